"""The page in a real browser: what it plays is the answer, sample for sample."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.api import Omni
from omni_jax.audio import io as audio_io
from tests.serve.conftest import Held, Running, assert_same_sound, eventually, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="the page is tested in Chromium, which is not installed"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    # What the microphone hears: a tone that rises and falls, over and over.
    moments = np.arange(48_000) / 16_000
    microphone = tmp_path_factory.mktemp("microphone") / "tone.wav"
    audio_io.write_wav(
        microphone, (0.3 * np.sin(2 * np.pi * 300 * moments) * np.sin(2 * np.pi * moments)).astype(np.float32), 16_000
    )
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


@pytest.fixture
def page(browser: Any, server: Running) -> Iterator[Any]:
    """A fresh page of the server; any error in it fails the test."""
    context = browser.new_context(permissions=["microphone"], viewport={"width": 1000, "height": 800})
    page = context.new_page()
    errors: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: elsewhere.append(request.url) if server.url not in request.url else None)
    page.goto(server.url)
    until(page, "document.getElementById('state').textContent === 'Ready.'")
    yield page
    context.close()
    assert not errors
    assert not [url for url in elsewhere if not url.startswith("data:")]


def until(page: Any, expression: str) -> None:
    """Wait for something in the page. Playwright's own way would need a page that allows `eval`."""
    eventually(lambda: bool(page.evaluate(expression)))


def played(page: Any, turn: int = -1) -> np.ndarray:
    """int16, what went to the loudspeaker in a turn, once all has."""
    until(page, f"window.omni.turns.at({turn})?.ended")
    samples = page.evaluate(f"[].concat(...window.omni.turns.at({turn}).played.map((piece) => [...piece]))")
    return np.rint(np.array(samples) * 32768).astype(int)


def test_a_typed_question(page: Any, server: Running) -> None:
    expected = server.omni.reply(text="hello")
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_sound(played(page), expected.audio)
    assert page.text_content("#history .answered") == expected.text
    timing = page.text_content("#history .timing")
    assert "first sound after" in timing
    assert "real time" in timing
    page.click("text=Play again")
    until(page, "window.omni.turns.at(-1).played.reduce((sum, piece) => sum + piece.length, 0) > 1")


@pytest.mark.parametrize("hold", ["mouse", "space"])
def test_hold_to_talk(page: Any, server: Running, hold: str) -> None:
    sent: list[Any] = []
    with page.expect_websocket() as socket:
        page.reload()
    socket.value.on("framesent", lambda frame: sent.append(frame))
    until(page, "document.getElementById('state').textContent === 'Ready.'")
    page.hover("#talk")
    page.mouse.down() if hold == "mouse" else page.keyboard.down("Space")
    until(page, "document.getElementById('talk').ariaPressed === 'true'")
    until(page, "document.getElementById('state').textContent === 'Listening …'")
    until_heard = time.monotonic() + 30
    while not any(isinstance(frame, bytes) for frame in sent):
        # The microphone opens when it does; this also lets the browser tell what it has sent.
        assert time.monotonic() < until_heard
        page.wait_for_timeout(50)
    page.wait_for_timeout(300)
    page.mouse.up() if hold == "mouse" else page.keyboard.up("Space")
    heard = played(page)
    samples = np.frombuffer(b"".join(frame for frame in sent if isinstance(frame, bytes)), "<i2")
    rate = next(int(frame.split('"sample_rate":')[1].split("}")[0]) for frame in sent if '"sample_rate"' in str(frame))
    assert np.abs(samples).max() > 1000
    expected = server.omni.reply(samples, sample_rate=rate)
    assert_same_sound(heard, expected.audio)
    assert page.text_content("#history .answered") == expected.text


def test_a_recording_is_dropped(page: Any, server: Running, sound: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "question.wav"
    audio_io.write_wav(path, sound, 16_000)
    page.set_input_files("#file", path)
    # 16 kHz, mono: the browser has nothing to change.
    expected = server.omni.reply(audio_io.to_pcm16(sound), sample_rate=16_000)
    assert_same_sound(played(page), expected.audio)
    assert page.text_content("#history .answered") == expected.text
    assert "question.wav" in page.text_content("#history .asked")
    (tmp_path / "text.wav").write_text("no sound")
    page.set_input_files("#file", tmp_path / "text.wav")
    until(page, "document.getElementById('state').textContent.includes('read as a recording')")


def test_stop(page: Any, server: Running) -> None:
    with Held(server) as held:
        page.fill("#text", "hello")
        page.press("#text", "Enter")
        held.wait()
        page.click("#stop")
        until(page, "document.querySelector('#history .timing').textContent === 'stopped'")
    server.idle()
    page.fill("#text", "hello")
    page.press("#text", "Enter")
    assert_same_sound(played(page), server.omni.reply(text="hello").audio)


def test_it_fits_a_phone_and_has_names_for_everything(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("Hold to talk", "Stop", "Ask"):
        assert page.get_by_role("button", name=name).count() == 1
    assert page.get_by_label("A question in writing").count() == 1
    assert page.get_by_role("status").text_content() == "Ready."
    page.focus("#text")
    reached = []
    for _ in range(6):
        reached.append(page.evaluate("document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"text", "send", "file"} <= set(reached)


def test_a_key_is_asked_for(browser: Any, omni: Omni) -> None:
    with running(omni, api_keys=("right",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.fill("#key", "right")
        page.press("#key", "Enter")
        until(page, "document.getElementById('state').textContent === 'Ready.'")
        assert page.is_hidden("#login")
        page.close()
