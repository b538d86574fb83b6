"""The numbers of the report on ForkMerge, computed from its rows."""

import re
from typing import Any

import numpy as np
import pytest
import quoted
from scipy import stats

from experiments.common import claims
from experiments.common.statistics import benjamini_hochberg, minimum_detectable, paired
from experiments.forkmerge import steps
from experiments.forkmerge.config import LABELS, Config
from experiments.forkmerge.train import MERGED
from mtljax.forkmerge import forkmerge_cost

ROOT = quoted.ROOT / "forkmerge"
pytestmark = pytest.mark.skipif(
    not (ROOT / "results").is_dir(), reason="the sdist has no rows"
)
CONFIG = Config()
STL, STL_2X, TWICE = (LABELS[x] for x in ("stl", "stl_2x", "alone_x2"))
EW, POST, GRID = (LABELS[x] for x in ("ew", "post_train", "lambda_grid"))
FORKMERGE, EACH = LABELS["forkmerge"], LABELS["forkmerge_each"]
WEIGHTS = [f"λ = {x:g}" for x in CONFIG.lambdas]
PAIRS = [(t, a) for t in CONFIG.domains for a in CONFIG.domains if t != a]


def rows(**where: Any) -> list[quoted.Line]:
    lines = quoted.rows_of("forkmerge/results/results.jsonl")
    return [x for x in lines if all(x.get(k) == v for k, v in where.items())]


def section(first: str, end: str | None = None) -> str:
    text = quoted.text_of("forkmerge")
    return text[text.index(first) : text.index(end) if end else None]


def in_code(file: str, pattern: str) -> float:
    (found,) = re.findall(pattern, (ROOT / file).read_text("utf-8"))
    return float(found)


def accuracy(row: str, part: str = "table", **where: Any) -> np.ndarray:
    where = {"part": part, "column": "last", "row": row} | where
    return quoted.over_seeds(rows(), "test_accuracy", **where)


def gain(row: str, target: str = "", *, of: str = STL, part: str = "table") -> Any:
    where = {"target": target} if target else {}
    return quoted.interval(accuracy(row, part, **where) - accuracy(of, **where))


def loss(row: str, target: str = "", *, part: str = "table") -> Any:
    """The mean loss, and the interval of the gain."""
    return gain(row, target, part=part) * np.array([-1, 1, 1])


def gains_of_pairs(row: str) -> np.ndarray:
    """Gains ``[pairs, seeds]``."""
    alone = [accuracy(STL, target=t) for t, _ in PAIRS]
    return np.array([accuracy(row, "pairs", target=t, aux=a) for t, a in PAIRS]) - alone


def spearman(measure: str, *weights: str) -> np.ndarray:
    """Coefficients with the gain ``[seeds]`` over all points at these weights."""
    lines = [x for x in rows(part="points", column="last") if x["row"] in weights]
    lines.sort(key=lambda x: x["seed"])
    both = np.array([(x[measure], x["gain"]) for x in lines])
    both = both.reshape(CONFIG.seeds, len(PAIRS) * len(weights), 2)
    return np.array([np.asarray(stats.spearmanr(x))[0] for x in both])


def cost(branches: int, kept: int | None = None) -> float:
    size, every = CONFIG.steps, CONFIG.interval
    return forkmerge_cost(branches, size, every, pruned_to=kept).branch_steps / size


