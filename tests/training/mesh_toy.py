"""A regression whose parameters and batches can be cut over 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# isort: split
import toy

from mtljax import training

OPT = optax.adam(3e-2)


def make_data(n=72):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 16)).astype(np.float32)
    y = x @ rng.normal(size=(16, 2)).astype(np.float32)
    return {"x": x, "y": y}


def init(key):
    key_w, key_v, key = jax.random.split(key, 3)
    params = {
        "w": 0.1 * jax.random.normal(key_w, (16, 64)),
        "v": 0.1 * jax.random.normal(key_v, (64, 2)),
    }
    return {"params": params, "opt": OPT.init(params), "key": key, "n": jnp.int32(0)}


def task_losses(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w"])
    return jnp.square(hidden @ params["v"] - batch["y"]).mean(0)


def make_step(gather=lambda params: params):
    """A step; ``gather`` brings parameters that are cut into the forward pass."""

    def step(state, batch):
        key, noise_key = jax.random.split(state["key"])
        weights = jax.nn.softmax(jax.random.normal(noise_key, (2,)))

        def total(params):
            losses = task_losses(gather(params), batch)
            return losses @ weights, losses

        grads, losses = jax.grad(total, has_aux=True)(state["params"])
        updates, opt = OPT.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt": opt, "key": key, "n": state["n"] + 1}
        return new, {"losses": losses, "task_weights": weights}

    return step


def mesh(kind, shape=(8,), names=("data",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType[kind],) * len(shape))


def cut(state, where, spec):
    """The state with every matrix cut by ``spec`` and the rest replicated."""
    put = lambda x: jax.device_put(
        x, NamedSharding(where, spec if x.ndim == 2 else P())
    )
    return jax.tree.map(put, state)


def gather(where):
    return lambda params: jax.tree.map(
        lambda p: jax.sharding.reshard(p, NamedSharding(where, P())), params
    )


def seeds_of(number):
    keys = jax.vmap(jax.random.key)(jnp.arange(number))
    return training.split_run_key(keys)


def run(num_steps=20, **settings):
    init_key, order_key = training.split_run_key(jax.random.key(0))
    defaults = {
        "state": init(init_key),
        "step": make_step(),
        "data": make_data(),
        "batch_size": 24,
        "order_key": order_key,
        "seeds": 0,
        "log_every": 4,
        "progress": False,
    }
    return toy.fit(**{**defaults, "num_steps": num_steps, **settings})


def losses(result):
    return np.array([row["losses"] for row in result.rows if "losses" in row])


class Stream:
    """Batches of 24, of which a process gives its part."""

    def __init__(self, part=0, parts=1, shift=0, examples=72):
        self.at, self.part, self.parts, self.shift = 0, part, parts, shift
        self.data = make_data(examples)
        self.size = examples

    def __next__(self):
        rows = (np.arange(24) + 8 * self.at + self.shift) % self.size
        self.at += 1
        mine = np.array_split(rows, self.parts)[self.part]
        return {name: values[mine] for name, values in self.data.items()}

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]
