"""Options of methods that depend on the run, and rows of other balancers.

Every other method has its default options.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

import mtljax
from experiments.common.config import ConfigError
from experiments.leaderboard.config import USELESS
from mtljax.balancer import from_weights
from mtljax.data.registry import import_name

# Shares of the run, as in the experiment `igb`.
WINDOW, TRAIN_FROM, USE_FROM = (0.05, 0.1), 0.15, 0.25


def _phases(steps: int) -> mtljax.IGBPhases:
    start = round(WINDOW[0] * steps)
    stop = max(start + 1, round(WINDOW[1] * steps))
    first = max(stop, round(TRAIN_FROM * steps))
    return mtljax.IGBPhases(
        (start, stop), first, max(first, round(USE_FROM * steps)), steps
    )


def options_of(name: str, steps: int) -> dict[str, Any]:
    """Options of a method by the number of steps."""
    if name == "igb_v1":
        return {"window": _phases(steps).window, "num_steps": steps}
    if name != "igb_v2":
        return {}
    agent = mtljax.IGBAgent(
        capacity=max(2, steps // 20),  # a twentieth of the run
        period=min(50, max(1, steps // 8)),
        batch_size=64,
        hidden=(64, 64),
        optimizer=1e-3,
    )
    # A constant schedule: the rate does not decay.
    return {"phases": _phases(steps), "schedule": 1.0, "agent": agent}


SEQUENTIAL = ("igb_v2",)
"""Methods whose seeds are trained one after the other. Under vmap, the agent would be
trained at every step, because both branches of a condition are computed."""


class RandomState(NamedTuple):
    """State of :func:`useless`."""

    task_weights: Array
    key: Array


def useless(num_tasks: int, *, key: Array) -> mtljax.Balancer:
    """Builds the planted bad row: normal weights of both signs and a large scale.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> balancer = useless(2, key=jax.random.key(0))
      >>> weights, _ = balancer.weigh(balancer.init({}), losses=jnp.ones(2))
      >>> bool((jnp.abs(weights) > 1).all())
      True
    """

    def weigh(state, *, losses, gramian, mask):
        del losses, gramian, mask
        key, mine = jax.random.split(state.key)
        weights = 1e3 * jax.random.normal(mine, (num_tasks,))
        return weights, RandomState(weights, key)

    def init():
        return RandomState(jnp.ones(num_tasks), jnp.copy(key))

    return from_weights(
        "useless", num_tasks, init=init, weigh=weigh, needs="losses", native="free"
    )


def external(name: str) -> Callable[..., mtljax.Balancer]:
    """Returns the function of ``module:function``.

    Raises:
      ConfigError: If the module or the function does not exist, or is not a function.
    """
    try:
        found = import_name(name)
    except ImportError as error:
        raise ConfigError(
            f"--add {name}: {error}. Give module:function, with the module on "
            "PYTHONPATH."
        ) from error
    if not callable(found):
        raise ConfigError(f"--add {name}: it is not a function.")
    return cast(Callable[..., mtljax.Balancer], found)


def balancer(
    name: str, num_tasks: int, *, steps: int, key: Array, weights: Array
) -> mtljax.Balancer:
    """Builds the balancer of a row. Controls are static weights."""
    if ":" in name:
        found = external(name)(num_tasks, key=key)
        if not isinstance(found, mtljax.Balancer) or found.num_tasks != num_tasks:
            raise ConfigError(f"--add {name} must return a balancer of its tasks.")
        return found
    if name == USELESS:
        return useless(num_tasks, key=key)
    if name in mtljax.METHODS:
        options = options_of(name, steps)
        return mtljax.METHODS[name].build(num_tasks, key=key, **options)
    return mtljax.linear(num_tasks, weights=weights)
