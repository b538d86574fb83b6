"""Fits ridge and logistic regression to each set, as a reference.

Single-task networks that are worse than a linear model would mean that the training
recipe is wrong. A set on which a linear model is no better than a constant has too
little signal to compare methods.
"""

import json
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.common.config import ConfigError
from experiments.leaderboard import problem, queue, train
from experiments.leaderboard.config import Config
from experiments.leaderboard.problem import Problem
from mtljax import data, training

TIE = 0.03
"""Differences of R², AUC or accuracy up to this are a tie."""
GAIN = {"R²": 0.1, "AUC": 0.05, "accuracy": 0.05}
"""Gain of the linear model over the constant prediction that a set needs."""
RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
LOGISTIC = (1e-3, 1e-2, 1e-1)
"""Penalties per example. Validation selects one for each task and seed."""


class Part(NamedTuple):
    """Standardised features ``[n, d]`` and labels ``[n]`` of a task."""

    x: np.ndarray
    y: np.ndarray


def metric_of(task: data.Task) -> str:
    """Metric of a task."""
    if task.kind == "regression":
        return "R²"
    return "AUC" if problem.is_scalar(task) else "accuracy"


def score_of_error(metric: str, error: Any) -> Any:
    """The metric of an error of :func:`experiments.leaderboard.problem.errors`.

    Examples:
      >>> score_of_error("AUC", 0.25), float(score_of_error("R²", 0.5))
      (0.75, 0.75)
    """
    return 1 - np.square(error) if metric == "R²" else 1 - error


def score(metric: str, out: np.ndarray, y: np.ndarray) -> float:
    """The metric of predictions: numbers, scores of a label, or classes."""
    if metric == "R²":
        return float(score_of_error(metric, problem.rrmse(out, y)))
    if metric == "AUC":
        return 1 - problem.one_minus_auc(out, y)
    return float(np.mean(out == y))


def ridge(part: Part, penalties: tuple[float, ...]) -> list[np.ndarray]:
    """Coefficients ``[d + 1]`` of ridge regression, the intercept last.

    They minimise the mean squared error plus the penalty times the squared norm. The
    intercept has no penalty.
    """
    mean, center = part.x.mean(0), part.y.mean()
    u, s, vt = np.linalg.svd(part.x - mean, full_matrices=False)
    along = u.T @ (part.y - center)
    found = []
    for penalty in penalties:
        weights = vt.T @ (s / (s**2 + penalty * len(part.x)) * along)
        found.append(np.append(weights, center - mean @ weights))
    return found


def predictors(metric: str, part: Part) -> list[Any]:
    """Functions of features, one per penalty."""
    if metric == "R²":
        return [lambda x, w=w: x @ w[:-1] + w[-1] for w in ridge(part, RIDGE)]
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    found = []
    for penalty in LOGISTIC:
        strength = 1 / (penalty * len(part.x))
        model = LogisticRegression(C=strength, max_iter=100, tol=1e-3)
        with warnings.catch_warnings():
            # The reference is good enough before the last digits.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(part.x, part.y.astype(int))
        found.append(model.decision_function if metric == "AUC" else model.predict)
    return found


def task_scores(metric: str, parts: Mapping[str, Part]) -> tuple[float, float]:
    """Test scores of the constant prediction and of the linear model."""
    y = parts["train"].y
    test = parts["test"]
    if metric == "accuracy":
        values, counts = np.unique(y, return_counts=True)
        constant = float(np.mean(test.y == values[counts.argmax()]))
    elif metric == "AUC":
        constant = 0.5
    else:
        constant = score(metric, np.full(len(test.y), y.mean()), test.y)
    found = predictors(metric, parts["train"])
    val = [score(metric, f(parts["val"].x), parts["val"].y) for f in found]
    best = found[int(np.nanargmax(val)) if not np.isnan(val).all() else 0]
    return constant, score(metric, best(test.x), test.y)


