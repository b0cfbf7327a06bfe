"""docs/format.md is held to the code: its decoder decodes, its examples are what the library writes and reads."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from hlwq_jax import BEST_RECIPE, QuantizedLinear, Recipe, pack_planes, trellis_indices

from .conftest import assert_decodes, gaussian

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
RECIPES = {
    "scalar": Recipe(block_size=8),
    "trellis": Recipe(block_size=8, history_bits=3, sign_seed=0, norm="least-squares"),
}


def fenced(kind: str) -> str:
    found = re.search(rf"^```{kind}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def decode():
    names: dict = {}
    exec(fenced("python"), names)
    return names["decode"]


def arrays_of(quantized) -> dict[str, np.ndarray]:
    lo, hi = pack_planes(quantized.codes, quantized.bits)
    arrays = {"lo": lo, "hi": hi, "norms": quantized.norms, "scaled_centroids": quantized.scaled_centroids}
    return {name: a for name, a in (arrays | {"signs": quantized.signs}).items() if a is not None}


def hexadecimal(array: np.ndarray) -> list[list[str]]:
    unsigned = array.view(f"u{array.itemsize}")
    return [[f"{value:0{2 * array.itemsize}x}" for value in row] for row in unsigned.tolist()]


@pytest.mark.parametrize("name", RECIPES)
def test_the_examples_are_what_the_library_writes(name):
    example, weight = json.loads(fenced(f"json {name}")), np.array(json.loads(fenced("json weight")), np.float32)
    quantized = RECIPES[name].quantize(weight)
    arrays = arrays_of(quantized)
    places = trellis_indices(quantized.codes, bits=5, history_bits=quantized.history_bits)
    assert quantized.codes.tolist() == example["codes"]
    assert places.tolist() == example["places"]
    for plane in ("lo", "hi", "norms"):
        assert hexadecimal(arrays[plane]) == example[plane]
    assert ("signs" in arrays) == example["shape"]["signs"]
    assert arrays.get("signs", np.array([])).tolist() == example.get("signs", [])
    np.testing.assert_allclose(quantized.scaled_centroids[places], example["levels"], atol=5e-7)
    assert hexadecimal(quantized.dequantize()) == example["decoded"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_examples_decode_by_the_document_alone(name, decode):
    example = json.loads(fenced(f"json {name}"))
    shape = example["shape"]
    read = {"lo": np.uint32, "hi": np.uint32, "norms": np.uint16}
    arrays = {
        key: np.array([[int(value, 16) for value in row] for row in example[key]], kind) for key, kind in read.items()
    }
    arrays["norms"] = arrays["norms"].view(np.float16)
    arrays["scaled_centroids"] = np.zeros(2 ** (shape["bits"] + shape["history_bits"]), np.float32)
    arrays["scaled_centroids"][np.array(example["places"])] = example["levels"]
    if shape["signs"]:
        arrays["signs"] = np.array(example["signs"], np.int8)
    decoded = decode(arrays, **shape).astype(ml_dtypes.bfloat16)
    expected = np.array([[int(value, 16) for value in row] for row in example["decoded"]], np.uint16)
    assert_decodes(decoded, expected.view(ml_dtypes.bfloat16))  # levels are written to 6 digits


@pytest.mark.parametrize(
    "recipe",
    [*(Recipe(bits=bits) for bits in range(2, 9)), BEST_RECIPE]
    + [Recipe(bits=bits, history_bits=5, sign_seed=2, block_size=64) for bits in (2, 3, 4, 6)],
)
def test_the_documents_decoder_reads_what_the_library_writes(recipe, decode):
    quantized = recipe.quantize(gaussian(5, 300))
    layer = QuantizedLinear.from_quantized(quantized)
    shape = {"in_features": 300, "out_features": 5, "bits": layer.bits, "block_size": layer.block_size}
    shape |= {"history_bits": layer.history_bits, "signs": layer.signs is not None}
    decoded = decode(arrays_of(quantized), **shape)
    assert_decodes(decoded.astype(ml_dtypes.bfloat16), quantized.dequantize())
    assert_decodes(np.asarray(layer.dequantize()), quantized.dequantize())


def test_the_version_is_the_programs():
    from ltx_jax.checkpoint import FORMAT, VERSION

    assert f'"{FORMAT}"' in TEXT
    assert re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)[-1] == str(VERSION)
