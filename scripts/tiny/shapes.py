"""The shapes of the little world, as distances to their outlines: what is drawn, and what the judge looks for."""

import math
from functools import cache

import numpy as np
from jaxtyping import Float

SHAPES = ("circle", "square", "triangle", "star")
NEW_SHAPE = "heart"  # never part of the base world: what a LoRA is to teach

# Corners, and the outline's distance halfway between two of them, as a share of that of the corners.
_CORNERS = {"square": (4, math.cos(math.pi / 4)), "triangle": (3, 0.5), "star": (5, 0.52)}
_ROUNDING = 0.07  # radius of the corners, beside a shape whose corners lie at 1
_ANGLES = 360  # of a measured outline
_REACH = 1.8  # no outline lies farther from the centre, in radii of a disc of the same area

Distances = Float[np.ndarray, "*points"]


def signed_distance(shape: str, x: Distances, y: Distances) -> Distances:
    """Distance to the outline of an upright shape, negative inside, at points right (x) and down (y) of its centre.

    The unit is the radius of a disc of the same area, so that all shapes of one size look equally big; the centre is
    that of the area. Exact near the outline, which is all that drawing needs.
    """
    scale, down = _placing(shape)
    return _unscaled(shape, x / scale, y / scale + down) * scale


@cache
def outline(shape: str) -> Float[np.ndarray, " angles"]:
    """Distance of the outline from the centre in evenly spaced directions: right first, then clockwise as seen.

    In radii of a disc of the same area.
    """
    directions = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    radii = np.linspace(0, _REACH, 1024)
    x, y = np.cos(directions)[:, None] * radii, np.sin(directions)[:, None] * radii
    return (signed_distance(shape, x, y) < 0).sum(axis=1) * radii[1]


@cache
def extents(shape: str) -> tuple[float, float, float, float]:
    """How far an upright shape reaches left, right, up and down of its centre, in radii of a disc of the same area."""
    directions = np.arange(_ANGLES) * 2 * np.pi / _ANGLES
    x, y = outline(shape) * np.cos(directions), outline(shape) * np.sin(directions)
    return float(-x.min()), float(x.max()), float(-y.min()), float(y.max())


def _unscaled(shape: str, x: Distances, y: Distances) -> Distances:
    """Signed distance in the units in which a shape is defined: y points down, as in pictures."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "heart":
        # A square on its tip, half a side long 1, and a disc on each of its upper sides.
        x = np.abs(x)
        along, across = np.abs(x + y) / math.sqrt(2), np.abs(x - y) / math.sqrt(2)
        square = np.hypot(np.maximum(along - 1, 0), np.maximum(across - 1, 0))
        square = square + np.minimum(np.maximum(along, across) - 1, 0)
        disc = np.hypot(x - math.sqrt(0.5), y + math.sqrt(0.5)) - 1
        return np.minimum(square, disc) - _ROUNDING
    if shape not in _CORNERS:
        raise ValueError(f"no shape is named {shape!r}; there are {', '.join((*SHAPES, NEW_SHAPE))}")
    # Folded onto half of one corner: the outline is there one line, from the corner (1, 0) to the point halfway.
    corners, inner = _CORNERS[shape]
    sector = 2 * np.pi / corners
    upright = -np.pi / 2 if corners % 2 else np.pi / 4
    angle = np.abs(np.mod(np.arctan2(y, x) - upright + sector / 2, sector) - sector / 2)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle) - 1, radius * np.sin(angle)
    ex, ey = inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    distance = np.hypot(px - along * ex, py - along * ey)
    return np.copysign(distance, py * -ex + px * ey) - _ROUNDING


@cache
def _placing(shape: str) -> tuple[float, float]:
    """The factor that gives a shape the area of the unit disc, and how far down the centre of its area lies."""
    side = np.linspace(-3, 3, 801)
    x, y = np.meshgrid(side, side)
    inside = _unscaled(shape, x, y) < 0
    area = inside.sum() * (side[1] - side[0]) ** 2
    return math.sqrt(math.pi / area), float(y[inside].mean())
