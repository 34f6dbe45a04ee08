"""The lm-eval model `lcft`: a Hugging Face causal LM that answers from a compressed KV cache.

Requests are grouped by context. Each context is prefilled and compressed once; every question continues from a
fork. With `kv=full` the results are those of `--model hf`.
"""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lceval.errors import UserError
from lceval.models import attention, packaged, recipe
from lceval.models.cache import QuestionCache
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.prefix import Job, find_boundary, fit, padded
from lceval.models.response import Score, Text, skipped
from lceval.models.scheduler import ContextScheduler, Question

logger = logging.getLogger(__name__)

OVERLONG = ("error", "middle", "end", "skip")
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
        self.recipe = recipe.parse(str(kv))
        choices = {"overlong": (overlong, OVERLONG), "attn": (attn, attention.CHOICES)}
        for name, (value, allowed) in {**choices, "diagnose": (diagnose, Diagnosis.KINDS)}.items():
            if value not in allowed:
                raise UserError(f"bad model argument {name}={value!r}: one of {', '.join(allowed)}")
        if not isinstance(query_aware, bool):
            raise UserError(f"bad model argument query_aware={query_aware!r}: true or false")
        if not isinstance(prefill_chunk, int) or prefill_chunk < 0:
            raise UserError(f"bad model argument prefill_chunk={prefill_chunk!r}: a number of tokens, or 0")
        if not isinstance(prefix_cache_gib, int | float) or prefix_cache_gib < 0:
            raise UserError(f"bad model argument prefix_cache_gib={prefix_cache_gib!r}: a number of GiB, or 0")
        if query_aware and getattr(self.recipe.evictor, "when", "") == "always":
            raise UserError(f"kv={self.recipe} evicts during decoding: use query_aware=false")
        if str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise UserError("lcft does not choose batch sizes automatically: pass a number as --batch_size")
        if "attn_implementation" in kwargs:
            raise UserError("lcft sets attn_implementation itself: remove it from --model_args")
        self.query_aware = query_aware
        self.overlong = overlong
        self.prefill_chunk = prefill_chunk
        self.context_field = context_field
        self.totals: Counter[str] = Counter()
        try:
            super().__init__(packaged.resolve(pretrained) if isinstance(pretrained, str) else pretrained, **kwargs)
        except TypeError as error:
            if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
                raise _unknown_argument(unknown[1]) from None
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

    # Requests ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Text]:
        """Generate from each prompt, as lm-eval specifies, with up to `batch_size` questions per batch.

        `max_gen_toks=0` generates nothing and returns telemetry and diagnosis only.
        """
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        jobs = []
        for index, request in enumerate(requests):
            prompt, gen_kwargs = request.args
            kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
            kwargs["until"] = handle_stop_sequences(kwargs.get("until"), eos=eos)
            kwargs.pop("max_length", None)
            ids = self.tok_batch_encode([prompt])[0][0].tolist()
            job = self._job(index, request, prompt, ids, kwargs)
            jobs.append(replace(job, answer_tokens=kwargs["max_gen_toks"]))
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
        choices: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        jobs: dict[tuple[int, ...], Job] = {}
        for index, request in enumerate(requests):
            prompt, continuation = request.args
            if prompt:
                ids, target = self._encode_pair(prompt, continuation)
            else:
                ids, target = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            key = tuple(ids)
            choices.setdefault(key, []).append((index, target))
            if key not in jobs:
                jobs[key] = self._job(index, request, prompt, ids, choices[key])
        # The last token of a continuation is scored but never fed to the model.
        sized = [replace(job, answer_tokens=max(len(t) for _, t in job.payload) - 1) for job in jobs.values()]
        fitting = self._fit(sized, requests)
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

    # Contexts ---------------------------------------------------------------------------------------------------

    def _job(self, index: int, request: Instance, prompt: str, ids: list[int], payload: Any) -> Job:
        doc = request.doc if isinstance(request.doc, dict) else {}
        context = doc.get(self.context_field)
        boundary = find_boundary(prompt, ids, context, self.tok_encode)
        has_context = boundary is not None
        if boundary is None:
            self.totals["no_boundary"] += context != ""  # rows with context=none have no context to find
            boundary = len(ids) - 1
        return Job(index, tuple(ids), boundary, has_context, payload=payload, prompt=prompt, doc=doc)

    def _fit(self, jobs: list[Job], requests: list[Instance]) -> list[Job]:
        fitting = fit(jobs, self.max_length, self.overlong, [str(request.task_name) for request in requests])
        self.totals["too_long"] += len(jobs) - len(fitting)
        return fitting

    def _batches(self, jobs: Sequence[Job], total: int, what: str, disable_tqdm: bool) -> Iterator[list[Question]]:
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

    # Questions --------------------------------------------------------------------------------------------------

    def _open(self, batch: Sequence[Question], *, answers: bool = True) -> tuple[QuestionCache, Tensor]:
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

    def _diagnose(self, batch: Sequence[Question], cache: QuestionCache, ids: Tensor) -> None:
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
    def _generate(self, batch: Sequence[Question]) -> list[tuple[int, Text]]:
        """The request index and the answer of each question."""
        kwargs = dict(batch[0].job.payload)
        until, new_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        start = time.perf_counter()
        cache, ids = self._open(batch, answers=new_tokens > 0)
        opening_s = time.perf_counter() - start
        self._diagnose(batch, cache, ids)
        if not new_tokens:
            self._account(batch, cache, question_s=opening_s, decode_s=0.0)
            return [(question.job.index, Text("", question.meta)) for question in batch]
        # generate() derives positions from the attention mask and skips the cached tokens. So each row is its context,
        # padding and its question, with the lengths of the longest context and question.
        past, longest = cache.get_seq_length(), ids.shape[1]
        whole = torch.full((len(batch), past + longest), self._pad, device=self.device)
        mask = torch.zeros_like(whole)
        for row, job in enumerate(question.job for question in batch):
            whole[row, : job.boundary] = torch.tensor(job.context)
            whole[row, whole.shape[1] - len(job.question) :] = torch.tensor(job.question)
            mask[row, : job.boundary] = 1
            mask[row, whole.shape[1] - len(job.question) :] = 1
        cache.start_clock()
        start = time.perf_counter()
        out = self._model_generate(
            context=whole,
            attention_mask=mask,
            stop=until,
            max_length=whole.shape[1] + new_tokens,
            cache=cache,
            **kwargs,
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
    def _score(self, batch: Sequence[Question]) -> list[tuple[int, Score]]:
        """Log-likelihoods of the questions' continuations: questions are prefilled once, then all choices as rows."""
        start = time.perf_counter()
        cache, ids = self._open(batch)
        self._diagnose(batch, cache, ids)
        first = self.engine.forward(cache, ids, keep=1)
        rows = [(row, index, target) for row, question in enumerate(batch) for index, target in question.job.payload]
        scores = []
        for at in range(0, len(rows), CHOICE_ROWS):
            part = rows[at : at + CHOICE_ROWS]
            logits = first[[row for row, _, _ in part]]
            longest = max(len(target) for _, _, target in part) - 1
            if longest:
                inputs = torch.zeros(len(part), longest, dtype=torch.long, device=self.device)
                for place, (_, _, target) in enumerate(part):
                    inputs[place, : len(target) - 1] = torch.tensor(target[:-1])
                branch = cache.fork() if len(rows) > CHOICE_ROWS else cache
                branch.select([row for row, _, _ in part])
                # Padding on the right: no scored token attends to it.
                logits = torch.cat([logits, self.engine.forward(branch, inputs)], 1)
            for place, (row, index, target) in enumerate(part):
                targets = torch.tensor(target, device=self.device)
                logprobs = torch.log_softmax(logits[place, : len(target)], dim=-1, dtype=self.softmax_dtype)
                total = float(logprobs.gather(-1, targets[:, None]).sum())
                greedy = bool((logprobs.argmax(-1) == targets).all())
                scores.append((index, Score((total, greedy), batch[row].meta)))
        self._account(batch, cache, question_s=time.perf_counter() - start, decode_s=0.0)
        return scores

    def _account(self, batch: Sequence[Question], cache: QuestionCache, **seconds: float) -> None:
        """Charge a batch's time to its questions in equal parts, and record its peak KV bytes."""
        current = (
            sum({id(question.context): question.context.allocated_bytes for question in batch}.values())
            + cache.own_bytes
        )
        for question in batch:
            question.meta["kv"] |= {name: value / len(batch) for name, value in seconds.items()}
            question.meta["kv"]["peak_bytes"] = max(question.meta["kv"]["peak_bytes"], current)

    # Records ----------------------------------------------------------------------------------------------------

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


def _unknown_argument(name: str) -> UserError:
    parameters = {*inspect.signature(LCFT.__init__).parameters, *inspect.signature(HFLM.__init__).parameters}
    known = sorted(parameters - {"self", "kwargs"})
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return UserError(f"unknown model argument {name!r}: {hint}")
