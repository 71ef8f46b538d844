"""Ranks: processes that train one model together, each on its own packs; torchrun starts them.

``torchrun --nproc-per-node N -m uml_fast.train ...`` sets RANK, WORLD_SIZE and LOCAL_RANK; without
them a process is the one rank of one, and everything here is free. Tensors go through gloo on the
CPU and NCCL on CUDA.

Gradients are summed in buckets of our own, not by DistributedDataParallel: under ``alternate`` and
``warmup`` ranks may hold packs of other modalities in the same step, for which DDP walks the graph
in every step, and what no rank has a gradient of must stay without one.

When a rank fails, the others notice that it is gone, and end too; the error that came first is the
only one shown.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uml_fast.config import ConfigError

T = TypeVar("T")

TIMEOUT_S = 1800.0
"""Seconds that a rank waits for the others; the longest wait is for the first rank's evaluation."""
BUCKET_BYTES = 25 << 20
"""Gradients summed at a time: DDP's size, large enough for the bandwidth of NVLink."""
_END_S = 20.0
"""Seconds that a rank leaves the one that failed first for closing and showing its error."""


class RanksError(RuntimeError):
    """Other ranks are gone or do not answer."""


class Ranks:
    """This process among those that train together. All of them call the same methods in turn."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files, evaluates and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)])
        with _talking():
            dist.all_reduce(value)
        return bool(value.item() > 0)

    def from_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, the only one that calls it."""
        if self.world == 1:
            return function()
        value = [function() if self.is_first else None]
        with _talking():
            dist.broadcast_object_list(value, src=0, device=torch.device("cpu"))
        found: T = value[0]  # type: ignore[assignment]
        return found

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in their order."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        with _talking():
            dist.all_gather_object(found, value)
        return found

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` with those of the first rank."""
        if self.world > 1:
            _in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0, async_op=True))

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` with their sums over the ranks; the same bits on every rank."""
        if self.world > 1:
            _in_buckets(tensors, lambda flat: dist.all_reduce(flat, async_op=True))


ALONE = Ranks()
"""The one rank of a process that trains by itself."""


@contextlib.contextmanager
def join_ranks(device: str, timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """The ranks that torchrun started, for as long as the context lasts; ``ALONE`` without it.

    ``device`` is that of the configuration: each rank gets the GPU of its local number, unless it
    is ``cpu``. An error on one rank ends all: the first is raised, the others exit with status 1.

    Raises:
        ConfigError: there are fewer GPUs than ranks on this machine, or ``device`` names one GPU.
        RanksError: another rank was killed, or nothing was heard of it for ``timeout_s``.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        _choose_gpu(device)
    wait = timedelta(seconds=timeout_s)
    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    store.set_timeout(wait)
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    shared = dist.PrefixStore("ranks", store)
    dist.init_process_group(backend, store=shared, rank=rank, world_size=world, timeout=wait)
    if rank > 0:
        logging.getLogger("uml_fast").setLevel(logging.WARNING)
    try:
        yield Ranks(rank, world)
    except (Exception, KeyboardInterrupt):
        if _is_first_error(store, rank):
            raise
        _wait_for_end()
        raise SystemExit(1) from None
    dist.destroy_process_group()


def _choose_gpu(device: str) -> None:
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device not in ("auto", "cuda"):
        raise ConfigError(f"device {device!r} is one GPU, each rank takes its own: --device cuda")
    if local >= count:
        raise ConfigError(
            f"rank {local} of this machine has no GPU, torch sees {count}; start {count} processes "
            "(torchrun --nproc-per-node), or use --device cpu"
        )
    torch.cuda.set_device(local)


def _is_first_error(store: dist.Store, rank: int) -> bool:
    """Whether no other rank failed before; a rank whose store is gone speaks for itself."""
    try:
        return store.compare_set("first error", "", str(rank)) == str(rank).encode()
    except RuntimeError:
        return True


def _wait_for_end() -> None:
    """Wait until the rank that failed first is gone: torchrun ends all when one does."""
    with contextlib.suppress(RuntimeError):
        work = dist.all_reduce(torch.zeros(1), async_op=True)
        work.wait(timedelta(seconds=_END_S))


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RanksError(
            f"another rank is gone or does not answer ({str(error).splitlines()[0]}). If nothing "
            "else is said above, it was killed: look for a lack of memory; the same command "
            "continues from the last checkpoint"
        ) from error


def _in_buckets(tensors: Sequence[Tensor], start: Callable[[Tensor], dist.Work]) -> None:
    """Pass flat copies of ``tensors`` to ``start``, many at a time, and write the results back."""
    running = []
    for bucket in _buckets(tensors):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        with _talking():
            running.append((bucket, flat, start(flat)))
    for bucket, flat, work in running:
        with _talking():
            work.wait()
        parts = flat.split([t.numel() for t in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, cut where the dtype changes or ``BUCKET_BYTES`` are reached."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size >= BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel() * tensor.element_size()
    if bucket:
        yield bucket
