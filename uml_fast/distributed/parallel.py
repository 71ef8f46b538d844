"""How several ranks hold one model: whole on each (DDP), or in shards (FSDP2, HSDP).

Both are PyTorch's own, around ``Losses``: one module whose forward is a pack's losses. Ranks may
hold packs of other modalities in the same step (policies ``alternate`` and ``warmup``), which
neither takes as it is: FSDP2 then reduces other sets of gradients on each rank, and hangs; DDP
walks the graph in every step (``find_unused_parameters``). So a pack's losses also *touch* what
they do not need: its gradient is zero. What no rank needed is left without a gradient after the
sums, as it is in one process, so neither weight decay nor momentum moves it.

Gradients are summed over ranks, not averaged: ranks weight their losses by their part of the
samples (``training/step.py``). The weights, and what is gathered and summed, stay fp32: matrix
products round them to bf16 where they are used (docs/numerics.md), on one rank as on many.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from uml_fast.config import DistConfig, RunConfig, require
from uml_fast.cost.scaling import STATE_BYTES, WHOLE_PART, stays_gathered
from uml_fast.distributed.exchange import Clock, put_clock
from uml_fast.distributed.ranks import Ranks
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch
from uml_fast.runtime.memory import memory_bytes

Parts = dict[str, Tensor]
LossFunction = Callable[[Uml, PackedBatch, RunConfig, Tensor | None], Parts]


class _Touch(torch.autograd.Function):
    """The first argument; gradients of the others are zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.likes = [(p.shape, p.dtype, p.device) for p in parameters]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(s, dtype=d, device=v) for s, d, v in ctx.likes)


