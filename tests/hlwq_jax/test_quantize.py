import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from hlwq_jax import BEST_RECIPE, TABLES, Recipe, dequantize, lloyd_max, quantize, random_signs
from hlwq_jax.energy import measure, plausible
from hlwq_jax.quantize import nearest, rows_at_once

from .conftest import gaussian


def test_worked_example():
    weight = np.array([[0.5, -1.25, 2.0, 0.75, -0.5, 3.0, -2.25, 1.0]], np.float32)
    quantized = quantize(weight, block_size=8)
    assert quantized.codes.tolist() == [[19, 11, 16, 16, 16, 27, 7, 16]]
    assert quantized.norms.tobytes().hex() == "a844"
    assert quantized.dequantize()[0].view(np.uint16).tobytes().hex() == "eb3ea8bff73f113fecbe3d4016c08a3f"


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "two_bit", "seven_bit", "eight_bit", "edge"])
def test_quantizer_reproduces_the_original_codes(hlwq_dir, name):
    bits = {"o_proj": 6, "two_bit": 2, "seven_bit": 7, "eight_bit": 8}.get(name, 5)
    weight = load_file(hlwq_dir / "original_f32.safetensors")[f"blk.0.attn.{name}.weight"]
    packed = load_file(hlwq_dir / "v4_dot_unpacked" / "model-00001-of-00001.safetensors")
    quantized = quantize(weight, bits=bits)
    expected = packed[f"blk.0.attn.{name}.codes"].view(np.uint8)
    differs = quantized.codes != expected
    if name == "edge":
        # Rotated values of the constant block are rounding noise around zero: codes 15 and 16 are interchangeable.
        assert set(quantized.codes[2, :128][differs[2, :128]]) <= {15, 16}
        differs[2, :128] = False
    assert not differs.any()
    np.testing.assert_array_equal(quantized.norms, packed[f"blk.0.attn.{name}.norms"])


def test_a_zero_block_stores_the_lower_middle_code_and_decodes_to_zero():
    quantized = quantize(np.zeros((1, 128), np.float32))
    assert set(quantized.codes.ravel()) == {15}
    assert quantized.norms[0, 0] == 0
    assert not quantized.dequantize().any()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_nearest_is_a_search_among_midpoints(table, bits):
    levels = lloyd_max(bits, table)
    midpoints = (levels[:-1] + levels[1:]) / np.float32(2)
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 2
    edges = [np.nextafter(midpoints, np.float32(side)) for side in (-9, 9)]
    values = np.concatenate([values, midpoints, *edges, levels, np.array([0, -0.0, 1e9, -1e9], np.float32)])
    np.testing.assert_array_equal(nearest(values, levels), np.searchsorted(midpoints, values, side="left"))


@pytest.mark.parametrize(
    ("bits", "table", "expected"),
    [(3, "A", 0.9829), (4, "B", 0.99533), (5, "A", 0.99855), (5, "converged", 0.99877), (6, "converged", 0.99968)],
)
def test_cosine_of_gaussian_weights(bits, table, expected):
    weight = gaussian(128, 512)
    decoded = quantize(weight, bits=bits, table=table).dequantize().astype(np.float32)
    cosine = np.sum(weight * decoded) / np.sqrt(np.sum(weight**2) * np.sum(decoded**2))
    assert cosine == pytest.approx(expected, abs=0.0005 if bits == 3 else 0.0001)  # 65,536 samples


