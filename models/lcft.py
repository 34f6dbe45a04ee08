"""The lm-eval model `lcft`: a Hugging Face causal LM that answers from a compressed KV cache.

Requests are grouped by context. Each context is prefilled and compressed once; every question continues from a
fork. With `kv=full` the results are those of `--model hf`.
"""

from __future__ import annotations

import atexit
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache, partial, reduce
from operator import or_
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm
from transformers import PreTrainedModel

from lceval import packaged
from lceval.core import interrupt
from lceval.core.answers import Score, Text
from lceval.core.errors import UserError
from lceval.models import adapter, attention, boundary, recipe, retrieval_heads, selfcheck, weights
from lceval.models import scorer as scorers
from lceval.models.answering import A, Answer, AnsweringLM
from lceval.models.arguments import check_arguments, check_mode
from lceval.models.dealing import Processes
from lceval.models.diagnosis import Diagnosis
from lceval.models.engine import Engine
from lceval.models.policies import StatsSpec
from lceval.models.policies.duo import HeadPattern
from lceval.models.prefix import Choice, GenerateJob, J, ScoreJob, fit
from lceval.models.reconstruction import Repetition
from lceval.models.scheduler import ContextScheduler, Question
from lceval.models.scorer import Scorer
from lceval.models.telemetry import failed

# lm-eval shows what is logged under its own name.
logger = logging.getLogger("lm_eval.models.lcft")


