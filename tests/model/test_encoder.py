"""A modality's own network: what it sees, what it hands over, and how networks are frozen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_model import batch_of
from tests.tiny import tiny, tiny_prediction
from uml_fast import train
from uml_fast.config import CheckpointConfig, ConfigError, ObjectiveConfig, RunConfig
from uml_fast.export import target_tensors
from uml_fast.model.objective import losses, total
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import SHARED, Uml
from uml_fast.training import checkpoint
from uml_fast.training.meter import flops_per_row
from uml_fast.training.start import build_model
from uml_fast.training.step import TrainStep

COUNTS = {"image": 5, "audio": 2, "text": 4, "features": 3}
WIDTH = 35
"""Of the shared part: that of the feature rows."""


def network(width: int, heads: int = 2, **changes: Any) -> TransformerConfig:
    config = TransformerConfig(width=width, layers=1, heads=heads, feed_forward=32, dropout=0.1)
    return dataclasses.replace(config, **changes)


def own_networks(**changes: Any) -> RunConfig:
    """Image: a pooled network; text: a network that hands over rows; features: as they are."""
    image, audio, text, features = tiny().modalities
    modalities = (
        dataclasses.replace(image, encoder=network(24), pooled=True),
        audio,
        dataclasses.replace(text, encoder=network(16)),
        dataclasses.replace(features, identity=True),
    )
    config = dataclasses.replace(
        tiny(), modalities=modalities, backbone=network(WIDTH, heads=5), precision="fp32",
        log_every=1,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def with_image(config: RunConfig, **changes: Any) -> RunConfig:
    """The configuration with another network for the images."""
    image, *others = config.modalities
    assert image.encoder is not None
    encoder = dataclasses.replace(image.encoder, **changes)
    image = dataclasses.replace(image, encoder=encoder)
    return dataclasses.replace(config, modalities=(image, *others))


def built(config: RunConfig) -> Uml:
    return build_model(config, config.load(0, "uml"), 0)


def gradients(model: Uml, config: RunConfig) -> Tensor:
    """Total loss of a pack with dropout, its gradients in ``model``."""
    loss = total(losses(model, batch_of(config, COUNTS), config, torch.tensor([3])), config)
    loss.backward()
    return loss


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_gets_a_gradient(precision: str) -> None:
    config = own_networks(precision=precision)
    model = built(config)
    gradients(model, config)
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    names = set(model.state_dict())
    assert {"projections.image.weight", "projections.text.weight"} <= names
    assert not any(n.startswith("modalities.features.stem") for n in names)


def test_embedding_of_a_sample_depends_on_that_sample_alone() -> None:
    config = own_networks()
    model = built(config)
    full, lonely = batch_of(config, COUNTS), batch_of(config, {"image": 1, "text": 1})
    slots = [full.layout.slot_slice(i).start for i in (0, 2)]
    together, alone = model(full).embedding_SE[slots], model(lonely).embedding_SE[slots]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.norm(dim=1).min() > 0.1


def test_empty_shared_part_is_the_supervised_model_of_the_paper() -> None:
    """s_img * W (P v) and s_txt * W t, with v from a model whose shared network is the image's."""
    objective = ObjectiveConfig(classes=3, learn_scale=True)
    config = own_networks(backbone=network(WIDTH, heads=1, layers=0), objective=objective)
    model = built(config)
    image = config.modalities[0]
    whole = dataclasses.replace(
        config, modalities=(dataclasses.replace(image, encoder=None, pooled=False),),
        backbone=network(24), modes=("unimodal",),
    )  # fmt: skip
    alone = build_model(whole, whole.load(0, "unimodal"), 0)
    alone.backbone.load_state_dict(model.encoders["image"].state_dict())
    alone.modality("image").load_state_dict(model.modality("image").state_dict())
    batch = batch_of(config, COUNTS)
    v = alone(batch.alone(0)).embedding_SE
    assert model.head is not None
    with torch.no_grad():
        model.head.scale["image"].fill_(2.0)
        model.head.scale["features"].fill_(3.0)
        expected = 2 * v @ model.projections["image"].weight.T @ model.head.weight.T
    encoded = model(batch)
    slots = batch.layout.slot_slice(0)
    torch.testing.assert_close(
        model.logits(encoded.embedding_SE[slots], "image"), expected, rtol=1e-4, atol=1e-5
    )
    rows, slots = batch.layout.row_slice(3), batch.layout.slot_slice(3)
    lengths = batch.offsets_S1.diff()[slots]
    t = batch.raw[3][: int(lengths[0])].mean(0)
    logits = model.logits(encoded.embedding_SE[slots], "features")[0]
    torch.testing.assert_close(logits, 3 * t @ model.head.weight.T, rtol=1e-4, atol=1e-5)
    assert rows.start > 0


