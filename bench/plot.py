"""Rows to the README's table and plots.

    python -m bench.plot               reads bench/results, writes docs/img/step.svg and the tables
                                       between the markers of README.md and docs/*.md
    python -m bench.plot --print       prints the tables of speed instead

A table goes between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``: a name of ``TABLES``, or
the recipe whose accuracy it shows.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.effects import effect_tables
from bench.harness import ROOT
from bench.tables import (
    Content,
    accuracy_table,
    by_width,
    extract_table,
    factors_table,
    grid_table,
    kernels_table,
    load,
    loader_table,
    multibench_table,
    ranks_table,
    saving_table,
    scaling_table,
    step_table,
    train_table,
)

TABLES: tuple[tuple[str, str, str, Callable[[Content], str]], ...] = (
    ("step", "step", "README.md", step_table),
    ("factors", "factors", "README.md", factors_table),
    ("train", "train", "README.md", train_table),
    ("kernels", "kernels", "docs/kernels.md", kernels_table),
    ("loader", "loader", "docs/loading.md", loader_table),
    ("grid", "grid", "docs/grid.md", grid_table),
    ("extract", "extract", "docs/features.md", extract_table),
    ("multibench", "multibench", "docs/multibench.md", multibench_table),
    ("ranks", "ranks", "docs/distributed.md", ranks_table),
    ("saving", "saving", "docs/distributed.md", saving_table),
    ("scaling", "step", "docs/scaling.md", scaling_table),
)
"""Name between the markers, bench whose rows it shows, page, and what makes it."""


def between_markers(text: str, name: str, content: str) -> str:
    """The text with what stands between the markers of ``name`` replaced.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(rf"(<!-- bench:{name} -->).*?(<!-- /bench:{name} -->)", re.DOTALL)
    out, count = pattern.subn(lambda found: f"{found[1]}\n{content}\n{found[2]}", text)
    if not count:
        raise ValueError(f"no markers <!-- bench:{name} --> ... <!-- /bench:{name} --> in the text")
    return out


def plot_step(content: Content, path: Path) -> None:
    """Bars of both providers per width with the spread p20..p80."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    widths = by_width(content)
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for place, (provider, colour) in enumerate((("plain", "#9aa5b1"), ("uml_fast", "#1f6feb"))):
        rows = [next(r for r in group if r["provider"] == provider) for group in widths.values()]
        speed = [r["valid_tokens_per_s"] for r in rows]
        at = [i + 0.38 * (place - 0.5) for i in range(len(rows))]
        low = [s - r["valid_tokens"] / r["p80_ms"] * 1000 for s, r in zip(speed, rows, strict=True)]
        high = [
            r["valid_tokens"] / r["p20_ms"] * 1000 - s for s, r in zip(speed, rows, strict=True)
        ]
        bars = axes.bar(at, speed, 0.36, yerr=[low, high], capsize=3, color=colour, label=provider)
        axes.bar_label(bars, [f"{s:,.0f}" for s in speed], padding=3, fontsize=8)
    axes.margins(y=0.1)
    axes.set_xticks(range(len(widths)), [f"d = {w}" for w in widths])
    axes.set_ylabel("valid tokens per second")
    axes.set_title(f"training step, MOSI's shape, {content['name']}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # neither date nor random ids in the file, so that equal rows give an equal file
    with plt.rc_context({"svg.hashsalt": "uml_fast"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the plot and the documents' tables from the committed rows, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the tables of speed")
    if parser.parse_args(argv).print:
        for name, kind, _, table in TABLES:
            if name == kind:
                for content in load(kind):
                    print(f"{table(content)}\n")
        return
    for content in load("step")[:1]:
        plot_step(content, ROOT / "docs" / "img" / "step.svg")
    tables: dict[str, dict[str, str]] = {"README.md": {}, "docs/results.md": effect_tables()}
    for name, kind, file, table in TABLES:
        if found := load(kind):
            text = "\n\n".join(table(content) for content in found)
            tables.setdefault(file, {})[name] = text
    for content in load("accuracy"):
        tables["README.md"][content["recipe"]] = accuracy_table(content)
    for file, parts in tables.items():
        if not parts:
            continue
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        for name, part in parts.items():
            text = between_markers(text, name, part)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
