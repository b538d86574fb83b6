"""The table of wrappers, which build a balancer from other balancers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mtljax.methods import Method, source_link
from mtljax.sharpness import flat_split
from mtljax.wrappers import (
    compose,
    inject_hyperparams,
    per_layer,
    reuse,
    smooth_weights,
)


class Wrapper(NamedTuple):
    """A row of the table of wrappers."""

    factory: Callable[..., Any]
    label: str  # name in the literature
    source: str  # arXiv id, or the venue if there is none
    needs: str  # balancers that the wrapper accepts
    promise: str  # one-line summary

    @property
    def name(self) -> str:
        """Returns the name of the factory."""
        return self.factory.__name__


WRAPPERS: dict[str, Wrapper] = {
    w.name: w
    for w in (
        Wrapper(
            compose,
            "A ∘ B",
            "2307.15429",
            "a loss balancer, and one with task weights",
            "gradient balancing of the weighted losses",
        ),
        Wrapper(
            smooth_weights,
            "CR-MOGM",
            "NeurIPS 2022",
            "one with task weights",
            "a moving average of the weights",
        ),
        Wrapper(
            per_layer,
            "layer-wise",
            "2010.05874",
            "any",
            "balances every group of leaves separately",
        ),
        Wrapper(
            flat_split,
            "F-X",
            "2211.13723",
            "any, on the gradients of `sharpness.sam_task_grads`",
            "balances the loss part and the flat part of SAM separately",
        ),
        Wrapper(
            reuse,
            "every k steps",
            "2202.01017",
            "one with task weights",
            "computes the weights every k steps and reuses them in between",
        ),
        Wrapper(
            inject_hyperparams,
            "schedules",
            "optax",
            "a factory, such as `cagrad`",
            "stores the float hyper-parameters in the state and schedules them",
        ),
    )
}


def wrappers_table() -> str:
    """Returns the Markdown table of the wrappers.

    Examples:
      >>> print(wrappers_table().splitlines()[2][:26])
      | `compose` | A ∘ B | [230
    """
    lines = ["| name | called | source | takes | summary |", "|:--|:--|:--|:--|:--|"]
    for wrapper in WRAPPERS.values():
        cells = (
            f"`{wrapper.name}`",
            wrapper.label,
            source_link(wrapper.source),
            wrapper.needs,
            wrapper.promise,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def method_reads(method: Method) -> str:
    """Returns what a method reads: nothing, losses, Gramian or gradients.

    Examples:
      >>> import mtljax
      >>> method_reads(mtljax.METHODS["cagrad"])
      'Gramian'
    """
    balancer = method.build(3, key=jax.random.key(0))
    named = {"gramian": "Gramian", "grads": "gradients"}
    return named.get(balancer.needs, "losses" if balancer.reads_losses else "nothing")
