"""Packing while converting: which linears, to which bits, what is said of them, and how the text encoder runs then."""

import json
import tracemalloc
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert import ConvertError, convert
from convert.__main__ import _with_groups, main
from convert.quantizing import RECIPES, Quantizing, quantize_tensor
from hlwq_jax import LazyTensor, QuantizedLinear, TensorFile, pack_planes, unpack_planes
from ltx_jax.checkpoint import Configs, Manifest
from ltx_jax.load import load_component, load_configs
from ltx_jax.models.adaln import AdaLN
from ltx_jax.orbax_io import restore, save
from ltx_jax.text import text_hidden_states

from .conftest import PACKAGE

PARTS = ("lo", "hi", "norms", "scaled_centroids", "signs")
SCALAR = RECIPES["scalar"]


@pytest.fixture(scope="module")
def converted(mini_release, tmp_path_factory) -> tuple[Path, str]:
    """The miniature release with everything packed that can be, and what the command said of it."""
    dest = tmp_path_factory.mktemp("packed") / "mini"
    with redirect_stderr(StringIO()) as said:
        gemma = str(mini_release / "gemma-3-mini")
        assert (
            main(
                [str(mini_release / PACKAGE), str(dest), "--gemma", gemma, "--quantize", "connectors,projection,adaln"]
            )
            == 0
        )
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
    assert all(shape.signs for shape in manifest.quantized["gemma"].values())
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
    assert f"{path}.signs" not in here
    for part in PARTS[:-1]:
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
    assert "quantises      projection: 2 linears at 5 bits, recipe scalar: " in text
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
    expected = SCALAR.quantize(weight)
    stem = f"layers.{part}.{linear}"
    codes = unpack_planes(
        jnp.asarray(arrays[f"{stem}.lo"]), jnp.asarray(arrays[f"{stem}.hi"]), bits=5, num_codes=expected.codes.shape[1]
    )
    np.testing.assert_array_equal(codes, expected.codes)
    np.testing.assert_array_equal(arrays[f"{stem}.norms"], expected.norms)
    np.testing.assert_array_equal(arrays[f"{stem}.scaled_centroids"], expected.scaled_centroids)
    np.testing.assert_array_equal(arrays[f"{stem}.signs"], expected.signs)
    original = weight[::16].astype(np.float32)
    decoded = expected.dequantize()[::16].astype(np.float32)
    error = np.linalg.norm(decoded - original) / np.linalg.norm(original)
    assert facts[path] == {
        "published": f"{published}.weight",
        "bits": 5,
        "relative_error": pytest.approx(error, abs=1e-5),
    }


@pytest.mark.parametrize(
    "recipe",
    [
        replace(RECIPES["published"], bits=2),
        RECIPES["published"],
        RECIPES["fitted"],
        SCALAR,
        replace(SCALAR, bits=8),
        replace(RECIPES["trellis"], history_bits=3),
    ],
    ids=str,
)
def test_slices_have_the_bits_of_the_whole(recipe):
    # 5.1 million values are two slices, of which the second is not full.
    weight = np.random.default_rng(recipe.bits).standard_normal((2500, 2040), np.float32)
    ours = quantize_tensor(LazyTensor.from_array("weight", weight), recipe)
    expected = recipe.quantize(weight)
    lo, hi = pack_planes(expected.codes, recipe.bits)
    absent = {name for name, part in (("hi", hi), ("signs", expected.signs)) if part is None}
    assert set(ours.arrays) == set(PARTS) - absent
    np.testing.assert_array_equal(ours.arrays["lo"], lo)
    if hi is not None:
        np.testing.assert_array_equal(ours.arrays["hi"], hi)
    np.testing.assert_array_equal(ours.arrays["norms"], expected.norms)
    decoded = expected.dequantize().astype(np.float32)
    error = np.linalg.norm(decoded - weight) / np.linalg.norm(weight)
    assert ours.relative_error == pytest.approx(error, rel=0.01)  # a sixteenth of the rows: 300,000 values


def test_a_weight_of_zeros_is_exact():
    zeros = LazyTensor.from_array("weight", np.zeros((3, 200), np.float32))
    assert quantize_tensor(zeros, SCALAR).relative_error == 0


# What is refused and said


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"gemma_bits": 9}, "gemma bits must be 2 to 8, or 16"),
        ({"gemma_bits": 1}, "got 1"),
        ({"quantize": ["adaln", "gates"]}, "nothing called gates.*blocks, connectors, projection, adaln"),
        ({"quantize": ["gemma"]}, "nothing called gemma"),
        ({"recipe": "finest"}, "no recipe is called finest; there are published, fitted, scalar, trellis"),
        ({"bits": "blocks.0"}, "bits are given as blocks.0=8.*got 'blocks.0'"),
        ({"bits": "blocks.0=9"}, "bits of blocks.0 must be 2 to 8, or 16"),
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
    assert "quantises      gemma: 42 linears at 5 bits, recipe scalar: 207.4 kB become 200.3 kB" in said
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
    assert len(list((tmp_path / "part/weight").glob("c.*"))) > 2
    found = restore(tmp_path / "part")
    np.testing.assert_array_equal(found["weight"], array)
    np.testing.assert_array_equal(found["bias"], array[0])


