"""`lceval train scorer RECIPE`: estimate a run (`--dry-run`), or train a scorer and summarize it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lceval.training.scorers.spec import read


def run(recipe: str, overrides: Sequence[str], output: Path | None, *, dry_run: bool, as_json: bool) -> str:
    """The text for stdout.

    Raises:
        UserError: invalid recipe, or the output folder contains a run of another one.
    """
    config = read(recipe, [*overrides, *([f"output={output}"] if output else [])])
    from lceval.training.scorers.learn import estimate, learn

    if dry_run:
        report = estimate(config)
        return json.dumps(report, indent=2) if as_json else "\n".join([*_size(report), _work(report)])
    record = {"output": str(config.output), **learn(config)}
    return json.dumps(record, indent=2) if as_json else _summary(record)


def _summary(record: Mapping[str, Any]) -> str:
    from lceval.training.scorers.scorer_card import held_out

    minutes = f"{record['output']}: trained in {record['wall_s'] / 60:.1f} min"
    return "\n".join([minutes, *_size({**record["data"], "scorer": record["scorer"]}), *held_out(record)])


def _size(report: Mapping[str, Any]) -> list[str]:
    scorer = report["scorer"]
    kind = "linear" if scorer["hidden_dim"] is None else f"hidden {scorer['hidden_dim']}"
    return [
        f"{report['contexts']} contexts of {report['tokens_a_context']:,.0f} tokens, {report['tokens_used']:,} tokens "
        f"used; {report['held_out']} contexts held out",
        f"{scorer['n_modules']} layers, {scorer['input_dim']} channels, {scorer['output_dim']} KV heads, {kind}: "
        f"{scorer['parameters']:,} parameters, {scorer['bytes'] / 1e3:,.0f} kB in 16 bit",
    ]


def _work(report: Mapping[str, Any]) -> str:
    return f"{report['work_bytes'] / 1e6:,.0f} MB of checkpoints in {report['output']}/work until it is finished"