def test_answer():
    paper = claims.load_claims(claims.claims_path("forkmerge"))
    transfer = quoted.claimed("forkmerge", "transfer-not-averaging")
    p = quoted.decisions("forkmerge")["transfer-not-averaging"].p_adjusted
    sd = gains_of_pairs(FORKMERGE).std(1, ddof=1).mean()
    values = [float(paper.link.rpartition("/")[2])]
    values += [loss(EW, x, part="pairs") for x in ("", "semeion", "usps")]
    values += [gain(EW, "mnist"), gain(EW, "optdigits"), loss(EW, "semeion"), gain(EW)]
    values += [gain(FORKMERGE, part="pairs"), minimum_detectable(CONFIG.seeds) * sd]
    values += [gain(FORKMERGE), gain(TWICE), transfer, p, gain(EACH)]
    values += [cost(5, CONFIG.keep), gain(EACH, of=FORKMERGE)]
    values += [gain(FORKMERGE, of=POST), loss(POST, "semeion")]
    values += [gain(POST, "mnist_m", of=FORKMERGE), gain(GRID), loss(GRID, "semeion")]
    quoted.check(section("# ForkMerge", "Two measures"), values)
    three = [gain(EW, x, part="pairs") for x in ("mnist", "mnist_m", "optdigits")]
    assert all(low < 0 < high for _, low, high in three)
    assert max(LABELS.values(), key=lambda row: accuracy(row).mean()) == EACH
    assert (cost(2), len(CONFIG.lambdas), len(PAIRS)) == (2, 4, 20)
    for row, worse, better in ((EW, 8, 0), (FORKMERGE, 0, 0)):
        gains = gains_of_pairs(row).T
        sign = np.sign(gains.mean(0))
        sign[benjamini_hochberg(paired(0 * gains, gains).p) >= 0.05] = 0
        assert ((sign < 0).sum(), (sign > 0).sum()) == (worse, better)
    assert (gains_of_pairs(FORKMERGE).mean(1) < 0).sum() == 7


def test_measures():
    margin = quoted.decisions("forkmerge")["conflict-not-predictive"].claim.smallest
    found = {m: [spearman(m, x) for x in WEIGHTS] for m in ("discrepancy", "cosine")}
    cosines = {(t, a, x): [] for t, a in PAIRS for x in WEIGHTS}
    for x in rows(part="points", column="last"):
        cosines[x["target"], x["aux"], x["row"]].append(x["cosine"])
    means = [np.mean(x) for x in cosines.values()]
    values = [quoted.interval(spearman(x, *WEIGHTS)) for x in reversed(found)]
    values += [quoted.claimed("forkmerge", "conflict-not-predictive"), margin]
    values += [quoted.claimed("forkmerge", "shift-predictive")]
    values += [quoted.interval(np.mean(x, 0)) for x in found.values()]
    *small, large = found["discrepancy"]
    values += [quoted.interval(x) for x in (large, np.mean(small, 0))]
    star = in_code("figures.py", r"p_values\[a, t\] < ([\d.]+)")
    values += [max(means), quoted.in_paper("forkmerge", "gains"), star]
    quoted.check(section("Two measures", "## Run it"), values)
    assert (len(means), round(min(means), 2), min(means) < 0) == (80, 0, False)
    assert all(quoted.interval(x)[2] > 0 for x in small)


def test_protocol():
    rest = [LABELS[x] for x in LABELS if x not in MERGED]
    lost = [accuracy(x).mean() - accuracy(x, column="chosen").mean() for x in rest]
    (rate,) = {x["lr"] for x in rows(part="table", row=STL_2X)}
    most = [x for x in CONFIG.domains if x != "mnist_m"]
    less = [accuracy(FORKMERGE, target=x) - accuracy(STL_2X, target=x) for x in most]
    values = [steps.EMA_DECAY, in_code("problem.py", r"optax\.trace\(([\d.]+)")]
    values += [CONFIG.lrs, max(lost), rate, gain(FORKMERGE, of=STL_2X)[0]]
    values += [quoted.interval(np.mean(less, 0)), cost(5, CONFIG.keep)]
    quoted.check(section("## Run it"), values)
    assert np.median(lost) > 0  # most rows lose
    late = {x["row"] for x in rows(part="table") if x["late"] > 0.5}
    assert late == {EW, "GCS", "OL-AUX", "ARML", "Auto-λ", POST}
    assert (accuracy(STL_2X, target="mnist_m") <= 100 / 10).sum() == 1
