"""flax linen: BatchNorm, dropout, and a balancer next to the optimizer."""

from typing import Any

import flax.linen as nn
import jax
import optax
from flax.training.train_state import TrainState

import mtljax


class MultiTaskState(TrainState):  # all that a checkpoint must contain
    batch_stats: Any
    balancer_state: Any
    key: jax.Array


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x))
        h = nn.Dropout(0.1, deterministic=not train)(nn.relu(h))
        return {t: nn.Dense(1, name=f"head_{t}")(h)[:, 0] for t in ("a", "b")}


def train(steps: int = 150) -> tuple[float, float]:
    """Returns the sum of the losses before and after training."""
    x = jax.random.normal(jax.random.key(0), (64, 4))
    y = {"a": x.sum(1), "b": x[:, 0] - x[:, 1]}
    network, balancer = Network(), mtljax.mgda(("a", "b"))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-2))
    init = network.init(jax.random.key(1), x, False)
    memory = {"balancer_state": balancer.init(init["params"]), "key": jax.random.key(2)}
    state = MultiTaskState.create(apply_fn=network.apply, tx=tx, **init, **memory)

    def task_losses(params, stats, key):
        collections = {"params": params, "batch_stats": stats}
        options = {"rngs": {"dropout": key}, "mutable": ["batch_stats"]}
        outputs, new = network.apply(collections, x, True, **options)
        losses = {t: ((outputs[t] - y[t]) ** 2).mean() for t in y}
        return losses, new["batch_stats"]

    labels = mtljax.label_params(init["params"], own="head_*")
    balanced = mtljax.value_and_balanced_grad
    grad_fn = balanced(task_losses, balancer, labels=labels, has_aux=True)

    def step(state, _):
        key = jax.random.fold_in(state.key, state.step)  # dropout of this step
        old = state.params, state.balancer_state, state.batch_stats
        (losses, stats), grad, new = grad_fn(*old, key)
        new = {"batch_stats": stats, "balancer_state": new}
        return state.apply_gradients(grads=grad, **new), sum(losses.values())

    _, found = jax.lax.scan(step, state, length=steps)
    return float(found[0]), float(found[-1])


if __name__ == "__main__":
    print(train())
