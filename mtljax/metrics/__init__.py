"""Metrics: summaries, gradient conflict, calibration, regression, Pareto.

All metrics are pure functions of arrays that run inside ``jit``.
"""

from mtljax.metrics.classification import accuracy, brier, ece, predictive_entropy
from mtljax.metrics.conflict import (
    conflict_rate,
    cosine_matrix,
    gradient_magnitude_similarity,
    mean_cosine,
)
from mtljax.metrics.pareto import hypervolume, non_dominated
from mtljax.metrics.regression import (
    explained_variance,
    mae,
    r2,
    relative_error,
    rmse,
)
from mtljax.metrics.relative import delta_m, delta_p, mean_rank

__all__ = [
    "delta_m",
    "delta_p",
    "mean_rank",
    "cosine_matrix",
    "mean_cosine",
    "conflict_rate",
    "gradient_magnitude_similarity",
    "accuracy",
    "ece",
    "brier",
    "predictive_entropy",
    "rmse",
    "mae",
    "relative_error",
    "r2",
    "explained_variance",
    "hypervolume",
    "non_dominated",
]
