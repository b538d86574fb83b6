"""The rules that every balancer keeps, one function a rule.

A check yields ``(what, problem)`` for each case, the problem being None if the rule
holds. Most of them only trace: nothing is compiled to find the dtype of a state.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from precision import enable_x64
from programs import DIM, LOSSES, flat
from registry import arguments, with_number
from rules.faults import good, run_matrix, same
from rules.subjects import Subject, built, params, raw
from zoo import J3

import mtljax

Outcome = tuple[str, str | None]
MATRIX = np.pad(J3, ((0, 0), (0, DIM - J3.shape[1])))


def inputs(subject: Subject, dtype=jnp.float32, tasks: int = 3):
    """Good gradients, a state, and keywords."""
    matrix, losses = (MATRIX, LOSSES) if tasks == 3 else good(tasks, 7)
    keywords = {
        "losses": jnp.asarray(losses, dtype),
        "mask": jnp.ones(tasks, bool),
    }
    state = built(subject.id, tasks).init(params(dtype))
    return subject.grads(matrix, dtype), state, keywords


def problem(holds: Any, text: str) -> str | None:
    return None if holds else text


def attempt(function: Callable[[], Any]) -> str | None:
    """The problem of a call that must work."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return None


# --- 1: the state policy ------------------------------------------------------------


def policy(subject: Subject) -> Iterator[Outcome]:
    """A step is applied completely or not at all: the fault matrix, and the seams."""
    report = run_matrix(subject)
    broken = dict.fromkeys(report.violations)
    for number in range(report.cases - len(broken)):
        yield f"fault {number}", None
    for text in broken:
        yield text, "breaks the policy"


def seams(subject: Subject) -> Iterator[Outcome]:
    """``weigh``, which the engines call, and ``observe`` keep the policy too."""
    balancer = built(subject.id)
    grads, state, keywords = inputs(subject)
    good_losses, present = keywords["losses"], keywords["mask"]
    if balancer.weigh is not None:
        gramian = jnp.asarray(MATRIX @ MATRIX.T, jnp.float32)
        weigh = jax.jit(balancer.weigh)
        bad = {"nan loss": {"losses": good_losses.at[1].set(jnp.nan)}}
        if balancer.needs == "gramian":
            bad["inf Gramian"] = {"gramian": gramian.at[1, 1].set(jnp.inf)}
        else:
            gramian = None
        if balancer.positive_losses:
            bad["loss 0"] = {"losses": good_losses.at[1].set(0)}
        for name, change in bad.items():
            given = {"losses": good_losses, "gramian": gramian, "mask": present}
            weights, after = weigh(state, **(given | change))
            kept = np.isnan(weights).all() and same(raw(after), raw(state))
            yield f"weigh: {name}", problem(kept, "weights or state moved")
    if balancer.observe is not None:
        update, observe = jax.jit(balancer.update), jax.jit(balancer.observe)
        _, state = update(grads, state, **keywords)
        bad = {"nan": jnp.nan, "inf": jnp.inf}
        bad |= {"0": 0.0, "-1": -1.0} if balancer.positive_losses else {}
        for name, value in bad.items():
            after = observe(state, losses=good_losses.at[1].set(value), mask=present)
            kept = same(raw(after), raw(state))
            yield f"observe: {name}", problem(kept, "the state moved")
        absent = present.at[1].set(False)
        seen = [
            observe(state, losses=good_losses.at[1].set(value), mask=absent)
            for value in (jnp.nan, 1.0)
        ]
        hidden = same(raw(seen[0]), raw(seen[1]))
        yield "observe: absent", problem(hidden, "an absent loss shows")
        nobody = observe(state, losses=good_losses, mask=~present)
        yield "observe: all absent", problem(same(raw(nobody), raw(state)), "moved")


# --- 2: masks -----------------------------------------------------------------------


