"""What every method promises; the contract and property tests iterate over it."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

import mtljax
from mtljax.sharpness import flat_split


def arguments(factory: Callable[..., Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, default and annotation of each argument, ``argument.field`` for groups."""
    for name, parameter in inspect.signature(factory).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            for field in dataclasses.fields(parameter.default):
                value = getattr(parameter.default, field.name)
                yield f"{name}.{field.name}", value, field.type
        else:
            yield name, parameter.default, parameter.annotation


def with_number(
    factory: Callable[..., Any], options: dict[str, Any], name: str, number: Any
) -> dict[str, Any]:
    """The options with one argument, or one field of a group, replaced."""
    name, _, field = name.partition(".")
    if not field:
        return options | {name: number}
    group = options.get(name, inspect.signature(factory).parameters[name].default)
    return options | {name: dataclasses.replace(group, **{field: number})}


def _short(value: Any) -> str:
    """A group of options by its name alone."""
    return type(value).__name__ if dataclasses.is_dataclass(value) else str(value)


class Case(NamedTuple):
    """One way to build a method, and what then must hold (full-rank gradients)."""

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012
    degree: float | None = 1.0  # J -> cJ gives D -> c^degree D, losses fixed
    permutation: bool = True  # relabelling the tasks changes nothing
    non_conflicting: int = 0  # <g_i, D> >= 0 for every task up to this T (0: never)
    task_scale: bool = False  # direction unchanged under g_i -> c_i g_i
    simplex: bool = False  # weights are >= 0 and sum to 1
    deterministic: bool = True
    rotation: bool = True  # A(JQ) = A(J)Q: reads the Gramian or the losses only
    scalable: bool = True  # `scale` can be seen on the identity matrix
    min_tasks: int = 2  # the fewest tasks it can be built for
    row_linear: bool = False  # c -> A(diag(c)J) is linear in c > 0
    stationary: str | None = (
        None  # D = 0 at "weak" or only "strong" Pareto stationarity
    )
    zero_row: str | None = None  # a zero gradient is "dropped", or "stops" everything
    maskable: bool = True  # an absent task shows nowhere, not even in draws
    stable: bool = True  # rounding does not decide the result
    precision: float | None = 1e-4  # float32 against float64, relative

    @property
    def id(self) -> str:
        extra = ",".join(f"{k}={_short(v)}" for k, v in self.options.items())
        return f"{self.name}({extra})" if extra else self.name

    def build(self, num_tasks: int, key=None, **more) -> mtljax.Balancer:
        key = jax.random.key(0) if key is None else key
        method = mtljax.get_method(self.name)
        return method.build(num_tasks, key=key, **(self.options | more))


# The methods whose tests all run by default; of the others the contract and the
# properties do, and their own files in deep: the suite is bound by compilation.
CLASSICS = frozenset(
    {
        "linear",
        "scale_invariant",
        "random_loss_weighting",
        "uncertainty",
        "dwa",
        "famo",
        "mgda",
        "pcgrad",
        "imtl_g",
        "cagrad",
        "nash_mtl",
    }
)

ANY = 10**6  # non-conflicting for every T

