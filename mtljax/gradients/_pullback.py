"""The backward pass: the one place that differentiates on behalf of the package.

``jax.vjp`` gives the pass. On one CPU device it is rewritten into forms that XLA:CPU
runs faster (``_rewrite``); everywhere else it is left unchanged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtljax import placement
from mtljax.gradients.passes import Body
from mtljax.placement import Backward


def everything(results: Any) -> Any:
    """All gradients."""
    return results


class Pull(NamedTuple):
    """What maps cotangents to gradients, any number of times."""

    vjp: Callable[[Any], Any]
    outputs: Any

    @property
    def body(self) -> Body:
        """What one pass consists of, as far as its residuals show."""
        residuals = [math.prod(x.shape) for x in _arrays(self.vjp)]
        return Body(max(residuals, default=1), False, 2 * len(residuals))

    def __call__(self, cotangent: Any, part: Callable[[Any], Any] = everything) -> Any:
        """The gradients, or a part of their tree.

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
    """Runs a function and returns what maps cotangents of its result to gradients.

    Args:
      function: A function of the primals.
      *primals: Trees of arrays.
      has_aux: The function returns ``(result, aux)``.
      backward: ``"jax"`` is ``jax.vjp`` unchanged, ``"rewritten"`` rewrites the pass
        for XLA:CPU, ``"auto"`` rewrites it on one CPU device only.
      runs: An estimate of the number of passes.

    Returns:
      ``(result, pull, aux)``. ``pull(cotangent)`` is the tuple of gradients, and
      ``pull(cotangent, part)`` a part of it, without the work for the rest;
      ``pull.body`` describes one pass. ``aux`` is None without ``has_aux``.
    """
    if has_aux:
        outputs, vjp, aux = jax.vjp(function, *primals, has_aux=True)
    else:
        (outputs, vjp), aux = jax.vjp(function, *primals), None
    if not placement.rewrites(backward, (primals, outputs, _arrays(vjp))):
        return outputs, Pull(vjp, outputs), aux
    from mtljax.gradients._rewrite.sweep import rewritten

    return outputs, rewritten(vjp, outputs, runs), aux
