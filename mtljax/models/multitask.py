"""Multi-task model as two functions: one trunk, one linear head per task."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from mtljax.models._layers import at_least_float32, linear
from mtljax.models.lenet import LeNet
from mtljax.models.mlp import MLP
from mtljax.models.resnet import ResNet

_TRUNKS: dict[str, type[nn.Module]] = {"mlp": MLP, "lenet": LeNet, "resnet18": ResNet}


class Variables(NamedTuple):
    """Parameters and running averages of a model."""

    params: PyTree  # {"trunk": {...}, "heads": {task: {"kernel", "bias"}}}
    batch_stats: PyTree  # running averages of batch normalisation; {} without them


class ApplyFn(Protocol):
    """The type of :attr:`Model.apply`."""

    def __call__(
        self,
        variables: Variables | tuple[PyTree, PyTree],
        x: ArrayLike,
        *,
        train: bool,
        key: PRNGKeyArray | None = None,
        update_stats: bool = True,
    ) -> tuple[dict[str, Array], PyTree]:
        """Runs the model.

        Args:
          variables: The variables of the model, or the pair ``(params, batch_stats)``.
          x: A batch, shape ``[batch, ...]``.
          train: Whether to normalise with the statistics of the batch and apply
            dropout. Otherwise the running averages are used and returned unchanged.
          key: Random key of dropout. Required in training if the model has dropout.
          update_stats: Whether running averages are updated with ``train=True``.
            ``False`` leaves them unchanged, for example in the second pass of SAM.

        Returns:
          A pair of the outputs of every task, ``{task: [batch, size]}`` in at least
          float32, and the new ``batch_stats``.

        """
        ...


class Model(NamedTuple):
    """A model as two pure functions, so that callers do not depend on Flax.

    Attributes:
      init: ``init(key, x) -> Variables``. Only the shape of ``x [batch, ...]`` is used.
      apply: ``apply(variables, x, *, train, key=None, update_stats=True) ->
        (outputs, batch_stats)``, see :class:`ApplyFn`.
    """

    init: Callable[[PRNGKeyArray, ArrayLike], Variables]
    apply: ApplyFn


def build(name: str, heads: Mapping[str, int], **options: Any) -> Model:
    """Builds a multi-task model from the name of its trunk.

    Args:
      name: ``"mlp"`` (:class:`MLP`), ``"lenet"`` (:class:`LeNet`) or ``"resnet18"``
        (:class:`ResNet`).
      heads: Output size of the linear head of every task. One entry gives a single-task
        model.
      **options: Fields of the class of the trunk, such as ``hidden`` or ``stem``. With
        ``dtype``, trunk and heads compute in this type with float32 parameters.

    Returns:
      A :class:`Model`. The trunk and each head use their own random keys, and the key
      of a head depends on the name of its task. With the same key, single-task and
      multi-task models therefore start from equal values.

    Raises:
      ValueError: If the name or an option is unknown, if there is no head, or if a head
        has no output.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax import models
      >>> model = models.build("mlp", {"digit": 10, "parity": 2}, hidden=(16,))
      >>> x = jnp.ones((4, 8, 8, 1))
      >>> variables = model.init(jax.random.key(0), x)
      >>> sorted(variables.params), sorted(variables.params["heads"])
      (['heads', 'trunk'], ['digit', 'parity'])
      >>> outputs, batch_stats = model.apply(variables, x, train=True)
      >>> outputs["digit"].shape, outputs["parity"].shape, batch_stats
      ((4, 10), (4, 2), {})
    """
    if name not in _TRUNKS:
        raise ValueError(f"Unknown model {name!r}; choose one of {', '.join(_TRUNKS)}.")
    trunk = _TRUNKS[name]
    known = [f for f in trunk.__dataclass_fields__ if f not in ("parent", "name")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"Unknown option {unknown[0]!r} of model {name!r}; choose from "
            f"{', '.join(known)}."
        )
    return multitask(trunk(**options), heads, dtype=options.get("dtype"))


def multitask(
    trunk: nn.Module, heads: Mapping[str, int], *, dtype: Dtype | None = None
) -> Model:
    """Adds one linear head per task to a trunk.

    Args:
      trunk: A linen module, called as ``trunk(x, train=...)``, that returns features
        ``[batch, features]`` and stores its running averages in ``batch_stats``.
      heads: Output size of the head of every task.
      dtype: Compute dtype of the heads. Outputs are cast back to float32.

    Returns:
      A :class:`Model`, see :func:`build`.

    Raises:
      ValueError: If there is no head, or if a head has no output.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax import models
      >>> model = models.multitask(models.MLP(hidden=(4,)), {"a": 1})
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3)))
      >>> variables.params["heads"]["a"]["kernel"].shape
      (4, 1)
    """
    if not heads:
        raise ValueError("A model needs at least one head, but heads is empty.")
    for task, size in heads.items():
        if size < 1:
            raise ValueError(f"Head {task!r} needs at least one output, not {size}.")
    heads = dict(heads)

    def init(key: PRNGKeyArray, x: ArrayLike) -> Variables:
        trunk_key, heads_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
        features, variables = trunk.init_with_output(trunk_key, x, train=False)
        head_params = {}
        for task, size in heads.items():
            head = linear(size, features.shape[-1], dtype=dtype)
            task_key = jax.random.fold_in(heads_key, zlib.crc32(task.encode()))
            head_params[task] = head.init(task_key, features)["params"]
        params = {"trunk": variables.get("params", {}), "heads": head_params}
        return Variables(params, variables.get("batch_stats", {}))

    def apply(
        variables: Variables | tuple[PyTree, PyTree],
        x: ArrayLike,
        *,
        train: bool,
        key: PRNGKeyArray | None = None,
        update_stats: bool = True,
    ) -> tuple[dict[str, Array], PyTree]:
        params, batch_stats = variables
        if train and key is None and getattr(trunk, "dropout", 0) > 0:
            raise ValueError("A model with dropout needs key= when train=True.")
        features, mutated = trunk.apply(
            {"params": params["trunk"], "batch_stats": batch_stats},
            x,
            train=train,
            rngs=None if key is None else {"dropout": key},
            mutable=["batch_stats"] if train and update_stats else [],
        )
        outputs = {}
        for task, size in heads.items():
            head = linear(size, features.shape[-1], dtype=dtype)
            out: Any = head.apply({"params": params["heads"][task]}, features)
            outputs[task] = at_least_float32(out)
        return outputs, mutated.get("batch_stats", batch_stats)

    return Model(init, apply)
