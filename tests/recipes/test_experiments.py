"""docs/experiments.md: every command names a recipe, a verb and options that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from uml_fast import cli
from uml_fast.extract import parse as parse_extract
from uml_fast.recipes import RECIPES
from uml_fast.search import read_arguments

PAGE = Path(__file__).parents[2] / "docs" / "experiments.md"
COMMANDS = list(dict.fromkeys(re.findall(r"`python -m uml_fast\.(\w+ [^`]+)`", PAGE.read_text())))


def parses(recipe: str, options: list[str]) -> None:
    config = cli.parse([recipe, *options], "test")
    assert config.recipe == recipe


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *arguments = shlex.split(command)
    if verb == "train":
        parses(arguments[0], arguments[1:])
    elif verb == "search":
        (recipe, *options), over = read_arguments(arguments)
        for field, values in over.items():
            for value in values:
                parses(recipe, [*options, f"--{field}", value])
    elif verb == "extract":
        assert parse_extract(arguments).kind == arguments[0]
    else:
        assert verb in ("analyse", "prepare")
        kind = arguments[:1] if verb == "prepare" else []
        assert cli.main([verb, *kind, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(re.search(rf"{o}\b", shown) for o in arguments if o.startswith("--"))


def test_every_recipe_of_the_paper_is_on_the_page() -> None:
    named = {shlex.split(c)[1] for c in COMMANDS if c.startswith("train ")}
    beside = {"folders", "throughput", "audio_images_clip"}  # one's own files, speed, a twin
    assert named >= RECIPES.keys() - beside


def test_links_and_modules_are_there() -> None:
    text = PAGE.read_text()
    for module in re.search(r"\[uml_fast/analysis\].*?\.\n\n", text, re.DOTALL)[0].split("`")[1::2]:  # type: ignore[index]
        assert (PAGE.parents[1] / "uml_fast" / "analysis" / f"{module}.py").is_file(), module
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (PAGE.parent / link).exists(), link


@pytest.mark.parametrize("command", ["train absent", "train mosi --data.colour red"])
def test_the_check_finds_what_is_not_there(command: str) -> None:
    recipe, *options = command.split()[1:]
    with pytest.raises((cli.ConfigError, SystemExit)):
        parses(recipe, options)
