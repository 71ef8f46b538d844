"""Sounds become shards: rates, channels, broken files, statistics."""

from __future__ import annotations

import io

import numpy as np
import pytest

from tests.data.made_files import ALL, SKIP, problems, run, samples, sound, soundfile, write
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.source import DataError


class TestAudio:
    def test_bytes_stay_where_rate_and_channels_fit(self, tmp_path):
        for i, form in enumerate(("WAV", "FLAC", "OGG")):
            write(tmp_path / "in" / "k" / f"{i}.{form.lower()}", sound(i, form=form))
        made = run("audio", tmp_path / "in", tmp_path / "out", *ALL)
        assert made["sample_rate"] == 8000 and made["notes"] == {}
        for key, (payload, _) in samples(tmp_path / "out").items():
            assert payload in [p.read_bytes() for p in (tmp_path / "in").glob(f"{key}.*")]
        with ShardSet.open(tmp_path / "out") as s:
            assert s.length.tolist() == [[400]] * 3

    def test_stereo_is_mixed_down_and_counted(self, tmp_path):
        write(tmp_path / "in" / "k" / "a.wav", sound(0, channels=2))
        made = run("audio", tmp_path / "in", tmp_path / "out", *ALL)
        assert made["notes"] == {"stereo mixed down": 1, "stored as flac": 1}
        ((payload, _),) = samples(tmp_path / "out").values()
        got, rate = soundfile.read(io.BytesIO(payload))
        both, _ = soundfile.read(io.BytesIO(sound(0, channels=2)))
        np.testing.assert_allclose(got, both.mean(1), atol=2 / 32768)
        assert rate == 8000

    def test_a_wrong_rate_is_refused_and_resampled_when_asked(self, tmp_path):
        for i in range(3):
            write(tmp_path / "in" / "k" / f"{i}.wav", sound(i))
        t = np.arange(4410) / 44100
        file = io.BytesIO()
        soundfile.write(file, 0.5 * np.sin(2 * np.pi * 440 * t), 44100, format="FLAC")
        write(tmp_path / "in" / "k" / "tone.flac", file.getvalue())
        with pytest.raises(DataError, match=r"tone\.flac: wrong sample rate \(44100 Hz.*8000 Hz"):
            run("audio", tmp_path / "in", tmp_path / "out")
        rate = ("--sample-rate", "8000")
        made = run("audio", tmp_path / "in", tmp_path / "out2", *ALL, *rate)
        assert made["notes"]["resampled from 44100 Hz"] == 1 and made["sample_rate"] == 8000
        got, _ = soundfile.read(io.BytesIO(samples(tmp_path / "out2")["k/tone"][0]))
        assert len(got) == 800
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(800) / 8000)
        assert np.abs(got - expected)[50:-50].max() < 2e-3

    def test_bad_sounds_are_named_and_skipped(self, tmp_path):
        source = tmp_path / "in"
        for i in range(2):
            write(source / "k" / f"{i}.wav", sound(i))
        for form in ("WAV", "FLAC", "OGG"):
            whole = sound(5, 20_000, form=form)
            write(source / "k" / f"cut_{form}.{form.lower()}", whole[: len(whole) // 2])
        write(source / "k" / "noise.wav", b"RIFF" + bytes(100))
        write(source / "k" / "zero.ogg", b"")
        write(source / "k" / "silent.wav", sound(0, 0))
        odd = bytearray(sound(0))
        odd[24:28] = (123_456_789).to_bytes(4, "little")
        write(source / "k" / "rate.wav", bytes(odd))
        nan = io.BytesIO()
        soundfile.write(nan, np.array([0.0, np.nan]), 8000, format="WAV", subtype="FLOAT")
        write(source / "k" / "nan.wav", nan.getvalue())
        made = run("audio", source, tmp_path / "out", *ALL, *SKIP)
        found = problems(tmp_path / "out")
        assert made["splits"]["train"]["samples"] == 2
        assert {k: v for k, v in found.items() if "cut" not in k} == {
            "k/noise.wav": "broken sound", "k/zero.ogg": "empty file",
            "k/rate.wav": "wrong sample rate", "k/silent.wav": "empty sound",
            "k/nan.wav": "not finite",
        }  # fmt: skip
        cut = {v for k, v in found.items() if "cut" in k}
        assert len(found) == 8 and cut <= {"truncated sound", "broken sound"}

    def test_statistics_are_peak_and_rms(self, tmp_path):
        for i in range(6):
            write(tmp_path / "in" / "k" / f"{i}.flac", sound(i, 100 + i, form="FLAC"))
        made = run("audio", tmp_path / "in", tmp_path / "out", *ALL)
        x = np.concatenate(
            [soundfile.read(io.BytesIO(p))[0] for p, _ in samples(tmp_path / "out").values()]
        )
        assert made["normalisation"]["peak"] == pytest.approx(np.abs(x).max(), rel=1e-6)
        assert made["normalisation"]["rms"] == pytest.approx(np.sqrt((x**2).mean()), rel=1e-6)
