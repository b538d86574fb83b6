"""The driver of a run: evaluation, rows, checkpoints, progress, and a clean stop."""

import contextlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from mtljax.training import checkpoint as checkpoints
from mtljax.training import loop, records
from mtljax.training._feeds import Resident, Streamed
from mtljax.training._run import FitResult, Run, Signals, label_of
from mtljax.training.errors import RunExistsError
from mtljax.training.progress import Progress
from mtljax.training.run_dir import holds_run, remove_run, set_rows_aside
from mtljax.training.writers import TensorBoardWriter, Writer


def own_state(state: PyTree) -> PyTree:
    """Copies a state into buffers of its own, without weak types.

    So the caller's arrays survive donation, no buffer occurs twice, and the first
    call compiles the same program as the others.

    Examples:
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

    return jax.tree.map(own, state)


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
    eval_fn: Callable[[Any], Mapping[str, Any]] | None = None,
    eval_every: int | None = None,
    eval_at_start: bool = False,
    select: str | None = None,
    select_mode: checkpoints.Mode = "min",
    log_every: int = 50,
    run_dir: str | pathlib.Path | None = None,
    checkpoint_every: int | None = None,
    keep_last: int = 2,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    config: Any = None,
    may_differ: Iterable[str] = (),
    writers: Sequence[Writer] = (),
    tensorboard: bool = False,
    progress: bool = True,
    title: str = "",
    chunk: int = 1000,
    positive_losses: bool = False,
    loop_on: Literal["device", "host"] | None = None,
) -> FitResult:
    """Trains: ``num_steps`` of ``step``, with everything a run needs around it.

    The numbers depend on neither the chunks nor on interruptions: a run that was
    stopped or killed and resumed ends with the same bits, and the same rows but for
    their ``seconds``.

    Args:
      state: Initial state, any pytree with everything that changes. With several
        ``seeds`` every leaf has a leading axis ``[S]``. It is copied, not donated.
      step: Pure ``step(state, batch) -> (state, metrics)`` for *one* run; ``metrics``
        is a dict of arrays. If it has ``"losses"`` ``[T]``, a non-finite one stops
        the run; ``"task_weights"`` ``[T]`` are shown.
      data: A pytree of arrays ``[N, ...]`` that stays on the device, or an iterator
        of batches (with Grain's ``get_state``/``set_state`` if ``run_dir`` is given).
      num_steps: Steps of the whole run, the part before a resume included.
      batch_size: Examples per step, for arrays.
      order_key: Fixes the order of arrays; ``[S]`` keys with several seeds.
      seeds: Label of the rows, or S of them: the runs are then vmapped. A label is a
        number or a dict, e.g. ``{"seed": 0, "lr": 0.1}``.
      task_names: T names, for messages and plots.
      eval_fn: ``eval_fn(state) -> dict`` of arrays (``[S, ...]`` with several seeds);
        jit it yourself. Called every ``eval_every`` steps and after the last.
      eval_every: Steps between evaluations; None for one at the end.
      eval_at_start: Whether to evaluate the initial state as well.
      select: The entry of the evaluation (mean over all its elements, so over seeds)
        that picks the best checkpoint, normally a validation metric.
      select_mode: Whether the best is the smallest or the largest.
      log_every: Steps between train rows, which hold means over those steps.
      run_dir: Where to write ``metrics.jsonl`` and ``checkpoints/<step>``; None writes
        nothing.
      checkpoint_every: Steps between checkpoints. One is also written at each new
        best, at an interruption, and at the end.
      keep_last: How many of the newest checkpoints to keep, besides the best.
      resume: True goes on from the newest undamaged checkpoint in ``run_dir``;
        ``"auto"`` does so if there is one and starts afresh otherwise; rows of a run
        without a checkpoint are then renamed, not deleted.
      overwrite: Deletes the files of an earlier run in ``run_dir`` first.
      config: Dataclass or mapping, stored with every checkpoint and in the header of
        the rows, and compared on resume.
      may_differ: Dotted names of fields of ``config`` that a resume may change,
        besides :data:`mtljax.training.MAY_DIFFER`.
      writers: Further receivers of the rows.
      tensorboard: Whether to write ``run_dir/tensorboard`` too.
      progress: Whether to show progress.
      title: What runs, shown before the progress.
      chunk: The most steps between two looks of the host.
      positive_losses: Whether a loss of zero or less stops the run as well; pass a
        balancer's ``positive_losses``.
      loop_on: Whether steps over arrays are looped over inside the compiled program or
        on the host; by default on the host only for convolutions on a CPU that a
        loop would slow down (:func:`~mtljax.training.loop.prefers_host_loop`).

    Returns:
      The last state, the best evaluation and the rows.

    Raises:
      RunExistsError: ``run_dir`` holds a run; nothing was touched.
      CheckpointError: Nothing usable to resume from.
      ConfigMismatchError: The run to resume has another configuration.
      TreeMismatchError: The run to resume has another state.
      NonFiniteLossError: A loss is NaN or infinite; names step, task and checkpoint.
      NonPositiveLossError: Likewise, a loss is not positive (``positive_losses``).
      ValueError: Arguments or shapes do not fit together.

    Examples:
      >>> def step(w, batch):
      ...     loss = jnp.square(w - batch["x"]).mean()
      ...     return w - 0.1 * (w - batch["x"].mean()), {"losses": loss[None]}
      >>> result = fit(jnp.float32(9), step, {"x": jnp.ones(64)}, num_steps=100,
      ...              batch_size=8, order_key=jax.random.key(0), log_every=25,
      ...              progress=False)
      >>> round(float(result.state), 3), [row["step"] for row in result.rows]
      (1.0, [25, 50, 75, 100])
    """
    _check_arguments(
        {
            "log_every": log_every,
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "chunk": chunk,
        },
        resume=bool(resume),
        overwrite=overwrite,
        run_dir=run_dir,
    )
    if select is not None and eval_fn is None:
        raise ValueError(f"select={select!r} needs an eval_fn.")
    folder = None if run_dir is None else pathlib.Path(run_dir)
    many = seeds is not None and not isinstance(seeds, int)
    labels = [label_of(s) for s in (seeds if isinstance(seeds, Sequence) else [seeds])]
    one = _single(state, len(labels) if many else None)
    if hasattr(data, "__next__"):
        engine: Any = Streamed(step, data, seeds=many, resumable=folder is not None)
    else:
        engine = Resident(
            step,
            data,
            batch_size=batch_size,
            order_key=order_key,
            chunk=chunk,
            seeds=many,
            one=one,
            loop_on=loop_on,
        )
        _check_metrics(loop.check_step(step, one, engine.batch), task_names)
    identity = {
        "config": records.to_json({} if config is None else config),
        "fit": {
            "batch_size": batch_size,
            "num_examples": engine.size,
            "order_key": None
            if order_key is None
            else records.to_json(jax.random.key_data(order_key)),
            "seeds": labels,
            "task_names": list(task_names) if task_names else None,
        },
    }
    state = own_state(state)
    with contextlib.ExitStack() as stack:
        screen = stack.enter_context(
            Progress(num_steps, task_names=task_names, title=title, enabled=progress)
        )
        run = Run(
            engine=engine,
            folder=folder,
            identity=identity,
            num_steps=num_steps,
            labels=labels,
            many=many,
            task_names=task_names,
            eval_fn=eval_fn,
            eval_every=eval_every,
            select=select,
            select_mode=select_mode,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            positive_losses=positive_losses,
            screen=screen,
        )
        if folder is not None:
            if resume == "auto":
                resume = bool(checkpoints.saved_steps(folder / "checkpoints"))
                overwrite = not resume
                aside = None if resume else set_rows_aside(folder)
                if aside is not None:
                    screen.note(f"No checkpoint to go on from; rows are in {aside}.")
            if overwrite:
                remove_run(folder)
            run.saver = stack.enter_context(
                checkpoints.Checkpointer(
                    folder / "checkpoints", keep_last=keep_last, mode=select_mode
                )
            )
            if resume:
                state = run.restore(state, {*records.MAY_DIFFER, *may_differ})
            run.saver.clean()
            if tensorboard:  # beside the rows
                writers = [*writers, TensorBoardWriter(folder / "tensorboard")]
        if not run.open_writers(writers, stack):
            return run.result(state)
        signals = stack.enter_context(Signals())
        if eval_at_start and run.done == 0 and not run.resumed:
            run.evaluate(state, final=False)
            run.save(state)
        state = run.train(state, signals, chunk)
        if run.done < num_steps:
            run.say_interrupted(signals)
        return run.result(state)


def _check_arguments(
    counts: Mapping[str, int | None],
    *,
    resume: bool,
    overwrite: bool,
    run_dir: str | pathlib.Path | None,
) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other.")
    if resume and run_dir is None:
        raise ValueError("resume needs a run_dir.")
    if run_dir is not None and holds_run(run_dir) and not (resume or overwrite):
        raise RunExistsError(
            f"{run_dir} already holds a run: add --resume to go on with it or "
            "--overwrite to start again."
        )


def _single(state: PyTree, num_seeds: int | None) -> PyTree:
    """Shapes of the state of one run."""
    shapes = jax.eval_shape(lambda s: s, state)
    if num_seeds is None:
        return shapes
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if leaf.shape[:1] != (num_seeds,):
            raise ValueError(
                f"State leaf {jax.tree_util.keystr(path) or '(root)'} has shape "
                f"{leaf.shape}; its leading axis must be the {num_seeds} seeds."
            )
    return jax.eval_shape(lambda s: jax.tree.map(lambda x: x[0], s), state)


def _check_metrics(metrics: Any, task_names: Sequence[str] | None) -> None:
    if not isinstance(metrics, Mapping) or any(
        not hasattr(m, "shape") for m in metrics.values()
    ):
        raise ValueError("The step must return (state, metrics), metrics a flat dict.")
    losses = metrics.get("losses")
    if losses is not None and len(losses.shape) != 1:
        raise ValueError(f"metrics['losses'] has shape {losses.shape}; it must be [T].")
    if losses is not None and task_names and len(task_names) != losses.shape[0]:
        raise ValueError(
            f"There are {len(task_names)} task_names but {losses.shape[0]} losses."
        )
