"""Blocks that are computed again in backward: the same bits, less kept."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.model.test_model import batch_of
from tests.tiny import tiny
from uml_fast.model.objective import losses, total
from uml_fast.model.transformer import TransformerConfig
from uml_fast.training.start import build_model

PRE = TransformerConfig(width=32, layers=4, heads=2, feed_forward=64, dropout=0.2)


def backward(backbone: TransformerConfig) -> tuple[dict[str, Tensor], int]:
    """Gradients of a training step's loss with the loss among them, and bytes kept for backward."""
    config = dataclasses.replace(tiny(), backbone=backbone)
    model = build_model(config, config.load(0, "uml"), 0)
    batch = batch_of(config, {"image": 9, "audio": 3, "text": 5, "features": 4})
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = total(losses(model, batch, config, torch.tensor([7])), config)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}, sum(kept.values())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_gradients_are_the_same_bits_and_less_is_kept(norm: str) -> None:
    backbone = dataclasses.replace(PRE, norm=norm)
    expected, kept = backward(backbone)
    found, kept_less = backward(dataclasses.replace(backbone, recompute=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert kept_less < 0.5 * kept
