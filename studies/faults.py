"""Runs killed at random moments, and processes that run for long: the figures of docs/faults.md.

python studies/faults.py kill [N]          kill and resume N sweeps (default 100); resumes at the next one
python studies/faults.py soak [MINUTES]    four lcft processes for so many minutes (default 20)
python studies/faults.py table             print both summaries

Both append to a JSON Lines file beside this script. Neither needs a network, a GPU or data.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from lceval import packaged
from lceval.analysis.table import main as table_text
from lceval.cli import invoke
from lceval.core.io import read_objects
from lceval.records.responses import Responses
from lceval.runs.folder import opened
from lceval.runs.runner import Runner

HERE = Path(__file__).parent
KILLED, SOAKED = HERE / "faults-killed.jsonl", HERE / "faults-soak.jsonl"
RECIPES = ("full", "snapkv:0.5", "streaming:0.25+int8")
SAMPLES, PROCESSES = 8, 4
TIMES = ("prefill_s", "prefill_tok_s", "decode_tok_s")


def tiny_model(folder: Path) -> Path:
    """A random Llama of two layers with the packaged model's tokenizer: a run of it takes a second."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.from_pretrained(packaged.folder(), **shape, num_key_value_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged.folder()).save_pretrained(folder)
    return folder


def sweep(model: Path, output: Path) -> list[str]:
    grid = output.with_suffix(".yaml")
    grid.parent.mkdir(parents=True, exist_ok=True)
    grid.write_text(
        json.dumps(
            {
                "models": [str(model)],
                "recipes": RECIPES,
                "tasks": ["lc_filings_ao_1k"],
                "limit": SAMPLES,
                "gen_kwargs": {"max_gen_toks": 8},
            }
        )
    )
    return ["sweep", str(grid), "--output_path", str(output)]


def forked(work: Callable[[], int], log: Path) -> int:
    """Start `work` in a child process with its output in `log`; returns the process id."""
    if process := os.fork():
        return process
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        os._exit(work())
    finally:
        os._exit(70)


def counted(argv: Sequence[str], answers: Path) -> Callable[[], int]:
    """A command line that also appends the request of every answer to a file, before the answer is stored."""

    def work() -> int:
        store = Responses.add_partial
        with answers.open("ab", buffering=0) as out:

            def add_partial(self: Responses, method: str, args: Any, response: Any) -> None:
                request = [str(self._path.parent.name), method, str(args[0])]
                out.write(json.dumps(request).encode() + b"\n")
                store(self, method, args, response)

            Responses.add_partial = add_partial  # type: ignore[method-assign]
            return invoke(list(argv))

    return work


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads(table_text([folder], "json"))["rows"]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def responses_of(folder: Path) -> dict[str, list[Any]]:
    return {
        file.parent.name: [row["filtered_resps"] for _, row in read_objects(file)]
        for file in sorted(folder.glob("*/samples_*.jsonl"))
    }


def integrity(file: Path) -> str:
    """SQLite's own verdict on a file: ok, or what is wrong."""
    with closing(sqlite3.connect(file)) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


def damaged(folder: Path) -> list[str]:
    """What is wrong with the stored answers of a sweep: a broken file, a missing answer or one stored twice."""
    faults = []
    for file in sorted(folder.glob("*/responses.sqlite")):
        check = integrity(file)
        with closing(sqlite3.connect(file)) as db:
            count, repeated = db.execute("SELECT count(*), max(place) FROM response").fetchone()
        if (check, count, repeated) != ("ok", SAMPLES, 0):
            faults.append(f"{file.parent.name}: {check}, {count} answers, place {repeated}")
    left = [str(file.relative_to(folder)) for file in folder.rglob(".*") if file.name != ".lock"]
    return faults + [f"left over: {name}" for name in left]


