"""Files that lie, are damaged or are something else: one clear error each, and nothing left behind."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main
from convert.files import open_source
from convert.report import inspect
from hlwq_jax import FormatError, TensorFile

from . import tiny
from .fuzz import cheaply
from .hostile import (
    CODES_0,
    INDEX,
    Case,
    T,
    check_case,
    check_refused,
    content,
    entry,
    header,
    rename,
    replaced,
    text,
    v1,
    v5,
)
from .mutations import join, split
from .tiny import BLOCK, GEMMA, KEPT, MAIN, SIDECAR, UPSCALER

SIZE = re.compile(rb"(?<=\s)32(?=\s)")  # in a header


def sparse(folder: Path) -> None:
    """A tensor of a terabyte, of which the disk holds nothing."""
    raw, data = split((folder / KEPT).read_bytes())
    found = json.loads(raw)
    end = max(e["data_offsets"][1] for name, e in found.items() if name != "__metadata__")
    found["huge"] = {"dtype": "F32", "shape": [2**38], "data_offsets": [end, end + 2**40]}
    whole = join(json.dumps(found).encode(), data)
    (folder / KEPT).write_bytes(whole)
    os.truncate(folder / KEPT, len(whole) + 2**40)


def doubled_name(raw: bytes) -> bytes:
    """The first tensor's name once more, with an entry that hides the first one from a careless reader."""
    name = re.match(rb'\{\s*("[^"]+"):', raw)
    assert name is not None
    return raw.rstrip()[:-1] + b", " + name[1] + b': {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'


