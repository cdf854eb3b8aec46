"""Ask nano through OpenAI's own client: a recorded question, whose end the server finds, or else push-to-talk.

    pip install 'openai[realtime]'
    omni-jax serve                              # in another terminal
    python examples/realtime/openai_client.py
    python examples/realtime/openai_client.py --push-to-talk

May be followed by a wav file with another question, and one to write.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Any

import openai
from recording import arguments, microphone, read, report


async def main() -> None:
    """Ask, and save the answer."""
    parser = arguments(__doc__, "answer_openai_client.wav")
    parser.add_argument("--push-to-talk", action="store_true", help="say where the question ends")
    options = parser.parse_args()
    speech = read(options.question)
    client = openai.AsyncOpenAI(base_url=f"{options.url}/v1", api_key=options.key)
    async with client, client.realtime.connect(model=options.model) as connection:
        detection: Any = None if options.push_to_talk else {"type": "server_vad", "silence_duration_ms": 300}
        audio: Any = {"input": {"turn_detection": detection, "transcription": {"model": options.model}}}
        await connection.session.update(session={"type": "realtime", "audio": audio})

        async def speak() -> None:
            sent = 0
            async for packet in microphone(speech):
                await connection.input_audio_buffer.append(audio=base64.b64encode(packet).decode())
                sent += len(packet)
                if options.push_to_talk and sent >= len(speech):
                    await connection.input_audio_buffer.commit()
                    await connection.response.create()
                    return

        speaking = asyncio.create_task(speak())
        asked, transcript, samples, status = None, "", b"", None
        async for event in connection:
            if event.type == "response.output_audio.delta":
                samples += base64.b64decode(event.delta)
            elif event.type == "response.output_audio_transcript.delta":
                transcript += event.delta
            elif event.type == "conversation.item.input_audio_transcription.completed":
                asked = event.transcript
            elif event.type == "response.done":
                status = event.response.status
            elif event.type == "error":
                raise SystemExit(f"error: {event.error}")
            if status is not None and asked is not None:
                break
        speaking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await speaking
    if status != "completed":
        raise SystemExit(f"the response is {status}")
    mode = "push-to-talk" if options.push_to_talk else "server VAD"
    report(f"openai {openai.__version__}, {mode}", asked or "", transcript, samples, options.answer)


if __name__ == "__main__":
    asyncio.run(main())
