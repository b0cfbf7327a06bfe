"""A little world of moving shapes with captions and sound: clips drawn from a grammar, the same for the same seed.

    toy = sample("train", seed=0, index=7)
    toy.caption                                     "a large red star bounces on a grey background, with a click at ..."
    render(toy, width=128, height=96, num_frames=25, fps=24.0)
    sound(toy, seconds=25 / 24.0, sample_rate_hz=16000)

What a caption says can be measured in the clip (`judge`): shape, colour, size, motion, background and the kind of
sound. What it leaves open varies with the toy's seed: where and when a motion starts, its pace, and slightly radius and
tint. Picture and sound read the same `poses` and `contacts`, so they are in step exactly.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from scripts.tiny.shapes import NEW_SHAPE, SHAPES, extents, outline, signed_distance

Frames = UInt8[np.ndarray, "frames height width 3"]
Waveform = Float32[np.ndarray, "samples 2"]
Times = Float[np.ndarray, " times"]  # seconds

COLOURS = {
    "red": (228, 56, 52),
    "green": (62, 186, 92),
    "blue": (58, 122, 244),
    "yellow": (250, 208, 62),
    "white": (242, 242, 238),
    "purple": (166, 84, 214),
}
BACKGROUNDS = {"black": (16, 16, 20), "grey": (108, 110, 116), "navy": (24, 32, 84), "brown": (88, 58, 38)}
SIZES = {"small": 0.19, "large": 0.27}  # radius of a disc of the same area, as a share of the picture's shorter side
MOTIONS = {
    "rightward": "moves left to right",
    "leftward": "moves right to left",
    "bounce": "bounces",  # straight up and down, off the lower edge
    "grow": "grows",  # to the size the caption names
    "spin": "spins",  # clockwise; nobody can see a circle spin, so none does
    "cross": "crosses from bottom left to top right",
}
SOUNDS = {
    "tone": "a tone that follows its height",
    "click": "a click at each bounce",  # of what bounces, and of nothing else
    "chord": "a chord for its colour",
}
SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}  # tenths of all combinations

CAPTION = "a {size} {colour} {shape} {motion} on a {background} background, with {sound}"
PARAPHRASES = (
    "on a {background} background a {size} {colour} {shape} {motion}, with {sound}",
    "a {colour} {shape}, {size}, {motion}; {background} background; {sound}",
    "we hear {sound} while a {size} {colour} {shape} {motion} on {background}",
)

# Roots in Hz. All partials are multiples of 50 Hz: of a spectrogram that does not change a vocoder makes nothing but
# multiples of its frame rate, as it does the same for every frame.
CHORDS = {"red": 200.0, "green": 300.0, "blue": 400.0, "yellow": 500.0, "white": 600.0, "purple": 700.0}
PARTIALS = (1.0, 3 / 2, 5 / 2)  # root, fifth, and third an octave up
LOWEST_HZ, OCTAVES = 300.0, 2.0  # of the tone, from the lower edge to the upper

MARGIN = 0.04  # that the picture's edges keep free, as a share of its shorter side
_CLICK_SECONDS, _CLICK_DECAY, _CLICK_LEVEL = 0.05, 0.01, 0.7
_TONE_LEVEL, _CHORD_LEVEL = 0.3, 0.14  # of one partial
_FADE_SECONDS = 0.02  # of tones and chords at the ends of a clip, which would click otherwise


@dataclass(frozen=True, kw_only=True)
class Toy:
    """One clip of the little world: what its caption says, and the seed of all that it leaves open.

    Raises ValueError for a word that the world does not have, a circle that spins and a click without a bounce.
    """

    shape: str
    colour: str
    size: str
    motion: str
    background: str
    sound: str
    seed: int = 0

    def __post_init__(self) -> None:
        for name, words in GRAMMAR.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}; got {getattr(self, name)!r}")
        if not is_possible(*self.words):
            raise ValueError(
                f"a {self.shape} that {MOTIONS[self.motion]} with {SOUNDS[self.sound]} is not of this world: circles "
                "do not spin, and only what bounces clicks"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """The combination that a caption names, in the order of `GRAMMAR`."""
        return tuple(getattr(self, name) for name in GRAMMAR)

    @property
    def caption(self) -> str:
        """The one caption that `parse` reads."""
        return self._say(CAPTION)

    @property
    def paraphrase(self) -> str:
        """A caption to train on: of every two toys one has its canonical caption, the other says it in another way."""
        return self._say((CAPTION, *PARAPHRASES)[max(0, self.seed % (2 * len(PARAPHRASES)) - len(PARAPHRASES) + 1)])

    def _say(self, template: str) -> str:
        spoken = {"motion": MOTIONS[self.motion], "sound": SOUNDS[self.sound]}
        return template.format(**dict(zip(GRAMMAR, self.words, strict=True)) | spoken)

    @property
    def variation(self) -> "Variation":
        """What the caption leaves open. The seed alone decides it: toys of one seed differ in their words only."""
        return Variation(*np.random.default_rng(self.seed).uniform(-1, 1, len(Variation._fields)).tolist())


class Variation(NamedTuple):
    """What a caption leaves open, each value uniform in [-1, 1]."""

    across: float  # where motions start, or stay
    height: float
    start: float
    end: float
    pace: float
    phase: float
    radius: float
    red: float
    green: float
    blue: float


class Poses(NamedTuple):
    """Where a shape is at some times. Free is what its whole motion leaves of the picture inside of the margins."""

    across: Times  # the share of the free width that lies left of it
    height: Times  # the share of the free height that lies below it
    scale: Times  # its radius, as a share of what it is at most
    angle: Times  # radians clockwise


GRAMMAR: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, NEW_SHAPE),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "motion": tuple(MOTIONS),
    "background": tuple(BACKGROUNDS),
    "sound": tuple(SOUNDS),
}


def is_possible(shape: str, colour: str, size: str, motion: str, background: str, sound: str) -> bool:
    """Whether the world has clips of this combination."""
    return not (shape == "circle" and motion == "spin") and not (sound == "click" and motion != "bounce")


# ---------------------------------------------------------------------- captions and splits


def parse(caption: str) -> Toy:
    """The toy that a canonical caption names, of seed 0. Raises ValueError for any other text."""
    spoken = {name: {word: word for word in words} for name, words in GRAMMAR.items()}
    spoken["motion"], spoken["sound"] = MOTIONS, SOUNDS
    patterns = {name: f"(?P<{name}>{'|'.join(map(re.escape, said.values()))})" for name, said in spoken.items()}
    found = re.fullmatch(CAPTION.format(**patterns), " ".join(caption.lower().split()).rstrip("."))
    if found is None:
        example = CAPTION.format(**{name: next(iter(said.values())) for name, said in spoken.items()})
        told = "; ".join(f"{name}: {', '.join(said.values())}" for name, said in spoken.items())
        raise ValueError(f"{caption!r} is not a caption of the little world, such as {example!r}. Words: {told}")
    return _toy([next(key for key in said if said[key] == found[name]) for name, said in spoken.items()], seed=0)


def _toy(words: Sequence[str], *, seed: int) -> Toy:
    shape, colour, size, motion, background, sound = words
    return Toy(
        shape=shape, colour=colour, size=size, motion=motion, background=background, sound=sound, seed=seed
    )  # fmt: skip


@cache
def combinations(split: str, shapes: tuple[str, ...] = SHAPES) -> tuple[tuple[str, ...], ...]:
    """All combinations of a split, as words in the order of `GRAMMAR`, of some shapes.

    A digest of the words decides to which split a combination belongs, so other shapes, such as `(NEW_SHAPE,)`, move
    none to another split. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    every = itertools.product(shapes, *list(GRAMMAR.values())[1:])
    return tuple(words for words in every if is_possible(*words) and _tenth(words) in SPLITS[split])


