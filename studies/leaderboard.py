"""The project's own leaderboard: every method on SmolLM2-135M, from committed samples.

python studies/leaderboard.py run [PART ...]    measure what is missing
python studies/leaderboard.py folders FOLDER    write the committed samples as run folders

Then `lceval report FOLDER --site public` writes the site. Parts: `nqopen` and `kvlookup` (gold_nll of every method at
three budgets; a quarter of the cache is measured by studies/methods.py), `quality` (every method at a quarter),
`answers` (eight methods at a quarter on both, generated) and `ruler` (the same on three rows of each of RULER's 13
tasks). Rerun the same command to resume. Raw samples are in runs/studies/leaderboard. Needs LCEVAL_DATA.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import methods
import parts

SAMPLES = Path(__file__).parent / "leaderboard"
RUNS = Path("runs/studies/leaderboard")
METRICS = ("subem", "acc", "string_match", "gold_nll", "kv_bytes", "kv_bytes_full", "kept_share")
SCORES = METRICS[:3]
BUDGETS = (0.5, 0.25, 0.1)
CONTROL = "random:{}:sinks=4:recent=64"
METHODS = [*(f"{name}:{{}}" for name in methods.EVICTORS), "keydiff:{}:block=128", "h2o:{}", "kvzip:{}"]
METHODS += ["kvzip:{}:plus=true", "random:{}", CONTROL]
ANSWERED = ["kvzap", "kvzip", "duo", "expected_attention", "snapkv", "adakv", "streaming"]
QUARTER = [*(f"{name}:0.25" for name in ANSWERED), CONTROL.format(0.25)]
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
)
RULER_TASKS += ("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2")
RULER = "lc_ruler_4k"
OTHERS = [recipe.format(budget) for recipe in METHODS for budget in BUDGETS if budget != 0.25]
NQOPEN, KVLOOKUP, QUALITY = "lc_nqopen_ao_4k", "lc_kvlookup_ao_4k", "lc_quality_mc"
# Part -> tasks with their number of contexts, recipes, and whether nothing is generated.
PARTS: dict[str, tuple[dict[str, int], list[str], bool]] = {
    "nqopen": ({NQOPEN: 10}, OTHERS, True),
    "kvlookup": ({KVLOOKUP: 12}, OTHERS, True),
    "quality": ({QUALITY: 3}, [recipe.format(0.25) for recipe in METHODS], False),
    "answers": ({NQOPEN: 10, KVLOOKUP: 12}, QUARTER, False),
    "ruler": ({f"lc_ruler_{task}_4k": 3 for task in RULER_TASKS}, QUARTER, False),
}


def run(names: Sequence[str]) -> None:
    """Run the missing samples of these parts."""
    for name in names:
        tasks, recipes, nll_only = PARTS[name]
        for task, contexts in tasks.items():
            options = {"contexts": contexts, "metadata": {}, "nll_only": nll_only, "heads": methods.HEADS}
            parts.bench(RUNS, SAMPLES, name, task, ["full", *recipes], metrics=METRICS, **options)


def of_methods(name: str, task: str) -> parts.Samples:
    """The samples of studies/methods.py at a quarter of the cache, on the contexts of a part."""
    contexts = PARTS[name][0][task]
    by_recipe = methods.samples(name, "query-agnostic")
    kept = list(dict.fromkeys(row["cluster"] for row in by_recipe["full"].values()))[:contexts]
    return {kv: {key: row for key, row in rows.items() if row["cluster"] in kept} for kv, rows in by_recipe.items()}


def boards() -> Iterator[tuple[str, parts.Samples]]:
    """Every task with its samples; where answers were generated, these."""
    for name, task in (("nqopen", NQOPEN), ("kvlookup", KVLOOKUP)):
        yield (
            task,
            {**of_methods(name, task), **parts.samples(SAMPLES, name, task), **parts.samples(SAMPLES, "answers", task)},
        )
    yield QUALITY, parts.samples(SAMPLES, "quality", QUALITY)
    together: parts.Samples = {}
    for task in PARTS["ruler"][0]:
        for kv, rows in parts.samples(SAMPLES, "ruler", task).items():
            together.setdefault(kv, {}).update({f"{task} {key}": row for key, row in rows.items()})
    yield RULER, together


def folders(root: Path) -> None:
    """Write every recipe on every task as a folder that `lceval table` and `lceval report` read."""
    for task, by_recipe in boards():
        for kv, rows in by_recipe.items():
            folder = root / f"{task}_{kv.replace(':', '-')}"
            folder.mkdir(parents=True, exist_ok=True)
            first = next(iter(rows.values()))
            metric = next((name for name in SCORES if first.get(name) is not None), "bypass")
            results = {
                "config": {"model": "lcft", "model_args": {"pretrained": "smollm2-135m", "kv": kv}},
                "n-samples": {task: {"original": len(rows), "effective": len(rows)}},
                "higher_is_better": {task: {metric: True}},
            }
            (folder / "results_committed.json").write_text(json.dumps(results) + "\n")
            lines = [
                {
                    "doc_id": number,
                    "doc": {"id": key, "cluster": row["cluster"]},
                    "metrics": [metric],
                    metric: row.get(metric),
                    **{
                        name: row[name]
                        for name in ("gold_nll", "kv_bytes", "kv_bytes_full")
                        if row.get(name) is not None
                    },
                    "kv": {"kept_share": row["kept_share"]},
                }
                for number, (key, row) in enumerate(rows.items())
            ]
            samples = folder / f"samples_{task}_committed.jsonl"
            samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", *names] if {*names} <= {*PARTS}:
            run(names or list(PARTS))
        case ["folders", folder]:
            folders(Path(folder))
        case _:
            raise SystemExit(__doc__)
