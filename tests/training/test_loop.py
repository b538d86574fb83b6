import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import toy

import mtljax
from mtljax import training
from mtljax.training import loop


def arrays():
    return jax.tree.map(jnp.asarray, toy.make_data())


def test_the_same_program_runs_any_split_of_the_steps_to_the_same_bits():
    run = training.make_chunk(toy.step, batch_size=8, chunk=30)
    init_key, order_key = training.split_run_key(jax.random.key(3))
    whole, whole_metrics = run(toy.init(init_key), arrays(), order_key, 0, 30)
    state, losses = toy.init(init_key), []
    for start, n in [(0, 7), (7, 13), (20, 1), (21, 9)]:  # an epoch has 8 steps
        state, metrics = run(state, arrays(), order_key, start, n)
        losses.append(np.asarray(metrics["losses"])[:n])
    assert training.tree_digest(state) == training.tree_digest(whole)
    np.testing.assert_array_equal(np.concatenate(losses), whole_metrics["losses"])
    assert run._cache_size() == 1


def test_each_epoch_visits_every_example_at_most_once_in_a_new_order():
    key, size = jax.random.key(0), 70
    epochs = [np.asarray(loop.epoch_order(key, e, size, 8)) for e in range(3)]
    for order in epochs:
        assert order.shape == (8, 8)
        assert len(set(order.ravel())) == 64
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(epochs[2], loop.epoch_order(key, 2, size, 8))


def test_the_chunk_follows_epoch_order_across_epochs():
    step = lambda state, batch: (state, {"rows": batch})
    run = training.make_chunk(step, batch_size=8, chunk=20)
    key = jax.random.key(5)
    _, metrics = run(jnp.float32(0), jnp.arange(70), key, 3, 17)
    orders = [loop.epoch_order(key, e, 70, 8) for e in range(3)]
    np.testing.assert_array_equal(metrics["rows"][:17], jnp.concatenate(orders)[3:20])


def test_seeds_are_a_vmap_axis():
    keys = jax.random.split(jax.random.key(1), 8)
    init_keys, order_keys = training.split_run_key(keys)
    run = training.make_chunk(toy.step, batch_size=8, chunk=20, seeds=True)
    states, metrics = run(jax.vmap(toy.init)(init_keys), arrays(), order_keys, 0, 20)
    assert metrics["losses"].shape == (20, 8, 2)
    single = training.make_chunk(toy.step, batch_size=8, chunk=20)
    for s in range(8):
        state, expected = single(toy.init(init_keys[s]), arrays(), order_keys[s], 0, 20)
        np.testing.assert_allclose(
            metrics["losses"][:, s], expected["losses"], rtol=2e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            states.params["w"][s], state.params["w"], rtol=2e-5, atol=1e-6
        )


