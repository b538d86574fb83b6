"""The process of ``benchmarks.accelerator`` that runs this library."""

import concurrent.futures
import contextlib
import functools
import inspect
import json
import math
import operator
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mtljax
from benchmarks.peer_models import MODELS, Problem

try:
    from jax import enable_x64
except ImportError:  # before jax 0.8
    from jax.experimental import enable_x64

Row = dict[str, Any]
Rows = Iterator[Row]
LABELS = {"trunk": "shared", "heads": "own"}
THREADS = 8
GRADIENT, WEIGHTS = 1e-5, 1e-4  # tolerances, relative
WARM_UP, BLOCK_S, LEAST, MOST = 5, 0.1, 3, 9
RATE, LONG = 1e-4, 1e6
# The reference values are computed once, so their programs need no optimisation.
FAST_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def say(**message: Any) -> None:
    """Sends one message to the command."""
    print("@" + json.dumps(message), flush=True)


def reason(error: BaseException) -> str:
    """Returns the class and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__


def together(
    work: dict[Any, Callable[[], Any]], until: float
) -> Iterator[tuple[Any, Any]]:
    """Calls functions in threads. Yields key and result, or the error, as they end.

    XLA compiles without the interpreter's lock. Threads can therefore compile in
    parallel.
    """
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    keys = {pool.submit(function): key for key, function in work.items()}
    left = set(keys)
    try:
        timeout = max(until - time.time(), 0.01)
        for future in concurrent.futures.as_completed(keys, timeout):
            left.discard(future)
            error = future.exception()
            yield keys[future], error or future.result()
    except TimeoutError:
        for future in left:
            yield keys[future], TimeoutError("time limit of this case")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# --- correctness: float64 on the CPU ------------------------------------------------


def cpu() -> Any:
    return jax.devices("cpu")[0]


def on_cpu(function: Callable[..., Any], *args: Any, wide: bool = True) -> Any:
    """Computes a function on the CPU, by default in float64. Returns NumPy arrays."""
    kind = np.float64 if wide else np.float32

    def cast(x):
        x = x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
        floating = isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating)
        return x.astype(kind) if floating else x

    with enable_x64(wide), jax.default_device(cpu()):
        args = jax.device_put(jax.tree.map(cast, args), cpu())
        program = jax.jit(function, compiler_options=FAST_COMPILATION)
        return jax.tree.map(np.asarray, program(*args))


def exact(function: Callable[..., Any], *args: Any) -> Any:
    """Computes a function on the device with full float32 products."""
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, jax.jit(function)(*args))


def flat(tree: Any) -> np.ndarray:
    """Returns all numbers of a tree in float64."""
    leaves = [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def apart(found: Any, reference: Any) -> float:
    """Returns the relative distance of two trees, or infinity if one is not finite."""
    a, b = flat(found), flat(reference)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


class Small(NamedTuple):
    """A small model with one head per task, for comparing engines."""

    params: Any
    batch: Any
    encode: Callable[[Any, Any], Any]

    def task_losses(self, params, batch):
        """Returns one loss per task."""
        h = self.encode(params["trunk"], batch[0])
        pairs = zip(params["heads"], batch[1], strict=True)
        return jnp.stack([jnp.mean((h @ head - y) ** 2) for head, y in pairs])


def small(name: str, tasks: int) -> Small:
    """Builds the models of the correctness checks."""
    rng = np.random.default_rng(7)

    def normal(*shape):
        scale = math.sqrt(math.prod(shape[:-1]) or 1)
        return (rng.normal(size=shape) / scale).astype(np.float32)

    n, d = 8, 16
    x: Any = rng.normal(size=(n, d)).astype(np.float32)
    if name == "mlp":
        trunk: Any = [{"w": normal(d, d), "b": normal(d)} for _ in range(2)]

        def encode(p, x):
            for layer in p:
                x = jnp.tanh(x @ layer["w"] + layer["b"])
            return x

    elif name == "conv":
        x = rng.normal(size=(n, 8, 8, 3)).astype(np.float32)
        trunk = {"a": normal(3, 3, 3, 8), "b": normal(3, 3, 8, d)}

        def encode(p, x):
            for w, stride in ((p["a"], 1), (p["b"], 2)):
                numbers = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(
                    x, w, (stride, stride), "SAME", dimension_numbers=numbers
                )
                x = jax.nn.gelu(x)
            return x.mean((1, 2))

    elif name == "transformer":
        x = rng.normal(size=(n, 4, d)).astype(np.float32)
        trunk = {name: normal(d, d) for name in ("q", "k", "v", "o", "up", "down")}

        def encode(p, x):
            q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
            scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k) / 4)
            x = x + jnp.einsum("bts,bsd->btd", scores, v) @ p["o"]
            x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(
                x.var(-1, keepdims=True) + 1e-3
            )
            return (x + jax.nn.gelu(x @ p["up"]) @ p["down"]).mean(1)

    elif name == "embedding":
        x = rng.integers(0, 20, (n, 5))
        trunk = {"table": normal(20, d), "w": normal(d, d)}

        def encode(p, x):
            return jnp.tanh(p["table"][x].mean(1) @ p["w"])

    else:
        x = rng.normal(size=(6, n, d)).astype(np.float32)
        trunk = {"x": normal(d, d), "h": normal(d, d)}

        def encode(p, x):
            def step(h, x):
                return jnp.tanh(x @ p["x"] + h @ p["h"]), None

            return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[0]

    heads = [normal(d) for _ in range(tasks)]
    y = rng.normal(size=(tasks, n)).astype(np.float32)
    return Small({"trunk": trunk, "heads": heads}, (x, y), encode)


def reference(model: Small, balancer: mtljax.Balancer) -> Any:
    """Returns losses and balanced gradient by ``jax.jacrev`` in float64 on the CPU."""

    def function(params, batch):
        losses = model.task_losses(params, batch)
        rows = jax.jacrev(model.task_losses)(params, batch)
        state = balancer.init(params["trunk"])
        trunk, _ = balancer.update(rows["trunk"], state, losses=losses)
        heads = jax.tree.map(lambda row: row.sum(0), rows["heads"])
        return losses, {"trunk": trunk, "heads": heads}

    return on_cpu(function, model.params, model.batch)


def compare_engines(
    name: str, tasks: int, cases: list[tuple[str, str]], until: float
) -> Rows:
    """Yields rows of engines and strategies on a small model."""
    model = small(name, tasks)
    balancers = {
        e: mtljax.uncertainty if e == "losses" else mtljax.upgrad for e, _ in cases
    }
    found = {e: make(tasks) for e, make in balancers.items()}
    known = {b.name: reference(model, b) for b in found.values()}

    def run(engine, strategy):
        balancer = found[engine]
        grad_fn = mtljax.value_and_balanced_grad(
            model.task_losses, balancer, labels=LABELS, engine=engine, strategy=strategy
        )

        def function(params, batch):
            losses, grad, _ = grad_fn(params, balancer.init(params), batch)
            return losses, grad

        return exact(function, model.params, model.batch)

    work = {case: functools.partial(run, *case) for case in cases}
    for (engine, strategy), result in together(work, until):
        method = found[engine].name
        row = {"check": "gradient", "model": name, "tasks": tasks, "method": method}
        row |= {"engine": engine, "strategy": strategy, "precision": "highest"}
        yield row | judged(result, known[method], GRADIENT)


def judged(result: Any, expected: Any, tolerance: float) -> Row:
    """Returns the error of a result, or the reason why there is none."""
    if isinstance(result, BaseException):
        return {"error": reason(result)}
    return {"rel_error": apart(result, expected), "tolerance": tolerance}


def smoke(tasks: int, until: float) -> Rows:
    """Runs each engine once on the smallest model."""
    names = ("losses", "stacked", "gramian", "auto")
    yield from compare_engines("mlp", tasks, [(name, "auto") for name in names], until)


def engines(model: str, tasks: int, until: float) -> Rows:
    """Compares the engines on one kind of model, with all strategies on the MLP."""
    cases = [("losses", "auto"), ("gramian", "vmap"), ("auto", "auto")]
    several = ("vmap", "map", "unrolled", "chunked")
    strategies = several if model == "mlp" else ("vmap", "unrolled")
    cases += [("stacked", strategy) for strategy in strategies]
    if model == "mlp":
        cases += [("gramian", strategy) for strategy in several[1:]]
    yield from compare_engines(model, tasks, cases, until)


def methods(share: list[int], tasks: int, until: float) -> Rows:
    """Compares two updates of each method, with all tasks and with an absent task."""
    index, shares = share
    names = list(mtljax.METHODS)[index::shares]
    rng = np.random.default_rng(11)

    def gradients():
        common = rng.normal(size=(1, 230))
        rows = (rng.normal(size=(tasks, 230)) + 0.5 * common).astype(np.float32)
        return {"a": rows[:, :200].reshape(tasks, 40, 5), "b": rows[:, 200:]}

    pair = [gradients(), gradients()]
    losses = rng.uniform(0.5, 2, (2, tasks)).astype(np.float32)
    masks = {"update": np.ones(tasks, bool), "update, mask": np.arange(tasks) != 1}

    def run(name):
        method = mtljax.METHODS[name]

        def function(pair, losses, mask, data):
            balancer = method.build(tasks, key=jax.random.wrap_key_data(data))
            params = jax.tree.map(lambda g: g[0], pair[0])
            state = balancer.init(params)
            updates = []
            for grads, now in zip(pair, losses, strict=True):
                options = {"losses": now, "mask": mask}
                update, state = balancer.update(grads, state, params, **options)
                updates.append(update)
            return updates

        data = np.asarray(jax.random.key_data(jax.random.key(3)))
        # A method that samples numbers would sample other numbers in float64.
        wide = not method.random
        program = jax.jit(function)
        results = {}
        for check, mask in masks.items():
            with jax.default_matmul_precision("highest"):
                got = jax.tree.map(np.asarray, program(pair, losses, mask, data))
            expected = on_cpu(function, pair, losses, mask, data, wide=wide)
            results[check] = got, expected
        return results

    work = {name: functools.partial(run, name) for name in names}
    for name, result in together(work, until):
        for check in masks:
            row = {"check": check, "tasks": tasks, "method": name}
            row |= {"precision": "highest"}
            if isinstance(result, BaseException):
                yield row | {"error": reason(result)}
            else:
                yield row | judged(*result[check], WEIGHTS)


# Strictly convex in the update, so that it is unique if the Gramian is singular.
CONVEX = ("mgda", "cagrad", "upgrad", "dualproj")


def gramians_of(tasks: int, count: int, singular: bool) -> np.ndarray:
    """Returns ``[count, T, T]`` Gramians of random gradients of several scales."""
    rng = np.random.default_rng([5, tasks, singular])
    dim = max(tasks - 1, 1) if singular else 2 * tasks
    rows = rng.normal(size=(count, tasks, dim)) + 0.5 * rng.normal(size=(count, 1, dim))
    rows *= 10.0 ** rng.uniform(-1.5, 1.5, (count, 1, 1))
    return rows @ rows.transpose(0, 2, 1)


def solvers(tasks: int, until: float) -> Rows:
    """Compares weights of 64 regular and, for convex problems, 64 singular Gramians."""

    def balancer_of(name):
        method = mtljax.METHODS[name]
        if method.random:
            return None
        balancer = method.build(tasks)
        state = balancer.init({"w": jnp.zeros(2)})
        solved = getattr(state, "solver", None) is not None
        return balancer if solved and balancer.needs == "gramian" else None

    def run(balancer, gramians):
        def one(gramian, losses):
            state = balancer.init({"w": jnp.zeros(2, gramian.dtype)})
            weights, state = balancer.weigh(
                state, losses=losses, gramian=gramian, mask=None
            )
            return weights, state.solver.converged

        function, losses = jax.vmap(one, (0, None)), np.ones(tasks, np.float32)
        # A singular Gramian that was rounded to float32 is indefinite in float64.
        found = exact(function, gramians.astype(np.float32), losses)
        return found, on_cpu(function, gramians, losses)

    work = {}
    for name in mtljax.METHODS:
        balancer = balancer_of(name)
        for singular in (False, True) if name in CONVEX else (False,):
            if balancer is not None:
                gramians = gramians_of(tasks, 64, singular)
                run_one = functools.partial(run, balancer, gramians)
                work[name, singular] = run_one
    for (name, singular), result in together(work, until):
        check = "solver, singular" if singular else "solver"
        row = {"check": check, "tasks": tasks, "method": name}
        row |= {"precision": "highest", "tolerance": WEIGHTS}
        if isinstance(result, BaseException):
            yield row | {"error": reason(result)}
            continue
        (weights, converged), (expected, _) = result
        cases = zip(gramians_of(tasks, 64, singular), weights, expected, strict=True)
        row |= {"rel_error": max(distance(*case) for case in cases)}
        yield row | {"converged": bool(converged.all())}


def distance(gramian: np.ndarray, weights: np.ndarray, expected: np.ndarray) -> float:
    """Returns the norm of the difference of two updates, computed from their weights.

    It is relative to the largest norm of a task gradient times the largest weight. The
    weights themselves are not unique if the Gramian is singular.
    """
    if not (np.isfinite(weights).all() and np.isfinite(expected).all()):
        return math.inf
    off = weights.astype(np.float64) - expected
    longest = math.sqrt(gramian.diagonal().max()) * max(np.abs(expected).max(), 1e-30)
    return float(math.sqrt(max(off @ gramian @ off, 0.0)) / longest)


def seeds(tasks: int, until: float) -> Rows:
    """Compares ``vmap`` over four seeds with one seed after the other."""
    model = small("mlp", tasks)
    balancer = mtljax.upgrad(tasks)
    rng = np.random.default_rng(2)
    four = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=(4, *x.shape)).astype(np.float32),
        model.params,
    )

    def run(engine):
        grad_fn = mtljax.value_and_balanced_grad(
            model.task_losses, balancer, labels=LABELS, engine=engine
        )

        def function(params):
            return grad_fn(params, balancer.init(params), model.batch)[:2]

        each = [jax.tree.map(operator.itemgetter(i), four) for i in range(4)]
        alone = [exact(function, one) for one in each]
        expected = jax.tree.map(lambda *x: np.stack(x), *alone)
        return exact(jax.vmap(function), four), expected

    names = ("stacked", "gramian")
    work = {name: functools.partial(run, name) for name in names}
    for engine, result in together(work, until):
        row = {"check": "seeds", "model": "mlp", "tasks": tasks, "engine": engine}
        row |= {"method": "upgrad", "precision": "highest"}
        if isinstance(result, BaseException):
            yield row | {"error": reason(result)}
        else:
            yield row | judged(*result, GRADIENT)


# --- time and memory ----------------------------------------------------------------


class Contender(NamedTuple):
    """One way to compute a step."""

    method: str
    engine: str
    strategy: str = "auto"
    backward: str = "auto"


def accepts(name: str) -> bool:
    """Returns whether ``value_and_balanced_grad`` has an argument of this name."""
    return name in inspect.signature(mtljax.value_and_balanced_grad).parameters


def contenders(model: str) -> list[Contender]:
    """Returns the timed ways for a model, including newer arguments if they exist."""
    found = [Contender("linear", "losses"), Contender("upgrad", "gramian")]
    strategies = ("vmap", "map", "unrolled") if model == "mlp" else ("vmap", "map")
    found += [Contender("upgrad", "stacked", strategy) for strategy in strategies]
    found += [Contender("upgrad", "auto")]
    if accepts("measure") and hasattr(mtljax, "through"):
        found += [Contender("upgrad", "representation")]
    if model == "mlp":
        if hasattr(mtljax, "reuse"):
            found += [Contender("upgrad", "reuse16")]
        found += [Contender(method, "auto") for method in ("mgda", "imtl_g")]
    # Backward passes are rewritten on one CPU device only.
    cpu = jax.default_backend() == "cpu"
    if model == "transformer" and cpu and accepts("backward"):
        found += [
            Contender("linear", "losses", "auto", "rewritten"),
            Contender("upgrad", "stacked", "vmap", "rewritten"),
        ]
    return found


class Step:
    """A compiled step of a contender, and its arrays."""

    def __init__(self, problem: Problem, contender: Contender):
        method, engine, strategy, backward = contender
        balancer: Any = mtljax.get_method(method).build(problem.tasks)
        options: Row = {"strategy": strategy, "labels": LABELS}
        task_losses: Any = problem.task_losses
        if engine == "representation":
            through: Any = mtljax.through  # pyright: ignore[reportAttributeAccessIssue]
            task_losses = through(problem.encode, problem.head_losses)
            options["measure"] = "representation"
        elif engine == "reuse16":
            reuse: Any = mtljax.reuse  # pyright: ignore[reportAttributeAccessIssue]
            balancer = reuse(balancer, every=16)
        else:
            options["engine"] = engine
        if backward != "auto":
            options["backward"] = backward
        grad_fn: Any = mtljax.value_and_balanced_grad(task_losses, balancer, **options)

        def step(params, state, rate, batch):
            losses, grad, state = grad_fn(params, state, batch)
            params = jax.tree.map(lambda p, g: p - rate * g, params, grad)
            return params, state, losses

        self.first = problem.params, balancer.init(problem.params)
        self.batch = jax.device_put((problem.x, problem.y))
        self.rate = jnp.float32(RATE)
        shapes = jax.eval_shape(lambda: self.first)
        self.lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            *shapes, self.rate, self.batch
        )

    def compile(self) -> Row:
        """Compiles the step. Returns the compiler's information."""
        start = time.perf_counter()
        self.program: Any = self.lowered.compile()
        row: Row = {"compile_s": round(time.perf_counter() - start, 3)}
        del self.lowered
        analysis = self.program.memory_analysis()
        row["temp_mb"] = analysis and round(analysis.temp_size_in_bytes / 2**20, 3)
        costs = self.program.cost_analysis() or {}
        costs = costs[0] if isinstance(costs, list) else costs
        row["flops"] = costs.get("flops")
        return row

    def reset(self) -> None:
        """Resets to the initial parameters."""
        # The step donates its arguments.
        make = functools.partial(jnp.array, copy=True)
        self.params, self.state = jax.tree.map(make, self.first)

    def first_step(self) -> tuple[float, np.ndarray]:
        """Returns the mean loss and the update of the trunk."""
        self.reset()
        # With such a large rate, the difference of the parameters is the update.
        rate = jnp.float32(LONG)
        params, _, losses = self.program(self.params, self.state, rate, self.batch)
        before = self.first[0]["trunk"]
        moved = {
            k: (before[k] - np.asarray(v)) / LONG for k, v in params["trunk"].items()
        }
        self.reset()
        return float(np.mean(losses)), flat(moved)

    def start(self) -> None:
        """Starts one step. The device may still be computing it at the return."""
        out = self.program(self.params, self.state, self.rate, self.batch)
        self.params, self.state, self.losses = out

    def wait(self) -> None:
        """Waits for the started steps."""
        jax.block_until_ready((self.params, self.losses))


