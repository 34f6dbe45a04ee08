"""The study of grpo.md: GRPO of the packaged model on short contexts, and what held-out questions say of it.

python docs/studies/grpo.py run      the next piece: MINUTES of training and the held-out questions; until it says done
python docs/studies/grpo.py table    prints the tables of grpo.md from the committed files

Committed are ids and scores, none of the questions' or outputs' text. Adapter and samples stay in runs/grpo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from lceval.stats import cluster_bootstrap

KEPT = Path(__file__).parent / "grpo"
OUTPUT = Path("runs/grpo")
STEPS, MINUTES = 24, 6.0
SHOWN = 4  # steps in a row of the table
HELD_OUT = 80
WORDS = 110  # of the gold passage, at most: with one more it makes contexts of about 300 tokens
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
SCORES = ("reward", "form", "subem", "subem_raw", "f1")


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Questions on their gold passage and one other: to train on, and held out; the two share no gold passage."""
    import random

    from lceval.models import packaged
    from lceval.tasks import catalogue
    from lceval.tasks.build import rows_of
    from lceval.tasks.prompts import block

    made = []
    for row in rows_of(catalogue.find("lc_squad_ao_2k"), {"pretrained": packaged.resolve("smollm2-135m")}):
        rng = random.Random(row["id"])
        gold = [d for d in row["docs"] if d["pid"] in row["gold_pids"]]
        others = [d for d in row["docs"] if d["pid"] not in row["gold_pids"]]
        if not others or sum(len(d["text"].split()) for d in gold) > WORDS:
            continue
        docs = [*gold, min(others, key=lambda d: len(d["text"]))]
        rng.shuffle(docs)
        made.append({**row, "docs": docs, "context": block("documents", [d["text"] for d in docs])})
    golds = sorted({row["gold_pids"][0] for row in made})
    random.Random(0).shuffle(golds)
    aside = {*golds[: len(golds) // 3]}
    train = [row for row in made if row["gold_pids"][0] not in aside]
    held_out = [row for row in made if row["gold_pids"][0] in aside]
    return train, random.Random(1).sample(held_out, min(HELD_OUT, len(held_out)))


def model(step: int) -> tuple[Any, Any]:
    """The model with what it had learned by a step, and its tokenizer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lceval.models import packaged

    folder = packaged.folder()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = PeftModel.from_pretrained(base, str(OUTPUT / f"step-{step}")) if step else base
    return found, AutoTokenizer.from_pretrained(folder)


def evaluate(step: int) -> None:
    """Greedy answers to the held-out questions, and their scores."""
    import torch

    from lceval.tasks.prompts import prompt
    from lceval.tasks.scoring import answer_metrics
    from lceval.training.rewards import Reward

    tuned, tokenizer = model(step)
    tokenizer.padding_side = "left"
    asked, lines = rows()[1], []
    for start in range(0, len(asked), 16):
        some = asked[start : start + 16]
        chats = [[{"role": "user", "content": prompt(row)}] for row in some]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            said = tuned.generate(**given, do_sample=False, max_new_tokens=SETTINGS["max_new_tokens"], pad_token_id=2)
        texts = tokenizer.batch_decode(said[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(some, texts, strict=True):
            parts = Reward(name="ao", variant="graded").parts(row, text)
            line = {"step": step, "id": row["id"], "gold": row["gold_pids"][0], "reward": sum(parts.values())}  # type: ignore[arg-type]
            lines.append({**line, "form": float((parts["form"] or 0) > 0), **answer_metrics(text, row["answers"])})
    KEPT.mkdir(exist_ok=True)
    with (KEPT / "held_out.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def learn() -> None:
    """MINUTES of training."""
    import shutil

    from peft import LoraConfig

    from lceval.training.grpo import Grpo, train

    base, tokenizer = model(0)
    made = train(
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
    lines = [{name: line[name] for name in names} for line in made.history if "loss" in line]
    KEPT.mkdir(exist_ok=True)
    (KEPT / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ignored = shutil.ignore_patterns("step-*", "checkpoints", "*.jsonl")
    shutil.copytree(OUTPUT, OUTPUT / f"step-{made.steps}", ignore=ignored)


def read(name: str) -> list[dict[str, Any]]:
    """The lines of a committed file, none if it is not there yet."""
    file = KEPT / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def step() -> bool:
    """Do what is next; False if nothing is."""
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
    """Held-out scores before and after each piece; differences are paired by question, intervals by gold passage."""
    found = read("held_out")
    steps = sorted({line["step"] for line in found})
    by = {at: {line["id"]: line for line in found if line["step"] == at} for at in steps}
    lines = ["| greedy, held out | n | " + " | ".join(SCORES) + " |", "| --- |" + " ---: |" * (len(SCORES) + 1)]
    for at in steps:
        cells = [f"{mean(line[score] for line in by[at].values()):.3f}" for score in SCORES]
        lines.append(f"| step {at} | {len(by[at])} | {' | '.join(cells)} |")
    for at in steps[1:]:
        cells = []
        for score in SCORES:
            values = [line[score] - by[0][key][score] for key, line in by[at].items()]
            if not any(values):
                cells.append("0")
                continue
            middle, low, high = cluster_bootstrap(values, [line["gold"] for line in by[at].values()])
            cells.append(f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| step {at} - step 0 | {len(by[at])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def course() -> str:
    """The samples drawn in training; nothing before there are any."""
    found = read("steps")
    if not found:
        return ""
    names = ("reward", "parts/answer", "parts/form", "kl", "entropy", "completions/mean_length", "step_time")
    lines = ["| sampled, steps | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for start in range(0, len(found), SHOWN):
        some = found[start : start + SHOWN]
        cells = [f"{mean(line[name] for line in some):.3g}" for name in names]
        lines.append(f"| {some[0]['step']}-{some[-1]['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["run"]:
        print("more to do" if step() else "done")
    elif sys.argv[1:] == ["table"]:
        print(table(), course(), sep="\n\n")
    else:
        raise SystemExit(__doc__)
