"""One process of two, with four devices each: a data-parallel step written by hand.

``python -m devices.two_processes ADDRESS RANK COUNT`` prints one JSON line with the
losses, sums over the gradient and the weights of four steps. A single process with
eight devices (``COUNT`` 1) prints the line to compare with.
"""

import json
import sys

import jax

STEPS = 4


def main() -> None:
    address, rank, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, num_processes=count, process_id=rank)

    import numpy as np
    from devices.layouts import Place
    from devices.models import TASKS, mlp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    import mtljax

    assert jax.device_count() == 8, jax.device_count()
    assert jax.process_count() == count, jax.process_count()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model, balancer = mlp(), mtljax.cagrad(TASKS)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def place(tree, sharding):
        def leaf(x):
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

        return jax.tree.map(leaf, tree)

    def run(engine):
        grad_fn = mtljax.value_and_balanced_grad(
            model.losses(Place()), balancer, labels=model.labels, engine=engine
        )

        def step(params, state, x, y):
            losses, grad, state = grad_fn(params, state, x, y)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
            sums = jax.tree.map(lambda g: (g * (1 + g)).sum(), grad)
            return params, state, (losses, state.task_weights, sums)

        jitted = jax.jit(step, out_shardings=whole)
        params = place(model.params, whole)
        state = place(balancer.init(model.params), whole)
        batch = place(model.batches["small"], split)
        found = []
        for _ in range(STEPS):
            params, state, numbers = jitted(params, state, *batch)
            leaves = jax.device_get(jax.tree.leaves(numbers))
            found.append([np.asarray(leaf).tolist() for leaf in leaves])
        return found

    report = {engine: run(engine) for engine in ("gramian", "stacked")}
    print(json.dumps({"rank": rank, "found": report}), flush=True)


if __name__ == "__main__":
    main()
