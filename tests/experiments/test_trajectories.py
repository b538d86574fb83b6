"""The trajectory experiment: its data, its files, what it says and to whom."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from experiments.common import claims
from experiments.trajectories import __main__ as command
from experiments.trajectories import analysis, data, figures, model, report, train
from experiments.trajectories.config import PRESETS, Config, Scale
from mtljax.data import write_idx

SMOKE = PRESETS["smoke"][1]
FACES = ("pose", "expression", "sunglasses")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Generated miniatures in the layout of the real files; labels can be learnt."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("fashion_mnist", "mnist"):
        (folder / name).mkdir()
        for part, count in (("train", 140), ("t10k", 30)):
            label = rng.integers(10, size=count).astype(np.uint8)
            image = rng.integers(60, size=(count, 28, 28)).astype(np.uint8)
            image[np.arange(count), label] = 255
            write_idx(folder / name / f"{part}-images-idx3-ubyte.gz", image)
            write_idx(folder / name / f"{part}-labels-idx1-ubyte.gz", label)
    (folder / "cmu_faces").mkdir()
    count = 400
    arrays = {"x": rng.integers(200, size=(count, 30, 32)).astype(np.uint8)}
    arrays["person"] = (np.arange(count) % 20).astype(np.uint8)
    for name, classes in zip(FACES, (4, 4, 2), strict=True):
        arrays[name] = rng.integers(classes, size=count).astype(np.uint8)
        arrays["x"][np.arange(count), arrays[name], 0] = 255
    np.savez(folder / "cmu_faces" / "cmu_faces_q.npz", **arrays)
    return folder


def small(files, **options):
    return dataclasses.replace(SMOKE, data_dir=files, **options)


def test_the_two_halves_of_fashion_share_no_image(files):
    scale = Scale(train_size=40, val_size=20, test_size=None)
    problem = data.fashion_mtl(small(files), scale)
    names = ("fashion", "other half", "noisy labels", "mnist", "copy")
    assert problem.tasks == names
    images, labels = problem.train["image"], problem.train["label"]
    assert images.shape == (40, 5, 28, 28, 1)
    np.testing.assert_array_equal(images[:, 4], images[:, 0])
    np.testing.assert_array_equal(labels[:, 4], labels[:, 0])
    rows = [{x.tobytes() for x in images[:, k]} for k in range(2)]
    assert not rows[0] & rows[1]
    held = {x.tobytes() for x in problem.val["image"][:, 0]}
    assert not held & (rows[0] | rows[1])
    # The noisy task: the other half's images, its labels in another order.
    np.testing.assert_array_equal(images[:, 1], images[:, 2])
    assert (labels[:, 1] != labels[:, 2]).mean() > 0.5
    assert sorted(labels[:, 1]) == sorted(labels[:, 2])
    np.testing.assert_array_equal(
        problem.val["label"][:, 0], problem.val["label"][:, 2]
    )
    sets = data.task_sets(dataclasses.replace(SMOKE, sets="all"), problem)
    assert len(sets) == 8
    assert all("fashion" in tasks for tasks in sets)
    assert sets[-1] == names[:4]
    pairs = data.task_sets(dataclasses.replace(SMOKE, sets="pairs"), problem)
    assert {tasks[1] for tasks in pairs} == {"other half", "noisy labels", "copy"}


def test_no_person_is_in_two_splits_of_the_faces(files):
    with np.load(files / "cmu_faces" / "cmu_faces_q.npz") as arrays:
        person = {
            x.tobytes(): p for x, p in zip(arrays["x"], arrays["person"], strict=True)
        }
    problem = data.named(small(files), "cmu_faces", Scale(val_size=1000))
    found = [
        {int(person[x.tobytes()]) for x in split["image"]}
        for split in (problem.train, problem.val, problem.test)
    ]
    assert [len(f) for f in found] == [12, 4, 4]
    assert len(set.union(*found)) == 20


class Cifar(list):
    """As many images of each of the hundred classes; class c is in superclass c % 20.

    The pixel says which of its superclass's classes an image is of.
    """

    def __init__(self, times):
        pixel = lambda c: np.full((32, 32, 3), c // 20, np.uint8)
        row = lambda c: {"image": pixel(c), "label": c, "coarse_label": c % 20}
        super().__init__(row(c) for _ in range(times) for c in range(100))


def test_cifar_100_is_a_task_a_superclass(monkeypatch):
    sources = {"train": Cifar(3), "test": Cifar(1)}
    monkeypatch.setattr(data.data, "tfds_source", lambda name, part, **_: sources[part])
    problem = data.cifar100(SMOKE, Scale(val_size=5, train_size=None))
    assert len(problem.tasks) == 20
    assert problem.train["image"].shape == (10, 20, 32, 32, 3)
    assert problem.test["label"].shape == (5, 20)
    for split in (problem.train, problem.val, problem.test):
        np.testing.assert_array_equal(split["image"][:, :, 0, 0, 0], split["label"])
    with pytest.raises(ValueError, match="leaves a superclass without"):
        data.cifar100(SMOKE, Scale(val_size=15))


@pytest.mark.deep
def test_celeba_is_forty_attributes_on_generated_faces():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=6):
        scale = Scale(train_size=5, val_size=3, test_size=4)
        celeba = data.celeba(SMOKE, scale)
    assert len(celeba.tasks) == 40
    assert celeba.train["image"].shape == (5, 64, 64, 3)
    assert celeba.test["label"].shape == (4, 40)
    assert set(np.unique(celeba.train["label"])) <= {0, 1}
    many = data.task_sets(dataclasses.replace(SMOKE, sets="all"), celeba)
    assert len(many) <= 28
    assert many[-1] == celeba.tasks
    assert {len(tasks) for tasks in many} == {2, 4, 10, 40}


@pytest.mark.deep
def test_the_smoke_preset_writes_everything_and_resumes(files, tmp_path, capsys):
    config = small(files, out=tmp_path / "run")
    command.main(config, "the command")
    out = capsys.readouterr().out
    assert "results.jsonl" in out
    header, *lines = results(config)
    assert header["command"] == "the command"
    assert str(files) not in json.dumps(header)
    runs = [x for x in lines if "tasks" in x]
    assert len(runs) == 5 * config.seeds  # three alone, together, together by pcgrad
    assert lines[: len(runs)] == runs
    # What claims read: three tasks and factors; pcgrad with those and the loss.
    assert [x["row"] for x in lines[len(runs) :]] == [
        *(["pairs and factors"] * 9),
        *(["optimizers and factors"] * 4),
    ]
    assert lines[0]["step"] == [0, 4, 8, 12]
    assert lines[0]["sharpness"][0] is not None
    assert lines[0]["sharpness"][1] is None
    table = (config.out / "table.md").read_text()
    for part in ("Table 1", "Figure 4", "pcgrad", "`the command`", "sunglasses"):
        assert part in table
    # The numbers of the files are those of the rows.
    groups = analysis.group(runs)
    key = ("cmu_faces", ("pose",), "linear")
    np.testing.assert_allclose(
        groups[key].of("train_loss", "pose")[0],
        [row[0] for row in lines[0]["train_loss"]],
    )
    # A second time without a word about it: refused. Resumed: the same numbers.
    argv = ["-", "smoke", "--data-dir", str(files), "--out", str(config.out)]
    argv += ["--no-plots"]
    assert cli(argv) == 1
    assert "--resume" in capsys.readouterr().err
    assert cli([*argv, "--resume"]) == 0
    again = results(config)
    assert again[1:] == lines
    assert "--data-dir DIR --no-plots --resume" in again[0]["command"]


@pytest.mark.deep
def test_runs_of_a_row_are_equal_together_and_one_by_one(files, tmp_path):
    found = []
    for together in (True, False):
        config = small(files, out=tmp_path / str(together), together=together)
        scale = dataclasses.replace(config.cmu_faces, lrs=(0.01, 0.03))
        problem = data.load(config, "cmu_faces").select(("pose",))
        functions = model.make_functions(config, scale, problem)
        rows = train.run_row(
            config,
            scale,
            problem,
            functions,
            train.Row(("pose",)),
            lrs=scale.lrs,
            measured=False,
        )
        evals = [r for r in rows if r["kind"] == "eval"]
        key = lambda r: (r["lr"], r["seed"], r["step"])
        found.append({key(r): r["val_loss"] for r in evals})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 2 * len(train.TUNING_SEEDS) * 3
    for key, value in found[0].items():
        np.testing.assert_allclose(value, found[1][key], rtol=1e-4)


def results(config):
    text = (config.out / "results.jsonl").read_text()
    return [json.loads(x) for x in text.splitlines()]


def cli(argv):
    before, sys.argv = sys.argv, argv
    try:
        command.cli()
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--settings", "cmu_faces"], "pass --data-dir DIR"),
        (["--methods", "adam"], "--methods: "),
        (["--seeds", "0"], "--seeds must be a whole number from 1 to 1000, not 0"),
        (["--cmu-faces.lrs", "-1"], "--cmu-faces.lrs must be a positive number"),
        (["--cmu-faces.rho", "nan"], "--cmu-faces.rho must be a positive number"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, tmp_path, capsys):
    status = cli(["-", "smoke", "--out", str(tmp_path / "x"), *arguments])
    assert status == (1 if "--data-dir" in sentence else 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_a_rate_at_which_runs_collapse_is_not_selected():
    curves = {0.03: (0.7, 0.8), 0.09: (0.9, 0.25)}
    rows = [
        {"kind": "eval", "task": "pose", "seed": 0, "lr": lr, "step": i, "val_mean": v}
        for lr, curve in curves.items()
        for i, v in enumerate(curve)
    ]
    choice = train.choose_by_last([*rows, {"kind": "train", "step": 1}], steps=1)
    assert (choice.lr, choice.edge) == (0.03, "low")


def line(tasks, *, seed, score, sharpness, method="linear", loss=(1.0, 0.1, 0.01)):
    """Three checkpoints of a made-up run."""
    times = len(loss)
    rows = lambda value: [[value] * len(tasks) for _ in range(times)]
    return {
        "setting": "fashion_mtl",
        "tasks": list(tasks),
        "method": method,
        "seed": seed,
        "lr": 0.1,
        "lr_at_edge": False,
        "step": list(range(times)),
        "nonfinite": [0] * times,
        "measured": {"sharpness": {"rho": 0.001}, "probe_set": str(tasks)},
        "train_loss": [[x] * len(tasks) for x in loss],
        "sharpness": [None, *rows(sharpness)[1:]],
        **{name: rows(score) for name in ("train_score", "val_score", "test_score")},
        **dict.fromkeys(("covariance", "square_norm", "fisher"), rows(1.0)),
        **dict.fromkeys(("similarity", "null", "split"), rows(len(tasks) ** -0.5)),
        **dict.fromkeys(("split_low", "split_high"), rows(None)),
    }


def made_up(worst_is_flattest):
    rows = {("fashion",): (0.8, 0.5), ("fashion", "other half"): (0.85, 0.4)}
    rows["fashion", "noisy labels"] = (0.7, 0.1 if worst_is_flattest else 0.9)
    noise = lambda seed: 1e-3 * seed
    return [
        line(tasks, seed=seed, score=score + noise(seed), sharpness=sharp + noise(seed))
        for tasks, (score, sharp) in rows.items()
        for seed in range(3)
    ]


def text(lines):
    return "\n".join(report.make_table(Config(), analysis.group(lines)))


def test_figures_of_rows(tmp_path):
    groups = analysis.group(made_up(True))
    written = figures.write(Config(out=tmp_path), groups)
    assert {path.stem for path in written} == {"gap", "factors"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


@pytest.mark.parametrize("truth", [True, False])
def test_the_row_of_the_paper(truth):
    table = text(made_up(truth))
    flat = "+ noisy labels" if truth else "+ other half"
    assert f"worst generaliser is '+ noisy labels', the flattest '{flat}'" in table
    (row,) = [
        r
        for r in analysis.transfer_rows(Config(), analysis.group(made_up(truth)))
        if r.others == ("noisy labels",)
    ]
    np.testing.assert_allclose(row.deltas["score"].delta, -0.1, atol=1e-4)
    assert row.deltas["score"].significant
    # Flatter and worse: contradicts; sharper and worse: explains.
    counts = analysis.agreements([row])["sharpness"]
    assert (counts.agree, counts.disagree) == ((0, 1) if truth else (1, 0))


def test_what_cannot_be_compared_is_said():
    lines = made_up(True)
    for x in lines[3:6]:
        x["train_loss"] = [[1e-6] * 2] * 3  # never where the single task is
    table = text(lines)
    assert "other half: The loss ranges do not overlap" in table
    lines[0]["sharpness"] = [[float("nan")]] * 3
    table = text(lines)
    assert "not finite" in table
    lines = made_up(True)
    for x in lines[:3]:
        x["measured"] = {"sharpness": {"rho": 0.01}}
    with pytest.raises(ValueError, match="differ in 'rho'"):
        text(lines)


def test_presets_name_only_what_exists():
    assert set(PRESETS) == {"smoke", "cpu", "large", "gpu", "paper"}
    for _, config in PRESETS.values():
        for setting in config.settings:
            scale = config.scale(setting)
            # Checkpoints at equal steps, the last one included.
            assert scale.steps % scale.eval_every == 0, setting
    assert train.Row(("a", "b")).label == "a + b"


def test_rows_are_compared_at_one_rate():
    """Lines of two rates are two blocks; differences are those of seeds, by hand."""
    lines = made_up(True)
    others = [{**x, "lr": 0.3, "test_score": x["train_score"]} for x in lines]
    blocks = analysis.blocks([*lines, *others])
    assert list(blocks) == [0.1, 0.3]
    found = analysis.target_differences(Config(), blocks[0.1])
    alone, noisy = found["test accuracy, points"]["fashion + noisy labels - fashion"]
    np.testing.assert_allclose(noisy - alone, -10, rtol=1e-5)
    alone, noisy = found["log sharpness"]["fashion + noisy labels - fashion"]
    expected = np.log([0.1, 0.101, 0.102]) - np.log([0.5, 0.501, 0.502])
    np.testing.assert_allclose(noisy - alone, expected, rtol=1e-5)


def claims_of(lines):
    paper = claims.load_claims(claims.claims_path("trajectories"))
    found = claims.decide(paper, analysis.claim_lines(Config(), lines))
    return {d.claim.id.partition(".")[2]: d for d in found}


def test_claims_read_the_rows_of_the_target():
    """All claims of FashionMTL have evidence; values by hand; one rate counts."""
    lines = made_up(True)
    others = [{**x, "lr": 0.3, "test_score": x["train_score"][::-1]} for x in lines]
    found = claims_of([*lines, *others])
    ran = {name for name, decision in found.items() if decision.evidence}
    about = {n for n, d in found.items() if d.claim.where["setting"] == "fashion_mtl"}
    assert ran == about
    mean = lambda name: found[name].evidence.mean
    np.testing.assert_allclose(mean("noisy-worse"), 10, rtol=1e-5)
    np.testing.assert_allclose(mean("half-better"), 5, rtol=1e-5)
    np.testing.assert_allclose(mean("gap-at-loss-0.2"), 10, rtol=1e-5)
    ratio = np.log([0.5, 0.501, 0.502]) - np.log([0.1, 0.101, 0.102])
    np.testing.assert_allclose(mean("noisy-flatter"), ratio.mean(), rtol=1e-5)
    # Of two pairs and three factors, flatness explains the gain of the other half.
    assert found["no-sign"].evidence.n == 6
    np.testing.assert_allclose(mean("no-sign"), 0.75 - 1 / 6, rtol=1e-6)
    alone = claims_of(lines)
    assert {n: str(d) for n, d in alone.items()} == {
        n: str(d) for n, d in found.items()
    }


def test_an_optimiser_is_explained_by_the_signs_of_all_its_changes():
    lines = [
        {**x, "setting": "cmu_faces", "method": method}
        for method in ("linear", "mgda")
        for seed in range(3)
        for x in [line(FACES, seed=seed, score=0.5, sharpness=0.4)]
    ]
    for x in lines[3:]:  # better and flatter in all tasks; nothing else changes
        x |= {"test_score": [[0.6] * 3] * 3, "sharpness": [None, *([[0.3] * 3] * 2)]}
    explained = lambda: {
        x["factor"]: x["explains"]
        for x in analysis.claim_lines(Config(), lines)
        if x["row"] == "optimizers and factors"
    }
    wanted = {"min_loss": 0, "sharpness": 1, "covariance": 0, "fisher": 0}
    assert explained() == wanted
    assert claims_of(lines)["optimizers-unexplained"].evidence.n == 4
    for x in lines[3:]:  # one task is better and sharper
        x["sharpness"] = [None, *([[0.3, 0.3, 0.5]] * 2)]
    assert explained() == {**wanted, "sharpness": 0}


def test_conflict_is_correlated_at_equal_numbers_of_tasks():
    """Where each change is a function of the similarity, the coefficient is 1 or -1."""
    sets = [*itertools.combinations(FACES, 1), *itertools.combinations(FACES, 2), FACES]
    lines = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        for tasks in sets:
            similarity = rng.uniform(0.2, 0.9, len(tasks))
            change = similarity if len(tasks) > 1 else np.zeros(1)
            level = np.array([0.1 * FACES.index(task) for task in tasks])
            rows = lambda values: [None, *[values.tolist()] * 2]
            found = line(tasks, seed=seed, score=0.5, sharpness=1.0)
            found |= {"setting": "cmu_faces", "similarity": rows(similarity)}
            # Tasks differ in score and in sharpness, which must not matter.
            found |= {"test_score": [(0.3 + level + 0.1 * change).tolist()] * 3}
            found |= {"sharpness": rows(np.exp(10 * level - change))}
            lines.append(found)
    made = [x for x in analysis.claim_lines(Config(), lines) if x["row"] == "task sets"]
    assert [x["seed"] for x in made] == [0, 1, 2]
    for x in made:
        np.testing.assert_allclose(x["partial_spearman_score"], 1, atol=1e-3)
        np.testing.assert_allclose(x["partial_spearman_sharpness"], -1, atol=1e-3)
        # Orthogonal gradients of equal norms: the similarity is T ** -0.5 for a set.
        assert np.isnan(x["null_spearman_score"])
        np.testing.assert_allclose(x["excess_spearman_score"], 1, atol=0.05)
    found = claims_of(lines)
    names = ("conflict-raises-factors", "conflict-not-predictive")
    assert [found[name].evidence.n for name in names] == [3, 3]


def test_first_passages():
    scores = [0.1, 0.2, 0.3]
    one = line(("fashion",), seed=0, score=0, sharpness=1) | {
        "test_score": [[x] for x in scores]
    }
    (found,) = analysis.group([one]).values()
    passage = lambda level: analysis.first_passage(found, "fashion", level)
    np.testing.assert_allclose(passage(0.2), [0.2])  # losses are 1, 0.1 and 0.01
    np.testing.assert_allclose(passage(0.05), [0.3])
    assert np.isnan(passage(0.001)).all()


def test_the_gpu_preset_traces(files):
    import jax
    import jax.numpy as jnp

    gpu = dataclasses.replace(PRESETS["gpu"][1], data_dir=files)
    scale = dataclasses.replace(
        gpu.fashion_mtl, train_size=40, val_size=20, eval_size=40
    )
    whole = data.fashion_mtl(gpu, scale)
    for tasks in (("fashion",), ("fashion", "noisy labels")):
        problem, row = whole.select(tasks), train.Row(tasks)
        functions = model.make_functions(gpu, scale, problem)
        init, step = train.make_step(functions, row, careful=False)
        batch = jax.tree.map(lambda x: jnp.asarray(x[:32]), problem.train)
        ids = jnp.arange(len(tasks), dtype=jnp.uint32)

        def once(problem=problem, init=init, step=step, batch=batch, ids=ids):
            key, classes = jax.random.key(0), jnp.array(problem.classes)
            made = model.make_init(problem, model.trunk_of(gpu))
            params, stats = made(key, batch["image"][:1], ids, classes)
            return step(init(params, stats, key, jnp.float32(0.1)), batch)

        _, seen = jax.eval_shape(once)
        assert seen["losses"].shape == (len(tasks),)