def block(step: Any, least: float, runs: int = 1) -> tuple[float, int]:
    """Returns the seconds of one step and the number of steps that were timed.

    The steps take at least ``least`` seconds together. Their number starts at ``runs``.
    """
    while True:
        start = time.perf_counter()
        for _ in range(runs):
            step.start()
        step.wait()
        seconds = time.perf_counter() - start
        if seconds >= least:
            return seconds / runs, runs
        runs = max(runs * 2, math.ceil(runs * least / max(seconds, 1e-9)))


def timed(
    steps: dict[Any, Any], seconds: float, until: float
) -> Iterator[tuple[Any, Row]]:
    """Times steps alternately. Yields key and row of each, or its error."""
    times: dict[Any, list[float]] = {}
    runs: dict[Any, int] = {}
    for key, step in list(steps.items()):
        try:
            for _ in range(WARM_UP):
                step.start()
            step.wait()
            times[key] = []
        except Exception as error:
            yield key, {"error": reason(error)}
    begin = time.time()
    least = min(BLOCK_S, seconds / 10)
    for turn in range(MOST):
        for key in list(times):
            try:
                found, runs[key] = block(steps[key], least, runs.get(key, 1))
                times[key].append(found)
            except Exception as error:
                del times[key]
                yield key, {"error": reason(error)}
        now = time.time()
        if now > until or (turn + 1 >= LEAST and now - begin > seconds):
            break
    for key, found in times.items():
        several = found if len(found) > 1 else found * 2
        low, middle, high = statistics.quantiles(several, n=4, method="inclusive")
        row = {"low_ms": 1e3 * low, "ms": 1e3 * middle, "high_ms": 1e3 * high}
        yield key, {**row, "samples": len(found)}


