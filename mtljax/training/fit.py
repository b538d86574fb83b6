"""Runs training steps with evaluation, rows, checkpoints and signals."""

import contextlib
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PyTree

from mtljax.training import _hosts, loop, records
from mtljax.training import checkpoint as checkpoints
from mtljax.training._feeds import Resident, Streamed, placement_of
from mtljax.training._options import Checkpointing, Evaluation, Execution, Logging
from mtljax.training._run import FitResult, Run, Subject, label_of
from mtljax.training._signals import Patient
from mtljax.training.errors import RunExistsError
from mtljax.training.progress import Progress
from mtljax.training.run_dir import holds_run, lock_run, remove_run, set_rows_aside
from mtljax.training.writers import TensorBoardWriter


def own_state(state: PyTree) -> PyTree:
    """Copies a state into separate buffers without weak types, all on one mesh.

    The arrays of the caller therefore survive donation, and no buffer occurs twice. The
    first call compiles the same program as later calls.

    Examples:
      >>> import jax.numpy as jnp
      >>> from mtljax.training.fit import own_state
      >>> w = jnp.ones(3)
      >>> twice = own_state({"a": w, "b": w, "lr": 0.5})
      >>> twice["a"] is twice["b"], twice["lr"]
      (False, Array(0.5, dtype=float32))
    """

    def own(leaf):
        leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.copy(leaf)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jnp.array(leaf, dtype=dtype, copy=True)

    owned = jax.tree.map(own, state)
    mesh = _hosts.mesh_of(owned)
    return owned if mesh is None else _hosts.place(mesh, owned)


def fit(
    state: PyTree,
    step: loop.Step,
    data: Any,
    *,
    num_steps: int,
    batch_size: int | None = None,
    order_key: Key[Array, "..."] | None = None,
    seeds: int | Sequence[int | Mapping[str, Any]] | None = None,
    task_names: Sequence[str] | None = None,
    evaluation: Evaluation | None = None,
    checkpointing: Checkpointing | None = None,
    logging: Logging = Logging(),  # noqa: B008 frozen
    execution: Execution = Execution(),  # noqa: B008 frozen
) -> FitResult:
    """Runs ``num_steps`` training steps with evaluation, checkpoints and logging.

    The results depend neither on chunks nor on interruptions. A run that was stopped or
    killed and then resumed produces the same bits as an uninterrupted run. Its rows are
    also the same, except for their ``seconds``.

    If a leaf of the state has a ``NamedSharding``, the state is trained on the devices
    of this mesh and keeps its shardings. Leaves and data without a mesh are replicated,
    and so are the metrics. With several processes, all of them call ``fit`` with the
    same arguments and a state on a mesh of all devices. The first process writes, and
    all processes must be able to read ``directory``. A run may be resumed on another
    number of devices. The results are then equal up to float tolerance.

    SIGTERM and SIGINT stop the run at the end of a chunk, with a checkpoint. A second
    SIGINT raises ``KeyboardInterrupt``.

    Args:
      state: Initial state, a pytree of all values that change. With several ``seeds``
        each leaf has a leading axis ``[S]``. The state is copied and not donated.
      step: A pure function ``step(state, batch) -> (state, metrics)`` for *one* run.
        ``metrics`` is a dict of arrays. A non-finite entry of ``"losses"`` ``[T]``, if
        present, stops the run. ``"task_weights"`` ``[T]``, if present, are shown. With
        ``task_names``, a metric may be a dict by task. The rows contain the vector.
      data: A pytree of arrays ``[N, ...]`` that is stored on the device, or an iterator
        of batches. A run with a directory needs an iterator with Grain's methods
        ``get_state`` and ``set_state``.
      num_steps: Number of steps of the whole run, including the part before a resume.
      batch_size: Number of examples per step, for arrays.
      order_key: Key that determines the order of arrays, ``[S]`` keys with several
        seeds.
      seeds: Label of the rows, or S labels. With several labels the runs are vmapped. A
        label is a number or a dict, for example ``{"seed": 0, "lr": 0.1}``.
      task_names: T names, for messages and plots, for example ``balancer.names``. They
        determine the order of metrics that are dicts by task.
      evaluation: Evaluation options.
      checkpointing: Storage options. With None, no files are written.
      logging: Options for rows and progress.
      execution: Options for chunks, loops and the sharding of batches.

    Returns:
      A :class:`FitResult` with the last state, the best evaluation and the rows.

    Raises:
      RunExistsError: If the directory contains a run. No file is changed.
      RunLockedError: If another process uses the directory. No file is changed.
      CheckpointError: If there is no usable checkpoint to resume from, or its rows were
        changed.
      ConfigMismatchError: If the run to resume has another configuration or stream.
      TreeMismatchError: If the run to resume has another state.
      OutputError: If a file cannot be written, for example because the disk is full.
      NonFiniteLossError: If a loss is NaN or infinite. The message names the step, the
        task and the checkpoint.
      NonPositiveLossError: If a loss is not positive and ``positive_losses`` is set.
      ValueError: If arguments or shapes are inconsistent.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.training import fit, Logging
      >>> def step(w, batch):
      ...     loss = jnp.square(w - batch["x"]).mean()
      ...     return w - 0.1 * (w - batch["x"].mean()), {"losses": loss[None]}
      >>> result = fit(jnp.float32(9), step, {"x": jnp.ones(64)}, num_steps=100,
      ...              batch_size=8, order_key=jax.random.key(0),
      ...              logging=Logging(every=25, progress=False))
      >>> round(float(result.state), 3), [row["step"] for row in result.rows]
      (1.0, [25, 50, 75, 100])
    """
    with Patient() as signals, contextlib.ExitStack() as stack:
        signals.number, _ = _hosts.boundary(signals.number, 0)
        if signals.number is not None:  # a signal arrived before: change no file
            signals.reported = True
            return FitResult(state, 0, None, [], signals.name, 0.0, None)
        many = seeds is not None and not isinstance(seeds, int)
        labels = list(seeds) if isinstance(seeds, Sequence) else [seeds]
        state = own_state(state)
        one = _single(state, len(labels) if many else None)
        common: Any = {
            "one": one,
            "seeds": many,
            "placement": placement_of(state, execution),
            "execution": execution,
        }
        if hasattr(data, "__next__"):
            resumable = checkpointing is not None
            engine: Any = Streamed(step, data, resumable=resumable, **common)
        else:
            engine = Resident(step, data, batch=(batch_size, order_key), **common)
        _check_metrics(engine.metrics, task_names)
        config = None if checkpointing is None else checkpointing.config
        identity = {
            "config": records.to_json({} if config is None else config),
            "fit": {
                "batch_size": batch_size,
                "num_examples": engine.size,
                "order_key": None
                if order_key is None
                else records.to_json(_hosts.fetch(jax.random.key_data(order_key))),
                "seeds": [label_of(label) for label in labels],
                "task_names": list(task_names) if task_names else None,
            },
        }
        subject = Subject(
            identity, num_steps, identity["fit"]["seeds"], many, task_names
        )
        screen = Progress(
            num_steps,
            task_names=task_names,
            title=logging.title,
            stream=None if _hosts.is_main() else io.StringIO(),
            enabled=logging.progress,
        )
        run = Run(
            engine,
            subject,
            evaluation=evaluation,
            checkpointing=checkpointing,
            logging=logging,
            execution=execution,
            screen=stack.enter_context(screen),
        )
        writers = list(logging.writers)
        if checkpointing is not None:
            state = _open_run(run, state, checkpointing, stack)
            if logging.tensorboard:
                folder = pathlib.Path(checkpointing.directory) / "tensorboard"
                writers.append(TensorBoardWriter(folder))
        if run.open_writers(writers, stack):
            if run.resumed is None and evaluation is not None and evaluation.at_start:
                run.evaluate(state, final=False)
                run.save(state)
            state = run.train(state, signals)
            if signals.number is not None:
                run.say_interrupted(signals)
        stack.close()  # so that errors in closing are raised before the result
        return run.result(state, signals)


