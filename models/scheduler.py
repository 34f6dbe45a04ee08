"""Schedules jobs: which contexts are prefilled, compressed and cached, and which questions share a batch."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import torch

from lceval.models import admission, chunkwise
from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.context_cache import ContextCache
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.faults import OUT_OF_MEMORY, is_out_of_memory
from lceval.models.policies import StatsSpec
from lceval.models.prefill import Prefill
from lceval.models.prefix import J, Job, by_context
from lceval.models.recipe import Recipe
from lceval.models.telemetry import telemetry

# Maximum number of prefilled questions cached with a prefill that is kept for other recipes.
CACHED_QUESTIONS = 16


@dataclass
class Question(Generic[J]):
    """A job with its compressed context, ready to be answered.

    Attributes:
        meta: telemetry so far.
        cache: under `query_aware=true` the question prefilled except its last token; else None.
    """

    job: J
    context: CompressedContext
    meta: dict[str, Any]
    cache: QuestionCache | None


class ContextScheduler:
    """Prefills each context once and yields its questions.

    Args:
        query_aware: whether a question is processed before its context is compressed.
        total_budget: whether a question's tokens are then inside the budget.
        context_cache_bytes: capacity of the cache of compressed contexts.
        totals: counters of prefilled `contexts` and yielded `samples`, updated in place.

    Attributes:
        keep_for: prefill statistics that later recipes require; the last prefill is then kept for them. None keeps no
            prefill.
        prefill_s: total seconds of all prefills.
    """

    def __init__(
        self,
        engine: Engine,
        diagnosis: Diagnosis,
        *,
        query_aware: bool,
        total_budget: bool = False,
        context_cache_bytes: int,
        totals: Counter[str],
    ) -> None:
        self.engine = engine
        self.diagnosis = diagnosis
        self.query_aware = query_aware
        self.total_budget = total_budget
        self.keep_for: StatsSpec | None = None
        self.prefill_s = 0.0
        self.totals = totals
        self._context_cache = ContextCache(context_cache_bytes)
        self._last_prefill: tuple[tuple[int, ...], Prefill] | None = None
        self._question_caches: dict[tuple[int, ...], QuestionCache] = {}

    def share(self, stats_spec: StatsSpec | None) -> None:
        """Keep the last prefill, with these statistics, for other recipes; None releases it."""
        self.keep_for = stats_spec
        self._last_prefill = None
        self._question_caches.clear()

    def batches(
        self, jobs: Sequence[J], recipe: Recipe, rows: int, on_failure: Callable[[J, str], None]
    ) -> Iterator[list[Question[J]]]:
        """All jobs in batches of up to `rows` questions that fit into memory; questions on one context are adjacent.

        A batch is cleared when the next one is requested, so that its contexts are freed before the next prefill.

        Args:
            on_failure: receives each job for whose context or question memory does not suffice, with the reason.
        """
        waiting: list[Question[J]] = []
        questions = self._questions(jobs, recipe, on_failure, waiting)
        for batch in in_batches(questions, rows, self.batch_key(recipe), waiting):
            self.totals["samples"] += len(batch)
            yield batch

    def batch_key(self, recipe: Recipe) -> Callable[[Job], Hashable]:
        """What is equal for all jobs of a batch, because of the model."""
        geometry = self.engine.geometry
        if geometry.counts_positions:
            return lambda job: (len(job.context), len(job.question))
        # No state tolerates padding before a question, and caches that evict later cannot be joined.
        evicts_later = recipe.evicts_while_writing or recipe.evicts_always
        return (lambda job: len(job.question)) if geometry.has_states and evicts_later else lambda _: None

    def _questions(
        self, jobs: Sequence[J], recipe: Recipe, on_failure: Callable[[J, str], None], waiting: Sequence[Question[J]]
    ) -> Iterator[Question[J] | None]:
        """Every job's question; None before one for which there is no room beside those that are `waiting`, and where
        memory ran out, before a second try without any cache."""
        for group in by_context(jobs):
            applied = recipe if group[0].has_context else Recipe()
            # Where nothing is compressed, both modes are the same.
            query_aware = self.query_aware and applied != Recipe() and bool(group[0].context)
            prepare = self._query_aware if query_aware else self._query_agnostic
            remaining, released = list(group), False
            if not self._has_room(waiting, group[0], prefilled=False):
                yield None
            while remaining:
                try:
                    for question in prepare(tuple(remaining), applied):
                        del remaining[0]
                        released = False
                        yield question
                        del question
                        if remaining and not self._has_room(waiting, remaining[0], prefilled=not query_aware):
                            yield None
                    continue
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                # Here the error, and what its frames hold, is freed.
                if released:
                    on_failure(remaining.pop(0), OUT_OF_MEMORY)
                yield None
                self.release()
                released = True

    def _has_room(self, waiting: Sequence[Question[Any]], job: Job, *, prefilled: bool) -> bool:
        beside = [question.job for question in waiting]
        return not beside or admission.has_room(self.engine, beside, job, prefilled=prefilled)

    def release(self) -> None:
        """Free all cached contexts, prefills and questions."""
        self._context_cache.clear()
        self._last_prefill = None
        self._question_caches.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _query_agnostic(self, group: Sequence[J], recipe: Recipe) -> Iterator[Question[J]]:
        """Compress the context once for all of its questions."""
        ids = group[0].context
        context, prefill = self._context_cache.get((ids, recipe)), None
        charged = context is not None
        in_chunks = recipe.reads_in_chunks
        if ids and (self.diagnosis.needs_prefill or (context is None and not in_chunks)):
            prefill = self._prefill(ids, recipe.stats_spec | self.diagnosis.stats_spec)
        prefill_s = 0.0 if prefill is None else prefill.prefill_s
        if context is None:
            if not ids:
                context = self.engine.empty_context()
            elif in_chunks:
                context, prefill_s = chunkwise.read(self.engine, ids, recipe)
                self.totals["contexts"] += 1
                self.prefill_s += prefill_s
            else:
                assert prefill is not None
                keep = self.keep_for is not None or self.diagnosis.needs_prefill
                context = prefill.compress(recipe, consume=not keep)
            self._context_cache.put((ids, recipe), context)
        if not self.diagnosis.needs_prefill:
            prefill = None
        for job in group:
            question_cache = None if prefill is None else self.engine.prefill_question(prefill, job.question, job.room)
            meta = telemetry(job, context, shared=charged, prefill_s=0.0 if charged else prefill_s)
            yield Question(job, context, meta | self.diagnosis.of_context(job, context, prefill, question_cache), None)
            charged = True

    def _query_aware(self, group: Sequence[J], recipe: Recipe) -> Iterator[Question[J]]:
        """Prefill every question over the uncompressed context, then compress the context for that question."""
        prefill = self._prefill(group[0].context, recipe.stats_spec | self.diagnosis.stats_spec)
        for place, job in enumerate(group):
            cache = self._prefill_question(prefill, job)
            applied = recipe.within(prefill.tokens, len(job.question)) if self.total_budget else recipe
            context = prefill.compress(applied, consume=False, question_cache=cache)
            meta = telemetry(job, context, shared=place > 0, prefill_s=0.0 if place else prefill.prefill_s)
            meta |= self.diagnosis.of_context(job, context, prefill, cache)
            # The last token is fed again, so that the whole answer depends on the compressed cache.
            cache.rebase(context)
            cache.rollback(1)
            yield Question(job, context, meta, cache)

    def _prefill_question(self, prefill: Prefill, job: Job) -> QuestionCache:
        """The question prefilled over the uncompressed context, or a copy if an earlier recipe prefilled it."""
        cached = self._question_caches.get(job.question)
        if cached is not None:
            return cached.fork()
        question_cache = self.engine.prefill_question(prefill, job.question, job.room)
        if self._last_prefill is not None and len(self._question_caches) < CACHED_QUESTIONS:
            self._question_caches[job.question] = question_cache.fork()
        return question_cache

    def _prefill(self, ids: tuple[int, ...], stats_spec: StatsSpec) -> Prefill:
        """The uncompressed context; the kept prefill if it is the same context with sufficient statistics."""
        if (
            self._last_prefill is not None
            and self._last_prefill[0] == ids
            and self._last_prefill[1].stats_spec == self._last_prefill[1].stats_spec | stats_spec
        ):
            return self._last_prefill[1]
        self._last_prefill = None
        self._question_caches.clear()
        prefill = self.engine.prefill(ids, stats_spec | (self.keep_for or StatsSpec()))
        self.totals["contexts"] += 1
        self.prefill_s += prefill.prefill_s
        if self.keep_for is not None:
            self._last_prefill = ids, prefill
        return prefill


def in_batches(
    questions: Iterable[Question[J] | None],
    rows: int,
    key: Callable[[J], Hashable] = lambda _: None,
    batch: list[Question[J]] | None = None,
) -> Iterator[list[Question[J]]]:
    """Questions in batches of up to `rows`, each cleared when the next one is requested; None ends a batch.

    Args:
        key: equal for all jobs of a batch.
        batch: the list that is filled, where others watch it.
    """
    batch = [] if batch is None else batch
    for question in questions:
        if question is None:  # memory is short: answer what is waiting first
            if batch:
                yield batch
                batch.clear()
            continue
        if batch and not (_can_share_batch(batch[0], question) and key(batch[0].job) == key(question.job)):
            yield batch
            batch.clear()
        batch.append(question)
        del question
        if len(batch) == rows:
            yield batch
            batch.clear()
    if batch:
        yield batch
        batch.clear()


def _can_share_batch(a: Question[Any], b: Question[Any]) -> bool:
    if (a.cache is None) != (b.cache is None) or not a.job.context or not b.job.context:
        return False
    return bool(a.job.can_share_batch(b.job))
