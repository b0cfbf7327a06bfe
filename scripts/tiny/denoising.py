"""The stages that train on latents: the transformer with its connectors, the upscaler, the LoRA for eight steps."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ltx_jax.checkpoint import Manifest
from ltx_jax.geometry import audio_latent_length
from ltx_jax.latents import Latents, save_latents
from ltx_jax.load import load_component
from ltx_jax.models.connector import TextConnectors
from ltx_jax.models.transformer import Transformer
from ltx_jax.models.upscaler import LatentUpscaler
from ltx_jax.progress import TerminalProgress
from ltx_jax.stages import encode_mel, encode_pixels
from ltx_jax.text import load_tokenizer, text_hidden_states, tokenize
from ltx_jax.training.adapters import adapters, add_adapters, write_adapters
from ltx_jax.training.data import Example, Examples, StatesRow, read_example
from ltx_jax.training.distillation import Distilled, DistilSettings, distillation_loss
from ltx_jax.training.flow import DenoisingModel, FlowSettings, flow_loss, start_quietly
from ltx_jax.training.loop import Schedule, Trainer
from ltx_jax.training.upscaling import LatentPairs, upscaler_loss
from scripts.tiny import clips, release, words, world
from scripts.tiny.stages import CONFIGS, FINAL, Run, Stage, muon, trained

LARGE = 10  # one clip of so many is kept at the second stage's size too
CLIPS_AT_ONCE = 8
Size = Literal["small", "large"]


@dataclass(frozen=True)
class EncodedWorld:
    """Training clips of the world as latents, encoded once and kept in `run.folder/latents`; one of four is upright."""

    run: Run

    def examples(self, size: Size) -> list[Example]:
        """The clips of one size, in order; the first of the small ones are the large ones, smaller."""
        count = self.run.num_clips if size == "small" else -(-self.run.num_clips // LARGE)
        toys = [world.sample("train", self.run.seed + 1, i) for i in range(count)]
        files = [self.run.folder / "latents" / size / f"{index:05d}.safetensors" for index in range(len(toys))]
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        groups = [[index for index in missing if _is_upright(index) == upright] for upright in (False, True)]
        parts = [group[i : i + CLIPS_AT_ONCE] for group in groups for i in range(0, len(group), CLIPS_AT_ONCE)]
        if parts:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            with TerminalProgress().stage(f"encode {size} clips", len(parts)) as advance:
                for part in parts:
                    self._encode([toys[i] for i in part], [files[i] for i in part], size, _is_upright(part[0]))
                    advance()
        return [read_example(file, CONFIGS, toy.paraphrase) for file, toy in zip(files, toys, strict=True)]

    def _encode(self, toys: list[world.Toy], files: list[Path], size: Size, upright: bool) -> None:
        width, height = (side * (2 if size == "large" else 1) for side in clips.size_of(upright=upright))
        pixels = np.stack([clips.pixels_of(toy, width=width, height=height) for toy in toys])
        sounds = np.stack([clips.sound_of(toy) for toy in toys])
        length = audio_latent_length(release.NUM_FRAMES, release.FPS, CONFIGS.audio_vae)
        video = encode_pixels(self._video_vae, pixels)
        audio = encode_mel(self._audio_vae, clips.mel_of(sounds, CONFIGS.audio_vae))[:, :length]
        for row, file in enumerate(files):
            latents = Latents(video=video[row : row + 1], audio=audio[row : row + 1])
            save_latents(file, latents, fps=release.FPS)

    @cached_property
    def _video_vae(self):
        return trained(self.run.folder, FINAL["video_vae"])

    @cached_property
    def _audio_vae(self):
        return trained(self.run.folder, FINAL["audio_vae"])


def _is_upright(index: int) -> bool:
    return index % 4 == 3


def read_captions(folder: Path, captions: Iterable[str]) -> dict[str, StatesRow]:
    """What the trained text encoder makes of captions, and of no text."""
    gemma = trained(folder, "language")
    words.write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    texts = sorted({"", *captions})
    rows = {}
    for start in range(0, len(texts), 64):
        chosen = texts[start : start + 64]
        chosen += [""] * (64 - len(chosen))
        token_ids, mask = tokenize(tokenizer, chosen)
        hidden = np.asarray(text_hidden_states(gemma, token_ids, mask, dtype=jnp.float32))
        rows |= {text: StatesRow(hidden[:, i], np.asarray(mask[i])) for i, text in enumerate(chosen)}
    return rows


def _batches(run: Run, batch_size: int, *, hard: bool = False) -> Examples:
    """Both sizes of clips, with what the text encoder makes of their captions.

    With `hard` what is learnt last comes more often: clicks, which must fall on a bounce, small stars, whose corners
    are a pixel, and what spins, a third of all then.
    """
    encoded = EncodedWorld(run)
    examples = [*encoded.examples("small"), *encoded.examples("large")]
    if hard:
        examples += 3 * [example for example in examples if "click" in example.caption]
        examples += [example for example in examples if "small" in example.caption and "star" in example.caption]
        examples += 4 * [example for example in examples if "spins" in example.caption]
    texts = read_captions(run.folder, (example.caption for example in examples))
    return Examples(examples, texts, CONFIGS, batch_size=batch_size, seed=run.seed)


def transformer(run: Run) -> Stage:
    """The diffusion transformer and its connectors."""
    model = DenoisingModel(
        Transformer(CONFIGS.transformer, rngs=nnx.Rngs(run.seed)),
        TextConnectors(CONFIGS.connectors, rngs=nnx.Rngs(run.seed + 1)),
    )
    start_quietly(model.transformer)
    schedule = Schedule(
        num_steps=run.num_steps, learning_rate=1e-2, adam_learning_rate=2e-3, optimizer="muon", warmup_steps=100,
        seed=run.seed, average_decay=0.998,
    )  # fmt: skip
    return Trainer(model, flow_loss(FlowSettings()), schedule), _batches(run, 32)


def transformer_fine(run: Run) -> Stage:
    """The same on, where what is hard comes more often."""
    model = DenoisingModel(
        trained(run.folder, "transformer", "transformer"), trained(run.folder, "transformer", "connectors")
    )
    schedule = Schedule(
        num_steps=run.num_steps, learning_rate=8e-3, adam_learning_rate=1.5e-3, optimizer="muon", warmup_steps=50,
        seed=run.seed + 1, average_decay=0.998, save_every=200,
    )  # fmt: skip
    batches = _batches(run, 32, hard=True)
    return Trainer(model, flow_loss(FlowSettings()), schedule), lambda step: batches(step + 10_000)


def upscaler(run: Run) -> Stage:
    """The latent upscaler by two, on clips that are kept at both sizes; one of three batches is upright.

    Raises ValueError for so few clips that none of the large ones is upright.
    """
    if run.num_clips <= 3 * LARGE:
        raise ValueError(f"of {run.num_clips} clips no large one is upright: take more than {3 * LARGE}")
    encoded = EncodedWorld(run)
    pairs = [
        (small.latents.video, large.latents.video)
        for small, large in zip(encoded.examples("small"), encoded.examples("large"), strict=False)
    ]
    groups = [[pair for i, pair in enumerate(pairs) if _is_upright(i) == upright] for upright in (False, True)]
    columns = [[np.concatenate(column) for column in zip(*group, strict=True)] for group in groups]

    def batches(step: int) -> LatentPairs:
        small, large = columns[step % 3 == 2]
        chosen = np.random.default_rng([run.seed, step]).integers(len(small), size=8)
        return LatentPairs(jnp.asarray(small[chosen]), jnp.asarray(large[chosen]))

    model = LatentUpscaler(CONFIGS.upscalers["upscaler_spatial_x2"], rngs=nnx.Rngs(run.seed))
    statistics = trained(run.folder, FINAL["video_vae"]).statistics
    return Trainer(model, upscaler_loss(statistics), muon(run.num_steps, run.seed)), batches


def distilled(run: Run) -> Stage:
    """A LoRA with which eight steps without guidance do what many guided ones do."""
    checkpoint = run.folder / "checkpoint"
    manifest = Manifest.read(checkpoint)
    teacher, student = (load_component(checkpoint, manifest, "transformer", dtype=jnp.float32) for _ in range(2))
    connectors = load_component(checkpoint, manifest, "connectors", dtype=jnp.float32)
    add_adapters(student, linear_names(manifest), rank=LORA_RANK, seed=run.seed)
    batches = _batches(run, 16, hard=True)
    none = batches.texts[""]
    assert isinstance(none, StatesRow)
    model = Distilled(
        DenoisingModel(student), DenoisingModel(teacher), connectors, jnp.asarray(none.hidden), jnp.asarray(none.mask)
    )
    settings = DistilSettings(video_cfg_scale=3.0, audio_cfg_scale=3.0)  # as guided clips are made and judged
    schedule = Schedule(
        num_steps=run.num_steps, learning_rate=2e-3, warmup_steps=30, seed=run.seed, average_decay=0.99, save_every=200
    )
    return Trainer(model, distillation_loss(settings), schedule, trainable=adapters), batches


LORA_RANK = 8


def linear_names(manifest: Manifest) -> dict[str, str]:
    """The linears of the transformer, by their published names."""
    return manifest.linears_below("model.diffusion_model.", "transformer")


def write_lora(path: Path, folder: Path, model: Distilled) -> None:
    """What distillation learnt, as a LoRA file."""
    names = linear_names(Manifest.read(folder / "checkpoint"))
    write_adapters(path, model.student.transformer, names, metadata={"rank": str(LORA_RANK)})
