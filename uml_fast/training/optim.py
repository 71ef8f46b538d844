"""Optimiser, learning-rate schedule, averaged weights, and the optimiser's state by name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from uml_fast.config import OptimConfig
from uml_fast.distributed.parallel import like, local
from uml_fast.distributed.ranks import ALONE, Ranks

RELEASED_FIRST_RATE = 1e-5
"""Learning rate of step 0 in the authors' code, whatever the rate of the others."""


def build_optimizer(
    model: nn.Module, config: OptimConfig, ranks: Ranks = ALONE
) -> torch.optim.Optimizer:
    """Adam or AdamW, fused; matrices decay, vectors and position tables do not.

    In one process the learning rate is a tensor, so that a CUDA graph reads it anew in each step
    (fp32 there, as the kernel takes it; on a CPU fp64, the same bits as a float).
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("position")
        (decayed if is_matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    lr: float | Tensor = config.lr
    if ranks.world == 1:
        device = next(model.parameters()).device
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        lr = torch.tensor(config.lr, dtype=dtype, device=device)
    return kind([g for g in groups if g["params"]], lr=lr, betas=config.betas, fused=True)


def update(optimizer: torch.optim.Optimizer) -> None:
    """Move the weights by their gradients, which are dropped."""
    # Adam asks for the flag where it is captured and warns of it elsewhere; fused, it does the same
    is_capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    for group in optimizer.param_groups:
        group["capturable"] = is_capturing
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give the optimiser the learning rate of a step, without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of step ``step`` (0-based) of ``steps``: linear warm-up, then the schedule."""
    if config.schedule == "release":
        return _released_rate(step, steps, config)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def short_warmup(steps: int, config: OptimConfig) -> str | None:
    """What to say where the run ends before the learning rate is reached; None where it is."""
    if steps > config.warmup_steps:
        return None
    highest = learning_rate(steps - 1, steps, config)
    return (
        f"the warm-up takes {config.warmup_steps:,} steps (--optim.warmup-steps), the run has "
        f"{steps:,}: its learning rate rises to {highest:.2g} and never reaches {config.lr:g}"
    )


def _released_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The authors' schedule (PAPER 1.4), which falls behind step 0 where lr <= 5e-4."""
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps if step else RELEASED_FIRST_RATE
    done = (step - config.warmup_steps) / steps
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """Moving average of a model's weights: a step moves it by ``1 - decay`` of what it is off.

    It starts at the weights that training starts from.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self.tensors = {name: p.detach().clone() for name, p in self._weights.items()}
        """The average of each parameter, shared among ranks as that is."""

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after a step."""
        averages = [local(t) for t in self.tensors.values()]
        weights = [local(p) for p in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from saved averages; of shared ones ``tensors`` has this rank's rows."""
        for name, value in tensors.items():
            local(self.tensors[name]).copy_(local(value))


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as ``<parameter>/<key>`` tensors."""
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            out[f"{name}/{key}"] = value
    return out


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``; of shared parameters ``tensors`` has this rank's rows."""
    by_name = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = by_name[name]
        copied = value.to(parameter.device, copy=True)
        optimizer.state[parameter][key] = like(parameter, copied) if value.ndim else copied
