"""Auto-λ: task weights by the exact gradient of the target's loss one step ahead."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from mtljax.balancer import check_number, commit
from mtljax.gradients import check_losses
from mtljax.types import Losses, Weights


class AutoLambdaState(NamedTuple):
    """State of :func:`auto_lambda`."""

    weights: Weights  # λ
    optimizer: Any  # of λ
    hypergradient: Weights  # of the last update, for logging


class AutoLambda(NamedTuple):
    """A pair of functions; see :func:`auto_lambda`."""

    init: Callable[[], AutoLambdaState]
    update: Callable[..., AutoLambdaState]


def hypergradient(
    task_losses: Callable[..., Losses],
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    weights: Weights,
    *,
    train: tuple[Any, ...],
    validation: tuple[Any, ...],
    primary: Weights,
) -> Weights:
    """The gradient ``∇_λ Σ_p L_p^val(θ'(λ))`` of the loss after one step.

    ``θ'(λ)`` is the step of the optimiser on ``Σ λ_i L_i``. With ``v = ∇L^val(θ')`` and
    u what a backward pass through the optimiser makes of v, entry i is
    ``<u, ∇L_i(θ)>``: one forward-mode pass (``jvp``) of the T losses along u gives them
    all. For SGD ``u = −η v``, whatever its momentum or decay; for Adam the derivative
    of its normalisation is included. No finite differences.

    Args:
      task_losses: ``task_losses(params, *args) -> losses[T]``.
      optimizer: The optimiser of the model, at the state it has now.
      params: θ.
      opt_state: Its state; not changed.
      weights: λ ``[T]``.
      train: Further arguments of ``task_losses`` for the training batch.
      validation: Those for the validation batch.
      primary: Weights ``[T]`` of the validation losses: one for the tasks that matter.

    Returns:
      The gradient ``[T]``. Cost: two gradients, a pass back through the optimiser and
      one forward-mode pass.

    Examples:
      >>> losses = lambda w: jnp.stack([(w - 1) ** 2, (w + 1) ** 2])
      >>> sgd = optax.sgd(0.1)
      >>> w = jnp.array(0.0)
      >>> hypergradient(losses, sgd, w, sgd.init(w), jnp.ones(2), train=(),
      ...               validation=(), primary=jnp.array([1.0, 0.0])).tolist()
      [-0.4, 0.4]
    """

    def train_losses(p):
        return check_losses(task_losses(p, *train))

    gradient = jax.grad(lambda p: jnp.vdot(weights, train_losses(p)))(params)

    def ahead(g):
        updates, _ = optimizer.update(g, opt_state, params)
        return optax.apply_updates(params, updates)

    new, back = jax.vjp(ahead, gradient)

    def objective(p):
        return jnp.vdot(primary, check_losses(task_losses(p, *validation)))

    (along,) = back(jax.grad(objective)(new))
    return jax.jvp(train_losses, (params,), (along,))[1]


def auto_lambda(
    num_tasks: int,
    task_losses: Callable[..., Losses],
    optimizer: optax.GradientTransformation,
    *,
    primary: int | Sequence[int] = 0,
    learning_rate: ArrayLike = 1e-4,
    initial: ArrayLike = 0.1,
    weight_optimizer: optax.GradientTransformation | None = None,
) -> AutoLambda:
    """Auto-λ: learns task weights by looking one step ahead (bi-level, one step).

    Before every step of the model, ``λ <- λ − β ∇_λ Σ_p L_p^val(θ'(λ))`` through Adam,
    with ``θ'`` the parameters after a step with the present λ. The released code
    takes the product of Jacobian and vector by finite differences and always looks
    ahead by SGD with momentum and decay; here it is exact, for any optimiser
    (:func:`hypergradient`). Weights are not constrained, as there, and may become
    negative.

    Args:
      num_tasks: T.
      task_losses: ``task_losses(params, *args) -> losses[T]``.
      optimizer: The optimiser of the model.
      primary: Index or indices of the tasks that matter; the target.
      learning_rate: β, 1e-4 in the released code's dense prediction.
      initial: First value of every weight, 0.1 there.
      weight_optimizer: Of λ; Adam with ``learning_rate`` by default.

    Returns:
      ``init() -> state`` and ``update(state, params, opt_state, train, validation) ->
      state`` with tuples of the further arguments of ``task_losses`` for a training
      and a validation batch. The model then steps on ``Σ λ_i L_i`` of the training
      batch with ``state.weights``. Cost of an update: see :func:`hypergradient`.

    Raises:
      ValueError: If ``primary`` is not the index of a task or ``learning_rate`` not
        positive.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mtljax import forkmerge
      >>> losses = lambda w, x: jnp.stack([(w - 1) ** 2, (w + x) ** 2])
      >>> sgd = optax.sgd(0.1)
      >>> method = forkmerge.auto_lambda(2, losses, sgd, learning_rate=0.01)
      >>> w = jnp.array(0.0)
      >>> state = method.update(method.init(), w, sgd.init(w), (1.0,), (1.0,))
      >>> state.weights.tolist()  # the second task leads away from the first's goal
      [0.11, 0.09]

    References:
      Liu et al., `Auto-Lambda: Disentangling Dynamic Task Relationships
      <https://arxiv.org/abs/2202.03091>`_, 2022.
    """
    chosen = [primary] if isinstance(primary, int) else list(primary)
    for task in chosen:
        if not 0 <= task < num_tasks:
            raise ValueError(
                f"auto_lambda: primary={primary!r} must name some of {num_tasks} tasks "
                "by index."
            )
    if not chosen:
        raise ValueError("auto_lambda: primary names no task.")
    check_number("auto_lambda", "learning_rate", learning_rate, above=0)
    check_number("auto_lambda", "initial", initial)
    rate: Any = learning_rate
    inner = optax.adam(rate) if weight_optimizer is None else weight_optimizer

    def init() -> AutoLambdaState:
        weights = jnp.full(num_tasks, initial)
        state = AutoLambdaState(weights, inner.init(weights), jnp.zeros(num_tasks))
        return jax.tree.map(jnp.copy, state)  # no buffer twice: donation is safe

    def update(
        state: AutoLambdaState,
        params: Any,
        opt_state: Any,
        train: tuple[Any, ...],
        validation: tuple[Any, ...],
    ) -> AutoLambdaState:
        goal = jnp.zeros(num_tasks).at[jnp.array(chosen)].set(1)
        found = hypergradient(
            task_losses,
            optimizer,
            params,
            opt_state,
            state.weights,
            train=train,
            validation=validation,
            primary=goal,
        )
        found = found.astype(state.weights.dtype)
        updates, moments = inner.update(found, state.optimizer, state.weights)
        weights: Any = optax.apply_updates(state.weights, updates)
        # Where a loss or a gradient is not finite, the weights stay.
        new = AutoLambdaState(weights, moments, found)
        return commit(True, (), new, state)[1]

    return AutoLambda(init, update)
