"""analysis.json as a section of the report and as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uml_fast.report.charts import interval_svg
from uml_fast.report.figures import DRAWN
from uml_fast.report.sections import ReportError, escape, figure, legend, table, together
from uml_fast.report.table import compared, mode_name


def _text(row: Mapping[str, Any], value: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{100 * value:{sign}.1f}" if row["in_points"] else f"{value:{sign}.3g}"
    return text if float(text) else text.replace("-", "+" if sign else "")


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["ci95_low"], row["ci95_high"]
    sign = "+" if row["paired_diff_mean"] is not None else ""
    return "" if low is None else f"{_text(row, low, sign)}..{_text(row, high, sign)}"


def _name(row: Mapping[str, Any]) -> str:
    unit = ", %" if row["in_points"] else ""
    return f"{row['title']}{unit}"


def side(row: Mapping[str, Any]) -> str:
    """better or worse where the corrected comparison shows it and the quantity has a direction."""
    low, high = row["ci95_low"], row["ci95_high"]
    if row["paired_diff_mean"] is None or low is None or low <= 0 <= high:
        return ""
    if row["better"] == "neither" or (row.get("p_holm") or 0.0) > 0.05:
        return ""
    return "better" if (low > 0) == (row["better"] == "higher") else "worse"


def print_analyses(analysis: Mapping[str, Any]) -> str:
    """The rows as plain text, a name that is too long on a line of its own, then what was left out
    and why."""
    width = min(44, max([len(_name(r)) for r in analysis["rows"]], default=0))
    heads = (*map(mode_name, compared(analysis)), "difference", "95 % interval", "n")
    sizes = (10, 11, 12, 20, 3)
    lines = [" " * width + "".join(f"{h:>{w}}" for h, w in zip(heads, sizes, strict=True))]
    setting = ""
    for r in analysis["rows"]:
        if r["setting"] != setting:
            setting = r["setting"]
            lines += ["", setting]
        cells = (
            _text(r, r["unimodal_mean"]), _text(r, r["uml_mean"]),
            _text(r, r["paired_diff_mean"], "+"), _interval(r), str(r["n"]),
        )  # fmt: skip
        *above, name = [_name(r)] if len(_name(r)) <= width else [_name(r), ""]
        numbers = "".join(f"{c:>{w}}" for c, w in zip(cells, sizes, strict=True))
        lines += [*above, f"{name:<{width}}{numbers}"]
    lines += ["", *_said(analysis)]
    for rate in analysis.get("exchange_rates") or ():
        lines += [
            f"{rate['variant']}: {rate['sentence']}",
            *(f"  note: {w}" for w in rate["warnings"]),
        ]
    lines += [f"left out: {name}: {why}" for name, why in analysis["skipped"].items()]
    return "\n".join(lines)


def _said(analysis: Mapping[str, Any]) -> list[str]:
    """What must be said of all rows together."""
    rows = [r for r in analysis["rows"] if r["paired_diff_mean"] is not None]
    own = mode_name(compared(analysis)[1])
    if not rows:
        return ["nothing is compared: no quantity has a value of both modes with the same seeds"]
    if all(r["n"] == 1 for r in rows):
        return ["one seed: no intervals, so that no difference is shown"]
    judged = [r for r in rows if r["better"] != "neither"]
    sides = [side(r) for r in judged]
    return [
        f"{len(rows)} comparisons; corrected for that (Holm), {own} is better in "
        f"{sides.count('better')} and worse in {sides.count('worse')} of the {len(judged)} that "
        "have a better direction"
    ]


def section(analysis: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    """The section as HTML; empty without anything to show.

    Raises:
        ReportError: a chart lacks a field or is of an unknown kind.
    """
    rows = analysis["rows"]
    if not rows and not analysis["charts"]:
        return ""
    first, second = (escape(mode_name(mode)) for mode in compared(analysis))
    head = (
        f'<tr><th></th><th class="number">{first}</th><th class="number">{second}</th>'
        '<th class="number">difference</th><th class="number">95 % interval</th><th></th>'
        '<th class="number">seeds</th><th>verdict</th></tr>'
    )
    body, setting = [], ""
    for r in rows:
        if r["setting"] != setting:
            body.append(f'<tr><th colspan="8">{escape(r["setting"])}</th></tr>')
        setting = r["setting"]
        body.append(_row(r))
    figures = []
    for i, c in enumerate(analysis["charts"]):
        try:
            figures.append(figure(c["title"], DRAWN[c["kind"]](c), c["note"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ReportError(f"analysis.json: chart {i} cannot be drawn: {error!r}") from error
    shown = table(head, body, "comparison")
    said = "".join(f'<p class="note">{escape(s[0].upper() + s[1:])}.</p>' for s in _said(analysis))
    drawn = f'{legend(analysis)}<div class="charts">{"".join(figures)}</div>' if figures else ""
    return f"<h2>Analyses</h2>{_stale(analysis, summary)}{shown}{said}{drawn}{_skipped(analysis)}"


def _row(r: Mapping[str, Any]) -> str:
    drawn = ""
    if r["paired_diff_mean"] is not None:
        ends = [
            abs(r[k]) for k in ("paired_diff_mean", "ci95_low", "ci95_high") if r[k] is not None
        ]
        drawn = interval_svg(
            r["paired_diff_mean"], r["ci95_low"], r["ci95_high"], max(ends) or 1.0, side(r)
        )
    notes = [x for x in (r["verdict"], r["note"]) if x]
    return (
        f'<tr><th scope="row">{escape(_name(r))}<br><span class="note">paper: '
        f"{escape(r['paper'])}</span></th>"
        f'<td class="number unimodal">{_text(r, r["unimodal_mean"])}</td>'
        f'<td class="number uml">{_text(r, r["uml_mean"])}</td>'
        f'<td class="number">{_text(r, r["paired_diff_mean"], "+")}</td>'
        f'<td class="number">{_interval(r) or "none"}</td><td class="interval">{drawn}</td>'
        f'<td class="number">{r["n"]}</td><td class="verdict {side(r)}">'
        f"{'<br>'.join(together(escape(n)) for n in notes)}</td></tr>"
    )


def _stale(analysis: Mapping[str, Any], summary: Mapping[str, Any] | None) -> str:
    trials = {(m, s) for m, s in analysis["trials"]}
    known = {(r["mode"], r["seed"]) for r in (summary or {}).get("results") or ()}
    if not known or known == trials:
        return ""
    return (
        f'<p class="warning">Made of {len(trials)} trials, the run has {len(known)}: '
        "analyse it again.</p>"
    )


def _skipped(analysis: Mapping[str, Any]) -> str:
    if not analysis["skipped"]:
        return ""
    items = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(why)}</td></tr>'
        for name, why in analysis["skipped"].items()
    )
    return (
        '<details class="card"><summary>Left out, and why</summary>'
        f"<table><tbody>{items}</tbody></table></details>"
    )
