"""What unpaired modalities bring, for every number of shots: a finished run's summary as rows, and
rows as the tables of docs/results.md.

    python -m bench.effects NAME RUN [RUN ...]      keeps bench/results/effect_NAME.json
    python -m bench.plot                            writes the tables between the markers

Several runs are one experiment with other shots (``folders`` has one number of shots a run).
``control@RUN`` is a run whose mode uml is called control. ``--against uml=network`` also compares
two modes with each other. The line "mean" compares each seed's mean over all shots.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import RESULTS
from uml_fast.analysis.statistics import correct_rows, paired_comparison
from uml_fast.cli import run_main
from uml_fast.runtime.files import replace_file

_KEPT = ("recipe", "target", "metric", "machine", "versions", "searched", "heads")
_RESULT = ("mode", "seed", "shots", "head", "validation", "steps")
_ALONE = "unimodal"


def keep(name: str, given: Sequence[str], against: Mapping[str, str]) -> Path:
    """Write the summaries of finished runs as one file of rows; returns its path.

    Args:
        name: of the rows.
        given: run folders of one recipe, the first with all numbers of shots, or ``control@`` ones.
        against: mode -> other mode that it is compared with, beside the target alone.

    Raises:
        ValueError: the runs are of different recipes, or one lacks a mode.
    """
    parts = [run.rpartition("@") for run in given]
    runs, called = [Path(p[2]) for p in parts], [p[0] or "uml" for p in parts]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    infos = [json.loads((run / "run.json").read_text()) for run in runs]
    first = summaries[0]
    if len({s["recipe"] for s in summaries}) > 1:
        raise ValueError(f"runs of several recipes: {', '.join(s['recipe'] for s in summaries)}")
    results: list[dict[str, Any]] = []
    baselines: list[dict[str, Any]] = []
    for summary, info, uml in zip(summaries, infos, called, strict=True):
        own = info["config"]["data"].get("shots")
        for r in summary["results"]:
            shots = own if r.get("shots") is None else r["shots"]
            mode = uml if r["mode"] == "uml" else r["mode"]
            results.append({k: r[k] for k in _RESULT if k in r} | {"shots": shots, "mode": mode})
        baselines += [b | {"shots": b.get("shots", own)} for b in summary["baselines"]]
    pairs = {m: _ALONE for m in dict.fromkeys(r["mode"] for r in results) if m != _ALONE}
    rows = [row for mode, other in (*pairs.items(), *against.items())
            for row in compare(results, mode, other)]  # fmt: skip
    content = {k: first[k] for k in _KEPT if k in first} | {
        "commits": [*dict.fromkeys(info["commit"] for info in infos)],
        "date": infos[0]["started"],
        "rows": correct_rows(rows),
        "baselines": baselines,
        "results": results,
        "config": infos[0]["config"],
    }
    path = RESULTS / f"effect_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(content, separators=(",", ":")) + "\n")
    return path


def compare(results: Sequence[Mapping[str, Any]], mode: str, other: str) -> list[dict[str, Any]]:
    """A mode against another one over paired seeds, for each number of shots and their mean."""
    values: dict[tuple[str, Any], dict[int, float]] = {}
    for r in results:
        values.setdefault((r["mode"], r["shots"]), {})[r["seed"]] = r["head"]
    numbers = list(dict.fromkeys(r["shots"] for r in results))
    pairs = {}
    for shots in numbers:
        found, base = (values.get((m, shots), {}) for m in (mode, other))
        seeds = sorted(found.keys() & base.keys())
        if not seeds:
            raise ValueError(f"no seed has both {mode} and {other} at {shots} shots")
        pairs[shots] = {s: (base[s], found[s]) for s in seeds}
    if len(numbers) > 1:
        common = sorted(set.intersection(*(set(p) for p in pairs.values())))
        pairs["mean"] = {s: tuple(np.mean([pairs[k][s] for k in numbers], 0)) for s in common}
    rows = []
    for shots, by_seed in pairs.items():
        c = paired_comparison(*map(list, zip(*by_seed.values(), strict=True)))
        rows.append({"mode": mode, "against": other, "shots": shots, **asdict(c)})
    return rows


def effect_tables() -> dict[str, str]:
    """Table of every kept experiment by its name."""
    paths = sorted(RESULTS.glob("effect_*.json"))
    return {p.stem.removeprefix("effect_"): effect_table(json.loads(p.read_text())) for p in paths}


def effect_table(content: Mapping[str, Any]) -> str:
    """Markdown: a line for each number of shots: the target alone, differences, simple methods."""
    rows, target = content["rows"], content["target"]
    pairs = list(dict.fromkeys((r["mode"], r["against"]) for r in rows))
    simple = list(dict.fromkeys(b["name"] for b in content["baselines"]))
    heads = [f"{m} - {target} alone" if o == _ALONE else f"{m} - {o}" for m, o in pairs]
    lines = [
        "| shots | " + " | ".join([f"{target} alone", *heads, *simple]) + " |",
        "|---:" * (2 + len(heads) + len(simple)) + "|",
    ]
    for shots in dict.fromkeys(r["shots"] for r in rows):
        own = {(r["mode"], r["against"]): r for r in rows if r["shots"] == shots}
        means = {b["name"]: b["mean"] for b in content["baselines"] if b["shots"] == shots}
        alone = next(r["unimodal_mean"] for (_, o), r in own.items() if o == _ALONE)
        cells = [str(shots), f"{100 * alone:.1f}", *(_difference(own[p]) for p in pairs)]
        cells += [f"{100 * means[n]:.1f}" if n in means else "-" for n in simple]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", conditions(content)])


def _difference(row: Mapping[str, Any]) -> str:
    mean = f"{100 * row['paired_diff_mean']:+.1f}"
    if row["ci95_low"] is None:
        return f"{mean} (no interval)"
    shown = f"{mean} [{100 * row['ci95_low']:+.1f}, {100 * row['ci95_high']:+.1f}]"
    return f"**{shown}**" if row["p_holm"] < 0.05 else shown


def conditions(content: Mapping[str, Any]) -> str:
    """One line with what the numbers depend on."""
    machine, rows = content["machine"], content["rows"]
    searched = f"{content['searched']} points searched a head, " if "searched" in content else ""
    commits = ", ".join((c or "unknown")[:10] for c in content["commits"])
    return (
        f"Test accuracy in %, {rows[0]['n']} paired seeds; [95 % t interval of the mean "
        f"difference]; bold: p < 0.05 after Holm's correction for {len(rows)} comparisons. "
        f"{searched}{machine['cpu']}, torch {content['versions']['torch']}, commit {commits}, "
        f"{content['date'][:10]}; rows in bench/results."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Keep finished runs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Keep finished runs as rows of docs/results.md.")
    parser.add_argument("name", help="of the rows and of the markers in docs/results.md")
    parser.add_argument("runs", nargs="+", help="run folders, control@RUN")
    parser.add_argument("--against", nargs="*", default=[], metavar="MODE=OTHER")
    given = parser.parse_args(argv)
    print(keep(given.name, given.runs, dict(pair.split("=") for pair in given.against)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
