"""Probe: measures quantities of a run periodically on fixed examples."""

import copy
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mtljax import stack
from mtljax.trajectory import _trees as trees


class Quantity(NamedTuple):
    """A quantity that :class:`Probe` measures.

    Attributes:
      measure: ``measure(params, data, key)`` returns an array, or a dictionary or
        NamedTuple of arrays. It must be a pure function of one run. It is compiled
        once.
      every: Measure at every ``every``-th probe. Use a larger value for expensive
        measurements.
      cost: Cost of one measurement in example-gradients, for :func:`cadence`. It is the
        number of gradients times the number of examples in each.
      config: Settings that affect the values, such as ``{"rho": 1e-3}``, as plain
        values.
    """

    measure: Callable[[Any, Any, PRNGKeyArray], Any]
    every: int = 1
    cost: float = 0.0
    config: Mapping[str, Any] = {}


def cadence(cost: float | int, step_cost: float | int, *, share: float = 0.05) -> int:
    """Returns the number of steps between probes for a given share of extra work.

    Args:
      cost: Cost of one probe in example-gradients.
      step_cost: Cost of one training step in the same unit: tasks times batch size.
      share: Permitted extra work of the probes, relative to training.

    Returns:
      The number of steps, at least 1.

    Raises:
      ValueError: If ``cost`` is negative, or if another number is not positive.

    Examples:
      >>> from mtljax.trajectory import cadence
      >>> cadence(cost=6720 * 128, step_cost=20 * 16)  # sharpness of 20 tasks
      53760
    """
    if cost < 0 or not step_cost > 0 or not share > 0:
        raise ValueError(
            f"cadence: cost={cost} must not be negative, and step_cost={step_cost} and "
            f"share={share} must be positive."
        )
    return max(1, math.ceil(cost / (share * step_cost) - 1e-9))


