"""Synthesised speech: what differs where it should, and the cache."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="pip install espeakng-loader")

from uml_fast.data import speech
from uml_fast.data.speech import SpeechError, Voice, spoken, synthesise


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "uml_fast"


def test_more_words_take_longer_and_a_faster_voice_takes_less():
    short = synthesise("four", Voice())
    long = synthesise("thirty four", Voice())
    fast = synthesise("thirty four", Voice(words_per_minute=300))
    assert long.dtype == np.int16 and long.ndim == 1
    assert len(long) > 1.3 * len(short)
    assert len(fast) < 0.9 * len(long)


def test_sample_rate_is_honoured():
    at_16k, at_8k = (synthesise("seven", Voice(), rate) for rate in (16000, 8000))
    assert abs(len(at_16k) - 2 * len(at_8k)) < 400
    assert 0.1 < len(at_16k) / 16000 < 1.0


def test_silence_is_cut_and_speech_is_loud():
    wave = synthesise("nine", Voice())
    assert abs(int(wave[0])) > 0 and abs(int(wave[-1])) > 0
    assert np.abs(wave.astype(int)).max() > 5000


def test_pitch_moves_the_fundamental():
    def fundamental(pitch):
        wave = synthesise("oh", Voice(pitch=pitch)).astype(float)
        middle = wave[len(wave) // 3 : 2 * len(wave) // 3]
        lags = np.correlate(middle, middle, "full")[len(middle) - 1 :]
        return 16000 / (40 + lags[40:300].argmax())

    assert fundamental(90) > 1.1 * fundamental(10)


def test_equal_requests_give_equal_samples_without_the_cache(cache):
    texts, voices = ["five", "five"], [Voice(name="en-us+f2", pitch=60), Voice(name="en-us+m1")]
    first = spoken(texts, voices)
    next(cache.glob("*.npz")).unlink()
    synthesise("seven", Voice())
    second = spoken(texts, voices)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_second_call_reads_the_cache(cache, monkeypatch):
    texts, voices = ["one", "twenty two"], [Voice(), Voice(name="en-us+m3")]
    first = spoken(texts, voices)
    assert len(list(cache.glob("speech-*.npz"))) == 1 and not list(cache.glob("*.tmp"))
    monkeypatch.setattr(speech.subprocess, "run", lambda *a, **k: pytest.fail("said it again"))
    second = spoken(texts, voices)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_parameters_get_other_files(cache):
    spoken(["one"], [Voice()])
    spoken(["one"], [Voice(pitch=60)])
    spoken(["one"], [Voice()], 8000)
    assert len(list(cache.glob("speech-*.npz"))) == 3


@pytest.mark.parametrize("keep", [0, 40, 200])
def test_a_damaged_cache_is_made_again(cache, keep):
    first = spoken(["one"], [Voice()])[0]
    path = next(cache.glob("*.npz"))
    path.write_bytes(path.read_bytes()[:keep])
    assert np.array_equal(first, spoken(["one"], [Voice()])[0])
    assert path.stat().st_size > 1000


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(spoken(["one"], [Voice()])[0]) > 1000


def test_bad_requests_are_named():
    with pytest.raises(SpeechError, match="no-such-voice"):
        synthesise("one", Voice(name="no-such-voice"))
    with pytest.raises(SpeechError, match="no-such-voice"):
        spoken(["one"], [Voice(name="no-such-voice")])
    with pytest.raises(SpeechError, match="says nothing"):
        synthesise("", Voice())
    with pytest.raises(SpeechError, match="words_per_minute"):
        Voice(words_per_minute=10)
    with pytest.raises(ValueError, match="2 texts but 1 voices"):
        spoken(["one", "two"], [Voice()])


def test_a_missing_package_names_the_pip_line():
    code = (
        "import sys; sys.modules['espeakng_loader'] = None\n"
        "from uml_fast.data.speech import Voice, synthesise\n"
        "synthesise('one', Voice())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError" in run.stderr and "pip install espeakng-loader" in run.stderr
