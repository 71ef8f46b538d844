"""Recipes: a run is a function without arguments that returns a RunConfig or a GridConfig.

The registry maps a name to ``module:function`` as text, so that listing recipes imports none of
them, and a recipe whose packages are missing stops nobody from using another one.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from uml_fast.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from uml_fast.grid.run import GridConfig

RECIPES = {
    "numbers": "uml_fast.recipes.numbers:numbers",
    "gaussian": "uml_fast.recipes.gaussian:gaussian",
    "tokens": "uml_fast.recipes.tokens:tokens",
    "folders": "uml_fast.recipes.folders:folders",
    "audio": "uml_fast.recipes.audio:audio",
    "audio_images": "uml_fast.recipes.audio:audio_images",
    "audio_clip": "uml_fast.recipes.audio:audio_clip",
    "audio_images_clip": "uml_fast.recipes.audio:audio_images_clip",
    "vision_text": "uml_fast.recipes.vision_text:vision_text",
    "vision_text_control": "uml_fast.recipes.vision_text:vision_text_control",
    "vision_text_clip": "uml_fast.recipes.vision_text:vision_text_clip",
    "text_ratio": "uml_fast.recipes.vision_text:text_ratio",
    "unrelated_text": "uml_fast.recipes.vision_text:unrelated_text",
    "exchange_rate": "uml_fast.recipes.vision_text:exchange_rate",
    "transfer": "uml_fast.recipes.transfer:transfer",
    "finetune": "uml_fast.recipes.finetune:finetune",
    "finetune-text": "uml_fast.recipes.finetune:finetune_text",
    "throughput": "uml_fast.recipes.throughput:throughput",
    "mosi": "uml_fast.recipes.multibench:mosi",
    "mosei": "uml_fast.recipes.multibench:mosei",
    "mustard": "uml_fast.recipes.multibench:mustard",
    "ur_funny": "uml_fast.recipes.multibench:ur_funny",
    "mimic": "uml_fast.recipes.multibench:mimic",
}
"""Name of each recipe -> where its function is."""

RECIPE_MODULE = "uml_recipe_"
"""Module names of users' own recipe files begin with this."""

DEFAULT = "numbers"
"""Recipe of a run that names none."""


def unknown(kind: str, given: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest names, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} {given!r}; did you mean {' or '.join(near)}?"
    there = f"there are: {', '.join(names)}" if names else "there is none"
    return f"unknown {kind} {given!r}; {there}"


def load_recipe(name: str) -> RunConfig | GridConfig:
    """The configuration of a registered recipe, or of ``path/to/recipe.py:function``.

    Raises:
        ConfigError: no such recipe, file or function, or what it returns is no configuration.
        ModuleNotFoundError: the recipe needs a package that is not installed.
    """
    path, _, function = name.rpartition(":")
    if path.endswith(".py"):
        recipe = _function(import_file(Path(path)), function, path)
    elif name in RECIPES:
        module, _, function = RECIPES[name].partition(":")
        recipe = _function(importlib.import_module(module), function, module)
    elif name.endswith(".py"):
        raise ConfigError(f"{name} is a file; add the function that returns the run: {name}:NAME")
    else:
        hint = " (your own recipe is path/to/recipe.py:function)"
        raise ConfigError(unknown("recipe", name, RECIPES) + hint)
    from uml_fast.grid.run import GridConfig  # with torch, which listing recipes does not need

    config = recipe()
    if not isinstance(config, (RunConfig, GridConfig)):
        raise ConfigError(
            f"recipe {name} returned {type(config).__name__}; it must return RunConfig or "
            "GridConfig"
        )
    return config


def describe() -> list[tuple[str, str]]:
    """Name and first docstring line of each registered recipe, read from the source text."""
    lines = []
    for name, place in RECIPES.items():
        module, _, function = place.partition(":")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
        lines.append((name, (ast.get_docstring(found) or "").partition("\n")[0]))
    return lines


def import_file(path: Path) -> ModuleType:
    """The module in a user's own recipe file.

    Raises:
        ConfigError: there is no such file.
    """
    if not path.is_file():
        raise ConfigError(f"there is no recipe file {path}")
    name = f"{RECIPE_MODULE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name when they resolve annotations.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str, place: str) -> Callable[[], object]:
    found = getattr(module, name, None)
    if callable(found):
        return found
    functions = [n for n, v in vars(module).items() if inspect.isfunction(v) and n[0] != "_"]
    raise ConfigError(f"{place}: " + unknown("function", name, functions))
