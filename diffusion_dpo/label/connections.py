"""Connections that nobody can hold for long: a limit on their number, and on the time that a request may take.

uvicorn waits for the headers of a request, for its body and for a reader of the answer as long as the other side
likes, and where no file can be opened any more it accepts nobody. Here a connection has some seconds to bring the
headers of its next request, and a request an end; where too many are open the one that has waited longest goes. A
browser whose idle connection was closed opens another one, and nobody notices.
"""

import asyncio
import functools
import resource
import socket
from typing import Any, ClassVar

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0
"""From the start of a connection, or from the last answer, to the end of the next request's headers."""
REQUEST_SECONDS = 120.0
"""From there to the last byte of the answer: an image over a slow line takes a while."""
_MOST_CONNECTIONS = 512
_ACCEPTED_AT_ONCE = 32
"""asyncio accepts as many in one turn of its loop as the backlog is long, before a protocol hears of the first."""
_OTHER_FILES = 64 + 4 * _ACCEPTED_AT_ONCE
"""What else is open: the log, images that are being read, the program's own, and connections that come or go."""
_MOST_WAITING = 2048
"""Connections that the system keeps until they are accepted; one more has to knock again, a second later."""


def make_server(app: ASGIApp) -> uvicorn.Server:
    """Return a server that keeps these limits, and prints nothing that a stranger can bring about."""
    max_connections()  # while few files are open
    settings = uvicorn.Config(
        app,
        http=LimitedProtocol,
        ws="none",
        lifespan="off",
        backlog=_ACCEPTED_AT_ONCE,
        log_level="error",
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    return _Server(settings)


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_MOST_WAITING)  # asyncio takes its setting for both, and has listened already


@functools.cache
def max_connections() -> int:
    """Return how many may be open in this process, having raised its soft limit on files where that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_CONNECTIONS + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(_MOST_CONNECTIONS, soft - _OTHER_FILES))


class LimitedProtocol(H11Protocol):
    """uvicorn's protocol with those limits, for its setting `http`. h11 bounds the headers; httptools does not."""

    waiting: ClassVar[dict["LimitedProtocol", None]] = {}
    """The connections of this process that wait for a request, since when being their order."""
    answering: ClassVar[dict["LimitedProtocol", None]] = {}
    """Those that have one, likewise."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; where that is one too many, the one that has waited longest is closed for it."""
        super().connection_made(transport)
        self._limit: asyncio.TimerHandle | None = None
        self._watched: Any = None
        self._watch()
        if len(self.waiting) + len(self.answering) > max_connections():
            next(iter(self.waiting if len(self.waiting) > 1 else self.answering))._end()

    def data_received(self, data: bytes) -> None:
        """Take bytes, which may be the start of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Set the time limit anew where the connection has begun to wait, or to answer."""
        is_answering = self.cycle is not None and (
            not self.cycle.response_complete or self.transport.get_write_buffer_size() > 0  # complete, but not sent
        )
        state = (self.cycle, is_answering)
        if state == self._watched or self.transport.is_closing():
            return
        self._forget()
        self._watched = state
        (self.answering if is_answering else self.waiting)[self] = None
        self._limit = self.loop.call_later(REQUEST_SECONDS if is_answering else HEADER_SECONDS, self._end)

    def _end(self) -> None:
        self._forget()  # at once: many connections come before the loop gets round to closing one
        self.transport.abort()

    def _forget(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
        self.waiting.pop(self, None)
        self.answering.pop(self, None)
