"""Frozen text encoders: any encoder or decoder of transformers, and CLIP's text tower.

Features of the paper's kinds (1.4): the CLS token of encoders, the mean of the last hidden states
over all tokens of decoders, CLIP's projected end-of-text token. The head over the vocabulary is
never built, and one hidden state is kept, the last.

Legend: b texts, T tokens of the longest, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.source import DataError
from uml_fast.encoders.extraction import Encoder
from uml_fast.encoders.networks import (
    clip_tower,
    freeze,
    transformers_config,
    transformers_network,
)
from uml_fast.runtime.foreign import import_transformers

Pool = Literal["auto", "cls", "mean", "eot"]
_MOST_TOKENS = 8192
"""Of a text for networks that name no limit."""


class TextEncoder(Encoder):
    """Features of texts.

    Args:
        name: name of the Hugging Face hub, or a folder.
        device: where it computes.
        dtype: of the network.
        pool: cls: first token; mean: of all tokens; eot: CLIP's projection of the last one; auto:
            eot for CLIP, cls for encoders (masked language models), mean for all others.

    Raises:
        DataError: there is no such network or tokenizer, or it has no such pooling.
        ModuleNotFoundError: transformers is missing.
    """

    kind = "text"

    def __init__(
        self, name: str, device: torch.device, dtype: torch.dtype, *, pool: Pool = "auto"
    ) -> None:
        transformers = import_transformers()
        config = transformers_config(name)
        is_clip = config.model_type in ("clip", "clip_text_model")
        if pool == "auto":
            masked = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
            pool = "eot" if is_clip else "cls" if config.model_type in masked else "mean"
        if (pool == "eot") != is_clip:
            raise DataError(
                f"{name} is {config.model_type}; --pool eot is CLIP's, and its only one"
            )
        if is_clip:
            model = clip_tower(name, config, "text")
        else:
            model = transformers_network("AutoModel", name, dtype=dtype)
        if config.is_encoder_decoder:
            model = model.get_encoder()
        self._model, weights = freeze(model, device, dtype)
        try:
            self._tokens: Any = transformers.AutoTokenizer.from_pretrained(
                name, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as e:
            raise DataError(f"transformers finds no tokenizer in {name}: {e}") from e
        self._device, self._pool = device, pool
        named = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
        # roberta numbers positions from the id of its padding on
        offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
        self._most = min(
            _MOST_TOKENS, int(self._tokens.model_max_length), (named or _MOST_TOKENS) - offset
        )
        self.facts = {
            "name": name, "weights": weights, "dtype": str(dtype), "pool": pool,
            "transform": {"tokens": self._most, "tokenizer": self._vocabulary_hash()},
        }  # fmt: skip
        self.width = self.encode(self.prepare([b"a"])).shape[1]

    def _vocabulary_hash(self) -> str:
        from uml_fast.encoders.cache import fingerprint_of

        backend = getattr(self._tokens, "backend_tokenizer", None)
        known = backend.to_str() if backend is not None else self._tokens.get_vocab()
        return fingerprint_of({"tokenizer": known})

    def prepare(self, payloads: Sequence[bytes]) -> list[Any]:
        """Token ids of each text; see ``Encoder``."""
        if not payloads:
            return []
        texts = [p.decode("utf-8", errors="replace") for p in payloads]
        found: list[Any] = []
        for ids in self._tokens(texts, truncation=False, verbose=False)["input_ids"]:
            found.append(ids if ids else DecodeError("a text without tokens"))
            if len(ids) > self._most:
                self.cut += 1
                # the end-of-text token of CLIP and BERT stays
                end = ids[-1:] if self._pool != "mean" else []
                found[-1] = ids[: self._most - len(end)] + end
        return found

    @torch.inference_mode()
    def encode(self, prepared: Sequence[Any]) -> Tensor:
        """fp32 (b, D); see ``Encoder``."""
        longest = max(map(len, prepared))
        pad = self._tokens.pad_token_id
        pad = self._tokens.eos_token_id if pad is None else pad
        ids_BT = torch.full((len(prepared), longest), 0 if pad is None else pad)
        mask_BT = torch.zeros(len(prepared), longest, dtype=torch.long)
        for i, ids in enumerate(prepared):
            ids_BT[i, : len(ids)] = torch.tensor(ids)
            mask_BT[i, : len(ids)] = 1
        ids_BT, mask_BT = ids_BT.to(self._device), mask_BT.to(self._device)
        out = self._model(input_ids=ids_BT, attention_mask=mask_BT)
        if self._pool == "eot":
            return out.text_embeds.float()
        hidden_BTD = out.last_hidden_state
        if self._pool == "cls":
            return hidden_BTD[:, 0].float()
        weight_BT1 = mask_BT[:, :, None].float()
        return (hidden_BTD.float() * weight_BT1).sum(1) / weight_BT1.sum(1)
