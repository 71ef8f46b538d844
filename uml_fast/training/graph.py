"""A step as one CUDA graph: captured once for each program, then launched whole.

A program is what fixes a step's kernels: the layouts of its packs and what is frozen. Its first
steps run kernel by kernel, so that what is made once (state of the optimiser, compiled kernels,
workspaces of libraries) is there when the next one is captured. What changes from step to step is
in tensors that stay where they are: packs are copied into the program's own; learning rate and
dropout keys are filled in by ``training/step.py``. Everything but ``capture`` runs on any device.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from uml_fast.config import RunConfig, require
from uml_fast.distributed.ranks import Ranks
from uml_fast.packing.pack import Layout, PackedBatch

logger = logging.getLogger("uml_fast")

WARM_STEPS = 3
"""Steps of a program before it is captured: what PyTorch advises for autograd and cuBLAS."""
MOST_PROGRAMS = 8
"""Programs held as graphs. Each keeps packs of its own, and K packs a step with L layouts in turn
make up to L^K of them; steps of the others run kernel by kernel."""


class Result(Protocol):
    """What a step leaves in tensors."""

    def copied(self: R) -> R:
        """The same in memory of its own."""
        ...


R = TypeVar("R", bound=Result)
Packs = Sequence[PackedBatch]
Program = tuple[tuple[Layout, ...], frozenset[str]]
"""Layouts of a step's packs, and names of the frozen networks."""


def is_wanted(config: RunConfig, ranks: Ranks, device: torch.device) -> bool:
    """Whether steps are to be captured.

    Raises:
        ConfigError: ``cuda_graph`` is ``on`` where that cannot be.
    """
    reason = None
    if device.type != "cuda":
        reason = f"steps on {device.type} are no CUDA graphs"
    elif ranks.world > 1:
        reason = "sums over ranks are not captured"
    elif config.compat != "none":
        reason = "compat 'release' pads each batch on the host"
    require(
        config.cuda_graph != "on" or reason is None,
        f"cuda_graph is 'on', but {reason}; leave it at auto",
    )
    return config.cuda_graph != "off" and reason is None


class Replays(Generic[R]):
    """Calls a step's function, or replays what it did.

    Args:
        function: one step on given packs, the same kernels every time; never waits for the device.
        reset: drops what a part of a step leaves, its gradients, where one was not captured whole.
        device: where it runs.
        must: whether a step that cannot be captured is an error; else training goes on without.
    """

    def __init__(
        self,
        function: Callable[[Packs], R],
        reset: Callable[[], None],
        device: torch.device,
        must: bool,
    ) -> None:
        self._function, self._reset, self._must = function, reset, must
        # programs warm up and are captured on one stream: each has a memory cache of its own
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._calls: dict[Program, int] = {}
        self._captured: dict[Program, tuple[Packs, Callable[[], R]]] = {}
        # programs replay one behind the other, and results are copied: they share memory
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._frozen = frozenset[str]()
        self._is_off = self._is_full = False

    def __call__(self, packs: Packs, frozen: frozenset[str]) -> R:
        """One step on ``packs`` while the networks named by ``frozen`` stay as they are.

        Raises:
            RuntimeError: the step cannot be captured, and must be.
        """
        if frozen != self._frozen:
            # what was frozen before does not come back: its graphs' memory goes
            self._frozen = frozen
            self._captured.clear()
        program = tuple(pack.layout for pack in packs), frozen
        calls = self._calls[program] = self._calls.get(program, 0) + 1
        if self._is_off:
            return self._function(packs)
        if calls <= WARM_STEPS or not self._has_room(program):
            with _on(self._stream):
                return self._function(packs)
        if program not in self._captured and not self._capture(program, packs):
            return self._function(packs)
        own, replay = self._captured[program]
        for mine, given in zip(own, packs, strict=True):
            mine.copy_(given)
        return replay().copied()

    def _has_room(self, program: Program) -> bool:
        """Whether a program is captured, or can be; says once where it cannot."""
        if program in self._captured or len(self._captured) < MOST_PROGRAMS:
            return True
        if not self._is_full:
            logger.warning(
                "steps have more than %d combinations of packs: those beyond run without a CUDA "
                "graph (a lower --optim.accumulate makes fewer)", MOST_PROGRAMS,
            )  # fmt: skip
        self._is_full = True
        return False

    def _capture(self, program: Program, packs: Packs) -> bool:
        """Capture a program; False: it failed, and nothing will be captured any more."""
        own = tuple(pack.clone() for pack in packs)
        try:
            self._captured[program] = (
                own,
                capture(lambda: self._function(own), self._stream, self._pool),
            )
        except RuntimeError as error:
            if self._must:
                raise
            reason = str(error).splitlines()[0]
            logger.warning("no CUDA graph of the step (%s); training goes on without", reason)
            self._reset()
            self._captured.clear()
            self._is_off = True
        return not self._is_off


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run kernels on a stream, behind those of the current one, which then waits for them."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def capture(function: Callable[[], R], stream: Any, pool: Any) -> Callable[[], R]:
    """What replays the kernels of ``function`` and returns its result, in the same memory always.

    Nothing runs before the first replay. Graphs of one ``pool``, captured on one ``stream``, share
    memory, results apart.

    Raises:
        RuntimeError: something in ``function`` cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # the outer stream comes back also where the capture fails; other threads upload meanwhile,
    # which the mode "global" takes for an error
    with (
        torch.cuda.stream(torch.cuda.current_stream(stream.device)),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        result = function()

    def replay() -> R:
        graph.replay()
        return result

    return replay
