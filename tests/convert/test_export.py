"""A checkpoint back to published files: to the byte those that it came from, or a new package."""

import json
import shutil
from hashlib import sha256
from itertools import cycle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import ConvertError, convert
from convert.__main__ import main
from convert.export import export
from convert.journal import INVENTORY, read_inventory
from convert.layout import KEPT_TENSORS, _round_trips
from convert.package import export_package
from convert.parts import ArrayTensor, PackedLinear
from hlwq_jax import LazyTensor, TensorFile, open_folder, quantize, unpack
from hlwq_jax.stored import replace
from ltx_jax.checkpoint import Manifest, part_of
from ltx_jax.orbax_io import restore

from .conftest import PACKAGE
from .published import parts, write_file

# Each layout at the widths its packings differ at; V7 has blocks across rows, which the device layout has no place for.
EVERY_LAYOUT = [
    *(("V5", bits) for bits in (2, 3, 4, 5, 6, 8)),
    *(("V1", bits) for bits in (5, 8)),
    *(("V2", bits) for bits in (2, 3, 4, 5, 6, 8)),
    ("V3", 4),
    ("V4", 5),
    ("V6", 5),
    ("V7", 5),
]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def repack(package: Path, mini_release: Path, layouts: list[tuple[str, int]]) -> None:
    """The package anew: its weights by turns in these layouts and widths, each layout in a file of its own."""
    facts = json.loads((mini_release / "reference/dequantised.json").read_text())
    shapes = {name: tuple(fact["shape"]) for name, fact in facts.items()}
    source = open_folder(mini_release / PACKAGE / "polarquant", model_shapes=shapes)
    files: dict[str, dict[str, np.ndarray]] = {}
    layers: dict[str, dict] = {}
    for (name, weight), (layout, bits) in zip(source.weights.items(), cycle(layouts), strict=False):
        files.setdefault(layout, {}).update(parts(layout, name, weight.dequantize(), bits, layers))
    shutil.rmtree(package / "polarquant/codes")
    for layout, tensors in files.items():
        write_file(package / f"polarquant/codes/{layout}.safetensors", tensors, {"written by": layout})
    sidecar = {"format": "polar_engine_v5", "layers": layers}
    (package / "polarquant/polar_config.json").write_text(json.dumps(sidecar, indent=3) + "\r\n")
    index = {"weight_map": {name: f"codes/{layout}.safetensors" for layout, file in files.items() for name in file}}
    (package / "polarquant/model.safetensors.index.json").write_text(json.dumps(index))
    kept = TensorFile(package / "polarquant/bf16/ltx23_bf16.safetensors")
    write_file(kept.path, {name: kept.read(name) for name in kept}, kept.metadata)


