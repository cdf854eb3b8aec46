"""Augmentation of waveforms: the tools one by one, and all of them together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from omni_jax.audio import augment
from omni_jax.errors import SynthesisError

RATE = 16_000
PLAIN = augment.Augmentation(
    stretch=(1.0, 1.0),
    room_chance=0,
    silence_chance=0,
    noise_chance=0,
    swell_chance=0,
    band_chance=0,
    clip_chance=0,
    codec_chance=0,
    level=(-20.0, -20.0),
)
"""Nothing but the level."""


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def decibels(audio: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(audio, dtype=np.float64))))


def amplitude(audio: np.ndarray, hertz: float, rate: int = RATE) -> float:
    """Of one frequency, away from both ends."""
    middle = audio[len(audio) // 8 : -len(audio) // 8] * np.hanning(len(audio) - 2 * (len(audio) // 8))
    wave = np.exp(-2j * np.pi * hertz * np.arange(len(middle)) / rate)
    return float(np.abs(np.mean(middle * wave)) * 4)


def dominant_frequency(audio: np.ndarray, rate: int) -> float:
    """The frequency with the most power."""
    size = 4 * len(audio)
    return float(np.fft.rfftfreq(size, 1 / rate)[np.abs(np.fft.rfft(audio, size)).argmax()])


def test_trim_silence_trims_ends_and_shortens_pauses():
    first, second, third = (0.5 * tone(hertz, seconds) for hertz, seconds in ((200, 0.5), (300, 0.4), (400, 0.3)))
    audio = np.concatenate([silence(1), first, silence(0.2), second, silence(1.5), third, silence(0.7)])
    trimmed = augment.trim_silence(audio, RATE)
    # 40 ms on each side of a sound and the short pause are kept; of the long one 0.3 s, and 40 ms on each side.
    assert len(trimmed) / RATE == pytest.approx(0.04 + 0.5 + 0.2 + 0.4 + 0.38 + 0.3 + 0.04, abs=0.011)
    begin, joint = round(0.04 * RATE), round(1.14 * RATE)
    np.testing.assert_array_equal(trimmed[begin:joint], audio[RATE : RATE + joint - begin])
    np.testing.assert_array_equal(trimmed[-len(third) - begin : -begin], third)
    assert np.abs(trimmed[: begin - 1]).max() == 0
    assert np.abs(trimmed[-begin + 1 :]).max() == 0
    shorter = augment.trim_silence(audio, RATE, pause=0.05)
    assert len(trimmed) - len(shorter) == pytest.approx((0.07 + 0.25) * RATE, abs=0.011 * RATE)


def test_trim_silence_removes_faint_noise_and_keeps_soft_speech():
    rng = np.random.default_rng(0)
    noise = (0.35 * 10 ** (-50 / 20) * rng.standard_normal(RATE)).astype(np.float32)
    loud, soft = 0.5 * tone(200, 0.5), 0.5 * 10 ** (-40 / 20) * tone(200, 0.5)
    trimmed = augment.trim_silence(np.concatenate([noise, loud, soft, noise]), RATE)
    assert len(trimmed) / RATE == pytest.approx(1.08, abs=0.011)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100])
def test_trim_silence_at_any_rate(rate: int):
    audio = np.concatenate([np.zeros(rate, np.float32), tone(200, 0.5, rate), np.zeros(rate, np.float32)])
    assert len(augment.trim_silence(audio, rate)) / rate == pytest.approx(0.58, abs=0.011)


@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.025, 0.05, 0.085])
@pytest.mark.parametrize("around", [0.0, 0.02, 1.0])
def test_trim_silence_keeps_short_sounds(seconds: float, around: float):
    sound = 0.5 * tone(1000, seconds)
    trimmed = augment.trim_silence(np.concatenate([silence(around), sound, silence(around)]), RATE)
    assert np.sum(trimmed**2) == pytest.approx(np.sum(sound**2), rel=1e-5)
    assert len(trimmed) / RATE <= seconds + 0.1


@pytest.mark.parametrize("samples", [0, 1, 1000, 16_000])
def test_trim_silence_of_silence_is_empty(samples: int):
    assert augment.trim_silence(np.zeros(samples, np.float32), RATE).shape == (0,)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.3, 2.0])
def test_change_speed(ratio: float):
    shifted = augment.change_speed(tone(500, 1), ratio)
    assert shifted.dtype == np.float32
    assert len(shifted) == pytest.approx(RATE / ratio, abs=1)
    assert dominant_frequency(shifted, RATE) == pytest.approx(500 * ratio, rel=1e-3)


def test_change_speed_by_1_returns_input():
    audio = tone(500, 0.1)
    assert augment.change_speed(audio, 1.0) is audio


def test_set_level_is_rms_limited_by_peak():
    audio = np.random.default_rng(0).uniform(-1, 1, 10_000).astype(np.float32)
    assert decibels(augment.set_level(audio, -23)) == pytest.approx(-23, abs=1e-3)
    audio[5] = -60
    limited = augment.set_level(audio, -20)
    assert limited.min() == pytest.approx(-0.98, rel=1e-6)
    np.testing.assert_allclose(limited / limited[5], audio / -60, atol=1e-6)
    assert limited.dtype == np.float32


@pytest.mark.parametrize("color", [-1.0, 0.0, 1.0, 2.0])
def test_colored_noise_spectrum(color: float):
    made = augment.colored_noise(np.random.default_rng(1), 200_000, RATE, color)
    assert (made.shape, made.dtype) == ((200_000,), np.float32)
    assert decibels(made) == pytest.approx(0, abs=1e-3)
    power = np.abs(np.fft.rfft(made)) ** 2
    frequencies = np.fft.rfftfreq(len(made), 1 / RATE)

    def density(low: float, high: float) -> float:
        return float(10 * np.log10(power[(frequencies >= low) & (frequencies < high)].mean()))

    # Three octaves apart; below 50 Hz flat.
    assert density(200, 220) - density(1600, 1760) == pytest.approx(color * 10 * np.log10(8), abs=1.2)
    assert density(2, 20) == pytest.approx(density(25, 50), abs=1.5)


@pytest.mark.parametrize("drr_db", [3.0, 18.0])
def test_room_impulse_response_is_direct_sound_and_decaying_tail(drr_db: float):
    response = augment.room_impulse_response(np.random.default_rng(2), RATE, 0.5, drr_db)
    assert (response.shape, response.dtype) == ((8000,), np.float32)
    assert response[0] == 1
    assert 10 * np.log10(np.sum(response[1:].astype(float) ** 2)) == pytest.approx(-drr_db, abs=0.01)
    # 60 dB in half a second, so 30 from one quarter second to the next; the early reflections are over by 40 ms.
    assert decibels(response[1000:3000]) - decibels(response[5000:7000]) == pytest.approx(30, abs=1)
    assert not response[1:30].any()


def test_augment_depends_on_seed():
    audio = 0.1 * tone(200, 0.5)
    first, drawn = augment.augment(audio, RATE, 7)
    again, same = augment.augment(audio, RATE, 7)
    np.testing.assert_array_equal(first, again)
    assert drawn == same
    others = [augment.augment(audio, RATE, seed) for seed in (8, [7, 1], [8, 1])]
    assert len({drawn["stretch"], *(other["stretch"] for _, other in others)}) == 4
    assert decibels(audio) == pytest.approx(-23, abs=0.1), "the input must not be modified"


DRAWN = {
    "stretch": 0.9321,
    "rt60": 0.2083,
    "drr_db": 6.6245,
    "silence_before": 2.4876,
    "color": 0.0,
    "snr_db": 33.7862,
    "level": -29.6342,
}


def test_augment_draws_same_numbers_for_same_seed():
    """The corpus of the shipped model depends on them."""
    _, drawn = augment.augment(0.1 * tone(200, 0.2), RATE, [25, 0])
    assert drawn == DRAWN


def test_augment_draws_from_ranges_with_given_chances():
    settings = augment.Augmentation()
    audio = 0.1 * tone(200, 0.2)
    draws = []
    for seed in range(300):
        sound, drawn = augment.augment(audio, RATE, seed)
        draws.append(drawn)
        assert sound.dtype == np.float32
        silences = drawn.get("silence_before", 0) + drawn.get("silence_after", 0)
        assert len(sound) == pytest.approx(len(audio) / drawn["stretch"] + silences * RATE, abs=3)
        assert np.abs(sound).max() <= 0.98 + 1e-6
        if np.abs(sound).max() < 0.979:
            assert decibels(sound) == pytest.approx(drawn["level"], abs=0.01)
        assert drawn.get("codec", "telephone").split()[0] in augment.CODECS
    for name in ("stretch", "rt60", "drr_db", "snr_db", "low_cut", "high_cut", "clip_db", "level"):
        low, high = getattr(settings, name)
        values = [drawn[name] for drawn in draws if name in drawn]
        assert low <= min(values) < low + 0.15 * (high - low), name
        assert high >= max(values) > high - 0.15 * (high - low), name
    assert {drawn["color"] for drawn in draws if "color" in drawn} == set(settings.colors)
    for chance, names in {
        0.4: ("rt60", "drr_db"),
        0.7: ("snr_db", "color"),
        0.2: ("low_cut", "high_cut", "silence_before", "silence_after"),
        0.1: ("clip_db",),
        0.3: ("codec",),
        0.35: ("swell",),
    }.items():
        for name in names:
            assert sum(name in drawn for drawn in draws) / 300 == pytest.approx(chance, abs=0.09), name


def test_augment_with_level_only():
    audio = 0.3 * tone(200, 0.5)
    sound, drawn = augment.augment(audio, RATE, 0, PLAIN)
    assert drawn == {"stretch": 1.0, "level": -20.0}
    np.testing.assert_allclose(sound, audio * 10 ** (-20 / 20) / np.sqrt(0.045), rtol=1e-4, atol=1e-7)


def test_augment_adds_noise_at_snr():
    settings = augment.Augmentation(**{**vars(PLAIN), "noise_chance": 1, "snr_db": (12.0, 12.0), "colors": (0.0,)})
    audio = 0.1 * tone(200, 2)
    sound, drawn = augment.augment(audio, RATE, 0, settings)
    assert drawn["snr_db"] == 12
    speech = audio * (sound @ audio) / (audio @ audio)
    assert decibels(speech) - decibels(sound - speech) == pytest.approx(12, abs=0.1)


def test_augment_adds_reverberation():
    settings = augment.Augmentation(**{**vars(PLAIN), "room_chance": 1, "rt60": (0.3, 0.3), "drr_db": (6.0, 6.0)})
    click = np.concatenate([silence(0.1), np.ones(1, np.float32), silence(0.5)])
    sound, _ = augment.augment(click, RATE, 0, settings)
    begin = round(0.1 * RATE)
    echo = sound / sound[begin]
    assert np.abs(echo[:begin]).max() < 1e-5
    assert 10 * np.log10(np.sum(echo[begin + 1 :] ** 2)) == pytest.approx(-6, abs=0.1)
    assert np.abs(echo[begin + round(0.3 * RATE) + 1 :]).max() < 1e-5


def test_augment_band_pass():
    settings = augment.Augmentation(
        **{**vars(PLAIN), "band_chance": 1, "low_cut": (300.0, 300.0), "high_cut": (3000.0, 3000.0)}
    )
    pitches = (75, 300, 1000, 3000, 6000)
    sound, _ = augment.augment(np.sum([0.1 * tone(hertz, 2) for hertz in pitches], axis=0), RATE, 0, settings)
    levels = {hertz: 20 * np.log10(amplitude(sound, hertz) / amplitude(sound, 1000)) for hertz in pitches}
    # Half the power at the cuts; from there 12 dB an octave below and 24 dB above.
    assert levels[300] == pytest.approx(-3, abs=0.1)
    assert levels[3000] == pytest.approx(-3, abs=0.1)
    assert levels[75] == pytest.approx(-24, abs=0.3)
    assert levels[6000] == pytest.approx(-24, abs=0.3)


def test_augment_adds_silence_before_and_after():
    settings = replace(PLAIN, silence_chance=1, silence=(0.5, 0.5))
    audio = 0.1 * tone(200, 1)
    sound, drawn = augment.augment(audio, RATE, 0, settings)
    assert drawn["silence_before"] == drawn["silence_after"] == 0.5
    assert not sound[: RATE // 2].any()
    assert not sound[-RATE // 2 :].any()
    np.testing.assert_allclose(sound[RATE // 2 : -RATE // 2], audio * sound[9000] / audio[1000], atol=1e-6)
    assert len(augment.augment(audio, RATE, 0, replace(settings, max_seconds=1.75))[0]) == 1.75 * RATE
    assert len(augment.augment(audio, RATE, 0, replace(settings, max_seconds=0.5))[0]) == RATE


def test_augment_noise_is_louder_and_softer():
    """In silence, where there is nothing else; its RMS relative to the speech is as drawn."""
    settings = replace(PLAIN, silence_chance=1, silence=(3.0, 3.0), noise_chance=1, snr_db=(6.0, 6.0), colors=(0.0,))
    levels = {}
    for chance in (0, 1):
        sound, drawn = augment.augment(0.1 * tone(200, 3), RATE, 3, replace(settings, swell_chance=chance))
        assert ("swell" in drawn) == (chance == 1)
        pieces = sound[: 3 * RATE].reshape(-1, RATE // 10)
        levels[chance] = np.std(10 * np.log10(np.mean(pieces**2, axis=1)))
    assert levels[0] < 0.5
    assert levels[1] > 2
    swelling = augment.swell(
        np.random.default_rng(0), augment.colored_noise(np.random.default_rng(1), RATE, RATE, 0), RATE
    )
    assert decibels(swelling) == pytest.approx(0, abs=1e-3)


def test_augment_clips():
    settings = replace(PLAIN, clip_chance=1, clip_db=(6.0, 6.0))
    sound, _ = augment.augment(0.1 * tone(200, 1), RATE, 0, settings)
    # Of a sine clipped at half its height, two thirds of the time are at the limit.
    assert np.mean(np.abs(sound) > 0.999 * np.abs(sound).max()) == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize(
    ("name", "bit_rate"),
    [(name, rate) for name, codec in augment.CODECS.items() for rate in codec.bit_rates or (None,)],
)
def test_through_codec_keeps_time_and_speech_band(name: str, bit_rate: int | None):
    codec = augment.CODECS[name]
    pitches = (500.0, 1100.0, 2300.0, 6000.0)
    envelope = np.interp(
        np.arange(RATE), np.arange(0, RATE, 800), np.random.default_rng(0).uniform(0.2, 1, RATE // 800)
    )
    audio = (envelope * np.sum([0.1 * tone(hertz, 1) for hertz in pitches], axis=0)).astype(np.float32)
    sound = augment.through_codec(audio, RATE, codec, bit_rate)
    assert (sound.shape, sound.dtype) == (audio.shape, np.float32)
    for hertz in pitches[:3]:
        assert amplitude(sound, hertz) == pytest.approx(amplitude(audio, hertz), rel=0.35)
    if codec.sample_rate == 8000:
        assert amplitude(sound, 6000) < 0.01 * amplitude(audio, 6000)
    delay = np.correlate(sound, audio, "full").argmax() - (len(audio) - 1)
    assert abs(delay) <= 8
    assert not np.array_equal(sound, audio)


def test_augment_draws_codecs():
    settings = replace(PLAIN, codec_chance=1)
    drawn = {str(augment.augment(0.1 * tone(200, 0.3), RATE, seed, settings)[1]["codec"]) for seed in range(60)}
    assert {name.split()[0] for name in drawn} == set(augment.CODECS)
    assert {name for name in drawn if name.startswith("voip")} == {
        f"voip {rate}" for rate in augment.CODECS["voip"].bit_rates
    }


@pytest.mark.parametrize("samples", [0, 100])
def test_augment_rejects_silence(samples: int):
    with pytest.raises(SynthesisError, match=f"expected sound to augment, found {samples} samples of silence"):
        augment.augment(np.zeros(samples, np.float32), RATE, 0)
