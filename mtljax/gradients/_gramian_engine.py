"""The Gramian of the task gradients without the gradients.

For a product ``y = x W`` the gradient of loss t is ``xᵀ δ_t``, with ``δ_t`` the
cotangent of y, and ``<xᵀ δ_s, xᵀ δ_t> = <δ_s, (x xᵀ) δ_t>``: inner products of
gradients from backward passes of the activations alone. The engine reads the jaxpr of
``task_losses``:

1. it sorts the operations into a trunk and the heads of the tasks (``_stages``),
2. finds the operations that are products with a parameter (``_uses``) and decides for
   every leaf whether its T gradients need to be formed (``_plan``); a bias that is
   added to such products is one more row of the parameter,
3. runs the program with zeros added to the results of these products, whose cotangents
   are the δ_t: one backward pass through all heads, T through the trunk
   (``_evaluate``),
4. contracts (``_contract``); once the weights are known, one weighted pass follows,
   or the weighted sum of what the T passes left, where that is less to read.

Whatever it does not recognise is differentiated as usual: the result is always exact.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from mtljax import stack
from mtljax.balancer import check_choice
from mtljax.gradients._engine import _evaluate as evaluate
from mtljax.gradients._engine._batch import batch
from mtljax.gradients._engine._cost import cheap_heads, combining_pays, pays
from mtljax.gradients._engine._cost import passes as default_passes
from mtljax.gradients._engine._passes import Passes
from mtljax.gradients._engine._plan import Plan, common_plan, plan
from mtljax.gradients._engine._program import explicit_axes, is_float, trace
from mtljax.gradients._labels import resolve_labels
from mtljax.gradients._task_grads import (
    Strategy,
    checked_losses,
    linearize,
    map_tasks,
    task_rows,
)
from mtljax.types import Gramian, Losses, Mask, Params, Weights

GramianEngine: TypeAlias = Literal["auto", "stacked", "gramian"]


class Uses(NamedTuple):
    """A planned ``task_losses``: what can be decided before anything is computed."""

    plan: Plan
    leaves: list[Any]
    treedef: Any
    marks: list[str]  # "shared" or "own", per leaf
    labelled: bool

    def numbers(self, label: str) -> list[int]:
        """The leaves with a label."""
        return [i for i, mark in enumerate(self.marks) if mark == label]


def find_uses(
    function: Callable[[Params], Any], params: Params, *, has_aux: bool, labels: Any
) -> Uses:
    """Traces ``function`` and plans its Gramian.

    Raises:
      ValueError: If a parameter is not a real floating-point array.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_float(jnp.result_type(leaf)):
            raise ValueError(
                f"parameter {stack.path_name(path)!r} has dtype "
                f"{jnp.result_type(leaf)}; only real floating-point leaves can be "
                "balanced."
            )
    leaves, treedef = jax.tree.flatten(params)
    marks = ["shared"] * len(leaves)
    if labels is not None:
        marks = resolve_labels(labels, params)
    program = trace(
        lambda flat: checked_losses(
            function(jax.tree.unflatten(treedef, flat)), has_aux
        ),
        leaves,
    )
    (num_tasks,) = program.avals[program.losses].shape
    shared = [i for i, mark in enumerate(marks) if mark == "shared"]
    made = plan(program, num_tasks, shared)
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    return Uses(made, arrays, treedef, marks, labels is not None)


