"""Conversions that are cut off: what is kept, what another run makes of it, and that nothing else is touched."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest

from convert import ConvertError, convert, writer
from convert.__main__ import main
from convert.destination import MARKER, TREE, WORKING, Work, claim
from convert.files import open_source
from convert.inventory import take_inventory
from convert.journal import INVENTORY, Journal, Part, array_digest, file_digest, read_inventory
from convert.quantizing import Quantizing
from convert.report import make_report
from convert.tasks import all_tasks, tensor_facts
from hlwq_jax import TensorFile
from ltx_jax import durable
from ltx_jax.checkpoint import MANIFEST, Manifest
from ltx_jax.orbax_io import Stored, restore

PACKAGE = "LTX-2.3-22B-PolarQuant-Q5"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every empty folder."""
    paths = [path for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}


@pytest.fixture
def whole(mini_release):
    """`whole(dest)`: the conversion of which `mini_checkpoint` is the undisturbed result."""
    return lambda dest, **more: convert(
        mini_release / PACKAGE, dest, gemma=mini_release / "gemma-3-mini", gemma_bits=16, **more
    )


# ------------------------------------------------------- a few tensors of a release


@pytest.fixture(scope="module")
def inventory(mini_release):
    return take_inventory(open_source(mini_release / PACKAGE, gemma=mini_release / "gemma-3-mini"))


@pytest.fixture
def few(inventory, mini_release, monkeypatch) -> Callable[..., Manifest]:
    """`few(dest)`: a conversion of two tensors a part, planned once, so that it may be done often."""
    planned: dict[Any, list] = {}

    def some_tasks(inventory: Any, quantizing: Any) -> list:
        key = repr(quantizing)
        if key not in planned:
            parts = "transformer/blocks.001", "gemma/layers.002", "connectors/shared", "upscaler_spatial_x2/shared"
            found = [task for task in all_tasks(inventory, quantizing) if task.part in parts]
            found.sort(key=lambda task: (task.part, -task.stored.nbytes, task.name))
            planned[key] = [task for _, tasks in groupby(found, lambda task: task.part) for task in list(tasks)[:2]]
        return planned[key]

    report = make_report(inventory)
    monkeypatch.setattr(writer, "open_source", lambda *args, **more: inventory.source)
    monkeypatch.setattr(writer, "take_inventory", lambda source, base: inventory)
    monkeypatch.setattr(writer, "make_report", lambda inventory: report)
    monkeypatch.setattr(writer, "all_tasks", some_tasks)
    return lambda dest, **more: convert(mini_release / PACKAGE, dest, **more)


class PowerCut(BaseException):
    """The machine is off: nothing that a program does after it happens."""


