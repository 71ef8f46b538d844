"""Decoding with NVIDIA DALI, a batch of samples at a time.

Shards are read, mixed and resumed by the native loader as ever: DALI decodes what it is handed and
reads no file, as its own readers know no exact order to resume (docs/design.md). A thread that
decodes has a pipeline to itself, with one DALI thread it waits for, so a pool of n threads keeps n
cores busy and no more.

Intact files give the arrays of the other backend, bit for bit: what DALI would round another way is
left to that backend. So is a batch that DALI gives up on, as one broken sample costs it the batch
and the pipeline: broken samples are named in the same words. Some damage differs: a JPEG whose scan
is broken between an intact header and an intact end (few BMP and WebP as well) decodes to whatever
libjpeg makes of it, where the other backend rejects it; ``uml-fast inspect --verify`` finds such
damage by checksum.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uml_fast.config import ConfigError, ModalityConfig
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.image import ImageConfig

if TYPE_CHECKING:
    from uml_fast.data.decoding.decode import Decode, DecodeError

_LOG = logging.getLogger("uml_fast")
_BATCH = 256
"""Most samples of a run. A pipeline takes 7 ms to build, a run 50 us besides its samples (EPYC)."""
_MOST_PIXELS = 1 << 27
"""Of a JPEG; a larger one is left to the other backend, which decodes one at a time."""
_HEADERS = 1 << 16
"""Bytes of a sound's file that may be no sound."""
_INPUT = "stored"
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class _Images:
    channels: int
    device: int | None = None
    """CUDA device that decodes; None: the CPU."""

    def takes(self, payload: bytes) -> bool:
        """Whether DALI makes the array of it that the other backend makes.

        It does of JPEG, where CMYK is a step off; of 8-bit PNG (16-bit pixels are scaled, where
        Pillow cuts them), WebP and 24-bit BMP, unless colours become gray, a step off again.
        """
        if payload.startswith(b"\xff\xd8"):
            return _is_usual_jpeg(payload)
        if payload.startswith(_PNG) and len(payload) > 25:
            depth, colour = payload[24], payload[25]
            return depth <= 8 and (self.channels == 3 or colour in (0, 4))
        if payload.startswith(b"BM") and len(payload) > 28:
            return self.channels == 3 and payload[28] == 24
        return self.channels == 3 and payload[:4] == b"RIFF" and payload[8:12] == b"WEBP"

    def outputs(self, stored: Any) -> tuple[Any, ...]:
        """The pixels, behind the input of the pipeline."""
        from nvidia.dali import fn, types

        pixels = fn.decoders.image(
            stored,
            device="cpu" if self.device is None else "mixed",
            output_type=types.GRAY if self.channels == 1 else types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        return (pixels if self.device is None else pixels.cpu(),)

    def array(self, *outputs: Any) -> np.ndarray | None:
        """uint8 (h, w, c) of a sample."""
        return np.asarray(outputs[0])


@dataclass(frozen=True, slots=True)
class _Sounds:
    sample_rate: int
    most: int
    """Samples of the longest sound the run takes."""
    device: int | None = None

    def takes(self, payload: bytes) -> bool:
        """Whether DALI makes the same array, of FLAC and WAV; Ogg Vorbis is one step off.

        It decodes all of a sound, so one of far more bytes than the run takes is left as well.
        """
        return payload[:4] in (b"fLaC", b"RIFF") and len(payload) <= 4 * self.most + _HEADERS

    def outputs(self, stored: Any) -> tuple[Any, ...]:
        """The sound and its rate, behind the input of the pipeline."""
        from nvidia.dali import fn, types

        sound, rate = fn.decoders.audio(stored, dtype=types.INT16, downmix=False)
        return sound, rate

    def array(self, *outputs: Any) -> np.ndarray | None:
        """int16 (n,) of a sample; None: of another rate or several channels."""
        samples, rate = map(np.asarray, outputs)
        if samples.shape[1] != 1 or rate != self.sample_rate:
            return None
        return samples[: self.most, 0]


@dataclass(frozen=True, slots=True)
class Batched:
    """Decodes with DALI what it takes, and the rest with the backend it stands in for."""

    graph: _Images | _Sounds
    """What DALI takes, does with it, and gives."""
    plain: Decode
    """Decodes what DALI does not take, and what it gave up on."""
    _free: list[Any] = field(default_factory=list, repr=False)
    """Pipelines that no thread is using; there are never more than threads that call."""

    def __call__(self, payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
        """See ``Decode``."""
        out: list[Any] = [None] * len(payloads)
        taken = [i for i, payload in enumerate(payloads) if self.graph.takes(payload)]
        for at in range(0, len(taken), _BATCH):
            batch = taken[at : at + _BATCH]
            for i, array in zip(batch, self._run([payloads[i] for i in batch]), strict=True):
                out[i] = array
        left = [i for i, array in enumerate(out) if array is None]
        for i, other in zip(left, self.plain([payloads[i] for i in left]), strict=True):
            out[i] = other
        return out

    def _run(self, payloads: list[bytes]) -> list[np.ndarray | None]:
        """The array of each payload, None where the other backend has to look."""
        from nvidia.dali.tensors import TensorCPU, TensorListCPU

        try:
            pipeline = self._free.pop()
        except IndexError:
            pipeline = self._pipeline()
        # arrays would do, but DALI asks each what it is: 2 us a sample
        stored = TensorListCPU([TensorCPU(np.frombuffer(p, np.uint8)) for p in payloads])
        try:
            lists = pipeline.run(**{_INPUT: stored})
        except RuntimeError as e:  # the pipeline is of no use any more
            _LOG.info("DALI gave up on a batch, which is decoded one by one instead: %s", e)
            return [None] * len(payloads)
        # an array keeps the memory it is a view of, so the pipeline may run again before it is read
        arrays = [self.graph.array(*(of[i] for of in lists)) for i in range(len(payloads))]
        self._free.append(pipeline)
        return arrays

    def build(self) -> None:
        """Make the first pipeline: a broken installation is an error here, not in a thread."""
        self._free.append(self._pipeline())

    def _pipeline(self) -> Any:
        from nvidia.dali import Pipeline, fn, types

        pipeline = Pipeline(
            batch_size=_BATCH, num_threads=1, device_id=self.graph.device, prefetch_queue_depth=1
        )
        with pipeline:
            stored = fn.external_source(name=_INPUT, dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(*self.graph.outputs(stored))
        pipeline.build()
        return pipeline


def batched(config: ModalityConfig, plain: Decode, on_gpu: bool = False) -> Decode:
    """What decodes the samples of a modality with DALI; ``plain`` where there is nothing to decode.

    Args:
        config: the modality.
        plain: the other backend's decoder of it.
        on_gpu: decode JPEG images with nvJPEG on torch's current device and bring the pixels back;
            they are some steps off the other backends'. Not run on a GPU yet.

    Raises:
        ModuleNotFoundError: DALI is not installed.
        ConfigError: ``on_gpu`` without a CUDA device.
    """
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("data.backend is dali_gpu, but torch sees no CUDA device; take dali")
    graph: _Images | _Sounds
    if isinstance(config, ImageConfig):
        graph = _Images(config.channels, torch.cuda.current_device() if on_gpu else None)
    elif isinstance(config, AudioConfig):
        graph = _Sounds(config.sample_rate, config.positions * config.row_samples)
    else:
        return plain
    try:
        import nvidia.dali  # noqa: F401
    except ModuleNotFoundError as e:
        message = "data.backend dali needs NVIDIA DALI: pip install nvidia-dali-cuda130"
        raise ModuleNotFoundError(message, name="nvidia.dali") from e
    decode = Batched(graph, plain)
    decode.build()
    return decode


def _is_usual_jpeg(payload: bytes) -> bool:
    """Whether the head of a JPEG is whole, says YCbCr, gray or RGB, and promises no gigabytes."""
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(payload)
    except ValueError:
        return False
    return colours in ("YCbCr", "Gray", "RGB") and height * width <= _MOST_PIXELS
