"""What a connection may cost before and below the application: counts, deadlines, pieces of data, frames.

The HTTP server is uvicorn with h11 on asyncio's own event loop: uvloop reads one socket up to 32 times in a row, which
lets a client of tiny frames keep all others waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from omni_jax.serve.budget import Budget, Share
from omni_jax.serve.sessions import Service

READ_BYTES = 8192
"""Data that is read from a socket before others have their turn: at most so many bytes of tiny frames are parsed."""
MAX_CHUNK_OVERHEAD = 1 << 16
"""Bytes that a body may have between its chunks: a client that needs more sends tiny ones."""
START_BYTES = 1 << 16
"""Largest message of a WebSocket until the application trusts its client."""
MAX_FRAGMENTS = 4096
"""Frames that a message of a WebSocket may come in."""
FRAME_CHARACTERS = 1 << 16
"""Characters of a message of a WebSocket that are sent at once."""
MAX_UNREAD_BYTES = 1 << 18
"""Answers to pings that a client may leave unread."""
TRY_AGAIN_LATER = 1013
"""Close code, RFC 6455 section 7.4.1 and IANA's registry."""
INVALID_DATA, TOO_BIG = 1007, 1009

BACKLOG = 64
"""Connections that wait to be accepted."""


class ServerConfig(uvicorn.Config):
    """uvicorn's configuration, with what the protocols need.

    Attributes:
        service: whose limits apply.
        open_connections: of all clients.
    """

    def __init__(self, app: Any, service: Service, **options: Any):
        # As many connections are accepted in a row, before anything else is done.
        super().__init__(app, http=HttpProtocol, ws=WebSocketProtocol, loop="asyncio", backlog=BACKLOG, **options)
        self.service = service
        most = service.settings.max_connections
        self.open_connections = Budget(most, max(1, most // 4))
        self._admitted: dict[Any, Share] = {}

    def admit(self, address: Any) -> bool:
        """Count a connection that is accepted, if it may be open; by its address and port."""
        share = Share(self.open_connections, self.service.client_of(address))
        if not share.take(1):
            return False
        self._admitted[address] = share
        return True

    def admitted(self, address: Any) -> Share:
        """The share of a connection that was admitted; it is to be given back."""
        return self._admitted.pop(address)


class HttpProtocol(H11Protocol):
    """One connection for HTTP."""

    config: ServerConfig

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]
        self._overhead = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._counted = self.config.admitted(transport.get_extra_info("peername"))
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count no longer."""
        super().connection_lost(exc)
        self._counted.give_back()
        if self._deadline is not None:
            self._deadline.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._await_request()
        super().on_response_complete()

    def _await_request(self) -> None:
        """Close the connection if the rest of this request and the head of the next do not arrive in time."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._overhead = 0
        self._deadline = self.loop.call_later(self.config.service.settings.idle_timeout, self._give_up)

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE or self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """End a body in tiny chunks, each of which takes as long as a large one, and what is left of one for too long.

        A client that is refused by the head of its request may send the rest, which is discarded: most see no answer
        before.
        """
        cycle, before = self.cycle, 0 if self.cycle is None else len(self.cycle.body)
        in_body = self.conn.their_state is h11.SEND_BODY
        super().data_received(data)
        if in_body and self.cycle is cycle:
            self._overhead += len(data) - (len(cycle.body) - before)
            discarded = cycle.response_complete
            if self._overhead > (self.config.service.settings.max_body_bytes if discarded else MAX_CHUNK_OVERHEAD):
                self.transport.abort()
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0] and self.cycle is not None:
            # Several requests at once, which no client sends but to have the server write more than it reads.
            self.cycle.keep_alive = False

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection on; it is counted until the WebSocket is closed."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().handle_websocket_upgrade(event)
        cast(WebSocketProtocol, self.transport.get_protocol()).counted = self._counted


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """One connection for WebSockets.

    Attributes:
        counted: the connection, among those that are open.
    """

    config: ServerConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.counted: Share | None = None
        self._fragments = 0
        # No message is larger before the application has seen the key.
        self.conn.max_message_size = START_BYTES

    def connection_made(self, transport: Any) -> None:
        """Take over the connection."""
        super().connection_made(transport)
        self._client = self.config.service.client_of(self.client)
        self._unread = self._new_share()
        self._sending = asyncio.Lock()
        # Messages that the application has not taken, and the one that it has not done with.
        self._queued: deque[Share] = deque()
        self._in_work: Share | None = None

    def _new_share(self) -> Share:
        return Share(self.config.service.bodies, self._client)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count no longer."""
        super().connection_lost(exc)
        for share in (self._unread, *self._queued, *filter(None, [self._in_work])):
            share.give_back()
        self._queued.clear()
        if self.counted is not None:
            self.counted.give_back()

    def handle_connect(self, event: Any) -> None:
        """Give the application the means to trust the client."""
        super().handle_connect(event)
        if self.response.status_code == 101:
            self.scope["state"]["trust"] = self._trust

    def _trust(self, client: str | None) -> None:
        """Take large messages of a client whose key was valid, and count what it has for that client."""
        self.conn.max_message_size = self.config.ws_max_size
        if client == self._client:
            return
        self._client = client
        if self.counted is not None:
            self.counted.give_back()
            self.counted = Share(self.config.open_connections, client)
            if not self.counted.take(1):
                self._end(TRY_AGAIN_LATER, "too many connections at once; try again later")

    def data_received(self, data: bytes) -> None:
        """Take data, if there is room for it until a message is complete."""
        if self.handshake_initiated and not self._unread.take(len(data)):
            self._end(TRY_AGAIN_LATER, "too much data at once; try again later")
            return
        super().data_received(data)

    def send_receive_event_to_app(self) -> None:
        """Hand a complete message on."""
        self._fragments = 0
        if self.curr_msg_data_type == "text" and not _is_utf8(self.frames):
            self.frames = []
            self._end(INVALID_DATA, "expected text in UTF-8")
            return
        if self.close_sent:
            self._unread.give_back()
        else:
            self._queued.append(self._unread)
            self._unread = self._new_share()
        super().send_receive_event_to_app()

    async def receive(self) -> Any:
        """The next event; the application has done with the message before."""
        if self._in_work is not None:
            self._in_work.give_back()
            self._in_work = None
        event = await super().receive()
        if event["type"] == "websocket.receive" and self._queued:
            self._in_work = self._queued.popleft()
        return event

    async def send(self, message: Any) -> None:
        """Send an event; a long text in frames, between which others have their turn.

        Raises:
            ClientDisconnected: the client is gone, or is disconnected as it read nothing for `Settings.idle_timeout`.
        """
        text = message.get("text") if message["type"] == "websocket.send" else None
        # Other messages wait until all frames of one are sent.
        async with self._sending:
            await self._until_writable()
            if text is None or len(text) <= FRAME_CHARACTERS:
                await super().send(message)
                return
            frames = asyncio.create_task(self._send_frames(text))
            try:
                await asyncio.shield(frames)
            except asyncio.CancelledError:
                # A message that has begun cannot be taken back: what was cancelled ends after it.
                with contextlib.suppress(ClientDisconnected):
                    await frames
                raise

    async def _send_frames(self, text: str) -> None:
        try:
            await self._try_send_frames(text)
        except BaseException:
            # Half a message is no use.
            self.transport.abort()
            raise

    async def _try_send_frames(self, text: str) -> None:
        for start in range(0, len(text), FRAME_CHARACTERS):
            await self._until_writable()
            send = self.conn.send_continuation if start else self.conn.send_text
            try:
                send(text[start : start + FRAME_CHARACTERS].encode(), fin=start + FRAME_CHARACTERS >= len(text))
            except InvalidState:
                raise ClientDisconnected from None
            self.transport.write(b"".join(self.conn.data_to_send()))
            await asyncio.sleep(0)

    async def _until_writable(self) -> None:
        try:
            async with asyncio.timeout(self.config.service.settings.idle_timeout):
                await self.writable.wait()
        except TimeoutError:
            self.transport.abort()
            raise ClientDisconnected from None

    def handle_cont(self, event: Any) -> None:
        """Count the fragments of a message, which may be empty."""
        self._fragments += 1
        if self._fragments <= MAX_FRAGMENTS:
            super().handle_cont(event)
        elif not self.close_sent:
            self._end(TOO_BIG, f"expected a message in at most {MAX_FRAGMENTS} frames")

    def handle_ping(self) -> None:
        """Answer, unless the client reads no answers."""
        super().handle_ping()
        if self.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            self.transport.abort()

    def _end(self, code: int, reason: str) -> None:
        if not self.close_sent and not self.transport.is_closing():
            self.conn.fail(code, reason)
            self.handle_parser_exception()


def _is_utf8(pieces: list[bytes]) -> bool:
    try:
        b"".join(pieces).decode()
    except UnicodeDecodeError:
        return False
    return True
