"""Options, table rows and presets of the IGB experiment."""

import dataclasses
import pathlib
from typing import Annotated, Literal, NamedTuple

from experiments.common import config as common
from experiments.common.config import Bounds, Rates, Share, Widths
from experiments.common.problem import check_data
from mtljax import data

SINGLE_TASK = "single_task"


class Row(NamedTuple):
    """A row of the table: a loss balancer and an optional gradient balancer."""

    label: str
    loss: str = "linear"
    gradient: str | None = None
    agent: tuple[tuple[str, object], ...] = ()  # changes of the preset's agent
    log: bool = False  # the logarithms of the losses are weighted


_LOSS = {
    "linear": "EW",
    "random_loss_weighting": "RLW",
    "scale_invariant": "SI",
    "uncertainty": "UW",
    "dwa": "DWA",
    "igb_v1": "IGBv1",
    "igb_v2": "IGBv2",
}
_GRADIENT = {
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "imtl_g": "IMTL-G",
    "nash_mtl": "Nash-MTL",
}

ROWS: dict[str, Row] = {
    **{name: Row(label, name) for name, label in _LOSS.items()},
    **{name: Row(label, "linear", name) for name, label in _GRADIENT.items()},
    **{
        f"{loss}+{name}": Row(f"{_LOSS[loss]} + {label}", loss, name)
        for name, label in _GRADIENT.items()
        for loss in ("igb_v1", "igb_v2")
    },
    "igb_v2:mean": Row("IGBv2, mean reward", "igb_v2", agent=(("reward", "mean"),)),
    "igb_v2:no_alpha": Row(
        "IGBv2, without alpha", "igb_v2", agent=(("lr_multiplier", False),)
    ),
    # Its actions are those of the first actor: noise instead of what was learnt.
    "igb_v2:frozen": Row("IGBv2, frozen agent", "igb_v2", agent=(("frozen", True),)),
    "random_si": Row("RLW + SI", "random_loss_weighting", log=True),
    "static": Row("static 1/σ²", "static"),
}

ALONE = (*_LOSS, *_GRADIENT)
TABLE = (
    *("linear", "scale_invariant", "random_si", "igb_v1", "igb_v2", "igb_v2:frozen"),
    *("static", "random_loss_weighting", "igb_v2:mean"),
    *("nash_mtl", "igb_v1+nash_mtl", "igb_v2+nash_mtl", "uncertainty", "dwa"),
)
"""Rows of the claims, the first first."""
SETS = ("enb", "jura", "oes97", "oes10", "atp1d", "slump")
"""Tables with a median R² of ridge regression above 0.4."""


@dataclasses.dataclass(frozen=True)
class Agent:
    """Phases of IGB as shares of a run, and options of the IGBv2 agent."""

    window: Annotated[tuple[float, float], Bounds(0, 1)] = (1 / 500, 2 / 500)
    """Shares of the steps between which the losses are averaged to L_base. The paper
    uses epoch 2 of 500."""
    train_from: Share = 3 / 500
    """Share of the steps after which the agent is trained."""
    use_from: Share = 5 / 500
    """Share of the steps after which the agent is used."""
    capacity: int = 10_000
    """Number of transitions in the buffer."""
    period: int = 50
    """Steps between two trainings of the agent."""
    updates: int = 25
    """Updates per training of the agent with an empty buffer."""
    batch_size: int = 128
    """Transitions per update with an empty buffer."""
    hidden: Widths = (128, 128)
    """Widths of actor and critics."""
    lr: float = 3e-4
    """Learning rate of actor, critics and temperature."""
    lr_composed: float = 1e-4
    """Learning rate in combination with MGDA, PCGrad or Nash-MTL."""
    density: Literal["tanh_compat", "logistic_normal"] = "tanh_compat"
    """Log-density of an action. tanh_compat is the formula of the authors' code,
    logistic_normal is the exact density."""


@dataclasses.dataclass(frozen=True)
class Training:
    """Model and training on one kind of data."""

    methods: tuple[str, ...] = ()
    """Rows, in table order (ROWS in config.py). The single-task rows come first."""
    steps: int = 1000
    """Updates of each run."""
    batch_size: int = 120
    """Examples per update."""
    lrs: Rates = (3e-4, 1e-3, 3e-3)
    """Of Adam in the beginning; halved at every fifth of the run. Validation picks one
    for each row."""
    hidden: Widths = (64, 64)
    """Widths of the trunk for tables."""
    width: int = 64
    """Size of the state of an atom, for molecules."""
    edge_width: int = 128
    """Hidden width of the edge network."""
    features: int = 64
    """Number of input features of the heads, for molecules."""
    train_size: int | None = None
    """Training examples, or None for all."""
    eval_size: int = 10_000
    """Validation and test examples used, at most."""
    eval_every: int = 100
    """Steps between evaluations."""
    log_every: int = 10
    """Steps between rows of training losses and weights."""
    agent: Agent = Agent()
    """Phases and agent of IGB."""


