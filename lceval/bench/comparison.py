"""Quality and cost of KV recipes on one task, against `--model hf` in the same run.

All recipes share one uncompressed prefill per context. Samples are written to a file as they arrive, so that rerunning
the same command resumes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lceval.bench.machine import device, machine
from lceval.core.errors import UserError
from lceval.core.io import objects_of, write_objects
from lceval.models import attention
from lceval.models.lcft import LCFT
from lceval.models.recipe import Recipe, parse
from lceval.runs.configuration import Context, contexts_of, own_tasks
from lceval.runs.runner import Answers, answers
from lceval.stats.estimates import mean_of

HF = "hf"
MEASURED = ("gold_nll", "gold_kept", "ndcg10", "kv_bytes", "kv_bytes_full")
METRICS = ("subem", "em", "acc", "acc_norm", "gold_nll", "gold_kept", "ndcg10")
TELEMETRY = ("kept_share", "bytes_read_per_step", "prefill_s", "compress_s")


def bench(
    task: str,
    recipes: Sequence[str],
    *,
    pretrained: str,
    contexts: int | None,
    against_hf: bool,
    diagnose: str,
    output: Path | None,
    nll_only: bool = False,
    template: bool = True,
    begin: str = "",
    metadata: Mapping[str, Any] | None = None,
    **model_args: Any,
) -> dict[str, Any]:
    """Evaluate every recipe on the same questions.

    Args:
        task: one task name, as lm_eval knows it.
        contexts: number of contexts, each with all its questions; None is all.
        against_hf: also evaluate `--model hf`, which prefills the context for every request.
        output: JSONL file of samples; those it contains are not run again.
        nll_only: compute gold_nll only (`diagnose=gold`), without generation.
        template: apply the model's chat template.
        begin: beginning of the reply, part of the prompt; empty is the task's default.
        metadata: lm_eval's `--metadata`: `context`, `data_seed`, ...

    Raises:
        UserError: an unknown task, a bad recipe, or the file of another benchmark.
    """
    if nll_only and (diagnose != "gold" or against_hf):
        raise UserError("--nll-only computes gold_nll only: it requires --diagnose gold and --no-hf")
    parsed = [parse(text) for text in recipes]
    if Recipe() not in parsed:
        parsed.insert(0, Recipe())
    model = LCFT(pretrained, device=device(), diagnose=diagnose, **model_args)
    loaded, every = requests_of(task, pretrained, model, template, metadata, begin)
    if nll_only:
        if loaded.OUTPUT_TYPE != "generate_until":
            raise UserError(f"{task} generates no answers: --nll-only does not apply")
        for request in (request for context in every for request in context.requests):
            request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 0})
    clusters = list(dict.fromkeys(context.name for context in every))[:contexts]
    chosen = [context for context in every if context.name in clusters]
    identity = {
        "task": task,
        "version": loaded.VERSION,
        "pretrained": pretrained,
        "template": template,
        "diagnose": diagnose,
        "nll_only": nll_only,
        **({"begin": begin} if begin else {}),
        **({"metadata": dict(metadata)} if metadata else {}),
        **{k: v if isinstance(v, bool) else str(v) for k, v in sorted(model_args.items())},
    }
    results = _Results(output, identity)
    sides: list[_Recipe | _HF] = [_Recipe(str(kv), model, kv) for kv in parsed]
    if against_hf:
        sides.append(_HF(HF, model))

    def is_open(side: _Recipe | _HF, context: Context) -> bool:
        return not results.has(context, side.name)

    unfinished = [kv for kv in parsed if not all(results.has(context, str(kv)) for context in chosen)]
    with model.sharing_prefills(unfinished):
        for one in answers(model, sides, chosen, is_open=is_open):
            seconds = one.seconds + (one.prefill_s or _shared_prefill_s(one.responses))
            results.add(_rows(loaded, one, seconds, nll_only))
    names = [*([HF] if against_hf else []), *map(str, parsed)]
    selected = {(cluster, name) for cluster in clusters for name in names}
    rows = [row for row in results.rows if (row["cluster"], row["kv"]) in selected]
    summaries = [_summary(name, [row for row in rows if row["kv"] == name]) for name in names]
    by_name = {side["kv"]: side for side in summaries}
    for side in summaries:
        side["same_as_full"] = None if nll_only else _agreement(rows, side["kv"])
        side["speedup_vs_hf"] = by_name[HF]["seconds"] / side["seconds"] if against_hf else None
        side["speedup_vs_full"] = by_name["full"]["seconds"] / side["seconds"]
    headline = by_name[str(parsed[-1])]
    return {
        "bench": "eval",
        **identity,
        "contexts": len(clusters),
        "samples": by_name["full"]["n"],
        "recipe": headline["kv"],
        "speedup_vs_hf": headline["speedup_vs_hf"],
        "speedup_vs_full": headline["speedup_vs_full"],
        "sides": summaries,
        "machine": machine(),
    }


class _Results:
    """Rows of samples, in memory and in a file whose first line is the identity of the benchmark."""

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self._rows: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._file = file
        if file is None:
            return
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_objects(file, [identity])
            return
        # Without the line that a killed run left incomplete.
        whole = file.read_bytes()
        complete = whole[: whole.rfind(b"\n") + 1]
        lines = [line for _, line in objects_of(complete.split(b"\n"), str(file))]
        if lines[:1] != [identity]:
            raise UserError(f"{file} contains results of another benchmark ({lines[:1]}): choose another --output")
        if complete != whole:
            write_objects(file, lines)
        self._rows = {_key(row): row for row in lines[1:]}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self._rows.values())

    def has(self, context: Context, kv: str) -> bool:
        """Whether all questions of a context have a row under a recipe."""
        return all((context.name, kv, _id(request)) in self._rows for request in context.requests)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add all rows of one side on one context; a killed run may have left some of them."""
        self._rows |= {_key(row): row for row in rows}
        if self._file is not None and rows:
            with self._file.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["cluster"], row["kv"], row["id"]