class Losses(nn.Module):
    """A pack's losses as a module: what DDP and FSDP2 are put around."""

    def __init__(self, model: Uml, config: RunConfig, function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.function = function
        self.touches = False
        """Whether parameters that a pack does not need get zeros as gradient."""
        self.clock = Clock()
        """Counts what FSDP's units exchange."""
        self.factor = 1.0
        """What the weighted loss is multiplied with, so that gradients come out as sums."""
        self.in_units = frozenset[str]()
        """Names of the parameters of FSDP's units, of which every pack runs all."""
        self.unused: dict[tuple[Layout, frozenset[str]], frozenset[str]] = {}
        """Names of the trained parameters that a pack does not need, by its layout and what is
        frozen."""
        self._cut: dict[tuple[Layout, frozenset[str]], list[str]] = {}
        """Those of them that its losses do not depend on; networks run on padding are apart."""

    def forward(self, batch: PackedBatch, rng_key: Tensor) -> Parts:
        """The losses of the pack, one fp32 scalar for each modality."""
        parts = self.function(self.model, batch, self.config, rng_key)
        if not self.touches:
            return parts
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        program = batch.layout, self.model.frozen
        if program not in self.unused:
            used = _leaves(parts.values())
            cut = frozenset(n for n, p in trained.items() if id(p) not in used) - self.in_units
            self._cut[program] = sorted(cut)
            idle = set(self.model.encoders) - {region.name for region in batch.layout.regions}
            padded = tuple(f"{p}.{name}." for name in idle for p in ("encoders", "projections"))
            self.unused[program] = cut | {n for n in trained if n.startswith(padded)}
        if touched := [trained[name] for name in self._cut[program]]:
            name, loss = next((n, x) for n, x in parts.items() if x.requires_grad)
            parts = parts | {name: _Touch.apply(loss, *touched)}
        return parts


def _leaves(losses: Any) -> set[int]:
    """``id`` of every leaf that the losses depend on."""
    nodes = [loss.grad_fn for loss in losses]
    seen, found = set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [before for before, _ in node.next_functions]
    return found


def check_groups(config: DistConfig, world: int) -> None:
    """Raise ConfigError where the groups of ``shard_ranks`` do not come out even."""
    require(
        world == 1 or not config.shard_ranks or world % config.shard_ranks == 0,
        f"{world} ranks cannot be divided into groups of dist.shard_ranks {config.shard_ranks}; "
        "start a multiple of them, or use --dist.shard-ranks 0",
    )


def choose(config: DistConfig, model: nn.Module, ranks: Ranks, device: torch.device) -> str:
    """``ddp`` or ``fsdp``; what ``auto`` means for this model on these ranks.

    Raises:
        ConfigError: the groups of ``shard_ranks`` do not come out even.
    """
    if ranks.world == 1:
        return "ddp"
    check_groups(config, ranks.world)
    if config.strategy != "auto":
        return config.strategy
    if config.shard_ranks:
        return "fsdp"
    if device.type != "cuda":
        return "ddp"
    whole = STATE_BYTES * sum(p.numel() for p in model.parameters())
    return "fsdp" if whole > WHOLE_PART * memory_bytes(device) else "ddp"


def distribute(losses: Losses, config: RunConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """Put the strategy around the losses; parameters of the model are DTensors under ``fsdp``.

    Every rank comes with the same weights (``Ranks.copy_first``).

    Raises:
        ConfigError: the strategy and other options do not go together.
    """
    strategy = choose(config.dist, losses.model, ranks, device)
    if ranks.world == 1:
        return losses
    if isinstance(losses, FSDPModule):
        return losses  # it gathers gradients of what is trained when it runs
    losses.touches = True
    if strategy == "ddp":
        losses.factor = float(ranks.world)  # DDP takes the mean
        return _replicated(losses, device)
    model = losses.model
    model.is_sharded = True
    units = model.units()
    inside = {id(p) for unit in units for p in unit.parameters()}
    losses.in_units = frozenset(n for n, p in model.named_parameters() if id(p) in inside)
    mesh = _mesh(config.dist, ranks, device)
    count = sum(p.numel() for p in model.parameters())
    stays = stays_gathered(count, mesh.size(mesh.ndim - 1), memory_bytes(device))
    for unit in units:
        if config.compile:
            # its forward, not its call: FSDP gathers and frees weights in hooks around that
            unit.forward = torch.compile(unit.forward, dynamic=False, fullgraph=True)
        fully_shard(unit, mesh=mesh, reshard_after_forward=not stays)
    # what is outside of the blocks stays gathered until backward: losses read it behind the model
    fully_shard(losses, mesh=mesh, reshard_after_forward=False)
    for module in losses.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
            put_clock(module, losses.clock)
    return losses


def _replicated(losses: Losses, device: torch.device) -> nn.Module:
    with warnings.catch_warnings():
        # its name since torch 2.13 is forward_sync_buffers, which 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            losses,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )


@contextlib.contextmanager
def summing(losses: nn.Module, is_last: bool) -> Iterator[None]:
    """Forward and backward of one pack of a step; gradients are summed over ranks in the last."""
    if isinstance(losses, FSDPModule):
        losses.set_requires_gradient_sync(is_last)
        losses.set_is_last_backward(is_last)
    with (
        losses.no_sync()
        if isinstance(losses, DistributedDataParallel) and not is_last
        else contextlib.nullcontext()
    ):
        yield


def parts_of(config: DistConfig, strategy: str, world: int) -> int:
    """Parts into which ``strategy`` (of ``choose``) cuts weights, gradients and moments."""
    return (config.shard_ranks or world) if strategy == "fsdp" else 1


def _mesh(config: DistConfig, ranks: Ranks, device: torch.device) -> DeviceMesh:
    size = parts_of(config, "fsdp", ranks.world)
    if size == ranks.world:
        return init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (ranks.world // size, size), mesh_dim_names=("replicate", "shard")
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor: DTensor) -> tuple[int, int]:
    """First row and number of rows of a tensor that this rank holds (FSDP2 cuts rows evenly)."""
    mesh = tensor.device_mesh
    each = -(-len(tensor) // mesh.size(mesh.ndim - 1))
    first = min(mesh.get_local_rank(mesh.ndim - 1) * each, len(tensor))
    return first, len(tensor.to_local())


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """``value``, this rank's rows, as a tensor that is shared as ``tensor`` is; else as it is."""
    if not isinstance(tensor, DTensor):
        return value
    return DTensor.from_local(
        value.to(tensor.device), tensor.device_mesh, tensor.placements,
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with all their rows; all ranks call it."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their norm is at most ``max_norm``; returns () the norm before.

    The norm is that of all shards; the same bits on every rank.
    """
    trained = [p for p in parameters if p.grad is not None]
    sharded = [p.grad for p in trained if isinstance(p.grad, DTensor)]
    if not sharded:
        return torch.nn.utils.clip_grad_norm_(trained, max_norm).detach()
    shards = [g.to_local() for g in sharded]
    square = torch.nn.utils.get_total_norm(shards).square()
    dist.all_reduce(square, group=sharded[0].device_mesh.get_group("shard"))
    norm = square.sqrt()
    torch._foreach_mul_(shards, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm
