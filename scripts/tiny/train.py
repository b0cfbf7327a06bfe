"""Trains one model of the miniature release after the other: `python -m scripts.tiny.train STAGE FOLDER`.

Each stage writes its run to `FOLDER/STAGE` (snapshots, `metrics.jsonl`) and goes on where it was stopped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from flax import nnx

from ltx_jax.config import VideoVAEConfig
from ltx_jax.models.video_vae import VideoVAE
from ltx_jax.progress import TerminalProgress
from ltx_jax.training.autoencoders import video_vae_loss
from ltx_jax.training.loop import Schedule, Trainer
from scripts.tiny import release, world


def frames_of(index: int, *, seed: int, num_frames: int, width: int, height: int) -> np.ndarray:
    """Consecutive frames of a training clip, from a random one on, as pixels in [-1, 1]."""
    toy = world.sample("train", seed, index)
    clip = world.render(toy, width=width, height=height, num_frames=release.NUM_FRAMES, fps=release.FPS)
    start = int(np.random.default_rng([seed, index]).integers(release.NUM_FRAMES - num_frames + 1))
    return clip[start : start + num_frames].astype(np.float32) / 127.5 - 1


def video_vae(seed: int, num_steps: int) -> tuple[Trainer, Callable[[int], np.ndarray]]:
    batch_size = 2

    def batches(step: int) -> np.ndarray:
        size = {"width": release.WIDTH, "height": release.HEIGHT}
        clips = range(step * batch_size, (step + 1) * batch_size)
        return np.stack([frames_of(index, seed=seed, num_frames=17, **size) for index in clips])

    model = VideoVAE(VideoVAEConfig.from_metadata(release.VAE), rngs=nnx.Rngs(seed))
    schedule = Schedule(num_steps=num_steps, learning_rate=2e-3, warmup_steps=200, seed=seed, average_decay=0.998)
    return Trainer(model, video_vae_loss, schedule), batches


STAGES: dict[str, tuple[Callable[..., tuple[Trainer, Callable[[int], np.ndarray]]], int]] = {
    "video-vae": (video_vae, 6000),
}


def main(
    stage: Annotated[str, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    seed: int = 0,
    steps: int | None = None,
) -> None:
    """Trains a stage of the miniature release, or goes on with it."""
    if stage not in STAGES:
        raise SystemExit(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    make, num_steps = STAGES[stage]
    trainer, batches = make(seed, steps or num_steps)
    trainer.train(batches, folder / stage, progress=TerminalProgress(), name=stage)


if __name__ == "__main__":
    tyro.cli(main)
