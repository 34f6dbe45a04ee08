"""Quality and cost of many recipes on one task, against `--model hf` in the same run.

One uncompressed prefill of a context serves every recipe. Per-sample results go to a file as they come, so that the
same line goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lceval.bench.machine import device, machine
from lceval.errors import UserError
from lceval.models import attention
from lceval.models.lcft import LCFT
from lceval.models.recipe import Recipe, parse
from lceval.run import own_tasks
from lceval.stats import cluster_bootstrap

HF = "hf"
MEASURED = ("gold_nll", "gold_kept", "ndcg10", "kv_bytes", "kv_bytes_full")
SHOWN = ("subem", "em", "acc", "acc_norm", "gold_nll", "gold_kept", "ndcg10")
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
    """Every recipe on the same questions.

    Args:
        task: one task name, as lm_eval knows it.
        contexts: how many contexts to take, with all their questions; None takes all.
        against_hf: whether `--model hf` answers too, which reads the context anew for every request.
        output: jsonl of per-sample results; what it holds is not run again.
        nll_only: only predict the gold answer (`diagnose=gold`), and generate nothing.
        template: whether the prompt is put into the model's chat template.
        begin: how the reply begins, given with the prompt; empty keeps what the task has.
        metadata: what lm_eval's `--metadata` takes: `context`, `data_seed`, ...

    Raises:
        UserError: no such task, a bad recipe, or a file of another bench.
    """
    if nll_only and (diagnose != "gold" or against_hf):
        raise UserError("without answers only gold_nll is left: pass --diagnose gold and --no-hf with --nll-only")
    hows = [parse(text) for text in recipes]
    if Recipe() not in hows:
        hows.insert(0, Recipe())
    model = LCFT(pretrained, device=device(), diagnose=diagnose, **model_args)
    loaded, groups = requests_of(task, pretrained, model, template, metadata, begin)
    if nll_only and loaded.OUTPUT_TYPE != "generate_until":
        raise UserError(f"{task} generates nothing: leave --nll-only out")
    chosen = list(groups)[:contexts]
    identity = {
        "task": task,
        "version": loaded.VERSION,
        "pretrained": pretrained,
        "template": template,
        "diagnose": diagnose,
        "nll_only": nll_only,
        **({"begin": begin} if begin else {}),
        **({"metadata": dict(metadata)} if metadata else {}),
        **{k: str(v) for k, v in sorted(model_args.items())},
    }
    results = _Results(output, identity)
    stats_spec = Recipe().stats_spec
    for how in hows:
        if not all(results.has(cluster, str(how)) for cluster in chosen):
            stats_spec |= how.stats_spec
    model.scheduler.keep_for = stats_spec
    for cluster in chosen:
        for how in hows:
            if not results.has(cluster, str(how)):
                model.recipe = how
                results.add(_side(loaded, model, str(how), groups[cluster], cluster, nll_only))
        if against_hf and not results.has(cluster, HF):
            results.add(_hf_side(loaded, model, groups[cluster], cluster))
    names = [*([HF] if against_hf else []), *map(str, hows)]
    wanted = {(cluster, name) for cluster in chosen for name in names}
    rows = [row for row in results.rows if (row["cluster"], row["kv"]) in wanted]
    sides = [_summary(name, [row for row in rows if row["kv"] == name]) for name in names]
    by_name = {side["kv"]: side for side in sides}
    for side in sides:
        side["same_as_full"] = None if nll_only else _agreement(rows, side["kv"])
        side["speedup_vs_hf"] = by_name[HF]["seconds"] / side["seconds"] if against_hf else None
        side["speedup_vs_full"] = by_name["full"]["seconds"] / side["seconds"]
    headline = by_name[str(hows[-1])]
    return {
        "bench": "eval",
        **identity,
        "contexts": len(chosen),
        "samples": by_name["full"]["n"],
        "recipe": headline["kv"],
        "speedup_vs_hf": headline["speedup_vs_hf"],
        "speedup_vs_full": headline["speedup_vs_full"],
        "sides": sides,
        "machine": machine(),
    }


class _Results:
    """Rows of samples, in memory and in a file whose first line says what it belongs to."""

    def __init__(self, file: Path | None, identity: dict[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = file
        if file is None:
            return
        if file.exists():
            first, *rest = (json.loads(line) for line in file.read_text().splitlines())
            if first != identity:
                raise UserError(f"{file} holds other results ({first}): name another --output")
            self.rows = rest
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(identity) + "\n")

    def has(self, cluster: str, kv: str) -> bool:
        return any(row["cluster"] == cluster and row["kv"] == kv for row in self.rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """All rows of one side on one context, at once: a side is never half there."""
        self.rows += rows
        if self._file is not None and rows:
            with self._file.open("a") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))


def requests_of(
    task: str,
    pretrained: str,
    model: LCFT,
    template: bool,
    metadata: Mapping[str, Any] | None = None,
    begin: str = "",
) -> tuple[Any, dict[str, list[Any]]]:
    """The task, and its requests by context."""
    from lm_eval.tasks import TaskManager

    chosen = {**(metadata or {}), "pretrained": pretrained}
    manager = own_tasks(chosen)
    if task not in manager.all_tasks:
        manager = TaskManager(metadata=chosen)
    if task not in manager.all_subtasks:
        raise UserError(f"no task {task!r} (a group is not one task): see lm_eval ls tasks")
    loaded = manager.load([task])["tasks"][task]
    if begin:
        loaded.set_config("gen_prefix", begin)
    loaded.build_all_requests(
        apply_chat_template=template, chat_template=model.apply_chat_template, tokenizer_name=model.tokenizer_name
    )
    groups: dict[str, list[Any]] = defaultdict(list)
    for request in loaded.instances:
        groups[str(request.doc.get("cluster", request.doc_id))].append(request)
    return loaded, groups


def _side(task: Any, model: Any, name: str, requests: list[Any], cluster: str, nll_only: bool = False) -> list[Any]:
    """One side's rows on one context."""
    if nll_only:
        for request in requests:
            request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 0})
    answer = model.generate_until if task.OUTPUT_TYPE == "generate_until" else model.loglikelihood
    read, start = _contexts_read(model), time.perf_counter()
    responses = answer(requests, disable_tqdm=True)
    seconds = time.perf_counter() - start
    if _contexts_read(model) == read:
        # Another side read the context for all: each is charged with what it takes by itself.
        seconds += math.fsum(r.meta["kv"].get("prefill_s", 0.0) for r in responses if hasattr(r, "meta"))
    return list(_rows(task, name, requests, responses, cluster, seconds, nll_only))


