"""`lceval train RECIPE`: estimate a run (`--dry-run`), or train and summarize it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lceval.training.config import read
from lceval.training.trainers import is_lead


def run(recipe: str, overrides: Sequence[str], output: Path | None, *, dry_run: bool, as_json: bool) -> str:
    """The text for stdout; empty unless this is the main process.

    Raises:
        UserError: invalid recipe, or the output folder contains a run of another one.
    """
    config = read(recipe, [*overrides, *([f"output={output}"] if output else [])])
    if dry_run:
        from lceval.training.dry_run import estimate, render

        report = estimate(config)
        return json.dumps(report, indent=2) if as_json else render(report)
    from lceval.adapt.graders import configured
    from lceval.training.train import train

    judged = config.grpo is not None and config.grpo.reward_function.judged
    with configured() if judged else nullcontext() as grader:
        record = train(config, grader)
    if not is_lead():
        return ""
    return json.dumps({"output": str(config.output), **record}, indent=2) if as_json else render_record(config, record)


def render_record(config: Any, record: dict[str, Any]) -> str:
    """A finished run as text."""
    losses = [loss for _, loss in record["losses"]]
    lines = [
        f"{config.output}: {record['data']['questions']} questions on {record['data']['contexts']} contexts, "
        f"{len(losses)} steps, {record['parameters']:,} parameters, {record['wall_s'] / 60:.1f} min",
        _trend("loss", losses, "mean of the first"),
    ]
    if rewards := [reward for _, reward in record.get("rewards", ())]:
        lines.append(_trend("reward", rewards, "first"))
    lines += [f"held-out loss {loss:.3f} at step {step}" for step, loss in record["eval_losses"]]
    lines.append(f"next: lceval train eval {config.output}")
    return "\n".join(lines)


def _trend(name: str, values: Sequence[float], of_first: str) -> str:
    first, last = values[:10], values[-10:]
    means = sum(first) / len(first), sum(last) / len(last)
    return f"{name} {means[0]:.3f} ({of_first} {len(first)} steps) -> {means[1]:.3f} (last {len(last)})"