@pytest.mark.parametrize(("in_features", "block_size"), [(300, 128), (1, 8), (40, 32), (1000, 1024), (3, 1)])
def test_rows_are_padded_to_whole_blocks(in_features, block_size):
    weight = gaussian(5, in_features)
    quantized = quantize(weight, bits=8, block_size=block_size)
    assert quantized.codes.shape == (5, -(-in_features // block_size) * block_size)
    decoded = quantized.dequantize().astype(np.float32)
    assert decoded.shape == weight.shape
    # 8 bits resolve a level to about 1 % of a block's root mean square, which one-value blocks show in full.
    np.testing.assert_allclose(decoded, weight, atol=0.05 * np.abs(weight).max())


def test_norms_that_float16_cannot_hold_are_refused():
    for value in (1e5, np.inf, np.nan, 1e30):
        weight = gaussian(3, 256)
        weight[1, 130] = value
        with pytest.raises(ValueError, match="row 1, block 1"):
            quantize(weight)


def test_codes_without_a_level_are_refused():
    with pytest.raises(ValueError, match="below 32, got 32"):
        dequantize(np.full((1, 8), 32, np.uint8), np.ones((1, 1), np.float16), lloyd_max(5), block_size=8)


def relative_error(weight, quantized) -> float:
    return float(np.sum((quantized.dequantize().astype(np.float32) - weight) ** 2) / np.sum(weight**2))


FAMILIES = {
    "Gaussian": lambda rng, shape: rng.standard_normal(shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "Student-t": lambda rng, shape: rng.standard_t(5, size=shape),
    "non-zero mean": lambda rng, shape: rng.standard_normal(shape) + 1,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_signs_and_a_trellis_every_family_has_the_error_of_gaussian_weights(family):
    weight = FAMILIES[family](np.random.default_rng(0), (64, 1024)).astype(np.float32)
    assert relative_error(weight, BEST_RECIPE.quantize(weight)) < 0.00125  # 0.0012, and 2 % for so few values
    converged = Recipe(table="converged", sign_seed=0, norm="least-squares").quantize(weight)
    assert relative_error(weight, converged) < 0.00247
    if family == "non-zero mean":
        assert relative_error(weight, quantize(weight, table="converged")) > 0.05  # what signs are for


def test_signs_are_those_of_splitmix64():
    # Its first outputs for the seed 0: e220a839…, 6e789e6a…, 06c45d18…, f88bb8a8…, 1b39896a….
    assert random_signs(5, 0).tolist() == [-1, 1, 1, -1, 1]
    assert abs(random_signs(10000, 7).sum(dtype=int)) < 400  # four standard deviations


def test_signs_only_turn_columns():
    weight = gaussian(5, 300)
    signs = random_signs(300, 3)
    quantized, turned = quantize(weight, signs=signs), quantize(weight * signs)
    np.testing.assert_array_equal(quantized.codes, turned.codes)
    np.testing.assert_array_equal(quantized.dequantize(), turned.dequantize() * signs)


@pytest.mark.parametrize("recipe", [Recipe(table="converged"), Recipe(history_bits=3)])
def test_the_least_squares_norm_is_the_best(recipe):
    weight = gaussian(32, 256)
    plain, fitted = (
        quantize(weight, table=recipe.table, history_bits=recipe.history_bits, norm=norm)
        for norm in ("l2", "least-squares")
    )
    np.testing.assert_array_equal(plain.codes, fitted.codes)
    best = relative_error(weight, fitted)
    assert best < relative_error(weight, plain)
    for factor in (0.995, 1.005):
        moved = (fitted.norms * np.float16(factor)).astype(np.float16)
        decoded = dequantize(fitted.codes, moved, fitted.centroids, history_bits=recipe.history_bits)
        assert np.sum((decoded.astype(np.float32) - weight) ** 2) / np.sum(weight**2) > best


@pytest.mark.parametrize(("bits", "table", "block_size"), [(5, "A", 128), (5, "B", 64), (4, "C", 128), (6, "A", 64)])
def test_the_fitted_norm_mends_what_is_clipped_and_its_codes_are_still_those_of_the_table(bits, table, block_size):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((256, 8 * block_size)).astype(np.float32)
    weight[:, : 2 * block_size] += rng.uniform(0, 1.5, (256, 1))  # two blocks of eight have a mean
    weight[0, :block_size] = 0.3  # and one has nothing else
    recipe = {"bits": bits, "table": table, "block_size": block_size}
    squares, fitted = quantize(weight, **recipe, norm="least-squares"), quantize(weight, **recipe, norm="fitted")

    error, best = relative_error(weight, squares), relative_error(weight, fitted)
    assert best < 0.5 * error
    # Most blocks without a mean keep their codes: only few are clipped.
    centred = slice(2 * block_size, None)
    assert (squares.codes[:, centred] != fitted.codes[:, centred]).mean() < 0.1

    measured = measure(fitted.codes.reshape(-1, block_size), fitted.centroids)
    assert measured.num_impossible == 0
    assert plausible(measured, fitted.centroids, block_size)


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(norm="fitted"), BEST_RECIPE, Recipe(table="converged", norm="least-squares")]
)
def test_slices_of_rows_are_quantized_as_the_whole(recipe, monkeypatch):
    monkeypatch.setattr(sys.modules["hlwq_jax.quantize"], "_CHUNK", 16 * 384)
    weight = gaussian(70, 300)
    whole, step = recipe.quantize(weight), rows_at_once(300)
    assert step == 16
    parts = [recipe.quantize(weight[start : start + 2 * step]) for start in range(0, 70, 2 * step)]
    np.testing.assert_array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    np.testing.assert_array_equal(np.concatenate([part.norms for part in parts]), whole.norms)


@pytest.mark.parametrize(
    ("bits", "block_size", "in_features"), [(2, 128, 100), (3, 64, 200), (4, 32, 32), (6, 256, 300)]
)
def test_trellises_of_other_widths_and_blocks(bits, block_size, in_features):
    weight = gaussian(24, in_features)
    recipe = Recipe(bits=bits, block_size=block_size, history_bits=3, sign_seed=1, norm="least-squares")
    scalar = Recipe(bits=bits, block_size=block_size, table="converged", sign_seed=1, norm="least-squares")
    assert relative_error(weight, recipe.quantize(weight)) < 0.8 * relative_error(weight, scalar.quantize(weight))


def test_a_trellis_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="got bits 8, history_bits 3"):
        quantize(gaussian(2, 128), bits=8, history_bits=3)


def test_a_zero_block_decodes_to_zero_by_every_recipe():
    for recipe in (BEST_RECIPE, Recipe(norm="least-squares"), Recipe(norm="fitted")):
        quantized = recipe.quantize(np.zeros((1, 128), np.float32))
        assert quantized.norms[0, 0] == 0
        assert not quantized.dequantize().any()