ROWS = Contender("upgrad", "stacked", "vmap")
AUTO = Contender("upgrad", "auto")


class Cell(NamedTuple):
    """A model of one size with T tasks in one precision."""

    model: str
    size: str  # the name of the options
    options: Row
    tasks: int
    precision: str
    seconds: float = 0.0  # total time of all contenders

    @property
    def problem(self) -> Problem:
        """Returns the model in both libraries."""
        return MODELS[self.model](self.tasks, **self.options)

    def row(self, problem: Problem, names: Row) -> Row:
        """Returns the first fields of a row."""
        known = {"model": self.model, "tasks": self.tasks, "size": problem.size}
        return {**known, "precision": self.precision, **names}

    def step(self, problem: Problem, contender: Contender) -> Step:
        """Returns a step in this precision that is not compiled yet."""
        setting = None if self.precision == "tf32" else "highest"
        with jax.default_matmul_precision(setting):
            return Step(problem, contender)


def compiled(
    problem: Problem, cell: Cell, until: float
) -> Iterator[tuple[Contender, Step | None, Row]]:
    """Traces and compiles all contenders. Yields failed ones without a step."""
    made: dict[Contender, Step] = {}
    for contender in contenders(cell.model):
        try:
            made[contender] = cell.step(problem, contender)
        except Exception as error:
            yield contender, None, {"error": reason(error)}
    same = duplicate(made)
    if same is not None:
        del made[AUTO]
    work = {contender: step.compile for contender, step in made.items()}
    for contender, result in together(work, until):
        if isinstance(result, BaseException):
            yield contender, None, {"error": reason(result)}
        else:
            yield contender, made[contender], result
    if same is not None:
        yield AUTO, None, {"auto": f"{same.engine}, {same.strategy}"}


