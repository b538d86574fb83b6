"""One step of FS-MTL: both passes, the balancer and the schedule of SAM."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax.balancer import Balancer, commit
from mtljax.gradients import (
    AxisName,
    Strategy,
    shared_params,
    value_and_balanced_grad,
)
from mtljax.gradients.linearized import VectorLosses
from mtljax.sharpness._diagnostics import FlatGramians, flat_gramians
from mtljax.sharpness._flat_split import FlatSplitState, Mode, flat_split
from mtljax.sharpness._passes import Passes, first_pass
from mtljax.sharpness._perturbation import Ball, Perturb
from mtljax.sharpness._rows import Engine, check_key, common_point, make_engine
from mtljax.sharpness._sam_grads import SamGrads, as_trees, merge_own, own_tree
from mtljax.sharpness._schedule import SamSchedule, check_schedule

NAME = "value_and_flat_grad"
ALWAYS = SamSchedule()


class FlatGradState(NamedTuple):
    """State of :func:`value_and_flat_grad`."""

    balancer: FlatSplitState
    step: Int[Array, ""]  # number of completed steps
    key: Any  # random key of the directions of SAMO, else ()
    kept: Any  # flat parts of the last step with SAM (between="reuse"), else ()
    gramians: Any  # FlatGramians of the last step if gramians=True, else ()


@dataclasses.dataclass(frozen=True, eq=False)
class FlatGrad:
    """The function that :func:`value_and_flat_grad` returns, with its initial state.

    Attributes:
      task_losses: The function of the losses.
      inner: The balancer that was passed.
      balancer: The result of :func:`flat_split` for this balancer.
      engine: The validated options of the gradients.
      schedule: The steps that have a second pass.
      gramians: Whether the state contains Gramians.
      split: Whether the loss gradients are computed in addition to the SAM gradients.
      key: Random key of the initial state.
      plain: The step for a radius of zero.
    """

    task_losses: Callable[..., Any]
    inner: Any
    balancer: Balancer
    engine: Engine
    schedule: SamSchedule
    gramians: bool
    split: bool
    key: Any
    plain: Callable[..., Any]

    @property
    def num_tasks(self) -> int:
        """T, or 0 if the balancer does not know it."""
        return self.balancer.num_tasks

    def init(self, params: Any) -> FlatGradState:
        """Returns the initial state for these parameters."""
        labels = self.engine.options.labels
        seen = params if labels is None else shared_params(params, labels)
        products: Any = ()
        if self.gramians:
            square = (self.num_tasks, self.num_tasks)
            products = FlatGramians(*(jnp.zeros(square, jnp.float32) for _ in "123"))
        return FlatGradState(
            balancer=self.balancer.init(seen),  # pyright: ignore[reportArgumentType]
            step=jnp.zeros((), jnp.int32),
            key=jax.tree.map(jnp.copy, self.key),  # the caller may donate its key
            kept=self.schedule.first_kept(params, labels, self.num_tasks),
            gramians=products,
        )

    def __call__(
        self,
        params: Any,
        state: FlatGradState,
        *args: Any,
        mask: Any = None,
        side: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, FlatGradState]:
        """Returns losses, gradient and state; see :func:`value_and_flat_grad`."""
        has_aux = self.engine.options.has_aux
        if self.engine.zero and not self.gramians:
            # Every mode reduces to A(g), which the cheapest engine computes exactly.
            out, grad, loss = self.plain(
                params, state.balancer.loss, *args, mask=mask, side=side, **kwargs
            )
            new = state._replace(balancer=state.balancer._replace(loss=loss))
            healthy = True
        else:
            names = getattr(self.inner, "names", None)
            call = VectorLosses(self.task_losses, args, kwargs, names)
            passes = first_pass(
                call,
                params,
                self.engine.options,
                mask=mask,
                name=NAME,
            )
            grad, new = self._step(passes, state, side or {})
            losses, mask = passes.losses, passes.first.region.mask
            seen = losses if mask is None else jnp.where(mask, losses, 0)
            healthy = jnp.isfinite(seen).all()
            losses = call.named(losses)
            out = (losses, passes.first.aux) if has_aux else losses
        grad, state = commit(healthy, grad, new._replace(step=new.step + 1), state)
        return out, grad, state

    def _step(
        self, passes: Passes, state: FlatGradState, side: dict[str, Any]
    ) -> tuple[Any, FlatGradState]:
        losses = passes.losses
        found = losses.shape[0]
        if self.num_tasks and found != self.num_tasks:
            raise ValueError(
                f"task_losses returns {found} losses, but {self.inner.name} was built "
                f"with num_tasks={self.num_tasks}."
            )
        if any(passes.splits[0]):
            raise ValueError(
                f"{NAME}: a shared parameter is split over axis_name, so that a device "
                "has a part of every gradient. Outside of jax.shard_map, parameters "
                "may be sharded in any way."
            )
        inputs = {"losses": losses, "mask": passes.first.region.mask, **side}
        draw = None
        if self.engine.draws:
            next_key, draw = jax.random.split(state.key)
            state = state._replace(key=next_key)
        if self._weighs_at_common_point():
            return self._weigh_at_common_point(passes, state, inputs)
        active = self.schedule.active(state.step)
        rows = self.engine.rows(passes, draw, active, split=self.split)
        grads, own = as_trees(passes, rows)
        if self.schedule.between == "reuse":
            flat, own, kept = self.schedule.reuse(
                passes, grads.flat, own, state.kept, state.step
            )
            grads, state = SamGrads(grads.loss, flat), state._replace(kept=kept)
        if self.gramians:
            products = flat_gramians(grads)
            products = jax.tree.map(lambda x: x.astype(jnp.float32), products)
            state = state._replace(gramians=products)
        update, balanced = self.balancer.update(grads, state.balancer, **inputs)
        new = state._replace(balancer=balanced)  # pyright: ignore[reportArgumentType]
        return merge_own(update, own), new

    def _weighs_at_common_point(self) -> bool:
        """Whether one weighted backward pass replaces the T passes at the new point."""
        return (
            self.engine.perturb == "global"
            and not self.split
            and self.schedule.always
            and getattr(self.inner, "needs", "grads") == "losses"
        )

    def _weigh_at_common_point(self, passes: Passes, state: Any, inputs: Any):
        point, _ = common_point(passes, self.engine.ball)
        weights, loss = self.inner.weigh(state.balancer.loss, **inputs)
        shared, _ = passes.gradients(weights.astype(passes.losses.dtype), point)
        _, own = passes.gradients(passes.present, point)
        leaves = passes.first.leaves
        grad = merge_own(leaves.shared_tree(shared), own_tree(passes, own))
        return grad, state._replace(balancer=state.balancer._replace(loss=loss))


def value_and_flat_grad(
    task_losses: Callable[..., Any],
    balancer: optax.GradientTransformationExtraArgs,
    *,
    rho: ArrayLike | Ball,
    perturb: Perturb = "local",
    mode: Mode = "split",
    schedule: SamSchedule = ALWAYS,
    gramians: bool = False,
    key: PRNGKeyArray | None = None,
    labels: Any = None,
    has_aux: bool = False,
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
) -> FlatGrad:
    """Returns a function that computes the sharpness-aware balanced gradient.

    The function performs one step of FS-MTL. It calls :func:`sam_task_grads` and
    applies :func:`flat_split` to the shared parameters. Own parameters receive their
    SAM gradient. The interface is that of :func:`mtljax.value_and_balanced_grad`. For
    ``rho=0`` the results are identical to those of that function. In the table, X is
    the method of ``balancer``.

    ===========================  ====================================================
    published method             options
    ===========================  ====================================================
    F-X (FS-MTL)                 the defaults
    "direct" ablation of F-X     ``mode="direct"``
    G-SAM                        ``mode="direct", perturb="global"``
    SAMO-X                       ``mode="direct", perturb="samo", key=...``
    F-LS (SAM of every loss)     ``balancer=mtljax.linear(T)``
    SAM of the mean loss         F-LS, ``mode="direct", perturb="global"``, joint norm
    ===========================  ====================================================

    Args:
      task_losses: See :func:`sam_task_grads`.
      balancer: See :func:`flat_split`.
      rho: ρ ≥ 0, or a :class:`Ball`, see :func:`sam_task_grads`.
      perturb: ``"local"``, ``"global"``, ``"samo"`` or :class:`Samo`.
      mode: See :func:`flat_split`.
      schedule: The steps that have a second pass, see :class:`SamSchedule`.
      gramians: Whether to store the :class:`FlatGramians` of the step in
        ``state.gramians``, for :func:`flat_conflicts`. They need both parts, so
        ``mode="direct"`` then saves no passes.
      key: Random key of the directions of SAMO. It is stored in the state. Only used
        with ``perturb="samo"``.
      labels: Marks parameters ``"shared"``, ``"own"`` or ``"frozen"``.
      has_aux: Whether ``task_losses`` returns ``(losses, aux)``.
      strategy: How the tasks are run.
      axis_name: The mapped axis, see :func:`sam_task_grads`. The balancer receives
        means over the devices.

    Returns:
      A :class:`FlatGrad`. Its method ``init(params)`` returns the initial state. A call
      with ``(params, state, *args, mask=None, side=None, **kwargs)`` returns
      ``(losses, grad, state)``, or ``((losses, aux), grad, state)`` with
      ``has_aux=True``. The losses have shape ``[T]``, or are a dictionary if
      ``task_losses`` returns one. The tree ``grad`` has the structure of ``params``.
      The dictionary ``side`` is passed to the balancer as keyword arguments. If the
      result, or a loss or gradient of a present task, is not finite, then ``grad`` is
      NaN everywhere and the state is unchanged.

      A step with SAM costs as much as :func:`sam_task_grads`. Any other step costs as
      much as :func:`mtljax.value_and_task_grads`. ``mode="direct"`` with
      ``perturb="global"`` costs 2 forward and 1 + T backward passes. If the balancer
      reads only the losses, it costs 2 forward and 2 backward passes. The state
      contains the state of the balancer and, with ``between="reuse"``, T copies of the
      shared parameters.

    Raises:
      ValueError: If :func:`sam_task_grads` or :func:`flat_split` rejects an argument,
        if the schedule does not consist of integers, if ``perturb="samo"`` has no key,
        or if the number of losses differs from ``balancer.num_tasks``.

    Examples:
      >>> import jax, jax.numpy as jnp, mtljax
      >>> from mtljax.sharpness import value_and_flat_grad
      >>> def task_losses(params, x):
      ...     h = x @ params["trunk"]
      ...     pair = zip((0.0, 1.0), params["heads"])
      ...     return jnp.stack([jnp.mean((h @ v - y) ** 2) for y, v in pair])
      >>> params = {"trunk": jnp.ones((2, 3)), "heads": [jnp.ones(3), -jnp.ones(3)]}
      >>> grad_fn = value_and_flat_grad(
      ...     task_losses, mtljax.imtl_g(2), rho=0.05,
      ...     labels={"trunk": "shared", "heads": "own"})
      >>> state = grad_fn.init(params)
      >>> losses, grad, state = jax.jit(grad_fn)(params, state, jnp.eye(2))
      >>> jax.tree.map(jnp.shape, grad)
      {'heads': [(3,), (3,)], 'trunk': (2, 3)}

    References:
      The papers of :func:`sam_task_grads`. Liu et al., `Towards Efficient and Scalable
      Sharpness-Aware Minimization <https://arxiv.org/abs/2203.02714>`_, 2022, propose
      the reuse of flat parts.
    """
    options = {
        "labels": labels,
        "has_aux": has_aux,
        "strategy": strategy,
        "axis_name": axis_name,
    }
    engine = make_engine(NAME, rho, perturb, **options)
    check_key(NAME, engine, key, "pass key=jax.random.key(...)")
    check_schedule(NAME, schedule)
    reuses = schedule.between == "reuse"
    if (gramians or reuses) and not isinstance(balancer, Balancer):
        raise ValueError(
            f"{NAME}: gramians=True and between='reuse' store arrays of shape "
            "[T, ...] in the state. They require a mtljax.Balancer, which knows T."
        )
    return FlatGrad(
        task_losses,
        balancer,
        flat_split(balancer, mode),
        engine,
        schedule,
        gramians,
        split=mode != "direct" or gramians or reuses,
        key=key if engine.draws else (),
        plain=value_and_balanced_grad(task_losses, balancer, **options),
    )
