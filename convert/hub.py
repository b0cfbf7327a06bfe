"""Sources that lie elsewhere: repositories of the Hugging Face Hub, each at one commit, and files at an address.

    owner/name[@REVISION]                  a repository, where there is no such path on this disk
    hf://owner/name[@REVISION][/PATH]      the same, or one file or folder of it
    https://HOST/FILE.safetensors          a file, to inspect only

`Hub.view` says what is there: small files come at once, the others can be read by ranges. `Hub.download` brings what a
conversion needs into the Hub's cache, where other programs find it too.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from fcntl import LOCK_EX, LOCK_NB, flock
from fnmatch import fnmatch
from glob import escape
from hashlib import file_digest
from pathlib import Path
from shutil import disk_usage
from threading import Event
from urllib.parse import unquote, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, errors, hf_hub_url, is_offline_mode
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_hf_uri,
)

from convert.files import ConvertError
from convert.progress import Advance, progress_bar
from hlwq_jax.remote import RemoteFile
from ltx_jax import durable

READ = ("*.safetensors", "*.json", "README.md")  # what a conversion may read of a repository
_WEIGHTS = ".safetensors"
_SMALL = 2**20  # bytes of a file that is fetched only to look at it
_FILES_AT_ONCE = 4
_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(.+))?")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository."""

    size: int
    sha256: str | None  # None for small ones, which Git holds itself


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository at one commit, and the files of it that a conversion may read."""

    name: str
    commit: str
    folder: Path  # in the Hub's cache
    files: dict[str, HubFile]


@dataclass(frozen=True, kw_only=True)
class View:
    """A source, before anything large of it is downloaded."""

    path: Path  # of the file or folder; it may not be there yet
    elsewhere: dict[Path, RemoteFile] = field(default_factory=dict)  # what is not on this disk, by the path it goes by
    repository: Repository | None = None  # that it can be downloaded from


class Hub:
    """The Hugging Face Hub as this user sees it: HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE say how."""

    def __init__(self, *, endpoint: str | None = None, token: str | None = None, cache: Path | None = None):
        self.api = HfApi(endpoint=endpoint, token=token, library_name="ltx-jax")
        self.cache = (cache or Path(constants.HF_HUB_CACHE)).expanduser().resolve()

    def view(self, source: str | Path) -> View:
        """What a source is. Raises ConvertError for a repository that is not there or may not be read."""
        if isinstance(source, Path) or Path(source).exists():
            return View(path=Path(source))
        if source.startswith(("http://", "https://")):
            address = urlsplit(source)
            path = Path(address.netloc + unquote(address.path))
            return View(path=path, elsewhere={path: RemoteFile(source, client=get_session())})
        if source.startswith("hf://"):
            try:
                place = parse_hf_uri(source)
            except ValueError as error:
                raise ConvertError(f"{source}: expected hf://owner/name[@REVISION][/PATH]: {error}") from error
            return self._view_repository(place.id, place.revision, place.path_in_repo)
        asked = _NAME.fullmatch(source)
        if asked is None or source.endswith(_WEIGHTS):
            return View(path=Path(source))  # whoever opens it says that it is not there
        return self._view_repository(asked[1], asked[2], "")

    def download(self, views: Sequence[View], needed: Collection[Path], *, progress: bool) -> None:
        """Brings the weights among `needed`, and all other files of their repositories, to the paths they go by.

        A file that was cut off goes on where it stopped, and is taken only if its digest is that of the repository.
        Raises ConvertError, before the first byte, for a disk that is too small.
        """
        wanted: list[tuple[Repository, list[str]]] = []
        large: dict[Path, _Download] = {}  # by content: two files, or two views, may have the same
        for view in views:
            if view.repository is None and view.elsewhere:
                raise ConvertError(f"{view.path} can only be inspected there: download it, and give the file")
            if view.repository is None:
                continue
            folder, files = view.repository.folder, view.repository.files
            names = [name for name in files if not name.endswith(_WEIGHTS) or folder / name in needed]
            wanted.append((view.repository, names))
            for name in names:
                if folder / name in view.elsewhere and files[name].sha256 is not None:
                    file = _Download(self.cache, view.repository, name, view.elsewhere[folder / name])
                    large[file.blob] = file
        self._check_room(sum(file.size - file.done for file in large.values()))
        _run(list(large.values()), progress=progress)
        for repository, names in wanted:
            self._snapshot(repository.name, repository.commit, names)

    def _view_repository(self, name: str, revision: str | None, inside: str) -> View:
        with self._explained(name, revision):
            # Where the Hub cannot be reached, it is the commit that the cache knows.
            commit = self.api.resolve_revision(name, revision=revision, cache_dir=self.cache).resolved
            folder = _cached(self.cache, name) / "snapshots" / commit
            path = folder / inside
            try:
                there = self.api.model_info(name, revision=commit, files_metadata=True).siblings or []
            except (errors.OfflineModeIsEnabled, httpx2.TransportError):
                if not path.is_file() and not any(path.rglob(f"*{_WEIGHTS}")):
                    raise
                return View(path=path)  # what is in the cache must do
        files = {
            file.rfilename: HubFile(size=file.size or 0, sha256=file.lfs.sha256 if file.lfs else None)
            for file in there
            if any(fnmatch(file.rfilename, pattern) for pattern in READ)
            and (not inside or file.rfilename == inside or file.rfilename.startswith(f"{inside}/"))
        }
        if not files:
            names = sorted(file.rfilename for file in there)
            raise ConvertError(
                f"{name} at {commit[:8]} has {f'no {inside}' if inside else 'no file to convert'}; it has "
                f"{', '.join(names[:8]) or 'nothing'}{' and more' if len(names) > 8 else ''}"
            )
        small = [file for file, facts in files.items() if facts.size <= _SMALL and not file.endswith(_WEIGHTS)]
        self._snapshot(name, commit, small)
        far = {folder / file: self._remote(name, commit, file) for file in files if not (folder / file).exists()}
        repository = Repository(name=name, commit=commit, folder=folder, files=files)
        return View(path=path, elsewhere=far, repository=repository)

    def _snapshot(self, name: str, commit: str, files: Sequence[str]) -> None:
        """Makes some files of a repository be in the cache."""
        if not files:
            return
        disable_progress_bars()  # one for each file; the large ones, which take time, are shown together
        with self._explained(name, commit):
            self.api.snapshot_download(
                name, revision=commit, cache_dir=self.cache, allow_patterns=[escape(file) for file in files]
            )

    def _remote(self, name: str, commit: str, file: str) -> RemoteFile:
        def refuse(response: httpx2.Response) -> None:
            with self._explained(name, commit):
                hf_raise_for_status(response)

        return RemoteFile(
            hf_hub_url(name, file, revision=commit, endpoint=self.api.endpoint),
            client=get_session(),
            headers=build_hf_headers(token=self.api.token, library_name="ltx-jax"),
            refuse=refuse,
        )

    def _check_room(self, needed: int) -> None:
        existing = next(folder for folder in (self.cache, *self.cache.parents) if folder.exists())
        free = disk_usage(existing).free
        if free < needed:
            raise ConvertError(
                f"{existing} has {free / 1e9:.3g} GB free, the download needs {needed / 1e9:.3g} GB: make room, or set "
                "HF_HOME to a folder on a larger disk"
            )

    @contextmanager
    def _explained(self, name: str, revision: str | None) -> Iterator[None]:
        """Raises what the Hub's library raises as ConvertError: one line that says what to do."""
        try:
            yield
        except (
            errors.HfHubHTTPError,
            errors.EntryNotFoundError,
            errors.RevisionResolutionError,
            errors.OfflineModeIsEnabled,
            httpx2.TransportError,
        ) as error:
            raise ConvertError(self._reason(error, name, revision)) from error
        except errors.HFValidationError as error:
            raise ConvertError(f"{name} is no name of a repository: {error}") from error

    def _reason(self, error: Exception, name: str, revision: str | None) -> str:
        sign_in = "sign in with `hf auth login`, or set HF_TOKEN"
        page = f"{self.api.endpoint}/{name}"
        if isinstance(error, errors.GatedRepoError):
            return f"{name} is gated: accept its licence at {page}, and {sign_in}"
        if isinstance(error, errors.RepositoryNotFoundError):
            return f"{name} is no path here, and {page} is no repository that you may read: if it is private, {sign_in}"
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{name} has no revision {revision}: give one of its branches, tags or commits after the @"
        if isinstance(error, errors.HfHubHTTPError):
            status, said = error.response.status_code, error.server_message or error.response.reason_phrase
            return f"{page}: {said} (HTTP {status})" + (f": {sign_in}" if status in (401, 403) else "")
        if is_offline_mode():
            return (
                f"{name} is no path here and not in {self.cache}, and HF_HUB_OFFLINE forbids to download it: unset that"
            )
        cause = error.__cause__ or error
        if isinstance(cause, errors.FileMetadataError):
            return f"{page}: {cause}"
        why = f"{page} cannot be reached ({cause})"
        return f"{name} is no path here, and {why}: check the connection, and run the same command again"


