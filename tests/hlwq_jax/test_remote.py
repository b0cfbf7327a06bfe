"""Files read by HTTP ranges: little is read, and nothing but the bytes asked for is believed."""

import json
from dataclasses import replace
from threading import Event

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import get_session
from safetensors.numpy import save

from hlwq_jax import FormatError, TensorFile
from hlwq_jax import remote as remote_module
from hlwq_jax.remote import PAGE, RemoteError, RemoteFile
from tests.web import Answer, serve

ARRAYS = {
    "large": np.arange(2**18, dtype=np.float32),
    "codes": np.arange(2**16, dtype=np.uint8).reshape(256, 256),
    "bf16": np.arange(4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    **{f"small.{i}": np.array([i, i + 1], np.int64) for i in range(40)},
}
DATA = save(ARRAYS, metadata={"format": "pt"})


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(remote_module, "_WAIT", 0.0)
    with serve() as web:
        web.files["/x.safetensors"] = DATA
        yield web


def open_at(web, path="/x.safetensors", **options):
    file = RemoteFile(web.address + path, client=get_session(), **options)
    return file, TensorFile("x.safetensors", file)


def test_tensors_are_those_of_the_file(web):
    _, file = open_at(web)
    assert file.metadata == {"format": "pt"}
    assert set(file) == set(ARRAYS)
    assert file.file_size == len(DATA)
    for name, array in ARRAYS.items():
        found = file.read(name)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(file.read_rows("codes", 3, 7), ARRAYS["codes"][3:7])


def test_only_what_is_asked_for_is_read_and_neighbours_come_together(web):
    remote, file = open_at(web)
    for i in range(40):
        file.read(f"small.{i}")
    np.testing.assert_array_equal(file["large"].read_flat(100_000, 100_010), np.arange(100_000, 100_010))
    assert remote.num_requests == len(web.requests) <= 4
    assert remote.bytes_read == web.sent <= 4 * PAGE < len(DATA) / 10


def test_a_redirect_is_followed_and_takes_no_token_to_another_host(web):
    other = web.address.replace("127.0.0.1", "localhost") + "/x.safetensors"
    web.fault = lambda request, answer: Answer(302, {"Location": other}) if request.path == "/moved" else answer
    _, file = open_at(web, "/moved", headers={"Authorization": "Bearer secret"})
    np.testing.assert_array_equal(file.read("bf16"), ARRAYS["bf16"])
    assert {"authorization" in request.headers for request in web.requests if request.path == "/moved"} == {True}
    assert {"authorization" in request.headers for request in web.requests if request.path != "/moved"} == {False}


def test_redirects_without_end_are_an_error(web):
    web.fault = lambda *_: Answer(302, {"Location": "/x.safetensors"})
    with pytest.raises(RemoteError, match="redirected without end"):
        open_at(web)


@pytest.mark.parametrize(
    ("status", "message"), [(401, "sign in"), (403, "may not read"), (404, "no such file"), (418, "HTTP 418")]
)
def test_a_refusal_is_told_with_the_address(web, status, message):
    web.fault = lambda *_: Answer(status)
    with pytest.raises(RemoteError, match=rf"http://127.*/x\.safetensors: .*{message}"):
        open_at(web)


def test_a_server_without_ranges_is_not_asked_for_the_whole_file(web):
    web.fault = lambda _, answer: Answer(200, {}, DATA)
    with pytest.raises(RemoteError, match=r"sends whole files only.*download it"):
        open_at(web)
    assert len(web.requests) == 1


@pytest.mark.parametrize("status", [200, 206])
def test_a_page_instead_of_the_file_is_named_as_one(web, status):
    page = b"<!doctype html><title>Sign in</title>" + bytes(100)
    headers = {"Content-Range": f"bytes 0-{len(page) - 1}/{len(page)}"} if status == 206 else {}
    web.fault = lambda *_: Answer(status, headers, page)
    with pytest.raises(FormatError, match="HTML or XML page"):
        open_at(web)


def test_what_was_cut_off_goes_on_where_it_stopped(web):
    web.fault = lambda _, answer: replace(answer, cut_after=60_000)
    remote = RemoteFile(f"{web.address}/x.safetensors", client=get_session())
    assert b"".join(remote.stream(0, len(DATA))) == DATA
    assert remote.bytes_read == len(DATA)  # nothing twice
    assert remote.num_requests == -(-len(DATA) // 60_000)


def test_an_answer_that_is_always_cut_off_is_an_error(web):
    web.fault = lambda _, answer: replace(answer, cut_after=0)
    with pytest.raises(RemoteError, match=r"5 times in a row at byte 0: check the connection.*same command again"):
        open_at(web)


def test_a_busy_server_is_asked_again(web):
    web.fault = lambda _, answer: Answer(503) if len(web.requests) % 3 else answer
    _, file = open_at(web)
    np.testing.assert_array_equal(file.read("codes"), ARRAYS["codes"])


def test_a_server_that_falls_silent_is_not_waited_for(web, monkeypatch):
    monkeypatch.setattr(remote_module, "_TIMEOUT", 0.02)
    silence = Event()
    web.fault = lambda _, answer: (silence.wait(5), answer)[1]
    with pytest.raises(RemoteError, match="5 times in a row"):
        open_at(web)
    silence.set()


def test_a_server_that_is_not_there_is_an_error():
    with serve() as web:
        address = web.address
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_module, "_WAIT", 0.0)
        with pytest.raises(RemoteError, match="refused"):
            _ = RemoteFile(f"{address}/x.safetensors", client=get_session()).size


def test_a_header_length_that_lies_is_refused_before_it_is_read(web):
    web.files["/x.safetensors"] = (2**40).to_bytes(8, "little") + bytes(10 * PAGE)
    with pytest.raises(FormatError, match=rf"promise a header of {2**40} bytes, but the file has {10 * PAGE + 8}"):
        open_at(web)
    assert web.sent == PAGE


def test_a_file_cut_off_on_the_server_is_refused_from_its_header(web):
    web.files["/x.safetensors"] = DATA[:-1]
    with pytest.raises(FormatError, match="the download was cut off"):
        open_at(web)


@pytest.mark.parametrize("found", ["bytes 1-16384/{size}", "bytes 0-9/{size}", "bytes 0-16383/*", ""])
def test_other_bytes_than_asked_for_are_refused(web, found):
    def lie(_, answer):
        answer.headers["Content-Range"] = found.format(size=len(DATA))
        return answer

    web.fault = lie
    with pytest.raises(RemoteError, match=r"asked for bytes 0 to 16384|expected bytes 0 to 16384, got HTTP 206"):
        open_at(web)


@pytest.mark.parametrize("change", [DATA + b"more", DATA[:-1] + b"x"], ids=["size", "content"])
def test_a_file_that_is_replaced_meanwhile_is_refused(web, change):
    _, file = open_at(web)
    web.files["/x.safetensors"] = change
    with pytest.raises(RemoteError, match="replaced while it was read"):
        file.read("large")


def test_a_server_that_sends_more_than_it_says_is_not_listened_to(web):
    web.fault = lambda _, answer: replace(
        answer,
        headers=answer.headers | {"Content-Length": str(len(answer.body) + 10**6)},
        body=answer.body + bytes(10**6),
    )
    remote, file = open_at(web)
    np.testing.assert_array_equal(file.read("codes"), ARRAYS["codes"])
    assert remote.bytes_read < len(DATA)


def test_a_json_header_that_is_none_is_refused(web):
    raw = json.dumps(["no", "object"]).encode()
    web.files["/x.safetensors"] = len(raw).to_bytes(8, "little") + raw
    with pytest.raises(FormatError, match="must be a JSON object"):
        open_at(web)
