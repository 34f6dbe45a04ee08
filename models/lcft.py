"""The lm-eval model `lcft`: a Hugging Face causal LM that answers from a compressed KV cache.

Requests are grouped by context. Each context is prefilled and compressed once; every question continues from a
fork. With `kv=full` the results are those of `--model hf`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lceval import packaged
from lceval.core.answers import Score, Text
from lceval.core.errors import UserError
from lceval.models import attention, recipe
from lceval.models.arguments import check_arguments, loaded_whole, unknown_argument, unknown_keyword
from lceval.models.cache import QuestionCache
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.policies import StatsSpec
from lceval.models.prefix import Choice, GenerateJob, J, ScoreJob, find_boundary, fit, padded, whole_rows
from lceval.models.scheduler import ContextScheduler, Question
from lceval.models.telemetry import skipped

logger = logging.getLogger(__name__)

# Choices scored in one forward pass.
CHOICE_ROWS = 32
REPEAT = "\n\nNow write out the text above again, word for word:\n\n"


class LCFT(HFLM):  # type: ignore[misc]
    """HFLM over a compressed KV cache.

    Args:
        pretrained: model name, folder or loaded model, as for HFLM; `smollm2-135m` is the packaged model.
        kv: KV recipe (`lceval.models.recipe`).
        query_aware: whether the question's tokens join the eviction scores of its context (query-aware). By default
            a context is compressed before any question is processed (query-agnostic).
        overlong: handling of a prompt that does not fit the model: `error` stops before the first prefill, `middle`
            and `end` truncate the context there, `skip` records the sample as an error.
        prefill_chunk: tokens per forward pass during prefill; 0 prefills a context in one pass.
        attn: decoding backend: `triton`, `torch`, or `auto` (`triton` on CUDA, else `torch`).
        diagnose: extra measurements: `gold` adds gold_kept and gold_nll to every sample, `attention` adds NDCG@10 of
            the documents ranked by the question's attention, `none` adds nothing.
        prefix_cache_gib: capacity in GiB of the LRU cache of compressed contexts.
        merge: merge the adapter into the weights: faster, but rounded to their dtype.
        context_field: field of a task's docs with the context exactly as it appears in the prompt.
        kwargs: all arguments of HFLM, including `peft`.

    Raises:
        UserError: a bad recipe (before anything is loaded), an unknown argument, or an unsupported model.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        kv: str = recipe.FULL,
        query_aware: bool = False,
        overlong: str = "error",
        prefill_chunk: int = 0,
        attn: str = "auto",
        diagnose: str = "none",
        prefix_cache_gib: float = 1.0,
        merge: bool = False,
        context_field: str = "context",
        **kwargs: Any,
    ) -> None:
        check_arguments(
            {"overlong": overlong, "attn": attn, "diagnose": diagnose, "query_aware": query_aware}
            | {"prefill_chunk": prefill_chunk, "prefix_cache_gib": prefix_cache_gib, **kwargs}
        )
        self.query_aware = query_aware
        self.totals: Counter[str] = Counter()
        self.use(kv)
        self.overlong = overlong
        self.prefill_chunk = prefill_chunk
        self.context_field = context_field
        try:
            with loaded_whole(pretrained, kwargs):
                super().__init__(packaged.resolve(pretrained) if isinstance(pretrained, str) else pretrained, **kwargs)
        except TypeError as error:
            if name := unknown_keyword(error):
                raise unknown_argument(name, LCFT, HFLM) from None
            raise
        if self.peft and any(config.is_prompt_learning for config in self.model.peft_config.values()):
            raise UserError(f"peft={self.peft}: prompt-learning adapters add tokens to the cache: use LoRA instead")
        if merge and not self.peft:
            raise UserError("bad model argument merge=True: no adapter to merge; pass one as peft=")
        self.merge = merge
        if merge:
            self._model = self.model.merge_and_unload()
        self.base = base = self.model if merge or not self.peft else self.model.get_base_model()
        self.engine = Engine(
            self.model,
            base,
            chunk=prefill_chunk,
            kernels=attention.use_kernels(attn, self.device),
            autocast=self._autocast,
            repeat_ids=self.tok_encode(REPEAT, add_special_tokens=False),
        )
        self.diagnosis = Diagnosis(diagnose, self.tokenizer, self.tok_encode, context_field)
        self._pad = self.tokenizer.pad_token_id
        self.scheduler = ContextScheduler(
            self.engine,
            self.diagnosis,
            query_aware=query_aware,
            context_cache_bytes=int(prefix_cache_gib * 2**30),
            totals=self.totals,
        )
        base.set_attn_implementation(attention.register())

    def use(self, kv: str | recipe.Recipe, totals: Mapping[str, int] | None = None) -> None:
        """Answer under another KV recipe from now on; the counts of `totals` restart, or continue those given.

        Raises:
            UserError: a bad recipe, or one that query-aware eviction excludes.
        """
        self.recipe = recipe.parse(kv) if isinstance(kv, str) else kv
        if self.query_aware and getattr(self.recipe.evictor, "when", "") == "always":
            raise UserError(f"kv={self.recipe} evicts during decoding: use query_aware=false")
        self.totals.clear()
        self.totals.update(totals or {})

    @contextmanager
    def sharing_prefills(self, recipes: Iterable[recipe.Recipe]) -> Iterator[None]:
        """Within the block, a context that these recipes answer one after another is prefilled once for all."""
        self.scheduler.share(reduce(or_, (kv.stats_spec for kv in recipes), StatsSpec()))
        try:
            yield
        finally:
            self.scheduler.share(None)

    @property
    def prefill_s(self) -> float:
        """Total seconds of all prefills of this model."""
        return self.scheduler.prefill_s

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Text]:
        """Generate from each prompt, as lm-eval specifies, with up to `batch_size` questions per batch.

        `max_gen_toks=0` generates nothing and returns telemetry and diagnosis only.
        """
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        jobs = []
        for index, request in enumerate(requests):
            prompt, gen_kwargs = request.args
            sampling = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
            sampling.pop("max_length", None)
            until = tuple(handle_stop_sequences(sampling.pop("until", None), eos=eos))
            new_tokens = sampling.pop("max_gen_toks")
            split = self._split(index, request, self.tok_batch_encode([prompt])[0][0].tolist())
            jobs.append(GenerateJob(**split, until=until, max_new_tokens=new_tokens, sampling=sampling))
        jobs = self._fit(jobs, requests)
        responses: list[Text] = [Text("", skipped())] * len(requests)
        for batch in self._batches(jobs, len(requests), "generate_until", disable_tqdm):
            for index, text in self._generate(batch):
                responses[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return responses

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Score each continuation, as lm-eval specifies. The choices of a question are scored together."""
        if self.enable_thinking:
            raise UserError("enable_thinking=True does not support log-likelihood tasks: use generative tasks")
        choices: dict[tuple[int, ...], list[Choice]] = {}
        for index, request in enumerate(requests):
            prompt, continuation = request.args
            if prompt:
                ids, tokens = self._encode_pair(prompt, continuation)
            else:
                ids, tokens = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            choices.setdefault(tuple(ids), []).append(Choice(index, tuple(tokens)))
        jobs = [
            ScoreJob(**self._split(of[0].index, requests[of[0].index], ids), choices=tuple(of))
            for ids, of in choices.items()
        ]
        fitting = self._fit(jobs, requests)
        responses = [Score((-float("inf"), False), skipped())] * len(requests)
        for batch in self._batches(fitting, len(jobs), "loglikelihood", disable_tqdm):
            for index, score in self._score(batch):
                responses[index] = score
                self.cache_hook.add_partial("loglikelihood", requests[index].args, score)
        return responses

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Perplexity of whole texts, which have no question; requires `kv=full`."""
        if self.recipe != recipe.Recipe():
            raise UserError(
                f"kv={self.recipe} does not support rolling log-likelihood (texts without a question): use kv=full"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def _split(self, index: int, request: Instance, ids: Sequence[int]) -> dict[str, Any]:
        """The fields that every job has."""
        prompt, doc = request.args[0], request.doc if isinstance(request.doc, dict) else {}
        context = doc.get(self.context_field)
        boundary = find_boundary(prompt, ids, context, self.tok_encode)
        has_context = boundary is not None
        if boundary is None:
            self.totals["no_boundary"] += context != ""  # rows with context=none have no context to find
            boundary = len(ids) - 1
        return {
            "index": index, "ids": tuple(ids), "boundary": boundary, "has_context": has_context,
            "prompt": prompt, "doc": doc,
        }  # fmt: skip

    def _fit(self, jobs: list[J], requests: list[Instance]) -> list[J]:
        fitting = fit(jobs, self.max_length, self.overlong, [str(request.task_name) for request in requests])
        self.totals["too_long"] += len(jobs) - len(fitting)
        return fitting

    def _batches(self, jobs: Sequence[J], total: int, what: str, disable_tqdm: bool) -> Iterator[list[Question[J]]]:
        """Jobs with their compressed contexts, in batches."""
        if self.totals["no_boundary"] and self.recipe != recipe.Recipe():
            logger.warning(
                "%d prompts have no context field %r: they run uncompressed (kept share 1.0)",
                self.totals["no_boundary"],
                self.context_field,
            )
        bar = tqdm(total=total, initial=total - len(jobs), disable=disable_tqdm or self.rank != 0, desc=what)
        for batch in self.scheduler.batches(jobs, self.recipe, int(self.batch_size)):
            answered = len(batch)
            yield batch
            bar.update(answered)
        bar.close()

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
        cache = self.engine.batch([question.context for question in batch], questions, room)
        if self.diagnosis.needs_answer and answers:
            # All but the last token, so that gold answer and model answer start from the same cache.
            rest = torch.tensor(padded([q[:-1] for q in questions], self._pad), device=self.device)
            if rest.shape[1]:
                self.engine.forward(cache, rest, keep=1)
            return cache, last
        return cache, torch.tensor(padded(questions, self._pad), device=self.device)

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
        # generate() derives positions from the attention mask and skips the cached tokens.
        rows = whole_rows([q.job for q in batch], cache.get_seq_length() + ids.shape[1], self._pad)
        whole, mask = (torch.tensor(x, device=self.device) for x in zip(*rows, strict=True))
        cache.start_clock()
        start = time.perf_counter()
        out = self._model_generate(
            context=whole,
            attention_mask=mask,
            stop=until,
            max_length=whole.shape[1] + new_tokens,
            cache=cache,
            **batch[0].job.sampling,
        )
        end = time.perf_counter()
        first_token = cache.first_step or end
        self._account(batch, cache, question_s=opening_s + first_token - start, decode_s=end - first_token)
        texts = []
        for question, row in zip(batch, out[:, whole.shape[1] :].tolist(), strict=True):
            tokens = self._until_eos(row)
            question.meta["kv"] |= {"decode_tokens": max(0, len(tokens) - 1), "new_tokens": len(tokens)}
            texts.append((question.job.index, Text(self._text(tokens, until), question.meta)))
        return texts

    def _until_eos(self, tokens: list[int]) -> list[int]:
        """A row's tokens up to its first end token; the rest is padding up to the longest row."""
        ends = [tokens.index(e) for e in self._eos_ids if e in tokens]
        return tokens[: min(ends) + 1] if ends else tokens

    @property
    def _eos_ids(self) -> list[int]:
        eos = self.model.generation_config.eos_token_id
        return [self.eot_token_id] if eos is None else [eos] if isinstance(eos, int) else list(eos)

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
        scores = []
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
        return scores

    def _account(self, batch: Sequence[Question[Any]], cache: QuestionCache, **seconds: float) -> None:
        """Charge a batch's time to its questions in equal parts, and record its peak KV bytes."""
        current = (
            sum({id(question.context): question.context.allocated_bytes for question in batch}.values())
            + cache.own_bytes
        )
        for question in batch:
            question.meta["kv"] |= {name: value / len(batch) for name, value in seconds.items()}
            question.meta["kv"]["peak_bytes"] = max(question.meta["kv"]["peak_bytes"], current)

    @property
    def identity(self) -> dict[str, Any]:
        """All settings of this model that change its outputs."""
        return {
            "pretrained": self.pretrained if isinstance(self.pretrained, str) else self.config._name_or_path,
            "revision": self.revision,
            "peft": self.peft,
            "delta": self.delta,
            **({"merge": True} if self.merge else {}),
            "kv": str(self.recipe),
            "query_aware": self.query_aware,
            "overlong": self.overlong,
            "context_field": self.context_field,
            "prefill_chunk": self.prefill_chunk,
            "attn": "triton" if self.engine.kernels else "torch",
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Accept lm-eval's `--use_cache` hook only if its file was written under the same identity.

        lm-eval keys that file by prompt only, so it would return the answers of another model or recipe.
        """
        super().set_cache_hook(cache_hook)
        stored = getattr(cache_hook, "dbdict", None)
        if stored is not None:
            identity, key = repr(sorted(self.identity.items(), key=str)), "lceval-identity"
            writer = stored.get(key) if key in stored or len(stored) == 0 else "another model"
            if writer not in (None, identity):
                raise UserError(f"the --use_cache file was written by {writer}, not by {identity}: use another file")
            stored[key] = identity

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's record, with recipe, backend and totals under `lcft`."""
        lcft = {
            "recipe": str(self.recipe),
            "attn": self.identity["attn"],
            "expanded": self.recipe.expanded(),
            **self.totals,
        }
        return {**super().get_model_info(), "lcft": lcft}
