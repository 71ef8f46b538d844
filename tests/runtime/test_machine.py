"""The machine and the commit a run was made on."""

import json
import subprocess

import torch

import uml_fast
from uml_fast.runtime import machine
from uml_fast.runtime.machine import machine_info


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_machine_info_is_json_and_names_what_numbers_depend_on():
    info = json.loads(json.dumps(machine_info()))
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["uml_fast"] == uml_fast.__version__
    assert info["machine"]["cpu"]
    assert info["machine"]["cores"] >= 1
    assert info["machine"]["torch_threads"] == torch.get_num_threads()
    assert (info["machine"]["gpu"] is None) == (not torch.cuda.is_available())


def test_commit_and_dirty_flag_follow_the_repository(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit, dirty = machine._commit(file)
    assert len(commit) == 40
    assert dirty is False
    file.write_text("a = 2\n")
    assert machine._commit(file) == (commit, True)


def test_an_installed_package_does_not_report_the_repository_around_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_DIR", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "own.py").write_text("")
    git(tmp_path, "add", "own.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    installed = tmp_path / "site-packages" / "code.py"
    installed.parent.mkdir()
    installed.write_text("")
    assert machine._commit(installed) == (None, None)


def test_no_git_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._commit(tmp_path / "code.py") == (None, None)
