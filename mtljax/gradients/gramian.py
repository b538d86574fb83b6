"""The Gramian of the task gradients, with or without the gradients."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from mtljax import placement, stack
from mtljax.balancer import check_choice, task_vector
from mtljax.gradients._gramian import evaluate
from mtljax.gradients._gramian.cost import cheap_heads, combining_pays, pays
from mtljax.gradients._gramian.cost import passes as default_passes
from mtljax.gradients._gramian.plan import Plan, common_plan, plan
from mtljax.gradients._primitives import CUSTOM_VJP, bodies
from mtljax.gradients._program import Program, trace
from mtljax.gradients.linearized import (
    AxisName,
    Leaves,
    Linearized,
    Options,
    Region,
    Strategy,
    VectorLosses,
    checked_losses,
    in_range,
    linearize,
    make_options,
    make_region,
    rescaled,
    split_leaves,
)
from mtljax.gradients.passes import Passes, map_tasks
from mtljax.gradients.separate import Separate, linearize_separate
from mtljax.placement import Backward
from mtljax.types import Gramian, Losses, Params, Weights

GramianEngine: TypeAlias = Literal["auto", "stacked", "gramian"]


class Uses(NamedTuple):
    """A planned ``task_losses``, before any value is computed."""

    plan: Plan
    leaves: Leaves
    partly: bool  # whether the Gramian is that of some of the shared leaves only


def find_uses(
    function: Callable[[Params], Any],
    params: Params,
    options: Options,
    measured: list[int] | None = None,
) -> Uses:
    """Traces ``function`` and plans its Gramian.

    Args:
      function: A function that returns the losses.
      params: Parameters.
      options: Options of the gradients.
      measured: Leaves over which inner products are computed; None for all shared ones.

    Raises:
      ValueError: If a parameter is not a real floating-point array.
    """
    leaves = split_leaves(params, options.labels)
    leaves.check_balanced("shared", "own")
    # Frozen leaves are constants of the program.
    trained = [i for i, mark in enumerate(leaves.marks) if mark != "frozen"]
    values = placement.cast([leaves.values[i] for i in trained], options.axes)

    def of_trained(trained_values):
        full = list(leaves.values)
        for i, value in zip(trained, trained_values, strict=True):
            full[i] = value
        out = function(jax.tree.unflatten(leaves.treedef, full))
        return checked_losses(out, options.has_aux)

    program = trace(of_trained, values)
    (num_tasks,) = program.avals[program.losses].shape
    chosen = leaves.numbers("shared") if measured is None else measured
    shared = [k for k, i in enumerate(trained) if i in chosen]
    made = plan(program, num_tasks, shared, options.axes)
    return Uses(made, leaves, measured is not None)


class LinearizedUses(NamedTuple):
    """The forward pass, with the members of ``Linearized`` and the Gramian."""

    uses: Uses
    region: Region
    backward: evaluate.Backward
    options: Options

    @property
    def leaves(self) -> Leaves:
        """The parameters."""
        return self.uses.leaves

    @property
    def losses(self) -> Losses:
        """The T losses."""
        return self.region.losses

    @property
    def aux(self) -> Any:
        """The auxiliary output of ``task_losses``."""
        return self.uses.plan.program.restore_aux(self.backward.aux)

    def measured(self) -> tuple[Gramian, evaluate.Rows]:
        """Returns the Gramian, and the gradients as far as they were formed."""
        rows = self.rows(self.options.passes)
        return self.gramian(rows), rows

    def gradients(
        self, weights: Weights, own: Weights, rows: evaluate.Rows | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Returns the weighted gradients of shared and of own leaves."""
        return self.shared(weights, rows), self.own(own)

    def rows(self, passes: Passes) -> evaluate.Rows:
        """Returns the T gradients, formed only if the plan requires it."""
        rewrites = placement.rewrites(self.options.backward, self._types())

        def run(pull, cotangents, in_axes, out_axes):
            if passes.strategy == "vmap" and rewrites:
                from mtljax.gradients._rewrite.batch import batch

                return batch(pull, cotangents, in_axes, out_axes)
            axes = {"in_axes": in_axes, "out_axes": out_axes}
            return map_tasks(pull, cotangents, passes, **axes)

        return evaluate.gather(self.uses.plan, self.backward, run, self._sums("shared"))

    def gramian(self, rows: evaluate.Rows) -> Gramian:
        """Returns inner products of the gradients of the shared leaves."""
        products = self.products(rows, rows)
        # Rounding differs across the diagonal, and solvers rely on symmetry.
        return (products + products.T) / 2

    def products(self, left: evaluate.Rows, right: evaluate.Rows) -> Gramian:
        """Returns inner products of the gradients of two batches; not symmetric."""
        return evaluate.products(
            self.uses.plan,
            self.backward.leaves,
            left,
            right,
            sums=self._sums("shared"),
            axes=self.region.axes,
        )

    def shared(self, weights: Weights, rows: evaluate.Rows | None) -> list[Any]:
        """Returns ``Σ_t weights[t] g_t`` for the shared leaves."""
        made = self.uses.plan
        if rows is None or self.uses.partly or not combining_pays(made):
            return self._gradient("shared", weights)
        numbers = self._numbers("shared")
        found = evaluate.combine(
            made, self.backward, rows, weights, numbers, sums=self._sums("shared")
        )
        return self._filled(found, numbers)

    def own(self, weights: Weights) -> list[Any]:
        """Returns ``Σ_t weights[t] g_t`` for the own leaves."""
        return self._gradient("own", weights) if self.leaves.numbers("own") else []

    def _types(self) -> Any:
        return list(self.uses.plan.program.avals.values())

    def _numbers(self, label: str) -> list[int]:
        """Returns the leaves of the program with a label; frozen ones are excluded."""
        marks = [mark for mark in self.leaves.marks if mark != "frozen"]
        return [i for i, mark in enumerate(marks) if mark == label]

    def _sums(self, label: str) -> dict[int, Any]:
        """Returns the axes over which the gradient of each leaf is summed."""
        values = zip(self._numbers(label), self.leaves.of(label), strict=True)
        return {number: self.region.sums(value) for number, value in values}

    def _gradient(self, label: str, weights: Weights) -> list[Any]:
        numbers, made = self._numbers(label), self.uses.plan
        seeds, sums = self.region.seeds, self._sums(label)
        weights, scale = in_range(weights, self.losses.dtype)
        found = evaluate.gradient(
            made,
            self.backward,
            weights,
            numbers,
            seeds=seeds,
            heads_again=cheap_heads(made),
        )
        found = {i: placement.total(g, sums[i]) for i, g in found.items()}
        return rescaled(self._filled(found, numbers), scale)

    def _filled(self, found: dict[int, Any], numbers: list[int]) -> list[Any]:
        """Adds zeros for leaves that no loss reads."""
        leaves = self.backward.leaves
        return [found[i] if i in found else jnp.zeros_like(leaves[i]) for i in numbers]


