"""Every analysis of the paper that a run allows: ``python -m uml_fast.analyse RUN``.

Writes analysis.json into the run folder and its charts into report.html.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from uml_fast.analysis.findings import Findings, Of
from uml_fast.analysis.of_heads import (
    Trained,
    head_findings,
    own_accuracy,
    pair_findings,
    pictures,
)
from uml_fast.cli import options, run_main
from uml_fast.config import ConfigError, RunConfig, require
from uml_fast.experiment.observe import (
    Observed,
    look,
    neuron_findings,
    open_pairs,
    open_shifted,
    shift_findings,
)
from uml_fast.experiment.observe_grid import (
    ChosenHead,
    Loaded,
    chosen_heads,
    look_at_head,
    mean_words,
    open_shifted_features,
    rate_findings,
    settings_of,
    shifted_heads,
)
from uml_fast.experiment.run import read_any_config
from uml_fast.experiment.trained import finished_trials, load_model
from uml_fast.grid.run import UNIMODAL, GridConfig
from uml_fast.report import print_analyses, write_report
from uml_fast.report.table import mode_name
from uml_fast.runtime.progress import StatusLine, duration
from uml_fast.training.log import write_json

ANALYSIS = "analysis.json"
"""Name of the file in a run's folder."""


def analyse(
    folder: Path,
    shifted: Mapping[str, str] | None = None,
    pairs: Mapping[str, str] | None = None,
    texts: Path | None = None,
) -> dict[str, Any]:
    """Analyse every finished trial, or chosen head, of a run; returns what analysis.json holds.

    Args:
        folder: run folder.
        shifted: name of a shifted test set of the target -> its shards; for heads on frozen
            features: a file of features (python -m uml_fast.extract).
        pairs: auxiliary -> shards whose samples are named like their partners among the target's
            test samples (for measuring multimodal neurons; training never sees them).
        texts: table of the texts that features were made of, for exchange rates in words.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no trial is finished, or one has no whole checkpoint.
        DataError: shards or features that cannot be used.
        ConfigError: ``pairs`` names no auxiliary of the run, or an option is not for such a run.
    """
    config = read_any_config(folder)
    rates: list[dict[str, Any]] = []
    if isinstance(config, GridConfig):
        require(not pairs, "--pairs is for runs of models; frozen features have no units in common")
        compared, found = (UNIMODAL, "uml"), Findings()
        heads = chosen_heads(folder)
        trials = sorted({(h.variant, h.cell.seed) for h in heads})
        rates = _analyse_heads(found, heads, config, shifted or {}, texts)
    else:
        require(texts is None, "--texts is for exchange rates, which grids of heads have")
        compared = config.compared
        found = Findings(compared, (mode_name(compared[0]), mode_name(compared[1])))
        trials = finished_trials(folder)
        _analyse_run(found, folder, config, trials, shifted or {}, pairs or {})
    found.charts += found.shift_charts()
    return {
        "recipe": config.recipe, "target": config.target, "compared": list(compared),
        "trials": [list(t) for t in trials], "rows": found.rows(), "exchange_rates": rates,
        "values": found.values, "charts": found.charts, "skipped": found.skipped,
    }  # fmt: skip


class _Progress:
    """The status line: what is analysed, and the time left."""

    def __init__(self, steps: int) -> None:
        self._steps, self._line, self._started = steps, StatusLine(), time.monotonic()

    def show(self, what: str, done: int) -> None:
        """Say what comes next."""
        if self._line.is_due():
            left = (time.monotonic() - self._started) / max(done, 1) * (self._steps - done)
            more = f", {duration(left)} left" if done else ""
            self._line.update(f"analysing {what} ({done + 1} of {self._steps}{more})")


def _analyse_heads(
    found: Findings,
    heads: Sequence[ChosenHead],
    config: GridConfig,
    shifted: Mapping[str, str],
    texts: Path | None,
) -> list[dict[str, Any]]:
    """Chosen heads of every setting against the unimodal head of its shots; the exchange rates."""
    sets = open_shifted_features(shifted)
    if not sets:
        found.skipped["robustness under shift"] = (
            "no shifted set is given (--shifted NAME=FEATURES.safetensors)"
        )
    found.skipped["multimodal neurons"] = "frozen features of two encoders have no units in common"
    renames = dict(pair.split("=") for pair in getattr(config.data, "same", ()))
    alone = {(h.cell.shots, h.cell.seed): h for h in heads if h.mode == UNIMODAL}
    work = [(s, h) for s, own in settings_of(heads).items() for h in own]
    pictured = next((i for i, (s, _) in enumerate(work) if s == work[-1][0]), -1)
    loaded, progress = Loaded(config), _Progress(len(work))
    for done, (setting, head) in enumerate(work):
        progress.show(f"{setting}, seed {head.cell.seed}", done)
        data = loaded.of(head)
        trained = []
        for h in (alone.get((head.cell.shots, head.cell.seed)), head):
            if h is not None:
                trained.append(look_at_head(found, h, data, setting, config))
                head_findings(found, trained[-1])
                if sets:
                    own_accuracy(found, trained[-1])
                shifted_heads(found, trained[-1], sets, data.class_names, renames)
        if len(trained) == 2:
            pair_findings(found, *trained)
        if done == pictured:
            pictures(found, trained, data.class_names)
    words = None if texts is None else mean_words(texts)
    return rate_findings(found, heads, loaded.of(heads[0]), words)


