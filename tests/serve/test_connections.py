"""What clients may do with a connection; attacks of one client, bounded in count and time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Frame
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from benchmarks.attacks import event, frame, message, upgrade
from omni_jax.api import Omni
from omni_jax.serve.connections import (
    FRAME_CHARACTERS,
    MAX_CHUNK_OVERHEAD,
    MAX_FRAGMENTS,
    START_BYTES,
    WebSocketProtocol,
)
from tests.serve.conftest import RunningServer, eventually, run_server
from tests.serve.test_app import connect, post, still_answers

MAX_DELAY = 2.0
"""Seconds that /healthz may take while a client attacks, on a machine that has other things to do; it was 7 to 26."""


def started(server: RunningServer, key: str = "") -> socket.socket:
    """A WebSocket with a session of the Realtime API, which has begun."""
    client = connect(server)
    client.sendall(upgrade(key))
    receive_until(client, b'"realtime.conversation"}}')
    return client


def receive_until(client: socket.socket, end: bytes) -> bytes:
    """What the server sends up to some bytes."""
    received = b""
    while end not in received:
        data = client.recv(1 << 16)
        assert data, received
        received += data
    return received


def is_closed(client: socket.socket, seconds: float = 10) -> bool:
    """Whether the server closes the connection soon; what it sends is dropped."""
    client.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        try:
            while client.recv(1 << 16):
                pass
        except TimeoutError:
            return False
    return True


def send_until_closed(client: socket.socket, data: bytes, times: int) -> bool:
    client.settimeout(20)
    for _ in range(times):
        try:
            client.sendall(data)
        except (ConnectionError, TimeoutError):
            return True
    return is_closed(client)


@contextlib.contextmanager
def measured(server: RunningServer) -> Iterator[Callable[[], float]]:
    """The longest time so far that /healthz took."""
    delays, stop = [0.0], threading.Event()

    def ask() -> None:
        while not stop.wait(0.02):
            start = time.perf_counter()
            assert server.call("/healthz")[0] == 200
            delays.append(time.perf_counter() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield lambda: max(delays)
    finally:
        stop.set()
        thread.join(60)


def test_connections_of_a_client_are_bounded(omni: Omni) -> None:
    with run_server(omni, max_connections=40) as server:
        held = [connect(server) for _ in range(10)]
        eventually(lambda: len(server.server.server_state.connections) == 10)
        for _ in range(3):
            # It may be closed before `connect` returns.
            with contextlib.suppress(ConnectionError), connect(server) as client:
                assert is_closed(client)
        # Another client, on another address.
        with socket.create_connection(("127.0.0.1", server.port), timeout=30, source_address=("127.0.0.2", 0)) as other:
            other.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(100).startswith(b"HTTP/1.1 200")
        for client in held:
            client.close()
        eventually(lambda: not server.server.server_state.connections)
        # A WebSocket is one, until it is closed.
        sockets = [started(server) for _ in range(9)]
        assert server.call("/healthz")[0] == 200
        for client in sockets:
            client.close()
        eventually(lambda: not server.server.server_state.connections)
        assert still_answers(server)


def test_proxies_stand_for_many_clients(omni: Omni) -> None:
    with run_server(omni, max_connections=8, trusted_proxies=("127.0.0.1",)) as server:
        held = [connect(server) for _ in range(7)]
        assert server.call("/healthz")[0] == 200
        for client in held:
            client.close()


@pytest.mark.parametrize("trusted", [(), ("127.0.0.1",)])
def test_proxy_headers_count_from_trusted_proxies_only(
    omni: Omni, trusted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_server(omni, trusted_proxies=trusted) as server:
        found: list[Any] = []
        client_of = server.service.client_of

        def note_address(address: Any, key: str = "") -> str | None:
            found.append(address[0])
            return client_of(address, key)

        monkeypatch.setattr(server.service, "client_of", note_address)
        assert server.call("/v1/models", **{"X-Forwarded-For": "203.0.113.7"})[0] == 200
        assert found[-1] == ("203.0.113.7" if trusted else "127.0.0.1")


@pytest.mark.parametrize("begun", [b"", b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Le"])
def test_connections_without_a_request_are_closed(omni: Omni, begun: bytes) -> None:
    with run_server(omni, idle_timeout=1) as server:
        with connect(server) as client:
            client.sendall(begun)
            assert is_closed(client)
        with connect(server) as client:
            # Again after a request.
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + begun)
            assert is_closed(client)


def test_pipelined_requests_end_the_connection(server: RunningServer) -> None:
    get = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as client:
        client.sendall(get * 100)
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := client.recv(10_000):
                received += data
    assert 1 <= received.count(b"HTTP/1.1 200") < 5
    with connect(server) as client:
        for _ in range(5):
            client.sendall(get)
            received = b""
            while b'"ok"' not in received:
                received += client.recv(1000)
            assert received.startswith(b"HTTP/1.1 200")


def test_bodies_in_tiny_chunks_are_ended(server: RunningServer) -> None:
    with measured(server) as worst, connect(server) as client:
        client.sendall(post("/chat", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        assert send_until_closed(client, b"1\r\na\r\n" * 1000, 10 * MAX_CHUNK_OVERHEAD // 5000)
    assert worst() < MAX_DELAY
    with connect(server) as client:
        # Chunks of an ordinary size.
        client.sendall(post("/chat", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        for _ in range(200):
            client.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 400")


def test_what_a_refused_client_still_sends_is_bounded(omni: Omni) -> None:
    with run_server(omni, api_keys=("right",), max_body_bytes=1_000_000) as server:
        with connect(server) as client:
            # Large, but allowed: the client sees why, although it reads only after it has sent all.
            client.sendall(post("/chat", b" " * 1_000_000))
            assert client.recv(1000).startswith(b"HTTP/1.1 401")
        with connect(server) as client:
            client.sendall(post("/chat", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            assert send_until_closed(client, b"10000\r\n" + b" " * 0x10000 + b"\r\n", 1000)


def test_messages_need_a_key(omni: Omni) -> None:
    """A client without one is refused before it can send any; with one they may be large."""
    with run_server(omni, api_keys=("right",)) as server, measured(server) as worst:
        for data in (b"[" + b"0," * (15 << 20) + b"0]", b" " * (30 << 20)):
            with connect(server) as client:
                with contextlib.suppress(ConnectionError):
                    client.sendall(upgrade("wrong"))
                    assert client.recv(1000).startswith(b"HTTP/1.1 401")
                    client.sendall(frame(data))
                assert is_closed(client)
        assert server.service.bodies.left("127.0.0.1") == server.service.bodies.per_client
        with started(server, "right") as client:
            client.sendall(message(type="input_audio", audio="A" * (4 * START_BYTES)))
            receive_until(client, b"conversation.item.done")
        assert worst() < MAX_DELAY


def test_json_of_many_values_is_refused(server: RunningServer) -> None:
    with measured(server) as worst, started(server) as client:
        client.sendall(frame(b"[" + b"0," * (10 << 20) + b"0]"))
        receive_until(client, b"commas, colons and brackets")
        assert worst() < MAX_DELAY
    server.wait_until_idle()


@pytest.mark.parametrize(
    "tiny", [frame(b"", 10), event("input_audio_buffer.append", audio="")], ids=["pongs", "messages"]
)
def test_tiny_frames_block_no_one(server: RunningServer, tiny: bytes) -> None:
    with measured(server) as worst, started(server) as client:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            client.sendall(tiny * 2000)
        client.sendall(event("input_audio_buffer.clear"))
        receive_until(client, b"input_audio_buffer.cleared")
    assert worst() < MAX_DELAY


def test_fragments_are_counted(server: RunningServer) -> None:
    with started(server) as client:
        client.sendall(frame(b"", 2, last=False))
        assert send_until_closed(client, frame(b"", 0, last=False) * 1000, MAX_FRAGMENTS // 50)
    with started(server) as client:
        client.sendall(frame(b'{"type": ', 1, last=False) + frame(b'"input_audio_buffer.clear"}', 0))
        receive_until(client, b"input_audio_buffer.cleared")


def test_pings_that_are_not_drained_close_the_socket(server: RunningServer) -> None:
    with started(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        assert send_until_closed(client, frame(os.urandom(125), 9) * 1000, 500)


def test_unfinished_messages_are_bounded(omni: Omni) -> None:
    with run_server(omni, max_body_bytes=100_000) as server:
        held = [started(server) for _ in range(4)]
        for client in held[:2]:
            client.sendall(frame(b" " * 99_000)[:-1])
        eventually(lambda: server.service.bodies.left("127.0.0.1") < 5000)
        held[2].sendall(frame(b" " * 99_000)[:-1])
        assert is_closed(held[2])
        for client in held:
            client.close()
        eventually(lambda: server.service.bodies.left("127.0.0.1") == 200_000)


def test_recordings_are_bounded(omni: Omni) -> None:
    with run_server(omni, max_body_bytes=20_000) as server:
        held = [started(server) for _ in range(5)]
        refused = []
        for client in held:
            for _ in range(4):
                client.sendall(event("input_audio_buffer.append", audio="A" * 2800))
                client.sendall(event("conversation.item.retrieve", item_id="none"))
                refused.append(b"speak again" in receive_until(client, b"item_retrieve_invalid_item_id"))
        # The second piece of the last client is too much.
        assert refused.index(True) == 17
        for client in held:
            client.close()
        eventually(lambda: server.service.bodies.left("127.0.0.1") == 40_000)


class Sender:
    """What `WebSocketProtocol.send` needs of itself."""

    send: Any = WebSocketProtocol.send
    _send_frames: Any = WebSocketProtocol._send_frames
    _try_send_frames: Any = WebSocketProtocol._try_send_frames
    _until_writable: Any = WebSocketProtocol._until_writable

    def __init__(self) -> None:
        self.config = SimpleNamespace(service=SimpleNamespace(settings=SimpleNamespace(idle_timeout=30)))
        self.conn, self.transport = ServerProtocol(state=State.OPEN), Mock()
        self.writable, self._sending = asyncio.Event(), asyncio.Lock()
        self.writable.set()


@pytest.mark.parametrize("turns", range(4))
def test_cancellation_while_sending_is_not_lost(turns: int) -> None:
    """Whatever the connection is doing when an answer is cancelled; it was lost in Python 3.11."""

    async def answer(sender: Sender) -> None:
        for _ in range(100):
            await sender._until_writable()
            await asyncio.sleep(0)

    async def cancel() -> bool:
        task = asyncio.create_task(answer(Sender()))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancel())


async def eventually_written(sender: Sender) -> None:
    while not sender.transport.write.called:
        await asyncio.sleep(0)


def test_connection_ends_if_a_message_is_cancelled_twice() -> None:
    async def send() -> Sender:
        sender = Sender()
        task = asyncio.create_task(sender.send({"type": "websocket.send", "text": "a" * (2 * FRAME_CHARACTERS)}))
        await eventually_written(sender)
        sender.writable.clear()
        for _ in range(2):
            task.cancel()
            await asyncio.wait([task], timeout=0.1)
        assert task.cancelled()
        return sender

    assert asyncio.run(send()).transport.abort.called


def test_message_that_has_begun_is_sent_whole_if_cancelled() -> None:
    """The client read slowly, and the connection goes on."""
    text = "a" * (2 * FRAME_CHARACTERS + 1)

    async def send() -> Sender:
        sender = Sender()
        task = asyncio.create_task(sender.send({"type": "websocket.send", "text": text}))
        await eventually_written(sender)
        sender.writable.clear()
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
        sender.writable.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return sender

    sender = asyncio.run(send())
    client = ClientProtocol(parse_uri("ws://localhost"), state=State.OPEN)
    client.receive_data(b"".join(call.args[0] for call in sender.transport.write.call_args_list))
    frames = [event for event in client.events_received() if isinstance(event, Frame)]
    assert b"".join(frame.data for frame in frames).decode() == text
    assert [frame.fin for frame in frames] == [False, False, True]
    assert not sender.transport.abort.called
