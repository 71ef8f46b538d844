"""The sections of the report as HTML; each is empty where a run has nothing to show for it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uml_fast.report import charts
from uml_fast.report.table import (
    MODE_MEANING,
    THROUGHPUT,
    TOO_SHORT,
    baseline_name,
    baselines_of,
    both_sides,
    compared,
    has_rate,
    is_too_short,
    metric_of,
    mode_name,
    rate,
    setting,
)


class ReportError(ValueError):
    """A file of the run folder that no report can be made from; the message names it."""


def escape(value: Any) -> str:
    """A value as text of a page or of an attribute."""
    return html.escape(str(value), quote=True)


def together(text: str) -> str:
    """HTML text in which a number and its per-cent sign stay on one line."""
    return text.replace(" %", "&nbsp;%")


def legend(summary: Mapping[str, Any]) -> str:
    """The colours of the two modes."""
    first, second = (MODE_MEANING[mode] for mode in compared(summary))
    return (
        f'<p class="legend"><span><i class="unimodal"></i>{first}</span>'
        f'<span><i class="uml"></i>{second}</span></p>'
    )


def comparison(summary: Mapping[str, Any]) -> str:
    """The table of settings, with the baselines below."""
    rows = summary["comparison"]
    if not rows:
        return ""
    body = [_comparison_row(summary, c) for c in rows]
    for b in summary.get("baselines") or ():
        m = metric_of(summary, b)
        interval = m.interval(b)
        name = f'{escape(baseline_name(b))}<br><span class="note">simple baseline</span>'
        said = f"mean; its 95 % interval is {interval}" if interval else ""
        body.append(
            f'<tr><th scope="row">{name}</th><td class="number">{m.text(b["mean"])}</td>'
            f'<td></td><td></td><td></td><td></td><td class="number">{b["n"]}</td>'
            f'<td class="verdict note">{said}</td></tr>'
        )
    first, second = (escape(mode_name(mode)) for mode in compared(summary))
    head = (
        f'<tr><th></th><th class="number">{first}</th><th class="number">{second}</th>'
        '<th class="number">difference</th><th class="number">95 % interval</th><th></th>'
        '<th class="number">seeds</th><th>verdict</th></tr>'
    )
    return (
        f"<h2>{first[0].upper()}{first[1:]} against {second}</h2>"
        f"<p>{escape(metric_of(summary).title.capitalize())}, measured on the test data of the "
        "target modality. Both modes have the same seeds; the interval is that of the paired "
        "difference (Student t over seeds).</p>" + table(head, body, "comparison")
    )


def _comparison_row(summary: Mapping[str, Any], c: Mapping[str, Any]) -> str:
    m = metric_of(summary, c)
    low, high = c.get("ci95_low"), c.get("ci95_high")
    side = m.side(c)
    reach = max(
        abs(r[k])
        for r in summary["comparison"] if metric_of(summary, r) == m
        for k in ("paired_diff_mean", "ci95_low", "ci95_high") if r.get(k) is not None
    )  # fmt: skip
    drawn = charts.interval_svg(c["paired_diff_mean"], low, high, reach or 1.0, side)
    return (
        f'<tr><th scope="row">{escape(setting(summary, c))}</th>'
        f'<td class="number unimodal">{m.text(c["unimodal_mean"])}</td>'
        f'<td class="number uml">{m.text(c["uml_mean"])}</td>'
        f'<td class="number">{m.text(c["paired_diff_mean"], "+")}</td>'
        f'<td class="number">{m.interval(c, "+") or "none"}</td>'
        f'<td class="interval">{drawn}</td><td class="number">{c["n"]}</td>'
        f'<td class="verdict {side}">{together(escape(c["verdict"]))}</td></tr>'
    )


def table(head: str, body: Sequence[str], kind: str = "") -> str:
    """A table in a card: its head and its rows, as HTML."""
    return (
        f'<div class="card scroll {kind}"><table><thead>{head}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def every_seed(summary: Mapping[str, Any]) -> str:
    """The paired results of each setting."""
    figures = []
    for c in summary["comparison"]:
        m = metric_of(summary, c)
        a, b = both_sides(summary, c)
        seeds = sorted(a.keys() & b.keys())
        if not seeds:
            continue
        title = f"{setting(summary, c)}: {m.title}"
        fitting = baselines_of(summary, c)
        svg = charts.pairs_chart(
            title,
            [a[s] for s in seeds],
            [b[s] for s in seeds],
            [x["mean"] for x in fitting],
            m.text,
            (mode_name(compared(summary)[0]), mode_name(compared(summary)[1])),
        )
        dashed = ", ".join(f"{x['name']} {m.text(x['mean'])}" for x in fitting)
        figures.append(figure(title, svg, f"dashed: {dashed}" if dashed else ""))
    if not figures:
        return ""
    note = '<p class="note">A line joins the two runs of one seed; the bars are the means.</p>'
    return f'<h2>Every seed</h2>{legend(summary)}<div class="charts">{"".join(figures)}</div>{note}'


def figure(title: str, svg: str, note: str = "") -> str:
    """A chart in a card, with its title and a note below."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="card"><figcaption>{escape(title)}</figcaption>{svg}{below}</figure>'


