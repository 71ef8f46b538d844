"""Shards from URLs and pipes: fetched once, whole, continued, and refused in clear words."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
import threading
import time
from pathlib import Path

import pytest

from tests.data.http_folder import serving
from tests.data.made_files import contents, image, image_folder, run, tar
from uml_fast import cli
from uml_fast.data.shards import fetch, remote
from uml_fast.data.shards.files import ShardSet, splits_of
from uml_fast.data.source import DataError

OPTIONS = ("--split", "train=0.7,test=0.3", "--shard-size-mib", "0.005")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "BACKOFF_S", 0.01)
    remote.fetch_manifest.cache_clear()


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tar files of two images each."""
    folder = tmp_path / "x"
    folder.mkdir()
    for n in range(3):
        members = [(f"{n}-{i}.{e}", c) for i in range(2)
                   for e, c in (("cls", b"%d" % i), ("jpg", image(2 * n + i)))]  # fmt: skip
        tar(folder / f"{n:03}.tar", members)
    return folder


@pytest.fixture(scope="module")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    run("images", image_folder(folder / "in", 12), folder / "out", *OPTIONS)
    return folder / "out"


@pytest.fixture
def prepared(_original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_original, tmp_path / "served" / "photos"))


def same(shards: ShardSet, n: int = 6) -> bool:
    return [shards.payload(i) for i in range(len(shards))] == [image(i) for i in range(n)]


