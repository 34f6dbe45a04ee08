"""A local Hugging Face model as the judge.

A JSON reply is not generated but chosen: for each field in turn, the label with the highest log-likelihood after the
prompt and the previous fields. So a verdict is always well-formed, even from a small model. The reply includes the
log-likelihoods, which reveal a bias towards one label. Prose (a rating) is generated greedily.
"""

from __future__ import annotations

import hashlib
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from lceval import packaged
from lceval.core.errors import UserError
from lceval.judge.protocol import JudgeName, RefusedError
from lceval.judge.replies import Reply
from lceval.judge.rubrics import Case, Label, Prompt, Rubric

SCORES = "log_likelihoods"
"""Key of the log-likelihoods in a chosen reply, by field and label."""


def loaded(kind: Any, spec: JudgeName, **options: Any) -> Any:
    """A part of the judge, from `kind.from_pretrained`.

    Raises:
        UserError: the judge cannot be loaded.
    """
    pinned = {"revision": spec.revision} if spec.revision else {}
    try:
        return kind.from_pretrained(packaged.resolve(spec.model), trust_remote_code=False, **pinned, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load the judge {spec.model!r}: {reason}") from None


class LocalJudge:
    """A local Hugging Face model."""

    parallel = False
    priced = False

    def __init__(self, spec: JudgeName, *, max_tokens: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.name, self._max_tokens = str(spec), max_tokens
        self._tokenizer = loaded(AutoTokenizer, spec)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = loaded(AutoModelForCausalLM, spec, dtype="auto", use_safetensors=True).to(device).eval()
        commit = getattr(self._model.config, "_commit_hash", None)
        self.revision = spec.revision or commit or _digest(Path(packaged.resolve(spec.model)))
        self._longest = int(getattr(self._model.config, "max_position_embeddings", 0)) or 1 << 30

    @property
    def label(self) -> str:
        return self.name

    def close(self) -> None:
        """Free the weights."""
        del self._model

    def ask(self, rubric: Rubric, case: Case, prompt: Prompt) -> Reply:
        """A chosen JSON object, or generated prose."""
        import torch

        ids = self._encode(prompt)
        with torch.inference_mode():
            if rubric.reply == "json":
                chosen, scores = self._choose(rubric, ids)
                return Reply(json.dumps({**chosen, SCORES: scores}), len(ids), 0, self.revision)
            return self._generate(rubric, ids)

    def _encode(self, prompt: Prompt) -> list[int]:
        from jinja2 import TemplateError

        text = f"{prompt.system}\n\n{prompt.user}"
        if self._tokenizer.chat_template is None:
            ids: list[int] = self._tokenizer.encode(f"{text}\n")
            return ids
        try:
            return self._tokens(self._template(prompt.messages))
        except TemplateError:  # some templates do not support a system message
            return self._tokens(self._template([{"role": "user", "content": text}]))

    def _choose(self, rubric: Rubric, ids: list[int]) -> tuple[dict[str, Label], dict[str, dict[str, float]]]:
        """The chosen labels and the log-likelihoods of all labels; the prompt is prefilled once."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        chosen: dict[str, Label] = {}
        log_likelihoods: dict[str, dict[str, float]] = {}
        prefix, cached = "{", [*ids]
        for place, (field, labels) in enumerate(rubric.labels.items()):
            prefix += ", " * bool(place) + json.dumps(field) + ":"
            continuations = {label: self._tokens(f"{prefix} {json.dumps(label)}") for label in labels}
            # A token may span the prefix and the label, so the common tokens of all labels are prefilled.
            common = _common_length(*continuations.values())
            shared = ids + next(iter(continuations.values()))[:common]
            longest = len(ids) + max(map(len, continuations.values()))
            if longest > self._longest:
                raise RefusedError(f"the prompt has {longest} tokens; the judge's limit is {self._longest}")
            # All but the last shared token, whose logits give the first token of every label.
            _trim(cache, min(_common_length(cached, shared), len(shared) - 1))
            fresh = shared[cache.get_seq_length() : -1]
            if fresh:
                inputs = torch.tensor([fresh], device=self._model.device)
                self._model(input_ids=inputs, cache=cache, use_cache=True, logits_to_keep=1)
            cached = shared[:-1]
            scores = {label: self._score(cache, shared[-1], tokens[common:]) for label, tokens in continuations.items()}
            chosen[field] = max(scores, key=scores.__getitem__)
            log_likelihoods[field] = {str(label): round(score, 4) for label, score in scores.items()}
            prefix += f" {json.dumps(chosen[field])}"
        return chosen, log_likelihoods

    def _score(self, cache: Any, last: int, tail: list[int]) -> float:
        """The log-likelihood of `tail` after the cached tokens and `last`; the cache is unchanged afterwards."""
        import torch

        before = cache.get_seq_length()
        inputs = torch.tensor([[last, *tail[:-1]]], device=self._model.device)
        logits = self._model(input_ids=inputs, cache=cache, use_cache=True).logits[0].float().log_softmax(-1)
        _trim(cache, before)
        return float(logits[range(len(tail)), tail].sum())

    def _template(self, messages: list[dict[str, str]]) -> Any:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _generate(self, rubric: Rubric, ids: list[int]) -> Reply:
        import torch

        limit = self._max_tokens or rubric.max_tokens
        if len(ids) + limit > self._longest:
            raise RefusedError(
                f"the prompt has {len(ids)} tokens and the reply up to {limit}; the judge's limit is {self._longest}"
            )
        inputs = torch.tensor([ids], device=self._model.device)
        generated = self._model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=limit, do_sample=False
        )[0, len(ids) :]
        text = str(self._tokenizer.decode(generated, skip_special_tokens=True))
        return Reply(text, len(ids), len(generated), self.revision, cut=len(generated) >= limit)


def _common_length(*sequences: list[int]) -> int:
    """Length of the common prefix of all sequences."""
    return sum(1 for _ in takewhile(lambda tokens: len({*tokens}) == 1, zip(*sequences, strict=False)))


def _trim(cache: Any, length: int) -> None:
    """Crop a cache to its first `length` tokens."""
    if (surplus := cache.get_seq_length() - length) > 0:
        cache.crop(-surplus)


def _digest(folder: Path) -> str:
    """Digest of a folder's weights and tokenizer, 16 characters; "" without a folder."""
    digest = hashlib.sha256()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]) if folder.is_dir() else []
    for file in files:
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16] if files else ""
