"""Feed-forward block: ``out = dropout(activation(input up^T + bias_up)) down^T + bias_down``.

Legend: T rows, K width of the stream, N hidden width, P columns of the up product: N, or 2 N for
swiglu, whose ``hidden = silu(gate) * value`` takes its gates from the first N rows of the up weight
and its values from the last N.

Products take and give the working dtype and accumulate in fp32; bias, activation and dropout are
fp32 between product and rounding. FLOPs: 2 T K (P + N) forward, twice that backward. The wide
activation crosses memory once in each direction: forward writes hidden (T, N), backward writes the
gradient of the product (T, P), and what a product needs of them it reads.

Saved for backward: hidden, which the gradient of the down weight needs; the mask is drawn again.
For relu that is all, since hidden > 0 says active and kept at once. gelu and swiglu save the
product (T, P) too. To recompute it instead would save writing and reading it, 4 P bytes a row in
bf16, for 2 K P operations. At 4.3 TB/s and 790 TFLOP/s (H200) they cost the same at K = 367, and
nearer 300 at the rate of a fused kernel, which would also hold two products at once. gelu and
swiglu serve ViTs, K = 192 to 1024: recomputing would gain 0.5 ps of the 6 ps of an element at 192
and lose everywhere else, so it is not done.

Parameters may have another dtype than the input (fp32 masters): the weights are cast once, the cast
serves the backward pass too, and gradients come back in the masters' dtype, on a CPU with matrix
tiles without a rounding to bf16 between.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating, check_same, check_shape
from uml_fast.kernels.dropout import dropout_reference
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.rng import check_dropout
from uml_fast.kernels.spec import KernelSpec, Pair, Shape

NAME = "feed_forward"

Activation = Literal["relu", "gelu", "swiglu", "gelu_tanh", "quick_gelu"]
"""gelu in its exact form; swiglu is gated, its up weight has twice the rows; gelu_tanh (GPT-2) and
quick_gelu ``x sigmoid(1.702 x)`` (CLIP) are approximations of gelu, and run as plain torch."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

FUSED = ("relu", "gelu", "swiglu")
"""Activations that the kernels have."""

_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

_LOG = logging.getLogger("uml_fast")


@functools.cache
def _say_unfused(activation: str) -> None:
    """Say once that an activation has no kernel."""
    _LOG.info("%s: %s has no kernel; the block runs as plain torch", NAME, activation)


def up_width(hidden: int, activation: str) -> int:
    """Columns of the up product, for a hidden layer of so many."""
    return 2 * hidden if activation == "swiglu" else hidden


def feed_forward_reference(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor, *,
    activation: str = "relu", dropout_p: float = 0.0, rng_key: Tensor | None = None, site: int = 0,
) -> Tensor:  # fmt: skip
    """Plain torch definition; differentiable, any floating dtype."""
    dtype = input.dtype
    up = F.linear(input, weight_up.to(dtype), bias_up.to(dtype))
    if activation == "swiglu":
        gate, value = up.chunk(2, 1)
        hidden = F.silu(gate) * value
    else:
        hidden = _ELEMENTWISE[activation](up)
    if rng_key is not None and dropout_p > 0:
        hidden = dropout_reference(hidden, dropout_p, rng_key, site)
    return F.linear(hidden, weight_down.to(dtype), bias_down.to(dtype))


