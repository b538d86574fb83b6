"""Auto-λ: task weights from the gradient of the loss after one step."""

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
    optimizer: Any  # optimizer state of λ
    hypergradient: Weights  # gradient of the last update, for logging


class AutoLambda(NamedTuple):
    """Pair of functions that :func:`auto_lambda` returns."""

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
    """Computes the gradient ``∇_λ Σ_p L_p^val(θ'(λ))`` of the loss after one step.

    ``θ'(λ)`` are the parameters after a step of the optimizer on ``Σ λ_i L_i``. Let
    ``v = ∇L^val(θ')``, and let u be the pullback of v through the optimizer. Entry i is
    ``<u, ∇L_i(θ)>``. One forward-mode pass (``jvp``) of the T losses along u computes
    all entries. For SGD ``u = −η v``, with any momentum or decay. For Adam the
    derivative of its normalisation is included. No finite differences are used.

    Args:
      task_losses: A function ``task_losses(params, *args)`` that returns the losses,
        shape ``[T]``.
      optimizer: The optimizer of the model.
      params: θ.
      opt_state: The current state of the optimizer, which is not changed.
      weights: λ, shape ``[T]``.
      train: Further arguments of ``task_losses`` for the training batch.
      validation: Further arguments of ``task_losses`` for the validation batch.
      primary: Weights of the validation losses, shape ``[T]``: 1 for target tasks.

    Returns:
      The gradient, shape ``[T]``. The cost is two gradients, one backward pass through
      the optimizer and one forward-mode pass.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from mtljax.forkmerge import hypergradient
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
    """Auto-λ: learns task weights by one-step bi-level optimisation.

    Before every step of the model, Adam performs ``λ <- λ − β ∇_λ Σ_p L_p^val(θ'(λ))``.
    Here ``θ'`` are the parameters after a step with the current λ. The released code
    approximates the product of Jacobian and vector by finite differences, and always
    uses SGD with momentum and decay for the step. Here the product is exact and
    available for any optimizer (:func:`hypergradient`). As in the released code, the
    weights are unconstrained and may become negative.

    Args:
      num_tasks: T.
      task_losses: A function ``task_losses(params, *args)`` that returns the losses,
        shape ``[T]``.
      optimizer: The optimizer of the model.
      primary: Index or indices of the target tasks.
      learning_rate: β. The released code uses 1e-4 for dense prediction.
      initial: Initial value of every weight, 0.1 in the released code.
      weight_optimizer: Optimizer of λ, by default Adam with ``learning_rate``.

    Returns:
      An :class:`AutoLambda` with the functions ``init() -> state`` and ``update(state,
      params, opt_state, train, validation) -> state``. ``train`` and ``validation``
      are tuples of the further arguments of ``task_losses`` for a training and a
      validation batch. After an update, train the model on ``Σ λ_i L_i`` of the
      training batch with λ from ``state.weights``. An update costs as much as
      :func:`hypergradient`. If a loss or a gradient is not finite, the state is
      unchanged.

    Raises:
      ValueError: If ``primary`` is not the index of a task, or if ``learning_rate`` is
        not positive.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mtljax import forkmerge
      >>> losses = lambda w, x: jnp.stack([(w - 1) ** 2, (w + x) ** 2])
      >>> sgd = optax.sgd(0.1)
      >>> method = forkmerge.auto_lambda(2, losses, sgd, learning_rate=0.01)
      >>> w = jnp.array(0.0)
      >>> state = method.update(method.init(), w, sgd.init(w), (1.0,), (1.0,))
      >>> state.weights.tolist()  # the second task has another optimum
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
        raise ValueError(
            "auto_lambda: primary names no task. Pass the index of a target task."
        )
    check_number("auto_lambda", "learning_rate", learning_rate, above=0)
    check_number("auto_lambda", "initial", initial)
    rate: Any = learning_rate
    inner = optax.adam(rate) if weight_optimizer is None else weight_optimizer

    def init() -> AutoLambdaState:
        weights = jnp.full(num_tasks, initial)
        state = AutoLambdaState(weights, inner.init(weights), jnp.zeros(num_tasks))
        # Copies ensure that no array occurs twice, so that the state may be donated.
        return jax.tree.map(jnp.copy, state)

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
        # If a loss or a gradient is not finite, the weights do not change.
        new = AutoLambdaState(weights, moments, found)
        return commit(True, (), new, state)[1]

    return AutoLambda(init, update)
