"""The shared bottleneck: its network, its independence of the pack, and its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from uml_fast.config import ConfigError
from uml_fast.model.bottleneck import Bottleneck, BottleneckConfig
from uml_fast.packing.pack import Layout, PackedBatch, Region, pack_samples

LAYOUT = Layout((Region(name="x", rows=5, slots=5, row_elems=4, dtype="float32", max_len=1),))


def pack() -> PackedBatch:
    return pack_samples(LAYOUT, {"x": [np.ones((1, 4), np.float32)] * 3})


def small() -> Bottleneck:
    return BottleneckConfig(width=6, hidden=5, latent=2).build()


def test_widths_are_those_of_the_configuration() -> None:
    model = small()
    hidden, embedding = model(torch.randn(5, 6), pack(), None)
    assert (model.output_width, model.embedding_width) == (6, 2)
    assert hidden.shape == (5, 6) and embedding.shape == (5, 2)


def test_computes_two_linear_maps_with_one_relu_on_each_side() -> None:
    model = small()
    x = torch.randn(5, 6)
    w = [p.detach() for p in model.parameters()]
    latent = (x @ w[0].T + w[1]).clamp(min=0) @ w[2].T + w[3]
    hidden = (latent @ w[4].T + w[5]).clamp(min=0) @ w[6].T + w[7]
    got_hidden, got_latent = model(x, pack(), None)
    torch.testing.assert_close(got_latent, latent)
    torch.testing.assert_close(got_hidden, hidden)


def test_the_latent_is_all_the_decoder_sees() -> None:
    model = small()
    with torch.no_grad():
        for p in model.encoder[2].parameters():
            p.zero_()
    hidden, embedding = model(torch.randn(5, 6), pack(), None)
    assert not embedding.any()
    torch.testing.assert_close(hidden, hidden[:1].expand(5, 6))


def test_rows_do_not_interact() -> None:
    model = small()
    x = torch.randn(5, 6)
    changed = x.clone()
    changed[0] += 1
    (before, _), (after, _) = model(x, pack(), None), model(changed, pack(), None)
    assert not torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=0)


def test_gradients_reach_every_parameter_and_match_float64() -> None:
    model = small().double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, pack(), None)

    assert torch.autograd.gradcheck(outputs, (x,))
    sum(t.square().sum() for t in outputs(x)).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_products_follow_the_dtype_of_the_tokens() -> None:
    hidden, embedding = small()(torch.randn(5, 6, dtype=torch.bfloat16), pack(), None)
    assert hidden.dtype == embedding.dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["width", "hidden", "latent"])
def test_refuses_an_empty_layer(field: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone.{field} is 0"):
        BottleneckConfig(**{field: 0})
