"""The OpenAI services for transcription and speech of Pipecat or LiveKit Agents, unchanged, against a server of nano.

`make test-clients` runs this in an environment that has their packages and not omni_jax.

    python tests/clients/services.py pipecat http://127.0.0.1:8000 question.wav
"""

from __future__ import annotations

import asyncio
import re
import sys
import wave
from pathlib import Path

QUESTION = "what is seven plus five"
SENTENCE = "My name is Nano. Seven plus five is twelve."
MODELS = ("whisper-1", "gpt-4o-mini-tts")


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


async def pipecat(url: str, recording: Path) -> None:
    from pipecat.frames.frames import TranscriptionFrame, TTSAudioRawFrame
    from pipecat.services.openai.stt import OpenAISTTService
    from pipecat.services.openai.tts import OpenAITTSService

    stt = OpenAISTTService(api_key="none", base_url=f"{url}/v1", settings=OpenAISTTService.Settings(model=MODELS[0]))
    frames = [frame async for frame in stt.run_stt(recording.read_bytes())]
    texts = [frame.text for frame in frames if isinstance(frame, TranscriptionFrame)]
    assert [words(text) for text in texts] == [QUESTION], frames
    print(f"pipecat STT: {texts[0]!r}")

    tts = OpenAITTSService(
        api_key="none", base_url=f"{url}/v1", sample_rate=24_000, settings=OpenAITTSService.Settings(model=MODELS[1])
    )
    tts._sample_rate = 24_000  # what the pipeline's start frame sets
    spoken = [frame async for frame in tts.run_tts(SENTENCE, "turn")]
    audio = b"".join(frame.audio for frame in spoken if isinstance(frame, TTSAudioRawFrame))
    seconds = len(audio) / 2 / 24_000
    assert 2 < seconds < 10, spoken
    print(f"pipecat TTS: {seconds:.2f} s of audio in {len(spoken)} frames")


async def livekit(url: str, recording: Path) -> None:
    from livekit import rtc
    from livekit.plugins import openai

    with wave.open(str(recording)) as file:
        rate, data = file.getframerate(), file.readframes(file.getnframes())
    frame = rtc.AudioFrame(data, rate, 1, len(data) // 2)
    for model in MODELS[:1]:
        stt = openai.STT(model=model, base_url=f"{url}/v1", api_key="none", use_realtime=False)
        event = await stt.recognize(frame)
        (found,) = event.alternatives
        assert words(found.text) == QUESTION, event
        print(f"livekit STT: {found.text!r}, language {found.language!r}")
    for format in ("mp3", "wav", "opus", "pcm"):
        tts = openai.TTS(model=MODELS[1], base_url=f"{url}/v1", api_key="none", response_format=format)
        seconds = 0.0
        async with tts.synthesize(SENTENCE) as stream:
            async for event in stream:
                seconds += event.frame.duration
        assert 2 < seconds < 10, format
        print(f"livekit TTS, {format}: {seconds:.2f} s of audio")
        await tts.aclose()


if __name__ == "__main__":
    services = {"pipecat": pipecat, "livekit": livekit}
    asyncio.run(services[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))
