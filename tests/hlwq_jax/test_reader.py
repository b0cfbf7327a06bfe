import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hlwq_jax import (
    FormatError,
    LazyTensor,
    TensorFile,
    find_sidecar,
    open_folder,
    pack,
    pack_planes,
    quantize,
    read_package,
)

from .conftest import assert_decodes, gaussian, lazy, random_quantized, stored_as


@pytest.fixture(scope="module")
def shapes(hlwq_dir):
    return {name: info.shape for name, info in TensorFile(hlwq_dir / "original_f32.safetensors").tensors.items()}


@pytest.mark.parametrize(
    ("folder", "layout", "reference", "count"),
    [
        ("v4_dot_unpacked", "V1", "A", 8),
        ("v5_dot_packed", "V2", "A", 8),
        ("dunder_codes", "V4", "A", 8),
        ("packed_meta4", "V5", "B", 8),
        ("hlwq_q5_meta5", "V6", "A", 2),
    ],
)
def test_original_packages_decode(hlwq_dir, shapes, folder, layout, reference, count):
    package = open_folder(hlwq_dir / folder, model_shapes=shapes)
    assert package.layout == layout
    assert len(package.weights) == count
    expected = TensorFile(hlwq_dir / f"dequantised_bf16_table{reference}.safetensors")
    for name, weight in package.weights.items():
        key = name if name in expected else name.removesuffix(".weight")
        assert_decodes(weight.dequantize(), expected.read(key))
        assert weight.table in ("stored", reference)
        weight.check()
    assert set(package.plain) <= {"blk.0.norm.weight"}
    assert not set(package.missing) & set(package.weights)


def test_a_released_package_opens_and_its_table_is_found(mini_release):
    package = open_folder(mini_release / "LTX-2.3-22B-PolarQuant-Q5" / "polarquant")
    assert package.layout == "V5"
    assert len(package.plain) == 1572
    assert {weight.table for weight in package.weights.values()} == {"B"}
    name = "model__diffusion_model__audio_proj_out__weight"
    assert package.weights[name].table_reason.startswith("energy 1.00")


