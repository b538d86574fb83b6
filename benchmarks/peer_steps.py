"""One training step of a problem, ours and TorchJD's, by one interface.

A step consists of the forward pass, the gradients, the balanced update of the trunk and
SGD on all parameters. Heads follow their own losses.

- ``Ours``: ``value_and_balanced_grad`` with its defaults, jitted.
- ``Theirs``: The ways in TorchJD's documentation. ``"jacobian"`` is ``mtl_backward``
  and ``jac_to_grad`` with all tasks in one vmapped pass. ``"lean"`` adds
  ``optimize_gramian_computation=True``, and ``"in turn"`` adds
  ``parallel_chunk_size=1``. ``"gramian"`` is ``autogram.Engine`` and one backward pass
  of the weighted losses, which also weights the heads. Equal weights are one ordinary
  backward pass.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mtljax
from benchmarks.peer_models import Problem, to_torch, torch_losses

BASELINE = "equal weights"
C = 0.4
LABELS = {"trunk": "shared", "heads": "own"}
RATE = 1e-3

OURS: dict[str, Callable[[int], Any]] = {
    BASELINE: mtljax.linear,
    "MGDA": mtljax.mgda,
    "CAGrad": lambda tasks: mtljax.cagrad(tasks, c=C),
    "Nash-MTL": mtljax.nash_mtl,
    "UPGrad": mtljax.upgrad,
    "PCGrad": lambda tasks: mtljax.pcgrad(tasks, key=jax.random.key(0)),
}
METHODS = tuple(OURS)
WAYS = ("jacobian", "lean", "in turn", "gramian")


def step_of(problem: Problem, method: str, **options: Any) -> Callable[..., Any]:
    """Builds ``(params, state, rate, batch) -> (params, state, losses)``."""
    balancer = OURS[method](problem.tasks)
    grad_fn = mtljax.value_and_balanced_grad(
        problem.task_losses, balancer, labels=LABELS, **options
    )

    def step(params, state, rate, batch):
        losses, grad, state = grad_fn(params, state, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, grad), state, losses

    return step


class Ours:
    """A compiled step and its arrays. ``seeds`` adds an axis of equal runs."""

    def __init__(self, problem: Problem, method: str, seeds: int | None = None):
        self.problem = problem
        step = step_of(problem, method)
        state = OURS[method](problem.tasks).init({})
        params, batch = problem.params, (problem.x, problem.y)
        if seeds is not None:
            step = jax.vmap(step, (0, 0, None, 0))
            params, state, batch = jax.tree.map(
                lambda x: jnp.stack([jnp.asarray(x)] * seeds), (params, state, batch)
            )
        self.start = params, state
        self.batch = jax.device_put(batch)
        self.rate = jnp.float32(RATE)
        self.reset()
        started = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
            self.params, self.state, self.rate, self.batch
        )
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - started

    def reset(self) -> None:
        """Resets to the initial parameters."""
        # Copied, because the step donates its arguments.
        self.params, self.state = jax.tree.map(
            lambda x: jnp.array(x, copy=True), self.start
        )

    def __call__(self) -> None:
        """Runs one step."""
        out = self.program(self.params, self.state, self.rate, self.batch)
        self.params, self.state, losses = jax.block_until_ready(out)
        del losses

    def first_step(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns losses and the update of the trunk, flat and in PyTorch's layout."""
        out = self.program(self.params, self.state, jnp.float32(LONG), self.batch)
        after = {k: np.asarray(v) for k, v in out[0]["trunk"].items()}
        before = self.problem.params["trunk"]
        flat = [to_torch((before[k] - after[k]) / LONG, (-1,)) for k in sorted(before)]
        losses = np.asarray(out[2])
        self.reset()
        return losses, np.concatenate(flat)

    @property
    def memory(self) -> int:
        """Temporary bytes without arguments and results, as XLA reports them."""
        analysis: Any = self.program.memory_analysis()
        return analysis.temp_size_in_bytes


# Rate of the compared step. The difference of the parameters then has all digits of the
# update, for any norm of the update.
LONG = 1e6


def theirs_of(method: str, tasks: int) -> tuple[Any, Any]:
    """Returns TorchJD's aggregator, and its weighting of a Gramian if it has one."""
    from torchjd import aggregation as peer

    if method == "Nash-MTL":  # it reads the Jacobian
        return peer.NashMTL(tasks, max_norm=0.0), None
    return {
        "MGDA": lambda: (peer.MGDA(), peer.MGDAWeighting()),
        "CAGrad": lambda: (peer.CAGrad(C), peer.CAGradWeighting(C)),
        "IMTL-G": lambda: (peer.IMTLG(), peer.IMTLGWeighting()),
        "UPGrad": lambda: (peer.UPGrad(), peer.UPGradWeighting()),
        "PCGrad": lambda: (peer.PCGrad(), peer.PCGradWeighting()),
    }[method]()


