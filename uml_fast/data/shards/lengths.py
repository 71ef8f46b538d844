"""How long a stored sample is, read from the head of its bytes."""

from __future__ import annotations

import io
import math
import threading
import warnings
from typing import BinaryIO

import numpy as np

from uml_fast.data.source import DataError

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
AUDIO = ("wav", "flac", "ogg")
FEATURES = ("npy",)
TEXT = ("txt",)
TOKENS = ("ids",)
"""Token ids of one tokenizer, little-endian int32."""

KINDS = {
    **dict.fromkeys(IMAGES, "images"),
    **dict.fromkeys(AUDIO, "audio"),
    **dict.fromkeys(FEATURES, "features"),
    **dict.fromkeys(TEXT, "text"),
    **dict.fromkeys(TOKENS, "tokens"),
}
"""Extension of a payload -> kind of data; where a sample has several, the first of these wins."""

UNITS = {
    "images": ("height", "width"),
    "audio": ("samples",),
    "features": ("rows",),
    "text": ("bytes",),
    "tokens": ("tokens",),
}
"""Kind -> what its length counts."""
_MOST_FRAMES = (1 << 31) - 1
"""Samples of a sound; lengths are int32."""


def length_of(extension: str, content: bytes) -> tuple[int, ...]:
    """Length of a payload, as ``UNITS`` of its kind says.

    Raises:
        DataError: the content is not what the extension says.
        ModuleNotFoundError: Pillow (images) or soundfile (audio) is missing.
    """
    kind = KINDS[extension]
    if kind == "text":
        return (len(content),)
    if kind == "tokens":
        if len(content) % 4:
            raise DataError(f"{len(content)} bytes; token ids have four each")
        return (len(content) // 4,)
    if kind == "features":
        return (npy_layout(content)[0][0],)
    if kind == "images":
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, large images
            try:
                with Image.open(io.BytesIO(content)) as image:
                    return image.height, image.width
            except Exception as e:  # whatever the parser of a broken file's format stumbles on
                raise DataError(f"not a readable image: {e}") from e
    import soundfile

    try:
        frames = int(soundfile.info(io.BytesIO(content)).frames)
    except (soundfile.LibsndfileError, TypeError, ValueError) as e:
        raise DataError(f"not a readable sound: {e}") from e
    if frames > _MOST_FRAMES:
        raise DataError(f"its header promises {frames:,} samples")
    return (frames,)


def npy_shape(content: bytes) -> tuple[int, ...]:
    """Shape of a stored array, its content unread.

    Raises:
        DataError: as ``npy_header``.
    """
    return npy_header(io.BytesIO(content))[0]


_PARSER = threading.Lock()
"""numpy parses headers with ``ast``, which threads confuse up to Python 3.12: now and then a whole
header would be refused."""


def npy_layout(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, column order, type and first byte of a stored array that is all there.

    Raises:
        DataError: as ``npy_header``; or its bytes are not as many as its shape takes.
    """
    file = io.BytesIO(content)
    shape, is_fortran, dtype = npy_header(file)
    start = file.tell()
    # numpy itself would first reserve what a broken header promises
    there, said = len(content) - start, math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or there != said:
        raise DataError(f"{there:,} bytes for shape {list(shape)} of {dtype}")
    return shape, is_fortran, dtype, start


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, column order and type of a ``.npy`` file; its content begins where reading stopped.

    Raises:
        DataError: not a ``.npy`` file, or a single number.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with _PARSER:
            shape, is_fortran, dtype = read(file)
    except Exception as e:  # numpy parses a header as Python, and passes on what that raises
        raise DataError(f"not a readable .npy array: {e}") from e
    if not shape:
        raise DataError("a single number, not an array of rows")
    return shape, is_fortran, dtype
