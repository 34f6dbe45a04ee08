"""The model card of what was trained: what it learned from what, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md`, with the front matter that hubs read."""
    recipe, optim, grpo = record["recipe"], record["recipe"]["optim"], record["recipe"]["grpo"]
    first, last = record["losses"][:10], record["losses"][-10:]
    dtype, minutes = recipe["model"]["dtype"], record["wall_s"] / 60
    steps = (
        f"{grpo['max_steps']} steps of {grpo['prompts_per_step']} prompts" if grpo else f"{optim['max_steps']} steps"
    )
    lines = [
        "---",
        f"base_model: {recipe['model']['pretrained']}",
        f"library_name: {'peft' if loads_as(record) == 'peft' else 'transformers'}",
        "tags: [lceval, long-context, kv-cache]",
        "---",
        f"# {output.name}",
        f"{recipe['model']['pretrained']}, fine-tuned by `lceval train`.",
        "",
        f"- Data: {_data(recipe, record['data'])}",
        f"- Trained: {record['parameters']:,} parameters, {steps}, {minutes:.1f} minutes; weights in {dtype}.",
        f"- Loss: {_mean(first):.3f} over the first {len(first)} steps, {_mean(last):.3f} over the last {len(last)}.",
    ]
    if rewards := record.get("rewards"):
        lines.append(
            f"- Reward {grpo['reward']}: {_mean(rewards[:10]):.3f} at first, {_mean(rewards[-10:]):.3f} at last."
        )
    lines += [f"- Held-out loss after step {step}: {loss:.3f}." for step, loss in record["eval_losses"][-1:]]
    lines += ["", "```", _line(output, record), "```", "", "Recipe:", "```json", json.dumps(recipe, indent=1), "```"]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def loads_as(record: Mapping[str, Any]) -> str:
    """The model argument that loads what was trained: `peft` or `pretrained`."""
    return str(record.get("loads_as") or ("peft" if record["recipe"]["lora"] else "pretrained"))


def _data(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """What it learned from."""
    if recipe["texts"]:
        files = ", ".join(Path(file).name for file in recipe["texts"]["files"])
        what = f"{files}: {data['contexts']:,} sequences"
    else:
        tables, rows, said = recipe["neighbourhoods"], recipe["rows"], recipe["data"]
        name = Path(rows).name if rows else ", ".join((tables or said)["datasets"])
        side = "" if tables or rows else f" (split {said['split']}, modes {', '.join(said['modes'])})"
        what = f"{name}{side}: {data['questions']:,} questions on {data['contexts']:,} contexts"
    return f"{what} of {data['tokens_a_context']:,.0f} tokens (digest {data['digest']})."


def _line(output: Path, record: Mapping[str, Any]) -> str:
    """How to evaluate it."""
    recipe, said = record["recipe"], record["recipe"]["data"]
    folder = output / record["model"] if "model" in record else output
    base = f"pretrained={recipe['model']['pretrained']},peft={folder}"
    model = base if loads_as(record) == "peft" else f"pretrained={folder}"
    plain = recipe["texts"] or recipe["neighbourhoods"] or recipe["rows"]
    task = "lc_icr" if plain else f"lc_{said['datasets'][0]}_{said['modes'][0]}"
    return f"lm_eval --model lcft --model_args {model} --tasks {task} --apply_chat_template"


def _mean(curve: list[list[float]]) -> float:
    return sum(value for _, value in curve) / len(curve)
