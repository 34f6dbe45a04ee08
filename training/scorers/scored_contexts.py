"""The contexts of a scorer: those to train on and those held out, and what a model pays to and reads at their slots.

The tokens before the user message (the template's header, with a system prompt) and the sinks, the first 4 tokens, are
left out: kvzip keeps them whatever their score.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lceval.core.errors import UserError
from lceval.models.policies import StatsSpec
from lceval.models.policies.base import SINKS
from lceval.models.scorer import attention_inputs
from lceval.tasks import catalogue
from lceval.tasks.rows import by_context
from lceval.training import data, texts
from lceval.training.encode import Encoder
from lceval.training.packing import QAPair
from lceval.training.scorers.spec import ScorerRecipe


@dataclass(frozen=True)
class ScoredContext:
    """A context as token ids.

    Attributes:
        first: the first token that counts.
        pairs: its questions with gold answers; none for a text.
        documents: datasets and ids of its documents; none for a text.
    """

    ids: tuple[int, ...]
    first: int
    pairs: tuple[QAPair, ...] = ()
    documents: frozenset[tuple[str, str]] = frozenset()

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class ContextSet:
    """The contexts to train on, and those held out."""

    fitted: tuple[ScoredContext, ...]
    held_out: tuple[ScoredContext, ...]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(context.tokens for context in self.fitted)

    @property
    def digest(self) -> str:
        """Hash of the token ids of contexts, questions and answers."""
        digest = hashlib.sha256()
        for context in (*self.fitted, *self.held_out):
            pairs = [(pair.question, pair.answer) for pair in context.pairs]
            digest.update(repr((context.first, context.ids, pairs)).encode())
        return digest.hexdigest()[:16]


def build(recipe: ScorerRecipe, lm: Any) -> ContextSet:
    """The contexts of a recipe in the order of its seed; the first are held out.

    Raises:
        UserError: data that is unknown, missing or of the side for evaluation, or too few contexts.
    """
    chat = recipe.model.applies_template(lm.tokenizer)
    header = message_header(lm, chat_template=chat)
    contexts = [] if recipe.data is None else _of_rows(recipe, lm, Encoder(lm, chat_template=chat))
    if recipe.texts is not None:
        pieces = texts.sequences(recipe.texts, partial(lm.tok_encode, add_special_tokens=False))
        contexts += [ScoredContext((*header, *piece), max(SINKS, len(header))) for piece in pieces]
    contexts = [context for context in contexts if context.tokens > 0]
    random.Random(f"scorer {recipe.seed}").shuffle(contexts)
    held_out, others = contexts[: recipe.held_out], contexts[recipe.held_out :]
    reported = frozenset[tuple[str, str]]().union(*(context.documents for context in held_out))
    fitted = [context for context in others if not context.documents & reported][: recipe.contexts]
    if not fitted:
        raise UserError(
            f"{len(contexts)} contexts, of which none is left to train on without documents of the {recipe.held_out} "
            "held out: reduce held_out, or add data"
        )
    return ContextSet(tuple(fitted), tuple(held_out))


def message_header(lm: Any, *, chat_template: bool) -> list[int]:
    """The tokens of a prompt before the user message."""
    text, message = "", "[message]"
    if chat_template:
        text = lm.apply_chat_template([{"role": "user", "content": message}]).partition(message)[0]
    return list(lm.tok_encode(text))


def _of_rows(recipe: ScorerRecipe, lm: Any, encoder: Encoder) -> list[ScoredContext]:
    assert recipe.data is not None
    spec = recipe.data.model_copy(update={"tokenizer": recipe.model.pretrained})
    known = catalogue.datasets()
    for name in spec.datasets:
        if name in known and known[name].splits and spec.split != "train":
            raise UserError(f"data.split={spec.split}: {name} has a side for evaluation: use split=train")
    contexts = []
    for rows in by_context(data.rows(spec)[0]).values():
        documents = frozenset((rows[0]["dataset"], document["pid"]) for document in rows[0]["docs"])
        for packed in encoder.encode(rows):
            first = max(SINKS, lm.engine.protected_tokens(packed.context))
            contexts.append(ScoredContext(packed.context, first, packed.pairs, documents))
    return contexts


@dataclass(frozen=True)
class ScoredSlots:
    """What the slots of a context have, by full-attention layer: inputs [T, d] and targets [T, Hkv] float32, of the
    tokens that count.
    """

    inputs: list[Tensor]
    targets: list[Tensor]


def observe(lm: Any, context: ScoredContext, recipe: ScorerRecipe) -> ScoredSlots:
    """Prefill a context and measure the targets of its slots.

    Args:
        lm: the model, as lcft.
    """
    layers = lm.engine.geometry.full
    received: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def receive(layer: int, hidden: Tensor) -> None:
        # The prefill comes first; the inputs of a reconstruction are not those of the context.
        if sum(part.shape[1] for part in received[layer]) < len(context.ids):
            received[layer].append(hidden)

    reconstructed = recipe.target != "attention"
    spec = StatsSpec(reconstruction=reconstructed, reconstruction_plus=recipe.target == "kvzip+")
    with attention_inputs(lm.base, layers, receive):
        prefill = lm.engine.prefill(context.ids, spec)
    if recipe.target == "attention":
        paid = lm.engine.attention_paid(prefill, [[*pair.question, *pair.answer[:-1]] for pair in context.pairs])
    else:
        plus = recipe.target == "kvzip+"
        paid = prefill.reconstruction_plus if plus else prefill.reconstruction_attention
    return ScoredSlots(
        [torch.cat(parts, 1)[0, context.first :] for parts in received.values()],
        [part[0, :, context.first :].T.clamp_min(recipe.floor).log() for part in paid],
    )
