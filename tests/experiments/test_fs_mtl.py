"""FS-MTL's experiment: its list of runs, its tables, and that a killed run goes on."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest
import tyro

from experiments.common import claims
from experiments.fs_mtl import __main__ as command
from experiments.fs_mtl import figures, paper, report, train
from experiments.fs_mtl.config import PRESETS, Config, Entry, entries
from experiments.fs_mtl.problem import load, make_problem, shrink
from mtljax import training

SMOKE = PRESETS["smoke"][1]
CPU = PRESETS["cpu"][1]

# --- the list of runs ---------------------------------------------------------------


def test_the_lines_of_the_paper_are_all_there():
    labels = [entry.label for entry in entries(PRESETS["paper"][1])]
    for base in ("MGDA", "PCGrad", "CAGrad", "IMTL-G", "Nash-MTL", "FairGrad"):
        for line in (base, f"F-{base}", f"direct {base}", f"SAMO-{base}"):
            assert labels.count(line) == 1, line
    for line in ("LS", "F-LS", "RLW+SAM", "second-aggre CAGrad", "each-aggre CAGrad"):
        assert labels.count(line) == 1, line
    for line in ("STL", "F-STL"):
        assert labels.count(line) == 2  # a run for each task
    assert [e.label for e in entries(CPU)] == [
        *("LS", "F-LS", "CAGrad", "F-CAGrad", "RLW+SAM")
    ]


@pytest.mark.parametrize(
    ("entry", "passes"),
    [
        (Entry("linear", "plain"), 1),
        (Entry("linear", "split"), 4),
        (Entry("cagrad", "plain"), 2),
        (Entry("cagrad", "split"), 4),
        (Entry("cagrad", "each"), 4),
        (Entry("cagrad", "samo"), 3),
        (Entry("single_task", "plain", 0), 1),
        (Entry("single_task", "split", 1), 2),
    ],
)
def test_backward_passes(entry, passes):
    assert entry.backward_passes == passes


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("cagrd",)}, "--methods: unknown name 'cagrd'. Choose from mgda"),
        (
            {"ablations": ("mgda",)},
            "unknown name 'mgda'. Choose from imtl_g",
        ),
        ({"controls": ("stl",)}, "--controls: unknown name 'stl'. Choose from"),
        ({"methods": (), "controls": (), "ablations": ()}, "Nothing to run"),
        ({"epochs": 0}, "--epochs must be a whole number from 1"),
        ({"rhos": (-1.0,)}, "--rhos must be a positive number, not -1"),
        ({"lr": 0.0}, "--lr must be a positive number, not 0"),
        ({"report_only": True, "overwrite": True}, "exclude each other"),
        ({"shrink": 9}, "--shrink 9 is too large for 12x12"),
        ({"batch_size": 10_000}, "--batch-size 10000 is more than the 256"),
    ],
)
def test_bad_input_is_one_sentence(options, message, tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fs_mtl", "smoke"])
        patch.setattr(tyro.extras, "overridable_config_cli", lambda *a, **k: config)
        with pytest.raises(SystemExit) as stopped:
            command.cli()
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in printed
    assert len(printed.strip().splitlines()) == 1


def test_images_shrink_by_means():
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4, 1)
    got = shrink(images, 2)
    assert got.shape == (2, 2, 2, 1)
    assert got.dtype == np.uint8
    assert got[0, 0, 0, 0] == np.rint((0 + 1 + 4 + 5) / 4)
    assert shrink(images, 1) is images


def test_the_problem_has_the_two_classifications_and_their_heads():
    splits = load(SMOKE, "multidigits")
    assert [task.name for task in splits.tasks] == ["left", "right"]
    both, one = make_problem(SMOKE, splits), make_problem(SMOKE, splits, 1)
    assert both.names == ("left", "right")
    assert one.names == ("right",)
    assert set(one.train) == {"image", "right"}


# --- tables from rows ---------------------------------------------------------------


def eval_rows(values, *, step=4, tasks=("left", "right"), **more):
    """Two evaluations of every seed; validation prefers the first."""
    rows = []
    for seed, accuracy in enumerate(values):
        for at, (val, shift) in enumerate([(0.9, 0.0), (0.1, 0.05)], 1):
            row = {"kind": "eval", "seed": seed, "step": at * step, "val_score": val}
            for name in tasks:
                row[f"test_{name}_acc"] = accuracy + shift
                row |= {f"test_{name}_{m}": 0.1 for m in ("ece", "brier", "entropy")}
            row |= {"test_score": accuracy + shift, "seconds": 10.0 * at}
            rows.append(row | more)
            rows.append(
                {
                    "kind": "train",
                    "seed": seed,
                    "step": at * step,
                    "seconds": 10.0 * at - 6,
                }
            )
    return rows


def synthetic():
    rows = {
        Entry("single_task", "plain", 0): eval_rows([0.80, 0.82], tasks=["left"]),
        Entry("single_task", "plain", 1): eval_rows([0.60, 0.62], tasks=["right"]),
        Entry("linear", "plain"): eval_rows([0.70, 0.72]),
        Entry("linear", "split"): eval_rows([0.73, 0.74], probe_inter_loss=0.25),
        Entry("cagrad", "plain"): eval_rows([0.69, 0.71]),
        Entry("cagrad", "split"): eval_rows([0.74, 0.75]),
        Entry("cagrad", "direct"): eval_rows([0.74, 0.73]),
    }
    for entry, found in rows.items():
        for row in found:
            if row["kind"] == "eval" and entry.method != "single_task":
                row |= {f"probe_{n}": 0.5 for n in ("inter_flat", "intra")}
                row.setdefault("probe_inter_loss", 0.5)
    return report.Runs("multi_mnist", ("left", "right"), rows, {}, 4)


def test_validation_picks_the_epoch_and_single_tasks_make_one_line():
    runs = synthetic()
    found = report.table_rows(runs)
    assert list(found) == ["STL", "LS", "F-LS", "CAGrad", "F-CAGrad", "direct CAGrad"]
    np.testing.assert_allclose(found["STL"]["left"], [80, 82])
    np.testing.assert_allclose(found["STL"]["average"], [70, 72])
    np.testing.assert_allclose(found["STL"]["last epoch"], [75, 77])
    assert found["STL"]["backward passes"] == 2
    np.testing.assert_allclose(found["F-LS"]["inter-loss"], [25, 25])


def test_the_cautions_are_answered_by_paired_differences():
    config = dataclasses.replace(CPU, methods=("cagrad",))
    one, two = (f(config, synthetic()) for f in (report.caution_1, report.caution_2))
    # Seeds: split - direct 0.0 and 2.0 points.
    assert "| CAGrad | 1.00 ± 1.41 | 3.50 ± 2.12 | 4.50 ± 0.71 | +0.72 |" in one
    assert "(n = 2; 1 positive)" in one
    assert "| F-LS - LS | 2.50 ± 0.71 |" in two
    assert "| F-CAGrad - F-LS | 1.00 ± 0.00 |" in two
    assert "F-STL" not in two


def test_beside_the_paper():
    text = report.beside_paper(synthetic())
    assert "| F-CAGrad | 74.50 ± 0.71 | 4.50 ± 0.71 | 95.95 ± 0.01 | +0.94 |" in text
    assert "| F-LS | 73.50 ± 0.71 | 2.50 ± 0.71 | 95.67 | +0.79 |" in text


def test_published_numbers_are_consistent():
    """Averages are those of the tasks: to rounding, but to 0.05 in the logs."""
    tables = json.loads(
        pathlib.Path(paper.__file__).with_name("paper.json").read_text(encoding="utf-8")
    )
    assert len(tables["table_1"]) == 13
    for kind, table in tables.items():
        tolerance = 0.051 if kind == "logs" else 0.011
        for label, cells in table.items():
            for name, (one, two, average, _) in cells.items():
                if one is not None:
                    assert abs((one + two) / 2 - average) < tolerance, (label, name)
    assert paper.published("multi_mnist", "nothing") is None


def test_figures_of_rows(tmp_path):
    runs = synthetic()
    config = dataclasses.replace(PRESETS["large"][1], out=tmp_path)
    written = figures.write(config, runs)
    names = {path.stem for path in written}
    assert names == {
        *("accuracy_over_cost", "accuracy_over_epochs", "conflict_inter_loss")
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    _, path = report.write(config, runs, "the command", "notes")
    table = path.read_text()
    assert "Not finished: " in table
    assert "`the command`" in table


# --- runs ---------------------------------------------------------------------------


def results(out):
    text = (out / "multidigits" / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_claims_read_lines_of_the_presets():
    """Every label of a claim is a line of its preset, at a length that it runs."""
    for name in ("cpu", "large", "conflict"):
        config = PRESETS[name][1]
        known = {
            one.label
            for entry in entries(config)
            for one in report.at_lengths(config, entry, [], 1)
        }
        paper = claims.load_claims(claims.claims_path("fs_mtl"))
        for claim in paper.entries:
            if config.study == claim.where.get("study", ""):
                assert {*claim.row, *claim.against} <= known, claim.id
    assert {c.scope for c in paper.entries if "study" not in c.where} == {
        "MultiMNIST, ResNet of 4 narrow blocks, "
        f"{CPU.train_size:,} canvases, {CPU.seeds} seeds"
    }


def test_claims_compare_equal_backward_passes():
    """The two lines of the claim at equal passes cost the same."""
    config, passes = PRESETS["cpu"][1], {}
    for entry in entries(config):
        lengths = report.at_lengths(config, entry, [], 1)
        for times, one in zip((1, 2, 4), lengths, strict=False):
            passes[one.label] = times * entry.backward_passes
    paper = claims.load_claims(claims.claims_path("fs_mtl"))
    (claim,) = (c for c in paper.entries if c.id == "fs_mtl.sam-helps-equal-passes")
    for one, two in zip(claim.row, claim.against, strict=True):
        assert passes[one] == passes[two] == 4


@pytest.mark.deep
def test_smoke_is_resumed_and_reported(tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path)
    command.main(config, "the command")
    head, *lines = results(tmp_path)
    assert len(lines) == 2 * 2 * 2  # lines, seeds, columns
    assert all(np.isfinite(line["test_score"]) for line in lines)
    assert {"plain_intra_conflict", "conflict_share", "test_ece"} <= set(lines[0])
    printed = capsys.readouterr().out
    assert "[2/2] F-IMTL-G: test accuracy" in printed
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.jsonl")}
    # Resumed: what is finished is read, not run.
    config = dataclasses.replace(config, resume=True)
    command.main(config, "the command")
    again, *rows = results(tmp_path)
    assert rows == lines
    times = ("started", "wall_s")  # of the process and of the file
    assert {**again, **dict.fromkeys(times)} == {**head, **dict.fromkeys(times)}
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.jsonl")}
    # A longer run goes on from where the short one ended.
    longer = dataclasses.replace(config, epochs=3, variants=("split",))
    command.main(longer, "")
    folder = tmp_path / "multidigits" / "runs" / "imtl_g-split-rho_0.1"
    header, rows = training.read_jsonl(folder)
    assert [s["from_step"] for s in header["sessions"]] == [0, 8]
    assert max(row["step"] for row in rows) == 12
    # The report of what is there; the plain run is shorter, so it is left out.
    both = dataclasses.replace(longer, variants=SMOKE.variants, report_only=True)
    both = dataclasses.replace(both, resume=False)
    command.main(both, "")
    table = (tmp_path / "multidigits" / "table.md").read_text()
    assert "Not finished: IMTL-G." in table


@pytest.mark.deep
def test_seeds_apart_are_seeds_together(tmp_path):
    """To rounding: vmap computes the same in another order."""
    config = dataclasses.replace(SMOKE, variants=("split",))
    found = []
    for together in (True, False):
        out = tmp_path / str(together)
        command.main(dataclasses.replace(config, out=out, together=together), "")
        lines = (out / "multidigits" / "results.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines[1:]])
    folder = tmp_path / "False" / "multidigits" / "runs" / "imtl_g-split-rho_0.1"
    assert [path.name for path in sorted(folder.iterdir())] == ["seed_0", "seed_1"]
    for one, other in zip(*found, strict=True):
        assert one["seed"] == other["seed"]
        assert abs(one["test_score"] - other["test_score"]) <= 2 / 128


@pytest.mark.deep
@pytest.mark.parametrize("variant", ["plain", "split", "direct", "samo", "each"])
def test_every_variant_learns(variant):
    config = dataclasses.replace(
        SMOKE, train_size=2000, hidden=(64,), epochs=6, lr=3e-3, seeds=1
    )
    splits = load(config, "multidigits")
    problem = make_problem(config, splits)
    entry = Entry("cagrad", variant)
    score = train.make_score(problem)
    program = train.make_program(config, problem, entry, None, score)
    state, order = train.initial_state(program, [0])
    result = training.fit(
        state,
        program.step,
        problem.train,
        num_steps=6 * train.steps_per_epoch(config, problem),
        batch_size=config.batch_size,
        order_key=order,
        seeds=[0],
        evaluation=training.Evaluation(program.evaluate),
        logging=training.Logging(progress=False),
    )
    assert result.rows[-1]["test_score"] > 0.3  # chance is 0.1


def test_all_entries_of_a_seed_start_alike():
    config = dataclasses.replace(SMOKE, seeds=2)
    splits = load(config, "multidigits")
    problem = make_problem(config, splits)
    states = []
    for entry in (Entry("linear", "plain"), Entry("pcgrad", "samo")):
        program = train.make_program(config, problem, entry, None, lambda *a: {})
        states.append(train.initial_state(program, [0, 1]))
    for one, two in zip(*(jax.tree.leaves(s[0].params) for s in states), strict=True):
        np.testing.assert_array_equal(one, two)
    assert (states[0][1] == states[1][1]).all()
    kernel = jax.tree.leaves(states[0][0].params)[-1]
    assert np.abs(kernel[0] - kernel[1]).max() > 0


def test_radii_and_lengths_are_chosen_and_cut():
    """The better radius by validation; a plain line is cut at each length."""
    rows = lambda values: [
        {"kind": "eval", "seed": 0, "step": step, "val_score": v, "test_score": 0}
        for step, v in enumerate(values, 1)
    ]
    flat = Entry("linear", "split")
    tried = {flat._replace(rho=0.5): rows([0.6]), flat._replace(rho=2.0): rows([0.7])}
    choice, best = report.choose_radius(tried)
    assert choice.lr == 2.0
    assert best[0]["val_score"] == 0.7
    assert best[0]["edge"] == "high"
    config = dataclasses.replace(SMOKE, epochs=2, equal_passes=True)
    plain = Entry("linear", "plain")
    found = report.at_lengths(config, plain, rows(np.arange(16) / 16), 2)
    assert {e.label: len(r) for e, r in found.items()} == {
        "LS": 4,
        "LS, 2x epochs": 8,
        "LS, 4x epochs": 16,
    }
    assert train.epochs_of(config, plain) == 8
    assert train.epochs_of(config, flat) == 2
    # A balancer and a single task have half of the passes of their F-lines.
    assert Entry("cagrad", "plain").lengths(config) == (1, 2)
    assert Entry("single_task", "plain", 0).lengths(config) == (1, 2)
    equal_epochs = dataclasses.replace(config, equal_passes=False)
    assert plain.lengths(equal_epochs) == (1,)
    chosen = command.with_radii(config, Entry("linear", "direct"), {"linear": 2.0})
    assert [entry.rho for entry in chosen] == [2.0]
    random = Entry("random_loss_weighting", "split")
    assert [e.rho for e in command.with_radii(config, random, {"linear": 2.0})] == [2.0]
    assert len(command.with_radii(config, random, {})) == len(config.rhos)
    study, table = (report.result_lines(synthetic(), x)[0] for x in ("conflict", ""))
    assert study["study"] == "conflict"
    assert "study" not in table


def test_differences_at_equal_epochs_and_passes():
    runs = synthetic()
    runs.rows[Entry("linear", "plain4")] = eval_rows([0.72, 0.75])
    runs.rows[Entry("cagrad", "plain2")] = eval_rows([0.75, 0.75])
    text = "\n".join(report.comparisons(runs))
    # F-LS - LS: 3 and 2 points; F-CAGrad - CAGrad: 5 and 4; the mean 4 and 3.
    assert "| F-X - X, mean | +3.50 |" in text
    # At equal passes: 1 and -1 points, -1 and 0 points; the mean 0 and -0.5.
    assert "| F-X - X at equal passes, mean | -0.25 |" in text
    assert "| F-CAGrad - direct CAGrad | +1.00 |" in text


def test_the_gpu_preset_traces():
    """A residual network on images of its size; no canvases are needed."""
    gpu = dataclasses.replace(PRESETS["gpu"][1], sets=("multidigits",))
    small = dataclasses.replace(
        gpu, train_size=64, val_size=32, test_size=32, batch_size=32
    )
    problem = make_problem(small, load(small, "multidigits"))
    batch = {k: v[:32] for k, v in problem.train.items()}
    for entry in entries(gpu):
        program = train.make_program(small, problem, entry, None, lambda *a: {})

        def once(program=program):
            return program.step(program.init(jax.random.key(0)), batch)

        _, seen = jax.eval_shape(once)
        assert seen["losses"].shape == (2,)


def test_presets_are_configurations():
    for text, config in PRESETS.values():
        assert isinstance(config, Config)
        assert text.endswith(".")
