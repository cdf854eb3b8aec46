"""The Realtime API's beta: names and shapes that older clients send and read, translated from and to those of GA.

A connection is in the beta if it says so, with the header `OpenAI-Beta: realtime=v1` or the subprotocol
`openai-beta.realtime-v1`, or from the first update of the session that has fields of the beta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMATS = {"pcm16": "audio/pcm", "g711_ulaw": "audio/pcmu", "g711_alaw": "audio/pcma"}
"""Of audio: GA's name by that of the beta."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "modalities": ("output_modalities",),
    "voice": ("audio", "output", "voice"),
    "speed": ("audio", "output", "speed"),
    "input_audio_format": ("audio", "input", "format"),
    "output_audio_format": ("audio", "output", "format"),
    "input_audio_transcription": ("audio", "input", "transcription"),
    "input_audio_noise_reduction": ("audio", "input", "noise_reduction"),
    "turn_detection": ("audio", "input", "turn_detection"),
    "max_response_output_tokens": ("max_output_tokens",),
}
"""Of sessions and responses: where GA has a field of the beta."""

EVENTS = {
    "response.output_text.delta": "response.text.delta",
    "response.output_text.done": "response.text.done",
    "response.output_audio.delta": "response.audio.delta",
    "response.output_audio.done": "response.audio.done",
    "response.output_audio_transcript.delta": "response.audio_transcript.delta",
    "response.output_audio_transcript.done": "response.audio_transcript.done",
    "conversation.item.added": "conversation.item.created",
}
"""From the server: the beta's name by that of GA."""

CONTENT = {"output_text": "text", "output_audio": "audio"}
"""Types of content: the beta's name by that of GA."""


def is_beta(fields: Mapping[str, Any]) -> bool:
    """Whether the settings of a session are in the shape of the beta."""
    return "type" not in fields and any(name in fields for name in FIELDS)


def from_beta(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a session or a response in the shape of GA; fields of GA stay.

    A format of audio that there is none of stays as it is, for validation to find.
    """
    found = {name: value for name, value in fields.items() if name not in FIELDS}
    for name, path in FIELDS.items():
        if name not in fields:
            continue
        value = fields[name]
        if name == "modalities" and isinstance(value, list) and sorted(map(str, value)) == ["audio", "text"]:
            value = ["audio"]
        elif name.endswith("_audio_format") and isinstance(value, str):
            value = {"type": FORMATS.get(value, value)}
        place = found
        for step in path[:-1]:
            # A copy: the client's own objects stay as they are.
            place[step] = dict(place[step]) if isinstance(place.get(step), dict) else {}
            place = place[step]
        place[path[-1]] = value
    return found


def to_beta(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """An event in the shape of the beta; None if it has none such."""
    kind = event["type"]
    if kind == "conversation.item.done":
        return None
    found = dict(event) | {"type": EVENTS.get(kind, kind)}
    if "item" in found:
        found["item"] = _item(found["item"])
    if "response" in found:
        found["response"] = _response(found["response"])
    if "session" in found:
        found["session"] = session_to_beta(found["session"])
        if event["session"]["type"] == "transcription":
            found["type"] = f"transcription_{kind}"
    return found


def session_to_beta(session: Mapping[str, Any]) -> dict[str, Any]:
    """A session in the shape of the beta."""
    audio_in = session["audio"]["input"]
    detection = audio_in["turn_detection"]
    if detection is not None and detection.get("idle_timeout_ms") is None:
        detection = {name: value for name, value in detection.items() if name != "idle_timeout_ms"}
    found = {
        **({"id": session["id"]} if "id" in session else {}),
        "object": session["object"],
        "input_audio_format": _format(audio_in["format"]),
        "input_audio_transcription": audio_in["transcription"],
        "input_audio_noise_reduction": None,
        "turn_detection": detection,
        "expires_at": session["expires_at"],
    }
    if session["type"] == "transcription":
        return found
    output = session["audio"]["output"]
    return found | {
        "model": session["model"],
        "modalities": _modalities(session["output_modalities"]),
        "instructions": session["instructions"],
        "voice": output["voice"],
        "output_audio_format": _format(output["format"]),
        "speed": output["speed"],
        "tools": session["tools"],
        "tool_choice": session["tool_choice"],
        "tracing": None,
        "temperature": session.get("temperature"),
        "max_response_output_tokens": session["max_output_tokens"],
    }


def _format(format: Mapping[str, Any]) -> str:
    return next(beta for beta, name in FORMATS.items() if name == format["type"])


def _modalities(modalities: list[str]) -> list[str]:
    return ["text", "audio"] if modalities == ["audio"] else modalities


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    content = [part | {"type": CONTENT.get(part["type"], part["type"])} for part in item["content"]]
    return {**item, "content": content}


def _response(response: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in response.items() if name not in ("output_modalities", "audio")}
    output = response["audio"]["output"]
    if (found["status_details"] or {}).get("error"):
        error = {name: value for name, value in found["status_details"]["error"].items() if name != "message"}
        found["status_details"] = found["status_details"] | {"error": error}
    return found | {
        "output": [_item(item) for item in response["output"]],
        "modalities": _modalities(response["output_modalities"]),
        "voice": output["voice"],
        "output_audio_format": _format(output["format"]),
    }
