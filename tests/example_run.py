"""A finished run folder, written by the parts of the package that write real ones."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import wave
import zlib
from dataclasses import asdict

import numpy as np
from sklearn.datasets import load_digits

from uml_fast.analysis.statistics import mean_interval, paired_comparison
from uml_fast.runtime.machine import machine_info
from uml_fast.training.log import RunLog

STEPS = range(20, 601, 20)


def png(pixels: np.ndarray) -> str:
    """Grey image as a base64 PNG file."""
    height, width = pixels.shape

    def chunk(kind, body):
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    lines = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    file += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


def wav(samples: np.ndarray, width: int = 2) -> str:
    """Mono sound as a base64 WAV file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(width)
        out.setframerate(8000)
        out.writeframes(samples.tobytes())
    return base64.b64encode(file.getvalue()).decode()


def log_training(folder, seeds, target):
    """Learning curves of two modes: noisy decay of losses, a rise of the validation accuracy."""
    with RunLog(folder, stream=io.StringIO()) as log:
        for seed in range(seeds):
            for mode, names in (("unimodal", [target]), ("uml", [target, "speech", "text"])):
                rng = np.random.default_rng([seed, len(names)])
                log.begin(mode, seed)
                for step in STEPS:
                    fall = math.exp(-step / (240 if mode == "unimodal" else 150))
                    noise = rng.uniform(0.05, 0.2, len(names))
                    losses = {n: 2.3 * fall + 0.1 * i + noise[i] for i, n in enumerate(names)}
                    gain = 0.55 if mode == "unimodal" else 0.7
                    record = (
                        {"val": gain * (1 - fall) + rng.normal(0, 0.01)} if step % 60 == 0 else {}
                    )
                    log.write(
                        step, loss=sum(losses.values()), losses=losses, lr=1e-3 * (1 - step / 600),
                        grad_norm=1 + fall * rng.uniform(1, 3), samples_per_s=2_400.0,
                        tokens_per_s=rng.normal(52_000, 2_500), mfu=0.31, fill_pct=97.6,
                        stall_pct=rng.uniform(0, 1), **record,
                    )  # fmt: skip


def compare(results, metric, shots=None):
    of = {
        mode: [r[metric] for r in results if r["mode"] == mode and r["shots"] == shots]
        for mode in ("unimodal", "uml")
    }
    row = paired_comparison(of["unimodal"], of["uml"], lower_is_better=metric == "error")
    return {"shots": shots, "metric": metric, **asdict(row)}


def make_run(folder, *, metric="head", seeds=5, gain=0.12, shots=(None,), curves=True):
    """Write a finished run, with or without its metrics.jsonl, and return its summary."""
    target = "image"
    rng = np.random.default_rng(0)
    results = []
    for k in shots:
        for seed in range(seeds):
            level = rng.normal(0.55, 0.04) + 0.03 * (k or 0)
            for mode, value in (("unimodal", level), ("uml", level + gain + rng.normal(0, 0.015))):
                result = {
                    "mode": mode,
                    "seed": seed,
                    "shots": k,
                    "probe": None,
                    "head": None,
                    "error": None,
                }
                results.append({**result, metric: value})
    i = mean_interval([0.62, 0.6, 0.63, 0.61, 0.62])
    info = machine_info()
    summary = {
        "recipe": "digits", "target": target, "metric": metric, "machine": info["machine"],
        "versions": info["versions"], "commit": info["commit"], "results": results,
        "comparison": [compare(results, metric, k) for k in shots],
        "baselines": [{"name": "nearest neighbour", "mean": i.mean, "ci95_low": i.ci95_low,
                       "ci95_high": i.ci95_high, "n": i.n}],
        "throughput": {"tokens_per_s": 52_340.0, "samples_per_s": 2_410.0, "mfu": 0.312,
                       "mfu_datasheet": None, "stall_pct": 0.42, "fill_pct": 97.6, "recompiles": 0,
                       "stages": {"read": 38.0, "assemble": 22.0, "step": 99.4}},
        "theory": [{"name": "Theorem 1", "statement": "variance < with Y", "assumed": True,
                    "holds": True, "holds_schur": None, "quantities": [["gap", 0.01234]]},
                   {"name": "Corollary 2", "statement": "infinite to finite", "assumed": True,
                    "holds": False, "holds_schur": False, "quantities": []}],
    }  # fmt: skip
    config = {
        "class": "uml_fast.config:RunConfig", "recipe": "digits", "target": target,
        "metric": metric, "steps": 600,
        "modalities": [{"class": "a:ImageConfig", "name": "image", "share": 1.0}],
        "optim": {"class": "uml_fast.config:OptimConfig", "lr": 0.001, "betas": [0.9, 0.999]},
    }  # fmt: skip
    if curves:
        log_training(folder, seeds, target)
    digits = load_digits().images[:4] / 16 * 255
    time = np.arange(3200) / 8000
    word = np.sin(1400 * time) * np.sin(np.pi * time / 0.4) ** 2 * (1 + 0.5 * np.sin(60 * time))
    sound = wav((word * 9000).astype("<i2"))
    long = (
        "a bar & a <slanted> stroke that runs from its right end down to the left, "
        "sometimes crossed in the middle"
    )
    walk = np.cumsum(rng.normal(size=(40, 6)), 0).round(2).tolist()
    samples = [
        *({"modality": "image", "kind": "image", "caption": str(i), "png": png(d)}
          for i, d in enumerate(digits)),
        *({"modality": "speech", "kind": "audio", "caption": c, "wav": sound}
          for c in ("three", "seven")),
        {"modality": "text", "kind": "text", "caption": "three", "text": "two open bows"},
        {"modality": "text", "kind": "text", "caption": "seven", "text": long},
        {"modality": "motion", "kind": "features", "caption": "", "values": walk},
        {"modality": "motion", "kind": "features", "values": np.sin(time[:90] * 500).tolist()},
    ]  # fmt: skip
    run = {"config": config, "started": "2026-01-05T10:00:00+0000", **info}
    for name, content in (("run", run), ("summary", summary), ("samples", samples)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return summary
