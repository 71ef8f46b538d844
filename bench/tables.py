"""Rows of bench/results as Markdown tables, each with the conditions it was measured under."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from bench.harness import RESULTS
from uml_fast.cost.scaling import Chip, Cluster, Network, Stream, predict
from uml_fast.data.synthetic import SHAPES
from uml_fast.model.transformer import multibench

Content = dict[str, Any]
"""One file of rows."""


def load(kind: str) -> list[Content]:
    """The row files of a bench, one per machine."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{kind}_*.json"))]


def conditions(content: Content) -> str:
    """One line with everything the numbers depend on."""
    machine, row = content["machine"], content["rows"][0]
    chip = machine["gpu"] or f"{machine['cpu']} ({', '.join(machine['cpu_features'])})"
    commit = (content["commit"] or "unknown")[:10] + (" with changes" if content["dirty"] else "")
    threads = f"threads {row['threads']}, " if "threads" in row else ""
    dropout = f"dropout {row['dropout']}, " if "dropout" in row else ""
    load = f"load {row['load_before']} before, " if "load_before" in row else ""
    return (
        f"{chip}, {machine['cores']} cores, {threads}torch {content['versions']['torch']}, "
        f"{dropout}median of interleaved rounds, {load}commit {commit}, {content['date'][:10]}; "
        "rows in bench/results."
    )


def by_width(content: Content) -> dict[int, list[dict[str, Any]]]:
    """Rows per width, in their order."""
    out: dict[int, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        out.setdefault(row["d"], []).append(row)
    return out


def step_table(content: Content) -> str:
    """Markdown: one line per width with both providers and their ratio."""
    lines = [
        "| d | batch | plain, valid tokens/s | uml_fast, valid tokens/s | times as fast | filled |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for width, rows in by_width(content).items():
        plain, ours = (next(r for r in rows if r["provider"] == p) for p in ("plain", "uml_fast"))
        ratio = ours["valid_tokens_per_s"] / plain["valid_tokens_per_s"]
        lines.append(
            f"| {width} | {ours['batch']} + {ours['batch']} | {plain['valid_tokens_per_s']:,.0f} "
            f"({plain['dtype']}) | {ours['valid_tokens_per_s']:,.0f} ({ours['dtype']}) | "
            f"{ratio:.1f} | {plain['fill_pct']:.0f} % / {ours['fill_pct']:.0f} % |"
        )
    return "\n".join([*lines, "", conditions(content)])


def multibench_table(content: Content) -> str:
    """Markdown: an epoch of each provider, its two parts, and their ratios."""
    plain, ours = (
        next(r for r in content["rows"] if r["provider"] == p) for p in ("plain", "uml_fast")
    )

    def ratio(key: str) -> str:
        return f"{plain[key] / ours[key]:.1f}"

    lines = [
        "| MOSI's layout, d = 150, batch 32 | training, s | evaluation, s | epoch, s |",
        "|---|---:|---:|---:|",
        *(
            f"| {r['provider']} ({r['dtype']}) | {r['train_s']:.2f} | {r['evaluate_s']:.2f} | "
            f"{r['p50_ms'] / 1000:.2f} |"
            for r in (plain, ours)
        ),
        f"| times as fast | {ratio('train_s')} | {ratio('evaluate_s')} | {ratio('p50_ms')} |",
    ]
    return "\n".join([*lines, "", conditions(content)])


def factors_table(content: Content) -> str:
    """Markdown: one line per change with the factor it brought at each width."""
    widths = by_width(content)
    lines = [
        "| change | " + " | ".join(f"d = {w}" for w in widths) + " |",
        "|---|" + "---:|" * len(widths),
    ]
    for changes in zip(*widths.values(), strict=True):
        name = changes[0]["variant"]
        cells = [f"{r['valid_tokens_per_s']:,.0f} (x {r['factor']:.2f})" for r in changes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"Valid tokens/s (x the line above). {conditions(content)}"])


def kernels_table(content: Content) -> str:
    """Markdown: one line per op, shape and dtype: how many times as fast as each baseline."""
    cases: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for row in content["rows"]:
        case = cases.setdefault((row["op"], row["shape_name"], row["dtype"]), {})
        case.setdefault(row["mode"], {})[row["provider"]] = row["times_ours"]
    modes = ("fwd", "bwd", "full")
    lines = [
        "| op | shape | dtype | forward | backward | both |",
        "|---|---|---|---:|---:|---:|",
    ]
    for (op, shape, dtype), found in cases.items():
        cells = []
        for mode in modes:
            others = {p: t for p, t in found.get(mode, {}).items() if p != "uml_fast"}
            cells.append(", ".join(f"{t:.1f} {p}" for p, t in others.items()) or "-")
        lines.append(f"| `{op}` | {shape} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", f"Time of each baseline / time of uml_fast. {conditions(content)}"]
    )


