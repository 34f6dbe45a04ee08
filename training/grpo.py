"""GRPO on the rewards of `rewards.py`, with TRL's trainer (LoRA, checkpoints, vLLM, accelerate).

The G samples of a prompt have rewards r_1 … r_G; the advantage of sample i is (r_i - mean) / std, the ratio of the new
to the old policy is clipped at 1 ± epsilon, and beta weighs the KL divergence from the reference model (with LoRA: the
weights without the adapter, or a copy of the initial adapter). The prompts are those of `lceval run`.
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

from pydantic import BaseModel, Field, model_validator

from lceval.core.errors import UserError
from lceval.models import attention
from lceval.tasks import prompts
from lceval.training import rewards
from lceval.training.grpo_trainer import trainer_class
from lceval.training.rewards import Grader, Reward, Row
from lceval.training.samples import LoggedReward
from lceval.training.trainers import common_settings, last_checkpoint, log_to_stderr, processes

_SAME_NAMES = {"max_steps", "num_generations", "temperature", "top_p", "learning_rate", "warmup_steps", "weight_decay"}
_SAME_NAMES |= {"max_grad_norm", "beta", "epsilon", "epsilon_high", "loss_type", "scale_rewards", "save_steps"}
"""Fields of a recipe that TRL's configuration has under the same name."""


