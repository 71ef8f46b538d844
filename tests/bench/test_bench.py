"""The bench measures what it says: same data and losses, turns, full packs, fixed shapes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import cuda_timing, gate, harness, plot, step, tables
from bench.factors import PackedStep
from bench.plain import PlainStep
from bench.shapes import STEP_SHAPES, StepShape, draw_batches, layout, valid_tokens
from tests.plain_uml import PlainUml, adam, pad
from uml_fast.packing.pack import pack_samples, unpack_samples
from uml_fast.packing.schedule import Planner, Stream, make_layouts
from uml_fast.recipes.throughput import mosi

SMALL = StepShape(width=10, batch=6, rounds=1, plain_rounds=1)
"""A shape that trains in milliseconds."""


@pytest.mark.parametrize("shape", STEP_SHAPES, ids=lambda s: f"d{s.width}")
def test_batches_are_exact_and_fill_their_pack(shape: StepShape) -> None:
    for batch in draw_batches(shape):
        assert [len(samples) for samples in batch.values()] == [shape.batch, shape.batch]
        packed = pack_samples(layout(shape), batch)
        assert valid_tokens(batch) == int(packed.valid_T().sum()) >= 0.95 * packed.layout.rows
        for m, samples in unpack_samples(packed).items():
            for got, given in zip(samples, batch[m], strict=True):
                np.testing.assert_array_equal(got, given)


@pytest.mark.parametrize("shape", STEP_SHAPES, ids=lambda s: f"d{s.width}")
def test_the_planner_fills_packs_of_the_mosi_shape_with_one_shape(shape: StepShape) -> None:
    """What a run gets: every pack of one layout, so nothing recompiles, and 95 % or more filled."""
    config = mosi(shape.width, shape.batch)
    streams = [
        Stream(name=s.name, lengths=s.lengths, row_elems=s.rows.shape[1], dtype=s.rows.dtype.name)
        for s in config.load(0, "uml").train
    ]
    layouts = make_layouts(streams, config.mix)
    planner = Planner(streams, layouts, config.mix, seed=0)
    assert len(layouts) == 1
    rows = []
    for _ in range(64):
        plan = planner.next()
        rows.append(
            sum(int(s.lengths[i].sum()) for s, i in zip(streams, plan.samples, strict=True))
        )
    assert sum(rows) / (64 * layouts[0].rows) >= 0.95
    assert layouts[0].rows <= config.mix.token_budget


def test_steps_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs of other samples run the same compiled step."""
    # what is traced, and when again, does not depend on the backend that makes the code
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = torch._dynamo.utils.counters
    torch._dynamo.reset()
    compiled.clear()
    batches = draw_batches(SMALL, count=4)
    ours = step.UmlFastStep(batches, SMALL, dropout=0.1, compile=True)
    ours()
    once = compiled["stats"]["unique_graphs"]
    for _ in range(4):
        ours()
    assert once >= 1
    assert compiled["stats"]["unique_graphs"] == once
    torch._dynamo.reset()


def test_equal_losses_pass() -> None:
    assert step.check_equal_losses(SMALL, draw_batches(SMALL)) < step.LOSS_TOLERANCE


def test_unequal_losses_stop_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    state = step.uml_fast_state

    def bent(plain: PlainUml) -> dict[str, torch.Tensor]:
        weights = state(plain)
        weights["backbone.blocks.4.down.weight"] = weights["backbone.blocks.4.down.weight"] * 1.02
        return weights

    monkeypatch.setattr(step, "uml_fast_state", bent)
    with pytest.raises(AssertionError, match="losses differ"):
        step.check_equal_losses(SMALL, draw_batches(SMALL))


def test_plain_step_trains_the_release_way() -> None:
    batches = draw_batches(SMALL)
    plain = PlainStep(batches, SMALL.width, dropout=0.0)
    expected = PlainUml({"x": 20, "y": 300}, SMALL.width, dropout=0.0)
    expected.load_state_dict(plain.model.state_dict())
    optimizer = adam(expected)
    for batch in batches:
        total, _ = expected.total_loss({m: pad(s) for m, s in batch.items()}, "release")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        assert plain() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize(("one_pass", "fused_adam"), [(False, False), (True, False), (True, True)])
def test_packed_variants_train_the_same_model(one_pass: bool, fused_adam: bool) -> None:
    batches = draw_batches(SMALL)
    packed = PackedStep(
        batches, SMALL.width, 0.0, one_pass=one_pass, bf16=False, fused_adam=fused_adam
    )
    plain = PlainUml({"x": 20, "y": 300}, SMALL.width, dropout=0.0)
    plain.load_state_dict(packed.model.state_dict())
    optimizer = adam(plain)
    for batch in batches:
        total, _ = plain.total_loss({m: pad(s) for m, s in batch.items()}, "valid")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        assert packed() == pytest.approx(total.item(), rel=1e-5)


def test_providers_take_turns() -> None:
    calls: list[str] = []
    steps = {name: functools.partial(calls.append, name) for name in "ab"}
    seconds = harness.measure(steps, rounds={"a": 4, "b": 2}, warmup_rounds=1)
    assert "".join(calls[:2]) == "ab"
    # the order turns round every time, and the slow provider's rounds spread over the run
    assert "".join(calls[2:]) == "abaaba"
    assert [len(seconds["a"]), len(seconds["b"])] == [4, 2]


