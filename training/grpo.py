"""GRPO on the rewards of `rewards.py`, by TRL's trainer: it samples, compares the samples of a prompt, and updates.

A prompt's G samples are worth r_1 … r_G; sample i is pushed by its advantage (r_i - mean) / std, the ratio of the new
to the old policy is clipped at 1 ± epsilon, and beta weighs the divergence from the model that training began with
(with LoRA: the same weights without the adapter, or a copy of the adapter that training began with). The prompts are
what `lceval run` shows. TRL and the trainer bring LoRA, checkpoints, vLLM and accelerate.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lceval.errors import UserError
from lceval.models import attention
from lceval.tasks import prompts
from lceval.training import rewards
from lceval.training.grpo_trainer import trainer_class
from lceval.training.rewards import Grader, Reward, Row
from lceval.training.samples import Scores
from lceval.training.trainers import last_checkpoint, processes, speak_on_stderr


class Grpo(BaseModel):
    """What GRPO is asked for; the defaults are the paper's, where it states them and one machine can follow.

    Attributes:
        reward, variant, answer: as `rewards.Reward`.
        max_steps: updates of the weights.
        num_generations: samples of a prompt, G.
        prompts_per_step: prompts whose samples make an update, over all processes.
        updates_per_generation: updates made from one round of sampling, each on its own prompts (paper: 256 / 64 = 4).
        iterations: times that a round is gone over.
        completions_per_device: samples that go through the model at once; it changes memory and time alone.
        max_new_tokens: of a sample.
        learning_rate: 1e-6 in the paper, for all weights; LoRA needs some ten times as much.
        warmup_steps: over which the rate rises; `schedule` says how it falls after that.
        beta: weight of the divergence from the first model, 0 for none.
        unbiased_kl: weigh the divergence by the policies' ratio, which makes its gradient unbiased; the paper does not.
        epsilon, epsilon_high: how far the ratio may fall and rise; None takes the same for both.
        loss_type: how the losses of tokens are averaged, as TRL's.
        scale_rewards: whose standard deviation the rewards are divided by.
        use_vllm: who samples: the model itself, vLLM on the same devices, or a server (`trl vllm-serve`) at `vllm_url`.
        vllm_memory: share of a device's memory for vLLM where it is on the same.
        gradient_checkpointing: recompute activations in backward: less memory, about a third more time.
        save_steps: steps between checkpoints.
        eval_steps: steps between evaluations on held-out rows, one sample a prompt; 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    reward: rewards.Name = "ao"
    variant: rewards.Variant = "paper"
    answer: rewards.Answer = "extracted"
    max_steps: int = Field(default=100, gt=0)
    num_generations: int = Field(default=5, ge=2)
    prompts_per_step: int = Field(default=64, gt=0)
    updates_per_generation: int = Field(default=1, gt=0)
    iterations: int = Field(default=1, gt=0)
    completions_per_device: int = Field(default=5, gt=0)
    max_new_tokens: int = Field(default=2048, gt=0)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    learning_rate: float = Field(default=1e-6, gt=0)
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    beta: float = Field(default=0.001, ge=0)
    unbiased_kl: bool = False
    epsilon: float = Field(default=0.2, gt=0)
    epsilon_high: float | None = Field(default=None, gt=0)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    use_vllm: Literal["none", "colocate", "server"] = "none"
    vllm_memory: float = Field(default=0.3, gt=0, lt=1)
    vllm_url: str | None = None
    gradient_checkpointing: bool = False
    save_steps: int = Field(default=50, gt=0)
    eval_steps: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _resumable(self) -> Grpo:
        round_steps = self.updates_per_generation * self.iterations
        if self.save_steps % round_steps:
            raise ValueError(
                f"save_steps={self.save_steps} would save in the middle of a round of sampling: expected a multiple of "
                f"updates_per_generation * iterations = {round_steps}"
            )
        return self

    @property
    def wanted(self) -> Reward:
        """The reward."""
        return Reward(name=self.reward, variant=self.variant, answer=self.answer)


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Attributes:
        adapter: the folder of the adapter, or of the model where all weights were trained.
        parameters: how many were trained.
        max_steps: updates made, earlier ones included.
        history: what the trainer logged, in order; `reward`, `kl`, `loss` and `parts/…` by `step`.
        unjudged: samples without a verdict, in this process since it began.
    """

    adapter: Path
    parameters: int
    steps: int
    history: tuple[dict[str, Any], ...]
    unjudged: int


def train(
    *,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    grpo: Grpo,
    output: Path,
    lora: Any,
    seed: int = 0,
    resume: bool = False,
    grader: Grader | None = None,
    held_out: Sequence[Row] = (),
    chat_template: bool | None = None,
    bf16: bool = False,
    report_to: Sequence[Literal["tensorboard", "trackio"]] = (),
    minutes: float | None = None,
) -> Trained:
    """Train `model` on `rows`, and leave the adapter in `output`.

    Args:
        model: transformers'; changed in place. With an adapter of its own already, that one is trained on.
        tokenizer: left alone; a copy is given what sampling needs.
        rows: of tasks, in the mode that the reward is for.
        lora: a PEFT configuration; None trains the model's own adapter, or all weights where it has none.
        resume: go on from the last checkpoint in `output/checkpoints`, if there is one.
        grader: gives J, for a reward that has one.
        held_out: rows that the reward is also taken on, every `eval_steps` steps.
        chat_template: whether prompts go through the tokenizer's template; None: if it has one.
        bf16: compute in bfloat16 (autocast), whatever the weights are kept in.
        minutes: stop after so many, with a checkpoint from which `resume` goes on; None runs to the end.

    Raises:
        UserError: what cannot be trained, or not here; nothing has been written then.
    """
    if model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation("sdpa")  # it also samples, from rows that are padded on the left
    reward = grpo.wanted
    _check(reward, rows, grader, output, resume, grpo, report_to)
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat = tokenizer.chat_template is not None if chat_template is None else chat_template
    everything = [*rows, *held_out]
    _fits(everything, tokenizer, chat, grpo.max_new_tokens, model)
    settings = _settings(grpo, output, seed, bf16, bool(held_out), report_to)
    checkpoint = last_checkpoint(output) if resume else None
    score = Scores(reward, everything, len(rows), grader, output, settings.process_index)
    score.go_on_from(int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0)
    trainer = trainer_class(settings.device.type)(
        model=model,
        reward_funcs=[score],
        args=settings,
        train_dataset=_dataset(everything, _order(len(rows), grpo, seed), chat),
        eval_dataset=_dataset(everything, range(len(rows), len(everything)), chat) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora,
    )
    speak_on_stderr(trainer)
    if minutes is not None:
        _stop_after(trainer, minutes, grpo.updates_per_generation * grpo.iterations)
    trained = trainer.model
    parameters = sum(p.numel() for name, p in trained.named_parameters() if p.requires_grad and ".ref." not in name)
    trainer.train(resume_from_checkpoint=checkpoint)
    if "ref" in getattr(trained, "peft_config", {}):  # the copy of the adapter that training began with
        trained.delete_adapter("ref")
    trainer.save_model(str(output))
    return Trained(output, parameters, trainer.state.global_step, tuple(trainer.state.log_history), score.unjudged)


def _prompt(row: Row, chat: bool) -> Any:
    """The prompt as lm-eval builds it: one turn of the user, or plain text."""
    text = prompts.prompt(row)
    return [{"role": "user", "content": text}] if chat else text


def _order(count: int, grpo: Grpo, seed: int) -> list[int]:
    """The places of the prompts of all rounds of sampling, shuffled anew each time that all have been drawn.

    It depends on the seed alone and is one epoch to the trainer, so that a resumed run draws what an unbroken one does.
    """
    a_round = grpo.prompts_per_step * grpo.updates_per_generation
    rounds = -(-grpo.max_steps // (grpo.updates_per_generation * grpo.iterations))
    order: list[int] = []
    while len(order) < rounds * a_round:
        epoch = random.Random(f"{seed} {len(order)}")
        order += epoch.sample(range(count), count)
    return order[: rounds * a_round]


def _dataset(rows: Sequence[Row], places: Sequence[int], chat: bool) -> Any:
    """Places alone: a prompt of 100,000 tokens is rendered when it is asked for."""
    from datasets import Dataset

    made = Dataset.from_dict({"place": list(places)})
    return made.with_transform(
        lambda batch: {"place": batch["place"], "prompt": [_prompt(rows[place], chat) for place in batch["place"]]}
    )


def _settings(grpo: Grpo, output: Path, seed: int, bf16: bool, evaluate: bool, report_to: Sequence[str]) -> Any:
    """TRL's configuration."""
    import torch
    from trl import GRPOConfig

    at_once = grpo.completions_per_device * processes()
    samples = grpo.prompts_per_step * grpo.num_generations
    if samples % at_once:
        raise UserError(
            f"prompts_per_step * num_generations = {samples} samples cannot be dealt out {at_once} at a time "
            f"(completions_per_device={grpo.completions_per_device} on each process): choose a divisor"
        )
    accumulated = samples // at_once
    return GRPOConfig(
        output_dir=str(output / "checkpoints"),
        max_steps=grpo.max_steps,
        per_device_train_batch_size=grpo.completions_per_device,
        per_device_eval_batch_size=grpo.completions_per_device,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * grpo.updates_per_generation,
        num_generations=grpo.num_generations,
        num_generations_eval=1,
        num_iterations=grpo.iterations,
        max_completion_length=grpo.max_new_tokens,
        temperature=grpo.temperature,
        top_p=grpo.top_p,
        learning_rate=grpo.learning_rate,
        lr_scheduler_type=grpo.schedule,
        warmup_steps=grpo.warmup_steps,
        weight_decay=grpo.weight_decay,
        max_grad_norm=grpo.max_grad_norm,
        beta=grpo.beta,
        use_bias_correction_kl=grpo.unbiased_kl,
        epsilon=grpo.epsilon,
        epsilon_high=grpo.epsilon_high,
        loss_type=grpo.loss_type,
        scale_rewards=grpo.scale_rewards,
        use_vllm=grpo.use_vllm != "none",
        vllm_mode="server" if grpo.use_vllm == "server" else "colocate",
        vllm_gpu_memory_utilization=grpo.vllm_memory,
        vllm_server_base_url=grpo.vllm_url,
        activation_checkpointing=grpo.gradient_checkpointing,
        bf16=bf16,
        seed=seed,
        data_seed=seed,
        shuffle_dataset=False,
        logging_steps=1,
        save_steps=grpo.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluate and grpo.eval_steps else "no",
        eval_steps=grpo.eval_steps or None,
        report_to=list(report_to) or "none",
        project="lceval",
        trackio_static_space_id=False,  # it stays on this machine
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )


