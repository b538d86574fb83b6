"""Writes the API reference, its tables and other pages from the code.

Everything below ``docs/api`` and ``docs/_generated`` is written here, before Sphinx
reads its sources. A file is written only if its text changes, so that a second build
reads only what changed.
"""

import functools
import importlib
import inspect
import json
import pathlib
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from sphinx.application import Sphinx
from sphinx.ext import napoleon
from sphinx.util.nodes import make_refnode

import mtljax
from experiments.common import board
from mtljax.catalogue import WRAPPERS, method_reads, wrappers_table
from mtljax.methods import METHODS, source_link

DOCS = pathlib.Path(__file__).parents[1]
FAMILIES = ("loss balancing", "gradient balancing")
SCALES = {
    "sum": "the sum of the losses",
    "mean": "the mean of the losses",
    None: "neither, see the docstring",
}

# Page -> what it documents: a module, and a heading.
MODULES = {
    "mtljax.alternating": "Alternating task steps",
    "mtljax.sharpness": "Sharpness-aware training",
    "mtljax.forkmerge": "ForkMerge and auxiliary tasks",
    "mtljax.trajectory": "Trajectory analysis",
    "mtljax.metrics": "Metrics",
    "mtljax.solvers": "Solvers",
    "mtljax.stack": "Stacked trees",
    "mtljax.training": "Training runs",
    "mtljax.training.tables": "Tables of results",
    "mtljax.training.plots": "Figures of runs",
    "mtljax.training.compare": "Comparisons of runs",
    "mtljax.training.report": "Reports of runs",
    "mtljax.training.cli": "Commands of experiments",
    "mtljax.models": "Models",
    "mtljax.data": "Data sets",
}

# Values and aliases of types, which have no docstring of their own.
DATA = {
    "mtljax.METHODS": "The rows of the table of methods, by the name of the factory.",
    "mtljax.training.MAY_DIFFER": (
        "Fields of a configuration that a resumed run may change by default."
    ),
    "mtljax.training.Step": "Type of ``step(state, batch) -> (state, metrics)``.",
    "mtljax.models.ApplyFn": "Type of ``Model.apply``.",
    "mtljax.models.Variables": "Type of the variables of a model, a dict of trees.",
    "mtljax.data.DIGIT_DOMAINS": "Names of the digit domains.",
    "mtljax.data.DOMAINNET_DOMAINS": "Names of the domains of DomainNet.",
    "mtljax.data.MISSING": "The value of a class label that is missing.",
    "mtljax.data.SPLITS": "Names of the splits of a data set.",
}


