from __future__ import annotations

from omni_jax.inference.answer import Segment
from omni_jax.text.subtitles import srt, vtt

SEGMENTS = [Segment(0, 1.5, "One & two."), Segment(1.5, 2, ""), Segment(3599.9996, 3723.0421, "<Three>")]


def test_srt() -> None:
    assert srt(SEGMENTS) == (
        "1\n00:00:00,000 --> 00:00:01,500\nOne & two.\n\n2\n01:00:00,000 --> 01:02:03,042\n<Three>\n"
    )
    assert srt([]) == ""


def test_vtt() -> None:
    assert vtt(SEGMENTS) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne &amp; two.\n\n01:00:00.000 --> 01:02:03.042\n&lt;Three&gt;\n"
    )
    assert vtt([]) == "WEBVTT\n"
