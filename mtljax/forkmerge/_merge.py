"""Merges several models into one by means with the weights Λ."""

import fnmatch
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtljax import stack
from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._checks import Numbers

Policy: TypeAlias = Literal["merge", "keep", "reset"]
Head: TypeAlias = int | Literal["stacked"]


class Rules(NamedTuple):
    """Policies and heads in a hashable form, in the order of their patterns."""

    policies: tuple[tuple[str, Policy], ...] = ()
    heads: tuple[tuple[str, Head], ...] = ()


def make_rules(
    name: str, policies: Mapping[str, Policy] | None, heads: Mapping[str, Head] | None
) -> Rules:
    """Validates the values; :func:`plan` matches the patterns with a tree."""
    for pattern, policy in (policies or {}).items():
        if policy not in get_args(Policy):
            raise ValueError(
                f"{name}: policies[{pattern!r}]={policy!r} is not one of "
                f"{', '.join(map(repr, get_args(Policy)))}."
            )
    for pattern, task in (heads or {}).items():
        index = isinstance(task, int) and not isinstance(task, bool) and task >= 0
        if not (index or task == "stacked"):
            raise ValueError(
                f"{name}: heads[{pattern!r}]={task!r} must be the index of a task, or "
                "'stacked' for leaves with one row per task."
            )
    return Rules(tuple((policies or {}).items()), tuple((heads or {}).items()))


def _matches(path: str, pattern: str) -> bool:
    prefix = pattern.rstrip("/")
    inside = path == prefix or path.startswith(prefix + "/")
    return inside or fnmatch.fnmatchcase(path, pattern)


