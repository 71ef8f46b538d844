"""Weights under our names and under those of another library.

Legend: D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uml_fast.config import ConfigError

Tensors = tuple[Tensor, ...]


def _joined(*theirs: Tensor) -> Tensors:
    return (torch.cat([t.float() for t in theirs]) if len(theirs) > 1 else theirs[0].float(),)


@dataclass(frozen=True, slots=True)
class Entry:
    """Weights of ours and the ones they are made of."""

    ours: tuple[str, ...]
    """Names in a state of ours."""
    theirs: tuple[str, ...]
    """Names in the other library's file."""
    read: Callable[..., Tensors] = _joined
    """From theirs, in that order, to ours; by default one behind the other."""
    write: Callable[..., Tensors] | None = None
    """From ours to theirs; None: ours in as many equal parts as there are of theirs."""


def same(ours: str, *theirs: str) -> Entry:
    """A tensor that theirs give one behind the other."""
    return Entry((ours,), theirs)


def dense(ours: str, *theirs: str, bias: bool = True) -> list[Entry]:
    """A linear map or norm: weight and maybe bias of it."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [same(f"{ours}.{k}", *(f"{t}.{k}" for t in theirs)) for k in kinds]


def transposed(ours: str, theirs: str) -> list[Entry]:
    """A linear map kept as (inputs, outputs), as GPT-2 does."""
    weight = Entry(
        (f"{ours}.weight",), (f"{theirs}.weight",), lambda w: (w.float().t().contiguous(),)
    )
    return [weight, same(f"{ours}.bias", f"{theirs}.bias")]


def zeros(ours: str, size: int) -> Entry:
    """A bias that they do not have."""
    return Entry((ours,), (), lambda: (torch.zeros(size),))


def read_entries(
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    ignored: str,
    source: str,
) -> dict[str, Tensor]:
    """Our weights, fp32, out of theirs.

    Args:
        entries: where each of ours is.
        tensors: theirs.
        shapes: of ours.
        ignored: regular expression of those of theirs that have no place here (heads, poolers).
        source: for the message.

    Raises:
        ConfigError: lists names that are missing or unexpected, and shapes that differ.
    """
    out: dict[str, Tensor] = {}
    missing, wrong = [], []
    for entry in entries:
        absent = [name for name in entry.theirs if name not in tensors]
        if absent:
            missing += absent
            continue
        for name, tensor in zip(
            entry.ours, entry.read(*(tensors[n] for n in entry.theirs)), strict=True
        ):
            if list(tensor.shape) != list(shapes[name]):
                has = ", ".join(f"{n} {list(tensors[n].shape)}" for n in entry.theirs)
                wrong.append(
                    f"{has} make {name} {list(tensor.shape)}; the configuration says "
                    f"{list(shapes[name])}"
                )
            out[name] = tensor
    used = {name for entry in entries for name in entry.theirs}
    unexpected = [n for n in tensors if n not in used and not re.fullmatch(ignored, n)]
    if missing or unexpected or wrong:
        raise ConfigError(
            f"{source} is not the network that its configuration says"
            + _listed("missing", sorted(set(missing)))
            + _listed("unexpected", unexpected)
            + _listed("other shapes", wrong)
        )
    return out


def write_entries(entries: Sequence[Entry], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights out of ours."""
    out: dict[str, Tensor] = {}
    for entry in entries:
        if not entry.theirs:
            continue
        given = [ours[name] for name in entry.ours]
        parts = entry.write(*given) if entry.write else given[0].chunk(len(entry.theirs))
        out |= dict(zip(entry.theirs, (p.contiguous() for p in parts), strict=True))
    return out


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights by the names of the bare network, where a head was saved together with it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items()}


def _listed(what: str, names: Sequence[str]) -> str:
    """``; what: a, b, ...`` with the first twelve."""
    if not names:
        return ""
    rest = f", and {len(names) - 12} more" if len(names) > 12 else ""
    return f"\n  {what}: {', '.join(names[:12])}{rest}"