def _cached(cache: Path, name: str) -> Path:
    """A repository's folder in the Hub's cache.

    Source: huggingface_hub, "Understand caching": blobs/DIGEST are the contents, snapshots/COMMIT/NAME link to them.
    """
    return cache / f"models--{name.replace('/', '--')}"


class _Download:
    """A large file on its way into the Hub's cache.

    `snapshot_download` finds it there by its digest. By itself it would begin anew with each file that was cut off
    (https://github.com/huggingface/huggingface_hub/issues/4196).
    """

    def __init__(self, cache: Path, repository: Repository, name: str, source: RemoteFile):
        self.name = Path(name).name
        self.size, self.sha256 = repository.files[name].size, repository.files[name].sha256
        self.source = source
        self.blob = _cached(cache, repository.name) / "blobs" / str(self.sha256)
        self.partial = self.blob.with_suffix(".partial")

    @property
    def done(self) -> int:
        """Bytes that are there already."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def run(self, advance: Advance, stop: Event) -> None:
        """Downloads what is left, or returns early once `stop` is set."""
        self.blob.parent.mkdir(parents=True, exist_ok=True)
        with self.partial.open("ab") as out:
            try:
                flock(out, LOCK_EX | LOCK_NB)
            except BlockingIOError:
                raise ConvertError(f"{self.name} is being downloaded by another process: wait for it") from None
            advance(self.name, out.tell())
            for data in self.source.stream(out.tell(), self.size):
                if stop.is_set():
                    return
                out.write(data)
                advance(self.name, len(data))
            out.flush()
            os.fsync(out.fileno())
            with self.partial.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
            if digest != self.sha256:
                self.partial.unlink()
                raise ConvertError(
                    f"{self.name} came with SHA-256 {digest}, its repository says {self.sha256}: run the same command "
                    "again"
                )
            durable.rename(self.partial, self.blob)


def _run(files: Sequence[_Download], *, progress: bool) -> None:
    """Downloads files, some at once. What has come stays where anything fails."""
    total, stop = sum(file.size for file in files), Event()
    with progress_bar("download", total, shown=progress) as advance, ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        try:
            for finished in as_completed([pool.submit(file.run, advance, stop) for file in files]):
                finished.result()
        except OSError as error:
            raise ConvertError(f"{error}: what has come is kept, the same command goes on from there") from error
        finally:  # at an error, or Ctrl-C, the others end too
            stop.set()
            pool.shutdown(cancel_futures=True)
