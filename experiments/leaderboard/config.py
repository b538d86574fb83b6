"""Options, data sets, rows and presets of the leaderboard."""

import dataclasses
import pathlib
from typing import Literal, NamedTuple

import mtljax
from experiments.common import config as common
from experiments.common.config import Rates, Size, Widths, folder_name


class Set(NamedTuple):
    """A data set of the leaderboard.

    Attributes:
      loader: Name for :func:`mtljax.data.load`, or ``module:function``.
      group: Sets of a group are related. The report also averages over groups.
      options: Options of the loader.
      shrink: Factor by which images are averaged down.
      exclude: Tasks that are trained but not averaged, for all rows.
    """

    loader: str
    group: Literal["regression", "labels", "image", "other"]
    options: tuple[tuple[str, object], ...] = ()
    shrink: int = 1
    exclude: tuple[str, ...] = ()


def _table(subset: str, quarter: int) -> Set:
    sizes = (("val_size", quarter), ("test_size", quarter))
    return Set("mulan_mtr", "regression", (("subset", subset), *sizes))


def _labels(subset: str) -> Set:
    return Set("mulan_multilabel", "labels", (("subset", subset),))


def _sized(train: int, val: int, test: int):
    return (("train_size", train), ("val_size", val), ("test_size", test))


# In the order of their cost, so that a report of all rows on few sets exists early.
SETS: dict[str, Set] = {
    "enb": _table("enb", 192),
    "jura": _table("jura", 89),
    "adult": Set("adult", "other", _sized(10_000, 3000, 4000)),
    "digits": Set("multidigits", "image", _sized(4000, 1000, 2000)),
    # Expressions cannot be recognised from so few persons.
    "faces": Set(
        "cmu_faces", "image", (("persons", "mixed"),), shrink=2, exclude=("expression",)
    ),
    "emotions": _labels("emotions"),
    "multi_mnist": Set("multi_mnist", "image", _sized(4000, 1000, 2000), shrink=2),
    "atp1d": _table("atp1d", 84),
    "scene": _labels("scene"),
    "tox21": Set("tox21", "other", (("bits", 256),)),
    "yeast": _labels("yeast"),
    "birds": _labels("birds"),
    "oes97": _table("oes97", 83),
    "oes10": _table("oes10", 100),
    "slump": _table("slump", 25),  # 103 examples
}
CORE = tuple(SETS)[:12]
"""Twelve sets. The other three have 103 to 403 examples, and two of them describe the
same 16 occupations in two years."""
SMALL = tuple(SETS)[:9]
"""The nine cheapest sets, which have at most six tasks. Fewer sets cannot show that one
of eleven methods is better, because the smallest p of Wilcoxon's test is too large."""
LARGEST = ("adult", "digits", "multi_mnist", "scene", "tox21", "yeast", "enb")
"""The seven sets with the most examples."""

