"""Schedule of the second pass, and the behaviour of steps without it."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mtljax import stack
from mtljax.balancer import check_choice
from mtljax.gradients import shared_params
from mtljax.sharpness._passes import Passes
from mtljax.sharpness._perturbation import widen
from mtljax.sharpness._sam_grads import own_tree

Between: TypeAlias = Literal["plain", "reuse"]


class Kept(NamedTuple):
    """Flat parts of the last step with SAM, at least float32."""

    shared: Any  # stacked [T, ...]
    own: Any  # q^SAM − q


@dataclasses.dataclass(frozen=True)
class SamSchedule:
    """Schedule of the second pass of :func:`value_and_flat_grad`.

    The steps ``start, start + every, ...`` have a second pass.

    Attributes:
      every: Number of steps from one step with SAM to the next.
      start: First step with SAM (0-based), for example late in training.
      between: Behaviour of the steps without SAM after ``start``. ``"plain"`` computes
        the step for ρ = 0. ``"reuse"`` adds the flat parts of the last step with SAM.
        This is the idea of LookSAM; how the paper of FS-MTL reuses them is not known.
        Both cost the plain passes only.
    """

    every: int = 1
    start: int = 0
    between: Between = "plain"

    @property
    def always(self) -> bool:
        """Whether every step has a second pass."""
        return self.every == 1 and self.start == 0

    def active(self, step: Array) -> Array | None:
        """Whether this step has a second pass; None if every step has one."""
        if self.always:
            return None
        return (step >= self.start) & ((step - self.start) % self.every == 0)

    def first_kept(self, params: Any, labels: Any, num_tasks: int) -> Any:
        """Returns zeros, or () if no flat parts are stored."""
        if self.between == "plain":
            return ()

        def zeros(*lead):
            return lambda p: jnp.zeros((*lead, *p.shape), widen(p).dtype)

        hole = optax.MaskedNode()
        seen = params if labels is None else shared_params(params, labels)
        own = jax.tree.map(
            lambda s, p: p if isinstance(s, optax.MaskedNode) else hole,
            seen,
            params,
            is_leaf=lambda s: isinstance(s, optax.MaskedNode),
        )
        return Kept(jax.tree.map(zeros(num_tasks), seen), jax.tree.map(zeros(), own))

    def reuse(
        self, passes: Passes, flat: Any, own: Any, kept: Kept, step: Array
    ) -> tuple[Any, Any, Kept]:
        """Returns the flat parts and own gradients of this step, and the stored parts.

        A task that is absent from a step with SAM keeps its previous flat part.
        """
        active = self.active(step)
        assert active is not None
        present = passes.present != 0
        plain = own_tree(passes, passes.gradients(passes.present)[1])

        def remember(new, old):
            seen = present.reshape((-1,) + (1,) * (new.ndim - 1))
            return jnp.where(active & seen, new, old)

        shared = jax.tree.map(remember, flat, kept.shared)
        heads = jax.tree.map(
            lambda sam, q, old: jnp.where(active, widen(sam) - widen(q), old),
            own,
            plain,
            kept.own,
        )
        own = jax.tree.map(
            lambda sam, q, more: jnp.where(
                active, sam, (widen(q) + more).astype(q.dtype)
            ),
            own,
            plain,
            heads,
        )
        # Before the first step with SAM the stored parts are zeros.
        return stack.select(shared, present), own, Kept(shared, heads)


def check_schedule(name: str, schedule: SamSchedule) -> None:
    """Raises an error unless the schedule is valid."""
    check_choice(name, "between", schedule.between, Between)
    every, start = schedule.every, schedule.start
    for argument, value, least in (("every", every, 1), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}: {argument} must be an integer >= {least}, not {value!r}."
            )
    if schedule.between == "reuse" and every == 1:
        raise ValueError(
            f"{name}: between='reuse' applies to the steps between those with SAM, "
            "but every=1 leaves none; set every to at least 2."
        )
