"""Curves over seeds, and drawings of sounds and features."""

import re

import numpy as np
import pytest

from tests.example_run import wav
from uml_fast.report.charts import curve_over_seeds, values_svg, waveform_svg


def test_curve_is_mean_and_range_over_seeds():
    records = [
        {"mode": mode, "seed": seed, "step": step, "loss": 10.0 * step + seed}
        for mode in ("unimodal", "uml") for seed in (0, 1, 5) for step in (1, 2)
    ]  # fmt: skip
    c = curve_over_seeds(records, "uml", lambda r: r["loss"])
    assert c.steps.tolist() == [1, 2]
    assert (c.mean.tolist(), c.low.tolist(), c.high.tolist()) == ([12, 22], [10, 20], [15, 25])
    assert curve_over_seeds(records, "uml", lambda r: r.get("val")) is None


def test_a_lone_long_seed_does_not_bend_the_mean():
    records = [{"mode": "uml", "seed": s, "step": 1, "loss": 1.0} for s in (0, 1, 2)]
    records.append({"mode": "uml", "seed": 2, "step": 2, "loss": 50.0})
    assert curve_over_seeds(records, "uml", lambda r: r["loss"]).steps.tolist() == [1]


def test_long_curves_are_averaged_in_blocks():
    records = [{"mode": "uml", "seed": 0, "step": i, "loss": float(i % 2)} for i in range(16_000)]
    c = curve_over_seeds(records, "uml", lambda r: r["loss"])
    assert len(c.steps) == 160
    assert np.allclose(c.mean, 0.5)


def test_waveform_shows_the_envelope():
    def heights(samples):
        path = re.search(r'd="([^"]*)"', waveform_svg(wav(samples))).group(1)
        return [float(b) - float(a) for a, b in re.findall(r"M\S+ (\S+?)V([\d.]+)", path)]

    loud_then_quiet = np.repeat([20_000, 200], 4000) * np.tile([1, -1], 4000)
    h = heights(loud_then_quiet.astype("<i2"))
    assert h[0] > 40 and h[-1] < 2


def test_waveform_refuses_other_sample_widths():
    with pytest.raises(ValueError, match="8-bit samples"):
        waveform_svg(wav(np.zeros(8, np.uint8), width=1))


def test_vectors_become_a_map_and_a_series_a_line():
    assert values_svg([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]]).count("<rect") == 6
    assert 'fill="var(--unimodal)" fill-opacity="0.50"' in values_svg([[1.0, -1.0], [0.0, 2.0]])
    assert "polyline" in values_svg([[1.0], [2.0], [0.0]])