def plan(name: str, tree: Any, rules: Rules) -> list[tuple[Policy, Head | None]]:
    """Returns policy and head of every leaf; the first matching pattern applies."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    paths = [stack.path_name(path) for path, _ in leaves]
    for argument, patterns in (("policies", rules.policies), ("heads", rules.heads)):
        for pattern, _ in patterns:
            if not any(_matches(path, pattern) for path in paths):
                shown = ", ".join(paths[:8]) + (", …" if len(paths) > 8 else "")
                raise ValueError(
                    f"{name}: {argument} {pattern!r} matches no leaf of the train "
                    f"state; the paths are {shown}."
                )

    def first(patterns: Any, path: str, default: Any) -> Any:
        found = (value for pattern, value in patterns if _matches(path, pattern))
        return next(found, default)

    def policy(path: str, leaf: Any) -> Policy:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            asked = first(rules.policies, path, "keep")
            # Counters and keys cannot be averaged.
            return "reset" if asked == "reset" else "keep"
        return first(rules.policies, path, "merge")

    return [
        (policy(path, leaf), first(rules.heads, path, None))
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]


def average(leaf: Array, weights: Array) -> Array:
    """Computes ``Σ_b w_b leaf_b`` in at least float32, without branches of weight zero.

    A branch that diverged can therefore be excluded, although ``0 * NaN`` is NaN. The
    weights have shape ``[B]``, or ``[B, rows]`` for a leaf whose second axis is rows.
    """
    wide = stack.wide_dtype(leaf.dtype)
    weights = weights.reshape(weights.shape + (1,) * (leaf.ndim - weights.ndim))
    terms = weights.astype(wide) * leaf.astype(wide)
    return jnp.where(weights != 0, terms, 0).sum(0).astype(leaf.dtype)


def head_weights(weights: Array, trained: Array) -> Array:
    """Normalises Λ over the branches that trained a head; returns Λ if none did.

    Args:
      weights: Λ, shape ``[B]``.
      trained: Flags, shape ``[B]`` or ``[B, rows]``.
    """
    plain = weights.reshape((-1,) + (1,) * (trained.ndim - 1))
    own = jnp.where(trained, plain, 0)
    total = own.sum(0, keepdims=True)
    return jnp.where(total > 0, own / jnp.where(total > 0, total, 1), plain)


def merge(
    branches: Any,
    weights: Numbers,
    *,
    policies: Mapping[str, Policy] | None = None,
    heads: Mapping[str, Head] | None = None,
    branch_weights: Numbers | None = None,
    initial: Any = None,
) -> Any:
    """Merges B states into ``θ* = Σ_b Λ_b θ^b``, with a policy for every leaf.

    The paper does not discuss optimizer state, running statistics and heads, so their
    policies are explicit here. The released codes keep the optimizer state of every
    branch, and average statistics and all heads like weights. Sums are accumulated in
    float32.

    Args:
      branches: The branches, with leaves ``[B, ...]``.
      weights: Λ of shape ``[B]``, not negative, with the sum one. A branch of weight
        zero is excluded, even if it is NaN.
      policies: A dictionary from paths of leaves to policies. ``"merge"`` is the
        default. ``"keep"`` leaves a separate value in every branch, and the merged
        state contains that of the branch with the largest weight. ``"reset"`` uses the
        value in ``initial``. Paths are prefixes or globs, such as ``opt_state`` or
        ``*/batch_stats/*``. The first path that matches applies. Leaves that are not
        floating-point (counters, keys) are kept.
      heads: A dictionary from paths of leaves to task indices. Such a leaf is merged
        over the branches that trained this task, with renormalised Λ. Use
        ``"stacked"`` for leaves ``[B, T, ...]`` that contain the heads of all tasks.
        Without ``heads``, untrained heads enter the average at their old values, in
        proportion to Λ.
      branch_weights: ν of shape ``[B, T]``, required with ``heads``.
      initial: A state without the branch axis that contains the leaves to reset.

    Returns:
      The merged state, without the branch axis.

    Raises:
      ValueError: If shapes are inconsistent, if a path matches no leaf, or if
        ``branch_weights`` or ``initial`` is missing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> branches = {"w": jnp.array([0.0, 10.0]), "count": jnp.array([7, 7])}
      >>> merged = forkmerge.merge(branches, [0.75, 0.25])
      >>> merged["w"].tolist(), merged["count"].tolist()
      (2.5, 7)
    """
    rules = make_rules("merge", policies, heads)
    return merge_leaves(
        "merge",
        branches,
        weights,
        rules,
        branch_weights=branch_weights,
        initial=initial,
    )


def merge_leaves(
    name: str,
    branches: Any,
    weights: Numbers,
    rules: Rules,
    *,
    branch_weights: Numbers | None = None,
    initial: Any = None,
) -> Any:
    """Applies :func:`merge` with hashable rules."""
    num_branches = checks.count_branches(name, branches)
    weights = checks.merge_weights(name, weights, num_branches)
    weights = weights.astype(stack.wide_dtype(weights.dtype))
    leaves, treedef = jax.tree.flatten(branches)
    kinds = plan(name, branches, rules)
    fresh = [None] * len(leaves)
    if any(policy == "reset" for policy, _ in kinds):
        if initial is None:
            raise ValueError(
                f"{name}: a policy is 'reset', which needs initial=, a state with the "
                "initial values."
            )
        fresh = treedef.flatten_up_to(initial)
    trained = None
    if any(head is not None for _, head in kinds):
        if branch_weights is None:
            raise ValueError(
                f"{name}: heads= needs branch_weights=, which states the branches that "
                "trained each head."
            )
        nu = checks.branch_weights(name, branch_weights, num_branches)
        trained = nu != 0
    heaviest = jnp.argmax(weights)
    paths = [
        stack.path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(branches)
    ]

    def leaf(path, x, value, policy, head):
        if policy == "reset":
            return jnp.asarray(value)
        if policy == "keep":
            return x[heaviest]
        if head is None:
            return average(x, weights)
        assert trained is not None
        tasks = trained.shape[1]
        if head == "stacked":
            if x.ndim < 2 or x.shape[1] != tasks:
                raise ValueError(
                    f"{name}: stacked head {path!r} has shape {x.shape}; its second "
                    f"axis must be the {tasks} tasks."
                )
            return average(x, head_weights(weights, trained))
        if head >= tasks:
            raise ValueError(
                f"{name}: head {path!r} is labelled to be of task {head}, but "
                f"branch_weights has {tasks} tasks."
            )
        return average(x, head_weights(weights, trained[:, head]))

    merged = [
        leaf(path, x, value, policy, head)
        for path, x, value, (policy, head) in zip(
            paths, leaves, fresh, kinds, strict=True
        )
    ]
    return jax.tree.unflatten(treedef, merged)


def refork(
    branches: Any, merged: Any, *, policies: Mapping[str, Policy] | None = None
) -> Any:
    """Returns the branches after a merge: merged leaves, and kept leaves unchanged.

    Args:
      branches: The branches before the merge, with leaves ``[B, ...]``.
      merged: The result of :func:`merge`.
      policies: The policies that were passed to :func:`merge`.

    Returns:
      The branches of the next round.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import merge, refork
      >>> branches = {"w": jnp.array([0.0, 4.0]), "momentum": jnp.array([1.0, 2.0])}
      >>> policies = {"momentum": "keep"}
      >>> merged = merge(branches, [0.5, 0.5], policies=policies)
      >>> after = refork(branches, merged, policies=policies)
      >>> after["w"].tolist(), after["momentum"].tolist()
      ([2.0, 2.0], [1.0, 2.0])
    """
    return refork_leaves(branches, merged, make_rules("refork", policies, None))


def refork_leaves(branches: Any, merged: Any, rules: Rules) -> Any:
    """Applies :func:`refork` with hashable rules."""
    checks.count_branches("refork", branches)

    def leaf(policy, x, m):
        return x if policy == "keep" else jnp.broadcast_to(m[None], x.shape)

    return _map("refork", rules, leaf, branches, merged)


def keep_only(tree: Any, rules: Rules, policy: Policy) -> Any:
    """Keeps the leaves of one policy and replaces others by ``optax.MaskedNode()``."""

    def leaf(kind, x):
        return x if kind == policy else optax.MaskedNode()

    return _map("keep_only", rules, leaf, tree)


def overlay(tree: Any, kept: Any, rules: Rules, policy: Policy) -> Any:
    """Returns ``tree`` with the leaves of one policy taken from ``kept``."""
    leaf = lambda kind, x, k: k if kind == policy else x
    return _map("overlay", rules, leaf, tree, kept)


def _map(name: str, rules: Rules, function: Any, tree: Any, *others: Any) -> Any:
    """Applies ``function(policy, *leaves)`` to the leaves of trees."""
    leaves, treedef = jax.tree.flatten(tree)
    policies = [policy for policy, _ in plan(name, tree, rules)]
    rest = map(treedef.flatten_up_to, others)
    return treedef.unflatten(map(function, policies, leaves, *rest))
