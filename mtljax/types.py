"""Type aliases for the arrays and the options of the core.

``tasks`` is the number of tasks T. The leaves of *stacked* gradients have the shapes of
the parameters with an additional leading axis of length T.
"""

from typing import Any, Literal, TypeAlias

from jaxtyping import Array, Bool, Float, Int, PyTree

Params: TypeAlias = PyTree[Any]
Grads: TypeAlias = PyTree[Float[Array, "tasks ..."]]
Update: TypeAlias = PyTree[Float[Array, "..."]]
Gramian: TypeAlias = Float[Array, "tasks tasks"]
Weights: TypeAlias = Float[Array, " tasks"]
Losses: TypeAlias = Float[Array, " tasks"]
Mask: TypeAlias = Bool[Array, " tasks"]

Needs: TypeAlias = Literal["losses", "gramian", "grads"]
Scale: TypeAlias = Literal["native", "sum", "mean"]
Heads: TypeAlias = Literal["own", "weighted"]
Label: TypeAlias = Literal["shared", "own", "frozen"]
# A hyper-parameter: a number, or a concrete or traced scalar array.
Number: TypeAlias = int | float | Float[Array, ""] | Int[Array, ""]
