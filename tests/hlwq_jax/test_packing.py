import numpy as np
import pytest

from hlwq_jax import pack, packed_length, unpack

ASCENDING = [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("codes", "bits", "packing", "expected"),
    [
        (ASCENDING, 3, "M", "053977"),
        (ASCENDING, 4, "M", "01234567"),
        (ASCENDING, 5, "M", "00443214c7"),
        (ASCENDING, 5, "L", "2088418a39"),
        (ASCENDING, 6, "M", "001083105187"),
        ([31, 0, 21, 10, 1, 30, 16, 15], 5, "M", "f82aa0fa0f"),
        ([31, 0, 21, 10, 1, 30, 16, 15], 5, "L", "1f54153c7c"),
        ([3, 0, 1, 2, 2, 1, 0, 3], 2, "M", "c693"),
        ([3, 0, 1, 2, 2, 1, 0, 3], 2, "L", "93c6"),
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, "H", "51627384"),
        ([19, 11, 16, 16, 16, 27, 7, 16], 5, "M", "9ae1086cf0"),
        ([19, 11, 16, 16, 16, 27, 7, 16], 5, "L", "734108f781"),
        ([0, 127, 128, 255], 8, "N", "007f80ff"),
        ([1, 0, 0, 0, 0, 0, 0, 1], 1, "L", "81"),
    ],
)
def test_published_vectors(codes, bits, packing, expected):
    codes = np.array(codes, np.uint8)
    packed = pack(codes, bits=bits, packing=packing, block_size=8)
    assert packed.tobytes().hex() == expected
    np.testing.assert_array_equal(unpack(packed, num_codes=len(codes), bits=bits, packing=packing, block_size=8), codes)


@pytest.mark.parametrize("packing", ["M", "L", "H", "N"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_inverts_pack(packing, bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, 48, dtype=np.uint8)
    try:
        length = packed_length(codes.size, bits=bits, packing=packing)
    except ValueError:
        assert (packing, bits) not in {("M", 5), ("L", 5), ("H", 4), ("N", 8)}
        return
    packed = pack(codes, bits=bits, packing=packing, block_size=16)
    assert packed.size == length
    np.testing.assert_array_equal(unpack(packed, num_codes=48, bits=bits, packing=packing, block_size=16), codes)


def test_a_last_group_is_filled_up_with_zeros():
    packed = pack(np.array([31], np.uint8), bits=5, packing="M")
    assert packed.tobytes().hex() == "f800000000"
    assert unpack(packed, num_codes=1, bits=5, packing="M").tolist() == [31]


def test_codes_too_large_and_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="below 32 at 5 bits, got 32"):
        pack(np.array([32], np.uint8), bits=5, packing="M")
    with pytest.raises(ValueError, match="take 5 bytes, got 4"):
        unpack(np.zeros(4, np.uint8), num_codes=8, bits=5, packing="M")
