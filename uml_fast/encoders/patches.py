"""Image features learned here without labels: a dictionary of whitened patches (Coates, Ng and Lee,
"An analysis of single-layer networks in unsupervised feature learning", 2011).

    patch   every patch of the image, brightness and contrast taken out, whitened (ZCA)
    code    max(0, mean distance to the words - distance to this word)        "triangle", section 3
    pool    mean of the codes in each quarter of the image
    out     standardised, projected to its principal components, L2-normalised

Words (k-means), statistics and components are fitted to images alone, no label is read.

Legend: n images, b of a batch, p places of a patch, V values of a patch, K words, P = 4 K pooled
codes, D features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.data.source import DataError, say_once
from uml_fast.encoders.extraction import Encoder, Stored, data_facts
from uml_fast.modalities.image import ImageConfig

_PATCHES = 100_000
"""Patches that the words are fitted to; 200,000 give the same accuracy on CIFAR-10."""
_POOLED = 5_000
"""Images, at most, that statistics and components are fitted to."""
_FEWEST = 4
"""Images that statistics can be taken of."""
_WORDS_PER_IMAGE = 10
"""Words that an image's patches can be told apart by; fewer images get a smaller dictionary."""
_AT_ONCE = 8
"""Images whose codes are in memory together: 12 MB, which stay in the cache of a core."""
_CONTRAST_FLOOR = 10.0
"""Variance (of values 0..255) that is added before a patch is divided by its deviation."""
_WHITENING_FLOOR = 0.1
"""Added to the eigenvalues of the patches before whitening."""


@dataclass(frozen=True, slots=True, eq=False)
class _Words:
    """What codes are made of."""

    patch: int
    center_V: Tensor
    whiten_VV: Tensor
    words_KV: Tensor

    @staticmethod
    def learn(images: np.ndarray, patch: int, words: int, seed: int) -> _Words:
        """K-means of whitened patches."""
        from sklearn.cluster import MiniBatchKMeans

        drawn = _drawn_patches(images, patch, np.random.default_rng(seed))
        center_V = drawn.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(drawn.T))
        whiten_VV = vectors * (values + _WHITENING_FLOOR).rsqrt() @ vectors.T
        k_means = MiniBatchKMeans(words, batch_size=4096, n_init=1, max_iter=20, random_state=seed)
        k_means.fit(((drawn - center_V) @ whiten_VV).numpy())
        return _Words(patch, center_V, whiten_VV, torch.from_numpy(k_means.cluster_centers_))

    def pooled(self, images: np.ndarray) -> Tensor:
        """fp32 (b, P) codes of uint8 (b, h, w, 3) images."""
        rows, columns = (s - self.patch + 1 for s in images.shape[1:3])
        turned_VK = self.whiten_VV @ self.words_KV.T
        offset_K = self.center_V @ turned_VK
        squares_K = self.words_KV.square().sum(1)
        out = torch.empty(len(images), 4, len(squares_K))
        for begin in range(0, len(images), _AT_ONCE):
            x_bpV = _patches_of(images[begin : begin + _AT_ONCE], self.patch)
            norms_bp1 = ((x_bpV - self.center_V) @ self.whiten_VV).square().sum(-1, keepdim=True)
            code_bpK = (x_bpV @ turned_VK).sub_(offset_K).mul_(-2).add_(norms_bp1).add_(squares_K)
            code_bpK.clamp_(min=0).sqrt_().neg_()
            code_bpK.sub_(code_bpK.mean(-1, keepdim=True)).clamp_(min=0)
            grid = code_bpK.view(-1, rows, columns, len(squares_K))
            quarters = [
                quarter.mean((1, 2))
                for half in grid.tensor_split(2, 1) for quarter in half.tensor_split(2, 2)
            ]  # fmt: skip
            out[begin : begin + _AT_ONCE] = torch.stack(quarters, 1)
        return out.flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Learned:
    """Words and components, and the size of the images they were learned from."""

    size: tuple[int, int]
    words: _Words
    mean_P: Tensor
    components_PD: Tensor
    """Principal components, the division by the codes' deviation included."""


