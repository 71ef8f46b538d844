"""The report and the terminal table of a run folder that the training code's own parts wrote."""

import base64
import io
import json
import math
import re
import struct
import sys
import wave
import zlib
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.datasets import load_digits

from uml_fast.analysis.statistics import mean_interval, paired_comparison
from uml_fast.log import RunFolderError, RunLog
from uml_fast.machine import machine_info
from uml_fast.report import ReportError, print_table, write_report
from uml_fast.report.charts import curve_over_seeds, values_svg, waveform_svg

STEPS = range(20, 601, 20)


def png(pixels: np.ndarray) -> str:
    """Grey image as a base64 PNG file."""
    height, width = pixels.shape

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    lines = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    file += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


def wav(samples: np.ndarray, width: int = 2) -> str:
    """Mono sound as a base64 WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(width)
        out.setframerate(8000)
        out.writeframes(samples.tobytes())
    return base64.b64encode(file.getvalue()).decode()


def log_training(folder, seeds, target):
    """Learning curves of two modes: noisy decay of losses, a rise of the validation accuracy."""
    with RunLog(folder, stream=io.StringIO()) as log:
        for seed in range(seeds):
            for mode, names in (("unimodal", [target]), ("uml", [target, "speech", "text"])):
                rng = np.random.default_rng([seed, len(names)])
                log.begin(mode, seed)
                for step in STEPS:
                    fall = math.exp(-step / (240 if mode == "unimodal" else 150))
                    noise = rng.uniform(0.05, 0.2, len(names))
                    losses = {n: 2.3 * fall + 0.1 * i + noise[i] for i, n in enumerate(names)}
                    gain = 0.55 if mode == "unimodal" else 0.7
                    record = (
                        {"val": gain * (1 - fall) + rng.normal(0, 0.01)} if step % 60 == 0 else {}
                    )
                    log.write(
                        step, loss=sum(losses.values()), losses=losses, lr=1e-3 * (1 - step / 600),
                        grad_norm=1 + fall * rng.uniform(1, 3), samples_per_s=2_400.0,
                        tokens_per_s=rng.normal(52_000, 2_500), mfu=0.31, fill_pct=97.6,
                        stall_pct=rng.uniform(0, 1), **record,
                    )  # fmt: skip


def compare(results, metric, shots=None):
    of = {
        mode: [r[metric] for r in results if r["mode"] == mode and r["shots"] == shots]
        for mode in ("unimodal", "uml")
    }
    row = paired_comparison(of["unimodal"], of["uml"], lower_is_better=metric == "error")
    return {"shots": shots, "metric": metric, **asdict(row)}


def make_run(folder, *, metric="head", seeds=5, gain=0.12, shots=(None,), curves=True):
    """Write a finished run, with or without its metrics.jsonl, and return its summary."""
    target = "image"
    rng = np.random.default_rng(0)
    results = []
    for k in shots:
        for seed in range(seeds):
            level = rng.normal(0.55, 0.04) + 0.03 * (k or 0)
            for mode, value in (("unimodal", level), ("uml", level + gain + rng.normal(0, 0.015))):
                result = {
                    "mode": mode,
                    "seed": seed,
                    "shots": k,
                    "probe": None,
                    "head": None,
                    "error": None,
                }
                results.append({**result, metric: value})
    i = mean_interval([0.62, 0.6, 0.63, 0.61, 0.62])
    info = machine_info()
    summary = {
        "recipe": "digits", "target": target, "metric": metric, "machine": info["machine"],
        "versions": info["versions"], "commit": info["commit"], "results": results,
        "comparison": [compare(results, metric, k) for k in shots],
        "baselines": [{"name": "nearest neighbour", "mean": i.mean, "ci95_low": i.ci95_low,
                       "ci95_high": i.ci95_high, "n": i.n}],
        "throughput": {"tokens_per_s": 52_340.0, "samples_per_s": 2_410.0, "mfu": 0.312,
                       "mfu_datasheet": None, "stall_pct": 0.42, "fill_pct": 97.6, "recompiles": 0,
                       "stages": {"read": 38.0, "assemble": 22.0, "step": 99.4}},
        "theory": [{"name": "Theorem 1", "statement": "variance < with Y", "assumed": True,
                    "holds": True, "holds_schur": None, "quantities": [["gap", 0.01234]]},
                   {"name": "Corollary 2", "statement": "infinite to finite", "assumed": True,
                    "holds": False, "holds_schur": False, "quantities": []}],
    }  # fmt: skip
    config = {
        "class": "uml_fast.config:RunConfig", "recipe": "digits", "target": target,
        "metric": metric, "steps": 600,
        "modalities": [{"class": "a:ImageConfig", "name": "image", "share": 1.0}],
        "optim": {"class": "uml_fast.config:OptimConfig", "lr": 0.001, "betas": [0.9, 0.999]},
    }  # fmt: skip
    if curves:
        log_training(folder, seeds, target)
    digits = load_digits().images[:4] / 16 * 255
    time = np.arange(3200) / 8000
    word = np.sin(1400 * time) * np.sin(np.pi * time / 0.4) ** 2 * (1 + 0.5 * np.sin(60 * time))
    sound = wav((word * 9000).astype("<i2"))
    long = (
        "a bar & a <slanted> stroke that runs from its right end down to the left, "
        "sometimes crossed in the middle"
    )
    walk = np.cumsum(rng.normal(size=(40, 6)), 0).round(2).tolist()
    samples = [
        *({"modality": "image", "kind": "image", "caption": str(i), "png": png(d)}
          for i, d in enumerate(digits)),
        *({"modality": "speech", "kind": "audio", "caption": c, "wav": sound}
          for c in ("three", "seven")),
        {"modality": "text", "kind": "text", "caption": "three", "text": "two open bows"},
        {"modality": "text", "kind": "text", "caption": "seven", "text": long},
        {"modality": "motion", "kind": "features", "caption": "", "values": walk},
        {"modality": "motion", "kind": "features", "values": np.sin(time[:90] * 500).tolist()},
    ]  # fmt: skip
    run = {"config": config, "started": "2026-01-05T10:00:00+0000", **info}
    for name, content in (("run", run), ("summary", summary), ("samples", samples)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return summary


class Page(HTMLParser):
    """Text, headings, addresses and open tags of a page."""

    VOID = frozenset(("meta", "img", "br", "line", "circle", "rect", "path", "use", "polyline"))

    def __init__(self, text):
        super().__init__()
        self.text, self.addresses, self.tags, self.open, self.crossed = [], [], [], [], []
        self.feed(text)
        self.all_text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module", autouse=True)
def no_events():
    """Without TensorBoard, which the report does not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder, summary and page of one finished run."""
    folder = tmp_path_factory.mktemp("run")
    summary = make_run(folder)
    path = write_report(folder)
    assert path == folder / "report.html"
    return folder, summary, path.read_text(encoding="utf-8")


class TestPage:
    def test_is_well_formed_and_needs_nothing_from_outside(self, finished):
        page = Page(finished[2])
        assert (page.open, page.crossed) == ([], [])
        assert "script" not in page.tags and "link" not in page.tags
        assert all(a.startswith(("data:", "#")) for a in page.addresses)
        assert not re.search(r"url\((?!#)|@import", finished[2])

    def test_headline_is_the_verdict(self, finished):
        _, summary, text = finished
        verdict = summary["comparison"][0]["verdict"]
        headline = re.search(r'<h1 class="better">(.*?)</h1>', text).group(1)
        said, _, evidence = verdict.replace(" %", "&nbsp;%").partition(" (")
        assert headline == f"{said} <span>{evidence.removesuffix(')')}</span>"
        assert said.startswith("UML is better by ")

    def test_comparison_and_baseline_stand_in_the_table(self, finished):
        page, c = Page(finished[2]), finished[1]["comparison"][0]
        low, high = 100 * c["ci95_low"], 100 * c["ci95_high"]
        means = [100 * c[k] for k in ("unimodal_mean", "uml_mean", "paired_diff_mean")]
        row = (
            "image {:.1f} {:.1f} {:+.1f}".format(*means)
            + f" {low:+.1f}..{high:+.1f} 5 UML is better"
        )
        assert row in page.all_text
        baseline = "nearest neighbour simple baseline 61.6 5 mean; its 95 % interval is 60.2..63.0"
        assert baseline in page.all_text

    def test_has_a_dot_for_every_seed(self, finished):
        chart = re.search(
            r'<svg role="img" aria-label="image: head accuracy in %".*?</svg>', finished[2], re.S
        )
        for mode in ("unimodal", "uml"):
            dots = re.findall(rf"<use [^>]*fill: var\(--{mode}\)", chart.group())
            assert len(dots) == 5
        assert "dashed: nearest neighbour 61.6" in finished[2]

    def test_curves_show_each_metric_in_the_modes_that_have_it(self, finished):
        def lines(title):
            svg = re.search(
                rf'<svg role="img" aria-label="{title}".*?</svg>', finished[2], re.S
            ).group()
            return [
                m
                for m in ("unimodal", "uml")
                if re.search(rf"fill: none; stroke: var\(--{m}\)", svg)
            ]

        assert lines("validation: head accuracy in %") == ["unimodal", "uml"]
        assert lines("loss of image") == ["unimodal", "uml"]
        assert lines("loss of speech") == ["uml"]
        assert lines("loss of text") == ["uml"]
        assert finished[2].index("loss of image") < finished[2].index("loss of speech")

    def test_throughput_and_stage_occupancy(self, finished):
        text = Page(finished[2]).all_text
        for shown in (
            "52,340 tokens a second",
            "31.2 % MFU",
            "0.42 % stall",
            "97.6 % fill",
            "0 recompiles",
        ):
            assert shown in text
        assert "datasheet" not in text
        assert "read 38 % assemble 22 % step 99 %" in text

    def test_samples_are_shown_and_escaped(self, finished):
        page = Page(finished[2])
        assert page.tags.count("img") == 4
        assert page.tags.count("audio") == 2
        assert "a bar & a <slanted> stroke" in page.all_text
        assert "<slanted>" not in finished[2]
        images = [a for a in page.addresses if a.startswith("data:image/png;base64,")]
        assert base64.b64decode(images[0].partition(",")[2]).startswith(b"\x89PNG")

    def test_configuration_machine_and_theory(self, finished):
        page = Page(finished[2])
        assert "optim OptimConfig optim.lr 0.001 optim.betas 0.9 , 0.999" in page.all_text.replace(
            ",", " ,"
        )
        assert "modalities.image.share" in page.all_text
        assert finished[1]["machine"]["cpu"] in page.all_text
        assert "Theorem 1 variance < with Y yes yes gap = 0.01234" in page.all_text
        assert "Corollary 2 infinite to finite yes no no" in page.all_text

    def test_charts_follow_the_page_colours(self, finished):
        assert not re.search(r"#0[1-5]0[1-5]0[1-5]", finished[2])
        assert "prefers-color-scheme: dark" in finished[2]

    def test_size_is_fit_for_mail(self, finished):
        assert len(finished[2]) < 1_500_000


class TestVerdicts:
    def test_worse_and_a_baseline_that_wins_are_said_first(self, tmp_path):
        make_run(tmp_path, curves=False, gain=-0.1)
        text = write_report(tmp_path).read_text()
        assert '<h1 class="worse">UML is worse by' in text
        assert re.search(
            r"</h1>\s*<p class=\"warning\">The baseline nearest neighbour \(61.6\) is better", text
        )

    def test_no_difference_has_no_colour(self, tmp_path):
        make_run(tmp_path, curves=False, gain=0.001)
        assert '<h1 class="">No difference shown <span>UML' in write_report(tmp_path).read_text()

    def test_one_seed_has_no_interval(self, tmp_path):
        summary = make_run(tmp_path, curves=False, seeds=1)
        assert '<h1 class="">One seed: no interval' in write_report(tmp_path).read_text()
        assert "one seed: no interval" in print_table(summary)

    def test_errors_are_better_when_lower(self, tmp_path):
        summary = make_run(tmp_path, curves=False, metric="error", gain=-0.2)
        page = write_report(tmp_path).read_text()
        assert '<h1 class="better">UML is better by 0.2' in page
        assert "lower is better" in page
        assert "baseline nearest neighbour" not in print_table(summary).partition("verdict")[2]

    def test_several_settings_are_counted(self, tmp_path):
        summary = make_run(tmp_path, curves=False, shots=(1, 2, 8))
        page = write_report(tmp_path).read_text()
        assert '<h1 class="better">UML is better in 3 of 3 settings</h1>' in page
        assert page.count('role="img" aria-label="8 shots: head') == 1
        assert "8 shots: UML is better" in print_table(summary)


class TestTable:
    def test_is_aligned_and_narrow(self, finished):
        lines = print_table(finished[1]).splitlines()
        head = next(line for line in lines if "unimodal" in line)
        row = next(line for line in lines if line.startswith("image "))
        baseline = next(line for line in lines if line.startswith("nearest neighbour"))
        assert all(len(line) <= 100 for line in lines)
        assert len(head) == len(row) == len(baseline)
        c = finished[1]["comparison"][0]
        end = head.index("unimodal") + len("unimodal")
        assert row[:end].endswith(f"{100 * c['unimodal_mean']:.1f}")
        assert baseline[:end].endswith("61.6")
        assert f"{100 * c['ci95_low']:+.1f}..{100 * c['ci95_high']:+.1f}" in row

    def test_ends_with_verdict_and_rates(self, finished):
        text = print_table(finished[1])
        assert finished[1]["comparison"][0]["verdict"] in text
        assert "tokens a second 52,340" in text
        assert "datasheet" not in text

    def test_without_pairs_says_so(self, finished):
        text = print_table({**finished[1], "comparison": []})
        assert "no comparison: a paired one needs both modes with the same seeds" in text


class TestPartialRuns:
    def test_a_running_run_shows_its_curves(self, tmp_path):
        make_run(tmp_path)
        (tmp_path / "summary.json").unlink()
        page = write_report(tmp_path).read_text()
        assert "The run has not finished" in page
        assert "loss of speech" in page

    def test_summary_alone_is_enough(self, tmp_path):
        make_run(tmp_path)
        for name in ("run.json", "samples.json", "metrics.jsonl"):
            (tmp_path / name).unlink()
        page = write_report(tmp_path).read_text()
        assert "UML is better" in page
        assert "Learning curves" not in page and "Samples" not in page

    def test_unimodal_alone_has_no_comparison(self, tmp_path):
        summary = make_run(tmp_path)
        (tmp_path / "summary.json").write_text(json.dumps({**summary, "comparison": []}))
        assert "No comparison" in write_report(tmp_path).read_text()


class TestErrors:
    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ReportError, match=f"{tmp_path} holds no run"):
            write_report(tmp_path)

    def test_a_damaged_file_is_named(self, tmp_path):
        make_run(tmp_path, curves=False)
        (tmp_path / "summary.json").write_text('{"recipe": ')
        with pytest.raises(ReportError, match=r"cannot read .*summary\.json"):
            write_report(tmp_path)

    @pytest.mark.parametrize(
        ("sample", "message"),
        [
            ({"modality": "m", "kind": "smell"}, "kind 'smell' is none of"),
            ({"modality": "m", "kind": "image"}, "KeyError"),
            ({"modality": "m", "kind": "image", "png": '"><script>'}, "sample 0 cannot be shown"),
            ({"modality": "m", "kind": "audio", "wav": base64.b64encode(b"noise").decode()}, "WAV"),
            ({"modality": "m", "kind": "features", "values": [[1.0], [2.0, 3.0]]}, "sample 0"),
        ],
    )
    def test_a_sample_that_cannot_be_shown_is_named(self, tmp_path, sample, message):
        make_run(tmp_path, curves=False)
        (tmp_path / "samples.json").write_text(json.dumps([sample]))
        with pytest.raises(ReportError, match=rf"samples\.json.*{message}"):
            write_report(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        make_run(tmp_path, curves=False)
        (tmp_path / "report.html").mkdir()
        with pytest.raises(RunFolderError, match=r"cannot write .*report\.html: Is a directory"):
            write_report(tmp_path)

    def test_missing_matplotlib_gets_the_pip_line(self, tmp_path, monkeypatch):
        make_run(tmp_path, curves=False)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
            write_report(tmp_path)


class TestCharts:
    def test_curve_is_mean_and_range_over_seeds(self):
        records = [
            {"mode": mode, "seed": seed, "step": step, "loss": 10.0 * step + seed}
            for mode in ("unimodal", "uml") for seed in (0, 1, 5) for step in (1, 2)
        ]  # fmt: skip
        c = curve_over_seeds(records, "uml", lambda r: r["loss"])
        assert c.steps.tolist() == [1, 2]
        assert (c.mean.tolist(), c.low.tolist(), c.high.tolist()) == ([12, 22], [10, 20], [15, 25])
        assert curve_over_seeds(records, "uml", lambda r: r.get("val")) is None

    def test_a_lone_long_seed_does_not_bend_the_mean(self):
        records = [{"mode": "uml", "seed": s, "step": 1, "loss": 1.0} for s in (0, 1, 2)]
        records.append({"mode": "uml", "seed": 2, "step": 2, "loss": 50.0})
        assert curve_over_seeds(records, "uml", lambda r: r["loss"]).steps.tolist() == [1]

    def test_long_curves_are_averaged_in_blocks(self):
        records = [
            {"mode": "uml", "seed": 0, "step": i, "loss": float(i % 2)} for i in range(16_000)
        ]
        c = curve_over_seeds(records, "uml", lambda r: r["loss"])
        assert len(c.steps) == 160
        assert np.allclose(c.mean, 0.5)

    def test_waveform_shows_the_envelope(self):
        def heights(samples):
            path = re.search(r'd="([^"]*)"', waveform_svg(wav(samples))).group(1)
            return [float(b) - float(a) for a, b in re.findall(r"M\S+ (\S+?)V([\d.]+)", path)]

        loud_then_quiet = np.repeat([20_000, 200], 4000) * np.tile([1, -1], 4000)
        h = heights(loud_then_quiet.astype("<i2"))
        assert h[0] > 40 and h[-1] < 2

    def test_waveform_refuses_other_sample_widths(self):
        with pytest.raises(ValueError, match="8-bit samples"):
            waveform_svg(wav(np.zeros(8, np.uint8), width=1))

    def test_vectors_become_a_map_and_a_series_a_line(self):
        assert values_svg([[1.0, -1.0, 0.5], [0.0, 2.0, 1.0]]).count("<rect") == 6
        assert 'fill="var(--unimodal)" fill-opacity="0.50"' in values_svg([[1.0, -1.0], [0.0, 2.0]])
        assert "polyline" in values_svg([[1.0], [2.0], [0.0]])
