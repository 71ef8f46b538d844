"""Training steps of uml_fast against plain PyTorch on the same samples and weights (paper 1.2)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.plain_uml import PlainUml, adam, pad, uml_fast_state
from uml_fast.config import ConfigError, RunConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.model.compat import embeddings, prediction_losses, release_batch
from uml_fast.model.objective import losses, total
from uml_fast.model.transformer import multibench
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch, Region, pack_samples
from uml_fast.recipes.throughput import mosi
from uml_fast.training.step import TrainStep

SIZES = {"x": 6, "y": 11, "z": 5}
"""Elements of a row; z is a modality of single vectors."""
WEIGHTS = {"x": 1.0, "y": 0.5, "z": 2.0}
WIDTH, HIDDEN, LAYERS = 20, 64, 3
STEPS = 4
LR = 1e-2
"""High enough that the weights move far from where they start."""


def config() -> RunConfig:
    base = mosi(width=WIDTH, batch=8, dropout=0.0)
    modalities = tuple(
        FeaturesConfig(name=m, size=e, weight=WEIGHTS[m], vector=m == "z") for m, e in SIZES.items()
    )
    backbone = dataclasses.replace(multibench(WIDTH, 0.0), layers=LAYERS, feed_forward=HIDDEN)
    return dataclasses.replace(
        base,
        modalities=modalities,
        backbone=backbone,
        optim=dataclasses.replace(base.optim, lr=LR),
        steps=STEPS,
        precision="fp32",
    )


def draw_samples(seed: int) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = {"x": rng.integers(2, 12, 7), "y": rng.integers(2, 9, 5), "z": np.ones(6, int)}
    return {
        m: [rng.standard_normal((n, e), np.float32) for n in lengths[m]] for m, e in SIZES.items()
    }


def pack(samples: dict[str, list[np.ndarray]]) -> PackedBatch:
    rows = {"x": 90, "y": 48, "z": 8}
    regions = tuple(
        Region(
            name=m,
            rows=rows[m],
            slots=20,
            row_elems=e,
            dtype="float32",
            max_len=1 if m == "z" else 12,
        )
        for m, e in SIZES.items()
    )
    return pack_samples(Layout(regions), samples)


def twins(seed: int) -> tuple[PlainUml, Uml, RunConfig]:
    """The plain model and uml_fast's with the same weights, and the run's configuration."""
    torch.manual_seed(seed)
    plain = PlainUml(SIZES, WIDTH, layers=LAYERS, hidden=HIDDEN, dropout=0.0)
    run = config()
    model = Uml(run)
    model.load_state_dict(uml_fast_state(plain))
    return plain, model, run


def gradients(plain: PlainUml) -> dict[str, torch.Tensor]:
    """Gradients of the plain model under uml_fast's names."""
    renamed = uml_fast_state(plain)
    by_storage = {p.data_ptr(): p.grad for p in plain.parameters()}
    return {k: by_storage[v.data_ptr()].reshape(v.shape) for k, v in renamed.items()}


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_equal(seed: int) -> None:
    plain, model, run = twins(seed)
    samples = draw_samples(seed)
    expected, _ = plain.total_loss({m: pad(s) for m, s in samples.items()}, "valid", WEIGHTS)
    expected.backward()
    total(losses(model, pack(samples), run, None), run).backward()
    wanted = gradients(plain)
    assert wanted.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert wanted[name].abs().max() > 0 or name.endswith("qkv.bias")
        torch.testing.assert_close(
            parameter.grad, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("seed", range(4))
def test_training_steps_are_equal(seed: int) -> None:
    plain, model, run = twins(seed)
    step = TrainStep(model, run, seed)
    optimizer = adam(plain, LR)
    for i in range(STEPS):
        samples = draw_samples(100 * seed + i)
        expected, parts = plain.total_loss(
            {m: pad(s) for m, s in samples.items()}, "valid", WEIGHTS
        )
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        result = step(pack(samples), i)
        torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-4, atol=0)
        for m, part in parts.items():
            torch.testing.assert_close(result.parts[m], part.detach(), rtol=1e-4, atol=0)
    start = uml_fast_state(twins(seed)[0])
    for name, value in uml_fast_state(plain).items():
        got = model.get_parameter(name)
        assert (value - start[name]).abs().max() > LR
        # Adam divides by the root of the squared gradient, so the key bias, whose true gradient is
        # zero, moves by rounding alone; everything else stays together
        if name.endswith("qkv.bias"):
            got, value = (torch.cat((b[:WIDTH], b[2 * WIDTH :])) for b in (got, value))
        torch.testing.assert_close(
            got, value, rtol=1e-3, atol=LR / 100, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_bf16_products_stay_near_fp32() -> None:
    plain, model, run = twins(0)
    model.dtype = torch.bfloat16
    step = TrainStep(model, run, 0)
    optimizer = adam(plain, LR)
    for i in range(STEPS):
        samples = draw_samples(i)
        expected, _ = plain.total_loss({m: pad(s) for m, s in samples.items()}, "valid", WEIGHTS)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        got = step(pack(samples), i).loss
        # bf16 has 8 bits, so single terms are off by up to 0.4 %; the loss is a mean over hundreds
        torch.testing.assert_close(got, expected.detach(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(2))
def test_embeddings_are_the_mean_over_a_samples_own_rows(seed: int) -> None:
    plain, model, _ = twins(seed)
    samples = draw_samples(seed)
    with torch.no_grad():
        got = embeddings(model, pack(samples))
        for m, given in samples.items():
            torch.testing.assert_close(
                got[m], plain.embedding(m, *pad(given), "valid"), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("seed", range(2))
def test_compat_release_is_the_releases_padded_mean_and_loss(seed: int) -> None:
    plain, model, run = twins(seed)
    samples = draw_samples(seed)
    batch = pack(samples)
    with torch.no_grad():
        own, released = embeddings(model, batch), embeddings(model, batch, "release")
        loss = prediction_losses(model, batch, run, "release")
        for m, given in samples.items():
            padded, lengths = pad(given)
            wanted = plain.embedding(m, padded, lengths, "release")
            torch.testing.assert_close(released[m], wanted, rtol=1e-4, atol=1e-5)
            wanted = plain.loss(m, padded, lengths, "release")
            torch.testing.assert_close(loss[m], wanted, rtol=1e-4, atol=0)
    assert (own["x"] - released["x"]).abs().max() > 1e-2
    torch.testing.assert_close(own["z"], released["z"])


def test_only_the_release_lets_an_embedding_depend_on_its_batch() -> None:
    _, model, _ = twins(0)
    samples = draw_samples(0)
    short = {m: [min(s, key=len)] for m, s in samples.items()}
    at = min(range(len(samples["x"])), key=lambda i: len(samples["x"][i]))
    with torch.no_grad():
        for compat, is_same in (("none", True), ("release", False)):
            alone = embeddings(model, pack(short), compat)["x"][0]
            among = embeddings(model, pack(samples), compat)["x"][at]
            assert torch.allclose(alone, among, rtol=1e-4, atol=1e-5) == is_same


def test_release_batch_refuses_what_the_release_cannot_pad() -> None:
    region = Region(name="t", rows=8, slots=4, row_elems=1, dtype="int32", max_len=8)
    batch = pack_samples(Layout((region,)), {"t": [np.ones((3, 1), np.int32)]})
    with pytest.raises(ConfigError, match="t: the release pads float features only"):
        release_batch(batch)


def test_release_batch_keeps_labels_and_leaves_no_padding() -> None:
    samples = {"x": [np.full((n, 6), n, np.float32) for n in (2, 5, 3)]}
    region = Region(name="x", rows=32, slots=10, row_elems=6, dtype="float32", max_len=12)
    batch = release_batch(pack_samples(Layout((region,)), samples, {"x": [4, -1, 7]}))
    assert batch.label_S.tolist() == [4, -1, 7]
    assert batch.offsets_S1.tolist() == [0, 5, 10, 15]
    assert batch.raw[0][:, 0].tolist() == [2, 2, 0, 0, 0, 5, 5, 5, 5, 5, 3, 3, 3, 0, 0]
