"""What the autoencoders and the vocoder lose of clips: coded and decoded, nothing generated in between."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltx_jax.clip import Clip
from ltx_jax.engine import Engine
from ltx_jax.geometry import audio_latent_length
from ltx_jax.latents import Latents
from ltx_jax.media import read_video
from scripts.quality.captions import Judged, summary
from scripts.quality.measures import mel_distance_db, psnr_db, ssim
from scripts.tiny import clips, release, world


def recoded(engine: Engine, clip: Clip) -> Clip:
    """A clip through both autoencoders and the vocoder, at its own size: 8k + 1 frames, sides that latents divide."""
    num_frames, height, width, _ = clip.frames.shape
    seconds = num_frames / clip.fps
    length = audio_latent_length(num_frames, clip.fps, engine.configs.audio_vae)
    latents = Latents(
        video=engine.encode_video(clip.frames, height=height, width=width),
        audio=engine.encode_audio(clip.waveform, clip.sample_rate_hz, num_latents=length, seconds=seconds),
    )
    rate = engine.configs.vocoder.sample_rate_hz
    waveform = engine.decode_audio(latents.audio)
    return Clip(
        frames=engine.frames(latents), fps=clip.fps, waveform=waveform, sample_rate_hz=rate, latents=latents
    )  # fmt: skip


def drawn(toy: world.Toy, sample_rate_hz: int, *, upright: bool = False, scale: int = 1) -> Clip:
    """A clip of the little world as it is meant to be."""
    width, height = (scale * side for side in clips.size_of(upright=upright))
    frames = world.render(toy, width=width, height=height, num_frames=release.NUM_FRAMES, fps=release.FPS)
    return Clip(
        frames=frames, fps=release.FPS, waveform=clips.sound_of(toy, sample_rate_hz), sample_rate_hz=sample_rate_hz,
        latents=None,
    )  # fmt: skip


def files(engine: Engine, folder: Path) -> Iterator[Clip]:
    """The clips of a folder, cut to what the autoencoder takes: for any model, without captions."""
    time, rows, columns = engine.configs.video_vae.scale
    for path in sorted(folder.glob("*.mp4")):
        video = read_video(path)
        count, height, width, _ = video.frames.shape
        frames = video.frames[: (count - 1) // time * time + 1, : height // rows * rows, : width // columns * columns]
        sound = (
            np.zeros((round(count / video.fps * 48000), 2), np.float32) if video.waveform is None else video.waveform
        )
        yield Clip(
            frames=frames, fps=video.fps, waveform=sound, sample_rate_hz=video.sample_rate_hz or 48000, latents=None
        )


def losses(
    engine: Engine, originals: Iterable[Clip], advance: Callable[[], None], toys: Sequence[world.Toy] = ()
) -> dict[str, Any]:
    """Mean distances of clips from what is coded and decoded of them.

    With the `toys` that the clips were drawn from, also how much of what their captions say survives: what no
    transformer can do better than. Raises ValueError for no clips, and for sound at another rate than the vocoder's.
    """
    rows, found = [], []
    for number, clip in enumerate(originals):
        made = recoded(engine, clip)
        rate = made.sample_rate_hz
        if clip.sample_rate_hz != rate:
            raise ValueError(f"clips to code have the vocoder's {rate} Hz; got {clip.sample_rate_hz}")
        rows.append(
            {
                "PSNR dB": psnr_db(made.frames, clip.frames),
                "SSIM": ssim(made.frames, clip.frames),
                "mel dB": mel_distance_db(made.waveform, clip.waveform, rate, engine.configs.audio_vae),
            }
        )
        if toys:
            found.append(Judged.of(made, toys[number], seed=0))
        advance()
    if not rows:
        raise ValueError("there are no clips to code; give a folder of .mp4 files")
    means = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    return {**means, **summary(found)} if found else means
