"""Training from the command line: results, resume, kill, stop, errors, evaluate and export."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.tiny import tiny
from uml_fast import evaluate, export, train
from uml_fast.config import ConfigError, MixConfig, OptimConfig, RunConfig
from uml_fast.data.synthetic import SyntheticConfig
from uml_fast.experiment.run import from_json, locked, to_json
from uml_fast.experiment.trained import load_model
from uml_fast.training import trial
from uml_fast.training.log import RunFolderError
from uml_fast.training.measure import embed, pack_source
from uml_fast.training.start import build_model
from uml_fast.training.trial import TrainingError

ROOT = Path(__file__).parents[1]
RECIPE = f"{Path(__file__).parent / 'tiny.py'}:tiny"


def losses(folder: Path) -> list[tuple[str, int, int, float]]:
    """(mode, seed, step, loss) of every logged step, in file order."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["mode"], r["seed"], r["step"], r["loss"]) for r in records]


def run_config(folder: Path, **changes: object) -> RunConfig:
    return dataclasses.replace(tiny(), out=folder, seeds=1, **changes)


def start(folder: Path) -> subprocess.Popen[str]:
    """Train the tiny recipe in a process of its own."""
    command = [sys.executable, "-m", "uml_fast.train", RECIPE, "--out", str(folder), "--seeds", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT
    )


