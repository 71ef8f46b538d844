"""The plan's arithmetic against models that are built, and its advice against itself."""

import dataclasses
import math

import pytest
import torch

from uml_fast.config import ConfigError
from uml_fast.cost.flops import training_flops, transformer_flops
from uml_fast.cost.scaling import CHIPS, Cluster, Network, Stream, predict
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.model.objective import losses, total
from uml_fast.model.transformer import TransformerConfig, vit
from uml_fast.plan import PlanConfig, describe, main, plan
from uml_fast.recipes.throughput import mixed
from uml_fast.training.start import build_model, shares_of

ROWS = Stream(
    name="rows", share=1.0, tokens=64, inputs=48, stored_bytes=1e4, raw_bytes=1e4, decode_s=1e-3
)
SMALL = Network(width=128, layers=2, feed_forward=512, classes=10)
ONE = Cluster(chip=CHIPS["H200"], gpus=1)


def test_parameters_are_those_of_the_backbone_that_is_built() -> None:
    b = vit("ti")
    built = sum(p.numel() for p in b.build().parameters())
    network = Network(width=b.width, layers=b.layers, feed_forward=b.feed_forward, classes=0)
    assert network.parameters(()) == built


def test_operations_are_those_that_training_counts() -> None:
    network = dataclasses.replace(SMALL, classes=0)
    bare = dataclasses.replace(ROWS, inputs=0)
    forward = transformer_flops(128, 2, 512, [64] * 4)
    assert predict(network, (bare,), ONE, 256).flops == training_flops(forward)


@pytest.mark.parametrize("hidden", [256, 512])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_kept_activations_are_what_autograd_saves(precision: str, hidden: int) -> None:
    width, dtype_bytes = 128, {"bf16": 2, "fp32": 4}[precision]

    def saved(layers: int) -> float:
        """Bytes that forward saves per row, without weights and their bf16 copies."""
        config = dataclasses.replace(
            mixed(), precision=precision,
            backbone=TransformerConfig(width=width, layers=layers, heads=2, feed_forward=hidden),
        )  # fmt: skip
        task = config.load(0, "uml")
        model = build_model(config, task, 0)
        layouts = layouts_of(task.train, config.mix, shares_of(config), config.target)
        found: dict[int, int] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            if t.ndim and len(t) >= 1024:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with Loader(
            task.train, layouts, config.mix, 0, shares=shares_of(config), target=config.target
        ) as loader:
            batch, _ = next(loader)
            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                total(losses(model, batch, config, None), config)
        return sum(found.values()) / batch.layout.rows

    layer = Network(width=width, layers=1, feed_forward=hidden)
    assert (saved(3) - saved(1)) / 2 == pytest.approx(layer.kept(dtype_bytes), rel=0.04)


def test_sharding_divides_states_and_leaves_activations() -> None:
    whole = predict(SMALL, (ROWS,), Cluster(chip=CHIPS["H200"], gpus=4), 4096)
    parts = predict(SMALL, (ROWS,), Cluster(chip=CHIPS["H200"], gpus=4, strategy="fsdp"), 4096)
    gathered = 4 * parts.parameters  # whole weights fit, and stay from forward until backward
    assert parts.states_bytes == whole.states_bytes / 4 + gathered
    assert parts.activations_bytes == whole.activations_bytes
    assert parts.communication_s > 0 and whole.communication_s > 0


def test_one_rank_talks_to_nobody_and_the_slowest_link_binds_a_ring() -> None:
    chip = CHIPS["H200"]
    assert predict(SMALL, (ROWS,), ONE, 4096).communication_s == 0
    assert Cluster(chip=chip, gpus=8).bus_bytes_per_s == chip.link_bytes_per_s
    over = Cluster(chip=chip, gpus=4, nodes=2).bus_bytes_per_s
    assert over == 2 * chip.network_bytes_per_s


def test_slow_loading_binds_and_sets_the_step() -> None:
    slow = dataclasses.replace(ROWS, decode_s=1.0)
    found = predict(SMALL, (slow,), Cluster(chip=CHIPS["H200"], gpus=1, cores_per_node=4), 6400)
    assert found.binds == "loading" and found.step_s == pytest.approx(100 / 4)


def test_advice_of_a_plan_that_does_not_fit_fits() -> None:
    config = PlanConfig(model="l", gpu="A100", tokens=200_000)
    advised = [line for line in describe(config) if "DOES NOT FIT" in line]
    assert advised
    tokens = int(advised[0].split("--tokens ")[1])
    lines = list(describe(config))
    after = lines[lines.index(advised[0]) + 1 :]
    assert "would be with enough memory" in after[0] and any("tokens/s" in x for x in after)
    assert lines[0].endswith(" 1 A100")
    fitting = dataclasses.replace(config, tokens=tokens)
    assert "would be" not in "".join(describe(fitting))
    assert not [line for line in describe(fitting) if "DOES NOT FIT" in line]
    larger = dataclasses.replace(config, tokens=tokens + 2048)
    assert [line for line in describe(larger) if "DOES NOT FIT" in line]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "H20"}, "did you mean"),
        ({"gpus": 9, "nodes": 2}, "cannot be divided"),
        ({"image": 0.0, "text": 0.0, "audio": 0.0}, "mix is empty"),
        ({"image_px": 100}, "multiple"),
        ({"tokens": 0}, "tokens is 0"),
    ],
)
def test_plans_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(PlanConfig(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [["--gpu", "H20"], ["--tokens", "0"], ["--nodes", "2"]])
def test_refusals_have_one_form(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2 and "Error parsing PlanConfig: " in capsys.readouterr().err


def test_the_verb_prints_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "b", "--gpus", "64", "--nodes", "8", "--train-images", "1e9"]) == 0
    said = capsys.readouterr().out
    for word in ("memory per GPU", "what binds", "MFU", "GFLOP a sample", "from storage", "h for"):
        assert word in said
    expected = plan(PlanConfig(model="b", gpus=64, nodes=8))
    assert f"{1000 * expected.step_s:.1f} ms" in said and math.isfinite(expected.step_s)