def warm(cells: list[Row], until: float) -> Rows:
    """Compiles the programs of several cells, so that the cache contains them.

    Errors are left to the timed parts, which repeat them.
    """
    pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    started: dict[concurrent.futures.Future[Row], Row] = {}
    programs: set[str] = set()
    for options in cells:
        cell = Cell(**options)
        problem = cell.problem
        for contender in contenders(cell.model):
            try:
                step = cell.step(problem, contender)
            except Exception:
                continue
            program = step.lowered.as_text()
            if program not in programs and time.time() < until:
                programs.add(program)
                row = cell.row(problem, contender._asdict()) | {"part": cell.model}
                started[pool.submit(step.compile)] = row
        yield from ended(started, 0.0)
    yield from ended(started, until - time.time())
    pool.shutdown(wait=False, cancel_futures=True)


def ended(started: dict[concurrent.futures.Future[Row], Row], timeout: float) -> Rows:
    """Removes and yields the compilations that end within the time."""
    with contextlib.suppress(TimeoutError):
        for future in concurrent.futures.as_completed(list(started), max(timeout, 0)):
            row = started.pop(future)
            if future.exception() is None:
                yield row | future.result()


def duplicate(made: dict[Contender, Step]) -> Contender | None:
    """Returns the contender that ``auto`` equals before compilation, or None."""
    if AUTO not in made:
        return None
    program = made[AUTO].lowered.as_text()
    return next(
        (
            contender
            for contender, step in made.items()
            if contender.engine in ("stacked", "gramian")
            and step.lowered.as_text() == program
        ),
        None,
    )