@pytest.mark.parametrize("layout", ["V1", "V2", "V3", "V4", "V5", "V6"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_every_layout_reads_what_was_written(layout, bits):
    weight = random_quantized(40, 300, bits=bits)
    package = read_package(
        lazy(stored_as(layout, "net.a", weight)), model_shapes={"net.a.weight": (40, 300)}, table="A"
    )
    stored = package.weights["net.a.weight"]
    # V2 is told from V1 by a packed tensor; where none is packed they are the same thing. Likewise V3.
    assert stored.layout in {layout, "V1"} if bits > 5 or layout == "V3" else stored.layout == layout
    assert stored.bits == bits
    np.testing.assert_array_equal(stored.codes(), weight.codes)
    np.testing.assert_array_equal(stored.norms(), weight.norms)
    assert_decodes(stored.dequantize(), weight.dequantize())
    for plane, expected in zip(stored.planes(), pack_planes(weight.codes, bits), strict=True):
        np.testing.assert_array_equal(plane, expected)


@pytest.mark.parametrize("in_features", [128 * 3, 300])
@pytest.mark.parametrize("bits", [3, 5])
def test_flattened_blocks_decode_by_the_models_shape(bits, in_features):
    flat = gaussian(1, 10 * in_features)
    quantized = quantize(flat, bits=bits)
    levels = quantized.centroids.round(4) if bits == 3 else quantized.centroids
    arrays = {"a.codes": quantized.codes.view(np.int8).ravel(), "a.norms": quantized.norms.ravel()}
    package = read_package(
        lazy(arrays), model_shapes={"a.weight": (10, in_features)}, sidecar={"layers": {"a": {"bits": bits}}}
    )
    stored = package.weights["a.weight"]
    assert (package.layout, stored.flattened) == ("V7", in_features == 300)
    np.testing.assert_array_equal(stored.centroids, levels)
    assert_decodes(stored.dequantize(), quantized.dequantize().reshape(10, in_features))
    with pytest.raises(FormatError, match="a: its number of inputs is not in the package"):
        read_package(lazy(arrays), sidecar={"layers": {"a": {"bits": bits}}}).weights["a"].dequantize()


@pytest.mark.parametrize(("bits", "tables"), [(4, "ABC"), (5, "ABC"), (6, "ABC"), (3, "C")])
def test_the_table_is_found_by_the_codes_energy(bits, tables):
    for table in [*tables, "converged"] if bits > 3 else tables:
        arrays = {}
        for i in range(8):
            arrays |= stored_as("V5", f"net.{i}", random_quantized(32, 512, bits=bits, table=table, seed=i))
        package = read_package(lazy(arrays))
        assert {weight.table for weight in package.weights.values()} == {table}
        assert not package.warnings


def test_one_damaged_weight_does_not_move_the_others_table():
    arrays = {}
    for i in range(8):
        arrays |= stored_as("V5", f"net.{i}", random_quantized(32, 512, seed=i))
    packed = arrays["net__3__weight__packed"]
    arrays["net__3__weight__packed"] = np.random.default_rng(0).integers(0, 256, packed.size, dtype=np.uint8)
    with pytest.raises(FormatError, match=r"net__3__weight: energy .* with table A at 5 bits"):
        read_package(lazy(arrays))


def test_a_wrong_bit_order_is_an_error_that_names_the_right_one():
    weight = random_quantized(32, 512)
    arrays = stored_as("V5", "a", weight)
    arrays["a__weight__packed"] = pack(weight.codes, bits=5, packing="L")
    with pytest.raises(
        FormatError, match=r"a__weight: energy [234]\..*packing M: wrong bit order.*in packing L it fits"
    ):
        read_package(lazy(arrays))
    stored = read_package(lazy(arrays), bit_order="lsb", table="A").weights["a__weight"]
    np.testing.assert_array_equal(stored.codes(), weight.codes)


def test_a_foreign_package_may_have_either_order_of_a_5_bit_stream():
    weight = random_quantized(32, 512)
    for packing in ("M", "L"):
        arrays = stored_as("V6", "a", weight)
        arrays["a.weight__packed"] = pack(weight.codes, bits=5, packing=packing).reshape(32, -1)
        stored = read_package(lazy(arrays)).weights["a.weight"]
        assert stored.packing == packing
        np.testing.assert_array_equal(stored.codes(), weight.codes)


@pytest.mark.parametrize(
    ("layout", "packing", "order"), [("V5", "M", None), ("V6", "L", None), ("V6", "M", "msb"), ("V5", "L", "lsb")]
)
def test_two_bit_streams_follow_the_length_of_meta_and_can_be_overridden(layout, packing, order):
    weight = random_quantized(32, 512, bits=2)
    arrays = stored_as(layout, "a", weight)
    key = next(key for key in arrays if key.endswith("packed"))
    arrays[key] = pack(weight.codes, bits=2, packing=packing)
    (stored,) = read_package(lazy(arrays), bit_order=order).weights.values()
    np.testing.assert_array_equal(stored.codes(), weight.codes)


def test_damage_in_one_block_is_found_when_the_weight_is_read():
    weight = random_quantized(64, 2048)
    arrays = stored_as("V5", "a", weight)
    arrays["a__weight__packed"][80 * 555 : 80 * 556] = np.random.default_rng(1).integers(0, 256, 80, dtype=np.uint8)
    package = read_package(lazy(arrays), model_shapes={"a.weight": (64, 2048)})
    for read in (package.weights["a.weight"].check, package.weights["a.weight"].dequantize):
        with pytest.raises(FormatError, match=r"a\.weight: .* 1 of the blocks impossible"):
            read()


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("layout", ["V1", "V2", "V4", "V5", "V6"])
def test_other_block_sizes(layout, block_size):
    weight = random_quantized(16, 1000, block_size=block_size)
    sidecar = {"block_size": block_size} if layout in ("V2", "V4") else None
    arrays = stored_as(layout, "a", weight)
    package = read_package(lazy(arrays), sidecar=sidecar, model_shapes={"a.weight": (16, 1000)}, table="A")
    assert package.weights["a.weight"].block_size == block_size
    assert_decodes(package.weights["a.weight"].dequantize(), weight.dequantize())


def test_codes_bytes_and_norms_under_unknown_names_are_found_by_structure():
    weight = random_quantized(16, 384)
    arrays = {"x.y_indices": weight.codes, "x.y_scale": weight.norms, "x.bias": np.zeros(16, np.float16)}
    package = read_package(lazy(arrays), model_shapes={"x.y.weight": (16, 384), "x.bias": (16,)})
    assert (package.layout, list(package.plain)) == ("other", ["x.bias"])
    assert_decodes(package.weights["x.y.weight"].dequantize(), weight.dequantize())


def test_bytes_of_codes_without_a_width_get_theirs_from_the_codes():
    for bits in (4, 5, 6, 7, 8):
        weight = random_quantized(32, 512, bits=bits)
        assert read_package(lazy(stored_as("V4", "a", weight)), table="A").weights["a"].bits == bits


def test_meta_of_two_entries_is_read_with_a_warning():
    weight = random_quantized(8, 384)
    arrays = stored_as("V5", "a", weight) | {"a__weight__meta": np.array([5, 384], np.int64)}
    package = read_package(lazy(arrays), model_shapes={"a.weight": (8, 384)})
    assert any("meta has 2 entries" in warning for warning in package.warnings)
    assert_decodes(package.weights["a.weight"].dequantize(), weight.dequantize())


def test_inputs_are_never_guessed():
    weight = random_quantized(8, 300)
    arrays = stored_as("V5", "a", weight)
    stored = read_package(lazy(arrays), table="A").weights["a__weight"]
    assert stored.in_features is None
    with pytest.raises(FormatError, match="a__weight: its number of inputs"):
        stored.dequantize()
    by_sidecar = read_package(lazy(arrays), sidecar={"layers": {"a": {"in_features": 300}}}, table="A")
    assert_decodes(by_sidecar.weights["a__weight"].dequantize(), weight.dequantize())


def damaged(change) -> dict[str, np.ndarray]:
    arrays = stored_as("V6", "a", random_quantized(8, 300)) | {"b.weight": np.zeros(3, np.float32)}
    change(arrays)
    return arrays


P, N, M = "a.weight__packed", "a.weight__norms", "a.weight__meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(P), "a.weight: its codes are missing"),
        (lambda a: a.pop(N), "a.weight__norms is missing"),
        (lambda a: a.pop(M), "a.weight__meta is missing"),
        (lambda a: a.update({P: a[P][:-5]}), "a.weight: codes of shape .* fit no packing"),
        (lambda a: a.update({N: a[N][:-1]}), "a.weight: meta promises 8 rows"),
        (lambda a: a.update({N: a[N].astype(np.float32)}), "a.weight__norms: expected float16"),
        (lambda a: a.update({P: a[P].astype(np.int32)}), "a.weight__packed: expected uint8"),
        (lambda a: a.update({M: a[M].astype(np.float32)}), "a.weight__meta: expected int64"),
        (lambda a: a.update({M: a[M][:3]}), "a.weight__meta: expected 2, 4 or 5 entries"),
        (lambda a: a.update({M: -a[M]}), "a.weight__meta: expected positive sizes"),
        (lambda a: a.update({M: np.array([8, 3, 128, 3071, 300])}), "a.weight: meta promises 3071 codes"),
        (lambda a: a.update({M: np.array([8, 3, 100, 2400, 300])}), "a.weight: the block size must be a power of two"),
        (
            lambda a: a.update({M: np.array([8, 3, 128, 3072, 299])}),
            "a.weight: inputs disagree: meta: 299, the model: 300",
        ),
        (lambda a: a.update({"a__weight__codes": a[P], "a__weight__norms": a[N]}), "both stand for a.weight"),
        (lambda a: a.update({"a.weight": np.zeros(2)}), "a.weight is there both as codes .* and plain"),
    ],
)
def test_every_contradiction_raises_with_the_tensors_name(change, message):
    with pytest.raises(FormatError, match=message):
        read_package(lazy(damaged(change)), model_shapes={"a.weight": (8, 300), "b.weight": (3,)})


@pytest.mark.parametrize("in_features", [256, 385])
def test_inputs_that_do_not_fit_the_blocks_raise(in_features):
    arrays = damaged(lambda a: a.update({M: np.array([8, 3, 128, 3072, in_features])}))
    with pytest.raises(FormatError, match=f"a.weight: 3 blocks of 128 hold 257 to 384 inputs, got {in_features}"):
        read_package(lazy(arrays))
    with pytest.raises(FormatError, match=r"a\.weight: inputs disagree"):
        read_package(lazy(arrays), model_shapes={"a.weight": (8, 300)})


def test_a_shape_other_than_the_models_raises():
    arrays = stored_as("V1", "a", random_quantized(8, 300))
    with pytest.raises(FormatError, match=r"a\.weight: rows disagree: its norms: 8, the model: 9"):
        read_package(lazy(arrays), model_shapes={"a.weight": (9, 300)})


def test_norms_that_are_not_finite_and_codes_too_large_raise():
    weight = random_quantized(64, 2048)
    arrays = stored_as("V1", "a", weight)
    arrays["a.norms"] = weight.norms.copy()
    arrays["a.norms"][40, 7] = np.inf
    stored = read_package(lazy(arrays)).weights["a"]
    with pytest.raises(FormatError, match="a: norm 647 of 1024 is inf"):
        stored.check()
    arrays = stored_as("V1", "a", weight)
    arrays["a.codes"] = weight.codes.view(np.int8).copy()
    arrays["a.codes"][0, 0] = -1
    with pytest.raises(FormatError, match="a: the largest code is 255, expected below 32"):
        read_package(lazy(arrays))


def test_a_stored_table_in_the_wrong_scaling_is_noticed():
    arrays = stored_as("V1", "a", random_quantized(32, 512))
    arrays["a.ct"] = arrays.pop("a.ct_scaled")
    with pytest.raises(FormatError, match=r"a: energy 0\.0078, expected"):
        read_package(lazy(arrays))
    arrays["a.ct"] = arrays["a.ct"] * np.float32(128**0.5)
    assert read_package(lazy(arrays)).weights["a"].table == "stored"
    arrays["a.ct"] = arrays["a.ct"][::-1]
    with pytest.raises(FormatError, match=r"a\.ct: expected finite levels in ascending order"):
        read_package(lazy(arrays))


def test_a_stored_converged_table_wins():
    weight = random_quantized(32, 512, table="converged")
    stored = read_package(lazy(stored_as("V2", "a", weight)), model_shapes={"a.weight": (32, 512)}).weights["a.weight"]
    assert_decodes(stored.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.weight_packed", "a.weight_scale"], "compressed-tensors"),
        (["a.codes", "a.scales"], "EOQ"),
        (["a.qweight", "a.qzeros"], "GPTQ"),
        (["a.weight", "a.scales", "a.biases"], "MLX"),
        (["a.weight"], "none of 1 tensors is an HLWQ weight"),
    ],
)
def test_look_alikes_are_named(names, message):
    with pytest.raises(FormatError, match=message):
        read_package(lazy({name: np.zeros((2, 2), np.float32) for name in names}))


