"""The accelerator benchmark: its rehearsal, and what it does with failures."""

import inspect
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import accelerator, accelerator_report
from benchmarks.accelerator import Job, Part, Results, failures, run_part

ROOT = pathlib.Path(__file__).parent.parent

# A process that follows the protocol without importing anything large.
WORKER = """
import json, sys, time

def say(**message):
    print("@" + json.dumps(message), flush=True)

print("a line that is no message")
say(about={"platform": "cpu"})
for index, job in enumerate(json.loads(sys.argv[1])["jobs"]):
    say(begin=index)
    model = job["options"]["model"]
    if job["kind"] == "hangs":
        time.sleep(60)
    if job["kind"] == "crashes":
        sys.exit("the device is lost")
    say(row={"check": "x", "model": model, "rel_error": 1e-7, "tolerance": 1e-5})
    say(end=index)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Runs jobs ``(kind, model)`` in processes and returns the results."""
    (tmp_path / "accelerator_worker.py").write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*kinds, module="accelerator_worker", seconds=20.0, limit=1.0, fresh=False):
        monkeypatch.setitem(accelerator.MODULES, "mtljax", module)
        jobs = [
            Job(kind, limit, {"model": f"m{i}", "tasks": 3})
            for i, kind in enumerate(kinds)
        ]
        results = Results(tmp_path / "found.json", {"rehearsal": True})
        part = Part("smoke", "mtljax", seconds, jobs, fresh)
        run_part(part, time.time() + seconds, env, results)
        rows = json.loads((tmp_path / "found.json").read_text())["rows"]
        assert rows == list(results.rows.values())
        return {row["model"]: row for row in rows}

    return run


@pytest.mark.parametrize("fresh", [False, True])
def test_a_failed_job_is_a_row_and_the_others_run(worker, fresh):
    rows = worker("works", "hangs", "crashes", "works", fresh=fresh)
    errors = {model: row["error"] for model, row in rows.items()}
    assert errors == {
        "m0": None,
        "m1": "time limit",
        "m2": "the device is lost",
        "m3": None,
    }
    assert {row["model"] for row in failures(rows.values())} == {"m1", "m2"}


def test_a_process_that_does_not_start_is_a_row_for_each_job(worker):
    rows = worker("works", "works", module="no_such_module_here")
    assert len(rows) == 2
    assert all("no_such_module_here" in row["error"] for row in rows.values())


def test_jobs_without_time_are_rows(worker):
    rows = worker("works", "works", seconds=-1.0)
    assert [row["error"] for row in rows.values()] == [
        "not run: no time was left",
        "not run: no time was left",
    ]


def test_rows_of_one_case_are_merged(tmp_path):
    results = Results(tmp_path / "found.json", {})
    case = {"part": "mlp", "side": "mtljax", "model": "mlp", "tasks": 3}
    results.add({**case, "compile_s": 2.0})
    results.add({**case, "ms": 5.0, "compile_s": 0.1})  # read from the cache
    results.add({**case, "tasks": 11, "ms": float("nan")})
    first, second = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert set(first) == set(accelerator.FIELDS)
    assert (first["compile_s"], first["ms"], first["error"]) == (2.0, 5.0, None)
    assert (second["ms"], second["error"]) == (None, "ms is not finite")


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        ({"rel_error": 1e-6, "tolerance": 1e-5}, False),
        ({"rel_error": 1e-4, "tolerance": 1e-5}, True),
        ({"rel_error": 1e-6, "tolerance": 1e-5, "converged": False}, True),
        ({"error": "TypeError: x"}, True),
        ({"part": "mlp", "error": "out of memory"}, False),
        ({"part": "mlp", "rel_error": 1e-2}, False),
    ],
)
def test_only_checks_can_fail(tmp_path, row, fails):
    results = Results(tmp_path / "found.json", {})
    results.add({"part": "correctness", **row})
    assert bool(failures(results.rows.values())) == fails


