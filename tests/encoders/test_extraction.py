"""Extraction: once, in batches, resumable; what cannot be read is left out and named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.source import DataError
from uml_fast.encoders.cache import load_features
from uml_fast.encoders.extraction import Encoder, Sentences, extract

TEXTS = tuple("x" * (1 + i * 7 % 11) + str(i) for i in range(20))
SAMPLES = Sentences(TEXTS, np.arange(20, dtype=np.int32) % 3, ("a", "b", "c"))


class Counting(Encoder):
    """A text's length and last digit; counts what it is given."""

    kind = "text"
    width = 2

    def __init__(self, bad: str = "", stop_after: int = 1000) -> None:
        self.facts = {"name": "counting"}
        self.batches: list[list[bytes]] = []
        self.bad, self.stop_after = bad.encode(), stop_after

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        return [DecodeError("broken") if p == self.bad else p for p in payloads]

    def encode(self, prepared: Sequence[Any]) -> Tensor:
        if len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(list(prepared))
        return torch.tensor([[len(p), p[-1]] for p in prepared], dtype=torch.float32)


def made(path: Path, encoder: Encoder, samples: Sentences = SAMPLES, most: int = 0) -> bool:
    return extract(samples, encoder, path, max_errors=most, batch=6)


def test_rows_are_in_the_order_of_the_samples_and_batches_in_that_of_lengths(tmp_path) -> None:
    encoder, path = Counting(), tmp_path / "text-train.safetensors"
    assert made(path, encoder)
    found = load_features(path)
    assert found.rows[:, 0].tolist() == [len(t) for t in TEXTS]
    assert torch.equal(found.labels, torch.arange(20) % 3) and found.class_names == ("a", "b", "c")
    assert found.keys[4] == "b/4"
    lengths = [len(p) for b in encoder.batches for p in b]
    assert lengths == sorted(lengths, reverse=True) and len(encoder.batches) == 4


def test_a_second_call_does_nothing_and_a_changed_one_extracts_again(tmp_path, capsys) -> None:
    path, again = tmp_path / "text-train.safetensors", Counting()
    made(path, Counting())
    before = path.stat().st_mtime_ns
    assert not made(path, again) and not again.batches and path.stat().st_mtime_ns == before
    other = replace(SAMPLES, texts=("y", *TEXTS[1:]))
    assert made(path, Counting(), other) and load_features(path).rows[0, 0] == 1
    assert "was made of something else" in capsys.readouterr().err
    relabelled = replace(SAMPLES, texts=other.texts, label=np.zeros(20, np.int32))
    assert made(path, Counting(), relabelled) and not load_features(path).labels.any()
    encoder = Counting()
    encoder.facts = {"name": "counting", "weights": "other"}
    assert made(path, encoder, relabelled) and encoder.batches


def test_a_torn_file_is_made_again(tmp_path, capsys) -> None:
    path = tmp_path / "text-train.safetensors"
    made(path, Counting())
    path.write_bytes(path.read_bytes()[:-7])
    assert made(path, Counting()) and len(load_features(path)) == 20
    assert "torn" in capsys.readouterr().err


def test_an_interrupted_extraction_goes_on_behind_its_last_batch(tmp_path, capsys) -> None:
    path, whole = tmp_path / "text-train.safetensors", Counting()
    with pytest.raises(KeyboardInterrupt):
        made(path, Counting(stop_after=3))
    assert "12 of 20 samples are kept" in capsys.readouterr().err and not path.exists()
    again = Counting()
    assert made(path, again) and sum(map(len, again.batches)) == 8
    made(tmp_path / "other.safetensors", whole)
    assert torch.equal(load_features(path).rows, load_features(tmp_path / "other.safetensors").rows)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "other.safetensors"}


def test_samples_that_cannot_be_read_are_left_out_and_named(tmp_path) -> None:
    path = tmp_path / "text-train.safetensors"
    made(path, Counting(bad=TEXTS[5]), most=1)
    found = load_features(path)
    assert len(found) == 19 and found.keys[5] == "a/6" and found.rows[5, 0] == len(TEXTS[6])
    (line,) = path.with_suffix(".jsonl").read_text().splitlines()
    named = json.loads(line)
    assert named == {"modality": "text-train", "sample": "c/5", "problem": "broken"}
    mended = replace(SAMPLES, texts=(*TEXTS[:5], "mended", *TEXTS[6:]))
    assert made(path, Counting(bad=TEXTS[5]), mended) and len(load_features(path)) == 20
    assert not path.with_suffix(".jsonl").exists(), "errors of other samples stay"
    with pytest.raises(DataError, match=r"sample c/5: broken\. 1 samples cannot be read"):
        made(tmp_path / "strict.safetensors", Counting(bad=TEXTS[5]), most=0)
    alone = Sentences(TEXTS[:1], np.zeros(1, np.int32), ("a",))
    with pytest.raises(DataError, match="none of the 1 samples can be read"):
        made(tmp_path / "alone.safetensors", Counting(bad=TEXTS[0]), alone, most=1)


def test_features_that_are_not_finite_stop_and_name_the_sample(tmp_path) -> None:
    class Overflowing(Counting):
        def encode(self, prepared: Sequence[Any]) -> Tensor:
            return super().encode(prepared) / torch.tensor([[1.0, 0.0]])

    with pytest.raises(DataError, match="features are not finite; try --precision fp32"):
        made(tmp_path / "x.safetensors", Overflowing())


def test_an_encoder_without_masks_gets_batches_of_one_length(tmp_path) -> None:
    encoder = Counting()
    encoder.same_length = True
    made(tmp_path / "x.safetensors", encoder)
    assert all(len({len(p) for p in b}) == 1 for b in encoder.batches)
    assert len(encoder.batches) == len({len(t) for t in TEXTS})


def test_samples_of_another_kind_are_refused(tmp_path) -> None:
    encoder = Counting()
    encoder.kind = "images"
    with pytest.raises(DataError, match="the samples are text, the encoder takes images"):
        made(tmp_path / "x.safetensors", encoder)
