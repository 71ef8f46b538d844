"""Log-mel features against the float64 reference, formulas written out in numpy, and librosa."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.numerics import assert_equal, assert_matches
from uml_fast.kernels.log_mel import hann, log_mel, mel_filters, windowed_dft

BF16, FP32 = torch.bfloat16, torch.float32
NATIVE = pytest.param("native", marks=pytest.mark.native)
TRITON = pytest.param("triton", marks=pytest.mark.triton)
BACKENDS = [NATIVE, TRITON, "reference"]
# window -> (row samples, frames): the default; powers of two; every radix and several of one; a
# prime above the radices, alone, twice and squared; odd windows, which have no pairs; the least
# window, and one that reaches a whole row ahead.
WINDOWS = {
    400: (640, 4), 512: (512, 2), 32: (32, 2), 420: (240, 1), 98: (98, 1), 54: (30, 1),
    22: (24, 2), 242: (140, 1), 89: (60, 2), 105: (80, 1), 1: (3, 3), 2: (4, 2), 48: (32, 2),
}  # fmt: skip


def arguments(
    rows: int = 5, row_samples: int = 640, frames: int = 4, window: int = 400, mels: int = 10,
    is_int16: bool = True,
) -> dict[str, Any]:  # fmt: skip
    samples = torch.randn(rows, row_samples) * 10 ** (-3 * torch.rand(rows, 1)) / 4
    return {
        "samples": (samples * 32767).clamp(-32768, 32767).short() if is_int16 else samples,
        "continues": torch.arange(rows) % 3 != 2,
        "frames": frames,
        "window": window,
        "mels": mels,
    }


@pytest.mark.parametrize("is_int16", [True, False], ids=["int16", "fp32"])
@pytest.mark.parametrize("window", WINDOWS)
def test_matches(instruction_set: str, window: int, is_int16: bool) -> None:
    # more frames than lanes of any instruction set, and a part of a group
    inputs = arguments(23, *WINDOWS[window], window, 9, is_int16)
    statistics = {"mean": torch.randn(9), "deviation": torch.rand(9) + 0.5}
    op, reference = (functools.partial(log_mel, backend=b) for b in ("native", "reference"))
    assert_matches(op, reference, inputs | statistics, ())


@pytest.mark.parametrize("backend", [NATIVE, TRITON])
@pytest.mark.parametrize("mels", [1, 17, 130])
def test_any_number_of_bands(backend: str, mels: int) -> None:
    inputs = arguments(3, 64, 2, 64, mels)
    statistics = {"mean": torch.randn(mels), "deviation": torch.rand(mels) + 0.5}
    op, reference = (functools.partial(log_mel, backend=b) for b in (backend, "reference"))
    assert_matches(op, reference, inputs | statistics, ())


def edges_in_hertz(bands: int, scale: str) -> np.ndarray:
    """Lower edge, centres and upper edge of bands to 8 kHz."""
    if scale == "htk":
        top = 2595 * np.log10(1 + 8000 / 700)
        return np.array([700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, top, bands + 2)])
    top = 15 + 27 * np.log(8) / np.log(6.4)
    mels = np.linspace(0, top, bands + 2)
    return np.array([200 * m / 3 if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in mels])


def written_out(waveform: np.ndarray, frames: int, scale: str, norm: str | None) -> np.ndarray:
    """Log-mel of one sound at 16 kHz, window 400, hop 160, 12 bands, by numpy's FFT."""
    padded = np.concatenate((waveform / 32768, np.zeros(400)))
    window = np.sin(np.pi * np.arange(400) / 400) ** 2
    edges, hertz = edges_in_hertz(12, scale), np.arange(201) * 40.0
    out = np.empty((frames, 12))
    for frame in range(frames):
        power = np.abs(np.fft.rfft(window * padded[160 * frame : 160 * frame + 400])) ** 2
        for band in range(12):
            low, centre, high = edges[band : band + 3]
            triangle = np.interp(hertz, [low, centre, high], [0, 1, 0])
            height = 2 / (high - low) if norm == "slaney" else 1
            out[frame, band] = np.log(height * triangle @ power / 100**2 + 1e-6)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("scale", "norm"), [("htk", None), ("htk", "slaney"), ("slaney", None), ("slaney", "slaney")]
)
def test_agrees_with_the_formulas(backend: str, scale: str, norm: str | None) -> None:
    inputs = arguments(6, mels=12) | {"mel_scale": scale, "norm": norm}
    mean, deviation = torch.randn(12), torch.rand(12) + 0.5
    got = log_mel(**inputs, mean=mean, deviation=deviation, backend=backend)
    sounds = inputs["samples"].numpy().reshape(2, 3 * 640)
    want = np.concatenate([written_out(sound, 12, scale, norm) for sound in sounds])
    want = torch.from_numpy((want - mean.numpy()) / deviation.numpy())
    torch.testing.assert_close(got.view(24, 12).double(), want, atol=3e-5, rtol=0)


