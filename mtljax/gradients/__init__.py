"""Per-task gradients, their Gramian, and the balanced gradient."""

from mtljax.gradients._balanced import Engine as Engine
from mtljax.gradients._balanced import (
    value_and_balanced_grad as value_and_balanced_grad,
)
from mtljax.gradients._gramian_engine import (
    cross_task_gramian as cross_task_gramian,
)
from mtljax.gradients._gramian_engine import task_gramian as task_gramian
from mtljax.gradients._labels import check_labels as check_labels
from mtljax.gradients._labels import label_params as label_params
from mtljax.gradients._labels import resolve_labels as resolve_labels
from mtljax.gradients._labels import shared_params as shared_params
from mtljax.gradients._task_grads import Strategy as Strategy
from mtljax.gradients._task_grads import (
    value_and_task_grads as value_and_task_grads,
)
