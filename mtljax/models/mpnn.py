"""Message-passing network for molecules, with NNConv, GRU and Set2Set."""

from typing import Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mtljax.models._layers import linear, to_compute, torch_bias

Edges: TypeAlias = Literal["bonds", "distances"]

_ATOM_COLUMNS = 5  # atomic number, hydrogens, charge + 1, hybridisation, ring
_BOND_TYPES = 4  # single, double, triple, aromatic


class MPNN(nn.Module):
    """Message-passing network (MPNN) of the multi-task tables on QM9.

    The network processes padded molecules in three stages:

    1. A dense layer with ReLU embeds the atoms.
    2. ``rounds`` rounds with the same weights compute ``m_i = mean_j A(e_ij) h_j`` over
       the neighbours, apply ReLU, and update ``h_i = GRU(m_i, h_i)``.
    3. Set2Set pools the atoms, and a dense layer with ReLU returns the features.

    ``A`` is a network with one hidden layer that maps the features of an edge to a
    width x width matrix. For bonds, it is evaluated once per bond type. For distances,
    it is contracted with the states of the neighbours before its last layer. This gives
    the same values without a matrix per edge.

    Attributes:
      edges: ``"bonds"`` takes the tables of ``mtljax.data.qm9_subset``, ``[batch,
        atoms, 5 + atoms, 1]``, whose edges are bonds of four types. ``"distances"``
        takes those of ``qm9``, ``[batch, atoms, 4, 1]``, where every pair is an edge.
      width: Length of the state of an atom.
      edge_width: Hidden width of the edge network.
      rounds: Number of rounds of message passing.
      readout_steps: Number of steps of Set2Set.
      features: Number of features, which are the input of the heads.
      dtype: Compute dtype. Parameters stay float32.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax import models
      >>> from mtljax.models.mpnn import MPNN
      >>> model = models.multitask(MPNN(width=8, features=6), {"mu": 1})
      >>> x = jax.ShapeDtypeStruct((2, 9, 14, 1), jnp.uint8)
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
      >>> variables.params["heads"]["mu"]["kernel"].shape
      (6, 1)

    References:
      Gilmer et al., `Neural Message Passing for Quantum Chemistry
      <https://arxiv.org/abs/1704.01212>`_, 2017. Vinyals et al., `Order Matters:
      Sequence to sequence for sets <https://arxiv.org/abs/1511.06391>`_, 2015.
    """

    edges: Edges = "bonds"
    width: int = 64
    edge_width: int = 128
    rounds: int = 3
    readout_steps: int = 3
    features: int = 64
    dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, train: bool) -> Float[Array, "batch features"]:
        """Maps molecules to features ``[batch, features]``.

        Raises:
          ValueError: If the shape of ``x`` does not match ``edges``.
        """
        del train
        x = jnp.asarray(x)
        if self.edges == "bonds":
            _check(x, "bonds", lambda n: _ATOM_COLUMNS + n)
            atoms, real, bonds = _read_bonded(x[..., 0])
        else:
            _check(x, "distances", lambda _: 4)
            atoms, real, bonds = _read_placed(x[..., 0])
        atoms, bonds = to_compute(atoms, self.dtype), to_compute(bonds, self.dtype)
        keep = real[..., None].astype(atoms.dtype)

        embed = linear(self.width, atoms.shape[-1], dtype=self.dtype, name="embed")
        h = jax.nn.relu(embed(atoms)) * keep
        by_kind = self.edges == "bonds"
        messages = self._bonded(bonds) if by_kind else self._placed(bonds, real)
        gru = self._gru()
        for _ in range(self.rounds):
            h = gru(jax.nn.relu(messages(h)), h) * keep

        pooled = self._set2set(h, real)
        out = linear(self.features, pooled.shape[-1], dtype=self.dtype, name="out")
        return jax.nn.relu(out(pooled))

    def _edge_network(self, columns: int):
        """Returns the two layers of ``A``."""
        hidden = linear(self.edge_width, columns, dtype=self.dtype, name="edge_hidden")
        size = self.width * self.width
        return hidden, linear(size, self.edge_width, dtype=self.dtype, name="edge_out")

    def _bonded(self, bonds: Array):
        """Returns mean messages of states, with one matrix per bond type."""
        batch, n, _, kinds = bonds.shape
        width = self.width
        hidden, last = self._edge_network(kinds)
        matrices = last(jax.nn.relu(hidden(jnp.eye(kinds, dtype=bonds.dtype))))
        # [width in, kinds x width out], so that one product covers all kinds of bonds.
        joined = matrices.reshape(kinds, width, width).transpose(1, 0, 2)
        joined = joined.reshape(width, kinds * width)
        count = jnp.maximum(bonds.sum((2, 3)), 1)[..., None]
        spread = bonds.reshape(batch, n, n * kinds)

        def messages(h):
            sent = (h @ joined).reshape(batch, n * kinds, width)
            return spread @ sent / count

        return messages

    def _placed(self, edges: Array, real: Array):
        """Returns mean messages, contracted before the last layer of ``A``."""
        width = self.width
        apart = ~jnp.eye(real.shape[1], dtype=bool)[None]
        pairs = (real[:, :, None] & real[:, None, :] & apart).astype(edges.dtype)
        hidden, last = self._edge_network(edges.shape[-1])
        basis = jax.nn.relu(hidden(edges)) * pairs[..., None]
        last(basis[:1, :1, 0])  # creates the parameters that are used below
        layer = last.variables["params"]
        kernel = layer["kernel"].astype(edges.dtype).reshape(-1, width)
        bias = layer["bias"].astype(edges.dtype).reshape(width, width)
        count = jnp.maximum(pairs.sum(-1), 1)[..., None]

        def messages(h):
            met = jnp.einsum("bijk,bjc->bikc", basis, h)
            near = jnp.einsum("bij,bjc->bic", pairs, h)
            flat = met.reshape(*met.shape[:2], -1)
            return (flat @ kernel + near @ bias) / count

        return messages

    def _gru(self):
        """Returns the GRU cell of PyTorch, which all rounds share."""
        ingoing = linear(3 * self.width, self.width, dtype=self.dtype, name="gru_in")
        own = linear(3 * self.width, self.width, dtype=self.dtype, name="gru_state")

        def cell(m, h):
            reset_m, update_m, new_m = jnp.split(ingoing(m), 3, -1)
            reset_h, update_h, new_h = jnp.split(own(h), 3, -1)
            reset = jax.nn.sigmoid(reset_m + reset_h)
            update = jax.nn.sigmoid(update_m + update_h)
            new = jnp.tanh(new_m + reset * new_h)
            return (1 - update) * new + update * h

        return cell

    def _set2set(self, h: Array, real: Array) -> Array:
        """Pools atoms with an LSTM, which queries, and attention over the atoms."""
        batch, width = h.shape[0], self.width
        draw = torch_bias(width)  # initialises all matrices and biases, as in PyTorch

        def dense(name):
            return nn.Dense(
                4 * width,
                dtype=self.dtype,
                kernel_init=draw,
                bias_init=draw,
                name=name,
            )

        ingoing, own = dense("lstm_in"), dense("lstm_state")
        query = cell = jnp.zeros((batch, width), h.dtype)
        answer = jnp.zeros((batch, 2 * width), h.dtype)
        for _ in range(self.readout_steps):
            gates = ingoing(answer) + own(query)
            gate_in, gate_keep, new, gate_out = jnp.split(gates, 4, -1)
            cell = jax.nn.sigmoid(gate_keep) * cell
            cell = cell + jax.nn.sigmoid(gate_in) * jnp.tanh(new)
            query = jax.nn.sigmoid(gate_out) * jnp.tanh(cell)
            score = (h * query[:, None]).sum(-1)
            # A row that consists of padding has no atom to attend to.
            share = jnp.where(real, jax.nn.softmax(score, where=real), 0)
            answer = jnp.concatenate([query, (share[..., None] * h).sum(1)], -1)
        return answer


