"""Packing while converting: which linears, to which bits, what is said of them, and how the text encoder runs then."""

import json
import tracemalloc
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert import ConvertError, convert
from convert.__main__ import main
from convert.quantizing import OPTIONAL, quantize_tensor
from hlwq_jax import LazyTensor, QuantizedLinear, TensorFile, dequantize, pack_planes, quantize, unpack_planes
from ltx_jax.checkpoint import Configs, Manifest
from ltx_jax.load import load_component, load_configs
from ltx_jax.models.adaln import AdaLN
from ltx_jax.orbax_io import restore, save
from ltx_jax.text import text_hidden_states

from .conftest import PACKAGE

PARTS = ("lo", "hi", "norms", "scaled_centroids")


@pytest.fixture(scope="module")
def converted(mini_release, tmp_path_factory) -> tuple[Path, str]:
    """The miniature release with everything packed that can be, and what the command said of it."""
    dest = tmp_path_factory.mktemp("packed") / "mini"
    with redirect_stderr(StringIO()) as said:
        gemma = str(mini_release / "gemma-3-mini")
        assert main([str(mini_release / PACKAGE), str(dest), "--gemma", gemma, "--quantize", ",".join(OPTIONAL)]) == 0
    return dest, said.getvalue()


@pytest.fixture(scope="module")
def packed(converted) -> Path:
    return converted[0]


@pytest.fixture(scope="module")
def manifest(packed) -> Manifest:
    return Manifest.read(packed)


