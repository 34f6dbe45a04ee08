"""The study of modes.md: fine-tuning for ids, ids with contents, ids with quotes, and reasoning with citations.

python docs/studies/modes.py train [MODE …]      trains an adapter a mode; goes on where it stopped
python docs/studies/modes.py answer [MODE …]     base and adapter answer held-out questions; goes on where it stopped
python docs/studies/modes.py table               writes the table of modes.md anew from the committed samples

MODE is id, idc, idq or rj. Committed are scores, none of the outputs' text; adapters go to runs/studies/modes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lceval.stats import cluster_bootstrap

SAMPLES = Path(__file__).parent / "modes"
RUNS = Path("runs/studies/modes")
MODES = ("id", "idc", "idq", "rj")
LIMIT, METADATA = 80, {"split": "test", "questions": 5}
# At most; ids have less room by themselves.
NEW_TOKENS, ROOM = 256, {"id": 96}
# Thousands of tokens; copies of whole documents take their room from the context's.
LENGTH = {"idc": 2}
JUDGED = ("judge_reasoning", "judge_grounding", "judge_correct")
METRICS = ("subem", "ids_f1", "ids_exact", "content", "quotes", *JUDGED, "parse_rate", "ids_rate")
MARK = "<!-- the table of the committed samples -->\n"


def recipe(mode: str) -> dict[str, Any]:
    """40 steps of two contexts with four questions each."""
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
    """One adapter."""
    from lceval.training.config import parse
    from lceval.training.run import train as run

    record = run(parse(recipe(mode), mode))
    kept = {key: record[key] for key in ("recipe", "data", "parameters", "wall_s", "losses")}
    SAMPLES.mkdir(exist_ok=True)
    (SAMPLES / f"{mode}-train.json").write_text(json.dumps(kept) + "\n")


def answer(mode: str) -> None:
    """Greedy answers of base and adapter to the same questions, by `lceval run`; rj is judged by rules."""
    for name in ("base", "tuned"):
        folder = RUNS / f"{mode}-{name}"
        adapter = f",peft={RUNS / mode},merge=True" if name == "tuned" else ""
        line = ["run", "--model", "lcft", f"--model_args=pretrained=smollm2-135m,dtype=bfloat16{adapter}"]
        line += [f"--tasks=lc_squad_{mode}_{LENGTH.get(mode, 1)}k", f"--metadata={json.dumps(METADATA)}"]
        line += [f"--limit={LIMIT}", "--batch_size=5", f"--gen_kwargs=max_gen_toks={ROOM.get(mode, NEW_TOKENS)}"]
        line += [f"--output_path={folder}"]
        subprocess.run([sys.executable, "-m", "lceval", *line], check=True, env={**os.environ, "LCEVAL_JUDGE": "rule"})
        (samples,) = folder.glob("samples_*.jsonl")
        rows = []
        for row in map(json.loads, samples.read_text().splitlines()):
            scores = {metric: row[metric] for metric in METRICS if metric in row}
            rows.append({"id": row["doc"]["id"], "cluster": row["doc"]["cluster"], **scores})
        text = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: str(row["id"])))
        SAMPLES.mkdir(exist_ok=True)
        (SAMPLES / f"{mode}-{name}.jsonl").write_text(text)


def read(mode: str, name: str) -> dict[str, dict[str, Any]]:
    """The committed scores of a model's answers, by question."""
    lines = (SAMPLES / f"{mode}-{name}.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def interval(values: list[float], clusters: list[str], sign: str = "") -> str:
    """A mean in % with its interval, by context; alone where no question differs from another."""
    middle, low, high = (100 * x for x in cluster_bootstrap(values, clusters))
    return f"{middle:{sign}.1f}" + ("" if math.isnan(low) else f" [{low:{sign}.1f}, {high:{sign}.1f}]")


def table() -> str:
    """Every metric of a mode: base, adapter, and their difference, paired by question."""
    lines = ["| mode | metric | n | base | tuned | tuned - base |", "| --- | --- |" + " ---: |" * 4]
    for mode in MODES:
        base, tuned = read(mode, "base"), read(mode, "tuned")
        for metric in METRICS:
            # A score is None where there is nothing to score: no verdict.
            known = [key for key in base if None not in (base[key].get(metric), tuned[key].get(metric))]
            if known:
                clusters = [base[key]["cluster"] for key in known]
                scores = [[float(rows[key][metric]) for key in known] for rows in (base, tuned)]
                gain = [after - before for before, after in zip(*scores, strict=True)]
                cells = [*(interval(values, clusters) for values in scores), interval(gain, clusters, "+")]
                lines.append(f"| {mode} | {metric} | {len(known)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command, wanted = sys.argv[1:2], sys.argv[2:] or list(MODES)
    if command in (["train"], ["answer"]) and set(wanted) <= set(MODES):
        for mode in wanted:
            (train if command == ["train"] else answer)(mode)
    elif sys.argv[1:] == ["table"]:
        page = SAMPLES.with_suffix(".md")
        page.write_text(page.read_text().partition(MARK)[0] + MARK + table() + "\n")
    else:
        raise SystemExit(__doc__)
