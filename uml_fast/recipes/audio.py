"""One, two and three modalities with sounds in folds (paper 1.6, tables 25 and 26).

Features are extracted once: ``python -m uml_fast.extract audio ...``, ``... image``, ``... text``.
"""

from __future__ import annotations

import dataclasses

from uml_fast.grid.cells import HeadSchedule
from uml_fast.grid.folds import SoundFolds
from uml_fast.grid.run import GridConfig, SearchConfig, VariantConfig


def _three(recipe: str, target: str, other: str) -> GridConfig:
    """The target alone, with each of the other two modalities, and with both."""
    subsets = ((target, other), (target, "text"), (target, other, "text"))
    return GridConfig(
        recipe=recipe,
        target=target,
        variants=tuple(VariantConfig(name="_".join(s), modalities=s) for s in subsets),
        data=SoundFolds(),
        search=SearchConfig(
            lr=(1e-1, 1e-2, 1e-3, 1e-4),
            weight_decay=(0.0, 0.01, 1e-4),
            batch=(8,),
            learn_scale=(True,),
            alpha=(1.0,),
            auxiliary_shots=("average", 0),
        ),
        schedule=HeadSchedule(patience=5),
        shots=(1, 2, 4),
        seeds=5,
        seed=0,
    )


def audio() -> GridConfig:
    """Sounds alone, with images, with text, with both: --data.where FOLDER (uml_fast.extract).

    Table 25: a seed is a fold that is trained on, the other folds are the test; with ESC-50's five
    folds the five seeds are the paper's splits. ``--data.class-map FILE`` or ``--data.same
    dog_bark=dog`` say which classes meet.
    """
    return _three("audio", "audio", "image")


def audio_images() -> GridConfig:
    """Images alone, with the sounds of a fold, with text, with both (table 26)."""
    return _three("audio_images", "image", "audio")


def audio_clip() -> GridConfig:
    """The same as audio for aligned encoders (AudioCLIP and CLIP): no projection, scale 100."""
    return _aligned(audio(), "audio_clip")


def audio_images_clip() -> GridConfig:
    """The same as audio_images for aligned encoders: no projection, scale 100."""
    return _aligned(audio_images(), "audio_images_clip")


def _aligned(config: GridConfig, recipe: str) -> GridConfig:
    search = dataclasses.replace(config.search, learn_scale=(False,))
    return dataclasses.replace(config, recipe=recipe, project=False, scale=100.0, search=search)