class Theirs:
    """A step of TorchJD and its arrays."""

    def __init__(
        self, problem: Problem, method: str, way: str, device: str = "cpu"
    ) -> None:
        import torch
        from torch import nn
        from torchjd.autogram import Engine

        self.problem, self.device = problem, torch.device(device)
        self.trunk = problem.module()
        width = problem.params["heads"][0]["weight"].shape
        self.heads = nn.ModuleList(nn.Linear(*width) for _ in range(problem.tasks))
        self.trunk.to(self.device)
        self.heads.to(self.device)
        x = problem.x.transpose(0, 3, 1, 2) if problem.x.ndim == 4 else problem.x
        self.x = torch.tensor(np.ascontiguousarray(x), device=self.device)
        self.y = torch.tensor(problem.y, device=self.device)
        self.named = dict(self.trunk.named_parameters())
        parameters = [*self.trunk.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.SGD(parameters, RATE)
        self.method, self.way = method, way
        self.aggregator: Any = None
        self.weighting: Any = None
        self.engine: Any = None
        if method != BASELINE:
            self.aggregator, self.weighting = theirs_of(method, problem.tasks)
            if way == "gramian":
                self.engine = Engine(self.trunk, batch_dim=None)
        self.reset()

    def reset(self) -> None:
        """Resets to the initial parameters."""
        import torch

        heads = self.problem.params["heads"]
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(torch.tensor(to_torch(self._first(name), tuple(p.shape))))
            for head, values in zip(self.heads, heads, strict=True):
                for name, p in head.named_parameters():
                    p.copy_(torch.tensor(to_torch(values[name], tuple(p.shape))))

    def _first(self, name: str) -> np.ndarray:
        return self.problem.params["trunk"][name]

    def __call__(self) -> Any:
        """Runs one step and waits for it."""
        losses = self.start()
        self.wait()
        return losses

    def start(self) -> Any:
        """Starts one step. A GPU may still be computing it at the return."""
        self.optimizer.zero_grad()
        losses = self._backward()
        self.optimizer.step()
        return losses

    def wait(self) -> None:
        """Waits for the started steps."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def _backward(self) -> Any:
        import torch
        from torchjd.autojac import jac_to_grad, mtl_backward

        features, losses = torch_losses(self.trunk, self.heads, self.x, self.y)
        stacked = torch.stack(losses)
        if self.method == BASELINE:
            stacked.sum().backward()
        elif self.engine is not None:
            weights = self.weighting(self.engine.compute_gramian(stacked))
            stacked.backward(weights)
        else:
            chunk = {"parallel_chunk_size": 1} if self.way == "in turn" else {}
            mtl_backward(losses, features=features, **chunk)
            lean = {"optimize_gramian_computation": True} if self.way == "lean" else {}
            jac_to_grad(self.trunk.parameters(), self.aggregator, **lean)
        return stacked.detach()

    def first_step(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns losses and the flat update of the trunk."""
        self.optimizer.param_groups[0]["lr"] = LONG
        losses = self().cpu().numpy()
        flat = [
            (
                to_torch(self._first(name), tuple(p.shape)) - p.detach().cpu().numpy()
            ).reshape(-1)
            / LONG
            for name, p in sorted(self.named.items())
        ]
        self.optimizer.param_groups[0]["lr"] = RATE
        self.reset()
        if hasattr(self.aggregator, "reset"):
            self.aggregator.reset()  # Nash-MTL starts from its last solution
        return losses, np.concatenate(flat)


def ways_of(method: str) -> tuple[str, ...]:
    """Returns the ways in which TorchJD can run a method."""
    if method == BASELINE:
        return ("jacobian",)
    return ("jacobian", "in turn") if method == "Nash-MTL" else WAYS


def differences(ours: Ours, theirs: Theirs) -> tuple[float, float]:
    """Returns differences of losses and of update directions on the first step."""
    (losses, update), (losses2, update2) = ours.first_step(), theirs.first_step()
    a, b = update / np.linalg.norm(update), update2 / np.linalg.norm(update2)
    apart = np.abs(losses - losses2).max() / np.abs(losses2).max()
    return float(apart), float(np.linalg.norm(a.astype(np.float64) - b))
