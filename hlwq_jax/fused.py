"""From packed codes to the bfloat16 weight in one kernel: unpack, look up, scale and rotate in one pass over memory.

It moves 2.6 bytes a weight where XLA's two kernels of the "rotate_weight" form move 6.6. Its weight is that form's, bit
for bit, so it changes no result: in both the values to rotate are levels times one norm, rounded to bfloat16. These are
multiples of one power of two, and where the levels of the table lie within a factor of 65,536 / block_size (in files of
5 bits they lie within 41, of 8 within 326) no sum of a block's values needs more than the 24 bits of float32. So any
order of summing gives the same exact sum, and the rounding to bfloat16 at the end is the only one left.

The kernel is written in Pallas-Triton, which compiles for NVIDIA cards; elsewhere it is interpreted, slowly. jax 0.12
calls Pallas-Triton deprecated: a jax without it has no fused form. `check_fused` compares the bits on a device.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, BFloat16, Float16, Float32, UInt32

from hlwq_jax.codebook import lloyd_max
from hlwq_jax.hadamard import signs
from hlwq_jax.planes import plane_widths

try:
    from jax.experimental.pallas import triton as _triton
except ImportError:
    _triton = None
triton: Any = _triton

# Rows of a tile, and inputs of one matrix product. A block of 128 is rotated by four products of 32 and two rounds of
# sums and differences: a quarter of the multiplications, and about 110 registers where one product of 128 spills beyond
# 255. And 32 codes fill whole words of every plane.
_ROWS = 64
_PART = 32


def fused_supports(block_size: int) -> bool:
    """Whether the kernel takes blocks of that size: 32, 64 or 128, in a jax that has Pallas-Triton."""
    return triton is not None and block_size in (32, 64, 128)


def fused_weight(
    lo: UInt32[Array, "out lo"],
    hi: UInt32[Array, "out hi"] | None,
    norms: Float16[Array, "out blocks"],
    scaled_centroids: Float32[Array, " levels"],
    *,
    bits: int,
    block_size: int,
) -> BFloat16[Array, "out padded"]:
    """The weight as the "rotate_weight" form computes it for bfloat16 activations, padding included.

    Compiled on NVIDIA cards, interpreted elsewhere. Raises ValueError where `fused_supports` says no.
    """
    if not fused_supports(block_size):
        got = "this jax has no Pallas-Triton" if triton is None else f"got blocks of {block_size}"
        raise ValueError(f"the fused kernel needs Pallas-Triton and blocks of 32, 64 or 128; {got}: use rotate_weight")
    rows, blocks = norms.shape
    planes = (lo,) if hi is None else (lo, hi)
    matrix = jnp.asarray(signs(_PART) * np.float32(1 / block_size), jnp.bfloat16)

    def run(*arrays: jax.Array, interpret: bool) -> jax.Array:
        return pl.pallas_call(
            partial(_fused_weight_tile, bits=bits, block_size=block_size),
            grid=(blocks, pl.cdiv(rows, _ROWS)),  # neighbours in a row at the same time: they share sectors of memory
            out_shape=jax.ShapeDtypeStruct((rows, blocks * block_size), jnp.bfloat16),
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
        )(*arrays)

    arrays = (norms, scaled_centroids, matrix, *planes)
    compiled, interpreted = partial(run, interpret=False), partial(run, interpret=True)
    return jax.lax.platform_dependent(*arrays, cuda=compiled, default=interpreted)


def _fused_weight_tile(norms: Any, levels: Any, matrix: Any, *planes_and_weight: Any, bits: int, block_size: int):
    """`_ROWS` rows of one block. Past the last row the last one is computed again, which needs no masks."""
    *planes, weight = planes_and_weight
    block = pl.program_id(0)
    rows = jnp.minimum(pl.program_id(1) * _ROWS + jnp.arange(_ROWS), norms.shape[0] - 1)
    columns = [block * block_size + start + jnp.arange(_PART) for start in range(0, block_size, _PART)]
    row_norms = triton.load(norms.at[rows, jnp.full_like(rows, block)]).astype(jnp.float32)[:, None]
    signs_of_part = triton.load(matrix)
    parts = []
    for part in columns:
        values = triton.load(levels.at[_codes(planes, rows, part, bits)]) * jnp.float32(block_size**0.5)
        parts.append(triton.dot((values * row_norms).astype(jnp.bfloat16), signs_of_part))
    # The matrix of the block is that of a part, repeated with the signs of the small matrix over the parts.
    half = 1
    while half < len(parts):
        parts = [parts[i ^ half] - y if i & half else y + parts[i ^ half] for i, y in enumerate(parts)]
        half *= 2
    for part, y in zip(columns, parts, strict=True):
        triton.store(weight.at[rows[:, None], part[None]], y.astype(jnp.bfloat16))


def _codes(planes: list[Any], rows: jax.Array, columns: jax.Array, bits: int) -> jax.Array:
    codes = jnp.zeros((len(rows), len(columns)), jnp.uint32)
    taken = 0
    widths = plane_widths(32, bits)  # the bits of a code in each plane: 32 codes fill as many words
    for plane, width in zip(planes, widths[: len(planes)], strict=True):
        words = triton.load(plane.at[rows[:, None], (columns * width // 32)[None]])
        shifts = (columns * width % 32).astype(jnp.uint32)[None]
        codes |= ((words >> shifts) & jnp.uint32(2**width - 1)) << jnp.uint32(taken)
        taken += width
    return codes.astype(jnp.int32)


@dataclass(frozen=True, kw_only=True)
class FusedCheck:
    """What `check_fused` found on one device."""

    device: str
    unavailable: str | None = None  # why the kernel could not be checked
    interpreted: bool = False
    num_weights: int = 0  # compared
    num_different: int = 0
    max_steps: int = 0  # the largest difference, in steps from one bfloat16 to the next

    @property
    def equal(self) -> bool:
        """Whether weights were compared and all were equal bit for bit."""
        return self.unavailable is None and self.num_weights > 0 and self.num_different == 0

    @property
    def proved(self) -> bool:
        """Whether the compiled kernel gave equal weights: only then may the fused form be switched on."""
        return self.equal and not self.interpreted

    def __str__(self) -> str:
        if self.unavailable is not None:
            return f"fused kernel not available on {self.device}: {self.unavailable}"
        how = "interpreted" if self.interpreted else "compiled"
        if self.equal:
            return f"fused kernel, {how} on {self.device}: all {self.num_weights:,} weights equal bit for bit"
        return (
            f"fused kernel, {how} on {self.device}: {self.num_different:,} of {self.num_weights:,} weights differ, by "
            f"up to {self.max_steps} bfloat16 steps; use rotate_weight"
        )


def check_fused(
    device: jax.Device | None = None,
    *,
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (1000, 384), (1, 128)),
    interpret: bool = False,
) -> FusedCheck:
    """Compares the kernel with the "rotate_weight" form on a device (default: jax's first), at 5 bits in blocks of 128.

    The weights of `shapes` `(out, in)` have random codes, and norms from zero and the smallest float16 to 256. Without
    an NVIDIA card, or where a form fails to compile or to run, the report says why; nothing is raised. `interpret` lets
    other devices interpret the kernel, which checks its arithmetic and proves nothing for a card.
    """
    from hlwq_jax.matmul import quantized_matmul  # here, as it imports this module

    chosen: Any = jax.devices()[0] if device is None else device
    on_card = chosen.platform == "gpu"
    if triton is None:
        return FusedCheck(device=chosen.device_kind, unavailable="this jax has no Pallas-Triton")
    if not on_card and not interpret:
        return FusedCheck(device=chosen.device_kind, unavailable="it compiles for NVIDIA cards alone")
    multiply = jax.jit(partial(quantized_matmul, bits=5, block_size=128), static_argnames="form")
    num_weights = num_different = max_steps = 0
    for seed, (out_features, in_features) in enumerate(shapes):
        # Times the identity a weight comes out as it is: in every sum one term at most is not zero.
        arrays = (np.eye(in_features, dtype=jnp.bfloat16), *_random_weight(seed, out_features, in_features))
        try:
            arrays = jax.device_put(arrays, chosen)
            weight, expected = (np.asarray(multiply(*arrays, form=form)) for form in ("fused", "rotate_weight"))
        except Exception as error:  # whatever compiler or driver raise: this is the report of it
            return FusedCheck(device=chosen.device_kind, unavailable=f"{type(error).__name__}: {error}")
        steps = np.abs(_ordered(weight) - _ordered(expected))
        num_weights += steps.size
        num_different += int(np.count_nonzero(steps))
        max_steps = max(max_steps, int(steps.max()))
    return FusedCheck(
        device=chosen.device_kind,
        interpreted=not on_card,
        num_weights=num_weights,
        num_different=num_different,
        max_steps=max_steps,
    )


def _random_weight(seed: int, out_features: int, in_features: int) -> tuple[np.ndarray, ...]:
    """Planes, norms and scaled centroids at 5 bits in blocks of 128."""
    rng = np.random.default_rng(seed)
    lo, hi = (rng.integers(0, 2**32, (out_features, n), dtype=np.uint32) for n in plane_widths(in_features, 5))
    blocks = (out_features, in_features // 128)
    norms = 2.0 ** rng.integers(-26, 8, blocks) * rng.uniform(1, 2, blocks)
    return lo, hi, norms.astype(np.float16), lloyd_max(5) / np.float32(128**0.5)


def _ordered(weight: np.ndarray) -> np.ndarray:
    """bfloat16 values as integers in their order, neighbours one apart; both zeros are 0."""
    bits = weight.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
