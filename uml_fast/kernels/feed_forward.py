from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.rng import check_dropout

Activation = Literal["relu", "gelu"]


def feed_forward_reference(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor, *,
    activation: Activation = "relu", dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> Tensor:  # fmt: skip
    """Plain torch definition; differentiable, any floating dtype."""
    dtype = input.dtype
    up = F.linear(input, weight_up.to(dtype), bias_up.to(dtype))
    hidden = F.relu(up) if activation == "relu" else F.gelu(up)
    if dropout_p > 0:
        hidden = dropout_reference(hidden, dropout_p, rng_key, site)
    return F.linear(hidden, weight_down.to(dtype), bias_down.to(dtype))


def feed_forward(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor, *,
    activation: Activation = "relu", dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> Tensor:  # fmt: skip
    """``down(dropout(activation(up(input))))``; parameters of any floating dtype, computed in the input's."""
    check_dropout("feed_forward", dropout_p, rng_key)
    return feed_forward_reference(
        input, weight_up, bias_up, weight_down, bias_down, activation=activation, dropout_p=dropout_p,
        rng_key=rng_key, site=site,
    )  # fmt: skip