def _analyse_run(
    found: Findings,
    folder: Path,
    config: RunConfig,
    trials: Sequence[tuple[str, int]],
    shifted: Mapping[str, str],
    pairs: Mapping[str, str],
) -> None:
    auxiliaries = [m.name for m in config.modalities if m.name != config.target]
    for name in pairs:
        require(name in auxiliaries, f"--pairs names {name!r}; auxiliaries are {auxiliaries}")
    sets = open_shifted(config, shifted)
    if not sets:
        found.skipped["robustness under shift"] = "no shifted set is given (--shifted NAME=SHARDS)"
    found.skipped["exchange rate"] = "needs heads at several shots of both (recipe exchange_rate)"
    seen: dict[int, dict[str, Trained]] = {}
    progress = _Progress(len(trials))
    for done, (mode, seed) in enumerate(trials):
        progress.show(f"{mode} seed {seed}", done)
        observed = Observed(*load_model(folder, mode, seed), Of(mode, seed))
        trained = seen.setdefault(seed, {})[mode] = look(observed)
        if not len(trained.labels):
            found.skipped["what needs classes"] = "the test samples have none"
        else:
            head_findings(found, trained)
            if sets:
                own_accuracy(found, trained)
            shift_findings(found, observed, sets)
        if mode == config.compared[1]:
            _neurons(found, observed, pairs, folder / "trials" / f"{mode}-{seed}")
        of_seed = seen.get(seed, {})
        if set(config.compared) <= of_seed.keys():
            pair_findings(found, *(of_seed[m] for m in config.compared))
        if seed == trials[0][1] and (done + 1 == len(trials) or trials[done + 1][1] != seed):
            pictures(found, list(of_seed.values()), observed.task.class_names)
        if done + 1 < len(trials) and trials[done + 1][1] != seed:
            seen.pop(seed, None)


def _neurons(found: Findings, o: Observed, places: Mapping[str, str], place: Path) -> None:
    pairs = open_pairs(o, places)
    if not pairs:
        found.skipped["multimodal neurons"] = (
            "the data have no true pairs; give some with --pairs AUXILIARY=SHARDS"
        )
        return
    neuron_findings(found, o, pairs, place)


def _named(option: str, given: Sequence[str]) -> dict[str, str]:
    """``NAME=PLACE`` arguments by name.

    Raises:
        ConfigError: one is written otherwise, or a name stands twice.
    """
    out: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or name in out:
            raise ConfigError(f"{option} {text}: write NAME=SHARDS, every name once")
        out[name] = place
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyseConfig:
    """Every analysis of the paper that a run allows: into analysis.json and report.html.

      python -m uml_fast.analyse runs/folders
      python -m uml_fast.analyse runs/folders --shifted sketch=shards/sketch fog=shards/fog
      python -m uml_fast.analyse runs/folders --pairs text=shards/captions
      python -m uml_fast.analyse runs/exchange_rate --texts prompts.json

    docs/experiments.md says what each measures.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    shifted: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=SHARDS ...")] = ()
    """Test sets of the target from elsewhere (features for heads on them); classes meet by name."""
    pairs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="AUXILIARY=SHARDS ...")] = ()
    """Samples named as their true partners among the target's test samples."""
    texts: Path | None = None
    """Table of the texts that features were made of, for exchange rates in words."""
    json: bool = False
    """Print what analysis.json holds instead of a table."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.analyse``; returns the exit status."""
    args = options(AnalyseConfig, "analyse", argv)
    shifted, pairs = _named("--shifted", args.shifted), _named("--pairs", args.pairs)
    result = analyse(args.run, shifted, pairs, args.texts)
    write_json(args.run / ANALYSIS, result)
    report = write_report(args.run)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(print_analyses(result))
        print(f"report: {report}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
