"""The one abstraction: an optax transformation that turns T gradients into one.

A :class:`Balancer` is an ``optax.GradientTransformationExtraArgs``: its input is
the *stacked* gradients (the tree of the parameters, every leaf ``[T, ...]``), its
output one update shaped like the parameters. It also says what it ``needs`` to
know, so that :func:`mtljax.value_and_balanced_grad` can compute the same update
without stacking anything when T numbers are enough.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mtljax import stack
from mtljax.types import Grads, Losses, Mask, Needs, Scale, Weights

# weigh(state, *, losses, gramian, mask) -> (weights, state)
WeighFn: TypeAlias = Callable[..., tuple[Weights, Any]]


class Balancer(optax.GradientTransformationExtraArgs):
    """A multi-task method as an optax transformation, still the pair (init, update).

    ``update(grads, state, params=None, *, losses=None, mask=None, **ignored)`` maps
    stacked gradients to one update. ``losses`` ``[T]`` is required by the methods
    that read them; ``mask`` ``[T]`` marks the tasks present in this batch: an absent
    task contributes nothing, its state is not touched, and the result is that of the
    method on the present tasks alone. A non-finite loss or gradient gives a
    non-finite update (for ``optax.apply_if_finite`` further down the chain to skip)
    and leaves the state as it was.

    Attributes:
      init: ``init(params) -> state``.
      update: As above.
      name: Name of the factory, used in errors and logs.
      num_tasks: T.
      needs: What the weights are a function of: ``"losses"`` (or nothing),
        ``"gramian"`` (``[T, T]``, and possibly the losses), or ``"grads"``.
      weigh: ``weigh(state, *, losses, gramian, mask) -> (weights[T], state)``; None
        when ``needs == "grads"``. The update is then ``sum_i weights[i] * grads[i]``.
      reads_losses: True when ``losses`` must be given.
      positive_losses: True when the method takes the logarithm of the losses.
      observe: For methods that look at the losses again *after* the step (FAMO):
        ``observe(state, *, losses, mask=None) -> state``; None for all others.
        Call it through :func:`mtljax.observe`.
    """

    name: str
    num_tasks: int
    needs: Needs
    weigh: WeighFn | None
    reads_losses: bool
    positive_losses: bool
    observe: Callable[..., Any] | None

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        *,
        name: str = "balancer",
        num_tasks: int = 0,
        needs: Needs = "grads",
        weigh: WeighFn | None = None,
        reads_losses: bool = False,
        positive_losses: bool = False,
        observe: Callable[..., Any] | None = None,
    ) -> "Balancer":
        """Attaches what the method reads to the pair (init, update)."""
        self = super().__new__(cls, init, update)  # pyright: ignore[reportCallIssue]
        self.name = name
        self.num_tasks = num_tasks
        self.needs = needs
        self.weigh = weigh
        self.reads_losses = reads_losses
        self.positive_losses = positive_losses
        self.observe = observe
        return self

    def __repr__(self) -> str:
        """Short: the name, T and what it needs."""
        return (
            f"Balancer({self.name}, num_tasks={self.num_tasks}, needs={self.needs!r})"
        )


def check_num_tasks(name: str, num_tasks: int) -> None:
    """Raises unless ``num_tasks`` is a positive integer."""
    if isinstance(num_tasks, bool) or not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(
            f"{name}: num_tasks must be a positive integer, not {num_tasks!r}."
        )


def check_choice(name: str, argument: str, value: Any, choices: Any) -> None:
    """Raises unless ``value`` is one of the choices (a tuple or a Literal)."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: {argument}={value!r} is not one of {listed}.")


