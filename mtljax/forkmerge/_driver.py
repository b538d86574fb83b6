"""Trains, searches and merges ForkMerge branches around an optimizer step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mtljax.balancer import check_choice, choose
from mtljax.forkmerge import _checks as checks
from mtljax.forkmerge._branches import (
    BranchStep,
    Strategy,
    fork,
    place,
    take_branches,
    train_branches,
)
from mtljax.forkmerge._checks import Direction
from mtljax.forkmerge._merge import (
    Head,
    Policy,
    keep_only,
    overlay,
    plan,
    refork_leaves,
)
from mtljax.forkmerge._prune import prune
from mtljax.forkmerge._realise import Realisation
from mtljax.forkmerge._search import (
    Inputs,
    Method,
    Plan,
    Search,
    make_plan,
    merged_state,
    run_search,
    validate,
)

MergeSource: TypeAlias = Literal["last", "best_in_round", "best_ever"]
Final: TypeAlias = Literal["last", "best"]


@dataclasses.dataclass(frozen=True)
class BranchTraining:
    """Options for training the branches of :class:`ForkMerge`.

    Attributes:
      realisation: ``"sum"`` or ``"sample"``, see :func:`train_branches`.
      per_branch: Whether each branch has its own batches, ``[n, B, ...]``.
      strategy: ``"vmap"``, ``"map"``, ``"shard"`` or ``"auto"``.
      mesh: The mesh for ``"shard"``.
    """

    realisation: Realisation = "sum"
    per_branch: bool = False
    strategy: Strategy = "auto"
    mesh: Mesh | None = None


TRAINING = BranchTraining()


@dataclasses.dataclass(frozen=True)
class Snapshots:
    """Parameters of the branches that are merged.

    Attributes:
      source: ``"last"`` uses the parameters at t + Δt, as in the paper.
        ``"best_in_round"`` uses the parameters with the best validation score of each
        branch since the last merge. ``"best_ever"`` does not reset this record at a
        merge. The released codes behave in this way, probably by mistake, so use
        ``"best_ever"`` for comparisons only.
      evaluate_every: Number of steps between evaluations for ``"best_in_round"`` and
        ``"best_ever"``. An evaluation also takes place before each merge.
    """

    source: MergeSource = "last"
    evaluate_every: int | None = None


class MergeInfo(NamedTuple):
    """Result of one merge."""

    weights: Float[Array, " branches"]  # merge weights Λ*
    branch_scores: Float[Array, "..."]  # [B], scores on the set of the search
    score: Float[Array, "..."]  # score of the merged model on the same set
    report_score: Float[Array, "..."]  # score on held-out data; NaN without them
    # Held-out score of the branch with the best search score.
    single_report_score: Float[Array, "..."]
    gap: Float[Array, "..."]  # search minus held-out score; positive is optimistic


class ForkMergeState(NamedTuple):
    """State of a run, a pytree that can be saved and restored."""

    branches: Any  # the train state, leaves [B, ...]
    merged: Any  # the resulting model, from the last or the best merge
    merged_score: Float[Array, "..."]  # larger is better
    snapshots: Any  # the best leaves of every branch; () with merge_source="last"
    snapshot_scores: Float[Array, "..."]  # [B], larger is better
    initial: Any  # initial values of leaves to reset; () without such leaves
    key: Any  # random key of tasks and candidates; () if nothing is sampled
    step: Int[Array, ""]  # number of steps of every branch
    merged_at: Int[Array, ""]  # step of the last merge
    round: Int[Array, ""]  # number of merges
    info: MergeInfo  # result of the last merge


@dataclasses.dataclass(frozen=True, eq=False)
class ForkMerge:
    """Trains branches of one model and merges them every ``interval`` steps.

    One round has three stages. First, each branch takes ``interval`` optimizer steps
    with its own task weights (:func:`train_branches`). Second, a search selects the
    merge weights with the best validation score of the target (:func:`search_merge`).
    Third, the merged model is copied to all branches.

    The state of a run is one pytree (:class:`ForkMergeState`). The result of each call
    depends only on this state and on the batches. A run that is restored from a saved
    state therefore produces the same result as an uninterrupted run.

    The methods ``train``, ``evaluate`` and ``merge`` are compiled. :meth:`run` calls
    them from the host. :meth:`advance` performs one training step, including the merge
    if it is due. Use it in ``scan`` and with :func:`mtljax.training.fit`.

    For several targets or seeds, write a function that takes the branch weights,
    builds the driver and calls these methods. Map this function with ``jax.vmap`` or
    ``jax.lax.map``.

    Args:
      step: One optimizer step of one model, see :func:`train_branches`.
      score: Validation performance P̂ of the target. The signature is
        ``score(state)``, or ``score(state, validation)`` with a validation set.
      branch_weights: Task weights ν of the branches, shape ``[B, T]``.
      interval: Number of steps between merges, Δt in the paper. The paper uses 12 500
        on DomainNet and 10 epochs on NYUv2.
      training: Options for training the branches, see :class:`BranchTraining`. If it
        contains a mesh, :meth:`init` places the branches on the mesh.
      method: Search method for the merge weights, see :func:`search_merge`, or a
        :class:`Search`.
      direction: ``"max"`` if a large score is good, ``"min"`` if a small one is.
      refresh: Function that is applied to every candidate, see :func:`search_merge`.
      policies: See :func:`merge`. The released codes use ``{"opt_state": "keep"}``.
      heads: See :func:`merge`.
      merge_source: Parameters that are merged: ``"last"``, as in the paper,
        ``"best_in_round"`` or ``"best_ever"``. See :class:`Snapshots`.
      final: Model that is returned. ``"last"`` is the model of the last merge.
        ``"best"`` is the merged model with the best validation score, as in the
        released NYUv2 code.

    Raises:
      ValueError: If shapes or options are inconsistent.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> def step(w, weights, batch):  # the auxiliary task has another optimum
      ...     losses = lambda w: jnp.stack([(w - 1.0) ** 2, (w - 3.0) ** 2])
      ...     grad = jax.grad(lambda w: forkmerge.weighted_sum(losses(w), weights))(w)
      ...     return w - 0.05 * grad, {}
      >>> driver = forkmerge.ForkMerge(
      ...     step, lambda w: -jnp.abs(w - 1.0), forkmerge.target_vs_all(2), interval=5)
      >>> state = driver.init(jnp.float32(0.0))
      >>> state = driver.run(state, lambda step, n: jnp.zeros(n), 10)
      >>> round(float(driver.result(state)), 2), int(state.round)
      (1.0, 2)

    References:
      Jiang et al., `ForkMerge: Mitigating Negative Transfer in Auxiliary-Task Learning
      <https://arxiv.org/abs/2301.12618>`_, 2023, Algorithms 1 and 2.
    """

    step: BranchStep
    score: Callable[..., Any]
    branch_weights: Any
    _: dataclasses.KW_ONLY
    interval: int
    training: BranchTraining = TRAINING
    method: Method | Search = "auto"
    direction: Direction = "max"
    refresh: Callable[[Any], Any] | None = None
    policies: Mapping[str, Policy] | None = None
    heads: Mapping[str, Head] | None = None
    merge_source: MergeSource | Snapshots = "last"
    final: Final = "last"

    def __post_init__(self):
        name = "ForkMerge"
        weights = jnp.asarray(self.branch_weights)
        object.__setattr__(self, "branch_weights", weights)
        checks.positive(name, "interval", self.interval)
        check_choice(name, "realisation", self.training.realisation, Realisation)
        check_choice(name, "strategy", self.training.strategy, Strategy)
        check_choice(name, "merge_source", self._source.source, MergeSource)
        check_choice(name, "final", self.final, Final)
        if weights.ndim != 2:
            raise ValueError(
                f"{name}: branch_weights has shape {weights.shape}; it must be "
                "(branches, tasks)."
            )
        every = self._source.evaluate_every
        if every is not None:
            checks.positive(name, "evaluate_every", every)
            if self._source.source == "last":
                raise ValueError(
                    f"{name}: evaluate_every={every} is only used with "
                    "merge_source='best_in_round' or 'best_ever'. Remove it or change "
                    "merge_source."
                )
        _ = self._search  # validates the options of the search

    # Properties that follow from the fields.

    @property
    def num_branches(self) -> int:
        """Number of branches B."""
        return self.branch_weights.shape[-2]

    @functools.cached_property
    def _search(self) -> Plan:
        return make_plan(
            self.score,
            self.num_branches,
            self.method,
            direction=self.direction,
            policies=self.policies,
            heads=self.heads,
            refresh=self.refresh,
        )

    @functools.cached_property
    def _source(self) -> Snapshots:
        found = self.merge_source
        return found if isinstance(found, Snapshots) else Snapshots(found)

    @property
    def _remembers(self) -> bool:
        return self._source.source != "last"

    @property
    def _draws(self) -> bool:
        return self.training.realisation == "sample"

    # The state.

    def init(self, state: Any, *, key: Any = None) -> ForkMergeState:
        """Forks a train state.

        Args:
          state: Any pytree; see :func:`fork`.
          key: Random key for ``realisation="sample"`` and ``method="random"``.

        Returns:
          The initial :class:`ForkMergeState`. Its arrays may be donated. It stores
          B + 1 train states. If ``merge_source`` is not ``"last"``, it also stores B
          copies of the leaves that are merged.

        Raises:
          ValueError: If a key is missing, or if the path of a policy matches no leaf.
        """
        draws = self._draws or self._search.search.method == "random"
        if draws and key is None:
            raise ValueError(
                "ForkMerge.init: pass key=, because realisation='sample' and "
                "method='random' draw random numbers."
            )
        branches = fork(state, self.num_branches)
        if self.training.mesh is not None:
            branches = place(branches, self.num_branches, self.training.mesh)
        merged, rules = jax.tree.map(jnp.asarray, state), self._search.rules
        kinds = {policy for policy, _ in plan("ForkMerge.init", merged, rules)}
        nothing, each = jnp.full((), jnp.nan), jnp.full(self.num_branches, jnp.nan)
        info = MergeInfo(each, each, nothing, nothing, nothing, nothing)
        found = ForkMergeState(
            branches=branches,
            merged=merged,
            merged_score=jnp.full_like(nothing, -jnp.inf),
            snapshots=keep_only(branches, rules, "merge") if self._remembers else (),
            snapshot_scores=jnp.full_like(each, -jnp.inf),
            initial=keep_only(merged, rules, "reset") if "reset" in kinds else (),
            key=key if draws else (),
            step=jnp.int32(0),
            merged_at=jnp.int32(0),
            round=jnp.int32(0),
            info=info,
        )
        # Copies ensure that no array is shared with the caller or occurs twice, so that
        # the state may be donated.
        return jax.tree.map(jnp.copy, found)

    def result(self, state: ForkMergeState) -> Any:
        """Returns the merged train state, of the last or the best merge."""
        return state.merged

    # The three stages of a round.

    def train(
        self, state: ForkMergeState, batches: Any, *, data: Any = None
    ) -> tuple[ForkMergeState, Any]:
        """Trains all branches without merging; :meth:`run` also merges.

        Args:
          state: The state of the run.
          batches: Pytree of arrays ``[n, ...]``, see :func:`train_branches`.
          data: Passed to the step unchanged.

        Returns:
          The state, and the metrics with leaves ``[B, n, ...]``.
        """
        return self._compiled["train"](state, batches, data)

    def evaluate(
        self, state: ForkMergeState, validation: Any = None
    ) -> tuple[ForkMergeState, Array]:
        """Scores the branches and updates the record of their best parameters.

        The record exists unless ``merge_source="last"``. A second evaluation at the
        same step changes nothing.

        Args:
          state: The state of the run.
          validation: Validation set that is passed to the score.

        Returns:
          The state, and the scores of shape ``[B]``. The cost is B validation passes.
        """
        args = checks.score_args("ForkMerge.evaluate", validation)
        return self._compiled["evaluate"](state, args)

    def merge(
        self, state: ForkMergeState, validation: Any = None, report: Any = None
    ) -> tuple[ForkMergeState, MergeInfo]:
        """Merges the branches and forks again.

        Args:
          state: The state of the run.
          validation: Validation set of the search, which is passed to the score.
          report: Held-out validation set (:func:`split_validation`). It affects no
            decision. It shows how much of the score is due to selection.

        Returns:
          The state, and the :class:`MergeInfo`. The cost is that of
          :func:`search_merge`, two more passes with ``report``, and B more passes
          unless ``merge_source="last"``.
        """
        args, report = self._score_args("merge", validation, report)
        return self._compiled["merge"](state, args, report)

    def advance(
        self,
        state: ForkMergeState,
        batch: Any,
        *,
        validation: Any = None,
        report: Any = None,
        data: Any = None,
    ) -> tuple[ForkMergeState, Any]:
        """Performs one step of all branches, and the merge if it is due.

        The method is not compiled by itself. It is intended for ``scan``. The merge is
        a branch of ``lax.cond``. Under ``vmap`` over runs it would be evaluated at
        every step, so use ``jax.lax.map`` over runs.

        Args:
          state: The state of the run.
          batch: One batch.
          validation: See :meth:`merge`.
          report: See :meth:`merge`.
          data: See :meth:`train`.

        Returns:
          The state, and the metrics with leaves ``[B, ...]``.
        """
        args, report = self._score_args("advance", validation, report)
        batches = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        state, metrics = self._train(state, batches, data)
        metrics = jax.tree.map(lambda m: jnp.squeeze(m, 1), metrics)
        if self._source.evaluate_every is not None:
            state = lax.cond(
                state.step % self._source.evaluate_every == 0,
                lambda s: self._evaluate(s, args)[0],
                lambda s: s,
                state,
            )
        state = lax.cond(
            state.step % self.interval == 0,
            lambda s: self._merge(s, args, report)[0],
            lambda s: s,
            state,
        )
        return state, metrics

    def run(
        self,
        state: ForkMergeState,
        batches: Callable[[int, int], Any],
        num_steps: int,
        *,
        validation: Any = None,
        report: Any = None,
        data: Any = None,
        chunk: int | None = None,
        on_chunk: Callable[[ForkMergeState, Any], Any] | None = None,
        on_merge: Callable[[ForkMergeState, MergeInfo], Any] | None = None,
    ) -> ForkMergeState:
        """Trains every branch up to step ``num_steps``, and merges when it is due.

        The run starts from any state. ``on_chunk`` may have saved it in the middle of a
        round, or at the end of a round before the merge. With equal ``chunk`` the
        results are identical bit by bit. The last step is always followed by a merge.

        Args:
          state: The state of a run, new or restored.
          batches: A function ``batches(step, n)`` of the step alone. It returns the
            batches ``[n, ...]`` of the steps ``step, …, step + n − 1``.
          num_steps: Total number of steps since the start of the run.
          validation: See :meth:`merge`.
          report: See :meth:`merge`.
          data: See :meth:`train`.
          chunk: Maximum number of steps per compiled call. Calls end at multiples of
            ``chunk``. The default is ``interval``. Use 1 if
            :func:`mtljax.training.loop.prefers_host_loop` returns True.
          on_chunk: Called as ``on_chunk(state, metrics)`` after every chunk, before a
            merge that is due. Use it to save a checkpoint.
          on_merge: Called as ``on_merge(state, info)`` after every merge.

        Returns:
          The state after ``num_steps`` steps.
        """
        checks.positive("ForkMerge.run", "num_steps", num_steps)
        if chunk is not None:
            checks.positive("ForkMerge.run", "chunk", chunk)
        every = self._source.evaluate_every
        periods = [p for p in (self.interval, every, chunk) if p]
        while True:
            step = int(state.step)
            fresh = step > int(state.merged_at)
            if fresh and (step % self.interval == 0 or step >= num_steps):
                state, info = self.merge(state, validation, report)
                if on_merge is not None:
                    on_merge(state, info)
            elif fresh and every and step % every == 0:
                state, _ = self.evaluate(state, validation)
            if step >= num_steps:
                return state
            n = min(num_steps - step, *(p - step % p for p in periods))
            state, metrics = self.train(state, batches(step, n), data=data)
            if on_chunk is not None:
                on_chunk(state, metrics)

    # Pruning.

    def prune(
        self,
        state: ForkMergeState,
        *,
        keep: int,
        target: int = 0,
        drop_zeros: bool = True,
        keep_target_only: bool = True,
    ) -> tuple["ForkMerge", ForkMergeState]:
        """Keeps the branches with the largest merge weights; see :func:`prune`.

        Args:
          state: The state after a merge.
          keep: K′, the maximum number of branches to keep.
          target: Index of the target task.
          drop_zeros: See :func:`prune`.
          keep_target_only: See :func:`prune`.

        Returns:
          A driver with the kept branches, and its state.

        Raises:
          ValueError: If the state is from before the first merge.
        """
        if int(state.round) == 0:
            raise ValueError(
                "ForkMerge.prune: there was no merge yet. Prune after the first merge."
            )
        info = state.info
        checks.task_index("ForkMerge.prune", self.branch_weights.shape[-1], target)
        kept = prune(
            info.weights,
            info.branch_scores,
            self.branch_weights,
            keep=keep,
            target=target,
            direction=self.direction,
            drop_zeros=drop_zeros,
            keep_target_only=keep_target_only,
        )
        return self.restrict(kept), self.select(state, kept)

    def restrict(self, kept: Sequence[int]) -> "ForkMerge":
        """Returns a driver of some of the branches, for example to restore a run.

        Args:
          kept: Indices of the branches.

        Returns:
          A driver without the other branches.
        """
        rows = take_branches(self.branch_weights, kept)
        return dataclasses.replace(self, branch_weights=rows)

    def select(
        self, state: ForkMergeState, kept: Sequence[int] | Array
    ) -> ForkMergeState:
        """Returns the state for :meth:`restrict`, with some of the branches."""
        take = functools.partial(take_branches, indices=kept)
        info = state.info._replace(
            weights=take(state.info.weights),
            branch_scores=take(state.info.branch_scores),
        )
        return state._replace(
            branches=take(state.branches),
            snapshots=take(state.snapshots),
            snapshot_scores=take(state.snapshot_scores),
            info=info,
        )

    # Pure functions that are compiled.

    @functools.cached_property
    def _compiled(self) -> dict[str, Callable[..., Any]]:
        return {
            "train": jax.jit(self._train),
            "evaluate": jax.jit(self._evaluate),
            "merge": jax.jit(self._merge),
        }

    def _score_args(self, what: str, *sets: Any) -> list[tuple[Any, ...]]:
        return [checks.score_args(f"ForkMerge.{what}", found) for found in sets]

    def _train(self, state: ForkMergeState, batches: Any, data: Any):
        training = self.training
        branches, metrics = train_branches(
            self.step,
            state.branches,
            self.branch_weights,
            batches,
            data=data,
            per_branch=training.per_branch,
            realisation=training.realisation,
            key=state.key if self._draws else None,
            start_step=state.step,
            strategy=training.strategy,
            mesh=training.mesh,
        )
        steps = jax.tree.leaves(batches)[0].shape[0]
        return state._replace(branches=branches, step=state.step + steps), metrics

    def _evaluate(self, state: ForkMergeState, args: tuple[Any, ...]):
        search = self._search
        score = lambda s: search.sign * validate(self.score, s, args)
        if self.training.strategy == "map":
            scores = lax.map(score, state.branches)
        else:
            scores = jax.vmap(score)(state.branches)
        if self._remembers:
            better = scores > state.snapshot_scores  # False for NaN
            new = keep_only(state.branches, search.rules, "merge")
            state = state._replace(
                snapshots=_where(better, new, state.snapshots),
                snapshot_scores=jnp.where(better, scores, state.snapshot_scores),
            )
        return state, search.sign * scores

    def _merge(
        self, state: ForkMergeState, args: tuple[Any, ...], report: tuple[Any, ...]
    ):
        search = self._search
        source = state.branches
        if self._remembers:
            state, _ = self._evaluate(state, args)
            source = overlay(source, state.snapshots, search.rules, "merge")
        key = None
        if search.search.method == "random":
            key = jax.random.fold_in(state.key, state.step)
            key = jax.random.fold_in(key, 2**31 - 1)  # not used for sampled tasks
        inputs = Inputs(source, args, key, self.branch_weights, state.initial)
        found = run_search(search, inputs)
        held_out = single = jnp.full((), jnp.nan, found.score.dtype)
        if report:
            held_out = validate(self.score, found.state, report)
            at = jnp.argmax(search.sign * found.branch_scores)
            alone = jax.nn.one_hot(at, self.num_branches)
            alone = merged_state(search, inputs, alone)
            single = validate(self.score, alone, report)
        gap = search.sign * (found.score - held_out)
        info = MergeInfo(
            found.weights, found.branch_scores, found.score, held_out, single, gap
        )
        info = jax.tree.map(lambda new, old: new.astype(old.dtype), info, state.info)
        merged, score = found.state, search.sign * info.score
        if self.final == "best":
            better = score > state.merged_score
            merged = _where(better, merged, state.merged)
            score = jnp.where(better, score, state.merged_score)
        scores = state.snapshot_scores
        if self._source.source == "best_in_round":
            scores = jnp.full_like(scores, -jnp.inf)
        state = state._replace(
            branches=refork_leaves(state.branches, found.state, search.rules),
            merged=merged,
            merged_score=score,
            snapshot_scores=scores,
            merged_at=state.step,
            round=state.round + 1,
            info=info,
        )
        return state, info


def _where(flags: Array, new: Any, old: Any) -> Any:
    """Selects the new or the old values along the leading axes of every leaf."""

    def leaf(n, o):
        return choose(flags.reshape(flags.shape + (1,) * (n.ndim - flags.ndim)), n, o)

    return jax.tree.map(leaf, new, old)
