"""Sets on the device: the order of an epoch and the gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtljax.data import DataError, epoch_order, take


@pytest.mark.parametrize(("num_examples", "batch_size"), [(12, 4), (13, 4), (5, 5)])
def test_no_example_twice_in_an_epoch(num_examples, batch_size):
    key = jax.random.key(0)
    order = epoch_order(key, 0, num_examples, batch_size)
    assert order.shape == (num_examples // batch_size, batch_size)
    flat = np.sort(order.ravel())
    assert len(np.unique(flat)) == order.size
    assert flat.min() >= 0
    assert flat.max() < num_examples
    if num_examples % batch_size == 0:
        np.testing.assert_array_equal(flat, np.arange(num_examples))


def test_order_is_a_function_of_key_and_epoch():
    make = jax.jit(epoch_order, static_argnums=(2, 3))
    one = epoch_order(jax.random.key(0), 7, 100, 10)
    np.testing.assert_array_equal(make(jax.random.key(0), jnp.int32(7), 100, 10), one)
    assert (epoch_order(jax.random.key(0), 8, 100, 10) != one).any()
    assert (epoch_order(jax.random.key(1), 7, 100, 10) != one).any()


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_must_fit(batch_size):
    with pytest.raises(DataError, match=f"10 examples of the set, not {batch_size}"):
        epoch_order(jax.random.key(0), 0, 10, batch_size)


def test_take_inside_scan():
    data = {"image": np.arange(40).reshape(10, 2, 2, 1), "left": np.arange(10)}

    @jax.jit
    def epoch(data, order):
        return jax.lax.scan(lambda c, idx: (c, take(data, idx)), None, order)[1]

    order = epoch_order(jax.random.key(0), 0, 10, 5)
    seen = epoch(data, order)
    assert seen["image"].shape == (2, 5, 2, 2, 1)
    np.testing.assert_array_equal(seen["left"], order)
    np.testing.assert_array_equal(seen["image"], data["image"][np.asarray(order)])
