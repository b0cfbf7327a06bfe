"""What an incomplete package lacks, taken from the official checkpoint that it was made from."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from convert import ConvertError, convert, inspect
from convert.__main__ import main
from convert.export import export
from convert.journal import read_inventory
from convert.tasks import FILLED
from hlwq_jax import TensorFile, dequantize, open_folder
from ltx_jax.checkpoint import Manifest
from ltx_jax.orbax_io import restore

from .conftest import PACKAGE
from .test_export import digests

BLOCK = "model.diffusion_model.transformer_blocks.1."
BIAS = f"{BLOCK}attn1.to_q.bias"


@pytest.fixture(scope="module")
def originals(mini_release) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What the miniature release may have been made from: its linears with the error of rounding, the rest as it is."""
    kept = TensorFile(mini_release / PACKAGE / "polarquant/bf16/ltx23_bf16.safetensors")
    facts = json.loads((mini_release / "reference/dequantised.json").read_text())
    shapes = {name: tuple(fact["shape"]) for name, fact in facts.items()}
    weights = open_folder(mini_release / PACKAGE / "polarquant", model_shapes=shapes).weights
    rng = np.random.default_rng(0)
    noise = {name: 0.03 * rng.standard_normal(shape) for name, shape in shapes.items()}
    linears = {
        name: (weight.dequantize().astype(np.float32) * (1 + noise[name])).astype(ml_dtypes.bfloat16)
        for name, weight in weights.items()
    }
    return {**{name: kept.read(name) for name in kept}, **linears}, dict(kept.metadata)


@pytest.fixture
def official(originals, tmp_path) -> Path:
    tensors, metadata = originals
    save_file(tensors, tmp_path / "official.safetensors", metadata=metadata)
    return tmp_path / "official.safetensors"