class Linearized(NamedTuple):
    """The forward pass, with the members of ``Pullback`` and the Gramian."""

    uses: Uses
    backward: evaluate.Backward

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.backward.losses

    @property
    def aux(self) -> Any:
        """The auxiliary output of ``task_losses``."""
        return self.uses.plan.program.restore_aux(self.backward.aux)

    def select(self, mask: Mask) -> "Linearized":
        """As if the gradients of absent tasks were zero."""
        return self._replace(backward=evaluate.select(self.backward, mask))

    def shared(self, weights: Weights, rows: evaluate.Rows) -> Any:
        """``Σ_t weights[t] g_t`` of the shared leaves, MaskedNode for own ones."""
        absent = [optax.MaskedNode()] * self.uses.marks.count("own")
        return self.merge(self._gradient("shared", weights, rows), absent)

    @property
    def own(self) -> Callable[[Weights], list[Any]] | None:
        """The same of own leaves; None without labels."""
        if not self.uses.labelled:
            return None
        return lambda weights: self._gradient("own", weights)

    def merge(self, shared: Any, own: list[Any] | None) -> Any:
        """A tree like the parameters."""
        sources = {"shared": iter(jax.tree.leaves(shared)), "own": iter(own or ())}
        leaves = [next(sources[mark]) for mark in self.uses.marks]
        return jax.tree.unflatten(self.uses.treedef, leaves)

    def gramian(self, rows: evaluate.Rows) -> Gramian:
        """Inner products of the gradients of the shared leaves."""
        products = evaluate.products(self.uses.plan, rows, rows)
        # Rounding differs across the diagonal, and solvers rely on symmetry.
        return (products + products.T) / 2

    def rows(self, passes: Passes) -> evaluate.Rows:
        """The T gradients, formed as far as they need to be."""

        def run(pull, cotangents, in_axes, out_axes):
            # Where shardings are part of types, only vmap knows its axes.
            if passes.strategy == "vmap" and not explicit_axes():
                return batch(pull, cotangents, in_axes, out_axes)
            axes = {"in_axes": in_axes, "out_axes": out_axes}
            return map_tasks(pull, cotangents, passes, **axes)

        return evaluate.gather(self.uses.plan, self.backward, run)

    def _gradient(
        self, label: str, weights: Weights, rows: evaluate.Rows | None = None
    ) -> list[Any]:
        numbers, made = self.uses.numbers(label), self.uses.plan
        if rows is not None and combining_pays(made):
            found = evaluate.combine(made, self.backward, rows, weights, numbers)
        else:
            found = evaluate.gradient(
                made, self.backward, weights, numbers, heads_again=cheap_heads(made)
            )
        return [
            found[i] if i in found else jnp.zeros_like(self.uses.leaves[i])
            for i in numbers
        ]


def linearize_uses(uses: Uses) -> Linearized:
    """One forward pass, and one backward pass through the heads."""
    return Linearized(uses, evaluate.forward(uses.plan, uses.leaves))


def task_gramian(
    task_losses: Callable[..., Any],
    *,
    has_aux: bool = False,
    labels: Any = None,
    engine: GramianEngine = "auto",
    strategy: Strategy = "auto",
    chunk_size: int = 4,
) -> Callable[..., Any]:
    """Losses and the Gramian of their gradients.

    Args:
      task_losses: As for :func:`value_and_task_grads`.
      has_aux: ``task_losses`` returns ``(losses, aux)``.
      labels: Restricts the Gramian to the shared parameters.
      engine: ``"stacked"`` forms the T gradients, ``"gramian"`` only those that are
        cheaper formed than not, ``"auto"`` chooses; see
        :func:`value_and_balanced_grad`.
      strategy: How the T backward passes run.
      chunk_size: Tasks in a chunk.

    Returns:
      A function of ``(params, *args)`` that returns ``(losses[T], gramian[T, T])``, or
      ``((losses, aux), gramian)``. Cost: one forward and T backward passes.

    Examples:
      >>> import jax.numpy as jnp
      >>> losses, gramian = task_gramian(lambda p: jnp.array([2.0, -1.0]) * p)(3.0)
      >>> gramian.tolist()
      [[4.0, -2.0], [-2.0, 1.0]]
    """
    check_choice("task_gramian", "engine", engine, GramianEngine)
    asked = Passes(strategy, chunk_size)

    def function(params, *args, **kwargs):
        def losses_of(p):
            return task_losses(p, *args, **kwargs)

        options = {"has_aux": has_aux, "labels": labels}
        uses, passes = choose(engine, losses_of, params, asked, **options)
        if uses is None:
            pull = linearize(losses_of, params, **options)
            rows = task_rows(pull, passes)
            stack.check(rows, pull.losses.shape[0], "task_gramian")
            gramian = stack.gramian(rows)
        else:
            pull = linearize_uses(uses)
            gramian = pull.gramian(pull.rows(passes))
        return ((pull.losses, pull.aux) if has_aux else pull.losses), gramian

    return function


class Choice(NamedTuple):
    """An engine and how its passes run."""

    uses: Uses | None  # None: stack the gradients
    passes: Passes


