"""Pure training loops for any step, compiled into one program.

A *step* is a function ``step(state, batch) -> (state, metrics)``. ``state`` is any
pytree of all values that change (parameters, optimizer, balancer, keys). ``metrics`` is
a dict of arrays of fixed shapes. The loops are independent of losses, tasks and models.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core.primitives import conv_general_dilated_p
from jaxtyping import Array, Int, Key, PyTree

from mtljax.training._digest import tree_spec
from mtljax.training._hosts import Placement, place

Metrics: TypeAlias = Any  # a dict of arrays (or a tree of them)
Step: TypeAlias = Callable[[Any, Any], tuple[Any, Metrics]]


def num_examples(data: PyTree, batch_size: int) -> int:
    """Returns the length of the common leading axis of all arrays of ``data``.

    Args:
      data: Pytree of arrays ``[N, ...]``.
      batch_size: Number of examples per step, at most N.

    Returns:
      The number of examples N.

    Raises:
      ValueError: If the lengths differ, or N is smaller than a batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.training.loop import num_examples
      >>> num_examples({"x": jnp.zeros((10, 3)), "y": jnp.zeros(10)}, 4)
      10
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError("The training data contain no arrays.")
    first = jax.tree_util.keystr(leaves[0][0]) or "data"
    size = leaves[0][1].shape[0] if jnp.ndim(leaves[0][1]) else 0
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path) or "data"
        if jnp.ndim(leaf) == 0:
            raise ValueError(f"Training array {name} is a scalar. It needs an axis.")
        if leaf.shape[0] != size:
            raise ValueError(
                f"Training array {name} has {leaf.shape[0]} examples, but {first} "
                f"has {size}."
            )
    if not 1 <= batch_size <= size:
        raise ValueError(
            f"batch_size={batch_size} must lie between 1 and the {size} examples."
        )
    return size


def epoch_order(
    order_key: Array, epoch: int | Array, size: int, batch_size: int
) -> Int[Array, "steps batch"]:
    """Returns the order of the examples in an epoch, a function of key and epoch.

    Args:
      order_key: Key that is constant for the whole run.
      epoch: 0-based number of the epoch.
      size: Number of examples N.
      batch_size: Number of examples per step, B.

    Returns:
      Indices ``[N // B, B]``. The omitted ``N % B`` examples differ between epochs.

    Examples:
      >>> import jax
      >>> from mtljax.training import epoch_order
      >>> epoch_order(jax.random.key(0), 0, 10, 4).shape
      (2, 4)
    """
    order = jax.random.permutation(jax.random.fold_in(order_key, epoch), size)
    steps = size // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def _take(data: PyTree, rows: Array, placement: Placement | None = None) -> PyTree:
    options: Any = {"mode": "promise_in_bounds", "unique_indices": True}
    if placement is not None and placement.explicit:
        options["out_sharding"] = placement.batch
    batch = jax.tree.map(lambda a: a.at[rows].get(**options), data)
    if placement is None or placement.explicit:
        return batch
    return lax.with_sharding_constraint(batch, placement.batch)


def _replicated(arrays: PyTree, placement: Placement | None) -> PyTree:
    """Replicates arrays on a mesh with Explicit axes. Other arrays are unchanged."""
    if placement is None or not placement.explicit:
        return arrays
    return jax.tree.map(lambda a: jax.sharding.reshard(a, placement.replicated), arrays)


