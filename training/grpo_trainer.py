"""TRL's GRPO trainer, and one for a CPU that scores the samples alone.

TRL's fused head scores the samples' positions where Triton runs; elsewhere it scores every position of the prompt too,
so that shapes stay the same. On a CPU that is most of a step: the head is a fifth of a small model.
"""

from __future__ import annotations

from typing import Any

from lceval.errors import UserError


def trainer_class(device: str) -> Any:
    """The trainer for a type of device, as torch names it."""
    import torch
    from torch.nn.functional import cross_entropy
    from trl import GRPOTrainer

    if device != "cpu":
        return GRPOTrainer

    class OnCpu(GRPOTrainer):  # type: ignore[misc]
        def _get_per_token_logps_and_entropies(
            self,
            model: Any,
            input_ids: Any,
            attention_mask: Any,
            logits_to_keep: int,
            batch_size: int | None = None,
            compute_entropy: bool = False,
            compute_aux_loss: bool = False,
            **_: Any,
        ) -> Any:
            if compute_aux_loss:
                raise UserError("GRPO of a mixture of experts needs a GPU: on a CPU its load-balancing loss is missing")
            found, entropies = [], []
            at_once = batch_size or len(input_ids)
            for ids, mask in zip(input_ids.split(at_once), attention_mask.split(at_once), strict=True):
                with self.accelerator.autocast():
                    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=logits_to_keep + 1, use_cache=False)
                logits = out.logits[:, :-1].float() / self.temperature
                target = ids[:, -logits_to_keep:]
                found.append(-cross_entropy(logits.transpose(1, 2), target, reduction="none"))
                if compute_entropy:
                    with torch.no_grad():
                        log_p = logits.log_softmax(-1)
                        entropies.append(-(log_p.exp() * log_p).sum(-1))
            kept = attention_mask[:, -logits_to_keep:].bool()
            entropy = torch.cat(entropies).masked_fill(~kept, 0) if compute_entropy else None
            return torch.cat(found).masked_fill(~kept, 0), entropy, None

    return OnCpu
