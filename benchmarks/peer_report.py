"""Tables and the figure of ``benchmarks.peers``, from its rows."""

import pathlib
import statistics
from typing import Any

from benchmarks.peer_steps import BASELINE, METHODS

Row = dict[str, Any]
YTICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200)
BALANCED = [method for method in METHODS if method != BASELINE]

# Both sides start from the same weights, and their losses agree to rounding. Updates
# agree to rounding for equal weights, and up to TorchJD's solver errors for the other
# methods. TorchJD adds 1e-4 of the trace to the Gramian of UPGrad and factorises that
# of CAGrad in single precision. Its MGDA takes a hundred Frank-Wolfe steps, its
# Nash-MTL stops early, and its PCGrad samples another order for T > 2. The differences
# of these three are recorded and not checked.
TOLERANCE = {BASELINE: 1e-3, "UPGrad": 0.05, "CAGrad": 0.05}
# Rounding can move activations across zero in each layer. The gradients of the two
# ResNets agree to 1e-14 in float64, and their directions to 0.005 in float32.
LOOSER = {"resnet18": 0.02}


def check_agreement(
    model: str, tasks: int, method: str, losses: float, update: float
) -> None:
    """Raises if the two sides do not compute the same step."""
    bound = max(TOLERANCE.get(method, float("inf")), LOOSER.get(model, 0))
    if losses > 1e-4 or update > bound:
        raise RuntimeError(
            f"{model}, T={tasks}, {method}: losses differ by {losses:.1e} and the "
            f"directions of the updates by {update:.1e}; the sides are not comparable."
        )


def pick(rows: list[Row], **wanted: Any) -> list[Row]:
    """Returns the rows with the given entries."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def cells(rows: list[Row], part: str) -> list[tuple[str, int, str]]:
    """Returns the cells of a part, ordered by model and T."""
    found = {(r["model"], r["tasks"], r["size"]) for r in rows if r["part"] == part}
    order = ["mlp", "lenet", "transformer", "resnet18"]
    main = {"mlp": "width 512"}

    def rank(cell):
        model, tasks, size = cell
        other = not size.startswith(main.get(model, ""))
        number = int(size.split()[1].strip(",")) if other else 0
        return order.index(model), other, tasks, number

    return sorted(found, key=rank)


def step_of(rows: list[Row], cell: tuple[str, int, str], method: str, side: str) -> Row:
    """Returns the row of a step, or an empty row if it is missing or failed."""
    model, tasks, size = cell
    wanted = {"model": model, "tasks": tasks, "size": size, "method": method}
    found = pick(rows, part="steps", side=side, **wanted)
    return found[0] if found and "ms" in found[0] else {}


def ratio(one: Row, other: Row) -> float | None:
    """Returns the ratio of two times, the median over rounds if they are stored."""
    if not one or not other:
        return None
    turns = one.get("turns_ms", []), other.get("turns_ms", [])
    if turns[0] and len(turns[0]) == len(turns[1]):
        return statistics.median(a / b for a, b in zip(*turns, strict=True))
    return one["ms"] / other["ms"]


def overhead(rows: list[Row], cell: Any, method: str, side: str) -> float | None:
    """Returns the time of a step relative to equal weights."""
    return ratio(*(step_of(rows, cell, m, side) for m in (method, BASELINE)))


def longer(rows: list[Row], cell: Any, method: str) -> float | None:
    """Returns the time of TorchJD's step relative to ours."""
    return ratio(*(step_of(rows, cell, method, s) for s in ("TorchJD", "mtljax")))


def _number(value: float | None, digits: int = 3) -> str:
    """Formats three digits without an exponent."""
    if value is None:
        return ""
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def _spread(row: Row) -> str:
    low, high = _number(row["low_ms"]), _number(row["high_ms"])
    return f"{_number(row['ms'])} ({low} to {high})"


def steps_table(rows: list[Row]) -> list[str]:
    """Formats all cells and methods."""
    lines = [
        "| model | T | size | method | ours, ms | TorchJD, ms | way | TorchJD / ours "
        "| overhead, ours | overhead, TorchJD | updates apart |",
        "|:--|--:|:--|:--|--:|--:|:--|--:|--:|--:|--:|",
    ]
    for cell in cells(rows, "steps"):
        for method in METHODS:
            both = [
                pick(
                    rows,
                    part="steps",
                    model=cell[0],
                    tasks=cell[1],
                    size=cell[2],
                    method=method,
                    side=side,
                )
                for side in ("mtljax", "TorchJD")
            ]
            if not both[0]:
                continue
            ours, theirs = both[0][0], both[1][0]
            entries = [*map(str, cell), method, _spread(ours)]
            if "ms" in theirs:
                entries += [_spread(theirs), theirs["way"]]
                entries.append(f"{longer(rows, cell, method):.2f}")
            else:
                entries += [theirs.get("error", ""), theirs.get("way", ""), ""]
            for side in ("mtljax", "TorchJD"):
                entries.append(_number(overhead(rows, cell, method, side)))
            apart = theirs.get("update_apart")
            entries.append("" if apart is None else f"{apart:.0e}")
            lines.append(f"| {' | '.join(entries)} |")
    return lines