def linearize_uses(
    uses: Uses, options: Options, *, mask: Any = None, name: str
) -> LinearizedUses:
    """Runs one forward pass, and one backward pass through the heads."""
    values = [
        jnp.asarray(value)
        for value, mark in zip(uses.leaves.values, uses.leaves.marks, strict=True)
        if mark != "frozen"
    ]
    values = placement.cast(values, options.axes)
    local, after = evaluate.forward(uses.plan, values, options.backward)
    region = make_region(local, mask, options, name)
    backward = evaluate.through_heads(after, region.seeds)
    if region.local_mask is not None:
        backward = evaluate.select(backward, region.local_mask)
    return LinearizedUses(uses, region, backward, options)


def task_gramian(
    task_losses: Callable[..., Any],
    *,
    has_aux: bool = False,
    labels: Any = None,
    engine: GramianEngine = "auto",
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
    backward: Backward = "auto",
) -> Callable[..., Any]:
    """Returns a function that computes the losses and the Gramian of their gradients.

    Args:
      task_losses: See :func:`value_and_task_grads`.
      has_aux: Whether ``task_losses`` returns ``(losses, aux)``.
      labels: Restricts the Gramian to the parameters labelled ``"shared"``.
      engine: ``"stacked"`` forms the T gradients. ``"gramian"`` forms only those that
        are less expensive to form. ``"auto"`` selects one of them, see
        :func:`value_and_balanced_grad`.
      strategy: How the T backward passes are run.
      axis_name: See :func:`value_and_task_grads`.
      backward: See :func:`value_and_task_grads`.

    Returns:
      A function of ``(params, *args)`` and ``mask=`` that returns ``(losses, gramian)``
      of shapes ``[T]`` and ``[T, T]``, or ``((losses, aux), gramian)``. The cost is one
      forward and T backward passes.

    Raises:
      ValueError: If an option is unknown, if the losses are not a vector, if a
        parameter that is not frozen is not a floating-point array, or if
        ``engine="gramian"`` is used with an unsupported ``custom_vjp`` rule.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> gramian_fn = mtljax.task_gramian(lambda p: jnp.array([2.0, -1.0]) * p)
      >>> losses, gramian = gramian_fn(3.0)
      >>> gramian.tolist()
      [[4.0, -2.0], [-2.0, 1.0]]
    """
    name = "task_gramian"
    check_choice(name, "engine", engine, GramianEngine)
    options = make_options(
        name,
        has_aux=has_aux,
        labels=labels,
        strategy=strategy,
        backward=backward,
        axis_name=axis_name,
    )

    def function(params, *args, mask=None, **kwargs):
        call = VectorLosses(task_losses, args, kwargs)
        if isinstance(task_losses, Separate):
            call.names = task_losses.names
            found = linearize_separate(
                task_losses, params, args, kwargs, options, mask=mask, name=name
            )
        else:
            found = linearize_any(engine, call, params, options, mask=mask, name=name)
        gramian, _ = found.measured()
        losses = call.named(found.losses)
        return ((losses, found.aux) if has_aux else losses), gramian

    return function


