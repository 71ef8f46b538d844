"""Who delivers batches in ``bench/loader.py``: uml_fast and the loaders it is compared with.

All do the same work: samples in an order each shuffles as it does, decoded to uint8, int16, bytes
or float32, in batches of the same number of samples that lie contiguously in the main process, with
their labels. Ragged samples are delivered end to end with their lengths, without padding.

The baselines are tuned: PyTorch's DataLoader reads through the same index (any sample by its
number), decodes with simplejpeg, fetches a whole batch in one call (``__getitems__``) into one
array, and keeps its workers; it and webdataset get the number of workers that is fastest here.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench import loader_data
from uml_fast.config import MixConfig, ModalityConfig
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import Backend, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.shards.direct import DirectImages
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.source import ShardSource
from uml_fast.modalities.image import ImageConfig

THREADS = 2
PREFETCH = 4
"""Batches that a worker of a baseline makes ahead."""
SHUFFLE = 1000
"""Samples in the shuffle buffers of webdataset and DALI."""
Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True, slots=True)
class Part:
    """One modality of a case."""

    data: str
    """Data set of ``loader_data``."""
    config: ModalityConfig
    count: int
    """Samples in a batch."""
    decode: Decode
    """The baselines' decoder."""


class Provider(Protocol):
    """An endless stream of batches."""

    def next(self) -> int:
        """Take a batch; returns its samples."""

    def ahead(self) -> int:
        """Batches that may lie ready; they are taken before a turn is timed."""

    def close(self) -> None:
        """Stop workers and threads."""


def decode_simplejpeg(payload: bytes) -> np.ndarray:
    """uint8 (height, width, 3)."""
    import simplejpeg

    return simplejpeg.decode_jpeg(payload)


def decode_pillow(payload: bytes) -> np.ndarray:
    """uint8 (height, width, 3)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(payload)))


def decode_sound(payload: bytes) -> np.ndarray:
    """int16 (samples,)."""
    import soundfile

    return soundfile.read(io.BytesIO(payload), dtype="int16")[0]


def decode_text(payload: bytes) -> np.ndarray:
    """uint8 (bytes,)."""
    return np.frombuffer(payload, np.uint8)


def decode_npy(payload: bytes) -> np.ndarray:
    """float32 (rows, E)."""
    return np.load(io.BytesIO(payload))


class UmlFast:
    """uml_fast's loader over the same shards; a pack has the rows of ``count`` samples."""

    def __init__(self, parts: Sequence[Part], backend: Backend = "webdataset") -> None:
        self.shards = [loader_data.open_shards(p.data) for p in parts]
        self.sources = [
            ShardSource(
                p.config.name, s, decode_of(p.config, backend), rows_of(p.config, AugmentConfig()),
                DataErrors(0), direct=_direct(p.config) if backend == "webdataset" else None,
            )
            for p, s in zip(parts, self.shards, strict=True)
        ]  # fmt: skip
        rows = [p.count * float(s.lengths.mean()) for p, s in zip(parts, self.sources, strict=True)]
        shares = {s.name: r / sum(rows) for s, r in zip(self.sources, rows, strict=True)}
        mix = MixConfig(token_budget=int(1.03 * sum(rows)) if len(rows) > 1 else int(sum(rows)))
        layouts = layouts_of(self.sources, mix, shares)
        self.loader = Loader(self.sources, layouts, mix, seed=0, shares=shares)
        self.tokens_per_sample = sum(rows) / sum(p.count for p in parts)
        self._samples = 0.0

    def next(self) -> int:
        next(self.loader)
        stats = self.loader.stats()
        samples = sum(stats[f"samples/{s.name}"] for s in self.sources)
        got, self._samples = samples - self._samples, samples
        return int(got)

    def ahead(self) -> int:
        return 4

    def close(self) -> None:
        self.loader.close()
        for shards in self.shards:
            shards.close()


def _direct(config: ModalityConfig) -> DirectImages | None:
    return DirectImages(config) if isinstance(config, ImageConfig) else None


def gathered(samples: Sequence[np.ndarray], labels: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Samples end to end in one tensor, their lengths and labels."""
    lengths = np.array([len(s) for s in samples])
    first = samples[0]
    out = np.empty((int(lengths.sum()), *first.shape[1:]), first.dtype)
    np.concatenate(samples, out=out)
    return torch.from_numpy(out), torch.from_numpy(lengths), torch.tensor(labels)


class Indexed(Dataset[Any]):
    """Samples of all parts by number; a batch is one call."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.shards: list[ShardSet] = [loader_data.open_shards(p.data) for p in parts]

    def __getitems__(self, chosen: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, ...]]:
        return [
            gathered([part.decode(shards.payload(i)) for i in index], shards.label[index])
            for part, shards, index in zip(self.parts, self.shards, chosen, strict=True)
        ]


