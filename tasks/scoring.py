"""Scores of one output: the metrics of the task forms, and the telemetry that comes with them.

The headline of an answer-only task is `subem` on the extracted answer; `subem_raw` reads the whole
output, which flatters long ones, and is reported beside it. Responses of our own model are `str` and
`tuple` subclasses with a dict `meta`; its telemetry is passed on as metrics. Other models have none, and
then none of those metrics is emitted.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lceval.tasks import parsing
from lceval.tasks.parsing import extract, normalize

DIAGNOSES = ("gold_kept", "gold_nll", "ndcg10")
"""What the model measures with `diagnose=`: None for a sample that does not allow it."""

_CLOSED_SETS = frozenset({"yes", "no", "noanswer"})


def _best(score: Callable[[str, str], float], prediction: str, answers: Iterable[str]) -> float:
    """The best score over the gold answers, both sides normalised; golds that vanish match nothing."""
    said = normalize(prediction)
    golds = (normalize(answer) for answer in answers)
    return max((score(said, gold) for gold in golds if gold), default=0.0)


def subem(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if a normalised gold answer is a substring of the normalised prediction."""
    return _best(lambda said, gold: float(gold in said), prediction, answers)


def em(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the prediction equals a gold answer after normalisation."""
    return _best(lambda said, gold: float(gold == said), prediction, answers)


def _token_f1(said: str, gold: str) -> float:
    if said != gold and (said in _CLOSED_SETS or gold in _CLOSED_SETS):
        return 0.0
    said_tokens, gold_tokens = said.split(), gold.split()
    common = sum((Counter(said_tokens) & Counter(gold_tokens)).values())
    # 2PR / (P + R) with P = common / said and R = common / gold
    return 2.0 * common / (len(said_tokens) + len(gold_tokens))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Token F1, best over the gold answers; 0 when exactly one side is yes, no or noanswer (HELMET)."""
    return _best(_token_f1, prediction, answers)


def answer_metrics(output: str, answers: Sequence[str]) -> dict[str, float]:
    """All metrics of one answer-only output; `parse_rate` is 1.0 if the output had the required form."""
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
    """lm-eval's `process_results` of the answer-only tasks; a document that was not run scores 0."""
    metrics = answer_metrics(str(results[0]), doc["answers"])
    return with_telemetry(metrics, results[0], parsed=bool(metrics["parse_rate"]))


def choice_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """lm-eval's `process_results` of the multiple-choice tasks; a document that was not run scores 0."""
    metrics = choice_metrics([result[0] for result in results], doc["choices"], doc["gold"])
    return with_telemetry(metrics, results[0], parsed=True)


def gold_places(doc: Mapping[str, Any]) -> set[int]:
    """The numbers that the gold documents have in the prompt."""
    return {place for place, document in enumerate(doc["docs"]) if document["pid"] in doc["gold_pids"]}


def citation_metrics(named: Sequence[int] | None, gold: set[int]) -> dict[str, float]:
    """Precision, recall, F1 and exactness of the documents that an output names; `ids_rate`: it names any, or none.

    Without a gold document in the prompt the right thing is to name none. Nothing named in the required form scores 0.
    """
    said = set(named or ())
    hits = len(said & gold)
    right = float(named is not None and said == gold)
    precision = hits / len(said) if said else right
    recall = hits / len(gold) if gold else right
    f1_of = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "ids_precision": precision,
        "ids_recall": recall,
        "ids_f1": f1_of,
        "ids_exact": right,
        "ids_rate": float(named is not None),
    }


def recall_at(ranked: Sequence[int], gold: set[int], k: int) -> float:
    """The share of the gold documents among the first k named."""
    return len(set(ranked[:k]) & gold) / len(gold) if gold else 0.0


def mrecall_at(ranked: Sequence[int], gold: set[int], k: int) -> float:
    """1.0 if the first k named hold min(k, golds) of the gold documents (Min et al. 2021, as in LOFT)."""
    return float(bool(gold) and len(set(ranked[:k]) & gold) == min(k, len(gold)))


def reference_recall(text: str, references: Sequence[str]) -> float:
    """The share of references that stand in the text, whatever their case (RULER's `all`)."""
    said = text.lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def _content(found: Sequence[parsing.Passage], doc: Mapping[str, Any]) -> float:
    """1.0 if every gold document, and no other, is given word for word, normalised (the paper's ID+C condition)."""
    texts = [normalize(document["text"]) for document in doc["docs"]]
    given = {place: normalize(text) for place, text in found if place < len(texts)}
    gold = gold_places(doc)
    return float(bool(gold) and set(given) == gold and all(texts[place] in given[place] for place in gold))