def linearize_any(
    engine: str,
    function: VectorLosses,
    params: Params,
    options: Options,
    *,
    mask: Any,
    name: str,
    measured: list[int] | None = None,
) -> Linearized | LinearizedUses:
    """Runs the forward pass for the engine ``"gramian"`` or ``"stacked"``."""
    uses, passes = choose(engine, function, params, options, measured)
    options = options._replace(passes=passes)
    if uses is None:
        found = linearize(function, params, options, mask=mask, name=name)
        if measured is None:
            return found
        shared = found.leaves.numbers("shared")
        return found._replace(only=tuple(map(shared.index, measured)))
    return linearize_uses(
        uses, options, mask=task_vector(mask, function.names), name=name
    )


class Choice(NamedTuple):
    """An engine and the strategy of its passes."""

    uses: Uses | None  # None: stack the gradients
    passes: Passes


def choose(
    engine: str,
    function: Callable[[Params], Any],
    params: Params,
    options: Options,
    measured: list[int] | None = None,
) -> Choice:
    """Resolves ``engine="auto"`` and ``strategy="auto"`` from the shapes.

    If only some of the shared leaves are ``measured``, the Gramian engine is preferred,
    and gradients are stacked only if this engine does not support the program.
    """
    asked = options.passes

    def passes(uses, stacked):
        if asked.strategy != "auto":
            return asked
        return default_passes(uses.plan, stacked=stacked)

    if engine == "stacked":
        return Choice(None, asked)
    if engine == "gramian":
        uses = find_uses(function, params, options, measured)
        rule = _nonlinear_rule(uses.plan.program, function, params, options)
        if rule is not None:
            raise ValueError(
                "engine='gramian' needs backward passes that are linear in the "
                f"cotangent, but the custom_vjp rule of {rule} is not. Use "
                "engine='stacked'."
            )
        return Choice(uses, passes(uses, stacked=False))
    leaves = split_leaves(params, options.labels)
    trained = leaves.of("shared") + leaves.of("own")
    if any(stack.why_unbalanced(leaf) for leaf in trained):
        return Choice(None, asked)
    try:
        uses = find_uses(function, params, options, measured)
    except jax.errors.JAXTypeError:
        # Outside of jit a function may read concrete values of its parameters.
        return Choice(None, asked)
    # Inlining jax.checkpoint would lose its memory savings, so stack the gradients.
    program = uses.plan.program
    worth = measured is not None or pays(uses.plan)
    if (
        program.rematerialises
        or not worth
        or _nonlinear_rule(program, function, params, options) is not None
    ):
        return Choice(None, passes(uses, stacked=True))
    return Choice(uses, passes(uses, stacked=False))


def _nonlinear_rule(
    program: Program,
    function: Callable[[Params], Any],
    params: Params,
    options: Options,
) -> str | None:
    """Returns the name of a ``custom_vjp`` rule that is not linear in the cotangent.

    If a rule clips or rounds a cotangent, the sum of two backward passes differs from
    the pass of the sum. The check runs only if the program contains a rule.
    """
    rules = [eqn for op in program.ops for eqn in _custom_rules(op.eqn)]
    if not rules:
        return None
    found = jax.eval_shape(
        lambda p: linearize(function, p, options._replace(backward="jax")).losses,
        params,
    )

    def transposed(p, cotangent):
        lin = linearize(function, p, options._replace(backward="jax"))
        seed = placement.like(cotangent, lin.region.local)
        (back,) = jax.linear_transpose(lin.pull, seed)(lin.pull(seed))
        return back

    try:
        jax.eval_shape(transposed, params, found)
    except NotImplementedError:
        return str(rules[0].params.get("name", "a function"))
    return None


