"""What can be set, the rows there are, and the presets."""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal, NamedTuple

from experiments.common import config as common
from experiments.common.config import (
    POSITIVE,
    ConfigError,
    Rates,
    Size,
    Widths,
)
from experiments.common.problem import check_data
from mtljax import data
from mtljax.alternating import Groups

SINGLE_TASK = "single_task"
SETS = ("digits", "faces", "camvid", "tox21", "school")
TASKS = {"digits": 21, "faces": 5, "camvid": 12, "tox21": 12, "school": 139}


class Row(NamedTuple):
    """A row of the table: how the tasks' gradients become steps.

    Either ``options`` of ``mtljax.alternating.alternate``, or a ``balancer`` of mtljax.
    ``rate`` multiplies the learning rate: "T" for the joint steps whose length matches
    that of T alternating ones.
    """

    label: str
    options: tuple[tuple[str, Any], ...] = ()
    balancer: str | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    rate: Literal["1", "T"] = "1"


def _alternating(
    label: str, optimizer: Literal["adam", "sgd"] = "adam", **options: Any
):
    return Row(label, tuple(options.items()), optimizer=optimizer)


def _groups(number: int) -> dict[str, Row]:
    return {
        f"groups_{number}:{state}": _alternating(
            f"G = {number}, {state.replace('_', ' ')}", groups=number, state=state
        )
        for state in ("slot", "shared", "per_task")
    }


_MEAN: dict[str, Any] = {"groups": Groups(1, loss="mean")}

ROWS: dict[str, Row] = {
    # Plain SGD: the second and third differ by the second-order term alone.
    "sgd:mean": _alternating("SGD, mean", "sgd", **_MEAN),
    "sgd:mean_T": Row("SGD, mean, lr x T", tuple(_MEAN.items()), None, "sgd", "T"),
    "sgd:alternating": _alternating("SGD, alternating", "sgd"),
    "mean": _alternating("mean", **_MEAN),
    "mean_T": Row("mean, lr x T", tuple(_MEAN.items()), rate="T"),
    "sum": _alternating("sum", groups=1),
    "alternating:shared": _alternating("alternating, shared state", state="shared"),
    "alternating": _alternating("alternating, per task"),
    "alternating:fixed": _alternating("alternating, fixed order", order="fixed"),
    "alternating:largest": _alternating(
        "alternating, largest loss first", order="largest_loss_first"
    ),
    "alternating:per_batch": _alternating(
        "alternating, task per batch", schedule="per_batch"
    ),
    **{name: row for g in (2, 3, 4, 6, 12, 35) for name, row in _groups(g).items()},
    "groups_4:never": _alternating(
        "G = 4, slot, fixed partition", groups=Groups(4, regroup_every="never")
    ),
    "adatask": _alternating("AdaTask", groups=1, state="per_task"),
    "uncertainty": Row("UW", balancer="uncertainty"),
    "random_loss_weighting": Row("RLW", balancer="random_loss_weighting"),
    "mgda": Row("MGDA", balancer="mgda"),
    "pcgrad": Row("PCGrad", balancer="pcgrad"),
    "cagrad": Row("CAGrad", balancer="cagrad"),
}

