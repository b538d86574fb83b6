"""Tracing a step stays cheap; see ``trace_budget.py``."""

import json
import pathlib
import subprocess
import sys

# Relative to jax.value_and_grad, but "stacked" to jax.jacrev and the update by hand.
# jax 0.10.2: 1.47, 1.18 and 3.40; jax 0.7.0: 1.77, 1.22 and 4.17.
BUDGETS = {"losses": 1.8, "stacked": 1.3, "gramian": 4.5}


def test_trace_budget():
    tests = pathlib.Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-m", "gradients.trace_budget"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tests,
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "JAX_PLATFORMS": "cpu"},
    )
    ratios = json.loads(found.stdout.splitlines()[-1])
    over = {k: v for k, v in ratios.items() if v > BUDGETS[k]}
    assert not over, ratios
