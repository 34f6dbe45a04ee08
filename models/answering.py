"""Generation and scoring of a batch of questions over compressed contexts."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor
from transformers import LogitsProcessorList

from lceval.core.answers import Score, Text
from lceval.models import generation
from lceval.models.checked_hflm import CheckedHFLM
from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.faults import NOT_FINITE, OUT_OF_MEMORY, FiniteLogits, is_out_of_memory
from lceval.models.prefix import GenerateJob, J, ScoreJob, padded, whole_rows
from lceval.models.recipe import Recipe
from lceval.models.replay import Steps
from lceval.models.scheduler import ContextScheduler, Question, in_batches
from lceval.models.writing import WritingCache

logger = logging.getLogger(__name__)

A = TypeVar("A")
Answer = Callable[[Sequence[Question[J]]], list[tuple[int, A]]]
# Choices scored in one forward pass.
CHOICE_ROWS = 32
# The most questions of an automatic batch, as in lm-eval.
MAX_BATCH_ROWS = 64


class AnsweringLM(CheckedHFLM):
    """HFLM that answers batches of questions, each over its compressed context.

    Attributes:
        totals: counts of this model, of which `failed` is that of samples without an answer.
    """

    engine: Engine
    diagnosis: Diagnosis
    scheduler: ContextScheduler
    recipe: Recipe
    totals: Counter[str]
    _pad: int

    @property
    def batch_rows(self) -> int:
        """The most questions of a batch; under `--batch_size auto` as many as fit into memory, up to this number."""
        automatic = str(self.batch_size).startswith("auto")
        return int((self.max_batch_size or MAX_BATCH_ROWS) if automatic else self.batch_size)

    def _detect_batch_size(self, *_: Any, **__: Any) -> int:
        """Under `--batch_size auto`, texts without a question run in pieces of the model's length, one by one."""
        return 1

    def _in_memory(self, batch: Sequence[Question[J]], answer: Answer[J, A]) -> list[tuple[int, A]]:
        """The answers of a batch; of its halves where memory does not suffice, and errors of single questions."""
        try:
            return answer(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Here the error, and what its frames hold, is freed.
        self.scheduler.release()
        if half := len(batch) // 2:
            logger.warning("out of memory with %d questions in a batch: retrying with %d", len(batch), half)
            return self._in_memory(batch[:half], answer) + self._in_memory(batch[half:], answer)
        self.totals["failed"] += 1
        (question,) = batch
        question.meta["kv"] |= {"status": "error", "error": OUT_OF_MEMORY}
        return question.job.unanswered(question.meta)

    def generate(self, questions: Iterable[Question[GenerateJob]], rows: int) -> list[Text]:
        """The answers, ordered by the index of their jobs, in batches of up to `rows` questions."""
        answers: dict[int, Text] = {}
        for batch in in_batches(questions, rows, self.scheduler.batch_key(self.recipe)):
            answers |= self._in_memory(batch, self._generate)
        return [answers[index] for index in sorted(answers)]

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _open(self, batch: Sequence[Question[Any]], *, answers: bool = True) -> tuple[QuestionCache, Tensor]:
        """A cache for the batch, and the question tokens still to be fed: [B, T], padded on the left.

        Args:
            answers: whether the batch is also answered, not only measured.
        """
        room = max(question.job.answer_tokens for question in batch)
        questions = [question.job.question for question in batch]
        last = torch.tensor([q[-1:] for q in questions], device=self.device)
        if caches := [question.cache for question in batch if question.cache is not None]:
            return (QuestionCache.joined(caches, 1 + room) if len(caches) > 1 else caches[0]), last
        contexts = [question.context for question in batch]
        if self.engine.geometry.has_states and len({len(question) for question in questions}) > 1:
            return self._open_apart(contexts, questions, room), last
        if self.recipe.evicts_while_writing:
            protected = [self.engine.protected_tokens(question.job.ids) for question in batch]
            cache: QuestionCache = WritingCache(self.engine, contexts, questions, protected, self.recipe)
        else:
            cache = self.engine.batch(contexts, questions, room)
        if self.diagnosis.needs_answer and answers:
            # All but the last token, so that gold answer and model answer start from the same cache.
            rest = torch.tensor(padded([q[:-1] for q in questions], self._pad), device=self.device)
            if rest.shape[1]:
                self.engine.forward(cache, rest, keep=1)
            return cache, last
        return cache, torch.tensor(padded(questions, self._pad), device=self.device)

    def _open_apart(
        self, contexts: Sequence[CompressedContext], questions: Sequence[Sequence[int]], room: int
    ) -> QuestionCache:
        """Questions of different lengths, all but their last token: a state does not tolerate padding before them."""
        caches = []
        for context, question in zip(contexts, questions, strict=True):
            cache = self.engine.batch([context], [question], 1)
            if question[:-1]:
                self.engine.forward(cache, torch.tensor([question[:-1]], device=self.device), keep=1)
            caches.append(cache)
        return QuestionCache.joined(caches, 1 + room)

    def _diagnose(self, batch: Sequence[Question[Any]], cache: QuestionCache, ids: Tensor) -> None:
        if self.diagnosis.needs_answer:
            for at in range(0, len(batch), CHOICE_ROWS):
                part = batch[at : at + CHOICE_ROWS]
                rows = range(at, at + len(part))
                probe = cache.fork()
                probe.select(rows)
                jobs = [question.job for question in part]
                measurements = self.diagnosis.of_answers(jobs, self.engine, probe, ids[rows.start : rows.stop].tolist())
                for question, measured in zip(part, measurements, strict=True):
                    question.meta |= measured

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Question[GenerateJob]]) -> list[tuple[int, Text]]:
        """The request index and the answer of each question."""
        until, new_tokens = list(batch[0].job.until), batch[0].job.max_new_tokens
        start = time.perf_counter()
        cache, ids = self._open(batch, answers=new_tokens > 0)
        opening_s = time.perf_counter() - start
        self._diagnose(batch, cache, ids)
        if not new_tokens:
            self._account(batch, cache, question_s=opening_s, decode_s=0.0)
            return [(question.job.index, Text("", question.meta)) for question in batch]
        select = generation.selection(self.model.generation_config, batch[0].job.sampling)
        cache.start_clock()
        start = time.perf_counter()
        with cache.writing() if isinstance(cache, WritingCache) else nullcontext():
            if select is None:
                written = self._written_by_transformers(batch, cache, ids)
            else:
                written = self._written(cache, ids, select, until, new_tokens)
        end = time.perf_counter()
        first_token = cache.first_step or end
        question_s = opening_s + first_token - start
        self._account(batch, cache, question_s=question_s, decode_s=end - first_token)
        for question in batch:
            kv = question.meta["kv"]
            # The whole question's pass: a row waits for all rows of its batch, but not for their contexts.
            kv["first_token_s"] = kv["prefill_s"] + kv["compress_s"] + question_s
        texts = []
        for question, tokens, not_finite in zip(batch, written.rows, written.failed, strict=True):
            if not_finite:
                texts += self._not_finite(question)
                continue
            question.meta["kv"] |= {"decode_tokens": max(0, len(tokens) - 1), "new_tokens": len(tokens)}
            texts.append((question.job.index, Text(self._text(tokens, until), question.meta)))
        return texts

    def _written(
        self, cache: QuestionCache, ids: Tensor, select: generation.Selection, until: Sequence[str], limit: int
    ) -> generation.Written:
        logits = self.engine.forward(cache, ids, keep=1)[:, -1]
        return generation.write(
            logits, Steps(self.engine, cache, limit - 1), select, self._ends(until), self._pad, limit
        )

    def _written_by_transformers(
        self, batch: Sequence[Question[GenerateJob]], cache: QuestionCache, ids: Tensor
    ) -> generation.Written:
        """What `generate` writes: it derives positions from the attention mask and skips the cached tokens."""
        job = batch[0].job
        rows = whole_rows([q.job for q in batch], cache.get_seq_length() + ids.shape[1], self._pad)
        whole, mask = (torch.tensor(x, device=self.device) for x in zip(*rows, strict=True))
        finite = FiniteLogits()
        out = self._model_generate(
            context=whole,
            logits_processor=LogitsProcessorList([finite]),
            attention_mask=mask,
            stop=list(job.until),
            max_length=whole.shape[1] + job.max_new_tokens,
            cache=cache,
            **job.sampling,
        )
        ends = self._ends(job.until)
        # The rest of a row is padding, or was written while other rows went on.
        written = [tokens[: ends.after(tokens)] for tokens in out[:, whole.shape[1] :].tolist()]
        return generation.Written(written, finite.failed(len(batch)))

    def _not_finite(self, question: Question[J]) -> list[tuple[int, Any]]:
        self.totals["failed"] += 1
        question.meta["kv"] |= {"status": "error", "error": NOT_FINITE}
        return question.job.unanswered(question.meta)

    def _ends(self, until: Sequence[str]) -> generation.Ends:
        decode = partial(self.tok_decode, skip_special_tokens=False)
        return generation.Ends(frozenset(self._eos_ids), tuple(string for string in until if string), decode)

    @property
    def _eos_ids(self) -> set[int]:
        """Tokens that end an answer: the model's, and the tokenizer's, which lm-eval adds to the stop sequences."""
        eos = self.model.generation_config.eos_token_id
        own = set() if eos is None else {eos} if isinstance(eos, int) else {*eos}
        return own | {self.eot_token_id}

    def _text(self, tokens: list[int], until: list[str]) -> str:
        """Decode, and remove thinking and everything from a stop sequence on, as HFLM does."""
        end = self.think_end_token
        if isinstance(end, int) and end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        text = self.tok_decode(tokens)
        if isinstance(end, int):
            text = text.lstrip()
        return str(postprocess_generated_text(text, until, end if isinstance(end, str) else None))

    @torch.inference_mode()
    def _score(self, batch: Sequence[Question[ScoreJob]]) -> list[tuple[int, Score]]:
        """Log-likelihoods of the questions' continuations: questions are prefilled once, then all choices as rows."""
        start = time.perf_counter()
        cache, ids = self._open(batch)
        self._diagnose(batch, cache, ids)
        first = self.engine.forward(cache, ids, keep=1)
        rows = [(row, choice) for row, question in enumerate(batch) for choice in question.job.choices]
        scores: list[tuple[int, Score]] = []
        for at in range(0, len(rows), CHOICE_ROWS):
            part = rows[at : at + CHOICE_ROWS]
            logits = first[[row for row, _ in part]]
            longest = max(len(choice.tokens) for _, choice in part) - 1
            if longest:
                inputs = torch.zeros(len(part), longest, dtype=torch.long, device=self.device)
                for place, (_, choice) in enumerate(part):
                    inputs[place, : len(choice.tokens) - 1] = torch.tensor(choice.tokens[:-1])
                branch = cache.fork() if len(rows) > CHOICE_ROWS else cache
                branch.select([row for row, _ in part])
                # Padding on the right: no scored token attends to it.
                logits = torch.cat([logits, self.engine.forward(branch, inputs)], 1)
            for place, (row, choice) in enumerate(part):
                targets = torch.tensor(choice.tokens, device=self.device)
                logprobs = torch.log_softmax(logits[place, : len(targets)], dim=-1, dtype=self.softmax_dtype)
                total = float(logprobs.gather(-1, targets[:, None]).sum())
                greedy = bool((logprobs.argmax(-1) == targets).all())
                scores.append((choice.index, Score((total, greedy), batch[row].meta)))
        self._account(batch, cache, question_s=time.perf_counter() - start, decode_s=0.0)
        broken = {index for index, score in scores if not math.isfinite(score[0])}
        for question in batch:
            if any(choice.index in broken for choice in question.job.choices):
                scores += self._not_finite(question)  # replaces those of its choices
        return scores

    def _account(self, batch: Sequence[Question[Any]], cache: QuestionCache, **seconds: float) -> None:
        """Charge a batch's time to its questions in equal parts, and record its peak KV bytes."""
        current = (
            sum({id(question.context): question.context.allocated_bytes for question in batch}.values())
            + cache.peak_own_bytes
        )
        for question in batch:
            question.meta["kv"] |= {name: value / len(batch) for name, value in seconds.items()}
            question.meta["kv"]["batch"] = len(batch)
            question.meta["kv"]["peak_bytes"] = max(question.meta["kv"]["peak_bytes"], current)
            if isinstance(cache, WritingCache):
                question.meta["kv"]["evictions"] = cache.evictions