def memory_table(rows: list[Row]) -> list[str]:
    lines = [
        "| model | T | size | ours, MB | of which XLA plans | TorchJD, MB | way "
        "| TorchJD / ours | the leanest way of TorchJD, MB |",
        "|:--|--:|:--|--:|--:|--:|:--|--:|:--|",
    ]
    for cell in cells(rows, "memory"):
        wanted = {"model": cell[0], "tasks": cell[1], "size": cell[2]}
        found = {r["side"]: r for r in pick(rows, part="memory", **wanted)}
        ours, theirs = found["mtljax"], found["TorchJD"]
        mine, planned = ours.get("peak_mb"), ours["planned_mb"]
        ways = {k: v for k, v in theirs["ways_mb"].items() if isinstance(v, float)}
        leanest = min(ways, key=lambda way: ways[way])
        ratio = theirs["peak_mb"] / (planned if mine is None else mine)
        entries = [*map(str, cell), _number(mine), _number(planned)]
        entries += [_number(theirs["peak_mb"]), theirs["way"], f"{ratio:.2f}"]
        entries.append(f"{_number(ways[leanest])} ({leanest})")
        lines.append(f"| {' | '.join(entries)} |")
    return lines


def seeds_table(rows: list[Row]) -> list[str]:
    sides = ["mtljax, vmap", "mtljax, in turn", "TorchJD, in turn"]
    lines = [
        f"| model | T | size | method | {' | '.join(f'{s}, ms' for s in sides)} |",
        "|:--|--:|:--|:--|--:|--:|--:|",
    ]
    for cell in cells(rows, "seeds"):
        wanted = {"model": cell[0], "tasks": cell[1], "size": cell[2]}
        for method in METHODS:
            here = pick(rows, part="seeds", method=method, **wanted)
            found = {r["side"]: r for r in here}
            if found:
                entries = [*map(str, cell), method]
                entries += [_spread(found[side]) for side in sides]
                lines.append(f"| {' | '.join(entries)} |")
    return lines


def compile_table(rows: list[Row]) -> list[str]:
    lines = ["| model | T | size | method | seconds |", "|:--|--:|:--|:--|--:|"]
    for cell in cells(rows, "compile"):
        wanted = {"model": cell[0], "tasks": cell[1], "size": cell[2]}
        for row in pick(rows, part="compile", **wanted):
            entries = [*map(str, cell), row["method"], f"{row['compile_s']:.1f}"]
            lines.append(f"| {' | '.join(entries)} |")
    return lines


def _ranges(rows: list[Row]) -> list[tuple[str, str, list[float], str]]:
    """Returns quantity, place, measured values, and the target if there is one."""
    found = []
    most, least = {3: 2.5, 11: 5.0, 40: 25.0}, {3: 2.0, 11: 4.0, 40: 4.0}
    for cell in cells(rows, "steps"):
        model, tasks, size = cell
        where = f"{model}, T = {tasks}, {size}"
        ours = [overhead(rows, cell, m, "mtljax") for m in BALANCED]
        theirs = [overhead(rows, cell, m, "TorchJD") for m in BALANCED]
        known = [r for r in (longer(rows, cell, m) for m in BALANCED) if r]
        if model == "mlp" and size.startswith("width 512") and tasks in most:
            found.append(("TorchJD / ours", where, known, f">= {least[tasks]:g}"))
            kept = [over for over in ours if over]
            found.append(("overhead, ours", where, kept, f"<= {most[tasks]:g}"))
        elif model == "transformer":
            found.append(("TorchJD / ours", where, known, ">= 1"))
        elif model in ("lenet", "resnet18"):
            pairs = zip(ours, theirs, strict=True)
            kept = [a / b for a, b in pairs if a and b]
            found.append(("overhead, ours / TorchJD", where, kept, "<= 1"))
            found.append(("TorchJD / ours", where, known, ""))
    for row in pick(rows, part="memory", side="TorchJD", model="transformer"):
        same = {k: row[k] for k in ("part", "model", "tasks", "size")}
        (mine,) = pick(rows, side="mtljax", **same)
        where = f"transformer, T = {row['tasks']}, {row['size']}"
        value = row["peak_mb"] / mine.get("peak_mb", mine["planned_mb"])
        found.append(("peak memory, TorchJD / ours", where, [value], ">= 2"))
    slow = [r["compile_s"] for r in pick(rows, part="compile", tasks=40)]
    if slow:
        found.append(("seconds to compile", "T = 40", slow, "<= 20"))
    return [entry for entry in found if entry[2]]


def targets_table(rows: list[Row]) -> list[str]:
    """Formats the targets and the measured ranges over the methods."""
    lines = ["| what | where | measured | target | met |", "|:--|:--|--:|--:|:--|"]
    for what, where, values, bound in _ranges(rows):
        low, high, said = min(values), max(values), ""
        if bound:
            limit = float(bound.split()[1])
            met = [v >= limit if bound.startswith(">") else v <= limit for v in values]
            said = "yes" if all(met) else "no" if not any(met) else "in part"
        span = (
            _number(low) if len(values) == 1 else f"{_number(low)} to {_number(high)}"
        )
        lines.append(f"| {what} | {where} | {span} | {bound} | {said} |")
    return lines


