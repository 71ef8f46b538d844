"""Images: uint8 pixels, one row per patch, all images of one size."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uml_fast.config import ModalityConfig, require
from uml_fast.kernels.image_stem import image_stem
from uml_fast.modalities.base import Modality
from uml_fast.packing.pack import RegionRows


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig(ModalityConfig):
    """Images cut into patches, in reading order."""

    height: int
    """Image height in pixels."""
    width: int
    """Image width in pixels."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    patch_height: int = 16
    """Patch height in pixels."""
    patch_width: int = 16
    """Patch width in pixels."""
    class_token: bool = False
    """A learned row in front of each image's patches, for networks that pool the first row."""

    def __post_init__(self) -> None:
        ModalityConfig.__post_init__(self)
        require(self.channels in (1, 3), f"{self.name}.channels is {self.channels}; 1 or 3")
        for size, patch, axis in (
            (self.height, self.patch_height, "height"),
            (self.width, self.patch_width, "width"),
        ):
            require(
                patch >= 1 and size % patch == 0,
                f"{self.name}: {axis} {size} is not a multiple of the patch's {patch}",
            )

    @property
    def patches(self) -> int:
        """Rows per image."""
        return (self.height // self.patch_height) * (self.width // self.patch_width)

    def build(self, width: int, output_width: int, decode: bool) -> Image:
        """The stem and decoder for a backbone of this width."""
        require(
            not (decode and self.class_token),
            f"{self.name}.class_token: a class token has no features that next_embedding could "
            "predict; leave it off",
        )
        return Image(self, width, output_width, decode)


def to_patches(
    images: np.ndarray, patch_height: int, patch_width: int, out: np.ndarray | None = None
) -> np.ndarray:
    """uint8 (N, H, W, channels) to rows (N, patches, patch_height * patch_width * channels).

    ``out``: contiguous memory of the rows, in any shape.
    """
    n, h, w, c = images.shape
    down, across = h // patch_height, w // patch_width
    rows = np.empty(images.size, np.uint8) if out is None else out
    grid = images.reshape(n, down, patch_height, across, patch_width, c)
    patches = rows.reshape(n, down, across, patch_height, patch_width, c)
    patches[:] = grid.transpose(0, 1, 3, 2, 4, 5)
    return patches.reshape(n, down * across, -1)


def from_patches(rows: np.ndarray, config: ImageConfig) -> np.ndarray:
    """Rows (patches, E) of one image to (H, W, channels)."""
    c = config
    grid = rows.reshape(
        c.height // c.patch_height,
        c.width // c.patch_width,
        c.patch_height,
        c.patch_width,
        c.channels,
    )
    return grid.transpose(0, 2, 1, 3, 4).reshape(c.height, c.width, c.channels)


class Image(Modality):
    """``tokens = Linear((pixels / 255 - mean) / deviation) + position``.

    mean and deviation are per channel. The class token has no position of its own.
    """

    row_dtype = "uint8"
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: ImageConfig, width: int, output_width: int, decode: bool) -> None:
        elems = config.patch_height * config.patch_width * config.channels
        super().__init__(
            config, features=elems, width=width, output_width=output_width,
            positions=config.patches, decode=decode,
        )  # fmt: skip
        self.config = config
        self.row_elems = elems
        self.register_buffer("mean", torch.full((config.channels,), 0.5))
        self.register_buffer("deviation", torch.full((config.channels,), 0.25))
        if config.class_token:
            self.class_token = nn.Parameter(torch.randn(width) * 0.02)

    def fit(self, rows: np.ndarray, offsets: np.ndarray) -> None:
        pixels = rows.reshape(-1, self.config.channels).astype(np.float64) / 255
        self.mean.copy_(torch.from_numpy(pixels.mean(0)))
        self.deviation.copy_(torch.from_numpy(np.maximum(pixels.std(0), 1e-3)))

    def features(self, region: RegionRows) -> Tensor:
        pixels = region.raw.float().view(len(region.raw), -1, self.config.channels)
        scale = 1 / (255 * self.deviation)
        return torch.addcmul(-self.mean / self.deviation, pixels, scale).flatten(1)

    def embed(
        self, region: RegionRows, features: Tensor | None, dtype: torch.dtype, out: Tensor | None
    ) -> Tensor:
        size = (self.config.patch_height, self.config.patch_width)
        return image_stem(
            region.raw.view(-1, *size, self.config.channels), *self.stem_arguments(region),
            self.mean, self.deviation, patch_size=size, dtype=dtype, out=out,
        )  # fmt: skip

    def describe(self, sample: np.ndarray) -> dict[str, Any]:
        image = from_patches(sample, self.config)
        return {"kind": "image", "png": base64.b64encode(_png(image)).decode()}


def _png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 1 or 3) as a PNG file."""
    h, w, channels = image.shape

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", w, h, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks
