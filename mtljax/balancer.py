"""The one abstraction: an optax transformation that turns T gradients into one.

A :class:`Balancer` is an ``optax.GradientTransformationExtraArgs``: its input is
the *stacked* gradients (the tree of the parameters, every leaf ``[T, ...]``), its
output one update shaped like the parameters. It also says what it ``needs`` to
know, so that :func:`mtljax.value_and_balanced_grad` can compute the same update
without stacking anything when T numbers are enough.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Scalar

from mtljax import placement, stack
from mtljax.types import Grads, Losses, Mask, Needs, Scale, Weights

# weigh(state, *, losses, gramian, mask) -> (weights, state)
WeighFn: TypeAlias = Callable[..., tuple[Weights, Any]]
# domain(losses[T]) -> bool[T]: the losses that the method is defined for
Domain: TypeAlias = Callable[[Any], Any]
_Call = TypeVar("_Call", bound=Callable[..., Any])


class Balancer(optax.GradientTransformationExtraArgs):
    """A multi-task method as an optax transformation, still the pair (init, update).

    ``update(grads, state, params=None, *, losses=None, mask=None, **ignored)`` maps
    stacked gradients to one update. ``losses`` ``[T]`` is required by the methods
    that read them. ``mask`` ``[T]``, boolean or integer, marks the tasks present in
    this batch: the result is that of the method on the present tasks alone, and the
    entries of an absent task in the state do not change. If ``params`` is given, every
    gradient must have the shape ``[T, *parameter.shape]``.

    A step is applied completely or not at all. The update is NaN and the state comes
    back bit-identical if a loss or a gradient of a present task is not finite, if a
    loss is outside the domain of the method, or if the update or the new state would
    not be finite. ``optax.apply_if_finite`` further down the chain then skips the step.
    With all tasks absent the update is zero and the state does not change.

    Every leaf of the state has a buffer of its own, so that a step may donate it.
    A call outside ``jit`` compiles once per balancer and shape.

    Attributes:
      init: ``init(params) -> state``.
      update: As above.
      name: Name of the factory, used in errors and logs.
      num_tasks: T.
      needs: What the weights are a function of: ``"losses"`` (or nothing),
        ``"gramian"`` (``[T, T]``, and possibly the losses), or ``"grads"``.
      weigh: ``weigh(state, *, losses, gramian, mask) -> (weights[T], state)``; None
        when ``needs == "grads"``. The update is then ``sum_i weights[i] * grads[i]``.
        The weights of a step that cannot be applied are NaN, with the old state.
      reads_losses: True when ``losses`` must be given.
      positive_losses: True when the domain of the method is losses above zero.
      domain: ``domain(losses[T]) -> bool[T]``, the losses that the method is defined
        for; None for all finite losses.
      observe: For methods that read the losses again *after* the step (FAMO):
        ``observe(state, *, losses, mask=None) -> state``; None for all others.
        Call it through :func:`mtljax.observe`.
      hyperparams: Arguments of the factory by name, for ``repr``.
      names: Names of the tasks, if the factory got a tuple of names for ``num_tasks``;
        ``losses`` and ``mask`` may then be dicts.
    """

    name: str
    num_tasks: int
    needs: Needs
    weigh: WeighFn | None
    reads_losses: bool
    positive_losses: bool
    domain: Domain | None
    observe: Callable[..., Any] | None
    hyperparams: dict[str, Any]
    names: tuple[str, ...] | None

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        *,
        name: str = "balancer",
        num_tasks: int = 0,
        needs: Needs = "grads",
        weigh: WeighFn | None = None,
        reads_losses: bool = False,
        positive_losses: bool = False,
        domain: Domain | None = None,
        observe: Callable[..., Any] | None = None,
        names: tuple[str, ...] | None = None,
    ) -> "Balancer":
        """Attaches what the method reads to the pair (init, update)."""

        def by_name(function):
            compiled = _compiled_once(function)

            @functools.wraps(function)
            def call(*args, **kwargs):
                for key in ("losses", "mask"):
                    if isinstance(kwargs.get(key), Mapping):
                        kwargs[key] = task_vector(kwargs[key], self.names)
                return compiled(*args, **kwargs)

            return call

        self = super().__new__(  # pyright: ignore[reportCallIssue]
            cls, _own_buffers(init), by_name(update)
        )
        self.name = name
        self.num_tasks = num_tasks
        self.needs = needs
        self.weigh = None if weigh is None else by_name(weigh)
        self.reads_losses = reads_losses
        self.positive_losses = positive_losses
        self.domain = _positive if positive_losses and domain is None else domain
        self.observe = None if observe is None else by_name(observe)
        self.hyperparams = {}
        self.names = names
        return self

    def __repr__(self) -> str:
        """The call of the factory with all hyper-parameters."""
        if not self.hyperparams:
            return (
                f"Balancer({self.name}, num_tasks={self.num_tasks}, "
                f"needs={self.needs!r})"
            )
        # The name of a wrapper holds the names of what it wraps.
        arguments = ", ".join(
            _shown(value) if isinstance(value, Balancer) else f"{key}={_shown(value)}"
            for key, value in self.hyperparams.items()
        )
        return f"{self.name.partition('(')[0]}({arguments})"


def _shown(value: Any) -> str:
    """A hyper-parameter in one short line; a traced one by its shape and dtype."""
    if isinstance(value, jax.Array | np.ndarray):
        concrete = not isinstance(value, Tracer)
        plain = concrete and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        if plain and value.size <= 8:
            return str(np.asarray(value).tolist())
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        shown = (f"{f.name}={_shown(getattr(value, f.name))}" for f in fields)
        return f"{type(value).__name__}({', '.join(shown)})"
    if callable(value) and not isinstance(value, tuple):
        return getattr(value, "__qualname__", type(value).__name__)
    return repr(value)


def _own_buffers(init: Callable[..., Any]) -> Callable[..., Any]:
    """Gives each leaf of the state a buffer of its own, of a strong dtype.

    A leaf that occurs twice, or that is an array of the caller (a key, a preference),
    could not be donated. A weak dtype would change in the first step.
    """

    def copy(leaf):
        leaf = jnp.copy(leaf)
        weak = leaf.weak_type if hasattr(leaf, "weak_type") else False
        return jax.lax.convert_element_type(leaf, leaf.dtype) if weak else leaf

    @functools.wraps(init)
    def own(*args, **kwargs):
        return jax.tree.map(copy, init(*args, **kwargs))

    return own


def _compiled_once(function: _Call) -> _Call:
    """Compiles calls outside of any trace; inside one, the function is unchanged.

    Without it every call outside ``jit`` would compile the loops of the solvers again,
    as their bodies are new functions each time.
    """
    compiled = jax.jit(lambda args, kwargs: function(*args, **kwargs))

    @functools.wraps(function)
    def call(*args, **kwargs):
        if all(map(_is_concrete, jax.tree.leaves((args, kwargs)))):
            return compiled(args, kwargs)
        return function(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def _is_concrete(leaf: Any) -> bool:
    """Whether ``jit`` takes the leaf as an argument."""
    if isinstance(leaf, Tracer):
        return False
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype != jax.dtypes.float0 and leaf.dtype.kind not in "OSUMm"
    return isinstance(leaf, jax.Array | bool | int | float | complex)


def factory(function: _Call) -> _Call:
    """Decorates the factory of a balancer: its arguments are checked and recorded.

    ``num_tasks`` may be any integer, also of NumPy or a concrete array; ``key`` must
    be a key of ``jax.random``. The arguments are what ``repr`` of the balancer shows.

    Args:
      function: Returns a :class:`Balancer`.

    Returns:
      The function with the same signature.

    Examples:
      >>> @factory
      ... def equal(num_tasks: int, *, weight: float = 1.0):
      ...     return Balancer(lambda params: (), lambda g, s: (g, s), name="equal")
      >>> equal(3)
      equal(num_tasks=3, weight=1.0)
    """
    signature = inspect.signature(function)
    name = function.__name__

    @functools.wraps(function)
    def build(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        given, names = bound.arguments, None
        if "num_tasks" in given:
            names = task_names(name, given["num_tasks"])
            count = given["num_tasks"] if names is None else len(names)
            given["num_tasks"] = check_num_tasks(name, count)
        if "key" in given:
            check_key(name, given["key"])
        balancer = function(*bound.args, **bound.kwargs)
        bound.apply_defaults()
        shown = {"num_tasks": names} if names else {}
        balancer.hyperparams = {**bound.arguments, **shown}
        inner = (x.names for x in given.values() if isinstance(x, Balancer))
        balancer.names = names or balancer.names or next(filter(None, inner), None)
        return balancer

    return build  # pyright: ignore[reportReturnType]


def task_names(name: str, num_tasks: Any) -> tuple[str, ...] | None:
    """The names of the tasks, if ``num_tasks`` is a sequence of names."""
    if not isinstance(num_tasks, list | tuple):
        return None
    names = tuple(num_tasks)
    named = all(isinstance(task, str) for task in names)
    if not (names and named and len(set(names)) == len(names)):
        raise ValueError(
            f"{name}: num_tasks must be a number, or a sequence of distinct names, not "
            f"{num_tasks!r}."
        )
    return names


def task_vector(values: Any, names: Sequence[str] | None) -> Any:
    """A dict by task as a vector in the order of the names; anything else unchanged.

    Raises:
      ValueError: If the tasks have no names, or the names differ.
    """
    if not isinstance(values, Mapping):
        return jnp.asarray(values) if isinstance(values, list | tuple) else values
    if names is None:
        raise ValueError(
            f"a dict with the names {list(values)} was given, but the tasks have no "
            "names; return a dict of losses from task_losses, or build the balancer "
            "with names."
        )
    if set(values) != set(names):
        raise ValueError(
            f"the tasks are {list(names)}, but a dict with the names {list(values)} "
            "was given."
        )
    return jnp.stack([jnp.asarray(values[name]) for name in names])


def named(values: Any, balancer: Balancer) -> dict[str, Any]:
    """Returns the entries of a vector over the tasks, by the names of the tasks.

    Args:
      values: Any array ``[T, ...]``, such as ``state.task_weights`` or losses.
      balancer: A balancer that was built with names.

    Raises:
      ValueError: If the balancer has no names, or another number of tasks.

    Examples:
      >>> import jax.numpy as jnp, mtljax
      >>> balancer = mtljax.linear(("seg", "depth"))
      >>> weights = jnp.array([1.0, 0.5])
      >>> {name: float(w) for name, w in mtljax.named(weights, balancer).items()}
      {'seg': 1.0, 'depth': 0.5}
    """
    if balancer.names is None:
        raise ValueError(
            f"{balancer.name} was built without names of tasks; pass a tuple of names "
            "for num_tasks."
        )
    if len(values) != len(balancer.names):
        raise ValueError(
            f"{balancer.name} has {len(balancer.names)} tasks, but {len(values)} "
            "values were given."
        )
    return dict(zip(balancer.names, values, strict=True))


def check_num_tasks(name: str, num_tasks: Any) -> int:
    """Returns ``num_tasks`` as an ``int``; raises unless it is a positive integer."""
    if isinstance(num_tasks, Tracer):
        raise ValueError(
            f"{name}: num_tasks is traced, but it sets the shapes and must be static; "
            "with optax.inject_hyperparams, pass static_args=('num_tasks',)."
        )
    try:
        number = 0 if _is_boolean(num_tasks) else operator.index(num_tasks)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(
            f"{name}: num_tasks must be a positive integer, not {num_tasks!r}."
        )
    return number


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def check_key(name: str, key: Any) -> None:
    """Raises unless ``key`` is a key, of ``jax.random.key`` or ``PRNGKey``."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        valid = shape == ()
    else:  # raw keys have two words, those of rbg four
        valid = dtype == jnp.uint32 and shape in ((2,), (4,))
    if not valid:
        given = repr(key) if dtype is None else f"an array {dtype}{list(shape or ())}"
        raise ValueError(
            f"{name}: key must be one key of jax.random, such as jax.random.key(0), "
            f"not {given}."
        )


