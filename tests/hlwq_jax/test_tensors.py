import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hlwq_jax import FormatError, TensorFile


def write(path: Path, header: dict | str, data: bytes = bytes(8)) -> Path:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: object = "F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_writes(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(ml_dtypes.bfloat16),
        "c": np.array([[1], [-2]], np.int8),
        "empty": np.zeros((0, 3), np.float16),
        "scalar": np.array(3, np.int64),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (file[name].dtype, file[name].shape, file[name].nbytes) == (array.dtype, array.shape, array.nbytes)
        np.testing.assert_array_equal(file.read(name), array)
    np.testing.assert_array_equal(file.read_rows("a", 1, 2), arrays["a"][1:2])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(dtype="F33")}, "a: dtype 'F33' is not supported"),
        ({"a": entry(dtype=["F32"])}, "a: dtype"),
        ({"a": entry(shape=[-2])}, "a: shape must be a list of sizes"),
        ({"a": entry(shape=[True, 2])}, "a: shape must be"),
        ({"a": entry(shape=[2.0])}, "a: shape must be"),
        ({"a": entry(shape=[2**40, 2**40])}, "a: F32 of shape"),
        ({"a": entry(shape=[3])}, "takes 12 bytes, its data_offsets"),
        ({"a": entry(offsets=[8, 0])}, "start <= end"),
        ({"a": entry(offsets=[0, 8, 9])}, "data_offsets must be"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "expected dtype, shape and data_offsets"),
        ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "b starts at byte .* overlaps a"),
        ({"a": entry(shape=[1], offsets=[4, 8])}, "leaves a gap after the header"),
        ({"a": entry(offsets=[8, 16])}, "the file has .* bytes, its header promises .* cut off"),
        ({"a": entry(shape=[1], offsets=[0, 4])}, "bytes that belong to no tensor"),
        ({"__metadata__": {"n": 1}, "a": entry()}, "__metadata__ must map strings to strings"),
        ({"__metadata__": [], "a": entry()}, "__metadata__ must map strings to strings"),
        ('{"a": 1, "a": 2}', "names 'a' twice"),
        ('{"a": {"dtype": "F32", "dtype": "F16"}}', "names 'dtype' twice"),
        ("[]", "must be a JSON object"),
        ("{        ", "not valid JSON"),
        ('{"\ud800"', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    if isinstance(header, str):
        raw = header.encode("utf-8", "surrogatepass")
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    else:
        write(path, header)
    with pytest.raises(FormatError, match=message) as error:
        TensorFile(path)
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        (b"PK\x03\x04aaaaaaaaaa", "zip or pickle"),
        (b"", "got 0 bytes"),
        (b"\xff" * 7, "got 7 bytes"),
        (b"\xff" * 40, "promise a header of"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        TensorFile(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(4, dtype=np.float32), "b": np.arange(4, dtype=np.int8)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            TensorFile(path)


def test_a_file_cut_off_after_opening_raises_and_does_not_crash(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(1000, dtype=np.float32)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FormatError, match=r"a .*the file ends after"):
        file.read("a")