def _custom_rules(eqn: Any) -> list[Any]:
    if eqn.primitive in CUSTOM_VJP:
        return [eqn]
    return [
        rule
        for body in bodies(eqn.params)
        for inner in body.eqns
        for rule in _custom_rules(inner)
    ]


def cross_task_gramian(
    task_losses: Callable[..., Any],
    *,
    labels: Any = None,
    engine: GramianEngine = "auto",
    strategy: Strategy | int = "auto",
    axis_name: AxisName = None,
    backward: Backward = "auto",
) -> Callable[..., Any]:
    """Returns a function that computes inner products of task gradients of two batches.

    The result ``J₁ J₂ᵀ`` is the side input ``cross_gramian`` of ``modo`` and
    ``sdmgrad``. The Gramian of one batch has noise on its diagonal. The expectation of
    the cross-batch product does not contain this noise. For a product the entries are
    ``<δ_s, (x x'ᵀ) δ'_t>``, as in :func:`task_gramian`.

    Args:
      task_losses: See :func:`value_and_task_grads`, without auxiliary output.
      labels: Restricts the products to the parameters labelled ``"shared"``.
      engine: See :func:`task_gramian`.
      strategy: How the 2 T backward passes are run.
      axis_name: See :func:`value_and_task_grads`.
      backward: See :func:`value_and_task_grads`.

    Returns:
      A function of ``(params, first, second)``, where ``first`` and ``second`` are
      tuples of the further arguments of ``task_losses`` for each batch. It returns
      ``(losses, losses, cross)`` of shapes ``[T]``, ``[T]`` and ``[T, T]``. The losses
      are dictionaries if ``task_losses`` returns one. Rows of ``cross`` belong to the
      first batch. The cost is two forward and 2 T backward passes.

    Raises:
      ValueError: If the two batches give different numbers of losses.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> def task_losses(p, x):
      ...     return jnp.stack([p @ x, 2 * p @ x])
      >>> cross = mtljax.cross_task_gramian(task_losses)
      >>> p, x, y = jnp.zeros(2), jnp.array([1.0, 0.0]), jnp.array([3.0, 5.0])
      >>> cross(p, (x,), (y,))[2].tolist()
      [[3.0, 6.0], [6.0, 12.0]]
    """
    name = "cross_task_gramian"
    check_choice(name, "engine", engine, GramianEngine)
    options = make_options(
        name,
        labels=labels,
        strategy=strategy,
        backward=backward,
        axis_name=axis_name,
    )

    def function(params, first, second):
        calls = [VectorLosses(task_losses, args, {}) for args in (first, second)]

        def named(*losses):
            pairs = zip(calls, losses, strict=True)
            return tuple(call.named(vector) for call, vector in pairs)

        choices = [choose(engine, call, params, options) for call in calls]
        left, right = (choice.uses for choice in choices)
        if left is None or right is None:
            found = [
                linearize(
                    call, params, options._replace(passes=choice.passes), name=name
                )
                for call, choice in zip(calls, choices, strict=True)
            ]
            losses = [one.losses for one in found]
            _check_equal_tasks(*losses)
            found[0].leaves.check_balanced("shared")
            rows = [one.stacked() for one in found]
            return *named(*losses), stack.cross_gramian(*rows)
        # Both sides of a product must have the same form.
        common = common_plan(left.plan, right.plan)
        found = [
            linearize_uses(uses._replace(plan=made), options, name=name)
            for uses, made in zip((left, right), common, strict=True)
        ]
        losses = [one.losses for one in found]
        _check_equal_tasks(*losses)
        rows = [
            one.rows(choice.passes) for one, choice in zip(found, choices, strict=True)
        ]
        return *named(*losses), found[0].products(*rows)

    return function


def _check_equal_tasks(first: Losses, second: Losses) -> None:
    if first.shape != second.shape:
        raise ValueError(
            f"cross_task_gramian: task_losses returns {first.shape[0]} losses on the "
            f"first batch and {second.shape[0]} on the second. They must be equal."
        )