def test_summary():
    def row(side, method, engine, ms, **more):
        case = {"part": "mlp", "model": "mlp", "size": "s", "tasks": 3}
        names = {"side": side, "method": method, "engine": engine, "ms": ms}
        empty = dict.fromkeys(accelerator.FIELDS)
        return {**empty, **case, **names, "strategy": "vmap", "loss": 1.0, **more}

    rows = [
        row("mtljax", "linear", "losses", 1.0),
        row("mtljax", "upgrad", "stacked", 3.0),
        row("mtljax", "upgrad", "gramian", 2.0),
        row("mtljax", "upgrad", "auto", 3.0, auto="stacked, vmap"),
        row("mtljax", "upgrad", "representation", 1.5),
        row("TorchJD", "linear", "backward", 4.0, loss=1.5),
        row("TorchJD", "upgrad", "jacobian", 9.0),
        row("TorchJD", "upgrad", "gramian", 6.0),
    ]
    (cell,) = accelerator_report.summary_of(rows, [])["cells"]
    assert cell["best"] == "gramian, vmap"
    assert cell["auto"] == "stacked, vmap"
    assert cell["regret"] == rows[3]["regret"] == pytest.approx(0.5)
    assert cell["overhead"] == pytest.approx(3)
    assert cell["torchjd"] == "gramian"
    assert cell["torchjd_over_auto"] == pytest.approx(2)
    assert cell["torch_equal_over_equal"] == pytest.approx(4)
    assert cell["losses_apart"] == pytest.approx(1 / 3)


def test_the_plan_fits_into_its_budget():
    for rehearse in (False, True):
        parts = accelerator.plan(rehearse)
        ends = [part.end_s for part in parts]
        assert ends == sorted(ends)
        assert ends[-1] < accelerator.BUDGET
        warm = [accelerator.deadline(part, 560.0, 390.0) for part in parts]
        assert warm == sorted(warm)
        checks = [part.name in accelerator.CHECKED for part in parts]
        assert [end > 390 for end in warm] == [not check for check in checks]
        assert warm[-1] < 560
    assert accelerator.BUDGET <= 480


def test_a_resumed_run_repeats_the_jobs_that_lacked_time(tmp_path):
    jobs = [
        Job("engines", 9, {"model": "mlp", "tasks": 3}),
        Job("engines", 9, {"model": "scan", "tasks": 3}),
        Job("engines", 9, {"model": "scan", "tasks": 11}),  # has no row
        Job("methods", 9, {"share": [0, 4], "tasks": 3}),
        Job("methods", 9, {"share": [0, 4], "tasks": 11}),
        Job("seeds", 9, {"tasks": 3}),  # has no row
    ]
    part = Part("correctness", "mtljax", 9, jobs)
    timed = Part("mlp", "mtljax", 9, [Job("steps", 9, {"model": "mlp", "tasks": 3})])
    first = Results(tmp_path / "found.json", {"device": "a"})
    of = {"part": "correctness", "side": "mtljax", "tasks": 3}
    kept = of | {"check": "gradient", "model": "mlp", "rel_error": 1e-7}
    first.add(kept)
    first.add(of | {"check": "engines", "model": "scan", "error": "time limit"})
    first.add(of | {"check": "update", "method": "mgda", "error": "ValueError: no"})
    late = {"check": "methods", "tasks": 11, "error": "not run: no time was left"}
    first.add(of | late)
    first.add({**of, "part": "mlp", "model": "mlp", "ms": 1.0})

    second = Results(first.path, {})  # TorchJD's processes do not name the device
    left, none = second.resume([part, timed])
    assert left.jobs == [jobs[1], jobs[2], jobs[4], jobs[5]]
    assert none.jobs == []
    errors = [row["error"] for row in second.rows.values()]
    assert errors == [None, "ValueError: no", None]
    assert second.about == {"device": "a", "earlier": [{"device": "a"}]}


