"""The command line: recipes and overrides become a configuration, errors one line and a code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from uml_fast import cli, recipes
from uml_fast.config import ConfigError, RunConfig
from uml_fast.data.source import DataError
from uml_fast.training.checkpoint import CheckpointError

RECIPE = '''
from __future__ import annotations
from dataclasses import dataclass
from uml_fast.config import *

@dataclass(frozen=True, kw_only=True, slots=True)
class Camera(ModalityConfig):
    patch: int = 4
    """Side of a patch in pixels."""

@dataclass(frozen=True, kw_only=True, slots=True)
class Words(ModalityConfig):
    vocabulary: int = 90
    """Number of token ids."""

@dataclass(frozen=True, kw_only=True, slots=True)
class Made(DataConfig):
    samples: int = 5
    """Samples of each modality."""

@dataclass(frozen=True, kw_only=True, slots=True)
class Net(BackboneConfig):
    depth: int = 2
    """Layers."""

def tiny() -> RunConfig:
    """A tiny run."""
    return RunConfig(
        recipe="tiny", target="image", data=Made(), backbone=Net(width=8),
        modalities=(Camera(name="image"), Words(name="text", share=0.5)),
        objective=ObjectiveConfig(classes=10),
    )

def wrong() -> int:
    return 3
'''


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return f"{path}:tiny"


def test_overrides_reach_every_field_of_the_kinds_in_use(recipe: str) -> None:
    overrides = (
        "--steps 7 --seeds 2 --out /tmp/x --resume never --device cpu --modes uml "
        "--optim.lr 3e-4 --optim.betas 0.8 0.9 --mix.token-budget 64 --data.samples 9 "
        "--backbone.depth 3 --modalities.0.share 2 --modalities.0.patch 8 "
        "--modalities.1.vocabulary 50 --compile --eval.no-probe"
    )
    got = cli.parse([recipe, *overrides.split()], "train")
    image, text = got.modalities
    assert (got.steps, got.seeds, got.out, got.resume) == (7, 2, Path("/tmp/x"), "never")
    assert (got.device, got.modes, got.compile, got.eval.probe) == ("cpu", ("uml",), True, False)
    assert (got.optim.lr, got.optim.betas, got.mix.token_budget) == (3e-4, (0.8, 0.9), 64)
    assert (got.data.samples, got.backbone.depth, got.backbone.width) == (9, 3, 8)  # type: ignore[attr-defined]
    assert (type(image).__name__, image.name, image.share, image.patch) == ("Camera", "image", 2, 8)  # type: ignore[attr-defined]
    assert (text.share, text.vocabulary) == (0.5, 50)  # type: ignore[attr-defined]


def test_no_override_is_the_recipe_itself(recipe: str) -> None:
    got = cli.parse([recipe], "train")
    assert repr(got) == repr(recipes.load_recipe(recipe))


def test_default_recipe_is_used_where_none_is_named(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = recipes.load_recipe(recipe)
    asked = []

    def load(name: str) -> RunConfig:
        asked.append(name)
        return tiny

    monkeypatch.setattr(cli, "load_recipe", load)
    assert cli.parse(["--steps", "3"], "train").steps == 3
    assert cli.parse([], "train") == tiny
    assert asked == [recipes.DEFAULT, recipes.DEFAULT]


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what stderr got, of a verb that only parses."""

    def verb(argv: list[str] | None) -> int:
        cli.parse(argv, "uml-fast train")
        return 0

    code = cli.run_main(verb, arguments)
    return code, capsys.readouterr().err


