"""The study of docs/studies/grpo.md: GRPO of the packaged model on short contexts, evaluated on held-out questions.

python studies/grpo.py run      train for MINUTES, then evaluate; repeat until it prints "done"
python studies/grpo.py table    rewrite docs/studies/grpo-tables.md from the committed scores

Ids and scores are committed, texts of questions and outputs are not. Adapter and samples stay in runs/grpo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from lceval.stats.estimates import cluster_bootstrap

SCORES = Path(__file__).parent / "grpo"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "grpo-tables.md"
MARK = "<!-- tables of the committed scores -->\n"
OUTPUT = Path("runs/grpo")
STEPS, MINUTES = 24, 6.0
STEPS_PER_ROW = 4
HELD_OUT = 80
GOLD_WORDS = 110  # maximum length of a gold passage; with one distractor contexts have about 300 tokens
SETTINGS: dict[str, Any] = {
    "reward": "ao",
    "variant": "graded",
    "num_generations": 6,
    "prompts_per_step": 6,
    "completions_per_device": 12,
    "max_new_tokens": 20,
    "learning_rate": 3e-4,
    "beta": 0.001,
    "save_steps": 4,
}
METRICS = {
    "reward": "reward",
    "correct_format": "correct format",
    "subem": "subem",
    "subem_raw": "subem_raw",
    "f1": "f1",
}
TRAINING = {
    "reward": "reward",
    "parts/answer": "answer part",
    "parts/form": "format part",
    "kl": "KL",
    "entropy": "entropy",
    "completions/mean_length": "mean tokens",
    "step_time": "s per step",
}
"""Columns of the training table: the logged metric and its title."""


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows: a gold passage and one distractor; the two sets share no gold passage."""
    import random

    from lceval import packaged
    from lceval.tasks import catalogue
    from lceval.tasks.build import rows_of
    from lceval.tasks.prompts import block

    selected = []
    for row in rows_of(catalogue.find("lc_squad_ao_2k"), {"pretrained": packaged.resolve("smollm2-135m")}):
        rng = random.Random(row["id"])
        gold = [d for d in row["docs"] if d["pid"] in row["gold_pids"]]
        others = [d for d in row["docs"] if d["pid"] not in row["gold_pids"]]
        if not others or sum(len(d["text"].split()) for d in gold) > GOLD_WORDS:
            continue
        docs = [*gold, min(others, key=lambda d: len(d["text"]))]
        rng.shuffle(docs)
        selected.append({**row, "docs": docs, "context": block("documents", [d["text"] for d in docs])})
    golds = sorted({row["gold_pids"][0] for row in selected})
    random.Random(0).shuffle(golds)
    held_out_golds = {*golds[: len(golds) // 3]}
    train = [row for row in selected if row["gold_pids"][0] not in held_out_golds]
    held_out = [row for row in selected if row["gold_pids"][0] in held_out_golds]
    return train, random.Random(1).sample(held_out, min(HELD_OUT, len(held_out)))


def model(step: int) -> tuple[Any, Any]:
    """The model with the adapter of a step (0: no adapter), and its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lceval import packaged

    folder = packaged.folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tuned = PeftModel.from_pretrained(base, str(OUTPUT / f"step-{step}")) if step else base
    return tuned, AutoTokenizer.from_pretrained(folder)


def evaluate(step: int) -> None:
    """Score greedy answers to the held-out questions."""
    import torch

    from lceval.tasks.prompts import prompt
    from lceval.tasks.scoring import answer_metrics
    from lceval.training.rewards import Reward

    tuned, tokenizer = model(step)
    tokenizer.padding_side = "left"
    questions, lines = rows()[1], []
    for start in range(0, len(questions), 16):
        batch = questions[start : start + 16]
        chats = [[{"role": "user", "content": prompt(row)}] for row in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            outputs = tuned.generate(
                **inputs, do_sample=False, max_new_tokens=SETTINGS["max_new_tokens"], pad_token_id=2
            )
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(batch, texts, strict=True):
            parts = Reward(name="ao", variant="graded").parts(row, text)
            line = {"step": step, "id": row["id"], "gold": row["gold_pids"][0], "reward": sum(parts.values())}  # type: ignore[arg-type]
            line["correct_format"] = float((parts["form"] or 0) > 0)
            lines.append({**line, **answer_metrics(text, row["answers"])})
    SCORES.mkdir(exist_ok=True)
    with (SCORES / "held_out.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def learn() -> None:
    """Train for MINUTES."""
    import shutil

    from peft import LoraConfig

    from lceval.training.grpo import Grpo, train

    base, tokenizer = model(0)
    result = train(
        model=base,
        tokenizer=tokenizer,
        rows=rows()[0],
        grpo=Grpo(**SETTINGS, max_steps=STEPS),
        output=OUTPUT,
        lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        resume=True,
        minutes=MINUTES,
    )
    names = ["step", "reward", "reward_std", "frac_reward_zero_std", "parts/answer", "parts/form", "kl", "entropy"]
    names += ["loss", "grad_norm", "completions/mean_length", "completions/clipped_ratio", "step_time"]
    lines = [{name: line[name] for name in names} for line in result.history if "loss" in line]
    SCORES.mkdir(exist_ok=True)
    (SCORES / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ignored = shutil.ignore_patterns("step-*", "checkpoints", "*.jsonl")
    shutil.copytree(OUTPUT, OUTPUT / f"step-{result.steps}", ignore=ignored)


def read(name: str) -> list[dict[str, Any]]:
    """Lines of a committed file; empty if it does not exist."""
    file = SCORES / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def step() -> bool:
    """Run the next part; returns False when all are done."""
    measured = {line["step"] for line in read("held_out")}
    if 0 not in measured:
        evaluate(0)
        return True
    done = max((line["step"] for line in read("steps")), default=0)
    if done < STEPS:
        learn()
        done = read("steps")[-1]["step"]
    if done not in measured:
        evaluate(done)
    return bool(done < STEPS)


def table() -> str:
    """Held-out scores at every evaluated step and their change; paired by question, intervals over gold passages."""
    scores = read("held_out")
    steps = sorted({row["step"] for row in scores})
    by_step = {step: {row["id"]: row for row in scores if row["step"] == step} for step in steps}
    lines = ["| greedy, held out | n | " + " | ".join(METRICS.values()) + " |"]
    lines.append("| --- |" + " ---: |" * (len(METRICS) + 1))
    for step, rows in by_step.items():
        cells = [f"{mean(row[metric] for row in rows.values()):.3f}" for metric in METRICS]
        lines.append(f"| step {step} | {len(rows)} | {' | '.join(cells)} |")
    for step in steps[1:]:
        cells = []
        for metric in METRICS:
            values = [row[metric] - by_step[0][key][metric] for key, row in by_step[step].items()]
            if not any(values):
                cells.append("0")
                continue
            middle, low, high = cluster_bootstrap(values, [row["gold"] for row in by_step[step].values()])
            cells.append(f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| step {step} - step 0 | {len(by_step[step])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table() -> str:
    """Metrics logged in training, averaged over STEPS_PER_ROW steps; empty before the first step."""
    history = read("steps")
    if not history:
        return ""
    lines = ["| training steps | " + " | ".join(TRAINING.values()) + " |", "| --- |" + " ---: |" * len(TRAINING)]
    for start in range(0, len(history), STEPS_PER_ROW):
        steps = history[start : start + STEPS_PER_ROW]
        cells = [f"{mean(step[name] for step in steps):.3g}" for name in TRAINING]
        lines.append(f"| {steps[0]['step']}-{steps[-1]['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables() -> str:
    """All tables of the tables page."""
    return f"## Held-out questions\n\n{table()}\n\n## Training\n\n{training_table()}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        print("more to do" if step() else "done")
    elif sys.argv[1:] == ["table"]:
        TABLES.write_text(TABLES.read_text().partition(MARK)[0] + MARK + tables())
    else:
        raise SystemExit(__doc__)
