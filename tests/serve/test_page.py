"""The page in a real browser: it plays the answer, sample for sample."""

from __future__ import annotations

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
from omni_jax.config.model import AudioConfig
from omni_jax.inference.engine import Engine
from tests.serve.conftest import HeldBatch, RunningServer, assert_same_audio, eventually, run_server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="the page is tested in Chromium, which is not installed"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    # Input of the microphone: a tone that rises and falls, repeated.
    t = np.arange(48_000) / 16_000
    microphone = tmp_path_factory.mktemp("microphone") / "tone.wav"
    write_audio(microphone, (0.3 * np.sin(2 * np.pi * 300 * t) * np.sin(2 * np.pi * t)).astype(np.float32), 16_000)
    with sync_playwright() as playwright:
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


READY = "document.getElementById('state').textContent === 'Ready.'"


@contextmanager
def opened(browser: Any, server: RunningServer) -> Iterator[Any]:
    """The page of a server, in a context of its own; any error in it fails the test."""
    context = browser.new_context(permissions=["microphone"], viewport={"width": 1000, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    foreign: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
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
    while not any(isinstance(frame, bytes) for frame in sent):
        # Waiting also lets Playwright process the events of the socket.
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    page.wait_for_timeout(400)


def test_page_text_request(page: Any, server: RunningServer) -> None:
    expected = server.omni.reply(text="hello")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_audio(played(page), expected.audio)
    assert page.text_content("#history .answer") == expected.text
    timing = page.text_content("#history .timing")
    assert "first audio after" in timing
    assert "real-time factor" in timing
    page.click("text=Play again")
    until(page, "window.omni.turns.at(-1).played.reduce((sum, samples) => sum + samples.length, 0) > 1")


@pytest.mark.parametrize("hold", ["mouse", "space"])
def test_page_hold_to_talk(page: Any, server: RunningServer, hold: str) -> None:
    sent: list[Any] = []
    with page.expect_websocket() as socket:
        page.reload()
    socket.value.on("framesent", lambda frame: sent.append(frame))
    until(page, READY)
    # So short a recording may have ended before anyone looks.
    page.evaluate(
        """() => {
            const [state, talk] = ["state", "talk"].map((id) => document.getElementById(id));
            const note = () => window.seen.push(`${talk.ariaPressed}: ${state.textContent}`);
            window.seen = [];
            new MutationObserver(note).observe(state, { childList: true, characterData: true, subtree: true });
        }"""
    )
    page.hover("#talk")
    page.mouse.down() if hold == "mouse" else page.keyboard.down("Space")
    until(page, "window.seen.some((text) => /^true: Listening … \\d+ s left$/.test(text))")
    wait_for_sound(page, sent)
    page.mouse.up() if hold == "mouse" else page.keyboard.up("Space")
    received = played(page)
    samples = np.frombuffer(b"".join(frame for frame in sent if isinstance(frame, bytes)), "<i2")
    rate = next(json.loads(frame)["sample_rate"] for frame in sent if '"sample_rate"' in str(frame))
    assert np.abs(samples).max() > 1000
    expected = server.omni.reply(samples, sample_rate=rate)
    assert_same_audio(received, expected.audio)
    assert page.text_content("#history .answer") == expected.text
    transcript = server.omni.transcribe(samples, sample_rate=rate).text
    until(page, "!document.querySelector('#history .transcript').hidden")
    assert page.text_content("#history .transcript") == (
        f"Transcript: {transcript}" if transcript else "Nothing was understood."
    )
    page.click("text=Play my recording")


@pytest.mark.parametrize("late", [False, True])
def test_page_does_not_send_a_tap(page: Any, late: bool) -> None:
    """A tap, and one whose end a busy page gets to know when sound has been recorded."""
    sent: list[Any] = []
    with page.expect_websocket() as socket:
        page.reload()
    socket.value.on("framesent", lambda frame: sent.append(frame))
    until(page, READY)
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
    assert not [frame for frame in sent if '"end"' in str(frame)]
    assert page.locator("#history li").count() == 0


def test_page_sends_at_the_limit_what_was_said(browser: Any, omni: Omni) -> None:
    with run_server(omni, max_audio_seconds=0.39) as server, opened(browser, server) as page:
        # The page sends a little before the limit.
        page.evaluate("window.omni.limitMargin = 0.05")
        page.hover("#talk")
        page.mouse.down()
        until(page, "document.querySelector('#history .question')?.textContent.includes('the limit of 0.39 s')")
        page.mouse.up()
        until(page, "window.omni.turns.at(-1).ended")


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
            until(page, "document.querySelector('#history .timing')?.textContent.startsWith('No speech was found.')")
    finally:
        omni.config = config


def test_page_sends_audio_file(page: Any, server: RunningServer, samples: np.ndarray, tmp_path: Path) -> None:
    # A format that no browser reads.
    path = tmp_path / "question.au"
    soundfile.write(path, samples, 16_000, format="AU", subtype="ULAW")
    page.set_input_files("#file", path)
    expected = server.omni.reply(path)
    assert_same_audio(played(page), expected.audio)
    assert page.text_content("#history .answer") == expected.text
    assert page.text_content("#history .question") == "question.au"
    (tmp_path / "text.wav").write_text("no sound")
    page.set_input_files("#file", tmp_path / "text.wav")
    until(page, "document.querySelector('#history .timing').textContent.includes('cannot be decoded')")


def test_page_stop_button(page: Any, server: RunningServer) -> None:
    with HeldBatch(server) as held:
        page.fill("#text", "hello")
        page.press("#text", "Enter")
        held.wait()
        page.click("#stop")
        until(page, "document.querySelector('#history .timing').textContent === 'stopped'")
    server.wait_until_idle()
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_audio(played(page), server.omni.reply(text="hello").audio)


def test_page_fits_phone_and_names_controls(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("Hold to talk", "Stop", "Send"):
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
