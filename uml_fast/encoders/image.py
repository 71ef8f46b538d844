"""Frozen image encoders: any network of timm or transformers.

The transform is the paper's "crop" (1.4): shorter side to ``size`` with bicubic interpolation, then
the middle square. Pixels go to the device as uint8 and are normalised there.

Legend: b samples, S size in pixels, D features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.data.prepare.pool import usable_cores
from uml_fast.data.source import DataError
from uml_fast.encoders.extraction import Encoder
from uml_fast.encoders.networks import (
    CLIP,
    IMAGENET,
    clip_tower,
    freeze,
    is_timm,
    timm_network,
    transformers_config,
    transformers_network,
    transformers_statistics,
)
from uml_fast.modalities.image import ImageConfig

Norm = Literal["model", "clip", "imagenet"]
Pool = Literal["auto", "cls", "mean"]


def crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (S, S, 3): shorter side to S, bicubic, then the middle square.

    It is the same as resizing all and cutting the middle out, without computing what is cut away.

    Args:
        pixels: uint8 (h, w, 3).
        size: S.
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    short = min(height, width)
    new_height, new_width = size * height // short, size * width // short
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    per_y, per_x = height / new_height, width / new_width
    box = (left * per_x, top * per_y, (left + size) * per_x, (top + size) * per_y)
    image = Image.fromarray(pixels)
    if image.size == (size, size):
        return pixels
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


class ImageEncoder(Encoder):
    """Features of images.

    Args:
        name: ``timm/NAME``, a name of the Hugging Face hub, or a folder of either library.
        device: where it computes.
        dtype: of the network.
        size: S.
        norm: statistics of the pixels: the network's own, CLIP's or ImageNet's.
        pool: auto: the network's own (timm: before its classifier; CLIP: the projection; ResNet:
            the mean; else the CLS token); cls; mean: of the patch tokens.

    Raises:
        DataError: there is no such network, or it has no such pooling.
        ModuleNotFoundError: a library is missing.
    """

    kind = "images"

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        size: int = 224,
        norm: Norm = "model",
        pool: Pool = "auto",
    ) -> None:
        self._device, self._dtype, self._size = device, dtype, size
        if is_timm(name):
            model, own = timm_network(name, size)
            self._model, weights = freeze(model, device, dtype)
            self._features = _of_timm(self._model, pool)
        else:
            model, own = _transformers_vision(name)
            self._model, weights = freeze(model, device, dtype)
            self._features = _of_transformers(self._model, size, pool)
        statistics = {"model": own, "clip": CLIP, "imagenet": IMAGENET}[norm]
        if statistics is None:
            raise DataError(
                f"{name} does not say which mean and deviation its pixels have "
                "(preprocessor_config.json); choose with --norm clip or --norm imagenet"
            )
        mean, std = (torch.tensor(s, device=device).view(1, 3, 1, 1) for s in statistics)
        self._scale, self._shift = 1 / (255 * std), -mean / std
        self._model.to(memory_format=torch.channels_last)
        self.facts = {
            "name": name, "weights": weights, "dtype": str(dtype), "pool": pool,
            "transform": {"crop": size, "mean": statistics[0], "std": statistics[1]},
        }  # fmt: skip
        self._decode = decode_of(
            ImageConfig(name="image", height=size, width=size, patch_height=size, patch_width=size)
        )
        self._threads = ThreadPoolExecutor(usable_cores())
        self.width = self.encode([np.zeros((size, size, 3), np.uint8)]).shape[1]

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        """uint8 (S, S, 3) of each image; see ``Encoder``."""
        return list(self._threads.map(self._prepare, payloads))

    def _prepare(self, payload: bytes) -> np.ndarray | DecodeError:
        (found,) = self._decode([payload])
        if isinstance(found, DecodeError):
            return found
        if not found.size:
            return DecodeError("an image without pixels")
        return crop(found, self._size)

    @torch.inference_mode()
    def encode(self, prepared: Sequence[Any]) -> Tensor:
        """fp32 (b, D); see ``Encoder``."""
        pixels = torch.from_numpy(np.stack(prepared))
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        # channels stay last, as they were decoded: convolutions in bf16 take half the time
        x = torch.addcmul(self._shift, pixels.permute(0, 3, 1, 2).float(), self._scale)
        return self._features(x.to(self._dtype)).float()


def _transformers_vision(name: str) -> tuple[nn.Module, Any]:
    config = transformers_config(name)
    if config.model_type in ("clip", "clip_vision_model"):
        model = clip_tower(name, config, "vision")
    else:
        kind = "SiglipVisionModel" if config.model_type == "siglip" else "AutoModel"
        model = transformers_network(kind, name)
    takes = getattr(model, "main_input_name", "pixel_values")
    if takes != "pixel_values":
        raise DataError(
            f"{name} is a {type(model).__name__}, which takes {takes} and no pixels; "
            "extract image needs a network of images"
        )
    return model, transformers_statistics(name)


def _of_timm(model: Any, pool: Pool) -> Callable[[Tensor], Tensor]:
    if pool == "auto":
        return model
    prefix = getattr(model, "num_prefix_tokens", None)
    if prefix is None or (pool == "cls" and prefix == 0):
        raise DataError(f"{type(model).__name__} has no tokens for --pool {pool}; leave it at auto")

    def features(x: Tensor) -> Tensor:
        tokens = model.forward_features(x)
        return tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(1)

    return features


def _of_transformers(model: Any, size: int, pool: Pool) -> Callable[[Tensor], Tensor]:
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = getattr(model.config, "image_size", size) != size

    def features(x: Tensor) -> Tensor:
        out = model(pixel_values=x, **options)
        if pool == "auto" and getattr(out, "image_embeds", None) is not None:
            return out.image_embeds
        tokens = out.last_hidden_state
        if tokens.ndim == 4 and pool != "cls":
            return tokens.mean((2, 3))
        if tokens.ndim != 3:
            raise DataError(
                f"{type(model).__name__} has no tokens for --pool {pool}; leave it at auto"
            )
        if pool == "auto" and model.config.model_type.startswith("siglip"):
            return out.pooler_output
        return tokens[:, 1:].mean(1) if pool == "mean" else tokens[:, 0]

    return features
