"""Linears that are packed while converting: which ones, at how many bits, and how close they come to what was there.

A linear that arrives packed is never quantised again.
"""

import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from convert.files import ConvertError
from hlwq_jax import (
    BEST_RECIPE,
    PUBLISHED_RECIPE,
    FormatError,
    LazyTensor,
    Recipe,
    dequantize,
    pack_planes,
    plane_widths,
)
from hlwq_jax.quantize import rows_at_once
from hlwq_jax.trellis import TRELLIS_BITS
from ltx_jax.checkpoint import QuantizedShape

BITS, BLOCK_SIZE = 5, 128
BLOCK_SIZES = (32, 64, 128)  # smaller ones follow narrow layers without padding; all run fused on a card
UNPACKED_BITS = 16  # as published
GEMMA = "gemma"
RECIPES: Mapping[str, Recipe] = {
    # What packages in layout V5 can hold: one of the published tables, no signs.
    "published": PUBLISHED_RECIPE,
    "fitted": Recipe(norm="fitted"),
    # Less error, for our own checkpoints.
    "scalar": Recipe(table="converged", sign_seed=0, norm="least-squares"),
    "trellis": BEST_RECIPE,
}
RECIPE = "scalar"
# Group -> the component it lies in, and the paths of its linears there. Gates, embeddings and norms are in none.
GROUPS: Mapping[str, tuple[str, re.Pattern[str]]] = {
    GEMMA: ("gemma", re.compile(r"layers\.\d+\.(attn|ff)\.\w+")),
    "blocks": ("transformer", re.compile(r"blocks\.\d+\.(?!.*to_gate_logits).+")),
    "connectors": ("connectors", re.compile(r"(video|audio)\.blocks\.\d+\.(attn|ff)\.(?!to_gate_logits)\w+")),
    "projection": ("connectors", re.compile(r"projection\.(video|audio)")),
    "adaln": ("transformer", re.compile(r"(video|audio)\.\w*adaln\.\w+")),
}
OPTIONAL = tuple(group for group in GROUPS if group != GEMMA)
_ERROR_ROWS = 16  # one row in so many is decoded again, to measure the error: a twentieth of the time of quantising
_THREADS = min(4, os.cpu_count() or 1)  # each needs 0.1 GB for its slice


@dataclass(frozen=True)
class Quantizing:
    """What a conversion packs: groups with their bits, exceptions by name, and the recipe for all."""

    bits: Mapping[str, int]
    exceptions: tuple[tuple[str, int], ...] = ()  # (pattern, bits), of which the first that fits holds
    recipe: str = RECIPE
    block_size: int = BLOCK_SIZE  # weights of a row that share a norm

    @classmethod
    def of(
        cls,
        *,
        gemma_bits: int,
        groups: Iterable[str],
        bits: str = "",
        recipe: str = RECIPE,
        block_size: int = BLOCK_SIZE,
    ) -> "Quantizing":
        """`bits` is as `blocks.0=8,blocks.43-47=6,*=5`.

        Raises ConvertError for bits, groups, recipes and sizes of blocks that there are not.
        """
        groups = tuple(groups)
        unknown = sorted(set(groups) - set(OPTIONAL))
        if unknown:
            raise ConvertError(f"nothing called {', '.join(unknown)} to quantize; there are {', '.join(OPTIONAL)}")
        if recipe not in RECIPES:
            raise ConvertError(f"no recipe is called {recipe}; there are {', '.join(RECIPES)}")
        _check_bits("gemma bits", gemma_bits)
        packed = {} if gemma_bits == UNPACKED_BITS else {GEMMA: gemma_bits}
        exceptions = tuple(_exception(text) for text in bits.split(",") if text.strip())
        if block_size not in BLOCK_SIZES:
            raise ConvertError(f"block-size must be one of {', '.join(map(str, BLOCK_SIZES))}; got {block_size}")
        return cls(packed | {group: BITS for group in OPTIONAL if group in groups}, exceptions, recipe, block_size)

    @property
    def options(self) -> dict[str, object]:
        """What decides the result, as JSON."""
        said = {"groups": dict(self.bits), "bits": dict(self.exceptions), "recipe": self.recipe}
        return said if self.block_size == BLOCK_SIZE else {**said, "block_size": self.block_size}

    def group(self, component: str, parameter: str) -> str | None:
        """The group to be packed that a parameter of a component is in, or None."""
        path = parameter.removesuffix(".kernel")
        if path == parameter:
            return None
        for group in self.bits:
            owner, paths = GROUPS[group]
            if owner == component and paths.fullmatch(path):
                return group if self._bits(group, component, path) != UNPACKED_BITS else None
        return None

    def recipe_of(self, group: str, component: str, parameter: str) -> Recipe:
        """How a parameter of a group is packed; more bits than a trellis has make it scalar."""
        bits = self._bits(group, component, parameter.removesuffix(".kernel"))
        recipe = replace(RECIPES[self.recipe], bits=bits, block_size=self.block_size)
        if recipe.history_bits and bits not in TRELLIS_BITS:
            recipe = replace(RECIPES["scalar"], bits=bits, block_size=self.block_size)
        return recipe

    def _bits(self, group: str, component: str, path: str) -> int:
        name = path if component == "transformer" else f"{component}.{path}"
        found = (bits for pattern, bits in self.exceptions if pattern == group or _fits(pattern, name))
        return next(found, self.bits[group])

    def pack(self, tensor: LazyTensor, group: str, recipe: Recipe) -> "QuantizedTensor":
        """Packs a weight of a group. Raises ConvertError, with the option that leaves it out, where it cannot be."""
        try:
            return quantize_tensor(tensor, recipe)
        except FormatError:  # a damaged file
            raise
        except ValueError as error:
            otherwise = f"--gemma-bits {UNPACKED_BITS}" if group == GEMMA else f"{group} left out of --quantize"
            raise ConvertError(f"{tensor.where} cannot be quantised: {error}; convert with {otherwise}") from error


