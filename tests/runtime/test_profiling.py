"""``--profile``: a trace of some steps whose phases and stems have names."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.tiny import tiny
from uml_fast.runtime.profiling import SKIPPED, TAKEN, WARM
from uml_fast.train import train


def profile(folder: Path, steps: int) -> Path:
    path = folder / "new" / "profile.json"
    config = dataclasses.replace(
        tiny(), out=folder / "run", profile=path, steps=steps, seeds=1, modes=("uml",)
    )
    train(config)
    return path


def test_a_profile_names_phases_and_stems(tmp_path: Path) -> None:
    events = json.loads(profile(tmp_path, SKIPPED + WARM + TAKEN + 3).read_text())["traceEvents"]
    named = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
    for name in ("forward", "backward", "optimizer", "stem image", "stem audio", "stem text"):
        assert named[name] >= TAKEN, name


def test_a_trial_too_short_for_a_profile_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not profile(tmp_path, 3).exists()
    assert "no profile: the trial ended before" in "".join(capsys.readouterr())


def test_a_profile_that_cannot_be_written_does_not_cost_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new").write_text("in the way")
    assert not profile(tmp_path, SKIPPED + WARM + TAKEN).exists()
    assert "could not be written" in "".join(capsys.readouterr())
    assert (tmp_path / "run" / "summary.json").exists()
