"""Checkpoints of other libraries: a folder with config.json and weights as safetensors.

Names of the Hugging Face hub are downloaded as such folders; nothing that is pickled is opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from uml_fast.config import ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar")
_WANTED = ("config.json", "preprocessor_config.json", "model*.safetensors", INDEX)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint says of itself, and where its weights are."""

    source: str
    """Path or name, as it was given."""
    folder: Path
    """Where its files are."""
    config: dict[str, Any]
    """config.json: with ``architecture`` it is timm's, with ``model_type`` transformers'."""
    files: tuple[Path, ...]
    """Weights as safetensors."""

    def shapes(self) -> dict[str, list[int]]:
        """Shapes of the weights by the names in the files, of which only the headers are read."""
        from safetensors import SafetensorError, safe_open

        out: dict[str, list[int]] = {}
        for path in self.files:
            try:
                with safe_open(path, "pt") as file:
                    names = list(file.keys())
                    out |= {name: file.get_slice(name).get_shape() for name in names}
            except (OSError, SafetensorError) as e:
                raise _unreadable(path, e) from e
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Weights by the names in the files."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        out: dict[str, Tensor] = {}
        for path in self.files:
            try:
                out |= load_file(path)
            except (OSError, SafetensorError) as e:
                raise _unreadable(path, e) from e
        return out

    def image_statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation of pixel / 255 per channel, where the checkpoint has them."""
        known = self.config.get("pretrained_cfg", self.config)
        if "mean" in known and "std" in known:
            return list(known["mean"]), list(known["std"])
        path = self.folder / "preprocessor_config.json"
        if not path.is_file():
            return None
        processor = _read_json(path)
        if not processor.get("do_normalize", True) or "image_mean" not in processor:
            return None
        return list(processor["image_mean"]), list(processor["image_std"])


def open_checkpoint(source: str) -> Checkpoint:
    """Find a checkpoint and read its configuration.

    Args:
        source: a folder; ``NAME=FILE``, a timm architecture and its safetensors file; or a name on
            the Hugging Face hub (``timm/vit_small_patch14_dinov2.lvd142m``, ``bert-base-uncased``).

    Raises:
        ConfigError: there is no such folder or name, it lacks a file, the weights are pickled, or
            the configuration is broken; says what to do.
    """
    name, _, file = source.partition("=")
    if file:
        path = Path(file)
        _refuse_pickle(path)
        return Checkpoint(source, path.parent, {"architecture": name}, (path,))
    folder = Path(source)
    if folder.is_file():
        _refuse_pickle(folder)
        raise ConfigError(
            f"{source} is a file without a configuration; give its folder with a config.json, or "
            f"ARCHITECTURE={source} for a model of timm"
        )
    if not folder.is_dir():
        folder = _download(source)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{source}: there is no config.json in {folder}; it names the network")
    return Checkpoint(source, folder, _read_json(config_file), _weight_files(folder))


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    if index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
        if any(Path(f).name != f for f in files):
            raise ConfigError(f"{index} names files outside of its folder: {files}")
        return tuple(folder / f for f in files)
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    for path in sorted(folder.iterdir()):
        _refuse_pickle(path)
    raise ConfigError(f"{folder} has no {WEIGHTS}; save the weights as safetensors")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in _PICKLED:
        raise ConfigError(
            f"{path} is pickled, and loading a pickle can run any code, so it is not opened. Where "
            "you trust it, convert it: load it with the library that wrote it and save it again "
            "as safetensors (transformers: model.save_pretrained(FOLDER); timm: "
            "safetensors.torch.save_file(model.state_dict(), FILE))"
        )


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read {path} as safetensors: {error}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return value


def _download(name: str) -> Path:
    """The folder of a repository on the Hugging Face hub, from its cache if it is there."""
    what_else = "give a local folder with config.json and model.safetensors"
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"there is no folder {name}; to look for it on the Hugging Face hub: pip install "
            f"'uml-fast[models]', or {what_else}"
        ) from e
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as e:  # huggingface_hub passes on errors of several HTTP libraries
        raise ConfigError(
            f"there is no folder {name}, and the Hugging Face hub gave none of that name: "
            f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}; "
            f"{what_else}"
        ) from e