def wait_for_steps(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = start(folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return folder


def test_run_folder_holds_results_comparison_and_report(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [(r["mode"], r["seed"]) for r in summary["results"]] == [("unimodal", 0), ("uml", 0)]
    assert all(0 <= r["probe"] <= 1 and 0 <= r["head"] <= 1 for r in summary["results"])
    (comparison,) = summary["comparison"]
    assert comparison["n"] == 1
    assert comparison["paired_diff_mean"] == pytest.approx(
        comparison["uml_mean"] - comparison["unimodal_mean"]
    )
    rates = summary["throughput"]
    assert rates["tokens_per_s"] > 0 and rates["recompiles"] == 0 and 50 < rates["fill_pct"] <= 100
    assert "<svg" in (finished / "report.html").read_text()
    samples = json.loads((finished / "samples.json").read_text())
    assert {s["kind"] for s in samples} == {"image", "audio", "text", "features"}
    assert list((finished / "tensorboard").rglob("events*"))


def test_every_step_is_logged_once_with_every_modality(finished: Path) -> None:
    lines = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    uml = [r for r in lines if r["mode"] == "uml"]
    assert [r["step"] for r in uml] == list(range(1, 31))
    assert set(uml[0]["losses"]) == {"image", "audio", "text", "features"}
    assert uml[0]["loss"] == pytest.approx(sum(uml[0]["losses"].values()), rel=1e-5)
    assert [r["step"] for r in lines if "val" in r] == [10, 20, 30] * 2


def test_killed_three_times_and_resumed_gives_the_same_losses(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    draw = random.Random()
    seed = draw.randrange(10**6)
    draw.seed(seed)
    for target in sorted(draw.sample(range(2, 58), 3)):
        process = start(folder)
        wait_for_steps(folder, process, target)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    process = start(folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert losses(folder) == losses(finished), f"kill moments of seed {seed}"
    before, after = (json.loads((f / "summary.json").read_text()) for f in (finished, folder))
    assert before["results"] == after["results"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_saves_and_exits_cleanly(
    number: signal.Signals, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_steps(folder, process, 7)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "continues it" in output
    done = len(losses(folder))
    assert 7 <= done < 60
    process = start(folder)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert losses(folder) == losses(finished)


def test_torn_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tmp_path / "run", modes=("uml",))
    train.train(config)
    whole = losses(tmp_path / "run")
    place = tmp_path / "run" / "trials" / "uml-0"
    (place / "result.json").unlink()
    newest = max((place / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    train.train(config)
    assert newest.name in caplog.text
    assert losses(tmp_path / "run") == whole


def test_finished_run_is_not_trained_again(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    train.train(run_config(finished))
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert "UML" in capsys.readouterr().out


def test_more_seeds_keep_the_ones_that_are_there(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", steps=4)
    train.train(config)
    first = losses(tmp_path / "run")
    train.train(dataclasses.replace(config, seeds=2))
    assert losses(tmp_path / "run")[: len(first)] == first
    assert len(losses(tmp_path / "run")) == 2 * len(first)


def test_other_configuration_in_the_folder_is_refused_by_name(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", steps=2, modes=("uml",))
    train.train(config)
    changed = dataclasses.replace(config, optim=OptimConfig(lr=0.5))
    with pytest.raises(ConfigError, match=r"optim\.lr \(0\.001 -> 0\.5\).*--resume never"):
        train.train(changed)
    train.train(dataclasses.replace(changed, resume="never"))
    aside = [p for p in tmp_path.iterdir() if p.name != "run"]
    assert len(aside) == 1 and (aside[0] / "summary.json").exists()


@pytest.mark.filterwarnings("ignore:.*nonfinite.*")
def test_nan_loss_stops_and_names_samples_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e30, clip_norm=0.0, schedule="constant", weight_decay=0.0)
    config = run_config(tmp_path / "run", modes=("uml",), optim=optim)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=1))
    with pytest.raises(
        TrainingError, match=r"(loss is (nan|inf)|weights are not finite).*checkpoints: "
    ):
        train.train(config)
    named = json.loads((tmp_path / "run" / "trials" / "uml-0" / "nonfinite.json").read_text())
    assert set(named["samples"]) == {"image", "audio", "text", "features"}
    assert all(named["samples"].values())


def test_patience_stops_early_and_restores_the_best(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", modes=("unimodal",), steps=200)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=2, patience=2))
    train.train(config)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    values = [r["val"] for r in lines if "val" in r]
    assert len(lines) < 200
    assert values[-3] == max(values) and values[-3] >= max(values[-2:])
    model, _, task = load_model(tmp_path / "run", "unimodal", 0)
    from uml_fast.training.measure import head_accuracy

    assert head_accuracy(model, pack_source(task.validation, torch.device("cpu"))) == max(values)


def test_configuration_round_trips_through_json() -> None:
    config = tiny()
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_evaluate_repeats_the_summary(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(finished), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    results = json.loads((finished / "summary.json").read_text())["results"]
    for one, other in zip(again["results"], results, strict=True):
        assert one["head"] == pytest.approx(other["head"])
        assert one["probe"] == pytest.approx(other["probe"])
        assert 0 <= one["knn"] <= 1


def test_exported_file_gives_the_same_logits_without_uml_fast(
    finished: Path, tmp_path: Path
) -> None:
    path = export.export(finished, "uml", None, tmp_path / "image.safetensors")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert not {n for n in names if "audio" in n or "text" in n}
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.S)
    assert code
    scope: dict[str, object] = {}
    exec(code.group(1).replace("image.safetensors", str(path)), scope)
    model, _, task = load_model(finished, "uml", 0)
    model.dtype = torch.float32
    packed = pack_source(task.test, torch.device("cpu"))
    expected = model.logits(torch.from_numpy(embed(model, packed)), "image")
    images = torch.from_numpy(task.test.rows).view(len(task.test), -1, 192)
    torch.testing.assert_close(scope["logits"](images), expected, rtol=1e-4, atol=1e-4)


def test_modes_of_a_seed_start_from_the_same_shared_weights() -> None:
    config = tiny()
    task = SyntheticConfig(shape="mixed", samples=40, held_out=12, classes=3).load(3, "uml")
    both = build_model(config, task, 3).state_dict()
    alone_task = config.load(3, "unimodal")
    alone = build_model(config.for_mode("unimodal"), alone_task, 3).state_dict()
    assert alone.keys() < both.keys()
    for name in alone:
        if not name.endswith(("mean", "deviation")):
            assert torch.equal(alone[name], both[name]), name


def test_losses_of_prediction_fall(tmp_path: Path) -> None:
    from tests.tiny import tiny_prediction

    optim = OptimConfig(lr=1e-2)
    config = dataclasses.replace(
        tiny_prediction(), out=tmp_path / "run", seeds=1, modes=("uml",), optim=optim
    )
    train.train(config)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0]["losses"]:
        assert math.isfinite(lines[-1]["losses"][name])
        assert lines[-1]["losses"][name] < lines[0]["losses"][name]


def test_stop_during_validation_saves_before_it_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "run", modes=("uml",), log_every=5)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=0))

    def stopped(*arguments: object) -> float:
        signal.raise_signal(signal.SIGTERM)
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr(trial, "run_metric", stopped)
        assert train.train(config) is None
    saved = list((tmp_path / "run" / "trials" / "uml-0" / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step-000000010.safetensors"]


def test_early_stop_leaves_the_checkpoint_that_the_result_is_of(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", modes=("unimodal",), steps=100)
    config = dataclasses.replace(
        config,
        eval=dataclasses.replace(config.eval, every=2, patience=2),
        checkpoint=dataclasses.replace(config.checkpoint, every=0),
    )
    train.train(config)
    (result,) = json.loads((tmp_path / "run" / "summary.json").read_text())["results"]
    (again,) = evaluate.evaluate(tmp_path / "run")
    assert again["head"] == result["head"]


def test_weights_that_are_not_finite_are_neither_saved_nor_measured(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e38, schedule="constant", weight_decay=0.0)
    config = run_config(tmp_path / "run", modes=("uml",), optim=optim, steps=1)
    with pytest.raises(TrainingError, match=r"weights are not finite at step 1.*none was saved"):
        train.train(config)
    assert (tmp_path / "run" / "trials" / "uml-0" / "nonfinite.json").exists()
    assert not (tmp_path / "run" / "trials" / "uml-0" / "checkpoints").exists()


@pytest.mark.parametrize(
    "mix",
    [
        MixConfig(token_budget=700),
        MixConfig(token_budget=700, policy="warmup", warmup_epochs=1),
        MixConfig(token_budget=700, policy="warmup", warmup_epochs=1, warmup_first="target"),
        MixConfig(token_budget=700, policy="alternate"),
    ],
    ids=["joint", "auxiliary-first", "target-first", "alternate"],
)
def test_unimodal_packs_have_the_target_rows_of_a_joint_pack(mix: MixConfig) -> None:
    config = dataclasses.replace(tiny(), mix=mix)
    task = config.load(0, "unimodal")
    _, (layout,) = trial.plan_mix(config, "unimodal", task, 0)
    assert layout.rows == pytest.approx(700 / 4, rel=0.1)


def test_run_of_a_users_own_classes_is_evaluated_in_a_new_process(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "import dataclasses\n"
        "from tests.tiny import tiny\n"
        "from uml_fast.data.synthetic import SyntheticConfig\n"
        "@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)\n"
        "class Mine(SyntheticConfig):\n    pass\n"
        "def mine():\n"
        "    data = Mine(shape='mixed', samples=40, held_out=12, classes=3)\n"
        "    return dataclasses.replace(tiny(), recipe='mine', data=data, steps=2, seeds=1)\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for verb in (
        ["train", f"{recipe}:mine", "--out", str(tmp_path / "run")],
        ["evaluate", str(tmp_path / "run")],
    ):
        command = [sys.executable, "-m", f"uml_fast.{verb[0]}", *verb[1:]]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_second_process_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(RunFolderError, match="another process trains"):
        train.train(run_config(tmp_path / "run", steps=1))
