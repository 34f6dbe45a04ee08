"""lceval against kvpress, end to end, on the same prompts, method and budget.

    python tests/peers/race.py PEER_PYTHON --kv snapkv:0.25 --task lc_filings_ao_1k --contexts 4

PEER_PYTHON is the path printed by tests/peers/make_env.sh. Both sides prefill each context, compress it and answer its
questions greedily, one at a time, up to the same number of tokens or the end of the turn. One JSON object goes to
stdout: seconds of both (without model loading), their ratio, and the number of identical answers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lceval import packaged
from lceval.bench.comparison import requests_of
from lceval.models.lcft import LCFT
from lceval.models.prefix import Job
from lceval.models.recipe import parse


def jobs_of(model: LCFT, task: str, contexts: int, new_tokens: int) -> list[dict[str, Any]]:
    """The task's first contexts with their questions, as token ids."""
    _, every = requests_of(task, packaged.NAME, model, template=True)
    jobs = []
    for requests in (context.requests for context in every[:contexts]):
        group = [Job(**model._split(0, request, model.tok_encode(request.args[0]))) for request in requests]
        questions = [list(job.question) for job in group]
        jobs.append({"context": list(group[0].context), "questions": questions, "max_new_tokens": new_tokens})
    return jobs


def ours(model: LCFT, kv: str, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds, KV bytes and answers of lceval."""
    recipe = parse(kv)
    answers, stored = [], 0
    start = time.perf_counter()
    for job in jobs:
        context = model.engine.prefill(job["context"], recipe.stats_spec).compress(recipe, consume=True)
        stored = max(stored, context.allocated_bytes)
        for question in job["questions"]:
            cache = context.fork(len(question) + job["max_new_tokens"], kernels=model.engine.kernels)
            ids = torch.tensor([[*job["context"], *question]], device=model.device)
            out = model.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                cache=cache,
                max_new_tokens=job["max_new_tokens"],
                do_sample=False,
                pad_token_id=model.tokenizer.pad_token_id,
            )
            answers.append(out[0, ids.shape[1] :].tolist())
    return {"seconds": time.perf_counter() - start, "kv_bytes": stored, "answers": answers}


def theirs(python: str, kv: str, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The same of kvpress."""
    name, keep, *_ = kv.split(":")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "jobs.json")
        file.write_text(json.dumps(jobs))
        script = Path(__file__).with_name("kvpress_eval.py")
        threads = ["--threads", str(torch.get_num_threads()), "--warmup", "1"]
        command = [python, str(script), str(packaged.folder()), str(file), "--press", name, "--keep", keep, *threads]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


def until_end(ids: list[int], ends: set[int]) -> list[int]:
    """An answer up to the end of its turn."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def main() -> None:
    """Run both sides and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("--kv", default="snapkv:0.25")
    parser.add_argument("--task", default="lc_filings_ao_1k")
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    chosen = parser.parse_args()
    model = LCFT(packaged.NAME, device="cpu")
    jobs = jobs_of(model, chosen.task, chosen.contexts, chosen.new_tokens)
    with torch.inference_mode():
        ours(model, chosen.kv, [{**jobs[0], "max_new_tokens": 2}])
        rounds = [(ours(model, chosen.kv, jobs), theirs(chosen.python, chosen.kv, jobs)) for _ in range(chosen.rounds)]
    ends = {model.eot_token_id}
    mine, peer = rounds[0]
    peer_answers = [answer["ids"] for result in peer["jobs"] for answer in result["answers"]]
    same = [until_end(a, ends) == until_end(b, ends) for a, b in zip(mine["answers"], peer_answers, strict=True)]
    print(
        json.dumps(
            {
                "bench": "kvpress",
                "kv": chosen.kv,
                "task": chosen.task,
                "contexts": len(jobs),
                "questions": len(same),
                "context_tokens": [len(job["context"]) for job in jobs],
                "seconds": [ours["seconds"] for ours, _ in rounds],
                "seconds_kvpress": [peer["seconds"] for _, peer in rounds],
                "speedup_vs_kvpress": min(p["seconds"] for _, p in rounds) / min(o["seconds"] for o, _ in rounds),
                "kv_bytes": mine["kv_bytes"],
                "kv_bytes_kvpress": peer["kv_bytes"],
                "same_answers": sum(same),
                "peer_errors": [result["error"] for result in peer["jobs"] if result["error"]],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
