"""TRL's GRPO trainer, and a subclass for CPUs that runs the LM head on the sampled tokens only.

With Triton, TRL's fused head is limited to the sampled tokens; without, it also runs on every position of the prompt,
to keep shapes constant. On a CPU that is most of the time of a step: the head is a fifth of a small model.
"""

from __future__ import annotations

from typing import Any

from lceval.core.errors import UserError


def trainer_class(device: str) -> Any:
    """The trainer class for a torch device type."""
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
                raise UserError(
                    "GRPO of a mixture of experts requires a GPU: the load-balancing loss is not implemented on CPU"
                )
            logps, entropies = [], []
            chunk = batch_size or len(input_ids)
            for ids, mask in zip(input_ids.split(chunk), attention_mask.split(chunk), strict=True):
                with self.accelerator.autocast():
                    out = model(input_ids=ids, attention_mask=mask, logits_to_keep=logits_to_keep + 1, use_cache=False)
                logits = out.logits[:, :-1].float() / self.temperature
                target = ids[:, -logits_to_keep:]
                logps.append(-cross_entropy(logits.transpose(1, 2), target, reduction="none"))
                if compute_entropy:
                    with torch.no_grad():
                        log_p = logits.log_softmax(-1)
                        entropies.append(-(log_p.exp() * log_p).sum(-1))
            mask = attention_mask[:, -logits_to_keep:].bool()
            entropy = torch.cat(entropies).masked_fill(~mask, 0) if compute_entropy else None
            return torch.cat(logps).masked_fill(~mask, 0), entropy, None

    return OnCpu
