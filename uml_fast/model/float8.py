"""Products of the blocks in float8, through torchao's training recipe.

The two linear maps around attention are swapped: a third of a block's products. Input, weight and
gradient are each scaled by their own largest value and rounded to float8 for every product; weights
stay fp32. The feed-forward's products stay in bf16: they are halves of fused kernels, whose bias,
activation and dropout happen before the rounding, and torchao's layers would write the wide
activation and read it again three times.
"""

from __future__ import annotations

import torch
from torch import nn

from uml_fast.config import ConfigError, require
from uml_fast.model.blocks import Block

LEAST = (8, 9)
"""Compute capability of the first GPUs with float8 products (Ada; Hopper is 9.0)."""
_MULTIPLE = 16
"""Features of a float8 product come in multiples of this."""


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError unless the device multiplies float8 and the other products are bf16."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    needs = ".".join(map(str, LEAST))
    here = (
        f"this device is {device.type}" if found is None else f"this one has {found[0]}.{found[1]}"
    )
    require(
        found is not None and found >= LEAST,
        f"float8 needs a GPU of compute capability {needs} or more (Ada, Hopper, Blackwell), "
        f"{here}; leave --float8 out",
    )
    require(
        dtype == torch.bfloat16,
        f"float8 goes with bf16, the products are {dtype}; use --precision auto",
    )


def to_float8(model: nn.Module, emulate: bool = False) -> list[str]:
    """Swap the blocks' maps around attention in place; returns the names of those swapped.

    Parameters keep their names and objects. ``emulate``: round as float8 does and multiply in fp32,
    on any device.

    Raises:
        ConfigError: torchao is not installed, or no map of the model can be swapped.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("float8 needs torchao; pip install 'uml-fast[float8]'") from error
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    swapped = []
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        called = ("qkv",) if block.config.layer_scale else ("qkv", "out")
        fitting = [
            part for part in called
            if getattr(block, part).in_features % _MULTIPLE == 0
            and getattr(block, part).out_features % _MULTIPLE == 0
        ]  # fmt: skip
        convert_to_float8_training(
            block, module_filter_fn=lambda _, part, fitting=fitting: part in fitting, config=config
        )
        swapped += [f"{name}.{part}" for part in fitting]
    require(
        bool(swapped),
        "float8 finds no transformer block whose width is a multiple of 16; leave --float8 out",
    )
    return swapped
