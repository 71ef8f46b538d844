"""Write a run's target model as a plain file: ``python -m uml_fast.export RUN --to safetensors``.

The file holds the target's stem, the shared backbone and the head, nothing of the other modalities;
docs/export.md loads it in 20 lines without uml_fast.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from uml_fast.cli import run_main
from uml_fast.config import ConfigError
from uml_fast.evaluate import finished_trials, load_model
from uml_fast.grid.run import GridConfig
from uml_fast.heads import export_head
from uml_fast.log import RunFolderError
from uml_fast.model.uml import Uml
from uml_fast.run import read_any_config, to_json


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


def export(folder: Path, mode: str, seed: int | None, out: Path | None) -> Path:
    """Write ``<target>.safetensors`` with the configuration as JSON metadata; returns its path.

    Raises:
        RunFolderError: the folder holds no run, or the file cannot be written.
        ConfigError: there is no finished trial of that mode and seed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    trials = [t for t in finished_trials(folder) if t[0] == mode and seed in (None, t[1])]
    if not trials:
        raise ConfigError(
            f"no finished trial {mode} seed {seed}; there are: {finished_trials(folder)}"
        )
    chosen = trials[0][1]
    model, config, task = load_model(folder, mode, chosen)
    path = out or folder / f"{config.target}.safetensors"
    metadata = {
        "format": "pt",
        "stem": json.dumps(to_json(config.modality(config.target))),
        "backbone": json.dumps(to_json(config.backbone)),
        "objective": json.dumps(to_json(config.objective)),
        "classes": json.dumps(task.class_names),
        "trial": json.dumps({"recipe": config.recipe, "mode": mode, "seed": chosen}),
    }
    try:
        temporary = path.with_name(path.name + ".tmp")
        save_file(target_tensors(model, config.target), temporary, metadata)
        temporary.replace(path)
    except (OSError, SafetensorError) as e:
        raise RunFolderError(f"cannot write {path}: {e}") from e
    return path


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.export``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m uml_fast.export", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--to", choices=["safetensors"], default="safetensors", help="format")
    parser.add_argument("--mode", default="uml", help="uml (default), unimodal, or another variant")
    parser.add_argument(
        "--seed", type=int, help="seed of the trial; default: the first that is finished"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: RUN/<target>.safetensors")
    parser.add_argument("--shots", type=int, help="of a grid of heads: shots; default: the most")
    args = parser.parse_args(argv)
    if isinstance(read_any_config(args.run), GridConfig):
        print(export_head(args.run, args.mode, args.shots, args.seed, args.out))
        return 0
    print(export(args.run, args.mode, args.seed, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