def test_unknown_names_get_the_nearest(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe.removesuffix(":tiny")
    for arguments, expected in (
        (["gausian"], "unknown recipe 'gausian'; did you mean gaussian"),
        (["zzz"], f"there are: {', '.join(recipes.RECIPES)} (your own recipe is path/to"),
        ([f"{path}:tinny"], "unknown function 'tinny'; did you mean tiny?"),
        ([path], "add the function that returns the run"),
        ([f"{path}:wrong"], "returned int; it must return RunConfig"),
        (["absent.py:f"], "there is no recipe file absent.py"),
        ([recipe, "--optim.lrr", "3"], "--optim.lr"),
        ([recipe, "--optim.lr", "fast"], "--optim.lr"),
        ([recipe, "--optim.lr", "-1"], "optim.lr is -1.0; it must be positive"),
        ([recipe, "--steps", "0"], "steps is 0"),
        ([recipe, "--recipe", "gaussian"], "the recipe comes first"),
    ):
        code, error = run(arguments, capsys)
        assert code == 2, arguments
        assert expected in error and "Traceback" not in error, (arguments, error)


def test_help_lists_recipes_and_the_options_of_the_one_named(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_main(lambda a: bool(cli.parse(a, "train")), [recipe, "--help"]) == 0
    text = capsys.readouterr().out
    for name, line in recipes.describe():
        assert f"  {name} " in text and line in text
    assert "--modalities.1.vocabulary" in text and "Side of a patch" in text


def test_every_registered_recipe_is_described_in_one_line() -> None:
    described = dict(recipes.describe())
    assert described.keys() == recipes.RECIPES.keys()
    assert all(len(line) > 10 for line in described.values())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_registered_recipe_loads_under_its_name(name: str) -> None:
    assert recipes.load_recipe(name).recipe == name


def raising(error: BaseException) -> cli.Main:
    def verb(argv: list[str] | None) -> int:
        raise error

    return verb


def test_expected_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error, expected in (
        (ConfigError("optim.lr is 0"), "error: optim.lr is 0"),
        (DataError("image: no samples"), "error: image: no samples"),
        (CheckpointError("cannot write x"), "error: cannot write x"),
        (ModuleNotFoundError("no", name="sklearn.svm"), "pip install scikit-learn"),
        (ModuleNotFoundError("no", name="nvidia.dali"), "pip install nvidia-dali-cuda130"),
        (ModuleNotFoundError("no", name="my_thing"), "pip install my-thing"),
        (PermissionError(13, "Permission denied", "/run"), "error: /run: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
    ):
        assert cli.run_main(raising(error)) == 2
        text = capsys.readouterr().err
        assert expected in text and text.count("\n") == 1


def test_interrupt_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_main(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert cli.run_main(raising(SystemExit())) == 0
    assert cli.run_main(raising(SystemExit(5))) == 5
    assert cli.run_main(lambda argv: 4) == 4


def test_an_interrupt_while_train_is_imported_is_one_line(tmp_path: Path) -> None:
    """A torch that interrupts its own import stands for Ctrl-C in the first seconds."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, "-m", "uml_fast.train"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "defect", [KeyError("x"), ModuleNotFoundError("no", name="uml_fast.gone"), OSError("bare")]
)
def test_defects_keep_their_traceback(defect: Exception) -> None:
    with pytest.raises(type(defect)):
        cli.run_main(raising(defect))


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UML_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.run_main(raising(ConfigError("x")))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "uml_fast.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "UML_DEBUG": "0"},
    )


def test_verbs() -> None:
    listing = command()
    assert listing.returncode == 0
    assert all(f"  {verb} " in listing.stdout for verb in cli.VERBS)
    mistyped = command("inspekt")
    assert mistyped.returncode == 2
    assert mistyped.stderr == "error: unknown verb 'inspekt'; did you mean inspect?\n"
    doctor = command("doctor")
    assert doctor.returncode == 0 and "torch" in doctor.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_that_names_it(verb: str) -> None:
    done = command(verb, "--help")
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr


def test_listing_recipes_imports_neither_torch_nor_a_recipe() -> None:
    code = (
        "import sys; from uml_fast import cli, recipes; recipes.describe(); "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('uml_fast.recipes.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


BASE_RECIPE = """
from uml_fast.config import *

def base() -> RunConfig:
    return RunConfig(
        recipe="base", target="a", modalities=(ModalityConfig(name="a"),), data=DataConfig(),
        backbone=BackboneConfig(width=8), objective=ObjectiveConfig(classes=2),
    )
"""


def test_options_of_every_run_are_the_frozen_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of the command line is meant: tests/options.txt changes in the same commit."""
    path = tmp_path / "base.py"
    path.write_text(BASE_RECIPE)
    with pytest.raises(SystemExit):
        cli.parse([f"{path}:base", "--help"], "train")
    shown = re.findall(r"^[^\w-]*(?:-h, )?(--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE)
    frozen = Path(__file__).with_name("options.txt").read_text().split()
    assert "--steps" in shown and sorted(shown) == sorted(frozen)
