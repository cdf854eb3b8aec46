"""Ask nano through a realtime session of the OpenAI Agents SDK: a recorded question, then a written one.

    pip install 'openai-agents[realtime]'
    omni-jax serve                              # in another terminal
    python examples/realtime/agents_sdk.py

May be followed by a wav file with another question, and one to write.
"""

from __future__ import annotations

import asyncio
import contextlib
from importlib import metadata

from agents.realtime import RealtimeAgent, RealtimeRunner, RealtimeSession
from recording import arguments, microphone, read, report

TYPED = "What is two plus two?"


async def answer_of(session: RealtimeSession, asked: str | None = None) -> tuple[str, str, bytes]:
    """What was asked, if it is not known, the answer's transcript and its samples, once a turn is complete."""
    transcript, samples, ended = "", b"", False
    async for event in session:
        if event.type == "audio":
            samples += event.audio.data
        elif event.type == "error":
            raise SystemExit(f"error: {event.error}")
        elif event.type == "raw_model_event" and event.data.type == "transcript_delta":
            transcript += event.data.delta
        elif event.type == "raw_model_event" and event.data.type == "input_audio_transcription_completed":
            asked = event.data.transcript
        elif event.type == "agent_end":
            ended = True
        if ended and asked is not None:
            return asked, transcript, samples
    raise SystemExit("the session has ended without an answer")


async def main() -> None:
    """Ask, and save the answer."""
    options = arguments(__doc__, "answer_agents_sdk.wav").parse_args()
    agent = RealtimeAgent(name="nano", instructions="Be brief.")
    runner = RealtimeRunner(
        agent,
        config={
            "model_settings": {
                "model_name": options.model,
                "input_audio_transcription": {"model": options.model},
                "turn_detection": {"type": "server_vad", "silence_duration_ms": 300, "interrupt_response": True},
            },
            "tracing_disabled": True,
        },
    )
    url = f"{options.url.replace('http', 'ws', 1)}/v1/realtime?model={options.model}"
    async with await runner.run(model_config={"api_key": options.key, "url": url}) as session:

        async def speak() -> None:
            async for packet in microphone(read(options.question)):
                await session.send_audio(packet)

        speaking = asyncio.create_task(speak())
        spoken = await answer_of(session)
        speaking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await speaking
        await session.send_message(TYPED)
        typed = await answer_of(session, TYPED)
    client = f"openai-agents {metadata.version('openai-agents')}"
    report(client, *spoken, options.answer)
    report(client, *typed, options.answer.with_stem(f"{options.answer.stem}_typed"))


if __name__ == "__main__":
    asyncio.run(main())
