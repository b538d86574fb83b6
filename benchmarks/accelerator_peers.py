"""The process of ``benchmarks.accelerator`` that runs torch and TorchJD."""

import os
import sys
import warnings
from typing import Any

import jax
import numpy as np

from benchmarks.accelerator_ours import Cell, Row, Rows, reason, run_jobs, timed
from benchmarks.peer_models import Problem
from benchmarks.peer_steps import BASELINE, WAYS, Theirs

NAMES = {BASELINE: "linear", "UPGrad": "upgrad", "MGDA": "mgda", "IMTL-G": "imtl_g"}


def contenders(model: str) -> list[tuple[str, str]]:
    """Returns methods and ways: UPGrad with each way, others with the first way."""
    ways = WAYS if model == "mlp" else ("jacobian", "in turn", "gramian")
    found = [(BASELINE, "backward"), *(("UPGrad", way) for way in ways)]
    if model == "mlp":
        found += [(method, "jacobian") for method in ("MGDA", "IMTL-G")]
    return found


def set_precision(precision: str) -> None:
    """Selects TF32 or full float32 for products and convolutions."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def prepared(
    problem: Problem, method: str, way: str, device: str
) -> tuple[Theirs, Row]:
    """Returns a step, its first result and its memory."""
    import torch

    gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    step = Theirs(problem, method, way, device)
    losses, update = step.first_step()
    row: Row = {"loss": float(np.mean(losses))}
    row["update_norm"] = float(np.linalg.norm(update.astype(np.float64)))
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        most = torch.cuda.max_memory_allocated() - before
        row["peak_mb"] = round(most / 2**20, 3)
    return step, row


def steps(*, until: float, **options: Any) -> Rows:
    """Times TorchJD's ways to compute a step."""
    import torch

    cell = Cell(**options)
    set_precision(cell.precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = cell.problem

    def whole(contender, row):
        method, way = contender
        names = {"method": NAMES[method], "engine": way}
        return cell.row(problem, names) | row

    ready: dict[Any, Any] = {}
    for contender in contenders(cell.model):
        try:
            ready[contender], row = prepared(problem, *contender, device)
        except Exception as error:
            row = {"error": reason(error)}
        yield whole(contender, row)
    for contender, row in timed(ready, cell.seconds, until):
        yield whole(contender, row)


def main() -> None:
    warnings.filterwarnings("ignore")
    jax.config.update("jax_platforms", "cpu")  # torch uses the device
    run_jobs({"steps": steps}, sys.argv[1])
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