def masks(subject: Subject) -> Iterator[Outcome]:
    """A masked task equals a dropped task, over steps with a memory."""
    skip = not (subject.case.maskable and subject.case.deterministic)
    kept = "update_every" in subject.id  # holds the weights of another batch
    if skip or kept or subject.fewest > 2:
        return
    big, small = built(subject.id), built(subject.id, 2)
    steps = jax.jit(big.update), jax.jit(small.update)
    states = big.init(params()), small.init(params())
    present = np.array([0, 2])
    mask = jnp.array([True, False, True])
    for seed in range(3):
        matrix, losses = good(3, seed)
        with_nan, lost = matrix.copy(), losses.copy()
        with_nan[1], lost[1] = np.nan, np.nan
        masked, first = steps[0](
            subject.grads(with_nan),
            states[0],
            losses=jnp.asarray(lost, jnp.float32),
            mask=mask,
        )
        dropped, second = steps[1](
            subject.grads(matrix[present]),
            states[1],
            losses=jnp.asarray(losses[present], jnp.float32),
            mask=jnp.ones(2, bool),
        )
        states = first, second
        a, b = flat(masked), flat(dropped)
        near = np.allclose(a, b, rtol=1e-3, atol=1e-4 * max(np.abs(b).max(), 1e-30))
        yield f"step {seed}", problem(near, f"{a} is not {b}")


# --- 3: buffers ---------------------------------------------------------------------


def buffers(subject: Subject) -> Iterator[Outcome]:
    """No buffer twice in a state, none of the caller."""
    for name, key in (("typed", jax.random.key(0)), ("raw", jax.random.PRNGKey(0))):
        balancer = subject.build(3, key)
        given = params()
        state = balancer.init(given)
        places = _pointers(state)
        yield f"init, {name} key", problem(len(set(places)) == len(places), "twice")
        owned = {*_pointers(given), *_pointers(key)}
        yield f"caller, {name} key", problem(not owned & set(places), "shared")
        weak = [leaf for leaf in jax.tree.leaves(state) if _weak(leaf)]
        yield f"strong dtypes, {name} key", problem(not weak, "a weak dtype")


def donation(subject: Subject) -> Iterator[Outcome]:
    """A loop of two steps that donates parameters and state."""
    key = jax.random.key(0)
    balancer = subject.build(3, key)

    def step(given, state, grads, losses, mask):
        update, state = balancer.update(grads, state, given, losses=losses, mask=mask)
        return optax.apply_updates(given, update), state

    donating = jax.jit(step, donate_argnums=(0, 1))
    grads, _, keywords = inputs(subject)

    def loop():
        given = params()
        state = balancer.init(given)
        for _ in range(2):
            given, state = donating(given, state, grads, **keywords)
            jax.block_until_ready(state)
        jax.random.normal(key)  # still the caller's
        balancer.init(given)

    yield "two steps", attempt(loop)


def _pointers(state):
    leaves = []
    for leaf in jax.tree.leaves(state):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        leaves.append(jax.random.key_data(leaf) if is_key else leaf)
    # A key of one state is read through its data, which is one array.
    return [leaf.unsafe_buffer_pointer() for leaf in leaves if leaf.size]


def _weak(leaf):
    return getattr(leaf, "weak_type", False)


# --- 4: tracing ---------------------------------------------------------------------


def hyperparameters(subject: Subject) -> dict[str, float]:
    """The float hyper-parameters of a method with their values in this case."""
    if isinstance(subject.case, tuple) and hasattr(subject.case, "inner"):
        return {}
    values = {
        name: default
        for name, default, _ in arguments(subject.factory)
        if isinstance(default, float)
    }
    given = {k: v for k, v in subject.case.options.items() if isinstance(v, float)}
    return values | given


def _method(subject: Subject, name: str, number: Any):
    """The factory itself with the options of the case and one other number."""
    method = mtljax.get_method(subject.case.name)
    options = with_number(method.factory, subject.case.options, name, number)
    return method.build(3, key=jax.random.key(0), **options)


