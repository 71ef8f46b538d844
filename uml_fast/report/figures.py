"""Charts of analysis.json: one function a kind, all drawn by ``charts.chart``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from uml_fast.report.charts import INK, LINE, MODE_COLOUR, MUTED, UML, UNIMODAL, chart, ticker
from uml_fast.report.table import mode_name

_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_OPAQUE = ((0x0B, 0x67, 0xB2), (0xC5, 0x6A, 0x00))
"""Red, green and blue of positive and negative cells of a heat map, on any background."""


def heat(c: Mapping[str, Any]) -> str:
    """Heat map of a square matrix: blue positive, orange negative, strength as opacity."""
    matrix = np.asarray(c["matrix"], np.float64)
    peak = max(float(np.abs(matrix).max()), 1e-12)
    picture = np.zeros((*matrix.shape, 4))
    picture[..., :3] = np.where(matrix[..., None] >= 0, *np.array(_OPAQUE)) / 255
    picture[..., 3] = np.abs(matrix) / peak

    def draw(axes: Any) -> None:
        axes.imshow(picture, interpolation="nearest")
        axes.grid(visible=False)
        names = c["names"]
        if len(names) <= 12:
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.set_xlabel(c["xlabel"])
        axes.set_ylabel("head rows")

    return chart(c["title"], draw, size=(3.7, 3.4))


def boundary(c: Mapping[str, Any]) -> str:
    """Both classes in the plane of the boundary, a row a mode."""
    panels = c["panels"]

    def draw(axes: Any) -> None:
        figure = axes.figure
        axes.remove()
        for k, panel in enumerate(panels):
            ax = figure.add_subplot(1, len(panels), k + 1)
            for points, marker, name in zip(panel["points"], ("o", "x"), c["names"], strict=True):
                xy = np.asarray(points, np.float64).reshape(-1, 2)
                colour = MODE_COLOUR[panel["mode"]] if marker == "o" else INK
                ax.plot(xy[:, 0], xy[:, 1], marker, color=colour, ms=3, mew=0.8, alpha=0.6,
                        label=name)  # fmt: skip
            ax.axvline(0, color=MUTED, lw=1)
            ax.set_xlabel(mode_name(panel["mode"]))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.legend(fontsize=7, frameon=False, loc="best", labelcolor=MUTED)

    return chart(c["title"], draw, size=(5.2, 2.6))


def histogram(c: Mapping[str, Any]) -> str:
    """Shares of samples by value, both modes over each other."""
    edges = np.asarray(c["edges"], np.float64)

    def draw(axes: Any) -> None:
        for mode, share in c["bars"].items():
            axes.stairs(share, edges, color=MODE_COLOUR[mode], lw=1.4)
            axes.stairs(share, edges, color=MODE_COLOUR[mode], fill=True, alpha=0.14, lw=0)
        axes.axvline(0, color=MUTED, lw=0.9)
        axes.set_xlabel(c["xlabel"])
        axes.yaxis.set_major_locator(ticker().MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")

    return chart(c["title"], draw)


def bars(c: Mapping[str, Any]) -> str:
    """Accuracies on several sets, a bar a mode with its interval."""

    def draw(axes: Any) -> None:
        at, width = np.arange(len(c["names"])), 0.8 / max(len(c["bars"]), 1)
        for k, (mode, found) in enumerate(c["bars"].items()):
            x = at + (k - (len(c["bars"]) - 1) / 2) * width
            axes.bar(x, [f["mean"] for f in found], 0.92 * width, color=MODE_COLOUR[mode], lw=0,
                     alpha=0.8)  # fmt: skip
            for place, f in zip(x, found, strict=True):
                if f["ci95_low"] is not None:
                    ends = max(0.0, f["ci95_low"]), min(1.0, f["ci95_high"])
                    axes.plot([place, place], ends, color=INK, lw=1)
        axes.set_xticks(at, c["names"])
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")

    return chart(c["title"], draw)


def neurons(c: Mapping[str, Any]) -> str:
    """Correlation of the strongest units: bars over all pairs, marks within labels."""

    def draw(axes: Any) -> None:
        at = np.arange(len(c["units"]))
        axes.bar(at, c["overall"], width=0.7, color=UML, alpha=0.35, lw=0)
        for marker, (name, values) in zip("o^sv", c["by_label"].items(), strict=False):
            axes.plot(at, values, marker, color=INK, ms=3, mew=0, label=name)
        for level in (c["baseline"], -c["baseline"]):
            axes.axhline(level, color=MUTED, lw=0.9, ls=(0, (4, 3)))
        axes.set_ylim(-1.05, 1.05)
        axes.set_xticks(at, [str(u) for u in c["units"]], fontsize=7)
        axes.set_xlabel("unit")
        axes.set_ylabel("Pearson r")
        axes.grid(axis="x", visible=False)
        if c["by_label"]:
            axes.legend(fontsize=7, frameon=False, labelcolor=MUTED, ncols=2, loc="lower left")

    return chart(c["title"], draw)


def lines(c: Mapping[str, Any]) -> str:
    """Series over a common axis."""

    def draw(axes: Any) -> None:
        for k, (name, values) in enumerate(c["lines"].items()):
            dash = _DASHES[k % len(_DASHES)]
            colour = (UML, UNIMODAL, MUTED)[k // len(_DASHES) % 3]
            axes.plot(c["x"], values, color=colour, lw=1.4, ls=dash, label=name)
        axes.set_xlabel(c["xlabel"])
        axes.legend(fontsize=7, frameon=False, labelcolor=MUTED, ncols=2)

    return chart(c["title"], draw)


def plane(c: Mapping[str, Any]) -> str:
    """Mean accuracy of each cell over both kinds of shots, with the fitted plane's isolines."""
    x, y, z = (np.asarray(c[k], np.float64) for k in ("image_shots", "text_shots", "accuracy"))
    a, b, slope = c["plane"]

    def draw(axes: Any) -> None:
        low, high = float(z.min()), float(z.max())
        size = 14 + 90 * (z - low) / max(high - low, 1e-12)
        axes.margins(0.09)
        axes.scatter(x, y, s=size, color=UML, alpha=0.75, lw=0)
        for i, v in enumerate(z):
            axes.annotate(f"{100 * v:.0f}", (x[i], y[i]), xytext=(5, 4), fontsize=6.5,
                          textcoords="offset points", color=MUTED)  # fmt: skip
        if slope:
            across = np.array([x.min(), x.max()])
            limits = axes.get_ylim()
            for level in np.linspace(low, high, 6):
                axes.plot(across, (level - a - b * across) / slope, color=LINE, lw=1)
            axes.set_ylim(*limits)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker().MaxNLocator(6, integer=True))
        axes.set_xlabel("images of each class")
        axes.set_ylabel("texts of each class")

    return chart(c["title"], draw)


DRAWN: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "bars": bars, "boundary": boundary, "heat": heat, "histogram": histogram, "lines": lines,
    "neurons": neurons, "plane": plane,
}  # fmt: skip
"""Kind of chart -> what draws it."""
