"""Arrays piece by piece: they are those of the whole, and a large one is never in memory."""

import tracemalloc

import numpy as np
import pytest
from einops import rearrange

from convert import arrays
from convert.arrays import moved, planes
from hlwq_jax import FormatError, LazyTensor, TensorFile, open_folder, stored
from ltx_jax import orbax_io

PATTERNS = [
    ((30, 41), "o i -> i o"),
    ((33, 7), "v d -> v d"),
    ((77,), "d -> d"),
    ((7, 5, 3, 2, 2), "o i t h w -> t h w i o"),
    ((9, 4, 5), "o i t -> t i o"),
]


@pytest.mark.parametrize(("shape", "pattern"), PATTERNS)
@pytest.mark.parametrize("row_bytes", [10, 2**20], ids=["runs", "rows"])
def test_pieces_are_those_of_the_whole(shape, pattern, row_bytes, monkeypatch):
    small = {"WHOLE_BYTES": 0, "_SLICED": 100, "_SLICE_ROWS": 4, "_ROW_BYTES": row_bytes, "_READ_BYTES": 300}
    for name, value in small.items():
        monkeypatch.setattr(arrays, name, value)
    monkeypatch.setattr(orbax_io, "PIECE_BYTES", 200)
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    result = moved(LazyTensor.from_array("x", array), pattern)
    expected = rearrange(array, pattern)
    rows = orbax_io.piece_rows(expected.shape, np.float32)
    pieces = list(result.pieces)
    assert (result.shape, result.dtype) == (expected.shape, np.float32)
    assert all(len(piece) == rows for piece in pieces[:-1])
    np.testing.assert_array_equal(np.concatenate(pieces), expected)


@pytest.mark.parametrize(("pattern", "row_bytes"), [("o i -> i o", 0), ("o i -> i o", 2**20), ("o i -> o i", 0)])
def test_a_large_tensor_is_never_in_memory_as_a_whole(pattern, row_bytes, tmp_path, monkeypatch):
    for name, value in (("WHOLE_BYTES", 2**20), ("_READ_BYTES", 2**20), ("_ROW_BYTES", row_bytes)):
        monkeypatch.setattr(arrays, name, value)
    monkeypatch.setattr(orbax_io, "PIECE_BYTES", 2**20)
    array = np.arange(2**23, dtype=np.float32).reshape(2**10, -1)  # 32 MiB
    header = b'{"x":{"dtype":"F32","shape":[1024,8192],"data_offsets":[0,33554432]}}   '
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + array.tobytes())
    tensor = TensorFile(tmp_path / "x.safetensors")["x"]
    next(iter(moved(tensor, pattern).pieces))  # what is imported or kept at the first time does not count
    tracemalloc.start()
    try:
        result = moved(tensor, pattern)
        (tmp_path / "part").mkdir()
        orbax_io.write_array(tmp_path / "part", "x", result.shape, result.dtype, result.pieces)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 2**20  # a piece as read, as moved, as sliced
    orbax_io.write_tree(tmp_path / "part", ["x"])
    np.testing.assert_array_equal(orbax_io.restore(tmp_path / "part")["x"], rearrange(array, pattern))


@pytest.fixture
def weight(mini_release, monkeypatch):
    weights = open_folder(mini_release / "LTX-2.3-22B-PolarQuant-Q5/polarquant").weights
    monkeypatch.setattr(stored, "_RUN_CODES", 2048)
    return max(weights.values(), key=lambda weight: weight.nbytes)


def test_planes_are_read_in_runs_of_rows(weight):
    assert weight.norm_tensor.size * weight.block_size > 4 * 2048
    lo, hi = weight.planes()
    found = planes(weight)
    np.testing.assert_array_equal(found["lo"], lo)
    np.testing.assert_array_equal(found["hi"], hi)
    np.testing.assert_array_equal(found["norms"], weight.norms())
    np.testing.assert_array_equal(found["scaled_centroids"], weight.scaled_centroids)


def test_runs_are_judged_together_as_the_whole_is(weight):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, weight.code_tensor.size).astype(np.uint8)
    damaged = stored.replace(weight, code_tensor=LazyTensor.from_array("x", noise))
    for check in (damaged.check, damaged.checked_planes):
        with pytest.raises(FormatError, match="wrong bit order, width or offset, or damaged data"):
            check()
    norms = weight.norms().copy()
    norms[-1, -1] = np.nan
    damaged = stored.replace(weight, norm_tensor=LazyTensor.from_array("x", norms))
    with pytest.raises(FormatError, match=f"norm {norms.size - 1} of {norms.size} is nan"):
        damaged.checked_planes()
