"""ForkMerge: auxiliary-task learning by forking and merging models.

A model is forked into branches that train with different task weights. Every Δt steps
the branches are merged and forked again. The merge is the convex combination with the
best validation performance of the target.

- :class:`ForkMerge` runs the algorithm around an ordinary train step. A run can be
  resumed from any saved state.
- :func:`fork`, :func:`train_branches`, :func:`search_merge` and :func:`merge` are its
  building blocks.
- :func:`target_vs_all`, :func:`target_plus_each` and similar functions build the task
  weights of the branches.
- :func:`auto_lambda`, :func:`arml`, :func:`post_train` and :func:`grid_search` are
  baselines, together with :func:`mtljax.gcs` and :func:`mtljax.ol_aux`.
- :func:`transfer_gain`, :func:`negative_transfer`,
  :func:`confidence_score_discrepancy` and :func:`ternary_map` are diagnostics.
"""

from mtljax.forkmerge._analysis import NegativeTransfer as NegativeTransfer
from mtljax.forkmerge._analysis import OneStepTransfer as OneStepTransfer
from mtljax.forkmerge._analysis import TernaryMap as TernaryMap
from mtljax.forkmerge._analysis import (
    confidence_score_discrepancy as confidence_score_discrepancy,
)
from mtljax.forkmerge._analysis import mixture_probability as mixture_probability
from mtljax.forkmerge._analysis import negative_transfer as negative_transfer
from mtljax.forkmerge._analysis import one_step_transfer as one_step_transfer
from mtljax.forkmerge._analysis import ternary_map as ternary_map
from mtljax.forkmerge._analysis import transfer_gain as transfer_gain
from mtljax.forkmerge._arml import ARMLState as ARMLState
from mtljax.forkmerge._arml import arml as arml
from mtljax.forkmerge._auto_lambda import AutoLambda as AutoLambda
from mtljax.forkmerge._auto_lambda import AutoLambdaState as AutoLambdaState
from mtljax.forkmerge._auto_lambda import auto_lambda as auto_lambda
from mtljax.forkmerge._auto_lambda import hypergradient as hypergradient
from mtljax.forkmerge._baselines import GridSearchResult as GridSearchResult
from mtljax.forkmerge._baselines import grid_search as grid_search
from mtljax.forkmerge._baselines import post_train as post_train
from mtljax.forkmerge._baselines import weight_grid as weight_grid
from mtljax.forkmerge._branch_weights import custom as custom
from mtljax.forkmerge._branch_weights import nested_topk as nested_topk
from mtljax.forkmerge._branch_weights import rank_auxiliaries as rank_auxiliaries
from mtljax.forkmerge._branch_weights import target_only as target_only
from mtljax.forkmerge._branch_weights import target_plus_each as target_plus_each
from mtljax.forkmerge._branch_weights import (
    target_plus_each_and_all as target_plus_each_and_all,
)
from mtljax.forkmerge._branch_weights import target_vs_all as target_vs_all
from mtljax.forkmerge._branches import BranchStep as BranchStep
from mtljax.forkmerge._branches import Strategy as Strategy
from mtljax.forkmerge._branches import branch_mesh as branch_mesh
from mtljax.forkmerge._branches import fork as fork
from mtljax.forkmerge._branches import take_branches as take_branches
from mtljax.forkmerge._branches import train_branches as train_branches
from mtljax.forkmerge._cost import ForkMergeCost as ForkMergeCost
from mtljax.forkmerge._cost import forkmerge_cost as forkmerge_cost
from mtljax.forkmerge._cost import merge_passes as merge_passes
from mtljax.forkmerge._driver import BranchTraining as BranchTraining
from mtljax.forkmerge._driver import ForkMerge as ForkMerge
from mtljax.forkmerge._driver import ForkMergeState as ForkMergeState
from mtljax.forkmerge._driver import MergeInfo as MergeInfo
from mtljax.forkmerge._driver import MergeSource as MergeSource
from mtljax.forkmerge._driver import Snapshots as Snapshots
from mtljax.forkmerge._merge import Policy as Policy
from mtljax.forkmerge._merge import merge as merge
from mtljax.forkmerge._merge import refork as refork
from mtljax.forkmerge._prune import prune as prune
from mtljax.forkmerge._prune import prune_groups as prune_groups
from mtljax.forkmerge._realise import Realisation as Realisation
from mtljax.forkmerge._realise import draw_task as draw_task
from mtljax.forkmerge._realise import take_task as take_task
from mtljax.forkmerge._realise import task_orders as task_orders
from mtljax.forkmerge._realise import weighted_sum as weighted_sum
from mtljax.forkmerge._search import Method as Method
from mtljax.forkmerge._search import Search as Search
from mtljax.forkmerge._search import SearchResult as SearchResult
from mtljax.forkmerge._search import search_merge as search_merge
from mtljax.forkmerge._search import split_validation as split_validation
from mtljax.forkmerge._search import subsample as subsample
from mtljax.forkmerge._statistics import recompute_statistics as recompute_statistics
