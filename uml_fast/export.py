"""Write a run's target model for others: ``python -m uml_fast.export RUN --to timm``.

``safetensors`` is one file with the target's stem, the shared backbone and the head, nothing of
the other modalities; ``timm`` and ``transformers`` are folders that these libraries load.
docs/export.md has a few lines of Python for each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from uml_fast.cli import options, run_main
from uml_fast.config import ConfigError
from uml_fast.experiment.heads import export_head
from uml_fast.experiment.run import read_any_config, to_json
from uml_fast.experiment.trained import finished_trials, load_model
from uml_fast.grid.run import GridConfig
from uml_fast.model.interop.checkpoint import WEIGHTS
from uml_fast.model.interop.plain import plain_model
from uml_fast.model.interop.to_timm import timm_files
from uml_fast.model.interop.to_transformers import transformers_files
from uml_fast.model.uml import Uml
from uml_fast.runtime.files import replace_file
from uml_fast.training.log import RunFolderError


def target_tensors(model: Uml, target: str) -> dict[str, Tensor]:
    """Weights by plain names.

    They are ``stem.*``, ``position``, ``mean``, ``deviation``, ``encoder.*`` and ``projection.*``
    where the target has a network of its own, ``backbone.*`` and ``head.*``.
    """
    plain = {f"modalities.{target}.": "", f"encoders.{target}.": "encoder.",
             f"projections.{target}.": "projection."}  # fmt: skip
    keyed = ("modalities.", "encoders.", "projections.", "head.project.", "head.scale.")
    out = {}
    for name, tensor in model.state_dict().items():
        kind = next((k for k in keyed if name.startswith(k)), "")
        if kind and name.removeprefix(kind).split(".")[0] != target:
            continue
        own = next((p for p in plain if name.startswith(p)), "")
        shown = plain.get(own, "") + name.removeprefix(own)
        out[shown] = tensor.detach().cpu().contiguous()
    return out


def export(
    folder: Path, mode: str | None, seed: int | None, out: Path | None, to: str = "safetensors"
) -> Path:
    """Write the target of a trial; returns the path.

    ``safetensors``: ``<target>.safetensors`` with the configuration as JSON metadata. ``timm`` and
    ``transformers``: the folder ``<target>-<to>`` with config.json and model.safetensors.

    Raises:
        RunFolderError: the folder holds no run, or a file cannot be written.
        ConfigError: there is no finished trial of that mode and seed, or the model is none that the
            other library has: names what is in the way.
    """
    there = finished_trials(folder)
    if mode is None:
        modes = [m for m, _ in there]
        mode = next(m for m in ("uml", "pretrained", *modes) if m in modes)
    trials = [t for t in there if t[0] == mode and seed in (None, t[1])]
    if not trials:
        wanted = mode if seed is None else f"{mode}-{seed}"
        names = ", ".join(f"{m}-{s}" for m, s in there)
        raise ConfigError(f"{folder} has no finished trial {wanted}; there are: {names}")
    chosen = trials[0][1]
    model, config, task = load_model(folder, mode, chosen)
    trial = {"recipe": config.recipe, "mode": mode, "seed": chosen}
    if to != "safetensors":
        plain = plain_model(model, config, list(task.class_names))
        path = out or folder / f"{config.target}-{to}"
        if to == "timm":
            timm_config, tensors = timm_files(plain)
            files = {"config.json": timm_config}
        else:
            files, tensors = transformers_files(plain)
        return _write_folder(path, files, tensors, trial)
    path = out or folder / f"{config.target}.safetensors"
    metadata = {
        "stem": json.dumps(to_json(config.modality(config.target))),
        "backbone": json.dumps(to_json(config.backbone)),
        "objective": json.dumps(to_json(config.objective)),
        "classes": json.dumps(task.class_names),
        "trial": json.dumps(trial),
    }
    _write_tensors(path, target_tensors(model, config.target), metadata)
    return path


def _write_folder(
    folder: Path,
    files: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    trial: dict[str, Any],
) -> Path:
    """Write weights first and configurations last, so that no folder loads half."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_tensors(folder / WEIGHTS, tensors, {"trial": json.dumps(trial)})
        for name, content in reversed(files.items()):
            replace_file(folder / name, json.dumps(content, indent=1) + "\n")
    except OSError as e:
        raise RunFolderError(f"cannot write {folder}: {e}") from e
    return folder


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save

    whole = {name: t.contiguous() for name, t in tensors.items()}
    try:
        replace_file(path, save(whole, {"format": "pt"} | metadata))
    except OSError as e:
        raise RunFolderError(f"cannot write {path}: {e}") from e


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a run's target model for others: one plain file, or a folder that a library loads.

      python -m uml_fast.export runs/numbers
      python -m uml_fast.export runs/folders --to timm --seed 2 --out models/mine
      python -m uml_fast.export runs/vision_text --shots 16      the chosen head as one matrix

    docs/export.md has the lines of Python that load each.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    to: Literal["safetensors", "timm", "transformers"] = "safetensors"
    """Format: one file that holds any model, or a folder that the library loads."""
    mode: str | None = None
    """Trial of this mode or variant; None: uml, or pretrained."""
    seed: int | None = None
    """Seed of the trial; None: the first that is finished."""
    out: Path | None = None
    """What to write; None: RUN/<target>.safetensors or RUN/<target>-<to>."""
    shots: int | None = None
    """Of heads on frozen features: shots; None: the most."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.export``; returns the exit status."""
    given = options(ExportConfig, "export", argv)
    if isinstance(read_any_config(given.run), GridConfig):
        if given.to != "safetensors":
            raise ConfigError(
                f"{given.run} holds heads on features of a frozen encoder: one matrix, which --to "
                "safetensors writes"
            )
        mode = given.mode or "uml"
        print(export_head(given.run, mode, given.shots, given.seed, given.out))
        return 0
    if given.shots is not None:
        raise ConfigError("--shots is for heads on frozen features; this run has trained models")
    print(export(given.run, given.mode, given.seed, given.out, given.to))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