def _quoted(found: Sequence[parsing.Passage], doc: Mapping[str, Any]) -> float:
    """The share of quotes that stand, normalised, in the gold document they name; 0 without a quote."""
    texts = [normalize(document["text"]) for document in doc["docs"]]
    gold = gold_places(doc)
    hits = [place in gold and normalize(text) in texts[place] for place, text in found]
    return sum(hits) / len(hits) if hits else 0.0


def cited_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of the forms that name documents before the answer."""
    output = str(results[0])
    ids = citation_metrics(parsing.document_ids(parsing.before_answer(output)), gold_places(doc))
    return _answered(doc, results, ids)


def copied_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of ID+C: documents are copied before the answer."""
    found = parsing.passages(said := parsing.before_answer(str(results[0])))
    # A document that is copied may itself speak of "document 3": only the tags of copies name one.
    named = [*dict.fromkeys(place for place, _ in found)] or parsing.document_ids(said)
    ids = citation_metrics(named, gold_places(doc))
    return _answered(doc, results, {**ids, "content": _content(found, doc)})


def quoted_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of ID+Q: quotes with their documents come before the answer."""
    said = parsing.before_answer(str(results[0]))
    ids = citation_metrics(parsing.document_ids(said), gold_places(doc))
    return _answered(doc, results, {**ids, "quotes": _quoted(parsing.quotes(said), doc)})


def _answered(doc: Mapping[str, Any], results: Sequence[Any], more: Mapping[str, float]) -> dict[str, Any]:
    metrics = answer_metrics(str(results[0]), doc["answers"])
    return with_telemetry({**metrics, **more}, results[0], parsed=bool(metrics["parse_rate"]))


def retrieved_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of document-id retrieval."""
    named, gold = parsing.document_ids(parsing.without_thinking(str(results[0]))), gold_places(doc)
    ranked = named or []
    metrics = {
        "recall_1": recall_at(ranked, gold, 1),
        "recall_5": recall_at(ranked, gold, 5),
        "mrecall_5": mrecall_at(ranked, gold, 5),
        **citation_metrics(named, gold),
    }
    return with_telemetry(metrics, results[0], parsed=named is not None)


def listed_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` where `answers` are references that should all be given."""
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
    """`process_results` of answers that may be a sentence; `number` compares figures where the gold answer is one."""
    from lceval.tasks.finance.numbers import number_match

    metrics = answer_metrics(str(results[0]), doc["answers"])
    matches = [number_match(extract(str(results[0])).answer, answer) for answer in doc["answers"]]
    known = [match for match in matches if match is not None]
    made = with_telemetry(dict(metrics), results[0], parsed=bool(metrics["parse_rate"]))
    failed = made.get("kv", {}).get("status") == "error"
    return {**made, "number": None if not known else 0.0 if failed else max(known)}


def with_telemetry(metrics: dict[str, float], response: object, *, parsed: bool) -> dict[str, Any]:
    """The metrics, and those that the response's `meta` adds.

    `kv["status"]` says how the sample ended: error, truncated (the model says so), wrong_format or ok.
    """
    meta = getattr(response, "meta", None)
    if not isinstance(meta, Mapping):
        return metrics
    kv = dict(meta.get("kv") or {})
    status = meta.get("status", kv.get("status", "ok"))
    if status == "ok" and kv.get("truncated"):
        status = "truncated"
    elif status == "ok" and not parsed:
        status = "wrong_format"
    if status == "error":
        metrics = dict.fromkeys(metrics, 0.0)
    return {
        **metrics,
        "kv_bytes": meta.get("kv_bytes", 0),
        "kv_bytes_full": meta.get("kv_bytes_full", 0),
        "kv": {**kv, "status": status},
        **{name: meta[name] for name in DIAGNOSES if name in meta},
    }


def mean_known(items: Iterable[float | None]) -> float:
    """Aggregation of a diagnosis: the mean over the samples that allow it, nan if none does."""
    known = [item for item in items if item is not None]
    return math.fsum(known) / len(known) if known else math.nan


def kept_share(items: Iterable[Mapping[str, Any]]) -> float:
    """Aggregation of the `kv` metric: the mean kept share of the samples that were run, nan if none was."""
    ran = (item for item in items if item.get("status") != "error")
    shares = [float(item["kept_share"]) for item in ran if item.get("kept_share") is not None]
    return math.fsum(shares) / len(shares) if shares else math.nan
