"""Clips of the little world as files: `python -m scripts.tiny.draw FOLDER --shapes heart --count 160`.

A folder of `clip.mp4` and `clip.txt`, as `finetune.py` reads it.
"""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from ltx_jax.media import write_mp4
from ltx_jax.progress import TerminalProgress
from scripts.tiny import clips, release, world

SAMPLE_RATE_HZ = 48000  # of the files' sound


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    *,
    shapes: tuple[str, ...] = world.SHAPES,
    split: Literal["train", "validation", "test"] = "train",
    count: int = 160,
    seed: int = 0,
    scale: int = 1,
    paraphrase: bool = True,
) -> None:
    """Draws clips and writes them with their captions. `scale` 2 is the size of a second stage.

    Half of the captions say the same in another way, which `evaluate.py clips` cannot read: `--no-paraphrase`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    width, height = (scale * side for side in clips.size_of(upright=False))
    with TerminalProgress().stage("draw clips", count) as advance:
        for index in range(count):
            toy = world.sample(split, seed, index, shapes=shapes)
            frames = world.render(toy, width=width, height=height, num_frames=release.NUM_FRAMES, fps=release.FPS)
            path = folder / f"{toy.shape}-{index:04d}.mp4"
            sound = clips.sound_of(toy, SAMPLE_RATE_HZ)
            write_mp4(path, frames, fps=release.FPS, waveform=sound, sample_rate_hz=SAMPLE_RATE_HZ)
            caption = toy.paraphrase if paraphrase else toy.caption
            path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
            advance()


if __name__ == "__main__":
    tyro.cli(main)