def linears(configs: Configs, component: str) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of every linear of a model, by path."""
    modules = nnx.iter_modules(configs.abstract(component))
    return {
        ".".join(map(str, path)): (module.in_features, module.out_features)
        for path, module in modules
        if isinstance(module, nnx.Linear)
    }


def adaln_linears(configs: Configs) -> set[str]:
    modules = dict(nnx.iter_modules(configs.abstract("transformer")))
    return {
        ".".join(map(str, path))
        for path, module in modules.items()
        if isinstance(module, nnx.Linear) and isinstance(modules[path[:-1]], AdaLN)
    }


# Which linears


def test_every_linear_of_the_text_encoder_is_packed_and_no_other_array(manifest, packed):
    expected = linears(load_configs(manifest), "gemma")
    assert len(expected) == 6 * 7
    shapes = {path: (shape.in_features, shape.out_features) for path, shape in manifest.quantized["gemma"].items()}
    assert shapes == expected
    assert {(shape.bits, shape.block_size) for shape in manifest.quantized["gemma"].values()} == {(5, 128)}
    names = {name for part in manifest.parts["gemma"] for name in restore(packed / "gemma" / part)}
    assert {name for name in names if not name.endswith(PARTS)} == {
        "embed.embedding",
        "norm.weight",
        *(
            f"layers.{n}.{norm}.weight"
            for n in range(6)
            for norm in ("attn.q_norm", "attn.k_norm", "pre_attn_norm", "post_attn_norm", "pre_ff_norm", "post_ff_norm")
        ),
    }


def test_groups_hold_connectors_projections_and_adaln_but_no_gates(manifest, mini_checkpoint):
    configs = load_configs(manifest)
    connectors = linears(configs, "connectors")
    gates = {path for path in connectors if path.endswith("to_gate_logits")}
    assert gates
    assert set(manifest.quantized["connectors"]) == set(connectors) - gates
    before = Manifest.read(mini_checkpoint).quantized
    assert set(before) == {"transformer"}
    assert set(manifest.quantized["transformer"]) == set(before["transformer"]) | adaln_linears(configs)


def test_what_arrives_packed_is_not_quantised_again(manifest, packed, mini_checkpoint):
    path = "audio.cross_gate_adaln.linear"  # the one AdaLN linear that this package packs
    here, before = (restore(folder / "transformer/shared") for folder in (packed, mini_checkpoint))
    for part in PARTS:
        np.testing.assert_array_equal(here[f"{path}.{part}"], before[f"{path}.{part}"])
    ours = manifest.provenance["quantized_here"]["linears"]
    assert f"transformer/{path}" not in ours
    assert {name for name in ours if name.startswith("transformer/")} == {
        f"transformer/{name}" for name in adaln_linears(load_configs(manifest)) - {path}
    }
    assert manifest.provenance["quantized"] == Manifest.read(mini_checkpoint).provenance["quantized"]


def test_blocks_of_an_unpacked_source_stay_as_they_are(ltx_dir, tmp_path, capsys):
    command = [str(ltx_dir / "checkpoint.safetensors"), str(tmp_path / "out"), "--quantize", "projection, adaln"]
    assert main(command) == 0
    manifest = Manifest.read(tmp_path / "out")
    assert set(manifest.quantized) == {"connectors", "transformer"}
    assert set(manifest.quantized["connectors"]) == {"projection.video", "projection.audio"}
    assert set(manifest.quantized["transformer"]) == adaln_linears(load_configs(manifest))
    text = capsys.readouterr().err
    assert "quantises      projection: 2 linears at 5 bits in blocks of 128" in text
    assert "gemma:" not in text  # there is none


def test_the_text_encoder_stays_as_it_is_with_16_bits(mini_checkpoint):
    assert "gemma" not in Manifest.read(mini_checkpoint).quantized
    assert "layers.0.attn.to_q.kernel" in restore(mini_checkpoint / "gemma/layers.000")


# To which bits


@pytest.mark.parametrize("published", ["layers.3.self_attn.q_proj", "layers.5.mlp.down_proj"])  # 36 and 96 inputs
def test_stored_planes_and_error_are_those_of_the_quantizer(manifest, packed, mini_release, published):
    files = [TensorFile(path) for path in (mini_release / "gemma-3-mini").glob("*.safetensors")]
    name = f"language_model.model.{published}.weight"
    weight = next(file for file in files if name in file).read(name)
    facts = manifest.provenance["quantized_here"]["linears"]
    path = next(key for key, fact in facts.items() if fact["published"] == f"{published}.weight")
    part, _, linear = path.removeprefix("gemma/layers.").partition(".")
    arrays = restore(packed / f"gemma/layers.{int(part):03d}")
    expected = quantize(weight)
    stem = f"layers.{part}.{linear}"
    codes = unpack_planes(
        jnp.asarray(arrays[f"{stem}.lo"]), jnp.asarray(arrays[f"{stem}.hi"]), bits=5, num_codes=expected.codes.shape[1]
    )
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(arrays[f"{stem}.norms"], expected.norms)
    np.testing.assert_array_equal(arrays[f"{stem}.scaled_centroids"], expected.scaled_centroids)
    original = weight[::16].astype(np.float32)
    decoded = expected.dequantize()[::16].astype(np.float32)
    error = np.linalg.norm(decoded - original) / np.linalg.norm(original)
    assert facts[path] == {
        "published": f"{published}.weight",
        "bits": 5,
        "relative_error": pytest.approx(error, abs=1e-5),
    }


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_slices_have_the_bits_of_the_whole(bits):
    # 5.1 million values are two slices, of which the second is not full.
    weight = np.random.default_rng(bits).standard_normal((2500, 2040), np.float32)
    ours = quantize_tensor(LazyTensor.from_array("weight", weight), bits=bits)
    expected = quantize(weight, bits=bits)
    lo, hi = pack_planes(expected.codes, bits)
    assert set(ours.arrays) == set(PARTS) - ({"hi"} if hi is None else set())
    np.testing.assert_array_equal(ours.arrays["lo"], lo)
    if hi is not None:
        np.testing.assert_array_equal(ours.arrays["hi"], hi)
    np.testing.assert_array_equal(ours.arrays["norms"], expected.norms)
    decoded = dequantize(expected.codes, expected.norms, expected.centroids, in_features=2040).astype(np.float32)
    error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
    assert ours.relative_error == pytest.approx(error, rel=0.01)  # a sixteenth of the rows: 300,000 values


def test_a_weight_of_zeros_is_exact():
    zeros = LazyTensor.from_array("weight", np.zeros((3, 200), np.float32))
    assert quantize_tensor(zeros, bits=5).relative_error == 0


# What is refused and said


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"gemma_bits": 9}, "gemma bits must be 2 to 8, or 16"),
        ({"gemma_bits": 1}, "got 1"),
        ({"quantize": ["adaln", "gates"]}, "nothing called gates.*connectors, projection, adaln"),
        ({"quantize": ["gemma"]}, "nothing called gemma"),
    ],
)
def test_unknown_bits_and_groups_are_refused_before_anything_is_read(tmp_path, more, match):
    with pytest.raises(ConvertError, match=match):
        convert(tmp_path / "nowhere", tmp_path / "out", **more)


def test_a_weight_that_cannot_be_packed_is_named_and_nothing_is_left(package, kept, rewrite, tmp_path, capsys):
    name = "text_embedding_projection.audio_aggregate_embed.weight"

    def change(tensors, metadata):
        tensors[name][2, 5] = 1e6

    rewrite(kept, change)
    assert main([str(package), str(tmp_path / "out"), "--quantize", "projection"]) == 2
    text = capsys.readouterr().err
    assert f"{name} (" in text
    assert "row 2, block 0 has a norm of" in text
    assert "convert with projection left out of --quantize" in text
    assert {path.name for path in tmp_path.iterdir()} == {"package"}


def test_the_command_says_what_it_will_quantise_and_the_size_of_the_arrays_it_will_write(converted, manifest):
    dest, said = converted
    lines = dict(line.split(maxsplit=1) for line in said.splitlines() if line.startswith(("quantises", "writes")))
    assert "quantises      gemma: 42 linears at 5 bits in blocks of 128: 207.4 kB become 198.2 kB" in said
    written = sum(
        array.nbytes
        for component, parts in manifest.parts.items()
        for part in parts
        for array in restore(dest / component / part).values()
    )
    assert lines["writes"] == f"{dest}, {written / 1e6:.4g} MB"


# The text encoder, packed


@pytest.fixture(scope="module")
def prompts(mini_release) -> tuple[np.ndarray, np.ndarray]:
    text = load_file(mini_release / "reference/text.safetensors")
    names = ("prompt0", "prompt1", "prompt2", "negative")
    ids = np.stack([text[f"in.{name}.input_ids"] for name in names])
    return ids, np.stack([text[f"in.{name}.attention_mask"] for name in names]).astype(bool)


def states(gemma: Any, prompts: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Hidden states of the prompts' tokens, in float32."""
    ids, mask = prompts
    return np.asarray(text_hidden_states(gemma, jnp.asarray(ids), jnp.asarray(mask), dtype=jnp.float32))[:, mask]