def tones() -> Tensor:
    """440 Hz and a chirp, int16 (5, 640); its values do not depend on a library's generator."""
    t = np.arange(5 * 640)
    wave = 12000 * np.sin(2 * np.pi * 440 * t / 16000)
    wave += 6000 * np.sin(2 * np.pi * 1234.5 * t / 16000 * (1 + t / 9600))
    return torch.from_numpy(wave.round().astype(np.int16).reshape(5, 640))


# librosa 0.11.0 in float64: filters.mel(sr, n_fft, n_mels, htk, norm)[band, bin], and their sum.
LIBROSA_FILTERS = {
    (16000, 400, 40, "htk", None): (
        192.91728066345416, {(0, 1): 0.9014272001903754, (20, 46): 0.9682977384829933,
                             (39, 187): 0.9971902602180064},
    ),
    (16000, 400, 80, "slaney", "slaney"): (
        1.9990241029178577, {(0, 1): 0.024862593984176087, (40, 43): 0.01473556574143909,
                             (79, 192): 0.003164711739176461},
    ),
    (22050, 512, 23, "slaney", None): (
        237.30951440356216, {(0, 3): 0.9319007163597258, (11, 46): 0.993885007631248,
                             (22, 222): 0.9968978840481545},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LIBROSA_FILTERS, ids=str)
def test_filters_of_librosa(case: tuple) -> None:
    total, values = LIBROSA_FILTERS[case]
    filters = mel_filters(*case)
    assert filters.sum().item() == pytest.approx(total, rel=1e-13)
    for (band, bin), value in values.items():
        assert filters[bin, band].item() == pytest.approx(value, rel=1e-11)


# librosa 0.11.0 in float64: log(feature.melspectrogram(y=tones / 32768 and silence, n_fft=400,
# hop_length=160, center=False, ...) * (4 / 400)**2 + 1e-6)[band, frame] by (frame, band).
LIBROSA_LOG_MEL = {
    (40, "htk", None): {
        (0, 7): -1.871416, (7, 7): -1.871427, (7, 20): -12.899083, (13, 13): -13.815419,
        (18, 7): -1.927231, (19, 7): -3.902124, (19, 39): -12.278457,
    },
    (80, "slaney", "slaney"): {
        (0, 11): -5.796801, (7, 11): -5.796812, (7, 40): -13.428510, (13, 26): -13.815509,
        (18, 11): -5.888032, (19, 11): -8.090369, (19, 79): -13.808410,
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LIBROSA_LOG_MEL, ids=str)
def test_log_mel_of_librosa(backend: str, case: tuple) -> None:
    mels, mel_scale, norm = case
    got = log_mel(
        tones(), torch.ones(5, dtype=torch.bool), frames=4, window=400, mels=mels,
        mel_scale=mel_scale, norm=norm, backend=backend,
    ).view(20, mels)  # fmt: skip
    for (frame, band), value in LIBROSA_LOG_MEL[case].items():
        assert got[frame, band].item() == pytest.approx(value, abs=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sound_depends_on_itself_alone(backend: str) -> None:
    inputs = arguments(6)
    alone = inputs | {"samples": inputs["samples"][:3], "continues": inputs["continues"][:3]}
    together = log_mel(**inputs, backend=backend)
    assert torch.equal(together[:3], log_mel(**alone, backend=backend))
    # the last row's flag has no row to point at
    alone["continues"] = torch.ones(3, dtype=torch.bool)
    assert torch.equal(together[:3], log_mel(**alone, backend=backend))
    # and the last frames of a row do reach into the next
    cut = inputs | {"continues": torch.zeros(6, dtype=torch.bool)}
    differs = (together != log_mel(**cut, backend=backend)).view(6, 4, 10).any(-1)
    # frames of 400 samples start at 0, 160, 320 and 480 of 640
    assert differs.tolist() == [[False, False, goes, goes] for goes in [True, True, False] * 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_silence_is_the_floor(backend: str) -> None:
    inputs = arguments(2) | {"samples": torch.zeros(2, 640).short(), "floor": 1e-4}
    got = log_mel(**inputs, backend=backend)
    torch.testing.assert_close(got, torch.full((2, 40), np.log(1e-4)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_makes_its_frames_nan(backend: str, value: float) -> None:
    inputs = arguments(4, is_int16=False)
    inputs["continues"] = torch.tensor([True, True, False, True])
    # in frames [480, 880) of row 0 and [0, 400), [160, 560) of row 1; and the first of row 3
    inputs["samples"][1, 200] = inputs["samples"][3, 0] = value
    got = log_mel(**inputs, backend=backend).view(4, 4, 10)
    bad = torch.zeros(4, 4, dtype=torch.bool)
    bad[0, 3] = bad[1, 0] = bad[1, 1] = bad[3, 0] = True
    assert torch.equal(got.isnan().all(-1), bad)
    assert torch.equal(got.isfinite().all(-1), ~bad)


def test_rounds_once_to_bf16(instruction_set: str) -> None:
    got = log_mel(**(inputs := arguments(5)), dtype=BF16, backend="native")
    assert torch.equal(got, log_mel(**inputs, backend="native").bfloat16())


@pytest.mark.native
def test_threads_give_the_same_bits(two_threads: None) -> None:
    inputs = arguments(200)
    two = log_mel(**inputs, backend="native")
    torch.set_num_threads(1)
    assert torch.equal(two, log_mel(**inputs, backend="native"))


def test_the_dft_is_the_dft() -> None:
    frame = torch.randn(89, dtype=torch.float64)
    want = torch.fft.rfft(hann(89) * frame)
    real, imaginary = (frame @ windowed_dft(89)).chunk(2)
    torch.testing.assert_close(torch.complex(real, imaginary), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    assert log_mel(**arguments(0), backend=backend).shape == (0, 40)


def test_compiled_and_opcheck() -> None:
    inputs = arguments(3)
    compiled = torch.compile(log_mel, fullgraph=True, backend="aot_eager")
    assert_equal([("", compiled(**inputs))], [("", log_mel(**inputs))])
    statistics = torch.zeros(10), torch.ones(10)
    torch.library.opcheck(
        torch.ops.uml_fast.log_mel.default,
        (inputs["samples"], inputs["continues"], *statistics, 4, 400, 16000, 10, "htk", None, 1e-6,
         BF16),
    )  # fmt: skip


STATISTICS = {"mean": torch.zeros(10), "deviation": torch.ones(10)}
ZERO = torch.tensor([1.0, 0.0] * 5)
BAD = {
    "samples dtype": ({"samples": torch.ones(5, 640).int()}, TypeError, "samples are torch.int32"),
    "samples 1-D": ({"samples": torch.ones(640)}, ValueError, r"must be \[rows, samples\]"),
    "strides": ({"samples": torch.ones(640, 5).t()}, ValueError, "samples has strides"),
    "gradient": (
        {"samples": torch.ones(5, 640, requires_grad=True)}, ValueError, "require a gradient",
    ),
    "continues dtype": ({"continues": torch.ones(5)}, TypeError, "continues is torch.float32"),
    "continues rows": ({"continues": torch.ones(4).bool()}, ValueError, r"it must be \[5\]"),
    "frames": ({"frames": 3}, ValueError, "do not divide into 3 frames"),
    "no frames": ({"frames": 0}, ValueError, "do not divide into 0 frames"),
    "window below hop": ({"window": 159}, ValueError, r"must lie in 160\.\.800"),
    "window above": ({"window": 801}, ValueError, r"window is 801; it must lie in 160\.\.800"),
    "rate": ({"sample_rate": 0}, ValueError, "sample_rate 0 and mels 10"),
    "mels": ({"mels": 0}, ValueError, "mels 0 must be at least 1"),
    "scale": ({"mel_scale": "bark"}, ValueError, "'bark'; it must be 'htk' or 'slaney'"),
    "norm": ({"norm": "area"}, ValueError, "norm is 'area'"),
    "floor": ({"floor": 0.0}, ValueError, "floor is 0.0; it must be positive"),
    "floor NaN": ({"floor": float("nan")}, ValueError, "floor is nan"),
    "dtype": ({"dtype": torch.int16}, TypeError, "dtype is torch.int16"),
    "mean alone": ({"mean": torch.zeros(10)}, ValueError, "given together"),
    "mean dtype": (STATISTICS | {"mean": torch.zeros(10).int()}, TypeError, "mean is torch.int32"),
    "deviation shape": (
        STATISTICS | {"deviation": torch.ones(9)}, ValueError, r"deviation is \[9\]",
    ),
    "deviation strides": (
        STATISTICS | {"deviation": torch.ones(20)[::2]}, ValueError, "deviation has strides",
    ),
    "zero deviation": (
        STATISTICS | {"deviation": ZERO}, ValueError, r"deviation\[1\] is 0.0; it must be above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        log_mel(**arguments() | change, backend=backend)
