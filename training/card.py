"""The model card of a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lceval.training.run_record import SCORER


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md` with front matter for the Hugging Face hub."""
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
        f"- Training: {record['parameters']:,} parameters, {steps}, {minutes:.1f} minutes; weights in {dtype}.",
        f"- Loss: {_mean(first):.3f} (mean of the first {len(first)} steps), {_mean(last):.3f} (last {len(last)}).",
    ]
    if rewards := record.get("rewards"):
        lines.append(
            f"- Reward {grpo['reward']}: {_mean(rewards[:10]):.3f} (mean of the first 10 steps), "
            f"{_mean(rewards[-10:]):.3f} (last 10)."
        )
    lines += [f"- Held-out loss at step {step}: {loss:.3f}." for step, loss in record["eval_losses"][-1:]]
    lines += ["", "```", _command(output, record), "```", "", "Recipe:", "```json", json.dumps(recipe, indent=1), "```"]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def loads_as(record: Mapping[str, Any]) -> str:
    """The model argument that loads the output: `peft` or `pretrained`."""
    return str(record.get("loads_as") or ("peft" if record["recipe"]["lora"] else "pretrained"))


def _data(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """The training data."""
    if recipe["texts"]:
        files = ", ".join(Path(file).name for file in recipe["texts"]["files"])
        text = f"{files}: {data['contexts']:,} sequences"
    else:
        tables, rows, data_spec = recipe["neighbourhoods"], recipe["rows"], recipe["data"]
        name = Path(rows).name if rows else ", ".join((tables or data_spec)["datasets"])
        split = "" if tables or rows else f" (split {data_spec['split']}, modes {', '.join(data_spec['modes'])})"
        text = f"{name}{split}: {data['questions']:,} questions on {data['contexts']:,} contexts"
    return f"{text} of {data['tokens_a_context']:,.0f} tokens (digest {data['digest']})."


def _command(output: Path, record: Mapping[str, Any]) -> str:
    """A command that evaluates the output."""
    recipe, data_spec = record["recipe"], record["recipe"]["data"]
    folder = output / record["model"] if "model" in record else output
    base = f"pretrained={recipe['model']['pretrained']},peft={folder}"
    base += f",kv=kvzap:0.25,scorer={folder / SCORER}" if "scorer" in record else ""
    model = base if loads_as(record) == "peft" else f"pretrained={folder}"
    other_data = recipe["texts"] or recipe["neighbourhoods"] or recipe["rows"]
    task = "lc_icr" if other_data else f"lc_{data_spec['datasets'][0]}_{data_spec['modes'][0]}"
    return f"lm_eval --model lcft --model_args {model} --tasks {task} --apply_chat_template"


def _mean(curve: list[list[float]]) -> float:
    return sum(value for _, value in curve) / len(curve)