def parts(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache").rglob("*.part*")]


def test_a_range_of_urls_is_fetched_once_and_read_like_files(tars: Path, tmp_path: Path, capsys):
    with serving(tars) as (url, faults):
        with ShardSet.open(url + "/{000..002}.tar") as shards:
            assert same(shards) and shards.label.tolist() == [0, 1] * 3
        assert "fetched 3 files" in capsys.readouterr().err
        with ShardSet.open(url + "/{000..001}.tar::" + url + "/002.tar") as shards:
            assert same(shards)
        assert faults.asked == {"000.tar": 1, "001.tar": 1, "002.tar": 1}
        own = tmp_path / "own"
        with ShardSet.open(url + "/001.tar", cache=own) as shards:
            assert shards.payload(0) == image(2) and own in shards.paths[0].parents
    assert not parts(tmp_path)


def test_pipes_and_file_urls_and_mixtures(tars: Path):
    with ShardSet.open(f"pipe:cat {tars}/{{000..002}}.tar") as shards:
        assert same(shards)
    with ShardSet.open(f"file:{tars}/{{000..002}}.tar") as shards:
        assert same(shards) and shards.paths[0] == tars / "000.tar"
    with ShardSet.open(f"{tars}/000.tar::pipe:cat {tars}/001.tar::{tars}/002.tar") as shards:
        assert same(shards)


def test_a_prepared_folder_by_url(prepared: Path):
    with serving(prepared.parent) as (url, faults):
        assert splits_of(url + "/photos") == ("train", "test")
        for split in ("train", "test"):
            with (
                ShardSet.open(f"{url}/photos/", split) as there,
                ShardSet.open(prepared, split) as here,
            ):
                assert len(here.paths) > 1 and len(there) == len(here)
                assert there.class_names == here.class_names == ("cat", "dog")
                assert all(there.payload(i) == here.payload(i) for i in range(len(here)))
                assert not [*there.verify()]
        assert max(faults.asked.values()) <= 2  # the manifest by both spellings of the URL
        with pytest.raises(DataError, match=r"/photos: .*has the splits train, test; 'val' is"):
            ShardSet.open(url + "/photos", "val")


def test_shards_that_were_made_again_are_fetched_again(prepared: Path):
    with serving(prepared.parent) as (url, _):
        ShardSet.open(url + "/photos", "train").close()
        manifest = json.loads((prepared / "manifest.json").read_text())
        manifest["fingerprint"] = "another"
        (prepared / "manifest.json").write_text(json.dumps(manifest))
        remote.fetch_manifest.cache_clear()
        ShardSet.open(url + "/photos", "train").close()
    folders = [p for p in (remote.cache_folder() / "remote").iterdir() if p.is_dir()]
    assert len(folders) == 2 and all((f / "train.index.npz").exists() for f in folders)


class TestFaults:
    def test_a_cut_connection_goes_on_where_it_was_cut(self, tars: Path, tmp_path: Path):
        with serving(tars) as (url, faults):
            faults.cuts["000.tar"] = [700, 1500]
            with ShardSet.open(url + "/000.tar") as shards:
                assert same(shards, 2)
            assert faults.ranges == ["000.tar 700", "000.tar 1500"]
        assert not parts(tmp_path)

    def test_what_a_killed_process_left_is_continued(self, tars: Path):
        with serving(tars) as (url, faults):
            faults.cuts["000.tar"] = [600] * fetch.ATTEMPTS
            faults.cuts["000.tar"][1:] = [601, 602, 603]
            with pytest.raises(DataError, match="cut after 603 of"):
                ShardSet.open(url + "/000.tar")
            with ShardSet.open(url + "/000.tar") as shards:
                assert same(shards, 2)
            assert faults.ranges[-1] == "000.tar 603"

    def test_a_file_that_changed_meanwhile_is_begun_anew(self, tars: Path):
        with serving(tars) as (url, faults):
            faults.cuts["000.tar"] = [600] * fetch.ATTEMPTS
            with pytest.raises(DataError, match="cut after"):
                ShardSet.open(url + "/000.tar")
            tar(tars / "000.tar", [("k.jpg", image(9))])
            with ShardSet.open(url + "/000.tar") as shards:
                assert shards.payload(0) == image(9)

    def test_an_overloaded_server_is_asked_again(self, tars: Path):
        with serving(tars) as (url, faults):
            faults.status["000.tar"] = [503, 429]
            ShardSet.open(url + "/000.tar").close()
            assert faults.asked["000.tar"] == 3
            faults.status["001.tar"] = [503] * 9
            with pytest.raises(DataError, match=r"001\.tar: the server says 503 .*tried 4 times"):
                ShardSet.open(url + "/001.tar")

    @pytest.mark.parametrize(("code", "remedy"), [(404, "correct the URL"), (403, "sign the URL")])
    def test_a_refusal_is_told_at_once(self, tars: Path, code: int, remedy: str):
        with serving(tars) as (url, faults):
            faults.status["001.tar"] = [code] * 9
            with pytest.raises(DataError, match=f"001.tar: the server says {code} .*{remedy}"):
                ShardSet.open(url + "/{000..002}.tar")
            assert faults.asked["001.tar"] == 1

    def test_nobody_listens(self):
        with pytest.raises(
            DataError, match=r"http://127.0.0.1:9/x.tar: cannot be reached: .*tried"
        ):
            ShardSet.open("http://127.0.0.1:9/x.tar")

    def test_a_wrong_checksum_and_a_wrong_size(self, prepared: Path, tmp_path: Path):
        path = prepared / "train-000001.tar"
        whole = bytearray(path.read_bytes())
        with serving(prepared.parent) as (url, _):
            path.write_bytes(whole[:-512])
            with pytest.raises(
                DataError, match=r"train-000001\.tar: it has .* bytes, the manifest"
            ):
                ShardSet.open(url + "/photos", "train")
            whole[700] ^= 1
            path.write_bytes(whole)
            with pytest.raises(
                DataError, match=r"train-000001\.tar: .*\(sha256\); upload it again"
            ):
                ShardSet.open(url + "/photos", "train")
            whole[700] ^= 1
            path.write_bytes(whole)
            with ShardSet.open(url + "/photos", "train") as shards:
                assert not [*shards.verify()]

    def test_a_page_instead_of_a_tar_file(self, tars: Path):
        (tars / "page.tar").write_text("<html>please log in</html>" * 50)
        with (
            serving(tars) as (url, _),
            pytest.raises(DataError, match=r"page\.tar: what was fetched"),
        ):
            ShardSet.open(url + "/page.tar")

    def test_a_full_disk(self, tars: Path, monkeypatch: pytest.MonkeyPatch):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(fetch.os, "fsync", full)
        with serving(tars) as (url, _), pytest.raises(
            DataError, match=r"000\.tar: cannot write .*No space.*free space, or .*--data\.cache"
        ):  # fmt: skip
            ShardSet.open(url + "/000.tar")

    def test_a_cache_that_cannot_be_written(self, tars: Path, tmp_path: Path):
        (tmp_path / "file").write_text("")
        with (
            serving(tars) as (url, _),
            pytest.raises(DataError, match=r"cannot write .*--data\.cache"),
        ):
            ShardSet.open(url + "/000.tar", cache=tmp_path / "file")

    @pytest.mark.parametrize(
        ("where", "message"),
        [
            ("pipe:exit 3", r"its command ended with exit 3 \(tried 4"),
            ("pipe:echo hello", "what was fetched: broken or truncated"),
            ("pipe:head -c 1200 {tars}/000.tar", "what was fetched: .*trunca"),
            ("xyz://a/b.tar", "xyz: is not known; known are .*https.*s3"),
            ("pipe:cat ${{NOT_SET}}", "WDS_NOT_SET"),
            ("http:///x.tar", "http:///x.tar"),
        ],
    )
    def test_what_cannot_be_opened(self, tars: Path, where: str, message: str):
        with pytest.raises(DataError, match=message):
            ShardSet.open(where.format(tars=tars))

    def test_a_manifest_that_names_files_elsewhere(self, prepared: Path):
        manifest = json.loads((prepared / "manifest.json").read_text())
        manifest["splits"]["train"]["shards"][0]["file"] = "../../x.tar"
        (prepared / "manifest.json").write_text(json.dumps(manifest))
        with (
            serving(prepared.parent) as (url, _),
            pytest.raises(DataError, match="no plain file name"),
        ):
            ShardSet.open(url + "/photos", "train")


def test_threads_that_want_the_same_shards_fetch_them_once(tars: Path):
    errors: list[BaseException] = []

    def work(url: str) -> None:
        try:
            with ShardSet.open(url + "/{000..002}.tar") as shards:
                assert same(shards)
        except BaseException as e:
            errors.append(e)

    with serving(tars) as (url, faults):
        threads = [threading.Thread(target=work, args=(url,)) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors and faults.asked == {"000.tar": 1, "001.tar": 1, "002.tar": 1}


def _fetch_pipe(where: str, cache: Path) -> None:
    ShardSet.open(where, cache=cache).close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a process with threads is forked
def test_processes_that_want_the_same_shard_run_its_command_once(tars: Path, tmp_path: Path):
    where = f"pipe:echo x >> {tmp_path}/ran; sleep 0.3; cat {tars}/000.tar"
    fork = multiprocessing.get_context("fork")
    others = [fork.Process(target=_fetch_pipe, args=(where, tmp_path / "c")) for _ in range(3)]
    for p in others:
        p.start()
    for p in others:
        p.join()
    assert [p.exitcode for p in others] == [0, 0, 0]
    assert (tmp_path / "ran").read_text() == "x\n"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_was_killed_while_it_fetched_is_continued(tars: Path, tmp_path: Path):
    cache = tmp_path / "c"
    with serving(tars) as (url, faults):
        faults.cuts["000.tar"] = [1100]
        faults.stalled.add("000.tar")
        fork = multiprocessing.get_context("fork")
        other = fork.Process(target=_fetch_pipe, args=(url + "/000.tar", cache))
        other.start()
        end = time.monotonic() + 30
        while sum(p.stat().st_size for p in cache.rglob("*.part")) < 1100:
            assert time.monotonic() < end
            time.sleep(0.01)
        other.kill()
        other.join()
        faults.stalled.clear()
        with ShardSet.open(url + "/000.tar", cache=cache) as shards:
            assert same(shards, 2)
        assert faults.ranges == ["000.tar 1100"]
        assert not [*cache.rglob("*.part*")]


def test_inspect_shows_shards_from_a_url(prepared: Path, capsys):
    before = contents(prepared)
    with serving(prepared.parent) as (url, _):
        assert cli.main(["inspect", url + "/photos", "--verify"]) == 0
        assert cli.main(["inspect", url + "/gone"]) == 2
    shown = capsys.readouterr()
    assert "train: " in shown.out and "nothing wrong found" in shown.out
    assert "404" in shown.err and contents(prepared) == before