class Probe:
    """Measures quantities on a fixed set of examples, during training or afterwards.

    Every measurement uses the same examples and the same random numbers. Differences
    along a run and between runs are therefore due to the parameters. The probe stores
    nothing between measurements. A run that is resumed from a checkpoint measures the
    same values as an uninterrupted run.

    Args:
      quantities: Dictionary of quantities by name.
      data: The probe set, any pytree. It is stored on the device.
      key: Random key of all measurements.
      every: Number of steps between probes. By default it is computed from the costs,
        see :func:`cadence`.
      step_cost: Cost of a training step in example-gradients, required without
        ``every``.
      share: Permitted extra work, for the default of ``every``.
      at: Further steps at which all quantities are measured, such as the last.
      many: Whether parameters have a leading axis of runs (seeds trained together).
      prefix: Prefix of the names in the rows.

    Raises:
      ValueError: If there is no quantity, or if ``every`` of the probe or of a quantity
        is not positive.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax.trajectory import Probe, Quantity
      >>> norm = Quantity(lambda w, data, key: (w**2).sum(), config={"of": "all"})
      >>> probe = Probe({"norm": norm}, None, key=jax.random.key(0), every=10)
      >>> {k: float(v) for k, v in probe(jnp.array([3.0, 4.0]), step=20).items()}
      {'probe_nonfinite': 0.0, 'probe_norm': 25.0}
      >>> probe(jnp.array([3.0, 4.0]), step=21)
      {}
      >>> rows = probe.offline([(0, jnp.zeros(2)), (10, jnp.ones(2))])
      >>> [(row["step"], float(row["probe_norm"])) for row in rows]
      [(0, 0.0), (10, 2.0)]
    """

    def __init__(
        self,
        quantities: Mapping[str, Quantity],
        data: Any,
        *,
        key: PRNGKeyArray,
        every: int | None = None,
        step_cost: float | int | None = None,
        share: float = 0.05,
        at: Collection[int] = (),
        many: bool = False,
        prefix: str = "probe_",
    ):
        if not quantities:
            raise ValueError(
                "Probe: quantities is empty, so there is no quantity to measure."
            )
        for name, quantity in quantities.items():
            trees.check_positive(f"Probe: quantity {name!r}", "every", quantity.every)
        self.quantities = dict(quantities)
        self.data = jax.tree.map(jnp.asarray, data)
        self.key, self.at, self.many, self.prefix = key, frozenset(at), many, prefix
        if every is None and step_cost is None:
            raise ValueError("Probe: give every= or step_cost=.")
        if every is None and step_cost is not None:
            every = cadence(self.cost(), step_cost, share=share)
        trees.check_positive("Probe", "every", every)
        assert every is not None
        self.every = every
        self._compiled: dict[tuple[str, ...], Callable[..., Any]] = {}

    def on(self, data: Any) -> "Probe":
        """Returns the same probe for other examples of the same shapes.

        Args:
          data: The probe set.

        Returns:
          A :class:`Probe` that shares the compiled programs.

        Examples:
          >>> import jax, jax.numpy as jnp
          >>> from mtljax.trajectory import Probe, Quantity
          >>> mean = Quantity(lambda w, data, key: (w * data).mean())
          >>> probe = Probe({"m": mean}, jnp.ones(2), key=jax.random.key(0), every=1)
          >>> float(probe.on(jnp.zeros(2))(jnp.array(3.0), 0)["probe_m"])
          0.0
        """
        other = copy.copy(self)
        other.data = jax.tree.map(jnp.asarray, data)
        return other

    def cost(self) -> float:
        """Returns the mean cost of a probe in example-gradients."""
        return sum(q.cost / q.every for q in self.quantities.values())

    def config(self) -> dict[str, Any]:
        """Returns the settings that affect the values, for :func:`check_comparable`.

        The settings are plain values. They include the digest of the probe set and the
        key.
        """
        digest = hashlib.sha256()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.data):
            digest.update(f"{stack.path_name(path)} {leaf.dtype} {leaf.shape}".encode())
            digest.update(memoryview(jax.device_get(leaf)).tobytes())
        seed = jax.random.key_data(self.key) if _is_typed(self.key) else self.key
        found: dict[str, Any] = {n: dict(q.config) for n, q in self.quantities.items()}
        found["probe_set"] = digest.hexdigest()[:16]
        found["probe_key"] = [int(x) for x in seed.ravel()]
        return found

    def due(self, step: int) -> tuple[str, ...]:
        """Returns the names of the quantities that are measured at a step.

        Args:
          step: Number of completed steps.
        """
        if step in self.at:
            return tuple(self.quantities)
        if step % self.every:
            return ()
        index = step // self.every
        return tuple(n for n, q in self.quantities.items() if index % q.every == 0)

    def __call__(self, params: Any, step: int) -> dict[str, Array]:
        """Measures the quantities that are due at a step.

        Args:
          params: Parameters, with a leading axis of runs if ``many``.
          step: Number of completed steps.

        Returns:
          Arrays by name (``prefix + quantity[_field]``), or an empty dictionary if
          nothing is due. ``prefix + "nonfinite"`` is the number of entries that are NaN
          or infinite. Such entries are returned unchanged.
        """
        names = self.due(int(step))
        return self._run(names, params) if names else {}

    def _run(self, names: tuple[str, ...], params: Any) -> dict[str, Array]:
        if names not in self._compiled:
            single = self._measure_of(names)
            run = jax.vmap(single, (0, None, None)) if self.many else single
            self._compiled[names] = jax.jit(run)
        return dict(self._compiled[names](params, self.data, self.key))

    def _measure_of(self, names: tuple[str, ...]):
        order = list(self.quantities)

        def measure(params, data, key):
            found: dict[str, Array] = {}
            for name in names:
                own = jax.random.fold_in(key, order.index(name))
                value = self.quantities[name].measure(params, data, own)
                fields = getattr(value, "_asdict", None)
                if fields is not None:  # a NamedTuple
                    value = fields()
                for path, leaf in jax.tree_util.tree_leaves_with_path(value):
                    ending = stack.path_name(path).replace("/", "_") if path else ""
                    found[f"{self.prefix}{name}{'_' * bool(path)}{ending}"] = leaf
            bad = [
                (~jnp.isfinite(leaf)).sum()
                for leaf in found.values()
                if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
            ]
            found[f"{self.prefix}nonfinite"] = sum(bad, jnp.int32(0))
            return found

        return measure

    def beside(
        self,
        evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
        *,
        params: Callable[[Any], Any],
        step: Callable[[Any], Any],
    ) -> Callable[[Any], dict[str, Any]]:
        """Adds the measurements to an evaluation function.

        Pass the result to a training loop as ``eval_fn``. Its rows contain the metrics
        and, at the steps that are due, the measurements. The loop must evaluate at
        these steps, so its interval must divide ``every``.

        Args:
          evaluate: The evaluation of the run, ``evaluate(state) -> dict``.
          params: ``params(state)``, the parameters that the quantities receive.
          step: ``step(state)``, the number of completed steps, of the first run if
            there are several. It is read from the state, so that a resumed run
            continues the count.

        Returns:
          A function ``f(state) -> dict``.

        Examples:
          >>> import jax, jax.numpy as jnp
          >>> from mtljax.trajectory import Probe, Quantity
          >>> norm = Quantity(lambda w, data, key: jnp.abs(w))
          >>> probe = Probe({"norm": norm}, None, key=jax.random.key(0), every=5)
          >>> evaluate = probe.beside(
          ...     lambda s: {"val": s["w"]}, params=lambda s: s["w"],
          ...     step=lambda s: s["step"])
          >>> sorted(evaluate({"w": jnp.array(-2.0), "step": 5}))
          ['probe_nonfinite', 'probe_norm', 'val']
        """

        def both(state):
            found = dict(evaluate(state)) if evaluate is not None else {}
            done = int(jnp.ravel(jnp.asarray(step(state)))[0])
            measured = self(params(state), done)
            twice = sorted(set(found) & set(measured))
            if twice:
                raise ValueError(
                    f"Probe: the evaluation returns {twice[0]!r} too; change prefix=."
                )
            return found | measured

        return both

    def offline(self, checkpoints: Iterable[tuple[int, Any]]) -> list[dict[str, Any]]:
        """Measures all quantities of saved parameters, at any steps.

        Args:
          checkpoints: Pairs of step and parameters. A generator loads them one at a
            time.

        Returns:
          A list with one dictionary per checkpoint, which also contains ``step``.
        """
        names = tuple(self.quantities)
        return [{"step": s, **self._run(names, params)} for s, params in checkpoints]


def _is_typed(key: Any) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
