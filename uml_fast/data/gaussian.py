"""The linear-Gaussian experiment (paper section 3.1 and appendix E.14).

Two modalities see the same kind of hidden factors through their own fixed random projections:

    x = A [theta_c, theta_x] + noise        y = B [theta_c', theta_y] + noise

The samples are unpaired: every one draws its own factors, so nothing but the *distribution* of
``theta_c`` is shared. In the training data of X only the first factors of ``theta_c`` have full
strength and the rest are almost invisible; Y sees all of them; validation and test data of X have
them all. What X under-covers, Y holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from uml_fast.config import DataConfig, RunConfig, require
from uml_fast.data.source import Source, Task

# Purpose of each random stream: one more stream never changes the numbers of another.
_PROJECTION_X, _PROJECTION_Y, _TRAIN_X, _TRAIN_Y, _VALIDATION, _TEST = range(6)


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianConfig(DataConfig):
    """Modalities ``x`` (target) and ``y`` (auxiliary): float32 vectors, one row per sample."""

    common: int = 10
    """Factors both modalities see (dim theta_c)."""
    specific: int = 5
    """Factors one modality sees alone (dim theta_x = dim theta_y)."""
    width: int = 50
    """Features of an observation."""
    noise: float = 0.3
    """Standard deviation of the observation noise."""
    covered: float = 0.1
    """Part of the common factors that training X sees at full strength, 0..1."""
    attenuation: float = 0.05
    """Factor on the common factors that training X does not cover."""
    samples: int = 10_000
    """Training samples: all X in mode unimodal, half X and half Y in mode uml."""
    held_out: int = 2_000
    """Samples of X for validation, and as many for test; not attenuated."""

    def __post_init__(self) -> None:
        require(self.common >= 1, f"data.common is {self.common}; it must be >= 1")
        require(self.specific >= 0, f"data.specific is {self.specific}; it must be >= 0")
        require(self.width >= 1, f"data.width is {self.width}; it must be >= 1")
        require(self.noise >= 0, f"data.noise is {self.noise}; it must not be negative")
        require(0 <= self.covered <= 1, f"data.covered is {self.covered}; it must be in 0..1")
        require(
            self.attenuation >= 0,
            f"data.attenuation is {self.attenuation}; it must not be negative",
        )
        require(self.samples >= 2, f"data.samples is {self.samples}; it must be >= 2")
        require(self.held_out >= 1, f"data.held_out is {self.held_out}; it must be >= 1")

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """The samples of one trial.

        A seed fixes the projections, the factors and the noise. The X samples of mode ``uml`` are
        the first half of those of mode ``unimodal``, and both modes share validation and test data.
        The baseline is the best linear autoencoder of the same X samples: PCA with ``common``
        components.

        Args:
            seed: any integer >= 0.
            mode: ``unimodal`` (X alone, ``samples`` of them) or ``uml`` (half X, half Y).

        Raises:
            ConfigError: another mode.
        """
        require(mode in ("unimodal", "uml"), f"mode {mode!r} is unknown; use unimodal or uml")

        def stream(purpose: int) -> np.random.Generator:
            return np.random.default_rng([seed, purpose])

        factors = self.common + self.specific
        projection_x = stream(_PROJECTION_X).standard_normal((factors, self.width))
        projection_y = stream(_PROJECTION_Y).standard_normal((factors, self.width))
        full = np.ones(factors)
        attenuated = np.ones(factors)
        attenuated[round(self.common * self.covered) : self.common] = self.attenuation

        def observe(
            name: str, purpose: int, n: int, projection: np.ndarray, strength: np.ndarray
        ) -> Source:
            rng = stream(purpose)
            theta = rng.standard_normal((n, factors)) * strength
            rows = theta @ projection + self.noise * rng.standard_normal((n, self.width))
            return Source(name, rows.astype(np.float32), np.arange(n + 1), np.full(n, -1, np.int32))

        x = observe("x", _TRAIN_X, self.samples, projection_x, attenuated)
        half = self.samples // 2
        if mode == "unimodal":
            train: tuple[Source, ...] = (x,)
        else:
            y = observe("y", _TRAIN_Y, half, projection_y, full)
            train = (x.select(np.arange(half)), y)
        test = observe("x", _TEST, self.held_out, projection_x, full)
        return Task(
            train=train,
            validation=observe("x", _VALIDATION, self.held_out, projection_x, full),
            test=test,
            baselines=(("PCA", pca_error(train[0].rows, test.rows, self.common)),),
        )


def pca_error(train: np.ndarray, test: np.ndarray, components: int) -> float:
    """Mean squared error of ``test`` (N, E) rebuilt from principal components of ``train``."""
    mean = train.mean(0, dtype=np.float64)
    _, vectors = np.linalg.eigh(np.cov((train - mean).T))
    kept = vectors[:, -components:]
    centred = test - mean
    return float(np.square(centred - centred @ kept @ kept.T).mean())
