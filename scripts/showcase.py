"""Clips of several prompts in one animation, each under its prompt: what the README shows.

python scripts/showcase.py --checkpoint outputs/ltx-2.3-tiny --prompts prompts.txt --output docs/showcase.gif \\
    --lora LORA.safetensors --width 64 --height 48 --num-frames 33 --fps 16 --upscale 2
"""

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from generate import parse_lora
from ltx_jax.cache import written_whole
from ltx_jax.clip import Clip
from ltx_jax.environment import prepare
from ltx_jax.media import write_mp4
from ltx_jax.pipeline import load_pipeline
from ltx_jax.progress import TerminalProgress
from ltx_jax.settings import Settings
from ltx_jax.several import read_prompts

COLUMNS, GAP, LINES, LINE_HEIGHT = 3, 6, 3, 11
INK, PAPER = (40, 40, 40), (250, 250, 248)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Makes a clip of each prompt and puts all of them into one animation."""

    checkpoint: Path
    prompts: Path
    """A prompt a line, or JSON as `generate.py --prompts` takes it."""
    output: Path
    """The animation, .gif. `--clips` keeps the clips themselves, with sound."""
    clips: Path | None = None
    lora: tuple[str, ...] = ()
    width: int
    height: int
    num_frames: int
    fps: float
    upscale: float | None = None
    seed: int = 0
    zoom: int = 2
    """Pixels of the animation for each of a clip's."""


def main(options: Arguments) -> None:
    """Writes the animation."""
    prepare()
    base = Settings(
        width=options.width, height=options.height, num_frames=options.num_frames, fps=options.fps,
        upscale=options.upscale, seed=options.seed,
    )  # fmt: skip
    loras = [parse_lora(word) for word in options.lora]
    pipe = load_pipeline(options.checkpoint, loras=loras, keep_prompts=False)
    wanted = read_prompts(options.prompts, base)
    made: list[tuple[str, Clip]] = []
    with TerminalProgress().stage("make clips", len(wanted)) as advance:
        for settings in wanted:
            [(positive, negative)] = pipe.contexts_of([settings])
            latents = pipe.generate_latents(settings, prompt=positive, negative=negative)
            made.append((settings.prompt, pipe.decode(latents, settings=settings)))
            advance()
    if options.clips is not None:
        options.clips.mkdir(parents=True, exist_ok=True)
        for number, (prompt, clip) in enumerate(made):
            path = options.clips / f"{number:02d}.mp4"
            write_mp4(path, clip.frames, fps=clip.fps, waveform=clip.waveform, sample_rate_hz=clip.sample_rate_hz)
            path.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
    write_animation(options.output, made, zoom=options.zoom)


def write_animation(path: Path, clips: list[tuple[str, Clip]], *, zoom: int) -> None:
    """All clips side by side, played together, over and over; written whole or not at all."""
    _, height, width, _ = clips[0][1].frames.shape
    cell_width, cell_height = width * zoom + GAP, height * zoom + GAP + LINES * LINE_HEIGHT
    rows = -(-len(clips) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * cell_width + GAP, rows * cell_height + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for number, (prompt, _) in enumerate(clips):
        x, y = GAP + number % COLUMNS * cell_width, GAP + number // COLUMNS * cell_height
        for line, text in enumerate(textwrap.wrap(prompt, cell_width // 5)[:LINES]):
            draw.text((x, y + height * zoom + 1 + line * LINE_HEIGHT), text, INK, font)
    frames = []
    for index in range(len(clips[0][1].frames)):
        frame = sheet.copy()
        for number, (_, clip) in enumerate(clips):
            place = GAP + number % COLUMNS * cell_width, GAP + number // COLUMNS * cell_height
            shown = Image.fromarray(np.asarray(clip.frames[index]))
            frame.paste(shown.resize((width * zoom, height * zoom), Image.Resampling.BICUBIC), place)
        frames.append(frame.quantize(64, dither=Image.Dither.NONE))
    with written_whole(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=1000 / clips[0][1].fps, loop=0
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