def check_step(step: Step, state: PyTree, batch: PyTree) -> PyTree:
    """Traces one step and checks that it preserves the form of the state.

    Args:
      step: The step function.
      state: A state, or its shapes.
      batch: A batch, or its shapes.

    Returns:
      The shapes of the metrics.

    Raises:
      ValueError: If the step returns a state of another structure, shape or dtype. The
        message names the leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.training.loop import check_step
      >>> check_step(lambda s, b: (s + b.sum(), {"s": s}), jnp.float32(0), jnp.ones(2))
      {'s': ShapeDtypeStruct(shape=(), dtype=float32)}
      >>> check_step(lambda s, b: ({"w": s["w"] > 0}, {}), {"w": jnp.ones(2)}, None)
      Traceback (most recent call last):
      ...
      ValueError: The step returns state leaf ['w'] as bool[2]; it was float32[2].
    """
    new, metrics = jax.eval_shape(step, state, batch)
    old = jax.eval_shape(lambda s: s, state)
    before, after = tree_spec(old), tree_spec(new)
    for path in [*before, *after]:
        if before.get(path) != after.get(path):
            raise ValueError(
                f"The step returns state leaf {path or '(root)'} as "
                f"{after.get(path, 'nothing')}; it was {before.get(path, 'absent')}."
            )
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "The step returns a state of another structure: "
            f"{jax.tree.structure(new)} instead of {jax.tree.structure(old)}."
        )
    return metrics


class Order(NamedTuple):
    """A key, and the order of the examples in one epoch, for later calls."""

    key: Any  # a key, or keys [S]
    epoch: Any  # scalar; -1 in the beginning
    rows: Any  # indices [N // B, B], or [S, N // B, B]