def _tenth(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:4]) % 10


def sample(split: str, seed: int, index: int, *, shapes: tuple[str, ...] = SHAPES) -> Toy:
    """The toy at `index` >= 0 of an endless shuffled sequence, in which every combination comes once a round."""
    every = combinations(split, shapes)
    turn, place = divmod(index, len(every))
    order = np.random.default_rng([seed, list(SPLITS).index(split), turn]).permutation(len(every))
    own_seed = np.random.SeedSequence([seed, list(SPLITS).index(split), index]).generate_state(1)[0]
    return _toy(every[order[place]], seed=int(own_seed))


# ---------------------------------------------------------------------- motion


def poses(toy: Toy, times: Times, *, seconds: float) -> Poses:
    """Where the shape is at `times` of a clip of `seconds`. What travels or grows takes the whole clip for it."""
    vary = toy.variation
    progress = times / seconds
    across, height = np.full_like(times, 0.5 + 0.25 * vary.across), np.full_like(times, 0.5 + 0.25 * vary.height)
    scale, angle = np.ones_like(times), np.zeros_like(times)
    start, end = 0.08 + 0.08 * vary.start, 0.92 + 0.08 * vary.end
    match toy.motion:
        case "rightward":
            across = start + (end - start) * progress
        case "leftward":
            across = end + (start - end) * progress
        case "cross":
            across = height = start + (end - start) * progress
        case "bounce":
            since = (times - _first_contact(toy)) / _period(toy)
            height = (0.85 + 0.1 * vary.height) * (1 - (2 * (since % 1) - 1) ** 2)
        case "grow":
            scale = 0.45 + 0.05 * vary.start + (0.55 - 0.05 * vary.start) * progress
        case "spin":
            angle = 2 * np.pi * ((0.2 + 0.02 * vary.pace) * times + 0.02 * vary.phase)  # from upright
    return Poses(across, height, scale, angle)


