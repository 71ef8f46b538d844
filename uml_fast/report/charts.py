"""Charts of the report: inline SVG with the colours of the page, so that they follow dark mode."""

from __future__ import annotations

import base64
import html
import io
import re
import wave
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_POINTS = 160

_PAGE_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--unimodal)",
    "#050505": "var(--uml)",
}
INK, MUTED, LINE, UNIMODAL, UML = _PAGE_COLOURS
MODE_COLOUR = {"unimodal": UNIMODAL, "uml": UML, "random": UNIMODAL, "pretrained": UML}
"""Colour of each mode in a drawing of ``chart``."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over steps: mean over seeds, lowest and highest seed; arrays of one length."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def curve_over_seeds(
    records: Sequence[Mapping[str, Any]],
    mode: str,
    value: Callable[[Mapping[str, Any]], float | None],
) -> Curve | None:
    """The curve of one mode; None where nothing was logged.

    A step counts if at least half of the mode's seeds logged it (others stopped early). Long curves
    are averaged in blocks of steps.
    """
    at: dict[int, list[float]] = defaultdict(list)
    seeds = set()
    for r in records:
        if r.get("mode") == mode and (x := value(r)) is not None:
            at[r["step"]].append(x)
            seeds.add(r.get("seed"))
    steps = [s for s in sorted(at) if 2 * len(at[s]) >= len(seeds)]
    if not steps:
        return None
    columns = [np.array([f(at[s]) for s in steps]) for f in (np.mean, np.min, np.max)]
    blocks = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
    mean, low, high = (np.array([c[b].mean() for b in blocks]) for c in columns)
    return Curve(np.array([np.array(steps)[b].mean() for b in blocks]), mean, low, high)


def curves_chart(
    title: str, curves: Mapping[str, Curve], y_format: Callable[[float], str], *, is_error: bool
) -> str:
    """SVG of a metric over steps, a line and a band per mode; logarithmic for wide errors."""

    def draw(axes: Any) -> None:
        low = min(float(c.low.min()) for c in curves.values())
        high = max(float(c.high.max()) for c in curves.values())
        is_log = is_error and low > 0 and high / low > 30
        if is_log:
            axes.set_yscale("log")
        for mode, c in curves.items():
            axes.fill_between(c.steps, c.low, c.high, color=MODE_COLOUR[mode], alpha=0.16, lw=0)
            marker = "o" if len(c.steps) == 1 else None
            axes.plot(c.steps, c.mean, color=MODE_COLOUR[mode], lw=1.6, marker=marker)
        axes.set_xlabel("optimiser steps")
        axes.xaxis.set_major_locator(ticker().MaxNLocator(5, integer=True))
        if not is_log:
            axes.yaxis.set_major_locator(ticker().MaxNLocator(5))
            axes.yaxis.set_major_formatter(lambda v, _: y_format(v))

    return chart(title, draw)


def pairs_chart(
    title: str,
    unimodal: Sequence[float],
    uml: Sequence[float],
    baselines: Sequence[float],
    y_format: Callable[[float], str],
    names: tuple[str, str] = ("unimodal", "UML"),
) -> str:
    """SVG of every seed as two joined dots, the means as bars and the baselines as dashed lines."""

    def draw(axes: Any) -> None:
        for a, b in zip(unimodal, uml, strict=True):
            axes.plot([0, 1], [a, b], color=MUTED, lw=0.8, alpha=0.7)
        for x, values, colour in ((0, unimodal, UNIMODAL), (1, uml, UML)):
            axes.plot([x] * len(values), values, "o", color=colour, ms=4.5, mew=0, alpha=0.85)
            side = -0.3 if x == 0 else 0.12
            mean = sum(values) / len(values)
            axes.plot([x + side, x + side + 0.18], [mean, mean], color=colour, lw=2.4)
        for level in baselines:
            axes.axhline(level, color=MUTED, lw=0.9, ls=(0, (4, 3)))
        axes.set_xlim(-0.45, 1.45)
        axes.set_xticks([0, 1], list(names))
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(ticker().MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda v, _: y_format(v))

    return chart(title, draw)


def ticker() -> Any:
    """matplotlib's module of the places of ticks."""
    from matplotlib import ticker as module

    return module


