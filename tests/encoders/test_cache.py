"""Features on disk: any program may write them, and a torn or changed file is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from uml_fast.data.shards.files import ShardSet
from uml_fast.data.source import DataError
from uml_fast.encoders.cache import Unfinished, is_stored, load_features, save_features
from uml_fast.prepare import main

ROWS = torch.arange(12, dtype=torch.float32).reshape(4, 3) / 7
LABELS = torch.tensor([0, 1, 1, -1])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "image-train.safetensors"
    keys = ["cat/ä 1", "dog/2", "dog/3", "x/4"]
    save_features(path, ROWS, LABELS, ("cat", "dog"), keys, {"encoder": "x"})
    found = load_features(path)
    assert torch.equal(found.rows, ROWS) and torch.equal(found.labels, LABELS)
    assert found.class_names == ("cat", "dog") and found.keys == tuple(keys)
    assert len(found.fingerprint) == 64 and is_stored(path, found.fingerprint)
    assert not is_stored(path, "other") and not is_stored(tmp_path / "absent", "other")


def test_a_file_of_another_program_needs_rows_labels_and_names_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"rows": ROWS.bfloat16(), "labels": LABELS.int()}
    save_file(tensors, path, {"class_names": json.dumps(["cat", "dog"])})
    found = load_features(path)
    assert found.rows.dtype == torch.float32 and torch.equal(found.rows, ROWS.bfloat16().float())
    assert found.labels.dtype == torch.int64 and found.keys == ()


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(
        DataError, match=r"does not exist; make it with python -m uml_fast\.extract"
    ):
        load_features(path)
    save_features(path, ROWS, LABELS, ("cat", "dog"))
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match="torn or no safetensors file"):
        load_features(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match="damaged"):
        load_features(path)
    save_file({"rows": ROWS}, path, {})
    with pytest.raises(DataError, match="class_names, labels is not there"):
        load_features(path)
    save_features(path, ROWS, LABELS, ("cat",))
    with pytest.raises(DataError, match=r"labels -1\.\.1 and 1 class names"):
        load_features(path)
    save_features(path, ROWS / 0, LABELS, ("cat", "dog"))
    with pytest.raises(DataError, match=r"x\.safetensors: sample 0 has a feature that is NaN"):
        load_features(path)


def test_a_killed_extraction_keeps_its_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "image-train.safetensors"
    begun = Unfinished(path, "made of this")
    begun.add(np.ones((2, 3), np.float32))
    begun.add(np.full((2, 3), 2, np.float32))
    rows = path.with_name(path.name + ".rows")
    rows.write_bytes(rows.read_bytes()[:-5])  # killed within a write
    again = Unfinished(path, "made of this")
    assert again.done == 3
    again.add(np.full((1, 3), 3, np.float32))
    assert again.rows()[:, 0].tolist() == [1, 1, 2, 3]
    assert Unfinished(path, "made of something else").done == 0
    assert not list(tmp_path.iterdir()), "rows of something else stay"


@pytest.mark.parametrize(
    ("class_names", "message"),
    [("cat,dog", "must be a JSON list"), ('{"cat": 0}', "must be a JSON list"),
     ('["cat", "dog", "cat"]', "cat more than once")],
)  # fmt: skip
def test_class_names_that_name_no_classes_are_refused(
    tmp_path: Path, class_names: str, message: str
) -> None:
    path = tmp_path / "image-train.safetensors"
    tensors = {"rows": torch.zeros(2, 3), "labels": torch.tensor([0, 1])}
    save_file(tensors, path, {"class_names": class_names})
    with pytest.raises(DataError, match=message):
        load_features(path)


def test_extracted_features_can_be_prepared_with_their_classes(tmp_path: Path) -> None:
    path = tmp_path / "text-train.safetensors"
    rows = torch.arange(12.0).view(4, 3)
    save_features(path, rows, torch.tensor([1, 0, 1, 0]), ("cat", "dog"))
    out = tmp_path / "shards"
    assert main(["features", str(path), str(out), "--split", "train=1"]) == 0
    shards = ShardSet.open(out, "train")
    assert shards.class_names == ("cat", "dog")
    assert sorted(shards.label.tolist()) == [0, 0, 1, 1]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="holds no features that"):
        main(["features", str(path), str(tmp_path / "other"), "--split", "train=1"])