def loader_table(content: Content) -> str:
    """Markdown: samples a second of each provider, a line per case, then what whole runs see."""
    cases: dict[str, dict[str, Any]] = {}
    runs: dict[str, Any] = {}
    for row in content["rows"]:
        if "provider" in row:
            cases.setdefault(row["case"], {})[row["provider"]] = row
        else:
            runs[row["case"]] = row
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    lines = [
        "| samples/s (uml_fast is times as fast; CPU s per 1,000) | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
    ]
    for case, found in cases.items():
        cells = [
            f"{found[n]['samples_per_s']:,.0f} ({found[n]['ours_times']:.2f}; "
            f"{found[n]['cpu_s_per_1000']:.3g})" if n in found else "-" for n in names
        ]  # fmt: skip
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    if row := runs.get("headspace"):
        lines.append(
            f"\nTraining `folders` on {row['files']} images, texts and sounds: "
            f"{row['headspace_pct']:.1f} % of the rate with packs in memory, stall "
            f"{row['stall_pct']:.2f} %, mix within {row['mix_error_pct']:.2f} % in every 64 packs."
        )
    if row := runs.get("memory"):
        lines.append(f"\nMemory over {row['epochs']} epochs: {row['growth_pct']:+.2f} %.")
    if row := runs.get("start"):
        lines.append(
            f"\nFirst step on {row['samples']:,} images after {row['first_step_s']:.1f} s."
        )
    return "\n".join([*lines, "", conditions(content)])


def grid_table(content: Content) -> str:
    """Markdown: a grid of cells on each device, and the same cells one after another."""
    lines = [
        "| device | cells x steps | together, s | one after another, s | times | a step, us |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        lines.append(
            f"| {row['device']} | {row['cells']} x {row['steps']} | {row['grid_s']:.1f} | "
            f"{row['loop_s']:.0f} ({row['loop']}, threads {row['loop_threads']}) | "
            f"**{row['times']:.1f}** | {row['grid_us_a_step']:.0f} |"
        )
    return "\n".join([*lines, "", conditions(content)])


