"""The layout of codes on the device: uint32 words along the input axis, unpacked by shifts that fuse into one kernel.

Up to six bits, `lo` holds the low four bits of eight neighbours and `hi` what is above them: 1 or 2 bits (5 and 6 bits
a code) of 32 or 16 neighbours. Two and three bits ride in the nibbles. A 5-bit weight so takes exactly 5 bits, and one
elementwise kernel without scratch memory unpacks it on every target, which the groups of 5 bytes in the files do not
allow. Seven and eight bits take a byte: `lo` then holds four neighbours and there is no `hi`. Two nibble planes
would be as small, but took 1.7 times as long to unpack (scripts/bench_quantized_linear.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32


def _widths(bits: int) -> tuple[int, int]:
    """Bits of a code that lie in `lo` and in `hi`."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    return (8, 0) if bits > 6 else (4, max(bits - 4, 0))


def plane_widths(num_codes: int, bits: int) -> tuple[int, int]:
    """Words per row in `lo` and in `hi` (0 where there is no `hi`)."""
    low, high = _widths(bits)
    return -(-num_codes * low // 32), -(-num_codes * high // 32)


def pack_planes(
    codes: UInt8[np.ndarray, "*batch codes"], bits: int
) -> tuple[UInt32[np.ndarray, "*batch lo"], UInt32[np.ndarray, "*batch hi"] | None]:
    """The planes of rows of codes; a row that does not fill its last word is filled up with zeros."""
    low, high = _widths(bits)
    return _plane(codes & np.uint8(2**low - 1), low), _plane(codes >> np.uint8(low), high) if high else None


def _plane(values: np.ndarray, width: int) -> np.ndarray:
    per_byte, per_word = 8 // width, 32 // width
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_word)])
    packed = np.zeros((*values.shape[:-1], values.shape[-1] // per_byte), np.uint8)
    for i in range(per_byte):
        packed |= values[..., i::per_byte] << np.uint8(width * i)
    return packed.view("<u4").astype(np.uint32, copy=False)


def unpack_planes(
    lo: UInt32[Array, "*batch lo"], hi: UInt32[Array, "*batch hi"] | None, *, bits: int, num_codes: int
) -> UInt32[Array, "*batch codes"]:
    """The codes of a weight's rows: shifts and masks only, so that a lookup fuses behind it."""
    low, high = _widths(bits)
    codes = _spread(lo, low)[..., :num_codes]
    if hi is not None:
        codes |= _spread(hi, high)[..., :num_codes] << low
    return codes


def _spread(words: jax.Array, width: int) -> jax.Array:
    shifts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    return ((words[..., None] >> shifts) & jnp.uint32(2**width - 1)).reshape(*words.shape[:-1], -1)


def planes_from_stream(
    stream: UInt8[np.ndarray, " bytes"], *, out_features: int, row_codes: int
) -> tuple[UInt32[np.ndarray, "out lo"], UInt32[np.ndarray, "out hi"]]:
    """The planes straight from a 5-bit stream of packing M, without codes in between: exact, and five times as fast.

    Rows must be whole words: `row_codes` a multiple of 32.
    """
    if row_codes % 32 or stream.size * 8 != out_features * row_codes * 5:
        raise ValueError(
            f"{out_features} rows of {row_codes} 5-bit codes need {out_features * row_codes * 5 / 8:g} bytes and whole "
            f"words a row, got {stream.size} bytes"
        )
    lo, hi = _repack(stream.reshape(out_features, row_codes // 8, 5))
    return np.asarray(lo), np.asarray(hi).view("<u4").astype(np.uint32, copy=False)


@jax.jit
def _repack(groups: jax.Array) -> tuple[jax.Array, jax.Array]:
    b = [groups[..., i].astype(jnp.uint32) for i in range(5)]
    top, last = b[0] << 24 | b[1] << 16 | b[2] << 8 | b[3], b[4]  # the 40 bits: 32 and 8
    lo, hi = jnp.zeros_like(top), jnp.zeros_like(top)
    for i in range(8):
        shift = 35 - 5 * i
        if shift >= 8:
            code = top >> (shift - 8)
        elif shift > 3:
            code = top << (8 - shift) | last >> shift
        else:
            code = last >> shift
        lo |= (code & 15) << (4 * i)
        hi |= ((code >> 4) & 1) << i
    return lo, hi.astype(jnp.uint8)
