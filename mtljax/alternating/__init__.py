"""Alternating independent optimizer steps per task or group of tasks.

- :func:`alternate` applies any optax optimizer to one task after another. It supports
  one optimizer state per task and random groups of tasks. Operations of a batch, such
  as weight decay, are performed once per batch. The idea is that of
  `arXiv 2109.11678 <https://arxiv.org/abs/2109.11678>`_.
- :func:`adatask` keeps one optimizer state per task without the alternation. It is an
  optax transformation of stacked gradients.
- :func:`indexed`, :func:`check_owners` and :func:`balanced_groups` are helper
  functions.
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