def _open_run(
    run: Run, state: PyTree, options: Checkpointing, stack: contextlib.ExitStack
) -> PyTree:
    """Locks the directory and restores a run, or removes an earlier run."""
    folder = pathlib.Path(options.directory)

    def open_folder() -> bool:
        """Returns whether to resume."""
        if not (options.resume or options.overwrite) and holds_run(folder):
            raise RunExistsError(
                f"{folder} already contains a run. Pass resume=True (--resume) to "
                "continue it or overwrite=True (--overwrite) to replace it."
            )
        stack.enter_context(lock_run(folder))
        if options.resume != "auto":
            return bool(options.resume)
        return bool(checkpoints.saved_steps(folder / "checkpoints"))

    resume = _hosts.on_main(open_folder)
    mode = "min" if run.evaluation is None else run.evaluation.mode
    run.saver = stack.enter_context(
        checkpoints.Checkpointer(
            folder / "checkpoints", keep_last=options.keep_last, mode=mode
        )
    )
    if resume:
        state = run.restore(state, {*records.MAY_DIFFER, *options.may_differ})

    def tidy() -> None:
        if options.resume == "auto" and not resume:
            aside = set_rows_aside(folder)
            if aside is not None:
                run.screen.note(
                    f"No checkpoint to resume from. The rows are in {aside}."
                )
        if not resume:
            remove_run(folder)
        checkpoints.Checkpointer(folder / "checkpoints").clean()

    _hosts.on_main(tidy)
    return state


def _single(state: PyTree, num_seeds: int | None) -> PyTree:
    """Returns the shapes of the state of one run, with shardings on a mesh."""

    def shape(path, leaf):
        sharding, shape = leaf.sharding, leaf.shape
        if num_seeds is not None:
            if shape[:1] != (num_seeds,):
                raise ValueError(
                    f"State leaf {jax.tree_util.keystr(path) or '(root)'} has shape "
                    f"{shape}, but its leading axis must be the {num_seeds} seeds."
                )
            shape = shape[1:]
        if not isinstance(sharding, NamedSharding):
            return jax.ShapeDtypeStruct(shape, leaf.dtype)
        if num_seeds is not None:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(shape, state)


def _check_metrics(metrics: Any, task_names: Sequence[str] | None) -> None:
    values = list(metrics.values()) if isinstance(metrics, Mapping) else [None]
    dicts = [value for value in values if isinstance(value, Mapping)]
    arrays = [value for value in values if not isinstance(value, Mapping)]
    arrays += [entry for value in dicts for entry in value.values()]
    if not all(hasattr(array, "shape") for array in arrays):
        raise ValueError("The step must return (state, metrics), metrics a flat dict.")
    shapes = jax.tree.map(lambda x: np.empty(x.shape), dict(metrics))
    losses = records.by_task(shapes, task_names).get("losses")
    if losses is not None and len(losses.shape) != 1:
        raise ValueError(f"metrics['losses'] has shape {losses.shape}; it must be [T].")
    if losses is not None and task_names and len(task_names) != losses.shape[0]:
        raise ValueError(
            f"There are {len(task_names)} task_names but {losses.shape[0]} losses."
        )
