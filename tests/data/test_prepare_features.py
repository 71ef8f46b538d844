"""Feature arrays and pickles become shards; a pickle never runs what is in it."""

from __future__ import annotations

import io
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.data.made_files import ALL, SKIP, problems, run, samples
from uml_fast.data.prepare import restricted
from uml_fast.data.prepare.restricted import load_arrays
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.source import DataError


def arrays(out: Path, split: str = "train") -> dict[str, np.ndarray]:
    return {k: np.load(io.BytesIO(p)) for k, (p, _) in samples(out, split).items()}


def dump(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


class TestArrays:
    def test_rows_of_one_array(self, tmp_path):
        x = np.random.default_rng(0).normal(size=(20, 5))
        np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 3)
        made = run("features", tmp_path / "a.npz", tmp_path / "out", *ALL)
        assert made["width"] == 5 and made["class_names"] == ["0", "1", "2"]
        got = arrays(tmp_path / "out")
        for i in range(20):
            assert np.array_equal(got[f"a/{i:08d}"], x[i : i + 1].astype(np.float32))
        np.testing.assert_allclose(
            made["normalisation"]["mean"], x.astype(np.float32).mean(0, np.float64), atol=1e-12
        )
        np.testing.assert_allclose(made["normalisation"]["std"], x.std(0), rtol=1e-6)

    def test_rows_of_samples_and_trimmed_padding(self, tmp_path):
        x = np.ones((3, 6, 2), np.float32)
        x[0, :4] = 0
        x[1, 5:] = 0
        x[1, 2] = 0
        x[2] = 0
        np.save(tmp_path / "a.npy", x)
        run("features", tmp_path / "a.npy", tmp_path / "out", *ALL)
        with ShardSet.open(tmp_path / "out") as s:
            assert s.length.tolist() == [[6]] * 3 and s.label.tolist() == [-1] * 3
        made = run("features", tmp_path / "a.npy", tmp_path / "trimmed", *ALL, *SKIP, "--trim")
        got = {k: len(v) for k, v in arrays(tmp_path / "trimmed").items()}
        assert got == {"a/00000000": 2, "a/00000001": 5}
        assert made["problems"] == {"no rows": 1}

    def test_ragged_samples_by_offsets(self, tmp_path):
        rows = np.arange(12, dtype=np.float32).reshape(6, 2)
        np.savez(tmp_path / "a.npz", rows=rows, offsets=np.array([0, 1, 6]), labels=["b", "a"])
        run("features", tmp_path / "a.npz", tmp_path / "out", *ALL)
        got = arrays(tmp_path / "out")
        assert np.array_equal(got["a/00000000"], rows[:1])
        assert np.array_equal(got["a/00000001"], rows[1:])
        np.savez(tmp_path / "b.npz", rows=rows, offsets=np.array([0, 4, 2, 6]))
        with pytest.raises(DataError, match="offsets must be integers that rise from 0 to the 6"):
            run("features", tmp_path / "b.npz", tmp_path / "out2")

    def test_a_folder_with_a_file_for_each_split(self, tmp_path):
        for name in ("train", "valid"):
            np.savez(tmp_path / f"{name}.npz", x=np.ones((2, 3)), y=[0, 1])
        made = run("features", tmp_path, tmp_path / "o" / "out")
        assert {n: s["samples"] for n, s in made["splits"].items()} == {"train": 2, "val": 2}

    def test_class_folders_of_one_array_a_sample(self, tmp_path):
        for i, width in enumerate((4, 4, 4, 3)):
            path = tmp_path / "in" / "k" / f"{i}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.full((i + 1, width), i, np.float16))
        (tmp_path / "in" / "k" / "cut.npy").write_bytes(path.read_bytes()[:100])
        odd = path.read_bytes().replace(b"'shape': (", b"'shape': ((")
        (tmp_path / "in" / "k" / "odd.npy").write_bytes(odd)
        np.save(tmp_path / "in" / "k" / "words.npy", np.array([["a", "b", "c", "d"]]))
        run("features", tmp_path / "in", tmp_path / "out", *ALL, *SKIP)
        assert {k: v.shape for k, v in arrays(tmp_path / "out").items()} == {
            f"k/{i}": (i + 1, 4) for i in range(3)
        }
        assert problems(tmp_path / "out") == {
            "k/3.npy": "wrong width", "k/cut.npy": "broken array", "k/odd.npy": "broken array",
            "k/words.npy": "not numbers",
        }  # fmt: skip

    def test_nan_and_missing_labels_are_named_and_skipped(self, tmp_path):
        x = np.ones((4, 2))
        x[1, 1] = np.nan
        x[2, 0] = 1e300
        np.savez(tmp_path / "a.npz", x=x, y=[0.0, 1.0, 0.0, np.nan])
        run("features", tmp_path / "a.npz", tmp_path / "out", *ALL, *SKIP)
        assert problems(tmp_path / "out") == {
            "a/00000001": "not finite", "a/00000002": "not finite", "a/00000003": "missing label",
        }  # fmt: skip

    def test_measurements_become_two_classes_when_asked(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.ones((4, 2)), y=np.array([[-1.5], [0.0], [0.2], [3.0]]))
        with pytest.raises(DataError, match=r"measurements, not classes; --names\.threshold 0"):
            run("features", tmp_path / "a.npz", tmp_path / "out")
        run("features", tmp_path / "a.npz", tmp_path / "out", *ALL, "--names.threshold", "0")
        names = [name for _, (_, name) in sorted(samples(tmp_path / "out").items())]
        assert names == ["not above 0", "not above 0", "above 0", "above 0"]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"a": np.ones((2, 2)), "b": np.ones((2, 2))}, "has a, b; name the features"),
            ({"x": np.ones(3)}, r"have shape \(3,\)"),
            ({"x": np.ones((3, 2)), "y": [1]}, "for 3 samples"),
            ({"x": np.array([None, 1])}, "plain numbers"),
            ({"x": np.ones((0, 2))}, "no input can be used"),
        ],
    )
    def test_a_file_that_cannot_be_used_is_named(self, tmp_path, columns, message):
        np.savez(tmp_path / "a.npz", **columns)
        with pytest.raises(DataError, match=message):
            run("features", tmp_path / "a.npz", tmp_path / "out")

    @pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.pkl"])
    def test_broken_files_are_named(self, tmp_path, name):
        for content in (b"", b"PK\x03\x04 no", b"\x93NUMPY\x01", b"\x80\x04"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError, match=name):
                run("features", tmp_path / name, tmp_path / "out")


