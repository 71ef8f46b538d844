"""The command line: ``uml-fast <verb>``, overrides of a recipe, and errors as one clear line.

Exit codes: 0 done, or stopped with everything saved; 2 it cannot be done as asked (one message,
no traceback); 130 interrupted.
``UML_DEBUG=1`` shows the traceback of every error.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from uml_fast.config import ConfigError, RunConfig
from uml_fast.doctor import pip_line
from uml_fast.recipes import DEFAULT, describe, load_recipe, unknown
from uml_fast.runtime.launcher import tell_launcher

if TYPE_CHECKING:
    from uml_fast.grid.run import GridConfig

VERBS = {
    "prepare": "make shards of your own images, sounds, texts or features",
    "inspect": "show what is in shards, and whether it is whole",
    "extract": "features of frozen encoders, once, for heads that are trained on them",
    "train": "train a recipe: every mode for every seed, then the comparison",
    "search": "try combinations of options, choosing on validation",
    "evaluate": "evaluate the models of a run folder again",
    "analyse": "shift, margins, clusters, alignment, neurons, ...: what the paper looks at",
    "export": "write a run's target model as plain safetensors",
    "plan": "memory, rate and limits of a run on a cluster, before it is started",
    "doctor": "print what is on in this installation, and why",
}
"""Verb -> what it does; the verb's module is ``uml_fast.<verb>``."""

T = TypeVar("T")

Main = Callable[[list[str] | None], int]


def main(argv: list[str] | None = None) -> int:
    """``uml-fast <verb> [arguments]``; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: uml-fast <verb> [arguments]\n\nverbs:")
        print(_table(list(VERBS.items())))
        print("\numl-fast <verb> --help tells more")
        return 0
    return run_main(_verb, arguments)


def run_main(function: Main, argv: list[str] | None = None) -> int:
    """Run a verb's ``main`` and turn what it raises into a message on stderr and an exit code.

    Expected errors are those that uml_fast defines, missing packages, and what the operating
    system refuses (a folder, a full disk). Any other exception is a defect and passes through.
    """
    try:
        return function(argv)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        message = _explain(error)
        tell_launcher(message or f"{type(error).__name__}: {error} (its traceback is above)")
        if message is None or os.environ.get("UML_DEBUG") == "1":
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str] | None, prog: str) -> RunConfig | GridConfig:
    """The configuration that ``[recipe] [--field value ...]`` asks for.

    Args:
        argv: arguments; None: those of the process. The first names a registered recipe or
            ``path/to/recipe.py:function``; where it is an option, the default recipe is meant.
        prog: name of the command in help and errors.

    Raises:
        ConfigError: unknown recipe.
        SystemExit: help was asked for (0), or an option is unknown or has a bad value (2).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments.pop(0) if named else DEFAULT
    if any(a.partition("=")[0] == "--recipe" for a in arguments):
        raise ConfigError(f"the recipe comes first, without an option: {prog} NAME --steps 100")
    config = load_recipe(recipe)
    rows = [*describe(), ("FILE.py:FUNCTION", "your own: a function that returns a RunConfig")]
    description = (
        f"recipes ({DEFAULT} where none is named):\n{_table(rows)}\n\noptions of {recipe}:"
    )

    import tyro

    return tyro.cli(
        type(config),
        default=config,
        args=arguments,
        prog=f"{prog} {recipe}",
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
    )


def options(kind: type[T], verb: str, argv: Sequence[str] | None) -> T:
    """The options of a verb: a dataclass whose docstring is the help, as it is written.

    Fields without a default are positional; a flag that is off needs no ``--no-``.

    Raises:
        ConfigError: an option has a value that cannot be.
        SystemExit: help was asked for (0), or an option is unknown or has a bad value (2).
    """
    import tyro

    return tyro.cli(
        kind,
        args=sys.argv[1:] if argv is None else argv,
        prog=f"python -m uml_fast.{verb}",
        description=inspect.getdoc(kind),
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )


def _verb(argv: list[str] | None) -> int:
    assert argv
    verb, *rest = argv
    if verb not in VERBS:
        raise ConfigError(unknown("verb", verb, VERBS))
    main: Main = importlib.import_module(f"uml_fast.{verb}").main
    return main(rest)


def _explain(error: Exception) -> str | None:
    """One message for an expected error, None for a defect."""
    if any(t.__module__.startswith("uml_fast.") for t in type(error).__mro__):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        if error.name.partition(".")[0] == "uml_fast":
            return None
        return f"the package {error.name} is not installed; {pip_line(error.name)}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return None


def _table(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


if __name__ == "__main__":
    sys.exit(main())