@pytest.mark.parametrize("num_steps", [5, 16, 20])
def test_make_train_gives_the_drivers_numbers(num_steps):
    train = training.make_train(toy.init, toy.step, num_steps=num_steps, batch_size=8)
    state, metrics = jax.jit(train)(jax.random.key(0), arrays())
    result = toy.run(num_steps, key=0, log_every=1)
    losses = [r["losses"] for r in result.rows if r["kind"] == "train"]
    np.testing.assert_allclose(metrics["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(
        state.params["w"], result.state.params["w"], rtol=1e-5, atol=1e-6
    )


def test_make_train_vmaps_over_keys():
    train = training.make_train(toy.init, toy.step, num_steps=20, batch_size=8)
    keys = jax.random.split(jax.random.key(2), 8)
    _, many = jax.jit(jax.vmap(train, (0, None)))(keys, arrays())
    one = jax.jit(train)
    for s in range(8):
        _, metrics = one(keys[s], arrays())
        np.testing.assert_allclose(many["losses"][s], metrics["losses"], rtol=2e-5)


def test_make_train_can_be_differentiated():
    def init(rate):
        return {"w": jnp.float32(0), "rate": rate}

    def step(state, x):
        w = state["w"] - state["rate"] * (state["w"] - x.mean())
        return {**state, "w": w}, {"losses": jnp.square(w - x.mean())[None]}

    def final(rate):
        train = training.make_train(
            lambda key: init(rate), step, num_steps=6, batch_size=2
        )
        return train(jax.random.key(0), jnp.ones(8))[1]["losses"][-1, 0]

    # w = 1 - (1 - r)^6, so the loss is (1 - r)^12
    np.testing.assert_allclose(jax.grad(final)(0.1), -12 * 0.9**11, rtol=1e-5)


def test_static_mistakes_are_said_in_one_sentence():
    with pytest.raises(ValueError, match=r"\['y'\] has 6 examples, but \['x'\] has 5"):
        loop.num_examples({"x": jnp.ones(5), "y": jnp.ones(6)}, 2)
    with pytest.raises(ValueError, match="batch_size=9 must lie between 1 and the 5"):
        loop.num_examples({"x": jnp.ones(5)}, 9)
    with pytest.raises(ValueError, match="contain no arrays"):
        loop.num_examples({}, 9)
    with pytest.raises(ValueError, match="is a scalar"):
        loop.num_examples({"x": jnp.float32(1)}, 1)
    with pytest.raises(ValueError, match=r"leaf \['n'\] as nothing; it was int32\[\]"):
        loop.check_step(lambda s, b: ({}, {}), {"n": jnp.int32(0)}, None)
    with pytest.raises(ValueError, match="another structure"):
        loop.check_step(lambda s, b: ([s[0]], {}), (jnp.int32(0),), None)
    with pytest.raises(ValueError, match="chunk=0"):
        training.make_chunk(toy.step, batch_size=1, chunk=0)


def test_hyper_parameters_are_a_vmap_axis_too():
    def step(state, x):
        opt = optax.sgd(state["rate"])
        updates, _ = opt.update(state["w"] - x.mean(), opt.init(state["w"]))
        w = optax.apply_updates(state["w"], updates)
        return {**state, "w": w}, {"losses": jnp.square(w - x.mean())[None]}

    rates = jnp.array([0.1, 0.5, 1.0])
    result = training.fit(
        {"w": jnp.zeros(3), "rate": rates},
        step,
        jnp.ones(8),
        num_steps=3,
        batch_size=4,
        order_key=jax.random.split(jax.random.key(0), 3),
        seeds=[{"seed": 0, "lr": r} for r in (0.1, 0.5, 1.0)],
        logging=training.Logging(every=1, progress=False),
    )
    np.testing.assert_allclose(result.state["w"], 1 - (1 - rates) ** 3, rtol=1e-5)
    assert [r["lr"] for r in result.rows[:3]] == [0.1, 0.5, 1.0]


def test_the_loop_on_the_host_is_the_same_training(tmp_path):
    on_device = toy.run(20)
    on_host = toy.run(20, loop_on="host", run_dir=tmp_path / "a")
    for a, b in zip(on_device.rows, on_host.rows, strict=True):
        name = "losses" if a["kind"] == "train" else "val_losses"
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    toy.run(7, loop_on="host", run_dir=tmp_path / "b")
    resumed = toy.run(20, loop_on="host", run_dir=tmp_path / "b", resume=True)
    digest = training.tree_digest
    assert digest(resumed.state) == digest(on_host.state)
    assert toy.comparable(tmp_path / "a") == toy.comparable(tmp_path / "b")


def test_the_loop_on_the_host_takes_seeds():
    keys = jax.random.split(jax.random.key(1), 3)
    init_keys, order_keys = training.split_run_key(keys)
    many = loop.make_host_chunk(toy.step, batch_size=8, seeds=True)
    _, metrics, _ = many(jax.vmap(toy.init)(init_keys), arrays(), order_keys, 3, 9)
    run = training.make_chunk(toy.step, batch_size=8, chunk=20, seeds=True)
    _, expected = run(jax.vmap(toy.init)(init_keys), arrays(), order_keys, 3, 9)
    np.testing.assert_allclose(
        metrics["losses"], expected["losses"][:9], rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("loop_on", ["device", "host"])
@pytest.mark.parametrize("seeds", [False, True])
def test_calls_within_an_epoch_use_one_order(monkeypatch, loop_on, seeds):
    """Short calls neither sort the examples again nor change the results."""
    keys = jax.random.split(jax.random.key(4), 3)
    init_keys, order_keys = training.split_run_key(keys if seeds else keys[0])
    init = jax.vmap(toy.init) if seeds else toy.init
    sorts = []

    def step(state, batch):
        return toy.step(state, batch)

    def counted(key, epoch, *sizes):
        # The epoch has no axis of seeds, so the effect happens once for all of them.
        jax.debug.callback(lambda epoch: sorts.append(int(epoch)), epoch)
        return epoch_order(key, epoch, *sizes)

    epoch_order = loop.epoch_order
    monkeypatch.setattr(loop, "epoch_order", counted)
    size = len(jax.tree.leaves(arrays())[0])
    per_epoch = size // 8
    runner = loop.make_runner(
        step,
        jax.eval_shape(toy.init, keys[0]),
        jax.tree.map(lambda a: a[:8], arrays()),
        batch_size=8,
        chunk=20,
        seeds=seeds,
        loop_on=loop_on,
    )
    state, at, found = init(init_keys), 0, []
    for n in (2, 1, per_epoch, 1):
        state, metrics = runner(state, arrays(), order_keys, at, n)
        found.append(metrics["losses"][:n])
        at += n
    jax.effects_barrier()
    assert sorted(set(sorts)) == [0, 1]
    assert len(sorts) in (2, 2 * 3)  # a callback under vmap runs once for each seed
    monkeypatch.undo()
    whole = training.make_chunk(toy.step, batch_size=8, chunk=40, seeds=seeds)
    _, expected = whole(init(init_keys), arrays(), order_keys, 0, at)
    np.testing.assert_allclose(
        np.concatenate(found), expected["losses"][:at], rtol=2e-5, atol=1e-6
    )


def test_convolutions_that_a_loop_slows_down_are_looped_on_the_host():
    def losses(kernel, images):
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=axes
        )
        return jnp.stack([(y**2).mean()])

    def ours(kernel, images):
        return mtljax.value_and_task_grads(losses)(kernel, images)[1][0], {}

    def plain(kernel, images):
        return jax.grad(lambda p: losses(p, images)[0])(kernel), {}

    shapes = jnp.ones((3, 3, 2, 4)), jnp.ones((5, 6, 6, 2))
    on_cpu = jax.default_backend() == "cpu"
    assert loop.prefers_host_loop(plain, *shapes) == on_cpu
    assert not loop.prefers_host_loop(ours, *shapes)