def check_choice(name: str, argument: str, value: Any, choices: Any) -> None:
    """Raises unless ``value`` is one of the choices (a tuple or a Literal)."""
    choices = choices if isinstance(choices, tuple) else get_args(choices)
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name}: {argument}={value!r} is not one of {listed}.")


def check_number(
    name: str,
    argument: str,
    value: Any,
    *,
    at_least: float | int | None = None,
    above: float | int | None = None,
    at_most: float | int | None = None,
    below: float | int | None = None,
) -> None:
    """Raises unless a concrete hyper-parameter is a finite number in its range.

    A traced value cannot be judged and passes: this is what makes ``vmap`` over a
    hyper-parameter, a schedule and ``optax.inject_hyperparams`` possible.
    """
    if isinstance(value, Tracer):
        return
    bounds = (
        ("at least", at_least, operator.ge),
        ("above", above, operator.gt),
        ("at most", at_most, operator.le),
        ("below", below, operator.lt),
    )
    wanted = [(word, bound) for word, bound, _ in bounds if bound is not None]
    number = np.asarray(value)
    valid = number.shape == () and np.issubdtype(number.dtype, np.number)
    valid = valid and np.isrealobj(number) and bool(np.isfinite(number))
    if not valid or not all(
        holds(float(number), bound) for _, bound, holds in bounds if bound is not None
    ):
        required = " and ".join(f"{word} {bound:g}" for word, bound in wanted)
        raise ValueError(
            f"{name}: {argument} must be a finite number{' ' if required else ''}"
            f"{required}, not {value!r}."
        )


