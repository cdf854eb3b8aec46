"""Ask nano through LiveKit's OpenAI Realtime plugin, in an agent session without a room: in writing, then a recording.

    pip install livekit-agents livekit-plugins-openai
    omni-jax serve                              # in another terminal
    python examples/realtime/livekit_plugin.py

May be followed by a wav file with another question, and one to write.
"""

from __future__ import annotations

import asyncio
import time
from importlib import metadata
from pathlib import Path

from livekit import rtc
from livekit.agents import Agent, AgentSession
from livekit.agents.voice import io
from livekit.plugins.openai import realtime
from openai.types.realtime import AudioTranscription
from openai.types.realtime.realtime_audio_input_turn_detection import ServerVad
from recording import RATE, arguments, microphone, read, report

TYPED = "What is two plus two?"


class Microphone(io.AudioInput):
    """Silence, and a recording once it is spoken."""

    def __init__(self) -> None:
        super().__init__(label="recording")
        self._packets = microphone(b"")

    def speak(self, speech: bytes) -> None:
        """Go on with a recording."""
        self._packets = microphone(speech)

    async def __anext__(self) -> rtc.AudioFrame:
        packet = await anext(self._packets)
        return rtc.AudioFrame(packet, RATE, 1, len(packet) // 2)


class Loudspeaker(io.AudioOutput):
    """Keeps what is played, and takes the time that playing it takes."""

    def __init__(self) -> None:
        super().__init__(label="file", capabilities=io.AudioOutputCapabilities(pause=False), sample_rate=RATE)
        self.samples = b""
        self._started, self._seconds = 0.0, 0.0
        self._playing: asyncio.Task[None] | None = None

    async def capture_frame(self, frame: rtc.AudioFrame) -> None:
        """Take a piece of an answer."""
        await super().capture_frame(frame)
        if not self._seconds:
            self._started = time.monotonic()
        self._seconds += frame.duration
        self.samples += frame.data.tobytes()

    def flush(self) -> None:
        """The answer is complete; say when it has been played."""
        super().flush()
        self._playing = asyncio.create_task(self._play())

    async def _play(self) -> None:
        await asyncio.sleep(self._started + self._seconds - time.monotonic())
        self._finish(interrupted=False)

    def clear_buffer(self) -> None:
        """Stop playing; the answer was interrupted."""
        if self._seconds:
            if self._playing is not None:
                self._playing.cancel()
            self._finish(interrupted=True)

    def _finish(self, *, interrupted: bool) -> None:
        position = min(self._seconds, time.monotonic() - self._started)
        self._seconds = 0.0
        self.on_playback_finished(playback_position=position, interrupted=interrupted)


async def main() -> None:
    """Ask, and save the answers."""
    options = arguments(__doc__, "answer_livekit.wav").parse_args()
    model = realtime.RealtimeModel(
        model=options.model,
        base_url=f"{options.url}/v1",
        api_key=options.key,
        modalities=["audio"],
        input_audio_transcription=AudioTranscription(model=options.model),
        turn_detection=ServerVad(type="server_vad", silence_duration_ms=300),
    )
    session = AgentSession[None](llm=model)
    talker, loudspeaker = Microphone(), Loudspeaker()
    session.input.audio, session.output.audio = talker, loudspeaker
    said: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    @session.on("conversation_item_added")
    def added(event: object) -> None:
        item = event.item  # type: ignore[attr-defined]
        if item.type == "message":
            said.put_nowait((item.role, item.text_content or ""))

    @session.on("error")
    def failed(event: object) -> None:
        said.put_nowait(("error", str(event.error)))  # type: ignore[attr-defined]

    async def turn(path: Path) -> None:
        """Wait for a question and its answer, and save it."""
        texts: dict[str, str] = {}
        async with asyncio.timeout(60):
            while {*texts} != {"user", "assistant"}:
                role, text = await said.get()
                if role == "error":
                    raise SystemExit(f"error: {text}")
                texts[role] = text
        client = f"livekit-plugins-openai {metadata.version('livekit-plugins-openai')}"
        report(client, texts["user"], texts["assistant"], loudspeaker.samples, path)
        loudspeaker.samples = b""

    await session.start(Agent(instructions="Be brief."))
    session.generate_reply(user_input=TYPED)
    await turn(options.answer.with_stem(f"{options.answer.stem}_typed"))
    talker.speak(read(options.question))
    await turn(options.answer)
    await session.aclose()
    await model.aclose()


if __name__ == "__main__":
    asyncio.run(main())