def chart(
    title: str, draw: Callable[[Any], None], *, size: tuple[float, float] = (3.7, 2.5)
) -> str:
    """SVG of what ``draw`` puts on a matplotlib Axes, in the page's colours; ``size`` in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, "axes.edgecolor": LINE,
        "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True,
        "grid.color": LINE, "grid.linewidth": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
        "xtick.major.size": 0, "ytick.major.size": 0, "ytick.minor.size": 0, "text.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(
        r' id="(?:figure|patch|axes|matplotlib\.axis|xtick|ytick|text|line2d)_\d+"', "", svg
    )
    for placeholder, colour in _PAGE_COLOURS.items():
        svg = svg.replace(placeholder, colour)
    label = html.escape(title, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def interval_svg(
    mean: float, low: float | None, high: float | None, scale: float, side: str
) -> str:
    """A difference and its interval on an axis from -scale to scale with a mark at zero."""

    def x(value: float) -> float:
        return round(100 + 94 * max(-1.0, min(1.0, value / scale)), 2)

    colour = f"var(--{side})" if side else "var(--muted)"
    bar = ""
    if low is not None and high is not None:
        bar = (
            f'<line x1="{x(low)}" x2="{x(high)}" y1="11" y2="11" stroke="{colour}" '
            'stroke-width="5" stroke-opacity=".35" stroke-linecap="round"/>'
        )
    return (
        '<svg viewBox="0 0 200 22" aria-hidden="true">'
        '<line x1="100" x2="100" y1="1" y2="21" stroke="var(--muted)" stroke-width="1"/>'
        f'{bar}<circle cx="{x(mean)}" cy="11" r="4" fill="{colour}"/></svg>'
    )


def waveform_svg(wav: str) -> str:
    """Envelope of a base64 WAV file of 16-bit samples.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        with wave.open(io.BytesIO(base64.b64decode(wav, validate=True))) as file:
            if file.getsampwidth() != 2:
                raise ValueError(f"{8 * file.getsampwidth()}-bit samples; 16 are expected")
            sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"not a WAV file: {error}") from error
    if not len(sound):
        raise ValueError("the WAV file has no samples")
    blocks = np.array_split(sound, min(len(sound), 120))
    peak = max(1.0, float(np.abs(sound).max()))
    step = 240 / len(blocks)
    path = "".join(
        f"M{(i + 0.5) * step:.1f} {24 - 22 * b.max() / peak:.1f}V{24.5 - 22 * b.min() / peak:.1f}"
        for i, b in enumerate(blocks)
    )
    return (
        '<svg viewBox="0 0 240 48" aria-hidden="true">'
        f'<path d="{path}" stroke="var(--uml)" stroke-width="1.4" fill="none"/></svg>'
    )


def values_svg(values: Sequence[Any]) -> str:
    """A series of numbers as a line, a series of vectors as a map with a column per vector.

    Raises:
        ValueError: the values are not numbers of a rectangular shape.
    """
    x = np.asarray(values, np.float64)
    if x.ndim == 2 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim not in (1, 2) or x.size == 0 or not np.isfinite(x).all():
        raise ValueError("the values are not a list of finite numbers or of equal rows of them")
    if x.ndim == 1 and len(x) > 1:
        span = max(float(np.ptp(x)), 1e-12)
        points = " ".join(
            f"{240 * i / (len(x) - 1):.1f},{46 - 44 * (v - x.min()) / span:.1f}"
            for i, v in enumerate(x)
        )
        return (
            '<svg viewBox="0 0 240 48" aria-hidden="true"><polyline '
            f'points="{points}" stroke="var(--uml)" stroke-width="1.5" fill="none"/></svg>'
        )
    table = np.atleast_2d(x)[:64, :64].T
    peak = max(float(np.abs(table).max()), 1e-12)
    cells = "".join(
        f'<rect x="{j}" y="{i}" width="1.02" height="1.02" '
        f'fill="var(--{"uml" if v >= 0 else "unimodal"})" fill-opacity="{abs(v) / peak:.2f}"/>'
        for (i, j), v in np.ndenumerate(table)
    )
    height, width = table.shape
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" '
        f'style="aspect-ratio: 2" aria-hidden="true">{cells}</svg>'
    )
