"""The page in a real browser: it plays the answer, sample for sample."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omni_jax.api import Omni
from omni_jax.audio.encoding import write_audio
from omni_jax.audio.io import read_audio
from omni_jax.cli.demo import QUESTIONS
from omni_jax.config.model import AudioConfig
from omni_jax.inference.engine import Engine
from tests.serve.conftest import HeldBatch, RunningServer, assert_same_audio, eventually, run_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="the page is tested in Chromium, which is not installed"),
]


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright


@contextmanager
def launched(playwright: Any, microphone: Path) -> Iterator[Any]:
    """A browser with a recording as its microphone, again and again."""
    browser = playwright.chromium.launch(
        executable_path=CHROMIUM,
        args=[
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            "--use-fake-ui-for-media-stream",
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}",
            "--autoplay-policy=no-user-gesture-required",
        ],
    )
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def browser(playwright: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    # Input of the microphone: a tone that rises and falls, repeated.
    t = np.arange(48_000) / 16_000
    microphone = tmp_path_factory.mktemp("microphone") / "tone.wav"
    write_audio(microphone, (0.3 * np.sin(2 * np.pi * 300 * t) * np.sin(2 * np.pi * t)).astype(np.float32), 16_000)
    with launched(playwright, microphone) as browser:
        yield browser


READY = "document.getElementById('state').textContent === 'Ready.'"


@contextmanager
def opened(browser: Any, server: RunningServer) -> Iterator[Any]:
    """The page of a server, in a context of its own; any error in it fails the test."""
    context = browser.new_context(permissions=["microphone"], viewport={"width": 1000, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    foreign: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on_console = lambda message: errors.append(message.text) if message.type == "error" else None
    page.on("console", page.on_console)
    page.on("request", lambda request: foreign.append(request.url) if server.url not in request.url else None)
    page.goto(server.url)
    yield page
    context.close()
    assert not errors
    assert not [url for url in foreign if not url.startswith("data:")]


@pytest.fixture
def page(browser: Any, server: RunningServer) -> Iterator[Any]:
    """A fresh page of the server that all tests share."""
    with opened(browser, server) as page:
        until(page, READY)
        yield page


def until(page: Any, expression: str) -> None:
    """Wait for something in the page. Playwright's own function needs a page that allows `eval`."""
    eventually(lambda: bool(page.evaluate(expression)))


def played(page: Any, turn: int = -1) -> np.ndarray:
    """int16, what was played in a turn, once it has ended."""
    until(page, f"window.omni.turns.at({turn})?.ended")
    samples = page.evaluate(f"[].concat(...window.omni.turns.at({turn}).played.map((samples) => [...samples]))")
    return np.rint(np.array(samples) * 32768).astype(int)


def wait_for_sound(page: Any, sent: list[Any]) -> None:
    """Wait until the page has sent a part of a recording, and 0.4 s more."""
    deadline = time.monotonic() + 30
    while not any("input_audio_buffer.append" in frame for frame in sent):
        # Waiting also lets Playwright process the events of the socket.
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    page.wait_for_timeout(400)


def test_page_text_request(page: Any, server: RunningServer) -> None:
    expected = server.omni.reply(text="hello")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_audio(played(page), expected.audio)
    assert page.text_content("#history .assistant .text") == expected.text
    timing = page.text_content("#history .assistant .timing")
    assert "first audio after" in timing
    assert "real-time factor" in timing
    page.click("#history .assistant .replay")


def sent_samples(sent: list[Any]) -> np.ndarray:
    """int16 [samples] at 24 kHz, what the page has taken from the microphone."""
    events = [json.loads(frame) for frame in sent]
    encoded = [event["audio"] for event in events if event["type"] == "input_audio_buffer.append"]
    return np.frombuffer(b"".join(map(base64.b64decode, encoded)), "<i2")


@contextmanager
def recorded_events(page: Any) -> Iterator[list[str]]:
    """The events that the page sends after it was opened once more."""
    sent: list[str] = []
    with page.expect_websocket() as socket:
        page.reload()
    socket.value.on("framesent", lambda frame: sent.append(frame))
    until(page, READY)
    yield sent


