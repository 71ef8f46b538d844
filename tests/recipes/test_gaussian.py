"""The Gaussian experiment: what each modality sees, what modes and seeds share, and the recipe."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from uml_fast.config import ConfigError
from uml_fast.data.gaussian import GaussianConfig, pca_error
from uml_fast.model.objective import losses, total
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, Region, pack_samples
from uml_fast.recipes.gaussian import gaussian


def spectrum(rows: np.ndarray) -> np.ndarray:
    """Eigenvalues of the covariance, largest first."""
    return np.linalg.eigvalsh(np.cov(rows.T.astype(np.float64)))[::-1]


def test_modes_have_the_sample_counts_of_the_paper() -> None:
    unimodal, uml = (GaussianConfig().load(0, mode) for mode in ("unimodal", "uml"))
    assert [(s.name, len(s)) for s in unimodal.train] == [("x", 10_000)]
    assert [(s.name, len(s)) for s in uml.train] == [("x", 5_000), ("y", 5_000)]
    for source in (*unimodal.train, *uml.train, uml.validation, uml.test):
        assert source.rows.dtype == np.float32 and source.rows.shape[1] == 50
        assert (source.lengths == 1).all() and (source.labels == -1).all()


def test_training_x_hides_nine_common_factors_and_nothing_else_does() -> None:
    task = GaussianConfig().load(1, "uml")
    x, y = task.train
    noise = 0.3**2
    of_x, *others = (spectrum(s.rows) for s in (x, y, task.validation, task.test))
    # six full-strength factors (one common, five specific), nine at 0.05: variance 50 / 400
    assert of_x[5] > 10 and of_x[6] < 0.6
    assert of_x[14] > noise * 1.15
    for values in others:
        assert values[14] > 5 and values[15] < noise * 1.5


def test_noise_has_the_stated_deviation() -> None:
    rows = GaussianConfig(held_out=20_000).load(2, "unimodal").test.rows
    assert np.sqrt(spectrum(rows)[15:].mean()) == pytest.approx(0.3, rel=0.02)


def test_validation_uses_the_projection_of_training_x_and_y_has_its_own() -> None:
    task = GaussianConfig(noise=0.0).load(3, "uml")
    x, y = task.train
    span = np.linalg.svd(x.rows.astype(np.float64), full_matrices=False)[2][:15]

    def outside(rows: np.ndarray) -> float:
        return float(np.square(rows - rows @ span.T @ span).mean() / np.square(rows).mean())

    assert outside(task.validation.rows) < 1e-6 and outside(task.test.rows) < 1e-6
    assert outside(y.rows) > 0.3


def test_samples_of_x_and_y_are_unpaired() -> None:
    x, y = GaussianConfig().load(4, "uml").train
    cross = np.corrcoef(x.rows.T, y.rows.T)[:50, 50:]
    assert np.abs(cross).max() < 0.08


def test_a_seed_shares_x_and_held_out_data_over_the_modes() -> None:
    config = GaussianConfig(samples=200, held_out=20)
    unimodal, uml = config.load(5, "unimodal"), config.load(5, "uml")
    np.testing.assert_array_equal(uml.train[0].rows, unimodal.train[0].rows[:100])
    np.testing.assert_array_equal(uml.validation.rows, unimodal.validation.rows)
    np.testing.assert_array_equal(uml.test.rows, unimodal.test.rows)
    again, other = config.load(5, "uml"), config.load(6, "uml")
    np.testing.assert_array_equal(uml.train[1].rows, again.train[1].rows)
    assert np.abs(uml.train[1].rows - other.train[1].rows).mean() > 1


def test_training_validation_and_test_samples_differ() -> None:
    task = GaussianConfig(samples=200, held_out=100, attenuation=1.0).load(7, "unimodal")
    splits = [s.rows for s in (task.train[0], task.validation, task.test)]
    assert len(np.unique(np.concatenate(splits), axis=0)) == 400


def test_full_coverage_leaves_nothing_hidden() -> None:
    x = GaussianConfig(covered=1.0).load(8, "unimodal").train[0]
    assert spectrum(x.rows)[14] > 5


def test_pca_error_is_the_variance_that_is_left_out() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4_000, 4)) * np.array([5.0, 3.0, 1.0, 0.5])
    assert pca_error(rows, rows, 4) == pytest.approx(0, abs=1e-12)
    assert pca_error(rows, rows, 2) == pytest.approx((1 + 0.25) / 4, rel=0.1)
    task = GaussianConfig().load(0, "unimodal")
    assert dict(task.baselines)["PCA"] == pca_error(task.train[0].rows, task.test.rows, 10)


def test_refuses_an_unknown_mode_and_impossible_values() -> None:
    with pytest.raises(ConfigError, match="'both' is unknown"):
        GaussianConfig().load(0, "both")
    for field, value in [("covered", 1.5), ("noise", -1.0), ("samples", 1), ("common", 0)]:
        with pytest.raises(ConfigError, match=f"data.{field} is {value}"):
            GaussianConfig(**{field: value})


def test_recipe_is_the_experiment_of_the_paper() -> None:
    config = gaussian()
    assert [m.name for m in config.modalities] == ["x", "y"] and config.target == "x"
    assert config.data == GaussianConfig()
    assert config.objective.kind == "next_embedding" and config.metric == "error"
    assert config.modes == ("unimodal", "uml") and config.seeds == 5
    assert config.mix.token_budget == 2 * 512
    assert config.eval.every and config.steps % config.eval.every == 0
    assert [m.name for m in config.for_mode("unimodal").modalities] == ["x"]


def test_recipe_minimises_the_summed_reconstruction_errors() -> None:
    config = gaussian()
    task = dataclasses.replace(config.data, samples=12, held_out=5).load(0, "uml")
    regions = (
        Region(name=s.name, rows=8, slots=8, row_elems=50, dtype="float32", max_len=1)
        for s in task.train
    )
    batch = pack_samples(
        Layout(tuple(regions)), {s.name: [s.sample(i) for i in range(6)] for s in task.train}
    )
    model = Uml(config)
    parts = losses(model, batch, config, None)
    backbone = model.backbone
    expected = []
    for source in task.train:
        modality = model.modality(source.name)
        rows = torch.from_numpy(source.rows)
        rebuilt = modality.decoder(backbone.decoder(backbone.encoder(modality.stem(rows))))
        expected.append((rebuilt - rows).square().mean())
        torch.testing.assert_close(parts[source.name], expected[-1])
    torch.testing.assert_close(total(parts, config), expected[0] + expected[1])


def test_recipe_fits_its_data() -> None:
    config = gaussian()
    task = dataclasses.replace(config.data, samples=20, held_out=5).load(0, "uml")
    backbone = config.backbone.build()
    for modality, source in zip(config.modalities, task.train, strict=True):
        built = modality.build(config.backbone.width, backbone.output_width, True)
        built.check(int(source.lengths.max()), source.rows.shape[1], source.rows.dtype.name)
        assert built.autoencode
