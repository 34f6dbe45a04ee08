"""Greedy decoding and plain sampling of a batch: the texts of transformers' `generate`, with less between two tokens.

`generate` waits for the device after every token, and lm-eval's stop strings end a batch only once one of them is in
every row. Here a row ends at the first of its stop strings, and the host looks every few tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lceval.models.faults import FiniteLogits
from lceval.models.prefix import BATCHED

# Tokens between two looks at what was written: on a device, the host waits for it there.
LOOK_EVERY = {"cpu": 1}
LOOK_EVERY_ELSEWHERE = 8
# Settings of a generation config that change no token of this loop, or that its caller applies.
IDLE = {"eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "use_cache"}
IDLE |= {"early_stopping", "length_penalty", "transformers_version", "_from_model_config"}
# Values under which other settings have no effect.
NEUTRAL: dict[str, Any] = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "min_length": 0}
NEUTRAL |= {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "typical_p": 1.0, "diversity_penalty": 0.0}
NEUTRAL |= {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
# What transformers assumes where a generation config is silent.
TOP_K = 50


@dataclass(frozen=True)
class Selection:
    """How the next token is selected from logits.

    Attributes:
        warpers: what sampling does to the logits; None for greedy decoding.
    """

    warpers: LogitsProcessorList | None

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens [B] of logits [B, V] float32."""
        if self.warpers is None:
            return logits.argmax(-1)
        # No warper reads the tokens before.
        probabilities = self.warpers(None, logits).softmax(-1)
        return torch.multinomial(probabilities, 1).squeeze(1)


def selection(config: GenerationConfig, sampling: Mapping[str, Any]) -> Selection | None:
    """How `generate` selects tokens under a model's generation config and generation arguments.

    None for what only `generate` can do: beams, penalties, constraints, and whatever it would refuse.
    """
    settings = {name: value for name, value in {**config.to_dict(), **sampling}.items() if value is not None}
    unusual = {name for name, value in settings.items() if value is not False and value != NEUTRAL.get(name)}
    if not {*sampling} <= BATCHED or unusual - BATCHED - IDLE:
        return None
    if not sampling.get("do_sample"):
        return Selection(None)
    temperature, top_k, top_p = sampling.get("temperature", 0.0), settings.get("top_k", TOP_K), settings.get("top_p", 1)
    try:
        warpers: list[Any] = [] if temperature == 1 else [TemperatureLogitsWarper(float(temperature))]
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        warpers += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    except (TypeError, ValueError):
        return None
    return Selection(LogitsProcessorList(warpers))


@dataclass(frozen=True)
class Ends:
    """What ends an answer.

    Attributes:
        tokens: end tokens.
        strings: stop strings.
        decode: the text of tokens, special tokens included.
    """

    tokens: frozenset[int]
    strings: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def after(self, tokens: Sequence[int], seen: int = 0) -> int | None:
        """The number of tokens after which an answer ends, more than `seen`; None if it does not end.

        tokens: a row's, of which the first `seen` do not end it.
        """
        # A byte or more of a stop string is in each of its tokens.
        longest = max((len(string.encode()) for string in self.strings), default=0)
        for count in range(seen + 1, len(tokens) + 1):
            if tokens[count - 1] in self.tokens:
                return count
            # The first tokens of a part can have another text than within the whole.
            if self._has_stop(tokens[max(0, count - longest - 2) : count]) and self._has_stop(tokens[:count]):
                return count
        return None

    def _has_stop(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens) if self.strings else ""
        return any(string in text for string in self.strings)


@dataclass(frozen=True)
class Written:
    """What a batch wrote: the tokens of each row up to its end, and whether its logits were ever NaN or infinite."""

    rows: list[list[int]]
    failed: list[bool]


def write(
    logits: Tensor, step: Callable[[Tensor], Tensor], select: Selection, ends: Ends, pad: int, limit: int
) -> Written:
    """Continue a batch until every row has ended, or has `limit` tokens.

    Args:
        logits: [B, V] of the first token.
        step: logits [B, V] after tokens [B, 1].
        pad: the token of rows that have ended.
    """
    rows, device = logits.shape[0], logits.device
    every = LOOK_EVERY.get(device.type, LOOK_EVERY_ELSEWHERE)
    finite, end_tokens = FiniteLogits(), torch.tensor(sorted(ends.tokens), device=device)
    written = torch.full((rows, limit), pad, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    stops: list[int | None] = [None] * rows
    seen = 0
    for count in range(1, limit + 1):
        tokens = select(finite(None, logits.float())).masked_fill(ended, pad)
        written[:, count - 1] = tokens
        ended |= torch.isin(tokens, end_tokens)
        if count % every == 0 or count == limit:
            for row, so_far in enumerate(written[:, :count].tolist()):
                stops[row] = stops[row] or ends.after(so_far, seen)
            seen = count
            if None not in stops:
                break
        if count < limit:
            logits = step(tokens[:, None])
    return Written(
        [tokens[:stop] for tokens, stop in zip(written[:, :seen].tolist(), stops, strict=True)], finite.failed(rows)
    )
