"""Vocabulary: the shapes that every file of the core speaks about.

``tasks`` is the number of losses T. A *stacked* tree has the structure of the
parameters and one more axis, the first, of length T.
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
# A hyper-parameter: a number, or a traced or concrete scalar array.
Number: TypeAlias = int | float | Float[Array, ""] | Int[Array, ""]
