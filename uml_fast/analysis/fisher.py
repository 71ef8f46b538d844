"""Fisher information of the linear-Gaussian model (paper section 3.1) and random designs of it.

Sample i of X and sample j of Y observe

    X_i = A_ci theta_c + A_xi theta_x + noise_x        Y_j = B_cj theta_c + B_yj theta_y + noise_y

with known designs and independent noise, so information adds over samples and over modalities. Two
readings of "the information about theta_c":

- **block** (the paper's proofs): the theta_c block, ``sum A_c' A_c / noise^2``; its inverse is the
  variance where theta_x and theta_y are known.
- **Schur**: the block less what the specific parameters explain away; its inverse is the variance
  where theta_x and theta_y are estimated too.

Legend: N samples, M rows of an observation, K common and P specific parameters. Everything is
float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# An eigenvalue below this part of the largest one is rounding, not information.
RANK_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Design:
    """The known matrices of one modality's samples."""

    common: np.ndarray
    """(N, M, K) what each sample sees of the common parameters (A_c or B_c)."""
    specific: np.ndarray
    """(N, M, P) what it sees of the modality's own parameters (A_x or B_y)."""
    noise: float = 1.0
    """Standard deviation of the observation noise."""

    def __post_init__(self) -> None:
        if self.common.ndim != 3 or self.specific.shape[:2] != self.common.shape[:2]:
            raise ValueError(
                f"common {self.common.shape} and specific {self.specific.shape} "
                "must be (N, M, K) and (N, M, P)"
            )
        if self.noise <= 0:
            raise ValueError(f"noise is {self.noise}; it must be positive")

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """(N * M, K) and (N * M, P): the observations of all samples below each other."""
        n, m, k = self.common.shape
        return self.common.reshape(n * m, k), self.specific.reshape(n * m, self.specific.shape[2])


def block_information(design: Design) -> np.ndarray:
    """(K, K) information about theta_c with the specific parameters known: the block (I_X)_cc."""
    rows, _ = design.stacked()
    information: np.ndarray = rows.T @ rows / design.noise**2
    return information


def schur_information(design: Design) -> np.ndarray:
    """(K, K) information about theta_c, the specific parameters estimated (Schur complement)."""
    common, specific = design.stacked()
    left, values, _ = np.linalg.svd(specific, full_matrices=False)
    left = left[:, values > RANK_TOLERANCE * values.max(initial=0.0)]
    rest = common - left @ (left.T @ common)
    # what is explained away leaves rounding behind, which must not count as information
    rest[np.abs(rest) <= RANK_TOLERANCE * np.abs(common).max()] = 0.0
    information: np.ndarray = rest.T @ rest / design.noise**2
    return information


def directional_variance(information: np.ndarray, v: np.ndarray) -> float:
    """``v' information^-1 v``: variance of the estimate of ``v' theta_c``.

    Infinite where v is not identified, that is, outside the range of the information.
    """
    values, vectors = np.linalg.eigh(information)
    seen = values > RANK_TOLERANCE * values[-1]
    along = vectors.T @ v
    if np.linalg.norm(along[~seen]) > math.sqrt(RANK_TOLERANCE) * np.linalg.norm(v):
        return math.inf
    return float((along[seen] ** 2 / values[seen]).sum())


def loewner_gap(larger: np.ndarray, smaller: np.ndarray) -> float:
    """Smallest eigenvalue of ``larger - smaller`` over the largest of ``larger``.

    Positive: strictly above in the Loewner order.
    """
    return float(np.linalg.eigvalsh(larger - smaller)[0] / np.linalg.norm(larger, 2))


def null_space(information: np.ndarray) -> np.ndarray:
    """(K, k) orthonormal directions that carry no information."""
    values, vectors = np.linalg.eigh(information)
    return vectors[:, values <= RANK_TOLERANCE * values[-1]]


def is_invertible(information: np.ndarray) -> bool:
    """Every direction is identified."""
    return bool(null_space(information).shape[1] == 0)


def random_design(
    rng: np.random.Generator,
    basis: np.ndarray,
    strength: np.ndarray,
    *,
    samples: int,
    rows: int,
    specific: int,
    noise: float = 1.0,
) -> Design:
    """A random design whose block information is exactly ``basis diag(strength^2) basis' /
    noise^2``.

    Args:
        rng: source of the matrices.
        basis: (K, K) orthonormal eigenvectors in its columns.
        strength: (K,) how well each of them is seen; 0: not at all.
        samples: N, with N * rows >= K.
        rows: M, features of an observation.
        specific: P, parameters of this modality alone.
        noise: standard deviation of the noise.
    """
    common = len(basis)
    columns = np.linalg.qr(rng.standard_normal((samples * rows, common)))[0]
    return Design(
        (columns * strength @ basis.T).reshape(samples, rows, common),
        rng.standard_normal((samples, rows, specific)) / math.sqrt(samples * rows),
        noise,
    )


def random_basis(rng: np.random.Generator, common: int) -> np.ndarray:
    """(K, K) random orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((common, common)))[0]
