"""Networks of timm and transformers by name or folder, frozen; no pickled code is ever run.

A folder is known by its ``config.json``: transformers' names a ``model_type``, timm's an
``architecture``. ``timm/NAME`` is a model of timm with its published weights, every other name a
repository of the Hugging Face hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from uml_fast.data.source import DataError, say_once
from uml_fast.runtime.foreign import import_timm, import_transformers

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of CLIP's pixels, 0..1."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Those of ImageNet."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def freeze(model: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[Any, str]:
    """The network for inference, and SHA-256 of its weights as they were loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return model, digest.hexdigest()


def one_line(error: Exception) -> str:
    """What a library says, without its line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def _hub_told_once(name: str) -> Iterator[None]:
    """One line where the hub cannot be reached, in place of two for each of its library's tries."""

    def told(record: logging.LogRecord) -> bool:
        say_once(
            f"{name}: the Hugging Face hub does not answer, it is tried again for up to a minute; "
            "HF_HUB_OFFLINE=1 uses what its cache holds"
        )
        return False

    requests = logging.getLogger("huggingface_hub.utils._http")
    requests.addFilter(told)
    try:
        yield
    finally:
        requests.removeFilter(told)


def is_timm(name: str) -> bool:
    """Whether a name or folder is timm's.

    Raises:
        DataError: a folder that holds no model.
    """
    if not Path(name).is_dir():
        return name.startswith("timm/")
    return "architecture" in _folder_config(Path(name))


def timm_network(name: str, size: int) -> tuple[nn.Module, Statistics]:
    """A timm model without its classifier, for images of ``size`` pixels, and its statistics.

    Raises:
        DataError: no such model, weights that are missing or those of another network.
        ModuleNotFoundError: timm is missing.
    """
    timm = import_timm()
    folder = Path(name)
    place = f"local-dir:{name}" if folder.is_dir() else name.removeprefix("timm/")
    if folder.is_dir():
        _check_weights(folder)
    try:
        with _hub_told_once(name):
            model = timm.create_model(place, pretrained=True)
    except Exception as e:  # whatever the hub, the registry or a wrong checkpoint raises
        raise DataError(f"timm cannot load {name}: {one_line(e)}") from e
    model.reset_classifier(0)
    if hasattr(model, "set_input_size"):
        model.set_input_size((size, size))
    return model, (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]))


def transformers_config(name: str) -> Any:
    """The configuration of a transformers model.

    Raises:
        DataError: there is none.
        ModuleNotFoundError: transformers is missing.
    """
    transformers = import_transformers()

    if Path(name).is_dir():
        _check_weights(Path(name))
    elif name.startswith(("/", "./", "../", "~")):
        raise DataError(f"there is no folder {name}; give one of a model, or a name on the hub")
    try:
        with _hub_told_once(name):
            return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"transformers cannot load {name}: {one_line(e)}") from e


def clip_tower(name: str, config: Any, tower: Literal["text", "vision"]) -> Any:
    """One tower of a CLIP with its projection, also out of a checkpoint of both.

    Raises:
        DataError: as ``transformers_network``.
    """
    kind = f"CLIP{tower.capitalize()}ModelWithProjection"
    if config.model_type != "clip":
        return transformers_network(kind, name)
    own = getattr(config, f"{tower}_config")
    own.projection_dim = config.projection_dim
    return transformers_network(kind, name, config=own)


def transformers_network(kind: str, name: str, **options: Any) -> Any:
    """A model of transformers, by the name of its class there.

    Raises:
        DataError: weights are missing, stored as pickles or those of another network.
    """
    transformers = import_transformers()

    says = transformers.logging
    level, has_bars = says.get_verbosity(), says.is_progress_bar_enabled()
    says.set_verbosity_error()  # what it would say is checked below
    says.disable_progress_bar()
    try:
        model, info = getattr(transformers, kind).from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as e:
        raise DataError(f"transformers cannot load {name}: {one_line(e)}") from e
    finally:
        says.set_verbosity(level)
        if has_bars:
            says.enable_progress_bar()
    # a checkpoint of pretraining often lacks the pooler, whose output is not used
    missing = [k for k in info["missing_keys"] if "pooler" not in k]
    wrong = [str(k) for k in info["mismatched_keys"]]
    if missing or wrong:
        raise DataError(
            f"{name} has the weights of another network: {len(missing)} are missing "
            f"({', '.join(sorted(missing)[:5])}), {len(wrong)} have another shape "
            f"({', '.join(wrong[:5])})"
        )
    return model


def transformers_statistics(name: str) -> Statistics | None:
    """Mean and deviation of the pixels that a transformers model wants, if it says so."""
    processors = import_transformers().image_processing_base
    try:
        found, _ = processors.ImageProcessingMixin.get_image_processor_dict(name)
        return tuple(found["image_mean"]), tuple(found["image_std"])
    except (OSError, KeyError, TypeError):
        return None


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not {"architecture", "model_type"} & config.keys():
            raise ValueError("it names neither an architecture (timm) nor a model_type")
    except (OSError, ValueError, AttributeError) as e:
        raise DataError(f"{folder} holds no model of timm or transformers: config.json: {e}") from e
    return config


def _check_weights(folder: Path) -> None:
    _folder_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{folder} holds no .safetensors; pickled weights are not read, since they can run "
            "code: save the model again with safetensors"
        )