def check_number(
    name: str,
    argument: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> None:
    """Raises unless a concrete hyper-parameter is a finite number in its range.

    A traced value cannot be judged and passes: this is what makes ``vmap`` over a
    hyper-parameter, a schedule and ``optax.inject_hyperparams`` possible.
    """
    if isinstance(value, Tracer):
        return
    bounds = (
        ("at least", at_least, operator.ge),
        ("above", above, operator.gt),
        ("at most", at_most, operator.le),
        ("below", below, operator.lt),
    )
    wanted = [(word, bound) for word, bound, _ in bounds if bound is not None]
    number = np.asarray(value)
    valid = number.shape == () and np.issubdtype(number.dtype, np.number)
    valid = valid and np.isrealobj(number) and bool(np.isfinite(number))
    if not valid or not all(
        holds(float(number), bound) for _, bound, holds in bounds if bound is not None
    ):
        required = " and ".join(f"{word} {bound:g}" for word, bound in wanted)
        raise ValueError(
            f"{name}: {argument} must be a finite number{' ' if required else ''}"
            f"{required}, not {value!r}."
        )


def commit(healthy: Any, update: Any, new: Any, old: Any) -> tuple[Any, Any]:
    """Applies the state policy to the result of one step.

    The update and the new state are returned if ``healthy`` holds and every entry of
    both is finite. Otherwise every entry of the update is NaN and the state is the old
    one, bit for bit. All methods, engines and wrappers end with this function.

    Args:
      healthy: Boolean scalar; False if an input of a present task was not usable.
      update: Tree of the update; ``MaskedNode`` is allowed.
      new: State that the method proposes.
      old: State before the step.

    Returns:
      The pair ``(update, state)``.
    """
    healthy = jnp.asarray(healthy)
    for leaf in jax.tree.leaves((update, new)):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            healthy &= jnp.isfinite(leaf).all()
    update = jax.tree.map(
        lambda u: jnp.where(healthy, u, jnp.asarray(jnp.nan, jnp.result_type(u))),
        update,
    )
    return update, jax.tree.map(lambda n, o: _keep(healthy, n, o), new, old)


def as_mask(name: str, num_tasks: int, mask: Any) -> Mask:
    """The mask as booleans ``[num_tasks]``; None means that all are present."""
    if mask is None:
        return jnp.ones(num_tasks, bool)
    mask = jnp.asarray(mask)
    if mask.shape != (num_tasks,):
        raise ValueError(
            f"{name}: mask has shape {mask.shape}; it must be ({num_tasks},), "
            "one flag per task."
        )
    return mask.astype(bool)


def as_losses(name: str, num_tasks: int, losses: Any) -> Losses:
    """The losses as a float vector ``[num_tasks]`` of at least float32."""
    if losses is None:
        raise ValueError(
            f"{name} reads the task losses: call update(grads, state, params, "
            "losses=losses) with one loss per task."
        )
    losses = jnp.asarray(losses)
    if losses.shape != (num_tasks,):
        raise ValueError(
            f"{name}: losses has shape {losses.shape}; it must be ({num_tasks},), "
            "one scalar per task."
        )
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))


def _check_positive(name: str, losses: Losses, mask: Mask) -> None:
    """Under ``jit`` values cannot raise; outside they can, and do."""
    if isinstance(losses, Tracer) or isinstance(mask, Tracer):
        return
    # Indexing a concrete array while something else is traced would trace that too.
    host_losses, host_mask = jax.device_get((losses, mask))
    for task, loss in enumerate(host_losses):
        if host_mask[task] and loss <= 0:
            raise ValueError(
                f"{name} takes the logarithm of the losses, but the loss of task "
                f"{task} is {loss:.6g}; shift it above zero or leave the task out."
            )


def rescale(
    weights: Weights, mask: Mask, scale: Scale, native: Literal["sum", "mean", "free"]
) -> Weights:
    """Brings weights to a declared scale.

    ``"sum"`` is the scale of the plain sum of losses (weights that add up to the
    number of present tasks), ``"mean"`` that of their mean (weights that add up
    to 1). A method whose own convention is one of the two is multiplied by a
    constant; the others (``native="free"``) are normalised by the sum of weights.
    """
    if scale in ("native", native):
        return weights
    count = jnp.maximum(mask.sum(), 1).astype(weights.dtype)
    if native == "free":
        total = jnp.where(mask, weights, 0).sum()
        weights = weights / jnp.where(total == 0, 1, total)
        return weights * count if scale == "sum" else weights
    return weights * count if native == "mean" else weights / count


def _keep(keep, new, old):
    """The new leaf where ``keep``, in the dtype that ``scan`` saw first."""
    new = new if new.dtype == old.dtype else new.astype(old.dtype)
    return jnp.where(keep, new, old)