def commit(healthy: Any, update: Any, new: Any, old: Any) -> tuple[Any, Any]:
    """Applies the state policy to the result of one step.

    The update and the new state are returned if ``healthy`` holds and every entry of
    both is finite. Otherwise every entry of the update is NaN and the state is the old
    one, bit for bit. All methods, engines and wrappers end with this function. An
    entry of the state that was infinite before the step and is unchanged is allowed.

    Args:
      healthy: Boolean scalar; False if an input of a present task was not usable.
      update: Tree of the update; ``MaskedNode`` is allowed.
      new: State that the method proposes. Its leaves are cast to the dtypes of the
        old state, which ``scan`` requires to stay.
      old: State before the step.

    Returns:
      The pair ``(update, state)``.
    """
    healthy = jnp.asarray(healthy)
    for leaf in jax.tree.leaves(update):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            healthy &= jnp.isfinite(leaf).all()
    new = jax.tree.map(_like, new, old)
    for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if n is not o and jnp.issubdtype(n.dtype, jnp.inexact):
            healthy &= (jnp.isfinite(n) | (n == o)).all()
    healthy = placement.agreed(healthy, old)

    def mark(u):
        # A frozen leaf may hold integers, which have no NaN.
        if not jnp.issubdtype(jnp.result_type(u), jnp.inexact):
            return u
        return jnp.where(healthy, u, jnp.asarray(jnp.nan, jnp.result_type(u)))

    update = jax.tree.map(mark, update)
    return update, choose_state(healthy, new, old)