class _Shuffled:
    """Endless batches of sample numbers, one array per part, each epoch in an order of its own."""

    def __init__(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        self.sizes, self.counts = sizes, counts

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        rng = np.random.default_rng(0)
        left = [np.empty(0, np.int64) for _ in self.sizes]
        while True:
            for m, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
                while len(left[m]) < count:
                    left[m] = np.concatenate([left[m], rng.permutation(size)])
            yield [x[:n] for x, n in zip(left, self.counts, strict=True)]
            left = [x[n:] for x, n in zip(left, self.counts, strict=True)]


def _as_it_is(batch: Any) -> Any:
    return batch


def tuned_loader(data: Indexed, workers: int, pin_memory: bool = False) -> Any:
    """PyTorch's DataLoader over all parts, endless and shuffled; it keeps its workers."""
    sampler = _Shuffled([len(s) for s in data.shards], [p.count for p in data.parts])
    return DataLoader(
        data,
        batch_sampler=sampler,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=_as_it_is,
        persistent_workers=workers > 0,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin_memory,
    )


class TorchLoader:
    """``torch.utils.data.DataLoader`` over the same index."""

    def __init__(self, parts: Sequence[Part], workers: int) -> None:
        self._count = sum(p.count for p in parts)
        self._ahead = workers * PREFETCH
        self._loader = tuned_loader(Indexed(parts), workers)
        self._batches = iter(self._loader)

    def next(self) -> int:
        next(self._batches)
        return self._count

    def ahead(self) -> int:
        return self._ahead

    def close(self) -> None:
        del self._batches, self._loader


class WebDataset:
    """webdataset's own pipeline of each part, taken in turns."""

    def __init__(self, parts: Sequence[Part], workers: int) -> None:
        import webdataset

        self._count = sum(p.count for p in parts)
        self._ahead = workers * PREFETCH
        self._loaders = []
        for part in parts:
            ext = loader_data.extension(part.data)
            data = (
                webdataset.WebDataset(
                    [str(p) for p in loader_data.shard_paths(part.data)],
                    shardshuffle=loader_data.SHARDS, seed=0,
                )
                .shuffle(SHUFFLE)
                .to_tuple(ext, "cls")
                .map_tuple(part.decode, int)
                .batched(part.count, collation_fn=_columns, partial=False)
                .repeat()
            )  # fmt: skip
            self._loaders.append(
                webdataset.WebLoader(
                    data, num_workers=workers, batch_size=None,
                    prefetch_factor=PREFETCH if workers else None,
                )
            )  # fmt: skip
        self._batches = [iter(x) for x in self._loaders]

    def next(self) -> int:
        for batches in self._batches:
            next(batches)
        return self._count

    def ahead(self) -> int:
        return self._ahead

    def close(self) -> None:
        del self._batches, self._loaders


def _columns(samples: Sequence[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, ...]:
    values, labels = zip(*samples, strict=True)
    return gathered(values, labels)


class Dali:
    """DALI's CPU pipeline of each part, taken in turns."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._count = sum(p.count for p in parts)
        self._pipelines = [_dali_pipeline(p) for p in parts]

    def next(self) -> int:
        for pipeline in self._pipelines:
            values, labels = pipeline.run()
            values.as_tensor() if values.is_dense_tensor() else np.concatenate(
                [np.asarray(v).reshape(-1) for v in values]
            )
            labels.as_tensor()
        return self._count

    def ahead(self) -> int:
        return 3

    def close(self) -> None:
        self._pipelines.clear()


def _dali_pipeline(part: Part) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    ext = loader_data.extension(part.data)

    @pipeline_def(batch_size=part.count, num_threads=THREADS, device_id=None, seed=0)
    def build() -> Any:
        payload, label = fn.readers.webdataset(
            paths=[str(p) for p in loader_data.shard_paths(part.data)], ext=[ext, "cls"],
            random_shuffle=True, initial_fill=SHUFFLE, missing_component_behavior="error",
        )  # fmt: skip
        if ext == "jpg":
            payload = fn.decoders.image(payload, device="cpu", output_type=types.RGB)
        elif ext == "flac":
            payload, _ = fn.decoders.audio(payload, dtype=types.INT16)
        elif ext == "npy":
            payload = fn.decoders.numpy(payload)
        return payload, label

    pipeline = build()
    pipeline.build()
    return pipeline


def has_dali() -> bool:
    """Whether NVIDIA DALI is installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True
