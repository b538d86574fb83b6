"""Models for multi-task experiments: a shared trunk and one head per task.

This subpackage imports Flax. The core of the library supports any pytree of parameters.
"""

from mtljax.extras import require

require("mtljax.models", "train", "flax")

from mtljax.models.lenet import LeNet
from mtljax.models.mlp import MLP
from mtljax.models.multitask import ApplyFn, Model, Variables, build, multitask
from mtljax.models.resnet import BasicBlock, ResNet

__all__ = [
    "build",
    "multitask",
    "Model",
    "ApplyFn",
    "Variables",
    "MLP",
    "LeNet",
    "ResNet",
    "BasicBlock",
]
