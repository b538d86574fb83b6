"""One compiled body: what compiles does not grow with the number of tasks."""

import time

import jax
import jax.numpy as jnp
import optax
import pytest

from mtljax.alternating import alternate

KEY = jax.random.key(0)
WIDTH = 16


def lowered(tasks, **options):
    """The program of a small MLP with stacked heads, before XLA sees it."""
    steps = alternate(
        optax.adam(1e-3),
        tasks,
        key=KEY,
        labels={"layers": "shared", "head": "own"},
        **options,
    )
    params = {
        "layers": [jnp.ones((WIDTH, WIDTH)) / WIDTH] * 4,
        "head": jnp.ones((tasks, WIDTH)),
    }

    def loss(params, task, batch):
        h = batch
        for layer in params["layers"]:
            h = jnp.tanh(h @ layer)
        return jnp.square(h @ params["head"] - task).mean()

    state = jax.eval_shape(steps.init, params)
    step = jax.jit(lambda p, s, x: steps.step(loss, p, s, x))
    return step.lower(params, state, jnp.ones((8, WIDTH)))


@pytest.mark.parametrize("options", [{}, {"groups": 2, "state": "per_task"}])
def test_the_program_is_as_long_for_64_tasks_as_for_4(options):
    few, many = (lowered(t, **options).as_text().count("\n") for t in (4, 64))
    assert few > 100
    assert abs(many - few) < 0.1 * few


@pytest.mark.deep
@pytest.mark.parametrize("options", [{}, {"groups": 2, "state": "per_task"}])
def test_compile_time_does_not_depend_on_the_number_of_tasks(options):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        seconds = {4: [], 64: []}
        for _ in range(4):
            for tasks, found in seconds.items():
                program = lowered(tasks, **options)
                start = time.process_time()
                program.compile()
                found.append(time.process_time() - start)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert min(seconds[64]) < 1.5 * min(seconds[4])


@pytest.mark.deep
@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "per_batch"}, {"groups": 2, "state": "per_task"}, {"groups": 8}],
)
def test_states_are_written_in_place(options):
    """A copy of the stack at every step, or even one a batch, would show as memory."""
    tasks, width = 16, 64
    steps = alternate(optax.adam(1e-3), tasks, key=KEY, **options)
    params = [jnp.ones((width, width)) / width] * 4
    state = jax.eval_shape(steps.init, params)

    def loss(params, task, batch):
        for layer in params:
            batch = jnp.tanh(batch @ layer)
        return jnp.square(batch - task).mean()

    step = jax.jit(lambda c, x: steps.step(loss, *c, x)[1:], donate_argnums=0)
    program = step.lower((params, state), jnp.ones((8, width))).compile()
    memory = program.memory_analysis()
    if memory is None:
        pytest.skip("this backend does not tell")
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.shared))
    assert memory.temp_size_in_bytes < 0.75 * size
