"""The parity script on parts of the reference, on broken copies of them, and (slow) on all of it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from convert.tables.transformer import TRANSFORMER
from convert.tables.video_vae import VIDEO_VAE
from scripts import parity
from scripts.parity_cases import Reference, Report, call, call_recorded, compare, our_path
from tests.conftest import DATA

INPUTS = "checkpoint.safetensors", "config.json", "gemma.safetensors", "gemma_config.json"


@pytest.fixture
def part(tmp_path: Path, ltx_dir: Path) -> Callable[..., Path]:
    """`part("rope", ...)`: a directory with the weights and these reference files alone, which may be rewritten."""

    def make(*names: str) -> Path:
        for name in INPUTS:
            (tmp_path / name).symlink_to(ltx_dir / name)
        for name in names:
            shutil.copyfile(ltx_dir / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        index = json.loads((ltx_dir / "index.json").read_text())
        (tmp_path / "index.json").write_text(json.dumps({k: v for k, v in index.items() if k in names}))
        return tmp_path

    return make


def failures(directory: Path, out: Path) -> tuple[int, dict[str, str]]:
    """The exit code, and the notes of the failing cases by name."""
    code = parity.main(directory, json_file=out)
    rows = json.loads(out.read_text())["rows"]
    return code, {row["case"]: row["note"] for row in rows if not row["ok"]}


def change(path: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path)


def test_parts_of_the_reference_agree(part, tmp_path):
    directory = part("rope", "sampling", "gemma_text", "transformer")
    # One case of the transformer, which needs the shared sigma of another.
    keep = ("in.audio.", "audio_only.", "uniform.in.")
    path = directory / "transformer.safetensors"
    save_file({name: array for name, array in load_file(path).items() if name.startswith(keep)}, path)
    index = json.loads((directory / "index.json").read_text())
    tensors = index["transformer"]["tensors"]
    index["transformer"]["tensors"] = {name: shape for name, shape in tensors.items() if name.startswith(keep)}
    (directory / "index.json").write_text(json.dumps(index))

    code = parity.main(directory, json_file=tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row for row in result["rows"] if not row["ok"]] == []
    assert code == 0
    assert result["ok"]
    cases = {row["case"] for row in result["rows"]}
    assert {"transformer/audio_only (list)", "transformer/audio_only (scan)", "gemma_text/hidden (scan)"} <= cases
    assert {"rope/video_self", "rope/positions keyframe", "sampling/cfgpp", "sampling/guide.video_2_3"} <= cases
    # What the script sets for itself is put back.
    assert not jax.config.read("jax_disable_most_optimizations")


def test_a_changed_value_fails_and_names_its_case(part, tmp_path):
    directory = part("sampling")

    def edit(arrays):
        arrays["guide.cfg"][0, 0, 0] += 1e-3

    change(directory / "sampling.safetensors", edit)
    code, failed = failures(directory, tmp_path / "out.json")
    assert code == 1
    assert set(failed) == {"sampling/guide.cfg"}


def test_unknown_and_broken_cases_fail_and_the_others_still_run(part, tmp_path):
    directory = part("sampling")

    def edit(arrays):
        arrays["mystery.0"] = arrays["euler.0"]
        arrays["beta.steps12"][3] = np.nan
        arrays["distilled.stage2"] = arrays["distilled.stage2"][:-1]
        arrays["euler.99"] = arrays.pop("euler.7")  # there is no sigma 99
        del arrays["ltx2.default.steps40"]

    change(directory / "sampling.safetensors", edit)
    (directory / "mystery.safetensors").write_bytes((directory / "sampling.safetensors").read_bytes())
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | {"absent": {}}))

    code, failed = failures(directory, tmp_path / "out.json")
    assert code == 1
    assert set(failed) == {
        "sampling/unknown: mystery.0",
        "sampling/beta",
        "sampling/distilled",
        "sampling/euler.99",
        "sampling/missing: euler.7",
        "sampling/missing: ltx2.default.steps40",
        "unknown: mystery.safetensors",
        "missing: absent.safetensors",
    }
    assert failed["sampling/beta"] == "beta.steps12: not finite in the reference"
    assert failed["sampling/distilled"] == "distilled.stage2: shape [4], need [3]"


def test_a_transformer_case_of_an_unknown_name_is_not_taken_for_a_known_one(part, tmp_path):
    directory = part()
    arrays = load_file(DATA / "ltx/transformer.safetensors")
    mystery = {name.replace("video_only", "mystery"): a for name, a in arrays.items() if name.startswith("video_only.")}
    save_file(mystery, directory / "transformer.safetensors")
    code, failed = failures(directory, tmp_path / "out.json")
    assert code == 1
    assert set(failed) == {f"transformer/unknown: {name}" for name in mystery}


def test_weights_that_do_not_fit_fail_by_name(part, tmp_path):
    directory = part("gemma_text")
    path = directory / "gemma.safetensors"
    arrays = load_file(path)
    path.unlink()  # a link
    arrays["language_model.model.layers.0.mlp.strange.weight"] = arrays.pop("language_model.model.norm.weight")
    save_file(arrays, path)
    code, failed = failures(directory, tmp_path / "out.json")
    assert code == 1
    assert set(failed) == {"gemma_text"}
    assert "unknown: layers.0.mlp.strange.weight; missing: norm.weight" in failed["gemma_text"]


def test_a_directory_of_neither_layout_is_refused(tmp_path, capsys):
    assert parity.main(tmp_path) == 2
    assert "checkpoint.safetensors and config.json, or reference/index.json" in capsys.readouterr().err


def test_the_script_runs_without_installation(tmp_path):
    script = Path(parity.__file__)
    done = subprocess.run(
        [sys.executable, script, tmp_path], cwd=tmp_path, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 2, done.stderr
    assert "neither known way" in done.stderr


def test_the_largest_difference_decides():
    ours, theirs = {"a": np.zeros(3), "b": np.array([0.0, 2.0])}, {"a": np.ones(3), "b": np.zeros(2)}
    row = compare("case", ours, theirs, 2.0)
    assert (row.error, row.ok, row.note) == (2.0, True, "largest at b")
    assert not compare("case", ours, theirs, 1.9).ok


def test_only_what_the_mask_says_is_compared():
    mask = np.array([[True, False]])
    ours, theirs = np.array([[[1.0], [5.0]]]), np.array([[[1.0], [np.nan]]])
    assert compare("case", ours, theirs, 0.0, mask).ok
    assert not compare("case", ours, theirs, 0.0).ok
    assert "nothing to compare" in compare("case", ours, theirs, 0.0, mask & False).note


@pytest.mark.parametrize(
    ("ours", "theirs", "note"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), "shape [2, 3], need [3, 2]"),
        (np.array([np.inf]), np.array([np.inf]), "not finite in ours and the reference"),
        ({"a": np.zeros(1)}, {"b": np.zeros(1)}, "the reference lacks ['a']; ours lacks ['b']"),
        ({}, {}, "nothing to compare"),
    ],
)
def test_what_cannot_be_compared_fails_with_a_note(ours, theirs, note):
    row = compare("case", ours, theirs, 1.0)
    assert not row.ok
    assert row.note == note


def test_a_case_that_raises_stands_for_its_own_arrays(tmp_path):
    save_file({"one.a": np.zeros(1), "one.b": np.zeros(1), "two": np.zeros(1)}, tmp_path / "x.safetensors")
    reference, report = Reference(tmp_path / "x.safetensors", {}), Report()
    with report.case("x/one", reference, "one."):
        _ = reference["one.a"]
        raise ValueError("broken")
    report.finish(reference)
    assert [(row.case, row.note[:18]) for row in report.rows] == [
        ("x/one", "ValueError: broken"),
        ("x/unknown: two", "no case that this "),
    ]


def test_published_modules_are_found_by_the_tables_of_their_tensors():
    assert our_path(TRANSFORMER, "transformer_blocks.12.audio_attn2") == "blocks.12.audio.text_attn"
    assert our_path(TRANSFORMER, "prompt_adaln_single") == "video.prompt_adaln"
    assert our_path(VIDEO_VAE, "decoder.up_blocks.3") == "decoder.blocks.3"
    assert our_path(TRANSFORMER, "transformer_blocks.0.mystery") is None


def test_what_modules_return_is_recorded():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
    x = np.ones((1, 2), np.float32)
    y, records = call_recorded(model, ("layers.0",), x)
    np.testing.assert_allclose(records["layers.0"], model.layers[0](x), atol=1e-6)
    np.testing.assert_allclose(y, call(model, x), atol=1e-6)
    assert records.keys() == {"layers.0"}


@pytest.mark.slow
def test_all_of_the_reference_agrees(ltx_dir, tmp_path):
    code, failed = failures(ltx_dir, tmp_path / "out.json")
    assert failed == {}
    assert code == 0
