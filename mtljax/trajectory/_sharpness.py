"""Sharpness under worst-case, SAM and random perturbations."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from mtljax.trajectory import _trees as trees

Loss = Callable[[Any, Any], Any]


class Sharpness(NamedTuple):
    """Rise of the loss, averaged over n batches."""

    sharpness: Float[Array, ""]  # NaN if a loss in the search was not finite
    per_batch: Float[Array, " n"]
    loss: Float[Array, ""]  # at the centre; a rise below eps · loss is rounding


class _Ascent(NamedTuple):
    """Iterate and record of APGD."""

    point: Any
    grad: Any
    before: Any  # the previous point, for momentum
    best_point: Any
    best_grad: Any
    best: Array
    step: Array
    improved: Array  # steps since the last checkpoint that raised the best value
    start_step: Array  # step size and best at the last checkpoint
    start_best: Array
    finite: Array


def apgd_checkpoints(num_iters: int) -> list[tuple[int, int]]:
    """Returns the iterations after which APGD may halve its step, with intervals.

    The first checkpoint is after 22 % of the iterations. Each interval is shorter than
    the previous one by 3 % of the iterations, and at least 6 % long. The counts are
    exact. The reference code rounds 70 % of 20 iterations up to 15.

    Args:
      num_iters: Total number of iterations.

    Returns:
      Pairs ``(iteration, iterations since the previous checkpoint)``.

    Examples:
      >>> [at for at, _ in apgd_checkpoints(20)]
      [5, 9, 12, 14, 16, 18, 19]
    """
    at, share, before = 0.22, 0.22, 0
    found = []
    while (step := math.ceil(at * num_iters - 1e-9)) < num_iters:
        if step > before:
            found.append((step, step - before))
        before, share = step, max(share - 0.03, 0.06)
        at += share
    return found


def worst_case_sharpness(
    loss: Loss,
    params: Any,
    batches: Any,
    *,
    rho: float,
    num_iters: int = 20,
    momentum: float = 0.75,
    adaptive: bool = True,
) -> Sharpness:
    r"""Computes the worst-case m-sharpness in a box that is relative to the weights.

    .. math:: E_B \max_{|ε_i| \le ρ |θ_i|} L^B(θ + ε) - L^B(θ)

    The maximisation uses APGD from ε = 0, with signed steps of ``2 ρ |θ|``, momentum
    and projection. If progress stalls, the step is halved and the iterate is reset to
    the best point. The result is a lower bound of the maximum. A weight of exactly 0
    cannot change. For small ρ the value is :math:`ρ ⟨|θ|, |∇L^B|⟩`. It depends on ρ, so
    compare values with equal ρ only. Mueller et al. specify the quantity but not the
    solver. The solver is that of Andriushchenko et al., which they cite, except that
    the iterate is also reset.

    Args:
      loss: ``loss(params, batch) -> ()``, a mean over the batch.
      params: Parameters to perturb. The paper uses the shared parameters.
      batches: Leaves ``[n, B, ...]``. The paper uses n = 16 batches of B = 128.
      rho: Half-width of the box, relative to the weights (absolute if not adaptive).
      num_iters: Number of iterations.
      momentum: Share of the projected step in the next iterate.
      adaptive: Whether the box is relative to the weights.

    Returns:
      :class:`Sharpness`: The mean over batches, at least 0. The cost is
      n (num_iters + 1) gradients. The memory is 7 copies of the parameters.

    Raises:
      ValueError: If ``rho`` is negative or not finite, if ``momentum`` is not in
        (0, 1], if ``num_iters`` is not positive, or if there is no batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import worst_case_sharpness
      >>> loss = lambda w, x: (w * x).sum()
      >>> w, x = jnp.array([1.0, -2.0]), jnp.array([[1.0, 1.0]])
      >>> round(float(worst_case_sharpness(loss, w, x, rho=0.1).sharpness), 5)
      0.3

    References:
      Mueller et al., `arXiv 2408.14677 <https://arxiv.org/abs/2408.14677>`_, 2024,
      eq. 3. Andriushchenko et al., `arXiv 2302.07011
      <https://arxiv.org/abs/2302.07011>`_, 2023. Croce and Hein, `arXiv 2003.01690
      <https://arxiv.org/abs/2003.01690>`_, 2020 (APGD).
    """
    name = "worst_case_sharpness"
    check_rho(name, rho)
    trees.check_positive(name, "num_iters", num_iters)
    if not 0 < momentum <= 1:
        raise ValueError(f"{name}: momentum={momentum} must lie in (0, 1].")
    trees.check_params(name, params)
    trees.check_length(name, "batches", batches)
    halves_at = dict(apgd_checkpoints(num_iters))
    # Length of the interval that the check after iteration t covers; 0 for no check.
    lengths = jnp.array([halves_at.get(t, 0) for t in range(1, num_iters + 1)])
    centre = trees.widen(params)
    box = jax.tree.map(jnp.abs if adaptive else jnp.ones_like, centre)

    def single(batch):
        def value_and_grad(eps):
            moved = lambda e: trees.wide(loss(trees.shifted(params, e), batch))
            return jax.value_and_grad(moved)(eps)

        zeros = jax.tree.map(jnp.zeros_like, centre)
        value, grad = value_and_grad(zeros)
        step = jnp.full_like(value, 2 * rho)
        start = _Ascent(
            point=zeros,
            grad=grad,
            before=zeros,
            best_point=zeros,
            best_grad=grad,
            best=value,
            step=step,
            improved=jnp.int32(0),
            start_step=step,
            start_best=value,
            finite=jnp.isfinite(value),
        )

        def advance(state, length):
            state = _climb(state, value_and_grad, box, rho, momentum)
            return _check_progress(state, length), None

        end, _ = jax.lax.scan(advance, start, lengths)
        return jnp.where(end.finite, end.best - value, jnp.nan), value

    return _mean(jax.lax.map(single, batches))


def _climb(state: _Ascent, value_and_grad, box, rho, momentum) -> _Ascent:
    """Performs one projected step with momentum."""

    def move(point, grad, scale, before):
        raised = point + state.step.astype(point.dtype) * scale * jnp.sign(grad)
        inside = jnp.clip(raised, -rho * scale, rho * scale)
        return momentum * inside + (1 - momentum) * before

    point = jax.tree.map(move, state.point, state.grad, box, state.before)
    value, grad = value_and_grad(point)
    better = value > state.best
    return state._replace(
        point=point,
        grad=grad,
        before=state.point,
        best_point=_choose(better, point, state.best_point),
        best_grad=_choose(better, grad, state.best_grad),
        best=jnp.where(better, value, state.best),
        improved=state.improved + better,
        finite=state.finite & jnp.isfinite(value),
    )


def _check_progress(state: _Ascent, length: Array) -> _Ascent:
    """Halves the step and returns to the best point if progress stalls."""
    due = length > 0
    few = state.improved < 0.75 * length
    stuck = (state.start_step == state.step) & (state.start_best == state.best)
    halve = due & (few | stuck)
    return state._replace(
        point=_choose(halve, state.best_point, state.point),
        grad=_choose(halve, state.best_grad, state.grad),
        before=_choose(halve, state.best_point, state.before),
        start_step=jnp.where(due, state.step, state.start_step),
        start_best=jnp.where(due, state.best, state.start_best),
        improved=jnp.where(due, 0, state.improved),
        step=jnp.where(halve, state.step / 2, state.step),
    )


def _choose(flag: Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), a, b)


def _mean(pairs: tuple[Array, Array]) -> Sharpness:
    rises, losses = pairs
    return Sharpness(rises.mean(), rises, losses.mean())


def check_rho(name: str, rho: Any) -> None:
    """Raises an error unless the radius is a finite number of at least 0."""
    if not isinstance(rho, int | float) or not 0 <= rho < math.inf:
        raise ValueError(f"{name}: rho={rho!r} must be a finite number of at least 0.")


def sam_sharpness(
    loss: Loss, params: Any, batches: Any, *, rho: float, adaptive: bool = False
) -> Sharpness:
    """Computes the rise of the loss along its own gradient, in one step.

    The rise is ``L(θ + ρ g/‖g‖) − L(θ)``. If adaptive, the perturbation is
    ``ρ |θ|² g / ‖|θ| g‖``. To first order the rise is ``ρ ‖g‖`` (``ρ ‖|θ| g‖`` if
    adaptive). It is a lower bound of the worst case in that ball.

    Args:
      loss: ``loss(params, batch) -> ()``.
      params: Parameters to perturb.
      batches: Leaves ``[n, ...]``.
      rho: Radius in the Euclidean norm (relative to the weights if adaptive).
      adaptive: Whether the norm is relative to the weights.

    Returns:
      :class:`Sharpness`: The mean over batches, 0 if the gradient is zero. The cost is
      n gradients and n forward passes. The memory is 3 copies of the parameters.

    Raises:
      ValueError: If ``rho`` is negative or not finite, or if there is no batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.trajectory import sam_sharpness
      >>> loss = lambda w, x: x.sum() * (w**2).sum()
      >>> found = sam_sharpness(loss, jnp.array([3.0, 4.0]), jnp.ones((1, 1)), rho=1.0)
      >>> float(found.sharpness)  # 6² − 5²
      11.0

    References:
      Foret et al., `arXiv 2010.01412 <https://arxiv.org/abs/2010.01412>`_, 2020. Kwon
      et al., `arXiv 2102.11600 <https://arxiv.org/abs/2102.11600>`_, 2021.
    """
    check_rho("sam_sharpness", rho)
    trees.check_params("sam_sharpness", params)
    trees.check_length("sam_sharpness", "batches", batches)
    centre = trees.widen(params)

    def single(batch):
        value, grad = jax.value_and_grad(lambda p: trees.wide(loss(p, batch)))(params)
        scaled = trees.widen(grad)
        if adaptive:
            scaled = jax.tree.map(lambda g, p: jnp.abs(p) * g, scaled, centre)
        square = trees.square_norm(scaled)
        moves = square > 0
        factor = jnp.where(moves, rho / jnp.sqrt(jnp.where(moves, square, 1)), 0)
        if adaptive:
            scaled = jax.tree.map(lambda g, p: jnp.abs(p) * g, scaled, centre)
        # A NaN gradient must give NaN and is not treated as a zero gradient.
        factor = jnp.where(jnp.isnan(square), jnp.nan, factor)
        return trees.wide(
            loss(trees.shifted(params, scaled, factor), batch)
        ) - value, value

    return _mean(jax.lax.map(single, batches))


def average_sharpness(
    loss: Loss,
    params: Any,
    batches: Any,
    key: PRNGKeyArray,
    *,
    rho: float,
    num_draws: int = 16,
    adaptive: bool = True,
) -> Sharpness:
    """Computes the mean rise of the loss under Gaussian noise on the weights.

    The value is ``E_{ε ~ N(0, ρ² θ²)} L(θ + ε) − L(θ)``. To second order it is
    ``ρ²/2 Σ_i θ_i² H_ii``. It can be negative.

    Args:
      loss: ``loss(params, batch) -> ()``.
      params: Parameters to perturb.
      batches: Leaves ``[n, ...]``.
      key: Random key of the noise. All batches use the same samples.
      rho: Standard deviation, relative to the weights (absolute if not adaptive).
      num_draws: Number of samples, over which the mean is taken.
      adaptive: Whether the noise is proportional to the weights.

    Returns:
      :class:`Sharpness`: The mean over batches and samples. The cost is
      n (num_draws + 1) forward passes. The memory is 3 copies of the parameters.

    Raises:
      ValueError: If ``rho`` is negative or not finite, or if ``num_draws`` is not
        positive.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import average_sharpness
      >>> loss = lambda w, x: x.sum() * w
      >>> args = (jnp.array(2.0), jnp.ones((1, 1)), jax.random.key(0))
      >>> float(average_sharpness(loss, *args, rho=0.0).sharpness)
      0.0

    References:
      Andriushchenko et al., `arXiv 2302.07011 <https://arxiv.org/abs/2302.07011>`_,
      2023.
    """
    name = "average_sharpness"
    check_rho(name, rho)
    trees.check_positive(name, "num_draws", num_draws)
    trees.check_params(name, params)
    trees.check_length(name, "batches", batches)
    keys = jax.random.split(key, num_draws)

    def single(batch):
        value = trees.wide(loss(params, batch))

        def rise(key):
            noise = random_tree(key, params)
            if adaptive:
                noise = jax.tree.map(lambda e, p: jnp.abs(p) * e, noise, params)
            return trees.wide(loss(trees.shifted(params, noise, rho), batch)) - value

        return jax.lax.map(rise, keys).mean(), value

    return _mean(jax.lax.map(single, batches))


def random_tree(key: PRNGKeyArray, params: Any) -> Any:
    """Samples standard normal entries for ``params``, at least float32."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        jax.random.normal(k, jnp.shape(p), jnp.promote_types(p.dtype, jnp.float32))
        for k, p in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)