def _check(
    reward: Reward,
    rows: Sequence[Row],
    grader: Grader | None,
    output: Path,
    resume: bool,
    grpo: Grpo,
    report_to: Sequence[str],
) -> None:
    if reward.judged and grader is None:
        raise UserError(f"the reward {reward.name} needs a judge: give one, or choose id, idc or idq")
    if not rows:
        raise UserError("no rows to train on")
    if not resume and last_checkpoint(output):
        raise UserError(f"{output} holds checkpoints of an earlier run: resume it, or choose another folder")
    for package in ("trl", *report_to, *(["vllm"] if grpo.use_vllm != "none" else [])):
        if find_spec(package) is None:
            raise UserError(f"GRPO with these settings needs the package {package}: pip install {package}")


def _fits(rows: Sequence[Row], tokenizer: Any, chat: bool, new_tokens: int, model: Any) -> None:
    """Refuse prompts that leave no room for a sample: nothing is cut in silence."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for row in rows:
        # No tokenizer makes more tokens than bytes, no template adds a thousand: only what could be long is counted.
        if len(prompts.prompt(row).encode()) + new_tokens + 1024 <= limit:
            continue
        prompt = _prompt(row, chat)
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else prompt
        length = len(tokenizer(text, add_special_tokens=not chat)["input_ids"])
        if length + new_tokens > limit:
            raise UserError(
                f"the prompt of {row['id']} has {length} tokens, and with max_new_tokens={new_tokens} that is more "
                f"than the model's {limit}: choose shorter rows or fewer new tokens"
            )


def _stop_after(trainer: Any, minutes: float, every: int) -> None:
    """Let a run end early, with a checkpoint, between two rounds of sampling."""
    from transformers import TrainerCallback

    began = time.monotonic()

    class Bound(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if time.monotonic() - began >= 60 * minutes and state.global_step % every == 0:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Bound())
