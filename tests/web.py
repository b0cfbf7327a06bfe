"""A web server in the process of the tests: files by ranges, a small Hugging Face Hub, and what can go wrong."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


@lru_cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0  # bytes of files


@dataclass
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None  # bytes after which the connection is closed


Fault = Callable[[Request, Answer], Answer]


@dataclass
class Web:
    """What is served, and what was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)  # by path
    repositories: dict[str, "FakeRepository"] = field(default_factory=dict)  # by name
    fault: Fault | None = None  # changes answers
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def answer(self, request: Request) -> Answer:
        path = unquote(urlsplit(request.path).path)
        if path in self.files:
            return _ranged(self.files[path], request)
        for name, repository in self.repositories.items():
            if path.startswith((f"/api/models/{name}", f"/{name}/resolve/")):
                return repository.answer(request, path.replace(name, "NAME", 1))
        return Answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})


@dataclass
class FakeRepository:
    """A model repository: its commits, and what branches and tags point to."""

    commits: dict[str, dict[str, bytes]]  # commit -> files
    names: dict[str, str]  # branch or tag -> commit
    gated: bool = False
    token: str | None = None  # that may read a gated one

    def answer(self, request: Request, path: str) -> Answer:
        if found := re.fullmatch(r"/api/models/NAME(?:/revision/(.+)|/tree/(.+))?", path):
            commit = self.commit(found[1] or found[2] or "main")
            if commit is None:
                return Answer(404, {"X-Error-Code": "RevisionNotFound"})
            entries = [self.entry(name, data) for name, data in self.commits[commit].items()]
            if found[2]:
                return _json([entry["tree"] for entry in entries])
            siblings = [entry["sibling"] for entry in entries]
            return _json({"id": "o/n", "sha": commit, "siblings": siblings, "gated": "auto" if self.gated else False})
        found = re.fullmatch(r"/NAME/resolve/([^/]+)/(.+)", path)
        assert found is not None
        commit = self.commit(found[1])
        if commit is None:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        if self.gated and request.headers.get("authorization") != f"Bearer {self.token}":
            return Answer(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"})
        data = self.commits[commit].get(found[2])
        if data is None:
            return Answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        digest = sha256(data)
        if not self.is_large(found[2]):
            answer = _ranged(data, request)
            answer.headers |= {"X-Repo-Commit": commit, "ETag": f'"{digest[:40]}"'}
            return answer
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        # Contents come from another host, as on the Hub.
        elsewhere = request.headers["host"].replace("127.0.0.1", "localhost")
        return Answer(302, headers | {"Location": f"http://{elsewhere}/blobs/{digest}"})

    def commit(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.names.get(unquote(revision))

    @staticmethod
    def is_large(name: str) -> bool:
        return name.endswith((".safetensors", "tokenizer.json"))

    def entry(self, name: str, data: bytes) -> dict:
        digest, size = sha256(data), len(data)
        large = self.is_large(name)
        lfs = {"lfs": {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}} if large else {}
        return {
            "tree": {"type": "file", "path": name, "size": size, "oid": digest[:40]} | lfs,
            "sibling": {"rfilename": name, "size": size, "blobId": digest[:40]} | lfs,
        }


def _json(content: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())


def _ranged(data: bytes, request: Request) -> Answer:
    tag = {"ETag": f'"{sha256(data)[:40]}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if asked is None:
        return Answer(200, tag, data)
    start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
    if start >= len(data):
        return Answer(416, tag | {"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, tag | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop])


@contextmanager
def serve() -> Iterator[Web]:
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers)
            answer = web.answer(request)
            if web.fault is not None:
                answer = web.fault(request, answer)
            web.requests.append(request)
            self.send_response(answer.status)
            for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            body = answer.body if answer.cut_after is None else answer.body[: answer.cut_after]
            if not self.path.startswith("/api/"):
                request.sent = len(body)
            self.wfile.write(body)
            if answer.cut_after is not None:
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # the other side hung up

    with Server(("127.0.0.1", 0), Handler) as server:
        web.address = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield web
        server.shutdown()