@pytest.fixture
def changed(originals, tmp_path):
    """`changed(tensors, metadata)`: another official checkpoint, with these in place of its own."""

    def write(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
        ours, facts = originals
        save_file({**ours, **tensors}, tmp_path / "other.safetensors", metadata=facts | (metadata or {}))
        return tmp_path / "other.safetensors"

    return write


@pytest.fixture
def short(package, codes, kept, rewrite) -> Path:
    """A package that was not downloaded whole: a file of codes is not there, and a tensor of another is not."""
    codes[2].unlink()
    rewrite(kept, lambda tensors, metadata: tensors.pop(BIAS))
    return package


def test_what_a_package_lacks_comes_from_its_base(short, official, originals, mini_checkpoint, tmp_path, capsys):
    command = [str(short), str(tmp_path / "checkpoint")]
    assert main(command) == 2
    refusal = capsys.readouterr().err
    assert "tensors are missing" in refusal
    assert "give the official checkpoint, which has them, with --base" in refusal
    assert main(["inspect", str(short), "--base", str(official)]) == 0
    assert f"of them to be packed, from {official}" in capsys.readouterr().out
    assert main([*command, "--base", str(official)]) == 0

    facts = read_inventory(tmp_path / "checkpoint")
    filled = {name for name, fact in facts["tensors"].items() if fact["rule"] == FILLED}
    gone = set(inspect_missing(short))
    assert filled == gone
    assert BIAS in filled
    assert {facts["tensors"][name]["from"] for name in filled} == {str(official)}
    manifest = Manifest.read(tmp_path / "checkpoint")
    assert str(official) in manifest.provenance["sources"]
    assert manifest.provenance["options"]["base"] == str(official)
    # All linears are packed as they are in a whole package, and what the package has is as it came.
    assert manifest.quantized["transformer"] == Manifest.read(mini_checkpoint).quantized["transformer"]
    before, after = (read_inventory(folder)["arrays"] for folder in (mini_checkpoint, tmp_path / "checkpoint"))
    own = {facts["tensors"][name]["to"] for name in facts["tensors"].keys() - filled}
    for part, arrays in after.items():
        component = part.partition("/")[0]
        for name, array in arrays.items():
            path = f"{component}/{name}"
            if path in own or path.rpartition(".")[0] in own:
                assert array == before[part][name], path
    tensors, _ = originals
    block = restore(tmp_path / "checkpoint/transformer/blocks.001")
    np.testing.assert_array_equal(block["blocks.1.video.self_attn.to_q.bias"], tensors[BIAS])


def inspect_missing(package: Path) -> list[str]:
    from convert.files import open_source
    from convert.inventory import take_inventory

    return take_inventory(open_source(package)).missing


def test_filled_linears_are_packed_with_the_table_of_the_package(short, official, originals, tmp_path):
    convert(short, tmp_path / "checkpoint", base=official)
    facts, tensors = read_inventory(tmp_path / "checkpoint")["tensors"], originals[0]
    manifest = Manifest.read(tmp_path / "checkpoint")
    linears = {
        name: fact["to"].partition("/")[2]
        for name, fact in facts.items()
        if fact["rule"] == FILLED and fact["to"].partition("/")[2] in manifest.quantized["transformer"]
    }
    assert len(linears) > 10
    from convert.parts import PackedLinear
    from ltx_jax.checkpoint import part_of

    tables = set()
    for name, path in linears.items():
        shape = manifest.quantized["transformer"][path]
        part = tmp_path / "checkpoint/transformer" / part_of("transformer", f"{path}.kernel")
        linear = PackedLinear(path, part, shape)
        tables.add(linear.scaled_centroids.tobytes())
        decoded = dequantize(
            linear.codes(slice(0, shape.out_features)),
            linear.norms.read(),
            linear.scaled_centroids * np.float32(shape.block_size**0.5),
            block_size=shape.block_size,
            in_features=shape.in_features,
        ).astype(np.float32)
        original = tensors[name].astype(np.float32)
        # 5 bits by a published table: 5.4 % root mean square; a little more for the zeros of padded blocks.
        assert np.linalg.norm(decoded - original) < 0.06 * np.linalg.norm(original), name
    whole = restore(tmp_path / "checkpoint/transformer/blocks.000")
    tables |= {x.tobytes() for name, x in whole.items() if name.endswith("scaled_centroids")}
    assert len(tables) == 1


def test_the_files_of_a_filled_package_come_back_as_they_were(short, official, tmp_path):
    convert(short, tmp_path / "checkpoint", base=official)
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert digests(tmp_path / "out") == digests(short)


def test_a_package_without_configuration_takes_that_of_its_base(short, official, kept, rewrite):
    rewrite(kept, lambda tensors, metadata: metadata.clear())
    report = inspect(short, base=official)
    assert report.complete
    assert report.configuration.startswith("metadata of the base")


def test_what_the_base_lacks_too_is_missing(short, originals, tmp_path):
    tensors, metadata = originals
    save_file({name: x for name, x in tensors.items() if name != BIAS}, tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises(ConvertError, match=r"1 tensors are missing:\n.*attn1\.to_q\.bias"):
        convert(short, tmp_path / "checkpoint", base=tmp_path / "b.safetensors")


# Bases of another model


def test_a_base_with_other_weights_is_refused(short, changed, originals):
    tensors, _ = originals
    name = f"{BLOCK}audio_attn1.to_q.bias"
    with pytest.raises(ConvertError, match=rf"1 of the \d+ tensors that both have differ, such as {name}"):
        inspect(short, base=changed({name: tensors[name] + np.ones((), ml_dtypes.bfloat16)}))
    other = {name: np.ascontiguousarray(x[::-1]) for name, x in tensors.items() if x.ndim == 2}
    with pytest.raises(ConvertError, match=r"packed weights are further from it than by their rounding.*times the sq"):
        inspect(short, base=changed(other))


def test_a_base_of_another_configuration_is_refused(short, changed, originals):
    config = json.loads(originals[1]["config"])
    config["transformer"]["num_layers"] += 1
    with pytest.raises(
        ConvertError, match=r"its configuration differs:\n  transformer: num_layers is 2, in the base 3"
    ):
        inspect(short, base=changed({}, {"config": json.dumps(config)}))


def test_a_base_of_other_shapes_is_refused(short, changed, originals):
    with pytest.raises(ConvertError, match=rf"is of another model:\n  {BIAS} is \[\d+\], expected \[\d+\]"):
        inspect(short, base=changed({BIAS: originals[0][BIAS][:-1]}))


def test_a_base_that_is_packed_is_refused(short, mini_release):
    with pytest.raises(ConvertError, match="is packed itself; --base wants the official checkpoint"):
        inspect(short, base=mini_release / PACKAGE)


def test_a_base_with_nothing_in_common_is_refused(short, tmp_path):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "b.safetensors")
    with pytest.raises(ConvertError, match="have no tensor in common"):
        inspect(short, base=tmp_path / "b.safetensors")