class TestMultiBench:
    def test_a_modality_of_its_pickles(self, tmp_path):
        rng = np.random.default_rng(0)
        data = {
            split: {
                "vision": rng.normal(size=(n, 4, 3)), "text": rng.normal(size=(n, 4, 2)),
                "labels": rng.normal(size=(n, 1, 1)), "id": np.array(["x"] * n),
            }
            for split, n in (("train", 5), ("valid", 2), ("test", 3))
        }  # fmt: skip
        source = dump(tmp_path / "mosi.pkl", data)
        with pytest.raises(DataError, match=r"has vision, text, labels, id; name the features"):
            run("features", source, tmp_path / "out")
        more = ("--names.features", "vision", "--names.threshold", "0")
        made = run("features", source, tmp_path / "out", *more)
        assert {n: s["samples"] for n, s in made["splits"].items()} == {
            "train": 5, "val": 2, "test": 3,
        }  # fmt: skip
        got = arrays(tmp_path / "out", "val")
        for i in range(2):
            expected = data["valid"]["vision"][i].astype(np.float32)
            assert np.array_equal(got[f"mosi/valid/{i:08d}"], expected)
        with pytest.raises(DataError, match=r"no 'audio'; it has vision, text, labels, id"):
            run("features", source, tmp_path / "o2", "--names.features", "audio")

    def test_ragged_lists_and_a_sample_of_another_width(self, tmp_path):
        ragged = np.empty(4, object)
        ragged[:] = [np.ones((2, 3)), np.ones((5, 3)), np.ones((1, 4)), np.ones(3)]
        for name, value in (("array", ragged), ("list", list(ragged))):
            source = dump(tmp_path / f"{name}.pkl", {"train": {"x": value, "y": [0, 1, 0, 1]}})
            run("features", source, tmp_path / name, *SKIP)
            lengths = {k[-1]: len(v) for k, v in arrays(tmp_path / name).items()}
            assert lengths == {"0": 2, "1": 5, "3": 1}
            assert list(problems(tmp_path / name).values()) == ["wrong width"]


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