def first_steps(steps: dict[Contender, Step]) -> Iterator[tuple[Contender, Row]]:
    """Compares the first steps' losses and updates with stacked gradients."""
    rows: np.ndarray | None = None
    for contender in sorted(steps, key=lambda contender: contender != ROWS):
        try:
            loss, update = steps[contender].first_step()
        except Exception as error:
            yield contender, {"error": reason(error)}
            continue
        row: Row = {"loss": loss, "update_norm": float(np.linalg.norm(update))}
        if contender == ROWS:
            rows = update
        same = contender.method == "upgrad" and contender.engine != "representation"
        if same and rows is not None:
            row["rel_error"] = apart(update, rows)
        yield contender, row


def steps(*, until: float, **options: Any) -> Rows:
    """Compiles all contenders of a cell, checks their first steps and times them."""
    cell = Cell(**options)
    problem = cell.problem

    def whole(contender, row):
        return cell.row(problem, contender._asdict()) | row

    ready: dict[Contender, Step] = {}
    facts: dict[Contender, Row] = {}
    # Slow compilation must not use the time for measuring the other contenders.
    compile_until = until - 3 * cell.seconds - 5
    same = None
    for contender, step, row in compiled(problem, cell, compile_until):
        if step is not None:
            ready[contender], facts[contender] = step, row
        elif "auto" in row:
            same = Contender("upgrad", *row["auto"].split(", "))
        yield whole(contender, row)
    for contender, row in list(first_steps(ready)):
        if "error" in row:
            del ready[contender]
        yield whole(contender, row)
    if same is None and (same := chosen(facts)) in ready:
        assert same is not None
        ready.pop(AUTO, None)
        yield whole(AUTO, {"auto": f"{same.engine}, {same.strategy}"})
    for contender, row in timed(ready, cell.seconds, until):
        yield whole(contender, row)
        if contender == same:
            yield whole(AUTO, row)