def test_a_spent_budget_ends_after_three_rounds_each() -> None:
    steps = {"a": lambda: None, "b": lambda: None}
    seconds = harness.measure(steps, rounds={"a": 40, "b": 10}, warmup_rounds=0, budget_s=0.0)
    assert len(seconds["b"]) == 3
    assert len(seconds["a"]) < 20


def test_recorded_clock_replays_durations() -> None:
    clock = harness.RecordedClock()
    clock.load([0.5, 0.25])
    start, end, start_again, end_again = (clock() for _ in range(4))
    assert (end - start, end_again - start_again) == (0.5, 0.25)


def content(fast: float) -> plot.Content:
    common = {"d": 40, "batch": 32, "threads": 2, "dropout": 0.1, "load_before": 0.0}
    speeds = {"plain": (1000.0, "float32"), "uml_fast": (fast, "bfloat16")}
    rows = [
        {
            **common,
            "provider": provider,
            "dtype": dtype,
            "valid_tokens_per_s": speed,
            "valid_tokens": 1200.0,
            "fill_pct": 41.0,
            "p20_ms": 1200 / speed * 900,
            "p80_ms": 1200 / speed * 1100,
        }
        for provider, (speed, dtype) in speeds.items()
    ]
    machine = {"gpu": None, "cpu": "A CPU", "cpu_features": ["avx2"], "cores": 2}
    return {
        "name": "a_cpu",
        "machine": machine,
        "commit": "0123456789abcdef",
        "dirty": False,
        "date": "2026-01-02T00:00:00",
        "versions": {"torch": "2.13.0"},
        "rows": rows,
    }


def test_table_has_the_ratio_and_the_conditions() -> None:
    table = tables.step_table(content(5250.0))
    assert "| 40 | 32 + 32 | 1,000 (float32) | 5,250 (bfloat16) | 5.2 | 41 % / 41 % |" in table
    assert "A CPU (avx2), 2 cores, threads 2, torch 2.13.0" in table and "0123456789," in table


def test_the_multibench_table_has_both_parts_and_their_ratios() -> None:
    made = content(1000.0)
    for row, seconds in zip(made["rows"], ((40.0, 20.0), (4.0, 1.0)), strict=True):
        row |= {"train_s": seconds[0], "evaluate_s": seconds[1], "p50_ms": 1000 * sum(seconds)}
    table = tables.multibench_table(made)
    assert "| plain (float32) | 40.00 | 20.00 | 60.00 |" in table
    assert "| times as fast | 10.0 | 20.0 | 12.0 |" in table


def test_readme_table_is_replaced_between_its_markers() -> None:
    text = "before\n<!-- bench:step -->\nold\n<!-- /bench:step -->\nafter\n"
    out = plot.between_markers(text, "step", "new")
    assert out == "before\n<!-- bench:step -->\nnew\n<!-- /bench:step -->\nafter\n"
    assert plot.between_markers(out, "step", "new") == out
    with pytest.raises(ValueError, match="bench:factors"):
        plot.between_markers(text, "factors", "new")


def test_equal_rows_give_an_equal_plot(tmp_path: Path) -> None:
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plot.plot_step(content(5000.0), first)
    plot.plot_step(content(5000.0), second)
    assert first.read_bytes() == second.read_bytes()
    plot.plot_step(content(6000.0), second)
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    ("body", "message"), [("assert 1 == 2", "assert 1 == 2"), ("", "no tests ran")]
)
def test_a_red_test_stops_the_kernel_bench(tmp_path: Path, body: str, message: str) -> None:
    file = tmp_path / "test_red.py"
    file.write_text(f"def test_it():\n    {body}\n" if body else "")
    with pytest.raises(gate.RedTests, match=message):
        gate.check(str(file))
    file.write_text("def test_it():\n    pass\n")
    gate.check(str(file))


def test_merged_rows_replace_those_of_the_same_case(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    harness.merge_rows(path, [{"op": "a", "ms": 1}, {"op": "b", "ms": 2}], ["op"])
    harness.merge_rows(path, [{"op": "b", "ms": 3}], ["op"])
    rows = json.loads(path.read_text())["rows"]
    assert [(r["op"], r["ms"], "date" in r) for r in rows] == [("a", 1, True), ("b", 3, False)]


def test_gaps_are_where_no_kernel_runs() -> None:
    def event(cat: str, ts: float, dur: float, name: str = "") -> dict[str, Any]:
        return {"cat": cat, "ts": ts, "dur": dur, "name": name}

    kernels = [event("kernel", 100, 40), event("kernel", 120, 30), event("gpu_memset", 160, 10)]
    assert cuda_timing.gap_pct([*kernels, event("kernel", 170, 30)]) == pytest.approx(10)
    copy = event("gpu_memcpy", 150, 10, "Memcpy DtoD (Device -> Device)")
    assert cuda_timing.gap_pct([*kernels, copy]) == pytest.approx(0)
    others = [
        event("gpu_memcpy", 150, 10, "Memcpy HtoD (Pinned -> Device)"),
        event("gpu_user_annotation", 100, 90), event("cpu_op", 0, 500), {"ph": "M", "name": "x"},
    ]  # fmt: skip
    assert cuda_timing.gap_pct([*kernels, *others]) == pytest.approx(100 / 7)