CASES = [
    Case("linear", row_linear=True, zero_row="dropped"),
    Case(
        "linear", {"scale": "mean"}, simplex=True, row_linear=True, zero_row="dropped"
    ),
    Case("scale_invariant", row_linear=True, zero_row="dropped"),
    Case(
        "random_loss_weighting",
        permutation=False,
        simplex=True,
        deterministic=False,
        row_linear=True,
        zero_row="dropped",
        maskable=False,
    ),
    Case("uncertainty", row_linear=True, zero_row="dropped"),
    Case(
        "uncertainty",
        {"kinds": "classification", "initial_log_variance": -0.5},
        row_linear=True,
        zero_row="dropped",
    ),
    Case("dwa", {"window": 2}, row_linear=True, zero_row="dropped"),
    Case("famo", simplex=True, row_linear=True, zero_row="dropped"),
    Case(
        "mgda", non_conflicting=ANY, simplex=True, stationary="weak", zero_row="stops"
    ),
    Case("mgda", {"normalize": "l2"}, simplex=True),
    Case(
        "mgda",
        {"normalize": "l2", "apply_to": "normalized"},
        degree=0.0,
        non_conflicting=ANY,
        task_scale=True,
        stationary="weak",
    ),
    Case("mgda", {"normalize": "loss+"}, simplex=True),
    Case(
        "pcgrad",
        permutation=False,
        non_conflicting=2,
        deterministic=False,
        row_linear=True,
        zero_row="dropped",
        maskable=False,
        precision=None,  # draws other orders in float64
    ),
    Case(
        "pcgrad",
        {"order": "fixed"},
        permutation=False,
        non_conflicting=2,
        row_linear=True,
        zero_row="dropped",
    ),
    Case("imtl_g", zero_row="dropped", precision=1e-3),
    Case(
        "imtl_g",
        {"sign_guard": True},
        non_conflicting=ANY,
        task_scale=True,
        zero_row="dropped",
        precision=1e-3,
    ),
    Case("cagrad", precision=1e-3),
    Case("cagrad", {"c": 1.5}, non_conflicting=ANY, precision=1e-3),
    Case("cagrad", {"rescale": "1+c^2"}, precision=1e-3),
    Case(
        "nash_mtl",
        degree=0.0,
        non_conflicting=ANY,
        task_scale=True,
        zero_row="dropped",
    ),
    Case(
        "nash_mtl",
        {"update_every": 3},
        degree=0.0,
        non_conflicting=ANY,
        task_scale=True,
        zero_row="dropped",
    ),
    Case("geometric_mean", row_linear=True, zero_row="dropped"),
    Case("imtl_l", row_linear=True, zero_row="dropped"),
    Case("gradnorm"),
    Case("gradnorm", {"compat": "libmtl"}),
    Case("gradient_norm_weighting", zero_row="dropped"),
    Case("stch", row_linear=True),
    Case(
        "stch",
        {"form": "mtl", "warmup_steps": 2, "nadir_steps": 2},
        row_linear=True,
        zero_row="dropped",
    ),
    Case("cosmos", row_linear=True),
    Case("pbi", row_linear=True),
    Case("excess_mtl"),
    Case("excess_mtl", {"compat": "torchjd"}, simplex=True),
    Case("igb_v1"),
    Case("igb_v1", {"window": (1, 3)}),
    Case(
        "igb_v2",
        {
            "phases": mtljax.IGBPhases(window=(1, 3)),
            "agent": mtljax.IGBAgent(
                period=2, updates=1, batch_size=4, capacity=8, hidden=(4,)
            ),
            "schedule": 0.1,
        },
        permutation=False,
        deterministic=False,
        maskable=False,
    ),
    Case(
        "random_gradient_weighting",
        permutation=False,
        simplex=True,
        deterministic=False,
        row_linear=True,
        zero_row="dropped",
        maskable=False,
    ),
    Case(
        "upgrad",
        non_conflicting=ANY,
        row_linear=True,
        stationary="strong",
        zero_row="dropped",
    ),
    Case("dualproj", non_conflicting=ANY, stationary="strong", zero_row="dropped"),
    Case("fairgrad", degree=-1 / 3, non_conflicting=ANY, zero_row="dropped"),
    Case(
        "fairgrad",
        {"alpha": 1.0},
        degree=0.0,
        non_conflicting=ANY,
        task_scale=True,
        zero_row="dropped",
    ),
    Case(
        "fairgrad",
        {"alpha": 0.5, "normalize_degree": True},
        non_conflicting=ANY,
    ),
    Case("aligned_mtl", zero_row="dropped", precision=1e-3),
    Case(
        "aligned_mtl",
        {"condition": "median", "cone": True},
        non_conflicting=ANY,
        zero_row="dropped",
        precision=1e-3,
    ),
    Case(
        "conflict_free",
        non_conflicting=ANY,
        task_scale=True,
        row_linear=True,
        zero_row="dropped",
        precision=1e-3,
    ),
    Case(
        "conflict_free",
        {"length": "harmonic"},
        non_conflicting=ANY,
        task_scale=True,
        zero_row="dropped",
        precision=1e-3,
    ),
    Case(
        "gradvac",
        permutation=False,
        deterministic=False,
        row_linear=True,  # from the first cosines, which are zero
        zero_row="dropped",
        maskable=False,
        precision=None,
    ),
    Case(
        "gradvac",
        {"order": "fixed", "beta": 0.5},
        permutation=False,
        row_linear=True,
        zero_row="dropped",
    ),
    Case("sdmgrad", simplex=True),
    # Its inner loop oscillates, so rounding decides.
    Case(
        "sdmgrad",
        {"inner": "reference"},
        degree=None,
        permutation=False,
        simplex=True,
        rotation=False,
        precision=None,
        stable=False,
    ),
    Case("modo", degree=None, simplex=True),
    Case("moco", degree=None, simplex=True),
    Case("db_mtl", task_scale=True, zero_row="dropped"),
    Case("db_mtl", {"beta": 0.0}, task_scale=True, zero_row="dropped"),
    Case(
        "graddrop",
        rotation=False,
        deterministic=False,
        zero_row="dropped",
        precision=None,  # draws other numbers in float64
    ),
    Case(
        "gcs",
        permutation=False,  # the first task is the main one
        row_linear=True,
        zero_row="dropped",
        maskable=False,
    ),
    Case(
        "gcs",
        {"weighted": True},
        permutation=False,
        zero_row="dropped",
        maskable=False,
    ),
    Case(
        "ol_aux",
        permutation=False,
        row_linear=True,
        zero_row="dropped",
        maskable=False,
    ),
    Case(
        "pcd",
        permutation=False,  # the first task is the main one
        zero_row="dropped",
        maskable=False,
    ),
    Case("krum", permutation=False, simplex=True, min_tasks=3),
    Case("krum", {"num_selected": 2}, simplex=True, min_tasks=3),
    Case("trimmed_mean", rotation=False, simplex=True, scalable=False, min_tasks=3),
]


