"""When the second pass is made, and what the steps without it do."""

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
    """Flat parts of the last step that had them, at least float32."""

    shared: Any  # stacked [T, ...]
    own: Any  # q^SAM − q


@dataclasses.dataclass(frozen=True)
class SamSchedule:
    """When :func:`value_and_flat_grad` makes the second pass.

    In the steps ``start, start + every, ...``.

    Attributes:
      every: SAM in every so many steps.
      start: SAM from this step on (0-based), e.g. only late in training.
      between: What steps without SAM do after ``start``: ``"plain"``, as if ρ = 0, or
        ``"reuse"``, with the flat parts of the last step that had it (LookSAM's idea;
        how the paper reuses them is not known). Either costs the plain passes only.
    """

    every: int = 1
    start: int = 0
    between: Between = "plain"

    @property
    def always(self) -> bool:
        """Whether every step has a second pass."""
        return self.every == 1 and self.start == 0

    def active(self, step: Array) -> Array | None:
        """Whether this step has a second pass; None if all have."""
        if self.always:
            return None
        return (step >= self.start) & ((step - self.start) % self.every == 0)

    def first_kept(self, params: Any, labels: Any, num_tasks: int) -> Any:
        """Zeros, or () where nothing is kept."""
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
        """Flat parts and own gradients of this step, and what is kept.

        A task absent from a step with SAM keeps the flat part it had.
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
        # Nothing is kept before the first step with SAM: these are zeros then.
        return stack.select(shared, present), own, Kept(shared, heads)


def check_schedule(name: str, schedule: SamSchedule) -> None:
    """Raises unless the schedule makes sense."""
    check_choice(name, "between", schedule.between, Between)
    every, start = schedule.every, schedule.start
    for argument, value, least in (("every", every, 1), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name}: {argument} must be an integer >= {least}, not {value!r}."
            )
    if schedule.between == "reuse" and every == 1:
        raise ValueError(
            f"{name}: between='reuse' keeps flat parts for the steps between those "
            "with SAM, but every=1 leaves none; set every."
        )
