"""Clips and captions to train on: a plain folder of `clip.mp4` and `clip.txt`, encoded once and kept.

engine = Engine(checkpoint)
examples = encode_folder(engine, Path("clips"), Path("cache"), width=512, height=320, num_frames=49)
batches = Examples(examples, contexts_of(engine, examples, Path("cache")), engine.configs, batch_size=4)
trainer.train(batches, Path("run"))
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from safetensors.numpy import load_file, save_file

from ltx_jax.cache import digest, written_whole
from ltx_jax.checkpoint import Configs
from ltx_jax.engine import Engine
from ltx_jax.geometry import (
    audio_latent_length,
    audio_positions,
    patchify_audio,
    patchify_video,
    video_positions,
)
from ltx_jax.latents import Latents, latents_size, read_latents, save_latents
from ltx_jax.models.connector import Contexts
from ltx_jax.record import read_record, sha256
from ltx_jax.training.flow import FlowBatch, TextStates
from ltx_jax.video import read_video

# The text encoder's states of one caption are 0.4 GB in LTX-2.3, and wait for the connectors to be read.
_CAPTIONS_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Example:
    """One clip as normalised latents, and what is said of it."""

    latents: Latents
    fps: float
    caption: str


class ContextRow(NamedTuple):
    """One caption as the transformer reads it."""

    video: Float[np.ndarray, "keys video_dim"]
    audio: Float[np.ndarray, "keys audio_dim"]


class StatesRow(NamedTuple):
    """One caption as the text encoder leaves it."""

    hidden: Float[np.ndarray, "states tokens hidden"]
    mask: Bool[np.ndarray, " tokens"]


def captioned_clips(folder: Path) -> list[tuple[Path, str]]:
    """The clips of a folder, by name, with their captions; of clips that `generate.py` made, its .json has the prompt.

    Raises ValueError, listing them, for clips without a caption and captions without a clip, and where there are none.
    """
    clips = {path.stem: path for path in sorted(folder.glob("*.mp4"))}
    captions = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))}
    for stem, clip in clips.items():
        if stem not in captions and clip.with_suffix(".json").is_file():
            captions[stem] = read_record(clip.with_suffix(".json"))["settings"]["prompt"]
    if not clips:
        raise ValueError(f"{folder} holds no clips; expected clip.mp4 and clip.txt, the caption, for each of them")
    lonely = [f"{clips[stem].name} (no {stem}.txt)" for stem in clips if stem not in captions]
    lonely += [f"{stem}.txt (no {stem}.mp4)" for stem in captions if stem not in clips]
    if lonely:
        raise ValueError(f"{folder}: every clip needs a caption of its name; without partner: {', '.join(lonely[:8])}")
    return [(clips[stem], captions[stem]) for stem in clips]


def encode_folder(
    engine: Engine, folder: Path, cache: Path, *, width: int, height: int, num_frames: int, fps: float | None = None
) -> list[Example]:
    """The clips of a folder as latents: the first `num_frames` of each, scaled to cover the size and cut to its centre.

    What has been encoded before, of the same file by the same checkpoint at the same size, is read from `cache`.
    Clips that are too short are left out, with a warning. Raises ValueError as `captioned_clips` does, and where no
    clip is long enough.
    """
    found, short = [], []
    clips = captioned_clips(folder)
    with engine.progress.stage("encode clips", len(clips)) as advance:
        for path, caption in clips:
            key = digest(sha256(path), _checkpoint_key(engine), width, height, num_frames, fps)
            kept = cache / f"{path.stem}-{key[:16]}.safetensors"
            if not kept.is_file():
                clip = read_video(path, fps=fps, num_frames=num_frames)
                if len(clip.frames) < num_frames:
                    short.append(f"{path.name} ({len(clip.frames)})")
                    advance()
                    continue
                cache.mkdir(parents=True, exist_ok=True)
                length = audio_latent_length(num_frames, clip.fps, engine.configs.audio_vae)
                waveform = np.zeros((1, 2), np.float32) if clip.waveform is None else clip.waveform
                rate = clip.sample_rate_hz or engine.configs.audio_vae.sample_rate_hz
                latents = Latents(
                    video=engine.encode_video(clip.frames, height=height, width=width),
                    audio=engine.encode_audio(waveform, rate, num_latents=length, seconds=num_frames / clip.fps),
                )
                save_latents(kept, latents, fps=clip.fps)
            found.append(read_example(kept, engine.configs, caption))
            advance()
    if short:
        message = f"{len(short)} of {len(clips)} clips have fewer than {num_frames} frames: {', '.join(short[:8])}"
        if not found:
            raise ValueError(f"{folder}: {message}; ask for fewer frames")
        warnings.warn(f"{message}; they are left out", stacklevel=2)
    return found


def read_example(path: Path, configs: Configs, caption: str) -> Example:
    """An example from its file of latents. Raises ValueError as `read_latents` does."""
    grid = latents_size(path, configs.video_vae.scale, fps=None)
    return Example(latents=read_latents(path, configs), fps=grid.fps, caption=caption)


def contexts_of(engine: Engine, examples: Iterable[Example], cache: Path) -> dict[str, ContextRow]:
    """The contexts of all captions, and of no text, which trains guidance; known ones are read from `cache`."""
    captions = sorted({"", *(example.caption for example in examples)})
    paths = {text: cache / f"text-{digest(text, _checkpoint_key(engine))[:16]}.safetensors" for text in captions}
    new = [text for text in captions if not paths[text].is_file()]
    cache.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(new), _CAPTIONS_AT_ONCE):
        some = new[start : start + _CAPTIONS_AT_ONCE]
        for text, prompt in zip(some, engine.encode_prompts(some), strict=True):
            with written_whole(paths[text]) as temporary:
                arrays = {"video": np.asarray(prompt.video[0]), "audio": np.asarray(prompt.audio[0])}
                save_file(arrays, str(temporary))
    return {text: ContextRow(**load_file(path)) for text, path in paths.items()}


def _checkpoint_key(engine: Engine) -> str:
    sources = engine.manifest.provenance.get("sources") or {}
    return digest(sorted(source["sha256"] for source in sources.values()), str(engine.dtype))


class Examples:
    """Batches of clips of one size, each a function of the number of its step.

    Text is `ContextRow`s, or `StatesRow`s where connectors are trained too; that of "" stands for captions that are
    left out.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        texts: Mapping[str, ContextRow] | Mapping[str, StatesRow],
        configs: Configs,
        *,
        batch_size: int,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ):
        """`batch_size` is that of the smallest clips; of larger ones a batch holds fewer, about as many tokens.

        Raises ValueError for no examples, and for captions that `texts` does not have.
        """
        if not examples:
            raise ValueError("there are no examples to train on")
        missing = [text for text in {"", *(example.caption for example in examples)} if text not in texts]
        if missing:
            raise ValueError(f"{len(missing)} captions have not been read by the text encoder, such as {missing[0]!r}")
        self.texts = texts
        self.configs = configs
        self.caption_dropout = caption_dropout
        self.seed = seed
        groups = defaultdict(list)
        for example in examples:
            groups[example.latents.video.shape, example.latents.audio.shape, example.fps].append(example)
        self.groups = [_Group.of(members, configs) for members in groups.values()]
        tokens = np.array([group.video.shape[1] for group in self.groups])
        self.batch_sizes = np.maximum(batch_size * tokens.min() // tokens, 1)
        # Every clip is as likely to be seen as any other.
        batches = np.array([len(group.captions) for group in self.groups]) / self.batch_sizes
        self.shares = batches / batches.sum()

    def __call__(self, step: int) -> FlowBatch:
        """The batch of a step."""
        rng = np.random.default_rng([self.seed, step])
        number = rng.choice(len(self.groups), p=self.shares)
        group, size = self.groups[number], int(self.batch_sizes[number])
        chosen = rng.integers(len(group.captions), size=size)
        dropped = rng.random(size) < self.caption_dropout
        rows = [self.texts["" if drop else group.captions[i]] for i, drop in zip(chosen, dropped, strict=True)]
        columns = [jnp.asarray(np.stack(column)) for column in zip(*rows, strict=True)]
        text = TextStates(*columns) if isinstance(rows[0], StatesRow) else Contexts(*columns)
        return FlowBatch(
            video=jnp.asarray(group.video[chosen]),
            audio=jnp.asarray(group.audio[chosen]),
            video_positions=jnp.repeat(group.video_positions, size, axis=0),
            audio_positions=jnp.repeat(group.audio_positions, size, axis=0),
            text=text,
        )


class _Group(NamedTuple):
    """Examples of one size."""

    video: Float[np.ndarray, "clips tokens channels"]
    audio: Float[np.ndarray, "clips audio_tokens audio_channels"]
    video_positions: Float[Array, "1 tokens 3 2"]
    audio_positions: Float[Array, "1 audio_tokens 1 2"]
    captions: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], configs: Configs) -> "_Group":
        first = examples[0]
        _, frames, height, width, _ = first.latents.video.shape
        positions = video_positions((frames, height, width), fps=first.fps, scale=configs.video_vae.scale)
        return cls(
            video=np.concatenate([np.asarray(patchify_video(example.latents.video)) for example in examples]),
            audio=np.concatenate([np.asarray(patchify_audio(example.latents.audio)) for example in examples]),
            video_positions=positions,
            audio_positions=audio_positions(first.latents.audio.shape[1], configs.audio_vae),
            captions=tuple(example.caption for example in examples),
        )
