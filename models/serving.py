"""From jobs to turns: which contexts are read, compressed, kept at hand, and which questions are answered together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lceval.models.cache import Context, Prefill, QuestionCache
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.policies import Needs
from lceval.models.prefix import Job, by_context
from lceval.models.recipe import Recipe
from lceval.models.response import telemetry
from lceval.models.shelf import Shelf

# Generation arguments under which what a row says, or is likely to say, depends on its own prompt alone, so that rows
# may share a batch.
BATCHED = {"do_sample", "temperature", "top_p", "top_k", "min_p", "until", "max_gen_toks"}
# How many questions, read over a context that is kept for other recipes, are kept with it.
KEPT_QUESTIONS = 16


@dataclass
class Turn:
    """A job whose context is at hand: what the model is asked next.

    Attributes:
        meta: its telemetry so far.
        cache: under `compress=aware` the question, read but for its last token; else None.
    """

    job: Job
    context: Context
    meta: dict[str, Any]
    cache: QuestionCache | None


class Server:
    """Reads each context once, and hands out its questions.

    Args:
        aware: whether a question is seen before its context is compressed.
        shelf_bytes: how much of compressed contexts is kept for later calls.
        totals: counts `contexts` read and `samples` handed out.

    Attributes:
        kept_for: what recipes to come will need of a prefill; the last one is then kept for them. None keeps none.
        read_s: seconds spent reading contexts so far.
    """

    def __init__(
        self, engine: Engine, diagnosis: Diagnosis, *, aware: bool, shelf_bytes: int, totals: Counter[str]
    ) -> None:
        self.engine = engine
        self.diagnosis = diagnosis
        self.aware = aware
        self.kept_for: Needs | None = None
        self.read_s = 0.0
        self.totals = totals
        self._shelf = Shelf(shelf_bytes)
        self._last: tuple[tuple[int, ...], Prefill] | None = None
        self._asked: dict[tuple[int, ...], QuestionCache] = {}

    def batches(self, jobs: Sequence[Job], recipe: Recipe, rows: int) -> Iterator[list[Turn]]:
        """All jobs, up to `rows` questions at a time; those on one context side by side.

        A batch is emptied when the next one is asked for: its contexts are gone before another is read.
        """
        batch: list[Turn] = []
        for turn in self._turns(jobs, recipe):
            if batch and not self._together(batch[0], turn):
                yield batch
                batch.clear()
            batch.append(turn)
            del turn
            self.totals["samples"] += 1
            if len(batch) == rows:
                yield batch
                batch.clear()
        if batch:
            yield batch
            batch.clear()

    @staticmethod
    def _together(a: Turn, b: Turn) -> bool:
        if (a.cache is None) != (b.cache is None) or not a.job.context or not b.job.context:
            return False
        # Payloads of generation are its arguments; those of scoring are choices, which any question may have.
        ours, theirs = a.job.payload, b.job.payload
        return not isinstance(ours, dict) or (ours == theirs and {*ours} <= BATCHED)

    def _turns(self, jobs: Sequence[Job], recipe: Recipe) -> Iterator[Turn]:
        for group in by_context(jobs):
            how = recipe if group[0].found else Recipe()
            # What a question cannot change is compressed once for all of them.
            yield from self._each(group, how) if self.aware and how.evictor else self._shared(group, how)

    def _shared(self, group: Sequence[Job], how: Recipe) -> Iterator[Turn]:
        ids = group[0].context
        context, prefill = self._shelf.get((ids, how)), None
        charged = context is not None
        if ids and (context is None or self.diagnosis.needs_prefill):
            prefill = self._read(ids, how.needs | self.diagnosis.needs)
        if context is None:
            keep = self.kept_for is not None or self.diagnosis.needs_prefill
            context = self.engine.nothing() if prefill is None else prefill.compress(how, consume=not keep)
            self._shelf.put((ids, how), context)
        prefill_s = 0.0 if prefill is None else prefill.read_s
        if not self.diagnosis.needs_prefill:
            prefill = None
        for job in group:
            asked = None if prefill is None else self.engine.ask(prefill, job.question, job.room)
            meta = telemetry(job, context, shared=charged, prefill_s=0.0 if charged else prefill_s)
            yield Turn(job, context, meta | self.diagnosis.of_context(job, context, prefill, asked), None)
            charged = True

    def _each(self, group: Sequence[Job], how: Recipe) -> Iterator[Turn]:
        """Question-aware: every question is read over the whole context, and then decides what stays."""
        prefill = self._read(group[0].context, how.needs | self.diagnosis.needs)
        for place, job in enumerate(group):
            cache = self._ask(prefill, job)
            context = prefill.compress(how, consume=False, asked=cache)
            meta = telemetry(job, context, shared=place > 0, prefill_s=0.0 if place else prefill.read_s)
            meta |= self.diagnosis.of_context(job, context, prefill, cache)
            # The last token is read again, so that all of the answer comes from the compressed cache.
            cache.over(context)
            cache.rollback(1)
            yield Turn(job, context, meta, cache)

    def _ask(self, prefill: Prefill, job: Job) -> QuestionCache:
        """The question, read over the uncompressed context; a copy of it, if it was kept for this recipe."""
        kept = self._asked.get(job.question)
        if kept is not None:
            return kept.fork()
        asked = self.engine.ask(prefill, job.question, job.room)
        if self._last is not None and len(self._asked) < KEPT_QUESTIONS:
            self._asked[job.question] = asked.fork()
        return asked

    def _read(self, ids: tuple[int, ...], needs: Needs) -> Prefill:
        """The uncompressed context; the last one again, if it was kept and observed what is needed now."""
        if self._last is not None and self._last[0] == ids and self._last[1].needs == self._last[1].needs | needs:
            return self._last[1]
        self._last = None
        self._asked.clear()
        prefill = self.engine.read(ids, needs | (self.kept_for or Needs()))
        self.totals["contexts"] += 1
        self.read_s += prefill.read_s
        if self.kept_for is not None:
            self._last = ids, prefill
        return prefill