def choose_state(keep: Any, new: Any, old: Any) -> Any:
    """The new state if ``keep``, else the old one, in the dtypes of the old one."""

    def leaf(n, o):
        # A state keeps its sharding, which scan requires like its dtypes.
        return o if n is o else jnp.where(keep, placement.like(_like(n, o), o), o)

    return jax.tree.map(leaf, new, old)


def _like(new: Any, old: Any) -> Any:
    """The leaf in the dtype of the old one."""
    if new is old:
        return new
    old_dtype = jnp.asarray(old).dtype
    new = jnp.asarray(new)
    return new if new.dtype == old_dtype else new.astype(old_dtype)


def as_mask(name: str, num_tasks: int, mask: Any) -> Mask:
    """The mask as booleans ``[num_tasks]``; None means that all are present.

    A mask is boolean or integer. A float mask is refused whatever its values, so that
    the same call is valid inside and outside ``jit``.
    """
    if mask is None:
        return jnp.ones(num_tasks, bool)
    mask = jnp.asarray(mask)
    if mask.shape != (num_tasks,):
        raise ValueError(
            f"{name}: mask has shape {mask.shape}; it must be ({num_tasks},), "
            "one flag per task."
        )
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise ValueError(
            f"{name}: mask has dtype {mask.dtype}, but a task is present or absent; "
            "pass booleans, for example mask > 0."
        )
    return mask.astype(bool)


def as_losses(name: str, num_tasks: int, losses: Any) -> Losses:
    """The losses as a float vector ``[num_tasks]`` of at least float32."""
    if losses is None:
        raise ValueError(
            f"{name} reads the task losses: call update(grads, state, params, "
            "losses=losses) with one loss per task."
        )
    losses = jnp.asarray(losses)
    if losses.shape != (num_tasks,):
        raise ValueError(
            f"{name}: losses has shape {losses.shape}; it must be ({num_tasks},), "
            "one scalar per task."
        )
    if not jnp.isrealobj(losses):
        raise ValueError(f"{name}: losses has dtype {losses.dtype}; it must be real.")
    return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))


