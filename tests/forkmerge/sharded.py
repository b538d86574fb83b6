"""Run by test_sharding in a process with eight devices: prints what it measured."""

import json

import jax
import numpy as np
from forkmerge.problem import ADAM, VALIDATION, batches, initial, make_step, score

from mtljax import forkmerge


def largest_difference(a, b):
    return max(
        float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def main():
    assert len(jax.devices()) == 8
    nu = forkmerge.custom(np.random.default_rng(0).uniform(0.1, 1, (8, 3)))
    mesh = forkmerge.branch_mesh(8)
    state = initial(ADAM)

    def run(strategy, mesh=None, count=8):
        branches = forkmerge.fork(state, count, mesh=mesh)
        return jax.jit(
            lambda b: forkmerge.train_branches(
                make_step(ADAM),
                b,
                nu[:count],
                batches(),
                strategy=strategy,
                mesh=mesh,
            )
        )(branches)

    results = {"vmap": run("vmap"), "map": run("map"), "shard": run("shard", mesh)}
    sharding = results["shard"][0].params["trunk"]["w"].sharding
    pairs = [("vmap", "map"), ("vmap", "shard"), ("map", "shard")]
    # Two branches on each of four devices.
    quarter = run("auto", forkmerge.branch_mesh(4))
    found = {
        name: forkmerge.search_merge(result[0], score, VALIDATION)
        for name, result in results.items()
        if name != "map"
    }
    text = (
        jax.jit(
            lambda b: forkmerge.train_branches(
                make_step(ADAM), b, nu, batches(), mesh=mesh
            )
        )
        .lower(forkmerge.fork(state, 8, mesh=mesh))
        .compile()
        .as_text()
    )
    driver = forkmerge.ForkMerge(
        make_step(ADAM),
        score,
        nu,
        interval=3,
        training=forkmerge.BranchTraining(mesh=mesh),
        policies={"opt_state": "keep"},
    )
    plain = forkmerge.ForkMerge(
        make_step(ADAM), score, nu, interval=3, policies={"opt_state": "keep"}
    )
    take = lambda step, n: jax.tree.map(lambda x: x[step : step + n], batches())
    runs = [
        d.result(d.run(d.init(state), take, 6, validation=VALIDATION)).params
        for d in (driver, plain)
    ]
    print(
        json.dumps(
            {
                "devices": len(sharding.device_set),
                "differences": [
                    largest_difference(results[a], results[b]) for a, b in pairs
                ],
                "quarter": largest_difference(quarter, results["vmap"]),
                "merged": largest_difference(
                    found["shard"].state.params, found["vmap"].state.params
                ),
                "weights": largest_difference(
                    found["shard"].weights, found["vmap"].weights
                ),
                "collectives": sum(
                    text.count(f" {name}(") + text.count(f" {name}-start(")
                    for name in (
                        "all-reduce",
                        "all-gather",
                        "all-to-all",
                        "collective-permute",
                    )
                ),
                "driver": largest_difference(*runs),
            }
        )
    )


if __name__ == "__main__":
    main()
