"""Releases with random weights: the real one's names and sizes, and a miniature one written, converted and run."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert import inspect
from convert.files import open_source
from convert.inventory import take_inventory
from hlwq_jax import TensorFile
from ltx_jax.checkpoint import MODELS
from scripts import real_size
from scripts._real_release import PACKAGE, TEXT_ENCODER, Release, cycle, release_files, write_files
from scripts.real_size import (
    CHECKPOINT,
    MARKER,
    Folder,
    Phase,
    RealSizeError,
    alone,
    check_memory,
    check_space,
    convert_release,
    load,
    main,
    run,
    step,
    write_release,
)


@pytest.fixture(scope="session")
def mini(mini_release: Path) -> Release:
    """The configuration of the miniature release."""
    package = mini_release / PACKAGE
    config = TensorFile(package / "polarquant/bf16/ltx23_bf16.safetensors").metadata["config"]
    upscalers = [json.loads(TensorFile(path).metadata["config"]) for path in (package / "upscalers").iterdir()]
    return Release(
        metadata=json.loads(config),
        upscalers={f"upscaler_{'temporal' if u['temporal_upsample'] else 'spatial'}_x2": u for u in upscalers},
        gemma=json.loads((mini_release / "gemma-3-mini/config.json").read_text()),
        text_length=64,
    )


@pytest.fixture(scope="session")
def results(mini, tmp_path_factory) -> tuple[Path, dict[str, Phase]]:
    """The miniature one written (in a process of its own), converted and run for a step."""
    folder = tmp_path_factory.mktemp("mini")
    phases = alone(write_release, folder, mini), convert_release(folder), step(folder)
    return folder, {phase.name: phase for phase in phases}


@pytest.fixture(scope="session")
def real() -> Release:
    return Release.ltx_2_3(blocks=48)


# ------------------------------------------------------------------- real size


def test_the_real_release_has_5947_tensors_of_which_1347_are_packed(real):
    assert (len(real.shapes), len(real.packed)) == (5_947, 1_347)
    assert set(real.packed) < set(real.shapes)
    blocks = [name for name in real.packed if ".transformer_blocks." in name]
    assert len(blocks) == 48 * 28
    assert sum(np.prod(real.packed[name]) for name in blocks) == 18_522_046_464
    assert sum(np.prod(shape) for shape in real.shapes.values()) == 23_069_505_387


def test_the_real_files_are_planned_at_the_published_sizes(real):
    files = release_files(real)
    codes = {path: file for path, file in files.items() if "/codes/" in path}
    kept = files[f"{PACKAGE}/polarquant/bf16/ltx23_bf16.safetensors"]
    assert len(kept.tensors) == 4_600
    assert kept.nbytes == pytest.approx(9.1e9, rel=0.01)  # "9.1 GB" on the package's card
    assert all(file.nbytes <= 1.5e9 for file in codes.values())
    assert sum(file.nbytes for file in codes.values()) == pytest.approx(11.87e9, rel=0.001)
    assert sum(len(file.tensors) for file in codes.values()) == 3 * 1_347


def test_a_shallower_release_differs_by_whole_blocks_alone(real):
    shallow = Release.ltx_2_3(blocks=2)
    assert set(real.shapes) - set(shallow.shapes) == {
        name for name in real.shapes if any(f".transformer_blocks.{i}." in name for i in range(2, 48))
    }
    assert shallow.shapes.items() <= real.shapes.items()


def test_a_text_encoder_has_the_real_widths_and_the_projection_reads_its_states():
    files = release_files(Release.ltx_2_3(blocks=1, upscalers=False, gemma_blocks=2))
    text = {name: t.shape for path, file in files.items() if TEXT_ENCODER in path for name, t in file.tensors.items()}
    assert text["language_model.model.embed_tokens.weight"] == (262208, 3840)
    assert text["language_model.model.layers.1.mlp.down_proj.weight"] == (3840, 15360)
    kept = files[f"{PACKAGE}/polarquant/bf16/ltx23_bf16.safetensors"].tensors
    assert kept["text_embedding_projection.video_aggregate_embed.weight"].shape == (4096, 3 * 3840)


# ------------------------------------------------------------------- miniature


def test_the_written_release_has_the_tensors_of_the_published_one(mini_release, results):
    published, written = (open_source(folder / PACKAGE) for folder in (mini_release, results[0]))
    for theirs, ours in [
        (published.tensors, written.tensors),
        *((published.upscalers[name].tensors, written.upscalers[name].tensors) for name in written.upscalers),
    ]:
        assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in theirs.items()}
    assert published.upscalers.keys() == written.upscalers.keys()
    assert (published.metadata, published.model_version) == (written.metadata, written.model_version)


def test_the_written_release_is_complete_and_its_codes_are_of_table_b(results):
    folder, _ = results
    report = inspect(folder / PACKAGE, gemma=folder / TEXT_ENCODER)
    assert report.complete
    assert report.warnings == ()
    (group,) = report.quantized
    assert (group.layout, group.packing, group.bits, group.codebook) == ("V5", "M", 5, "B")
    assert group.num_weights == report.linears_per_block * report.num_blocks + 3
    assert set(report.upscalers) == {"upscaler_spatial_x2", "upscaler_temporal_x2"}


def test_safetensors_reads_what_was_written(results):
    """The library refuses gaps, overlaps and misaligned headers, which our own reader might share with our writer."""
    for path in sorted(results[0].rglob("*.safetensors")):
        assert load_file(path).keys() == set(TensorFile(path))


def test_packed_weights_keep_the_size_of_what_they_multiply_and_no_rows_are_equal(mini, results):
    weights = take_inventory(open_source(results[0] / PACKAGE)).weights
    for name in ("attn1.to_q", "audio_ff.net.2"):
        weight = weights[f"model.diffusion_model.transformer_blocks.1.{name}.weight"].dequantize().astype(np.float32)
        # 5 % is five standard errors of the smallest sample, 65,536 weights of which a block is drawn at once.
        assert weight.std() == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
        assert len(np.unique(weight, axis=0)) == len(weight)


def test_the_phases_tell_what_they_did(results):
    folder, phases = results
    assert list(phases) == ["write", "convert", "step"]
    written = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert written <= phases["write"].disk_bytes == phases["convert"].moved_bytes
    assert phases["convert"].disk_bytes == sum(
        p.stat().st_size for p in (folder / CHECKPOINT).rglob("*") if p.is_file()
    )
    assert phases["step"].note.startswith("64 + 16 tokens, contexts of 64, float32")
    # A process that has imported JAX and NumPy holds more than that, and far less than this machine's.
    assert 2**26 < phases["write"].peak_rss_bytes < 2**31
    assert all(phase.seconds > 0 for phase in phases.values())


def test_a_model_loads_and_its_bytes_are_told(results):
    folder, phases = results
    assert load(folder, "transformer").weights_bytes == phases["step"].weights_bytes
    # Its layers' linears are packed by the converter, so it is smaller than what was written.
    assert 0 < load(folder, "gemma").weights_bytes < sum(p.stat().st_size for p in (folder / TEXT_ENCODER).iterdir())


@pytest.mark.slow  # twelve processes, each of which imports JAX
def test_a_whole_run_on_the_command_line(mini, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_size.Release, "ltx_2_3", lambda **_: mini)
    out = tmp_path / "figures.json"
    assert main(["--folder", str(tmp_path / "run"), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    names = [phase["name"] for phase in report["phases"]]
    assert names[:2] == ["write", "convert"]
    assert names[-1] == "step"
    assert {name.removeprefix("load ") for name in names[2:-1]} == {*MODELS, *mini.upscalers}
    assert all(bar["held"] for bar in report["bars"])
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert "LTX-2.3 with 2 blocks" in capsys.readouterr().out


# ---------------------------------------------------------------------- folder


def test_what_was_kept_is_known_and_only_what_a_run_made_goes(mini, tmp_path):
    path = tmp_path / "above" / "folder"
    first = Folder(path)
    first.claim(mini)
    first.make(PACKAGE)
    (path / PACKAGE).mkdir()
    first.leave(keep=True)
    assert Folder(path).release == mini

    second = Folder(path)
    second.claim(mini)
    second.make(CHECKPOINT)
    (path / CHECKPOINT).mkdir()
    second.leave(keep=False)
    assert {entry.name for entry in path.iterdir()} == {PACKAGE, MARKER}

    third = Folder(path)
    third.claim(mini)
    third.make(PACKAGE)
    third.leave(keep=False)
    assert list(path.iterdir()) == []  # the folder itself is the first run's


def test_a_new_folder_goes_with_what_is_above_it(mini, tmp_path):
    folder = Folder(tmp_path / "above" / "folder")
    folder.claim(mini)
    folder.make(PACKAGE)
    (folder.path / PACKAGE).mkdir()
    folder.leave(keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    assert main(["--folder", str(tmp_path), "--blocks", "1"]) == 2
    assert "was not made by this script" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_full_disk_is_refused_before_anything_is_written(mini, tmp_path, monkeypatch):
    usage = real_size.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(real_size.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(RealSizeError, match=r"0\.0 GB free, write and convert need 0\.1 GB"):
        list(run(mini, tmp_path / "new", ("write", "convert"), quantize=(), keep=True))
    assert list(tmp_path.iterdir()) == []


def test_the_room_of_what_is_replaced_counts_as_free(mini, results, monkeypatch):
    folder, _ = results
    usage = real_size.shutil.disk_usage(folder)
    reserve = 2**26
    monkeypatch.setattr(real_size.shutil, "disk_usage", lambda _: usage._replace(free=reserve))
    check_space(folder, mini, ("write",))
    with pytest.raises(RealSizeError, match="write need"):
        check_space(folder.parent / "other", mini, ("write",))


def test_a_model_that_memory_cannot_hold_is_refused(results, monkeypatch):
    free = real_size.psutil.virtual_memory()._replace(available=2**29)
    monkeypatch.setattr(real_size.psutil, "virtual_memory", lambda: free)
    with pytest.raises(RealSizeError, match=r"transformer needs 4\.3 GB of memory, 0\.5 GB are free"):
        check_memory(results[0], "transformer")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--phases", "write,paint"], "--phases has paint; there are write, convert, load, step"),
        (["--phases", ","], "--phases has nothing"),
        (["--blocks", "0"], "--blocks must be at least 1"),
        (["--phases", "convert"], "holds no release; add write"),
        (["--phases", "step"], "holds no checkpoint; add convert"),
    ],
)
def test_runs_that_cannot_be_are_refused_and_leave_nothing(arguments, says, tmp_path, capsys):
    assert main(["--folder", str(tmp_path / "new"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _die(folder: Path) -> Phase:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_killed_process_is_told_with_what_to_do(tmp_path):
    with pytest.raises(RealSizeError, match="killed, most likely for memory"):
        alone(_die, tmp_path)


# ---------------------------------------------------------------------- values


def test_cycle_goes_round_and_round():
    pool = np.arange(5)
    assert np.concatenate(list(cycle(pool, 8, 9))).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_equal_releases_are_equal_byte_for_byte(mini, results, tmp_path):
    files = release_files(mini)
    path = f"{PACKAGE}/polarquant/codes/chunk_00_codes.safetensors"
    write_files(tmp_path, Release(metadata=mini.metadata, upscalers={}), {path: files[path]}, lambda count: None)
    assert (tmp_path / path).read_bytes() == (results[0] / path).read_bytes()


def test_codes_are_cut_into_files_between_weights(mini):
    files = [file for path, file in release_files(mini, codes_file_bytes=300_000).items() if "/codes/" in path]
    assert len(files) > 2
    for file in files:
        stems = Counter(name.rpartition("__")[0] for name in file.tensors)
        assert set(stems.values()) == {3}
        assert file.nbytes <= 300_000 or len(stems) == 1
