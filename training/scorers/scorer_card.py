"""The model card of a scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TARGETS = {
    "kvzip": "KVzip's score",
    "kvzip+": "KVzip+'s score",
    "attention": "the most attention that the questions and gold answers pay to a slot",
}


def write(output: Path, record: Mapping[str, Any]) -> None:
    """Write `README.md` with front matter for the Hugging Face hub."""
    recipe, scorer = record["recipe"], record["scorer"]
    model, adapter = recipe["model"]["pretrained"], recipe["model"]["peft"]
    kind = "linear maps" if scorer["hidden_dim"] is None else f"MLPs with {scorer['hidden_dim']} hidden units"
    under = f" under the adapter {adapter}" if adapter else ""
    lines = [
        "---",
        f"base_model: {model}",
        "tags: [lceval, long-context, kv-cache, kvzap]",
        "---",
        f"# {output.name}",
        f"Scorer of KV slots for {model}{under}, trained by `lceval train scorer`: {kind} from the attention input of "
        f"each of {scorer['n_modules']} layers to the logarithm of {TARGETS[recipe['target']]} in each KV head.",
        "",
        f"- Data: {_data(recipe, record['data'])}",
        f"- Size: {scorer['parameters']:,} parameters, {scorer['bytes'] / 1e3:,.0f} kB in 16 bit; "
        f"{record['wall_s'] / 60:.1f} minutes.",
        *(f"- {line}" for line in held_out(record)),
        "",
        "```",
        f"lceval run --model lcft --model_args pretrained={model}{f',peft={adapter}' if adapter else ''},"
        f"kv=kvzap:0.25,scorer={output} --tasks lc_icr --apply_chat_template --output_path runs/kvzap",
        "```",
        "",
        "Recipe:",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
    ]
    (output / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def held_out(record: Mapping[str, Any]) -> list[str]:
    """The figures on held-out contexts, a line each."""
    figures, contexts = record["held_out"], record["data"]["held_out"]
    overlaps = ", ".join(f"{share:.3f} at {budget}" for budget, share in figures["overlap"].items())
    return [
        f"Held out ({contexts} contexts): correlation with the target {figures['correlation']:.3f} "
        "(mean over layers and KV heads).",
        f"Of the slots that the target keeps, the scorer keeps {overlaps} (by chance the budget).",
    ]


def _data(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    spec, texts = recipe["data"], recipe["texts"]
    parts = [f"{', '.join(spec['datasets'])} (split {spec['split']})"] if spec else []
    parts += [Path(file).name for file in texts["files"]] if texts else []
    return (
        f"{', '.join(parts)}: {data['contexts']} contexts of {data['tokens_a_context']:,.0f} tokens, of which "
        f"{data['tokens_used']:,} were used (digest {data['digest']})."
    )