def _contexts_read(model: Any) -> int:
    return int(model.totals["contexts"]) if isinstance(model, LCFT) else 0


def _hf_side(task: Any, model: LCFT, requests: list[Any], cluster: str) -> list[Any]:
    from lm_eval.models.huggingface import HFLM

    model.base.set_attn_implementation("sdpa")
    try:
        hf = HFLM(model.model, tokenizer=model.tokenizer, batch_size=model.batch_size)
        return _side(task, hf, HF, requests, cluster)
    finally:
        model.base.set_attn_implementation(attention.NAME)


def _rows(
    task: Any, name: str, requests: list[Any], responses: list[Any], cluster: str, seconds: float, nll_only: bool
) -> Iterator[dict[str, Any]]:
    """One row a question; a side's wall time is charged to its questions in equal parts."""
    by_doc: dict[int, list[tuple[Any, Any]]] = defaultdict(list)
    for request, response in zip(requests, responses, strict=True):
        by_doc[request.doc_id].append((request, response))
    for pairs in by_doc.values():
        doc = pairs[0][0].doc
        metrics = task.process_results(doc, [response for _, response in pairs])
        kv = metrics.pop("kv", {})
        yield {
            "cluster": cluster,
            "id": doc.get("id", pairs[0][0].doc_id),
            "kv": name,
            **{key: _short(value) for key, value in metrics.items() if not nll_only or key in MEASURED},
            "response": None if nll_only else [str(r) if isinstance(r, str) else round(r[0], 4) for _, r in pairs],
            "seconds": _short(seconds / len(by_doc)),
            **{key: _short(kv[key]) for key in TELEMETRY if key in kv},
        }


def _summary(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with intervals over contexts."""
    summary: dict[str, Any] = {"kv": name, "n": len(rows)}
    clusters = [row["cluster"] for row in rows]
    for metric in SHOWN:
        known = [(row[metric], c) for row, c in zip(rows, clusters, strict=True) if row.get(metric) is not None]
        if known:
            mean, low, high = cluster_bootstrap([v for v, _ in known], [c for _, c in known])
            summary[metric] = {"mean": mean, "low": _finite(low), "high": _finite(high), "n": len(known)}
    for field in ("kept_share", "kv_bytes", "kv_bytes_full", "bytes_read_per_step"):
        values = [row[field] for row in rows if row.get(field) is not None]
        summary[field] = sum(values) / len(values) if values else None
    summary["seconds"] = sum(row["seconds"] for row in rows)
    return summary


def _short(value: float | None) -> float | None:
    """Six digits: files of samples are kept, and timings have no more."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _agreement(rows: list[dict[str, Any]], name: str) -> float:
    """The share of questions answered as our own full cache answers them: the same text, or the same best choice."""

    def answer(row: dict[str, Any]) -> str | int:
        said = row["response"]
        return str(said[0]) if isinstance(said[0], str) else max(range(len(said)), key=said.__getitem__)

    full = {row["id"]: answer(row) for row in rows if row["kv"] == "full"}
    ours = {row["id"]: answer(row) for row in rows if row["kv"] == name}
    return sum(full[key] == value for key, value in ours.items()) / len(ours)