class Disk:
    """Counts steps that change the disk, and cuts the power within one of them.

    The step may be done, not done, or half done then; files that were not forced to the disk lose what they held.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cut_at: int | None, seed: int = 0):
        self.steps, self.cut_at, self.off = 0, cut_at, False
        self.random = random.Random(seed)
        self.unsynced: set[Path] = set()
        self.lock = RLock()  # parts are written by several threads
        for name in ("write", "append", "truncate", "sync", "_sync_one", "rename"):
            monkeypatch.setattr(durable, name, self._wrap(name, getattr(durable, name)))

    def _wrap(self, name: str, function: Callable[..., None]) -> Callable[..., None]:
        def step(path: Path, *args: Any) -> None:
            with self.lock:
                take(path, *args)

        def take(path: Path, *args: Any) -> None:
            if self.off:
                raise PowerCut
            self.steps += 1
            if self.steps == self.cut_at:
                self._cut(name, function, path, *args)
            function(path, *args)
            if name == "write":
                self.unsynced.add(path)
            elif name in ("sync", "_sync_one"):
                self.unsynced = {other for other in self.unsynced if path not in (other, *other.parents)}
            elif name == "rename":
                self.unsynced = {
                    args[0] / other.relative_to(path) if path in (other, *other.parents) else other
                    for other in self.unsynced
                }

        return step

    def _cut(self, name: str, function: Callable[..., None], path: Path, *args: Any) -> None:
        self.off = True
        half = self.random.choice((0, 1, 2))
        if half == 2:
            self.off = False  # `rename` syncs on its way
            function(path, *args)
            self.off = True
        elif half == 1 and name == "append":
            with open(path, "ab") as file:
                file.write(args[0][: self.random.randrange(len(args[0]))])
        lost = self.unsynced | ({path} if name == "write" else set())
        for other in sorted(lost):
            if other.is_file():
                data = bytearray(other.read_bytes())
                kept = self.random.randint(0, len(data))
                other.write_bytes(bytes(data[:kept]) + self.random.choice((b"", bytes(len(data) - kept))))
        raise PowerCut


def cut_and_go_on(run: Callable[..., Manifest], dest: Path, expected: dict[str, bytes], step: int) -> bool:
    """Cuts the power within a step, looks at what is there, and runs again; False where there is no such step."""
    before = tree(dest) if dest.exists() else None
    with pytest.MonkeyPatch.context() as patched:
        disk = Disk(patched, step, seed=step)
        try:
            run(dest)
        except PowerCut:
            pass
        else:
            assert disk.steps < step
    if (dest / MANIFEST).is_file():  # a checkpoint is a whole one: the old or the new
        found = {name: data for name, data in tree(dest).items() if not name.startswith(WORKING)}
        assert found in (before, expected)
    with suppress(ConvertError):  # a checkpoint is there already: it was cut off after its last step
        run(dest)
    assert tree(dest) == expected
    assert [path.name for path in dest.parent.iterdir()] == [dest.name]
    return disk.off


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["some steps", "every step"])
def test_a_power_cut_at_any_step_changes_nothing_of_the_result(few, tmp_path, stride):
    (tmp_path / "undisturbed").mkdir()
    few(tmp_path / "undisturbed/out")
    expected = tree(tmp_path / "undisturbed/out")
    number = 0
    for step in range(1, 1000, stride):
        number += 1
        (tmp_path / str(step)).mkdir()
        if not cut_and_go_on(few, tmp_path / str(step) / "out", expected, step):
            break
        shutil.rmtree(tmp_path / str(step))
    assert number * stride > 50


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some steps", "every step"])
def test_a_power_cut_while_replacing_leaves_the_old_checkpoint_or_the_new_one(few, tmp_path, stride):
    (tmp_path / "undisturbed").mkdir()
    few(tmp_path / "undisturbed/old", gemma_bits=4)
    few(tmp_path / "undisturbed/new")
    expected = tree(tmp_path / "undisturbed/new")
    number = 0
    for step in range(1, 1000, stride):
        number += 1
        dest = tmp_path / str(step) / "out"
        shutil.copytree(tmp_path / "undisturbed/old", dest)
        if not cut_and_go_on(lambda dest: few(dest, overwrite=True), dest, expected, step):
            break
        shutil.rmtree(dest.parent)
    assert number * stride > 70


# ------------------------------------------------------------------------ killed


@pytest.fixture(scope="module")
def spawn() -> Any:
    """Starts functions in processes that have imported everything already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["convert"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAX_PLATFORMS", "cpu")
        yield lambda function, *args, **more: context.Process(target=function, args=args, kwargs=more)


def killed_chain(spawn: Any, mini_release: Path, dest: Path, *, kills: int, spread: float, seed: int) -> int:
    """Begins conversions one after the other and kills each; returns how many had begun to write, and not ended."""
    rng, counted = random.Random(seed), 0
    for _ in range(kills):
        process = spawn(convert, mini_release / PACKAGE, dest, gemma=mini_release / "gemma-3-mini", gemma_bits=16)
        process.start()
        journal = dest.with_name(f"{dest.name}.converting") / MARKER
        while process.is_alive() and not (journal.is_file() and journal.stat().st_size):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, spread))
        process.kill()
        process.join()
        counted += process.exitcode == -signal.SIGKILL
        process.close()
    return counted


