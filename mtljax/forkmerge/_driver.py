"""ForkMerge around an ordinary train step: rounds of branches and merges."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from mtljax.balancer import check_choice
from mtljax.forkmerge._branches import (
    BranchStep,
    Strategy,
    fork,
    place,
    take_branches,
    train_branches,
)
from mtljax.forkmerge._checks import (
    Direction,
    check_positive,
    check_target,
    check_validation,
)
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
    """How :class:`ForkMerge` trains branches; see :func:`train_branches`.

    Attributes:
      realisation: ``"sum"`` or ``"sample"``.
      per_branch: Batches differ by branch: ``[n, B, ...]``.
      strategy: ``"vmap"``, ``"map"``, ``"shard"`` or ``"auto"``.
      mesh: For ``"shard"``.
    """

    realisation: Realisation = "sum"
    per_branch: bool = False
    strategy: Strategy = "auto"
    mesh: Mesh | None = None


TRAINING = BranchTraining()


@dataclasses.dataclass(frozen=True)
class Snapshots:
    """Which parameters of the branches are merged.

    Attributes:
      source: ``"last"``: those at t + Δt, as the paper writes; ``"best_in_round"``: the
        best of each branch by validation since the last merge; ``"best_ever"``: since
        the beginning, even from before earlier merges, which is what the released codes
        do, probably by mistake: for comparisons only.
      evaluate_every: Steps between the evaluations for the latter two; they also
        happen right before a merge.
    """

    source: MergeSource = "last"
    evaluate_every: int | None = None


class MergeInfo(NamedTuple):
    """What a merge found."""

    weights: Float[Array, " branches"]  # Λ*
    branch_scores: Float[Array, "..."]  # [B], on the set that was searched
    score: Float[Array, "..."]  # of the merged model, on the same set
    report_score: Float[Array, "..."]  # on the held-out part; NaN without one
    single_report_score: Float[Array, "..."]  # there, of the branch best in the search
    gap: Float[Array, "..."]  # how much better the search looks than the held-out part


class ForkMergeState(NamedTuple):
    """Everything that changes in a run: a pytree to be saved and restored as it is."""

    branches: Any  # the train state, leaves [B, ...]
    merged: Any  # the model to be used: of the last merge, or of the best
    merged_score: Float[Array, "..."]  # the larger the better
    snapshots: Any  # the best leaves of every branch; () with merge_source="last"
    snapshot_scores: Float[Array, "..."]  # [B], the larger the better
    initial: Any  # leaves to reset; () if there are none
    key: Any  # for drawn tasks and candidates; () if nothing is drawn
    step: Int[Array, ""]  # steps that every branch has taken
    merged_at: Int[Array, ""]  # step of the last merge
    round: Int[Array, ""]  # merges made
    info: MergeInfo  # of the last merge


@dataclasses.dataclass(frozen=True, eq=False)
class ForkMerge:
    """Trains branches of one model, and every Δt steps merges them into one.

    A round: Δt steps of every branch on its own task weights
    (:func:`train_branches`), the search for merge weights on a validation set of the
    target (:func:`search_merge`), and a new fork from the merged model. All state is
    one pytree (:class:`ForkMergeState`); what a call does is a function of it and of
    the batches alone, so a run that is killed and goes on from a saved state ends as
    it would have.

    ``train``, ``evaluate`` and ``merge`` are compiled. :meth:`run` calls them in turn
    from the host. :meth:`advance` is one step of training with the merge inside, for
    ``scan`` and for :func:`mtljax.training.fit`.

    For several targets or seeds, map a function that builds the driver from its branch
    weights and calls these pieces (``jax.vmap`` or ``jax.lax.map``).

    Args:
      step: One optimiser step of one model; see :func:`train_branches`.
      score: P̂, the target's validation performance: ``score(state)``, with
        ``validation`` as its next argument if there is one.
      branch_weights: ν ``[B, T]``.
      interval: Δt, steps between merges. 12 500 on DomainNet, 10 epochs on NYUv2.
      training: How branches are trained, see :class:`BranchTraining`; with a mesh, a
        first fork is placed on it.
      method: See :func:`search_merge`, or a :class:`Search`.
      direction: Whether a large or a small score is good.
      refresh: Applied to every candidate.
      policies: See :func:`merge`. The released codes: ``{"opt_state": "keep"}``.
      heads: See :func:`merge`.
      merge_source: ``"last"`` merges the parameters at t + Δt, as the paper writes;
        ``"best_in_round"`` and ``"best_ever"`` the best of each branch by validation,
        see :class:`Snapshots`.
      final: The model that counts: of the ``"last"`` merge, or of the ``"best"`` by
        its validation score, as in the released NYUv2 code.

    Raises:
      ValueError: If shapes or options do not fit together.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from mtljax import forkmerge
      >>> def step(w, weights, batch):  # an auxiliary task that pulls too far
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
        check_positive(name, "interval", self.interval)
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
            check_positive(name, "evaluate_every", every)
            if self._source.source == "last":
                raise ValueError(
                    f"{name}: evaluate_every={every} has no use with "
                    "merge_source='last'."
                )
        _ = self._search  # its options are checked there

    # What follows from the fields.

    @property
    def num_branches(self) -> int:
        """B."""
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
          key: For ``realisation="sample"`` and ``method="random"``.

        Returns:
          The state of a run, whose arrays may be donated. Memory: B + 1 train states,
          and B times the merged leaves more unless ``merge_source="last"``.

        Raises:
          ValueError: If a key is missing, or a policy's path matches nothing.
        """
        draws = self._draws or self._search.search.method == "random"
        if draws and key is None:
            raise ValueError(
                "ForkMerge.init: key= is needed, for tasks or candidates are drawn."
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
        # No array of the caller, and none twice: donation is safe.
        return jax.tree.map(jnp.copy, found)

    def result(self, state: ForkMergeState) -> Any:
        """The merged train state that counts."""
        return state.merged

    # The three pieces of a round.

    def train(
        self, state: ForkMergeState, batches: Any, *, data: Any = None
    ) -> tuple[ForkMergeState, Any]:
        """Steps of all branches; does not stop at a merge, :meth:`run` does.

        Args:
          state: The state of the run.
          batches: Pytree ``[n, ...]``; see :func:`train_branches`.
          data: Passed to the step as it is.

        Returns:
          The state, and the metrics ``[B, n, ...]``.
        """
        return self._jit_train(state, batches, data)

    def evaluate(
        self, state: ForkMergeState, validation: Any = None
    ) -> tuple[ForkMergeState, Array]:
        """Scores the branches and, unless ``merge_source="last"``, notes the best.

        Args:
          state: The state of the run.
          validation: Passed to the score.

        Returns:
          The state, and the scores ``[B]``. Cost: B validation passes.
          Again at the same step, it changes nothing.
        """
        self._check("evaluate", validation)
        return self._jit_evaluate(state, validation)

    def merge(
        self, state: ForkMergeState, validation: Any = None, report: Any = None
    ) -> tuple[ForkMergeState, MergeInfo]:
        """Merges the branches and forks again.

        Args:
          state: The state of the run.
          validation: Passed to the score; the set that is searched.
          report: Another one, held out (:func:`split_validation`): it decides nothing
            and shows how much of the score is selection.

        Returns:
          The state, and what was found. Cost: the passes of :func:`search_merge`, two
          more with ``report``, B more unless ``merge_source="last"``.
        """
        self._check("merge", validation, report)
        return self._jit_merge(state, validation, report)

    def advance(
        self,
        state: ForkMergeState,
        batch: Any,
        *,
        validation: Any = None,
        report: Any = None,
        data: Any = None,
    ) -> tuple[ForkMergeState, Any]:
        """One step of all branches, and the merge if it is due: for ``scan``.

        Not compiled by itself. The merge stands in a ``lax.cond``; under a ``vmap``
        over runs that would be computed in every step: use ``jax.lax.map`` there.

        Args:
          state: The state of the run.
          batch: One batch.
          validation: As for :meth:`merge`.
          report: As for :meth:`merge`.
          data: As for :meth:`train`.

        Returns:
          The state, and the metrics ``[B, ...]``.
        """
        self._check("advance", validation, report)
        batches = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        state, metrics = self._train(state, batches, data)
        metrics = jax.tree.map(lambda m: jnp.squeeze(m, 1), metrics)
        if self._source.evaluate_every is not None:
            state = lax.cond(
                state.step % self._source.evaluate_every == 0,
                lambda s: self._evaluate(s, validation)[0],
                lambda s: s,
                state,
            )
        state = lax.cond(
            state.step % self.interval == 0,
            lambda s: self._merge(s, validation, report)[0],
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
        """Trains until every branch has taken ``num_steps`` steps, merging on the way.

        It goes on from whatever state it is given: also one saved by ``on_chunk`` in
        the middle of a round, or at its end before the merge. With equal ``chunk`` the
        numbers are the same, bit by bit. After the last step there is always a merge.

        Args:
          state: The state of a run, new or restored.
          batches: ``batches(step, n)`` gives the batches ``[n, ...]`` of the steps
            ``step, …, step + n − 1``: a function of the step alone.
          num_steps: T, counted from the beginning of the run.
          validation: As for :meth:`merge`.
          report: As for :meth:`merge`.
          data: As for :meth:`train`.
          chunk: The most steps of one call; they end at its multiples. Δt by default.
            Take 1 where :func:`mtljax.training.loop.prefers_host_loop` holds.
          on_chunk: Called as ``on_chunk(state, metrics)`` after every chunk, before a
            merge that is due; the place to save a checkpoint.
          on_merge: Called as ``on_merge(state, info)`` after every merge.

        Returns:
          The state after T steps.
        """
        check_positive("ForkMerge.run", "num_steps", num_steps)
        if chunk is not None:
            check_positive("ForkMerge.run", "chunk", chunk)
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

    # Fewer branches.

    def prune(
        self,
        state: ForkMergeState,
        *,
        keep: int,
        target: int = 0,
        drop_zeros: bool = True,
        keep_target_only: bool = True,
    ) -> tuple["ForkMerge", ForkMergeState]:
        """Goes on with the branches that the last merge used most; see :func:`prune`.

        Args:
          state: The state after a merge.
          keep: K′, the most branches to keep.
          target: Index of the target task.
          drop_zeros: See :func:`prune`.
          keep_target_only: See :func:`prune`.

        Returns:
          A driver of fewer branches, and its state.

        Raises:
          ValueError: Before the first merge.
        """
        if int(state.round) == 0:
            raise ValueError("ForkMerge.prune: there was no merge yet to prune by.")
        info = state.info
        check_target("ForkMerge.prune", self.branch_weights.shape[-1], target)
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
        """The driver of some of the branches; also to restore a pruned run.

        Args:
          kept: Indices of the branches.

        Returns:
          A driver with the other branches left out.
        """
        rows = take_branches(self.branch_weights, kept)
        return dataclasses.replace(self, branch_weights=rows)

    def select(self, state: ForkMergeState, kept: Sequence[int]) -> ForkMergeState:
        """The state of :meth:`restrict`: some of the branches of a state."""
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

    # The pure functions that are compiled.

    @functools.cached_property
    def _jit_train(self):
        return jax.jit(self._train)

    @functools.cached_property
    def _jit_evaluate(self):
        return jax.jit(self._evaluate)

    @functools.cached_property
    def _jit_merge(self):
        return jax.jit(self._merge)

    def _check(self, what: str, *sets: Any) -> None:
        for found in sets:
            if found is not None:
                check_validation(f"ForkMerge.{what}", found)

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

    def _evaluate(self, state: ForkMergeState, validation: Any):
        search = self._search
        args = () if validation is None else (validation,)
        score = lambda s: search.sign * validate(self.score, s, args)
        if self.training.strategy == "map":
            scores = lax.map(score, state.branches)
        else:
            scores = jax.vmap(score)(state.branches)
        if self._remembers:
            better = scores > state.snapshot_scores  # NaN never is
            new = keep_only(state.branches, search.rules, "merge")
            state = state._replace(
                snapshots=_where(better, new, state.snapshots),
                snapshot_scores=jnp.where(better, scores, state.snapshot_scores),
            )
        return state, search.sign * scores

    def _merge(self, state: ForkMergeState, validation: Any, report: Any):
        search = self._search
        source = state.branches
        if self._remembers:
            state, _ = self._evaluate(state, validation)
            source = overlay(source, state.snapshots, search.rules, "merge")
        key = None
        if search.search.method == "random":
            key = jax.random.fold_in(state.key, state.step)
            key = jax.random.fold_in(key, 2**31 - 1)  # no branch draws tasks from it
        args = () if validation is None else (validation,)
        inputs = Inputs(source, args, key, self.branch_weights, state.initial)
        found = run_search(search, inputs)
        held_out = single = jnp.full((), jnp.nan, found.score.dtype)
        if report is not None:
            held_out = validate(self.score, found.state, (report,))
            at = jnp.argmax(search.sign * found.branch_scores)
            alone = jax.nn.one_hot(at, self.num_branches)
            alone = merged_state(search, inputs, alone)
            single = validate(self.score, alone, (report,))
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
    """``where`` over the leading axes of every leaf."""

    def leaf(n, o):
        return jnp.where(
            flags.reshape(flags.shape + (1,) * (n.ndim - flags.ndim)), n, o
        )

    return jax.tree.map(leaf, new, old)