def _positive(losses: Losses) -> Mask:
    return losses > 0


def judge_losses(
    name: str, num_tasks: int, losses: Any, present: Mask, domain: Domain | None
) -> tuple[Losses, Scalar]:
    """The losses, and whether those of the present tasks are usable.

    Usable losses are finite and in the domain. Losses of absent tasks are replaced by
    one, and all of them if one is not usable, so that a rule never sees NaN.
    """
    losses = as_losses(name, num_tasks, losses)
    usable = jnp.isfinite(losses)
    if domain is not None:
        usable &= domain(losses)
    healthy = (usable | ~present).all()
    return jnp.where(present & healthy, losses, 1), healthy


def check_state(name: str, state: Any, expected: Any, *, only_type: bool = False):
    """Raises unless the state has the structure and the shapes of an expected one.

    Args:
      name: Method on whose behalf the check is made.
      state: State as the caller gave it.
      expected: State of ``init``, or its shapes (``jax.eval_shape``).
      only_type: Compare the type and the entries ``task_weights`` only; what the state
        holds for every parameter is checked elsewhere.
    """
    remedy = "create it with init(params) of this balancer."
    if type(state) is not type(expected):
        raise ValueError(
            f"{name}: the state is of type {type(state).__name__}, not "
            f"{type(expected).__name__}; {remedy}"
        )
    if only_type:
        state, expected = (getattr(s, "task_weights", ()) for s in (state, expected))
    elif jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(f"{name}: the state has another structure; {remedy}")
    given = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), wanted in zip(given, jax.tree.leaves(expected), strict=True):
        if jnp.shape(leaf) != wanted.shape:
            raise ValueError(
                f"{name}: leaf {stack.path_name(path)!r} of the state has shape "
                f"{jnp.shape(leaf)}, but this balancer has {wanted.shape}; {remedy}"
            )


def rescale(
    weights: Weights, mask: Mask, scale: Scale, native: Literal["sum", "mean", "free"]
) -> Weights:
    """Brings weights to a declared scale.

    ``"sum"`` is the scale of the plain sum of losses (weights that add up to the
    number of present tasks), ``"mean"`` that of their mean (weights that add up
    to 1). A method whose own convention is one of the two is multiplied by a
    constant; the others (``native="free"``) are normalised by the sum of weights.
    """
    if scale in ("native", native):
        return weights
    count = jnp.maximum(mask.sum(), 1).astype(weights.dtype)
    if native == "free":
        total = jnp.where(mask, weights, 0).sum()
        weights = weights / jnp.where(total == 0, 1, total)
        return weights * count if scale == "sum" else weights
    return weights * count if native == "mean" else weights / count