def parts_of(on: Problem, seed: int, task: int) -> dict[str, Part]:
    """Splits of a task and a seed, in float64, without the missing labels."""
    found = {}
    x = np.asarray(on.parts["train"].x[seed], np.float64)
    mean, sd = x.mean(0), x.std(0)
    for name, part in on.parts.items():
        y = np.asarray(part.y[seed, :, task], np.float64)
        known = ~np.isnan(y)
        x = (np.asarray(part.x[seed], np.float64) - mean) / np.where(sd > 0, sd, 1)
        found[name] = Part(x[known], y[known])
    return found


def reference(on: Problem) -> dict[str, Any]:
    """Test scores of a set: metrics, constant and linear predictions by task.

    The scores are means over seeds.
    """
    metrics = [metric_of(task) for task in on.tasks]

    def scores(seed: int) -> list[tuple[float, float]]:
        parts = [parts_of(on, seed, task) for task in range(on.num_tasks)]
        return [task_scores(*pair) for pair in zip(metrics, parts, strict=True)]

    found = [scores(seed) for seed in range(len(on.parts["train"].x))]
    constant, linear = np.nanmean(np.array(found), 0).T
    return {
        "data": on.digest,
        "metrics": metrics,
        "counted": on.counted.tolist(),
        "constant": constant.tolist(),
        "linear": linear.tolist(),
    }


def gain(found: Mapping[str, Any]) -> float:
    """Gain of the linear model in units of :data:`GAIN`, mean over the tasks."""
    units = np.array([GAIN[metric] for metric in found["metrics"]])
    each = (np.array(found["linear"]) - np.array(found["constant"])) / units
    return float(each[np.array(found["counted"], bool)].mean())


class Versus(NamedTuple):
    """Single-task networks next to the references of a set, means over the tasks."""

    metrics: str
    constant: float
    linear: float
    network: float
    word: str  # better, tie or worse


def compare(found: Mapping[str, Any], errors: np.ndarray) -> Versus:
    """Compares networks with test errors ``[S, T]`` with the linear model."""
    counted = np.array(found["counted"], bool)
    mean = lambda values: float(np.array(values)[counted].mean())
    scores = [
        float(np.nanmean(score_of_error(metric, errors[:, t])))
        for t, metric in enumerate(found["metrics"])
    ]
    network, linear = mean(scores), mean(found["linear"])
    d = network - linear
    word = "tie" if abs(d) <= TIE else "better" if d > 0 else "worse"
    used = [m for m, c in zip(found["metrics"], counted, strict=True) if c]
    names = ", ".join(dict.fromkeys(used))
    return Versus(names, mean(found["constant"]), linear, network, word)


def cached(config: Config, about: Mapping[str, Any]) -> dict[str, Any] | str:
    """The reference of a set from its file, or fitted now.

    Args:
      config: Configuration of the rows.
      about: First line of a job of the set.

    Returns:
      The reference, or the reason why there is none.
    """
    name = about["set"]
    path = config.folder(name) / "reference.json"
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        if found["data"] == about["data"]:
            return found
    try:
        on = train.cached_problem(config, name)
    except (data.DataError, ConfigError) as error:
        return str(error).splitlines()[0]
    if on.digest != about["data"]:
        return "the data differ from those of the rows"
    found = training.to_json(reference(on))
    queue.save(path, found)
    return found


def check_sets(config: Config, say: Any) -> list[str]:
    """Prints the references of all sets. Returns the sets without enough signal."""
    refused = []
    for name in config.sets:
        found = reference(train.cached_problem(config, name))
        of = compare(found, np.ones((1, len(found["metrics"]))))
        if gain(found) < 1:
            refused.append(name)
        say(
            f"{name}: linear model {of.linear:.3f}, constant {of.constant:.3f} "
            f"({of.metrics}): {'REFUSED' if name in refused else 'accepted'}"
        )
    return refused