def contacts(toy: Toy, *, seconds: float) -> Times:
    """When the shape of a clip of `seconds` touches the ground; none for what does not bounce."""
    if toy.motion != "bounce":
        return np.zeros(0)
    first = _first_contact(toy) % _period(toy)
    return np.arange(first, seconds, _period(toy))


def _period(toy: Toy) -> float:
    """Seconds from one bounce to the next: every clip of one second shows one at least."""
    return 0.7 + 0.1 * toy.variation.pace


def _first_contact(toy: Toy) -> float:
    return 0.4 + 0.25 * toy.variation.phase


# ---------------------------------------------------------------------- picture


def render(toy: Toy, *, width: int, height: int, num_frames: int, fps: float) -> Frames:
    """The picture of a clip of `num_frames / fps` seconds, of any size; frame i shows the time `i / fps`."""
    picture = min(width, height)
    radius = SIZES[toy.size] * (1 + 0.05 * toy.variation.radius) * picture
    pose = poses(toy, np.arange(num_frames) / fps, seconds=num_frames / fps)
    # What spins needs room for its farthest corner on all sides.
    reach = (float(outline(toy.shape).max()),) * 4 if toy.motion == "spin" else extents(toy.shape)
    left, right, up, down = (MARGIN * picture + side * radius for side in reach)
    centre_x = left + pose.across * (width - left - right)
    centre_y = height - down - pose.height * (height - up - down)

    backdrop = _backdrop(toy, width, height)
    frames = np.repeat(np.round(backdrop).astype(np.uint8)[None], num_frames, axis=0)
    box = float(outline(toy.shape).max()) * radius + 2
    for i in range(num_frames):
        rows = slice(max(0, math.floor(centre_y[i] - box)), max(0, math.ceil(centre_y[i] + box)))
        columns = slice(max(0, math.floor(centre_x[i] - box)), max(0, math.ceil(centre_x[i] + box)))
        behind = backdrop[rows, columns]
        y, x = np.ogrid[rows.start : rows.start + behind.shape[0], columns.start : columns.start + behind.shape[1]]
        x, y = (x + 0.5 - centre_x[i]) / radius, (y + 0.5 - centre_y[i]) / radius
        frames[i, rows, columns] = np.round(_painted(toy, behind, x, y, pose.scale[i], pose.angle[i], 1 / radius))
    return frames