@pytest.mark.parametrize("hold", ["mouse", "space"])
def test_page_hold_to_talk(page: Any, server: RunningServer, hold: str) -> None:
    with recorded_events(page) as sent:
        page.click("text=Options")
        page.check("#hold")
        # So short a recording may have ended before anyone looks.
        page.evaluate(
            """() => {
                const [state, talk] = ["state", "talk"].map((id) => document.getElementById(id));
                const note = () => window.seen.push(`${talk.ariaPressed}: ${state.textContent}`);
                window.seen = [];
                new MutationObserver(note).observe(state, { childList: true, characterData: true, subtree: true });
                document.activeElement.blur();
            }"""
        )
        page.hover("#talk")
        page.mouse.down() if hold == "mouse" else page.keyboard.down("Space")
        until(page, "window.seen.some((text) => /^true: Listening … \\d+ s left$/.test(text))")
        wait_for_sound(page, sent)
        page.mouse.up() if hold == "mouse" else page.keyboard.up("Space")
        received = played(page)
    samples = sent_samples(sent)
    assert np.abs(samples).max() > 1000
    expected = server.omni.reply(samples, sample_rate=24_000)
    assert_same_audio(received, expected.audio)
    assert page.text_content("#history .assistant .text") == expected.text
    transcript = server.omni.transcribe(samples, sample_rate=24_000).text
    shown = transcript or "Nothing was understood."
    until(page, "document.querySelector('#history .user .text').textContent !== ''")
    assert page.text_content("#history .user .text") == shown
    page.click("#history .user .replay")


@pytest.mark.parametrize("late", [False, True])
def test_page_does_not_send_a_tap(page: Any, late: bool) -> None:
    """A tap, and one whose end a busy page gets to know when sound has been recorded."""
    with recorded_events(page) as sent:
        page.evaluate("document.getElementById('hold').click()")
        # This small model's limit would end the recording first.
        page.evaluate("window.omni.limitMargin = -9")
        # The keyboard of a test would be as slow as this machine is busy.
        event = """(kind, time) => {
            const event = new KeyboardEvent(kind, { code: "Space", bubbles: true });
            document.body.dispatchEvent(Object.defineProperty(event, "timeStamp", { value: time }));
        }"""
        page.evaluate(f"({event})('keydown', 1000)")
        if late:
            wait_for_sound(page, sent)
        page.evaluate(f"({event})('keyup', 1080)")
        if not late:
            until(page, "document.getElementById('state').textContent === 'Hold the button while you speak.'")
        page.wait_for_timeout(100)
    assert not [frame for frame in sent if "response.create" in frame]
    assert page.locator("#history li").count() == 0


def test_page_sends_at_the_limit_what_was_said(browser: Any, omni: Omni) -> None:
    with run_server(omni, max_audio_seconds=0.39) as server, opened(browser, server) as page:
        until(page, READY)
        page.evaluate("document.getElementById('hold').click()")
        # The page sends a little before the limit.
        page.evaluate("window.omni.limitMargin = 0.05")
        page.hover("#talk")
        page.mouse.down()
        until(page, "document.querySelector('#history .timing')?.textContent.includes('the limit of 0.39 s')")
        page.mouse.up()
        until(page, "window.omni.turns.at(-1)?.ended")