class TestRestrictedPickles:
    @pytest.mark.parametrize(
        ("call", "name"),
        [
            ((os.system, ("touch {}",)), "(posix|nt).system"),
            ((eval, ("__import__('pathlib').Path('{}').touch()",)), "builtin.*eval"),
            ((getattr, ("x", "upper")), "builtin.*getattr"),
            ((np.load, ("{}",)), "numpy"),
            ((np.ndarray, ((1,), np.dtype("O"), b"12345678")), "array"),
            ((np.dtype, ({"names": ["a"], "formats": ["O"], "offsets": [0]},)), "array type"),
            ((OrderedDict, ([("a", Evil(os.system, ("touch {}",)))],)), "system"),
            ((bytearray, (10**13,)), "bytes of int"),
        ],
    )
    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    def test_refuses_what_is_not_data(self, tmp_path, call, name, protocol):
        mark = tmp_path / "ran"
        function, args = call
        args = tuple(a.format(mark) if isinstance(a, str) else a for a in args)
        path = dump(tmp_path / "a.pkl", {"x": [Evil(function, args)]}, protocol)
        with pytest.raises(DataError, match=name):
            load_arrays(path)
        assert not mark.exists()

    def test_cannot_change_what_it_is_lent(self, tmp_path):
        # BUILD with the slot state {"__defaults__": ()} upon the stand-in for numpy's scalar
        code = b"\x80\x02cnumpy.core.multiarray\nscalar\nN}U\x0c__defaults__)s\x86b."
        (tmp_path / "a.pkl").write_bytes(code)
        before = restricted._scalar.__defaults__
        load_arrays(tmp_path / "a.pkl")
        assert before and restricted._scalar.__defaults__ == before

    def test_names_the_global(self, tmp_path):
        path = dump(tmp_path / "a.pkl", Evil(os.system, ("true",)))
        with pytest.raises(DataError, match=r"a\.pkl asks for \w+\.system; only numpy arrays"):
            load_arrays(path)

    @settings(max_examples=60, deadline=None)
    @given(
        x=hnp.arrays(
            st.sampled_from(["f4", "f8", "i8", "u1", ">f4", "bool", "c8", "U3", "S2"]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
        ),
        protocol=st.integers(0, 5),
        is_fortran=st.booleans(),
    )
    def test_arrays_come_back(self, tmp_path_factory, x, protocol, is_fortran):
        x = np.asarray(x, order="F" if is_fortran else "C")
        value = {"a": [x, (x, "text", 1.5, None)], "b": OrderedDict(c=np.float32(2))}
        got = load_arrays(dump(tmp_path_factory.mktemp("p") / "a.pkl", value, protocol))
        np.testing.assert_array_equal(got["a"][0], x)
        np.testing.assert_array_equal(got["a"][1][0], x)
        assert got["a"][1][1:] == ("text", 1.5, None) and got["b"]["c"] == 2
        assert got["a"][0].dtype == x.dtype or x.ndim == 0  # numbers have the machine's order

    def test_pickles_of_python_2_and_of_old_numpy(self, tmp_path):
        # protocol 2 of Python 2: bytes are stored as text, modules have their old names
        text = pickle.dumps({"x": np.array([[1.5, -2.0]])}, 2)
        old = text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        assert old != text
        (tmp_path / "a.pkl").write_bytes(old)
        assert load_arrays(tmp_path / "a.pkl")["x"].tolist() == [[1.5, -2.0]]
        code = (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
            b"J\xff\xff\xff\xffK\x00tb\x89U\x02\xe9Atb."
        )
        (tmp_path / "b.pkl").write_bytes(code)
        assert load_arrays(tmp_path / "b.pkl").tolist() == [0xE9, 0x41]

    def test_flipped_bytes_and_containers_that_hold_themselves(self, tmp_path):
        loop: list = []
        loop.append(loop)
        with pytest.raises(DataError, match="hold themselves"):
            load_arrays(dump(tmp_path / "a.pkl", loop))
        whole = pickle.dumps({"train": {"x": np.ones((3, 2)), "y": [1, 2, 3]}})
        rng = np.random.default_rng(0)
        for _ in range(300):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            (tmp_path / "b.pkl").write_bytes(data)
            try:
                load_arrays(tmp_path / "b.pkl")
            except DataError as e:
                assert re.search(r"b\.pkl", str(e))