class WrapperCase(NamedTuple):
    """A balancer made of balancers; the rules of tests/rules hold for it too."""

    factory: Callable[..., Any]
    inner: tuple[str, ...]  # the methods that it is made of
    options: dict[str, Any] = {}  # noqa: RUF012
    min_tasks: int = 2
    maskable: bool = True
    deterministic: bool = True

    @property
    def id(self) -> str:
        extra = "".join(
            f",{k}={getattr(v, '__name__', v)}" for k, v in self.options.items()
        )
        return f"{self.factory.__name__}({','.join(self.inner)}{extra})"

    def build(self, num_tasks: int, key=None) -> mtljax.Balancer:
        key = jax.random.key(0) if key is None else key
        methods = [mtljax.get_method(name) for name in self.inner]
        if self.factory is mtljax.inject_hyperparams:
            method = methods[0]
            options = {"key": key} if method.random else {}
            build = self.factory(method.factory)
            return build(num_tasks, **options, **self.options)
        parts = [method.build(num_tasks, key=key) for method in methods]
        return self.factory(*parts, **self.options)


def falling(count):
    """A schedule for hyper-parameters."""
    return 0.5 / (1 + count)


RANDOM = {"maskable": False, "deterministic": False}

WRAPPED = [
    WrapperCase(mtljax.compose, ("scale_invariant", "mgda")),
    WrapperCase(mtljax.compose, ("famo", "pcgrad"), **RANDOM),
    WrapperCase(mtljax.compose, ("dwa", "nash_mtl")),
    WrapperCase(mtljax.compose, ("uncertainty", "famo")),
    WrapperCase(mtljax.smooth_weights, ("nash_mtl",)),
    WrapperCase(mtljax.smooth_weights, ("famo",)),
    WrapperCase(mtljax.per_layer, ("cagrad",)),
    WrapperCase(mtljax.per_layer, ("famo",)),
    WrapperCase(mtljax.per_layer, ("db_mtl",)),
    WrapperCase(mtljax.reuse, ("nash_mtl",), {"every": 3}),
    WrapperCase(mtljax.reuse, ("pcgrad",), {"every": 2}, **RANDOM),
    WrapperCase(mtljax.reuse, ("famo",), {"every": 2}),
    WrapperCase(flat_split, ("mgda",)),
    WrapperCase(flat_split, ("famo",)),
    WrapperCase(flat_split, ("db_mtl",)),
    WrapperCase(flat_split, ("pcgrad",), {"mode": "direct"}, **RANDOM),
    WrapperCase(flat_split, ("cagrad",), {"mode": "second"}),
    WrapperCase(flat_split, ("nash_mtl",), {"mode": "each"}),
    WrapperCase(mtljax.inject_hyperparams, ("cagrad",), {"c": falling}),
    WrapperCase(mtljax.inject_hyperparams, ("famo",)),
    WrapperCase(mtljax.inject_hyperparams, ("db_mtl",)),
]
