"""The doctor tells the truth about what is on, and never falls over a broken part."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from uml_fast import doctor


def finding(name: str) -> doctor.Finding:
    return next(f for f in doctor.examine() if f.name == name)


def test_report_agrees_with_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["detail"].startswith(torch.__version__)
    assert report["cuda device"]["on"] == torch.cuda.is_available()
    assert str(torch.get_num_threads()) in report["threads"]["detail"]
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report)
    for line, (name, found) in zip(lines, report.items(), strict=True):
        assert line.startswith("on " if found["on"] else "off")
        assert name in line and line.endswith(found["detail"])


def test_native_lines_follow_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from uml_fast.runtime import native

    assert finding("native extension").on == native.available()
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "the file was deleted")
    assert finding("native extension") == doctor.Finding(
        "native extension", False, "the file was deleted"
    )


def test_missing_package_gets_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"nowhere_to_be_found": ("some-dist", "a test")}
    monkeypatch.setattr(doctor, "PACKAGES", absent)
    assert finding("some-dist") == doctor.Finding(
        "some-dist", False, "a test: pip install some-dist"
    )
    assert doctor.pip_line("nowhere_to_be_found.inner") == "pip install some-dist"


@pytest.mark.parametrize("lacks", [True, False])
def test_timm_that_only_uml_fast_can_import_is_said(
    monkeypatch: pytest.MonkeyPatch, lacks: bool
) -> None:
    pytest.importorskip("safetensors")
    from uml_fast.runtime import foreign

    here = {m: (d, "a test") for m, d in (("timm", "timm"), ("safetensors", "safetensors"))}
    monkeypatch.setattr(doctor, "PACKAGES", here)
    monkeypatch.setattr(foreign, "lacks_ops", lambda: lacks)
    if finding("timm").on:
        said = "a plain import of timm may fail" in finding("timm").detail
        assert said == lacks
    assert "plain import" not in finding("safetensors").detail


def test_a_broken_check_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert finding("cuda device") == doctor.Finding(
        "cuda device", False, "RuntimeError: driver too old"
    )


def test_it_runs_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from uml_fast import doctor; sys.exit(doctor.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "off  torch" in done.stdout, done.stderr


def test_unknown_option_shows_the_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--jsn"])
    assert stop.value.code == 2 and "--json" in capsys.readouterr().err