@pytest.mark.parametrize(
    ("chains", "kills", "spread"), [(1, 6, 0.5), pytest.param(20, 3, 2.5, marks=pytest.mark.slow)], ids=["6", "60"]
)
def test_killed_conversions_are_gone_on_with_to_the_same_bytes(
    spawn, whole, mini_release, mini_checkpoint, tmp_path, chains, kills, spread
):
    expected = tree(mini_checkpoint)
    counted = 0
    for chain in range(chains):
        dest = tmp_path / str(chain) / "out"
        counted += killed_chain(spawn, mini_release, dest, kills=kills, spread=spread, seed=chain)
        if not (dest / MANIFEST).is_file():
            whole(dest)
        assert tree(dest) == expected
        assert [path.name for path in dest.parent.iterdir()] == ["out"]
        shutil.rmtree(dest.parent)
    assert counted >= chains * kills * 0.8, f"only {counted} were killed while they wrote"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal's programs have it: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_written_and_the_same_command_goes_on(few, mini_release, tmp_path, monkeypatch, capsys):
    few(tmp_path / "expected")
    synced: list[str] = []
    sync = durable.sync

    def counted(folder: Path) -> None:
        sync(folder)
        synced.append(folder.name)
        if len(synced) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(durable, "sync", counted)
    assert main([str(mini_release / PACKAGE), str(tmp_path / "out")]) == 130
    assert not (tmp_path / "out").exists()
    kept = (tmp_path / "out.converting" / MARKER).read_bytes().count(b'"part"')
    assert kept in (1, 2, 3)  # of four: two are written at a time
    capsys.readouterr()
    del synced[:]
    monkeypatch.setattr(durable, "sync", lambda folder: (synced.append(folder.name), sync(folder)))
    few(tmp_path / "out", progress=True)
    assert f"goes on        {kept} of 4 parts are written" in capsys.readouterr().err
    assert len(set(synced) - {"tokenizer", "kept"}) == 4 - kept
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_a_full_disk_keeps_what_is_written(few, tmp_path, monkeypatch, mini_release, capsys):
    few(tmp_path / "expected")
    steps = 0

    def full(path: Path, chunks: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, chunks)

    write = durable.write
    with monkeypatch.context() as patched:
        patched.setattr(durable, "write", full)
        assert main([str(mini_release / PACKAGE), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert f"is kept in {tmp_path / 'out.converting'}: the same command goes on from there" in said
    few(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


# ------------------------------------------------------------- what does not mix


@pytest.fixture
def unfinished(few, monkeypatch) -> Callable[..., Path]:
    """`unfinished(dest)`: the working folder of a conversion that was cut off just before its end."""

    def cut(dest: Path, **more: Any) -> Path:
        with monkeypatch.context() as patched:
            patched.setattr(Work, "finish", lambda work: (_ for _ in ()).throw(PowerCut))
            with pytest.raises(PowerCut):
                few(dest, **more)
        return dest / WORKING if dest.exists() else dest.with_name(f"{dest.name}.converting")

    return cut


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: shutil.rmtree(path.parent)],
    ids=["a bit", "a file", "a byte", "an array"],
)
def test_only_what_its_digests_prove_is_used_again(few, unfinished, tmp_path, monkeypatch, damage):
    few(tmp_path / "expected")
    folder = unfinished(tmp_path / "out")
    damage(next((folder / TREE / "transformer/blocks.001").glob("*.lo/c.0.0")))
    synced: list[str] = []
    sync = durable.sync
    monkeypatch.setattr(durable, "sync", lambda path: (synced.append(path.name), sync(path)))
    few(tmp_path / "out")
    assert sorted(synced) == ["blocks.001.partial", "kept", "tokenizer"]
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_other_options_or_sources_start_over_and_say_so(few, unfinished, inventory, tmp_path, capsys):
    few(tmp_path / "expected", gemma_bits=3)
    unfinished(tmp_path / "out")
    few(tmp_path / "out", gemma_bits=3, progress=True)
    assert "starts over    an unfinished conversion was of other options" in capsys.readouterr().err
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    unfinished(tmp_path / "other")
    path = inventory.source.files[0]
    stat = path.stat()
    try:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        few(tmp_path / "other", gemma_bits=3, progress=True)
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "was of other source files, options" in capsys.readouterr().err
    assert tree(tmp_path / "other") == tree(tmp_path / "expected")


def test_a_source_that_changes_while_it_is_read_is_refused(few, inventory, tmp_path, monkeypatch):
    path = inventory.source.files[0]
    stat = path.stat()

    def touching(file: Path, *advance: Any) -> str:
        if advance:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
        return file_digest(file, *advance)

    monkeypatch.setattr(writer, "file_digest", touching)
    try:
        with pytest.raises(ConvertError, match=f"{path.name} was changed while it was read"):
            few(tmp_path / "out")
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not list(tmp_path.iterdir())


def test_two_conversions_into_one_destination_do_not_mix(few, unfinished, tmp_path):
    dest = tmp_path / "out"
    with claim(dest, overwrite=False), pytest.raises(ConvertError, match=r"another conversion into .* is running"):
        few(dest)
    few(dest)  # the lock is gone with its owner
    with claim(dest, overwrite=True), pytest.raises(ConvertError, match="another conversion"):
        few(dest, overwrite=True)
    assert not list(dest.glob(".*"))


def test_a_lock_outlives_neither_its_folder_nor_a_killed_process(few, unfinished, tmp_path):
    folder = unfinished(tmp_path / "out")
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / MARKER)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"locked\n"
    with pytest.raises(ConvertError, match="another conversion"):
        few(tmp_path / "out")
    child.kill()
    child.wait()
    child.stdout.close()
    assert few(tmp_path / "out").parts


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_in_the_way_is_left_alone(few, unfinished, tmp_path):
    (tmp_path / "out.converting").mkdir()
    (tmp_path / "out.converting/thesis.txt").write_text("irreplaceable")
    with pytest.raises(ConvertError, match=r"out\.converting is in the way and was not made by convert"):
        few(tmp_path / "out")
    dest = tmp_path / "there"
    dest.mkdir()
    unfinished(dest)
    (dest / "vocoder").mkdir()
    (dest / "transformer").write_text("mine")
    with pytest.raises(ConvertError, match="transformer is in the way; move it and run again"):
        few(dest)
    (dest / "transformer").rename(dest / "notes")
    few(dest)
    assert (dest / "notes").read_text() == "mine"
    assert Manifest.read(dest).parts["transformer"]
    assert (tmp_path / "out.converting/thesis.txt").read_text() == "irreplaceable"


