"""One HTTP request that ends in time: a limit on its seconds, all together, and on the bytes that are read.

The timeout of a socket is one of silence. A server that sends a byte now and then, in its headers, in an answer or in
the body of an error, is never silent; nor does a look-up of a name know any timeout.
"""

import http.client
import time
import urllib.error
import urllib.request
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

_MAX_ERROR_BYTES = 2**16


class HttpError(Exception):
    """An answer that is no success: its status, and what it said."""

    def __init__(self, error: urllib.error.HTTPError, body: bytes) -> None:
        super().__init__(f"{error.code} {error.reason}")
        self.code = error.code
        self.reason = str(error.reason)
        self.retry_after = error.headers.get("Retry-After") if error.headers else None
        self.body = body
        """At most 64 KiB of it, and what came within the time."""


class TooLargeError(ValueError):
    """An answer has more bytes than the caller wants to read."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the request, and the key with it, is for the server that the settings name."""

    def redirect_request(self, *_: Any) -> None:
        return None


def fetch(
    request: urllib.request.Request, *, timeout_seconds: float, max_bytes: int, follow_redirects: bool = False
) -> bytes:
    """Return the body of an answer, whole.

    Raises HttpError when the status is no success, TooLargeError, TimeoutError when it is not all there after
    `timeout_seconds`, and OSError or HTTPException when the connection fails or breaks off.
    """
    deadline = time.monotonic() + timeout_seconds
    outcomes: SimpleQueue[bytes | BaseException] = SimpleQueue()
    # In a thread of its own, which holds up no exit: what it hangs in cannot be interrupted.
    arguments = (request, timeout_seconds, deadline, max_bytes, follow_redirects, outcomes)
    Thread(target=_fetch, args=arguments, daemon=True).start()
    outcome = _wait(outcomes, deadline)
    if outcome is None:
        raise TimeoutError
    if isinstance(outcome, urllib.error.HTTPError):
        body = _wait(outcomes, deadline)
        raise HttpError(outcome, body if isinstance(body, bytes) else b"")
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _wait(outcomes: "SimpleQueue[bytes | BaseException]", deadline: float) -> bytes | BaseException | None:
    try:
        return outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
    except Empty:
        return None


def _fetch(
    request: urllib.request.Request,
    timeout_seconds: float,
    deadline: float,
    max_bytes: int,
    follow_redirects: bool,
    outcomes: "SimpleQueue[bytes | BaseException]",
) -> None:
    """Put an answer into the queue, or what went wrong; after an error of the server, what came of its body."""
    opener = urllib.request.build_opener(*([] if follow_redirects else [_NoRedirect]))
    try:
        with opener.open(request, timeout=timeout_seconds) as response:
            body = _read(response, deadline, max_bytes + 1)
            if time.monotonic() >= deadline:
                raise TimeoutError
            if len(body) > max_bytes:
                raise TooLargeError(f"it has more than {max_bytes} bytes")
            if response.length:
                raise http.client.IncompleteRead(body, response.length)
            outcomes.put(body)
    except urllib.error.HTTPError as error:
        outcomes.put(error)
        try:
            outcomes.put(_read(error, deadline, _MAX_ERROR_BYTES))
        except (OSError, http.client.HTTPException):
            outcomes.put(b"")
        error.close()
    except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
        outcomes.put(error)


def _read(response: Any, deadline: float, max_bytes: int) -> bytes:
    """Return a body, up to `max_bytes` of it or what has come by the deadline; a server's error may be cut short."""
    content = bytearray()
    while len(content) < max_bytes and time.monotonic() < deadline:
        chunk = response.read1(min(2**16, max_bytes - len(content)))
        if not chunk:
            break
        content += chunk
    return bytes(content)
