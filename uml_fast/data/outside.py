"""Shards beside those of a run, as samples of one of its modalities: shifted sets, true pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uml_fast.config import ModalityConfig
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.in_memory import for_evaluation
from uml_fast.data.shards.files import ShardSet, splits_of
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError, Source

MAX_ERRORS = 100
"""Samples that may be unreadable."""


@dataclass(frozen=True, slots=True)
class Outside:
    """Samples of shards that are not the run's."""

    source: Source
    """Samples in memory, in the order of the shards; labels number ``class_names``."""
    class_names: tuple[str, ...]
    """Name of each class; the numbers where the shards have no names."""


def open_outside(
    place: str | Path, modality: ModalityConfig, renames: Mapping[str, str] | None = None
) -> Outside:
    """Decode the test split of shards (or their only one) as a modality of a run sees it.

    Args:
        place: a folder that ``prepare`` wrote, or any WebDataset tar files.
        modality: what the samples become rows for.
        renames: classes that the run calls otherwise.

    Raises:
        DataError: there are no such shards, several splits and none is the test one, samples of
            another kind, or more than ``MAX_ERRORS`` that cannot be read.
    """
    splits = splits_of(place)
    if len(splits) > 1 and "test" not in splits:
        raise DataError(f"{place} has the splits {', '.join(splits)}, and none of them is test")
    split = "test" if "test" in splits else splits[0] if splits else None
    shards = ShardSet.open(place, split)
    labels = shards.label.astype(np.int32)
    names = shards.class_names or tuple(map(str, range(int(labels.max(initial=-1)) + 1)))
    labels = np.where(labels < len(names), labels, -1).astype(np.int32)
    decode, writer = decode_of(modality), rows_of(modality, AugmentConfig())
    errors = DataErrors(MAX_ERRORS)
    source = ShardSource(modality.name, shards, decode, writer, errors, labels=labels)
    renamed = tuple((renames or {}).get(n, n) for n in names)
    return Outside(for_evaluation(source, str(place)), renamed)
