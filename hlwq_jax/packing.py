"""Codes as published bytes, and back: the four packings of the files.

`M` is a dense bit stream, most significant bit first; `L` a dense 5-bit stream, least significant bit first (and the
1- and 2-bit form that one later notebook writes); `H` keeps two halves of a block in the nibbles of a byte; `N` is one
code per byte. All streams run over the whole tensor, row after row, so that any run of blocks is a run of bytes.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Int8, UInt8

Packing = Literal["M", "L", "H", "N"]

# bits: (codes in a group, bytes in a group). Packing M keeps 1, 7 and 8 bits as plain bytes.
_GROUPS_M = {1: (1, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 5: (8, 5), 6: (4, 3), 7: (1, 1), 8: (1, 1)}
_GROUPS_L = {1: (8, 1), 2: (4, 1), 5: (8, 5)}


def packed_length(num_codes: int, *, bits: int, packing: Packing) -> int:
    """Bytes that hold `num_codes` codes; raises where the packing does not exist at this width."""
    codes, num_bytes = _group(bits, packing)
    return math.ceil(num_codes / codes) * num_bytes


def _group(bits: int, packing: Packing) -> tuple[int, int]:
    if packing == "N" and 1 <= bits <= 8:
        return 1, 1
    if packing == "H" and bits in (1, 2, 3, 4):
        return 2, 1
    groups = {"M": _GROUPS_M, "L": _GROUPS_L}.get(packing, {})
    if bits not in groups:
        raise ValueError(f"packing {packing} does not exist at {bits} bits: M has 1-8, L has 1, 2, 5, H has 2-4, N 1-8")
    return groups[bits]


def pack(
    codes: UInt8[np.ndarray, "..."], *, bits: int, packing: Packing, block_size: int = 128
) -> UInt8[np.ndarray, " bytes"] | Int8[np.ndarray, " bytes"]:
    """The byte stream of codes (taken in row-major order), filled up with zero codes to a whole group."""
    group, num_bytes = _group(bits, packing)
    if codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"codes must be below {2**bits} at {bits} bits, got {int(codes.max())}")
    flat = np.ascontiguousarray(codes).reshape(-1)
    if packing == "N":
        return flat.view(np.int8)
    if packing == "H":
        _check_halves(flat.size, block_size)
        halves = flat.reshape(-1, 2, block_size // 2)
        return (halves[:, 0] | (halves[:, 1] << 4)).reshape(-1)
    if group == 1:
        return flat
    flat = np.pad(flat, (0, -flat.size % group)).reshape(-1, group)
    word_type = np.uint64 if bits * group > 32 else np.uint32
    word = np.zeros(len(flat), word_type)
    for i in range(group):
        word |= flat[:, i].astype(word_type) << word_type(_shift(i, group, bits, packing))
    out = np.empty((len(flat), num_bytes), np.uint8)
    for i in range(num_bytes):
        out[:, i] = (word >> word_type(_shift(i, num_bytes, 8, packing))).astype(np.uint8)
    return out.reshape(-1)


def unpack(
    data: UInt8[np.ndarray, "..."] | Int8[np.ndarray, "..."],
    *,
    num_codes: int,
    bits: int,
    packing: Packing,
    block_size: int = 128,
) -> UInt8[np.ndarray, " num_codes"]:
    """The first `num_codes` codes of a byte stream. Bytes are read as unsigned, whatever the type says."""
    group, num_bytes = _group(bits, packing)
    expected = packed_length(num_codes, bits=bits, packing=packing)
    if data.size != expected:
        raise ValueError(
            f"{num_codes} codes of {bits} bits in packing {packing} take {expected} bytes, got {data.size}"
        )
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if packing == "H":
        _check_halves(num_codes, block_size)
        halves = flat.reshape(-1, 1, block_size // 2)
        return np.concatenate([halves & 15, halves >> 4], axis=1).reshape(-1)
    if group == 1:
        return flat.copy()
    flat = flat.reshape(-1, num_bytes)
    word_type = np.uint64 if bits * group > 32 else np.uint32
    word = np.zeros(len(flat), word_type)
    for i in range(num_bytes):
        word |= flat[:, i].astype(word_type) << word_type(_shift(i, num_bytes, 8, packing))
    codes = np.empty((len(flat), group), np.uint8)
    for i in range(group):
        codes[:, i] = (word >> word_type(_shift(i, group, bits, packing))).astype(np.uint8) & np.uint8(2**bits - 1)
    return codes.reshape(-1)[:num_codes]


def _shift(i: int, count: int, width: int, packing: Packing) -> int:
    """Where item `i` of a group lies in the group's word: the first item on top in M, at the bottom in L."""
    return width * (count - 1 - i) if packing == "M" else width * i


def _check_halves(num_codes: int, block_size: int) -> None:
    if block_size % 2 or num_codes % block_size:
        raise ValueError(
            f"packing H takes whole blocks of an even size, got {num_codes} codes and blocks of {block_size}"
        )
