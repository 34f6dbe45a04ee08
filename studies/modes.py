"""The study of docs/studies/modes.md: fine-tuning for document ids, ids with content, ids with quotes, and reasoning.

python studies/modes.py train [MODE …]      train one adapter per mode
python studies/modes.py answer [MODE …]     generate answers of base and adapter to held-out questions
python studies/modes.py table               rewrite docs/studies/modes-tables.md from the committed scores

MODE is id, idc, idq or rj. Rerun the same command to resume. Scores are committed, output texts are not; adapters are
written to runs/studies/modes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lceval.stats.estimates import cluster_bootstrap

SAMPLES = Path(__file__).parent / "modes"
TABLES = Path(__file__).parents[1] / "docs" / "studies" / "modes-tables.md"
RUNS = Path("runs/studies/modes")
MODES = ("id", "idc", "idq", "rj")
LIMIT, METADATA = 80, {"split": "test", "questions": 5}
# Maximum new tokens, and the modes that need fewer.
NEW_TOKENS, FEWER_NEW_TOKENS = 256, {"id": 96}
# Context length in thousands of tokens, if not 1: `idc` copies whole documents into the output.
LENGTH = {"idc": 2}
JUDGED = ("judge_reasoning", "judge_grounding", "judge_correct")
METRICS = ("subem", "ids_f1", "ids_exact", "content", "quotes", *JUDGED, "parse_rate", "ids_rate")
MARK = "<!-- the table of the committed samples -->\n"


def recipe(mode: str) -> dict[str, Any]:
    """Training recipe: 40 steps of two contexts with four questions each."""
    return {
        "output": str(RUNS / mode),
        "model": {"pretrained": "smollm2-135m", "dtype": "bfloat16"},
        "data": {
            "datasets": ["squad"],
            "modes": [mode],
            "length_k": LENGTH.get(mode, 1),
            "split": "train",
            "questions": 4,
            "seeds": [1, 2],
        },
        "optim": {"learning_rate": 5e-4, "max_steps": 40, "contexts_per_step": 2},
        "save_steps": 10,
    }


def train(mode: str) -> None:
    """Train one adapter."""
    from lceval.training.config import parse
    from lceval.training.train import train as run

    record = run(parse(recipe(mode), mode))
    committed = {key: record[key] for key in ("recipe", "data", "parameters", "wall_s", "losses")}
    SAMPLES.mkdir(exist_ok=True)
    (SAMPLES / f"{mode}-train.json").write_text(json.dumps(committed) + "\n")


def answer(mode: str) -> None:
    """Greedy answers of base and adapter to the same questions with `lceval run`; the judge `rule` grades rj."""
    for name in ("base", "tuned"):
        folder = RUNS / f"{mode}-{name}"
        adapter = f",peft={RUNS / mode},merge=True" if name == "tuned" else ""
        arguments = ["run", "--model", "lcft", f"--model_args=pretrained=smollm2-135m,dtype=bfloat16{adapter}"]
        arguments += [f"--tasks=lc_squad_{mode}_{LENGTH.get(mode, 1)}k", f"--metadata={json.dumps(METADATA)}"]
        new_tokens = FEWER_NEW_TOKENS.get(mode, NEW_TOKENS)
        arguments += [f"--limit={LIMIT}", "--batch_size=5", f"--gen_kwargs=max_gen_toks={new_tokens}"]
        arguments += [f"--output_path={folder}"]
        env = {**os.environ, "LCEVAL_JUDGE": "rule"}
        subprocess.run([sys.executable, "-m", "lceval", *arguments], check=True, env=env)
        (samples,) = folder.glob("samples_*.jsonl")
        rows = []
        for row in map(json.loads, samples.read_text().splitlines()):
            scores = {metric: row[metric] for metric in METRICS if metric in row}
            rows.append({"id": row["doc"]["id"], "cluster": row["doc"]["cluster"], **scores})
        text = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: str(row["id"])))
        SAMPLES.mkdir(exist_ok=True)
        (SAMPLES / f"{mode}-{name}.jsonl").write_text(text)


def read(mode: str, name: str) -> dict[str, dict[str, Any]]:
    """Committed scores of a model's answers, by question."""
    lines = (SAMPLES / f"{mode}-{name}.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def interval(values: list[float], clusters: list[str], sign: str = "") -> str:
    """Mean in % with its 95% interval over contexts; the mean alone where the interval is undefined."""
    middle, low, high = (100 * x for x in cluster_bootstrap(values, clusters))
    return f"{middle:{sign}.1f}" + ("" if math.isnan(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]")


def table() -> str:
    """All metrics of a mode: base, adapter, and their difference, paired by question."""
    lines = ["| mode | metric | n | base | fine-tuned | Δ vs base |", "| --- | --- |" + " ---: |" * 4]
    for mode in MODES:
        base, tuned = read(mode, "base"), read(mode, "tuned")
        for metric in METRICS:
            # A score is None where there is no verdict.
            known = [key for key in base if None not in (base[key].get(metric), tuned[key].get(metric))]
            if known:
                clusters = [base[key]["cluster"] for key in known]
                scores = [[float(rows[key][metric]) for key in known] for rows in (base, tuned)]
                gain = [after - before for before, after in zip(*scores, strict=True)]
                cells = [*(interval(values, clusters) for values in scores), interval(gain, clusters, "+")]
                lines.append(f"| {mode} | {metric} | {len(known)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command, selected = sys.argv[1:2], sys.argv[2:] or list(MODES)
    if command in (["train"], ["answer"]) and set(selected) <= set(MODES):
        for mode in selected:
            (train if command == ["train"] else answer)(mode)
    elif sys.argv[1:] == ["table"]:
        TABLES.write_text(TABLES.read_text().partition(MARK)[0] + MARK + table() + "\n")
    else:
        raise SystemExit(__doc__)