def choose(
    engine: str,
    function: Callable[[Params], Any],
    params: Params,
    asked: Passes,
    *,
    has_aux: bool,
    labels: Any,
) -> Choice:
    """Resolves ``engine="auto"`` and ``strategy="auto"`` from the shapes."""
    check_choice("the engine", "strategy", asked.strategy, Strategy)

    def passes(uses, stacked):
        if asked.strategy != "auto":
            return asked
        return default_passes(uses.plan, stacked=stacked)

    if engine == "stacked":
        return Choice(None, asked)
    if engine == "gramian":
        uses = find_uses(function, params, has_aux=has_aux, labels=labels)
        return Choice(uses, passes(uses, stacked=False))
    if not all(is_float(jnp.result_type(leaf)) for leaf in jax.tree.leaves(params)):
        return Choice(None, asked)
    try:
        uses = find_uses(function, params, has_aux=has_aux, labels=labels)
    except jax.errors.JAXTypeError:
        # Outside of jit a function may look at the values of its parameters.
        return Choice(None, asked)
    # Who wrote jax.checkpoint wants its memory back, which inlining does not give.
    if uses.plan.program.rematerialises or not pays(uses.plan):
        return Choice(None, passes(uses, stacked=True))
    return Choice(uses, passes(uses, stacked=False))


def cross_task_gramian(
    task_losses: Callable[..., Any],
    *,
    labels: Any = None,
    engine: GramianEngine = "auto",
    strategy: Strategy = "auto",
    chunk_size: int = 4,
) -> Callable[..., Any]:
    """``J₁ J₂ᵀ``: inner products of the task gradients on two batches.

    The side input ``cross_gramian`` of ``moco``, ``modo`` and ``sdmgrad``, whose
    expectation is free of the noise that a Gramian of one batch has on its diagonal.
    For a product the entries are ``<δ_s, (x x'ᵀ) δ'_t>``, as in :func:`task_gramian`.

    Args:
      task_losses: As for :func:`value_and_task_grads`, without auxiliary output.
      labels: Restricts the products to the shared parameters.
      engine: As for :func:`task_gramian`.
      strategy: How the 2 T backward passes run.
      chunk_size: Tasks in a chunk.

    Returns:
      A function of ``(params, first, second)``, with a tuple of the further arguments
      of ``task_losses`` for each batch, that returns ``(losses[T], losses[T],
      cross[T, T])``; rows belong to the first batch. Cost: two forward and 2 T
      backward passes.

    Raises:
      ValueError: If the two batches give different numbers of losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> def task_losses(p, x):
      ...     return jnp.stack([p @ x, 2 * p @ x])
      >>> cross = cross_task_gramian(task_losses)
      >>> p, x, y = jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([3.0, 5.0])
      >>> cross(p, (x,), (y,))[2].tolist()
      [[3.0, 6.0], [6.0, 12.0]]
    """
    check_choice("cross_task_gramian", "engine", engine, GramianEngine)
    asked = Passes(strategy, chunk_size)

    def function(params, first, second):
        calls = [lambda p, args=args: task_losses(p, *args) for args in (first, second)]
        options = {"has_aux": False, "labels": labels}
        choices = [choose(engine, call, params, asked, **options) for call in calls]
        left, right = (choice.uses for choice in choices)
        if left is None or right is None:
            pulls = [linearize(call, params, **options) for call in calls]
            losses = [pull.losses for pull in pulls]
            _check_equal_tasks(*losses)
            rows = [
                task_rows(pull, choice.passes)
                for pull, choice in zip(pulls, choices, strict=True)
            ]
            return *losses, stack.cross_gramian(*rows)
        # Both sides of a product have to be of the same form.
        common = common_plan(left.plan, right.plan)
        pulls = [
            linearize_uses(uses._replace(plan=made))
            for uses, made in zip((left, right), common, strict=True)
        ]
        losses = [pull.losses for pull in pulls]
        _check_equal_tasks(*losses)
        rows = [
            pull.rows(choice.passes)
            for pull, choice in zip(pulls, choices, strict=True)
        ]
        return *losses, evaluate.products(common[0], *rows)

    return function


def _check_equal_tasks(first: Losses, second: Losses) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"cross_task_gramian: task_losses returns {first.shape[0]} losses on the "
            f"first batch and {second.shape[0]} on the second."
        )