# The table of the question: what is steps, what is states, what is grouping.
TABLE = tuple(
    name
    for name in ROWS
    if not name.startswith(("groups_3", "groups_6", "groups_12", "groups_35"))
)
SCALED_ROWS = ("sum", "alternating:shared", "alternating", "adatask", "pcgrad")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one data set is trained on."""

    rows: tuple[str, ...] = TABLE
    """Rows of the table (ROWS in config.py), in its order; single-task comes first."""
    hidden: Widths = (64, 32)
    """Widths of the trunk that the tasks share; each has a linear head of its own."""
    steps: int = 400
    """Batches of every run."""
    batch_size: int = 32
    """Examples per batch (of every task, for school)."""
    lrs: Rates = (3e-4, 1e-3, 3e-3)
    """Learning rates of Adam; validation picks one for each row."""
    sgd_lrs: Rates = (0.01, 0.03, 0.1)
    """The same for SGD."""
    eval_every: int = 40
    """Batches between evaluations (validation picks the one that is reported)."""
    scales: Annotated[tuple[float, ...], POSITIVE._replace(once=True, empty=True)] = ()
    """Factors of the last task's loss in a study of its own; none, no study."""
    alignment: bool = False
    """Whether to study cosines under plain SGD at eta, and at eta / 4 four times as
    long."""


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Joint, alternating and grouped steps on tasks of different nature."""

    sets: tuple[str, ...] = ("faces", "school", "tox21", "camvid")
    """Data sets; digits is embedded, the others are read from --data-dir. Any set of
    mtljax.data with classes and numbers as targets, NAME/SUBSET, or module:function of
    your own is trained by the options --other.*."""

    digits: Setting = Setting()
    """Every class of either digit against the rest, and the ink: 21 tasks."""
    faces: Setting = Setting()
    """Person, pose, expression, sunglasses, and the image itself: 5 tasks."""
    camvid: Setting = Setting()
    """11 classes of pixels against the rest, and brightness: 12 dense tasks."""
    tox21: Setting = Setting()
    """12 assays, a sixth of the labels missing."""
    school: Setting = Setting()
    """Exam scores in 139 schools, every one a task with pupils of its own."""
    other: Setting = Setting(rows=("mean_T", "sum", "alternating", "groups_2:slot"))
    """Any other set."""

    log_every: int = 20
    """Batches between rows of training losses and measures of exploration."""
    probe_size: int = 128
    """Training examples on which cosines of the gradients are measured."""
    time_rounds: Size = 0
    """Rounds of timing a batch, rows taking turns; 0 leaves it out (on an idle machine
    only; benchmarks/alternating.py times the steps by themselves)."""
    out: pathlib.Path = pathlib.Path("results/alternating")
    report_only: bool = False
    """Train nothing: write the report of the rows that are finished in --out."""

    def setting(self, name: str) -> Setting:
        """That of a data set."""
        return getattr(self, option_of(name))


def option_of(name: str) -> str:
    """The option that a data set is trained by."""
    return name if name in SETS else "other"


_SCHOOL_CURVE = ("groups_4:slot", "groups_12:slot", "groups_35:slot")
_CORE = ("mean_T", "sum", "alternating:shared", "alternating")

CPU = Config(
    faces=Setting(
        lrs=(1e-3, 3e-3, 1e-2),
        sgd_lrs=(0.1, 0.3, 1.0),
        scales=(1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3),
        alignment=True,
    ),
    school=Setting(
        rows=(*_CORE, *_SCHOOL_CURVE, "adatask"),
        hidden=(32,),
        steps=400,
        batch_size=8,
        lrs=(1e-4, 3e-4, 1e-3, 3e-3),
        eval_every=50,
    ),
    tox21=Setting(
        rows=("mean_T", "sum", "alternating", "groups_2:slot", "groups_4:slot"),
        hidden=(32,),
        steps=240,
        eval_every=20,
    ),
    camvid=Setting(
        rows=("mean_T", "sum", "alternating", "groups_4:slot"),
        steps=240,
        batch_size=4,
        lrs=(1e-3, 3e-3, 1e-2),
        eval_every=60,
    ),
)

_LONG: dict[str, Any] = {
    "steps": 10_000,
    "lrs": (1e-4, 3e-4, 1e-3, 3e-3),
    "sgd_lrs": (3e-3, 0.01, 0.03, 0.1),
    "eval_every": 250,
}

PRESETS = {
    "smoke": (
        "A quarter of a minute, mostly compilation: two rows, a few batches.",
        Config(
            sets=("digits",),
            seeds=2,
            digits=Setting(
                rows=("sum", "alternating"),
                hidden=(16,),
                steps=8,
                lrs=(1e-3,),
                eval_every=4,
            ),
            log_every=2,
            probe_size=64,
            time_rounds=0,
            plots=False,
            quick_compile=True,
            out=pathlib.Path("results/alternating-smoke"),
        ),
    ),
    "cpu": ("Small networks on four data sets, 3 seeds; needs --data-dir.", CPU),
    "paper": (
        "For an accelerator: every row on every set, 5 seeds, wider, longer runs.",
        dataclasses.replace(
            CPU,
            sets=SETS,
            seeds=5,
            digits=Setting(hidden=(512, 256), batch_size=128, **_LONG),
            faces=dataclasses.replace(CPU.faces, hidden=(256, 128), **_LONG),
            camvid=Setting(hidden=(512, 256, 256), batch_size=8, **_LONG),
            tox21=Setting(
                rows=(*TABLE, "groups_3:slot", "groups_6:slot"),
                hidden=(512, 128),
                batch_size=128,
                **_LONG,
            ),
            school=Setting(
                rows=(*TABLE, "groups_12:slot", "groups_35:slot"),
                hidden=(64, 32),
                batch_size=8,
                **_LONG,
            ),
            log_every=100,
            out=pathlib.Path("results/alternating-paper"),
        ),
    ),
}


def check_groups(name: str, rows: tuple[str, ...], tasks: int) -> None:
    """Checks that no row has more groups than there are tasks.

    Raises:
      ConfigError: One sentence.
    """
    for row in rows:
        groups = dict(ROWS[row].options).get("groups", 1)
        if groups > tasks:
            raise ConfigError(
                f"--{option_of(name)}.rows {row} has {groups} groups, but {name} has "
                f"{tasks} tasks."
            )


def check(config: Config) -> None:
    """Validates the configuration before anything is read.

    Raises:
      ConfigError: One sentence that names the field.
    """
    common.check_common(config)
    common.check_some("sets", config.sets)
    check_data("sets", config.sets, (*SETS, *data.available()))
    for name in config.sets:
        setting, option = config.setting(name), option_of(name)
        common.check_some(f"{option}.rows", setting.rows)
        common.check_names(f"{option}.rows", setting.rows, ROWS)
        if name in TASKS:
            check_groups(name, setting.rows, TASKS[name])
        if name in TASKS and name != "digits" and config.data_dir is None:
            raise ConfigError(
                f"{name} is read from files: pass --data-dir DIR, or --sets digits, "
                "which needs none."
            )
        needed = [r for r in ("sgd:mean_T", "sgd:alternating") if r not in setting.rows]
        if setting.alignment and needed:
            raise ConfigError(f"--{option}.alignment needs the row {needed[0]} too.")