class Grpo(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The section `grpo` of a recipe; defaults are the paper's where it states them and one machine allows it.

    Attributes:
        reward, variant, answer: as in `rewards.Reward`.
        max_steps: number of updates.
        num_generations: samples per prompt, G.
        prompts_per_step: prompts per update, over all processes.
        updates_per_generation: updates per round of sampling, each on its own prompts (paper: 256 / 64 = 4).
        iterations: passes over a round of samples.
        completions_per_device: samples per forward pass; changes memory and time only.
        max_new_tokens: maximum tokens of a sample.
        learning_rate: 1e-6 in the paper, for full fine-tuning; LoRA needs about ten times more.
        warmup_steps: steps of linear warmup; `schedule` applies after them.
        beta: weight of the KL divergence from the reference model; 0 disables it.
        unbiased_kl: weight the divergence by the policy ratio, for an unbiased gradient (not in the paper).
        epsilon, epsilon_high: lower and upper clipping range of the ratio; None: epsilon for both.
        loss_type: reduction of the token losses, as in TRL.
        scale_rewards: group for the standard deviation that rewards are divided by.
        use_vllm: sample with vLLM: none, on the same devices, or on a server (`trl vllm-serve`) at `vllm_url`.
        vllm_memory: share of GPU memory for vLLM on the same device.
        gradient_checkpointing: recompute activations in backward: less memory, about a third more time.
        save_steps: steps between checkpoints.
        eval_steps: steps between evaluations on held-out rows, with one sample per prompt; 0 disables them.
    """

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
                f"save_steps={self.save_steps} saves within a round of sampling: expected a multiple of "
                f"updates_per_generation * iterations = {round_steps}"
            )
        return self

    @property
    def reward_function(self) -> Reward:
        """The reward."""
        return Reward(name=self.reward, variant=self.variant, answer=self.answer)


@dataclass(frozen=True)
class GrpoResult:
    """The outcome of a training run.

    Attributes:
        adapter: folder of the adapter, or of the model after full fine-tuning.
        parameters: number of trained parameters.
        steps: number of updates, including those before a resume.
        history: the trainer's log, in order; `reward`, `kl`, `loss` and `parts/…` by `step`.
        unjudged: samples without grades, in this process since it started.
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
) -> GrpoResult:
    """Train `model` on `rows` and save the adapter in `output`.

    Args:
        model: transformers model, changed in place. An adapter that it already has is trained further.
        tokenizer: not modified; sampling uses a copy.
        rows: rows of tasks, in the mode of the reward.
        lora: PEFT configuration; None trains the model's own adapter, or all weights if it has none.
        resume: resume from the last checkpoint in `output/checkpoints`, if there is one.
        grader: judge of the samples, for a reward that requires one.
        held_out: rows for evaluation every `eval_steps` steps.
        chat_template: whether to apply the tokenizer's chat template; None: if it has one.
        bf16: bfloat16 autocast, independent of the dtype of the weights.
        minutes: time limit, after which training stops with a checkpoint for `resume`; None: no limit.

    Raises:
        UserError: invalid settings, rows or environment; nothing has been written.
    """
    if model.config._attn_implementation == attention.NAME:
        model.set_attn_implementation("sdpa")  # sampling uses left-padded batches
    reward = grpo.reward_function
    if reward.judged and grader is None:
        raise UserError(f"the reward {reward.name} requires a judge: configure one, or choose id, idc or idq")
    if not rows:
        raise UserError("no rows to train on")
    checkpoint = last_checkpoint(output)
    if checkpoint and not resume:
        raise UserError(f"{output} contains checkpoints of an earlier run: resume it, or choose another folder")
    for package in ("trl", *report_to, *(["vllm"] if grpo.use_vllm != "none" else [])):
        if find_spec(package) is None:
            raise UserError(f"GRPO with these settings requires the package {package}: pip install {package}")
    tokenizer = deepcopy(tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    chat = tokenizer.chat_template is not None if chat_template is None else chat_template
    all_rows = [*rows, *held_out]
    _check_lengths(all_rows, tokenizer, chat, grpo.max_new_tokens, model)
    settings = _settings(grpo, output, seed, bf16, bool(held_out), report_to)
    logged_reward = LoggedReward(reward, all_rows, len(rows), grader, output, settings.process_index)
    logged_reward.resume_from(int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0)
    trainer = trainer_class(settings.device.type)(
        model=model,
        reward_funcs=[logged_reward],
        args=settings,
        train_dataset=_dataset(all_rows, _order(len(rows), grpo, seed), chat),
        eval_dataset=_dataset(all_rows, range(len(rows), len(all_rows)), chat) if held_out else None,
        processing_class=tokenizer,
        peft_config=lora,
    )
    log_to_stderr(trainer)
    if minutes is not None:
        _stop_after(trainer, minutes, grpo.updates_per_generation * grpo.iterations)
    trained = trainer.model
    parameters = sum(p.numel() for name, p in trained.named_parameters() if p.requires_grad and ".ref." not in name)
    trainer.train(resume_from_checkpoint=checkpoint)
    if "ref" in getattr(trained, "peft_config", {}):  # the copy of the initial adapter
        trained.delete_adapter("ref")
    trainer.save_model(str(output))
    return GrpoResult(
        output, parameters, trainer.state.global_step, tuple(trainer.state.log_history), logged_reward.unjudged
    )


def _prompt(row: Row, chat: bool) -> Any:
    """The prompt as lm-eval builds it: one user message, or plain text."""
    text = prompts.prompt(row)
    return [{"role": "user", "content": text}] if chat else text


def _order(count: int, grpo: Grpo, seed: int) -> list[int]:
    """Row indices of the prompts of all rounds of sampling, reshuffled every epoch.

    The order depends on the seed only, and is a single epoch to the trainer, so a resumed run draws the same prompts.
    """
    prompts_per_round = grpo.prompts_per_step * grpo.updates_per_generation
    rounds = -(-grpo.max_steps // (grpo.updates_per_generation * grpo.iterations))
    order: list[int] = []
    while len(order) < rounds * prompts_per_round:
        epoch = random.Random(f"{seed} {len(order)}")
        order += epoch.sample(range(count), count)
    return order[: rounds * prompts_per_round]


def _dataset(rows: Sequence[Row], indices: Sequence[int], chat: bool) -> Any:
    """A dataset of row indices; prompts can have 100,000 tokens and are rendered on access."""
    from datasets import Dataset

    return Dataset.from_dict({"row_index": list(indices)}).with_transform(
        lambda batch: {**batch, "prompt": [_prompt(rows[index], chat) for index in batch["row_index"]]}
    )


def _settings(grpo: Grpo, output: Path, seed: int, bf16: bool, evaluate: bool, report_to: Sequence[str]) -> Any:
    """TRL's configuration."""
    from trl import GRPOConfig

    per_pass = grpo.completions_per_device * processes()
    samples = grpo.prompts_per_step * grpo.num_generations
    if samples % per_pass:
        raise UserError(
            f"prompts_per_step * num_generations = {samples} samples is not a multiple of {per_pass} "
            f"(completions_per_device={grpo.completions_per_device} times {processes()} processes): choose a divisor"
        )
    accumulated = samples // per_pass
    return GRPOConfig(
        **common_settings(output, seed, report_to),
        **grpo.model_dump(include=_SAME_NAMES),
        per_device_train_batch_size=grpo.completions_per_device,
        per_device_eval_batch_size=grpo.completions_per_device,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated * grpo.updates_per_generation,
        num_generations_eval=1,
        num_iterations=grpo.iterations,
        max_completion_length=grpo.max_new_tokens,
        lr_scheduler_type=grpo.schedule,
        use_bias_correction_kl=grpo.unbiased_kl,
        use_vllm=grpo.use_vllm != "none",
        vllm_mode="server" if grpo.use_vllm == "server" else "colocate",
        vllm_gpu_memory_utilization=grpo.vllm_memory,
        vllm_server_base_url=grpo.vllm_url,
        activation_checkpointing=grpo.gradient_checkpointing,
        bf16=bf16,
        shuffle_dataset=False,
        save_total_limit=2,
        eval_strategy="steps" if evaluate and grpo.eval_steps else "no",
        eval_steps=grpo.eval_steps or None,
    )


def _check_lengths(rows: Sequence[Row], tokenizer: Any, chat: bool, new_tokens: int, model: Any) -> None:
    """Raise an error for prompts that leave no room for a sample; nothing is truncated silently."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return
    for row in rows:
        # A token has at least one byte, and a template adds fewer than 1,024 tokens: count only what may be too long.
        if len(prompts.prompt(row).encode()) + new_tokens + 1024 <= limit:
            continue
        prompt = _prompt(row, chat)
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if chat else prompt
        length = len(tokenizer(text, add_special_tokens=not chat)["input_ids"])
        if length + new_tokens > limit:
            raise UserError(
                f"the prompt of {row['id']} has {length} tokens, which with max_new_tokens={new_tokens} is more than "
                f"the model's {limit}: choose shorter rows or a smaller max_new_tokens"
            )


def _stop_after(trainer: Any, minutes: float, every: int) -> None:
    """Stop training after a time limit, with a checkpoint, between two rounds of sampling."""
    from transformers import TrainerCallback

    start = time.monotonic()

    class TimeLimit(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if time.monotonic() - start >= 60 * minutes and state.global_step % every == 0:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(TimeLimit())
