"""Ask nano through Pipecat's OpenAI Realtime service, in a pipeline without a transport: in writing, then a recording.

    pip install 'pipecat-ai[openai]'
    omni-jax serve                              # in another terminal
    python examples/realtime/pipecat_service.py

May be followed by a wav file with another question, and one to write.
"""

from __future__ import annotations

import asyncio
from importlib import metadata
from pathlib import Path

from pipecat.frames.frames import (
    EndFrame,
    ErrorFrame,
    InputAudioRawFrame,
    LLMFullResponseEndFrame,
    LLMRunFrame,
    TranscriptionFrame,
    TTSAudioRawFrame,
    TTSTextFrame,
)
from pipecat.observers.base_observer import BaseObserver, FramePushed
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineParams, PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
from pipecat.services.openai.realtime.events import (
    AudioConfiguration,
    AudioInput,
    InputAudioTranscription,
    SessionProperties,
    TurnDetection,
)
from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService
from pipecat.workers.runner import WorkerRunner
from recording import RATE, arguments, microphone, read, report

TYPED = "What is two plus two?"


class Answer(BaseObserver):
    """Collects what the service pushes, turn by turn."""

    def __init__(self) -> None:
        super().__init__()
        self.error = ""
        self.complete = asyncio.Event()
        self.begin(TYPED)

    def begin(self, asked: str | None = None) -> None:
        """Begin a turn; `asked` is None until the question is transcribed."""
        self.asked, self.text, self.samples, self._ended = asked, "", b"", False
        self.complete.clear()

    async def on_push_frame(self, data: FramePushed) -> None:
        """Look at each frame once."""
        frame = data.frame
        if not data.first_push:
            return
        if isinstance(frame, TTSAudioRawFrame):
            self.samples += frame.audio
        elif isinstance(frame, TTSTextFrame):
            self.text += frame.text
        elif isinstance(frame, TranscriptionFrame):
            self.asked = frame.text
        elif isinstance(frame, LLMFullResponseEndFrame):
            self._ended = True
        elif isinstance(frame, ErrorFrame):
            self.error = frame.error
        if self.error or (self._ended and self.samples and self.asked is not None):
            self.complete.set()


async def main() -> None:
    """Ask, and save the answer."""
    options = arguments(__doc__, "answer_pipecat.wav").parse_args()
    audio = AudioInput(
        transcription=InputAudioTranscription(model=options.model),
        turn_detection=TurnDetection(silence_duration_ms=300),
    )
    service = OpenAIRealtimeLLMService(
        api_key=options.key,
        base_url=f"{options.url.replace('http', 'ws', 1)}/v1/realtime",
        settings=OpenAIRealtimeLLMService.Settings(
            model=options.model,
            system_instruction="Be brief.",
            session_properties=SessionProperties(audio=AudioConfiguration(input=audio)),
        ),
    )
    context = LLMContextAggregatorPair(LLMContext([{"role": "user", "content": TYPED}]))
    answer = Answer()
    worker = PipelineWorker(
        Pipeline([context.user(), service, context.assistant()]),
        params=PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE),
        observers=[answer],
    )

    async def speak() -> None:
        async for packet in microphone(read(options.question)):
            await worker.queue_frame(InputAudioRawFrame(audio=packet, sample_rate=RATE, num_channels=1))

    async def turns() -> None:
        await worker.queue_frame(LLMRunFrame())
        await complete(answer, options.answer.with_stem(f"{options.answer.stem}_typed"))
        answer.begin()
        speaking = asyncio.create_task(speak())
        await complete(answer, options.answer)
        speaking.cancel()
        await worker.queue_frame(EndFrame())

    runner = WorkerRunner()
    await runner.add_workers(worker)
    await asyncio.gather(runner.run(), turns())


async def complete(answer: Answer, path: Path) -> None:
    """Wait for an answer, and save it."""
    async with asyncio.timeout(60):
        await answer.complete.wait()
    if answer.error:
        raise SystemExit(f"error: {answer.error}")
    report(f"pipecat-ai {metadata.version('pipecat-ai')}", answer.asked or "", answer.text, answer.samples, path)


if __name__ == "__main__":
    asyncio.run(main())
