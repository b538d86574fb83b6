"""Per-task gradients, their Gramian, and the balanced gradient."""

from mtljax.gradients._pullback import pullback as pullback
from mtljax.gradients.balanced import Engine as Engine
from mtljax.gradients.balanced import value_and_balanced_grad as value_and_balanced_grad
from mtljax.gradients.gramian import cross_task_gramian as cross_task_gramian
from mtljax.gradients.gramian import task_gramian as task_gramian
from mtljax.gradients.labels import check_labels as check_labels
from mtljax.gradients.labels import label_params as label_params
from mtljax.gradients.labels import resolve_labels as resolve_labels
from mtljax.gradients.labels import shared_params as shared_params
from mtljax.gradients.linearized import AxisName as AxisName
from mtljax.gradients.linearized import Mapped as Mapped
from mtljax.gradients.linearized import Strategy as Strategy
from mtljax.gradients.linearized import check_losses as check_losses
from mtljax.gradients.task_grads import value_and_task_grads as value_and_task_grads
