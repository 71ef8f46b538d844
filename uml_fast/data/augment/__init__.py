"""How training samples are changed when they are read: another way each epoch, the same each run.

Every random number is a function of (seed, modality, epoch, sample): batches, threads, resuming and
the decode backend change none. What is evaluated is never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from uml_fast.data.augment.audio import AudioAugment
from uml_fast.data.augment.image import ImageAugment
from uml_fast.data.augment.text import TextAugment


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Augmentation of the training samples by their kind."""

    image: ImageAugment = field(default_factory=ImageAugment)
    """Of modalities of pictures."""
    audio: AudioAugment = field(default_factory=AudioAugment)
    """Of modalities of sounds."""
    text: TextAugment = field(default_factory=TextAugment)
    """Of modalities of text."""
