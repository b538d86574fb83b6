"""Searches for the merge weights Λ that maximise a validation score."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtljax import stack
from mtljax.balancer import check_choice
from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._checks import Direction, Numbers
from mtljax.forkmerge._merge import Head, Policy, Rules, make_rules, merge_leaves

Method: TypeAlias = Literal["auto", "grid", "greedy", "simplex", "random"]
Evaluation: TypeAlias = Literal["map", "vmap"]

_MOST_POINTS = 20_000  # maximum size of an exhaustive grid


class SearchResult(NamedTuple):
    """Result of :func:`search_merge`; n is the number of validation passes."""

    state: Any  # the merged state
    weights: Float[Array, " branches"]  # merge weights Λ*
    score: Float[Array, ""]  # score of the merged state
    branch_scores: Float[Array, " branches"]
    candidates: Float[Array, "n branches"]  # every Λ that was scored
    scores: Float[Array, " n"]


@dataclasses.dataclass(frozen=True)
class Search:
    """Options of the search of merge weights, see :func:`search_merge`.

    Attributes:
      method: Search method. ``"auto"`` follows the paper: the grid for two branches,
        the greedy search for more.
      levels: L, 5 in the paper.
      num_samples: Number of samples of ``"random"``.
      evaluation: ``"map"`` scores candidates one by one. ``"vmap"`` scores them in one
        batch and needs the memory of all of them.
    """

    method: Method = "auto"
    levels: int = 5
    num_samples: int = 32
    evaluation: Evaluation = "map"


class Plan(NamedTuple):
    """The static part of a search; hashable, so that the search is compiled once."""

    score: Callable[..., Any]
    search: Search  # its method is resolved, never "auto"
    sign: int
    rules: Rules
    refresh: Callable[[Any], Any] | None


class Inputs(NamedTuple):
    """The arrays of a search."""

    branches: Any
    args: tuple[Any, ...]  # further arguments of the score
    key: Any
    branch_weights: Any
    initial: Any


def simplex_points(num_branches: int, levels: int) -> list[list[float]]:
    """Returns all points of the simplex whose entries are multiples of ``1 / levels``.

    There are ``C(levels + B − 1, B − 1)`` points. The vertices come first.

    Examples:
      >>> simplex_points(2, 2)
      [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
    """
    count = math.comb(levels + num_branches - 1, num_branches - 1)
    if count > _MOST_POINTS:
        raise ValueError(
            f"search_merge: a simplex grid of {levels} levels over {num_branches} "
            f"branches has {count} points, but at most {_MOST_POINTS} are supported; "
            "use method='greedy', or fewer levels."
        )
    vertices = [
        [float(i == j) for j in range(num_branches)] for i in range(num_branches)
    ]
    inner = []
    slots = range(levels + num_branches - 1)
    for bars in itertools.combinations(slots, num_branches - 1):  # stars and bars
        edges = [-1, *bars, levels + num_branches - 1]
        parts = [b - a - 1 for a, b in itertools.pairwise(edges)]
        if max(parts) < levels:
            inner.append([part / levels for part in parts])
    return vertices + inner


def validate(score: Callable[..., Any], state: Any, args: tuple[Any, ...]) -> Array:
    """Runs one validation pass and returns a scalar, at least float32."""
    found = score(state, *args)
    if not hasattr(found, "shape") or jnp.shape(found) != ():
        what = (
            f"an array of shape {jnp.shape(found)}"
            if hasattr(found, "shape")
            else f"a {type(found).__name__}"
        )
        raise ValueError(
            "search_merge: the score must be a scalar array, because it ranks merged "
            f"models, not {what}."
        )
    return found.astype(stack.wide_dtype(jnp.result_type(found)))


def merged_state(plan: Plan, inputs: Inputs, weights: Array) -> Any:
    """Returns the candidate of one Λ, after ``refresh``."""
    state = merge_leaves(
        "search_merge",
        inputs.branches,
        weights,
        plan.rules,
        branch_weights=inputs.branch_weights,
        initial=inputs.initial,
    )
    return state if plan.refresh is None else plan.refresh(state)


def _score_all(plan: Plan, inputs: Inputs, candidates: Array) -> Array:
    """Returns scores ``[n]``; larger is better, and NaN becomes the worst score."""

    def one(weights):
        state = merged_state(plan, inputs, weights)
        found = plan.sign * validate(plan.score, state, inputs.args)
        return jnp.where(jnp.isnan(found), -jnp.inf, found)

    if plan.search.evaluation == "vmap":
        return jax.vmap(one)(candidates)
    return lax.map(one, candidates)


def _greedy(plan: Plan, inputs: Inputs, num_branches: int):
    """Algorithm 3: adds to the best branch the best share of each other branch."""
    corners = jnp.eye(num_branches)
    single = _score_all(plan, inputs, corners)
    order = jnp.argsort(-single)
    shares = jnp.arange(1, plan.search.levels + 1) / plan.search.levels

    def add(carry, place):
        raw, best = carry  # unnormalised weights, sorted by score
        mean = raw.sum() / place
        more = jax.nn.one_hot(place, num_branches)
        tried = raw[None] + shares[:, None] * mean * more[None]
        normal = tried / tried.sum(1, keepdims=True)
        candidates = jnp.zeros_like(normal).at[:, order].set(normal)
        scores = _score_all(plan, inputs, candidates)
        # The share zero is the current mixture, which is already scored.
        at = jnp.argmax(scores)
        better = scores[at] > best
        raw = jnp.where(better, tried[at], raw)
        return (raw, jnp.where(better, scores[at], best)), (candidates, scores)

    start = (corners[0], single[order[0]])
    places = jnp.arange(1, num_branches)
    (raw, best), (candidates, scores) = lax.scan(add, start, places)
    weights = jnp.zeros_like(raw).at[order].set(raw / raw.sum())
    candidates = jnp.concatenate([corners, candidates.reshape(-1, num_branches)])
    return weights, best, single, candidates, jnp.concatenate([single, scores.ravel()])


def _candidates(plan: Plan, inputs: Inputs, num_branches: int) -> Array:
    """Returns the candidates, vertices first, so that a single branch wins a tie."""
    if plan.search.method == "random":
        mixed = jax.random.dirichlet(
            inputs.key, jnp.ones(num_branches), (plan.search.num_samples,)
        )
        return jnp.concatenate([jnp.eye(num_branches), mixed])
    return jnp.array(simplex_points(num_branches, plan.search.levels))


def run_search(plan: Plan, inputs: Inputs) -> SearchResult:
    """Runs the search as one function that can be compiled."""
    num_branches = jax.tree.leaves(inputs.branches)[0].shape[0]
    if plan.search.method == "greedy":
        weights, best, single, candidates, scores = _greedy(plan, inputs, num_branches)
    else:
        candidates = _candidates(plan, inputs, num_branches)
        scores = _score_all(plan, inputs, candidates)
        at = jnp.argmax(scores)
        weights, best = candidates[at], scores[at]
        single = scores[:num_branches]
    return SearchResult(
        merged_state(plan, inputs, weights),
        weights,
        plan.sign * best,
        plan.sign * single,
        candidates,
        plan.sign * scores,
    )


@functools.partial(jax.jit, static_argnums=0)
def _compiled(plan: Plan, inputs: Inputs) -> SearchResult:
    return run_search(plan, inputs)


def make_plan(
    score: Callable[..., Any],
    num_branches: int,
    method: Method | Search,
    *,
    direction: Direction,
    policies: Mapping[str, Policy] | None,
    heads: Mapping[str, Head] | None,
    refresh: Callable[[Any], Any] | None,
) -> Plan:
    """Validates the options of a search and resolves ``"auto"``."""
    name = "search_merge"
    search = method if isinstance(method, Search) else Search(method)
    chosen = search.method
    check_choice(name, "method", chosen, Method)
    check_choice(name, "evaluation", search.evaluation, Evaluation)
    sign = checks.sign_of(name, direction)
    checks.positive(name, "levels", search.levels)
    checks.positive(name, "num_samples", search.num_samples)
    if chosen == "auto":
        chosen = "simplex" if num_branches <= 2 else "greedy"  # "grid" for two branches
    if chosen == "grid":
        if num_branches != 2:
            raise ValueError(
                f"{name}: method='grid' is the search of Algorithm 1, for 2 branches, "
                f"not {num_branches}; use 'greedy' or 'simplex'."
            )
        chosen = "simplex"  # has the same points
    if chosen == "simplex":
        simplex_points(num_branches, search.levels)  # raises if there are too many
    rules = make_rules(name, policies, heads)
    search = dataclasses.replace(search, method=chosen)
    return Plan(score, search, sign, rules, refresh)


def search_merge(
    branches: Any,
    score: Callable[..., Any],
    validation: Any = None,
    *,
    method: Method | Search = "auto",
    direction: Direction = "max",
    key: Any = None,
    policies: Mapping[str, Policy] | None = None,
    heads: Mapping[str, Head] | None = None,
    branch_weights: Numbers | None = None,
    initial: Any = None,
    refresh: Callable[[Any], Any] | None = None,
) -> SearchResult:
    """Searches for the convex combination of branches with the best score.

    The search is ``Λ* = argmax_{Λ ∈ simplex} P̂(Σ_b Λ_b θ^b)`` over a finite set of
    candidates. The set always contains every single branch. On the searched set, the
    result is therefore never worse than the best branch. To estimate its performance on
    other data, use a split that was not searched (:func:`split_validation`).

    - ``"grid"``: two branches, ``λ ∈ {0, 1/L, …, 1}`` (Algorithm 1). L + 1 passes.
    - ``"greedy"``: adds the branches in descending order of their scores to a mixture
      (Algorithm 3). The share of a branch is a multiple ``{0, 1/L, …, 1}`` of the mean
      weight so far. The best share is used if it improves the score. The best branch
      has at least the weight 1/2 relative to the second. ``B + L (B − 1)`` passes,
      because the mixture with a share of zero is already scored.
    - ``"simplex"``: all multiples of 1/L. ``C(L + B − 1, B − 1)`` passes: 6, 21, 56,
      252 for 2, 3, 4, 6 branches and L = 5.
    - ``"random"``: the single branches and uniform samples from the simplex.

    Args:
      branches: The branches, with leaves ``[B, ...]``.
      score: P̂, ``score(state) -> scalar``, or ``score(state, validation)`` if
        ``validation`` is given. NaN is the worst score. The function must be pure. It
        is compiled once for every function object and set of options.
      validation: Arrays of the validation set, not empty.
      method: One of the methods above, or a :class:`Search` with all options.
        ``"auto"`` follows the paper: the grid for two branches, greedy for more.
      direction: Whether a large (``"max"``: accuracy) or a small (``"min"``: error)
        score is good.
      key: Random key for ``"random"``.
      policies: See :func:`merge`.
      heads: See :func:`merge`.
      branch_weights: See :func:`merge`.
      initial: See :func:`merge`.
      refresh: ``refresh(state) -> state``. It is applied to every candidate before it
        is scored, and to the result. An example is :func:`recompute_statistics` for
        batch normalisation.

    Returns:
      :class:`SearchResult`: The merged state, Λ*, its score, the scores of the
      branches, and all candidates.

    Raises:
      ValueError: If the validation set is empty, if ``direction`` or ``method`` is
        unknown, if ``"grid"`` is used with more than two branches, or if the score is
        not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> branches = jnp.array([0.0, 1.0, 3.0])
      >>> found = forkmerge.search_merge(branches, lambda w: -jnp.square(w - 0.8))
      >>> found.weights.tolist(), round(float(found.score), 6)
      ([0.1667, 0.8333, 0.0], -0.001111)

    References:
      Jiang et al., `ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning
      <https://arxiv.org/abs/2301.12618>`_, 2023, Algorithms 1 and 3.
    """
    name = "search_merge"
    num_branches = checks.count_branches(name, branches)
    plan = make_plan(
        score,
        num_branches,
        method,
        direction=direction,
        policies=policies,
        heads=heads,
        refresh=refresh,
    )
    if plan.search.method == "random" and key is None:
        raise ValueError(
            f"{name}: method='random' samples candidates at random and needs key=."
        )
    args = checks.score_args(name, validation)
    if branch_weights is not None:
        branch_weights = checks.branch_weights(name, branch_weights, num_branches)
    inputs = Inputs(
        jax.tree.map(jnp.asarray, branches),
        args,
        key,
        branch_weights,
        initial,
    )
    return _compiled(plan, inputs)


def split_validation(
    validation: Any, *, key: Any, report: float = 0.5
) -> tuple[Any, Any]:
    """Splits a validation set into two disjoint parts, for search and for report.

    A search selects the best of its candidates, so its score is optimistic. The
    difference between the scores on both parts estimates this optimism.

    Args:
      validation: Pytree of arrays ``[N, ...]``.
      key: Random key of the shuffle.
      report: Share of the second part. Both parts get at least one example.

    Returns:
      A pair ``(search, report)``.

    Raises:
      ValueError: If there are fewer than two examples, if lengths differ, or if
        ``report`` is outside (0, 1).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.forkmerge import split_validation
      >>> parts = split_validation(jnp.arange(10), key=jax.random.key(0), report=0.3)
      >>> [len(part) for part in parts]
      [7, 3]
    """
    count = _count_examples("split_validation", validation)
    if not 0 < report < 1:
        raise ValueError(
            f"split_validation: report={report} must lie between 0 and 1, both "
            "excluded."
        )
    if count < 2:
        raise ValueError(
            f"split_validation: {count} example cannot be split in two. Pass at least "
            "2 examples."
        )
    size = min(max(round(report * count), 1), count - 1)
    order = jax.random.permutation(key, count)
    return _rows_of(validation, order[size:]), _rows_of(validation, order[:size])


def subsample(validation: Any, size: int, *, key: Any) -> Any:
    """Samples ``size`` examples of a validation set without replacement.

    Args:
      validation: Pytree of arrays ``[N, ...]``.
      size: Number of examples, at most N.
      key: Random key. Use a new one for every merge.

    Returns:
      Arrays ``[size, ...]``.

    Raises:
      ValueError: If the set is empty or has fewer than ``size`` examples.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.forkmerge import subsample
      >>> subsample({"x": jnp.arange(9)}, 4, key=jax.random.key(0))["x"].shape
      (4,)
    """
    checks.positive("subsample", "size", size)
    count = _count_examples("subsample", validation)
    if size > count:
        raise ValueError(
            f"subsample: size={size}, but the validation set has {count} examples."
        )
    rows = jax.random.choice(key, count, (size,), replace=False)
    return _rows_of(validation, rows)


def _rows_of(tree: Any, rows: Array) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x)[rows], tree)


def _count_examples(name: str, validation: Any) -> int:
    checks.validation_set(name, validation)
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(validation)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"{name}: the arrays of the validation set must have one common length, "
            f"not {sorted(lengths)}."
        )
    return lengths.pop()[0]