def test_a_run_without_a_file_cannot_be_resumed(tmp_path):
    with pytest.raises(SystemExit, match="no file to resume"):
        Results(tmp_path / "found.json", {}).resume([])


@pytest.mark.skipif(
    not (accelerator.RESULTS / "accelerator.json").exists(),
    reason="results are part of a clone only",
)
def test_the_pages_print_the_numbers_of_the_file():
    found = json.loads((accelerator.RESULTS / "accelerator.json").read_text())
    page = accelerator_report.page(found)
    assert (accelerator.RESULTS / "accelerator.md").read_text() == page
    guide = (ROOT / "docs" / "guides" / "speed.md").read_text("utf-8")
    cells = [c for c in found["summary"]["cells"] if "torchjd_over_auto" in c]
    assert len(cells) == 9
    for cell in cells:
        ours, theirs = f"{cell['auto_ms']:.3g}", f"{cell['torchjd_ms']:.3g}"
        ratio = f"{cell['torchjd_over_auto']:.1f}x"
        overhead = f"{cell['overhead']:.1f}x"
        line = f"| {cell['tasks']} | {ours} | {theirs} | {ratio} | {overhead} |"
        assert line in guide


def test_the_jobs_of_the_plan_are_accepted():
    from benchmarks import accelerator_ours, accelerator_peers

    kinds = {
        "mtljax": accelerator_ours.KINDS,
        "TorchJD": {"steps": accelerator_peers.steps},
    }
    for rehearse in (False, True):
        for part in accelerator.plan(rehearse):
            for job in part.jobs:
                function = kinds[part.side][job.kind]
                inspect.signature(function).bind(**job.options, until=0.0)
                if job.kind in ("steps", "peak"):
                    fields = {k: v for k, v in job.options.items() if k != "engine"}
                    cell = accelerator_ours.Cell(**fields)
                    assert cell.problem.size == cell.size


def test_programs_are_compiled_in_advance(tmp_path, monkeypatch):
    from benchmarks import accelerator_ours

    chosen = [accelerator_ours.Contender("linear", "losses")]
    monkeypatch.setattr(accelerator_ours, "contenders", lambda model: chosen)
    part = accelerator.warm_part(accelerator.plan(rehearse=True), 60.0)
    (job,) = part.jobs
    models = [cell["model"] for cell in job.options["cells"]]
    assert models == ["mlp", "transformer", "resnet18", "mlp"]
    cells = job.options["cells"][:2]
    # The models of the benchmark promote ranks, which the tests forbid elsewhere.
    with jax.numpy_rank_promotion("allow"):
        rows = list(accelerator_ours.warm(cells, until=time.time() + 60))
    assert {row["part"] for row in rows} == {"mlp", "transformer"}
    assert all(row["compile_s"] > 0 and row["engine"] == "losses" for row in rows)
    assert list(accelerator_ours.warm(cells, until=0.0)) == []


def test_the_smoke_part_of_the_rehearsal(tmp_path):
    command = ["-m", "benchmarks.accelerator", "--rehearse", "--only", "smoke"]
    done = subprocess.run(
        [sys.executable, *command, "--out", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.iterdir()
    assert file.name == "accelerator-rehearsal.json"
    found = json.loads(file.read_text())
    assert found["about"]["platform"] == "cpu"
    assert found["about"]["rehearsal"] is True
    assert {row["engine"] for row in found["rows"]} == {
        "losses",
        "stacked",
        "gramian",
        "auto",
    }
    for row in found["rows"]:
        assert row["error"] is None, row
        assert row["rel_error"] <= row["tolerance"] == 1e-5
    assert found["summary"]["checks"]["failed"] == []


def test_without_an_accelerator_nothing_is_replaced(tmp_path):
    kept = tmp_path / "accelerator.json"
    kept.write_text("{}")
    command = [
        "-m",
        "benchmarks.accelerator",
        "--only",
        "smoke",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1
    assert "jax finds no accelerator" in done.stderr
    assert kept.read_text() == "{}"
