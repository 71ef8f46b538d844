"""Linear probes on frozen image features with unpaired text features (paper 1.4 and 1.7).

Features are extracted once: ``python -m uml_fast.extract image ...``, ``... extract text ...``.
"""

from __future__ import annotations

import dataclasses

from uml_fast.grid.cells import HeadSchedule
from uml_fast.grid.data import FeatureFiles
from uml_fast.grid.run import GridConfig, SearchConfig, VariantConfig


def vision_text() -> GridConfig:
    """Frozen image and unpaired text features: --data.where FOLDER (made by uml_fast.extract).

    Tables 10 to 19 of the paper: 1 to 16 shots, ``--shots 0`` for all samples. "uml" starts from a
    random head, "uml_init" from the mean text of each class. ``--search.points 24`` tries fewer
    points of table 5's grid.
    """
    return GridConfig(
        recipe="vision_text",
        target="image",
        variants=(
            VariantConfig(name="uml"),
            VariantConfig(name="uml_init", init="text"),
        ),
        data=FeatureFiles(),
    )


def vision_text_control() -> GridConfig:
    """vision_text, and both of its networks without the text's loss: is a gain the text's?"""
    config = vision_text()
    network = VariantConfig(name="network", is_control=True)
    started = VariantConfig(name="network_init", init="text", is_control=True)
    return dataclasses.replace(
        config, recipe="vision_text_control", variants=(*config.variants, network, started)
    )


def vision_text_clip() -> GridConfig:
    """The same for aligned encoders (CLIP): no projection, fixed scale 100, patience 5.

    Tables 20 to 23.
    """
    return dataclasses.replace(
        vision_text(),
        recipe="vision_text_clip",
        project=False,
        scale=100.0,
        search=SearchConfig(batch=(32,), learn_scale=(False,)),
        schedule=HeadSchedule(patience=5),
    )


def text_ratio() -> GridConfig:
    """Texts of a step for each image, 1/4 to 4, a row of the table each (tables 27 and 28)."""
    config = vision_text()
    search = dataclasses.replace(config.search, ratio=(0.25, 0.5, 1.0, 2.0, 4.0))
    return dataclasses.replace(config, recipe="text_ratio", search=search, rows=("ratio",))


def unrelated_text() -> GridConfig:
    """Text of other classes as a control: extract it with --name unrelated (table 24).

    Its class i stands for the images' class i, so that it says nothing about them.
    """
    return dataclasses.replace(
        vision_text(),
        recipe="unrelated_text",
        variants=(
            VariantConfig(name="unrelated", modalities=("image", "unrelated")),
            VariantConfig(
                name="unrelated_init", modalities=("image", "unrelated"), init="unrelated"
            ),
            VariantConfig(name="related_init", init="text"),
        ),
        data=FeatureFiles(numbered=("unrelated",)),
    )


def exchange_rate() -> GridConfig:
    """Accuracy by shots of images and of texts, for their rate of exchange (paper 4.4, E.8)."""
    config = vision_text()
    texts = (1, 2, 5, 7, 10, 12, 15)
    return dataclasses.replace(
        config,
        recipe="exchange_rate",
        variants=(VariantConfig(name="uml"),),
        search=dataclasses.replace(config.search, auxiliary_shots=texts),
        rows=("auxiliary_shots",),
    )