def public(module: Any) -> list[str]:
    """Names that a module offers: ``__all__``, or what it defines or re-exports."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    package = hasattr(module, "__path__")
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or is_function(value))
        and (
            value.__module__.startswith(module.__name__ + ".")
            if package
            else value.__module__ == module.__name__
        )
    ]


def is_function(value: Any) -> bool:
    """Whether a value is a function, also one that ``jax.jit`` has wrapped."""
    return inspect.isroutine(value) or inspect.isroutine(inspect.unwrap(value))


def directive(module: str, name: str) -> list[str]:
    """The directive that documents one object."""
    value = getattr(importlib.import_module(module), name)
    path = f"{module}.{name}"
    if inspect.isclass(value):
        lines = [f".. autoclass:: {path}"]
        # Fields of a NamedTuple are described in its docstring or by comments.
        members = [
            key
            for key, member in vars(value).items()
            if not key.startswith("_")
            and (inspect.isfunction(member) or isinstance(member, property))
        ]
        fields = set(getattr(value, "_fields", ())) | {"_fields"}
        members = [key for key in members if key not in fields and _has_doc(value, key)]
        if members:
            lines.append(f"   :members: {', '.join(members)}")
        return [*lines, ""]
    if is_function(value):
        return [f".. autofunction:: {path}", ""]
    return [f".. py:data:: {path}", "", f"   {DATA[path]}", ""]


def _has_doc(owner: type, name: str) -> bool:
    return bool(getattr(vars(owner)[name], "__doc__", None))


def rst(lines: Iterable[str]) -> list[str]:
    """Lines of reStructuredText inside a Markdown page."""
    return ["```{eval-rst}", *lines, "```", ""]


def paragraph(text: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def method_pages() -> Iterator[tuple[str, list[str]]]:
    """One page for every family, with a section for every method."""
    for family in FAMILIES:
        members = [m for m in METHODS.values() if m.family == family]
        lines = [f"# {family.capitalize()}", ""]
        lines += [f"The {len(members)} methods of this family. T is the number of"]
        lines += ["tasks. {doc}`methods` compares all methods in one table.", ""]
        for method in members:
            lines += [f"## {method.name} ({method.label})", ""]
            lines += rst(directive("mtljax", method.name))
        if family == "loss balancing":
            lines += ["## Options of igb_v2", ""]
            lines += rst(
                line
                for name in ("IGBPhases", "IGBAgent")
                for line in directive("mtljax", name)
            )
        yield family.replace(" ", "_"), lines


def native_scale(name: str) -> str | None:
    """The scale whose program equals that of ``scale="native"``, if there is one."""
    method = METHODS[name]
    if "scale" not in inspect.signature(method.factory).parameters:
        return None
    params = {"w": jax.numpy.zeros(8)}
    grads = {"w": jax.numpy.zeros((3, 8))}

    def program(scale):
        balancer = method.build(3, key=jax.random.key(0), scale=scale)
        update = functools.partial(balancer.update, losses=jax.numpy.ones(3))
        text = str(jax.make_jaxpr(update)(grads, balancer.init(params)))
        return re.sub(r"0x[0-9a-f]+", "", text)

    native = program("native")
    return next((scale for scale in ("sum", "mean") if program(scale) == native), None)


def scales_table() -> list[str]:
    """Which methods have which native scale."""
    found: dict[str | None, list[str]] = {scale: [] for scale in SCALES}
    for name in METHODS:
        found[native_scale(name)].append(f"{{func}}`~mtljax.{name}`")
    lines = ["| native scale | methods |", "|:--|:--|"]
    lines += [f"| {SCALES[s]} | {', '.join(found[s])} |" for s in SCALES]
    return lines


def costs_table() -> list[str]:
    """Methods by what they read and what a step costs."""
    groups: dict[tuple[str, str], list[str]] = {}
    for method in METHODS.values():
        groups.setdefault((method_reads(method), method.cost), []).append(
            f"{{func}}`~mtljax.{method.name}`"
        )
    lines = ["| reads | cost of a step | methods |", "|:--|:--|:--|"]
    order = ("nothing", "losses", "Gramian", "gradients")
    rows = sorted(groups.items(), key=lambda row: order.index(row[0][0]))
    for (reads, cost), names in rows:
        lines.append(f"| {reads} | {cost} | {', '.join(names)} |")
    return lines


def leaderboard_lines(answer: bool = False) -> list[str]:
    """The committed leaderboard in short or its answer, nothing without rows."""
    found = board.read()
    if found is None:
        return []

    def name(entry: dict[str, Any]) -> str:
        known = entry["row"] in METHODS
        return f"{{func}}`~mtljax.{entry['row']}`" if known else entry["label"]

    page = f"repository/experiments/{board.PAGE}"
    first, *rest = board.summary(found, page, name)
    if answer:
        link = "{doc}`results` shows the table."
        return [f"**Leaderboard.** {first} {link}"]
    return [f"**Leaderboard.** {first}", *rest]


def linked(table: str) -> list[str]:
    """A table of the registry whose names are links to their sections."""
    return re.sub(r"^\| `(\w+)`", r"| {func}`~mtljax.\1`", table, flags=re.M).split(
        "\n"
    )


# Heading of the page of the core -> the names of ``mtljax`` below it.
CORE = {
    "Gradients": (
        "value_and_balanced_grad",
        "value_and_task_grads",
        "task_gramian",
        "cross_task_gramian",
    ),
    "Balancers and names of tasks": ("Balancer", "observe", "named"),
    "Registry of methods": ("METHODS", "get_method"),
    "Labels": ("label_params", "shared_params", "check_labels"),
    "Missing labels": ("masked_task_means", "skip_absent"),
    "Separate inputs and representations": ("separate", "through"),
    "Several devices": ("Mapped",),
}


def core_page() -> list[str]:
    """The names of ``mtljax`` that are neither methods nor modules."""
    wrappers = list(WRAPPERS)
    listed = {*METHODS, *wrappers, "IGBAgent", "IGBPhases"}
    names = {
        name
        for name in mtljax.__all__
        if name not in listed and not inspect.ismodule(getattr(mtljax, name))
    }
    known = [name for section in CORE.values() for name in section]
    if sorted(known) != sorted(names):
        raise ValueError(f"CORE must list these names once: {sorted(names)}.")
    lines = ["# Core", "", "Gradients, balancers, labels and masks.", ""]
    for heading, section in CORE.items():
        lines += [f"## {heading}", ""]
        lines += rst(line for name in section for line in directive("mtljax", name))
        if "separate" in section:
            types = (directive("mtljax.gradients", n) for n in ("Separate", "Through"))
            lines += rst(line for part in types for line in part)
    lines += ["## Balancers made of balancers", "", *linked(wrappers_table()), ""]
    lines += rst(line for name in wrappers for line in directive("mtljax", name))
    return lines


def methods_page() -> list[str]:
    """A table of the methods of each family, and the class of their rows."""
    lines = [
        "# All methods",
        "",
        f"The {len(METHODS)} methods of mtljax. T is the number of tasks. The column",
        '"passes" counts the forward and the backward passes of a step. The column',
        '"state" counts the numbers that are kept between steps, in addition to the',
        "last task weights and the solver status.",
        "{doc}`../choose` helps to select a method.",
        "",
    ]
    for family in FAMILIES:
        lines += [f"## {family.capitalize()}", ""]
        lines += ["| method | summary | reads | passes | state | source |"]
        lines += ["|:--|:--|:--|:--|:--|:--|"]
        for method in METHODS.values():
            if method.family == family:
                name = f"{{func}}`~mtljax.{method.name}` ({method.label})"
                passes = re.sub(" (forward|backward)", "", method.cost)
                cells = (name, method.promise, method_reads(method), passes)
                cells += (method.state, source_link(method.source))
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    row = directive("mtljax.methods", "Method")
    return [*lines, "## Rows of the registry", "", *rst(row)]


def module_pages() -> Iterator[tuple[str, list[str]]]:
    """One page for every subpackage."""
    skip = {f"mtljax.sharpness.{name}" for name in ("flat_split",)}
    for path, title in MODULES.items():
        module = importlib.import_module(path)
        lines = [f"# {title}", "", f"`{path}`", ""]
        text = inspect.cleandoc(module.__doc__ or "").split("\n")
        lines += rst([f".. py:module:: {path}", "", *text, ""])
        lines += rst(
            line
            for name in public(module)
            if f"{path}.{name}" not in skip
            for line in directive(path, name)
        )
        if path == "mtljax.training":
            lines += rst(directive("mtljax.training.loop", "prefers_host_loop"))
        yield path.removeprefix("mtljax.").replace(".", "_"), lines


# Markdown files of the repository that are pages of the site.
SOURCES = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "experiments/README.md",
    "experiments/RESULTS.md",
    "experiments/ERRATA.md",
)


def repository_pages() -> Iterator[tuple[str, list[str]]]:
    """Markdown files of the repository, and those that they link to."""
    root = DOCS.parent
    queue = [pathlib.PurePosixPath(path) for path in SOURCES]
    for source in queue:  # grows in the loop
        text = (root / source).read_text(encoding="utf-8")
        page = pathlib.PurePosixPath("repository") / source
        up = "/".join([".."] * len(page.parts[:-1]))

        def replace(match, folder=source.parent, up=up):
            mark, label, target = match.groups()
            path = target.partition("#")[0]
            if re.match(r"[a-z]+:", target) or not path:
                return match[0]
            path = pathlib.PurePosixPath(posixpath.normpath(folder / path))
            if mark or not (root / path).exists():
                return f"{mark}[{label}]({up}/../{path})" if mark else label
            if path.suffix == ".md":
                if path not in queue:
                    queue.append(path)
                return f"[{label}]({up}/repository/{path})"
            return label if label.startswith("`") else f"{label} (`{path}`)"

        text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", replace, text)
        if not text.lstrip().startswith("# "):
            text = f"# `{source}`\n\n{text}"
        top = "" if str(source) in SOURCES else "---\norphan: true\n---\n\n"
        yield str(page), (top + text).split("\n")


def pages() -> dict[str, list[str]]:
    """All generated files by their path below ``docs``."""
    found = {f"api/{name}.md": lines for name, lines in method_pages()}
    found |= {f"api/{name}.md": lines for name, lines in module_pages()}
    found |= dict(repository_pages())
    found["api/core.md"] = core_page()
    found["api/methods.md"] = methods_page()
    found["_generated/scales.md"] = scales_table()
    found["_generated/costs.md"] = costs_table()
    found["_generated/leaderboard.md"] = leaderboard_lines()
    found["_generated/leaderboard_answer.md"] = leaderboard_lines(answer=True)
    found["notebooks/index.md"] = notebooks_page()
    found["api/index.md"] = reference_page()
    return found


def reference_page() -> list[str]:
    """The index of the reference, with one line about each page."""
    families = {
        family.replace(" ", "_"): [m for m in METHODS.values() if m.family == family]
        for family in FAMILIES
    }
    rows = {
        "core": "`mtljax` | Gradients, balancers, labels and masks",
        "methods": "`mtljax` | A table of all methods: source, cost and state",
    }
    for page, members in families.items():
        names = ", ".join(f"`{method.name}`" for method in members[:4])
        rows[page] = f"`mtljax` | {len(members)} methods: {names} and others"
    for path in MODULES:
        text = paragraph(importlib.import_module(path).__doc__).partition(". ")[0]
        page = path.removeprefix("mtljax.").replace(".", "_")
        rows[page] = f"`{path}` | {text.rstrip('.')}"
    return [
        "# API reference",
        "",
        "These pages document every public name. Start with {doc}`methods`, and with",
        "{func}`mtljax.value_and_balanced_grad` on the page {doc}`core`.",
        "",
        "| page | module | contents |",
        "|:--|:--|:--|",
        *(f"| {{doc}}`{page}` | {text}. |" for page, text in rows.items()),
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *rows,
        "```",
    ]


def write(app: Sphinx) -> None:
    """Writes all pages and removes generated pages that no longer exist."""
    del app
    wanted = pages()
    for path, lines in wanted.items():
        file = DOCS / path
        text = "\n".join(lines).rstrip() + "\n"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    for folder in ("api", "_generated", "notebooks", "repository"):
        for file in (DOCS / folder).rglob("*.md"):
            if file.relative_to(DOCS).as_posix() not in wanted:
                file.unlink()
    copy_notebooks()


def notebooks_page() -> list[str]:
    """Returns a table of the notebooks with the question that each of them answers."""
    files = sorted((DOCS.parent / "notebooks").glob("*.ipynb"))
    rows = []
    for file in files:
        first = json.loads(file.read_text(encoding="utf-8"))["cells"][0]
        body = " ".join("".join(first["source"]).partition("\n")[2].split())
        question = body[: body.index("?") + 1]
        rows.append(f"| {{doc}}`{file.stem}` | {question} |")
    return [
        "# Notebooks",
        "",
        "Each notebook answers one question with pictures and runs in about a minute",
        "on a CPU with two cores.",
        "",
        "| notebook | question |",
        "|:--|:--|",
        *rows,
        "",
        "```{toctree}",
        ":hidden:",
        "",
        *(file.stem for file in files),
        "```",
    ]


def copy_notebooks() -> None:
    """Copies the executed notebooks to a folder that Sphinx reads."""
    target = DOCS / "notebooks"
    target.mkdir(exist_ok=True)
    folder = DOCS.parent / "notebooks"
    sources = {file.name: file for file in folder.glob("*.ipynb")}
    for name, file in sources.items():
        copy = target / name
        if not copy.exists() or copy.read_bytes() != file.read_bytes():
            shutil.copyfile(file, copy)
    for copy in target.glob("*.ipynb"):
        if copy.name not in sources:
            copy.unlink()


def resolve(app: Sphinx, env: Any, node: Any, contnode: Any) -> Any:
    """Resolves names that are written in another way than they are documented.

    A name of mtljax is found by the object that it names, or by its last part if that
    is unique: ``mtljax.sharpness.flat_split`` is documented as ``mtljax.flat_split``. A
    name of another package is accepted without a link if it exists.
    """
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node["reftarget"]
    paths = [f"{prefix}.{target}" for prefix in (node.get("py:module"), "mtljax")]
    found = [_found(path) for path in (*paths, target)]
    listed = [_listed(domain).get(id(value)) for value in found if value is not None]
    ends = [path for path in _public(domain) if path.endswith(f".{target}")]
    listed += ends if len(ends) == 1 else []
    for path in filter(None, listed):
        entry = domain.objects[path]
        source = node.get("refdoc", "index")
        return make_refnode(
            app.builder, source, entry.docname, entry.node_id, contnode, path
        )
    foreign = "." in target and not target.startswith("mtljax")
    return contnode if foreign and offline_name_exists(target) else None


def offline_name_exists(path: str) -> bool:
    """Whether a dotted name of an installed package exists."""
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(importlib.import_module(owner), name)
    except ImportError:
        return False


def _found(path: str) -> Any:
    """The object of mtljax with this path, or None."""
    owner, _, name = path.rpartition(".")
    if not owner.startswith("mtljax"):
        return None
    try:
        return getattr(importlib.import_module(owner), name, None)
    except ImportError:
        return None


def _listed(domain: Any) -> dict[int, str]:
    """Documented paths by the identity of the object."""
    paths = _public(domain)
    return {id(found): path for path in paths if (found := _found(path)) is not None}


def _public(domain: Any) -> list[str]:
    """Documented paths without the private paths that autodoc adds as aliases."""
    paths = [path for path in domain.objects if path.startswith("mtljax.")]
    return [path for path in paths if "._" not in path]


class Docstring(napoleon.GoogleDocstring):
    """Takes the text before a colon of ``Returns`` as a type only if it is one."""

    def _consume_returns_section(self, preprocess_types=False):
        fields = super()._consume_returns_section(preprocess_types)
        if not fields:
            return fields
        (name, kind, text), *rest = fields
        if kind and not re.fullmatch(r":\w+:`[^`]+`|[\w.]+", kind):
            first, *more = text or [""]
            text = [f"{kind}: {first}".rstrip(), *more]
            kind = ""
        return [(name, kind, text), *rest]


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the pages with Sphinx."""
    napoleon.GoogleDocstring = Docstring
    app.connect("builder-inited", write)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "version": "1"}
