"""Quantizes a weight to the Q5_K blocks of GGUF files, which the `gguf` package can read but not write.

Source: `quantize_row_q5_K_ref` and `make_qkx2_quants` in ggml-org/ggml (MIT), src/ggml-quants.c.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

SUPER = 256  # weights that share two float16 factors
SUB = 32  # weights that share a scale and a minimum of 6 bits each
BYTES = 2 + 2 + 12 + SUPER // 8 + SUPER // 2


def quantize_q5_k(weight: Float32[np.ndarray, "out in"]) -> UInt8[np.ndarray, "out bytes"]:
    """The blocks of every row, 5.5 bits a weight. Raises ValueError where a row does not hold whole blocks."""
    out_features, in_features = weight.shape
    if in_features % SUPER:
        raise ValueError(f"Q5_K takes rows of a multiple of {SUPER} weights, got {in_features}")
    rows = max(1, 2**22 // in_features)  # the search keeps several arrays of their size
    parts = [np.asarray(_blocks(weight[start : start + rows])) for start in range(0, out_features, rows)]
    return np.concatenate(parts).reshape(out_features, -1)


@jax.jit
def _blocks(weight: Float[Array, "rows in"]) -> UInt8[Array, "supers {BYTES}"]:
    x = weight.reshape(-1, SUPER // SUB, SUB)
    scale, minimum = _search(x)  # the smallest weight of each 32 is about -minimum
    inverse = [jnp.where(top > 0, 63 / top, 0) for top in (scale.max(-1), minimum.max(-1))]
    small = [jnp.clip(jnp.round(inverse[i][:, None] * v), 0, 63) for i, v in enumerate((scale, minimum))]
    factors = [(v.max(-1) / 63).astype(jnp.float16) for v in (scale, minimum)]
    d, m = (f.astype(jnp.float32)[:, None] * s for f, s in zip(factors, small, strict=True))
    codes = jnp.round((x + m[..., None]) / jnp.where(d > 0, d, 1)[..., None])
    codes = jnp.where(d[..., None] > 0, jnp.clip(codes, 0, 31), 0).astype(jnp.uint8)

    s, m = (v.astype(jnp.uint8) for v in small)
    scales = [s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]
    high = sum((codes[:, i] >> 4) << i for i in range(SUPER // SUB))
    low = (codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4
    halves = [jax.lax.bitcast_convert_type(f, jnp.uint8) for f in factors]
    return jnp.concatenate([*halves, *scales, high, low.reshape(len(x), -1)], axis=1)


def _search(x: Float[Array, "supers subs 32"]) -> tuple[Float[Array, "supers subs"], Float[Array, "supers subs"]]:
    """The scale and the minimum (as a positive number) of least weighted squared error, of 17 tried."""
    weights = jnp.sqrt(jnp.mean(x * x, -1, keepdims=True)) + jnp.abs(x)
    low, high = jnp.minimum(x.min(-1), 0), x.max(-1)
    span = jnp.where(high > low, high - low, 1)
    sum_w, sum_x = weights.sum(-1), (weights * x).sum(-1)

    def codes(levels):
        return jnp.clip(jnp.round((levels / span)[..., None] * (x - low[..., None])), 0, 31)

    def error(scale, minimum, q):
        return (weights * jnp.square(scale[..., None] * q + minimum[..., None] - x)).sum(-1)

    def attempt(best, step):
        q = codes(31 - 0.5 + 0.1 * step)
        sum_q, sum_qq, sum_xq = ((weights * v).sum(-1) for v in (q, q * q, q * x))
        determinant = sum_w * sum_qq - sum_q * sum_q
        safe = jnp.where(determinant > 0, determinant, 1)
        scale = (sum_w * sum_xq - sum_x * sum_q) / safe
        minimum = (sum_qq * sum_x - sum_q * sum_xq) / safe
        scale = jnp.where(minimum > 0, sum_xq / jnp.where(sum_qq > 0, sum_qq, 1), scale)
        minimum = jnp.minimum(minimum, 0)
        trial = (error(scale, minimum, q), scale, minimum)
        better = (determinant > 0) & (trial[0] < best[0])
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), trial, best), None

    first = (error(span / 31, low, codes(31.0)), span / 31, low)
    (_, scale, minimum), _ = jax.lax.scan(attempt, first, jnp.arange(16, dtype=jnp.float32))
    flat = high == low  # all equal and not above zero: codes 0, the minimum alone
    return jnp.where(flat, 0, scale), jnp.maximum(-minimum, 0)