def from_weights(
    name: str,
    num_tasks: int,
    *,
    init: Callable[[], Any],
    weigh: Callable[..., tuple[Weights, Any]],
    needs: Literal["losses", "gramian"],
    native: Literal["sum", "mean", "free"],
    scale: Scale = "native",
    reads_losses: bool = False,
    positive_losses: bool = False,
    domain: Domain | None = None,
    side_inputs: tuple[str, ...] = (),
    observe: Callable[..., Any] | None = None,
) -> Balancer:
    """A :class:`Balancer` from a rule that yields T weights.

    All that the methods have in common is defined here once: shape checks, masks, the
    declared scale, dtypes that do not change in ``scan``, and the state policy.

    Args:
      name: Name of the factory.
      num_tasks: T, the length of the leading axis.
      init: ``init() -> state``, a NamedTuple with a field ``task_weights`` ``[T]``,
        which this builder fills with the weights last used.
      weigh: ``weigh(state, *, losses, gramian, mask) -> (weights, state)``. It gets
        a boolean mask, losses of absent tasks replaced by one, and a Gramian whose
        rows and columns of absent tasks are zero; of a step that is not applied all
        losses are one and the Gramian is the identity. What it returns for absent tasks
        is ignored, but the state it returns for them must be the one it got.
      needs: ``"losses"`` when the rule does not read the Gramian.
      native: Convention of the rule's own weights, see :func:`rescale`.
      scale: What the user asked for.
      reads_losses: The rule reads ``losses``.
      positive_losses: The domain of the rule is losses above zero.
      domain: ``domain(losses[T]) -> bool[T]`` for any other domain. Losses must be
        finite in addition.
      side_inputs: Further keywords of ``update`` that ``weigh`` gets, None when the
        user gave none (``"preference"`` ``[T]``, ``"cross_gramian"`` ``[T, T]``).
      observe: ``observe(state, *, losses, mask) -> state``, see :class:`Balancer`. It
        gets losses and a mask as ``weigh`` does.

    Returns:
      The balancer.
    """
    num_tasks = check_num_tasks(name, num_tasks)
    check_choice(name, "scale", scale, Scale)
    shapes = functools.cache(lambda: jax.eval_shape(init))

    def full_weigh(state, *, losses=None, gramian=None, mask=None, **extra):
        check_state(name, state, shapes())
        side = {key: extra.get(key) for key in side_inputs}
        present = as_mask(name, num_tasks, mask)
        healthy = jnp.ones((), bool)
        if losses is not None or reads_losses:
            losses, healthy = judge_losses(
                name, num_tasks, losses, present, balancer.domain
            )
        if needs == "gramian":
            if gramian is None or gramian.shape != (num_tasks, num_tasks):
                raise ValueError(
                    f"{name} reads the Gramian of the task gradients, of shape "
                    f"({num_tasks}, {num_tasks}), not "
                    f"{None if gramian is None else gramian.shape}."
                )
            gramian = jnp.where(present[:, None] & present[None, :], gramian, 0)
            healthy = placement.agreed(healthy & jnp.isfinite(gramian).all(), state)
            # Solvers may loop: give them numbers they can finish on.
            gramian = jnp.where(
                healthy, gramian, jnp.eye(num_tasks, dtype=gramian.dtype)
            )
        weights, new = weigh(
            state, losses=losses, gramian=gramian, mask=present, **side
        )
        wide = jnp.float32 if gramian is None else gramian.dtype
        weights = weights.astype(jnp.promote_types(weights.dtype, wide))
        weights = jnp.where(present, rescale(weights, present, scale, native), 0)
        new = new._replace(task_weights=weights)
        return commit(healthy, weights, choose_state(present.any(), new, state), state)

    def full_observe(state, *, losses, mask=None):
        assert observe is not None
        check_state(name, state, shapes())
        present = as_mask(name, num_tasks, mask)
        losses, healthy = judge_losses(
            name, num_tasks, losses, present, balancer.domain
        )
        new = observe(state, losses=losses, mask=present)
        new = choose_state(present.any(), new, state)
        return commit(healthy, (), new, state)[1]

    def init_fn(params):
        del params
        return init()

    balancer = weighted(
        name,
        num_tasks,
        init=init_fn,
        weigh=full_weigh,
        needs=needs,
        reads_losses=reads_losses,
        positive_losses=positive_losses,
        domain=domain,
        observe=None if observe is None else full_observe,
    )
    return balancer


def weighted(
    name: str, num_tasks: int, *, init: Any, weigh: WeighFn, **attributes: Any
) -> Balancer:
    """A balancer whose update weights the gradients by what ``weigh`` returns.

    Args:
      name: As for :class:`Balancer`, like the other attributes.
      num_tasks: T.
      init: ``init(params) -> state``.
      weigh: As for :class:`Balancer`; it applies the state policy to the weights, and
        the update applies it again to the combined gradient.
      **attributes: Further attributes of the balancer.

    Returns:
      The balancer.
    """

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        weights, updates, new = weigh_stacked(
            balancer,
            updates,
            state,
            params=params,
            losses=losses,
            mask=mask,
            **extra_args,
        )
        return commit(True, stack.combine(updates, weights), new, state)

    balancer = Balancer(
        init, update, name=name, num_tasks=num_tasks, weigh=weigh, **attributes
    )
    return balancer


def weigh_stacked(
    balancer: Balancer,
    grads: Grads,
    state: Any,
    *,
    params: Any = None,
    losses: Any = None,
    mask: Any = None,
    **side: Any,
) -> tuple[Weights, Any, Any]:
    """Weights from stacked gradients; also returns these with absent rows zeroed."""
    name, num_tasks = balancer.name, balancer.num_tasks
    if balancer.weigh is None:
        raise ValueError(f"{name} combines gradients without task weights.")
    stack.check(grads, num_tasks, name, params)
    if mask is not None:
        grads = stack.select(grads, as_mask(name, num_tasks, mask))
    gramian = stack.gramian(grads) if balancer.needs == "gramian" else None
    weights, state = balancer.weigh(
        state, losses=losses, gramian=gramian, mask=mask, **side
    )
    return weights, grads, state


