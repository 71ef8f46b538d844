"""report.html: the files of a run folder put into the page."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uml_fast.report import analyses, sections, shots
from uml_fast.report.probes import probe_section
from uml_fast.report.sections import ReportError, escape, together, versions_of
from uml_fast.report.table import beaten_by, metric_of, searched
from uml_fast.training.log import RunFolderError, read_metrics


def write_report(folder: Path) -> Path:
    """Write ``report.html`` for the run in ``folder``, finished or not; returns its path.

    Raises:
        ReportError: the folder holds no run, or one of its files is damaged.
        RunFolderError: metrics.jsonl is damaged, or the report cannot be written.
        ModuleNotFoundError: matplotlib is missing.
    """
    run, summary = _read(folder, "run.json"), _read(folder, "summary.json")
    if run is None and summary is None:
        raise ReportError(f"{folder} holds no run: neither run.json nor summary.json is there")
    samples = _read(folder, "samples.json") or []
    analysis = _read(folder, "analysis.json")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError("report.html needs matplotlib: pip install matplotlib") from error
    page = _page(run or {}, summary, read_metrics(folder), samples, analysis, folder)
    path = folder / "report.html"
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _read(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"cannot read {path}: {error}") from error


def _page(
    run: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
    records: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    analysis: Mapping[str, Any] | None,
    folder: Path,
) -> str:
    config = run.get("config") or {}
    facts = {**config, **(summary or {})}
    recipe, target = facts.get("recipe", "run"), facts.get("target", "")
    headline, side, lead = _headline(summary)
    parts = [
        sections.comparison(summary) if summary else "",
        probe_section(summary) if summary else "",
        shots.section(summary) if summary else "",
        sections.every_seed(summary) if summary else "",
        sections.curves(records, facts),
        analyses.section(analysis, summary) if analysis else "",
        sections.throughput(summary, records) if summary else "",
        sections.sample_cards(samples, folder / "samples.json"),
        sections.theory(summary) if summary else "",
        sections.setup(run, summary or {}),
    ]
    eyebrow = [
        recipe,
        f"target: {target}",
        metric_of(facts).title,
        str(run.get("started", ""))[:16],
    ]
    template = string.Template(Path(__file__).with_name("template.html").read_text("utf-8"))
    return template.substitute(
        title=escape(f"{recipe}: {headline}"),
        eyebrow=escape(" · ".join(x for x in eyebrow if x)),
        headline=together(_in_two_sizes(escape(headline))),
        side=side,
        lead=lead,
        sections="\n".join(p for p in parts if p),
        footer=escape(f"uml_fast {versions_of(run, summary or {}).get('uml_fast', '')} · {folder}"),
    )


def _headline(summary: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """The verdict in one sentence, its side, and what must be said beside it (HTML)."""
    if summary is None:
        return "The run has not finished", "", '<p class="note">What was logged so far.</p>'
    rows = summary["comparison"]
    lead = "".join(
        f'<p class="warning">{escape(s[0].upper() + s[1:])}.</p>' for s in beaten_by(summary)
    ) + "".join(f'<p class="note">{escape(s[0].upper() + s[1:])}.</p>' for s in searched(summary))
    if not rows:
        lead += '<p class="note">A paired comparison needs both modes with the same seeds.</p>'
        return "No comparison", "", lead
    if len(rows) == 1:
        verdict = rows[0]["verdict"]
        return verdict[0].upper() + verdict[1:], metric_of(summary, rows[0]).side(rows[0]), lead
    sides = [metric_of(summary, c).side(c) for c in rows]
    better, worse = sides.count("better"), sides.count("worse")
    parts = [f"better in {better}"] * bool(better) + [f"worse in {worse}"] * bool(worse)
    if not parts:
        return f"No difference shown in {len(rows)} settings", "", lead
    side = "better" if not worse else "worse" if not better else ""
    return f"UML is {' and '.join(parts)} of {len(rows)} settings", side, lead


def _in_two_sizes(headline: str) -> str:
    """The headline with what it says in brackets, the evidence, set smaller."""
    said, bracket, evidence = headline.partition(" (")
    return f"{said} <span>{evidence.removesuffix(')')}</span>" if bracket else said
