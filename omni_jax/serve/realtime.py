"""OpenAI's Realtime API over WebSocket, `/v1/realtime`: a conversation in events, with turns found by the server.

Events and their fields are those of `openai.types.realtime` (GA); older clients get those of the beta, see
`omni_jax.serve.realtime_beta`. `/v1/realtime/client_secrets` gives out short-lived keys.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, cast

import pydantic_core
from fastapi import APIRouter, Request, WebSocket, WebSocketDisconnect
from pydantic import Field
from starlette.responses import JSONResponse

from omni_jax.errors import OmniError
from omni_jax.serve.bodies import JsonRoute
from omni_jax.serve.client_secrets import ClientSecrets
from omni_jax.serve.errors import RequestRefusedError, error_body
from omni_jax.serve.limits import POLICY_VIOLATION, bearer_key, is_known_key
from omni_jax.serve.realtime_beta import from_beta, is_beta, session_to_beta, to_beta
from omni_jax.serve.realtime_conversation import new_id
from omni_jax.serve.realtime_response import ENDPOINT
from omni_jax.serve.realtime_schema import (
    SMALL_MESSAGE,
    Model,
    Session,
    invalid,
    parse_event,
    parse_json,
    repeatable,
    validate,
)
from omni_jax.serve.realtime_session import RealtimeSession, update_session
from omni_jax.serve.sessions import Service
from omni_jax.serve.streaming import client_of, service_of

router = APIRouter(prefix="/v1/realtime", route_class=JsonRoute)

KEY_PROTOCOL = "openai-insecure-api-key."
"""Subprotocol of clients in browsers, which cannot send headers: the key follows."""
BETA_PROTOCOL = "openai-beta.realtime-v1"

DISCONNECTED = (WebSocketDisconnect, RuntimeError)
"""What sending and receiving raise once a client has left or reads nothing; Starlette's own is a RuntimeError."""


class ExpiresAfter(Model):
    """When a client secret expires."""

    anchor: Literal["created_at"] = "created_at"
    seconds: Annotated[int, Field(ge=10, le=7200)] = 600


class ClientSecretRequest(Model):
    """Body of `/v1/realtime/client_secrets`."""

    expires_after: ExpiresAfter = ExpiresAfter()
    session: dict[str, Any] = Field(default_factory=dict)


class BetaClientSecret(Model):
    """When the client secret of a session of the beta expires."""

    expires_after: ExpiresAfter = ExpiresAfter()
    expires_at: ExpiresAfter | None = None


@router.post("/client_secrets")
async def client_secrets(request: Request, body: ClientSecretRequest) -> Any:
    """A short-lived key that begins sessions with some settings."""
    service = service_of(request)
    session = update_session(service, Session(model=service.name), from_beta(body.session))
    value, expires_at = _secrets(request).create(client_of(request), session, body.expires_after.seconds)
    return {"value": value, "expires_at": expires_at, "session": {"id": new_id("sess"), **session.render()}}


@router.post("/sessions")
@router.post("/transcription_sessions")
async def sessions(request: Request, body: dict[str, Any]) -> Any:
    """The same in the shape of the beta."""
    service = service_of(request)
    fields = from_beta({name: value for name, value in body.items() if name != "client_secret"})
    if request.url.path.endswith("/transcription_sessions"):
        fields["type"] = "transcription"
    session = update_session(service, Session(model=service.name), fields)
    wanted = validate(BetaClientSecret, body.get("client_secret") or {}, "client_secret.")
    seconds = (wanted.expires_at or wanted.expires_after).seconds
    value, expires_at = _secrets(request).create(client_of(request), session, seconds)
    rendered = session_to_beta({"id": new_id("sess"), **session.render()})
    return {**rendered, "client_secret": {"value": value, "expires_at": expires_at}}


def _secrets(connection: Request | WebSocket) -> ClientSecrets:
    return cast(ClientSecrets, connection.app.state.client_secrets)


