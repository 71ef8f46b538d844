"""Features of sentences learned here without labels: TF-IDF of words and pairs of words, reduced to
its largest singular vectors (latent semantic analysis, Deerwester et al., 1990).

Legend: b sentences of a batch, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uml_fast.data.source import DataError
from uml_fast.encoders.extraction import Encoder, Stored, data_facts


class SentenceEncoder(Encoder):
    """Features of sentences, fp32 (b, D) of L2 norm 1, or 0 without a known word.

    Args:
        samples: texts in UTF-8 that words, their weights and singular vectors are learned from.
        width: D, lowered to what the sentences allow.
        seed: of the randomised SVD.

    Raises:
        DataError: the samples are no texts, or have fewer than two different words.
    """

    kind = "text"

    def __init__(self, samples: Stored, *, width: int = 128, seed: int = 0) -> None:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_pipeline

        if samples.kind != "text":
            raise DataError(f"the samples are {samples.kind}; sentence vectors are for text")
        texts = [samples.payload(i).decode(errors="replace") for i in range(len(samples))]
        words = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        try:
            known = len(words.fit(texts).vocabulary_)
        except ValueError:  # an empty vocabulary
            known = 0
        if min(known, len(texts)) < 2:
            raise DataError(
                f"{len(texts)} texts with {known} different words are too few for sentence vectors"
            )
        self.width = min(width, known - 1, len(texts) - 1)
        self._pipeline = make_pipeline(words, TruncatedSVD(self.width, random_state=seed))
        self._pipeline.fit(texts)
        self.facts = {
            "name": "sentences", "width": self.width, "seed": seed,
            "fitted_to": data_facts(samples),
        }  # fmt: skip

    def prepare(self, payloads: Sequence[bytes]) -> list[str]:
        """Each text."""
        return [payload.decode(errors="replace") for payload in payloads]

    def encode(self, prepared: Sequence[str]) -> Tensor:
        """fp32 (b, D)."""
        return F.normalize(torch.from_numpy(self._pipeline.transform(list(prepared))).float())
