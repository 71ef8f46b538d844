"""The probes of modalities that belong together (paper 1.2): each alone, and all side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from uml_fast.report.sections import escape

_SPLITS = ("validation", "test")


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Mode, view, seeds and the mean accuracy in per cent on each split."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for p in summary.get("probes") or ():
        row = found.setdefault((p["mode"], p["view"], str(p["n"])), {})
        row[p["split"]] = f"{100 * p['mean']:.1f}"
    return [(*names, *(row.get(s, "") for s in _SPLITS)) for names, row in found.items()]


def probe_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table as lines of text; none where the run has no such probes."""
    rows = [("mode", "probe of", "n", *_SPLITS), *_rows(summary)]
    if len(rows) == 1:
        return []
    wide = max(len(row[1]) for row in rows)
    return ["", "linear probes, mean accuracy in % over seeds"] + [
        f"{mode:<10}{view:<{wide}}{n:>4}{validation:>12}{test:>8}"
        for mode, view, n, validation, test in rows
    ]


def probe_section(summary: Mapping[str, Any]) -> str:
    """The table as HTML; empty where the run has no such probes."""
    rows = _rows(summary)
    if not rows:
        return ""
    body = "".join(
        f"<tr><td>{escape(mode)}</td><td>{escape(view)}</td>"
        + "".join(f'<td class="number">{cell}</td>' for cell in cells)
        + "</tr>"
        for mode, view, *cells in rows
    )
    heads = "".join(f"<th>{name}</th>" for name in ("mode", "probe of", "seeds", *_SPLITS))
    return (
        "<h2>Linear probes, mean accuracy in %</h2>"
        f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
