"""The run folder: what was asked for (run.json), how to safely start, continue or set one aside.

A folder holds run.json, metrics.jsonl, trials/<mode>-<seed>/{checkpoints/, result.json},
summary.json, samples.json, report.html and TensorBoard events.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from uml_fast.config import ConfigError, RunConfig
from uml_fast.distributed.ranks import Ranks
from uml_fast.grid.run import GridConfig
from uml_fast.recipes import RECIPE_MODULE, import_file
from uml_fast.runtime.machine import machine_info
from uml_fast.training.log import RunFolderError, write_json

logger = logging.getLogger("uml_fast")

_MAY_CHANGE = ("out", "resume", "seeds", "device", "log_every", "checkpoint", "dist", "trace",
             "profile", "wandb", "data.max_errors", "data.cache", "data.keep_mib")  # fmt: skip
"""Fields in which a continued run may differ from its folder's: they do not change a trial."""


def to_json(value: Any) -> Any:
    """A configuration as JSON; every dataclass carries its name under ``class``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": f"{_place(type(value))}:{type(value).__qualname__}"} | fields
    if isinstance(value, tuple):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _place(kind: type) -> str:
    """Where a class is imported from: its module, or the file of a user's own recipe."""
    name = kind.__module__
    return str(sys.modules[name].__file__) if name.startswith(RECIPE_MODULE) else name


def from_json(value: Any) -> Any:
    """Inverse of ``to_json``.

    Raises:
        ConfigError: a class is not a configuration of this version.
    """
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    place, _, name = value["class"].rpartition(":")
    try:
        is_file = place.endswith(".py")
        module = import_file(Path(place)) if is_file else importlib.import_module(place)
        kind = getattr(module, name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise TypeError(f"{name} is not a configuration")
        known = {f.name for f in dataclasses.fields(kind)}
        fields = {k: from_json(v) for k, v in value.items() if k != "class"}
        for name in ("out", "trace", "profile"):
            if name in known and fields.get(name) is not None:
                fields[name] = Path(fields[name])
        return kind(**fields)
    except (ImportError, AttributeError, TypeError, KeyError) as e:
        raise ConfigError(
            f"run.json names {value['class']!r}, which this version cannot build: {e}"
        ) from e


def read_any_config(folder: Path) -> RunConfig | GridConfig:
    """The configuration of the run in ``folder``, whichever kind it is.

    Raises:
        RunFolderError: there is no readable run.
    """
    path = folder / "run.json"
    try:
        config = from_json(json.loads(path.read_text())["config"])
    except FileNotFoundError:
        meant = Path("runs") / folder
        is_meant = (meant / "run.json").exists()
        advice = f"did you mean {meant}?" if is_meant else f"train one with --out {folder}"
        raise RunFolderError(f"{folder} holds no run (no run.json); {advice}") from None
    except (OSError, json.JSONDecodeError, KeyError) as e:
        raise RunFolderError(f"cannot read {path}: {e}") from e
    if not isinstance(config, (RunConfig, GridConfig)):
        raise RunFolderError(f"{path} holds no run configuration")
    return config


def read_config(folder: Path) -> RunConfig:
    """The configuration of the run of a model in ``folder``.

    Raises:
        RunFolderError: there is no readable run, or one of heads on frozen features.
    """
    config = read_any_config(folder)
    if isinstance(config, GridConfig):
        raise RunFolderError(f"{folder} holds heads on frozen features, not a trained model")
    return config


def check_folder(config: RunConfig | GridConfig) -> str:
    """What ``open_run`` would do, as a line for a person; changes nothing.

    Raises:
        RunFolderError: there is no readable run where one is to be continued.
        ConfigError: the folder holds a run that was configured otherwise; the message names the
            fields.
    """
    folder = config.folder
    if config.resume in ("auto", "never") and not (folder / "run.json").exists():
        return f"a new run in {folder}"
    if config.resume == "never":
        return f"a new run in {folder}; the one there is set aside"
    _check_same(folder, read_any_config(folder), config)
    return f"goes on with the run in {folder}"


def open_run(config: RunConfig | GridConfig) -> Path:
    """Make or continue the run folder; returns its path.

    ``resume`` auto continues the run in the folder if there is one, never sets it aside under a
    dated name, and a path continues the run there.

    Raises:
        RunFolderError, ConfigError: as ``check_folder``; the folder cannot be written.
    """
    check_folder(config)
    folder = config.folder
    if config.resume == "never" and (folder / "run.json").exists():
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        logger.info("the run that was in %s is now in %s", folder, aside)
    path = folder / "run.json"
    if path.exists():
        info = json.loads(path.read_text())  # keeps the machine and commit it was started with
    else:
        info = {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | machine_info()
    write_json(path, info | {"config": to_json(config)})
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder.

    Raises:
        RunFolderError: another process does.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(
                f"another process trains in {folder}; wait for it, or choose another --out"
            ) from None
        yield


def _check_same(folder: Path, before: RunConfig | GridConfig, now: RunConfig | GridConfig) -> None:
    a, b = _flat(to_json(before)), _flat(to_json(now))
    changed = sorted(
        name for name in a.keys() | b.keys()
        if a.get(name) != b.get(name) and not {name, name.split(".")[0]} & {*_MAY_CHANGE}
    )  # fmt: skip
    if changed:
        shown = ", ".join(f"{n} ({a.get(n)} -> {b.get(n)})" for n in changed[:5])
        raise ConfigError(
            f"{folder} holds a run with another configuration: {shown}. Use --resume never to set "
            "it aside, or another --out"
        )


def check_alike(config: RunConfig, ranks: Ranks) -> None:
    """Raise ConfigError on every rank unless all have the same configuration, code and PyTorch."""
    if ranks.world == 1:
        return
    own = {f"option {name}": value for name, value in _flat(to_json(config)).items()}
    own |= {"code of uml_fast": _code_digest(), "PyTorch": torch.__version__}
    found = ranks.gather(own)
    for rank, other in enumerate(found):
        names = [n for n in found[0] | other if found[0].get(n) != other.get(n)]
        if names:
            shown = "; ".join(f"{n}: {found[0].get(n)}, there {other.get(n)}" for n in names[:5])
            raise ConfigError(
                f"rank {rank} does not run what rank 0 runs ({shown}). Start all ranks with the "
                "same command and the same installation"
            )


def _code_digest() -> str:
    """Checksum of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if items is None:
        return {name: value}
    out: dict[str, Any] = {}
    for key, v in items:
        out |= _flat(v, f"{name}.{key}" if name else str(key))
    return out
