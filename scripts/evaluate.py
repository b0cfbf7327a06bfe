"""Quality, judged by behaviour: what clips show and sound like against what was asked for.

python scripts/evaluate.py captions --checkpoint outputs/tiny --lora release/loras/... --output quality/q5.json
python scripts/evaluate.py compare --reference outputs/bf16 --against outputs/q5 outputs/q4 --prompts prompts.txt
python scripts/evaluate.py coding --checkpoint outputs/tiny
python scripts/evaluate.py clips FOLDER
python scripts/evaluate.py tables RUN/quality
python scripts/evaluate.py sheet sheet.png without.mp4 with.mp4

`captions` and `clips` measure what the little world makes exact, so they take its captions; `compare`, and `coding`
with --clips, take any checkpoint. Each prints a table and writes JSON. Nothing is judged by a model.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs without installation

import tyro

from generate import parse_lora
from ltx_jax.cache import written_whole
from ltx_jax.environment import prepare
from ltx_jax.media import write_png
from ltx_jax.pictures import sheet_of
from ltx_jax.pipeline import Pipeline, load_pipeline
from ltx_jax.progress import TerminalProgress
from ltx_jax.settings import Settings
from ltx_jax.several import read_prompts
from ltx_jax.video import read_video
from scripts.quality import captions, coding, tables
from scripts.quality.compare import compare
from scripts.tiny import release, world

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Making:
    """How clips are made."""

    lora: tuple[str, ...] = ()
    """LoRA files, as PATH or PATH:STRENGTH."""
    pipeline: Literal["distilled", "dev", "two-stage"] = "distilled"
    steps: int | None = None
    """Of the dev pipeline."""
    cfg_scale: float | None = None
    """Classifier-free guidance of both streams; given, it is all that guides."""

    def load(self, checkpoint: Path) -> Pipeline:
        return load_pipeline(checkpoint, loras=[parse_lora(word) for word in self.lora], keep_prompts=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What the pipeline is called with."""
        said: dict[str, Any] = {"pipeline": self.pipeline}
        if self.steps is not None:
            said["steps"] = self.steps
        if self.cfg_scale is not None:
            for stream in ("video", "audio"):
                said |= {f"{stream}_cfg_scale": self.cfg_scale, f"{stream}_stg_scale": 0.0}
                said |= {f"{stream}_modality_scale": 1.0, f"{stream}_rescale": 0.0}
        return said


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Makes a clip of every held-out caption of the little world and judges it."""

    checkpoint: Path
    """A converted checkpoint folder."""
    making: tyro.conf.OmitArgPrefixes[Making] = Making()
    split: Literal["test", "validation", "train"] = "test"
    count: int | None = None
    """Captions; all of the split without it."""
    seeds: int = 1
    """Clips of each caption, each from its own noise."""
    shapes: tuple[str, ...] = world.SHAPES
    """What captions are about; `heart` is what the released LoRA teaches."""
    upright: bool = False
    scale: int = 1
    """2 for clips of two stages."""
    upscale: bool = False
    """Twice the size by the latent upscaler, as scripts/demo makes clips."""
    image: bool = False
    """Image to video: clips begin with the first frame that the caption should have."""
    output: Path | None = None
    """JSON with every clip's verdict."""

    def run(self) -> None:
        pipe = self.making.load(self.checkpoint)
        toys = captions.held_out(self.split, self.count, shapes=self.shapes)
        with progress("judge clips", len(toys) * self.seeds) as advance:
            if self.image:
                rows, found = captions.continued(pipe, toys, advance, **self.making.settings)
            else:
                more = {"upscale": 2.0} if self.upscale else {}
                make = captions.maker(pipe, upright=self.upright, scale=self.scale, **self.making.settings, **more)
                found = captions.judged(make, toys, self.seeds, advance)
                rows = captions.summary(found)
        if self.seeds > 1:
            rows |= captions.stability(found)
        report(self.checkpoint.name, rows, self.output, clips=[each.row() for each in found])


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Judges clips that are there: clip.mp4 beside clip.txt, a caption of the little world."""

    folder: tyro.conf.Positional[Path]
    output: Path | None = None

    def run(self) -> None:
        found = list(captions.judged_files(self.folder))
        report(self.folder.name, captions.summary(found), self.output, clips=[each.row() for each in found])


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compares checkpoints of one model with the one that they were packed from, from the same noise."""

    reference: Path
    against: tuple[Path, ...]
    making: tyro.conf.OmitArgPrefixes[Making] = Making()
    prompts: Path | None = None
    """A file with a prompt a line; without it held-out captions of the little world."""
    count: int = 24
    """Prompts."""
    width: int = release.WIDTH
    height: int = release.HEIGHT
    num_frames: int = release.NUM_FRAMES
    fps: float = release.FPS
    sheet: Path | None = None
    """A picture of the first prompt's clips, one below the other (.png)."""
    output: Path | None = None

    def run(self) -> None:
        if self.prompts is None:
            prompts = [toy.caption for toy in captions.held_out("test", self.count)]
        else:
            prompts = [each.prompt for each in read_prompts(self.prompts, Settings())][: self.count]
        size = {"width": self.width, "height": self.height, "num_frames": self.num_frames, "fps": self.fps}
        requests = [
            {"prompt": prompt, "seed": seed, "negative_prompt": "", **size, **self.making.settings}
            for seed, prompt in enumerate(prompts)
        ]
        pipes = {path.name: self.making.load(path) for path in self.against}
        with progress("compare", len(requests)) as advance:
            found = compare(self.making.load(self.reference), pipes, requests, advance)
        report(f"against {self.reference.name}", found.rows, self.output)
        if self.sheet is not None:
            labels = [self.reference.name, *list(found.shown)[1:]]
            write_png(self.sheet, sheet_of([clip.frames for clip in found.shown.values()], labels, columns=8))


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What both autoencoders and the vocoder lose: clips coded and decoded, nothing generated."""

    checkpoint: Path
    clips: Path | None = None
    """A folder of clips with the vocoder's sample rate; without it held-out clips of the little world."""
    count: int = 60
    output: Path | None = None

    def run(self) -> None:
        pipe = load_pipeline(self.checkpoint)
        if self.clips is not None:
            folder, paths = self.clips, sorted(self.clips.glob("*.mp4"))
            with progress("code clips", len(paths)) as advance:
                return report(folder.name, coding.losses(pipe, coding.files(pipe, folder), advance), self.output)
        toys = captions.held_out("test", self.count)
        rows: dict[str, Row] = {}
        sizes: dict[str, dict[str, Any]] = {"64 x 48": {}, "48 x 64": {"upright": True}, "128 x 96": {"scale": 2}}
        with progress("code clips", len(toys) * len(sizes)) as advance:
            for name, size in sizes.items():
                drawn = (coding.drawn(toy, pipe.configs.vocoder.sample_rate_hz, **size) for toy in toys)
                rows[name] = coding.losses(pipe, drawn, advance, toys)
        report(self.checkpoint.name, rows, self.output)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Writes the tables of a page, such as docs/quality.md, from measurements; figures there are never typed."""

    folder: tyro.conf.Positional[Path]
    """Where scripts/tiny/evaluate.sh left them: RUN/quality."""
    page: Path = Path("docs/quality.md")

    def run(self) -> None:
        print(f"{self.page}: {', '.join(tables.fill(self.page, self.folder))}")


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Puts clips below each other in a picture, a row of evenly spaced frames each, for comparing."""

    picture: tyro.conf.Positional[Path]
    """The picture to write (.png)."""
    clips: tyro.conf.Positional[tuple[Path, ...]]
    """Clips of any model; each is labelled with its name."""
    columns: int = 8
    """Frames of each clip."""

    def run(self) -> None:
        shown = [read_video(path).frames for path in self.clips]
        labels = [path.stem.replace("-", " ") for path in self.clips]
        write_png(self.picture, sheet_of(shown, labels, columns=self.columns))
        print(f"wrote {self.picture}")


@contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Progress of many clips; what is said of each of them is not."""
    with warnings.catch_warnings(), TerminalProgress().stage(name, total) as advance:
        warnings.filterwarnings("ignore", message="sound of .* is resampled")
        yield advance


def report(name: str, rows: Row | Mapping[str, Row], output: Path | None, **more: Any) -> None:
    """Prints rows as a Markdown table, and writes them as JSON."""
    several: dict[str, Row] = {name: rows} if not all(isinstance(row, Mapping) for row in rows.values()) else dict(rows)
    columns = list(next(iter(several.values())))
    lines = [[name, *columns], ["---"] * (1 + len(columns))]
    lines += [[key, *(_number(row[column]) for column in columns)] for key, row in several.items()]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(output) as temporary:
            Path(temporary).write_text(json.dumps({"name": name, "rows": several, **more}, indent=1), encoding="utf-8")


def _number(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def main() -> None:
    """The command line: exits with 2 and one line where something is not as it must be."""
    commands = {
        "captions": Captions,
        "clips": Clips,
        "compare": Compare,
        "coding": Coding,
        "tables": Tables,
        "sheet": Sheet,
    }
    options: Any = tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    prepare()
    try:
        options.run()
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
