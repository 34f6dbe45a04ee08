"""Metrics of summaries: ROUGE F-measures against several references.

As in InfiniteBench and SQuALITY: maximum over the references for each measure, no stemming, and the sentences of
ROUGE-Lsum are lines. For one-line texts, ROUGE-Lsum therefore equals ROUGE-L.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lceval.tasks.parsing import without_thinking
from lceval.tasks.scoring import with_telemetry

_MEASURES = ("rougeLsum", "rougeL", "rouge1", "rouge2")


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # heavy

    return RougeScorer([*_MEASURES], use_stemmer=False)


def rouge(summary: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE F-measures of a summary, each the maximum over the references."""
    scores = [_scorer().score(reference, summary) for reference in references]
    return {name: max((float(score[name].fmeasure) for score in scores), default=0.0) for name in _MEASURES}


def summary_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    """`process_results` of summaries: the whole output without thinking."""
    summary = without_thinking(str(results[0]))
    return with_telemetry(rouge(summary, doc["answers"]), results[0], parsed=bool(summary))
