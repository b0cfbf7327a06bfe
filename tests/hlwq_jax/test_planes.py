import jax.numpy as jnp
import numpy as np
import pytest

from hlwq_jax import pack, pack_planes, plane_widths, planes_from_stream, trellis_indices, unpack_indices, unpack_planes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("num_codes", [128, 24, 6])
def test_unpack_inverts_pack(bits, num_codes):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, num_codes), dtype=np.uint8)
    lo, hi = pack_planes(codes, bits)
    assert (lo.shape[-1], 0 if hi is None else hi.shape[-1]) == plane_widths(num_codes, bits)
    lo, hi = jnp.asarray(lo), None if hi is None else jnp.asarray(hi)
    np.testing.assert_array_equal(unpack_planes(lo, hi, bits=bits, num_codes=num_codes), codes)


def test_words_hold_neighbours_lowest_first():
    codes = np.array([[16 + 1, 2, 0, 0, 0, 0, 0, 16 + 15] + [0] * 24], np.uint8)
    lo, hi = pack_planes(codes, 5)
    assert hi is not None
    assert [hex(word) for word in lo[0]] == ["0xf0000021", "0x0", "0x0", "0x0"]
    assert [hex(word) for word in hi[0]] == ["0x81"]


def test_five_bits_take_five_bits():
    assert plane_widths(4096, 5) == (512, 128)
    assert plane_widths(4096, 4) == (512, 0)
    assert plane_widths(4096, 8) == (1024, 0)


def test_planes_come_straight_from_a_published_stream():
    codes = np.random.default_rng(0).integers(0, 32, (3, 160), dtype=np.uint8)
    stream = pack(codes, bits=5, packing="M")
    for plane, expected in zip(
        planes_from_stream(stream, out_features=3, row_codes=160), pack_planes(codes, 5), strict=True
    ):
        np.testing.assert_array_equal(plane, expected)
    with pytest.raises(ValueError, match="got 299 bytes"):
        planes_from_stream(stream[:-1], out_features=3, row_codes=160)


@pytest.mark.parametrize("bits", range(2, 7))
@pytest.mark.parametrize(("num_codes", "block_size"), [(256, 128), (96, 32), (24, 8), (6, 1)])
def test_indices_of_a_trellis_come_straight_from_planes(bits, num_codes, block_size):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 3, num_codes), dtype=np.uint8)
    lo, hi = pack_planes(codes, bits)
    for history_bits in (0, 3, 5, 7):
        expected = trellis_indices(codes.reshape(2, 3, -1, block_size), bits=bits, history_bits=history_bits)
        found = unpack_indices(
            jnp.asarray(lo),
            None if hi is None else jnp.asarray(hi),
            bits=bits,
            history_bits=history_bits,
            block_size=block_size,
            num_codes=num_codes,
        )
        np.testing.assert_array_equal(found, expected.reshape(codes.shape))
