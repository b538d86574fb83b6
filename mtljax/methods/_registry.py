"""The table of all methods, for documentation, tests and experiments."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray

from mtljax.balancer import Balancer
from mtljax.methods._aligned_mtl import aligned_mtl
from mtljax.methods._cagrad import cagrad
from mtljax.methods._conflict_free import conflict_free
from mtljax.methods._cosmos import cosmos
from mtljax.methods._db_mtl import db_mtl
from mtljax.methods._dualproj import dualproj
from mtljax.methods._dwa import dwa
from mtljax.methods._excess_mtl import excess_mtl
from mtljax.methods._fairgrad import fairgrad
from mtljax.methods._famo import famo
from mtljax.methods._gcs import gcs
from mtljax.methods._geometric_mean import geometric_mean
from mtljax.methods._graddrop import graddrop
from mtljax.methods._gradient_norm_weighting import gradient_norm_weighting
from mtljax.methods._gradnorm import gradnorm
from mtljax.methods._gradvac import gradvac
from mtljax.methods._igb_v1 import igb_v1
from mtljax.methods._igb_v2 import igb_v2
from mtljax.methods._imtl_g import imtl_g
from mtljax.methods._imtl_l import imtl_l
from mtljax.methods._krum import krum
from mtljax.methods._linear import linear
from mtljax.methods._mgda import mgda
from mtljax.methods._moco import moco
from mtljax.methods._modo import modo
from mtljax.methods._nash_mtl import nash_mtl
from mtljax.methods._ol_aux import ol_aux
from mtljax.methods._pbi import pbi
from mtljax.methods._pcd import pcd
from mtljax.methods._pcgrad import pcgrad
from mtljax.methods._random_gradient_weighting import random_gradient_weighting
from mtljax.methods._random_loss_weighting import random_loss_weighting
from mtljax.methods._scale_invariant import scale_invariant
from mtljax.methods._sdmgrad import sdmgrad
from mtljax.methods._stch import stch
from mtljax.methods._trimmed_mean import trimmed_mean
from mtljax.methods._uncertainty import uncertainty
from mtljax.methods._upgrad import upgrad


class Method(NamedTuple):
    """A row of the table of methods."""

    factory: Callable[..., Balancer]
    label: str  # acronym in the literature
    family: str  # "loss balancing" or "gradient balancing"
    source: str  # arXiv id, or the venue if there is none
    cost: str  # passes through the network for T tasks
    state: str  # numbers in the state, without task_weights
    promise: str  # one-line summary or guarantee

    @property
    def name(self) -> str:
        """Returns the name of the factory."""
        return self.factory.__name__

    @property
    def random(self) -> bool:
        """Returns whether the factory has an argument ``key``."""
        return "key" in inspect.signature(self.factory).parameters

    def build(
        self, num_tasks: int, *, key: PRNGKeyArray | None = None, **options: Any
    ) -> Balancer:
        """Builds the balancer. ``key`` is passed to methods that sample numbers.

        Args:
          num_tasks: Number of tasks T.
          key: Key of ``jax.random``, required by random methods.
          **options: Further arguments of the factory.

        Returns:
          A :class:`mtljax.Balancer`.
        """
        if self.random:
            options["key"] = key
        return self.factory(num_tasks, **options)


_LOSS, _GRAD = "loss balancing", "gradient balancing"
_ONE, _TWO, _ALL = (
    "1 forward, 1 backward",
    "2 forward, 1 backward",
    "1 forward, T backward",
)

METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(linear, "LS", _LOSS, "2209.11379", _ONE, "0", "constant weights; the first baseline to tune"),
        Method(scale_invariant, "SI", _LOSS, "2202.01017", _ONE, "0", "invariant to the unit of each loss"),
        Method(random_loss_weighting, "RLW", _LOSS, "2111.10603", _ONE, "key", "equal weights in expectation"),
        Method(uncertainty, "UW", _LOSS, "1705.07115", _ONE, "4T", "learned noise variance per task"),
        Method(dwa, "DWA", _LOSS, "1803.10704", _ONE, "5T", "larger weights for losses that decrease least"),
        Method(famo, "FAMO", _LOSS, "2306.03792", _TWO, "6T", "equal relative decrease of all losses over time"),
        Method(geometric_mean, "GLS", _LOSS, "1904.08492", _ONE, "0", "minimises the geometric mean of the losses"),
        Method(imtl_l, "IMTL-L", _LOSS, "ICLR 2021", _ONE, "4T", "learns scales such that all scaled losses are one"),
        Method(gradnorm, "GradNorm", _LOSS, "1711.02257", _ALL, "6T", "larger gradients for tasks that train slower"),
        Method(gradient_norm_weighting, "grad-norm", _LOSS, "2308.08468", _ALL, "T", "equal norms of all weighted gradients, averaged over time"),
        Method(stch, "STCH", _LOSS, "2402.19078", _ONE, "2T", "a smooth maximum of the losses"),
        Method(cosmos, "COSMOS", _LOSS, "2103.13392", _ONE, "0", "penalises the angle between losses and a preference"),
        Method(pbi, "PBI", _LOSS, "TEVC 2007", _ONE, "0", "penalises the distance of the losses from a preference line"),
        Method(excess_mtl, "ExcessMTL", _LOSS, "2402.02009", _ALL, "T copies + 2T", "weights from excess risks; robust to label noise"),
        Method(igb_v1, "IGBv1", _LOSS, "2307.15429", _ONE, "4T", "log losses, weighted by their improvable gaps"),
        Method(igb_v2, "IGBv2", _LOSS, "2307.15429", _ONE, "agent, 1e4 (5T + 1)", "log losses, weighted by a soft actor-critic"),
        Method(mgda, "MGDA", _GRAD, "1810.04650", _ALL, "0", "no task gets worse; zero at Pareto stationarity"),
        Method(pcgrad, "PCGrad", _GRAD, "2001.06782", _ALL, "key", "no conflict for T = 2"),
        Method(imtl_g, "IMTL-G", _GRAD, "ICLR 2021", _ALL, "0", "equal projections on all task gradients"),
        Method(cagrad, "CAGrad", _GRAD, "2110.14048", _ALL, "0", "best worst-case gain within c‖g₀‖ of the mean"),
        Method(nash_mtl, "Nash-MTL", _GRAD, "2202.01017", _ALL, "T", "proportional fairness; invariant to loss scale"),
        Method(random_gradient_weighting, "RGW", _GRAD, "2111.10603", _ONE, "key", "RLW on the shared parameters only"),
        Method(gradvac, "GradVac", _GRAD, "2010.05874", _ALL, "key, T²", "cosines kept at their running mean"),
        Method(fairgrad, "FairGrad", _GRAD, "2402.15638", _ALL, "0", "alpha-fair gains of all tasks, all positive"),
        Method(aligned_mtl, "Aligned-MTL", _GRAD, "2305.19000", _ALL, "0", "nearest orthogonal gradients of equal norm"),
        Method(upgrad, "UPGrad", _GRAD, "2406.16232", _ALL, "0", "no task gets worse; linear in each gradient"),
        Method(dualproj, "DualProj", _GRAD, "1706.08840", _ALL, "0", "nearest vector to the mean gradient that makes no task worse"),
        Method(conflict_free, "ConFIG", _GRAD, "2408.11104", _ALL, "0", "equal angles to all task gradients"),
        Method(sdmgrad, "SDMGrad", _GRAD, "2305.18409", _ALL, "T", "min-norm direction, regularised to the mean gradient"),
        Method(modo, "MoDo", _GRAD, "2305.20057", _ALL, "T", "one step towards the min-norm weights per batch"),
        Method(moco, "MoCo", _GRAD, "2210.12624", _ALL, "T copies + 2T", "min-norm weights of averaged gradients"),
        Method(db_mtl, "DB-MTL", _GRAD, "2308.12029", _ALL, "T copies + 2T", "log losses; all gradients of equal norm"),
        Method(graddrop, "GradDrop", _GRAD, "2010.06808", _ALL, "key", "one sign per coordinate; the sum in expectation"),
        Method(gcs, "GCS", _GRAD, "1812.02224", _ALL, "0", "auxiliary gradients with a positive cosine to the main one"),
        Method(pcd, "PCD", _GRAD, "2606.29521", _ALL, "2T", "nearest vector to the main gradient with a minimal gain for every other task"),
        Method(ol_aux, "OL-AUX", _GRAD, "NeurIPS 2019", _ALL, "3T", "auxiliary weights learned for the main task"),
        Method(krum, "Krum", _GRAD, "1703.02757", _ALL, "0", "the gradient nearest to most other gradients"),
        Method(trimmed_mean, "TrimmedMean", _GRAD, "1803.01498", _ALL, "0", "coordinate-wise mean without the extreme entries"),
    )
}  # fmt: skip


def get_method(name: str) -> Method:
    """Returns the table row of a method by the name of its factory or by its label.

    Case, hyphens, underscores and spaces are ignored, so that ``"PCGrad"``,
    ``"nash-mtl"`` and ``"nash_mtl"`` are valid names.

    Args:
      name: Name or label of the method.

    Returns:
      A ``Method``, an entry of ``mtljax.METHODS``.

    Raises:
      ValueError: If no method has this name. The message contains similar names.

    Examples:
      >>> import mtljax
      >>> mtljax.get_method("Nash-MTL").name
      'nash_mtl'
    """
    found, hint = find_row(name, METHODS)
    if found is None:
        hint = hint or "mtljax.METHODS lists all names."
        raise ValueError(f"get_method: no method has the name {name!r}; {hint}")
    return found


def find_row(name: str, rows: Mapping[str, Any]) -> tuple[Any, str]:
    """Returns the row with this name or label, or None and a hint with similar names.

    Only letters and digits are compared, without regard to case. The hint is empty if
    no name is similar.
    """
    labels = {_plain(row.label): row for row in rows.values()}
    known = labels | {_plain(row.name): row for row in rows.values()}
    found = known.get(_plain(name))
    close = difflib.get_close_matches(_plain(name), known, n=3, cutoff=0.5)
    similar = dict.fromkeys(repr(known[match].name) for match in close)
    hint = f"did you mean {' or '.join(similar)}?" if similar else ""
    return found, "" if found else hint


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def source_link(source: str) -> str:
    """Returns a link to arXiv if the source is an arXiv id, else the venue."""
    number = source[:4].isdigit()
    return f"[{source}](https://arxiv.org/abs/{source})" if number else source


def methods_table() -> str:
    """Returns the Markdown table of all methods.

    Examples:
      >>> print(methods_table().splitlines()[2][:26])
      | `linear` | LS | [2209.11
    """
    lines = [
        "| name | label | source | reads | cost of a step | state | summary |",
        "|:--|:--|:--|:--|:--|:--|:--|",
    ]
    for method in METHODS.values():
        balancer = method.build(3, key=jax.random.key(0))
        reads = "losses" if balancer.reads_losses else "nothing"
        reads = {"gramian": "Gramian", "grads": "gradients"}.get(balancer.needs, reads)
        cells = (f"`{method.name}`", method.label, source_link(method.source), reads)
        cells += (method.cost, method.state, method.promise)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
