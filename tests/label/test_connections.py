"""Connections that are held: that send nothing, half a request, too much, or do not read. All are of this machine."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from diffusion_dpo.label import connections, server
from diffusion_dpo.label.connections import LimitedProtocol, make_server, max_connections
from diffusion_dpo.label.items import make_items
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.server import make_app
from diffusion_dpo.label.study import Study
from tests.label.studies import TOKEN, make_config

MOST = 20
SECONDS = 0.4
BIG = "0" * 32


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with few connections and short times, and an image that no socket's buffer takes at once."""
    root = tmp_path_factory.mktemp("connections")
    config = make_config(root, prompts=["one", "two"])
    config.output_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch, Log(config.output_dir / "votes.jsonl") as log:
        patch.setattr(connections, "max_connections", lambda: MOST)
        patch.setattr(connections, "HEADER_SECONDS", SECONDS)
        patch.setattr(connections, "REQUEST_SECONDS", 2 * SECONDS)
        patch.setattr(server, "_BODY_SECONDS", SECONDS)
        study = Study(config, make_items(config, config.output_dir), log)
        (config.output_dir / "images" / f"{BIG}.png").write_bytes(bytes(32 * 2**20))
        listener = socket.create_server(("127.0.0.1", 0))
        number = int(listener.getsockname()[1])
        app = make_app(study, config.output_dir, token=TOKEN, hosts=frozenset([f"127.0.0.1:{number}"]))
        running = make_server(app)
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        yield number
        running.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(autouse=True)
