"""The probe: cadence, one program, nothing hidden, the same after a resume."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import toy

from mtljax import training, trajectory
from mtljax.trajectory import Probe, Quantity

KEY = jax.random.key(0)
HELD = {name: jnp.asarray(a[:24]) for name, a in toy.make_data().items()}


def covariance(params, data, key):
    """Of the first task of the toy, whole: also draws, so that the key matters."""
    del key
    loss = lambda p, b: toy.task_losses(p, b)[0]
    batches = jax.tree.map(lambda x: x.reshape(6, 4, *x.shape[1:]), data)
    return trajectory.gradient_covariance_trace(
        loss, params, batches, batch_size=4, population=70
    )


def noise(params, data, key):
    del params, data
    return jax.random.normal(key, (2,))


def make(**options):
    quantities = {
        "covariance": Quantity(covariance, cost=24.0, config={"B": 4}),
        "noise": Quantity(noise, every=2, cost=2.0),
    }
    return Probe(quantities, HELD, key=KEY, **{"every": 6, **options})


def test_what_is_due_when():
    probe = make(at=(20,))
    assert probe.due(0) == probe.due(12) == probe.due(20) == ("covariance", "noise")
    assert probe.due(6) == ("covariance",)
    assert probe.due(7) == ()
    assert probe.cost() == 24 + 1
    # 25 example-gradients a probe, 8 examples and 2 tasks a step, 5 % allowed.
    assert make(every=None, step_cost=16).every == 32


def test_it_measures_what_the_functions_measure_with_one_compilation():
    probe = make()
    params = {"w": jnp.ones((5, 2)), "b": jnp.zeros(2)}
    found = probe(params, 0)
    expected = jax.jit(covariance)(params, HELD, KEY)
    np.testing.assert_allclose(
        found["probe_covariance_trace"], expected.trace, rtol=1e-5
    )
    assert found["probe_noise"].shape == (2,)
    assert found["probe_nonfinite"] == 0
    other = probe({"w": 2 * params["w"], "b": params["b"]}, 12)
    # The same random numbers at every step: differences are of the parameters.
    np.testing.assert_array_equal(other["probe_noise"], found["probe_noise"])
    (compiled,) = probe._compiled.values()
    assert compiled._cache_size() == 1
    moved = probe.on(jax.tree.map(lambda x: 2 * x, HELD))
    assert moved(params, 0)["probe_covariance_trace"] != expected.trace
    assert compiled._cache_size() == 1


def test_what_is_not_finite_is_returned_and_counted():
    bad = Quantity(lambda p, d, k: {"a": jnp.log(p), "n": jnp.int32(3)})
    found = Probe({"q": bad}, None, key=KEY, every=1)(jnp.array([-1.0, 0.0, 1.0]), 0)
    assert np.isnan(found["probe_q_a"][0])
    assert found["probe_nonfinite"] == 2
    assert found["probe_q_n"] == 3


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_along_a_run_beside_the_metrics_and_after_a_resume(tmp_path, many):
    """Rows of an interrupted run equal those of one that was not."""

    def run(folder, num_steps, **options):
        probe = make(many=many)
        evaluate = toy.make_eval()
        if many:
            keys = jax.random.split(KEY, 2)
            inits, orders = jax.vmap(training.split_run_key)(keys)
            options |= {
                "state": jax.vmap(toy.init)(inits),
                "order_key": orders,
                "seeds": [0, 1],
            }
            evaluate = jax.vmap(evaluate)
        return toy.run(
            num_steps,
            run_dir=tmp_path / folder,
            eval_fn=probe.beside(
                evaluate, params=lambda s: s.params, step=lambda s: s.step
            ),
            eval_at_start=True,
            checkpoint_every=4,
            **options,
        )

    run("once", 18)
    run("twice", 7)
    result = run("twice", 18, resume=True)
    once, twice = (toy.comparable(tmp_path / name)[1] for name in ("once", "twice"))
    final = lambda row: {k: v for k, v in row.items() if k != "final"}
    assert [final(r) for r in once] == [final(r) for r in twice]
    evals = [r for r in twice if r["kind"] == "eval" and r.get("seed", 0) == 0]
    assert [r["step"] for r in evals] == [0, 6, 12, 18]
    assert all("val_loss" in r and "probe_covariance_trace" in r for r in evals)
    assert [r["step"] for r in evals if "probe_noise" in r] == [0, 12]
    if many:
        return
    # Offline, from the saved state: the same number as along the way.
    (row,) = make().offline([(18, result.state.params)])
    np.testing.assert_allclose(
        row["probe_covariance_trace"], evals[-1]["probe_covariance_trace"], rtol=1e-6
    )
    assert set(row) == {"step", *(k for r in evals for k in r if k.startswith("probe"))}


def test_the_protocol_can_be_compared():
    left, right = make().config(), make().on(jax.tree.map(jnp.negative, HELD)).config()
    trajectory.check_comparable(left, make().config())
    with pytest.raises(ValueError, match="probe_set"):
        trajectory.check_comparable(left, right)
    assert left["covariance"] == {"B": 4}


def test_mistakes_are_named(as_users):
    with pytest.raises(ValueError, match="give every= or step_cost="):
        make(every=None)
    with pytest.raises(ValueError, match="no quantity"):
        Probe({}, None, key=KEY, every=1)
    with pytest.raises(ValueError, match="'q': every must be a positive integer"):
        Probe({"q": Quantity(noise, every=0)}, None, key=KEY, every=1)
    probe = Probe({"q": Quantity(noise)}, None, key=KEY, every=1, prefix="")
    both = probe.beside(lambda s: {"q": s}, params=lambda s: s, step=lambda s: 0)
    with pytest.raises(ValueError, match="returns 'q' too"):
        both(jnp.zeros(()))