def chosen(facts: dict[Contender, Row]) -> Contender | None:
    """Returns the contender with the same program as ``auto``, or None."""
    auto = facts.get(AUTO)
    for contender, fact in facts.items():
        named = contender.engine in ("stacked", "gramian")
        if auto is None or not named or contender.backward != "auto":
            continue
        if all(auto[k] == fact[k] is not None for k in ("temp_mb", "flops")):
            return contender
    return None


def peak(*, engine: str, until: float, **options: Any) -> Rows:
    """Measures the peak of the allocator in this process, which runs one step."""
    del until
    cell = Cell(**options)
    problem = cell.problem
    method = "linear" if engine == "losses" else "upgrad"
    strategy = "vmap" if engine == "stacked" else "auto"
    contender = Contender(method, engine, strategy)
    step = cell.step(problem, contender)
    facts = step.compile()
    step.reset()
    for _ in range(2):
        step.start()
    step.wait()
    known = jax.devices()[0].memory_stats() or {}
    most = known.get("peak_bytes_in_use")
    row = cell.row(problem, contender._asdict()) | {"temp_mb": facts["temp_mb"]}
    yield row | {"check": "peak", "peak_mb": most and round(most / 2**20, 3)}


# --- the process --------------------------------------------------------------------

KINDS: dict[str, Callable[..., Rows]] = {
    "smoke": smoke,
    "engines": engines,
    "methods": methods,
    "solvers": solvers,
    "seeds": seeds,
    "warm": warm,
    "steps": steps,
    "peak": peak,
}


def run_jobs(kinds: dict[str, Callable[..., Rows]], ask: str) -> None:
    """Runs the jobs that the command requests and sends their rows."""
    asked = json.loads(ask)
    for index, job in enumerate(asked["jobs"]):
        say(begin=index)
        # One second remains for reporting unfinished cases.
        until = min(asked["end"], time.time() + job["limit_s"]) - 1
        try:
            for row in kinds[job["kind"]](**job["options"], until=until):
                say(row=row)
        except Exception as error:
            names = ("model", "tasks", "precision", "engine")
            known = {k: v for k, v in job["options"].items() if k in names}
            say(row={"check": job["kind"], **known, "error": reason(error)})
        say(end=index)


def main() -> None:
    warnings.filterwarnings("ignore")
    device = jax.devices()[0]
    say(about={"platform": device.platform, "device": device.device_kind})
    run_jobs(KINDS, sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # a thread may still be compiling


if __name__ == "__main__":
    main()