def requests_of(
    task: str,
    pretrained: str,
    model: LCFT,
    template: bool,
    metadata: Mapping[str, Any] | None = None,
    begin: str = "",
) -> tuple[Any, list[Context]]:
    """The task, and its requests by context."""
    from lm_eval.tasks import TaskManager

    metadata = {**(metadata or {}), "pretrained": pretrained}
    manager = own_tasks(metadata)
    if task not in manager.all_tasks:
        manager = TaskManager(metadata=metadata)
    if task not in manager.all_subtasks:
        raise UserError(
            f"no task {task!r} (a group is not one task): `lceval tasks` and `lm_eval ls tasks` list the names"
        )
    loaded = manager.load([task])["tasks"][task]
    if begin:
        loaded.set_config("gen_prefix", begin)
    return loaded, contexts_of([loaded], model, template=template)


@dataclass(frozen=True)
class _Recipe:
    """A KV recipe as a side."""

    name: str
    model: LCFT
    recipe: Recipe

    def answer(self, context: Context) -> list[Any]:
        self.model.use(self.recipe)
        responses: list[Any] = getattr(self.model, context.method)(context.requests, disable_tqdm=True)
        return responses


@dataclass(frozen=True)
class _HF:
    """`--model hf` on the same weights as a side; it prefills the context for every request."""

    name: str
    model: LCFT

    def answer(self, context: Context) -> list[Any]:
        from lm_eval.models.huggingface import HFLM

        model = self.model
        model.base.set_attn_implementation("sdpa")
        try:
            hf = HFLM(model.model, tokenizer=model.tokenizer, batch_size=model.batch_size)
            responses: list[Any] = getattr(hf, context.method)(context.requests, disable_tqdm=True)
        finally:
            model.base.set_attn_implementation(attention.NAME)
        return responses


def _shared_prefill_s(responses: list[Any]) -> float:
    """Seconds of a prefill that another side made for all: each side is charged as if it had been alone."""
    return math.fsum(r.meta["kv"].get("prefill_s", 0.0) for r in responses if hasattr(r, "meta"))


def _id(request: Any) -> Any:
    return request.doc.get("id", request.doc_id)


def _rows(task: Any, answered: Answers[_Recipe | _HF], seconds: float, nll_only: bool) -> list[dict[str, Any]]:
    """One row per question; a side's wall time is charged to its questions in equal parts."""
    rows = []
    by_doc: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
    for request, response in zip(answered.context.requests, answered.responses, strict=True):
        by_doc[request.doc_id].append((request, response))
    for pairs in by_doc.values():
        doc = pairs[0][0].doc
        metrics = task.process_results(doc, [response for _, response in pairs])
        kv = metrics.pop("kv", {})
        row = {
            "cluster": answered.context.name,
            "id": _id(pairs[0][0]),
            "kv": answered.side.name,
            **{key: _short(value) for key, value in metrics.items() if not nll_only or key in MEASURED},
            "response": None if nll_only else [str(r) if isinstance(r, str) else round(r[0], 4) for _, r in pairs],
            "seconds": _short(seconds / len(by_doc)),
            **{key: _short(kv[key]) for key in TELEMETRY if key in kv},
        }
        rows.append(row)
    return rows


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with confidence intervals over contexts."""
    summary: dict[str, Any] = {"kv": name, "n": len(rows)}
    clusters = [row["cluster"] for row in rows]
    for metric in METRICS:
        known = [(row[metric], c) for row, c in zip(rows, clusters, strict=True) if row.get(metric) is not None]
        if known:
            mean = mean_of([v for v, _ in known], [c for _, c in known])
            summary[metric] = {"mean": mean.value, "low": mean.lo, "high": mean.hi, "n": len(known)}
    for field in ("kept_share", "kv_bytes", "kv_bytes_full", "bytes_read_per_step"):
        values = [row[field] for row in rows if row.get(field) is not None]
        summary[field] = sum(values) / len(values) if values else None
    summary["seconds"] = sum(row["seconds"] for row in rows)
    return summary


def _short(value: float | None) -> float | None:
    """Round to six significant digits, to keep files of samples short."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _agreement(rows: list[dict[str, Any]], name: str) -> float:
    """The share of questions with the answer of the full cache: the same text, or the same best choice."""

    def answer(row: dict[str, Any]) -> str | int:
        response = row["response"]
        if isinstance(response[0], str):
            return response[0]
        return max(range(len(response)), key=response.__getitem__)

    full = {row["id"]: answer(row) for row in rows if row["kv"] == "full"}
    answers = {row["id"]: answer(row) for row in rows if row["kv"] == name}
    return sum(full[key] == value for key, value in answers.items()) / len(answers)
