import hashlib
import importlib.resources
from itertools import product

import numpy as np
import pytest

from hlwq_jax import trellis_encode, trellis_indices, trellis_table
from hlwq_jax.trellis import HISTORY_BITS, TRELLIS_BITS
from scripts.train_trellis import train


def unit_blocks(num_blocks: int, block_size: int = 128, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((num_blocks, block_size), dtype=np.float32)
    return values / np.sqrt(np.mean(values**2, axis=1, keepdims=True))


def squared_errors(values: np.ndarray, codes: np.ndarray, table: np.ndarray, *, bits: int) -> np.ndarray:
    history_bits = len(table).bit_length() - 1 - bits
    return ((table[trellis_indices(codes, bits=bits, history_bits=history_bits)] - values) ** 2).sum(axis=-1)


def test_the_tables_are_those_that_files_were_written_with():
    # Checkpoints hold their tables; whoever trains these anew changes what is written from then on.
    digest = hashlib.sha256()
    for bits, history_bits in product(TRELLIS_BITS, HISTORY_BITS):
        table = trellis_table(bits, history_bits)
        assert table.shape == (2 ** (bits + history_bits),)
        assert (np.diff(table.reshape(-1, 2 ** (bits - 1))) > 0).all()
        digest.update(table.astype("<f4").tobytes())
    assert digest.hexdigest()[:16] == "f2b2fd2d0e533d37"
    assert len(importlib.resources.files("hlwq_jax").joinpath("trellis.npz").read_bytes()) < 100_000


def test_an_index_is_the_paths_so_far_above_the_rest_of_the_code():
    codes = np.array([[0b10110, 0b01000, 0b11111, 0b00001, 0b10000]], np.uint8)
    windows = [0b1000, 0b0100, 0b1010, 0b0101, 0b1010]  # this path, the one before, two before, three before
    rests = [0b0110, 0b1000, 0b1111, 0b0001, 0b0000]
    expected = [[w * 16 + r for w, r in zip(windows, rests, strict=True)]]
    assert trellis_indices(codes, bits=5, history_bits=3).tolist() == expected
    assert trellis_indices(codes, bits=5, history_bits=0).tolist() == codes.tolist()
    assert trellis_indices(codes[:, :1], bits=5, history_bits=7).tolist() == [[0b10000000 * 16 + 6]]


@pytest.mark.parametrize(("bits", "history_bits", "block_size"), [(2, 3, 5), (2, 7, 5), (3, 5, 3)])
def test_no_other_codes_come_closer(bits, history_bits, block_size):
    table, values = trellis_table(bits, history_bits), unit_blocks(40, block_size)
    found = squared_errors(values, trellis_encode(values, table, bits=bits), table, bits=bits)
    every = np.array(list(product(range(2**bits), repeat=block_size)), np.uint8)
    best = np.stack([squared_errors(block, every, table, bits=bits).min() for block in values])
    # The search knows values to a 50th: at a tie it may take the other level.
    np.testing.assert_allclose(found, best, rtol=1e-3, atol=1e-3)
    assert np.mean(np.isclose(found, best, rtol=1e-5)) > 0.9


@pytest.mark.parametrize(
    ("bits", "history_bits", "expected"),
    [(5, 3, 0.00142), (5, 5, 0.00129), (5, 7, 0.00121), (4, 7, 0.00477), (6, 7, 0.000306), (3, 5, 0.0199)],
)
def test_squared_error_of_gaussian_blocks(bits, history_bits, expected):
    table, values = trellis_table(bits, history_bits), unit_blocks(512)
    error = squared_errors(values, trellis_encode(values, table, bits=bits), table, bits=bits).mean() / 128
    # Of 65,536 values, of which the error varies by half its mean from one to the next.
    assert error == pytest.approx(expected, rel=0.02)


def test_the_codes_of_a_block_depend_on_it_alone():
    table, values = trellis_table(5, 3), unit_blocks(100, 64)
    codes = trellis_encode(values, table, bits=5)
    for some in (slice(0, 1), slice(17, 50), slice(99, 100)):
        np.testing.assert_array_equal(trellis_encode(values[some], table, bits=5), codes[some])


def test_blocks_at_once_change_no_code(monkeypatch):
    table, values = trellis_table(4, 5), unit_blocks(100)
    codes = trellis_encode(values, table, bits=4)
    monkeypatch.setattr("hlwq_jax.trellis._COSTS_ON_CPU", 1)
    np.testing.assert_array_equal(trellis_encode(values, table, bits=4), codes)


def test_values_beyond_all_levels_take_the_outermost():
    values = np.zeros((1, 128), np.float32)
    values[0, 50] = 128**0.5  # a block that is a Walsh function
    table = trellis_table(5, 7)
    decoded = table[trellis_indices(trellis_encode(values, table, bits=5), bits=5, history_bits=7)]
    assert decoded[0, 50] == table.max()


def test_the_script_trains_the_tables_that_are_shipped():
    # Another machine rounds otherwise, and a code in a million changes.
    np.testing.assert_allclose(train(2, 3), trellis_table(2, 3), atol=1e-3)


def test_a_trellis_without_a_table_is_refused():
    with pytest.raises(
        ValueError, match=r"2, 3, 4, 5 or 6 bits with 3, 5 or 7 history bits .*, got bits 8, history_bits 4"
    ):
        trellis_table(8, 4)