def _check_bits(what: str, bits: int) -> None:
    if bits != UNPACKED_BITS and not 2 <= bits <= 8:
        raise ConvertError(f"{what} must be 2 to 8, or {UNPACKED_BITS} to leave it as it is; got {bits}")


def _exception(text: str) -> tuple[str, int]:
    pattern, _, bits = text.strip().partition("=")
    if not pattern or not bits.strip().isdecimal():
        raise ConvertError(f"bits are given as blocks.0=8,blocks.43-47=6,*=5; got {text.strip()!r}")
    _check_bits(f"bits of {pattern}", int(bits))
    return pattern, int(bits)


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern's words are the first of a name's: `*` is any word, `43-47` any of these numbers."""
    words, parts = pattern.split("."), name.split(".")
    return len(words) <= len(parts) and all(map(_word_fits, words, parts))


def _word_fits(word: str, part: str) -> bool:
    bounds = re.fullmatch(r"(\d+)-(\d+)", word)
    if bounds and part.isdecimal():
        return int(bounds[1]) <= int(part) <= int(bounds[2])
    return word in ("*", part)


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A linear's weight as it is stored in a checkpoint."""

    arrays: Mapping[str, np.ndarray]  # lo, norms, scaled_centroids; hi and signs where there are any
    shape: QuantizedShape
    relative_error: float  # of the decoded weight, root mean square, from every 16th row of a slice


def quantize_tensor(tensor: LazyTensor, recipe: Recipe) -> QuantizedTensor:
    """Packs a published weight `[out, in]` slice by slice: it is never in memory as a whole.

    The codes are those of `recipe.quantize` of the whole. Raises ValueError for values that it refuses, FormatError
    for a file that ends early.
    """
    out_features, in_features = tensor.shape
    bits, block_size = recipe.bits, recipe.block_size
    num_blocks = -(-in_features // block_size)
    lo_words, hi_words = plane_widths(num_blocks * block_size, bits)
    lo, hi = np.empty((out_features, lo_words), np.uint32), np.empty((out_features, hi_words), np.uint32)
    norms = np.empty((out_features, num_blocks), np.float16)
    rows = rows_at_once(in_features, block_size)

    def pack(start: int) -> tuple[np.ndarray, float, float]:
        place = slice(start, min(start + rows, out_features))
        weight = tensor.read_rows(place.start, place.stop)
        try:
            quantized = recipe.quantize(weight)
        except ValueError as error:
            raise ValueError(f"in rows {place.start} to {place.stop}, {error}") from error
        lo[place], high = pack_planes(quantized.codes, bits)
        if high is not None:
            hi[place] = high
        norms[place] = quantized.norms
        sample = slice(None, None, _ERROR_ROWS)
        decoded = dequantize(
            quantized.codes[sample],
            quantized.norms[sample],
            quantized.centroids,
            block_size=block_size,
            in_features=in_features,
            history_bits=quantized.history_bits,
            signs=quantized.signs,
        )
        original = weight[sample].astype(np.float32)
        error = decoded.astype(np.float32) - original
        return quantized.scaled_centroids, float(np.vdot(error, error)), float(np.vdot(original, original))

    with ThreadPoolExecutor(_THREADS) as pool:
        scaled_centroids, errors, squares = zip(*pool.map(pack, range(0, out_features, rows)), strict=True)
    signs = recipe.signs(in_features)
    arrays = {"lo": lo, "norms": norms, "scaled_centroids": scaled_centroids[0]}
    return QuantizedTensor(
        arrays=arrays | ({"hi": hi} if hi_words else {}) | ({} if signs is None else {"signs": signs}),
        shape=shape_of(recipe, out_features, in_features),
        relative_error=(sum(errors) / max(sum(squares), 1e-30)) ** 0.5,
    )


def packed_bytes(shape: QuantizedShape) -> int:
    """Bytes of a weight in the device layout, with norms, levels and signs; rows are padded to whole blocks."""
    num_blocks = -(-shape.in_features // shape.block_size)
    words = sum(plane_widths(num_blocks * shape.block_size, shape.bits))
    table = 4 * 2 ** (shape.bits + shape.history_bits) + shape.signs * shape.in_features
    return shape.out_features * (4 * words + 2 * num_blocks) + table


def shape_of(recipe: Recipe, out_features: int, in_features: int) -> QuantizedShape:
    """Of a weight that a recipe packs."""
    return QuantizedShape(
        in_features=in_features,
        out_features=out_features,
        bits=recipe.bits,
        block_size=recipe.block_size,
        history_bits=recipe.history_bits,
        signs=recipe.sign_seed is not None,
    )