def from_grads(
    name: str,
    num_tasks: int,
    *,
    init: Callable[[Any], Any],
    combine: Callable[..., tuple[Any, Any]],
    reads_losses: bool = False,
    positive_losses: bool = False,
    domain: Domain | None = None,
) -> Balancer:
    """A :class:`Balancer` from a rule that reads the gradients themselves.

    Args:
      name: Name of the factory.
      num_tasks: T.
      init: ``init(params) -> state``, a NamedTuple.
      combine: ``combine(state, grads, *, losses, mask) -> (update, state)``. ``grads``
        are stacked, rows of absent tasks zero; ``losses`` of absent tasks are one. The
        state it returns for absent tasks must be the one it got.
      reads_losses: The rule reads ``losses``.
      positive_losses: The domain of the rule is losses above zero.
      domain: ``domain(losses[T]) -> bool[T]`` for any other domain.

    Returns:
      The balancer, with the same policies as those of :func:`from_weights`.
    """
    num_tasks = check_num_tasks(name, num_tasks)

    def update(updates, state, params=None, *, losses=None, mask=None, **extra_args):
        del extra_args
        stack.check(updates, num_tasks, name, params)
        params = jax.tree.map(
            lambda g: jax.ShapeDtypeStruct(jnp.shape(g)[1:], g.dtype), updates
        )
        expected = jax.eval_shape(init, params)
        check_state(name, state, expected, only_type=True)
        present = as_mask(name, num_tasks, mask)
        if mask is not None:
            updates = stack.select(updates, present)
        healthy = placement.agreed(stack.all_finite(updates), state)
        if losses is not None or reads_losses:
            losses, usable = judge_losses(
                name, num_tasks, losses, present, balancer.domain
            )
            healthy &= usable
        combined, new = combine(state, updates, losses=losses, mask=present)
        combined = jax.tree.map(
            lambda c, g: jnp.where(present.any(), c, 0).astype(g.dtype),
            combined,
            updates,
        )
        return commit(healthy, combined, choose_state(present.any(), new, state), state)

    balancer = Balancer(
        init,
        update,
        name=name,
        num_tasks=num_tasks,
        needs="grads",
        reads_losses=reads_losses,
        positive_losses=positive_losses,
        domain=domain,
    )
    return balancer


def observe(
    balancer: Balancer, state: Any, *, losses: Losses, mask: Mask | None = None
) -> Any:
    """Passes the losses of the same batch *after* the optimizer's step to a balancer.

    Only methods like FAMO read them. Every other balancer returns the state unchanged,
    so a training script may call this for any balancer. Cost for the caller: one
    forward pass, to be made only when ``balancer.observe`` is not None. A loss of a
    present task that is not finite, or outside the domain, leaves the state unchanged.

    Args:
      balancer: The balancer whose state is meant.
      state: Its state, or any optimiser state that holds it (of an
        ``optax.chain`` or ``optax.partition``).
      losses: Losses ``[T]`` of the batch just used, at the new parameters.
      mask: Tasks present ``[T]``, as given to the update.

    Returns:
      The state, of the same structure.

    Examples:
      >>> import jax.numpy as jnp, mtljax, optax
      >>> balancer = mtljax.famo(2)
      >>> opt = optax.chain(balancer, optax.adam(1e-3))
      >>> state = opt.init({"w": jnp.zeros(3)})
      >>> grads = {"w": jnp.ones((2, 3))}
      >>> _, state = opt.update(grads, state, losses=jnp.array([1.0, 2.0]))
      >>> state = mtljax.observe(balancer, state, losses=jnp.array([0.9, 1.0]))
      >>> state[0].logits.tolist()
      [0.025, -0.025]
    """
    look = balancer.observe
    if look is None:
        return state
    kind = type(balancer.init({}))

    def is_state(node):
        return isinstance(node, kind)

    def visit(node):
        return look(node, losses=losses, mask=mask) if is_state(node) else node

    if not any(map(is_state, jax.tree.leaves(state, is_leaf=is_state))):
        raise ValueError(
            f"observe: no {kind.__name__} in the given state; pass the state of "
            f"{balancer.name} or of the optax.chain that holds it."
        )
    return jax.tree.map(visit, state, is_leaf=is_state)
