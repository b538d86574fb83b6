"""Runs on 8 virtual devices against one; a test starts it and reads what it prints."""

# ruff: noqa: E402 the flags come before jax
import os
import sys
import tempfile
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count=8"
if __name__ == "__main__":  # and not where doctests are collected
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import jax
import mesh_toy
import numpy as np
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtljax import training

INIT_KEY, _ = training.split_run_key(jax.random.key(0))
KEYS, ORDERS = mesh_toy.seeds_of(8)
STREAM = {"batch_size": None, "order_key": None}
SEEDS = {"order_key": ORDERS, "seeds": list(range(8))}


def compare(name, result, expected, spec=None):
    """Prints the largest relative difference of all losses, and where a leaf lies."""
    np.testing.assert_allclose(mesh_toy.losses(result), expected, rtol=1e-5)
    if spec is not None:
        leaf = result.state["params"]["w"]
        assert tuple(leaf.sharding.spec)[: len(spec)] == tuple(spec), leaf.sharding
    print("ok", name, flush=True)


def main(kind):
    run, losses = mesh_toy.run, mesh_toy.losses
    whole = losses(run())
    seeds = losses(run(state=jax.vmap(mesh_toy.init)(KEYS), **SEEDS))
    stream = losses(run(data=mesh_toy.Stream(), **STREAM))

    mesh = mesh_toy.mesh(kind)
    cut, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    parallel = {
        "state": jax.device_put(mesh_toy.init(INIT_KEY), everywhere),
        "batch_sharding": cut,
    }
    fsdp = {
        "state": mesh_toy.cut(mesh_toy.init(INIT_KEY), mesh, P("data", None)),
        "step": mesh_toy.make_step(mesh_toy.gather(mesh)),
        "batch_sharding": cut,
    }
    compare("data parallel", run(**parallel), whole)
    mixed = {**mesh_toy.init(INIT_KEY), "params": parallel["state"]["params"]}
    compare("the rest of the state on no mesh", run(state=mixed), whole)
    compare("FSDP", run(**fsdp), whole, ("data",))
    compare("FSDP, host", run(**fsdp, loop_on="host"), whole, ("data",))
    data = jax.device_put(mesh_toy.make_data(), cut)
    compare("FSDP, cut data", run(**fsdp, data=data), whole, ("data",))
    compare("stream", run(**fsdp, data=mesh_toy.Stream(), **STREAM), stream)
    many = jax.device_put(jax.vmap(mesh_toy.init)(KEYS), cut)
    compare("seeds", run(state=many, **SEEDS), seeds, ("data",))

    folder = Path(tempfile.mkdtemp())
    compare("8", run(8, **fsdp, run_dir=folder, checkpoint_every=4), whole[:2])
    compare("8 -> 1", run(12, run_dir=folder, resume=True), whole[:3])
    result = run(20, **fsdp, run_dir=folder, resume=True)
    compare("8 -> 1 -> 8", result, whole, ("data",))

    # The digest depends on neither the devices nor the axis types.
    alone = jax.device_get({**result.state, "key": None})
    assert training.tree_digest(alone) == training.tree_digest(
        {**result.state, "key": None}
    )
    # A target without shardings goes to one device.
    shapes = jax.eval_shape(lambda: mesh_toy.init(INIT_KEY))
    loaded = training.load_run(folder, shapes, "latest")
    assert loaded.step == 20
    assert training.tree_digest(loaded.state) == training.tree_digest(result.state)

    # The same bits on the same devices, resumed or not.
    for name, more in (("run", {}), ("stream", STREAM)):
        digests = []
        for stops in ([20], [7, 13, 20]):
            where = tempfile.mkdtemp()
            for i, stop in enumerate(stops):
                options = {"data": mesh_toy.Stream()} if more else {}
                last = run(stop, **fsdp, **more, **options, run_dir=where, resume=i > 0)
            digests.append((training.tree_digest(last.state), toy.comparable(where)))
        assert digests[0] == digests[1]
        print("ok resumed", name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
