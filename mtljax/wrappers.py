"""Balancers made of balancers: composition, smoothing, grouping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mtljax import stack
from mtljax.balancer import Balancer, as_mask, weigh_stacked
from mtljax.types import Weights


class ComposeState(NamedTuple):
    """State of :func:`compose`."""

    loss_balancer: Any
    gradient_balancer: Any
    task_weights: Weights  # the product that was used


class SmoothState(NamedTuple):
    """State of :func:`smooth_weights`."""

    inner: Any
    average: Weights
    seen: Bool[Array, " tasks"]  # tasks that have an average yet
    task_weights: Weights


class PerLayerState(NamedTuple):
    """State of :func:`per_layer`: that of the inner balancer for every group."""

    groups: dict[str, Any]


def compose(loss_balancer: Balancer, gradient_balancer: Balancer) -> Balancer:
    """A loss balancer, then a gradient balancer on what it weighted.

    The gradient balancer sees ``w_i g_i``, the gradients of the weighted losses; the
    result is again a :class:`Balancer`, with weights ``w_i a_i``. With
    ``scale_invariant`` first, a gradient method acts on the gradients of the log losses
    (the LOG_ variants of FAMO's code). Methods whose direction does not depend on the
    scale of a task (``nash_mtl``, ``imtl_g``) keep their direction. If the second
    reads losses too, it gets them unweighted.

    Args:
      loss_balancer: A balancer that reads at most the losses.
      gradient_balancer: A balancer of the same number of tasks that yields weights.

    Returns:
      A balancer; it needs what the second needs, costs what both cost.

    Raises:
      ValueError: If the first reads gradients, the second yields no weights, or the
        numbers of tasks differ.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.compose(mtljax.scale_invariant(2), mtljax.mgda(2))
      >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 10.0]])}
      >>> state = balancer.init(grads)
      >>> update, _ = balancer.update(grads, state, losses=jnp.array([1.0, 10.0]))
      >>> update["w"].tolist()
      [0.5, 0.5]
    """
    first, second = loss_balancer, gradient_balancer
    if first.needs != "losses":
        raise ValueError(
            f"compose: the first balancer must read at most the losses, but "
            f"{first.name} needs the {first.needs}."
        )
    if second.weigh is None or first.weigh is None:
        raise ValueError(f"compose: {second.name} does not act by task weights.")
    if first.num_tasks != second.num_tasks:
        raise ValueError(
            f"compose: {first.name} has num_tasks={first.num_tasks}, "
            f"{second.name} has num_tasks={second.num_tasks}."
        )
    weigh_losses, weigh_gradients = first.weigh, second.weigh
    num_tasks = first.num_tasks
    name = f"compose({first.name}, {second.name})"

    def init(params):
        return ComposeState(
            first.init(params), second.init(params), jnp.ones(num_tasks, jnp.float32)
        )

    def weigh(state, *, losses=None, gramian=None, mask=None, **side):
        outer, s1 = weigh_losses(state.loss_balancer, losses=losses, mask=mask, **side)
        if gramian is not None:
            gramian = outer[:, None] * gramian * outer[None, :]
        inner, s2 = weigh_gradients(
            state.gradient_balancer, losses=losses, gramian=gramian, mask=mask, **side
        )
        weights = outer * inner
        new = ComposeState(s1, s2, weights.astype(jnp.float32))
        # The first may have moved before the second met what is not finite.
        keep = jnp.isfinite(weights).all() & as_mask(name, num_tasks, mask).any()
        return weights, _where(keep, new, state)

    def observe(state, *, losses, mask=None):
        parts = [
            part if b.observe is None else b.observe(part, losses=losses, mask=mask)
            for b, part in ((first, state[0]), (second, state[1]))
        ]
        return ComposeState(parts[0], parts[1], state.task_weights)

    looks = first.observe is not None or second.observe is not None
    return _wrap(
        name,
        second,
        init=init,
        weigh=weigh,
        reads_losses=first.reads_losses or second.reads_losses,
        positive_losses=first.positive_losses or second.positive_losses,
        observe=observe if looks else None,
    )


def smooth_weights(balancer: Balancer, *, decay: float = 0.9) -> Balancer:
    """Exponential moving average of a balancer's weights (CR-MOGM).

    ``λ_k = a λ_{k-1} + (1 - a) λ̂_k``, started at the first weights. The paper lets a
    tend to 1 as the learning rate decays; here it is constant, as in TorchJD. A
    promise of the inner method that no task gets worse is lost.

    Args:
      balancer: Any balancer that yields weights.
      decay: a, at least 0 (the inner method) and below 1.

    Returns:
      A balancer that needs what the inner one needs; state: 2 T numbers more.

    Raises:
      ValueError: If ``decay`` is outside [0, 1), or the balancer yields no weights.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.smooth_weights(mtljax.scale_invariant(1), decay=0.5)
      >>> grads = {"w": jnp.ones((1, 1))}
      >>> state = balancer.init(grads)
      >>> for loss in (1.0, 0.5):
      ...     _, state = balancer.update(grads, state, losses=jnp.array([loss]))
      >>> state.task_weights.tolist()
      [1.5]

    References:
      Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient
      Manipulation and Beyond, NeurIPS 2022.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"smooth_weights: decay must lie in [0, 1), not {decay}.")
    inner_weigh = balancer.weigh
    if inner_weigh is None:
        raise ValueError(f"smooth_weights: {balancer.name} yields no task weights.")
    num_tasks = balancer.num_tasks

    def init(params):
        ones = jnp.ones(num_tasks, jnp.float32)
        return SmoothState(
            balancer.init(params), ones, jnp.zeros(num_tasks, bool), ones
        )

    def weigh(state, *, losses=None, gramian=None, mask=None, **side):
        new, inner = inner_weigh(
            state.inner, losses=losses, gramian=gramian, mask=mask, **side
        )
        present = jnp.ones(num_tasks, bool) if mask is None else jnp.asarray(mask, bool)
        finite = jnp.isfinite(new).all()
        mixed = jnp.where(state.seen, decay * state.average + (1 - decay) * new, new)
        keep = present & finite
        average = jnp.where(keep, mixed, state.average).astype(state.average.dtype)
        weights = jnp.where(present, jnp.where(finite, mixed, jnp.nan), 0)
        logged = jnp.where(finite & present.any(), weights, state.task_weights)
        return weights, SmoothState(
            inner, average, state.seen | keep, logged.astype(jnp.float32)
        )

    def observe(state, *, losses, mask=None):
        assert balancer.observe is not None
        inner = balancer.observe(state.inner, losses=losses, mask=mask)
        return state._replace(inner=inner)

    return _wrap(
        f"smooth_weights({balancer.name})",
        balancer,
        init=init,
        weigh=weigh,
        reads_losses=balancer.reads_losses,
        positive_losses=balancer.positive_losses,
        observe=None if balancer.observe is None else observe,
    )