def footer(about: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in about.items())


def markdown(rows: list[Row], about: Row) -> str:
    """Formats all tables."""
    disturbed = max((row.get("others", 0) for row in rows), default=0)
    note = []
    if disturbed > 0.1:
        note = [f"Other processes kept up to {disturbed:.1f} cores busy.", ""]
    return "\n".join(
        [
            "# A training step compared with TorchJD",
            "",
            "`python -m benchmarks.peers`: median and quartiles of a whole step, "
            "overhead relative to equal weights of the same side, and the difference "
            "of the directions of the first updates. Ratios are medians over rounds if "
            "the file contains the rounds (`turns_ms`), otherwise ratios of medians.",
            "",
            *note,
            "Targets, and the measured range over the gradient-balancing methods:",
            "",
            *targets_table(rows),
            "",
            "All steps:",
            "",
            *steps_table(rows),
            "",
            "Peak memory of a step with UPGrad beyond the memory between steps, each "
            "side in a separate process: growth of the resident set, and for ours also "
            "the temporary memory that XLA plans.",
            "",
            *memory_table(rows),
            "",
            "Ten seeds, time of a step of all seeds.",
            "",
            *seeds_table(rows),
            "",
            "Compile time of our step.",
            "",
            *compile_table(rows),
            "",
            footer(about),
            "",
        ]
    )


def readme(rows: list[Row], about: Row) -> str:
    """Formats the speed table of the README."""
    lines = [
        f"| model | T | {' | '.join(METHODS)} |",
        f"|:--|--:|{'--:|' * len(METHODS)}",
    ]
    for cell in cells(rows, "steps"):
        entries = []
        for method in METHODS:
            ours, theirs = (
                step_of(rows, cell, method, side).get("ms")
                for side in ("mtljax", "TorchJD")
            )
            both = f"{_number(ours)} / {_number(theirs)}"
            times = longer(rows, cell, method)
            if times is not None:
                both += f" ({times:.1f}x)"
            entries.append("" if ours is None else both)
        model, tasks, size = cell
        lines.append(f"| {model}, {size} | {tasks} | {' | '.join(entries)} |")
    return "\n".join([*lines, "", footer(about)])


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Draws overhead over equal weights by T, for models with several T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    groups: dict[tuple[str, str], list[Any]] = {}
    for cell in cells(rows, "steps"):
        groups.setdefault((cell[0], cell[2]), []).append(cell)
    several = {key: group for key, group in groups.items() if len(group) > 1}
    if not several:
        return
    width = 3.4 * len(several) + 1.6
    figure, axes = plt.subplots(
        1, len(several), figsize=(width, 3.8), sharey=True, squeeze=False
    )
    colours = dict(zip(BALANCED, [f"C{i}" for i in range(len(BALANCED))], strict=True))
    sides: dict[str, Any] = {"mtljax": ("-", "o"), "TorchJD": ("--", "s")}
    for axis, ((model, size), group) in zip(axes[0], several.items(), strict=True):
        for method in BALANCED:
            for side, (style, marker) in sides.items():
                points = [
                    (cell[1], over)
                    for cell in group
                    if (over := overhead(rows, cell, method, side)) is not None
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        linestyle=style,
                        marker=marker,
                        markersize=4,
                        color=colours[method],
                        markerfacecolor=colours[method] if style == "-" else "white",
                    )
        counts = [cell[1] for cell in group]
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(counts, [str(t) for t in counts])
        axis.set_xticks([], minor=True)
        axis.set_yticks(YTICKS, [str(y) for y in YTICKS])
        axis.set_yticks([], minor=True)
        axis.set_title(f"{model}, {size}", fontsize=10)
        axis.set_xlabel("tasks T")
        axis.grid(True, axis="y", which="both", alpha=0.25)
    low, high = axes[0][0].dataLim.intervaly
    for axis in axes[0]:
        low = min(low, axis.dataLim.intervaly[0])
        high = max(high, axis.dataLim.intervaly[1])
    axes[0][0].set_ylim(low / 1.2, high * 1.2)
    axes[0][0].set_ylabel("step time / equal weights")
    handles = [Line2D([], [], color=colours[m], label=m) for m in BALANCED]
    handles += [
        Line2D(
            [],
            [],
            color="0.3",
            linestyle=style,
            marker=marker,
            markersize=4,
            markerfacecolor="0.3" if style == "-" else "white",
            label=side,
        )
        for side, (style, marker) in sides.items()
    ]
    figure.legend(handles=handles, loc="center right", frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 1.4 / width, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(path: pathlib.Path, found: dict[str, Any]) -> None:
    """Writes the tables next to the JSON file, and the figure if matplotlib exists."""
    path.with_suffix(".md").write_text(markdown(found["rows"], found["about"]))
    try:
        plot(found["rows"], path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed")