def test_what_the_model_needs_and_the_package_lacks_is_listed():
    arrays = stored_as("V5", "model.diffusion_model.a", random_quantized(8, 256))
    arrays |= stored_as("V5", "x_y", random_quantized(8, 256, seed=1)) | {"model.diffusion_model.b": np.zeros(3)}
    shapes = {"a.weight": (8, 256), "b": (3,), "c.weight": (4, 4)}
    package = read_package(lazy(arrays), model_shapes=shapes)
    assert set(package.weights) == {"a.weight", "x_y.weight"}
    assert package.unknown_stems == ("x_y__weight",)
    assert package.missing == ("c.weight",)


def test_parts_of_a_weight_may_lie_in_different_files(tmp_path):
    arrays = stored_as("V5", "a", random_quantized(8, 256))
    (tmp_path / "codes").mkdir()
    for i, (name, array) in enumerate(arrays.items()):
        save_file({name: array, "bias": np.zeros(2)}, tmp_path / "codes" / f"{i}.safetensors")
    package = open_folder(tmp_path)
    assert list(package.weights) == ["a__weight"]
    assert not package.plain
    assert "1 plain tensors are in more than one file" in package.warnings[0]
    shutil.copy(tmp_path / "codes" / "0.safetensors", tmp_path / "again.safetensors")
    with pytest.raises(FormatError, match=r"a__weight__\w+ is in .*again.safetensors and in"):
        open_folder(tmp_path)


def test_sidecars_and_indexes(tmp_path):
    assert find_sidecar(tmp_path) is None
    (tmp_path / "hlwq_config.json").write_text(json.dumps({"format": "hlwq-q5"}))
    assert find_sidecar(tmp_path) == {"format": "hlwq-q5"}
    with pytest.raises(FormatError, match=r"no \.safetensors files"):
        open_folder(tmp_path)
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"lists one\.safetensors, which is not there"):
        open_folder(tmp_path)
    (tmp_path / "hlwq_config.json").write_text("[]")
    with pytest.raises(FormatError, match="expected a JSON object"):
        find_sidecar(tmp_path)


def test_stored_bytes_are_counted(hlwq_dir):
    files = load_file(hlwq_dir / "hlwq_q5_meta5" / "model-00001-of-00001.safetensors")
    assert open_folder(hlwq_dir / "hlwq_q5_meta5").nbytes == sum(array.nbytes for array in files.values())


@pytest.mark.parametrize("layout", ["V1", "V2", "V3", "V4", "V5", "V6"])
@pytest.mark.parametrize("bits", [4, 5, 6])
def test_a_sample_of_the_weights_decides_as_all_of_them_do(layout, bits):
    arrays, shapes = {}, {}
    for i in range(9):
        arrays |= stored_as(layout, f"net.{i}.a", random_quantized(64, 1024, bits=bits, table="B", seed=i))
        shapes[f"net.{i}.a.weight"] = (64, 1024)
    read: list[str] = []
    sampled = read_package(_logged(arrays, read), model_shapes=shapes, max_sampled=3)
    every = read_package(lazy(arrays), model_shapes=shapes)
    looked_at = {name for name, weight in sampled.weights.items() if weight.energy is not None}
    assert looked_at == {f"net.{i}.a.weight" for i in (0, 3, 6)}
    assert {name for name in read if "codes" in name or "packed" in name} == {
        name
        for name in arrays
        if ("codes" in name or "packed" in name) and name.split("net")[1].strip("_.")[0] in "036"
    }
    for name, weight in every.weights.items():
        found = sampled.weights[name]
        assert (found.bits, found.packing, found.table) == (weight.bits, weight.packing, weight.table)
        np.testing.assert_array_equal(found.centroids, weight.centroids)


def _logged(arrays, read):
    """Tensors that write their names down when they are read."""

    class Logged(LazyTensor):
        def read_flat(self, start, stop):
            read.append(self.name)
            return super().read_flat(start, stop)

    return {name: Logged.from_array(name, array) for name, array in arrays.items()}
