"""Metrics of one output by output format, and its telemetry.

The headline of an answer-only task is `subem` on the extracted answer; `subem_raw` on the whole output, which favours
long outputs, is reported beside it. Responses of our own model are `str` and `tuple` subclasses with a dict `meta`,
whose telemetry is emitted as metrics. Other models emit none of these metrics.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lceval.core.answers import DIAGNOSES
from lceval.tasks import parsing
from lceval.tasks.parsing import extract, normalize

_CLOSED_SETS = frozenset({"yes", "no", "noanswer"})


def _best(score: Callable[[str, str], float], prediction: str, answers: Iterable[str]) -> float:
    """Maximum score over the gold answers, both sides normalised; golds that normalise to nothing never match."""
    normalized = normalize(prediction)
    golds = (normalize(answer) for answer in answers)
    return max((score(normalized, gold) for gold in golds if gold), default=0.0)


def subem(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if a normalised gold answer is a substring of the normalised prediction."""
    return _best(lambda normalized, gold: float(gold in normalized), prediction, answers)


def em(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the prediction equals a gold answer after normalisation."""
    return _best(lambda normalized, gold: float(gold == normalized), prediction, answers)


def _token_f1(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in _CLOSED_SETS or gold in _CLOSED_SETS):
        return 0.0
    return overlap_f1(prediction.split(), gold.split())


def overlap_f1(prediction: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of two bags of tokens: 2PR / (P + R) with P = common / prediction and R = common / gold; 0 without tokens."""
    common = (Counter(prediction) & Counter(gold)).total()
    return 2.0 * common / max(1, len(prediction) + len(gold))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Token F1, maximum over the gold answers; 0 if exactly one side is yes, no or noanswer (HELMET)."""
    return _best(_token_f1, prediction, answers)


def answer_metrics(output: str, answers: Sequence[str]) -> dict[str, float]:
    """Metrics of an answer-only output; `parse_rate` is 1.0 if the output has the required format."""
    answer, parsed = extract(output)
    return {
        "subem": subem(answer, answers),
        "subem_raw": subem(output, answers),
        "em": em(answer, answers),
        "f1": f1(answer, answers),
        "parse_rate": float(parsed),
    }


def choice_metrics(log_likelihoods: Sequence[float], choices: Sequence[str], gold: int) -> dict[str, float]:
    """lm-eval's `acc` by log-likelihood, and its `acc_norm` by log-likelihood per character of the option."""
    per_character = [score / len(text) for score, text in zip(log_likelihoods, choices, strict=True)]
    return {"acc": float(_argmax(log_likelihoods) == gold), "acc_norm": float(_argmax(per_character) == gold)}


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def answer_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """lm-eval's `process_results` of the answer-only tasks; a failed sample scores 0."""
    metrics = answer_metrics(str(results[0]), doc["answers"])
    return with_telemetry(metrics, results[0], parsed=bool(metrics["parse_rate"]))


def choice_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """lm-eval's `process_results` of the multiple-choice tasks; a failed sample scores 0."""
    metrics = choice_metrics([result[0] for result in results], doc["choices"], doc["gold"])
    return with_telemetry(metrics, results[0], parsed=True)


def gold_places(doc: Mapping[str, Any]) -> set[int]:
    """Positions of the gold documents in the prompt."""
    return {place for place, document in enumerate(doc["docs"]) if document["pid"] in doc["gold_pids"]}


def citation_metrics(document_ids: Sequence[int] | None, gold: set[int]) -> dict[str, float]:
    """Precision, recall, F1 and exact match of the cited documents; `ids_rate` is 1.0 if the citations were parsed.

    If the prompt has no gold document, citing none (`[DOC -1]`) is correct. Unparsed citations (None) score 0.
    """
    cited = set(document_ids or ())
    hits = len(cited & gold)
    exact = float(document_ids is not None and cited == gold)
    precision = hits / len(cited) if cited else exact
    recall = hits / len(gold) if gold else exact
    f1_score = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "ids_precision": precision,
        "ids_recall": recall,
        "ids_f1": f1_score,
        "ids_exact": exact,
        "ids_rate": float(document_ids is not None),
    }


def recall_at(ranked: Sequence[int], gold: set[int], k: int) -> float:
    """Share of the gold documents among the first k ids."""
    return len(set(ranked[:k]) & gold) / len(gold) if gold else 0.0