def _backdrop(toy: Toy, width: int, height: int) -> Float[np.ndarray, "height width 3"]:
    """The background, a little lighter at the top than at the bottom."""
    light = np.linspace(1.1, 0.9, height)[:, None, None]
    return np.broadcast_to(np.array(BACKGROUNDS[toy.background]) * light, (height, width, 3))


def _painted(
    toy: Toy,
    behind: Float[np.ndarray, "rows columns 3"],
    x: Float[np.ndarray, "1 columns"],
    y: Float[np.ndarray, "rows 1"],
    scale: float,
    angle: float,
    pixel: float,
) -> Float[np.ndarray, "rows columns 3"]:
    """A piece of the picture with the shape on it; lengths in radii of the shape at its largest."""
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    distance = signed_distance(toy.shape, x * cos + y * sin, y * cos - x * sin) * scale
    cover = np.clip(0.5 - distance / pixel, 0, 1)[..., None]  # antialiased over one pixel
    vary = toy.variation
    tint = np.array(COLOURS[toy.colour]) + 8 * np.array([vary.red, vary.green, vary.blue])
    light = 1 - 0.1 * (x + y)[..., None] / scale  # lit from the upper left
    return np.clip(behind + cover * (tint * light - behind), 0, 255)


# ---------------------------------------------------------------------- sound


def pitch_hz(height: Times) -> Times:
    """The tone's frequency for the share of the free height that lies below the shape."""
    return LOWEST_HZ * 2 ** (OCTAVES * height)


def sound(toy: Toy, *, seconds: float, sample_rate_hz: int, grid_hz: float | None = None) -> Waveform:
    """The sound of a clip of `seconds`, the same on both channels; sample n is at `n / sample_rate_hz`.

    With `grid_hz` it is what a vocoder of so many frames a second can make of its spectrogram, which has no phase: the
    same for equal frames. Pitches are the nearest multiples of the rate, and clicks begin where the nearest frame does.
    """
    times = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    fade = np.clip(np.minimum(times, seconds - times) / _FADE_SECONDS, 0, 1)
    match toy.sound:
        case "tone":
            if grid_hz is None:
                frequency = pitch_hz(poses(toy, times, seconds=seconds).height)
                turns = np.cumsum(frequency) / sample_rate_hz
            else:
                frame = np.floor(times * grid_hz + 1e-6)
                frequency = pitch_hz(poses(toy, (frame + 0.5) / grid_hz, seconds=seconds).height)
                turns = np.round(frequency / grid_hz) * (times * grid_hz - frame)  # whole ones in every frame
            wave = _TONE_LEVEL * fade * np.sin(2 * np.pi * turns)
        case "chord":
            waves = [np.sin(2 * np.pi * CHORDS[toy.colour] * partial * times) for partial in PARTIALS]
            wave = _CHORD_LEVEL * fade * np.sum(waves, axis=0)
        case _:
            since = np.arange(round(_CLICK_SECONDS * sample_rate_hz)) / sample_rate_hz
            burst = np.random.default_rng(0).uniform(-1, 1, len(since)) * np.exp(-since / _CLICK_DECAY)
            wave = np.zeros(len(times) + len(since))
            for contact in contacts(toy, seconds=seconds):
                contact = contact if grid_hz is None else round(contact * grid_hz) / grid_hz
                first = math.ceil(contact * sample_rate_hz - 1e-6)
                wave[first : first + len(since)] += _CLICK_LEVEL * burst
            wave = wave[: len(times)]
    return np.repeat(wave.astype(np.float32)[:, None], 2, axis=1)