def test_the_packed_text_encoder_computes_with_its_decoded_weights(packed, manifest, mini_checkpoint, prompts):
    gemma: Any = load_component(packed, manifest, "gemma")
    plain: Any = load_component(mini_checkpoint, Manifest.read(mini_checkpoint), "gemma")
    published = states(plain, prompts)
    ours = states(gemma, prompts)
    count = 0
    modules = dict(nnx.iter_modules(gemma))
    for path, linear in list(nnx.iter_modules(plain)):
        if isinstance(linear, nnx.Linear):
            twin: Any = modules[path]
            assert isinstance(twin, QuantizedLinear)
            linear.kernel.set_value(jnp.swapaxes(twin.dequantize(), -1, -2))
            count += 1
    assert count == 7 * len(gemma.layers)
    # The same bfloat16 weights in float32 products: only the order of sums may differ.
    np.testing.assert_allclose(ours, states(plain, prompts), atol=2e-5 * np.abs(published).max(), rtol=0)
    # Matrices off by 4 to 5.5 % change a layer's output by 8 %, and what six layers of random weights add by 17.5 %.
    # The bounds lie halfway to 6 bits (11.6 %) and to 4 bits (33 %), on a scale of doubling.
    distance = np.linalg.norm(ours - published, axis=(1, 2)) / np.linalg.norm(published, axis=(1, 2))
    assert distance[0] == 0  # the embeddings are not quantised
    assert 0.14 < distance[-1] < 0.24


# Memory


def test_large_arrays_are_written_from_where_they_lie_and_read_in_pieces(tmp_path):
    array = np.arange(40 * 2**20, dtype=np.uint32).reshape(2**10, -1)  # 160 MiB
    tracemalloc.start()
    try:
        save(tmp_path / "part", {"weight": array, "bias": array[0]})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < array.nbytes / 4
    assert len(list((tmp_path / "part/weight/c").rglob("*"))) > 2
    found = restore(tmp_path / "part")
    np.testing.assert_array_equal(found["weight"], array)
    np.testing.assert_array_equal(found["bias"], array[0])


def test_the_manifest_stays_json_with_what_was_quantised(packed):
    content = json.loads((packed / "manifest.json").read_text())
    assert content["provenance"]["options"]["quantizing"] == {
        "gemma": 5,
        "connectors": 5,
        "projection": 5,
        "adaln": 5,
    }
    here = content["provenance"]["quantized_here"]
    assert (here["table"], here["block_size"]) == ("A", 128)
    # Gaussian weights at 5 bits: 5.4 % (1 - 0.99855 squared); short rows, padded, lie a little below.
    assert all(0.03 < fact["relative_error"] < 0.07 for fact in here["linears"].values())