def from_weights(
    name: str,
    num_tasks: int,
    *,
    init: Callable[[], Any],
    weigh: Callable[..., tuple[Weights, Any]],
    needs: Literal["losses", "gramian"],
    native: Literal["sum", "mean", "free"],
    scale: Scale = "native",
    reads_losses: bool = False,
    positive_losses: bool = False,
    side_inputs: tuple[str, ...] = (),
    observe: Callable[..., Any] | None = None,
) -> Balancer:
    """A :class:`Balancer` from a rule that yields T weights.

    All that the methods have in common stands here once: shape checks, masks, the
    declared scale, dtypes that survive ``scan``, and the policy on non-finite
    input.

    Args:
      name: Name of the factory.
      num_tasks: T, the length of the leading axis.
      init: ``init() -> state``, a NamedTuple with a field ``task_weights`` ``[T]``,
        which this builder fills with the weights last used.
      weigh: ``weigh(state, *, losses, gramian, mask) -> (weights, state)``. It gets
        a boolean mask, losses of absent tasks replaced by one, and a Gramian whose
        rows and columns of absent tasks are zero. What it returns for absent tasks
        is ignored, but the state it returns for them must be the one it got.
      needs: ``"losses"`` when the rule does not read the Gramian.
      native: Convention of the rule's own weights, see :func:`rescale`.
      scale: What the user asked for.
      reads_losses: The rule reads ``losses``.
      positive_losses: The rule takes their logarithm.
      side_inputs: Further keywords of ``update`` that ``weigh`` gets, None when the
        user gave none (``"preference"`` ``[T]``, ``"cross_gramian"`` ``[T, T]``).
      observe: See :class:`Balancer`.

    Returns:
      The balancer.
    """
    check_num_tasks(name, num_tasks)
    check_choice(name, "scale", scale, Scale)

    def full_weigh(state, *, losses=None, gramian=None, mask=None, **extra):
        side = {key: extra.get(key) for key in side_inputs}
        present = as_mask(name, num_tasks, mask)
        healthy = jnp.ones((), bool)
        if losses is not None or reads_losses:
            losses = as_losses(name, num_tasks, losses)
            if positive_losses:
                _check_positive(name, losses, present)
            losses = jnp.where(present, losses, 1)
            if reads_losses:
                healthy &= jnp.isfinite(losses).all()
        if needs == "gramian":
            if gramian is None or gramian.shape != (num_tasks, num_tasks):
                raise ValueError(
                    f"{name} reads the Gramian of the task gradients, of shape "
                    f"({num_tasks}, {num_tasks}), not "
                    f"{None if gramian is None else gramian.shape}."
                )
            gramian = jnp.where(present[:, None] & present[None, :], gramian, 0)
            healthy &= jnp.isfinite(gramian).all()
            # Solvers may loop: give them numbers they can finish on.
            gramian = jnp.where(
                healthy, gramian, jnp.eye(num_tasks, dtype=gramian.dtype)
            )
        weights, new = weigh(
            state, losses=losses, gramian=gramian, mask=present, **side
        )
        weights = jnp.where(present, rescale(weights, present, scale, native), 0)
        weights = jnp.where(healthy, weights, jnp.nan)
        keep = healthy & present.any()
        new = new._replace(task_weights=weights)
        return weights, jax.tree.map(lambda n, o: _keep(keep, n, o), new, state)

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        del params
        weights, updates, state = weigh_stacked(
            balancer, updates, state, losses=losses, mask=mask, **extra_args
        )
        return stack.combine(updates, weights), state

    def init_fn(params):
        del params
        return init()

    balancer = Balancer(
        init_fn,
        update,
        name=name,
        num_tasks=num_tasks,
        needs=needs,
        weigh=full_weigh,
        reads_losses=reads_losses,
        positive_losses=positive_losses,
        observe=observe,
    )
    return balancer


def weigh_stacked(
    balancer: Balancer,
    grads: Grads,
    state: Any,
    *,
    losses: Any = None,
    mask: Any = None,
    **side: Any,
) -> tuple[Weights, Any, Any]:
    """Weights from stacked gradients; also returns these with absent rows zeroed."""
    name, num_tasks = balancer.name, balancer.num_tasks
    if balancer.weigh is None:
        raise ValueError(f"{name} combines gradients without task weights.")
    stack.check(grads, num_tasks, name)
    if mask is not None:
        grads = stack.select(grads, as_mask(name, num_tasks, mask))
    gramian = stack.gramian(grads) if balancer.needs == "gramian" else None
    weights, state = balancer.weigh(
        state, losses=losses, gramian=gramian, mask=mask, **side
    )
    return weights, grads, state


