"""A network of another library in our terms: its configuration and where its weights are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uml_fast.config import ConfigError, ModalityConfig
from uml_fast.kernels.feed_forward import Activation
from uml_fast.model.interop.names import Entry
from uml_fast.model.transformer import TransformerConfig

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "relu": "relu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "silu": "swiglu",
}  # fmt: skip
"""By transformers' names; silu is that of gated feed-forward networks."""


@dataclass(frozen=True, slots=True)
class Network:
    """What is needed to read a checkpoint."""

    backbone: TransformerConfig
    """The network behind the embedding."""
    modality: ModalityConfig
    """The embedding of images or texts."""
    entries: list[Entry]
    """Where the weights of both are."""
    ignored: str
    """Regular expression of names that have no place here: heads, poolers, masks."""
    prefix: str = ""
    """Prefix of the names where a head was saved with the network."""
    antialias: bool = False
    """Whether the library resamples positions with antialiasing."""


def activation(name: str, source: str) -> Activation:
    """Our name of an activation of transformers.

    Raises:
        ConfigError: the feed-forward network does not have it.
    """
    if name not in ACTIVATIONS or name == "silu":
        raise ConfigError(
            f"{source}: activation {name!r} is none of {sorted(set(ACTIVATIONS) - {'silu'})}"
        )
    return ACTIVATIONS[name]


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
