"""The layout of codes on the device: uint32 words along the input axis, unpacked by shifts that fuse into one kernel.

Up to six bits, `lo` holds the low four bits of eight neighbours and `hi` what is above them: 1 or 2 bits (5 and 6 bits
a code) of 32 or 16 neighbours. Two and three bits ride in the nibbles. A 5-bit weight so takes exactly 5 bits, and one
elementwise kernel without scratch memory unpacks it on every target, which the groups of 5 bytes in the files do not
allow. The codes of a trellis are stored alike; at 5 bits their paths are `hi`, where a window is a shift of two words.
Seven and eight bits take a byte: `lo` then holds four neighbours and there is no `hi`. Two nibble planes would be as
small, but took 1.7 times as long to unpack (scripts/bench_quantized_linear.py).
"""

from functools import reduce
from operator import or_

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


def unpack_indices(
    lo: UInt32[Array, "*batch lo"],
    hi: UInt32[Array, "*batch hi"] | None,
    *,
    bits: int,
    history_bits: int,
    block_size: int,
    num_codes: int,
) -> UInt32[Array, "*batch codes"]:
    """Where in the table the levels of a weight's rows stand: codes, or with a trellis `trellis_indices` of each block.

    Shifts and masks as well, and one more word read for each.
    """
    codes = unpack_planes(lo, hi, bits=bits, num_codes=num_codes)
    if not history_bits:
        return codes
    low, high = _widths(bits)
    if hi is None:
        words, width, place = lo, low, bits - 1
    else:
        words, width, place = hi, high, bits - 1 - low
    windows = _windows(words, width, place, history_bits)[..., :num_codes]
    # What lies before a block does not count: its first code has no history, the next one bit, and so on.
    missing = np.maximum(history_bits - np.arange(block_size), 0).astype(np.uint32)
    blocks = windows.reshape(*windows.shape[:-1], -1, block_size)
    windows = (blocks >> missing << missing).reshape(windows.shape)
    return codes & jnp.uint32(2 ** (bits - 1) - 1) | windows << (bits - 1)


def _windows(words: jax.Array, width: int, place: int, history_bits: int) -> jax.Array:
    """Bit `place` of each field of `width` bits (on top) and of the `history_bits` fields before it."""
    before = jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(1, 0)])[..., :-1]
    used = np.arange(width, 33, width, dtype=np.uint32)  # bits of the word up to the end of each field
    fields = words[..., None] << (32 - used) | before[..., None] >> used
    fields = fields.reshape(*words.shape[:-1], -1)  # a field is now at the top of its word, those before it below
    if width == 1:
        return fields >> (31 - history_bits)
    paths = [fields >> (32 - width * (age + 1) + place) & 1 for age in range(history_bits + 1)]
    return reduce(or_, (path << (history_bits - age) for age, path in enumerate(paths)))


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
