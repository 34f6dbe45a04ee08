"""The lm-eval model `lcft`: a Hugging Face causal LM that answers from a compressed KV cache.

Requests are grouped by identical context. Each context is prefilled and compressed once; every question about it
continues from a fork. With `kv=full` the results are those of `--model hf`.
"""

from __future__ import annotations

import inspect
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
from lceval.kernels import decode
from lceval.models import attention, packaged, recipe
from lceval.models.cache import Context, Prefill, QuestionCache
from lceval.models.prefix import Job, by_context, cut, find_boundary
from lceval.models.response import Score, Text, skipped, telemetry

logger = logging.getLogger(__name__)

ATTENTION = ("auto", "torch", "triton")
OVERLONG = ("error", "middle", "end", "skip")
# Choices of one question that are scored in one forward pass.
CHOICE_ROWS = 32


class LCFT(HFLM):  # type: ignore[misc]
    """HFLM over a compressed KV cache.

    Args:
        pretrained: a name, folder or loaded model, as for HFLM; `smollm2-135m` names the packaged model.
        kv: the KV recipe (`lceval.models.recipe`).
        overlong: what happens to a prompt that does not fit the model: `error` stops before the first prefill,
            `middle` and `end` cut the context there, `skip` records the sample as an error.
        prefill_chunk: tokens per forward pass while reading a context; 0 reads it in one pass.
        attn: what decoding reads the context with: `triton` kernels, `torch`, or `auto`, which is the kernels on CUDA.
        context_field: the field of a task's docs that holds the context exactly as it stands in the prompt.
        kwargs: every argument of HFLM, `peft` among them.

    Raises:
        UserError: a bad recipe (before anything is loaded), an unknown argument, or a model this cache cannot serve.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        kv: str = recipe.FULL,
        overlong: str = "error",
        prefill_chunk: int = 0,
        attn: str = "auto",
        context_field: str = "context",
        **kwargs: Any,
    ) -> None:
        self.recipe = recipe.parse(str(kv))
        if overlong not in OVERLONG:
            raise UserError(f"bad model argument overlong={overlong!r}: one of {', '.join(OVERLONG)}")
        if not isinstance(prefill_chunk, int) or prefill_chunk < 0:
            raise UserError(f"bad model argument prefill_chunk={prefill_chunk!r}: a number of tokens, or 0")
        if attn not in ATTENTION:
            raise UserError(f"bad model argument attn={attn!r}: one of {', '.join(ATTENTION)}")
        if str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise UserError("lcft does not size batches by itself: pass a number as --batch_size")
        if "attn_implementation" in kwargs:
            raise UserError("lcft brings its own attention: leave attn_implementation out of --model_args")
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
        base = self.model.get_base_model() if self.peft else self.model
        _check_supported(base.config.get_text_config())
        if self.peft and any(config.is_prompt_learning for config in self.model.peft_config.values()):
            raise UserError(f"peft={self.peft}: prompt-learning adapters put their own tokens into the cache; use LoRA")
        self._kernels = _use_kernels(attn, self.device)
        base.set_attn_implementation(attention.register())
        self._reader = base.get_decoder()
        self._layers = base.config.get_text_config().num_hidden_layers

    # Requests ---------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Text]:
        """Generate from each prompt; lm-eval's contract."""
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        jobs = []
        for index, request in enumerate(requests):
            prompt, gen_kwargs = request.args
            kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
            kwargs["until"] = handle_stop_sequences(kwargs.get("until"), eos=eos)
            kwargs.pop("max_length", None)
            ids = self.tok_batch_encode([prompt])[0][0].tolist()
            jobs.append(self._job(index, request, prompt, ids, (request, kwargs)))
        jobs = self._fit(jobs, requests, [job.payload[1]["max_gen_toks"] for job in jobs])
        responses: list[Text] = [Text("", skipped())] * len(requests)
        for job, context, meta in self._over_contexts(jobs, len(requests), "generate_until", disable_tqdm):
            request, kwargs = job.payload
            responses[job.index] = self._generate(job, context, dict(kwargs), meta)
            self.cache_hook.add_partial("generate_until", request.args, responses[job.index])
        return responses

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Score each continuation after its context; lm-eval's contract. A question's choices are scored together."""
        if self.enable_thinking:
            raise UserError("enable_thinking=True does not go with log-likelihood tasks: use generative ones")
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
        # The last token of a continuation is scored, never read.
        room = [max(len(target) for _, target in job.payload) - 1 for job in jobs.values()]
        fitting = self._fit(list(jobs.values()), requests, room)
        responses = [Score((-float("inf"), False), skipped())] * len(requests)
        for job, context, meta in self._over_contexts(fitting, len(jobs), "loglikelihood", disable_tqdm):
            for start in range(0, len(job.payload), CHOICE_ROWS):
                rows = job.payload[start : start + CHOICE_ROWS]
                for (index, _), score in zip(rows, self._score(job, context, rows, meta), strict=True):
                    responses[index] = score
                    self.cache_hook.add_partial("loglikelihood", requests[index].args, score)
        return responses

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Perplexity of whole texts, which have no question: under `kv=full` only."""
        if self.recipe != recipe.Recipe():
            raise UserError(
                f"kv={self.recipe} does not go with rolling log-likelihood (a text without a question): use kv=full"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    # Contexts ---------------------------------------------------------------------------------------------------

    def _job(self, index: int, request: Instance, prompt: str, ids: list[int], payload: Any) -> Job:
        doc = request.doc if isinstance(request.doc, dict) else {}
        boundary = find_boundary(prompt, ids, doc.get(self.context_field), self.tok_encode)
        found = boundary is not None
        if boundary is None:
            self.totals["no_boundary"] += 1
            boundary = len(ids) - 1
        return Job(index, tuple(ids), boundary, found, payload=payload)

    def _fit(self, jobs: list[Job], requests: list[Instance], room: list[int]) -> list[Job]:
        """The jobs that will run, cut to the model's length where `overlong` says so."""
        fitting, too_long = [], []
        for job, reserved in zip(jobs, room, strict=True):
            excess = len(job.ids) + reserved - self.max_length
            if excess <= 0:
                fitting.append(job)
            elif self.overlong in ("middle", "end") and excess <= job.boundary:
                ids, boundary = cut(job.ids, job.boundary, excess, self.overlong)
                fitting.append(Job(job.index, ids, boundary, job.found, truncated=True, payload=job.payload))
            else:
                too_long.append((requests[job.index].task_name, len(job.ids) + reserved))
        if too_long and self.overlong != "skip":
            tasks = Counter(name for name, _ in too_long)
            named = ", ".join(
                f"{name} ({n}x, longest {max(t for m, t in too_long if m == name)})" for name, n in tasks.items()
            )
            raise UserError(
                f"{len(too_long)} of {len(jobs)} prompts do not fit the model's {self.max_length} tokens: {named}; "
                "choose a shorter length, or pass overlong=skip, overlong=middle or overlong=end in --model_args"
            )
        self.totals["too_long"] += len(too_long)
        return fitting

    def _over_contexts(
        self, jobs: Sequence[Job], total: int, what: str, disable_tqdm: bool
    ) -> Iterator[tuple[Job, Context, dict[str, Any]]]:
        """Each job with its compressed context and the start of its telemetry; the context is read once."""
        if self.totals["no_boundary"] and self.recipe != recipe.Recipe():
            logger.warning(
                "%d prompts have no context field %r: they run uncompressed (kept share 1.0)",
                self.totals["no_boundary"],
                self.context_field,
            )
        bar = tqdm(total=total, initial=total - len(jobs), disable=disable_tqdm or self.rank != 0, desc=what)
        for group in by_context(jobs):
            start = time.perf_counter()
            context = self._read(group[0].context, self.recipe if group[0].found else recipe.Recipe())
            prefill_s = time.perf_counter() - start - context.compress_s
            self.totals["contexts"] += 1
            for place, job in enumerate(group):
                shared = place > 0
                yield job, context, telemetry(job, context, shared=shared, prefill_s=0.0 if shared else prefill_s)
                self.totals["samples"] += 1
                bar.update()
        bar.close()

    @torch.inference_mode()
    def _read(self, ids: Sequence[int], how: recipe.Recipe) -> Context:
        """Prefill and compress a context."""
        if not ids:
            return Context.empty(self._layers, self.model.dtype, self.device)
        prefill = Prefill(self._layers, len(ids), how.queries_needed)
        step = self.prefill_chunk or len(ids)
        with self._autocast():
            for start in range(0, len(ids), step):
                chunk = torch.tensor([ids[start : start + step]], device=self.device)
                self._reader(input_ids=chunk, past_key_values=prefill, use_cache=True)
        return prefill.compress(how, consume=True)

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    # Questions --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _generate(self, job: Job, context: Context, kwargs: dict[str, Any], meta: dict[str, Any]) -> Text:
        until, new_tokens = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        cache = context.fork(len(job.question) + new_tokens, kernels=self._kernels)
        ids = torch.tensor([job.ids], device=self.device)
        start = time.perf_counter()
        out = self._model_generate(
            context=ids,
            attention_mask=torch.ones_like(ids),
            stop=until,
            max_length=len(job.ids) + new_tokens,
            past_key_values=cache,
            **kwargs,
        )
        tokens = out[0, len(job.ids) :].tolist()
        end = time.perf_counter()
        first_token = cache.first_step or end
        meta["kv"] |= {
            "question_s": first_token - start,
            "decode_s": end - first_token,
            "decode_tokens": max(0, len(tokens) - 1),
            "new_tokens": len(tokens),
            "peak_bytes": max(meta["kv"]["peak_bytes"], meta["kv"]["bytes_allocated"] + cache.tail_bytes),
        }
        return Text(self._finish(tokens, until), meta)

    def _finish(self, tokens: list[int], until: list[str]) -> str:
        """Decode and cut at stop sequences and thinking, as HFLM does."""
        end = self.think_end_token
        if isinstance(end, int) and end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(end) :]
        text = self.tok_decode(tokens)
        if isinstance(end, int):
            text = text.lstrip()
        return str(postprocess_generated_text(text, until, end if isinstance(end, str) else None))

    @torch.inference_mode()
    def _score(
        self, job: Job, context: Context, rows: Sequence[tuple[int, list[int]]], meta: dict[str, Any]
    ) -> list[Score]:
        """Log-likelihoods of several continuations of one question: the question is read once, then all in a batch."""
        longest = max(len(target) for _, target in rows)
        cache = context.fork(len(job.question) + longest, kernels=self._kernels)
        start = time.perf_counter()
        last = self._forward(cache, torch.tensor([job.question], device=self.device), keep=1)
        logits = last.expand(len(rows), 1, -1)
        if longest > 1:
            padded = torch.zeros(len(rows), longest - 1, dtype=torch.long, device=self.device)
            for row, (_, target) in enumerate(rows):
                padded[row, : len(target) - 1] = torch.tensor(target[:-1])
            cache.batch_repeat_interleave(len(rows))
            # Padding stands to the right, where no scored token can see it.
            logits = torch.cat([logits, self._forward(cache, padded, keep=0)], 1)
        scores = []
        for row, (_, target) in enumerate(rows):
            wanted = torch.tensor(target, device=self.device)
            logprobs = torch.log_softmax(logits[row, : len(target)], dim=-1, dtype=self.softmax_dtype)
            total = float(logprobs.gather(-1, wanted[:, None]).sum())
            scores.append((total, bool((logprobs.argmax(-1) == wanted).all())))
        meta["kv"] |= {
            "question_s": time.perf_counter() - start,
            "peak_bytes": max(meta["kv"]["peak_bytes"], meta["kv"]["bytes_allocated"] + cache.tail_bytes),
        }
        return [Score(score, meta) for score in scores]

    def _forward(self, cache: QuestionCache, ids: Tensor, keep: int) -> Tensor:
        """Logits [B, T or `keep`, V] of ids [B, T] that continue `cache`; `keep` = 0 gives all T."""
        with self._autocast():
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        logits: Tensor = out.logits
        return logits

    # Records ----------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What of this model changes its outputs."""
        return {
            "pretrained": self.pretrained if isinstance(self.pretrained, str) else self.config._name_or_path,
            "revision": self.revision,
            "peft": self.peft,
            "delta": self.delta,
            "kv": str(self.recipe),
            "overlong": self.overlong,
            "prefill_chunk": self.prefill_chunk,
            "attn": "triton" if self._kernels else "torch",
            "dtype": str(self.model.dtype),
            "max_length": self.max_length,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take lm-eval's `--use_cache` hook, if its file was written by this very model.

        lm-eval keys that file by prompt alone, so another model's answers would be served as ours.
        """
        super().set_cache_hook(cache_hook)
        stored = getattr(cache_hook, "dbdict", None)
        if stored is not None:
            ours, key = repr(sorted(self.identity.items(), key=str)), "lceval-identity"
            theirs = stored.get(key) if key in stored or len(stored) == 0 else "another model"
            if theirs not in (None, ours):
                raise UserError(f"the --use_cache file was written by {theirs}, not by {ours}: name another file")
            stored[key] = ours

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's record, and ours under `lcft`."""
        ours = {
            "recipe": str(self.recipe),
            "attn": self.identity["attn"],
            "expanded": self.recipe.expanded(),
            **self.totals,
        }
        return {**super().get_model_info(), "lcft": ours}


def _use_kernels(attn: str, device: torch.device) -> bool:
    """Whether decoding goes through the Triton kernels.

    Raises:
        UserError: they are asked for and cannot run on `device`.
    """
    able = decode.AVAILABLE and (device.type == "cuda" or decode.INTERPRETED)
    if attn == "triton" and not able:
        raise UserError(f"attn=triton needs triton and a CUDA device, and this is {device}: use attn=auto")
    return able and (attn == "triton" or (attn == "auto" and device.type == "cuda"))


def _unknown_argument(name: str) -> UserError:
    known = sorted({*inspect.signature(LCFT.__init__).parameters, *inspect.signature(HFLM.__init__).parameters})
    near = get_close_matches(name, known, n=1)
    hint = (
        f"did you mean {near[0]!r}?" if near else "lcft takes every argument of hf, and kv=, overlong=, prefill_chunk="
    )
    return UserError(f"unknown model argument {name!r}: {hint}")


def _check_supported(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(f"{config.model_type} has {', '.join(sorted(kinds))} layers; lcft serves full attention only")
