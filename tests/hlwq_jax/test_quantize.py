import numpy as np
import pytest
from safetensors.numpy import load_file

from hlwq_jax import TABLES, dequantize, lloyd_max, quantize
from hlwq_jax.quantize import nearest

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
