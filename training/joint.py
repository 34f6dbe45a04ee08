"""Learned eviction in training: an adapter learns under a scorer of KV slots, or together with it (joint training).

The slots of a context are scored in a pass of their own, without gradient, so that those of all layers compete for one
budget, as under lcft's `kvzap`. Where the scorer is trained, questions and answers see every slot through a gate

    g = sigmoid((score - threshold) / temperature),

added to the attention logits as log g. The threshold lies between the lowest score that is kept and the highest that is
not, so the drawn budget holds without a term in the loss. The temperature falls during training: the gate becomes the
mask that lcft applies. DMS (arXiv 2506.05345) trains gates of a model's own, with a term for the budget, and KV-Distill
(arXiv 2503.10337) a selection of tokens with LoRA, by the divergence from the full cache; here the selection is KVzap's
scorer, which lcft evicts by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lceval.core.errors import UserError
from lceval.models import scorer as scorers
from lceval.models.geometry import Geometry
from lceval.models.policies.kvzap import KVzap
from lceval.models.scorer import WEIGHTS, Scorer, attention_inputs
from lceval.training.config import LearnedScorer
from lceval.training.packing import Gate, Packing
from lceval.training.run_record import SCORER


class LearnedEviction:
    """The scorer of `kvzap` in training.

    Args:
        spec: the section of the recipe.
        pretrained: name of the model, whose own scorer is the default.
        base: the transformers model, also within a PEFT model.
        protected_tokens: how many first tokens of a context are never evicted, given its ids.

    Attributes:
        scorer: float32; its parameters require gradients if it is trained.
        rate: its learning rate; 0 if it is not trained.

    Raises:
        UserError: no scorer, or one of another model.
    """

    def __init__(
        self,
        spec: LearnedScorer,
        pretrained: str,
        base: Any,
        geometry: Geometry,
        protected_tokens: Callable[[Sequence[int]], int],
    ) -> None:
        name = spec.init or scorers.default(pretrained)
        if name is None:
            raise UserError(
                f"{pretrained} has no scorer of its own: train one with `lceval train scorer`, and set "
                "compression_aware.scorer.init to its folder"
            )
        self.scorer: Scorer = scorers.load(name).float().requires_grad_(spec.is_trained)
        self.scorer.check(geometry, base.config.get_text_config())
        self.rate = spec.learning_rate
        self._temperature, self._base, self._protected_tokens = spec.temperature, base, protected_tokens
        self._receive: Callable[[int, Tensor], None] | None = None
        # Registered for good: activation checkpointing runs layers again after a pass has ended.
        self._hooks = attention_inputs(base, geometry.full, self._received)
        self._hooks.__enter__()

    def apply(self, packing: Packing, ids: Tensor, evictor: KVzap, progress: float) -> None:
        """Set the kept slots of a packed sequence, or its gate.

        Args:
            ids: [1, L] of the sequence.
            evictor: with the drawn budget.
            progress: fraction of training completed, for the temperature.
        """
        context = ids[:, : packing.context]
        self.scorer.to(ids.device)
        prefix = self._protected_tokens(context[0].tolist())
        competing = [evictor.with_protected(scores, prefix) for scores in self._scores(context)]
        masks = evictor.select(competing)
        if not self.rate:
            self.release()
            packing.kept = {layer: [mask] for layer, mask in enumerate(masks)}
            return
        first, last = self._temperature
        temperature = first * (last / first) ** progress
        protected = competing[0] >= torch.finfo(torch.float32).max
        gate = Gate(threshold_of(competing, masks), temperature, protected, {})

        def receive(layer: int, hidden: Tensor) -> None:
            of_context = hidden[:, : packing.context].to(torch.float32)
            gate.scores[layer] = self.scorer.layers[layer](of_context).transpose(1, 2)

        self._receive = receive
        packing.gate = gate

    @torch.no_grad()
    def _scores(self, context: Tensor) -> list[Tensor]:
        """Per layer [1, Hkv, S] float32, of the tokens of a context [1, S]."""
        scores: dict[int, Tensor] = {}

        def receive(layer: int, hidden: Tensor) -> None:
            scores[layer] = self.scorer.score(layer, hidden)

        self._receive = receive
        self._base.get_decoder()(input_ids=context, use_cache=False)
        return [scores[layer] for layer in sorted(scores)]

    def _received(self, layer: int, hidden: Tensor) -> None:
        if self._receive is not None:
            self._receive(layer, hidden)

    def release(self) -> None:
        """Score nothing in the passes that follow."""
        self._receive = None

    def save(self, folder: Path) -> None:
        """Write the scorer, in its dtype, into its folder of a run or checkpoint."""
        self.scorer.save(folder / SCORER)

    def load(self, checkpoint: Path) -> None:
        """Continue with the scorer of a checkpoint."""
        self.scorer.load_state_dict(load_file(checkpoint / SCORER / WEIGHTS))


def finish(output: Path) -> dict[str, Any]:
    """Store the scorer of a finished run in 16 bit; returns its digest and shape.

    Raises:
        UserError: it has numbers beyond 16 bit.
    """
    scorer = scorers.load(str(output / SCORER)).half()
    if not all(parameter.isfinite().all() for parameter in scorer.parameters()):
        raise UserError("the scorer has numbers beyond 16 bit: reduce compression_aware.scorer.learning_rate")
    scorer.save(output / SCORER)
    return {"digest": scorer.digest, **scorer.dimensions}


def threshold_of(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """A score between the lowest that is kept, of those that compete, and the highest that is not."""
    kept = torch.cat([s[mask & s.isfinite()] for s, mask in zip(scores, masks, strict=True)])
    evicted = torch.cat([s[~mask] for s, mask in zip(scores, masks, strict=True)])
    if not len(kept) or not len(evicted):
        return float(torch.cat([kept, evicted]).median())
    return float(kept.min() + evicted.max()) / 2
