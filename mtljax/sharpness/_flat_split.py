"""A balancer for loss and flat gradients, made of any balancer (FS-MTL)."""

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Scalar

from mtljax import stack
from mtljax.balancer import (
    Balancer,
    as_mask,
    check_choice,
    check_state,
    choose_state,
    commit,
    factory,
    judge_losses,
)
from mtljax.sharpness._perturbation import widen
from mtljax.sharpness._sam_grads import SamGrads
from mtljax.wrappers import check_type, fold_keys

Mode: TypeAlias = Literal["split", "direct", "second", "each"]

_NEED_THREE = ("krum", "trimmed_mean")  # two rows leave them nothing to choose from


class FlatSplitState(NamedTuple):
    """State of :func:`flat_split`: one of the inner balancer for everything it does.

    Attributes:
      loss: Of the loss gradients (of the SAM gradients for ``"direct"``, of the tasks'
        mixtures for ``"each"``); its ``task_weights`` are those to log.
      flat: Of the flat parts (``"split"``, ``"second"``); else ().
      pair: Of the two halves (``"second"``), or of each task's two parts, stacked
        ``[T, ...]`` (``"each"``); else ().
    """

    loss: Any
    flat: Any
    pair: Any


def _sum(left: Any, right: Any) -> Any:
    """Leaf by leaf, at least float32."""
    return jax.tree.map(lambda a, b: widen(a) + widen(b), left, right)


def _like(tree: Any, model: Any) -> Any:
    return jax.tree.map(lambda x, m: x.astype(m.dtype), tree, model)