def _fwd(
    choice: Choice, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
    bias_down: Tensor, activation: str, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(out, hidden, product or empty), and casts of weights that had another dtype than the input.

    Those come as masters to "native" alone, which gives them gradients of their own dtype.
    """
    if weight_up.dtype != input.dtype or weight_down.dtype != input.dtype:
        up, down = weight_up.to(input.dtype, copy=True), weight_down.to(input.dtype, copy=True)
        rest = (activation, dropout_p, rng_key, site)
        return *_fwd(choice, input, up, bias_up, down, bias_down, *rest), up, down
    if choice != "reference":
        outputs: tuple[Tensor, Tensor, Tensor] = implementation(NAME, choice).fwd(
            input, weight_up, bias_up, weight_down, bias_down, activation, dropout_p, rng_key, site
        )
        return outputs
    out = feed_forward_reference(
        input, weight_up, bias_up, weight_down, bias_down, activation=activation,
        dropout_p=dropout_p, rng_key=rng_key, site=site,
    )  # fmt: skip
    hidden = input.new_zeros(len(input), weight_down.shape[1])
    width = 0 if activation == "relu" else len(weight_up)
    return out, hidden, input.new_zeros((len(input), width) if width else 0)


def _bwd(
    choice: Choice, grad_out: Tensor, input: Tensor, weight_up: Tensor, bias_up: Tensor,
    weight_down: Tensor, bias_down: Tensor, hidden: Tensor, product: Tensor, activation: str,
    dropout_p: float, rng_key: Tensor | None, site: int, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight_up, bias_up, weight_down and bias_down.

    ``trains`` False: weights and biases are frozen, and what stands for their gradients is empty.
    """
    if choice != "reference":
        a, b, c, d, e = implementation(NAME, choice).bwd(
            grad_out.contiguous(), input, weight_up, bias_up, weight_down, hidden, product,
            activation, dropout_p, rng_key, site, trains,
        )  # fmt: skip
        return a, b, c.to(bias_up.dtype), d, e.to(bias_down.dtype)
    reference = functools.partial(
        feed_forward_reference, activation=activation, dropout_p=dropout_p, rng_key=rng_key,
        site=site,
    )  # fmt: skip
    pull = torch.func.vjp(reference, input, weight_up, bias_up, weight_down, bias_down)[1]
    a, b, c, d, e = pull(grad_out)
    return a, b, c, d, e


@torch.library.custom_op("uml_fast::feed_forward_fwd", mutates_args=())
def _fwd_op(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor,
    activation: str, dropout_p: float, rng_key: Tensor | None, site: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, hidden, product = _fwd(
        choose(NAME, "auto", input), input, weight_up, bias_up, weight_down, bias_down, activation,
        dropout_p, rng_key, site,
    )  # fmt: skip
    return out, hidden, product


@_fwd_op.register_fake
def _(input, weight_up, bias_up, weight_down, bias_down, activation, dropout_p, rng_key, site):
    rows = input.shape[0]
    hidden = input.new_empty(rows, weight_down.shape[1])
    saved = (0,) if activation == "relu" else (rows, weight_up.shape[0])
    return input.new_empty(rows, weight_down.shape[0]), hidden, input.new_empty(saved)


@torch.library.custom_op("uml_fast::feed_forward_bwd", mutates_args=())
def _bwd_op(
    grad_out: Tensor, input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor,
    bias_down: Tensor, hidden: Tensor, product: Tensor, activation: str, dropout_p: float,
    rng_key: Tensor | None, site: int, trains: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    a, b, c, d, e = _bwd(
        choose(NAME, "auto", input), grad_out, input, weight_up, bias_up, weight_down, bias_down,
        hidden, product, activation, dropout_p, rng_key, site, trains,
    )  # fmt: skip
    return a, b.to(weight_up.dtype), c, d.to(weight_down.dtype), e


@_bwd_op.register_fake
def _(grad_out, input, weight_up, bias_up, weight_down, bias_down, *rest):
    trains = rest[-1]
    weights = (weight_up, bias_up, weight_down, bias_down)
    of_weights = (t.new_empty(t.shape if trains else 0) for t in weights)
    return input.new_empty(input.shape), *of_weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, up, bias_up, down, bias_down, activation, dropout_p, rng_key, site = inputs
    _, hidden, product, *casts = output
    if casts:
        up, down = casts
    ctx.save_for_backward(input, up, bias_up, down, bias_down, hidden, product, rng_key)
    ctx.options = (activation, dropout_p)
    ctx.site = site
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    *saved, rng_key = ctx.saved_tensors
    trains = any(ctx.needs_input_grad[-8:-4])
    arguments: tuple[Any, ...] = (grad_out, *saved, *ctx.options, rng_key, ctx.site, trains)
    grad, *of_weights = _bwd(ctx.choice, *arguments) if ctx.choice else _bwd_op(*arguments)
    return grad, *(of_weights if trains else [None] * 4), *[None] * 4


_apply = differentiable("FeedForward", _fwd, _fwd_op, _setup, _backward)


def feed_forward(
    input: Tensor, weight_up: Tensor, bias_up: Tensor, weight_down: Tensor, bias_down: Tensor, *,
    activation: Activation = "relu", dropout_p: float = 0.0, rng_key: Tensor | None = None,
    site: int = 0, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """The feed-forward block of a transformer.

    Args:
        input: (T, K) contiguous, fp32 or bf16; its dtype is that of the products and of the output.
        weight_up, bias_up: (N, K) and (N,), for swiglu (2 N, K) and (2 N,): the gates, then the
            values. Contiguous, any floating dtype.
        weight_down, bias_down: (K', N) and (K',), contiguous, any floating dtype.
        activation: one of ``Activation``.
        dropout_p: probability of dropping an element of the hidden tensor, with ``rng_key`` int64
            (1,) and ``site``.
        backend: for tests.

    Returns:
        (T, K').

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit, an unknown activation.
    """
    check_dropout(NAME, dropout_p, rng_key)
    parameters = {"weight_up": weight_up, "bias_up": bias_up, "weight_down": weight_down,
                  "bias_down": bias_down}  # fmt: skip
    check_floating(NAME, input=input, **parameters)
    check_same(NAME, "device", input=input, **parameters)
    check_contiguous(NAME, input=input, **parameters)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation {activation!r} is not one of {list(ACTIVATIONS)}")
    if input.ndim != 2 or weight_up.ndim != 2 or weight_down.ndim != 2:
        raise ValueError(f"{NAME}: input, weight_up and weight_down must have two dimensions")
    hidden = weight_up.shape[0] // up_width(1, activation)
    product = up_width(hidden, activation)
    check_shape(NAME, "weight_up", weight_up, (product, input.shape[1]))
    check_shape(NAME, "bias_up", bias_up, (product,))
    check_shape(NAME, "weight_down", weight_down, (weight_down.shape[0], hidden))
    check_shape(NAME, "bias_down", bias_down, (weight_down.shape[0],))
    options = (activation, dropout_p, rng_key, site)
    is_compiling = torch.compiler.is_compiling()
    if activation not in FUSED:
        if not is_compiling:
            _say_unfused(activation)
        backend = "reference"
    if backend == "reference" or (
        not is_compiling and (choice := choose(NAME, backend, input)) == "reference"
    ):
        return feed_forward_reference(
            input, weight_up, bias_up, weight_down, bias_down, activation=activation,
            dropout_p=dropout_p, rng_key=rng_key, site=site,
        )  # fmt: skip
    out: Tensor
    if not is_compiling and choice == "native":
        out, *_ = _apply(choice, input, weight_up, bias_up, weight_down, bias_down, *options)
        return out
    up, down = weight_up.to(input.dtype), weight_down.to(input.dtype)
    if is_compiling:
        out, _, _ = _fwd_op(input, up, bias_up, down, bias_down, *options)
    else:
        out, _, _ = _apply(choice, input, up, bias_up, down, bias_down, *options)
    return out


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Values near those of a trained block: pre-activations of unit scale, small biases.

    In bf16, pre-activations are multiples of 1/16 below 16 and never 0, hence exact: otherwise
    rounding decides which units near 0 are active, and the largest error tells nothing else.
    """
    T, K, N = shape["T"], shape["K"], shape["N"]
    activation = shape.get("activation", "relu")
    P = up_width(N, activation)
    x = {
        "input": torch.randn(T, K, generator=generator),
        "weight_up": torch.randn(P, K, generator=generator) / K**0.5,
        "bias_up": torch.randn(P, generator=generator) / 4,
        "weight_down": torch.randn(K, N, generator=generator) / N**0.5,
        "bias_down": torch.randn(K, generator=generator) / 4,
    }
    if dtype == torch.bfloat16:
        x["input"] = x["input"].round().clamp(-2, 2)
        x["weight_up"] = (8 * x["weight_up"]).round().clamp(-2, 2) / 8
        x["bias_up"] = (8 * x["bias_up"]).round() / 8 + 1 / 16
    x["input"] = x["input"].to(dtype)
    return x | {
        "activation": activation,
        "dropout_p": shape.get("dropout_p", 0.0),
        "rng_key": torch.tensor([0x1234_5678_9ABC_DEF0]),
        "site": 2,
    }


def _flops(shape: Shape) -> Pair:
    width = shape["N"] + up_width(shape["N"], shape.get("activation", "relu"))
    forward = 2.0 * shape["T"] * shape["K"] * width
    return forward, 2 * forward


def _bytes(shape: Shape, size: int) -> Pair:
    """Tensors of the rows: hidden written and read and, for backward, what is saved.

    Backward reads hidden for the gradient of the down weight, the saved tensor once, and writes and
    reads twice the gradient of the product; the streams (T, K) and the weights cross once a use.
    """
    T, K, N = shape["T"], shape["K"], shape["N"]
    activation = shape.get("activation", "relu")
    P = up_width(N, activation)
    saved = 0 if activation == "relu" else P
    weights = K * (P + N)
    forward = T * (2 * K + 2 * N + saved) + weights
    backward = T * (4 * K + N + (saved or N) + 3 * P) + 3 * weights
    return float(size * forward), float(size * backward)


SPEC = KernelSpec(
    name=NAME,
    function=feed_forward,
    inputs=_inputs,
    gradients=("input", "weight_up", "bias_up", "weight_down", "bias_down"),
    tests={
        "no rows": {"T": 0, "K": 8, "N": 16},
        "one of everything": {"T": 1, "K": 1, "N": 1},
        "one of everything, gated": {"T": 1, "K": 1, "N": 1, "activation": "swiglu"},
        "primes": {"T": 7, "K": 13, "N": 37, "dropout_p": 0.25},
        "primes, gelu": {"T": 7, "K": 13, "N": 37, "dropout_p": 0.25, "activation": "gelu"},
        "primes, gated": {"T": 7, "K": 13, "N": 37, "dropout_p": 0.25, "activation": "swiglu"},
        "hidden narrower than the stream": {"T": 5, "K": 24, "N": 10, "activation": "gelu"},
        "hidden narrower than the stream, gated": {
            "T": 5, "K": 24, "N": 10, "activation": "swiglu",
        },
        "the paper's narrowest stream": {"T": 12, "K": 10, "N": 256, "dropout_p": 0.1},
        "exactly one block": {"T": 64, "K": 32, "N": 64, "activation": "gelu", "dropout_p": 0.1},
        "exactly one block, gated": {"T": 64, "K": 32, "N": 32, "activation": "swiglu"},
        "one more than a block": {"T": 65, "K": 33, "N": 65, "activation": "gelu"},
        "one more than a block, relu": {"T": 129, "K": 65, "N": 129, "dropout_p": 0.1},
        "more row blocks than a group": {"T": 577, "K": 3, "N": 65, "dropout_p": 0.1},
        "one more than a block, gated": {
            "T": 65, "K": 33, "N": 65, "activation": "swiglu", "dropout_p": 0.1,
        },
    },
    benches={
        "multibench d 40": {"T": 1216, "K": 40, "N": 2048, "dropout_p": 0.1},
        "multibench d 150": {"T": 4864, "K": 150, "N": 2048, "dropout_p": 0.1},
        "multibench d 300": {"T": 4864, "K": 300, "N": 2048, "dropout_p": 0.1},
        "ViT-S": {"T": 65536, "K": 384, "N": 1536, "activation": "gelu"},
        "ViT-B": {"T": 65536, "K": 768, "N": 3072, "activation": "gelu"},
        "ViT-L": {"T": 65536, "K": 1024, "N": 4096, "activation": "gelu"},
        "ViT-L, gated": {"T": 65536, "K": 1024, "N": 2736, "activation": "swiglu"},
    },
    aot={
        "multibench d 10": {"T": 1280, "K": 10, "N": 2048, "dropout_p": 0.1},
        "multibench d 150": {"T": 1280, "K": 150, "N": 2048, "dropout_p": 0.1},
        "multibench d 300": {"T": 1280, "K": 300, "N": 2048, "dropout_p": 0.1},
        "odd width, gelu": {"T": 64, "K": 35, "N": 99, "activation": "gelu", "dropout_p": 0.1},
        "ViT-S": {"T": 1664, "K": 384, "N": 1536, "activation": "gelu"},
        "ViT-L": {"T": 640, "K": 1024, "N": 4096, "activation": "gelu", "dropout_p": 0.1},
        "ViT-L, gated": {"T": 896, "K": 1024, "N": 2736, "activation": "swiglu", "dropout_p": 0.1},
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
