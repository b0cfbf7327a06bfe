import numpy as np
import pytest

from hlwq_jax import TABLES, lloyd_max
from hlwq_jax.energy import block_energies, expected_energy, highest_energy, measure, plausible

from .conftest import random_quantized

# (bits, written with): decoded with A, B, C; computed independently for blocks of 128.
EXPECTED = {
    (4, "A"): (0.9929, 0.9843, 0.9471),
    (4, "C"): (1.0386, 1.0295, 0.9901),
    (5, "A"): (1.0012, 0.9854, 0.8617),
    (5, "B"): (1.0175, 1.0009, 0.8752),
    (5, "converged"): (1.4942, 1.4651, 1.2812),
    (6, "B"): (1.0067, 1.0009, 0.8053),
}


@pytest.mark.parametrize(("bits", "written"), EXPECTED)
def test_expected_energies(bits, written):
    for table, expected in zip(TABLES, EXPECTED[bits, written], strict=False):
        computed = expected_energy(lloyd_max(bits, table), 128, written=lloyd_max(bits, written))
        assert computed == pytest.approx(expected, abs=0.0001)  # the expected values have 4 decimals


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_no_block_exceeds_the_highest_energy(bits):
    rng = np.random.default_rng(0)
    levels = lloyd_max(bits)
    midpoints = (levels[:-1] + levels[1:]) / 2
    kinds = [rng.standard_normal((500, 128)), rng.standard_t(2, (500, 128)), rng.choice([-1.0, 1.0], (500, 128))]
    kinds += [rng.standard_normal((500, 128)) * (rng.random((500, 128)) < 0.1), rng.uniform(0.9, 1.2, (500, 128))]
    for z in kinds:
        z = z / np.sqrt((z**2).mean(axis=1, keepdims=True))
        codes = np.searchsorted(midpoints, z).astype(np.uint8)
        assert block_energies(codes, levels).max() <= highest_energy(levels) + 1e-6  # float32 squares


@pytest.mark.parametrize("block_size", [8, 32, 128, 512])
def test_true_codes_are_plausible_and_shuffled_bits_are_not(block_size):
    codes = random_quantized(64, 1024, block_size=block_size).codes.reshape(-1, block_size)
    levels = lloyd_max(5)
    assert plausible(measure(codes, levels), levels, block_size)
    uniform = np.random.default_rng(0).integers(0, 32, codes.shape, dtype=np.uint8)
    assert not plausible(measure(uniform, levels), levels, block_size)


def test_constant_blocks_saturate_and_are_counted():
    from hlwq_jax import quantize

    weight = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    weight[:8, :128] = 1.0
    measured = measure(quantize(weight).codes.reshape(-1, 128), lloyd_max(5))
    assert (measured.num_saturated, measured.num_impossible) == (8, 0)
    assert measured.mean == pytest.approx(1.0012, abs=0.005)  # 120 blocks
