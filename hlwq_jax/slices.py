"""A whole weight decoded on the host, some rows at a time, so that what it passes through stays in the caches."""

import jax
import ml_dtypes
import numpy as np
from jaxtyping import BFloat16, Float16, Float32, Int8, UInt32

from hlwq_jax.matmul import dequantize_planes

_VALUES = 2**20  # decoded at a time: 4 MiB of float32


def dequantize_in_slices(
    lo: UInt32[np.ndarray, "out lo"],
    hi: UInt32[np.ndarray, "out hi"] | None,
    norms: Float16[np.ndarray, "out blocks"],
    scaled_centroids: Float32[np.ndarray, " levels"],
    *,
    bits: int,
    block_size: int,
    in_features: int,
    history_bits: int = 0,
    signs: Int8[np.ndarray, " in"] | None = None,
) -> BFloat16[np.ndarray, "out in"]:
    """`dequantize_planes` less the padding, with the same bits, and on a CPU in less time."""
    out_features, num_blocks = norms.shape
    weight = np.empty((out_features, in_features), ml_dtypes.bfloat16)
    step = max(1, _VALUES // (num_blocks * block_size))

    begun: list[tuple[slice, jax.Array]] = []
    for start in range(0, out_features + step, step):
        if start < out_features:
            rows = slice(start, start + step)
            parts = lo[rows], None if hi is None else hi[rows], norms[rows], scaled_centroids
            layout = {"bits": bits, "block_size": block_size, "history_bits": history_bits}
            begun.append((rows, _decode(*parts, **layout, signs=signs)))
        if start:  # the slice before, copied while this one is decoded
            rows, part = begun.pop(0)
            weight[rows] = np.asarray(part)[:, :in_features]
    return weight


_decode = jax.jit(dequantize_planes, static_argnames=("bits", "block_size", "history_bits"))