class LCFT(AnsweringLM):
    """HFLM over a compressed KV cache.

    Args:
        pretrained: model name, folder or loaded model, as for HFLM; `smollm2-135m` is the packaged model.
        kv: KV recipe (`lceval.models.recipe`).
        query_aware: whether a question is processed before its context is compressed, so that its tokens join the
            eviction scores (query-aware). By default a context is compressed first (query-agnostic).
        budget: under `query_aware`, whether question tokens come on top of the budget (`context`) or are inside it
            (`total`, as in kvpress and most papers).
        scorer: folder or hub name of the scorer of learned evictors (kvzap); by default the model's own, if there is
            one.
        heads: for duo, a folder with an attention pattern of DuoAttention's authors (`full_attention_heads.tsv`,
            `config.json`), or a text, or folder of texts (`*.txt`), on which the retrieval heads are found.
        overlong: handling of a prompt that does not fit the model: `error` stops before the first prefill, `middle`
            and `end` truncate the context there, `skip` records the sample as an error.
        prefill_chunk: tokens per forward pass during prefill; 0 prefills a context in one pass; `auto` is 8192 on CUDA,
            where one pass of a 7B model over 128k tokens would need 42 GB, and 0 elsewhere.
        attn: decoding backend: `triton`, `torch`, or `auto` (`triton` on CUDA, else `torch`).
        diagnose: extra measurements: `gold` adds gold_kept and gold_nll to every sample, `attention` adds NDCG@10 of
            the documents ranked by the question's attention, `none` adds nothing.
        prefix_cache_gib: capacity in GiB of the LRU cache of compressed contexts.
        merge: merge the adapter into the weights (recommended): faster, but rounded to their dtype. An unmerged adapter
            runs in the model's dtype.
        context_from: where the context of a prompt ends: the name of a field of the task's rows with the context, a
            regular expression whose last match is where the question begins, `auto` (known for lm-eval's long-context
            tasks, else the field `context`), or `none` to compress nothing.
        allow_pickle: read weights that are not in safetensors; they can run code.
        kwargs: all arguments of HFLM, including `peft`.

    Raises:
        UserError: a bad recipe or argument (before anything is loaded), weights that are a pickle, a model, adapter or
            tokenizer that cannot be loaded, or an unsupported model.
        InfrastructureError: a model that does not fit into the memory.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        kv: str = recipe.FULL,
        query_aware: bool = False,
        budget: str = "context",
        scorer: str | None = None,
        heads: str | None = None,
        overlong: str = "error",
        prefill_chunk: int | str = "auto",
        attn: str = "auto",
        diagnose: str = "none",
        prefix_cache_gib: float = 1.0,
        merge: bool = False,
        context_from: str = "auto",
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> None:
        pretrained = packaged.resolve(pretrained) if isinstance(pretrained, str) else pretrained
        own: dict[str, Any] = {"overlong": overlong, "attn": attn, "diagnose": diagnose, "query_aware": query_aware}
        own |= {"budget": budget, "scorer": scorer, "heads": heads, "context_from": context_from}
        own |= {"prefill_chunk": prefill_chunk, "prefix_cache_gib": prefix_cache_gib, "allow_pickle": allow_pickle}
        check_arguments({"pretrained": pretrained, **own, **kwargs})
        self.query_aware = query_aware
        self.budget = budget
        self._heads = heads or ""
        self.totals: Counter[str] = Counter()
        self.recipe = self._checked(kv)
        self.overlong = overlong
        self.context_end = boundary.ContextEnd(context_from)
        with nullcontext() if allow_pickle else weights.only_safetensors(pretrained, kwargs):
            super().__init__(pretrained, **kwargs)
        if self.peft and any(config.is_prompt_learning for config in self.model.peft_config.values()):
            raise UserError(f"peft={self.peft}: prompt-learning adapters add tokens to the cache: use LoRA instead")
        if merge and not self.peft:
            raise UserError("bad model argument merge=True: no adapter to merge; pass one as peft=")
        self.merge = merge
        if merge:
            self._model = self.model.merge_and_unload()
        elif self.peft:
            adapter.cast(self.model)
        self.base = base = self.model if merge or not self.peft else self.model.get_base_model()
        self.prefill_chunk = attention.prefill_chunk(prefill_chunk, self.device)
        self.engine = Engine(
            self.model,
            base,
            chunk=self.prefill_chunk,
            kernels=attention.use_kernels(attn, self.device),
            autocast=self._autocast,
            repetition=Repetition.of(self.tokenizer, partial(self.tok_encode, add_special_tokens=False)),
        )
        self._scorers: dict[str, Scorer] = {}
        self._warm: list[recipe.Recipe] = []
        self.scorer: Scorer | None = None
        self._default_scorer = scorer or ""
        self.diagnosis = Diagnosis(diagnose, self.tokenizer, self.tok_encode)
        self._pad = self.tokenizer.pad_token_id
        # Questions on one context follow each other, and 140k tokens take .15 s.
        self._encode_context = lru_cache(maxsize=1)(self.tok_encode)
        self.scheduler = ContextScheduler(
            self.engine,
            self.diagnosis,
            query_aware=query_aware,
            total_budget=budget == "total",
            context_cache_bytes=int(prefix_cache_gib * 2**30),
            totals=self.totals,
        )
        if hasattr(self, "accelerator"):
            # HFLM deals out documents only where it sees several GPUs, and by the number of a process on its machine.
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            # A group that is still there when Python ends sometimes aborts a process that has done its work.
            atexit.register(self.accelerator.end_training)
        self.processes = Processes(self.rank, self.world_size)
        attention.install(base)
        if self.device.type != "meta":  # without weights, as in a dry run of training, there are no logits
            selfcheck.verify(self.engine, base)
            logger.info("attention: %s", self.attention)
        self.use(self.recipe)

    def use(self, kv: str | recipe.Recipe, totals: Mapping[str, int] | None = None, scorer: str = "") -> None:
        """Answer under another KV recipe from now on; the counts of `totals` restart, or continue those given.

        Args:
            scorer: folder or hub name, if not the model argument `scorer`.

        Raises:
            UserError: a bad recipe, one that the model or query-aware compression excludes, or no scorer for it.
        """
        self.recipe, self.scorer = self._bound(kv, scorer)
        self.totals.clear()
        self.totals.update(totals or {})
        self._pooled = Counter(self.totals)
        if self.device.type == "cuda" and self.recipe not in self._warm:
            self._warm.append(self.recipe)
            selfcheck.warm_up(self.engine, self.base, self.recipe)

    @contextmanager
    def sharing_prefills(
        self, recipes: Iterable[str | recipe.Recipe], scorers: Collection[str] = ("",)
    ) -> Iterator[None]:
        """Within the block, a context that these recipes answer one after another is prefilled once for all.

        Args:
            scorers: those of the recipes that require one, as for `use`.
        """
        bound = [self._bound(kv, scorer)[0] for kv in recipes for scorer in scorers]
        specs = (recipe.stats_spec for recipe in bound if not recipe.reads_in_chunks)
        self.scheduler.share(reduce(or_, specs, StatsSpec()))
        try:
            yield
        finally:
            self.scheduler.share(None)

    def _checked(self, kv: str | recipe.Recipe) -> recipe.Recipe:
        parsed = recipe.parse(kv) if isinstance(kv, str) else kv
        check_mode(parsed, self.query_aware, self.budget, self._heads)
        return parsed

    def _bound(self, kv: str | recipe.Recipe, scorer: str) -> tuple[recipe.Recipe, Scorer | None]:
        """A recipe with its scorer, which is loaded if it is not already."""
        parsed = self._checked(kv)
        self.engine.check(parsed)
        if parsed.needs_scorer:
            parsed = parsed.bound(self._scorer_of(str(parsed), scorer).digest)
        if parsed.needs_pattern:
            parsed = parsed.bound(pattern=self.head_pattern)
        return parsed, next((self.engine.scorers[digest] for digest in parsed.stats_spec.scorers), None)

    @cached_property
    def head_pattern(self) -> HeadPattern:
        """The pattern of retrieval heads that the argument `heads` names."""
        return retrieval_heads.pattern_of(self.engine, self._heads, self.tok_encode)

    def _scorer_of(self, kv: str, name: str) -> Scorer:
        """The scorer of that name, or the default one, for a recipe that requires one."""
        pretrained = self.pretrained if isinstance(self.pretrained, str) else self.config._name_or_path
        resolved = name or self._default_scorer or scorers.default(pretrained)
        if resolved is None:
            raise UserError(
                f"kv={kv} requires a scorer of {pretrained}: train one with `lceval train scorer` and pass it as "
                f"scorer=FOLDER; published ones: {', '.join(scorers.PUBLISHED.values())}"
            )
        if resolved not in self._scorers:
            loaded = scorers.load(resolved)
            self.engine.add_scorer(loaded)
            self._scorers[resolved] = loaded
        return self._scorers[resolved]

    @property
    def attention(self) -> str:
        """By what the model attends."""
        q = torch.empty(1, 1, 1, self.engine.key_dim, device=self.device, dtype=self.base.dtype)
        return attention.describe(self.engine.geometry, q, kernels=self.engine.kernels)

    @property
    def prefill_s(self) -> float:
        """Total seconds of all prefills of this model."""
        return self.scheduler.prefill_s

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Text]:
        """Generate from each prompt, as lm-eval specifies, with up to `batch_size` questions per batch.

        `max_gen_toks=0` generates nothing and returns telemetry and diagnosis only.
        """
        jobs = []
        for index, request in enumerate(requests):
            prompt, gen_kwargs = request.args
            split = self._split(index, request, self.tok_batch_encode([prompt])[0][0].tolist())
            jobs.append(self.generate_job(gen_kwargs, **split))
        return self._answers("generate_until", self._generate, jobs, requests, disable_tqdm)

    def generate_job(self, gen_kwargs: Mapping[str, Any], **split: Any) -> GenerateJob:
        """A prompt to continue under lm-eval's generation arguments. split: the fields that every job has."""
        sampling = dict(normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks))
        sampling.pop("max_length", None)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = tuple(handle_stop_sequences(sampling.pop("until", None), eos=eos))
        new_tokens = sampling.pop("max_gen_toks")
        if self.recipe.evicts_while_writing and sampling.get("num_beams", 1) != 1:
            raise UserError(f"kv={self.recipe} does not support beam search: remove num_beams from --gen_kwargs")
        return GenerateJob(**split, until=until, max_new_tokens=new_tokens, sampling=sampling)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Score each continuation, as lm-eval specifies. The choices of a question are scored together."""
        if self.recipe.evicts_while_writing:
            raise UserError(
                f"kv={self.recipe} evicts what is written, and a log-likelihood task writes nothing: use a generative "
                "task, or another recipe"
            )
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
        return self._answers("loglikelihood", self._score, jobs, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Perplexity of whole texts, which have no question; requires `kv=full`."""
        if self.recipe != recipe.Recipe():
            raise UserError(
                f"kv={self.recipe} does not support rolling log-likelihood (texts without a question): use kv=full"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def _split(self, index: int, request: Instance, ids: Sequence[int]) -> dict[str, Any]:
        """The fields that every job has."""
        task, prompt = str(request.task_name), request.args[0]
        doc = request.doc if isinstance(request.doc, dict) else {}
        end = self.context_end.find(task, prompt, doc)
        # What evicts only while writing needs no end of the context: the prompt is the context.
        writing = self.recipe.evicts_while_writing
        if end is None and not writing and self.context_end.is_expected(task, prompt, doc):
            if self.recipe != recipe.Recipe():
                raise self.context_end.not_found(task, doc, self.recipe)
            self.totals["no_boundary"] += 1
        return {
            "index": index,
            "ids": tuple(ids),
            "boundary": len(ids) - 1 if end is None else boundary.boundary_of(prompt[:end], ids, self._encode_context),
            "has_context": end is not None or writing,
            "prompt": prompt,
            "doc": doc,
        }

    def _answers(
        self, method: str, answer: Answer[J, A], jobs: list[J], requests: list[Instance], disable_tqdm: bool
    ) -> list[A]:
        """One response per request; a sample that cannot be answered is an error with its reason, not dropped."""
        fitting = fit(jobs, self.max_length, self.overlong, [str(request.task_name) for request in requests])
        self.totals["too_long"] += len(jobs) - len(fitting)
        answered = {job.index for job in fitting}
        too_long: dict[int, A] = {}
        for job in jobs:
            if job.index not in answered:
                too_long |= job.unanswered(failed("overlong"))
        responses: dict[int, A] = {}

        def on_failure(job: J, reason: str) -> None:
            self.totals["failed"] += 1
            responses.update(job.unanswered(failed(reason)))

        own = self.processes.dealt(fitting)
        for batch in self._batches(own, len(own) + len(too_long), method, disable_tqdm, on_failure):
            answers = dict(self._in_memory(batch, answer))
            responses |= answers
            if self.processes.count == 1:
                self._keep(method, requests, answers)
        if self.processes.count > 1:
            responses = self.processes.returned(responses)
            self._keep(method, requests, responses)
            # Every process reports the counts of all.
            others = self.processes.summed(self.totals - self._pooled) - (self.totals - self._pooled)
            self.totals.update(others)
            self._pooled = Counter(self.totals)
        responses |= too_long
        return [responses[index] for index in range(len(requests))]

    def _keep(self, method: str, requests: Sequence[Instance], answers: Mapping[int, Any]) -> None:
        """Write answers to lm-eval's `--use_cache` file."""
        for index, response in answers.items():
            self.cache_hook.add_partial(method, requests[index].args, response)

    def _batches(
        self, jobs: Sequence[J], total: int, what: str, disable_tqdm: bool, on_failure: Callable[[J, str], None]
    ) -> Iterator[list[Question[J]]]:
        """Jobs with their compressed contexts, in batches. Between batches the run can be stopped."""
        interrupt.check()
        disable = disable_tqdm or self.rank != 0
        with tqdm(total=total, initial=total - len(jobs), disable=disable, desc=what) as bar:
            for batch in self.scheduler.batches(jobs, self.recipe, self.batch_rows, on_failure):
                answered = len(batch)
                yield batch
                bar.update(answered)
                interrupt.check()

    @property
    def output_settings(self) -> dict[str, Any]:
        """The settings of this model that change its outputs: the key of a `--use_cache` file.

        A run folder is identified by its whole configuration instead (lceval.records.identity).
        """
        return {
            "pretrained": self.pretrained if isinstance(self.pretrained, str) else self.config._name_or_path,
            "revision": self.revision,
            "peft": self.peft,
            "delta": self.delta,
            **({"merge": True} if self.merge else {}),
            "kv": str(self.recipe),
            **({"scorer": str(self.scorer)} if self.scorer else {}),
            **({"heads": retrieval_heads.digest(pattern)} if (pattern := self.recipe.pattern) else {}),
            "query_aware": self.query_aware,
            **({"budget": self.budget} if self.budget != "context" else {}),
            "overlong": self.overlong,
            "context_from": self.context_end.context_from,
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
            identity, key = repr(sorted(self.output_settings.items(), key=str)), "lceval-identity"
            writer = stored.get(key) if key in stored or len(stored) == 0 else "another model"
            if writer not in (None, identity):
                raise UserError(f"the --use_cache file was written by {writer}, not by {identity}: use another file")
            stored[key] = identity

    def get_model_info(self) -> dict[str, Any]:
        """HFLM's record, with recipe, backend and totals under `lcft`."""
        lcft = {
            "recipe": str(self.recipe),
            **({"scorer": str(self.scorer)} if self.scorer else {}),
            "attn": self.output_settings["attn"],
            "attention": self.attention,
            "prefill_chunk": self.prefill_chunk,
            "expanded": self.recipe.expanded(),
            **self.totals,
        }
        return {**super().get_model_info(), "lcft": lcft}