def _check(x: Array, edges: str, columns) -> None:
    """Raises an error unless ``x`` is ``[batch, atoms, columns(atoms), 1]``."""
    if x.ndim != 4 or x.shape[2:] != (columns(x.shape[1]), 1):
        wanted = {"bonds": "5 + atoms", "distances": "4"}[edges]
        raise ValueError(
            f"MPNN(edges={edges!r}) takes molecules [batch, atoms, {wanted}, 1], but "
            f"the input has shape {x.shape}."
        )


def _read_bonded(x: Array) -> tuple[Array, Array, Array]:
    """Returns atom features, the real atoms, and one-hot bonds ``[batch, i, j, 4]``."""
    x = x.astype(jnp.int32)
    z, hydrogens, charge, hybrid, ring = (x[..., i] for i in range(_ATOM_COLUMNS))
    real = z > 0
    parts = [
        jax.nn.one_hot(z - 6, 4),  # C, N, O, F
        jax.nn.one_hot(charge, 3),
        jax.nn.one_hot(hybrid, 4),
        ring[..., None].astype(jnp.float32),
        hydrogens[..., None].astype(jnp.float32),
    ]
    atoms = jnp.concatenate(parts, -1) * real[..., None]
    bonds = jax.nn.one_hot(x[..., _ATOM_COLUMNS:] - 1, _BOND_TYPES)
    return atoms, real, bonds


def _read_placed(x: Array) -> tuple[Array, Array, Array]:
    """Returns atom features, the real atoms, and distances ``[batch, i, j, 1]``."""
    z = x[..., 0].astype(jnp.int32)
    real = z > 0
    elements = jnp.stack([z == number for number in (1, 6, 7, 8, 9)], -1)
    atoms = elements.astype(jnp.float32)
    place = x[..., 1:].astype(jnp.float32)
    square = jnp.square(place[:, :, None] - place[:, None, :]).sum(-1)
    # sqrt has no derivative at the distance 0 of an atom to itself.
    apart = square > 0
    distance = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0)
    return atoms, real, distance[..., None]