def mrecall_at(ranked: Sequence[int], gold: set[int], k: int) -> float:
    """1.0 if the first k ids contain min(k, golds) gold documents (Min et al. 2021, as in LOFT)."""
    return float(bool(gold) and len(set(ranked[:k]) & gold) == min(k, len(gold)))


def reference_recall(text: str, references: Sequence[str]) -> float:
    """Share of references that are substrings of the text, ignoring case (RULER's `all`)."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def _content(copies: Sequence[parsing.Passage], doc: Mapping[str, Any]) -> float:
    """1.0 if exactly the gold documents are copied, each verbatim after normalisation (the paper's ID+C condition)."""
    texts = [normalize(document["text"]) for document in doc["docs"]]
    copied = {place: normalize(text) for place, text in copies if place < len(texts)}
    gold = gold_places(doc)
    return float(bool(gold) and set(copied) == gold and all(texts[place] in copied[place] for place in gold))


def _quoted(quotes: Sequence[parsing.Passage], doc: Mapping[str, Any]) -> float:
    """Share of quotes that are, normalised, substrings of the gold document they cite; 0 without a quote."""
    texts = [normalize(document["text"]) for document in doc["docs"]]
    gold = gold_places(doc)
    hits = [place in gold and normalize(text) in texts[place] for place, text in quotes]
    return sum(hits) / len(hits) if hits else 0.0


def cited_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of formats that cite documents before the answer."""
    output = str(results[0])
    ids = citation_metrics(parsing.document_ids(parsing.before_answer(output)), gold_places(doc))
    return _answered(doc, results, ids)


def copied_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of ID+C: copies of documents, then the answer."""
    citations = parsing.before_answer(str(results[0]))
    copies = parsing.passages(citations, [document["text"] for document in doc["docs"]])
    # The text of a copied document may mention "document 3": only the tags of copies are citations.
    document_ids = [*dict.fromkeys(place for place, _ in copies)] or parsing.document_ids(citations)
    ids = citation_metrics(document_ids, gold_places(doc))
    return _answered(doc, results, {**ids, "content": _content(copies, doc)})


def quoted_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of ID+Q: quotes with document ids, then the answer."""
    citations = parsing.before_answer(str(results[0]))
    ids = citation_metrics(parsing.document_ids(citations), gold_places(doc))
    return _answered(doc, results, {**ids, "quotes": _quoted(parsing.quotes(citations), doc)})


def _answered(doc: Mapping[str, Any], results: Sequence[Any], more: Mapping[str, float]) -> dict[str, Any]:
    metrics = answer_metrics(str(results[0]), doc["answers"])
    return with_telemetry({**metrics, **more}, results[0], parsed=bool(metrics["parse_rate"]))


def retrieved_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of document-id retrieval."""
    document_ids, gold = parsing.document_ids(parsing.without_thinking(str(results[0]))), gold_places(doc)
    ranked = document_ids or []
    metrics = {
        "recall_1": recall_at(ranked, gold, 1),
        "recall_5": recall_at(ranked, gold, 5),
        "mrecall_5": mrecall_at(ranked, gold, 5),
        **citation_metrics(document_ids, gold),
    }
    return with_telemetry(metrics, results[0], parsed=document_ids is not None)


def listed_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of lists: `answers` are references that should all be in the output."""
    answer, parsed = extract(str(results[0]))
    recall = reference_recall(answer, doc["answers"])
    metrics = {
        "recall": recall,
        "recall_raw": reference_recall(str(results[0]), doc["answers"]),
        "all_found": float(recall == 1),
        "parse_rate": float(parsed),
    }
    return with_telemetry(metrics, results[0], parsed=parsed)


def short_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of short answers; `number` compares figures if the gold answer is a number, else it is None."""
    from lceval.tasks.finance.numbers import number_match

    metrics = answer_metrics(str(results[0]), doc["answers"])
    matches = [number_match(extract(str(results[0])).answer, answer) for answer in doc["answers"]]
    known = [match for match in matches if match is not None]
    scored = with_telemetry(dict(metrics), results[0], parsed=bool(metrics["parse_rate"]))
    failed = scored.get("kv", {}).get("status") == "error"
    return {**scored, "number": None if not known else 0.0 if failed else max(known)}


def with_telemetry(metrics: dict[str, float], response: object, *, parsed: bool) -> dict[str, Any]:
    """Add the telemetry of the response's `meta` to its metrics; those of a sample that failed are 0."""
    meta = getattr(response, "meta", None)
    if not isinstance(meta, Mapping):
        return metrics
    measured = telemetry(meta, parsed=parsed)
    return {**(dict.fromkeys(metrics, 0.0) if measured["kv"]["status"] == "error" else metrics), **measured}


def telemetry(meta: Mapping[str, Any], *, parsed: bool = True) -> dict[str, Any]:
    """A sample's telemetry from the `meta` of its response.

    `kv["status"]` is the status of the sample: error, truncated (reported by the model), wrong_format or ok.
    """
    kv = dict(meta.get("kv") or {})
    status = meta.get("status", kv.get("status", "ok"))
    if status == "ok" and kv.get("truncated"):
        status = "truncated"
    elif status == "ok" and not parsed:
        status = "wrong_format"
    return {
        "kv_bytes": meta.get("kv_bytes", 0),
        "kv_bytes_full": meta.get("kv_bytes_full", 0),
        "kv": {**kv, "status": status},
        **{name: meta[name] for name in DIAGNOSES if name in meta},
    }


def add_telemetry(samples: Iterable[dict[str, Any]]) -> None:
    """Add the telemetry of their responses to logged samples that lack it: those of tasks that are not lceval's.

    Of several responses (choices, repeats) the first counts, or the first that failed; of repeats, `new_tokens` is the
    mean, times and decoded tokens are sums, and `peak_bytes` is the largest.
    """
    for sample in samples:
        metas = [meta for of in sample["resps"] for response in of if (meta := getattr(response, "meta", None))]
        if "kv" not in sample and metas:
            measured = [telemetry(meta) for meta in metas]
            failed = [one for one in measured if one["kv"]["status"] == "error"]
            sample.update((failed or measured)[0])
            if len(sample["resps"]) == 1 and len(measured) > 1:
                sample["kv"] = {**sample["kv"], **_of_repeats([one["kv"] for one in measured])}


def _of_repeats(kvs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    def values(name: str) -> list[float]:
        return [kv[name] for kv in kvs if name in kv]

    combined = {name: math.fsum(of) for name in ("question_s", "decode_s", "decode_tokens") if (of := values(name))}
    if peaks := values("peak_bytes"):
        combined["peak_bytes"] = max(peaks)
    if tokens := values("new_tokens"):
        combined["new_tokens"] = mean_known(tokens)
    return combined


def tasks_within(tasks: Any) -> dict[str, Any]:
    """Tasks by name of what lm-eval's `evaluate` accepts: its dictionary with the key `tasks`, or nested groups."""
    by_name: dict[str, Any] = {}
    for name, value in tasks.items():
        if isinstance(value, Mapping):
            by_name |= tasks_within(value)
        elif hasattr(value, "process_results"):
            by_name[name] = value
    return by_name


def add_repeats(task: Any, samples: Iterable[dict[str, Any]]) -> None:
    """Add `repeats` to the logged samples of a generative task with several: every metric of each repeat, in order.

    lm-eval's own metrics are those of the first repeat, unless the task has filters.

    task: lm-eval's task.
    """
    repeats = getattr(task.config, "repeats", 1) or 1
    if repeats < 2 or task.OUTPUT_TYPE != "generate_until" or task.config.filter_list:
        return
    for sample in samples:
        of_each = [task.process_results(sample["doc"], [response]) for response in sample["resps"][0]]
        numeric = [name for name, value in of_each[0].items() if isinstance(value, bool | int | float)]
        sample["repeats"] = {name: [float(metrics[name]) for metrics in of_each] for name in numeric}


def mean_known(items: Iterable[float | None]) -> float:
    """Aggregation: mean over the samples with a value; nan without any."""
    known = [item for item in items if item is not None]
    return math.fsum(known) / len(known) if known else math.nan


def kept_share(items: Iterable[Mapping[str, Any]]) -> float:
    """Aggregation of the `kv` metric: mean kept share of the samples that did not fail; nan without any."""
    return mean_known(item.get("kept_share") for item in items if item.get("status") != "error")