DEEP = "[" * 200 + "]" * 200
CASES = [
    # Headers
    Case(
        "a length of 2^63", v5, lambda f: content(KEPT, b"\xff" * 7 + b"\x7f" + b"{" * 99)(f), "promise a header", KEPT
    ),
    Case("a length of nothing", v5, content(KEPT, bytes(8) + b"{}"), "not valid JSON", KEPT),
    Case("negative offsets", v5, entry(data_offsets=[-64, 0]), f"{T}: data_offsets must be", KEPT),
    Case("offsets backwards", v5, entry(data_offsets=[64, 0]), f"{T}: data_offsets must be", KEPT),
    Case("three offsets", v5, entry(data_offsets=[0, 8, 16]), f"{T}: data_offsets must be", KEPT),
    Case("offsets of text", v5, entry(data_offsets=["0", "64"]), f"{T}: data_offsets must be", KEPT),
    Case("offsets true", v5, entry(data_offsets=[False, True]), f"{T}: data_offsets must be", KEPT),
    Case("fractional offsets", v5, entry(data_offsets=[0.0, 64.0]), f"{T}: data_offsets must be", KEPT),
    Case("offsets of 2^70", v5, entry(data_offsets=[2**70, 2**70 + 64]), f"{T}: data_offsets must be", KEPT),
    Case("offsets behind the end", v5, entry(data_offsets=[2**40, 2**40 + 128]), rf"last tensor: {T}", KEPT),
    Case("a negative size", v5, entry(shape=[-32]), f"{T}: shape must be", KEPT),
    Case("a fractional size", v5, entry(shape=[32.0]), f"{T}: shape must be", KEPT),
    Case("a size true", v5, entry(shape=[True, 32]), f"{T}: shape must be", KEPT),
    Case("a size of text", v5, entry(shape=["32"]), f"{T}: shape must be", KEPT),
    Case("a size of null", v5, entry(shape=[None]), f"{T}: shape must be", KEPT),
    Case("no shape", v5, entry(shape=None), f"{T}: shape must be", KEPT),
    Case("a thousand axes", v5, entry(shape=[1] * 1000), f"{T}: shape must be", KEPT),
    Case("a product of 2^93", v5, entry(shape=[2**31] * 3), f"{T}: .* takes {2**94} bytes|{T}: .* takes", KEPT),
    Case("a product that wraps to 32", v5, entry(shape=[2**59 + 1, 32]), f"{T}: .* takes", KEPT),
    Case("sizes beside none", v5, entry(shape=[0, 2**62, 2**62]), f"{T}: .* takes 0 bytes", KEPT),
    Case("an unknown dtype", v5, entry(dtype="F33"), f"{T}: dtype 'F33'", KEPT),
    Case("a list of dtypes", v5, entry(dtype=["F32"]), rf"{T}: dtype \['F32'\]", KEPT),
    Case("whole numbers as weights", v5, entry(dtype="I32"), f"wrong type: {T} is int32", ""),
    Case("an entry of text", v5, header(KEPT, lambda h: h.update({T: "x"})), f"{T}: expected dtype, shape", KEPT),
    Case(
        "metadata of numbers", v5, header(KEPT, lambda h: h["__metadata__"].update(a=1)), "__metadata__ must map", KEPT
    ),
    Case("a name twice", v5, text(KEPT, doubled_name), "names '.*' twice", KEPT),
    Case(
        "a dtype twice",
        v5,
        text(KEPT, lambda h: h.replace(b'"dtype":', b'"dtype": "F32", "dtype":', 1)),
        "'dtype' twice",
        KEPT,
    ),
    Case(
        "a name twice in the metadata",
        v5,
        text(KEPT, lambda h: h.replace(b'"config":', b'"config": "{}", "config":')),
        "'config' twice",
        KEPT,
    ),
    Case("a header of nested lists", v5, text(KEPT, lambda h: b"{" + b'"a":[' * 50_000), "not valid JSON", KEPT),
    Case(
        "a header of 200 levels", v5, text(KEPT, lambda h: f'{{"a": {DEEP}}}'.encode()), "expected JSON of up to", KEPT
    ),
    Case(
        "a number of 5000 digits",
        v5,
        text(KEPT, lambda h: SIZE.sub(b"9" * 5000, h, count=1)),
        "not valid JSON: .*5000 digits",
        KEPT,
    ),
    Case(
        "a number that is none",
        v5,
        text(KEPT, lambda h: SIZE.sub(b"NaN", h, count=1)),
        "NaN is no number",
        KEPT,
    ),
    Case(
        "a header in UTF-16",
        v5,
        text(KEPT, lambda h: h.decode().encode("utf-16")),
        "not a safetensors file|not valid JSON",
        KEPT,
    ),
    Case("a header that is a list", v5, text(KEPT, lambda h: b"[1]"), "must be a JSON object", KEPT),
    Case(
        "an overlap",
        v5,
        header(KEPT, lambda h: h[T].update(data_offsets=[o - 2 for o in h[T]["data_offsets"]])),
        f"{T} .*(overlaps|gap)|(overlaps|gap) after {T}|overlaps",
        KEPT,
    ),
    Case(
        "bytes of no tensor",
        v5,
        lambda f: content(KEPT, (f / KEPT).read_bytes() + b"x")(f),
        "bytes that belong to no tensor",
        KEPT,
    ),
    Case("a terabyte of nothing", v5, sparse, "unknown tensor: huge", ""),
    # Names
    Case("a path as name", v5, rename("../x"), r"unknown tensor: \.\./x", ""),
    Case("an absolute name", v5, rename("/etc/passwd"), "unknown tensor: /etc/passwd", ""),
    Case("a backslash in a name", v5, rename("..\\x"), r"unknown tensor: \.\.\\x", ""),
    Case("a path below a model", v5, rename(f"{BLOCK}../../x"), "unknown tensor of transformer", ""),
    Case("no name", v5, rename(""), "'': expected a name", KEPT),
    Case("a NUL in a name", v5, rename("a\0b"), r"'a\\x00b': expected a name", KEPT),
    Case("a name of half a character", v5, rename("a\ud800"), r"'a\\ud800': expected a name", KEPT),
    Case("a name that moves the cursor", v5, rename("a\x1b[2J"), r"'a\\x1b\[2J': expected a name", KEPT),
    Case("a very long name", v5, rename("x" * 100_000), r"'x+\.\.\.: expected a name", KEPT),
    Case("other digits in a name", v5, rename(T.replace(".0.", ".٠.")), "unknown tensor of transformer", ""),
    # Not what their names say
    Case(
        "a pointer of Git LFS",
        v5,
        content(KEPT, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer",
        KEPT,
    ),
    Case("a page", v5, content(KEPT, "\n<!DOCTYPE html><html>404</html>"), "HTML", KEPT),
    Case("a pickle in disguise", v5, content(KEPT, b"\x80\x04\x95" + bytes(50)), "zip or pickle file", KEPT),
    Case("a torch archive in disguise", v5, content(KEPT, b"PK\x03\x04" + bytes(50)), "zip or pickle file", KEPT),
    Case("another format", v5, content(KEPT, b"GGUF" + bytes(50)), "GGUF file", KEPT),
    Case("an empty file", v5, content(KEPT, b""), "got 0 bytes", KEPT),
    Case("a file of zeros", v5, content(KEPT, bytes(10_000)), "not valid JSON", KEPT),
    Case("a folder called like a file", v5, replaced(KEPT, Path.mkdir), "is not a file", KEPT),
    Case("a pipe", v5, replaced(KEPT, os.mkfifo), "is not a file", KEPT),
    Case("a link to nothing", v5, replaced(KEPT, lambda p: p.symlink_to("nowhere")), "no such file", KEPT),
    Case("a link to itself", v5, replaced(KEPT, lambda p: p.symlink_to(p.name)), "no such file|is not a file", KEPT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_cannot_be_is_refused_by_file_and_tensor(case, tmp_path, capsys):
    check_case(case, tmp_path, capsys)


def test_undamaged_these_packages_are_converted(tmp_path):
    for number, release in enumerate((v5(), v1(), tiny.with_companions())):
        source = release.write(tmp_path / f"source{number}")
        with cheaply():
            assert main([str(source), str(tmp_path / f"out{number}")]) == 0


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.pth", "model.pkl"])
def test_pickles_are_never_opened(name, tmp_path, capsys, monkeypatch):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04cposix\nsystem\n(S'true'\ntR.")
    opened, really = [], Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or really(self, *a, **k))
    assert "never opened" in check_refused([path, tmp_path / "out"], tmp_path / "out", capsys)
    error = check_refused([tmp_path, tmp_path / "out"], tmp_path / "out", capsys)
    assert f"pickles are never opened: {name}" in error
    assert name not in opened


def test_a_pickle_beside_a_package_is_told_and_left_alone(tmp_path, capsys):
    source = v5().write(tmp_path / "source")
    (source / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert main(["inspect", str(source)]) == 0
    assert re.search(r"ignored .*optimizer\.pt: a pickle, by its name.*never opened", capsys.readouterr().out)


@pytest.mark.parametrize("file", [KEPT, CODES_0, SIDECAR, INDEX, MAIN, UPSCALER, f"{GEMMA}/model.safetensors"])
def test_a_file_cut_off_anywhere_is_refused(file, tmp_path):
    """At every byte of the ends and of the header's seams, and at random ones between."""
    release = v5() if file in v5().files else tiny.with_companions()
    source = release.write(tmp_path / "source")
    whole = release.files[file]
    length = len(whole)
    seam = 8 + int.from_bytes(whole[:8], "little") if file.endswith(".safetensors") else 1
    rng = np.random.default_rng(0)
    places = {0, 1, 7, 8, 9, seam - 1, seam, seam + 1, length - 2, length - 1, *rng.integers(0, length, 6).tolist()}
    for place in sorted(places):
        (source / file).write_bytes(whole[:place])
        with pytest.raises(FormatError, match=re.escape(str(source / file))):
            open_source(source)
    (source / file).write_bytes(whole)
    assert inspect(source).complete


def test_headers_of_any_length_are_told_from_other_files(tmp_path):
    """The first bytes are a length: of 640 they begin like a pickle, of 60 like a page, of 15392 with a blank."""
    for length in (60, 640, 8252, 15_392, 66_176):
        text = json.dumps({"__metadata__": {}})
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(join(text.ljust(length).encode(), b""))
        assert len(TensorFile(path)) == 0


@pytest.mark.parametrize(
    "manifest",
    ["", "[" * 100_000, "[]", '{"format": "ltx-jax checkpoint", "version": 1}', b"\xff"],
    ids=["empty", "nested", "list", "without parts", "not UTF-8"],
)
def test_a_destination_that_only_looks_like_a_checkpoint_is_left_alone(manifest, tmp_path, capsys):
    source, path = v5().write(tmp_path / "source"), tmp_path / "out/manifest.json"
    path.parent.mkdir()
    path.write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    assert main([str(source), str(tmp_path / "out"), "--overwrite"]) == 2
    assert f"error: {path} " in capsys.readouterr().err
    assert [path] == list(path.parent.iterdir())


def test_inspect_refuses_as_convert_does(tmp_path, capsys):
    source = v5().write(tmp_path / "source")
    entry(shape=[-32])(source)
    assert f"{T}: shape must be" in check_refused(["inspect", source], tmp_path / "out", capsys)


def test_text_in_brackets_is_no_markup(tmp_path, capsys):
    """Reports are printed by a library that reads [/red] as the end of something red."""
    source = v5().write(tmp_path / "[red]source[/blue]")
    with cheaply():
        assert main([str(source), str(tmp_path / "out")]) == 0
    assert "[red]source[/blue]" in capsys.readouterr().err
