"""Two processes on one machine have the numbers of one."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
from devices.harness import ROOT, environment

SECONDS = 120
# What jaxlib says if it was built without gloo.
MISSING = ("gloo", "make_gloo_tcp_collectives")


def start(address, rank, count):
    command = [sys.executable, "-m", "devices.two_processes", address]
    return subprocess.Popen(
        [*command, str(rank), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(8 // count),
        cwd=ROOT,
    )


def finish(processes):
    """What every process printed; none is left behind."""
    try:
        ends = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    reports = []
    for process, (out, err) in zip(processes, ends, strict=True):
        if process.returncode != 0:
            if any(word in err.splitlines()[-1] for word in MISSING):
                pytest.skip("jaxlib has no gloo collectives for the CPU")
            pytest.fail(err[-3000:], pytrace=False)
        reports.append(json.loads(out.splitlines()[-1])["found"])
    return reports


@pytest.mark.deep
def test_a_data_parallel_step_in_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    (alone,) = finish([start(address, 0, 1)])
    first, second = finish([start(address, rank, 2) for rank in range(2)])
    assert first == second  # the same bits on both
    for engine, steps in alone.items():
        for step, (got, want) in enumerate(zip(first[engine], steps, strict=True)):
            for pair in zip(got, want, strict=True):
                have, expected = (np.asarray(leaf) for leaf in pair)
                atol = 1e-5 * np.abs(expected).max()
                np.testing.assert_allclose(
                    have, expected, rtol=1e-5, atol=atol, err_msg=f"{engine} {step}"
                )
