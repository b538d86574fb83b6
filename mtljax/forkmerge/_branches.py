"""Forks a train state and trains the branches."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

from mtljax import stack
from mtljax.balancer import check_choice
from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._checks import Numbers
from mtljax.forkmerge._realise import Realisation, draw_task

Strategy: TypeAlias = Literal["auto", "vmap", "map", "shard"]
# step(state, weights or task, batch[, data]) -> (state, metrics)
BranchStep: TypeAlias = Callable[..., tuple[Any, Any]]

AXIS = "branch"


def branch_mesh(num_branches: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh with one device per branch and an axis named ``"branch"``.

    Args:
      num_branches: B.
      devices: Devices, of which the first B are used. By default all devices of jax.

    Returns:
      The mesh.

    Raises:
      ValueError: If there are fewer devices than branches.

    Examples:
      >>> from mtljax.forkmerge import branch_mesh
      >>> branch_mesh(1).shape["branch"]
      1
    """
    checks.positive("branch_mesh", "num_branches", num_branches)
    found = list(jax.devices() if devices is None else devices)
    if num_branches > len(found):
        raise ValueError(
            f"branch_mesh: {num_branches} branches need as many devices, but there "
            f"are {len(found)}; train them with strategy='vmap' or 'map', or pass a "
            "mesh whose 'branch' axis divides their number."
        )
    return Mesh(found[:num_branches], (AXIS,))


def fork(state: Any, num_branches: int, *, mesh: Mesh | None = None) -> Any:
    """Copies a train state B times, along a new first axis of every leaf.

    All copies are equal, including random keys. Branches therefore use the same random
    numbers and differ only by their task weights.

    Args:
      state: Any pytree of all values that training changes: parameters, running
        statistics, optimizer state, counters, keys.
      num_branches: B.
      mesh: Distributes the branches over its ``"branch"`` axis.

    Returns:
      The branches, with leaves ``[B, ...]``. They need B times the memory of the state.

    Raises:
      ValueError: If ``num_branches`` is not positive, if the state has no leaf, or if
        the mesh axis does not divide the number of branches.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> forkmerge.fork({"w": jnp.arange(2.0)}, 3)["w"].tolist()
      [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    """
    checks.positive("fork", "num_branches", num_branches)
    if not jax.tree.leaves(state):
        raise ValueError("fork: the train state is an empty tree.")

    def copies(leaf):
        leaf = jnp.asarray(leaf)
        return jnp.broadcast_to(leaf[None], (num_branches, *leaf.shape))

    branches = jax.tree.map(copies, state)
    return branches if mesh is None else place(branches, num_branches, mesh)


def place(branches: Any, num_branches: int, mesh: Mesh) -> Any:
    """Distributes branches over the mesh, so that each device stores whole branches."""
    check_mesh("fork", num_branches, mesh)
    return jax.device_put(branches, NamedSharding(mesh, PartitionSpec(AXIS)))


def check_mesh(name: str, num_branches: int, mesh: Mesh) -> None:
    """Raises an error unless the mesh has a branch axis that divides B."""
    if AXIS not in mesh.shape:
        raise ValueError(
            f"{name}: the mesh has axes {tuple(mesh.shape)}; it needs one named "
            f"{AXIS!r}. Use mtljax.forkmerge.branch_mesh."
        )
    if num_branches % mesh.shape[AXIS]:
        raise ValueError(
            f"{name}: {num_branches} branches cannot be divided evenly over the "
            f"{mesh.shape[AXIS]} devices of the mesh's {AXIS!r} axis."
        )


def take_branches(branches: Any, indices: Sequence[int] | Array) -> Any:
    """Selects some of the branches, in the order of ``indices``.

    Args:
      branches: Pytree of arrays ``[B, ...]``.
      indices: Indices of the branches, a sequence or an array that may be traced.

    Returns:
      A tree with leaves ``[len(indices), ...]``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.forkmerge import take_branches
      >>> take_branches({"w": jnp.arange(4.0)}, (0, 2))["w"].tolist()
      [0.0, 2.0]
    """
    rows = jnp.array(indices, jnp.int32)
    return jax.tree.map(lambda x: x[rows], branches)


def _check_batches(batches: Any, num_branches: int, per_branch: bool) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    if not leaves:
        raise ValueError("train_branches: the batches hold no array.")
    want = 2 if per_branch else 1
    steps = None
    for path, leaf in leaves:
        shape, where = jnp.shape(leaf), stack.path_name(path)
        if len(shape) < want or (per_branch and shape[1] != num_branches):
            raise ValueError(
                f"train_branches: batch array {where!r} has shape {shape}; it must "
                + (
                    f"be (steps, {num_branches}, ...) with per_branch=True."
                    if per_branch
                    else "be (steps, ...)."
                )
            )
        steps = shape[0] if steps is None else steps
        if shape[0] != steps or steps == 0:
            raise ValueError(
                f"train_branches: batch array {where!r} has {shape[0]} steps, the "
                f"first one {steps}; all must have the same positive number."
            )


