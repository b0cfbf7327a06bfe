"""Sources on the Hugging Face Hub: viewed by ranges, downloaded at one commit, and every way that may fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants

import convert.__main__ as program
from convert import ConvertError, inspect
from convert import hub as hub_module
from convert.files import Shelf, label, repository_of
from convert.hub import Hub
from convert.sources import bring
from hlwq_jax import remote as remote_module
from ltx_jax.checkpoint import Manifest
from tests.web import Answer, FakeRepository, Web, serve, sha256

NAME = "caiovicentino1/LTX-2.3-22B-PolarQuant-Q5"
FIRST, SECOND = "1" * 40, "2" * 40  # commits
BF16 = "polarquant/bf16/ltx23_bf16.safetensors"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(web: Web, name: str, *commits: dict[str, bytes], **options) -> FakeRepository:
    """A repository with commits 111..., 222..., of which `main` is the last; and the hosts of its contents."""
    by_hash = {str(i) * 40: files for i, files in enumerate(commits, start=1)}
    web.repositories[name] = FakeRepository(by_hash, {"main": str(len(commits)) * 40, "v1": FIRST}, **options)
    for data in (data for files in commits for data in files.values()):
        web.files[f"/blobs/{sha256(data)}"] = data
    return web.repositories[name]


@pytest.fixture(scope="module")
def package_files(mini_release) -> dict[str, bytes]:
    return files_below(mini_release / "LTX-2.3-22B-PolarQuant-Q5") | {"README.md": b"# 5-bit\n", "setup.py": b"0/0"}


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(remote_module, "_WAIT", 0.0)
    with serve() as web:
        yield web


@pytest.fixture
def hub(web, tmp_path) -> Hub:
    return Hub(endpoint=web.address, cache=tmp_path / "cache")


@pytest.fixture
def package(web, package_files) -> FakeRepository:
    """The package, with an older commit that has another card."""
    return publish(web, NAME, package_files | {"README.md": b"# old\n"}, package_files)


# ------------------------------------------------------------------------- views


def test_inspection_reads_headers_and_samples_by_ranges_only(hub, web, package, package_files):
    view = hub.view(NAME)
    shelf = Shelf(view.elsewhere)
    report = inspect(view.path, shelf=shelf)
    assert report.complete
    assert report.source == f"hf://{NAME}@{SECOND}"
    (group,) = report.quantized
    assert (group.codebook, group.bits, group.num_weights, group.num_sampled) == ("B", 5, 59, 8)
    assert 200 <= group.num_blocks <= 512  # enough to tell tables A and B apart
    weights = [data for name, data in package_files.items() if name.endswith(".safetensors")]
    fetched = report.fetched
    assert fetched is not None
    assert fetched.of_bytes == sum(map(len, weights))
    ranged = [request for request in web.requests if "range" in request.headers]
    assert fetched.num_bytes == sum(request.sent for request in ranged) < fetched.of_bytes / 10
    assert fetched.num_requests == sum(request.path.startswith("/blobs/") for request in ranged) < 10 * len(weights)
    whole = {request.path for request in web.requests if request.sent and "range" not in request.headers}
    assert whole == {f"/{NAME}/resolve/{SECOND}/README.md"}


def test_a_revision_is_pinned(hub, web, package):
    assert hub.view(f"{NAME}@v1").repository.commit == FIRST
    view = hub.view(f"hf://{NAME}@{FIRST}")
    assert (view.path / "README.md").read_text() == "# old\n"
    assert not any(f"/resolve/{SECOND}" in request.path for request in web.requests)
    package.names["main"] = FIRST
    assert hub.view(NAME).repository.commit == FIRST


def test_a_file_or_folder_of_a_repository_can_be_named(hub, package, package_files):
    view = hub.view(f"hf://{NAME}/{BF16}")
    assert set(view.repository.files) == {BF16}
    assert list(view.elsewhere) == [view.path]
    assert set(hub.view(f"hf://{NAME}@v1/polarquant/codes").repository.files) == {
        name for name in package_files if name.startswith("polarquant/codes/")
    }
    with pytest.raises(ConvertError, match=r"has no polarquant/cod; it has README.md, polarquant/bf16"):
        hub.view(f"hf://{NAME}/polarquant/cod")
    with pytest.raises(ConvertError, match=r"expected hf://owner/name"):
        hub.view("hf://owner")


@pytest.mark.parametrize("text", ["./a/b", "/a/b", "nowhere", "a/b/c", "a/b.safetensors", "a/b@main.safetensors"])
def test_what_looks_like_a_path_is_one(hub, web, text):
    assert hub.view(text).path == Path(text)
    assert not web.requests


def test_a_path_that_is_there_goes_before_a_repository_of_that_name(hub, web, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert hub.view(NAME).path == Path(NAME)
    assert hub.view(tmp_path / "gone").path == tmp_path / "gone"
    assert not web.requests


def test_a_file_at_an_address_is_inspected_and_not_converted(hub, web, ltx_dir):
    web.files["/a file.safetensors"] = (ltx_dir / "checkpoint.safetensors").read_bytes()
    view = hub.view(f"{web.address}/a%20file.safetensors")
    report = inspect(view.path, shelf=Shelf(view.elsewhere))
    assert (report.complete, report.kind) == (True, "plain checkpoint")
    assert report.fetched is not None
    assert report.fetched.num_bytes == web.sent < report.fetched.of_bytes / 10
    with pytest.raises(ConvertError, match="can only be inspected there: download it"):
        bring(hub, f"{web.address}/a%20file.safetensors")


def test_paths_in_the_hubs_cache_tell_their_repository():
    path = Path(f"/home/me/hub/models--a--b-c/snapshots/{FIRST}/d/e.safetensors")
    assert repository_of(path) == ("a/b-c", FIRST, "d/e.safetensors")
    assert label(path) == f"hf://a/b-c@{FIRST}/d/e.safetensors"
    assert repository_of(Path("/data/snapshots/x/y")) is None
    assert label(Path("x/y")) == "x/y"


# --------------------------------------------------------------------- downloads


def download(hub: Hub, source: str) -> Path:
    """The weights of a source, without a look at whether they can be converted."""
    view = hub.view(source)
    hub.download([view], set(view.elsewhere), progress=False)
    return view.path


def test_a_download_is_the_repository_and_comes_once(hub, web, package, package_files):
    found = bring(hub, NAME)
    wanted = {name: data for name, data in package_files.items() if not name.endswith(".py")}
    assert files_below(found.source) == wanted
    before = web.sent
    assert bring(hub, NAME) == found
    assert web.sent == before


def test_only_the_weights_that_a_conversion_reads_are_downloaded(hub, web, package_files, mini_release):
    lora = mini_release / "lora/ltx-2.3-mini-distilled-lora.safetensors"
    publish(web, NAME, package_files | {"lora.safetensors": lora.read_bytes()})
    found = bring(hub, NAME)
    assert not (found.source / "lora.safetensors").exists()
    assert (found.source / BF16).is_file()


def test_text_encoder_upscaler_and_base_may_be_repositories_too(
    hub, web, package, package_files, mini_release, ltx_dir
):
    upscaler = "upscalers/ltx-2.3-spatial-upscaler-x2-1.1.safetensors"
    gemma = files_below(mini_release / "gemma-3-mini")
    publish(web, "google/gemma-3", gemma)
    publish(web, "Lightricks/up", {"up.safetensors": package_files[upscaler]})
    base = {"dev.safetensors": (ltx_dir / "checkpoint.safetensors").read_bytes()}
    publish(web, "Lightricks/dev", base)
    found = bring(hub, NAME, gemma="google/gemma-3", upscalers=("Lightricks/up",), base="Lightricks/dev")
    assert files_below(found.gemma) == gemma
    assert found.upscalers[0].name == "up.safetensors"
    assert found.upscalers[0].read_bytes() == package_files[upscaler]
    assert files_below(found.base) == base
    assert not (found.source / upscaler).exists()  # another is given
    with pytest.raises(ConvertError, match="--upscaler wants one file"):
        bring(hub, NAME, upscalers=(f"hf://{NAME}@v1/upscalers",))


def test_an_incomplete_package_is_refused_before_it_is_downloaded(hub, web, package_files):
    publish(web, NAME, {name: data for name, data in package_files.items() if "chunk_02" not in name})
    with pytest.raises(ConvertError, match=r"(?s)hf://.*cannot be converted.*tensors are missing"):
        bring(hub, NAME)
    assert web.sent < 10**6


def test_a_download_goes_on_where_it_was_cut_off(hub, web, package, package_files, monkeypatch):
    digest = sha256(package_files[BF16])

    def cut(request, answer):  # all that is sent of the largest file, time after time, until nothing more comes
        if request.path == f"/blobs/{digest}" and answer.status == 206 and len(answer.body) > 10**6:
            return replace(answer, cut_after=2 * 10**6 if len(answer.body) > 5 * 10**6 else 0)
        return answer

    web.fault = cut
    with pytest.raises(ValueError, match=r"at byte \d+: check the connection.*same command again"):
        download(hub, NAME)
    (partial_file,) = hub.cache.rglob("*.partial")
    kept = partial_file.stat().st_size
    assert kept >= 4 * 10**6
    assert not (hub.view(NAME).path / BF16).exists()
    web.fault, web.requests = None, []
    assert (download(hub, NAME) / BF16).read_bytes() == package_files[BF16]
    ranges = [request.headers["range"] for request in web.requests if request.path == f"/blobs/{digest}"]
    assert ranges[-1] == f"bytes={kept}-{len(package_files[BF16]) - 1}"
    assert not list(hub.cache.rglob("*.partial"))


def test_what_is_damaged_on_its_way_is_not_taken(hub, web, package, package_files):
    digest = sha256(package_files[BF16])
    good = web.files[f"/blobs/{digest}"]
    web.files[f"/blobs/{digest}"] = good[:-1] + bytes([good[-1] ^ 1])
    with pytest.raises(ConvertError, match=rf"came with SHA-256 \w+, its repository says {digest}"):
        download(hub, NAME)
    assert not list(hub.cache.rglob("*.partial"))
    web.files[f"/blobs/{digest}"] = good
    assert (download(hub, NAME) / BF16).read_bytes() == good


def test_files_of_the_same_content_come_once(hub, web, package_files):
    data = package_files["polarquant/codes/chunk_00_codes.safetensors"]
    publish(web, NAME, {"a.safetensors": data, "b/c.safetensors": data})
    assert files_below(download(hub, NAME)) == {"a.safetensors": data, "b/c.safetensors": data}
    assert web.sent == len(data)


def test_two_processes_do_not_download_the_same_file_at_once(hub, web, package, package_files):
    digest = sha256(package_files[BF16])
    place = hub.cache / f"models--{NAME.replace('/', '--')}" / "blobs" / f"{digest}.partial"
    place.parent.mkdir(parents=True)
    with place.open("ab") as file:
        hub_module.flock(file, hub_module.LOCK_EX)
        with pytest.raises(ConvertError, match="is being downloaded by another process"):
            download(hub, NAME)


def test_a_disk_that_fills_up_loses_nothing(hub, web, package, package_files, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub_module.os, "fsync", full)
        with pytest.raises(
            ConvertError, match=r"No space left on device: what has come is kept, the same command goes on"
        ):
            download(hub, f"hf://{NAME}/{BF16}")
    before = web.sent
    assert download(hub, f"hf://{NAME}/{BF16}").read_bytes() == package_files[BF16]
    assert web.sent == before


def test_a_disk_that_is_too_small_is_told_before_the_download(hub, web, package, monkeypatch):
    monkeypatch.setattr(hub_module, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 10**7))
    with pytest.raises(
        ConvertError, match=r"has 0.01 GB free, the download needs 0.0119 GB: make room, or set HF_HOME"
    ):
        download(hub, NAME)
    assert web.sent < 10**6


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_gated_repository_says_how_to_get_in(web, package_files, tmp_path, token):
    publish(web, NAME, package_files, gated=True, token="right")
    with pytest.raises(ConvertError, match=r"is gated: accept its licence at http.*`hf auth login`, or set HF_TOKEN"):
        download(Hub(endpoint=web.address, cache=tmp_path, token=token), NAME)
    view = Hub(endpoint=web.address, cache=tmp_path, token=token).view(f"hf://{NAME}/{BF16}")
    with pytest.raises(ConvertError, match="is gated"):  # also where only the large file is asked for
        inspect(view.path, shelf=Shelf(view.elsewhere))
    found = download(Hub(endpoint=web.address, cache=tmp_path, token="right"), NAME)
    assert (found / BF16).read_bytes() == package_files[BF16]
    assert not any("authorization" in request.headers for request in web.requests if request.path.startswith("/blobs"))


def test_a_repository_or_revision_that_is_not_there_is_an_error(hub, package):
    with pytest.raises(ConvertError, match=r"a/b is no path here, and .* is no repository that you may read: if it is"):
        hub.view("a/b")
    with pytest.raises(ConvertError, match=f"{NAME} has no revision v9"):
        hub.view(f"{NAME}@v9")
    with pytest.raises(ConvertError, match="is no name of a repository"):
        hub.view("a/b--c")


def test_a_token_that_is_not_valid_is_an_error(web, hub, package):
    web.fault = lambda *_: Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    with pytest.raises(ConvertError, match=r"Invalid credentials.*HTTP 401\): sign in with `hf auth login`"):
        hub.view(NAME)


def test_a_repository_without_weights_is_refused(hub, web):
    publish(web, NAME, {"model.bin": b"x", "train.py": b""})
    with pytest.raises(ConvertError, match=r"has no file to convert; it has model.bin, train.py"):
        hub.view(NAME)


def test_a_hub_that_cannot_be_reached_is_an_error_unless_the_cache_has_it_all(web, package, tmp_path):
    with serve() as gone:
        address = gone.address
    with pytest.raises(ConvertError, match=r"no path here, and http.* cannot be reached .*run the same command again"):
        Hub(endpoint=address, cache=tmp_path).view(NAME)
    Hub(endpoint=web.address, cache=tmp_path).view(NAME)  # only looked at, not downloaded
    with pytest.raises(ConvertError, match="cannot be reached"):
        Hub(endpoint=address, cache=tmp_path).view(NAME)
    found = download(Hub(endpoint=web.address, cache=tmp_path), NAME)
    assert Hub(endpoint=address, cache=tmp_path).view(NAME).path == found


def test_offline_mode_asks_nobody(hub, web, package, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConvertError, match=rf"no path here and not in {hub.cache}, and HF_HUB_OFFLINE forbids"):
        hub.view(NAME)
    with pytest.raises(ConvertError, match="HF_HUB_OFFLINE forbids"):
        hub.view(f"{NAME}@{SECOND}")
    assert not web.requests


def test_offline_mode_takes_the_cache(web, package, tmp_path):
    download(Hub(endpoint=web.address, cache=tmp_path / "hub"), NAME)
    web.requests.clear()
    # In a process of its own, as the Hub's library reads the environment when it is imported.
    environment = os.environ | {"HF_ENDPOINT": web.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", f"from convert.hub import Hub; print(Hub().view({NAME!r}).path)"]
    asked = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert asked.returncode == 0, asked.stderr
    assert label(Path(asked.stdout.strip())) == f"hf://{NAME}@{SECOND}"
    assert not web.requests


def test_a_converted_repository_is_named_in_the_manifest(hub, web, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "Hub", partial(Hub, endpoint=web.address, cache=hub.cache))
    assert program.main([NAME, str(tmp_path / "out")]) == 0
    provenance = Manifest.read(tmp_path / "out").provenance
    assert provenance["repositories"] == {NAME: SECOND}
    assert program.main([f"{NAME}@v9", str(tmp_path / "out2")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: {NAME} has no revision v9: give one of its branches, tags or commits after the @"
    )
    assert not (tmp_path / "out2").exists()