def curves(records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """What was logged over steps; ``facts`` has the run's target and metric."""
    m, target = metric_of(facts), facts.get("target")
    seen = {name for r in records for name in r.get("losses") or ()}
    names = sorted(seen, key=lambda name: (name != target, name))
    wanted = [_Curve(f"validation: {m.title}", _logged("val"), m.text, m.lower_is_better)]
    if not names:
        wanted.append(_Curve("loss", _logged("loss"), "{:.3g}".format, True))
    wanted += [
        _Curve(f"loss of {name}", _logged("losses", name), "{:.3g}".format, True) for name in names
    ]
    figures = _curve_figures(records, wanted)
    if not figures:
        return ""
    steering = _curve_figures(
        records,
        [
            _Curve("gradient norm", _logged("grad_norm"), "{:.3g}".format, True),
            _Curve("learning rate", _logged("lr"), "{:.2g}".format, False),
        ],
    )
    folded = (
        '<details class="card"><summary>Gradient norm and learning rate</summary>'
        f'<div class="charts">{steering}</div></details>'
    )
    note = "Mean over seeds; the band is from the lowest to the highest seed."
    return (
        f'<h2>Learning curves</h2>{legend(facts)}<div class="charts">{figures}</div>'
        f'<p class="note">{note}</p>{folded if steering else ""}'
    )


@dataclass(frozen=True, slots=True)
class _Curve:
    title: str
    value: Callable[[Mapping[str, Any]], float | None]
    y_format: Callable[[float], str]
    is_error: bool


def _logged(key: str, name: str = "") -> Callable[[Mapping[str, Any]], float | None]:
    """Reader of a logged number, or of the one called ``name`` in a logged group."""
    return lambda r: (r.get(key) or {}).get(name) if name else r.get(key)


def _curve_figures(records: Sequence[Mapping[str, Any]], wanted: Sequence[_Curve]) -> str:
    out = []
    for w in wanted:
        found = {
            mode: charts.curve_over_seeds(records, mode, w.value) for mode in charts.MODE_COLOUR
        }
        drawn = {mode: curve for mode, curve in found.items() if curve is not None}
        if drawn:
            svg = charts.curves_chart(w.title, drawn, w.y_format, is_error=w.is_error)
            out.append(figure(w.title, svg))
    return "".join(out)


def throughput(summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """Rates of the run, occupancy of its stages, and how both went over time."""
    if is_too_short(summary):
        return f'<h2>Throughput</h2><div class="card">{TOO_SHORT}</div>'
    tiles = "".join(
        f"<div><b>{rate(summary, key)}</b><span>{label}</span><small>{note}</small></div>"
        for key, label, note in THROUGHPUT if has_rate(summary, key)
    )  # fmt: skip
    if not has_rate(summary, "tokens_per_s"):
        return ""
    loading = _stages(summary["throughput"]) + _loading(summary["throughput"])
    figures = _curve_figures(
        records,
        [
            _Curve("tokens a second", _logged("tokens_per_s"), "{:,.0f}".format, False),
            _Curve("stall, % of time", _logged("stall_pct"), "{:.3g}".format, False),
        ],
    )
    return (
        f'<h2>Throughput</h2><div class="card tiles">{tiles}</div>{loading}'
        f'<div class="charts" style="margin-top: 1rem">{figures}</div>'
    )


def _stages(rates: Mapping[str, Any]) -> str:
    """What the slots of the loader were in."""
    bars = "".join(
        f'<div class="bar"><span>{escape(name)}</span>'
        f'<div><i style="width: {max(0.0, min(100.0, pct)):.1f}%"></i></div>'
        f'<span class="number">{pct:.0f} %</span></div>'
        for name, pct in (rates.get("stages") or {}).items()
    )
    if not bars:
        return ""
    note = (
        "What the packs in memory were in, in % of their time. Mostly <i>ready</i>: loading keeps "
        "ahead of training. Mostly <i>read</i>: training waits for files."
    )
    return f'<h3>Stage occupancy</h3><div class="card">{bars}<p class="note">{note}</p></div>'


def _loading(rates: Mapping[str, Any]) -> str:
    """Milliseconds a pack by modality (or stage), and what training waited for."""
    columns = {k: rates.get(f"{k}_ms") or {} for k in ("read", "decode", "assemble", "stall")}
    shown = {k: v for k, v in columns.items() if v}
    names = list(dict.fromkeys(name for v in shown.values() for name in v))
    if not names:
        return ""
    titles = {"assemble": "copied from memory", "stall": "training waited"}
    head = "".join(f'<th class="number">{titles.get(k, k)}</th>' for k in shown)
    body = []
    for name in names:
        cells = "".join(
            f'<td class="number">{f"{v[name]:.2f}" if name in v else ""}</td>'
            for v in shown.values()
        )
        body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    shown_table = table(f"<tr><th></th>{head}</tr>", body)
    slowest = max(shown.get("stall") or {"": 0.0}, key=lambda k: shown.get("stall", {}).get(k, 0.0))
    note = "Milliseconds a pack: time of all threads, and what the wait was for."
    most = f" Training waited longest for {escape(slowest)}." if slowest else ""
    return f'<h3>Loading</h3>{shown_table}<p class="note">{note}{most}</p>'


def sample_cards(samples: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Samples grouped by modality; ``path`` is the file they came from.

    Raises:
        ReportError: a sample lacks a field or its content is damaged.
    """
    groups: dict[str, list[str]] = {}
    for i, sample in enumerate(samples):
        try:
            shown, is_wide = _sample(sample)
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"{path}: sample {i} cannot be shown: {error!r}") from error
        caption = (
            f"<figcaption>{escape(sample['caption'])}</figcaption>" if sample.get("caption") else ""
        )
        wide = " wide" if is_wide else ""
        card = f'<figure class="card{wide}">{shown}{caption}</figure>'
        groups.setdefault(str(sample["modality"]), []).append(card)
    if not groups:
        return ""
    parts = (
        f'<h3>{escape(name)}</h3><div class="samples">{"".join(c)}</div>'
        for name, c in groups.items()
    )
    return (
        "<h2>Samples</h2><p>What the modalities look like; none is paired with another.</p>"
        + "".join(parts)
    )


def _sample(sample: Mapping[str, Any]) -> tuple[str, bool]:
    """A sample as HTML, and whether it wants the width of two."""
    kind = sample["kind"]
    if kind == "image":
        alt, png = escape(sample.get("caption") or "image"), _base64(sample["png"])
        return f'<img alt="{alt}" src="data:image/png;base64,{png}">', False
    if kind == "audio":
        source = f"data:audio/wav;base64,{_base64(sample['wav'])}"
        drawn = charts.waveform_svg(sample["wav"])
        return f'{drawn}<audio controls preload="none" src="{source}"></audio>', True
    if kind == "text":
        return f"<blockquote>{escape(sample['text'])}</blockquote>", len(sample["text"]) > 60
    if kind == "features":
        return charts.values_svg(sample["values"]), False
    raise ValueError(f"kind {kind!r} is none of image, audio, text, features")


def _base64(text: str) -> str:
    base64.b64decode(text, validate=True)
    return text


def theory(summary: Mapping[str, Any]) -> str:
    """The numerical checks of the theory: a row a check, its fields as columns."""
    checks = summary.get("theory") or []
    if not checks:
        return ""
    columns = list(dict.fromkeys(key for check in checks for key in check))
    head = "".join(f"<th>{escape(c.replace('_', ' '))}</th>" for c in columns)
    body = ["".join(f"<td>{_cell(c.get(k))}</td>" for k in columns) for c in checks]
    return "<h2>Theory, checked numerically</h2>" + table(
        f"<tr>{head}</tr>", [f"<tr>{cells}</tr>" for cells in body]
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f'<span class="{"better" if value else "worse"}">{"yes" if value else "no"}</span>'
    if isinstance(value, float):
        return "unbounded" if math.isinf(value) else f"{value:.4g}"
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(k)} = {_cell(v)}" for k, v in value.items())
    if isinstance(value, list):
        is_pairs = all(isinstance(v, list) and len(v) == 2 for v in value)
        return _cell(dict(value)) if is_pairs else ", ".join(_cell(v) for v in value)
    return escape(value)


def setup(run: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Machine, versions and configuration, folded away."""
    machine = run.get("machine") or summary.get("machine") or {}
    commit = run.get("commit") or summary.get("commit")
    named = {k.replace("_", " "): v for k, v in machine.items()}
    facts = {**named, **{f"version of {k}": v for k, v in versions_of(run, summary).items()}}
    if commit:
        facts["commit"] = f"{commit}{' with uncommitted changes' if run.get('dirty') else ''}"
    parts = []
    if facts:
        cpu = machine.get("gpu") or machine.get("cpu") or ""
        cores = f", {machine['cores']} cores" if machine.get("cores") else ""
        parts.append(_details(f"Machine and versions: {cpu}{cores}", facts))
    if run.get("config"):
        parts.append(_details("Configuration", dict(_flat(run["config"]))))
    return "<h2>How it was run</h2>" + "".join(parts) if parts else ""


def versions_of(run: Mapping[str, Any], summary: Mapping[str, Any]) -> Mapping[str, Any]:
    """Versions of the packages a run was made with."""
    return run.get("versions") or summary.get("versions") or {}


def _details(title: str, facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_cell(value)}</td></tr>'
        for name, value in facts.items()
    )
    return (
        f'<details class="card"><summary>{escape(title)}</summary>'
        f"<table><tbody>{rows}</tbody></table></details>"
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a configuration as dotted names; a part that has a name is called by it."""
    if isinstance(value, Mapping):
        if name and "class" in value:
            yield name, str(value["class"]).rpartition(":")[2]
        for key, v in value.items():
            if key != "class":
                yield from _flat(v, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        for i, v in enumerate(value):
            yield from _flat(v, f"{name}.{v.get('name', i) if isinstance(v, Mapping) else i}")
    else:
        yield name, value