@functools.lru_cache(maxsize=16)  # a second fit of the same step is not recompiled
def make_chunk(
    step: Step,
    *,
    batch_size: int,
    chunk: int,
    seeds: bool = False,
    placement: Placement | None = None,
    keep_order: bool = False,
) -> Any:
    """Compiles up to ``chunk`` steps over data that are stored on the device.

    The number of steps is a traced value. The same program therefore runs 20 steps, or
    7 steps and then 13, with the same bits. A loop of static length would be compiled
    again and might round differently. The order of the data depends only on
    ``(order_key, epoch)``, see :func:`epoch_order`. A resumed run therefore needs only
    the step number. A chunk may cross epochs.

    Args:
      step: Step function ``step(state, batch) -> (state, metrics)``.
      batch_size: Number of examples per step, B.
      chunk: Number of rows of the metrics buffer, the maximum number of steps per call.
      seeds: Whether the state and ``order_key`` have a leading axis ``[S]`` of
        independent runs (seeds, hyper-parameters). The data have no such axis.
      placement: Placement of state and batches on a mesh, set by :func:`fit`.
      keep_order: Whether the function takes an ``Order`` from the last call
        instead of ``order_key``, and returns it as a third value. A call that begins
        within an epoch then does not sort the examples again.

    Returns:
      A jitted function ``(state, data, order_key, start_step, n) -> (state, metrics)``
      that donates the state. ``data`` is a pytree of arrays ``[N, ...]``. The function
      runs the steps ``start_step, ..., start_step + n - 1``. Each metric has shape
      ``[chunk, ...]`` (``[chunk, S, ...]`` with seeds). Its first ``n`` rows are
      filled.

    Raises:
      ValueError: If ``chunk`` is less than 1, or, when the function is called, if the
        data cannot form a batch.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.training import make_chunk
      >>> def step(w, x):
      ...     return w - 0.1 * (w - x.mean()), {"losses": (w - x.mean())[None]}
      >>> run = make_chunk(step, batch_size=2, chunk=8)
      >>> data, key = jnp.arange(6.0), jax.random.key(0)
      >>> w, metrics = run(jnp.float32(0), data, key, 0, 5)
      >>> metrics["losses"].shape
      (8, 1)
      >>> v, _ = run(jnp.float32(0), data, key, 0, 2)
      >>> v, _ = run(v, data, key, 2, 3)
      >>> bool(v == w)
      True
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1.")

    def run(state, data, order_key, start_step, n):
        size = num_examples(data, batch_size)
        per_epoch = size // batch_size
        first_rows = jnp.zeros(batch_size, jnp.int32)
        shapes = jax.eval_shape(
            lambda s: step(s, _take(data, first_rows, placement))[1], state
        )
        buffers = jax.tree.map(lambda m: jnp.zeros((chunk, *m.shape), m.dtype), shapes)
        buffers = _replicated(buffers, placement)
        n = jnp.minimum(n, chunk)

        def rows_of(epoch, known):
            if not keep_order:
                order = epoch_order(order_key, epoch, size, batch_size)
                return _replicated(order, placement)
            sort = lambda: epoch_order(known.key, epoch, size, batch_size)
            return lax.cond(epoch == known.epoch, lambda: known.rows, sort)

        def within_epoch(carry):
            i, state, metrics, known = carry
            offset = (start_step + i) % per_epoch
            epoch = (start_step + i) // per_epoch
            order = rows_of(epoch, known)

            def body(j, carry):
                state, metrics = carry
                rows = order[(start_step + j) % per_epoch]
                state, new = step(state, _take(data, rows, placement))
                new = _replicated(new, placement)
                return state, jax.tree.map(lambda m, x: m.at[j].set(x), metrics, new)

            stop = jnp.minimum(n, i + per_epoch - offset)
            if keep_order:
                known = Order(known.key, epoch, order)
            return stop, *lax.fori_loop(i, stop, body, (state, metrics)), known

        first = jnp.zeros_like(n)
        known = order_key if keep_order else None
        carry = lax.while_loop(
            lambda c: c[0] < n, within_epoch, (first, state, buffers, known)
        )
        return carry[1:] if keep_order else carry[1:3]

    if seeds:
        order = Order(0, None, 0) if keep_order else 0
        outputs = (0, 1, order) if keep_order else (0, 1)
        run = jax.vmap(run, in_axes=(0, None, order, None, None), out_axes=outputs)
    return jax.jit(run, donate_argnums=0) if keep_order else _jit(run, placement)


def _jit(run: Callable, placement: Placement | None) -> Callable:
    """Compiles ``run(state, ...) -> (state, metrics)`` and donates the state."""

    def placed(*args):
        state, metrics = run(*args)
        return state, _replicated(metrics, placement)

    outputs = None if placement is None else placement.outputs
    return jax.jit(placed, donate_argnums=0, out_shardings=outputs)


@functools.lru_cache(maxsize=16)
def make_host_chunk(
    step: Step,
    *,
    batch_size: int,
    seeds: bool = False,
    placement: Placement | None = None,
) -> Callable[..., tuple[Any, Metrics, Order]]:
    """Builds the function of :func:`make_chunk` as a host loop over a compiled step.

    On CPU, XLA runs a convolution inside a loop many times slower than outside, unless
    its axes are in the order images, pixels, channels. The convolutions of ``jax.grad``
    are not in this order. The host loop is then faster: a LeNet step on 2 cores takes
    190 ms instead of 1860 ms. The loop costs about 0.1 ms per step. Results are
    bit-identical for any split into calls.

    Args:
      step: Step function ``step(state, batch) -> (state, metrics)``.
      batch_size: Number of examples per step.
      seeds: Whether the state and ``order_key`` have a leading axis ``[S]``.
      placement: Placement of state and batches on a mesh, set by :func:`fit`.

    Returns:
      A function ``(state, data, order, start_step, n) -> (state, metrics, order)`` with
      host integers ``start_step`` and ``n``. Each metric has shape ``[n, ...]`` (``[n,
      S, ...]`` with seeds). ``order`` is a key, or the order of the last call.
    """

    def one(state, data, order, at):
        return step(state, _take(data, order[at], placement))

    def order_of(order_key, epoch, size):
        return epoch_order(order_key, epoch, size, batch_size)

    if seeds:
        one = jax.vmap(one, in_axes=(0, None, 0, None))
        order_of = jax.vmap(order_of, in_axes=(0, None, None))
    run = _jit(one, placement)
    order_of = jax.jit(order_of, static_argnums=2)
    mesh = None if placement is None else placement.mesh

    def chunk(state, data, order, start_step, n):
        size = num_examples(data, batch_size)
        per_epoch = size // batch_size
        order = order if isinstance(order, Order) else Order(order, -1, None)
        rows = []
        for at in range(int(start_step), int(start_step) + int(n)):
            if order.epoch != at // per_epoch:
                epoch = place(mesh, np.int32(at // per_epoch))
                found = order_of(order.key, epoch, size)
                order = Order(order.key, at // per_epoch, found)
            at_row = place(mesh, np.int32(at % per_epoch))
            state, metrics = run(state, data, order.rows, at_row)
            rows.append(metrics)
        stacked = jax.tree.map(lambda *m: np.stack(m), *jax.device_get(rows))
        return state, stacked, order

    return chunk


# Axis orders for which XLA:CPU has fast code, by the number of axes.
_USUAL_AXES = {
    n: jax.lax.conv_dimension_numbers((1,) * n, (1,) * n, axes)
    for n, axes in (
        (3, ("NWC", "WIO", "NWC")),
        (4, ("NHWC", "HWIO", "NHWC")),
        (5, ("NDHWC", "DHWIO", "NDHWC")),
    )
}


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a program, including those of loops and branches."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def prefers_host_loop(step: Step, state: PyTree, batch: PyTree) -> bool:
    """Returns whether the convolutions of a step favour a host loop on this backend.

    They do on CPU if the axes of a convolution are not in the order images, pixels,
    channels, as in the backward passes of ``jax.grad``. This function is called only
    for ``loop_on="auto"``.

    Args:
      step: The step function.
      state: A state, or its shapes.
      batch: A batch, or its shapes.

    Returns:
      Whether to loop on the host. The result depends on the step and the backend only.
      No timing is measured.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.training.loop import prefers_host_loop
      >>> prefers_host_loop(lambda s, b: (s + b.sum(), {}), jnp.float32(0), jnp.ones(2))
      False
    """
    if jax.default_backend() != "cpu":
        return False
    return any(
        equation.primitive is conv_general_dilated_p
        and equation.params["dimension_numbers"]
        != _USUAL_AXES.get(equation.invars[0].aval.ndim)
        for equation in _equations(jax.make_jaxpr(step)(state, batch).jaxpr)
    )


def make_runner(
    step: Step,
    state: PyTree,
    batch: PyTree,
    *,
    batch_size: int,
    chunk: int = 1000,
    seeds: bool = False,
    loop_on: Literal["device", "host", "auto"] = "device",
    placement: Placement | None = None,
) -> Callable[..., tuple[Any, Metrics]]:
    """Builds :func:`make_chunk` or ``make_host_chunk`` with one signature.

    Args:
      step: Step function ``step(state, batch) -> (state, metrics)``.
      state: State of one run, or its shapes.
      batch: A batch, or its shapes.
      batch_size: Number of examples per step.
      chunk: Maximum number of steps per call.
      seeds: Whether the states to run have a leading axis ``[S]``.
      loop_on: Place of the loop over the steps, ``"device"``, ``"host"`` or ``"auto"``,
        which calls :func:`prefers_host_loop`.
      placement: Placement of state and batches on a mesh, set by :func:`fit`.

    Returns:
      A function ``(state, data, order_key, start_step, n) -> (state, metrics)`` with
      host integers, which donates the state. Only the first ``n`` rows of the metrics
      are valid.

    Raises:
      ValueError: If ``chunk`` is less than 1, or, when the function is called, if the
        data cannot form a batch.
    """
    if loop_on == "auto":
        loop_on = "host" if prefers_host_loop(step, state, batch) else "device"
    options: Any = {"batch_size": batch_size, "seeds": seeds, "placement": placement}
    mesh = None if placement is None else placement.mesh
    if loop_on == "host":
        return _remembering(make_host_chunk(step, **options), lambda key, _: key)
    kept = mesh is None  # on a mesh the order would need a sharding
    run = make_chunk(step, chunk=chunk, keep_order=kept, **options)

    def run_chunk(state, data, order, start_step, n):
        bounds = place(mesh, (np.int32(start_step), np.int32(n)))
        return run(state, data, order, *bounds)

    def no_order(key, data):  # of no epoch, for the first call
        steps = num_examples(data, batch_size) // batch_size
        rows = np.zeros((*key.shape, steps, batch_size), np.int32)
        return Order(key, *place(None, (np.int32(-1), rows)))

    return _remembering(run_chunk, no_order) if kept else run_chunk


def _remembering(
    run: Callable[..., Any], start: Callable[..., Any]
) -> Callable[..., tuple[Any, Metrics]]:
    """Passes the order of one call to the next call with the same key."""
    last: Any = (None, None)

    def run_chunk(state, data, order_key, start_step, n):
        nonlocal last
        key, order = last
        if key is not order_key:
            order = start(order_key, data)
        state, metrics, order = run(state, data, order, start_step, n)
        last = order_key, order
        return state, metrics

    return run_chunk


@functools.lru_cache(maxsize=16)
def make_stream_step(
    step: Step,
    *,
    seeds: bool = False,
    placement: Placement | None = None,
) -> Callable[[Any, Any], tuple[Any, Metrics]]:
    """Compiles one step for batches that come from the host.

    Args:
      step: Step function ``step(state, batch) -> (state, metrics)``.
      seeds: Whether the state has a leading axis ``[S]``. All runs use the same batch.
      placement: Placement of the state on a mesh, set by :func:`fit`.

    Returns:
      The jitted step function.
    """
    run = jax.vmap(step, in_axes=(0, None)) if seeds else step
    return _jit(run, placement)


def split_run_key(
    key: Key[Array, "..."],
) -> tuple[Key[Array, "..."], Key[Array, "..."]]:
    """Splits the key of a run into a key for ``init`` and a key for the data order.

    Args:
      key: A key, or keys ``[S]``.

    Returns:
      The keys ``init_key`` and ``order_key``, each with the shape of ``key``.

    Examples:
      >>> import jax
      >>> from mtljax.training import split_run_key
      >>> init_keys, order_keys = split_run_key(jax.random.split(jax.random.key(0), 8))
      >>> order_keys.shape
      (8,)
    """
    halves = jax.random.split(key) if key.ndim == 0 else jax.vmap(jax.random.split)(key)
    return halves[..., 0], halves[..., 1]


def make_train(
    init: Callable[[Array], Any],
    step: Step,
    *,
    num_steps: int,
    batch_size: int,
) -> Callable[[Key, PyTree], tuple[Any, Metrics]]:
    """Builds a whole training as one pure function for ``jit`` and ``vmap``.

    The results equal those of :func:`mtljax.training.fit` with the same
    ``split_run_key(key)`` up to float tolerance, because the programs differ.

    Args:
      init: Function ``init(key) -> state``.
      step: Step function ``step(state, batch) -> (state, metrics)``.
      num_steps: Number of steps of the whole training.
      batch_size: Number of examples per step.

    Returns:
      A function ``train(key, data) -> (state, metrics)`` with metrics ``[num_steps,
      ...]``.

    Raises:
      ValueError: If the data cannot form a batch, when the function is called.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.training import make_train
      >>> def step(w, x):
      ...     return w - 0.1 * (w - x.mean()), {"losses": (w - x.mean())[None]}
      >>> init = lambda key: jnp.float32(0)
      >>> train = make_train(init, step, num_steps=5, batch_size=2)
      >>> keys = jax.random.split(jax.random.key(0), 8)
      >>> w, metrics = jax.jit(jax.vmap(train, (0, None)))(keys, jnp.arange(6.0))
      >>> metrics["losses"].shape
      (8, 5, 1)
    """

    def train(key, data):
        size = num_examples(data, batch_size)
        epochs, rest = divmod(num_steps, size // batch_size)
        init_key, order_key = split_run_key(key)

        def one(state, rows):
            return step(state, _take(data, rows))

        def epoch(state, number):
            order = epoch_order(order_key, number, size, batch_size)
            return lax.scan(one, state, order)

        state, metrics = lax.scan(epoch, init(init_key), jnp.arange(epochs))
        metrics = jax.tree.map(lambda m: m.reshape(-1, *m.shape[2:]), metrics)
        if rest:
            order = epoch_order(order_key, epochs, size, batch_size)[:rest]
            state, last = lax.scan(one, state, order)
            metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, last)
        return state, metrics

    return train
