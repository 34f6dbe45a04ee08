"""GRPO of the packaged model: a step with each reward, and an adapter that lcft loads."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer

from lceval.adapt.graders import Grader
from lceval.judge.backends.rule import RuleJudge
from lceval.judge.client import Client
from lceval.judge.replies import Store
from lceval.models.lcft import LCFT
from lceval.tasks import prompts
from lceval.training import rewards
from lceval.training.grpo import Grpo, train
from lceval.training.samples import COMPLETIONS

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEXTS = [
    "The harbour of Rena was dredged in 1954 by a firm from Turku.",
    "Ole Vinter built the Lindmark bridge over the river Orne.",
]


def row(output_format: str) -> dict[str, Any]:
    question = "Who built the Lindmark bridge?"
    return {
        "id": output_format,
        "question": question,
        "answers": ["Ole Vinter"],
        "docs": [{"pid": str(place), "title": "", "text": text} for place, text in enumerate(TEXTS)],
        "gold_pids": ["1"],
        "instruction": prompts.instruction("documents", output_format),
        "context": prompts.block("documents", TEXTS),
        "ask": prompts.ask(output_format, question),
    }


def run(model: Any, smollm2: str, output: Path, steps: int, prompt_row: dict[str, Any], **more: Any) -> Any:
    """Train; a step has 3 samples of one prompt with at most 24 tokens."""
    grader = more.pop("grader", None)
    settings = Grpo(
        max_steps=steps,
        num_generations=3,
        prompts_per_step=1,
        completions_per_device=3,
        max_new_tokens=24,
        learning_rate=1e-4,
        variant="graded",
        **more,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return train(
        model=deepcopy(model),
        tokenizer=tokenizer,
        rows=[prompt_row],
        grpo=settings,
        output=output,
        lora=lora,
        grader=grader,
    )


@pytest.mark.parametrize("name", rewards.NAMES)
def test_a_step_with_each_reward(name: Any, lcft_model: Any, smollm2: str, tmp_path: Path) -> None:
    prompt_row = row(name if name in prompts.OUTPUT_FORMATS else "id")
    with Store(tmp_path / "replies.sqlite") as store:
        grader = Grader(Client(RuleJudge(), store)) if name == "rj" else None
        result = run(lcft_model, smollm2, tmp_path, 1, prompt_row, reward=name, grader=grader)
        logged = [json.loads(line) for line in (tmp_path / COMPLETIONS).read_text().splitlines()]
        completions = [line["completion"] for line in logged]
        grades = grader([prompt_row] * 3, completions) if grader else [None] * 3
    (step,) = [line for line in result.history if "loss" in line]
    assert math.isfinite(step["loss"])
    assert math.isfinite(step["grad_norm"])
    reward = rewards.Reward(name=name, variant="graded")
    parts = [reward.parts(prompt_row, text, j) for text, j in zip(completions, grades, strict=True)]
    assert [line["reward"] for line in logged] == rewards.totals(parts, [0, 0, 0])
    assert step["reward"] == pytest.approx(sum(line["reward"] for line in logged) / 3, abs=1e-6)
    adapted = PeftModel.from_pretrained(deepcopy(lcft_model), str(result.adapter))
    assert adapted.peft_config["default"].r == 4


def test_three_steps_give_an_adapter_that_lcft_loads(lcft_model: Any, smollm2: str, tmp_path: Path) -> None:
    result = run(lcft_model, smollm2, tmp_path, 3, row("ao"))
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    model = LCFT(smollm2, peft=str(result.adapter), kv="snapkv:0.5", device="cpu").model
    assert sum(isinstance(module, torch.nn.Module) and hasattr(module, "lora_A") for module in model.modules()) == 60
