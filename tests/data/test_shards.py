"""Reading shards: prepared folders and anybody's tar files, whole and broken."""

from __future__ import annotations

import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.made_files import contents, image, image_folder, run, sound, tar
from uml_fast.data.shards import index as shard_index
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.index import ShardIndex, scan
from uml_fast.data.shards.tar import END, Member, dali_index, header, members, padded
from uml_fast.data.source import DataError

NAMES = st.text("abcxyz0189_-/", min_size=1, max_size=70).map(
    lambda s: "k" + s.replace("//", "/").strip("/")
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


OPTIONS = ("--split", "train=1", "--shard-size-mib", "0.005")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    run("images", image_folder(folder / "in", 8), folder / "out", *OPTIONS)
    return folder


@pytest.fixture
def prepared(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy")) / "out"


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(NAMES, st.binary(max_size=1100), min_size=1, max_size=6))
def test_members_written_here_are_read_by_tarfile_and_by_the_scanner(tmp_path_factory, files):
    path = tmp_path_factory.mktemp("t") / "a.tar"
    body = b"".join(header(f"{n}.txt", len(c)) + padded(c) for n, c in files.items())
    path.write_bytes(body + END)
    with tarfile.open(path) as file:
        assert {m.name: file.extractfile(m).read() for m in file} == {  # type: ignore[union-attr]
            f"{n}.txt": c for n, c in files.items()
        }
    data = path.read_bytes()
    found = {m.name: data[m.offset : m.offset + m.size] for m in members(path)}
    assert found == {f"{n}.txt": c for n, c in files.items()}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**62), st.integers(0, 2**62), st.integers(-1, 2**31 - 1),
            st.integers(-1, 2**31 - 1), st.sampled_from(["jpg", "png", "webp"]),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_an_index_comes_back_as_it_was_saved(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("i") / "x.index.npz"
    made = ShardIndex.of(
        [(0, o, s, label, (n, n), f"key-{i}", e) for i, (o, s, label, n, e) in enumerate(rows)],
        "images",
    )
    made.save(path)
    first = path.read_bytes()
    made.save(path)
    assert path.read_bytes() == first
    loaded = ShardIndex.load(path)
    for name in ShardIndex.__slots__:
        assert np.array_equal(getattr(loaded, name), getattr(made, name))
        assert getattr(loaded, name).dtype == getattr(made, name).dtype


def test_dali_index_is_the_text_that_wds2idx_writes():
    one = (Member("a/b.jpg", 512, 700), Member("a/b.cls", 2048, 1))
    assert dali_index([one, (Member("c.txt", 3072, 5),)]) == (
        "v1.2 2\njpg 512 700 a/b.jpg cls 2048 1 a/b.cls\ntxt 3072 5 c.txt\n"
    )


def test_dali_index_of_a_prepared_shard_names_the_places_that_tarfile_finds(prepared: Path):
    for path in prepared.glob("*.tar"):
        head, *lines = path.with_suffix(".idx").read_text().splitlines()
        assert head == f"v1.2 {len(lines)}"
        with tarfile.open(path) as file:
            expected = [(m.name, m.offset_data, m.size) for m in file]
        fields = [line.split(" ") for line in lines]
        found = [(f[i + 3], int(f[i + 1]), int(f[i + 2])) for f in fields for i in (0, 4)]
        assert found == expected and all(f[0] == "jpg" and f[4] == "cls" for f in fields)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_the_same_samples(prepared: Path):
    webdataset = pytest.importorskip("webdataset")
    shards = ShardSet.open(prepared, "train")
    urls = [str(p) for p in shards.paths]
    assert len(urls) > 2
    read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [s["__key__"] for s in read] == [shards.key(i) for i in range(len(shards))]
    assert [s["jpg"] for s in read] == [shards.payload(i) for i in range(len(shards))]
    assert [int(s["cls"]) for s in read] == shards.label.tolist()


def test_payloads_are_the_files_and_threads_may_share_a_set(prepared: Path):
    with ShardSet.open(prepared) as shards:
        expected = [
            (prepared.parent / "in" / f"{shards.key(i)}.jpg").read_bytes() for i in range(16)
        ]
        assert shards.class_names == ("cat", "dog")
        assert [shards.class_names[n] for n in shards.label] == [
            shards.key(i).split("/")[0] for i in range(16)
        ]
        assert shards.length.tolist() == [[10, 12]] * 16
        wrong: list[int] = []

        def read(start: int) -> None:
            for i in range(200):
                k = (start + 7 * i) % 16
                if shards.payload(k) != expected[k]:
                    wrong.append(k)

        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong
        copy = pickle.loads(pickle.dumps(shards))
        assert copy.payload(3) == expected[3]
        copy.close()


class TestPreparedFolderThatIsBroken:
    def test_a_missing_shard_is_named(self, prepared: Path):
        (prepared / "train-000001.tar").unlink()
        with pytest.raises(DataError, match=r"train-000001\.tar is missing"):
            ShardSet.open(prepared, "train")

    def test_a_truncated_shard_is_named(self, prepared: Path):
        path = prepared / "train-000000.tar"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match=r"train-000000.tar has \d+ bytes, it was made with"):
            ShardSet.open(prepared, "train")

    def test_a_shard_cut_off_while_it_is_read_is_named_with_the_key(self, prepared: Path):
        with ShardSet.open(prepared, "train") as shards:
            shards.paths[0].write_bytes(shards.paths[0].read_bytes()[:600])
            with pytest.raises(DataError, match=f"train-000000.tar, key {shards.key(0)}"):
                shards.payload(0)

    def test_a_shard_that_vanishes_is_named_with_the_key(self, prepared: Path):
        with ShardSet.open(prepared, "train") as shards:
            shards.paths[0].unlink()
            with pytest.raises(DataError, match=f"train-000000.tar, key {shards.key(0)}"):
                shards.payload(0)

    def test_verify_finds_one_flipped_bit(self, prepared: Path):
        path = prepared / "train-000000.tar"
        data = bytearray(path.read_bytes())
        data[700] ^= 1
        path.write_bytes(data)
        with ShardSet.open(prepared, "train") as shards:
            (fault,) = shards.verify()
        assert "train-000000.tar" in fault and "sha256" in fault

    def test_verify_finds_an_index_of_other_samples(self, prepared: Path):
        index = ShardIndex.load(prepared / "train.index.npz")
        index.label[0] = 1 - index.label[0]
        index.save(prepared / "train.index.npz")
        with ShardSet.open(prepared, "train") as shards:
            (fault,) = shards.verify()
        assert "label" in fault

    @pytest.mark.parametrize("name", ["train.index.npz", "manifest.json"])
    def test_broken_index_and_manifest_are_named(self, prepared: Path, name: str):
        path = prepared / name
        data = path.read_bytes()
        for broken in (b"", data[: len(data) // 2], b"[1]"):
            path.write_bytes(broken)
            with pytest.raises(DataError, match=name):
                ShardSet.open(prepared, "train")

    def test_an_unknown_split_names_those_there_are(self, prepared: Path):
        with pytest.raises(DataError, match="has the splits train; 'val' is none of them"):
            ShardSet.open(prepared, "val")


class TestTarFilesWithoutIndex:
    def test_are_scanned_once_and_kept_beside(self, tmp_path: Path, monkeypatch):
        for n in range(3):
            tar(
                tmp_path / f"x-{n}.tar",
                [(f"{n}-{i}.{e}", c) for i in range(2)
                 for e, c in (("json", b"{}"), ("cls", b"7"), ("png", image(n, form="PNG")))],
            )  # fmt: skip
        shards = ShardSet.open(str(tmp_path / "x-{0..2}.tar"))
        assert len(shards) == 6 and shards.kind == "images" and shards.label.tolist() == [7] * 6
        assert shards.length.tolist() == [[10, 12]] * 6 and shards.payload(5) == image(
            2, form="PNG"
        )
        assert shards.index.shard.tolist() == [0, 0, 1, 1, 2, 2]
        monkeypatch.setattr(shard_index, "scan", lambda path: pytest.fail("scanned again"))
        assert len(ShardSet.open(str(tmp_path / "x-*.tar"))) == 6
        assert len(ShardSet.open(tmp_path)) == 6

    def test_a_changed_tar_file_is_scanned_again(self, tmp_path: Path):
        path = tar(tmp_path / "a.tar", [("k.txt", b"one")])
        assert len(ShardSet.open(path)) == 1
        tar(path, [("k.txt", b"one"), ("l.txt", b"two")])
        assert len(ShardSet.open(path)) == 2

    def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(
        self, tmp_path: Path, monkeypatch
    ):
        path = tar(tmp_path / "a.tar", [("k.wav", sound(0))])
        save = ShardIndex.save

        def refuse(self, place, **more):
            if place.parent == tmp_path:
                raise PermissionError(13, "Permission denied", str(place))
            save(self, place, **more)

        monkeypatch.setattr(ShardIndex, "save", refuse)
        assert ShardSet.open(path).length.tolist() == [[400]]
        assert not path.with_suffix(".index.npz").exists()
        assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1

    def test_unlabelled_samples_and_long_names(self, tmp_path: Path):
        long = "d" * 150 + "/" + "k" * 140
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            path = tar(tmp_path / f"{form}.tar", [(f"{long}.txt", b"hello")], form)
            shards = ShardSet.open(path)
            assert shards.label.tolist() == [-1] and shards.key(0) == long
            assert shards.payload(0) == b"hello"

    def test_an_unreadable_payload_has_no_length_but_stops_nothing(self, tmp_path: Path):
        path = tar(tmp_path / "a.tar", [("a.jpg", b"no image"), ("b.jpg", image(1))])
        assert ShardSet.open(path).length.tolist() == [[-1, -1], [10, 12]]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["a.jpg", "b.jpg", "a.jpg"], "key 'a' comes twice"),
            (["a.jpg", "a.jpg"], "key 'a' comes twice"),
            (["a.jpg", "b.txt"], "mixes kinds"),
            (["a.xyz"], "sample 'a' has only xyz"),
            ([], "no sample"),
        ],
    )
    def test_what_cannot_be_used_is_named(self, tmp_path: Path, names, message):
        path = tar(tmp_path / "a.tar", [(n, b"1") for n in names])
        with pytest.raises(DataError, match=message) as error:
            ShardSet.open(path)
        assert "a.tar" in str(error.value)

    @pytest.mark.parametrize("label", [b"", b"cat", b"-1", b"99999999999"])
    def test_a_label_that_is_no_class_number_is_named(self, tmp_path: Path, label):
        path = tar(tmp_path / "a.tar", [("a.txt", b"x"), ("a.cls", label)])
        with pytest.raises(DataError, match="sample 'a' has the label"):
            ShardSet.open(path)

    def test_a_key_in_two_tar_files_is_named_with_both(self, tmp_path: Path):
        for name in "ab":
            tar(tmp_path / f"{name}.tar", [("k.txt", b"1")])
        with pytest.raises(DataError, match=r"'k' comes twice: in .*a\.tar and in .*b\.tar"):
            ShardSet.open(tmp_path)

    def test_nothing_there(self, tmp_path: Path):
        for where in (tmp_path, tmp_path / "x.tar", str(tmp_path / "*.tar")):
            with pytest.raises(DataError):
                ShardSet.open(where)

    def test_every_truncation_is_noticed(self, tmp_path: Path):
        path = tar(tmp_path / "a.tar", [("a.txt", b"x" * 600), ("b.txt", b"y" * 10)])
        whole = path.read_bytes()
        for size in [*range(0, 3072, 256), 3000]:
            path.write_bytes(whole[:size])
            with pytest.raises(DataError, match=r"a\.tar"):
                scan(path)
        path.write_bytes(whole[:3584])  # members and one zero block: every sample is there
        assert len(scan(path)[0]) == 2


def test_preparing_twice_does_nothing_the_second_time(prepared: Path, capsys):
    before = contents(prepared)
    run("images", prepared.parent / "in", prepared, *OPTIONS)
    assert "complete already" in capsys.readouterr().err
    assert contents(prepared) == before
