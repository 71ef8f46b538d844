"""Ranks: processes that train one model together, each on its own packs; torchrun starts them.

``torchrun --nproc-per-node N -m uml_fast.train ...`` sets RANK, WORLD_SIZE and LOCAL_RANK; without
them a process is the one rank of one, and everything here is free. Tensors go through gloo on the
CPU and NCCL on CUDA.

When a rank fails, the others notice that it is gone, and end too; the error that came first is the
only one shown.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from uml_fast.config import ConfigError
from uml_fast.runtime.launcher import tell_launcher

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""How long ranks wait for what the first one alone does, such as an evaluation."""
BUCKET_BYTES = 25 << 20
"""Weights copied at a time: large enough for the bandwidth of NVLink."""
_NAMING_S = 30.0
"""Seconds for naming the rank that hangs, before sums with it fail."""
_POLL_S = 0.02
_OF_THE_CONNECTION = re.compile(
    r"gloo|nccl|^Dist\w*Error|connection|by peer|socket|timed? ?out|process group", re.IGNORECASE
)
"""In type and message of the errors with which PyTorch says that a rank cannot be reached: gloo's
are plain RuntimeErrors, as are those of a model that fails."""
_END_S = 20.0
"""Seconds that a rank leaves the one that failed first for closing and showing its error."""


class RanksError(RuntimeError):
    """Other ranks are gone or do not answer."""


class Ranks:
    """This process among those that train together. All of them call the same methods in turn."""

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        store: dist.Store | None = None,
        patient: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.world = rank, world
        self.store = store
        """For threads beside training: a connection of its own to torchrun's store."""
        self._patient = patient

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files, evaluates and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank."""
        if self.world == 1:
            return flag
        value = torch.tensor([float(flag)])
        with talking():
            dist.all_reduce(value)
        return bool(value.item() > 0)

    def from_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, the only one that calls it.

        The others wait as long as it takes, and end if the first rank is gone.
        """
        if self.world == 1:
            return function()
        value = [function() if self.is_first else None]
        with talking():
            dist.broadcast_object_list(
                value, src=0, group=self._patient, device=torch.device("cpu")
            )
        found: T = value[0]  # type: ignore[assignment]
        return found

    def gather(self, value: T) -> list[T]:
        """``value`` of every rank, in their order."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        with talking():
            dist.all_gather_object(found, value)
        return found

    def is_done(self, what: str, parts: int) -> bool:
        """Whether the first ``parts`` ranks have said that they did ``what``."""
        assert self.store is not None
        return self.store.check([f"done {what} {rank}" for rank in range(parts)])

    def done(self, what: str) -> None:
        """Say, from any thread, that this rank did ``what``."""
        assert self.store is not None
        self.store.set(f"done {what} {self.rank}", "")

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` with those of the first rank."""
        if self.world > 1:
            _in_buckets(tensors, lambda flat: dist.broadcast(flat, src=0, async_op=True))

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to overwrite ``tensor`` with its sum over the ranks; returns what waits for it."""
        if self.world == 1:
            return lambda: None
        with talking():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with talking():
                work.wait()

        return wait


ALONE = Ranks()
"""The one rank of a process that trains by itself."""


@contextlib.contextmanager
def join_ranks(device: str, timeout_s: float) -> Iterator[Ranks]:
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
    wait = timedelta(seconds=timeout_s)
    served, rank, world = _meet(wait)
    served.set_timeout(wait)
    start = _agree_on_start(served, rank, world, timeout_s)
    store = dist.PrefixStore(start, served)
    if rank > 0:
        logging.getLogger("uml_fast").setLevel(logging.WARNING)
    try:
        patient = _join(dist.PrefixStore("ranks", store), rank, world, device, wait)
        yield Ranks(rank, world, _own_connection(served, start), patient)
    except (Exception, KeyboardInterrupt):
        if _is_first_error(store, rank):
            raise
        _wait_for_end()
        raise SystemExit(1) from None
    dist.destroy_process_group()


def _join(
    store: dist.Store, rank: int, world: int, device: str, wait: timedelta
) -> dist.ProcessGroup:
    """Make the group through which ranks exchange tensors; returns the patient one beside it."""
    on_cuda = torch.cuda.is_available() and device != "cpu"
    if on_cuda:
        _choose_gpu(device)
    elif device.partition(":")[0] == "cuda":
        raise ConfigError(
            f"device {device!r}: torch sees no CUDA device; uml-fast doctor says why. Train on "
            "CPUs with --device cpu"
        )
    # a step that hangs is named (watch.py) before a sum that waits for it gives up
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store, rank=rank, world_size=world, timeout=wait + timedelta(seconds=_NAMING_S),
    )  # fmt: skip
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of ranks that fail before they have met, the first one says why, once for all.

    What is printed meanwhile is held back until it is known who speaks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # no torchrun, no store to ask
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except BaseException as end:
        is_failure = not isinstance(end, SystemExit) or bool(end.code)
        if not _speaks_early():
            time.sleep(_END_S if is_failure else 0)
            raise SystemExit(int(is_failure)) from None
        print(said.getvalue(), end="", file=sys.stderr if is_failure else sys.stdout, flush=True)
        if isinstance(end, SystemExit) and is_failure:
            words = re.sub(r"-{3,}|[\u2500-\u257f]", " ", said.getvalue()).split()
            tell_launcher(" ".join(words))
        raise


def _speaks_early() -> bool:
    """Whether this rank is the first of its start to ask."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_END_S)
        )
    except RuntimeError:
        return True
    return _is_first_error(dist.PrefixStore(f"early {attempt}", store), int(os.environ["RANK"]))


