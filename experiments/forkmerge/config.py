"""Options and presets of the ForkMerge experiment."""

import dataclasses
import pathlib
from typing import Annotated, Literal

from experiments.common import config as common
from experiments.common.config import Bounds, ConfigError, NotNegative, Rates, Widths
from experiments.common.problem import check_data
from mtljax.data import DIGIT_DOMAINS, DOMAINNET_DOMAINS

Part = Literal["table", "pairs", "intervals", "analysis"]
DOMAINS = {"digits": DIGIT_DOMAINS, "domainnet": DOMAINNET_DOMAINS}
LABELS = {
    "stl": "target only (STL)",
    "stl_2x": "STL, 2x steps",
    "stl_ema": "STL + EMA",
    "alone_x2": "alone x2",
    "ew": "EW",
    "gcs": "GCS",
    "ol_aux": "OL-AUX",
    "arml": "ARML",
    "auto_lambda": "Auto-λ",
    "post_train": "post-train",
    "lambda_grid": "grid search of λ",
    "forkmerge": "ForkMerge, B = 2",
    "forkmerge_each": "ForkMerge‡, target + each",
}
"""Rows of the table, in this order."""
CONTROLS = ("stl", "stl_2x", "stl_ema", "alone_x2")
"""Rows that see the target only."""


@dataclasses.dataclass(frozen=True)
class Config(common.Tuned):
    """Trains each method for each target domain and compares the target scores."""

    data: str = "digits"
    """Digits from five sources, DomainNet as prepared by tensorflow-datasets, or your
    own module:function, which takes domain=."""
    parts: tuple[Part, ...] = ("table", "pairs", "intervals", "analysis")
    """table: every method with all auxiliaries; pairs: EW and ForkMerge with one
    auxiliary at a time; intervals: ForkMerge at several Δt; analysis: one auxiliary at
    several weights, with gradient cosines."""
    domains: tuple[str, ...] = DIGIT_DOMAINS
    """Tasks. Each is the target of separate runs, with the others as auxiliary
    tasks."""
    methods: tuple[str, ...] = tuple(LABELS)
    """Rows of the table; stl and ew always run."""
    seeds: Annotated[int, Bounds(1, 1000)] = 10
    """Runs per method and target. All runs are in one program."""

    train_size: int | None = 300
    """Training examples per domain, or None for all. The default is small, so that
    auxiliary tasks can help. Each seed samples a different subset."""
    val_size: int = 200
    """Validation examples of a domain."""
    test_size: int = 1000
    """Test examples per domain, at most."""
    image_size: Annotated[int, Bounds(1, 1024)] = 12
    """Side of the images, in pixels."""

    model: Literal["mlp", "lenet", "resnet18"] = "mlp"
    """Shared trunk. Each domain has its own linear head."""
    hidden: Widths = (128, 64)
    """Widths of the MLP trunk."""
    steps: int = 600
    """Updates of each run (of each branch)."""
    interval: int = 150
    """Δt, the number of steps between merges."""
    intervals: Annotated[tuple[int, ...], common.COUNT._replace(once=True)] = (
        50,
        300,
        600,
    )
    """Other values of Δt, for the part "intervals"."""
    batch_size: int = 48
    """Examples per update, of one domain or of all domains together."""
    lrs: Rates = (0.01, 0.03, 0.1, 0.3)
    """First learning rates of SGD with Nesterov momentum 0.9; it decays as a cosine.
    STL and all rows that train on all domains in every step run at each, and validation
    picks one for each row. STL's rate is that of the rows that train on one domain a
    step, EW's that of its pairs."""
    weight_decay: NotNegative = 5e-4
    """Weight decay of all parameters."""
    share: bool = True
    """Divide the auxiliary weights of a branch by their number, as in the released
    code."""
    keep: int = 3
    """Number of branches of forkmerge_each after the first merge."""
    lambdas: Rates = (0.0625, 0.25, 1.0, 4.0)
    """Auxiliary weights of the grid search and of the part "analysis". The grid also
    shows transfer gain and discrepancy."""
    ol_aux_lr: float = 1e-4
    """Step size β of OL-AUX."""
    arml_lr: float = 0.05
    """Step size β of ARML."""
    auto_lambda_lr: float = 1e-3
    """Step size β of Auto-λ."""
    auto_lambda_initial: float = 1.0
    """Initial weights of Auto-λ. With 1 it starts as EW; the released code starts at
    0.1."""

    eval_every: int = 150
    """Steps between evaluations."""
    save_every: int = 300
    """Steps between checkpoints, at the ends of chunks. The last checkpoint is always
    kept."""
    strategy: Literal["auto", "vmap", "map"] = "auto"
    """Whether branches, targets and seeds run in one batch or one after the other."""
    out: pathlib.Path = pathlib.Path("results/forkmerge")


PRESETS = {
    "smoke": (
        "Less than a minute, mostly compilation: three rows, a few steps.",
        Config(
            domains=("usps", "semeion"),
            methods=("stl", "ew", "forkmerge"),
            seeds=2,
            train_size=64,
            val_size=40,
            test_size=50,
            image_size=8,
            hidden=(16,),
            steps=12,
            interval=4,
            intervals=(12,),
            eval_every=4,
            save_every=8,
            batch_size=16,
            lrs=(0.03,),
            quick_compile=True,
            out=pathlib.Path("results/forkmerge-smoke"),
        ),
    ),
    "cpu": (
        "The default, 22 minutes of one CPU core: all parts, 10 seeds.",
        Config(),
    ),
    "gpu": (
        "10 minutes on one GPU: the same domains, a residual network, one rate.",
        Config(
            parts=("table", "pairs"),
            methods=("stl", "alone_x2", "ew", "forkmerge"),
            seeds=5,
            model="resnet18",
            image_size=32,
            train_size=590,
            steps=2000,
            interval=500,
            eval_every=500,
            save_every=500,
            lrs=(0.03,),
            strategy="map",
            out=pathlib.Path("results/forkmerge-gpu"),
        ),
    ),
    "large": (
        "Many hours on one GPU: DomainNet, a residual network, the paper's lengths.",
        Config(
            data="domainnet",
            domains=DOMAINNET_DOMAINS,
            parts=("table", "pairs"),
            methods=tuple(LABELS),
            seeds=3,
            model="resnet18",
            image_size=64,
            train_size=None,
            val_size=2000,
            test_size=10_000,
            steps=50_000,
            interval=12_500,
            eval_every=2500,
            save_every=2500,
            lrs=(0.003, 0.01, 0.03),
            strategy="map",
            out=pathlib.Path("results/forkmerge-large"),
        ),
    ),
}


def check(config: Config) -> None:
    """Raises a :class:`ConfigError` that names the option if one is invalid."""
    common.check_common(config)
    check_data("data", (config.data,), tuple(DOMAINS))
    known = DOMAINS.get(config.data, config.domains)
    common.check_names("domains", config.domains, known)
    common.check_names("methods", config.methods, LABELS)
    common.check_names("parts", config.parts, Part.__args__)
    common.check_some("parts", config.parts)
    if len(config.domains) < 2:
        raise ConfigError(
            "--domains must name at least a target and an auxiliary task."
        )
    if config.interval % config.eval_every:
        raise ConfigError(
            f"--interval {config.interval} must be a multiple of --eval-every "
            f"{config.eval_every}."
        )
    if config.batch_size < len(config.domains):
        raise ConfigError(
            f"--batch-size {config.batch_size} is below the {len(config.domains)} "
            "domains that share a joint batch."
        )