def test_a_destination_that_appears_meanwhile_is_not_written_into(few, unfinished, tmp_path):
    folder = unfinished(tmp_path / "out")
    few(tmp_path / "expected")
    finish = Work.finish

    def appears(work: Work) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("irreplaceable")
        finish(work)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Work, "finish", appears)
        with pytest.raises(ConvertError, match="out cannot be made"):
            few(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert (folder / TREE / MANIFEST).is_file()
    (tmp_path / "out").rename(tmp_path / "moved")
    few(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_sources_are_only_read(few, mini_release, tmp_path):
    def facts() -> dict[str, tuple[int, ...]]:
        paths = [mini_release, *mini_release.rglob("*")]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_mode) for path in paths}

    before = facts()
    few(tmp_path / "out")
    assert facts() == before


def test_a_disk_without_room_is_told_before_anything_is_written(few, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(ConvertError, match=r"has 0.001 GB free, the checkpoint needs"):
        few(tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------- digests


def test_the_inventory_has_the_digest_of_every_array_and_the_manifest_that_of_the_inventory(mini_checkpoint):
    manifest, inventory = Manifest.read(mini_checkpoint), read_inventory(mini_checkpoint)
    assert manifest.provenance["inventory_sha256"] == file_digest(mini_checkpoint / INVENTORY)
    assert set(inventory["arrays"]) == {f"{name}/{part}" for name, parts in manifest.parts.items() for part in parts}
    for part in ("transformer/blocks.001", "connectors/shared", "vocoder/shared"):
        found = restore(mini_checkpoint / part)
        assert inventory["arrays"][part] == {
            name: {"sha256": array_digest(array), "dtype": array.dtype.name, "shape": list(array.shape)}
            for name, array in found.items()
        }
    for name, digest in inventory["files"].items():
        assert sha256((mini_checkpoint / name).read_bytes()).hexdigest() == digest
    assert "tokenizer/tokenizer.json" in inventory["files"]
    for path, facts in manifest.provenance["sources"].items():
        assert sha256(Path(path).read_bytes()).hexdigest() == facts["sha256"]


def test_the_inventory_says_what_became_of_every_published_tensor(mini_checkpoint, mini_release, inventory):
    tensors = read_inventory(mini_checkpoint)["tensors"]
    package = mini_release / PACKAGE / "polarquant"
    kept = package / "bf16/ltx23_bf16.safetensors"
    gemma = {name for file in (mini_release / "gemma-3-mini").glob("*.safetensors") for name in TensorFile(file)}
    assert set(tensors) >= set(TensorFile(kept)) | set(inventory.weights) | gemma
    linear = "model.diffusion_model.transformer_blocks.1.attn1.to_q.weight"
    assert tensors[linear]["rule"] == "packed as it came"
    assert tensors[linear]["to"] == "transformer/blocks.1.video.self_attn.to_q"
    assert tensors[linear]["from"].startswith(str(package / "codes"))
    bias = tensors["vae.decoder.conv_out.conv.bias"]
    assert bias == {
        "from": str(kept),
        "rule": "kept",
        "to": "video_vae/decoder.conv_out.bias",
        "why": "bfloat16, not quantised",
    }
    rules = {facts["rule"] for facts in tensors.values()}
    assert rules == {"kept", "packed as it came", "skipped"}
    assert all((facts["to"] is None) == (facts["rule"] == "skipped") for facts in tensors.values())
    packed = tensor_facts(inventory, list(all_tasks(inventory, Quantizing.of(gemma_bits=6, groups=[]))))
    assert packed["language_model.model.layers.3.mlp.up_proj.weight"]["rule"] == "quantised"
    assert packed["language_model.model.layers.3.mlp.up_proj.weight"]["why"] == "gemma at 6 bits"


def test_an_inventory_that_is_missing_or_damaged_is_told(tmp_path):
    with pytest.raises(ConvertError, match=r"has no inventory\.json"):
        read_inventory(tmp_path)
    for wrong in ("{", "[]", "[" * 100_000, '{"arrays": {}, "files": 3, "tensors": {}}'):
        (tmp_path / INVENTORY).write_text(wrong)
        with pytest.raises(ConvertError, match=r"inventory\.json is"):
            read_inventory(tmp_path)


def test_a_journal_ends_where_its_last_line_was_cut_off(tmp_path):
    journal = Journal(tmp_path / "journal")
    (tmp_path / "journal").touch()
    journal.start({"of": 1})
    journal.finish_part("a/b", Part(arrays={"x": Stored("0" * 64, "float32", (2, 3))}, quantized={"x": {"bits": 5}}))
    whole = (tmp_path / "journal").read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        (tmp_path / "journal").write_bytes(whole[:size])
        found = Journal(tmp_path / "journal")
        count = sum(size >= len(b"".join(lines[: i + 1])) for i in range(len(lines)))
        assert (found.key, len(found.parts)) == (None if count == 0 else {"of": 1}, int(count == 2))
        found.set_step(swap=1)
        assert Journal(tmp_path / "journal").step == {"swap": 1}
    assert Journal(tmp_path / "journal").parts["a/b"].arrays["x"].shape == (2, 3)