def test_networks_draw_their_dropout_from_keys_of_their_own() -> None:
    config = own_networks()
    model = built(config)
    key = torch.tensor([3])
    keys = [model._key(key, name) for name in (SHARED, "image", "text")]
    assert len({int(k) for k in keys if k is not None}) == 3


def test_compiled_losses_equal_eager_ones() -> None:
    config = with_image(own_networks(), freeze=True)
    model = built(config)
    batch, key = batch_of(config, COUNTS), torch.tensor([3])
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, dynamic=False, backend="aot_eager")
    eager = losses(model, batch, config, key)
    for name, loss in compiled(model, batch, config, key).items():
        torch.testing.assert_close(loss, eager[name])


def test_rows_are_predicted_through_a_network_of_their_own() -> None:
    config = tiny_prediction()
    text = dataclasses.replace(config.modalities[2], encoder=network(24, causal=True))
    modalities = (*config.modalities[:2], text, *config.modalities[3:])
    config = dataclasses.replace(config, modalities=modalities)
    model = built(config)
    gradients(model, config)
    assert all(p.grad is not None and p.grad.any() for p in model.encoders.parameters())


def test_what_is_frozen_has_no_gradient_no_dropout_and_no_optimiser_state() -> None:
    config = with_image(own_networks(), freeze=True)
    model = built(config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = TrainStep(model, config, seed=0)
    for i in range(3):
        step(batch_of(config, COUNTS), i)
    frozen = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    own = ("encoders.image.", "modalities.image.")
    assert frozen == {n for n in before if n.startswith(own)}
    named = dict(model.named_parameters())
    assert all((named[n] in step.optimizer.state) == (n not in frozen) for n in named)
    batch = batch_of(config, COUNTS)
    stem, rows = model.modality("image"), batch.region(0)
    given = [
        model.encoders["image"](
            stem.embed(rows, None, torch.float32, None), batch.alone(0),
            model._key(torch.tensor([k]), "image"),
        )[1] for k in (1, 2)
    ]  # fmt: skip
    assert torch.equal(*given) and not given[0].requires_grad


def test_frozen_shared_network_lets_gradients_through_to_the_stems() -> None:
    config = own_networks(backbone=network(WIDTH, heads=5, freeze=True))
    model = built(config)
    gradients(model, config)
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == {n for n, _ in model.named_parameters() if not n.startswith("backbone.")}


def test_unfreezing_survives_a_resume_on_either_side_of_it(tmp_path: Path) -> None:
    config = with_image(
        own_networks(
            steps=12, seeds=1, modes=("uml",), checkpoint=CheckpointConfig(every=4, keep=3),
            backbone=network(WIDTH, heads=5, freeze=True, unfreeze_at=6), out=tmp_path / "run",
        ),
        freeze=True, unfreeze_at=6,
    )  # fmt: skip
    place = tmp_path / "run/trials/uml-0"

    def trained() -> tuple[list[float], dict[str, Tensor]]:
        train.train(config)
        lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        found = checkpoint.load_latest(place / "checkpoints")
        assert found is not None
        return [json.loads(line)["loss"] for line in lines], found.tensors

    whole, tensors = trained()
    by_step = {s: checkpoint.load(p).tensors for s, p in checkpoints(place).items()}
    start = {f"model/{n}": p for n, p in built(config).state_dict().items()}
    own = [n for n in start if n.startswith(("model/encoders.image.", "model/backbone."))]
    assert len(own) > 20
    assert all(torch.equal(by_step[4][n], start[n]) for n in own)
    assert not any(torch.equal(by_step[8][n], start[n]) for n in own)
    state = [n.removeprefix("model/") + "/exp_avg" for n in own]
    assert not any(f"optimizer/{n}" in by_step[4] for n in state)
    assert all(f"optimizer/{n}" in by_step[8] for n in state)
    for kept in (8, 4):
        (place / "result.json").unlink()
        for step, path in checkpoints(place).items():
            if step > kept:
                path.unlink()
        losses_again, tensors_again = trained()
        assert losses_again == whole
        assert all(torch.equal(tensors_again[n], t) for n, t in tensors.items())


def checkpoints(place: Path) -> dict[int, Path]:
    """Step -> checkpoint file of a trial."""
    found = (place / "checkpoints").glob("*.safetensors")
    return {int(p.stem.removeprefix("step-")): p for p in found}


def test_operations_count_what_is_trained() -> None:
    """2 rows in out, times one for the products, their weights' and their inputs' gradients."""
    config = own_networks(backbone=network(WIDTH, heads=1, layers=0))
    task = config.load(0, "uml")
    image = task.source("image")
    patches, elems = 16, 192
    stem = 2 * elems * 24
    encoder = 2 * 24 * (4 * 24 + 2 * 32) + 4 * patches * 24
    projection = 2 * 24 * WIDTH / patches
    trained = flops_per_row(built(config), config, image)
    assert trained == pytest.approx(2 * stem + 3 * encoder + 3 * projection)
    frozen = with_image(config, freeze=True)
    cost = flops_per_row(built(frozen), frozen, image)
    assert cost == pytest.approx(stem + encoder + 2 * projection)


def test_exported_file_holds_the_target_alone() -> None:
    names = target_tensors(built(own_networks()), "image")
    kinds = {n.split(".")[0] for n in names}
    assert kinds == {"stem", "position", "mean", "deviation", "encoder", "projection", "backbone",
                     "head"}  # fmt: skip
    assert names["projection.weight"].shape == (WIDTH, 24)


@pytest.mark.parametrize("keeps", [True, False])
def test_target_alone_may_drop_the_projection(keeps: bool) -> None:
    config = own_networks(backbone=network(WIDTH, heads=1, layers=0), project_alone=keeps)
    alone = config.for_mode("unimodal")
    model = build_model(alone, alone.load(0, "unimodal"), 0)
    assert model.head is not None
    assert ("image" in model.projections) == keeps
    assert model.head.weight.shape == (3, WIDTH if keeps else 24)
    ours = built(config)
    for name, tensor in model.encoders["image"].state_dict().items():
        assert torch.equal(tensor, ours.encoders["image"].state_dict()[name])


def test_impossible_networks_are_refused() -> None:
    image = own_networks().modalities[0]
    for changes, message in (
        ({"encoder": None}, r"image\.pooled needs image\.encoder"),
        ({"encoder": network(24, unfreeze_at=5)}, r"image\.encoder\.unfreeze_at is 5, but the"),
        ({"encoder": network(24, freeze=True, unfreeze_at=-1)}, "must not be negative"),
    ):
        with pytest.raises(ConfigError, match=message):
            own_networks(modalities=(dataclasses.replace(image, **changes),))
    with pytest.raises(ConfigError, match="no rows to predict"):
        own_networks(objective=ObjectiveConfig(kind="next_embedding"), metric="error")
    with pytest.raises(ConfigError, match="35 features cannot be tokens of width 16"):
        built(own_networks(backbone=network(16)))
