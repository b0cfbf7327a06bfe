import hashlib
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file

from hlwq_jax import TABLES, TableName, lloyd_max

# First 16 hex digits of the SHA-256 of the little-endian float32 table, at 2 to 6 bits.
HASHES = {
    "A": ("6c5d865914121f63", "841adbc9cd7646b4", "b0f9b2ecfbedd304", "f303a6b12f99e9c2", "c0df895f9fab98de"),
    "B": ("13df7a9a27502900", "51eb4ea204ba261a", "0fda671ea2c7906f", "40fe08c2ab7d7cbd", "794be8ee3c0aea57"),
    "C": ("1fe9a788c5f3cfcb", "b807bd6cf9ab5708", "bc49b09366df7711", "baaa8df6bc4ba064", "c43f2c70b280ed24"),
}


@pytest.mark.parametrize("table", ["A", "B", "C"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_tables_have_the_published_hashes(table, bits):
    digest = hashlib.sha256(lloyd_max(bits, table).astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == HASHES[table][bits - 2]


def test_tables_equal_the_original_functions_bit_for_bit(hlwq_dir):
    published = load_file(hlwq_dir / "centroids.safetensors")
    tables: tuple[TableName, ...] = ("A", "B")
    for table in tables:
        for bits in range(1, 9):
            np.testing.assert_array_equal(lloyd_max(bits, table), published[f"{table}{bits}"])
    assert len(published) == 16


def test_converged_table_at_5_bits():
    expected = [0.06588966, 0.1980518, 0.3313783, 0.4666995, 0.6049336, 0.7471357, 0.8945651, 1.048783]
    expected += [1.211804, 1.38634, 1.576228, 1.787233, 2.028728, 2.317739, 2.69112, 3.260732]
    # The expected values are printed to 7 digits.
    np.testing.assert_allclose(lloyd_max(5, "converged")[16:], expected, rtol=5e-7)
    np.testing.assert_allclose(lloyd_max(1, "converged"), [-((2 / np.pi) ** 0.5), (2 / np.pi) ** 0.5], rtol=1e-7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_converged_levels_are_the_means_of_their_cells(bits):
    from hlwq_jax.codebook import _cell_mean, _converged

    levels = _converged(bits)
    edges = np.concatenate([[-np.inf], (levels[:-1] + levels[1:]) / 2, [np.inf]])
    means = [_cell_mean(float(a), float(b), 0.0) for a, b in pairwise(edges)]
    # Probabilities of upper cells cancel in `_cell_mean` (1 - 1e-6 and the like): that costs it, not the table, digits.
    np.testing.assert_allclose(levels, means, atol=1e-8)


def test_every_table_ascends_and_is_antisymmetric():
    for table in TABLES:
        for bits in range(1, 9):
            levels = lloyd_max(bits, table)
            assert (np.diff(levels) > 0).all()
            np.testing.assert_array_equal(levels, -levels[::-1])


def test_unknown_tables_and_widths_are_refused():
    with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
        lloyd_max(9)
