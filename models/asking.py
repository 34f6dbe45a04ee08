"""Contexts from Python: compress a text once, ask any number of questions about it, save it, open it again.

    model = lceval.load("smollm2-135m", kv="snapkv:0.25")
    context = model.compress(text)
    answer = context.ask(question)

The prompt of a question is the chat template around the text and the question as one user message. Everything up to
the end of the text is compressed, before any question is known; the question, the rest of the template and
`answer_prefix` follow uncompressed. A model without a template gets text and question only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lceval import packaged
from lceval.core.answers import Text
from lceval.core.digests import digest_of
from lceval.core.errors import InfrastructureError, UserError
from lceval.models import chunkwise, context_file, recipe
from lceval.models.compressed import CompressedContext
from lceval.models.faults import OUT_OF_MEMORY, is_out_of_memory
from lceval.models.lcft import LCFT
from lceval.models.prefix import GenerateJob
from lceval.models.scheduler import Question
from lceval.models.telemetry import telemetry

# Model arguments of lcft without a meaning here.
REFUSED = {
    "query_aware": "compresses a context for one question, and here a context is compressed before its questions",
    "overlong": "a text is never truncated",
    "diagnose": "measures the samples of a task",
    "context_from": "is about the prompts of a task",
    "prefix_cache_gib": "a context stays in memory as long as you keep it",
    "batch_size": "pass it to ask_many",
}
# Model arguments that name files, and those that do not determine what a context stores: where it is computed, the
# limits of its use, and chunks and kernels, which only round.
FILES = ("pretrained", "peft", "delta", "tokenizer")
ELSEWHERE = {
    *("device", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder"),
    *("revision", "allow_pickle", "max_length", "prefill_chunk", "attn", *REFUSED),
}
_MARK = "[[lceval: text and question]]"


class LoadedModel:
    """A causal LM under one KV recipe; `lceval.load` loads it.

    Args:
        pretrained: model name, folder or loaded model, as for `lcft`.
        kv: KV recipe.
        arguments: further model arguments of `lcft`, such as `peft` and `dtype`.

    Raises:
        UserError: a bad argument or recipe, or a model that cannot be loaded (see `LCFT`).
    """

    def __init__(self, pretrained: str | PreTrainedModel, kv: str = recipe.FULL, **arguments: Any) -> None:
        for name, reason in REFUSED.items():
            if arguments.get(name, False) is not False:
                raise UserError(f"bad argument {name}={arguments[name]!r} of load: {reason}; leave it out")
        self.lcft = LCFT(pretrained, kv=kv, **arguments)
        self._arguments = {"pretrained": pretrained, **arguments}
        self._before, self._after = self._template()

    def compress(self, text: str) -> CompressedText:
        """Prefill a text and compress it.

        Raises:
            UserError: a text that is longer than the model's window.
            InfrastructureError: the memory does not suffice.
        """
        if not isinstance(text, str):
            raise UserError(f"compress requires a text, got {type(text).__name__}")
        return self.compress_tokens(self.lcft.tok_encode(self._before + text))

    def compress_tokens(self, ids: Iterable[int]) -> CompressedText:
        """As `compress`, of the tokens of the template's beginning and of the text."""
        ids, window, engine = tuple(ids), self.lcft.max_length, self.lcft.engine
        if len(ids) >= window:
            raise UserError(
                f"the text has {len(ids)} tokens with its template, and the model's window is {window}, question and "
                "answer included: shorten it"
            )
        if not ids:
            return CompressedText(self, engine.empty_context(), ids)
        try:
            kv = self.lcft.recipe
            if kv.reads_in_chunks:
                context, _ = chunkwise.read(engine, ids, kv)
            else:
                context = engine.prefill(ids, kv.stats_spec).compress(kv, consume=True)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise InfrastructureError(f"{OUT_OF_MEMORY}: {len(ids)} tokens do not fit; shorten the text") from None
        return CompressedText(self, context, ids)

    def open(self, file: str | Path) -> CompressedText:
        """A context that `CompressedText.save` wrote; it answers as the saved one.

        Raises:
            UserError: no such file, one that is damaged or no saved context, or one of another model, adapter, dtype
                or recipe.
        """
        context, ids = context_file.read(
            Path(file), self.settings, self.lcft.recipe.evictor, self.lcft.engine.layer_devices
        )
        return CompressedText(self, context, ids)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What determines the bytes of a compressed context; files have the digest of their content, or their commit.

        Raises:
            UserError: a model or tokenizer that was passed as an object, so that no file identifies it.
        """
        # Those of the methods are in output_settings where the recipe uses them.
        arguments = {key: value for key, value in self._arguments.items() if key not in ("scorer", "heads")}
        own = {**arguments, **self.lcft.output_settings}
        settings = {key: value for key, value in own.items() if key not in ELSEWHERE and key not in FILES}
        for key in FILES:
            if (value := self._arguments.get(key)) is None:
                continue
            digest = digest_of(packaged.resolve(value), str(self.lcft.revision)) if isinstance(value, str) else None
            if digest is None:
                raise UserError(f"{key} cannot be identified: contexts are saved and opened by models loaded by name")
            settings[key] = {"name": Path(value).name if Path(value).exists() else value, "digest": digest}
        if self.lcft.scorer is not None:
            settings["scorer"] = {"name": str(self.lcft.scorer), "digest": self.lcft.scorer.digest}
        return {key: value if isinstance(value, dict | bool) else str(value) for key, value in settings.items()}

    def _template(self) -> tuple[str, str]:
        """The chat template before and after the user's message; empty without a template."""
        if self.lcft.tokenizer.chat_template is None:
            return "", ""
        parts: list[str] = self.lcft.apply_chat_template([{"role": "user", "content": _MARK}]).split(_MARK)
        if len(parts) != 2:
            raise UserError("the model's chat template does not contain the user's message exactly once")
        return parts[0], parts[1]

    def job(
        self, index: int, context: tuple[int, ...], question: str, answer_prefix: str, **gen_kwargs: Any
    ) -> GenerateJob:
        """The prompt of a question about a context.

        Raises:
            UserError: it is empty, or does not fit the model's window.
        """
        text = question + self._after + answer_prefix
        ids = (*context, *self.lcft.tok_encode(text, add_special_tokens=False))
        job = self.lcft.generate_job(gen_kwargs, index=index, ids=ids, boundary=len(context), has_context=True)
        if not job.question:
            raise UserError("the question is empty")
        if (tokens := job.boundary + job.room) > self.lcft.max_length:
            raise UserError(
                f"context, question and {job.max_new_tokens} new tokens are {tokens} tokens, and the model's window is "
                f"{self.lcft.max_length}: shorten the question, or reduce max_new_tokens"
            )
        return job


