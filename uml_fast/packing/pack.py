"""The packed batch: ragged segments of several modalities in T rows, no padding between them.

Every modality is a ragged array of fixed-size *rows*, and one row becomes one token: an image patch
(uint8), a hop of samples (int16), a token id (int32), a feature vector (float32). A pack is a fixed
sequence of *regions*, one per modality; a region has a fixed number of rows and of segment slots,
so every shape of a run is fixed, stems write static slices, and nothing recompiles.

Legend: T rows of a pack, S segment slots, C rows of a region, E elements of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PADDING = -1
"""Value of ``modality_S`` for slots that hold no sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """The rows and slots of one modality in a pack."""

    name: str
    """Modality."""
    rows: int
    """Rows C of the region."""
    slots: int
    """Segment slots of the region."""
    row_elems: int
    """Elements E of one raw row."""
    dtype: str
    """numpy name of the raw element type."""
    max_len: int
    """Longest segment in rows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The fixed shape of a pack: its regions in order."""

    regions: tuple[Region, ...]

    @property
    def rows(self) -> int:
        """T, the rows of a pack."""
        return sum(r.rows for r in self.regions)

    @property
    def slots(self) -> int:
        """S, the segment slots of a pack."""
        return sum(r.slots for r in self.regions)

    @property
    def max_len(self) -> int:
        """Longest segment in rows."""
        return max(r.max_len for r in self.regions)

    def row_slice(self, index: int) -> slice:
        """Rows of region ``index``."""
        start = sum(r.rows for r in self.regions[:index])
        return slice(start, start + self.regions[index].rows)

    def slot_slice(self, index: int) -> slice:
        """Segment slots of region ``index``."""
        start = sum(r.slots for r in self.regions[:index])
        return slice(start, start + self.regions[index].slots)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One pack on a device.

    Segments of a region come first; rows behind them up to the region's end are covered by padding
    segments of at most ``max_len`` rows, and slots left over are empty segments at the region's
    end. So offsets never decrease, start at 0, end at T, and cover every row once.
    """

    layout: Layout
    raw: tuple[Tensor, ...]
    """Per region (C, E) raw rows; rows of padding are zero."""
    offsets_S1: Tensor
    """int32 (S + 1,) first row of each segment, then T."""
    modality_S: Tensor
    """int32 (S,) region index of each segment, PADDING for padding and empty slots."""
    label_S: Tensor
    """int32 (S,) class of each segment, -1 where there is none."""
    sample_S: Tensor
    """int64 (S,) index of the sample in its source, -1 for padding."""
    position_T: Tensor
    """int32 (T,) position of each row in its segment."""
    segment_T: Tensor
    """int32 (T,) segment slot of each row."""

    @property
    def max_len(self) -> int:
        """Longest segment in rows, a Python int that is the same for every pack of the layout."""
        return self.layout.max_len

    def to(self, device: torch.device, non_blocking: bool = True) -> PackedBatch:
        """The same pack on ``device``."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def clone(self) -> PackedBatch:
        """The same pack in memory of its own."""
        return self._each(torch.clone)

    def copy_(self, other: PackedBatch) -> None:
        """Take over the contents of a pack of the same layout."""
        for own, given in zip(self._tensors(), other._tensors(), strict=True):
            own.copy_(given, non_blocking=True)

    def _tensors(self) -> tuple[Tensor, ...]:
        return (
            *self.raw, self.offsets_S1, self.modality_S, self.label_S, self.sample_S,
            self.position_T, self.segment_T,
        )  # fmt: skip

    def _each(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        made = [function(t) for t in self._tensors()]
        return PackedBatch(self.layout, tuple(made[: len(self.raw)]), *made[len(self.raw) :])

    def valid_T(self) -> Tensor:
        """bool (T,) True for rows of samples, False for padding."""
        return self.modality_S[self.segment_T.long()] != PADDING

    def alone(self, index: int) -> PackedBatch:
        """Region ``index`` as a pack of its own, counted from 0."""
        rows, slots = self.layout.row_slice(index), self.layout.slot_slice(index)
        return PackedBatch(
            Layout((self.layout.regions[index],)), (self.raw[index],),
            self.offsets_S1[slots.start : slots.stop + 1] - rows.start,
            self.modality_S[slots].clamp(max=0), self.label_S[slots], self.sample_S[slots],
            self.position_T[rows], self.segment_T[rows] - slots.start,
        )  # fmt: skip

    def padding(self) -> PackedBatch:
        """A pack of one row of padding on the same device; it has no raw rows."""
        region = dataclasses.replace(self.layout.regions[0], rows=1, slots=1, max_len=1)
        zero = torch.zeros_like(self.modality_S[:1])
        return PackedBatch(
            Layout((region,)), (), torch.arange(2, dtype=zero.dtype, device=zero.device),
            zero + PADDING, zero - 1, zero.long() - 1, zero, zero,
        )  # fmt: skip

    def reshaped(self, pooled: Container[int] = (), led: Container[int] = ()) -> PackedBatch:
        """The pack with other rows in some of its regions; it has no raw rows.

        Args:
            pooled: regions that have one row for each slot.
            led: regions that have one row more in front of each slot (class token), which then is
                position 0.
        """
        regions, offsets, position, segment = [], [], [], []
        start = 0
        for i, region in enumerate(self.layout.regions):
            rows, slots = self.layout.row_slice(i), self.layout.slot_slice(i)
            own = torch.arange(
                region.slots, dtype=self.offsets_S1.dtype, device=self.offsets_S1.device
            )
            if i in pooled:
                regions.append(dataclasses.replace(region, rows=region.slots, max_len=1))
                offsets.append(own + start)
                position.append(torch.zeros_like(own))
                segment.append(own + slots.start)
            elif i in led:
                count, longest = region.rows + region.slots, region.max_len + 1
                regions.append(dataclasses.replace(region, rows=count, max_len=longest))
                at_C, first_S = self.alone(i).led_rows()
                offsets.append(first_S + start)
                zeros = own.new_zeros(count)
                position.append(zeros.index_copy(0, at_C, self.position_T[rows] + 1))
                segment.append(
                    zeros.index_copy(0, at_C, self.segment_T[rows])
                    .index_copy(0, first_S.long(), own + slots.start)
                )  # fmt: skip
            else:
                regions.append(region)
                offsets.append(self.offsets_S1[slots] + (start - rows.start))
                position.append(self.position_T[rows])
                segment.append(self.segment_T[rows])
            start += regions[-1].rows
        offsets.append(torch.full_like(self.offsets_S1[:1], start))
        return PackedBatch(
            Layout(tuple(regions)), (), torch.cat(offsets), self.modality_S, self.label_S,
            self.sample_S, torch.cat(position), torch.cat(segment),
        )  # fmt: skip

    def led_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of a pack that has one more in front of each slot.

        Returns:
            int64 (T,) where each row of this pack is there, and int32 (S,) the rows in front.
        """
        slots = torch.arange(len(self.modality_S), device=self.offsets_S1.device)
        rows = torch.arange(len(self.segment_T), device=self.offsets_S1.device)
        return rows + self.segment_T + 1, self.offsets_S1[:-1] + slots.int()

    def region(self, index: int) -> RegionRows:
        """The rows of region ``index``, as its stem and its loss see them."""
        rows, slots = self.layout.row_slice(index), self.layout.slot_slice(index)
        segment = self.segment_T[rows]
        valid = self.modality_S[segment.long()] != PADDING
        return RegionRows(self.raw[index], self.position_T[rows], segment, valid, rows, slots)


@dataclass(frozen=True, slots=True)
class RegionRows:
    """The rows of one region: static slices of a pack."""

    raw: Tensor
    """(C, E) raw rows."""
    position_C: Tensor
    """int32 (C,) position of each row in its segment."""
    segment_C: Tensor
    """int32 (C,) segment slot of each row."""
    valid_C: Tensor
    """bool (C,) False for padding."""
    rows: slice
    """Rows of the pack."""
    slots: slice
    """Segment slots of the pack."""

    def continues_C(self) -> Tensor:
        """bool (C,) True where the next row belongs to the same sample."""
        same = self.segment_C[1:] == self.segment_C[:-1]
        return torch.cat((same & self.valid_C[:-1], same.new_zeros(1)))


def padding_slots(rows: int, max_len: int) -> int:
    """Segment slots that ``rows`` rows of padding need."""
    return -(-rows // max_len)


def pack_samples(
    layout: Layout,
    samples: Mapping[str, Sequence[np.ndarray]],
    labels: Mapping[str, Sequence[int]] | None = None,
) -> PackedBatch:
    """Pack given samples in their order; the readable definition of what the native assembler does.

    Args:
        layout: shape of the pack.
        samples: per modality the samples, each (rows, E) of the region's dtype.
        labels: per modality one class per sample; -1 where absent.

    Raises:
        ValueError: a sample is empty, longer than ``max_len`` or of another row size or dtype, or
            the samples of a modality do not fit its region.
    """
    S, T = layout.slots, layout.rows
    offsets = np.zeros(S + 1, np.int32)
    modality = np.full(S, PADDING, np.int32)
    label = np.full(S, -1, np.int32)
    sample = np.full(S, -1, np.int64)
    position = np.zeros(T, np.int32)
    segment = np.zeros(T, np.int32)
    raw = []
    row, slot = 0, 0
    for m, region in enumerate(layout.regions):
        rows = np.zeros((region.rows, region.row_elems), region.dtype)
        end_row, end_slot = row + region.rows, slot + region.slots
        start_row = row
        given = samples.get(region.name, ())
        for i, x in enumerate(given):
            n = len(x)
            if x.shape[1:] != (region.row_elems,) or x.dtype != rows.dtype:
                raise ValueError(
                    f"{region.name} sample {i} is {x.dtype}{list(x.shape)}; "
                    f"its region takes {region.dtype}[rows, {region.row_elems}]"
                )
            if not 1 <= n <= region.max_len:
                raise ValueError(
                    f"{region.name} sample {i} has {n} rows; 1..{region.max_len} are allowed"
                )
            rest = end_row - row - n
            if rest < 0 or slot + 1 + padding_slots(rest, region.max_len) > end_slot:
                raise ValueError(
                    f"{region.name}: {len(given)} samples do not fit a region of {region.rows} "
                    f"rows and {region.slots} slots"
                )
            rows[row - start_row : row - start_row + n] = x
            offsets[slot], modality[slot], sample[slot] = row, m, i
            label[slot] = labels[region.name][i] if labels and region.name in labels else -1
            position[row : row + n] = np.arange(n)
            segment[row : row + n] = slot
            row, slot = row + n, slot + 1
        while row < end_row:
            n = min(region.max_len, end_row - row)
            offsets[slot] = row
            position[row : row + n] = np.arange(n)
            segment[row : row + n] = slot
            row, slot = row + n, slot + 1
        offsets[slot:end_slot] = end_row
        slot = end_slot
        raw.append(torch.from_numpy(rows))
    offsets[S] = T
    as_tensors = [
        torch.from_numpy(a) for a in (offsets, modality, label, sample, position, segment)
    ]
    return PackedBatch(layout, tuple(raw), *as_tensors)


def unpack_samples(batch: PackedBatch) -> dict[str, list[np.ndarray]]:
    """The samples of a pack per modality, in packed order; the inverse of ``pack_samples``."""
    offsets = batch.offsets_S1.tolist()
    modality = batch.modality_S.tolist()
    out: dict[str, list[np.ndarray]] = {r.name: [] for r in batch.layout.regions}
    for m, region in enumerate(batch.layout.regions):
        first = batch.layout.row_slice(m).start
        slots = batch.layout.slot_slice(m)
        rows = batch.raw[m].numpy()
        for s in range(slots.start, slots.stop):
            if modality[s] != PADDING:
                out[region.name].append(rows[offsets[s] - first : offsets[s + 1] - first])
    return out