class PatchEncoder(Encoder):
    """Features of images of one size, fp32 (b, D) of L2 norm 1; learned when first used.

    Args:
        samples: images that words and components are learned from; those that cannot be decoded are
            left out.
        patch: height and width of a patch in pixels.
        words: K, at most ``_WORDS_PER_IMAGE`` for each image.
        width: D, at most half as many as there are images.
        seed: of the patches that are looked at, and of k-means.

    Raises:
        DataError: there are fewer than ``_FEWEST`` images.
    """

    kind = "images"
    same_length = True

    def __init__(
        self, samples: Stored, *, patch: int = 6, words: int = 512, width: int = 256, seed: int = 0
    ) -> None:
        if len(samples) < _FEWEST:
            raise DataError(
                f"{len(samples)} images are too few to learn from; patches needs {_FEWEST} at least"
            )
        asked = words, width
        words = min(words, _WORDS_PER_IMAGE * len(samples))
        width = min(width, len(samples) // 2)
        if (words, width) != asked:
            say_once(
                f"patches: {words} words and {width} components ({asked[0]} and {asked[1]} take "
                f"{max(-(-asked[0] // _WORDS_PER_IMAGE), 2 * asked[1])} images; there are "
                f"{len(samples)})"
            )
        self._samples, self._patch, self._count, self._seed = samples, patch, words, seed
        self.width = width
        self.facts = {
            "name": "patches", "patch": patch, "words": words, "width": width, "seed": seed,
            "fitted_to": data_facts(samples),
        }  # fmt: skip

    @functools.cached_property
    def _learned(self) -> _Learned:
        from sklearn.decomposition import PCA

        images, size = _images_of(self._samples)
        if len(images) < max(self.width, _FEWEST):
            raise DataError(
                f"{len(images)} of {len(self._samples)} images can be decoded; {self.width} "
                f"components need {max(self.width, _FEWEST)} at least"
            )
        words = _Words.learn(images, self._patch, self._count, self._seed)
        pooled = words.pooled(images[:: -(-len(images) // _POOLED)])
        mean_P, deviation = pooled.mean(0), pooled.std(0).clamp(min=1e-3)
        pca = PCA(self.width, svd_solver="randomized", random_state=self._seed)
        pca.fit(((pooled - mean_P) / deviation).numpy())
        components = torch.from_numpy(pca.components_).T / deviation[:, None]
        return _Learned(size, words, mean_P, components.contiguous())

    def prepare(self, payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
        """uint8 (h, w, 3) pixels of each image; see ``Encoder``.

        Raises:
            DataError: the images to learn from have several sizes, or are too few.
        """
        size = self._learned.size
        return [
            image if isinstance(image, DecodeError) or image.shape[:2] == size
            else DecodeError(f"{image.shape[:2]} pixels; the encoder was fitted to {size}")
            for image in _decode(payloads)
        ]  # fmt: skip

    def encode(self, prepared: Sequence[np.ndarray]) -> Tensor:
        """fp32 (b, D)."""
        learned = self._learned
        pooled = learned.words.pooled(np.stack(prepared))
        return F.normalize((pooled - learned.mean_P) @ learned.components_PD)


def _decode(payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
    return decode_of(ImageConfig(name="image", height=32, width=32))(
        payloads
    )  # any size is decoded


def _images_of(samples: Stored) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 (n, h, w, 3) and the size."""
    if samples.kind != "images":
        raise DataError(f"the samples are {samples.kind}; a dictionary of patches is for images")
    decoded = _decode([samples.payload(i) for i in range(len(samples))])
    images = [image for image in decoded if not isinstance(image, DecodeError)]
    sizes = {image.shape[:2] for image in images}
    if len(sizes) != 1:
        shown = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:3])
        raise DataError(f"the images have {len(sizes)} sizes ({shown}); prepare them with one")
    return np.stack(images), sizes.pop()


def _patches_of(images: np.ndarray, patch: int) -> Tensor:
    """fp32 (b, p, V) patches without brightness and contrast."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x_bpV = F.unfold(pixels, patch).transpose(1, 2)
    x_bpV = x_bpV - x_bpV.mean(-1, keepdim=True)
    return x_bpV / (x_bpV.var(-1, keepdim=True) + _CONTRAST_FLOOR).sqrt()


def _drawn_patches(images: np.ndarray, patch: int, rng: np.random.Generator) -> Tensor:
    """fp32 (about ``_PATCHES``, V): as many of each image, at random places."""
    each = max(1, _PATCHES // len(images))
    drawn = []
    for begin in range(0, len(images), 64):
        x_bpV = _patches_of(images[begin : begin + 64], patch)
        places = torch.from_numpy(rng.integers(0, x_bpV.shape[1], (len(x_bpV), each)))
        drawn.append(x_bpV[torch.arange(len(x_bpV))[:, None], places].flatten(0, 1))
    return torch.cat(drawn)