def tracing(subject: Subject) -> Iterator[Outcome]:
    """Every float hyper-parameter may be traced: ``vmap``, a schedule, injected."""
    grads, _, keywords = inputs(subject)
    for name, value in hyperparameters(subject).items():

        def update(number, name=name):
            balancer = _method(subject, name, number)
            return balancer.update(grads, balancer.init(params()), **keywords)

        values = jnp.asarray([value, value])
        vmapped = attempt(lambda u=update, v=values: jax.eval_shape(jax.vmap(u), v))
        yield f"vmap over {name}", vmapped
        with enable_x64(True):  # a float64 value beside float32 gradients
            wide = jnp.asarray([value, value], jnp.float64)
            failed = attempt(lambda u=update, v=wide: jax.eval_shape(jax.vmap(u), v))
        yield f"x64: vmap over {name}", failed
        if name == "agent.optimizer":  # a rate, or an optimizer with a schedule
            continue
        method, argument, options = _injectable(subject, name, value)

        def injected(wrap, method=method, argument=argument, options=options, v=value):
            schedule = {argument: lambda count: v + 0.0 * count}
            built = wrap(method)(num_tasks=3, **(options | schedule))
            opt = optax.chain(built, optax.sgd(0.1))

            def step(grads, keywords):
                return opt.update(grads, opt.init(params()), params(), **keywords)

            jax.eval_shape(step, grads, keywords)

        static = [
            key
            for key, p in inspect.signature(method).parameters.items()
            if key in ("num_tasks", "key", "schedule")
            or isinstance(p.default, int | tuple)
            or isinstance(options.get(key), int | tuple)
        ]

        def by_optax(method, static=static):
            return optax.inject_hyperparams(method, static_args=static)

        ours = tuple(key for key in static if key != argument)
        yield (
            f"optax.inject_hyperparams, {name}",
            attempt(lambda run=injected, wrap=by_optax: run(wrap)),
        )
        yield (
            f"mtljax.inject_hyperparams, {name}",
            attempt(
                lambda run=injected, ours=ours: run(
                    lambda f: mtljax.inject_hyperparams(f, static_args=ours)
                )
            ),
        )


def _injectable(subject: Subject, name: str, value: float):
    """A factory, the argument of it that is the number, and the other options."""
    key = {"key": jax.random.key(0)}
    if "." not in name:
        random = "key" in inspect.signature(subject.factory).parameters
        return subject.factory, name, subject.case.options | (key if random else {})
    method = mtljax.get_method(subject.case.name)

    def build(num_tasks, *, key, number=value):
        """A field of a group is injected as the argument of one's own factory."""
        options = with_number(method.factory, subject.case.options, name, number)
        return method.build(num_tasks, key=key, **options)

    return build, "number", key


def traced_values(subject: Subject) -> Iterator[Outcome]:
    """``vmap`` over a hyper-parameter gives what two balancers give."""
    grads, _, keywords = inputs(subject)
    for name, value in hyperparameters(subject).items():
        pair = (value, 0.9 * value + 0.01)

        def update(number, name=name):
            balancer = _method(subject, name, number)
            return balancer.update(grads, balancer.init(params()), **keywords)[0]

        together = jax.jit(jax.vmap(update))(jnp.asarray(pair))
        for i, number in enumerate(pair):
            try:
                alone = flat(update(number))
            except ValueError:
                if number == value:
                    raise
                continue  # the other options refuse this number, if it is known
            found = flat(jax.tree.map(lambda x, i=i: x[i], together))
            near = np.allclose(found, alone, rtol=1e-3, atol=1e-5)
            yield f"{name}={number:g}", problem(near, f"{found} is not {alone}")


# --- 5: dtypes ----------------------------------------------------------------------


def dtypes(subject: Subject) -> Iterator[Outcome]:
    """The update has the leaves' dtype, and a state keeps its own."""
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        yield from _dtypes(subject, dtype)
    with enable_x64(True):
        for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
            yield from _dtypes(subject, dtype)