def round_trip(package: Path, tmp_path: Path) -> dict[str, str]:
    convert(package, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    return digests(tmp_path / "out")


def test_every_layout_at_once_is_exported_to_the_byte(package, mini_release, tmp_path):
    repack(package, mini_release, EVERY_LAYOUT)
    assert round_trip(package, tmp_path) == digests(package)
    facts = read_inventory(tmp_path / "checkpoint")["tensors"].values()
    assert {fact["rule"] for fact in facts} == {"kept", "packed as it came", "unpacked", "skipped"}
    # What conversion unpacked or did not need is kept as it came, and nothing else is.
    kept = TensorFile(tmp_path / "checkpoint" / KEPT_TENSORS)
    assert all(name.endswith(("__meta", ".ct", ".ct_scaled", "inverse_basis", "__codes", "__norms")) for name in kept)
    assert {tensor.dtype for name, tensor in kept.items() if name.endswith("__codes")} == {np.dtype(np.int8)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["V1", "V2", "V3", "V4", "V5", "V6", "V7"])
def test_a_package_of_one_layout_is_exported_to_the_byte(layout, package, mini_release, tmp_path):
    repack(package, mini_release, [pair for pair in EVERY_LAYOUT if pair[0] == layout])
    assert round_trip(package, tmp_path) == digests(package)
    layouts = {group["layout"] for group in Manifest.read(tmp_path / "checkpoint").provenance["quantized"]}
    assert layouts == {layout}


@pytest.mark.parametrize(
    "name", ["v4_dot_unpacked", "v5_dot_packed", "dunder_codes", "packed_meta4", "hlwq_q5_meta5"], ids=str
)
def test_weights_of_the_original_packer_come_back_from_the_device_layout(name, mini_release, tmp_path):
    """Its small packages are of no LTX model, so their weights go through the arrays of a checkpoint alone."""
    from convert.arrays import planes
    from convert.package import stream
    from ltx_jax.checkpoint import QuantizedShape
    from ltx_jax.orbax_io import save

    shapes = {
        f"{key.removesuffix('.weight')}.weight": x.shape
        for key, x in TensorFile(mini_release.parent / "hlwq/original_f32.safetensors").items()
        if len(x.shape) == 2
    }
    package = open_folder(mini_release.parent / "hlwq" / name, model_shapes=shapes)
    assert package.weights
    for number, weight in enumerate(package.weights.values()):
        assert _round_trips(weight)
        folder = tmp_path / str(number)
        save(folder, {f"w.{key}": array for key, array in planes(weight).items()})
        shape = QuantizedShape(
            in_features=weight.in_features,
            out_features=weight.out_features,
            bits=weight.bits,
            block_size=weight.block_size,
        )
        linear = PackedLinear("w", folder, shape)
        payload = stream(
            lambda linear=linear: map(linear.codes, linear.slices()),
            weight.norm_tensor.size * weight.block_size,
            packing=weight.packing,
            dtype=np.uint8,
            shape=shape,
        )
        written = b"".join(np.ascontiguousarray(piece).tobytes() for piece in payload.pieces())
        assert written == weight.code_tensor.read().tobytes(), weight.name
        assert linear.norms.read().tobytes() == weight.norm_tensor.read().tobytes()


def test_a_stream_that_ends_in_foreign_bits_is_kept(mini_release):
    weight = next(iter(open_folder(mini_release / PACKAGE / "polarquant").weights.values()))
    codes = np.arange(4, dtype=np.uint8) + 20
    packed = np.array([0b10100_101, 0b01_10110_1, 0b0111_0000, 0, 0], np.uint8)  # 20, 21, 22, 23 and no more

    def of(stream: np.ndarray):
        norms = LazyTensor.from_array("norms", np.ones((1, 1), np.float16))
        return replace(weight, block_size=4, code_tensor=LazyTensor.from_array("codes", stream), norm_tensor=norms)

    np.testing.assert_array_equal(unpack(packed, num_codes=4, bits=5, packing="M"), codes)
    assert _round_trips(of(packed))
    packed[4] = 1
    np.testing.assert_array_equal(unpack(packed, num_codes=4, bits=5, packing="M"), codes)
    assert not _round_trips(of(packed))


def test_the_release_is_exported_to_the_byte(mini_checkpoint, mini_release, tmp_path, capsys):
    assert main(["export", str(mini_checkpoint), str(tmp_path / "out")]) == 0
    assert digests(tmp_path / "out") == digests(mini_release / PACKAGE)
    assert "7 files, each with the SHA-256 of the one that was converted" in capsys.readouterr().out


# What is refused


@pytest.fixture
def copy(mini_checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(mini_checkpoint, tmp_path / "copy"))


def test_nothing_is_overwritten(mini_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConvertError, match="there already, and nothing is overwritten"):
        export(mini_checkpoint, tmp_path / "out")


def test_damage_is_found_and_leaves_nothing_behind(copy, tmp_path):
    piece = copy / "transformer/blocks.001/blocks.1.video.ff.proj_in.lo/c.0.0"
    data = bytearray(piece.read_bytes())
    data[100] ^= 4
    piece.write_bytes(data)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConvertError, match=r"would not be as it came: its SHA-256 is .* tells what is damaged"):
        export(copy, tmp_path / "out")
    piece.unlink()
    with pytest.raises(ConvertError, match=r"c\.0\.0.*`verify` lists all damage"):
        export(copy, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_another_inventory_is_refused(copy, tmp_path):
    content = read_inventory(copy)
    content["layout"]["files"][0]["name"] = "../outside.safetensors"
    (copy / INVENTORY).write_text(json.dumps(content))
    with pytest.raises(ConvertError, match="is not the one that the manifest names"):
        export(copy, tmp_path / "out")


def test_a_name_that_leads_outside_is_refused(copy, tmp_path):
    content = read_inventory(copy)
    content["layout"]["files"][0]["name"] = "../outside.safetensors"
    (copy / INVENTORY).write_text(json.dumps(content))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["provenance"]["inventory_sha256"] = sha256((copy / INVENTORY).read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConvertError, match="is no name of a file in a package"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "outside.safetensors").exists()


def test_a_disk_without_room_is_refused_before_anything_is_written(mini_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(ConvertError, match=r"has 0\.001 GB free, the checkpoint needs"):
        export(mini_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# New packages


@pytest.fixture(scope="module")
def quantised(ltx_dir, tmp_path_factory) -> Path:
    """An official checkpoint whose block linears were packed here, as the published recipe does it."""
    dest = tmp_path_factory.mktemp("quantised") / "checkpoint"
    convert(ltx_dir / "checkpoint.safetensors", dest, quantize=["blocks"], recipe="published")
    return dest


def test_what_was_quantised_here_cannot_come_back(quantised, tmp_path):
    with pytest.raises(ConvertError, match=r"56 linears, such as .* were quantised here.*--layout V5"):
        export(quantised, tmp_path / "out")


@pytest.mark.parametrize("layout", ["V5", "V1"])
def test_a_new_package_holds_what_the_checkpoint_does(layout, quantised, tmp_path, capsys):
    assert main(["export", str(quantised), str(tmp_path / "out"), "--layout", layout]) == 0
    files = {"polar_config.json", "codes/chunk_00_codes.safetensors", "bf16/model_bf16.safetensors"}
    assert set(digests(tmp_path / "out")) == files
    sidecar = json.loads((tmp_path / "out/polar_config.json").read_text())
    assert (sidecar.get("table"), sidecar["block_size"]) == ("A" if layout == "V5" else None, 128)
    convert(tmp_path / "out", tmp_path / "again")
    manifests = [Manifest.read(folder) for folder in (quantised, tmp_path / "again")]
    group = manifests[1].provenance["quantized"][0]
    assert (group["layout"], group["codebook"], group["num_weights"]) == (
        layout,
        {"V5": "A", "V1": "stored"}[layout],
        56,
    )
    assert manifests[0].metadata == manifests[1].metadata
    assert manifests[0].quantized == manifests[1].quantized
    for component, names in manifests[0].parts.items():
        for part in names:
            before, after = (restore(folder / component / part) for folder in (quantised, tmp_path / "again"))
            assert before.keys() == after.keys()
            for name, array in before.items():
                np.testing.assert_array_equal(after[name], array, err_msg=name)
                assert after[name].dtype == array.dtype


def test_signs_and_trellises_have_no_place_in_published_layouts(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 256), np.float32)
    signed = quantize(weight, signs=np.ones(256, np.int8))
    with pytest.raises(ConvertError, match=r"a\.weight has signs, for which no published layout has a place"):
        export_package(tmp_path / "out", {"a.weight": signed}, config={})
    trellis = quantize(weight, history_bits=3)
    with pytest.raises(ConvertError, match=r"a\.weight has a trellis.*`python -m convert --recipe published`"):
        export_package(tmp_path / "out", {"a.weight": trellis}, config={}, layout="V1")
    with pytest.raises(ConvertError, match="nothing is quantised here"):
        export_package(tmp_path / "out", {"a.weight": weight}, config={})
    assert list(tmp_path.iterdir()) == []


def test_other_tables_go_into_layout_v1_alone(tmp_path):
    rng = np.random.default_rng(0)
    bias = rng.standard_normal(7).astype(ml_dtypes.bfloat16)
    weights = {
        f"{name}.weight": quantize(rng.standard_normal((7, 300), np.float32), bits=bits, table=table)
        for name, bits, table in (("a.b", 5, "A"), ("a.c", 4, "B"), ("d", 8, "converged"))
    }
    with pytest.raises(ConvertError, match=r"d\.weight has the levels of table 'converged'.*Layout V1 stores them"):
        export_package(tmp_path / "out", weights, config={})
    del weights["d.weight"]
    with pytest.raises(ConvertError, match=r"tables A \(a\.b\.weight\) and B \(a\.c\.weight\).*take one for all"):
        export_package(tmp_path / "out", weights, config={})
    weights["d.weight"] = quantize(rng.standard_normal((7, 300), np.float32), bits=8, table="converged")
    assert export_package(tmp_path / "out", {**weights, "a.b.bias": bias}, config={"x": 1}, layout="V1") == 3
    read = open_folder(tmp_path / "out", model_shapes={name: (7, 300) for name in weights})
    assert read.layout == "V1"
    for name, weight in weights.items():
        np.testing.assert_array_equal(read.weights[name].codes(), weight.codes)
        np.testing.assert_array_equal(read.weights[name].scaled_centroids, weight.scaled_centroids)
        np.testing.assert_array_equal(read.weights[name].norms(), weight.norms)
    file = TensorFile(tmp_path / "out/bf16/model_bf16.safetensors")
    assert json.loads(file.metadata["config"]) == {"x": 1}
    assert file.read("a.b.bias").tobytes() == bias.tobytes()


def test_widths_of_layout_v5_are_read_back(tmp_path):
    rng = np.random.default_rng(1)
    weights = {
        f"w{bits}.weight": quantize(rng.standard_normal((16, 300), np.float32), bits=bits) for bits in range(2, 9)
    }
    export_package(tmp_path / "out", weights, config={})
    read = open_folder(tmp_path / "out", model_shapes={name: (16, 300) for name in weights})
    assert {name: weight.bits for name, weight in read.weights.items()} == {
        f"w{bits}.weight": bits for bits in range(2, 9)
    }
    for name, weight in weights.items():
        np.testing.assert_array_equal(read.weights[name].codes(), weight.codes)
        assert read.weights[name].table == "A"


def test_fitted_norms_leave_the_evidence_of_the_table(tmp_path):
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((256, 1024), np.float32)
    weight[:, :128] += 1.5  # an eighth of the blocks is clipped by the block's own norm
    fitted, published = (quantize(weight, norm=norm) for norm in ("fitted", "l2"))
    moved = (fitted.codes != published.codes).reshape(256, 8, 128).any(axis=2).mean(axis=0)
    assert moved[0] > 0.95
    assert (moved[1:] < 0.1).all()
    export_package(tmp_path / "out", {"w.weight": fitted}, config={})
    (read,) = open_folder(tmp_path / "out", model_shapes={"w.weight": weight.shape}).weights.values()
    assert read.table == "A"
    np.testing.assert_array_equal(read.codes(), fitted.codes)
    np.testing.assert_array_equal(read.norms(), fitted.norms)


# Arrays


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (7, 5), (40, 6, 3)], ids=str)
def test_arrays_of_a_checkpoint_are_read_in_any_rows(shape, tmp_path, monkeypatch):
    from ltx_jax import orbax_io

    monkeypatch.setattr(orbax_io, "PIECE_BYTES", 128)
    array = np.random.default_rng(0).standard_normal(shape).astype(ml_dtypes.bfloat16)
    orbax_io.save(tmp_path / "part", {"x": array})
    tensor = ArrayTensor("x", tmp_path / "part")
    assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
    assert tensor.read().tobytes() == array.tobytes()
    for start in range(0, array.size, 29):
        for stop in range(start, array.size + 1, 31):
            assert tensor.read_flat(start, stop).tobytes() == array.reshape(-1)[start:stop].tobytes()


def test_a_folder_that_is_no_array_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    for text in (None, b"[]", b"{", b'{"shape": [2], "data_type": "no such"}'):
        if text is not None:
            (tmp_path / "x/zarr.json").write_bytes(text)
        with pytest.raises(ConvertError, match="is not an array of a checkpoint"):
            ArrayTensor("x", tmp_path)


def test_codes_of_a_linear_come_in_whole_groups(mini_checkpoint):
    manifest = Manifest.read(mini_checkpoint)
    path, shape = next(iter(manifest.quantized["transformer"].items()))
    linear = PackedLinear(path, mini_checkpoint / "transformer" / part_of("transformer", f"{path}.kernel"), shape)
    rows = list(linear.slices())
    assert rows[0].start == 0
    assert rows[-1].stop == shape.out_features
    assert all((run.stop - run.start) * linear.row_codes % 8 == 0 for run in rows[:-1])
