"""RULER rows under lceval and under kvpress: the same answers?

    python tests/peers/ruler.py answer OURS.jsonl            answer the rows of LCEVAL_DATA/ruler/4096.jsonl
    python tests/peers/ruler.py apart OURS.jsonl             qa_1 and qa_2, context and question tokenized apart
    python tests/peers/ruler.py compare OURS.jsonl THEIRS.jsonl
    python tests/peers/ruler.py fixture THEIRS.jsonl          write kvpress-0.5.5-ruler.json beside this file

THEIRS.jsonl is written by kvpress_ruler.py. Both sides prefill each row for each recipe and write every answer as it
arrives; rerun the same command to resume.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROWS = 2
# Side of kvpress_ruler.py -> recipe with the same budget.
RECIPES = {
    "full": "full",
    **{name: f"{name}:0.5:round=down" for name in ("snapkv", "knorm", "streaming", "keydiff", "tova")},
    "pyramidkv": "pyramidkv:0.5",  # both round to the nearest
    "adakv": "adakv:0.5:round=down",
    "adakv of expected_attention": "adakv:0.5:round=down:of=expected_attention:eps=0.01",
    "kvzip": "kvzip:0.5",
}
FIXTURE = Path(__file__).parent / "kvpress-0.5.5-ruler.json"


def read(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Answers by side and row."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {(row["side"], row["id"]): row for row in map(json.loads, lines)}


def answer(file: Path) -> None:
    """Answer the missing rows."""
    from lceval import packaged
    from lceval.models.lcft import LCFT
    from lceval.tasks import catalogue

    done = read(file)
    model = LCFT(packaged.NAME, device="cpu", dtype="float32")
    with file.open("a") as out:
        for task in catalogue.groups()["lc_ruler_4k"]:
            for request in requests(model, task):
                for side in RECIPES:
                    if (side, request.doc["id"]) in done:
                        continue
                    record = {"side": side, "id": request.doc["id"], **answered(model, side, request)}
                    out.write(json.dumps(record) + "\n")
                    out.flush()


def apart(file: Path) -> None:
    """Answer the rows whose context ends with two line breaks, which are one token where it is tokenized apart."""
    from lceval import packaged
    from lceval.models.lcft import LCFT

    model = LCFT(packaged.NAME, device="cpu", dtype="float32")
    with file.open("w") as out, model.sharing_prefills([kv for side, kv in RECIPES.items() if side != "kvzip"]):
        for request in [request for name in ("qa_1", "qa_2") for request in requests(model, f"lc_ruler_{name}_4k")]:
            prompt, how = request.args
            end = model.context_end.find(request.task_name, prompt, request.doc)
            context, rest = (model.tok_encode(part, add_special_tokens=False) for part in (prompt[:end], prompt[end:]))
            for side, kv in RECIPES.items():
                if side == "kvzip":
                    continue
                model.use(kv)
                split = {"index": 0, "ids": (*context, *rest), "boundary": len(context), "has_context": True}
                job = model.generate_job(how, **split, prompt=prompt, doc=request.doc)
                (text,) = model._answers("generate_until", model._generate, [job], [request], disable_tqdm=True)
                out.write(
                    json.dumps({"side": side, "id": request.doc["id"], "answer": str(text), "seconds": 0.0}) + "\n"
                )
                out.flush()


def requests(model: Any, task: str) -> list[Any]:
    """The first rows of a task, as prompts for a model."""
    from lceval import packaged
    from lceval.bench.comparison import requests_of

    _, contexts = requests_of(task, packaged.NAME, model, template=True)
    return [request for context in contexts for request in context.requests][:ROWS]


def answered(model: Any, side: str, request: Any) -> dict[str, Any]:
    """Answer, seconds and kept share of one row under one recipe."""
    model.use(RECIPES[side])
    (text,) = model.generate_until([request], disable_tqdm=True)
    kv = text.meta["kv"]
    seconds = sum(kv[part] for part in ("prefill_s", "compress_s", "question_s", "decode_s"))
    return {"answer": str(text), "seconds": seconds, "kept_share": kv["kept_share"]}


def scored(answers: dict[tuple[str, str], dict[str, Any]], side: str) -> dict[str, float]:
    """The score of each row of a side."""
    from lceval.tasks.icr import ruler

    lines = (Path(os.environ["LCEVAL_DATA"]) / "ruler" / "4096.jsonl").read_text().splitlines()
    rows = {f"{row['task']}-{n}": row for n, row in enumerate(map(json.loads, lines))}
    scores = {}
    for (of, name), record in answers.items():
        if of == side:
            row = rows[name]
            results = ruler.best_results if row["task"].startswith("qa_") else ruler.all_results
            scores[name] = results({"answers": row["answer"]}, [record["answer"]])["string_match"]
    return scores


def compare(ours: dict[tuple[str, str], dict[str, Any]], theirs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Print, per recipe, equal answers, both scores and both times; then every difference."""
    print(f"{'recipe':50} {'equal':>8} {'score':>13} {'seconds':>15}")
    for side, kv in RECIPES.items():
        common = [name for of, name in ours if of == side and (side, name) in theirs]
        equal = sum(_text(ours[side, name]) == _text(theirs[side, name]) for name in common)
        scores = [scored(x, side) for x in (ours, theirs)]
        means = [100 * sum(of[name] for name in common) / max(1, len(common)) for of in scores]
        seconds = [sum(x[side, name]["seconds"] for name in common) for x in (ours, theirs)]
        print(f"{kv:50} {equal:3}/{len(common):<4} {means[0]:6.1f} {means[1]:6.1f} {seconds[0]:7.0f} {seconds[1]:7.0f}")
    for (side, name), record in ours.items():
        other = theirs.get((side, name))
        if other is not None and _text(record) != _text(other):
            print(f"\n{RECIPES[side]} {name}\n  ours   {record['answer']!r}\n  theirs {other['answer']!r}")


def _text(record: dict[str, Any]) -> str:
    return str(record["answer"]).strip()


def fixture(theirs: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Write kvpress's answers, scores and seconds."""
    sides = {
        side: {
            "parameters": next(record["parameters"] for (of, _), record in theirs.items() if of == side),
            "answers": {name: record["answer"] for (of, name), record in theirs.items() if of == side},
            "scores": scored(theirs, side),
            "seconds": sum(record["seconds"] for (of, _), record in theirs.items() if of == side),
        }
        for side in RECIPES
    }
    versions = next(iter(theirs.values()))["versions"]
    FIXTURE.write_text(json.dumps({"versions": versions, "sides": sides}, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["answer", file]:
            answer(Path(file))
        case ["apart", file]:
            apart(Path(file))
        case ["compare", ours, theirs]:
            compare(read(Path(ours)), read(Path(theirs)))
        case ["fixture", file]:
            fixture(read(Path(file)))
        case _:
            raise SystemExit(__doc__)
