"""JPEG files straight from shards into the rows of a pack: one native call for a part of a pack.

Reading, decoding and cutting into patches happen without the interpreter, so that readers never
wait for its lock (32x32 on the CPU of docs/log.md: a third of the time of a call for each sample).
The rows are those of simplejpeg bit for bit; what the native decoder does not take (other sizes and
formats, progressive or broken files) is left to the decoder of single samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.data.shards.files import ShardSet
from uml_fast.modalities.image import ImageConfig
from uml_fast.runtime import native

_EXTENSIONS = np.array([b"jpg", b"jpeg"])


@dataclass(frozen=True, slots=True)
class DirectImages:
    """Reads images of the run's size where the native extension is there."""

    config: ImageConfig

    def read(self, shards: ShardSet, samples: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Write the rows of samples one after the other to ``out``. Threads may call it together.

        Args:
            shards: images.
            samples: int64 (n,) numbers in ``shards``.
            out: uint8 (n patches, E), C-contiguous.

        Returns:
            bool (n,): the sample's rows are written; those of others are undefined.
        """
        c, index = self.config, shards.index
        is_read = np.zeros(len(samples), np.bool_)
        is_jpeg = np.isin(index.extensions, _EXTENSIONS)[index.extension[samples]]
        fits = is_jpeg & (index.length[samples] == (c.height, c.width)).all(1)
        extension = native.module()
        if extension is None or not fits.any():
            return is_read
        try:
            files, descriptors = shards.hold(samples)
        except OSError:  # the one that is gone is named where it is read alone
            return is_read
        extension.read_jpegs(
            descriptors, index.offset[samples], np.where(fits, index.size[samples], 0),
            c.height, c.width, c.channels, c.patch_height, c.patch_width, out.reshape(-1), is_read,
        )  # fmt: skip
        del files  # which kept them open
        return is_read