def test_page_waits_for_the_compiler(browser: Any, omni: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = threading.Event()
    monkeypatch.setattr(Engine, "warm_up", lambda self, stop: compiled.wait(60))
    with run_server(omni, ready=False) as server, opened(browser, server) as page:
        try:
            until(page, "document.getElementById('state').textContent.includes('compiling')")
            assert page.is_disabled("#talk")
            assert page.is_disabled("#send")
        finally:
            compiled.set()
        until(page, READY)
        assert page.is_enabled("#talk")


def test_page_says_that_there_is_no_speech(browser: Any, omni: Omni, tmp_path: Path) -> None:
    write_audio(tmp_path / "noise.wav", np.random.default_rng(0).normal(size=16_000).astype(np.float32) / 9, 16_000)
    config = omni.config
    try:
        omni.config = replace(config, audio=AudioConfig(find_speech=True))
        with run_server(omni) as server, opened(browser, server) as page:
            until(page, READY)
            page.set_input_files("#file", tmp_path / "noise.wav")
            until(
                page, "document.querySelector('#history .user .timing')?.textContent.startsWith('No speech was found.')"
            )
    finally:
        omni.config = config


def test_page_sends_audio_file(page: Any, server: RunningServer, tmp_path: Path) -> None:
    samples = (np.random.default_rng(0).normal(size=8_000) * 3000).astype(np.int16)
    soundfile.write(tmp_path / "question.wav", samples, 24_000)
    page.set_input_files("#file", tmp_path / "question.wav")
    expected = server.omni.reply(samples, sample_rate=24_000)
    assert_same_audio(played(page), expected.audio)
    assert page.text_content("#history .assistant .text") == expected.text
    assert page.text_content("#history .user .who") == "You · question.wav"


def test_page_lets_the_server_read_what_no_browser_reads(
    page: Any, server: RunningServer, samples: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "question.au"
    soundfile.write(path, samples, 16_000, format="AU", subtype="ULAW")
    transcript = server.omni.transcribe(path).text
    page.set_input_files("#file", path)
    if transcript:
        until(page, f"document.querySelector('#history .user .text')?.textContent === {json.dumps(transcript)}")
        assert_same_audio(played(page), server.omni.reply(text=transcript).audio)
    (tmp_path / "text.wav").write_text("no sound")
    # The browser logs that the server refused it.
    page.remove_listener("console", page.on_console)
    page.set_input_files("#file", tmp_path / "text.wav")
    until(page, "document.getElementById('state').textContent.includes('cannot be decoded')")


def test_page_talks_hands_free(playwright: Any, tmp_path: Path) -> None:
    """Five turns of a conversation, found by the server; the fourth is spoken during an answer and interrupts it."""
    names = ("name", "day", "sum", "name", "day")
    questions = [read_audio(QUESTIONS / f"{name}.wav") for name in names]
    # Seconds after each question: time for the answer, but for the third one.
    pauses = (7, 7, 1.8, 7, 20)
    sound = [np.zeros(8_000, np.float32)]
    for question, pause in zip(questions, pauses, strict=True):
        sound += [question, np.zeros(int(16_000 * pause), np.float32)]
    write_audio(tmp_path / "questions.wav", np.concatenate(sound), 16_000)
    omni = Omni.from_pretrained("nano")
    expected = [omni.transcribe(question, sample_rate=16_000).text for question in questions]
    with (
        run_server(omni) as server,
        launched(playwright, tmp_path / "questions.wav") as browser,
        opened(browser, server) as page,
    ):
        until(page, READY)
        page.click("#talk")
        eventually(lambda: page.locator("#history .assistant").count() >= 5, seconds=120)
        until(page, "window.omni.turns.at(-1).ended")
        page.click("#talk")
        assert page.get_by_role("button", name="Start talking").count() == 1
        turns = page.evaluate("window.omni.messages()")
    asked = [turn for turn in turns if turn["role"] == "user"]
    answered = [turn for turn in turns if turn["role"] == "assistant"]
    # A busy browser drops a little of its microphone's sound, so that one question may be understood otherwise.
    assert len(asked) == len(expected)
    assert sum(turn["text"] == text for turn, text in zip(asked, expected, strict=True)) >= len(expected) - 1
    for turn, question in zip(asked, questions, strict=True):
        [samples] = turn["pieces"]
        assert len(samples) / 24_000 == pytest.approx(len(question) / 16_000, abs=1.0)
    assert [bool(turn["cut"]) for turn in answered] == [False, False, True, False, False]
    reply = omni.reply(questions[0], sample_rate=16_000).text
    assert reply in (answered[0]["text"], answered[3]["text"])


def test_page_stop_button(page: Any, server: RunningServer) -> None:
    with HeldBatch(server) as held:
        page.fill("#text", "hello")
        page.press("#text", "Enter")
        held.wait()
        page.click("#stop")
        until(page, "document.querySelector('#history .assistant .timing').textContent === 'interrupted'")
    server.wait_until_idle()
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_audio(played(page, 1), server.omni.reply(text="hello").audio)


def test_page_fits_phone_and_names_controls(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("Start talking", "Stop answer", "Send"):
        assert page.get_by_role("button", name=name).count() == 1
    assert page.get_by_label("Type a question").count() == 1
    assert page.get_by_role("status").text_content() == "Ready."
    page.focus("#text")
    focused = []
    for _ in range(6):
        focused.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"text", "send", "file"} <= set(focused)


def test_page_asks_for_api_key(browser: Any, omni: Omni) -> None:
    with run_server(omni, api_keys=("right",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#key", "right")
        page.press("#key", "Enter")
        until(page, READY)
        assert page.is_hidden("#login")
        page.close()
