"""Images: checked by decoding them whole; their bytes stay as they are unless a size is asked."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uml_fast.data.prepare.items import BadSample, Converter, Item, Moments, Sample
from uml_fast.data.source import reason

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
)  # fmt: skip
"""Files that are taken as images."""

_STORED = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112
_VALUES = np.arange(256, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class ImageConverter(Converter):
    """Passes jpg, png and webp on; what is resized is stored as jpg if it was one, else as png."""

    resize: int
    """Shorter side in pixels; 0: as it is."""
    crop: bool
    """Cut the middle square of that side."""
    quality: int
    """JPEG quality of what is resized."""

    def convert(self, item: Item) -> Sample:
        """See ``Converter``."""
        from PIL import Image

        content = item.read()
        if not content:
            raise BadSample("empty file", "0 bytes; take it out")
        with warnings.catch_warnings():
            # odd metadata and large images; what cannot be decoded raises
            warnings.simplefilter("ignore")
            try:
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
                    return self._sample(image, content)
            except BadSample:
                raise
            except Exception as e:  # a broken file raises whatever its format's parser stumbles on
                raise BadSample("broken image", reason(e) or type(e).__name__) from e

    def _sample(self, image: Image.Image, content: bytes) -> Sample:
        notes = []
        if image.mode.startswith(("I", "F")):
            raise BadSample("unknown pixels", f"mode {image.mode}; store 8 bits per channel")
        if image.mode == "CMYK":
            notes.append("CMYK image")
        if getattr(image, "n_frames", 1) > 1:
            notes.append("first frame of an animation")
        is_turned = image.getexif().get(_ORIENTATION, 1) != 1
        stored = _STORED.get(image.format or "")
        extension = stored or "png"
        small = self._resized(image)
        if stored is None or small is not None:
            content = _encoded(image if small is None else small, extension, self.quality)
            notes.append("resized" if small is not None else f"{image.format} stored as png")
        if is_turned:
            notes.append("EXIF orientation " + ("applied" if small is not None else "kept"))
        shown = image if small is None else small
        return Sample(
            content, extension, (shown.height, shown.width), _moments(shown), tuple(notes)
        )

    def _resized(self, image: Image.Image) -> Image.Image | None:
        """The image in the asked size; None where it has that size already."""
        from PIL import Image, ImageOps

        short = min(image.size)
        side = self.resize
        if not side or (short == side and (image.width == image.height or not self.crop)):
            return None
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in ("L", "RGB", "LA", "RGBA"):
            upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
        width, height = (max(side, round(n * side / short)) for n in upright.size)
        resized = upright.resize((width, height), Image.Resampling.BICUBIC)
        if not self.crop:
            return resized
        left, top = (width - side) // 2, (height - side) // 2
        return resized.crop((left, top, left + side, top + side))


def _encoded(image: Image.Image, extension: str, quality: int) -> bytes:
    file = io.BytesIO()
    if extension == "jpg":
        image.convert("L" if image.mode == "L" else "RGB").save(file, "JPEG", quality=quality)
    elif extension == "webp":
        image.save(file, "WEBP", lossless=True)
    else:
        mode = image.mode if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "RGB"
        image.convert(mode).save(file, "PNG")
    return file.getvalue()


def _moments(image: Image.Image) -> Moments:
    """Of red, green and blue in 0..1; sums over histograms are exact."""
    counts = np.array(image.convert("RGB").histogram(), np.float64).reshape(3, 256)
    n = image.width * image.height
    mean = counts @ _VALUES / n
    squares = (counts * (_VALUES - mean[:, None]) ** 2).sum(1)
    peak = _VALUES[counts.any(0)].max()
    return Moments(n, mean / 255, squares / 255**2, float(peak) / 255)