def _dtypes(subject: Subject, dtype) -> Iterator[Outcome]:
    x64 = "x64, " if jax.config.jax_enable_x64 else ""
    label = f"{x64}{jnp.dtype(dtype).name}"
    balancer = subject.build(3)
    state = balancer.init(params(dtype))
    grads = subject.grads(MATRIX, dtype)
    losses, mask = jnp.asarray(LOSSES, dtype), jnp.ones(3, bool)
    found = {}

    def run():
        found["update"], found["state"] = jax.eval_shape(
            lambda *a: balancer.update(*a, losses=losses, mask=mask), grads, state
        )

    failed = attempt(run)
    yield f"{label}: traces", failed
    if failed:
        return
    kinds = {leaf.dtype for leaf in jax.tree.leaves(found["update"])}
    yield f"{label}: update", problem(kinds == {jnp.dtype(dtype)}, f"{kinds}")
    kept = _shapes(found["state"]) == _shapes(state)
    yield f"{label}: state", problem(kept, "a leaf has another dtype or shape")
    if balancer.weigh is not None:
        wide = jnp.promote_types(dtype, jnp.float32)
        gramian = jnp.ones((3, 3), wide) if balancer.needs == "gramian" else None
        weights, _ = jax.eval_shape(
            lambda s, g: balancer.weigh(s, losses=losses, gramian=g), state, gramian
        )
        enough = wide if balancer.needs == "gramian" else jnp.float32
        holds = jnp.promote_types(weights.dtype, enough) == weights.dtype
        yield f"{label}: weights", problem(holds, f"{weights.dtype}")
    if balancer.observe is not None:
        after = jax.eval_shape(
            lambda s: balancer.observe(s, losses=losses, mask=mask), state
        )
        kept = _shapes(after) == _shapes(state)
        yield f"{label}: observe", problem(kept, "a leaf has another dtype or shape")


def _shapes(tree_):
    return [(leaf.shape, leaf.dtype, _weak(leaf)) for leaf in jax.tree.leaves(tree_)]


# --- 7: calls -----------------------------------------------------------------------


@contextlib.contextmanager
def compilations():
    """Counts the programs that XLA is asked for."""
    counts = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            counts.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def calls(subject: Subject) -> Iterator[Outcome]:
    """A second call outside ``jit`` compiles nothing; none visits the host."""
    balancer = subject.build(3)
    grads, state, keywords = inputs(subject)
    update, state = balancer.update(grads, state, **keywords)
    jax.block_until_ready((update, state))
    with compilations() as counts:
        update, state = balancer.update(grads, state, **keywords)
        jax.block_until_ready((update, state))
    yield "second call", problem(not counts, f"{len(counts)} compilations")
    compiled = jax.jit(lambda g, s, k: balancer.update(g, s, **k))
    jax.block_until_ready(compiled(grads, state, keywords))

    def guarded():
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(compiled(grads, state, keywords))

    yield "no transfer", attempt(guarded)


# --- 8: errors ----------------------------------------------------------------------


def errors(subject: Subject) -> Iterator[Outcome]:
    """Static mistakes raise one sentence."""
    balancer = built(subject.id)
    grads, state, keywords = inputs(subject)

    def update(grads=grads, state=state, given=None, **changes):
        keys = {k: v for k, v in (keywords | changes).items() if v is not None}
        jax.eval_shape(lambda: balancer.update(grads, state, given, **keys))

    def change(leaf):
        """The same gradients with another first leaf."""
        leaves, structure = jax.tree.flatten(grads)
        return jax.tree.unflatten(structure, [leaf, *leaves[1:]])

    first = jax.tree.leaves(grads)[0]
    unstacked = {"a": {"kernel": jnp.ones((3, 1))}, "b": jnp.ones(3)}
    pair = grads._replace(loss=unstacked, flat=unstacked) if subject.paired else None
    other = mtljax.mgda(3) if balancer.name != "mgda" else mtljax.linear(3)
    wrong = {
        "too many rows": (lambda: update(change(jnp.ones((4, 2, 1)))), "num_tasks=3"),
        "a scalar leaf": (lambda: update(change(jnp.float32(1))), "num_tasks=3"),
        "unstacked": (lambda: update(pair or unstacked, given=unstacked), "stacked"),
        "integers": (lambda: update(change(first.astype(int))), "floating"),
        "float0": (
            lambda: update(change(np.zeros(first.shape, jax.dtypes.float0))),
            "float0",
        ),
        "float mask": (lambda: update(mask=jnp.array([0.5, 1, 1])), "mask"),
        "short mask": (lambda: update(mask=jnp.ones(2, bool)), "mask"),
        "short losses": (lambda: update(losses=jnp.ones(2)), "losses"),
        "state of another method": (
            lambda: update(state=other.init(params())),
            "state",
        ),
        "no state": (lambda: update(state=(jnp.ones(3),)), "state"),
        "state of four tasks": (
            lambda: update(state=subject.build(4).init(params())),
            "state",
        ),
    }
    if balancer.reads_losses:
        wrong["no losses"] = lambda: update(losses=None), "losses"
    if hasattr(subject.case, "options") and not hasattr(subject.case, "inner"):
        for value in (0, -1, 2.5, True, "3", None):
            wrong[f"num_tasks={value!r}"] = (
                lambda value=value: subject.build(value),
                "integer",
            )
        wrong["traced num_tasks"] = (
            lambda: jax.eval_shape(lambda n: subject.build(n) and None, jnp.int32(3)),
            "static_args",
        )
        if mtljax.get_method(subject.case.name).random:
            for value in (0, None, jnp.ones(2), jax.random.split(jax.random.key(0))):
                wrong[f"key={value!r:.20}"] = (
                    lambda value=value: subject.factory(3, key=value),
                    "key",
                )
        for name, number in (("np.int64", np.int64(3)), ("array", jnp.int32(3))):
            yield f"num_tasks: {name}", attempt(lambda n=number: subject.build(n))
    for name, (call, word) in wrong.items():
        yield name, one_sentence(call, word)


def one_sentence(call, word: str) -> str | None:
    """The problem of a call that must raise ``ValueError`` with one clear sentence."""
    try:
        call()
    except ValueError as error:
        text = str(error)
        if "\n" in text or not text.endswith(".") or len(text) > 400:
            return f"not one sentence: {' '.join(text.split())[:200]}"
        return None if word in text else f"{word!r} is not in: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "accepted"


# --- 9: honesty ---------------------------------------------------------------------


def honesty(subject: Subject) -> Iterator[Outcome]:
    """``repr`` shows the hyper-parameters; the docstring has its sections."""
    shown = repr(built(subject.id))
    for name in inspect.signature(subject.factory).parameters:
        if name in ("loss_balancer", "gradient_balancer", "balancer", "method"):
            continue
        if subject.factory is mtljax.inject_hyperparams:
            continue
        yield f"repr: {name}", problem(f"{name}=" in shown, f"not in {shown}")
    yield "repr: one line", problem("\n" not in shown and " at 0x" not in shown, shown)
    doc = subject.factory.__doc__ or ""
    for section in ("Args:", "Returns:", "Examples:"):
        yield f"docstring: {section}", problem(section in doc, "missing")


class Rule(NamedTuple):
    """A column of the table."""

    number: str
    check: Callable[[Subject], Iterator[Outcome]]
    compiles: bool  # a program of its own for every balancer

    @property
    def name(self) -> str:
        return self.check.__name__


RULES = [
    Rule("1", policy, True),
    Rule("1", seams, True),
    Rule("2", masks, True),
    Rule("3", buffers, False),
    Rule("3", donation, True),
    Rule("4", tracing, False),
    Rule("4", traced_values, True),
    Rule("5", dtypes, False),
    Rule("7", calls, True),
    Rule("8", errors, False),
    Rule("9", honesty, False),
]
