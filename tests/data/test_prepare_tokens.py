"""Tables become shards of token ids, and those become the text of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.made_files import ALL, problems, run, samples, write
from uml_fast.config import ConfigError
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.shards.files import ShardSet, read_manifest
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError
from uml_fast.modalities.text import TextConfig
from uml_fast.prepare import Tokens

tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "cat", "dog", "the"]
SENTENCES = {"cat": ["a photo of a cat", "the cat"], "dog": ["a photo of the big dog"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model with the tokenizer that BERT has, of ten words."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=16)
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    return tmp_path / "model"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "prompts.json", json.dumps(SENTENCES))


def ids(payload: bytes) -> list[int]:
    return np.frombuffer(payload, "<i4").tolist()


def source(config: TextConfig, folder: Path, allowed: int = 0) -> ShardSource:
    shards = ShardSet.open(folder, "train")
    writer = rows_of(config, None, shards.kind)
    return ShardSource(config.name, shards, decode_of(config), writer, DataErrors(allowed))


def test_ids_are_those_of_the_tokenizer_with_its_special_tokens(
    model: Path, table: Path, tmp_path: Path
) -> None:
    made = run("tokens", table, tmp_path / "out", "--tokenizer", str(model), *ALL)
    assert (made["kind"], made["vocabulary"], made["length_unit"]) == ("tokens", 10, ["tokens"])
    stored = sorted(ids(p) for p, _ in samples(tmp_path / "out").values())
    assert stored == [[2, 4, 5, 6, 4, 7, 3], [2, 4, 5, 6, 9, 1, 8, 3], [2, 9, 7, 3]]
    text = source(TextConfig(name="text", vocabulary=10, positions=7), tmp_path / "out")
    rows = np.zeros((int(text.lengths.sum()), 1), np.int32)
    assert text.read(range(len(text)), rows) == []
    read = np.split(rows[:, 0], text.offsets[1:-1])
    assert sorted(r.tolist() for r in read) == [s[:7] for s in stored]


def test_long_texts_keep_the_special_tokens(model: Path, table: Path, tmp_path: Path) -> None:
    more = ("--tokenizer", str(model / "tokenizer.json"), "--max-tokens", "5")
    run("tokens", table, tmp_path / "out", *more, *ALL)
    stored = sorted(ids(p) for p, _ in samples(tmp_path / "out").values())
    assert stored == [[2, 4, 5, 6, 3], [2, 4, 5, 6, 3], [2, 9, 7, 3]]


def test_another_tokenizer_makes_other_shards(model: Path, table: Path, tmp_path: Path) -> None:
    more = ("--tokenizer", str(model), *ALL)
    run("tokens", table, tmp_path / "out", *more)
    before = read_manifest(tmp_path / "out")
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"dog"', '"cow"'))
    with pytest.raises(DataError):
        run("tokens", table, tmp_path / "out", *more)
    after = run("tokens", table, tmp_path / "out", *more, "--overwrite")
    assert after["tokenizer_sha256"] != before["tokenizer_sha256"]


def test_unusable_ids_and_tokenizers_are_named(model: Path, table: Path, tmp_path: Path) -> None:
    run("tokens", table, tmp_path / "out", "--tokenizer", str(model), *ALL)
    small = source(TextConfig(name="text", vocabulary=9), tmp_path / "out")
    with pytest.raises(DataError, match=r"run from 2 to 9, text\.vocabulary is 9"):
        small.read(range(len(small)), np.zeros((int(small.lengths.sum()), 1), np.int32))
    with pytest.raises(DataError, match=r"there is no .*absent"):
        run("tokens", table, tmp_path / "other", "--tokenizer", str(tmp_path / "absent"))
    broken = write(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        run("tokens", table, tmp_path / "other", "--tokenizer", str(broken))
    with pytest.raises(ConfigError, match="max-tokens is 3"):
        Tokens(source=table, out=tmp_path / "x", tokenizer=model, max_tokens=3)
    with pytest.raises(ConfigError, match="--tokenizer FILE_OR_FOLDER"):
        Tokens(source=table, out=tmp_path / "x")


def test_empty_texts_are_problems(model: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "t.json", json.dumps({"cat": ["a cat", "  "], "dog": ["dog"]}))
    more = ("--tokenizer", str(model), "--max-errors", "5", *ALL)
    run("tokens", table, tmp_path / "out", *more)
    assert set(problems(tmp_path / "out").values()) == {"empty text"}
    assert len(samples(tmp_path / "out")) == 2
