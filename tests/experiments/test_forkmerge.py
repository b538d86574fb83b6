"""The ForkMerge experiment: rows, files, resumption, and what its users are told."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.forkmerge import __main__ as command
from experiments.forkmerge import figures, problem, report, train
from experiments.forkmerge.config import LABELS, PRESETS, Config

SMOKE = PRESETS["smoke"][1]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains in the layout of the real ones: bars of ink, at a place per class."""
    root = tmp_path_factory.mktemp("data")

    def bars(count, peak):
        digits = (np.arange(count) % 10).astype(np.uint8)
        images = RNG.integers(0, peak // 4 + 1, (count, 16, 16))
        images[np.arange(count), digits + 3] = peak
        return images.astype(np.uint8), digits

    for name in ("usps", "semeion"):
        (root / name).mkdir()
    (x, y), (u, v) = bars(160, 255), bars(60, 255)
    np.savez(root / "usps" / "usps.npz", x_train=x, y_train=y, x_test=u, y_test=v)
    x, y = bars(520, 1)
    np.savez(root / "semeion" / "semeion.npz", x=x, y=y)
    return root


def small(folder, out, **options):
    options = {"plots": False, **options}
    return dataclasses.replace(SMOKE, data_dir=folder, out=out, **options)


def lines_of(config):
    text = (config.out / "results.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_the_table_part_writes_table_and_rows(folder, tmp_path, capsys):
    methods = ("stl", "forkmerge")
    config = small(folder, tmp_path / "run", parts=("table",), methods=methods)
    command.main(config, "the command")
    printed = capsys.readouterr().out
    table = (config.out / "table.md").read_text()
    for method in ("stl", "ew", "forkmerge"):
        assert f"| {LABELS[method]} |" in table
        assert LABELS[method] in printed
    assert "`the command`" in table
    about, *lines = lines_of(config)
    assert about["config"]["steps"] == config.steps
    assert len(lines) == 3 * 2 * 2 * 2  # methods, targets, seeds, columns
    assert str(folder) not in json.dumps([about, *lines]) + table
    merged = [row for row in lines if row["method"] == "forkmerge"]
    assert all(row["step"] == config.steps for row in merged)
    np.testing.assert_allclose([sum(r["weights"]) for r in merged], 1, rtol=1e-5)
    # A second time without a word about it: nothing is touched.
    with pytest.raises(SystemExit) as stopped:
        run_cli(config)
    assert stopped.value.code == 1
    assert "--resume" in capsys.readouterr().err
    # Another configuration: it is named.
    with pytest.raises(SystemExit):
        run_cli(config, "--resume", "--weight-decay", "0.5")
    assert "weight_decay: 0.0005 -> 0.5" in capsys.readouterr().err


def run_cli(config: Config, *more: str):
    arguments = ["smoke", "--out", str(config.out), "--no-plots", *more]
    if config.data_dir is not None:
        arguments += ["--data-dir", str(config.data_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["forkmerge", *arguments])
        command.cli()


@pytest.mark.deep
def test_all_parts_of_the_smoke_preset(folder, tmp_path):
    config = small(folder, tmp_path / "run", plots=True, lrs=(0.01, 0.05), extensions=1)
    command.main(config, "the command")
    table = (config.out / "table.md").read_text()
    for title in ("in turn the target", "One auxiliary", "Steps between"):
        assert title in table
    assert (config.out / "pairs.png").stat().st_size > 5000
    lines = lines_of(config)[1:]
    count = lambda **wanted: len(report.of(lines, column="last", **wanted))
    seeds = config.seeds
    assert count(part="table") == len(config.methods) * 2 * seeds
    assert count(part="pairs", method="ew") == 2 * seeds
    assert count(part="pairs", aux="all") == 0
    assert count(part="intervals", interval=12) == 2 * seeds
    # One learning rate, whatever was tried.
    assert len({row["lr"] for row in report.of(lines, part="table", method="stl")}) == 1
    # With two domains the one auxiliary is all of them.
    for method in ("ew", "forkmerge"):
        alone, both = (
            [r["test"] for r in report.of(lines, part=part, method=method)]
            for part in ("pairs", "table")
        )
        np.testing.assert_allclose(alone, both, atol=0.05)
    # All is on disk: the same again, without a step.
    before = (config.out / "results.jsonl").read_text()
    resumed = dataclasses.replace(config, resume=True)
    command.main(resumed, "the command")
    after = (config.out / "results.jsonl").read_text()
    assert before.splitlines()[1:] == after.splitlines()[1:]


def run_of(config, method):
    found = problem.make_problem(config)
    evaluate = problem.make_evaluate(found)
    return lambda config: train.Run(
        config, train.make_job(config, found, evaluate, method, config.lrs)
    )


@pytest.mark.deep
@pytest.mark.parametrize("stop", ["4", "6", "8"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_rows(folder, tmp_path, stop):
    """In a round, and between the merge that prunes and the next checkpoint."""
    options = {
        "domains": ("usps", "semeion", "optdigits"),
        "methods": ("forkmerge_each",),
        "keep": 2,
        "eval_every": 2,
        "save_every": 2,
    }
    (folder / "optdigits").mkdir(exist_ok=True)
    source = np.load(folder / "usps" / "usps.npz")
    scaled = {k: v // 16 if k[0] == "x" else v for k, v in source.items()}
    np.savez(folder / "optdigits" / "optdigits.npz", **scaled)
    whole = small(folder, tmp_path / "whole", **options)
    make = run_of(whole, "forkmerge_each")
    expected = make(whole).finish()

    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    run = make(cut)
    save = run._save

    def save_and_die(state):
        save(state)
        if train.step_of(state) == int(stop):
            raise KeyboardInterrupt

    run._save = save_and_die
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    rows = make(dataclasses.replace(cut, resume=True)).finish()
    assert rows == expected
    sizes = {len(row["weights"]) for row in rows}  # the scores determine the smaller
    assert max(sizes) == 3
    assert min(sizes) <= 2


@pytest.mark.deep
def test_every_row_learns(folder, tmp_path):
    config = small(
        folder,
        tmp_path,
        parts=("table",),
        methods=tuple(LABELS),
        steps=120,
        interval=40,
        eval_every=40,
        save_every=120,
        lrs=(0.1,),
        lambdas=(0.5, 2.0),
        seeds=1,
        plots=True,
    )
    command.main(config, "")
    rows = lines_of(config)[1:]
    assert {row["method"] for row in rows} == set(LABELS)
    for row in rows:
        assert row["test"] > 0.5, row  # chance is a tenth
    assert (config.out / "transfer.png").stat().st_size > 5000


@pytest.mark.deep
def test_domainnet_takes_the_place_of_the_digits(tmp_path, monkeypatch):
    """Its reader is tested on files of its own, see tests/data/test_domainnet.py."""
    from mtljax import data
    from mtljax.data import Dataset, Task

    def domainnet(name, *, data_dir, domain, size, val_size, train_size=None):
        assert (name, data_dir) == ("domainnet", None)

        def split(count):
            labels = RNG.integers(0, 345, count).astype(np.int32)
            images = RNG.integers(0, 99, (count, size, size, 3)).astype(np.uint8)
            return {"image": images, "label": labels}

        train, val, test = (split(n) for n in (train_size or 50, val_size, 40))
        task = Task("label", "classification", 345)
        return Dataset(domain, (task,), (size, size, 3), train, val, test)

    monkeypatch.setattr(data, "load", domainnet)
    config = dataclasses.replace(
        PRESETS["large"][1],
        domains=("real", "sketch"),
        parts=("table",),
        methods=("stl", "forkmerge"),
        out=tmp_path / "run",
        model="mlp",
        hidden=(8,),
        image_size=8,
        val_size=10,
        steps=4,
        interval=2,
        eval_every=2,
        save_every=4,
        lrs=(0.01,),
        plots=False,
    )
    command.main(config, "")
    rows = lines_of(config)[1:]
    assert {row["target"] for row in rows} == {"real", "sketch"}
    assert len(rows) == 3 * 2 * 3 * 2


def test_methods_see_the_same_data_and_start(folder, tmp_path):
    config = small(folder, tmp_path)
    found = problem.make_problem(config)
    jobs = [
        train.make_job(config, found, lambda states: {}, method, (lr,))
        for method, lr in (("stl", 0.1), ("forkmerge", 0.1), ("gcs", 0.2))
    ]
    first = jobs[0].states
    for job in jobs[1:]:
        for name in ("params", "order", "rows", "key"):
            one, other = getattr(job.states, name), getattr(first, name)
            jax.tree.map(np.testing.assert_array_equal, *map(numbers, (one, other)))
    np.testing.assert_array_equal(first.order, [[0, 1]] * 2 + [[1, 0]] * 2)
    # A training set for each seed, of examples that are there.
    rows = np.asarray(first.rows)
    np.testing.assert_array_equal(rows[:2], rows[2:])
    assert (rows[0] != rows[1]).any()
    sizes = np.asarray(found.splits["train"]["size"])
    assert (rows < sizes[:, None]).all()
    assert all(len(set(row.tolist())) == config.train_size for row in rows[0])
    assert [job.runs[0]["lr"] for job in jobs] == [0.1, 0.1, 0.2]
    sizes = [jax.tree.leaves(job.states.opt_state[-1].hyperparams)[0] for job in jobs]
    np.testing.assert_allclose([s[0] for s in sizes], [-0.1, -0.1, -0.2], rtol=1e-6)


def numbers(tree):
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def test_pairs_have_one_auxiliary_and_sweeps_their_interval(folder, tmp_path):
    config = small(folder, tmp_path, seeds=1)
    found = problem.make_problem(config)
    make = lambda **options: train.make_job(
        config, found, lambda states: {}, "forkmerge", (0.1,), **options
    )
    pairs, sweep = make(part="pairs"), make(part="intervals", interval=6)
    assert [(r["target"], r["aux"]) for r in pairs.runs] == [
        ("usps", "semeion"),
        ("semeion", "usps"),
    ]
    np.testing.assert_array_equal(pairs.driver.branch_weights[0], [[1, 0], [1, 1]])
    assert sweep.driver.interval == 6
    assert {run["interval"] for run in sweep.runs} == {6}
    assert len({pairs.name, sweep.name, make().name}) == 3


def test_controls_train_on_the_target_only(folder, tmp_path):
    """Two branches draw other batches; a step of both is the step of either alone."""
    config = small(folder, tmp_path, seeds=1)
    found = problem.make_problem(config)
    make = lambda method: train.make_job(config, found, lambda s: {}, method, (0.1,))
    splits, three = found.splits["train"], jnp.arange(3)

    def after(method):
        job = make(method)
        state = jax.jit(lambda: job.driver.init(job.states, key=jax.random.key(0)))()
        return job, job.driver.train(state, three, splits).branches

    job, twins = after("alone_x2")
    assert (np.asarray(job.states.order) == [[0, 0], [1, 1]]).all()
    _, alone = after("stl")
    kernel = lambda states: jax.tree.leaves(states.params["trunk"])[-1]
    np.testing.assert_allclose(kernel(twins)[:, 0], kernel(alone)[:, 0], rtol=1e-5)
    assert np.abs(kernel(twins)[:, 1] - kernel(twins)[:, 0]).max() > 1e-5
    heads = jax.tree.leaves(twins.params["heads"])[-1]  # [G, B, domains, ...]
    # The other domain's head only decays.
    first = jax.tree.leaves(job.states.params["heads"])[-1]
    np.testing.assert_allclose(
        heads[0, :, 1], first[0, 1][None].repeat(2, 0), rtol=1e-3
    )

    # The average: by hand, from the weights after each step.
    job = make("stl_ema")
    state = jax.jit(lambda: job.driver.init(job.states, key=jax.random.key(0)))()
    mean = np.asarray(kernel(state.branches), np.float64)
    for i in range(3):
        state = job.driver.train(state, jnp.arange(i, i + 1), splits)
        mean = 0.99 * mean + 0.01 * np.asarray(kernel(state.branches))
    averaged = jax.tree.leaves(state.branches.weighting["trunk"])[-1]
    np.testing.assert_allclose(averaged, mean, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(kernel(state.branches), kernel(alone), rtol=1e-5)

    assert make("stl_2x").steps == 2 * config.steps


def test_the_gpu_preset_traces():
    """All programs of a residual network, without running any."""
    config = dataclasses.replace(
        PRESETS["gpu"][1], domains=("a", "b"), seeds=1, train_size=60
    )
    images = lambda n: RNG.integers(0, 255, (2, n, 32, 32, 3)).astype(np.uint8)
    split = lambda n: {
        "image": jnp.asarray(images(n)),
        "label": jnp.zeros((2, n), jnp.int32),
        "size": jnp.full(2, n, jnp.int32),
        "mask": jnp.ones((2, n), bool),
    }
    found = problem.Problem(
        {name: split(60) for name in ("train", "val", "test")},
        problem.models.build(config.model, {"label": 10}),
        problem.make_optimizer(config, config.steps),
        2,
        config.batch_size,
    )
    evaluate = problem.make_evaluate(found)

    def whole(method):
        job = train.make_job(config, found, evaluate, method, config.lrs)
        state = job.driver.init(job.states, key=jax.random.key(0))
        state = job.driver.train(state, jnp.arange(2), found.splits["train"])
        if job.merges:
            state, _ = job.driver.merge(state, found.splits["val"])
        return job.evaluate(state.branches)

    for method in config.methods:
        scores = jax.eval_shape(lambda method=method: whole(method))
        assert scores["test"].shape == (2, 2 if method in train.MERGED else 1)


def row(method, step, val, test, **more):
    fixed = {"part": "table", "target": "usps", "aux": "all", "seed": 0, "lr": 0.1}
    return {**fixed, "method": method, "step": step, "val": val, "test": test, **more}


def test_what_is_reported():
    rows = [row("ew", 1, 0.9, 0.1), row("ew", 2, 0.8, 0.2), row("ew", 3, 0.9, 0.3)]
    assert [r["test"] for r in report.chosen(rows)] == [0.1]
    rows = [row("forkmerge", s, v, v, interval=4) for s, v in ((4, 0.9), (8, 0.5))]
    assert [r["test"] for r in report.chosen(rows)] == [0.5]
    # A run that diverged is nobody's choice, in whatever order.
    rows = [row("ew", 1, None, None), row("ew", 2, 0.1, 0.2), row("ew", 3, None, None)]
    assert [r["test"] for r in report.chosen(rows)] == [0.2]
    config = dataclasses.replace(SMOKE, domains=("usps",), lambdas=(0.5, 1.0), steps=2)
    rows = [row("stl", 2, 0.5, 0, csd=0.1), row("stl", 1, 0.7, 0, csd=0.1)]
    rows += [row("stl", 2, 0.9, 0, csd=0.1, lr=0.2)]  # a rate that was not taken
    rows += [
        row("lambda_grid", 2, v, 0, csd=c) | {"lambda": lam}
        for lam, v, c in ((0.5, 0.6, 0.2), (1.0, 0.4, 0.3))
    ]
    found = figures.transfer(rows, config)
    np.testing.assert_allclose(found["gain"], [[0, 0.1, -0.1]], atol=1e-6)
    np.testing.assert_allclose(found["csd"], [[0.1, 0.2, 0.3]])
    assert not found["strong"][0]
    assert found["best_lambda"][0] == 0.5


def test_the_learning_rate_is_tuned_on_validation():
    rows = [
        row("ew", step, val, 0, lr=lr, seed=seed)
        for lr, runs in {
            0.1: [(0.5, 0.8), (0.6, 0.6)],  # best steps 0.8, 0.6
            0.2: [(0.7, 0.1), (0.8, 0.2)],  # 0.7, 0.8
            0.4: [(0.99, 0.1), (None, None)],  # a seed diverged
        }.items()
        for seed, values in enumerate(runs)
        for step, val in enumerate(values)
    ]
    assert report.choose(rows).lr == 0.2
    kept = report.reported(rows)
    assert [(r["lr"], r["step"]) for r in kept] == [(0.2, 0), (0.2, 0)]


def test_gains_of_pairs_and_their_significance():
    config = dataclasses.replace(SMOKE, domains=("usps", "semeion"), seeds=4)
    domains = config.domains
    scores = np.random.default_rng(1).uniform(0.5, 0.9, (3, 4))  # usps <- semeion worse
    scores[1] = scores[0] - [0.10, 0.11, 0.12, 0.10]
    rows = []
    for seed in range(4):
        for target in domains:
            more = {"target": target, "seed": seed, "test_last": scores[0, seed]}
            rows.append(row("stl", 1, 0, 0, **more))
        for i, (target, aux) in enumerate((domains, domains[::-1]), 1):
            where = {"part": "pairs", "target": target, "aux": aux, "seed": seed}
            rows.append(row("ew", 1, 0, 0, test_last=scores[i, seed], **where))
    found = report.pair_gains(rows, config)["ew"]
    expected = 100 * (scores[1:] - scores[0]).mean(1)
    np.testing.assert_allclose([found.gains[1, 0], found.gains[0, 1]], expected, 1e-4)
    assert np.isnan(found.gains.diagonal()).all()
    reference = stats.ttest_1samp((scores[1:] - scores[0]).T, 0)[1]
    got = [found.p_values[1, 0], found.p_values[0, 1]]
    np.testing.assert_allclose(got, np.asarray(reference), rtol=1e-3)
    assert found.negative == int((expected < 0).sum())
    assert found.significant(-1) == 1
    assert found.discoveries <= found.significant(-1) + found.significant(1)
    assert "| 2 |" in report.pairs_text({"ew": found}, 4).splitlines()[2]


def test_what_predicts_the_gain_over_pairs_and_weights():
    # Spearman by hand: the ranks 2, 1, 4, 3 of 1, 2, 3, 4 give 1 - 6 * 4 / 60 = 0.6.
    gains, cosines = (0.01, 0.02, 0.03, 0.04), (0.2, -0.1, 0.9, 0.5)
    places = [(aux, lam) for aux in ("mnist", "semeion") for lam in (0.5, 1.0)]
    rows = [row("stl", 1, 0.9, 0.4), row("stl", 2, 0.1, 0.5)]
    rows += [row("stl", 2, 0.99, 0.9, lr=0.3)]  # a rate of no other run
    for (aux, lam), gain, cosine in zip(places, gains, cosines, strict=True):
        where = {"part": "analysis", "aux": aux, "lambda": lam}
        # The cosine is the mean of both evaluations, gain and discrepancy are not.
        more = {"csd": 0.9 - gain, "cosine": cosine + 1, **where}
        rows.append(row("lambda_grid", 1, 0.8, 0.4 - gain, **more))
        more = {"csd": 0.5 - 10 * gain, "cosine": cosine - 1, **where}
        rows.append(row("lambda_grid", 2, 0.1, 0.5 + gain, **more))
    points = report.transfer_points(rows)
    last = report.of(points, column="last")
    np.testing.assert_allclose([p["gain"] for p in last], [1, 2, 3, 4], atol=1e-9)
    np.testing.assert_allclose([p["cosine"] for p in last], cosines, atol=1e-12)
    chosen, at_end = report.correlations(points)
    assert (chosen["column"], at_end["column"]) == ("chosen", "last")
    np.testing.assert_allclose(at_end["spearman_cosine_gain"], 0.6)
    np.testing.assert_allclose(at_end["spearman_discrepancy_gain"], -1.0)
    np.testing.assert_allclose(chosen["spearman_cosine_gain"], -0.6)
    np.testing.assert_allclose(chosen["spearman_discrepancy_gain"], 1.0)
    # At each weight, the larger cosine belongs to the larger gain at the last step.
    for line, sign in ((at_end, 1.0), (chosen, -1.0)):
        np.testing.assert_allclose(line["spearman_cosine_gain_equal_weight"], sign)
        found = line["spearman_discrepancy_gain_equal_weight"]
        np.testing.assert_allclose(found, -sign)
    lines = list(report.result_lines(points))
    assert [line["row"] for line in lines[-2:]] == ["pairs and weights"] * 2


def test_the_cosine_of_equal_and_of_different_batches(folder, tmp_path):
    found = problem.make_problem(small(folder, tmp_path / "run", seeds=1))
    # With one example a domain, both batches are equal.
    for rows, low, high in ((jnp.zeros((2, 1), int), 0.9999, 1.0001), ((), -1, 0.99)):
        state = found.init(jax.random.key(0), jnp.array([0, 0]), rows, jnp.array(0.1))
        cosine = float(found.cosine(state, found.splits["train"]))
        assert low <= cosine <= high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mgda"], "--methods: unknown name 'mgda'. Choose from stl, "),
        (["--domains", "usps"], "must name at least a target and an auxiliary"),
        (["--domains", "usps", "usps"], "--domains must name each value once"),
        (
            ["--data", "domainnet"],
            "unknown name 'usps'. Choose from clipart",
        ),
        (["--steps", "0"], "--steps must be a whole number from 1"),
        (["--val-size", "0"], "--val-size must be a whole number from 1"),
        (["--interval", "5"], "--interval 5 must be a multiple of --eval-every 4"),
        (["--batch-size", "1"], "below the 2 domains"),
        (["--lrs", "0.1", "0.1"], "--lrs must name each value once"),
        (["--intervals", "0"], "--intervals must be a whole number from 1"),
        (["--resume", "--overwrite"], "exclude each other"),
        ([], "pass --data-dir DIR with DIR/usps/usps.npz"),
    ],
)
@pytest.mark.usefixtures("as_users")
def test_bad_input_is_one_sentence(arguments, message, tmp_path, capsys):
    config = dataclasses.replace(SMOKE, out=tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        run_cli(config, *arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == (2 if arguments else 1)
    assert printed.startswith("error: ")
    assert message in printed
    assert len(printed.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("as_users")
def test_too_few_examples_are_named(folder, tmp_path, capsys):
    config = small(folder, tmp_path / "run")
    with pytest.raises(SystemExit):
        run_cli(config, "--train-size", "100")
    printed = capsys.readouterr().err
    assert (
        "--train-size 100 is more than the 80 training examples of semeion" in printed
    )


def test_presets_are_complete():
    assert set(PRESETS) == {"smoke", "cpu", "gpu", "large"}
    from experiments.forkmerge.config import check

    for name in PRESETS:
        config = PRESETS[name][1]
        check(config)
        if name in ("cpu", "large"):
            assert set(config.methods) == set(LABELS)
        assert config.steps % config.interval == 0
