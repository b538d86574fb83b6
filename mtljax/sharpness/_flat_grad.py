"""The whole step: both passes, the balancer, the schedule of SAM."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PRNGKeyArray

from mtljax.balancer import Balancer, as_mask
from mtljax.gradients import Strategy, shared_params, value_and_balanced_grad
from mtljax.sharpness._diagnostics import FlatGramians, flat_gramians
from mtljax.sharpness._flat_split import FlatSplitState, Mode, flat_split
from mtljax.sharpness._passes import Passes, first_pass
from mtljax.sharpness._perturbation import Compat, Norm, Perturb
from mtljax.sharpness._rows import Engine, check_key, common_point, make_engine
from mtljax.sharpness._sam_grads import SamGrads, as_trees, merge_own
from mtljax.sharpness._schedule import Between, Schedule, make_schedule

NAME = "value_and_flat_grad"


class FlatGradState(NamedTuple):
    """State of :func:`value_and_flat_grad`."""

    balancer: FlatSplitState
    step: Int[Array, ""]  # steps made
    key: Any  # of SAMO's directions, else ()
    kept: Any  # flat parts of the last step with SAM (between="reuse"), else ()
    gramians: Any  # FlatGramians of the last step where asked for, else ()


@dataclasses.dataclass(frozen=True, eq=False)
class FlatGrad:
    """What :func:`value_and_flat_grad` returns: a function, and its first state.

    Attributes:
      task_losses: As given.
      inner: The balancer as given.
      balancer: The :func:`flat_split` of it.
      engine: How gradients are taken.
      schedule: When.
      gramians: Whether the state holds Gramians.
      split: Whether the loss gradients are taken beside the SAM gradients.
      key: Of the first state.
      plain: The step for a radius of zero.
    """

    task_losses: Callable[..., Any]
    inner: Any
    balancer: Balancer
    engine: Engine
    schedule: Schedule
    gramians: bool
    split: bool
    key: Any
    plain: Callable[..., Any]

    @property
    def num_tasks(self) -> int:
        """T; 0 where the balancer does not know it."""
        return self.balancer.num_tasks

    def init(self, params: Any) -> FlatGradState:
        """The first state, for these parameters."""
        labels = self.engine.labels
        seen = params if labels is None else shared_params(params, labels)
        products: Any = ()
        if self.gramians:
            square = jnp.zeros((self.num_tasks, self.num_tasks), jnp.float32)
            products = FlatGramians(square, square, square)
        return FlatGradState(
            balancer=self.balancer.init(seen),  # pyright: ignore[reportArgumentType]
            step=jnp.zeros((), jnp.int32),
            key=self.key,
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
        """Losses, gradient and state; see :func:`value_and_flat_grad`."""
        if self.engine.radius.zero and not self.gramians:
            # Every mode is then A(g), which the cheapest engine gives exactly.
            out, grad, loss = self.plain(
                params, state.balancer.loss, *args, mask=mask, side=side, **kwargs
            )
            balanced = state.balancer._replace(loss=loss)
            new = state._replace(balancer=balanced)
        else:
            passes = first_pass(
                lambda p: self.task_losses(p, *args, **kwargs),
                params,
                has_aux=self.engine.has_aux,
                labels=self.engine.labels,
                mask=mask,
                name=NAME,
            )
            grad, new = self._step(passes, state, mask, side or {})
            losses = passes.pull.losses
            out = (losses, passes.pull.aux) if self.engine.has_aux else losses
        return out, grad, new._replace(step=state.step + 1)

    def _step(
        self, passes: Passes, state: FlatGradState, mask: Any, side: dict[str, Any]
    ) -> tuple[Any, FlatGradState]:
        losses = passes.pull.losses
        found = losses.shape[0]
        if self.num_tasks and found != self.num_tasks:
            raise ValueError(
                f"task_losses returns {found} losses, but {self.inner.name} was built "
                f"with num_tasks={self.num_tasks}."
            )
        mask = None if mask is None else as_mask(NAME, found, mask)
        inputs = {"losses": losses, "mask": mask, **side}
        draw = None
        if self.engine.perturb == "samo":
            next_key, draw = jax.random.split(state.key)
            state = state._replace(key=next_key)
        if self._weighs_at_common_point():
            return self._weigh_at_common_point(passes, state, inputs)
        active = self.schedule.active(state.step)
        rows = self.engine.rows(passes, draw, active, split=self.split)
        grads, own = as_trees(passes, rows, mask)
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
        """Whether one weighted backward pass is the whole second half."""
        return (
            self.engine.perturb == "global"
            and not self.split
            and self.schedule.always
            and getattr(self.inner, "needs", "grads") == "losses"
        )

    def _weigh_at_common_point(self, passes: Passes, state: Any, inputs: Any):
        pull, _ = common_point(passes, self.engine.radius)
        weights, loss = self.inner.weigh(state.balancer.loss, **inputs)
        shared, _ = pull.gradients(weights.astype(passes.pull.losses.dtype))
        _, own = pull.gradients(passes.basis.sum(0))
        tree_of = passes.parts.tree_of
        grad = merge_own(tree_of("shared", shared), tree_of("own", own))
        return grad, state._replace(balancer=state.balancer._replace(loss=loss))


def value_and_flat_grad(
    task_losses: Callable[..., Any],
    balancer: optax.GradientTransformationExtraArgs,
    *,
    rho: ArrayLike,
    rho_own: ArrayLike | None = None,
    adaptive: bool = False,
    norm: Norm = "separate",
    perturb: Perturb = "local",
    mode: Mode = "split",
    every: int = 1,
    start: int = 0,
    between: Between = "plain",
    key: PRNGKeyArray | None = None,
    gramians: bool = False,
    labels: Any = None,
    has_aux: bool = False,
    strategy: Strategy = "auto",
    chunk_size: int = 4,
    samo_alpha: float = 0.5,
    samo_step: float = 0.01,
    compat: Compat | None = None,
) -> FlatGrad:
    """Losses and the sharpness-aware balanced gradient: one step of FS-MTL.

    :func:`sam_task_grads`, then :func:`flat_split` on the shared parameters, while own
    parameters receive their SAM gradient; in the shape of
    :func:`mtljax.value_and_balanced_grad`, and for ``rho=0`` its very numbers.

    ===========================  ====================================================
    published as                 options
    ===========================  ====================================================
    F-X (FS-MTL)                 the defaults
    its "direct" ablation        ``mode="direct"``
    G-SAM                        ``mode="direct", perturb="global"``
    SAMO-X                       ``mode="direct", perturb="samo", key=...``
    F-LS (SAM of every loss)     ``balancer=mtljax.linear(T)``
    SAM of the mean loss         that, ``mode="direct", perturb="global", norm="joint"``
    ===========================  ====================================================

    Args:
      task_losses: As for :func:`sam_task_grads`.
      balancer: As for :func:`flat_split`.
      rho: ρ ≥ 0, see :func:`sam_task_grads`.
      rho_own: Radius of own parameters; None is ``rho``.
      adaptive: ASAM.
      norm: ``"separate"`` or ``"joint"``.
      perturb: ``"local"``, ``"global"`` or ``"samo"``.
      mode: See :func:`flat_split`.
      every: SAM in every so many steps.
      start: SAM from this step on (0-based), e.g. only late in training.
      between: What steps without SAM do after ``start``: ``"plain"``, as if ρ = 0, or
        ``"reuse"``, with the flat parts of the last step that had it (LookSAM's idea;
        how the paper reuses them is not known). Either costs the plain passes only.
      key: Seeds SAMO's directions; lives in the state. Only for ``perturb="samo"``.
      gramians: Whether ``state.gramians`` holds the :class:`FlatGramians` of the step,
        for :func:`flat_conflicts`; needs both parts, so it undoes the savings of
        ``mode="direct"`` in passes.
      labels: Marks parameters ``"shared"`` or ``"own"``.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      strategy: How the tasks run.
      chunk_size: Tasks in a chunk.
      samo_alpha: See :func:`sam_task_grads`.
      samo_step: Likewise.
      compat: Likewise.

    Returns:
      A :class:`FlatGrad`: ``init(params)`` gives the first state, and calling it with
      ``(params, state, *args, mask=None, side=None, **kwargs)`` gives ``(losses[T],
      grad, state)``, or ``((losses[T], aux), grad, state)``. ``grad`` is shaped like
      ``params``; ``side`` is a dict of further keywords for the balancer.

      Cost: that of :func:`sam_task_grads` in steps with SAM, of
      :func:`mtljax.value_and_task_grads` in others. ``mode="direct"`` with
      ``perturb="global"`` costs 2 forward and 1 + T backward passes, and 2 backward
      with a balancer that needs only the losses. State: the balancer's, and with
      ``"reuse"`` T copies of the shared parameters.

    Raises:
      ValueError: As the two functions; if the schedule is not of integers, ``"samo"``
        has no key, or the number of losses is not the balancer's.

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
      As :func:`sam_task_grads`; Liu et al., `Towards Efficient and Scalable
      Sharpness-Aware Minimization <https://arxiv.org/abs/2203.02714>`_, 2022, for the
      reuse.
    """
    engine = make_engine(
        NAME,
        rho=rho,
        rho_own=rho_own,
        adaptive=adaptive,
        norm=norm,
        perturb=perturb,
        has_aux=has_aux,
        labels=labels,
        strategy=strategy,
        chunk_size=chunk_size,
        samo_alpha=samo_alpha,
        samo_step=samo_step,
        compat=compat,
    )
    check_key(NAME, engine, key, "pass key=jax.random.key(...)")
    schedule = make_schedule(NAME, every, start, between)
    if (gramians or between == "reuse") and not isinstance(balancer, Balancer):
        raise ValueError(
            f"{NAME}: gramians=True and between='reuse' keep arrays [T, ...] in the "
            "state, so they take a mtljax.Balancer, which knows T."
        )
    return FlatGrad(
        task_losses,
        balancer,
        flat_split(balancer, mode),
        engine,
        schedule,
        gramians,
        split=mode != "direct" or gramians or between == "reuse",
        key=key if perturb == "samo" else (),
        plain=value_and_balanced_grad(
            task_losses,
            balancer,
            labels=labels,
            has_aux=has_aux,
            strategy=chunk_size if strategy == "chunked" else strategy,
        ),
    )
