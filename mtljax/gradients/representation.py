"""Task weights from the gradients of a representation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtljax import placement, stack
from mtljax.balancer import task_vector
from mtljax.gradients._pullback import pullback
from mtljax.gradients.gramian import choose, linearize_uses
from mtljax.gradients.linearized import (
    Leaves,
    Options,
    Region,
    VectorLosses,
    checked_losses,
    in_range,
    make_region,
    rescaled,
    split_leaves,
)
from mtljax.gradients.passes import map_tasks, pick
from mtljax.types import Gramian, Losses, Params, Weights


class Through:
    """A ``task_losses`` with a representation; the result of :func:`through`."""

    def __init__(self, encode: Callable[..., Any], losses: Callable[..., Any]):
        """Stores the two functions."""
        self.encode = encode
        self.losses = losses

    def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """Computes the losses of the representation."""
        return self.losses(
            params, self.encode(params, *args, **kwargs), *args, **kwargs
        )


def through(encode: Callable[..., Any], losses: Callable[..., Any]) -> Through:
    """Declares the representation between the trunk and the heads.

    With ``measure="representation"``, :func:`mtljax.value_and_balanced_grad` computes
    task weights from the gradients of the losses with respect to the representation.
    The T passes then run through the heads only (MGDA-UB).

    Args:
      encode: A function ``encode(params, *args, **kwargs)`` that returns the
        representation z, any tree of arrays. Integer and boolean arrays, such as a
        mask, are not differentiated. It must not read parameters that are labelled
        ``"own"``.
      losses: A function ``losses(params, z, *args, **kwargs)`` that returns the losses,
        shape ``[T]``, or ``(losses, aux)``.

    Returns:
      A ``Through``, which all functions of mtljax accept as ``task_losses``. It
      can also be called.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> def losses(p, z, x):
      ...     return (z @ p["heads"]).mean(0) ** 2
      >>> task_losses = mtljax.through(lambda p, x: x @ p["trunk"], losses)
      >>> params = {"trunk": jnp.ones((3, 2)), "heads": jnp.eye(2)}
      >>> task_losses(params, jnp.ones((4, 3))).tolist()
      [9.0, 9.0]

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018, Section 3.3.
    """
    return Through(encode, losses)


class Represented(NamedTuple):
    """A forward pass through the trunk and the heads."""

    leaves: Leaves
    region: Region
    aux: Any
    pull_heads: Callable[..., Any]  # of the losses -> (shared, own, representation)
    pull_trunk: Callable[..., Any]  # of the representation -> shared
    of_representation: Callable[[Any], Losses]  # the heads
    z: Any  # the representation
    split: tuple[str, ...]  # mapped axes over which the representation is split
    options: Options

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.region.losses

    def measured(self) -> tuple[Gramian, None]:
        """Returns the Gramian of the gradients of the representation.

        Examples do not mix in a representation, so the Gramian is a sum over devices.
        """
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.z):
            why = stack.why_unbalanced(leaf)
            if why is not None:
                raise ValueError(
                    "measure='representation': the representation "
                    f"{stack.path_name(path)!r} {why}"
                )
        products = self._of_products()
        if products is not None:
            return products, None
        region, num_tasks = self.region, self.losses.shape[0]
        basis = jnp.eye(num_tasks, dtype=region.local.dtype)
        basis = placement.cast(region.seeded(basis), placement.varying(region.local))
        body = self.pull_heads.body  # pyright: ignore[reportFunctionMemberAccess]
        passes = pick(self.options.passes, num_tasks, body)
        rows = map_tasks(lambda c: self.pull_heads(c, lambda r: r[2]), basis, passes)
        if region.local_mask is not None:
            rows = stack.select(rows, region.local_mask)
        return placement.total(stack.gramian(rows), self.split), None

    def _of_products(self) -> Gramian | None:
        """Returns the Gramian without T gradients of the representation.

        The heads are a program whose only parameter is the representation. None if the
        T gradients are less work, or if there are several devices: the products would
        gather the cotangents of examples that are split over them.
        """
        alone = jax.device_count() == 1 and placement.plain((self.z, self.losses))
        if self.options.axes or not alone:
            return None
        options = self.options._replace(has_aux=False, labels=None)
        uses, passes = choose("auto", self.of_representation, self.z, options)
        # A second evaluation of the heads would repeat their effects.
        if uses is None or any(op.eqn.effects for op in uses.plan.program.ops):
            return None
        options = options._replace(passes=passes)
        mask = self.region.local_mask
        found = linearize_uses(uses, options, mask=mask, name="through")
        return found.measured()[0]

    def local_gradients(self, weights: Weights, own: Weights) -> tuple[Any, Any]:
        """Returns this device's parts of both weighted gradients."""
        dtype = self.losses.dtype
        seeds, scale = in_range(self.region.seeded(weights), dtype)
        direct, of_z = self.pull_heads(seeds.astype(dtype), lambda r: (r[0], r[2]))
        (through_trunk,) = self.pull_trunk(of_z)
        shared = [a + b for a, b in zip(direct, through_trunk, strict=True)]
        return rescaled(shared, scale), self.local_own(own)

    def local_own(self, weights: Weights) -> list[Any]:
        """Returns this device's part of the weighted gradient of own leaves."""
        if not self.leaves.numbers("own"):
            return []
        dtype = self.losses.dtype
        seeds, scale = in_range(self.region.seeded(weights), dtype)
        return rescaled(self.pull_heads(seeds.astype(dtype), lambda r: r[1]), scale)

    def gradients(
        self, weights: Weights, own: Weights, cache: None = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the weighted gradients of shared and of own leaves."""
        del cache
        shared, owns = self.local_gradients(weights, own)
        axes = self.region.axes
        return self.leaves.summed(shared, axes), self.leaves.summed(owns, axes, "own")


def linearize_through(
    task: Through,
    call: VectorLosses,
    params: Params,
    options: Options,
    *,
    mask: Any,
    name: str,
) -> Represented:
    """Runs the trunk and then the heads, with the arguments of a call of ``task``."""
    args, kwargs = call.args, call.kwargs
    leaves = split_leaves(params, options.labels)
    frozen = leaves.of("frozen")
    shared, own = placement.cast((leaves.of("shared"), leaves.of("own")), options.axes)
    _check_trunk(task, leaves, own, args, kwargs)

    def trunk(shared):
        z = task.encode(leaves.tree(shared, own, frozen), *args, **kwargs)
        return _smooth_part(z), _smooth_part(z, False)

    def heads(shared, own, z):
        after = VectorLosses(task.losses, (_whole(z, rest), *args), kwargs, call.names)
        out = after(leaves.tree(shared, own, frozen))
        call.names = after.names
        return checked_losses(out, options.has_aux)

    mode = options.backward
    z, pull_trunk, rest = pullback(trunk, shared, has_aux=True, backward=mode)
    local, pull_heads, aux = pullback(
        heads, shared, own, z, has_aux=True, backward=mode
    )
    region = make_region(local, task_vector(mask, call.names), options, name)
    # Without axis names, the varying axes of z are used. If the parameters vary over an
    # axis too, that axis belongs to separate models.
    seen = placement.varying(z) - placement.varying(leaves.values)
    split = options.axes or tuple(sorted(seen))
    return Represented(
        leaves=leaves,
        region=region,
        aux=aux,
        pull_heads=pull_heads,
        pull_trunk=pull_trunk,
        of_representation=lambda z: heads(shared, own, z)[0],
        z=z,
        split=split,
        options=options,
    )


def _is_hole(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _smooth_part(tree: Any, smooth: bool = True) -> Any:
    """Returns the leaves that have a gradient, or those that have none."""

    def leaf(x):
        found = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
        return x if found == smooth else optax.MaskedNode()

    return jax.tree.map(leaf, tree)


def _whole(smooth: Any, rest: Any) -> Any:
    """Returns the tree of both parts."""
    return jax.tree.map(
        lambda x, y: y if _is_hole(x) else x, smooth, rest, is_leaf=_is_hole
    )


def _check_trunk(
    task: Through, leaves: Leaves, own: list[Any], args: Sequence[Any], kwargs: Any
) -> None:
    """Raises an error if the trunk reads an own parameter."""
    if not own:
        return
    rest = leaves.of("shared"), leaves.of("frozen")

    def trunk(own):
        return task.encode(leaves.tree(rest[0], own, rest[1]), *args, **kwargs)

    jaxpr = jax.make_jaxpr(trunk)(own).jaxpr
    inputs = set(jaxpr.invars)
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    if inputs.intersection(read) or inputs.intersection(
        v for v in jaxpr.outvars if not hasattr(v, "val")
    ):
        raise ValueError(
            "measure='representation': encode reads a parameter that is labelled "
            "'own', but own parameters belong to the heads. Label it 'shared'."
        )
