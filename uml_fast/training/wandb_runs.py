"""Weights & Biases beside metrics.jsonl: one wandb run for each trial, grouped by run folder.

The ids of the wandb runs are kept in ``wandb.json`` of the run folder, so that a trial that is
resumed goes on in its own. ``WANDB_*`` environment variables mean what they mean everywhere
(``WANDB_MODE=offline``, ``WANDB_ENTITY``, ``WANDB_DIR``, ...).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from uml_fast.config import ConfigError
from uml_fast.doctor import pip_line
from uml_fast.runtime.files import replace_file

logger = logging.getLogger("uml_fast")

IDS = "wandb.json"
_FINISH_S = 60.0
"""Seconds that the end of a trial waits for an upload; what is left lies in the folder."""


def check_wandb() -> None:
    """Raise ConfigError unless wandb is installed, and logged in or not in need of that."""
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"--wandb needs the package wandb: {pip_line('wandb')}, or leave the option out "
            "(TensorBoard events and metrics.jsonl are always written)"
        ) from None
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "--wandb: not logged in to Weights & Biases; run wandb login, set WANDB_API_KEY, or "
            "set WANDB_MODE=offline to keep everything here (wandb sync sends it later)"
        )


class WandbRuns:
    """The wandb runs of a run's trials, one at a time.

    Nothing that wandb raises ends the training: what fails is said once, and the trial goes on
    without it (offline, where wandb's server cannot be reached).

    Args:
        project: name of the project.
        folder: run folder.
        config: what wandb shows as the configuration.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        self._project, self._folder, self._config = project, folder, config
        self._mode: Literal["offline"] | None = None
        self._run: Any = None

    def begin(self, mode: str, seed: int) -> None:
        """Start a trial's wandb run, or go on with it."""
        import wandb

        name = f"{mode}-{seed}"
        shown: dict[str, Any] = {
            "project": self._project, "name": f"{self._folder.name} {name}", "job_type": mode,
            "group": os.environ.get("WANDB_RUN_GROUP") or self._folder.name,
            "id": self._id_of(name), "resume": "allow", "reinit": "finish_previous",
            "dir": os.environ.get("WANDB_DIR") or str(self._folder),
            "config": {**self._config, "mode": mode, "seed": seed},
        }  # fmt: skip
        try:
            wait = float(os.environ.get("WANDB_FINISH_TIMEOUT") or _FINISH_S)
            settings = wandb.Settings(finish_timeout=wait)
            try:
                self._run = wandb.init(**shown, mode=self._mode, settings=settings)
            except (wandb.errors.CommError, TimeoutError) as error:
                self._mode = "offline"
                logger.warning("wandb goes on offline (wandb sync sends it later): %s", error)
                self._run = wandb.init(**shown, mode="offline", settings=settings)
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log one step. Those that wandb has from before a resume are not sent again."""
        if self._run is None or step < self._run.step:
            return
        try:
            self._run.log(dict(numbers), step=step)
        except Exception as error:
            self._give_up(error)

    def end(self, result: Mapping[str, float]) -> None:
        """End the trial's wandb run; ``result``: its summary, empty where it was stopped."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.summary.update(dict(result))
            run.finish(exit_code=0 if result else 1)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        logger.warning("wandb does not log this trial on: %s: %s", type(error).__name__, error)

    def _id_of(self, name: str) -> str:
        """The trial's id, made where it has none yet."""
        path = self._folder / IDS
        try:
            ids: dict[str, str] = json.loads(path.read_text())
        except (OSError, ValueError):
            ids = {}
        if name not in ids:
            ids[name] = secrets.token_hex(4)
            replace_file(path, json.dumps(ids, indent=1) + "\n")
        return ids[name]
