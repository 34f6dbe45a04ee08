"""Supervised fine-tuning on packed contexts with TRL's trainer (LoRA, checkpoints, resume, accelerate).

The loss is the mean NLL of the answer tokens over all contexts of a step; the LM head runs on those positions only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from trl import SFTConfig, SFTTrainer

from lceval.core.errors import UserError
from lceval.models.geometry import Geometry
from lceval.models.lcft import LCFT
from lceval.models.policies.kvzap import KVzap
from lceval.training import compression_aware, texts
from lceval.training.config import Config
from lceval.training.encode import Packed
from lceval.training.joint import LearnedEviction
from lceval.training.packing import FULL_CACHE, IGNORED, Packing, pack
from lceval.training.trainers import common_settings, log_to_stderr, processes


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer on packed contexts, one per micro-batch."""

    def __init__(
        self, recipe: Config, geometry: Geometry, learned: LearnedEviction | None = None, **kwargs: Any
    ) -> None:
        super().__init__(data_collator=_collate, **kwargs)
        log_to_stderr(self)
        self._recipe = recipe
        self._geometry = geometry
        self._micro = (-1, 0)  # step, index of the micro-batch in the step
        self._self_distillation = recipe.compression_aware.self_distillation if recipe.compression_aware else None
        self._learned = learned

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The summed NLL of the answer tokens divided by `num_items_in_batch`, or their mean."""
        labels = inputs["labels"][0]
        rows = (labels != IGNORED).nonzero()[:, 0]
        evictor = self._draw() if self.model.training else None
        packing = Packing(inputs["block"], inputs["kind"], self._geometry, evictor)
        if self._learned is not None:
            self._learned.release()
            if isinstance(evictor, KVzap):
                progress = self.state.global_step / self.args.max_steps
                self._learned.apply(packing, inputs["input_ids"], evictor, progress)
        out = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            packing=packing,
            logits_to_keep=rows,
            use_cache=False,
        )
        logits = out.logits[0].float()
        loss = F.cross_entropy(logits, labels[rows], reduction="sum")
        full_cache = inputs["kind"][0, rows] == FULL_CACHE
        if self._self_distillation is not None and full_cache.any():
            # The labels contain every answer token twice, so the divergence counts twice in their mean.
            student, teacher = (logits[half].log_softmax(-1) for half in (~full_cache, full_cache))
            divergence = F.kl_div(student, teacher.detach(), log_target=True, reduction="sum")
            self._metrics["train"]["divergence"].append(divergence.item() / len(student))
            loss = loss + 2 * self._self_distillation * divergence
        loss = loss / (len(rows) if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = (
                loss * self.accelerator.num_processes
            )  # DDP averages gradients over processes; the loss is a sum over them
        with torch.no_grad():
            accuracy = (out.logits[0].argmax(-1) == labels[rows]).float().mean().item()
        self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append(accuracy)
        return (loss, out) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer, with the scorer's weights at their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self._learned is not None and self._learned.rate:
            weights = [*self._learned.scorer.parameters()]
            optimizer.add_param_group({"params": weights, "lr": self._learned.rate, "weight_decay": 0.0})
            # The trainer clears the gradients of its model only.
            optimizer.register_step_post_hook(lambda *_: self._learned.scorer.zero_grad())
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self._learned is not None:
            self._learned.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._learned is not None:
            self._learned.load(Path(resume_from_checkpoint))

    def _draw(self) -> Any:
        """The evictor of a micro-batch; depends on seed, step and index only, so a resumed run draws the same ones."""
        if self._recipe.compression_aware is None:
            return None
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        rng = random.Random(f"{self._recipe.seed} {step} {self._micro[1]} {self.args.process_index}")
        return compression_aware.draw(self._recipe.compression_aware, rng, step / self.args.max_steps)


def packed_trainer(
    recipe: Config, model: Any, lm: LCFT, contexts: Sequence[Packed], held_out: Sequence[Packed]
) -> PackedTrainer:
    """The trainer of `model` on `contexts`; checkpoints go to `output/checkpoints`.

    lm: the wrapper of `model` (`training.train.load`).
    """
    query_aware = recipe.compression_aware is not None and recipe.compression_aware.query_aware
    geometry = Geometry.of(model)
    if recipe.compression_aware is not None:
        compression_aware.check(recipe.compression_aware, geometry)
    return PackedTrainer(
        recipe,
        geometry,
        _learned(recipe, model, geometry, lm),
        model=model,
        processing_class=lm.tokenizer,
        train_dataset=_dataset(contexts, query_aware),
        eval_dataset=_dataset(held_out, query_aware) if held_out else None,
        peft_config=lora(recipe),
        args=settings(recipe, evaluate=bool(held_out)),
    )


def _learned(recipe: Config, model: Any, geometry: Geometry, lm: LCFT) -> LearnedEviction | None:
    """What evicts by learned scores, if an evictor of the recipe does.

    Raises:
        UserError: no scorer, or one that is trained in several processes.
    """
    section = recipe.compression_aware
    if section is None or not section.has_kvzap:
        return None
    if section.scorer.is_trained and processes() > 1:
        raise UserError("joint training runs in one process: start it without accelerate")
    return LearnedEviction(section.scorer, recipe.model.pretrained, model, geometry, lm.engine.protected_tokens)


def text_trainer(recipe: Config, model: Any, tokenizer: Any, sequences: Sequence[Sequence[int]]) -> Any:
    """TRL's SFTTrainer on sequences of one length; with `longlora`, `model` is already a PEFT model."""
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=texts.dataset(sequences),
        data_collator=_collate,
        peft_config=None if recipe.longlora else lora(recipe),
        args=settings(recipe, evaluate=False),
    )
    log_to_stderr(trainer)
    return trainer


def settings(recipe: Config, *, evaluate: bool) -> SFTConfig:
    """TRL's configuration of a recipe.

    Raises:
        UserError: the contexts of a step cannot be divided evenly among the processes.
    """
    optim = recipe.optim
    if optim.contexts_per_step % processes():
        raise UserError(
            f"optim.contexts_per_step={optim.contexts_per_step} is not divisible by the number of processes "
            f"({processes()}): choose a multiple"
        )
    return SFTConfig(
        **common_settings(recipe.output, recipe.seed, recipe.report_to),
        **optim.model_dump(include={"learning_rate", "max_steps", "weight_decay", "max_grad_norm", "bf16"}),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=optim.contexts_per_step // processes(),
        lr_scheduler_type=optim.schedule,
        warmup_steps=round(optim.warmup * optim.max_steps),
        activation_checkpointing=optim.gradient_checkpointing,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.keep_checkpoints,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=recipe.save_steps,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )


def lora(recipe: Config) -> Any:
    """The PEFT configuration of a recipe, or None for full fine-tuning."""
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.targets,
        task_type="CAUSAL_LM",
    )


def _dataset(contexts: Sequence[Packed], query_aware: bool) -> Dataset:
    return Dataset.from_list(
        [pack(c.context, c.pairs, query_aware=query_aware, self_distillation=c.self_distillation) for c in contexts]
    )


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    (item,) = items
    return {key: torch.tensor([row]) for key, row in item.items()}