@dataclasses.dataclass(frozen=True)
class Config(common.Tuned):
    """Trains single-task baselines and multi-task methods and compares them."""

    data: tuple[str, ...] = tuple(f"mulan_mtr/{name}" for name in SETS)
    """One table each: qm9_subset, qm9, mulan_mtr/NAME, or any set with numbers as
    targets, also module:function of your own. Tables of mulan_mtr are split by the
    seed, and their targets keep the ratios of their units."""
    source: Literal["files", "tfds"] = "files"
    """Source of qm9."""
    heads: Literal["algorithm3", "code"] = "algorithm3"
    """With algorithm3, heads descend their weighted loss. With code, as in the authors'
    code, this loss is also multiplied by the weight of MGDA, IMTL-G or Nash-MTL."""
    graph: Training = Training()
    """Settings for molecules."""
    table: Training = Training()
    """Settings for tables."""

    out: pathlib.Path = pathlib.Path("results/igb")

    def training_of(self, data: str) -> Training:
        """Returns the settings of a data set."""
        return self.graph if is_graph(data) else self.table


def is_graph(data: str) -> bool:
    """Returns whether a data set contains molecules."""
    return data in ("qm9", "qm9_subset")


# The paper's cadence and about its updates per step, but of a smaller agent; the buffer
# of the presets holds a twentieth of the run.
SHORT_RUN = Agent(
    window=(0.05, 0.1),
    train_from=0.15,
    use_from=0.25,
    period=50,
    updates=25,
    batch_size=64,
    hidden=(64, 64),
    lr=1e-3,
    lr_composed=3e-4,
)

PRESETS = {
    "smoke": (
        "About 15 seconds, mostly compilation: a small table, two methods.",
        Config(
            data=("mulan_mtr/enb",),
            seeds=2,
            table=Training(
                methods=("linear", "igb_v2+mgda"),
                steps=24,
                batch_size=32,
                lrs=(1e-3,),
                hidden=(8,),
                eval_every=12,
                log_every=4,
                agent=Agent(
                    window=(0.1, 0.2),
                    train_from=0.3,
                    use_from=0.4,
                    capacity=32,
                    period=4,
                    updates=1,
                    batch_size=8,
                    hidden=(8,),
                ),
            ),
            out=pathlib.Path("results/igb-smoke"),
        ),
    ),
    "cpu": (
        "An hour of one CPU core: six tables, 10 splits, 4 learning rates.",
        Config(
            seeds=10,
            extensions=0,  # more rates would compile every row once more
            table=Training(
                methods=TABLE,
                steps=600,
                batch_size=32,
                lrs=(1e-3, 3e-3, 1e-2, 3e-2),
                eval_every=30,
                log_every=30,
                agent=dataclasses.replace(SHORT_RUN, capacity=60),
            ),
        ),
    ),
    "large": (
        "Hours of one CPU core: the same with 20 splits and 4,000 steps.",
        Config(
            seeds=20,
            table=Training(
                methods=TABLE,
                steps=4000,
                batch_size=32,
                eval_every=50,
                log_every=50,
                agent=dataclasses.replace(SHORT_RUN, capacity=200),
            ),
            out=pathlib.Path("results/igb-large"),
        ),
    ),
    "molecules": (
        "An hour of one CPU core: molecules without positions, 5 seeds.",
        Config(
            data=("qm9_subset",),
            seeds=5,
            graph=Training(
                methods=("linear", *TABLE[1:5], "nash_mtl"),
                steps=2000,
                batch_size=64,
                lrs=(1e-3, 3e-3),
                width=16,
                edge_width=32,
                features=32,
                log_every=20,
                agent=dataclasses.replace(SHORT_RUN, capacity=100),
            ),
            out=pathlib.Path("results/igb-molecules"),
        ),
    ),
    "gpu": (
        "10 minutes on one GPU: ten tables, 100 splits.",
        Config(
            data=tuple(f"mulan_mtr/{n}" for n in (*SETS, "andro", "edm", "sf1", "sf2")),
            seeds=100,
            table=Training(
                methods=TABLE,
                steps=2000,
                batch_size=16,
                eval_every=50,
                log_every=50,
                agent=dataclasses.replace(SHORT_RUN, capacity=100),
            ),
            out=pathlib.Path("results/igb-gpu"),
        ),
    ),
    "qm9": (
        "Days of one GPU: all of QM9 with positions, the paper's length.",
        Config(
            data=("qm9",),
            graph=Training(
                methods=(*ALONE, "random_si"),
                steps=277_000,  # 300 epochs of 923 batches
                lrs=(1e-3,),
                eval_every=2770,
                log_every=100,
                agent=Agent(
                    window=(1 / 300, 2 / 300), train_from=1e-2, use_from=5 / 300
                ),
            ),
            out=pathlib.Path("results/igb-qm9"),
        ),
    ),
}


def check(config: Config) -> None:
    """Raises a :class:`ConfigError` that names the option if one is invalid."""
    common.check_common(config)
    common.check_some("data", config.data)
    check_data("data", config.data, data.available())
    for name in config.data:
        kind = "graph" if is_graph(name) else "table"
        settings = config.training_of(name)
        common.check_some(f"{kind}.methods", settings.methods)
        common.check_names(f"{kind}.methods", settings.methods, ROWS)
        agent = settings.agent
        times = (*agent.window, agent.train_from, agent.use_from)
        if agent.window[0] >= agent.window[1] or sorted(times) != list(times):
            raise common.ConfigError(
                f"--{kind}.agent.window, .train-from and .use-from must ascend, "
                f"not {times}."
            )
