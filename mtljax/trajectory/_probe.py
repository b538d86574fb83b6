"""A probe that a run takes along: chosen quantities, every so many steps."""

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
    """Something to measure.

    Attributes:
      measure: ``measure(params, data, key) -> array``, or a dict or NamedTuple of
        arrays; pure, of one run. It is compiled once.
      every: Measured at every so manieth probe: 1 for all, more for dear ones.
      cost: Example-gradients of one measurement, for :func:`cadence`: the number of
        gradients times the examples in each.
      config: What the numbers depend on, such as ``{"rho": 1e-3}``; plain values.
    """

    measure: Callable[[Any, Any, PRNGKeyArray], Any]
    every: int = 1
    cost: float = 0.0
    config: Mapping[str, Any] = {}


def cadence(cost: float | int, step_cost: float | int, *, share: float = 0.05) -> int:
    """Steps between probes so that probing adds about ``share`` of the training work.

    Args:
      cost: Of one probe, in example-gradients.
      step_cost: Of one training step, in the same unit: tasks times batch size.
      share: Extra work allowed, relative to training.

    Returns:
      The number of steps, at least 1.

    Raises:
      ValueError: If a number is not positive (a cost of 0 is fine).

    Examples:
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
    """Measures quantities on a fixed set of examples, in training or afterwards.

    Every measurement uses the same examples and the same random numbers, so that
    differences along a run, and between runs, are of the parameters. Nothing is
    remembered between measurements: an interrupted run that goes on from a checkpoint
    measures what it would have measured.

    Args:
      quantities: By name.
      data: The probe set, any pytree; kept on the device.
      key: Fixes the random numbers of all measurements.
      every: Steps between probes; by default from the costs, see :func:`cadence`.
      step_cost: Example-gradients of a training step; needed without ``every``.
      share: Extra work allowed, for the default of ``every``.
      at: Further steps to measure at, such as the last, with all quantities.
      many: Whether parameters have a leading axis of runs (seeds trained together).
      prefix: Of the names in the rows.

    Raises:
      ValueError: If there is no quantity, or ``every`` or a quantity's is not positive.

    Examples:
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
            raise ValueError("Probe: there is no quantity to measure.")
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
        """The same probe on other examples of the same shapes.

        Args:
          data: The probe set.

        Returns:
          A probe that shares the compiled programs.

        Examples:
          >>> mean = Quantity(lambda w, data, key: (w * data).mean())
          >>> probe = Probe({"m": mean}, jnp.ones(2), key=jax.random.key(0), every=1)
          >>> float(probe.on(jnp.zeros(2))(jnp.array(3.0), 0)["probe_m"])
          0.0
        """
        other = copy.copy(self)
        other.data = jax.tree.map(jnp.asarray, data)
        return other

    def cost(self) -> float:
        """Example-gradients of a probe, on average over the quantities' cadences."""
        return sum(q.cost / q.every for q in self.quantities.values())

    def config(self) -> dict[str, Any]:
        """What the numbers depend on, for :func:`check_comparable`; plain values.

        The digest of the probe set and the key are in it.
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
        """Names of what is measured at a step.

        Args:
          step: Completed steps.
        """
        if step in self.at:
            return tuple(self.quantities)
        if step % self.every:
            return ()
        index = step // self.every
        return tuple(n for n, q in self.quantities.items() if index % q.every == 0)

    def __call__(self, params: Any, step: int) -> dict[str, Array]:
        """Measures what is due at a step.

        Args:
          params: Parameters, with a leading axis of runs if ``many``.
          step: Completed steps.

        Returns:
          Arrays by name (``prefix + quantity[_field]``), and ``prefix + "nonfinite"``,
          the number of entries that are NaN or infinite, which are returned as they
          are. Empty if nothing is due.
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
        """An evaluation that measures too: pass it to a training loop as ``eval_fn``.

        Its rows hold the metrics and, at the steps that are due, the measurements. The
        loop must evaluate at these steps: let its interval divide ``every``.

        Args:
          evaluate: The evaluation of the run, ``evaluate(state) -> dict``.
          params: ``params(state)``, what the quantities take.
          step: ``step(state)``, the completed steps, from the state itself, so that a
            resumed run goes on counting; of the first run if there are several.

        Returns:
          ``function(state) -> dict``.

        Examples:
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
        """Measures saved parameters, whatever their steps, with all quantities.

        Args:
          checkpoints: Pairs of step and parameters; loaded one at a time if it is a
            generator.

        Returns:
          A dict for each, with ``step``.
        """
        names = tuple(self.quantities)
        return [{"step": s, **self._run(names, params)} for s, params in checkpoints]


def _is_typed(key: Any) -> bool:
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
