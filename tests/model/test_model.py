"""The model and its objectives: independence of samples, head, schedules of the mix, precision."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny, tiny_prediction
from uml_fast import train
from uml_fast.config import ConfigError, MixConfig, ObjectiveConfig, OptimConfig, RunConfig
from uml_fast.data.loading.loader import layouts_of
from uml_fast.model.head import SharedHead
from uml_fast.model.objective import losses, total
from uml_fast.model.positions import sinusoids
from uml_fast.model.transformer import TransformerConfig, multibench, vit
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import PackedBatch, pack_samples
from uml_fast.training.optim import build_optimizer, learning_rate
from uml_fast.training.start import build_model

BACKBONES = [
    TransformerConfig(width=16, layers=2, heads=2, feed_forward=32),
    TransformerConfig(
        width=16, layers=2, heads=2, feed_forward=32, activation="relu", norm="post", causal=True,
        input_projection=True, positions="sinusoid", max_positions=128,
    ),
    TransformerConfig(width=16, layers=0, heads=2, feed_forward=32, positions="learned"),
    TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, activation="swiglu"),
    TransformerConfig(
        width=16, layers=2, heads=4, key_heads=2, feed_forward=32, activation="swiglu", bias=False,
        norm_kind="rms", positions="rotary", pooling="last", causal=True,
    ),
    TransformerConfig(
        width=16, layers=2, heads=2, feed_forward=32, activation="quick_gelu", input_norm=True,
        layer_scale=0.1, pooling="first",
    ),
]  # fmt: skip
KINDS = pytest.mark.parametrize(
    "backbone", BACKBONES, ids=["pre", "post", "none", "gated", "Llama", "CLIP and DINOv2"]
)


def batch_of(config: RunConfig, counts: dict[str, int], seed: int = 0) -> PackedBatch:
    """A pack of the first samples of each modality."""
    sources = config.load(seed, "uml").train
    (layout,) = layouts_of(sources, config.mix)
    samples = {s.name: [s.sample(i) for i in range(counts.get(s.name, 0))] for s in sources}
    labels = {s.name: s.labels[: counts.get(s.name, 0)].tolist() for s in sources}
    return pack_samples(layout, samples, labels)


@KINDS
def test_embedding_of_a_sample_depends_on_that_sample_alone(backbone: TransformerConfig) -> None:
    config = dataclasses.replace(tiny(), backbone=backbone)
    model = build_model(config, config.load(0, "uml"), 0)
    model.dtype = torch.float32
    full = batch_of(config, {"image": 5, "audio": 2, "text": 4, "features": 3})
    lonely = batch_of(config, {"image": 1, "features": 1})
    slot = full.layout.slot_slice(3).start
    together, alone = model(full).embedding_SE, model(lonely).embedding_SE
    torch.testing.assert_close(together[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[slot], alone[slot], rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize("kind", ["next_embedding", "classification"])
def test_every_parameter_gets_a_gradient(backbone: TransformerConfig, kind: str) -> None:
    objective = ObjectiveConfig(kind=kind, classes=3, learn_scale=True, project=("image",))  # type: ignore[arg-type]
    metric = "error" if kind == "next_embedding" else "head"
    config = dataclasses.replace(tiny(), backbone=backbone, objective=objective, metric=metric)
    model = build_model(config, config.load(0, "uml"), 0)
    batch = batch_of(config, {"image": 5, "audio": 2, "text": 4, "features": 3})
    total(losses(model, batch, config, torch.tensor([3])), config).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_causal_rows_do_not_see_later_ones() -> None:
    config = dataclasses.replace(tiny_prediction(), backbone=BACKBONES[1])
    model = build_model(config, config.load(0, "uml"), 0)
    model.dtype = torch.float32
    batch = batch_of(config, {"features": 1})
    rows = batch.layout.row_slice(3)
    before = model(batch).hidden_TD[rows.start : rows.start + 2].detach()
    batch.raw[3][2:] += 5
    after = model(batch).hidden_TD[rows.start : rows.start + 4].detach()
    torch.testing.assert_close(after[:2], before)
    assert not torch.allclose(after[2], model(batch_of(config, {"features": 1})).hidden_TD[rows][2])


def test_samples_without_a_label_do_not_enter_the_loss() -> None:
    config = tiny()
    model = build_model(config, config.load(0, "uml"), 0)
    batch = batch_of(config, {"image": 4})
    batch.label_S[2:4] = -1
    labelled = batch_of(config, {"image": 2})
    one, other = (losses(model, b, config, None)["image"] for b in (batch, labelled))
    torch.testing.assert_close(one, other)
    batch.label_S[:] = -1
    assert losses(model, batch, config, None)["image"].item() == 0.0


def test_total_is_weighted() -> None:
    config = tiny()
    weighted = tuple(
        dataclasses.replace(m, weight=float(i)) for i, m in enumerate(config.modalities)
    )
    parts = {m.name: torch.tensor(10.0**i) for i, m in enumerate(weighted)}
    whole = total(parts, dataclasses.replace(config, modalities=weighted))
    assert whole.item() == 0 * 1 + 1 * 10 + 2 * 100 + 3 * 1000


def test_head_rows_are_normalised_class_means_where_there_are_samples() -> None:
    head = SharedHead(ObjectiveConfig(classes=3), 4, ("a",))
    before = head.weight.detach().clone()
    embedding = torch.tensor([[2.0, 0, 0, 0], [4.0, 0, 0, 0], [0, 3.0, 4.0, 0]])
    head.set_class_means(embedding, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(head.weight[0].detach(), torch.tensor([1.0, 0, 0, 0]))
    torch.testing.assert_close(head.weight[2].detach(), torch.tensor([0, 0.6, 0.8, 0]))
    torch.testing.assert_close(head.weight[1].detach(), before[1])


def test_head_starts_from_the_class_means_of_the_named_modality() -> None:
    objective = ObjectiveConfig(classes=3, init_head_from="text")
    config = dataclasses.replace(tiny(), objective=objective)
    task = config.load(0, "uml")
    model = build_model(config, task, 0)
    assert model.head is not None
    norms = model.head.weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3))
    alone = build_model(config.for_mode("unimodal"), config.load(0, "unimodal"), 0)
    assert alone.head is not None
    assert not torch.allclose(alone.head.weight.norm(dim=1), torch.ones(3))


def test_projection_and_scale_act_on_their_modality_alone() -> None:
    objective = ObjectiveConfig(classes=3, project=("a",), learn_scale=True)
    head = SharedHead(objective, 4, ("a", "b"))
    v = torch.randn(5, 4)
    with torch.no_grad():
        head.scale["a"].fill_(2.0)
        projected = head.project["a"](v)
    torch.testing.assert_close(head(v, "a"), 2 * projected @ head.weight.T)
    torch.testing.assert_close(head(v, "b"), v @ head.weight.T)


def test_bf16_follows_fp32() -> None:
    config = dataclasses.replace(tiny(), backbone=BACKBONES[0])
    model = build_model(config, config.load(0, "uml"), 0)
    batch = batch_of(config, {"image": 5, "audio": 2, "text": 4, "features": 3})
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.dtype = dtype
        model.zero_grad()
        total(losses(model, batch, config, torch.tensor([3])), config).backward()
        found[dtype] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
    a, b = found[torch.float32], found[torch.bfloat16]
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.995


def test_compiled_losses_equal_eager_ones() -> None:
    config = dataclasses.replace(tiny(), backbone=BACKBONES[0])
    model = build_model(config, config.load(0, "uml"), 0)
    batch = batch_of(config, {"image": 5, "audio": 2, "text": 4, "features": 3})
    key = torch.tensor([3])
    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, dynamic=False, backend="aot_eager")
    eager = losses(model, batch, config, key)
    for name, loss in compiled(model, batch, config, key).items():
        torch.testing.assert_close(loss, eager[name])


@pytest.mark.parametrize(
    "mix",
    [
        MixConfig(policy="alternate", token_budget=400),
        MixConfig(policy="warmup", token_budget=700, warmup_epochs=1),
        MixConfig(policy="warmup", token_budget=700, warmup_epochs=1, warmup_first="target"),
    ],
    ids=["alternate", "auxiliary-first", "target-first"],
)
def test_schedules_train_what_they_say(mix: MixConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny(), mix=mix, out=tmp_path / "run", seeds=1, modes=("uml",), steps=16
    )
    train.train(config)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = [set(json.loads(line)["losses"]) for line in lines]
    every = {"image", "audio", "text", "features"}
    if mix.policy == "alternate":
        assert all(len(s) == 1 for s in seen) and set.union(*seen) == every
    else:
        first = {"image"} if mix.warmup_first == "target" else every - {"image"}
        switch = seen.index(every)
        assert switch >= 1
        assert all(s == first for s in seen[:switch]) and all(s == every for s in seen[switch:])


def test_presets_have_the_sizes_of_the_paper_and_of_vit() -> None:
    """Shared encoder parameters of paper 1.2 at d = 40 and 150; ViT-S blocks."""
    for width, parameters in ((40, 864_840), (150, 3_561_490)):
        encoder = multibench(width).build()
        # the paper's count has the bias-free 1x1 convolution and the layers
        assert sum(p.numel() for p in encoder.parameters()) == parameters
    per_block = 12 * 384 * 384 + 13 * 384
    assert sum(p.numel() for p in vit("s").build().blocks.parameters()) == 12 * per_block


def test_sinusoids_are_bounded_distinct_rows() -> None:
    table = sinusoids(128, 10)
    assert table.shape == (128, 10) and table.abs().max() <= 1
    assert len(np.unique(table.numpy().round(6), axis=0)) == 128
    torch.testing.assert_close(table[1, 0], torch.tensor(1.0).sin())


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(s, 100, config) for s in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[4:])) and 0 < rates[-1] < 1e-3
    constant = dataclasses.replace(config, schedule="constant")
    assert learning_rate(99, 100, constant) == 1.0


def test_released_schedule_is_the_one_of_the_code() -> None:
    """PAPER 1.4: 1e-5 at step 0, lr * t / 50 to step 49, a cosine of 12,800 steps from step 50."""
    config = OptimConfig(lr=5e-5, warmup_steps=50, schedule="release")
    rates = [learning_rate(s, 12_800, config) for s in range(12_800)]
    assert rates[:3] == pytest.approx([1e-5, 1e-6, 2e-6])
    assert rates[49] == pytest.approx(4.9e-5) and rates[50] == pytest.approx(5e-5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-5)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12_800)
    for rate in rates[50:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        torchs.step()
    assert rates[-1] > 0


def test_head_with_a_hidden_layer_is_two_maps() -> None:
    head = SharedHead(ObjectiveConfig(classes=3, head_hidden=5, project=("a",)), 4, ("a",))
    v = torch.randn(2, 4)
    assert head.hidden is not None
    inner = head.project["a"](v) @ head.hidden.weight.T + head.hidden.bias
    expected = torch.nn.functional.gelu(inner) @ head.weight.T
    torch.testing.assert_close(head(v, "a"), expected)
    with pytest.raises(ConfigError, match="leave head_hidden at 0"):
        ObjectiveConfig(classes=3, head_hidden=5, init_head_from="text")


def test_vectors_and_positions_do_not_decay() -> None:
    config = tiny()
    model = Uml(config)
    decayed, plain = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert "modalities.image.position" in {names[id(p)] for p in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_impossible_backbones_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"backbone\.width 10 is not a multiple of backbone\.heads 4"
    ):
        TransformerConfig(width=10, layers=1, heads=4, feed_forward=8)
