"""A file on a web server, read by HTTP ranges: what is asked for and little more.

An answer is believed only if it is what was asked for: status 206, these bytes, of the same file as before. Everything
else raises `RemoteError`, which names the address and says what to do.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping

import httpx2

from hlwq_jax.tensors import ByteSource, FormatError, refuse_foreign

PAGE = 2**14  # small reads fetch, and keep, whole pages: neighbours of a small tensor are asked for next
_TRIES = 5  # without a byte in between
_WAIT = 0.5  # seconds before the second try; then twice as long each time
_TIMEOUT = 20.0  # seconds without a byte
_AGAIN = (408, 429, 500, 502, 503, 504)  # a server that answers so is asked again
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_MEANING = {
    401: "it wants you to sign in",
    403: "you may not read it, or the link is too old",
    404: "there is no such file",
    410: "the file is gone",
    416: "the file is empty or shorter than it was",
}


class RemoteError(FormatError):
    """A server does not give a file, or not what was asked of it."""


class RemoteFile(ByteSource):
    """Bytes of a file at an address. It is asked for nothing before something is read.

    `refuse` may raise for an answer before it is looked at here, where a server explains its errors in its own way.
    """

    def __init__(
        self,
        url: str,
        *,
        client: httpx2.Client,
        headers: Mapping[str, str] | None = None,
        refuse: Callable[[httpx2.Response], None] | None = None,
    ):
        self.url = url
        self.bytes_read = 0
        self.num_requests = 0
        self._client, self._headers, self._refuse = client, dict(headers or {}), refuse
        self._size: int | None = None
        self._version: str | None = None  # the server's own tag of this state of the file
        self._pages: dict[int, bytes] = {}

    @property
    def size(self) -> int:
        """Of the whole file, in bytes."""
        if self._size is None:  # the first answer says it
            self._pages[0] = b"".join(self.stream(0, PAGE))
        assert self._size is not None
        return self._size

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`; raises where the file ends before."""
        if not 0 <= start <= stop <= self.size:
            raise RemoteError(f"{self.url}: bytes {start} to {stop} are not in a file of {self.size}")
        first, last = start // PAGE, -(-stop // PAGE)
        lacking = [page for page in range(first, last) if page not in self._pages]
        if lacking:
            begin, end = lacking[0] * PAGE, min((lacking[-1] + 1) * PAGE, self.size)
            data = b"".join(self.stream(begin, end))
            for page in range(lacking[0], lacking[-1] + 1):
                self._pages[page] = data[page * PAGE - begin :][:PAGE]
        return b"".join(self._pages[page] for page in range(first, last))[start - first * PAGE :][: stop - start]

    def stream(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` as they arrive, kept nowhere. Goes on where a connection was cut off."""
        tries = 0
        while start < stop:
            wait, why = _WAIT * 2**tries, "the connection was cut off"
            try:
                headers = self._headers | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
                self.num_requests += 1
                with self._client.stream(
                    "GET", self.url, headers=headers, follow_redirects=True, timeout=_TIMEOUT
                ) as response:
                    if response.status_code in _AGAIN:
                        why = f"the server answers {response.status_code} {response.reason_phrase}"
                        wait = max(wait, _retry_after(response))
                    else:
                        stop = self._check(response, start, stop)
                        for chunk in response.iter_raw():
                            data = chunk[: stop - start]
                            if not data:  # it sends more than it said
                                break
                            self.bytes_read += len(data)
                            start, tries = start + len(data), 0
                            yield data
            except httpx2.TransportError as error:
                why = str(error) or type(error).__name__
            except httpx2.TooManyRedirects as error:
                raise RemoteError(f"{self.url}: is redirected without end; give the address of the file") from error
            except httpx2.InvalidURL as error:
                raise RemoteError(f"{self.url}: is no address: {error}") from error
            if start < stop:
                tries += 1
                if tries == _TRIES:
                    raise RemoteError(
                        f"{self.url}: {why}, {_TRIES} times in a row at byte {start}: check the connection, then run "
                        "the same command again"
                    )
                time.sleep(wait)

    def _check(self, response: httpx2.Response, start: int, stop: int) -> int:
        """Raises for any answer but the bytes asked for; returns where they end, which may be the end of the file."""
        if self._refuse is not None:
            self._refuse(response)
        status = response.status_code
        if status >= 400:
            raise RemoteError(f"{self.url}: {_MEANING.get(status, response.reason_phrase)} (HTTP {status})")
        if status == 200:
            refuse_foreign(self.url, next(response.iter_raw(), b"")[:256])
            raise RemoteError(
                f"{self.url}: this server sends whole files only, no ranges: download it and give the file"
            )
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if status != 206 or found is None or response.headers.get("Content-Encoding", "identity") != "identity":
            raise RemoteError(
                f"{self.url}: expected bytes {start} to {stop}, got HTTP {status} with Content-Range "
                f"{response.headers.get('Content-Range')!r}: download it and give the file"
            )
        first, last, size = map(int, found.groups())
        version = response.headers.get("ETag", "").removeprefix("W/") or None
        if (self._size or size, self._version or version) != (size, version):
            raise RemoteError(f"{self.url}: the file was replaced while it was read: run the same command again")
        if (first, last + 1) != (start, min(stop, size)):
            raise RemoteError(f"{self.url}: asked for bytes {start} to {stop} of {size}, got {first} to {last + 1}")
        self._size, self._version = size, version
        return last + 1

    def __str__(self) -> str:
        return self.url


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that a server wants us to wait, up to a minute."""
    said = response.headers.get("Retry-After", "")
    return min(float(said), 60.0) if said.isdecimal() else 0.0
