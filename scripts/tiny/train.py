"""Trains one model of the miniature release after the other: `python -m scripts.tiny.train STAGE FOLDER`.

Each stage writes its run to `FOLDER/STAGE` (snapshots, `metrics.jsonl`) and goes on where it was stopped.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from convert.official import read_official, write_parts
from ltx_jax.checkpoint import MODELS
from ltx_jax.geometry import audio_latent_length, patchify_audio
from ltx_jax.latents import Latents, save_latents
from ltx_jax.models.audio_vae import AudioVAE
from ltx_jax.models.connector import TextConnectors
from ltx_jax.models.gemma import Gemma
from ltx_jax.models.transformer import Transformer
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.models.vocoder import Vocoder
from ltx_jax.progress import TerminalProgress
from ltx_jax.stages import encode_mel, encode_pixels
from ltx_jax.text import load_tokenizer, text_hidden_states, tokenize
from ltx_jax.training.autoencoders import (
    audio_vae_loss,
    bandwidth_loss,
    learnt,
    measured_statistics,
    set_filters,
    start_smoothly,
    video_vae_loss,
    vocoder_loss,
)
from ltx_jax.training.data import Example, Examples, StatesRow, read_example
from ltx_jax.training.flow import DenoisingModel, FlowSettings, flow_loss, start_quietly
from ltx_jax.training.language import Texts, language_loss
from ltx_jax.training.loop import Schedule, Trainer
from scripts.tiny import clips, release, words, world

Stage = tuple[Trainer, Callable[[int], Any]]
CONFIGS = release.configs()
WEIGHTS = Path(__file__).parent / "weights"  # of finished stages


def _muon(num_steps: int, seed: int, *, learning_rate: float = 1e-2) -> Schedule:
    return Schedule(
        num_steps=num_steps, learning_rate=learning_rate, optimizer="muon", warmup_steps=50, seed=seed,
        average_decay=0.998,
    )  # fmt: skip


def _clips(step: int, seed: int) -> np.ndarray:
    """Four whole clips, upright ones every third step."""
    return np.stack([clips.clip_of(4 * step + i, seed=seed, upright=step % 3 == 2) for i in range(4)])


def video_vae(folder: Path, seed: int, num_steps: int) -> Stage:
    model = VideoVAE(CONFIGS.video_vae, rngs=nnx.Rngs(seed))
    start_smoothly(model)
    return Trainer(model, video_vae_loss, _muon(num_steps, seed)), lambda step: _clips(step, seed)


def video_vae_sharp(folder: Path, seed: int, num_steps: int) -> Stage:
    """The same on, with other clips, where edges count."""
    loss, before = partial(video_vae_loss, edge_weight=0.5), STAGES["video-vae"][1]
    schedule = _muon(num_steps, seed + 1, learning_rate=6e-3)
    return Trainer(trained(folder, "video-vae"), loss, schedule), lambda step: _clips(step + before, seed)


def audio_vae(folder: Path, seed: int, num_steps: int) -> Stage:
    def batches(step: int) -> jax.Array:
        return clips.mel_of(clips.sounds_of(range(4 * step, 4 * step + 4), seed=seed), CONFIGS.audio_vae)

    model: Any = AudioVAE(CONFIGS.audio_vae, rngs=nnx.Rngs(seed))
    # Logarithms of silence are far from zero, and a bias learns slowly.
    model.decoder.conv_out.bias.set_value(jnp.full(2, jnp.mean(batches(0))))
    return Trainer(model, audio_vae_loss, _muon(num_steps, seed)), batches


def vocoder(folder: Path, seed: int, num_steps: int) -> Stage:
    """The base generator, from spectrograms, half of which the audio autoencoder has seen before."""
    autoencoder = trained(folder, "audio-vae")
    frames, hop = 32, CONFIGS.audio_vae.hop_length

    @jax.jit
    def coded(mel: jax.Array) -> jax.Array:
        return autoencoder.decode(autoencoder.encode(mel))

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        waveform = clips.sounds_of(range(6 * step, 6 * step + 6), seed=seed)
        mel = clips.mel_of(waveform, CONFIGS.audio_vae)
        mels = [np.asarray(mel), np.asarray(coded(mel))]
        rng = np.random.default_rng([seed, step])
        pieces = []
        for i in range(len(waveform)):
            start = int(rng.integers(mels[1].shape[1] - frames))
            piece = slice(start, start + frames), slice(start * hop, (start + frames) * hop)
            pieces.append((mels[(i + step) % 2][i, piece[0]], waveform[i, piece[1]]))
        inputs, targets = zip(*pieces, strict=True)
        return np.stack(inputs), np.stack(targets)

    model = Vocoder(CONFIGS.vocoder, rngs=nnx.Rngs(seed))
    set_filters(model)
    # Logarithms of magnitudes are large, and make a loud noise of the first weights.
    model.base.conv_post.kernel.set_value(0.01 * model.base.conv_post.kernel[...])
    return Trainer(model, vocoder_loss, _muon(num_steps, seed), trainable=learnt("base")), batches


def bandwidth(folder: Path, seed: int, num_steps: int) -> Stage:
    """The generator of high frequencies, which only clicks have; it begins as none."""

    def batches(step: int) -> tuple[np.ndarray, np.ndarray]:
        indices = range(3 * step, 3 * step + 3)
        rates = CONFIGS.vocoder.input_sample_rate_hz, CONFIGS.vocoder.sample_rate_hz
        start = int(np.random.default_rng([seed, step]).integers(16)) * CONFIGS.vocoder.bwe_hop_length * 10
        low, high = (clips.sounds_of(indices, seed=seed, sample_rate_hz=rate) for rate in rates)
        ratio = rates[1] // rates[0]
        return low[:, start : start + 12800], high[:, start * ratio : (start + 12800) * ratio]

    model = trained(folder, "vocoder")
    model.bwe.conv_post.kernel.set_value(jnp.zeros_like(model.bwe.conv_post.kernel[...]))
    schedule = Schedule(num_steps=num_steps, learning_rate=1e-3, warmup_steps=50, seed=seed)
    return Trainer(model, bandwidth_loss, schedule, trainable=learnt("bwe")), batches


def language(folder: Path, seed: int, num_steps: int) -> Stage:
    """The text encoder, as a language model of captions."""
    words.write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")

    def batches(step: int) -> Texts:
        toys = [world.sample("train", seed, 32 * step + i) for i in range(32)]
        return Texts(*tokenize(tokenizer, [toy.paraphrase for toy in toys]))

    assert CONFIGS.gemma is not None
    schedule = Schedule(num_steps=num_steps, learning_rate=3e-3, seed=seed, average_decay=0.99)
    return Trainer(Gemma(CONFIGS.gemma, rngs=nnx.Rngs(seed)), language_loss, schedule), batches


NUM_CLIPS = 6000  # with latents kept, one of four upright
CLIPS_AT_ONCE = 8
STATISTICS_CLIPS = 240  # that statistics of latents are measured over


def encoded_world(folder: Path, seed: int) -> list[Example]:
    """Training clips of the world as latents, encoded once and kept in `folder/latents`."""
    files = [folder / "latents" / f"{index:05d}.safetensors" for index in range(NUM_CLIPS)]
    toys = [world.sample("train", seed + 1, index) for index in range(NUM_CLIPS)]
    missing = [index for index, file in enumerate(files) if not file.is_file()]
    groups = [[index for index in missing if _is_upright(index) == upright] for upright in (False, True)]
    parts = [group[i : i + CLIPS_AT_ONCE] for group in groups for i in range(0, len(group), CLIPS_AT_ONCE)]
    if parts:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        vae, audio_vae = trained(folder, "video-vae-sharp"), trained(folder, "audio-vae")
        length = audio_latent_length(release.NUM_FRAMES, release.FPS, CONFIGS.audio_vae)
        with TerminalProgress().stage("encode clips", len(parts)) as advance:
            for part in parts:
                width, height = clips.size_of(upright=_is_upright(part[0]))
                pixels = np.stack([clips.pixels_of(toys[i], width=width, height=height) for i in part])
                sounds = np.stack([clips.sound_of(toys[i]) for i in part])
                video = encode_pixels(vae, pixels)
                audio = encode_mel(audio_vae, clips.mel_of(sounds, CONFIGS.audio_vae))[:, :length]
                for row, index in enumerate(part):
                    latents = Latents(video=video[row : row + 1], audio=audio[row : row + 1])
                    save_latents(files[index], latents, fps=release.FPS)
                advance()
    return [read_example(file, CONFIGS, toy.paraphrase) for file, toy in zip(files, toys, strict=True)]


def _is_upright(index: int) -> bool:
    return index % 4 == 3


def set_statistics(model: VideoVAE | AudioVAE, seed: int) -> None:
    """Gives a trained autoencoder the mean and deviation of its latents over training clips, in place."""
    if isinstance(model, VideoVAE):
        pixels = ([clips.pixels_of(world.sample("train", seed, i), width=release.WIDTH, height=release.HEIGHT)]
                  for i in range(STATISTICS_CLIPS))  # fmt: skip
        encode = jax.jit(lambda encoder, x: encoder(x))
        latents = (np.asarray(encode(model.encoder, np.stack(clip))) for clip in pixels)
    else:
        encode = jax.jit(lambda encoder, x: patchify_audio(encoder(x)))
        sounds = (clips.sounds_of(range(i, i + 1), seed=seed) for i in range(STATISTICS_CLIPS))
        latents = (np.asarray(encode(model.encoder, clips.mel_of(sound, CONFIGS.audio_vae))) for sound in sounds)
    mean, std = measured_statistics(latents)
    model.statistics.mean.set_value(jnp.asarray(mean, jnp.float32))
    model.statistics.std.set_value(jnp.asarray(std, jnp.float32))


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


def transformer(folder: Path, seed: int, num_steps: int) -> Stage:
    """The diffusion transformer and its connectors, on latents that are kept."""
    examples = encoded_world(folder, seed)
    texts = read_captions(folder, (example.caption for example in examples))
    batches = Examples(examples, texts, CONFIGS, batch_size=32, seed=seed)
    model = DenoisingModel(
        Transformer(CONFIGS.transformer, rngs=nnx.Rngs(seed)),
        TextConnectors(CONFIGS.connectors, rngs=nnx.Rngs(seed + 1)),
    )
    start_quietly(model.transformer)
    schedule = Schedule(
        num_steps=num_steps, learning_rate=1e-2, adam_learning_rate=2e-3, optimizer="muon", warmup_steps=100, seed=seed,
        average_decay=0.999,
    )  # fmt: skip
    return Trainer(model, flow_loss(FlowSettings()), schedule), batches


STAGES: dict[str, tuple[Callable[[Path, int, int], Stage], int]] = {
    "video-vae": (video_vae, 5000),
    "video-vae-sharp": (video_vae_sharp, 4000),
    "audio-vae": (audio_vae, 2500),
    "vocoder": (vocoder, 3000),
    "bandwidth": (bandwidth, 300),
    "language": (language, 600),
    "transformer": (transformer, 8000),
}


# What each stage leaves, the transformer's beside the connectors.
COMPONENTS = {
    "video-vae": "video_vae",
    "video-vae-sharp": "video_vae",
    "audio-vae": "audio_vae",
    "vocoder": "vocoder",
    "bandwidth": "vocoder",
    "language": "gemma",
}
TOGETHER = ("transformer", "connectors")


def trained(folder: Path, stage: str) -> Any:
    """The model of a finished stage, of this run or else as it is kept here, in the precision that it is released in.

    Raises FileNotFoundError where there is none.
    """
    path = next((place / f"{stage}.safetensors" for place in (folder, WEIGHTS)
                 if (place / f"{stage}.safetensors").is_file()), None)  # fmt: skip
    if path is None:
        raise FileNotFoundError(
            f"{folder} has no {stage}.safetensors: run `python -m scripts.tiny.train {stage} {folder}` first"
        )
    component = COMPONENTS[stage]
    model = MODELS[component](CONFIGS.of(component), rngs=nnx.Rngs(0))
    read_official(path, component, model)
    return model


def main(
    stage: Annotated[str, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    seed: int = 0,
    steps: int | None = None,
) -> None:
    """Trains a stage of the miniature release, or goes on with it; what is finished is `FOLDER/STAGE.safetensors`."""
    if stage not in STAGES:
        raise SystemExit(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    make, num_steps = STAGES[stage]
    trainer, batches = make(folder, seed, steps or num_steps)
    trainer.train(batches, folder / stage, progress=TerminalProgress(), name=stage)
    model = trainer.model()
    if isinstance(model, VideoVAE | AudioVAE):
        set_statistics(model, seed)
    parts = {part: getattr(model, part) for part in TOGETHER} if stage == "transformer" else {COMPONENTS[stage]: model}
    write_parts(folder / f"{stage}.safetensors", parts)


if __name__ == "__main__":
    tyro.cli(main)
