"""Options, table rows and presets of the alternating experiment."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

from experiments.common import config as common
from experiments.common.problem import check_data
from mtljax import data

SINGLE_TASK = "single_task"
SETS = ("digits", "faces", "camvid", "tox21", "school")
TASKS = {"digits": 21, "faces": 5, "camvid": 12, "tox21": 12, "school": 139}


class Row(NamedTuple):
    """A row of the table: ``options`` of ``mtljax.alternating.alternate`` with Adam.

    With a ``balancer``, a name in ``mtljax.METHODS``, the row is a joint step instead.
    """

    label: str
    options: Mapping[str, Any] = {}
    balancer: str | None = None

    @property
    def groups(self) -> int:
        """Groups that a set must have tasks for."""
        return self.options.get("groups", 1)


ROWS: dict[str, Row] = {
    # Adam divides by the size of gradients: the mean of the losses is the same row.
    "joint": Row("joint", {"groups": 1}),
    "alternating": Row("alternating, states per task"),
    "alternating:shared": Row("alternating, shared state", {"state": "shared"}),
    "adatask": Row("AdaTask", {"groups": 1, "state": "per_task"}),
    **{
        f"groups_{g}": Row(f"G = {g}, slot", {"groups": g, "state": "slot"})
        for g in (2, 3, 4, 6, 12, 35)
    },
    "uncertainty": Row("UW", balancer="uncertainty"),
    "pcgrad": Row("PCGrad", balancer="pcgrad"),
    "cagrad": Row("CAGrad", balancer="cagrad"),
}
_ALTERNATING = ("joint", "alternating", "alternating:shared")
TABLE = (*_ALTERNATING, "adatask", "groups_2", "groups_4")
_BALANCERS = ("uncertainty", "pcgrad", "cagrad")
SCALES = common.POSITIVE._replace(once=True, empty=True)
SCALED_ROWS = ("joint", "alternating", "alternating:shared", "adatask")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the networks of one data set are trained."""

    rows: tuple[str, ...] = TABLE
    """Rows of the table, in this order (ROWS in config.py). The single-task rows come
    first."""
    hidden: common.Widths = (64, 32)
    """Widths of the shared trunk. Each task has its own linear head."""
    steps: int = 400
    """Number of batches of each run."""
    batch_size: int = 32
    """Examples per batch (per task for school)."""
    lrs: common.Rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates of Adam. Validation selects one for each row."""
    eval_every: int = 40
    """Batches between evaluations."""
    seeds: int | None = None
    """Seeds of this set; --seeds unless given."""
    scales: Annotated[tuple[float, ...], SCALES] = ()
    """Factors of the last task's loss in a separate study. If empty, the study is
    skipped."""


@dataclasses.dataclass(frozen=True)
class Config(common.Tuned):
    """Joint, alternating and grouped steps on tasks of different kinds."""

    sets: tuple[str, ...] = ("tox21", "faces", "school", "camvid")
    """Data sets. digits is embedded, the others are read from --data-dir. The options
    --other.* apply to any data set of mtljax.data with class or number targets, to
    NAME/SUBSET, and to your own module:function."""

    digits: Setting = Setting()
    """Each class of both digits against the rest, and the ink: 21 tasks."""
    faces: Setting = Setting()
    """Person, pose, expression, sunglasses, and the image itself: 5 tasks; a split for
    every seed."""
    camvid: Setting = Setting()
    """11 pixel classes, each against the rest, and brightness: 12 dense tasks."""
    tox21: Setting = Setting()
    """12 assays. One sixth of the labels are missing."""
    school: Setting = Setting()
    """Exam scores in 139 schools, every one a task with pupils of its own; a split for
    every seed."""
    other: Setting = Setting(rows=("joint", "alternating", "groups_2"))
    """Any other data set."""

    log_every: int = 20
    """Batches between rows of training losses and exploration measures."""
    out: pathlib.Path = pathlib.Path("results/alternating")
    report_only: bool = False
    """Do not train. Write the report of the rows that are finished in --out."""

    def setting(self, name: str) -> Setting:
        """Returns the setting of a data set."""
        return getattr(self, option_of(name))

    def seeds_of(self, name: str) -> range:
        """The seeds of a data set."""
        count = self.setting(name).seeds or self.seeds
        return range(self.first_seed, self.first_seed + count)


def option_of(name: str) -> str:
    """Returns the option that configures a data set."""
    return name if name in SETS else "other"


_SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)

CPU = Config(
    seeds=5,
    tox21=Setting(hidden=(32,), steps=1000, eval_every=50, seeds=10),
    faces=Setting(
        rows=(*TABLE, *_BALANCERS), steps=1500, eval_every=75, scales=_SCALES
    ),
    school=Setting(
        rows=(*_ALTERNATING, "groups_4", "groups_12", *_BALANCERS),
        hidden=(32,),
        steps=300,
        batch_size=8,
        eval_every=20,
    ),
    camvid=Setting(
        rows=(*_ALTERNATING, "groups_2", "groups_4", *_BALANCERS),
        steps=1000,
        batch_size=4,
        eval_every=50,
    ),
)

LARGE = dataclasses.replace(
    CPU,
    tox21=dataclasses.replace(CPU.tox21, steps=2000, eval_every=100),
    faces=dataclasses.replace(CPU.faces, steps=2000, eval_every=100),
    school=dataclasses.replace(
        CPU.school,
        rows=(*_ALTERNATING, "adatask", "groups_4", "groups_12", "groups_35"),
        steps=1500,
        eval_every=75,
    ),
    camvid=dataclasses.replace(CPU.camvid, rows=TABLE, steps=2000, eval_every=100),
    out=pathlib.Path("results/alternating-large"),
)

PRESETS = {
    "smoke": (
        "About 15 seconds, mostly compilation: two rows, a few batches.",
        Config(
            sets=("digits",),
            seeds=2,
            digits=Setting(
                rows=("joint", "alternating"),
                hidden=(16,),
                steps=8,
                lrs=(1e-3,),
                eval_every=4,
            ),
            log_every=2,
            plots=False,
            quick_compile=True,
            out=pathlib.Path("results/alternating-smoke"),
        ),
    ),
    "cpu": (
        "About an hour of one CPU core: four sets, 5 seeds (tox21: 10).",
        CPU,
    ),
    "large": ("Longer runs and more groups: some hours of one CPU core.", LARGE),
    "gpu": (
        "One GPU: wide networks and large batches on camvid and tox21.",
        dataclasses.replace(
            LARGE,
            sets=("camvid", "tox21"),
            camvid=dataclasses.replace(
                LARGE.camvid, hidden=(512, 256, 256), batch_size=16
            ),
            tox21=dataclasses.replace(LARGE.tox21, hidden=(512, 128), batch_size=128),
            out=pathlib.Path("results/alternating-gpu"),
        ),
    ),
}


def check_groups(name: str, rows: tuple[str, ...], tasks: int) -> None:
    """Raises a :class:`ConfigError` if a row has more groups than tasks."""
    for row in rows:
        if ROWS[row].groups > tasks:
            raise common.ConfigError(
                f"--{option_of(name)}.rows {row} has {ROWS[row].groups} groups, but "
                f"{name} has {tasks} tasks."
            )


def check(config: Config) -> None:
    """Raises a :class:`ConfigError` that names the option if one is invalid."""
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
            raise common.ConfigError(
                f"{name} is read from files. Pass --data-dir DIR, or --sets digits, "
                "which needs no files."
            )