@dataclass(frozen=True, eq=False)
class CompressedText:
    """A text in the compressed KV cache of a model. Immutable: no question changes what the next one sees.

    Attributes:
        model: the model that compressed it.
        cache: the compressed cache.
        ids: its tokens, with those of the chat template before the text.
    """

    model: LoadedModel
    cache: CompressedContext
    ids: tuple[int, ...]

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 256,
        answer_prefix: str = "",
        until: Iterable[str] = (),
        temperature: float = 0.0,
    ) -> Text:
        """The answer to a question: a str with telemetry in `meta`.

        Args:
            question: follows the text as it is, without a space or a line break between them.
            max_new_tokens: maximum tokens of the answer.
            answer_prefix: beginning of the answer, which the model continues; not part of what is returned.
            until: texts before which the answer ends.
            temperature: 0 is greedy; above, tokens are sampled.

        Raises:
            UserError: a bad argument, or a question that does not fit the model's window.
            InfrastructureError: no answer, because of the memory or of logits that are NaN or infinite.
        """
        return self.ask_many(
            [question],
            max_new_tokens=max_new_tokens,
            answer_prefix=answer_prefix,
            until=until,
            temperature=temperature,
        )[0]

    def ask_many(
        self,
        questions: Iterable[str],
        *,
        max_new_tokens: int = 256,
        answer_prefix: str = "",
        until: Iterable[str] = (),
        temperature: float = 0.0,
        batch_size: int = 8,
    ) -> list[Text]:
        """The answers to independent questions, in batches of `batch_size`; else as `ask`."""
        if isinstance(questions, str):
            raise UserError("ask_many requires a list of questions: use ask for one")
        for name, number in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
            if not isinstance(number, int) or number < 1:
                raise UserError(f"bad {name}={number!r}: a number, at least 1")
        if temperature < 0:
            raise UserError(f"bad temperature={temperature!r}: 0, or above to sample")
        gen_kwargs: dict[str, Any] = {"max_gen_toks": max_new_tokens}
        gen_kwargs["until"] = [until] if isinstance(until, str) else [*until]
        if temperature:
            gen_kwargs |= {"do_sample": True, "temperature": temperature}
        jobs = [
            self.model.job(index, self.ids, question, answer_prefix, **gen_kwargs)
            for index, question in enumerate(questions)
        ]
        texts = self.model.lcft.generate(
            (Question(job, self.cache, telemetry(job, self.cache, shared=True, prefill_s=0.0), None) for job in jobs),
            batch_size,
        )
        for text in texts:
            if error := text.meta["kv"].get("error"):
                raise InfrastructureError(f"no answer: {error}")
        return texts

    def save(self, file: str | Path) -> None:
        """Write it to a file (safetensors), atomically; `LoadedModel.open` opens it.

        Raises:
            UserError: a file that cannot be written, or a model that no file identifies.
            InfrastructureError: the disk is full or fails.
        """
        context_file.write(Path(file), self.cache, self.ids, self.model.settings)

    @property
    def kept_share(self) -> float:
        """`kv_bytes` as a share of the bytes without compression."""
        return self.cache.kept_share

    @property
    def kv_bytes(self) -> int:
        """Bytes of the compressed cache, with positions, scales and index."""
        return self.cache.kept_bytes

    def __repr__(self) -> str:
        size = f"{100 * self.kept_share:.1f}% of the KV cache kept, {self.kv_bytes / 1e6:.1f} MB"
        return f"<context of {len(self.ids)} tokens under {self.model.lcft.recipe}: {size}>"
