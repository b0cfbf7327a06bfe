"""What a picture shows, measured: one object on a plain background, its shape, colours, size and motion.

Made for clips of a small model: soft, noisy, a little wrong. What cannot be seen is None.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from scripts.tiny.shapes import NEW_SHAPE, SHAPES, signed_distance
from scripts.tiny.world import BACKGROUNDS, COLOURS, MARGIN, SIZES

Frames = UInt8[np.ndarray, "frames height width 3"]
PerFrame = Float[np.ndarray, " frames"]
Levels = Float[np.ndarray, " 3"]
Cover = Float[np.ndarray, "rows columns"]  # of a pixel by the object, in [0, 1]

# Levels are of 255; the palettes' nearest colours lie some 60 apart.
_CONTRAST = 40.0  # levels from the background that an object has at least
_FAR = 90.0  # levels from every colour of the palette at which a colour has no name
_SOLE = 0.7  # share of all that stands out which one object must hold
_AREAS = 0.002, 0.5  # of the picture, for an object
_VISIBLE = 0.75  # of the frames, for a clip to have an object
_OUTLINE_ERROR = 0.12  # rms distance from the best shape's outline, in radii; shapes are 0.1 to 0.25 apart
_TRAVEL = 0.15  # share of the picture that what moves crosses; all motions of the world cross 0.25
_STEADY = 0.9  # correlation with time of what travels or grows
_GROWTH = 1.4  # the world grows by 2 to 2.5
_TURNS = 0.1  # a second; the world spins by 0.18 to 0.22
_UNSTEADY = 0.7  # rms radians that the phase of what spins may stray; at random it is 1.8
_ANGLES, _RADII, _REACH = 72, 32, 2.0  # of the polar grid on which outlines are compared; the last in radii


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a picture shows. None and NaN stand for what cannot be seen."""

    visible: float  # share of the frames that show one object
    shape: str | None
    colour: str | None
    size: str | None
    motion: str | None
    background: str | None
    outline_error: float  # rms distance from the shape's outline, in radii
    colour_error: float  # levels from the palette
    background_error: float
    radius: float  # of a disc of the same area at the largest, as a share of the shorter side
    travel: tuple[float, float]  # right and up in the whole clip, as shares of the picture
    growth: float  # of the radius in the whole clip, as a factor
    turns_per_second: float  # clockwise
    heights: tuple[float, ...]  # of each frame: the share of the free height that lies below
    contacts: tuple[float, ...]  # seconds at which it touches the ground


def look(frames: Frames, fps: float) -> Seen:
    """Measures one object on a plain background. Motion needs three frames."""
    ground = _border_levels(frames)
    plain = np.median(ground, axis=0)
    background, background_error = _nearest(plain, BACKGROUNDS)
    found = _Track.of(frames, ground)
    if found is None:
        return Seen(
            visible=0.0, shape=None, colour=None, size=None, motion=None, background=background,
            outline_error=math.nan, colour_error=math.nan, background_error=background_error, radius=math.nan,
            travel=(math.nan, math.nan), growth=math.nan, turns_per_second=math.nan,
            heights=(math.nan,) * len(frames), contacts=(),
        )  # fmt: skip
    palette = {name: _faded(np.array(value, float), plain, found.colour) for name, value in COLOURS.items()}
    colour, colour_error = _nearest(found.colour, palette)
    errors = {name: found.outline_error(name) for name in (*SHAPES, NEW_SHAPE)}
    shape = min(errors, key=lambda name: errors[name])
    radius = float(np.nanpercentile(found.radius, 90)) / min(frames.shape[1:3])
    motion, travel, growth, turns = found.motion(shape, fps)
    return Seen(
        visible=float(found.valid.mean()),
        shape=shape if errors[shape] < _OUTLINE_ERROR else None,
        colour=colour,
        size="small" if radius < math.sqrt(SIZES["small"] * SIZES["large"]) else "large",
        motion=motion,
        background=background,
        outline_error=errors[shape],
        colour_error=colour_error,
        background_error=background_error,
        radius=radius,
        travel=travel,
        growth=growth,
        turns_per_second=turns,
        heights=tuple(found.height.tolist()),
        contacts=found.contacts(fps) if motion == "bounce" else (),
    )


