"""The section on accuracy by the number of training samples, of runs that vary it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uml_fast.report.charts import MUTED, UML, UNIMODAL, chart
from uml_fast.report.sections import figure
from uml_fast.report.table import ROW_AXES, compared, metric_of, mode_name

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def section(summary: Mapping[str, Any]) -> str:
    """A line of each mode and baseline over the shots, a dot of each seed; empty for one number."""
    metric = metric_of(summary)
    rows = [r for r in summary["results"] if r.get(metric.name) is not None]
    shots = sorted({r.get("shots") for r in rows} - {None}, key=lambda s: s or np.inf)
    if len(shots) < 2 or any(axis in r for r in rows for axis in ROW_AXES):
        return ""
    first = compared(summary)[0]
    modes = list(dict.fromkeys([first, *(r["mode"] for r in rows)]))
    simple = list(dict.fromkeys(b["name"] for b in summary.get("baselines") or ()))
    place = {s: i for i, s in enumerate(shots)}

    def draw(axes: Any) -> None:
        for k, mode in enumerate(modes):
            of = [r for r in rows if r["mode"] == mode]
            values = {s: [r[metric.name] for r in of if r["shots"] == s] for s in shots}
            x = [place[s] for s in shots if values[s]]
            colour = UNIMODAL if mode == first else UML
            dashes = _DASHES[max(0, k - 1) % len(_DASHES)]
            axes.plot(x, [np.mean(values[s]) for s in shots if values[s]], color=colour, lw=1.6,
                      ls=dashes, label=mode_name(mode))  # fmt: skip
            axes.plot([place[r["shots"]] for r in of], [r[metric.name] for r in of], "o",
                      color=colour, ms=2.5, mew=0, alpha=0.5)  # fmt: skip
        for k, name in enumerate(simple):
            of = [b for b in summary["baselines"] if b["name"] == name and b.get("shots") in place]
            axes.plot([place[b["shots"]] for b in of], [b["mean"] for b in of], color=MUTED, lw=1,
                      ls=_DASHES[(k + 1) % len(_DASHES)], label=name)  # fmt: skip
        axes.set_xticks(range(len(shots)), [str(s) if s else "all" for s in shots])
        axes.set_xlabel("training samples of each class")
        axes.yaxis.set_major_formatter(lambda v, _: metric.text(v))
        axes.legend(fontsize=7, frameon=False, loc="best", labelcolor=MUTED)

    drawn = figure(metric.title, chart(metric.title, draw, size=(5.2, 3.2)))
    note = '<p class="note">Lines join the means over seeds; a dot is a seed.</p>'
    return f'<h2>By training samples</h2><div class="charts">{drawn}</div>{note}'
