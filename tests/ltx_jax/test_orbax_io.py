"""Checkpoint folders of arrays: what Orbax reads of what is written here, and what proves that it is still there."""

import json
from hashlib import sha256

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from ltx_jax import orbax_io
from ltx_jax.orbax_io import describe, piece_rows, proves, restore, save, write_array


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.kernel": rng.standard_normal((37, 5)).astype(ml_dtypes.bfloat16),
        "a.bias": rng.standard_normal(5).astype(np.float16),
        "b.lo": rng.integers(0, 2**32, (7, 3, 2), np.uint32),
        "count": np.array(7, np.int32),
        "flags": np.array([True, False, True]),
        "zeros": np.zeros((30, 30), np.float32),
    }


@pytest.fixture(params=[100, orbax_io.PIECE_BYTES], ids=["many pieces", "one piece"])
def folder(request, arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_io, "PIECE_BYTES", request.param)
    save(tmp_path / "part", arrays)
    return tmp_path / "part"


def test_orbax_reads_what_is_written(folder, arrays):
    for found in (restore(folder), ocp.PyTreeCheckpointer().restore(folder)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    shapes = describe(folder)
    assert {name: (x.shape, x.dtype) for name, x in shapes.items()} == {
        name: (x.shape, x.dtype) for name, x in arrays.items()
    }
    some = {name: shapes[name] for name in ("zeros", "a.bias")}
    assert restore(folder, some).keys() == some.keys()


def test_the_dictionary_is_described_as_orbax_does(folder, arrays, tmp_path):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "theirs", arrays)
    for name in ("_METADATA", "_CHECKPOINT_METADATA"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (folder, tmp_path / "theirs"))
        times = {"init_timestamp_nsecs", "commit_timestamp_nsecs"}
        assert ours == {key: value for key, value in theirs.items() if key not in times}


def test_checkpoints_that_orbax_wrote_are_read(arrays, tmp_path):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
        checkpointer.save(tmp_path / "theirs", arrays)
    assert {name: x.shape for name, x in describe(tmp_path / "theirs").items()} == {
        name: x.shape for name, x in arrays.items()
    }
    np.testing.assert_array_equal(restore(tmp_path / "theirs")["b.lo"], arrays["b.lo"])


def test_the_same_arrays_give_the_same_files(folder, arrays, tmp_path):
    save(tmp_path / "again", dict(reversed(arrays.items())))
    first, second = (
        {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (folder, tmp_path / "again")
    )
    assert first == second


def test_digests_are_those_of_the_bytes_in_c_order(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_io, "PIECE_BYTES", 100)
    for name, stored in save(tmp_path / "part", arrays).items():
        assert stored == (sha256(arrays[name].tobytes()).hexdigest(), arrays[name].dtype.name, arrays[name].shape)


def test_pieces_of_another_size_or_type_are_refused(tmp_path):
    rows = piece_rows((4, 3), np.float32)
    assert rows == 4
    with pytest.raises(ValueError, match="36 bytes of float32, expected 48 of float32"):
        write_array(tmp_path, "short", (4, 3), np.float32, [np.zeros((3, 3), np.float32)])
    with pytest.raises(ValueError, match="expected 48 of float32"):
        write_array(tmp_path, "other", (4, 3), np.float32, [np.zeros((4, 3), np.int32)])
    with pytest.raises(ValueError, match=r"longer|shorter"):
        write_array(tmp_path, "more", (4, 3), np.float32, [np.zeros((4, 3), np.float32)] * 2)


@pytest.mark.parametrize(("shape", "rows"), [((1000, 10), 4), ((9, 10), 3), ((3, 1000), 1), ((0, 5), 1), ((), 1)])
def test_pieces_are_of_like_size_and_small(shape, rows, monkeypatch):
    monkeypatch.setattr(orbax_io, "PIECE_BYTES", 160)
    assert piece_rows(shape, np.float32) == rows


def test_a_folder_is_proved_by_all_its_bytes_and_no_others(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_io, "PIECE_BYTES", 100)
    folder = tmp_path / "part"
    stored = save(folder, arrays)
    assert proves(folder, stored)
    assert not proves(folder, {name: x for name, x in stored.items() if name != "flags"})
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        flipped = bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 1])
        for wrong in (whole[:-1], whole + b"\0", *flipped):
            path.write_bytes(wrong)
            assert not proves(folder, stored), path
        path.unlink()
        assert not proves(folder, stored), path
        path.write_bytes(whole)
    assert proves(folder, stored)
    (folder / "a.kernel/c.99.0").write_bytes(b"")
    assert not proves(folder, stored)
