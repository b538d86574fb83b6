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
from mtljax.forkmerge._prune import prune, prune_groups
from mtljax.forkmerge._realise import Realisation
from mtljax.forkmerge._search import (
    Evaluation,
    Inputs,
    Method,
    Search,
    make_search,
    merged_state,
    run_search,
    validate,
)

MergeSource: TypeAlias = Literal["last", "best_in_round", "best_ever"]
Final: TypeAlias = Literal["last", "best"]


class MergeInfo(NamedTuple):
    """What a merge found; every field has a first axis ``[G]`` with several targets."""

    weights: Float[Array, "..."]  # Λ* [B]
    branch_scores: Float[Array, "..."]  # [B], on the set that was searched
    score: Float[Array, "..."]  # of the merged model, on the same set
    report_score: Float[Array, "..."]  # on the held-out part; NaN without one
    single_report_score: Float[Array, "..."]  # there, of the branch best in the search
    gap: Float[Array, "..."]  # how much better the search looks than the held-out part


class ForkMergeState(NamedTuple):
    """Everything that changes in a run: a pytree to be saved and restored as it is."""

    branches: Any  # the train state, leaves [B, ...] or [G, B, ...]
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

    Several targets (or seeds) train at once with branch weights ``[G, B, T]`` and
    ``targets``: a second axis before that of branches, each entry of it with its own
    score, merge and model.

    Args:
      step: One optimiser step of one model; see :func:`train_branches`.
      score: P̂, the target's validation performance: ``score(state)``, with
        ``validation`` as its next argument if there is one, and an entry of
        ``targets`` as the last with several.
      branch_weights: ν ``[B, T]`` or ``[G, B, T]``.
      interval: Δt, steps between merges. 12 500 on DomainNet, 10 epochs on NYUv2.
      targets: With ``[G, B, T]`` only: a pytree of arrays ``[G, ...]``, such as the
        indices of the targets.
      realisation: See :func:`train_branches`.
      per_branch: Batches differ by branch: ``[n, B, ...]`` (``[n, G, B, ...]``).
      strategy: See :func:`train_branches`.
      mesh: See :func:`train_branches`; a first fork is placed on it.
      method: See :func:`search_merge`; also the next five.
      direction: Whether a large or a small score is good.
      levels: L, 5 in the paper.
      evaluation: How candidates are scored.
      num_samples: Draws of ``"random"``.
      refresh: Applied to every candidate.
      policies: See :func:`merge`. The released codes: ``{"opt_state": "keep"}``.
      heads: See :func:`merge`.
      merge_source: ``"last"`` merges the parameters at t + Δt, as the paper writes;
        ``"best_in_round"`` the best of each branch by validation since the last merge;
        ``"best_ever"`` since the beginning, even from before earlier merges, which is
        what the released codes do, probably by mistake: for comparisons only.
      evaluate_every: Steps between the evaluations for the latter two; they also
        happen right before a merge.
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
    targets: Any = None
    realisation: Realisation = "sum"
    per_branch: bool = False
    strategy: Strategy = "auto"
    mesh: Mesh | None = None
    method: Method = "auto"
    direction: Direction = "max"
    levels: int = 5
    evaluation: Evaluation = "map"
    num_samples: int = 32
    refresh: Callable[[Any], Any] | None = None
    policies: Mapping[str, Policy] | None = None
    heads: Mapping[str, Head] | None = None
    merge_source: MergeSource = "last"
    evaluate_every: int | None = None
    final: Final = "last"

    def __post_init__(self):
        name = "ForkMerge"
        weights = jnp.asarray(self.branch_weights)
        object.__setattr__(self, "branch_weights", weights)
        check_positive(name, "interval", self.interval)
        check_choice(name, "realisation", self.realisation, Realisation)
        check_choice(name, "strategy", self.strategy, Strategy)
        check_choice(name, "merge_source", self.merge_source, MergeSource)
        check_choice(name, "final", self.final, Final)
        wanted = 2 if self.targets is None else 3
        if weights.ndim != wanted:
            what = "(branches, tasks)" if wanted == 2 else "(targets, branches, tasks)"
            raise ValueError(
                f"{name}: branch_weights has shape {weights.shape}; it must be {what}"
                + ("." if wanted == 3 else ", or with targets= have one axis more.")
            )
        for leaf in jax.tree.leaves(self.targets):
            if jnp.shape(leaf)[:1] != weights.shape[:1]:
                raise ValueError(
                    f"{name}: targets has an array of shape {jnp.shape(leaf)}, but "
                    f"branch_weights is of {weights.shape[0]} targets."
                )
        if self.evaluate_every is not None:
            check_positive(name, "evaluate_every", self.evaluate_every)
            if self.merge_source == "last":
                raise ValueError(
                    f"{name}: evaluate_every={self.evaluate_every} has no use with "
                    "merge_source='last'."
                )
        _ = self._search  # its options are checked there

    # What follows from the fields.

    @property
    def num_branches(self) -> int:
        """B."""
        return self.branch_weights.shape[-2]

    @property
    def num_targets(self) -> int | None:
        """G, None without that axis."""
        return None if self.targets is None else self.branch_weights.shape[0]

    @functools.cached_property
    def _search(self) -> Search:
        return make_search(
            self.score,
            self.num_branches,
            method=self.method,
            direction=self.direction,
            levels=self.levels,
            evaluation=self.evaluation,
            num_samples=self.num_samples,
            policies=self.policies,
            heads=self.heads,
            refresh=self.refresh,
        )

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.num_targets is None else (self.num_targets,)

    def _over_targets(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(target args, *args)``, for every target if there are several."""
        if self.targets is None:
            return function((), *args)
        if self.strategy == "map":
            return lax.map(
                lambda xs: function((xs[0],), *xs[1:]), (self.targets, *args)
            )
        return jax.vmap(lambda target, *xs: function((target,), *xs))(
            self.targets, *args
        )

    # The state.

    def init(
        self, state: Any, *, key: Any = None, per_target: bool = False
    ) -> ForkMergeState:
        """Forks a train state.

        Args:
          state: Any pytree; see :func:`fork`.
          key: For ``realisation="sample"`` and ``method="random"``.
          per_target: The leaves have a first axis ``[G]``, a state for each target.

        Returns:
          The state of a run. Memory: B + 1 train states (a target), and B times the
          merged leaves more unless ``merge_source="last"``.

        Raises:
          ValueError: If a key is missing, or a policy's path matches nothing.
        """
        draws = self.realisation == "sample" or self._search.method == "random"
        if draws and key is None:
            raise ValueError(
                "ForkMerge.init: key= is needed, for tasks or candidates are drawn."
            )
        if per_target and self.targets is None:
            raise ValueError("ForkMerge.init: per_target=True needs targets=.")
        merged = jax.tree.map(jnp.asarray, state)
        if self._lead and not per_target:
            merged = jax.tree.map(
                lambda x: jnp.broadcast_to(x[None], (*self._lead, *x.shape)), merged
            )
        split = functools.partial(fork, num_branches=self.num_branches)
        branches = jax.vmap(split)(merged) if self._lead else split(merged)
        if self.mesh is not None and not self._lead:
            branches = place(branches, self.num_branches, self.mesh)
        rules = self._search.rules
        kinds = {policy for policy, _ in plan("ForkMerge.init", merged, rules)}
        nothing = jnp.full((*self._lead,), jnp.nan)
        each = jnp.full((*self._lead, self.num_branches), jnp.nan)
        info = MergeInfo(each, each, nothing, nothing, nothing, nothing)
        last = self.merge_source == "last"
        return ForkMergeState(
            branches=branches,
            merged=merged,
            merged_score=jnp.full_like(nothing, -jnp.inf),
            snapshots=() if last else keep_only(branches, rules, "merge"),
            snapshot_scores=jnp.full_like(each, -jnp.inf),
            initial=keep_only(merged, rules, "reset") if "reset" in kinds else (),
            key=key if draws else (),
            step=jnp.int32(0),
            merged_at=jnp.int32(0),
            round=jnp.int32(0),
            info=info,
        )

    def result(self, state: ForkMergeState) -> Any:
        """The merged train state that counts (``[G, ...]`` with several targets)."""
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
          The state, and the metrics ``[B, n, ...]`` (``[G, B, n, ...]``).
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
          The state, and the scores ``[B]`` (``[G, B]``). Cost: B validation passes.
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
        over runs that would be computed in every step: use ``targets`` for such an
        axis instead.

        Args:
          state: The state of the run.
          batch: One batch.
          validation: As for :meth:`merge`.
          report: As for :meth:`merge`.
          data: As for :meth:`train`.

        Returns:
          The state, and the metrics ``[B, ...]`` (``[G, B, ...]``).
        """
        self._check("advance", validation, report)
        batches = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
        state, metrics = self._train(state, batches, data)
        axis = len(self._lead) + 1
        metrics = jax.tree.map(lambda m: jnp.squeeze(m, axis), metrics)
        if self.evaluate_every is not None:
            state = lax.cond(
                state.step % self.evaluate_every == 0,
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
        periods = [p for p in (self.interval, self.evaluate_every, chunk) if p]
        while True:
            step = int(state.step)
            fresh = step > int(state.merged_at)
            if fresh and (step % self.interval == 0 or step >= num_steps):
                state, info = self.merge(state, validation, report)
                if on_merge is not None:
                    on_merge(state, info)
            elif fresh and self.evaluate_every and step % self.evaluate_every == 0:
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
        target: int | Sequence[int] = 0,
        drop_zeros: bool = True,
        keep_target_only: bool = True,
    ) -> tuple["ForkMerge", ForkMergeState]:
        """Goes on with the branches that the last merge used most; see :func:`prune`.

        Args:
          state: The state after a merge.
          keep: K′, the most branches to keep (a target).
          target: Index of the target task; with several, one each.
          drop_zeros: See :func:`prune`; with several targets all keep equally many.
          keep_target_only: See :func:`prune`.

        Returns:
          A driver of fewer branches, and its state.

        Raises:
          ValueError: Before the first merge.
        """
        if int(state.round) == 0:
            raise ValueError("ForkMerge.prune: there was no merge yet to prune by.")
        info, tasks = state.info, self.branch_weights.shape[-1]
        if isinstance(target, int):
            if self.num_targets is not None:
                raise ValueError(
                    f"ForkMerge.prune: target={target} is one task; name one for each "
                    f"of the {self.num_targets} targets."
                )
            check_target("ForkMerge.prune", tasks, target)
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
        else:
            for each in target:
                check_target("ForkMerge.prune", tasks, each)
            kept = prune_groups(
                info.weights,
                info.branch_scores,
                self.branch_weights,
                targets=target,
                keep=keep,
                direction=self.direction,
                keep_target_only=keep_target_only,
            )
        return self.restrict(kept), self.select(state, kept)

    def restrict(self, kept: Sequence[Any]) -> "ForkMerge":
        """The driver of some of the branches; also to restore a pruned run.

        Args:
          kept: Indices of the branches; with several targets, one tuple each.

        Returns:
          A driver with the other branches left out.
        """
        return dataclasses.replace(
            self, branch_weights=self._take(self.branch_weights, kept)
        )

    def select(self, state: ForkMergeState, kept: Sequence[Any]) -> ForkMergeState:
        """The state of :meth:`restrict`: some of the branches of a state."""
        take = functools.partial(self._take, kept=kept)
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

    def _take(self, tree: Any, kept: Sequence[Any]) -> Any:
        if self.num_targets is None:
            return take_branches(tree, kept)
        rows = jnp.array(kept, jnp.int32)
        pick = jax.vmap(lambda x, row: x[row])
        return jax.tree.map(lambda x: pick(x, rows), tree)

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

    def _flat(self, tree: Any, axis: int = 0) -> Any:
        """Targets and branches as one axis: to train, they are all the same."""
        if not self._lead:
            return tree
        size = self._lead[0] * self.num_branches

        def leaf(x):
            return x.reshape(*x.shape[:axis], size, *x.shape[axis + 2 :])

        return jax.tree.map(leaf, tree)

    def _unflat(self, tree: Any) -> Any:
        if not self._lead:
            return tree
        shape = (*self._lead, self.num_branches)
        return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)

    def _train(self, state: ForkMergeState, batches: Any, data: Any):
        branches, metrics = train_branches(
            self.step,
            self._flat(state.branches),
            self._flat(self.branch_weights),
            self._flat(batches, axis=1) if self.per_branch else batches,
            data=data,
            per_branch=self.per_branch,
            realisation=self.realisation,
            key=state.key if self.realisation == "sample" else None,
            start_step=state.step,
            strategy=self.strategy,
            mesh=self.mesh,
        )
        taken = jnp.int32(jax.tree.leaves(batches)[0].shape[0])
        state = state._replace(branches=self._unflat(branches), step=state.step + taken)
        return state, self._unflat(metrics)

    def _evaluate(self, state: ForkMergeState, validation: Any):
        search = self._search

        def one(target, branches):
            args = (() if validation is None else (validation,)) + target
            score = lambda s: search.sign * validate(self.score, s, args)
            if self.strategy == "map":
                return lax.map(score, branches)
            return jax.vmap(score)(branches)

        scores = self._over_targets(one, state.branches)
        if self.merge_source != "last":
            better = scores > state.snapshot_scores  # NaN never is
            new = keep_only(state.branches, search.rules, "merge")
            state = state._replace(
                snapshots=_where(better, new, state.snapshots),
                snapshot_scores=jnp.where(better, scores, state.snapshot_scores),
            )
        return state, search.sign * scores

    def _merge(self, state: ForkMergeState, validation: Any, report: Any):
        search = self._search
        if self.merge_source != "last":
            state, _ = self._evaluate(state, validation)
        key = None
        if search.method == "random":
            key = jax.random.fold_in(state.key, state.step)
            key = jax.random.fold_in(key, 2**31 - 1)  # no branch draws tasks from it

        def one(target, branches, snapshots, nu, initial):
            source = branches
            if self.merge_source != "last":
                source = overlay(branches, snapshots, search.rules, "merge")
            args = (() if validation is None else (validation,)) + target
            inputs = Inputs(source, args, key, nu, initial)
            found = run_search(search, inputs)
            nan = jnp.full((), jnp.nan, found.score.dtype)
            held_out = single = nan
            if report is not None:
                args = (report, *target)
                held_out = validate(self.score, found.state, args)
                at = jnp.argmax(search.sign * found.branch_scores)
                alone = merged_state(
                    search, inputs, jax.nn.one_hot(at, self.num_branches)
                )
                single = validate(self.score, alone, args)
            info = MergeInfo(
                found.weights,
                found.branch_scores,
                found.score,
                held_out,
                single,
                search.sign * (found.score - held_out),
            )
            forked = refork_leaves(branches, found.state, search.rules)
            return forked, found.state, info

        branches, merged, info = self._over_targets(
            one, state.branches, state.snapshots, self.branch_weights, state.initial
        )
        info = jax.tree.map(lambda new, old: new.astype(old.dtype), info, state.info)
        score = search.sign * info.score
        if self.final == "best":
            better = score > state.merged_score

            merged = _where(better, merged, state.merged)
            score = jnp.where(better, score, state.merged_score)
        scores = state.snapshot_scores
        if self.merge_source == "best_in_round":
            scores = jnp.full_like(scores, -jnp.inf)
        state = state._replace(
            branches=branches,
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