def _any(tree: Any) -> Scalar:
    """Whether an entry of a leaf is not zero (NaN is not)."""
    found = [(leaf != 0).any() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(found).any()


def check_flat_split(
    balancer: optax.GradientTransformationExtraArgs, mode: Mode
) -> None:
    """Raises for a balancer that cannot do what the mode asks of it."""
    check_choice("flat_split", "mode", mode, Mode)
    if mode in ("split", "direct"):
        return
    if not isinstance(balancer, Balancer):
        raise ValueError(
            f"flat_split: mode={mode!r} balances two gradients with the method for T, "
            "which takes a mtljax.Balancer, not another transformation."
        )
    name = balancer.name
    if balancer.reads_losses:
        raise ValueError(
            f"flat_split: mode={mode!r} balances a loss part with a flat part, which "
            f"have no losses, but {name} reads losses; use mode='split' or 'direct'."
        )
    if any(word in name for word in _NEED_THREE):
        raise ValueError(
            f"flat_split: mode={mode!r} balances two gradients, but {name} needs at "
            "least 3; use mode='split' or 'direct'."
        )
    if balancer.num_tasks < 2:
        raise ValueError(
            f"flat_split: mode={mode!r} balances two gradients, but {name} was built "
            f"with num_tasks={balancer.num_tasks}; use mode='split' or 'direct'."
        )


def _pair_update(balancer: Any, rows: Any, state: Any) -> tuple[Any, Any]:
    """The method on two rows ``[2, ...]``, as a batch that holds two of its T tasks."""
    num_tasks = balancer.num_tasks
    mask = jnp.arange(num_tasks) < 2
    spare = num_tasks - 2
    if balancer.weigh is not None:
        gramian = None
        if balancer.needs == "gramian":
            gramian = jnp.pad(stack.gramian(rows), (0, spare))
        weights, state = balancer.weigh(state, losses=None, gramian=gramian, mask=mask)
        return stack.combine(rows, weights[:2]), state
    padded = jax.tree.map(
        lambda x: jnp.pad(x, ((0, spare),) + ((0, 0),) * (x.ndim - 1)), rows
    )
    return balancer.update(padded, state, mask=mask)


def _pair(balancer: Any, loss: Any, flat: Any, state: Any) -> tuple[Any, Any]:
    """A({loss, flat}); the loss part itself, and the old state, without a flat part."""
    rows = jax.tree.map(lambda a, b: jnp.stack([widen(a), widen(b)]), loss, flat)
    mixed, new = _pair_update(balancer, rows, state)
    exists = _any(flat)
    mixed = jax.tree.map(lambda m, a: jnp.where(exists, m, widen(a)), mixed, loss)
    return mixed, choose_state(exists, new, state)


def _halves(update: Callable[..., Any], grads: SamGrads, state: FlatSplitState, side):
    """A(g) and A(h); a flat part that vanishes gives zero and leaves its state."""
    flat_side = {k: v for k, v in side.items() if k != "cross_gramian"}
    loss, loss_state = update(grads.loss, state.loss, **side)
    flat, flat_state = update(grads.flat, state.flat, **flat_side)
    exists = _any(grads.flat)
    flat = jax.tree.map(lambda x: jnp.where(exists, x, 0), flat)
    new = state._replace(
        loss=loss_state, flat=choose_state(exists, flat_state, state.flat)
    )
    return loss, flat, new


def _parts(updates: Any, mode: Mode) -> SamGrads:
    """The two parts, checked for what the mode needs."""
    if not isinstance(updates, SamGrads):
        raise ValueError(
            "flat_split takes SamGrads(loss, flat), as mtljax.sharpness.sam_task_grads "
            f"returns them, not a {type(updates).__name__}."
        )
    if updates.flat is None and mode != "direct":
        raise ValueError(
            f"flat_split: mode={mode!r} needs the flat part, but the gradients hold "
            "SAM gradients only; call sam_task_grads with split=True."
        )
    if updates.flat is not None:
        structures = jax.tree.structure(updates.loss), jax.tree.structure(updates.flat)
        if structures[0] != structures[1]:
            raise ValueError(
                "flat_split: the loss and the flat part are trees of different "
                f"structure: {structures[0]} and {structures[1]}."
            )
    return updates


@factory
def flat_split(
    balancer: optax.GradientTransformationExtraArgs, mode: Mode = "split"
) -> Balancer:
    """Balances loss gradients and flat parts apart, then adds them up (FS-MTL).

    With A the inner balancer, on ``SamGrads(g, h)`` of :func:`sam_task_grads`:

    ============  ============================================  ====================
    ``mode``      update                                        calls of A
    ============  ============================================  ====================
    ``"split"``   ``A(g_1..g_T) + A(h_1..h_T)``, the paper's    2
    ``"direct"``  ``A(g_1 + h_1 .. g_T + h_T)``                 1
    ``"second"``  ``A(A(g), A(h))``                             3
    ``"each"``    ``A(p_1..p_T)``, ``p_i = A(g_i, h_i)``        T + 1
    ============  ============================================  ====================

    For a linear A the first two are equal: only the balancer's non-linearity can make
    the split matter. The balancer's own ``scale`` holds for each call, so ``"second"``
    and ``"each"`` with a method that averages halve the step twice.

    Losses, mask and side inputs go to every call on T tasks; ``cross_gramian`` to that
    on the loss gradients only, as it is theirs. Where all flat parts are zero (ρ = 0, a
    step without SAM) the update is exactly ``A(g)`` and no other state changes; if
    anything is not finite, the update is not, and no state changes.

    Args:
      balancer: Any balancer, or for ``"split"`` and ``"direct"`` any transformation of
        stacked gradients (an ``optax.chain`` that begins with one).
      mode: As above. ``"second"`` and ``"each"`` run the method on two of its T tasks
        by a mask: T ≥ 2, and one that does not read losses; weights or preferences
        given to its factory are then those of the first two tasks. In ``"each"`` a
        method that reads the gradients themselves (``graddrop``) holds T² copies.

    Returns:
      A balancer of pairs; no passes of its own. State: that of the inner one for each
      kind of call; random methods draw for each on its own (the paper's code does so
      for PCGrad; for RLW it is not known). Initialise it with the shared parameters.

    Raises:
      ValueError: If the mode is unknown or the balancer cannot take it; in ``update``,
        if the gradients are no ``SamGrads`` or lack the flat part.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> from mtljax.sharpness import SamGrads, flat_split
      >>> balancer = flat_split(mtljax.mgda(2))
      >>> g = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> h = {"w": jnp.array([[0.1, 0.0], [0.1, 0.0]])}
      >>> state = balancer.init({"w": jnp.zeros(2)})
      >>> jax.jit(balancer.update)(SamGrads(g, h), state)[0]["w"].tolist()
      [0.6, 0.5]

    References:
      Phan et al., `Beyond Losses Reweighting: Empowering Multi-Task Learning via the
      Generalization Perspective <https://arxiv.org/abs/2211.13723>`_, 2022; the modes
      other than ``"split"`` are its ablations.
    """
    check_flat_split(balancer, mode)
    name = getattr(balancer, "name", "the transformation")
    label = f"flat_split({name}, {mode})"
    num_tasks = getattr(balancer, "num_tasks", 0)
    inner = optax.with_extra_args_support(balancer).update
    inner_observe = getattr(balancer, "observe", None)

    def init(params):
        first = balancer.init(params)
        if mode == "direct":
            return FlatSplitState(first, (), ())
        if mode == "split":
            return FlatSplitState(first, fold_keys(balancer.init(params), 1), ())
        if mode == "second":
            flat, pair = (fold_keys(balancer.init(params), i) for i in (1, 2))
            return FlatSplitState(first, flat, pair)
        each = [fold_keys(balancer.init(params), 1 + i) for i in range(num_tasks)]
        return FlatSplitState(first, (), jax.tree.map(lambda *x: jnp.stack(x), *each))

    def split(grads, state, side):
        loss, flat, new = _halves(inner, grads, state, side)
        return _sum(loss, flat), new

    def direct(grads, state, side):
        rows = grads.loss if grads.flat is None else _sum(grads.loss, grads.flat)
        mixed, new = inner(rows, state.loss, **side)
        return mixed, state._replace(loss=new)

    def second(grads, state, side):
        loss, flat, new = _halves(inner, grads, state, side)
        mixed, pair = _pair(balancer, loss, flat, state.pair)
        return mixed, new._replace(pair=pair)

    def each(grads, state, side):
        def one(g, h, s):
            return _pair(balancer, g, h, s)

        rows, pair = jax.vmap(one)(grads.loss, grads.flat, state.pair)
        mixed, loss = inner(rows, state.loss, **side)
        return mixed, FlatSplitState(loss, (), pair)

    run = {"split": split, "direct": direct, "second": second, "each": each}[mode]

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        if mask is not None:
            tasks = num_tasks or jnp.shape(mask)[0]
            mask = as_mask(name, tasks, mask)
        grads = _parts(updates, mode)
        for part in grads:
            if part is not None and num_tasks:
                stack.check(part, num_tasks, label, params)
        like = jax.tree.map(
            lambda g: jax.ShapeDtypeStruct(jnp.shape(g)[1:], g.dtype), grads.loss
        )
        check_state(label, state, jax.eval_shape(init, like))
        if mask is not None:
            grads = SamGrads(
                *(None if x is None else stack.select(x, mask) for x in grads)
            )
        side = {"params": params, "losses": losses, "mask": mask, **extra_args}
        combined, new = run(grads, state, side)
        healthy = jnp.ones((), bool)
        if losses is not None and num_tasks:
            present = as_mask(name, num_tasks, mask)
            _, healthy = judge_losses(name, num_tasks, losses, present, None)
        model = jax.tree.map(operator.itemgetter(0), grads.loss)
        return commit(healthy, _like(combined, model), new, state)

    def observe(state, *, losses, mask=None):
        check_type(label, state, FlatSplitState)

        def look(inner_state):
            assert inner_observe is not None
            return inner_observe(inner_state, losses=losses, mask=mask)

        flat = look(state.flat) if mode == "split" else state.flat
        return state._replace(loss=look(state.loss), flat=flat)

    return Balancer(
        init,
        update,
        name=label,
        num_tasks=num_tasks,
        needs="grads",
        reads_losses=getattr(balancer, "reads_losses", False),
        positive_losses=getattr(balancer, "positive_losses", False),
        domain=getattr(balancer, "domain", None),
        observe=None if inner_observe is None else observe,
    )
