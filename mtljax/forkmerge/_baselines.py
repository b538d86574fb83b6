"""Baselines of auxiliary-task learning: post-training and grid search."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._branches import BranchStep, Strategy, fork, train_branches
from mtljax.forkmerge._checks import Direction, Numbers
from mtljax.forkmerge._realise import Realisation
from mtljax.forkmerge._search import validate


class GridSearchResult(NamedTuple):
    """Result of :func:`grid_search`."""

    state: Any  # the best train state
    weights: Float[Array, " tasks"]  # task weights of the best state
    best: Array  # index of the best candidate
    scores: Float[Array, " n"]  # scores of all candidates


def post_train(
    num_tasks: int, *, joint_steps: int, target: int = 0
) -> Callable[[ArrayLike], Float[Array, " tasks"]]:
    """Builds the schedule of post-training: all tasks first, then the target alone.

    Args:
      num_tasks: T.
      joint_steps: Number of steps with all weights equal to one.
      target: Index of the target task, whose weight remains one.

    Returns:
      A traceable function ``weights(step)`` that returns the task weights, shape
      ``[T]``.

    Raises:
      ValueError: If ``target`` is not the index of a task, or if ``joint_steps`` is
        negative.

    Examples:
      >>> from mtljax.forkmerge import post_train
      >>> weights = post_train(3, joint_steps=100)
      >>> weights(99).tolist(), weights(100).tolist()
      ([1.0, 1.0, 1.0], [1.0, 0.0, 0.0])

    References:
      Jiang et al., `ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning
      <https://arxiv.org/abs/2301.12618>`_, 2023, which uses this baseline.
    """
    checks.task_index("post_train", num_tasks, target)
    if isinstance(joint_steps, bool) or joint_steps < 0:
        raise ValueError(
            f"post_train: joint_steps must not be negative, not {joint_steps!r}."
        )

    def weights(step: ArrayLike) -> Float[Array, " tasks"]:
        alone = jax.nn.one_hot(target, num_tasks)
        return jnp.where(jnp.asarray(step) < joint_steps, jnp.ones(num_tasks), alone)

    return weights


def weight_grid(
    num_tasks: int, values: Sequence[float] = (0.3, 1.0, 3.0)
) -> Float[Array, "n tasks"]:
    """Returns all combinations of task weights, ``len(values) ** T`` rows.

    The default is the grid of the paper's comparison with scalarisation (27 points for
    3 tasks).

    Args:
      num_tasks: T.
      values: Possible values of every weight.

    Returns:
      Candidates ``[n, T]`` for :func:`grid_search`.

    Examples:
      >>> from mtljax.forkmerge import weight_grid
      >>> weight_grid(2, (1.0, 2.0)).tolist()
      [[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]
    """
    rows = list(itertools.product(values, repeat=num_tasks))
    return jnp.array(rows, jnp.float32)


def grid_search(
    step: BranchStep,
    state: Any,
    candidates: Numbers,
    batches: Any,
    score: Callable[..., Any],
    *,
    validation: Any = None,
    direction: Direction = "max",
    data: Any = None,
    realisation: Realisation = "sum",
    key: Any = None,
    strategy: Strategy = "auto",
    mesh: Mesh | None = None,
) -> GridSearchResult:
    """Trains with every candidate of task weights and returns the best model.

    The candidates are branches without merges, so they train in one program.

    Args:
      step: See :func:`train_branches`.
      state: The train state from which all candidates start.
      candidates: Task weights, shape ``[n, T]``.
      batches: See :func:`train_branches`.
      score: ``score(state)`` or ``score(state, validation)``.
      validation: See :func:`search_merge`.
      direction: ``"max"`` if a large score is good, ``"min"`` if a small one is.
      data: See :func:`train_branches`.
      realisation: See :func:`train_branches`.
      key: See :func:`train_branches`.
      strategy: See :func:`train_branches`.
      mesh: See :func:`train_branches`.

    Returns:
      :class:`GridSearchResult`: The best state, its weights and index, and all scores.
      The cost is n training runs.

    Raises:
      ValueError: If the candidates are not a matrix, or if :func:`train_branches` or
        :func:`search_merge` would raise an error for the other arguments.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import grid_search, weight_grid
      >>> def step(w, weights, batch):
      ...     return w + weights.sum() * batch, {}
      >>> found = grid_search(step, jnp.float32(0), weight_grid(2, (0.0, 1.0)),
      ...                     jnp.ones(3), lambda w: -jnp.abs(w - 5))
      >>> found.weights.tolist(), found.scores.tolist()
      ([1.0, 1.0], [-5.0, -2.0, -2.0, -1.0])
    """
    sign = checks.sign_of("grid_search", direction)
    args = checks.score_args("grid_search", validation)
    candidates = jnp.asarray(candidates)
    if candidates.ndim != 2:
        raise ValueError(
            f"grid_search: candidates have shape {candidates.shape}; they must be "
            "(n, tasks)."
        )
    states, _ = train_branches(
        step,
        fork(state, candidates.shape[0]),
        candidates,
        batches,
        data=data,
        realisation=realisation,
        key=key,
        strategy=strategy,
        mesh=mesh,
    )
    scores = jax.lax.map(lambda s: validate(score, s, args), states)
    signed = sign * scores
    index = jnp.argmax(jnp.where(jnp.isnan(signed), -jnp.inf, signed))
    best = jax.tree.map(lambda x: x[index], states)
    return GridSearchResult(best, candidates[index], index, scores)
