"""Whether clips of the little world are what their captions say: made by a pipeline, or read from files."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ltx_jax.clip import Clip
from ltx_jax.media import read_video
from ltx_jax.pipeline import Pipeline
from scripts.quality.measures import ssim
from scripts.tiny import clips, release, world
from scripts.tiny.judge import Verdict, judge

WORDS = ("shape", "colour", "size", "motion", "background", "sound")
TRAVELLING = ("rightward", "leftward", "cross")  # motions that have a direction
Make = Callable[[world.Toy, int], Clip]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One clip: what was asked for, and what it is."""

    toy: world.Toy
    seed: int
    verdict: Verdict

    @classmethod
    def of(cls, clip: Clip, toy: world.Toy, *, seed: int) -> "Judged":
        """Judges a clip by what was asked for."""
        return cls(toy=toy, seed=seed, verdict=judge(clip.frames, clip.fps, clip.waveform, clip.sample_rate_hz, toy))

    def row(self) -> dict[str, Any]:
        """As JSON."""
        v = self.verdict
        words = {word: bool(getattr(v, word)) for word in WORDS}
        seen = {word: getattr(v.seen, word) for word in ("shape", "colour", "size", "motion", "background")}
        asked = dict(zip(world.GRAMMAR, self.toy.words, strict=True))
        return {
            "caption": self.toy.caption, "seed": self.seed, "asked": asked,
            "right": words, "found": {**seen, "sound": v.heard.sound, "chord": v.heard.chord}, "in_step": v.in_step,
            "offset_ms": v.offset_ms, "pitch_correlation": v.pitch_correlation,
            "pitch_error_semitones": v.pitch_error_semitones,
        }  # fmt: skip


def held_out(split: str, count: int | None, *, shapes: tuple[str, ...] = world.SHAPES) -> list[world.Toy]:
    """Toys of combinations that training has not seen: all of a split, or the first `count` of a shuffle."""
    total = len(world.combinations(split, shapes))
    return [world.sample(split, 0, i, shapes=shapes) for i in range(total if count is None else min(count, total))]


def maker(pipe: Pipeline, *, upright: bool = False, scale: int = 1, **settings: Any) -> Make:
    """Makes a toy's clip from its caption, at the little world's length and size, or `scale` times that."""
    width, height = clips.size_of(upright=upright)

    def make(toy: world.Toy, seed: int) -> Clip:
        return pipe(
            prompt=toy.caption, seed=seed, width=scale * width, height=scale * height, num_frames=release.NUM_FRAMES,
            fps=release.FPS, negative_prompt="", **settings,
        )  # fmt: skip

    return make


def judged(make: Make, toys: Sequence[world.Toy], seeds: int, advance: Callable[[], None]) -> list[Judged]:
    """Makes and judges a clip of every toy from `seeds` noises, which are every toy's own."""
    found = []
    for number, toy in enumerate(toys):
        for seed in range(number, number + seeds * len(toys), len(toys)):
            found.append(Judged.of(make(toy, seed), toy, seed=seed))
            advance()
    return found


def judged_files(folder: Path) -> Iterator[Judged]:
    """Clips of any model in files: `clip.mp4` beside `clip.txt`, a caption of the little world.

    Raises ValueError for a caption that is none of its, and where there are no clips.
    """
    paths = sorted(folder.glob("*.mp4"))
    if not paths:
        raise ValueError(f"{folder} holds no clips; expected clip.mp4 and clip.txt, its caption, for each of them")
    for path in paths:
        clip = read_video(path)
        toy = world.parse(path.with_suffix(".txt").read_text(encoding="utf-8"))
        sound = np.zeros((1, 2), np.float32) if clip.waveform is None else clip.waveform
        yield Judged(toy=toy, seed=0, verdict=judge(clip.frames, clip.fps, sound, clip.sample_rate_hz or 48000, toy))


def summary(found: Sequence[Judged]) -> dict[str, Any]:
    """Shares of clips that are right, word by word, and how well sound and picture are in step."""
    right = {word: _share(getattr(each.verdict, word) for each in found) for word in WORDS}
    travelling = [each.verdict.motion for each in found if each.toy.motion in TRAVELLING]
    offsets = [each.verdict.offset_ms for each in found if each.verdict.offset_ms is not None]
    correlations = [each.verdict.pitch_correlation for each in found if each.verdict.pitch_correlation is not None]
    return {
        "clips": len(found),
        **right,
        "direction": _share(travelling),
        "everything": _share(each.verdict.right for each in found),
        "in_step": _share(each.verdict.in_step for each in found if each.verdict.in_step is not None),
        "click_offset_ms": _median(np.abs(offsets)),
        "pitch_correlation": _median(correlations),
    }


def stability(found: Sequence[Judged]) -> dict[str, Any]:
    """Of captions made with several seeds: how many are right with all of them, with some, with none."""
    by_caption: dict[str, list[bool]] = {}
    for each in found:
        by_caption.setdefault(each.toy.caption, []).append(each.verdict.right)
    return {
        "captions": len(by_caption),
        "always": _share(all(rights) for rights in by_caption.values()),
        "never": _share(not any(rights) for rights in by_caption.values()),
    }


def continued(
    pipe: Pipeline, toys: Sequence[world.Toy], advance: Callable[[], None], **settings: Any
) -> tuple[dict[str, Any], list[Judged]]:
    """Image to video: whether clips keep what their first frame shows, and that frame itself."""
    width, height = clips.size_of(upright=False)
    similarity = []

    def make(toy: world.Toy, seed: int) -> Clip:
        first = world.render(toy, width=width, height=height, num_frames=release.NUM_FRAMES, fps=release.FPS)[0]
        # Clean frames of this size have no use for the round trip through H.264 that photographs get.
        clip = maker(pipe, image=first, image_crf=None, **settings)(toy, seed)
        similarity.append(ssim(clip.frames[:1], first[None]))
        return clip

    found = judged(make, toys, 1, advance)
    return {**summary(found), "first_frame_ssim": float(np.mean(similarity))}, found


def _share(values: Iterable[bool | None]) -> float:
    known = [bool(value) for value in values]
    return math.nan if not known else sum(known) / len(known)


def _median(values: Any) -> float:
    return float(np.median(values)) if len(values) else math.nan