def kill(trials: int) -> None:
    done = len(list(read_objects(KILLED))) if KILLED.exists() else 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        # In a child: a process that has run torch cannot be forked.
        os.waitpid(forked(lambda: int(not tiny_model(root / "model")), root / "log"), 0)
        start = time.monotonic()
        whole = root / "whole" / "sweep"
        _, status = os.waitpid(forked(lambda: invoke(sweep(root / "model", whole)), root / "log"), 0)
        assert status == 0, (root / "log").read_text()
        seconds = time.monotonic() - start
        expected = rows_of(whole), responses_of(whole)
        for trial in range(done, trials):
            draw, folder = random.Random(trial), root / str(trial) / "sweep"
            argv, answers, moments = sweep(root / "model", folder), root / str(trial) / "answers.jsonl", []
            for _ in range(draw.choice([1, 1, 2, 3])):
                process = forked(counted(argv, answers), root / str(trial) / "log")
                moments.append(draw.uniform(0, seconds))
                time.sleep(moments[-1])
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            _, status = os.waitpid(forked(counted(argv, answers), root / str(trial) / "log"), 0)
            times = Counter(line for line in answers.read_text().splitlines())
            record = {
                "trial": trial,
                "killed_after_s": [round(moment, 3) for moment in moments],
                "exit_code": os.waitstatus_to_exitcode(status),
                "table_equal": rows_of(folder) == expected[0],
                "answers_equal": responses_of(folder) == expected[1],
                "answers": len(times),
                "generated_twice": sum(times.values()) - len(times),
                "faults": damaged(folder),
            }
            append(KILLED, record)
            print(record, file=sys.stderr)


def keep_running(index: int, root: Path, end: float) -> int:
    """Evaluate the recipes again and again with one loaded model, and append the process's memory after each time."""
    runner, start, cycle = Runner(), time.monotonic(), 0
    while time.monotonic() < end:
        common = ["--model=lcft", "--tasks=lc_filings_ao_1k", "--limit=4", "--gen_kwargs=max_gen_toks=8"]
        with ExitStack() as folders:
            runs = [
                folders.enter_context(
                    opened(
                        [
                            *common,
                            f"--model_args=pretrained=smollm2-135m,kv={kv}",
                            f"--output_path={root / str(index) / str(cycle) / kv.replace(':', '-')}",
                        ]
                    )
                )
                for kv in RECIPES
            ]
            errors = [str(outcome) for outcome in runner.evaluate(runs) if isinstance(outcome, Exception)]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        rss_mb = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
        seconds = round(time.monotonic() - start, 1)
        append(SOAKED, {"process": index, "cycle": cycle, "s": seconds, "rss_mb": rss_mb, "errors": errors})
        cycle += 1
    return 0


def soak(minutes: float) -> None:
    SOAKED.unlink(missing_ok=True)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        children = [forked(partial(keep_running, index, root, end), root / f"log{index}") for index in range(PROCESSES)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        folders = sorted(root.glob("*/*/*"))
        unfinished = [f for f in folders if json.loads((f / "run.json").read_text())["status"] != "finished"]
        broken = [f for f in folders if integrity(f / "responses.sqlite") != "ok"]
        scores = {(folder.name, rows_of(folder)[0]["score"]) for folder in folders}
    append(
        SOAKED,
        {
            "exit_codes": codes,
            "runs": len(folders),
            "damaged": len({*unfinished, *broken}),
            "scores": len(scores),
        },
    )


def append(file: Path, record: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(record) + "\n")


def table() -> str:
    """The summaries, as sentences of figures."""
    lines = []
    if KILLED.exists():
        rows = [row for _, row in read_objects(KILLED)]
        kills = sum(len(row["killed_after_s"]) for row in rows)
        lines += [
            f"{len(rows)} sweeps of {len(RECIPES)} recipes and {SAMPLES} samples, killed {kills} times: "
            f"{sum(row['exit_code'] == 0 for row in rows)} finished, "
            f"{sum(row['table_equal'] for row in rows)} tables and {sum(row['answers_equal'] for row in rows)} sets of "
            f"answers equal to those of an unbroken sweep, {sum(bool(row['faults']) for row in rows)} with a "
            f"fault in its folder (an answer damaged, missing or repeated, or a file left over), "
            f"{sum(row['generated_twice'] for row in rows)} answers generated twice."
        ]
    if SOAKED.exists():
        *rows, end = (row for _, row in read_objects(SOAKED))
        for process in range(PROCESSES):
            rss = [row["rss_mb"] for row in rows if row["process"] == process]
            first, last = rss[len(rss) // 4 : len(rss) // 2], rss[3 * len(rss) // 4 :]
            lines.append(
                f"process {process}: {len(rss)} times {len(RECIPES)} runs in {rows[-1]['s'] / 60:.0f} minutes, "
                f"RSS {statistics.mean(first):.0f} MB in the second quarter, {statistics.mean(last):.0f} MB in the last"
            )
        lines.append(
            f"{end['runs']} runs, {end['damaged']} damaged, {sum(len(row['errors']) for row in rows)} with an error, "
            f"{end['scores']} different scores of {len(RECIPES)} recipes; exit codes {end['exit_codes']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["table"]
    if command == "kill":
        kill(int(rest[0]) if rest else 100)
    elif command == "soak":
        soak(float(rest[0]) if rest else 20)
    print(table())
