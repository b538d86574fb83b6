"""Multi-task optimisation for JAX.

mtljax implements methods that balance several losses as ``optax`` transformations of
stacked task gradients. ``import mtljax`` imports the core, which depends on jax, optax,
jaxtyping and numpy only. Every other public module, for example ``mtljax.training``, is
imported when it is first used as an attribute. ``mtljax.models``, ``mtljax.data`` and
``mtljax.training`` need the extra ``mtljax[train]``.
"""

import importlib
import pkgutil
import sys
from typing import Any

from mtljax import alternating as alternating
from mtljax import forkmerge as forkmerge
from mtljax import metrics as metrics
from mtljax import sharpness as sharpness
from mtljax import solvers as solvers
from mtljax import stack as stack
from mtljax.balancer import Balancer as Balancer
from mtljax.balancer import named as named
from mtljax.balancer import observe as observe
from mtljax.gradients import Mapped as Mapped
from mtljax.gradients import check_labels as check_labels
from mtljax.gradients import cross_task_gramian as cross_task_gramian
from mtljax.gradients import label_params as label_params
from mtljax.gradients import separate as separate
from mtljax.gradients import shared_params as shared_params
from mtljax.gradients import task_gramian as task_gramian
from mtljax.gradients import through as through
from mtljax.gradients import value_and_balanced_grad as value_and_balanced_grad
from mtljax.gradients import value_and_task_grads as value_and_task_grads
from mtljax.methods import METHODS as METHODS
from mtljax.methods import IGBAgent as IGBAgent
from mtljax.methods import IGBPhases as IGBPhases
from mtljax.methods import aligned_mtl as aligned_mtl
from mtljax.methods import cagrad as cagrad
from mtljax.methods import conflict_free as conflict_free
from mtljax.methods import cosmos as cosmos
from mtljax.methods import db_mtl as db_mtl
from mtljax.methods import dualproj as dualproj
from mtljax.methods import dwa as dwa
from mtljax.methods import excess_mtl as excess_mtl
from mtljax.methods import fairgrad as fairgrad
from mtljax.methods import famo as famo
from mtljax.methods import gcs as gcs
from mtljax.methods import geometric_mean as geometric_mean
from mtljax.methods import get_method as get_method
from mtljax.methods import graddrop as graddrop
from mtljax.methods import gradient_norm_weighting as gradient_norm_weighting
from mtljax.methods import gradnorm as gradnorm
from mtljax.methods import gradvac as gradvac
from mtljax.methods import igb_v1 as igb_v1
from mtljax.methods import igb_v2 as igb_v2
from mtljax.methods import imtl_g as imtl_g
from mtljax.methods import imtl_l as imtl_l
from mtljax.methods import krum as krum
from mtljax.methods import linear as linear
from mtljax.methods import mgda as mgda
from mtljax.methods import moco as moco
from mtljax.methods import modo as modo
from mtljax.methods import nash_mtl as nash_mtl
from mtljax.methods import ol_aux as ol_aux
from mtljax.methods import pbi as pbi
from mtljax.methods import pcd as pcd
from mtljax.methods import pcgrad as pcgrad
from mtljax.methods import random_gradient_weighting as random_gradient_weighting
from mtljax.methods import random_loss_weighting as random_loss_weighting
from mtljax.methods import scale_invariant as scale_invariant
from mtljax.methods import sdmgrad as sdmgrad
from mtljax.methods import stch as stch
from mtljax.methods import trimmed_mean as trimmed_mean
from mtljax.methods import uncertainty as uncertainty
from mtljax.methods import upgrad as upgrad
from mtljax.missing import masked_task_means as masked_task_means
from mtljax.missing import skip_absent as skip_absent
from mtljax.sharpness import flat_split as flat_split
from mtljax.wrappers import compose as compose
from mtljax.wrappers import inject_hyperparams as inject_hyperparams
from mtljax.wrappers import per_layer as per_layer
from mtljax.wrappers import reuse as reuse
from mtljax.wrappers import smooth_weights as smooth_weights

__version__ = "0.1.0"

__all__ = [
    # balancers
    "Balancer",
    "observe",
    "named",
    # gradients
    "value_and_balanced_grad",
    "value_and_task_grads",
    "task_gramian",
    "cross_task_gramian",
    "label_params",
    "shared_params",
    "check_labels",
    "separate",
    "through",
    "Mapped",
    # missing labels and absent tasks
    "masked_task_means",
    "skip_absent",
    # loss balancing
    "linear",
    "scale_invariant",
    "random_loss_weighting",
    "uncertainty",
    "dwa",
    "famo",
    "geometric_mean",
    "imtl_l",
    "gradnorm",
    "gradient_norm_weighting",
    "stch",
    "cosmos",
    "pbi",
    "excess_mtl",
    "igb_v1",
    "igb_v2",
    "IGBAgent",
    "IGBPhases",
    # gradient balancing
    "mgda",
    "pcgrad",
    "imtl_g",
    "cagrad",
    "nash_mtl",
    "random_gradient_weighting",
    "upgrad",
    "dualproj",
    "fairgrad",
    "aligned_mtl",
    "conflict_free",
    "gradvac",
    "sdmgrad",
    "modo",
    "moco",
    "db_mtl",
    "graddrop",
    "gcs",
    "ol_aux",
    "pcd",
    "krum",
    "trimmed_mean",
    # wrappers of balancers
    "compose",
    "smooth_weights",
    "per_layer",
    "flat_split",
    "inject_hyperparams",
    "reuse",
    # the table of methods
    "METHODS",
    "get_method",
    # subpackages of the core that are imported with the package
    "alternating",
    "forkmerge",
    "metrics",
    "sharpness",
    "solvers",
    "stack",
]


def _modules() -> set[str]:
    """Returns the names of all public modules and subpackages, imported or not."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return {name for name in found if not name.startswith("_")}


def __getattr__(name: str) -> Any:
    """Imports a public module when it is first used as an attribute."""
    if not name.startswith("_") and name in _modules():
        return importlib.import_module(f"{__name__}.{name}")
    # With the name and the module, Python shows similar names in the traceback.
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}",
        name=name,
        obj=sys.modules[__name__],
    )


def __dir__() -> list[str]:
    """Returns the public names, including modules that are not imported yet."""
    return sorted({*__all__, *_modules(), "__version__"})