@router.websocket("")
async def realtime(socket: WebSocket) -> None:
    """Talk until the client disconnects."""
    service = cast(Service, socket.app.state.service)
    protocols = [name.strip() for name in socket.headers.get("sec-websocket-protocol", "").split(",")]
    key = bearer_key(socket.headers) or next(
        (name.removeprefix(KEY_PROTOCOL) for name in protocols if name.startswith(KEY_PROTOCOL)), ""
    )
    secret = _secrets(socket).find(key)
    keys = service.settings.api_keys
    if secret is None and keys and not is_known_key(key, keys):
        service.metrics.count(ENDPOINT, "refused")
        body = error_body("expected a valid API key or client secret", status=401, code="invalid_api_key")
        await socket.send_denial_response(JSONResponse(body, 401, headers={"www-authenticate": "Bearer"}))
        return
    await socket.accept("realtime" if "realtime" in protocols else None)
    # Where a client is a key, a secret stands for the key that asked for it.
    client = secret[1] if secret and len(keys) > 1 else service.client_of(socket.client, key if keys else "")
    # From now on messages may be large.
    if trust := socket.scope.get("state", {}).get("trust"):
        trust(client)
    beta = socket.headers.get("openai-beta") == "realtime=v1" or BETA_PROTOCOL in protocols
    with service.metrics.realtime_sessions.track_inprogress():
        await Connection(socket, service, client, beta=beta).run(secret[0] if secret else None)


class Connection:
    """One client: events in and out.

    Attributes:
        beta: whether the client sends and reads the shapes of the beta.
    """

    def __init__(self, socket: WebSocket, service: Service, client: str | None, *, beta: bool):
        self.beta = beta
        self._socket, self._service, self._client = socket, service, client
        self._gone = False

    async def run(self, settings: Session | None) -> None:
        """Handle events until the client disconnects.

        Args:
            settings: how the session begins, if a client secret says; else the address does.
        """
        try:
            settings = self._settings(settings)
        except RequestRefusedError as error:
            session = RealtimeSession(self._service, self._client, Session(model=self._service.name), self.send)
            await session.send_error(error)
            with contextlib.suppress(*DISCONNECTED):
                await self._socket.close(POLICY_VIOLATION, error.code or "")
            return
        session = RealtimeSession(self._service, self._client, settings, self.send)
        try:
            await session.open()
            while not self._gone:
                await self._handle(session, await self._socket.receive())
                # Others have their turn between two messages, however many have arrived.
                await asyncio.sleep(0)
        except DISCONNECTED:
            pass
        finally:
            session.close()

    def _settings(self, settings: Session | None) -> Session:
        query = self._socket.query_params
        patch: dict[str, Any] = {"model": query["model"]} if query.get("model") else {}
        if query.get("intent") == "transcription":
            # The model of the address is one that transcribes, of which there is one here.
            patch = {"type": "transcription"}
        return update_session(self._service, settings or Session(model=self._service.name), patch)

    async def _handle(self, session: RealtimeSession, received: Any) -> None:
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        event_id = None
        try:
            if received.get("text") is None:
                raise invalid("event: expected a message of text, found one of bytes")
            text = received["text"]
            fields = parse_json(text) if len(text) <= SMALL_MESSAGE else await asyncio.to_thread(parse_json, text)
            event_id = repeatable(fields.get("event_id"))
            event = parse_event(fields)
        except OmniError as error:
            await session.send_error(error, event_id)
            return
        if event.type == "transcription_session.update" or (
            event.type == "session.update" and is_beta(fields["session"])
        ):
            self.beta = True
        await session.handle(event)

    async def send(self, type: str, *, large: Callable[[], dict[str, Any]] | None = None, **fields: Any) -> None:
        """Send an event. A client that reads nothing is disconnected, which ends `run`.

        Args:
            type: of the event.
            large: makes further fields of which there may be much: in a thread, as the JSON is made then.
            **fields: of the event.
        """

        def render() -> str | None:
            found = {"type": type, "event_id": new_id("event"), **fields, **(large() if large else {})}
            event = to_beta(found) if self.beta else found
            return None if event is None else pydantic_core.to_json(event).decode()

        text = render() if large is None else await self._service.run_large(render)
        if text is None or self._gone:
            return
        try:
            await self._socket.send_text(text)
        except DISCONNECTED:
            self._gone = True
