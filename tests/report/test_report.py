"""The report and the terminal table of a run folder that the training code's own parts wrote."""

import base64
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from tests.example_run import make_run
from uml_fast.analysis.statistics import correct_rows
from uml_fast.experiment.summary import throughput
from uml_fast.report import ReportError, print_table, write_report
from uml_fast.training.log import RunFolderError


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


def write_log(folder, records):
    text = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(text)


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
            r"</h1>\s*<p class=\"warning\">The baseline nearest neighbour has a better mean", text
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

    def test_settings_are_corrected_for_being_several(self, tmp_path):
        summary = make_run(tmp_path, curves=False, shots=(1, 2, 8))
        rows = correct_rows(summary["comparison"])
        said = "3 settings were compared: corrected for that (Holm), UML is better in 3"
        assert said in print_table({**summary, "comparison": rows})
        rows[1]["p_holm"] = 0.2
        (tmp_path / "summary.json").write_text(
            json.dumps({**summary, "comparison": rows, "searched": 60})
        )
        page = write_report(tmp_path).read_text()
        assert '<h1 class="better">UML is better in 2 of 3 settings</h1>' in page
        assert "UML is better in 2 and worse in 0 of them." in page
        assert "Each value is that of the configuration, of 60, that was best" in page


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

    def test_a_run_too_short_to_measure_says_so(self, finished, tmp_path):
        lap = {"mode": "uml", "seed": 0, "step": 20, "tokens_per_s": 10.0, "recompiles": 0}
        write_log(tmp_path, [lap])
        short = print_table({**finished[1], "throughput": throughput(tmp_path)})
        assert "throughput: too short to measure" in short and "recompiles" not in short
        assert max(map(len, short.splitlines())) <= 100
        write_log(tmp_path, [lap, lap | {"step": 40}])
        long = print_table({**finished[1], "throughput": throughput(tmp_path)})
        assert "tokens a second 10, recompiles 0" in long and "too short" not in long
        only = print_table({**finished[1], "throughput": throughput(tmp_path, "unimodal")})
        assert "recompiles" not in only and "too short" not in only

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
