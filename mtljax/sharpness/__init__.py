"""Sharpness-aware minimisation (SAM) for multi-task learning.

- :func:`sam_task_grads` returns the loss gradient ``g_i`` of every task and its flat
  part ``h_i = g_i^SAM − g_i``. The flat part is the change of the gradient under the
  worst small perturbation of the parameters.
- :func:`flat_split` turns a balancer into a balancer of pairs (g, h), as in FS-MTL.
- :func:`value_and_flat_grad` combines both in one step and supports schedules.
- :func:`flat_gramians`, :func:`flat_conflicts` and :func:`surrogate_sharpness` are
  diagnostics.
"""

from mtljax.sharpness._diagnostics import FlatConflicts as FlatConflicts
from mtljax.sharpness._diagnostics import FlatGramians as FlatGramians
from mtljax.sharpness._diagnostics import flat_conflicts as flat_conflicts
from mtljax.sharpness._diagnostics import flat_gramians as flat_gramians
from mtljax.sharpness._diagnostics import surrogate_sharpness as surrogate_sharpness
from mtljax.sharpness._flat_grad import FlatGrad as FlatGrad
from mtljax.sharpness._flat_grad import FlatGradState as FlatGradState
from mtljax.sharpness._flat_grad import value_and_flat_grad as value_and_flat_grad
from mtljax.sharpness._flat_split import FlatSplitState as FlatSplitState
from mtljax.sharpness._flat_split import Mode as Mode
from mtljax.sharpness._flat_split import flat_split as flat_split
from mtljax.sharpness._perturbation import Ball as Ball
from mtljax.sharpness._perturbation import Norm as Norm
from mtljax.sharpness._perturbation import Perturb as Perturb
from mtljax.sharpness._perturbation import Samo as Samo
from mtljax.sharpness._sam_grads import SamGrads as SamGrads
from mtljax.sharpness._sam_grads import merge_own as merge_own
from mtljax.sharpness._sam_grads import sam_task_grads as sam_task_grads
from mtljax.sharpness._schedule import SamSchedule as SamSchedule