def _meet(wait: timedelta) -> tuple[dist.Store, int, int]:
    """The store that all ranks share, this rank and their number, as torchrun says it."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"

    def explain(reason: str) -> str:
        return (
            f"no meeting of the ranks at {where} ({reason}). Start them with torchrun; if the port "
            "is in use, name another one (torchrun --master-port)"
        )

    def give_up() -> None:
        print(f"error: {explain('who listens there does not answer')}", file=sys.stderr, flush=True)
        os._exit(1)

    # a store's constructor waits without end for what listens on its port and is no store
    watch = threading.Timer(wait.total_seconds() + _END_S, give_up)
    watch.daemon = True
    watch.start()
    try:
        return next(dist.rendezvous("env://", timeout=wait))
    except (RuntimeError, ValueError) as error:
        raise RanksError(explain(str(error).splitlines()[0])) from error
    finally:
        watch.cancel()


def _agree_on_start(store: dist.Store, rank: int, world: int, timeout_s: float) -> str:
    """A name that only the ranks of this start know; what they keep in the store is under it.

    torchrun keeps its store when it starts ranks again, and with it the addresses of dead ones; the
    count of restarts that it hands out may differ between nodes.
    """
    deadline = time.monotonic() + timeout_s
    own = uuid.uuid4().hex
    store.set(f"hello {rank}", own)
    hellos = [f"hello {r}" for r in range(world)]
    while time.monotonic() < deadline:
        if rank == 0 and store.check(hellos):
            store.set("start", json.dumps([own, *(store.get(h).decode() for h in hellos)]))
        if store.check(["start"]):
            start, *heard = json.loads(store.get("start"))
            if len(heard) == world and heard[rank] == own:
                store.set(f"{start} {rank}", "")
                if rank or store.check([f"{start} {r}" for r in range(world)]):
                    return str(start)
        time.sleep(_POLL_S)
    raise RanksError(f"not all of {world} ranks came within {timeout_s:.0f} s")


def _own_connection(store: dist.Store, start: str) -> dist.Store:
    """The same keys over another connection, so that no thread waits for another's answer."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    own = dist.TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"{start} threads", own)


def _choose_gpu(device: str) -> None:
    if not dist.is_nccl_available():
        raise ConfigError(
            "this PyTorch has no NCCL, through which GPUs exchange gradients; install a CUDA build "
            "(uml-fast doctor), or train on CPUs: --device cpu"
        )
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
    if not dist.is_initialized():
        time.sleep(_END_S)
        return
    with contextlib.suppress(RuntimeError):
        work = dist.all_reduce(torch.zeros(1), async_op=True)
        work.wait(timedelta(seconds=_END_S))


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Turn what a connection to another rank fails with into RanksError; others pass through."""
    try:
        yield
    except RuntimeError as error:
        if not _OF_THE_CONNECTION.search(f"{type(error).__name__}: {error}"):
            raise
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
        with talking():
            running.append((bucket, flat, start(flat)))
    for bucket, flat, work in running:
        with talking():
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