def _border_levels(frames: Frames) -> Float[np.ndarray, "frames 3"]:
    """The median colour along each frame's border, which is the background's: an object covers little of it."""
    width = max(1, round(0.06 * min(frames.shape[1:3])))
    inner = np.zeros(frames.shape[1:3], bool)
    inner[width:-width, width:-width] = True
    return np.median(frames[:, ~inner], axis=1).astype(np.float32)


def _nearest(levels: Levels, palette: Mapping[str, Levels | tuple[int, int, int]]) -> tuple[str | None, float]:
    """The palette's colour nearest to some levels and how far it is; None where that is too far for a name."""
    far = {name: float(np.linalg.norm(levels - np.array(value))) for name, value in palette.items()}
    name = min(far, key=lambda key: far[key])
    return name if far[name] < _FAR else None, far[name]


def _faded(colour: Levels, ground: Levels, levels: Levels) -> Levels:
    """A colour mixed with up to half of the background's, as small soft objects are: the mixture nearest to levels."""
    kept = np.clip((levels - ground) @ (colour - ground) / np.sum((colour - ground) ** 2), 0.5, 1)
    return ground + kept * (colour - ground)


@dataclass(frozen=True, kw_only=True)
class _Track:
    """One object through all frames, in pixels; NaN where a frame does not show it."""

    colour: Levels
    x: PerFrame
    y: PerFrame  # downward
    radius: PerFrame  # of a disc of the same area
    height: PerFrame  # share of the free height that lies below
    softness: PerFrame  # of the outline: see `_softness`
    outlines: Float[np.ndarray, "frames angles"]  # distance from the centre in each direction, in radii
    picture: tuple[int, int]  # height and width

    @property
    def valid(self) -> Bool[np.ndarray, " frames"]:
        return np.isfinite(self.x)

    @classmethod
    def of(cls, frames: Frames, ground: Float[np.ndarray, "frames 3"]) -> "_Track | None":
        """None where too few of the frames show one object."""
        # Both are smoothed, as noise stands out farther than what is faint; the colour in squares of two by two.
        height, width = (size // 2 * 2 for size in frames.shape[1:3])
        levels = frames.astype(np.float32)
        rows = levels[:, :height:2, :width] + levels[:, 1:height:2, :width]
        squares = (rows[:, :, ::2] + rows[:, :, 1::2]) / 4 - ground[:, None, None]
        far = np.sqrt(np.einsum("fhwc,fhwc->fhw", squares, squares))
        if np.percentile(far, 99.7) < _CONTRAST:
            return None
        colour = _core(squares, far)
        direction = colour / (colour @ colour)
        cover = levels @ direction - (ground @ direction)[:, None, None]
        for axis in (1, 2):
            cover = ndimage.uniform_filter1d(cover, 3, axis)
        cover = np.clip(cover, 0, 1)
        measured = np.stack([_measured(cover[i]) for i in range(len(cover))])
        if np.isfinite(measured[:, 0]).mean() < _VISIBLE:
            return None
        x, y, radius, share, softness = measured[:, :5].T
        return cls(
            colour=np.median(ground, axis=0) + colour, x=x, y=y, radius=radius, height=share, softness=softness,
            outlines=measured[:, 5:], picture=frames.shape[1:3],
        )  # fmt: skip

    def outline_error(self, shape: str) -> float:
        """Rms distance from the outline of a shape as soft as this, each frame turned as it fits best: the median.

        Of the frames that show it larger than others.
        """
        large = self.valid & (np.nan_to_num(self.radius) >= np.nanmedian(self.radius))
        softness, templates = _templates(shape)
        known = templates[np.abs(softness - np.median(self.softness[large])).argmin()]
        spectra = np.fft.rfft(self.outlines[large], axis=1) * np.fft.rfft(known).conj()
        overlap = np.fft.irfft(spectra, _ANGLES, axis=1).max(axis=1) / _ANGLES
        squares = (self.outlines[large] ** 2).mean(axis=1) + (known**2).mean() - 2 * overlap
        return float(np.sqrt(np.median(np.maximum(squares, 0))))

    def motion(self, shape: str, fps: float) -> tuple[str | None, tuple[float, float], float, float]:
        """Its kind, travel right and up, growth and turns a second."""
        valid = self.valid
        if valid.sum() < 3:
            return None, (math.nan, math.nan), math.nan, math.nan
        times, seconds = np.flatnonzero(valid) / fps, len(valid) / fps
        x, y = self.x[valid] / self.picture[1], self.y[valid] / self.picture[0]
        across, across_steady = _trend(times, x)
        down, down_steady = _trend(times, y)
        growing, growing_steady = _trend(times, np.log(self.radius[valid]))
        right, up, growth = across * seconds, -down * seconds, math.exp(growing * seconds)
        turns = _turns_per_second(self.outlines[valid], times, shape)
        kind = None
        if abs(right) >= _TRAVEL and across_steady:
            if abs(up) < _TRAVEL:
                kind = "rightward" if right > 0 else "leftward"
            elif right > 0 and up > 0 and down_steady:
                kind = "cross"
        elif np.ptp(x) >= _TRAVEL:
            pass  # to and fro is no motion of the world
        elif np.ptp(y) >= _TRAVEL:
            kind = "bounce" if abs(up) < 0.8 * np.ptp(y) else None  # it comes back
        elif growth >= _GROWTH and growing_steady:
            kind = "grow"
        elif abs(turns) >= _TURNS:
            kind = "spin"
        return kind, (right, up), growth, turns

    def contacts(self, fps: float) -> tuple[float, ...]:
        """Seconds at which it turns from falling to rising, between frames.

        Without its fall, `y - gravity t² / 2`, what flies moves in a straight line: a contact is where the line
        through the two frames before the lowest one meets that through the two after it. So none is found in the
        first and the last two frames.
        """
        y, times = self.y, np.arange(len(self.y)) / fps
        gravity = float(np.nanmedian(np.diff(y, 2))) * fps**2  # contacts, where it bends the other way, are few
        line = y - gravity * times**2 / 2
        found = []
        for i in range(2, len(y) - 2):
            fall, rise = (line[i - 1] - line[i - 2]) * fps, (line[i + 2] - line[i + 1]) * fps
            if y[i] == np.max(y[i - 2 : i + 3]) and y[i] > np.nanmean(y) and fall > rise:  # no NaN is a maximum
                met = (line[i + 1] - rise * times[i + 1] - line[i - 1] + fall * times[i - 1]) / (fall - rise)
                found.append(float(np.clip(met, times[i - 1], times[i + 1])))
        return tuple(found)


def _core(
    values: Float[np.ndarray, "*pixels channels"], far: Float[np.ndarray, "*pixels"]
) -> Float[np.ndarray, " channels"]:
    """The median value of the pixels that are farthest from the background, of an object's inside."""
    return np.median(values[far > 0.7 * np.percentile(far, 99.7)], axis=0)


def _measured(cover: Cover) -> Float[np.ndarray, " values"]:
    """Centre x and y, radius, free share below, softness and outline of a frame's one object, in pixels; or NaN."""
    labels = np.zeros(cover.shape, np.int32)
    ndimage.label(cover > 0.5, output=labels)
    areas = np.bincount(labels.ravel(), minlength=2)[1:]
    best, area = int(areas.argmax()), int(areas.max())
    if area < _SOLE * areas.sum() or not _AREAS[0] <= area / cover.size <= _AREAS[1]:
        return np.full(5 + _ANGLES, np.nan)
    rows, columns = ndimage.find_objects(labels)[best]
    margin = MARGIN * min(cover.shape)
    above, below = rows.start - margin, cover.shape[0] - rows.stop - margin
    share = min(max(below / max(above + below, 1.0), 0.0), 1.0)
    # Its edge fades beyond the threshold; farther out is noise, and what else stands there.
    first_row, first_column = max(rows.start - 3, 0), max(columns.start - 3, 0)
    around = np.s_[first_row : rows.stop + 3, first_column : columns.stop + 3]
    whole = cover[around] * ndimage.binary_dilation(labels[around] == best + 1, iterations=2)
    radius = math.sqrt(float(whole.sum()) / math.pi)
    y, x = (float(np.average(np.arange(whole.shape[axis]), weights=whole.sum(axis=1 - axis))) for axis in (0, 1))
    outlined = _outline_of(whole, x, y, radius)
    return np.array([first_column + x, first_row + y, radius, share, _softness(whole, radius), *outlined])


def _outline_of(cover: Cover, x: float, y: float, radius: float) -> Float[np.ndarray, " angles"]:
    """How far an object reaches in each direction, in radii: its cover, summed outward from the centre."""
    angles = np.arange(_ANGLES)[:, None] * 2 * np.pi / _ANGLES
    distances = (np.arange(_RADII) + 0.5) * _REACH / _RADII
    where = [y + radius * np.sin(angles) * distances, x + radius * np.cos(angles) * distances]
    return ndimage.map_coordinates(cover, where, order=1).sum(axis=1) * _REACH / _RADII


def _softness(cover: Cover, radius: float) -> float:
    """How much of an object is neither in nor out, in squared radii: grows with the blur of its outline."""
    return float((cover * (1 - cover)).sum()) / radius**2


@cache
def _templates(shape: str) -> tuple[Float[np.ndarray, " blurs"], Float[np.ndarray, "blurs angles"]]:
    """Softness and outline of a shape, sharp and more and more blurred: small shapes lose their corners to a blur.

    Measured as clips are, on a shape about as large as the small ones of a small clip.
    """
    radius, half = 12.0, 32.0
    y, x = np.mgrid[-half : half + 1, -half : half + 1] / radius
    sharp = np.clip(0.5 - signed_distance(shape, x, y) * radius, 0, 1)
    blurred = [ndimage.gaussian_filter(sharp, blur * radius) for blur in np.arange(0.02, 0.42, 0.02)]
    measured = np.stack([_measured(np.clip(cover / _core(cover[..., None], cover), 0, 1)) for cover in blurred])
    return measured[:, 4], measured[:, 5:]


def _trend(times: PerFrame, values: PerFrame) -> tuple[float, bool]:
    """Change a second, and whether the values change steadily."""
    slope = float(np.polyfit(times, values, 1)[0])
    explained = abs(slope) * np.std(times)  # of the values' deviation
    return slope, bool(explained >= _STEADY * np.std(values))


def _turns_per_second(outlines: Float[np.ndarray, "frames angles"], times: PerFrame, shape: str) -> float:
    """Clockwise turns of the strongest harmonic of the shape's outline; 0 where it does not turn steadily."""
    strength = np.abs(np.fft.rfft(_templates(shape)[1][0]))[1:]
    if strength.max() < 0.02 * _ANGLES:  # a circle
        return 0.0
    order = int(strength.argmax()) + 1
    phase = -np.unwrap(np.angle(np.fft.rfft(outlines, axis=1)[:, order]))
    slope, level = np.polyfit(times, phase, 1)
    steady = np.std(phase - slope * times - level) < _UNSTEADY
    return float(slope) / order / (2 * np.pi) if steady else 0.0
