"""The model card of a trained adapter: what it learned from what, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md`, with the front matter that hubs read."""
    recipe, data, optim = record["recipe"], record["data"], record["recipe"]["optim"]
    said = recipe["data"]
    base, name = recipe["model"]["pretrained"], output.name
    first, last = record["losses"][:10], record["losses"][-10:]
    lines = [
        "---",
        f"base_model: {base}",
        f"library_name: {'peft' if recipe['lora'] else 'transformers'}",
        "tags: [lceval, long-context, kv-cache]",
        "---",
        f"# {name}",
        f"{base}, fine-tuned by `lceval train` to answer from its context (modes: {', '.join(said['modes'])}).",
        "",
        f"- Data: {', '.join(said['datasets'])}, split {said['split']}: {data['questions']:,} questions on "
        f"{data['contexts']:,} contexts of {data['tokens_a_context']:,.0f} tokens (digest {data['digest']}).",
        f"- Trained: {record['parameters']:,} parameters, {optim['steps']} steps of {optim['contexts']} contexts, "
        f"{record['wall_s'] / 60:.1f} minutes.",
        f"- Loss: {_mean(first):.3f} over the first {len(first)} steps, {_mean(last):.3f} over the last {len(last)}.",
        *[
            f"- Reward {recipe['grpo']['reward']}: {_mean(record['rewards'][:10]):.3f} over the first steps, "
            f"{_mean(record['rewards'][-10:]):.3f} over the last."
            for _ in record.get("rewards", ())[:1]
        ],
        *[f"- Held-out loss after step {step}: {loss:.3f}." for step, loss in record["eval_losses"][-1:]],
        "",
        "```",
        f"lm_eval --model lcft --model_args pretrained={base},{'peft=' if recipe['lora'] else ''}{output} "
        f"--tasks lc_{said['datasets'][0]}_{said['modes'][0]}_{said['length_k']:g}k "
        "--metadata split=test --apply_chat_template",
        "```",
        "",
        "Recipe:",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
    ]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _mean(curve: list[list[float]]) -> float:
    return sum(value for _, value in curve) / len(curve)
