"""Frozen audio encoders of transformers (wav2vec 2.0, HuBERT, AST, Whisper's encoder, ...).

Legend: b sounds, D features.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.source import DataError
from uml_fast.encoders.extraction import Encoder
from uml_fast.encoders.networks import freeze, transformers_config, transformers_network
from uml_fast.runtime.foreign import import_transformers


class AudioEncoder(Encoder):
    """Features of sounds: the mean of the last hidden states, or CLAP's projection.

    The sounds of a batch have one length, so that none sees padding.

    Args:
        name: name of the Hugging Face hub, or a folder.
        device: where it computes.
        dtype: of the network.

    Raises:
        DataError: there is no such network.
        ModuleNotFoundError: transformers or soundfile is missing.
    """

    kind = "audio"
    same_length = True

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        import soundfile  # noqa: F401 (a missing library is said before anything is loaded)

        config = transformers_config(name)
        is_clap = config.model_type.startswith("clap")
        model = transformers_network(
            "ClapAudioModelWithProjection" if is_clap else "AutoModel", name
        )
        if config.is_encoder_decoder:
            model = model.get_encoder()
        self._model, weights = freeze(model, device, dtype)
        try:
            self._extractor: Any = import_transformers().AutoFeatureExtractor.from_pretrained(name)
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"transformers finds no feature extractor in {name}: {e}") from e
        self._device, self._dtype = device, dtype
        self._rate = int(self._extractor.sampling_rate)
        self.facts = {
            "name": name, "weights": weights, "dtype": str(dtype),
            "transform": {k: v for k, v in self._extractor.to_dict().items()
                          if isinstance(v, (str, int, float, bool))},
        }  # fmt: skip
        self.width = self.encode([np.zeros(self._rate, np.float32)]).shape[1]

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        """fp32 samples of each sound, -1..1; see ``Encoder``."""
        return [self._prepare(p) for p in payloads]

    def _prepare(self, payload: bytes) -> np.ndarray | DecodeError:
        import soundfile

        try:
            samples, rate = soundfile.read(io.BytesIO(payload), dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, TypeError, ValueError) as e:
            return DecodeError(f"broken sound: {e}")
        if rate != self._rate:
            return DecodeError(
                f"{rate} Hz; the encoder takes {self._rate} Hz: prepare with --sample-rate "
                f"{self._rate}"
            )
        return samples.mean(1) if len(samples) else DecodeError("a sound without samples")

    @torch.inference_mode()
    def encode(self, prepared: Sequence[Any]) -> Tensor:
        """fp32 (b, D); see ``Encoder``."""
        made = self._extractor(list(prepared), sampling_rate=self._rate, return_tensors="pt")
        name = "input_values" if "input_values" in made else "input_features"
        out = self._model(**{name: made[name].to(self._device, self._dtype)})
        if getattr(out, "audio_embeds", None) is not None:
            return out.audio_embeds.float()
        return out.last_hidden_state.float().mean(1)