def test_the_manifest_stays_json_with_what_was_quantised(packed):
    content = json.loads((packed / "manifest.json").read_text())
    assert content["provenance"]["options"]["quantizing"] == {
        "groups": {"gemma": 5, "connectors": 5, "projection": 5, "adaln": 5},
        "bits": {},
        "recipe": "scalar",
    }
    here = content["provenance"]["quantized_here"]
    assert here["recipe"] == asdict(SCALAR)
    # Gaussian weights at 5 bits: 4.9 %; less for short rows, as fitted norms make use of their padding.
    assert all(0.02 < fact["relative_error"] < 0.07 for fact in here["linears"].values())


# Bits of some layers


def test_the_first_exception_that_fits_a_name_holds():
    chosen = Quantizing.of(gemma_bits=5, groups=["blocks"], bits="blocks.0=8, blocks.43-47=6,blocks.*.audio=16,gemma=4")
    name = "video.self_attn.to_q.kernel"
    bits = {n: chosen.recipe_of("blocks", "transformer", f"blocks.{n}.{name}").bits for n in (0, 1, 10, 42, 43, 47, 48)}
    assert bits == {0: 8, 1: 5, 10: 5, 42: 5, 43: 6, 47: 6, 48: 5}
    assert chosen.group("transformer", "blocks.3.audio.self_attn.to_q.kernel") is None
    assert chosen.group("transformer", f"blocks.3.{name}") == "blocks"
    assert chosen.recipe_of("gemma", "gemma", "layers.3.attn.to_q.kernel").bits == 4
    trellis = Quantizing.of(gemma_bits=5, groups=["blocks"], bits="blocks.0=8", recipe="trellis")
    assert trellis.recipe_of("blocks", "transformer", f"blocks.0.{name}") == replace(SCALAR, bits=8)
    assert trellis.recipe_of("blocks", "transformer", f"blocks.1.{name}") == RECIPES["trellis"]


def test_small_blocks_are_published_and_come_back(ltx_dir, tmp_path):
    source = str(ltx_dir / "checkpoint.safetensors")
    arguments = ["--quantize", "--recipe", "published", "--block-size", "32"]
    assert main([source, str(tmp_path / "out"), *arguments]) == 0
    first = Manifest.read(tmp_path / "out").quantized["transformer"]
    assert {shape.block_size for shape in first.values()} == {32}
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "package"), "--layout", "V5"]) == 0
    assert main([str(tmp_path / "package"), str(tmp_path / "again")]) == 0
    assert Manifest.read(tmp_path / "again").quantized["transformer"] == first
    models: list[Any] = [
        load_component(tmp_path / name, Manifest.read(tmp_path / name), "transformer") for name in ("out", "again")
    ]
    for (place, one), (_, other) in zip(*(nnx.to_flat_state(nnx.state(model)) for model in models), strict=True):
        np.testing.assert_array_equal(one.get_value(), other.get_value(), err_msg=str(place))


def test_odd_sizes_of_blocks_are_refused():
    with pytest.raises(ConvertError, match="block-size must be one of 32, 64, 128; got 48"):
        Quantizing.of(gemma_bits=5, groups=[], block_size=48)


def test_a_model_of_layers_with_different_bits_is_two_stacks_and_computes_with_its_decoded_weights(ltx_dir, tmp_path):
    source = str(ltx_dir / "checkpoint.safetensors")
    assert main([source, str(tmp_path / "out"), "--bits", "blocks.0=6", "--recipe", "trellis", "--quantize"]) == 0
    manifest = Manifest.read(tmp_path / "out")
    model: Any = load_component(tmp_path / "out", manifest, "transformer")
    depth = load_configs(manifest).transformer.num_layers
    assert [stack.num_layers for stack in model.blocks] == [1, depth - 1]
    widths = [stack.layer.video.self_attn.to_q.bits for stack in model.blocks]
    assert widths == [6, 5]
    original = (
        TensorFile(source).read("model.diffusion_model.transformer_blocks.0.attn1.to_q.weight").astype(np.float32)
    )
    decoded = np.asarray(model.blocks[0].layer.video.self_attn.to_q.dequantize()[0], np.float32)
    # Six bits of a trellis: 1.9 % for Gaussian weights; twice that would be five bits.
    assert np.linalg.norm(decoded - original) / np.linalg.norm(original) < 0.028


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["a", "b", "--quantize"], ["a", "b", "--quantize", "blocks"]),
        (["--quantize", "a", "b"], ["--quantize", "blocks", "a", "b"]),
        (["a", "--quantize", "--json"], ["a", "--quantize", "blocks", "--json"]),
        (["--quantize", "adaln, blocks", "a"], ["--quantize", "adaln, blocks", "a"]),
    ],
)
def test_quantize_alone_means_the_blocks(given, meant):
    assert _with_groups(given) == meant