def _nothing_is_left_or_logged(port: int, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No connection of the test before; no traceback, whatever a stranger does."""
    until(lambda: not LimitedProtocol.waiting and not LimitedProtocol.answering)
    with caplog.at_level(logging.ERROR):
        yield
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def head(port: int, method: str, path: str, *more: str) -> bytes:
    host = f"127.0.0.1:{port}"
    rater = f"Cookie: token-{port}={TOKEN}; rater-{port}={b'ann'.hex()}"
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Origin: http://{host}", rater, "X-Rater: ann", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status of an answer and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        assert chunk, "closed without an answer"
        data += chunk
    top, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in top.splitlines() if line.lower().startswith(b"content-length"))
    while len(body) < length:
        body += connection.recv(65536)
    return int(top.split()[1]), body


def ask(port: int) -> float:
    """Return the seconds until a rater's question is answered, over a connection of its own."""
    began = time.monotonic()
    with closing(connect(port)) as connection:
        connection.sendall(head(port, "GET", "/next"))
        status, body = read_answer(connection)
    assert status == 200 and json.loads(body)["total"] == 2
    return time.monotonic() - began


def seconds_until_closed(connection: socket.socket, drip: bytes = b"") -> float:
    """Return how long the other side keeps a connection, to which a byte of `drip` is sent now and then."""
    began = time.monotonic()
    connection.settimeout(0.05)
    for place in range(200):
        try:
            if drip:
                connection.sendall(drip[place % len(drip) :][:1])
            if connection.recv(65536) == b"":
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


def test_held_connections_leave_room_for_those_who_ask(port: int) -> None:
    held = [connect(port) for _ in range(5 * MOST)]
    try:
        assert ask(port) < SECONDS / 2  # before any of them has run out of time
        assert len(LimitedProtocol.waiting) + len(LimitedProtocol.answering) <= MOST
    finally:
        for connection in held:
            connection.close()


def test_the_one_that_has_waited_longest_goes_first(port: int) -> None:
    with closing(connect(port)) as asking, closing(connect(port)) as idle:
        until(lambda: len(LimitedProtocol.waiting) == 2)
        asking.sendall(head(port, "GET", "/next"))
        assert read_answer(asking)[0] == 200  # its wait begins anew
        others = [connect(port) for _ in range(MOST - 2)]
        try:
            assert ask(port) < SECONDS / 2
            assert seconds_until_closed(idle) < SECONDS / 4
            asking.sendall(head(port, "GET", "/next"))
            assert read_answer(asking)[0] == 200
        finally:
            for connection in others:
                connection.close()


def test_many_who_come_at_once_are_taken_a_few_at_a_time(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a protocol hears of the first, a whole backlog is accepted: that many files are open meanwhile."""
    real, unheard, most_unheard = socket.socket.accept, [0], [0]
    made = LimitedProtocol.connection_made

    def accept(listener: socket.socket) -> tuple[socket.socket, Any]:
        found = real(listener)
        unheard[0] += 1
        most_unheard[0] = max(most_unheard[0], unheard[0])
        time.sleep(0.001)  # the others come meanwhile
        return found

    def connection_made(self: LimitedProtocol, transport: asyncio.Transport) -> None:
        unheard[0] -= 1
        made(self, transport)

    monkeypatch.setattr(socket.socket, "accept", accept)
    monkeypatch.setattr(LimitedProtocol, "connection_made", connection_made)
    held = [connect(port) for _ in range(400)]
    try:
        assert ask(port) < 10
        assert most_unheard[0] <= 4 * connections._ACCEPTED_AT_ONCE
    finally:
        for connection in held:
            connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET /next HTTP/1.1\r\nHost: x\r\n"])
@pytest.mark.parametrize("drip", [b"", b"X-A: b\r\n"])
def test_headers_that_do_not_end_are_not_waited_for(port: int, sent: bytes, drip: bytes) -> None:
    with closing(connect(port)) as connection:
        connection.sendall(sent or (drip and b"GET / HTTP/1.1\r\n"))
        assert 0.5 * SECONDS < seconds_until_closed(connection, drip) < 3 * SECONDS


def test_a_second_request_has_as_long_as_the_first(port: int) -> None:
    with closing(connect(port)) as connection:
        for _ in range(3):
            time.sleep(SECONDS / 2)
            connection.sendall(head(port, "GET", "/next"))
            assert read_answer(connection)[0] == 200
        connection.sendall(b"GET")
        assert 0.5 * SECONDS < seconds_until_closed(connection, b"A") < 3 * SECONDS


def test_a_body_that_does_not_end_is_a_408(port: int) -> None:
    with closing(connect(port)) as connection:
        connection.sendall(head(port, "POST", "/vote", "Content-Length: 1000") + b'{"task": ')
        began = time.monotonic()
        status, body = read_answer(connection)
        assert status == 408 and b"seconds to arrive" in body and time.monotonic() - began < 3 * SECONDS
        assert seconds_until_closed(connection) < SECONDS


@pytest.mark.parametrize("framing", ["Content-Length: 10000000000", "Transfer-Encoding: chunked"])
def test_a_body_that_is_too_large_is_a_413_and_is_not_read_to_its_end(port: int, framing: str) -> None:
    with closing(connect(port)) as connection:
        body = b"2000\r\n" + b" " * 0x2000 if "chunked" in framing else b" " * 8192
        connection.sendall(head(port, "POST", "/vote", framing) + body)
        status, answer = read_answer(connection)
        assert status == 413 and b"4096 bytes" in answer
        assert seconds_until_closed(connection) < SECONDS


def test_headers_that_are_too_large_are_refused(port: int) -> None:
    with closing(connect(port)) as connection:
        connection.sendall(head(port, "GET", "/next", "X-Long: " + "x" * 200_000)[:150_000])
        assert seconds_until_closed(connection) < SECONDS


def test_an_answer_that_nobody_reads_is_not_kept(port: int) -> None:
    with closing(connect(port)) as connection:
        connection.sendall(head(port, "GET", f"/image/{BIG}"))
        until(lambda: bool(LimitedProtocol.answering))
        began = time.monotonic()
        until(lambda: not LimitedProtocol.answering)
        assert SECONDS < time.monotonic() - began < 6 * SECONDS


def test_whoever_leaves_in_the_middle_is_no_error(port: int) -> None:
    for sent in (b"", b'{"task": '):
        with closing(connect(port)) as connection:
            connection.sendall(head(port, "POST", "/vote", "Content-Length: 1000") + sent)
    time.sleep(SECONDS / 4)
    assert ask(port) < SECONDS


@pytest.mark.parametrize(
    "soft,hard,raised,most",
    [(256, 4096, 704, 512), (1024, 4096, None, 512), (256, 300, 300, 108), (256, -1, 704, 512), (-1, -1, None, 512)],
)
def test_the_limit_on_open_files_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int | None, most: int
) -> None:
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(connections.resource, "setrlimit", lambda which, limits: said.append(limits))
    max_connections.cache_clear()
    assert max_connections() == most
    assert said == ([] if raised is None else [(raised, hard)])
    max_connections.cache_clear()