SINGLE, EQUAL, LINEAR = "single task", "equal weights", "linear"
NULL, STATIC, WIDE = "equal weights, other seeds", "static-5", "static-25"
USELESS, ORACLE = "useless", "oracle"
CONTROLS = (EQUAL, SINGLE, NULL, STATIC, WIDE)
"""Rows that are not methods. Equal weights come first, because they set the grid."""
PLANTED = (USELESS, ORACLE)
"""Rows whose place is known. They check the comparison and are not ranked."""
AUXILIARY = ("gcs", "pcd", "ol_aux")
"""Methods with a main task, which is the first one. They are listed apart."""
CLASSICS = (
    *("linear", "scale_invariant", "random_loss_weighting", "uncertainty", "dwa"),
    *("famo", "igb_v1", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl"),
)
NULL_SEED = 100
"""First seed of the initial weights and of the order of the null row."""


@dataclasses.dataclass(frozen=True)
class Config(common.Tuned):
    """Trains every balancer on every set with about as many tries."""

    sets: tuple[str, ...] = CORE
    """Names of SETS in config.py, or module:function of your own."""
    methods: tuple[str, ...] = ("all",)
    """Names of mtljax.METHODS; "all" and "classics" stand for several."""
    add: tuple[str, ...] = ()
    """Methods of your own as module:function, a function of (num_tasks, *, key) that
    returns a balancer."""
    lrs: Rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates of Adam. Validation selects one for each row."""
    steps: int = 2000
    """Updates of each run."""
    eval_every: int = 100
    """Steps between evaluations."""
    batch_size: int = 64
    """Examples per update."""
    small_batch: int = 32
    """Examples per update of a set with fewer than 256 training examples."""
    hidden: Widths = (128, 128)
    """Widths of the trunk."""
    train_size: int | None = None
    """Maximum number of training examples, or None for all."""
    seeds: int = 5
    """Seeds of each row. A seed has its split, initial weights and order of data."""
    cost_sets: tuple[str, ...] = ("scene",)
    """Sets on which the time of a step is measured, one run at a time."""
    cost_rounds: Size = 5
    """Repetitions of a measurement of time. 0 measures none."""
    jobs: int = 1
    """Processes that share the work. Each uses one thread."""
    report_only: bool = False
    """Write the report of the finished jobs and train nothing."""
    train_only: bool = False
    """Train jobs that no other process trains, and write no report. Start the command
    several times with this option to share the work by hand."""
    check_sets: bool = False
    """Only fit ridge and logistic regression to each set, and train no network. The
    exit status is 1 if they are hardly better than a constant prediction on a set."""
    recheck: Size = 0
    """Only train this number of finished cells again, chosen at random, and compare.
    The exit status is 1 if a number differs."""
    start_from: pathlib.Path | None = None
    """Folder of a report whose finished rows are not trained again."""
    report_to: pathlib.Path | None = None
    """Folder of the files of the report. The default is --out, which has the jobs."""
    out: pathlib.Path = pathlib.Path("results/leaderboard")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the methods of the registry, in the order of the registry."""
        groups = {"all": tuple(mtljax.METHODS), "classics": CLASSICS}
        names = [m for name in self.methods for m in groups.get(name, (name,))]
        return tuple(name for name in mtljax.METHODS if name in names)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of all rows that are trained, cheap and needed ones first."""
        return (*CONTROLS, USELESS, *self.chosen, *self.add)


PRESETS = {
    "smoke": (
        "A minute of one CPU core, mostly compilation: two sets, three methods.",
        Config(
            sets=("enb", "jura"),
            methods=("linear", "dwa", "pcgrad"),
            lrs=(1e-3, 1e-2),
            steps=40,
            eval_every=10,
            hidden=(16,),
            seeds=2,
            extensions=0,
            cost_sets=("enb",),
            cost_rounds=1,
            out=pathlib.Path("results/leaderboard-smoke"),
        ),
    ),
    "quick": (
        "Two to three hours of one CPU core: nine sets, twelve methods.",
        Config(
            sets=SMALL,
            methods=("classics",),
            cost_sets=("emotions",),
            out=pathlib.Path("results/leaderboard-quick"),
        ),
    ),
    "gpu": (
        "Ten minutes of one H100 (estimated, not measured): seven sets, three methods.",
        Config(
            sets=LARGEST,
            # With more methods, seven sets cannot show that any of them is better.
            methods=("scale_invariant", "mgda", "cagrad"),
            lrs=(3e-4, 1e-3, 3e-3),
            steps=1000,
            batch_size=256,
            extensions=0,
            cost_rounds=0,
            out=pathlib.Path("results/leaderboard-gpu"),
        ),
    ),
    "cpu": ("Ten hours of one CPU core: 12 sets, all methods.", Config()),
    "all": (
        "The same with all sets.",
        Config(sets=tuple(SETS), out=pathlib.Path("results/leaderboard-all")),
    ),
}


def check(config: Config) -> None:
    """Raises a :class:`ConfigError` that names the option if one is invalid."""
    common.check_common(config)
    common.check_some("sets", config.sets)
    common.check_some("methods", [*config.methods, *config.add])
    for field in ("sets", "cost_sets"):
        names = [name for name in getattr(config, field) if ":" not in name]
        common.check_names(field, names, SETS)
        common.check_distinct(field, [*map(folder_name, getattr(config, field))])
    groups = ("all", "classics")
    single = [name for name in config.methods if name not in groups]
    common.check_names("methods", single, (*groups, *mtljax.METHODS))
    for name in config.add:
        if ":" not in name:
            raise common.ConfigError(
                f"--add: {name!r} is not module:function. Methods of the library are "
                "named with --methods."
            )
    common.check_distinct("add", config.add)
    if config.steps % config.eval_every or config.steps < 2 * config.eval_every:
        raise common.ConfigError(
            f"--steps {config.steps} must be a multiple of --eval-every "
            f"{config.eval_every}, and at least twice it."
        )
    flags = ("report_only", "train_only", "check_sets", "recheck")
    chosen = [common.option(name) for name in flags if getattr(config, name)]
    if len(chosen) > 1:
        raise common.ConfigError(f"{chosen[0]} and {chosen[1]} exclude each other.")
