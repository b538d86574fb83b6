"""Alternating independent task steps: one optimiser step a task (or group) in turn.

- :func:`alternate`: any optax optimiser over one task after the other, with optimiser
  states of their own, random groups, and everything that belongs to a batch done once
  a batch. After the idea of `arXiv 2109.11678 <https://arxiv.org/abs/2109.11678>`_.
- :func:`adatask`: the same states without the alternation, an optax transformation of
  stacked gradients.
- :func:`indexed`, :func:`check_owners`, :func:`balanced_groups`: what helps with both.
"""

from mtljax.alternating._adatask import AdaTaskState as AdaTaskState
from mtljax.alternating._adatask import adatask as adatask
from mtljax.alternating._alternate import Alternating as Alternating
from mtljax.alternating._alternate import AlternatingState as AlternatingState
from mtljax.alternating._alternate import Cost as Cost
from mtljax.alternating._alternate import alternate as alternate
from mtljax.alternating._gradients import indexed as indexed
from mtljax.alternating._parts import check_owners as check_owners
from mtljax.alternating._schedule import Groups as Groups
from mtljax.alternating._schedule import Order as Order
from mtljax.alternating._schedule import Plan as Plan
from mtljax.alternating._schedule import Regroup as Regroup
from mtljax.alternating._schedule import Schedule as Schedule
from mtljax.alternating._schedule import balanced_groups as balanced_groups
from mtljax.alternating._step import StepOptions as StepOptions
