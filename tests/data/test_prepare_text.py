"""Tables become shards of text, or say which files are whose."""

from __future__ import annotations

import json

import pytest

from tests.data.made_files import ALL, SKIP, image, problems, run, samples, write
from uml_fast.data.source import DataError


class TestTables:
    def test_bad_rows_are_named_and_skipped(self, tmp_path):
        for i in range(3):
            write(tmp_path / "in" / f"{i}.jpg", image(i))
        rows = ["file,label", "0.jpg,a", "1.jpg,", "2.jpg,b", "gone.jpg,a", "0.jpg,b", ",a"]
        write(tmp_path / "in" / "t.csv", "\n".join(rows))
        run("images", tmp_path / "in", tmp_path / "out", *ALL, *SKIP)
        assert problems(tmp_path / "out") == {
            "1.jpg": "missing label", "gone.jpg": "missing file", "0.jpg": "duplicate key",
            "t.csv:7": "missing file",
        }  # fmt: skip
        got = samples(tmp_path / "out")
        assert {k: name for k, (_, name) in got.items()} == {"0": "a", "2": "b"}

    def test_a_table_without_the_columns_names_those_it_has(self, tmp_path):
        table = write(tmp_path / "t.csv", "where,what\na.jpg,x\n")
        with pytest.raises(DataError, match=r"no column 'file'; its columns are where, what"):
            run("images", table, tmp_path / "out")
        write(tmp_path / "a.jpg", image(0))
        columns = ("--columns.file", "where", "--columns.label", "what")
        run("images", table, tmp_path / "out", *ALL, *columns)
        assert samples(tmp_path / "out") == {"a": (image(0), "x")}

    def test_none_of_the_files_exists(self, tmp_path):
        table = write(tmp_path / "t.csv", "file,label\nx/a.jpg,x\nx/b.jpg,x\n")
        with pytest.raises(DataError, match=r"none of its 2 files exists, such as 'x/a\.jpg'"):
            run("images", table, tmp_path / "out")


class TestText:
    @pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "classes.json"])
    def test_every_table_gives_the_same_samples(self, tmp_path, form):
        rows = [("a cat, asleep", "cat"), ('a "dog"\nawake', "dog"), ("größe 猫", "cat")]
        objects = [{"text": t, "label": c} for t, c in rows]
        classes = {c: [t for t, d in rows if d == c] for c in ("cat", "dog")}
        quoted = [('"' + t.replace('"', '""') + '"', c) for t, c in rows]
        content = {
            "csv": "text,label\r\n" + "".join(f"{t},{c}\r\n" for t, c in quoted),
            "tsv": "text\tlabel\n" + "".join(f"{t}\t{c}\n" for t, c in quoted),
            "jsonl": "\n".join(json.dumps(o) for o in objects),
            "json": json.dumps(objects),
            "classes.json": json.dumps(classes),
        }[form]  # fmt: skip
        source = write(tmp_path / f"t.{form}", b"\xef\xbb\xbf" + content.encode())
        run("text", source, tmp_path / "out", *ALL)
        got = set(samples(tmp_path / "out").values())
        assert got == {(t.encode(), c) for t, c in rows}

    def test_bad_rows_are_named_and_skipped(self, tmp_path):
        rows = [b"text,label,id", b"fine,a,1", b"caf\xe9,a,2", b"  ,a,3", b"no label,,4",
                b"again,a,1", b"no id,a,"]  # fmt: skip
        source = write(tmp_path / "t.csv", b"\n".join(rows))
        made = run("text", source, tmp_path / "out", *ALL, *SKIP)
        assert samples(tmp_path / "out") == {"1": (b"fine", "a")}
        assert problems(tmp_path / "out") == {
            "2": "invalid UTF-8", "3": "empty text", "t.csv:5": "missing label",
            "1": "duplicate key", "t.csv:7": "missing id",
        }  # fmt: skip
        assert sum(made["problems"].values()) == 5

    def test_equal_sentences_stay_in_one_split(self, tmp_path):
        texts = {"a": [f"sentence {i % 40}" for i in range(120)]}
        made = run("text", write(tmp_path / "t.json", json.dumps(texts)), tmp_path / "out")
        assert made["notes"] == {"texts that occur again in their class": 80}
        parts = [
            {p for p, _ in samples(tmp_path / "out", name).values()} for name in made["splits"]
        ]
        assert len(parts) == 3 and sum(map(len, parts)) == 40

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("t.csv", "", "is empty"),
            ("t.csv", 'text,label\n"open,a\n', "line 2"),
            ("t.jsonl", '{"text": "a"}\n{"text": ', "t.jsonl:2 is not JSON"),
            ("t.jsonl", "[1]", "is not an object"),
            ("t.json", '{"cat": "no list"}', "class 'cat' has no list"),
            ("t.json", "3", "holds neither"),
            ("t.json", "[" * 100_000, "is not JSON"),
            ("t.txt", "hello", "is no table"),
            ("t.csv", "label\na\n", "no column 'text'"),
            ("t.csv", "text,label\n", "no input can be used"),
        ],
    )
    def test_a_table_that_cannot_be_read_is_named(self, tmp_path, name, content, message):
        with pytest.raises(DataError, match=message):
            run("text", write(tmp_path / name, content), tmp_path / "out")
