"""Backward passes: the only module that differentiates for the package.

``jax.vjp`` provides the pass. On one CPU device the pass is rewritten into forms that
XLA:CPU runs faster (``_rewrite``). Otherwise it is unchanged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtljax import placement
from mtljax.gradients.passes import Body
from mtljax.placement import Backward


def everything(results: Any) -> Any:
    """Selects all gradients."""
    return results


class Pull(NamedTuple):
    """Function that maps cotangents to gradients and can be called repeatedly."""

    vjp: Callable[[Any], Any]
    outputs: Any

    @property
    def body(self) -> Body:
        """Estimates the operations of one pass from its residuals."""
        residuals = [math.prod(x.shape) for x in _arrays(self.vjp)]
        return Body(max(residuals, default=1), False, 2 * len(residuals))

    def __call__(self, cotangent: Any, part: Callable[[Any], Any] = everything) -> Any:
        """Returns the gradients, or a part of their tree.

        The cotangent gets the varying axes and the Explicit sharding of the outputs.
        """
        return part(self.vjp(placement.like(cotangent, self.outputs)))


def _arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]


def pullback(
    function: Callable[..., Any],
    *primals: Any,
    has_aux: bool = False,
    backward: Backward = "auto",
    runs: int = 1,
) -> tuple[Any, Callable[..., Any], Any]:
    """Runs a function and returns its result with the pullback of cotangents.

    Args:
      function: A function of the primals.
      *primals: Trees of arrays.
      has_aux: Whether the function returns ``(result, aux)``.
      backward: ``"jax"`` is ``jax.vjp`` unchanged. ``"rewritten"`` rewrites the pass
        for XLA:CPU. ``"auto"`` rewrites it on one CPU device only.
      runs: An estimate of the number of passes.

    Returns:
      A tuple ``(result, pull, aux)``. ``pull(cotangent)`` returns the tuple of
      gradients. ``pull(cotangent, part)`` returns a part of it and skips the work for
      the rest. ``pull.body`` describes one pass. ``aux`` is None without ``has_aux``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.gradients import pullback
      >>> result, pull, _ = pullback(lambda x: x**2, jnp.array(3.0))
      >>> float(result), float(pull(jnp.array(1.0))[0])
      (9.0, 6.0)
    """
    if has_aux:
        outputs, vjp, aux = jax.vjp(function, *primals, has_aux=True)
    else:
        (outputs, vjp), aux = jax.vjp(function, *primals), None
    if not placement.rewrites(backward, (primals, outputs, _arrays(vjp))):
        return outputs, Pull(vjp, outputs), aux
    from mtljax.gradients._rewrite.sweep import rewritten

    return outputs, rewritten(vjp, outputs, runs), aux
