"""Meshes, where parameters lie on them, and the few operations that say so.

A model names the axes of its parameters ("embed", "mlp", ...); a layout maps these
names to axes of the mesh. The same model then runs on one device, on Auto axes, where
the compiler places values, and on Explicit axes, where shardings are part of types
and a contraction of sharded axes must name the sharding of its result.
"""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


class Layout(NamedTuple):
    """Which axes of a mesh split the batch and the parameters.

    Attributes:
      name: For the names of cases.
      shape: Sizes of the axes of the mesh.
      axes: Their names.
      batch: The axes that split the batch.
      fsdp: The axis that stores parameters in parts and gathers them before use.
      model: The axis that splits the products themselves (tensor parallelism).
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    batch: tuple[str, ...]
    fsdp: str | None = None
    model: str | None = None


LAYOUTS = (
    Layout("dp8", (8,), ("data",), ("data",)),
    Layout("fsdp8", (8,), ("data",), ("data",), fsdp="data"),
    Layout("tp42", (4, 2), ("data", "model"), ("data",), model="model"),
    Layout("two42", (4, 2), ("data", "model"), ("data",), fsdp="data", model="model"),
    Layout(
        "three222",
        (2, 2, 2),
        ("data", "fsdp", "model"),
        ("data", "fsdp"),
        fsdp="fsdp",
        model="model",
    ),
)

BY_NAME = {layout.name: layout for layout in LAYOUTS}


def make_mesh(layout: Layout, kind: str) -> jax.sharding.Mesh:
    """A mesh with all axes of one kind, ``"auto"`` or ``"explicit"``."""
    axis = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[kind]
    return jax.make_mesh(
        layout.shape, layout.axes, axis_types=(axis,) * len(layout.axes)
    )


def has_set_mesh() -> bool:
    """Whether a mesh can be the context of a program (not in jax 0.7.0)."""
    return hasattr(jax, "set_mesh")


def is_names(node: Any) -> bool:
    """Whether a node of a tree is the names of the axes of one array."""
    return isinstance(node, tuple) and all(
        name is None or isinstance(name, str) for name in node
    )


class Place(NamedTuple):
    """Where values lie; ``Place()`` is one device, and does nothing.

    Attributes:
      layout: Names of mesh axes.
      mesh: The mesh.
      kind: ``"auto"`` or ``"explicit"``.
      constrain: On Auto axes, whether the model constrains what it uses, as a
        training loop with FSDP does. Otherwise the compiler decides alone.
    """

    layout: Layout | None = None
    mesh: jax.sharding.Mesh | None = None
    kind: str = "auto"
    constrain: bool = False

    @property
    def context(self) -> Any:
        """What to trace in: the mesh as the context, where that is asked for."""
        if self.mesh is not None and self.constrain and has_set_mesh():
            return jax.set_mesh(self.mesh)
        return contextlib.nullcontext()

    def axis(self, name: str | None, *, stored: bool) -> Any:
        """The mesh axes of a named axis: as stored, or as used in a product."""
        layout = self.layout
        if layout is None or name is None:
            return None
        if name == "batch":
            return layout.batch[0] if len(layout.batch) == 1 else layout.batch or None
        if name == "embed":
            return layout.fsdp if stored else None
        return layout.model if name in ("mlp", "heads") else None

    def sharding(self, names: Any, *, stored: bool) -> NamedSharding:
        """The sharding of an array whose axes have these names."""
        assert self.mesh is not None
        spec = P(*(self.axis(name, stored=stored) for name in names))
        return NamedSharding(self.mesh, spec)

    def use(self, x: jax.Array, *names: str | None) -> jax.Array:
        """A value placed as products use it."""
        if self.mesh is None:
            return x
        target = self.sharding(names, stored=False)
        if self.kind == "explicit":
            return jax.sharding.reshard(x, target)
        return jax.lax.with_sharding_constraint(x, target) if self.constrain else x

    def einsum(self, formula: str, *operands: jax.Array, names: Any) -> jax.Array:
        """An einsum that says where its result lies, if that is part of its type."""
        if self.mesh is None or self.kind == "auto":
            return jnp.einsum(formula, *operands)
        target = self.sharding(names, stored=False)
        return jnp.einsum(formula, *operands, out_sharding=target)

    def take(self, table: jax.Array, ids: jax.Array, *, names: Any) -> jax.Array:
        """Rows of a table."""
        if self.mesh is None or self.kind == "auto":
            return table[ids]
        target = self.sharding(names, stored=False)
        return table.at[ids].get(out_sharding=target)

    def put(self, tree: Any, names: Any) -> Any:
        """The arrays, placed as they are stored."""
        if self.mesh is None:
            return tree
        return jax.device_put(tree, self.shardings(names))

    def shardings(self, names: Any) -> Any:
        """A tree of shardings for a tree of names of axes."""
        return jax.tree.map(
            lambda axes: self.sharding(axes, stored=True),
            names,
            is_leaf=is_names,
        )

    def replicate(self, tree: Any) -> Any:
        """The arrays on every device."""
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, P()))
