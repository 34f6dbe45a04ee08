"""From jobs to turns: which contexts are read, compressed, kept at hand, and which questions are answered together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.models.cache import CompressedContext, Prefill, QuestionCache
from lceval.models.context_cache import ContextCache
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.policies import StatsSpec
from lceval.models.prefix import Job, by_context
from lceval.models.recipe import Recipe
from lceval.models.response import telemetry

# Generation arguments under which what a row says, or is likely to say, depends on its own prompt alone, so that rows
# may share a batch.
BATCHED = {"do_sample", "temperature", "top_p", "top_k", "min_p", "until", "max_gen_toks"}
# How many questions, read over a context that is kept for other recipes, are kept with it.
KEPT_QUESTIONS = 16


@dataclass
class Question:
    """A job whose context is at hand: what the model is asked next.

    Attributes:
        meta: its telemetry so far.
        cache: under `query_aware=true` the question, read but for its last token; else None.
    """

    job: Job
    context: CompressedContext
    meta: dict[str, Any]
    cache: QuestionCache | None


class ContextScheduler:
    """Reads each context once, and hands out its questions.

    Args:
        query_aware: whether a question is seen before its context is compressed.
        context_cache_bytes: capacity of the cache of compressed contexts.
        totals: counts `contexts` read and `samples` handed out.

    Attributes:
        keep_for: what recipes to come will need of a prefill; the last one is then kept for them. None keeps none.
        prefill_s: seconds spent prefilling contexts so far.
    """

    def __init__(
        self, engine: Engine, diagnosis: Diagnosis, *, query_aware: bool, context_cache_bytes: int, totals: Counter[str]
    ) -> None:
        self.engine = engine
        self.diagnosis = diagnosis
        self.query_aware = query_aware
        self.keep_for: StatsSpec | None = None
        self.prefill_s = 0.0
        self.totals = totals
        self._context_cache = ContextCache(context_cache_bytes)
        self._last: tuple[tuple[int, ...], Prefill] | None = None
        self._asked: dict[tuple[int, ...], QuestionCache] = {}

    def batches(self, jobs: Sequence[Job], recipe: Recipe, rows: int) -> Iterator[list[Question]]:
        """All jobs, up to `rows` questions at a time; those on one context side by side.

        A batch is emptied when the next one is asked for: its contexts are gone before another is read.
        """
        batch: list[Question] = []
        for question in self._questions(jobs, recipe):
            if batch and not self._together(batch[0], question):
                yield batch
                batch.clear()
            batch.append(question)
            del question
            self.totals["samples"] += 1
            if len(batch) == rows:
                yield batch
                batch.clear()
        if batch:
            yield batch
            batch.clear()

    @staticmethod
    def _together(a: Question, b: Question) -> bool:
        if (a.cache is None) != (b.cache is None) or not a.job.context or not b.job.context:
            return False
        # Payloads of generation are its arguments; those of scoring are choices, which any question may have.
        ours, theirs = a.job.payload, b.job.payload
        return not isinstance(ours, dict) or (ours == theirs and {*ours} <= BATCHED)

    def _questions(self, jobs: Sequence[Job], recipe: Recipe) -> Iterator[Question]:
        for group in by_context(jobs):
            how = recipe if group[0].found else Recipe()
            # What a question cannot change is compressed once for all of them.
            yield from self._each(group, how) if self.query_aware and how.evictor else self._shared(group, how)

    def _shared(self, group: Sequence[Job], how: Recipe) -> Iterator[Question]:
        ids = group[0].context
        context, prefill = self._context_cache.get((ids, how)), None
        charged = context is not None
        if ids and (context is None or self.diagnosis.needs_prefill):
            prefill = self._prefill(ids, how.stats_spec | self.diagnosis.stats_spec)
        if context is None:
            keep = self.keep_for is not None or self.diagnosis.needs_prefill
            context = self.engine.nothing() if prefill is None else prefill.compress(how, consume=not keep)
            self._context_cache.put((ids, how), context)
        prefill_s = 0.0 if prefill is None else prefill.prefill_s
        if not self.diagnosis.needs_prefill:
            prefill = None
        for job in group:
            question_cache = None if prefill is None else self.engine.ask(prefill, job.question, job.room)
            meta = telemetry(job, context, shared=charged, prefill_s=0.0 if charged else prefill_s)
            yield Question(job, context, meta | self.diagnosis.of_context(job, context, prefill, question_cache), None)
            charged = True

    def _each(self, group: Sequence[Job], how: Recipe) -> Iterator[Question]:
        """Query-aware: every question is prefilled over the whole context, and then decides what stays."""
        prefill = self._prefill(group[0].context, how.stats_spec | self.diagnosis.stats_spec)
        for place, job in enumerate(group):
            cache = self._ask(prefill, job)
            context = prefill.compress(how, consume=False, question_cache=cache)
            meta = telemetry(job, context, shared=place > 0, prefill_s=0.0 if place else prefill.prefill_s)
            meta |= self.diagnosis.of_context(job, context, prefill, cache)
            # The last token is read again, so that all of the answer comes from the compressed cache.
            cache.over(context)
            cache.rollback(1)
            yield Question(job, context, meta, cache)

    def _ask(self, prefill: Prefill, job: Job) -> QuestionCache:
        """The question, read over the uncompressed context; a copy of it, if it was kept for this recipe."""
        kept = self._asked.get(job.question)
        if kept is not None:
            return kept.fork()
        question_cache = self.engine.ask(prefill, job.question, job.room)
        if self._last is not None and len(self._asked) < KEPT_QUESTIONS:
            self._asked[job.question] = question_cache.fork()
        return question_cache

    def _prefill(self, ids: tuple[int, ...], stats_spec: StatsSpec) -> Prefill:
        """The uncompressed context; the last one again, if it was kept and observed what is needed now."""
        if (
            self._last is not None
            and self._last[0] == ids
            and self._last[1].stats_spec == self._last[1].stats_spec | stats_spec
        ):
            return self._last[1]
        self._last = None
        self._asked.clear()
        prefill = self.engine.prefill(ids, stats_spec | (self.keep_for or StatsSpec()))
        self.totals["contexts"] += 1
        self.prefill_s += prefill.prefill_s
        if self.keep_for is not None:
            self._last = ids, prefill
        return prefill