def train_branches(
    step: BranchStep,
    branches: Any,
    branch_weights: Numbers,
    batches: Any,
    *,
    data: Any = None,
    per_branch: bool = False,
    realisation: Realisation = "sum",
    key: Any = None,
    start_step: ArrayLike = 0,
    strategy: Strategy = "auto",
    mesh: Mesh | None = None,
) -> tuple[Any, Any]:
    """Trains each branch with its own task weights. The branches do not communicate.

    All strategies give the same numbers, up to the rounding of batched products.

    Args:
      step: One optimizer step of *one* model, ``step(state, weights, batch) ->
        (state, metrics)``. The argument ``weights`` of shape ``[T]`` is the row of ν of
        the branch, for its objective ``Σ_k ν_k L_k`` (:func:`weighted_sum`). With
        ``realisation="sample"`` the signature is ``step(state, task, batch)`` with the
        index of the task that is sampled for this step. If ``data`` is given, it is
        the last argument.
      branches: The branches, with leaves ``[B, ...]`` (:func:`fork`).
      branch_weights: ν of shape ``[B, T]``.
      batches: Pytree of arrays ``[n, ...]``, one batch for each of n steps, which all
        branches use. The arrays may be indices of examples in ``data``.
      data: Passed to every step unchanged, for example the training set on the device.
      per_branch: Whether the batches differ between branches, ``[n, B, ...]``.
      realisation: ``"sum"`` trains all tasks of the branch in each step. ``"sample"``
        trains one task, sampled in proportion to its weight. The expected gradient of
        a branch is then ``Σ ν_k g_k / Σ ν_k``, which has a different scale.
      key: Random key for ``"sample"``. Use the same key for the whole run.
      start_step: Number of steps before these, for ``"sample"``.
      strategy: ``"vmap"`` trains all branches as one batched program. ``"map"`` trains
        one branch after another, with the activations of one. ``"shard"`` trains them
        on the devices of a mesh without communication. ``"auto"`` is ``"shard"`` if a
        mesh is given, else ``"map"`` on a CPU, where XLA runs batched products slowly,
        else ``"vmap"``.
      mesh: Mesh for ``"shard"``. The size of its axis ``"branch"`` must divide B. The
        default has one device per branch.

    Returns:
      The branches, and the metrics with leaves ``[B, n, ...]``. The cost is B n
      training steps with one gradient each.

    Raises:
      ValueError: If shapes are inconsistent, if ``key`` is missing, or if there are
        more branches than devices.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> def step(w, weights, batch):  # two tasks: one with the optimum 1, one linear
      ...     losses = lambda w: jnp.stack([(w - 1.0) ** 2, -batch * w])
      ...     grad = jax.grad(lambda w: forkmerge.weighted_sum(losses(w), weights))(w)
      ...     return w - 0.1 * grad, {"losses": losses(w)}
      >>> nu = forkmerge.target_vs_all(2)
      >>> branches = forkmerge.fork(jnp.float32(0.0), 2)
      >>> branches, metrics = forkmerge.train_branches(step, branches, nu, jnp.ones(1))
      >>> branches.tolist(), metrics["losses"].shape
      ([0.2, 0.3], (2, 1, 2))

    References:
      Jiang et al., `ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning
      <https://arxiv.org/abs/2301.12618>`_, 2023, Algorithm 2, lines 4 to 10.
    """
    name = "train_branches"
    check_choice(name, "realisation", realisation, Realisation)
    check_choice(name, "strategy", strategy, Strategy)
    num_branches = checks.count_branches(name, branches)
    weights = checks.branch_weights(name, branch_weights, num_branches)
    _check_batches(batches, num_branches, per_branch)
    if realisation == "sample" and key is None:
        raise ValueError(
            f"{name}: realisation='sample' samples tasks at random and needs key=."
        )
    if strategy == "auto":
        batched: Strategy = "map" if jax.default_backend() == "cpu" else "vmap"
        strategy = batched if mesh is None else "shard"

    def run(state, weights, branch, batches, common):
        data, key, start = common

        def body(carry, batch):
            state, count = carry
            what = weights
            if realisation == "sample":
                what = draw_task(key, count, branch, weights)
            more = () if data is None else (data,)
            out = step(state, what, batch, *more)
            if not (isinstance(out, tuple) and len(out) == 2):
                raise ValueError(
                    f"{name}: the step must return (state, metrics), not a "
                    f"{type(out).__name__}."
                )
            return (out[0], count + 1), out[1]

        (state, _), metrics = lax.scan(body, (state, start), batches)
        return state, metrics

    index = jnp.arange(num_branches, dtype=jnp.int32)
    start = jnp.asarray(start_step, jnp.int32)
    common = (data, key if realisation == "sample" else None, start)
    if strategy == "map":
        if per_branch:
            batches = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batches)

        def one(args):
            state, row, branch, own = args
            return run(state, row, branch, own if per_branch else batches, common)

        return lax.map(one, (branches, weights, index, batches if per_branch else None))
    axes = (0, 0, 0, 1 if per_branch else None, None)
    many = jax.vmap(run, in_axes=axes)
    if strategy == "shard":
        mesh = branch_mesh(num_branches) if mesh is None else mesh
        check_mesh(name, num_branches, mesh)
        own, same = PartitionSpec(AXIS), PartitionSpec()
        many = jax.shard_map(
            many,
            mesh=mesh,
            in_specs=(
                own,
                own,
                own,
                PartitionSpec(None, AXIS) if per_branch else same,
                same,
            ),
            out_specs=own,
            check_vma=False,  # a step may carry arrays that it creates
        )
    return many(branches, weights, index, batches, common)
