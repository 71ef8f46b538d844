"""The base sections of modalities and networks, and the error of a wrong configuration."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uml_fast.modalities.base import Modality
    from uml_fast.model.backbone import Backbone


class ConfigError(ValueError):
    """A configuration that cannot run: the message names field, value and what is accepted."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def check_finite(value: Any, name: str = "") -> None:
    """Raise ConfigError where a number of a configuration is infinite or NaN."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            check_finite(getattr(value, f.name), f"{name}.{f.name}" if name else f.name)
    elif isinstance(value, tuple):
        for i, v in enumerate(value):
            check_finite(v, f"{name}[{i}]")
    elif isinstance(value, float):
        require(math.isfinite(value), f"{name} is {value}; it must be finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityConfig:
    """One modality of a run: its name, its part of the token mix and its weight in the loss.

    Subclasses live in ``uml_fast/modalities/`` and build the stem, the decoder and the loss.
    """

    name: str
    """Name of the modality, unique in the run; sources, metrics and checkpoints use it."""
    share: float = 1.0
    """Part of this modality in the mix, relative to the others: of tokens, or as mix.share_of."""
    weight: float = 1.0
    """Factor of this modality's loss in the total (alpha of the paper)."""
    encoder: BackboneConfig | None = None
    """The modality's own network, between its stem and the shared part (f_X of paper 1.1)."""
    pooled: bool = False
    """The shared part gets one vector per sample from the encoder, not its rows (paper 1.4)."""

    def __post_init__(self) -> None:
        require(
            self.name.isidentifier(), f"modality name {self.name!r} must be a Python identifier"
        )
        require(self.share > 0, f"{self.name}.share is {self.share}; it must be positive")
        require(self.weight >= 0, f"{self.name}.weight is {self.weight}; it must not be negative")
        require(
            self.encoder is not None or not self.pooled,
            f"{self.name}.pooled needs {self.name}.encoder: without one there is nothing to pool",
        )

    def build(self, width: int, output_width: int, decode: bool) -> Modality:
        """The stem (to ``width``) and, if ``decode``, the decoder (from ``output_width``)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """A network over packs: the shared one, or a modality's own.

    Subclasses live in ``uml_fast/model/`` and implement ``build``.
    """

    width: int
    """Features per token at the input of the network; stems project to it. Of a shared network 0:
    as many as those of modalities give it (``uml_fast.training.complete``)."""
    freeze: bool = False
    """Leave the network as it starts; a modality's own together with its stem."""
    unfreeze_at: int = 0
    """Step at which a frozen network starts to be trained; 0: never."""

    def given_width(self, pooled: bool) -> int:
        """Features of what the network gives: of an embedding if ``pooled``, else of a row."""
        return self.width

    def from_scratch(self) -> BackboneConfig:
        """The same network with random weights to start from, wherever these come from."""
        return self

    @property
    def stays_frozen(self) -> bool:
        """Whether the network is never trained."""
        return self.freeze and self.unfreeze_at == 0

    def is_frozen(self, step: int) -> bool:
        """Whether step ``step`` leaves the network as it is."""
        return self.stays_frozen or (self.freeze and step < self.unfreeze_at)

    def check(self, modality: str, longest: int) -> None:
        """Raise ConfigError unless samples of ``longest`` rows of a modality fit the network."""

    def build(self) -> Backbone:
        """The network with freshly drawn weights."""
        raise NotImplementedError