def _wrap(name: str, inner: Balancer, *, init, weigh, **attributes: Any) -> Balancer:
    """A balancer whose weights come from ``weigh``, reading what ``inner`` reads."""

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        del params
        weights, updates, state = weigh_stacked(
            balancer, updates, state, losses=losses, mask=mask, **extra_args
        )
        return stack.combine(updates, weights), state

    balancer = Balancer(
        init,
        update,
        name=name,
        num_tasks=inner.num_tasks,
        needs=inner.needs,
        weigh=weigh,
        **attributes,
    )
    return balancer


def per_layer(
    balancer: Balancer, *, group: Callable[[str], str] | None = None
) -> Balancer:
    """Balances every leaf, or every group of leaves, on its own.

    Each group has its own Gramian, weights and state: cheaper conflicts to resolve, and
    no promise about the whole gradient (GradVac's "layer" grouping, for any method).
    Random methods draw from a different key in each group. Losses, masks and side
    inputs go to every group as they are. If one group's update is not finite, none is,
    and no state changes.

    Args:
      balancer: The balancer to run in every group.
      group: ``group(path) -> name`` with paths written ``trunk/dense/kernel``; None
        makes every leaf a group of its own.

    Returns:
      A balancer that needs the stacked gradients. State: one inner state per group;
      initialise it with the parameters that are balanced (``mtljax.shared_params``).

    Raises:
      ValueError: If the groups of the gradients are not those of the state.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.per_layer(mtljax.mgda(2))
      >>> grads = {"a": jnp.array([[1.0], [3.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> balancer.update(grads, balancer.init(grads))[0]["a"].tolist()
      [1.0]
    """

    def groups_of(tree):
        paths = jax.tree_util.tree_leaves_with_path(tree)
        names = [stack.path_name(path) for path, _ in paths]
        return [name if group is None else group(name) for name in names]

    def split(tree):
        """The leaves of every group, in the order of the tree."""
        groups: dict[str, list[Any]] = {}
        for name, leaf in zip(groups_of(tree), jax.tree.leaves(tree), strict=True):
            groups.setdefault(name, []).append(leaf)
        return groups

    def init(params):
        return PerLayerState(
            {
                name: fold_keys(balancer.init(leaves), i)
                for i, (name, leaves) in enumerate(split(params).items())
            }
        )

    def update(updates, state, params=None, **extra_args):
        del params
        stack.check(updates, balancer.num_tasks, f"per_layer({balancer.name})")
        groups = split(updates)
        if set(groups) != set(state.groups):
            raise ValueError(
                f"per_layer: the gradients have groups {sorted(groups)}, the state "
                f"has {sorted(state.groups)}; initialise it with the parameters that "
                "are balanced (mtljax.shared_params)."
            )
        parts, states = {}, {}
        for name, leaves in groups.items():
            part, states[name] = balancer.update(
                leaves, state.groups[name], **extra_args
            )
            parts[name] = iter(jax.tree.leaves(part))
        leaves = [next(parts[name]) for name in groups_of(updates)]
        finite = stack.all_finite(leaves)
        leaves = [jnp.where(finite, x, jnp.nan).astype(x.dtype) for x in leaves]
        combined = jax.tree.unflatten(jax.tree.structure(updates), leaves)
        return combined, _where(finite, PerLayerState(states), state)

    def observe(state, *, losses, mask=None):
        assert balancer.observe is not None
        return PerLayerState(
            {
                name: balancer.observe(inner, losses=losses, mask=mask)
                for name, inner in state.groups.items()
            }
        )

    return Balancer(
        init,
        update,
        name=f"per_layer({balancer.name})",
        num_tasks=balancer.num_tasks,
        needs="grads",
        reads_losses=balancer.reads_losses,
        positive_losses=balancer.positive_losses,
        observe=None if balancer.observe is None else observe,
    )


def fold_keys(state: Any, number: int) -> Any:
    """The state with every key folded with the number of the group.

    Keys of the old kind, two integers, are known by the name of their field.
    """

    def leaf(path, x):
        dtype = jnp.asarray(x).dtype
        named = stack.path_name(path[-1:]) == "key" and dtype == jnp.uint32
        is_key = named or jnp.issubdtype(dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(x, number) if is_key else x

    return jax.tree_util.tree_map_with_path(leaf, state)


def _where(keep: Any, new: Any, old: Any) -> Any:
    """The new state where ``keep``, else the old one."""
    return jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, old)
