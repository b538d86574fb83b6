"""One of two processes with 4 devices each; a test starts both."""

# ruff: noqa: E402 the flags come before jax
import argparse
import os
import sys
import time
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count=4"
if __name__ == "__main__":  # and not where doctests are collected
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"
    os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import jax
import mesh_toy
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtljax import training


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--kind", choices=["resident", "stream"], default="resident")
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument("--slow", type=float, default=0.0)
    args = parser.parse_args()
    jax.distributed.initialize(
        f"localhost:{args.port}", 2, args.process, heartbeat_timeout_seconds=10
    )
    mesh = mesh_toy.mesh("Auto")
    init_key, _ = training.split_run_key(jax.random.key(0))

    def place(leaf):  # FSDP: matrices are cut, the rest is replicated by fit
        if leaf.ndim != 2:
            return leaf
        host = np.asarray(leaf)
        sharding = NamedSharding(mesh, P("data", None))
        return jax.make_array_from_callback(host.shape, sharding, lambda i: host[i])

    def evaluate(state):
        time.sleep(args.slow)
        return {"sum": state["params"]["v"].sum(1)}  # cut over both processes

    stream = {"data": mesh_toy.Stream(args.process, 2), "batch_size": None}
    result = mesh_toy.run(
        args.num_steps,
        **({**stream, "order_key": None} if args.kind == "stream" else {}),
        state=jax.tree.map(place, mesh_toy.init(init_key)),
        batch_sharding=NamedSharding(mesh, P("data")),
        eval_fn=evaluate,
        eval_every=2,
        run_dir=args.folder,
        checkpoint_every=4,
        resume="auto",
    )
    print("digest", training.tree_digest(result.state))
    print("rows", [[row["step"], row.get("losses")] for row in result.rows])
    print("signal", result.signal, flush=True)
    sys.exit(result.exit_status)


if __name__ == "__main__":
    main()