def from_grads(
    name: str,
    num_tasks: int,
    *,
    init: Callable[[Any], Any],
    combine: Callable[..., tuple[Any, Any]],
    reads_losses: bool = False,
    positive_losses: bool = False,
) -> Balancer:
    """A :class:`Balancer` from a rule that reads the gradients themselves.

    Args:
      name: Name of the factory.
      num_tasks: T.
      init: ``init(params) -> state``, a NamedTuple.
      combine: ``combine(state, grads, *, losses, mask) -> (update, state)``. ``grads``
        are stacked, rows of absent tasks zero; ``losses`` of absent tasks are one. The
        state it returns for absent tasks must be the one it got.
      reads_losses: The rule reads ``losses``.
      positive_losses: The rule takes their logarithm.

    Returns:
      The balancer, with the same policies as those of :func:`from_weights`.
    """
    check_num_tasks(name, num_tasks)

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        del params, extra_args
        stack.check(updates, num_tasks, name)
        present = as_mask(name, num_tasks, mask)
        if mask is not None:
            updates = stack.select(updates, present)
        healthy = stack.all_finite(updates)
        if losses is not None or reads_losses:
            losses = as_losses(name, num_tasks, losses)
            if positive_losses:
                _check_positive(name, losses, present)
            losses = jnp.where(present, losses, 1)
            if reads_losses:
                healthy &= jnp.isfinite(losses).all()
        combined, new = combine(state, updates, losses=losses, mask=present)
        keep = healthy & present.any()

        def leaf(c, g):
            c = jnp.where(healthy, jnp.where(present.any(), c, 0), jnp.nan)
            return c.astype(g.dtype)

        combined = jax.tree.map(leaf, combined, updates)
        return combined, jax.tree.map(lambda n, o: _keep(keep, n, o), new, state)

    return Balancer(
        init,
        update,
        name=name,
        num_tasks=num_tasks,
        needs="grads",
        reads_losses=reads_losses,
        positive_losses=positive_losses,
    )


def observe(
    balancer: Balancer, state: Any, *, losses: Losses, mask: Mask | None = None
) -> Any:
    """Shows a balancer the losses of the same batch *after* the optimiser's step.

    Only FAMO-like methods look; for every other the state comes back as it was, so
    a training script may call this for any balancer. Cost for the caller: one
    forward pass, to be made only when ``balancer.observe`` is not None.

    Args:
      balancer: The balancer whose state is meant.
      state: Its state, or any optimiser state that holds it (of an
        ``optax.chain`` or ``optax.partition``).
      losses: Losses ``[T]`` of the batch just used, at the new parameters.
      mask: Tasks present ``[T]``, as given to the update.

    Returns:
      The state, of the same structure.

    Examples:
      >>> import jax.numpy as jnp, mtljax, optax
      >>> balancer = mtljax.famo(2)
      >>> opt = optax.chain(balancer, optax.adam(1e-3))
      >>> state = opt.init({"w": jnp.zeros(3)})
      >>> grads = {"w": jnp.ones((2, 3))}
      >>> _, state = opt.update(grads, state, losses=jnp.array([1.0, 2.0]))
      >>> state = mtljax.observe(balancer, state, losses=jnp.array([0.9, 1.0]))
      >>> state[0].logits.tolist()
      [0.025, -0.025]
    """
    look = balancer.observe
    if look is None:
        return state
    kind = type(balancer.init({}))

    def is_state(node):
        return isinstance(node, kind)

    def visit(node):
        return look(node, losses=losses, mask=mask) if is_state(node) else node

    if not any(map(is_state, jax.tree.leaves(state, is_leaf=is_state))):
        raise ValueError(
            f"observe: no {kind.__name__} in the given state; pass the state of "
            f"{balancer.name} or of the optax.chain that holds it."
        )
    return jax.tree.map(visit, state, is_leaf=is_state)
