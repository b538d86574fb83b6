"""Balancer of loss gradients and flat parts, from any balancer (FS-MTL)."""

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

_NEED_THREE = ("krum", "trimmed_mean")  # these methods cannot select among two rows


class FlatSplitState(NamedTuple):
    """State of :func:`flat_split`, with one inner state for each kind of call.

    Attributes:
      loss: State for the loss gradients. For ``"direct"`` it belongs to the SAM
        gradients, and for ``"each"`` to the balanced pair of each task. Log its
        ``task_weights``.
      flat: State for the flat parts (``"split"`` and ``"second"``), else ().
      pair: State for the two balanced parts (``"second"``), or for the two parts of
        each task, stacked ``[T, ...]`` (``"each"``), else ().
    """

    loss: Any
    flat: Any
    pair: Any


def _sum(left: Any, right: Any) -> Any:
    """Adds two trees, in at least float32."""
    return jax.tree.map(lambda a, b: widen(a) + widen(b), left, right)


def _like(tree: Any, model: Any) -> Any:
    return jax.tree.map(lambda x, m: x.astype(m.dtype), tree, model)


def _any(tree: Any) -> Scalar:
    """Whether any entry is nonzero; NaN counts as nonzero."""
    found = [(leaf != 0).any() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(found).any()


def check_flat_split(
    balancer: optax.GradientTransformationExtraArgs, mode: Mode
) -> None:
    """Raises an error for a balancer that does not support the mode."""
    check_choice("flat_split", "mode", mode, Mode)
    if mode in ("split", "direct"):
        return
    if not isinstance(balancer, Balancer):
        raise ValueError(
            f"flat_split: mode={mode!r} applies the method for T tasks to two "
            "gradients, which takes a mtljax.Balancer, not another transformation."
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
    """Applies the balancer to two rows ``[2, ...]`` and masks its other tasks."""
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
    """Returns A({loss, flat}), or the loss part and the old state if flat is zero."""
    rows = jax.tree.map(lambda a, b: jnp.stack([widen(a), widen(b)]), loss, flat)
    mixed, new = _pair_update(balancer, rows, state)
    exists = _any(flat)
    mixed = jax.tree.map(lambda m, a: jnp.where(exists, m, widen(a)), mixed, loss)
    return mixed, choose_state(exists, new, state)


def _halves(update: Callable[..., Any], grads: SamGrads, state: FlatSplitState, side):
    """Returns A(g) and A(h); a zero flat part gives zero and keeps its state."""
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
    """Returns the two parts after checking that the mode can use them."""
    if not isinstance(updates, SamGrads):
        raise ValueError(
            "flat_split takes SamGrads(loss, flat), the result of "
            "mtljax.sharpness.sam_task_grads, not a "
            f"{type(updates).__name__}."
        )
    if updates.flat is None and mode != "direct":
        raise ValueError(
            f"flat_split: mode={mode!r} needs the flat part, but the gradients contain "
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
    """Balances loss gradients and flat parts separately and adds the results (FS-MTL).

    Let A be the inner balancer and ``SamGrads(g, h)`` the result of
    :func:`sam_task_grads`.

    ============  ============================================  ====================
    ``mode``      update                                        calls of A
    ============  ============================================  ====================
    ``"split"``   ``A(g_1..g_T) + A(h_1..h_T)`` (the paper)     2
    ``"direct"``  ``A(g_1 + h_1 .. g_T + h_T)``                 1
    ``"second"``  ``A(A(g), A(h))``                             3
    ``"each"``    ``A(p_1..p_T)``, ``p_i = A(g_i, h_i)``        T + 1
    ============  ============================================  ====================

    For a linear A, ``"split"`` and ``"direct"`` are equal. Only the non-linearity of
    the balancer makes a difference. The ``scale`` of the balancer applies to each
    call. A balancer that averages therefore averages twice in ``"second"`` and
    ``"each"``.

    Every call on T tasks receives the losses, the mask and the side inputs. Only the
    call on the loss gradients receives ``cross_gramian``, which describes them. If all
    flat parts are zero (ρ = 0 or a step without SAM), the update is exactly ``A(g)``
    and no other state changes. If an input or the result is not finite, the update is
    NaN and no state changes.

    Args:
      balancer: Any balancer. For ``"split"`` and ``"direct"`` also any transformation
        of stacked gradients, for example an ``optax.chain`` that begins with one.
      mode: One of the modes in the table. ``"second"`` and ``"each"`` run the balancer
        on two of its T tasks by means of a mask. They require T ≥ 2 and a balancer
        that does not read losses. Weights or preferences of the balancer are then
        those of its first two tasks. In ``"each"``, a method that reads the gradients
        themselves (``graddrop``) stores T² copies.

    Returns:
      A balancer of pairs. It needs no passes of its own. Its state contains one state
      of the inner balancer for each kind of call. Random methods sample independently
      for each kind. The paper's code does this for PCGrad; for RLW it is not known.
      Initialise the state with the shared parameters.

    Raises:
      ValueError: If the mode is unknown, or if the balancer does not support it. In
        ``update``, if the gradients are not a :class:`mtljax.sharpness.SamGrads` or
        have no flat part.

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
      Generalization Perspective <https://arxiv.org/abs/2211.13723>`_, ICCV 2025. The
      modes other than ``"split"`` are ablations of this paper.
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