def train_table(content: Content) -> str:
    """Markdown: training end to end, a line for each size and provider."""
    lines = [
        "| ViT | provider | valid tokens/s | images, sounds, texts/s | MFU | filled | first step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        mfu = f"{100 * row['mfu']:.1f} %"
        if row["mfu_datasheet"]:
            mfu += f", datasheet {100 * row['mfu_datasheet']:.1f} %"
        samples = " ".join(f"{row['samples_per_s'][m]:,.1f}" for m in ("image", "audio", "text"))
        plain = next(
            r for r in content["rows"] if r["size"] == row["size"] and r["provider"] == "plain"
        )
        is_ours = row["provider"] == "uml_fast"
        times = f" ({plain['times']:.2f} times the plain stack)" if is_ours else ""
        lines.append(
            f"| {row['size'].title()}/16 | {row['provider']} | "
            f"{row['tokens_per_s']:,.0f}{times} | {samples} | {mfu} | {row['fill_pct']:.0f} % | "
            f"{row['first_step_s']:.1f} s |"
        )
    return "\n".join([*lines, "", conditions(content)])


def scaling_table(content: Content) -> str:
    """Markdown: what docs/scaling.md's model predicts for each step, and what was measured."""
    lines = [
        "| d | predicted, tokens/s | of it the products alone | measured | part reached |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in (r for r in content["rows"] if r["provider"] == "uml_fast" and "peak_tflops" in r):
        backbone = multibench(row["d"])
        streams = tuple(
            Stream(
                name=name, share=s.mean, tokens=s.mean, inputs=s.row_elems, stored_bytes=0,
                raw_bytes=0, decode_s=0,
            ) for name, s in SHAPES[row["shape"]].items()
        )  # fmt: skip
        chip = Chip(
            flops=1e12 * row["peak_tflops"], bytes_per_s=1e9 * row["copy_gb_per_s"], reached=1,
            reached_bandwidth=1, memory_gib=1, link_bytes_per_s=1, network_bytes_per_s=1,
        )  # fmt: skip
        network = Network(
            width=row["d"], layers=backbone.layers, feed_forward=backbone.feed_forward, classes=0,
            causal=True,
        )  # fmt: skip
        tokens = round(row["valid_tokens"])
        found = predict(
            network, streams, Cluster(chip=chip, gpus=1), tokens,
            dtype_bytes=2 if row["dtype"] == "bfloat16" else 4,
        )  # fmt: skip
        predicted = tokens / found.compute_s
        lines.append(
            f"| {row['d']} | {predicted:,.0f} | {tokens / found.products_s:,.0f} | "
            f"{row['valid_tokens_per_s']:,.0f} | "
            f"{100 * row['valid_tokens_per_s'] / predicted:.0f} % |"
        )
    return "\n".join([*lines, "", conditions(content)])


def accuracy_table(content: Content) -> str:
    """Markdown: the target's metric of both modes and of the simple methods on the same data."""
    is_error = content["metric"] == "error"

    def shown(value: float) -> str:
        return f"{value:.2f}" if is_error else f"{100 * value:.1f} %"

    (c,) = content["comparison"]
    low, high = (shown(c[k]) for k in ("ci95_low", "ci95_high"))
    metric = "error" if is_error else "accuracy"
    lines = [
        f"| {content['recipe']}: {content['target']} {metric} | mean |",
        "|---|---:|",
        f"| the target alone, same network and steps | {shown(c['unimodal_mean'])} |",
        f"| **UML** | **{shown(c['uml_mean'])}** |",
        f"| difference, paired over {c['n']} seeds | "
        f"{shown(c['paired_diff_mean'])} (95 % interval {low} to {high}) |",
        *(f"| {b['name']} (baseline) | {shown(b['mean'])} |" for b in content["baselines"]),
    ]
    return "\n".join([*lines, "", c["verdict"] + "."])


def extract_table(content: Content) -> str:
    """Markdown: images a second of extraction and of timm's own loop."""
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    reading = {}
    for row in content["rows"]:
        if row["network"]:
            cases.setdefault((row["network"], row["dtype"]), {})[row["provider"]] = row
        else:
            reading[row["provider"]] = row
    lines = [
        "| network | dtype | uml_fast, images/s | timm's loop, images/s | times as fast |",
        "|---|---|---:|---:|---:|",
    ]
    for (network, dtype), found in cases.items():
        lines.append(
            f"| {network} | {dtype} | {found['uml_fast']['images_per_s']:.1f} | "
            f"{found['timm']['images_per_s']:.1f} | {found['timm']['times_ours']:.2f} |"
        )
    if reading:
        lines.append(
            f"\nReading the features of a grid takes {reading['read']['p50_ms']:.0f} ms, its heads "
            f"{reading['grid']['times_ours']:.0f} times as long."
        )
    return "\n".join([*lines, "", conditions(content)])


def ranks_table(content: Content) -> str:
    """Markdown: one rank and two, one thread each; losses of one, two and four."""
    rows = [r for r in content["rows"] if "tokens_per_s" in r]
    rates = {r["provider"]: float(np.median(r["tokens_per_s"])) for r in rows}
    lines = [
        "| ranks, one thread each | tokens/s | times one | weights and moments of a rank, MiB | "
        "exchange, % of time |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        name, rate = row["provider"], rates[row["provider"]]
        held, exchange = row.get("state_bytes"), row.get("exchange_pct")
        lines.append(
            f"| {name} | {rate:,.0f} | {rate / rates['one']:.2f} | "
            f"{'' if held is None else f'{held / 2**20:.1f}'} | "
            f"{'' if exchange is None else f'{exchange:.0f}'} |"
        )
    apart = {r["provider"]: r["apart"] for r in content["rows"] if "apart" in r}
    if apart:
        named = "; ".join(f"{name} {x:.0e}" for name, x in apart.items() if name != "one")
        lines.append(
            f"\nLargest relative difference of the loss from one rank's, 50 steps: {named}."
        )
    return "\n".join([*lines, "", conditions(content)])


def saving_table(content: Content) -> str:
    """Markdown: the part of training's time that checkpoints take."""
    lines = [
        "| checkpoint | MB | every | step, ms | a save holds up, ms (p20, p50, p80) | of the time "
        "| steps beside it |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in content["rows"]:
        held = f"{r['p20_ms']:.0f}, {r['p50_ms']:.0f}, {r['p80_ms']:.0f}"
        lines.append(
            f"| {r['provider']} | {r['checkpoint_mb']:.0f} | {r['every']} steps | "
            f"{r['step_ms']:.0f} | {held} | {r['held_pct']:.2f} % | {r['slowed_pct']:+.2f} % |"
        )
    return "\n".join([*lines, "", conditions(content)])
