"""LOFT's metrics for predictions in LOFT's format (Lee et al. 2024): document ids or answers.

A prediction is, for each turn of a conversation, a ranked list of ids or answers. Each turn is scored separately. Text
is normalised as for SQuAD after Unicode decomposition (NFD), so that accents are separate characters and are compared.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import normalize
from lceval.tasks.scoring import overlap_f1

CUTOFFS = (1, 2, 3, 5)


def recall_at(ranked: Sequence[str], golds: Sequence[str], k: int) -> float:
    """Share of the gold documents among the first k ids."""
    return len(set(ranked[:k]) & set(golds)) / len(golds)


def mrecall_at(ranked: Sequence[str], golds: Sequence[str], k: int) -> float:
    """1.0 if the first k ids contain min(k, golds) gold documents (Min et al. 2021)."""
    return float(len(set(ranked[:k]) & set(golds)) == min(k, len(golds)))


def retrieval_metrics(outputs: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Recall and MRecall of ids at LOFT's cutoffs."""
    ranked, gold_ids = [output.strip() for output in outputs], [gold.strip() for gold in golds]
    return {
        **{f"recall_{k}": recall_at(ranked, gold_ids, k) for k in CUTOFFS},
        **{f"mrecall_{k}": mrecall_at(ranked, gold_ids, k) for k in CUTOFFS},
    }


def normalized(text: str) -> str:
    """SQuAD's normalisation of the decomposed text."""
    return normalize(unicodedata.normalize("NFD", text))


def answer_metrics(outputs: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Metrics of the first answer against alternative golds; further answers are ignored."""
    prediction = normalized(outputs[0]) if outputs else ""
    normalized_golds = [normalized(gold) for gold in golds]
    return {
        "subspan_em": float(bool(prediction) and any(gold and gold in prediction for gold in normalized_golds)),
        "em": float(bool(prediction) and prediction in normalized_golds),
        "f1": max(overlap_f1(prediction.split(), gold.split()) for gold in normalized_golds),
    }


def set_metrics(outputs: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Metrics of a set of answers against golds that are all required.

    `subspan_em` is 1.0 if every gold can be matched to a distinct answer such that one contains the other.
    """
    predictions, normalized_golds = [normalized(output) for output in outputs], [normalized(gold) for gold in golds]
    return {
        "subspan_em": float(bool(predictions) and _all_paired(predictions, normalized_golds)),
        "em": float(set(predictions) == set(normalized_golds)),
        "coverage": len(set(predictions) & set(normalized_golds)) / len(normalized_golds),
    }


def _all_paired(predictions: Sequence[str], golds: Sequence[str]) -> bool:
    import numpy as np
    from scipy.optimize import linear_sum_assignment  # heavy

    # An answer that normalises to nothing would be a substring of every gold.
    match = np.array(
        [[bool(text) and (gold in text or text in gold) for text in predictions] for gold in golds],
        dtype=float,
    )
    rows, columns = linear_sum_assignment(match, maximize=True)
    return len(rows) == len(golds) and bool(match[rows, columns].all())


SCORERS: Mapping[str, Callable[[Sequence[str], Sequence[str]], dict[str, float]]] = {
    "loft_retrieval": retrieval_metrics,
    "loft_rag": answer_metrics,
    "loft_rag_multi": set_metrics,
}
"""Scorers of `lceval score` by name."""


def turns(outputs: Sequence[Sequence[Any]], golds: Sequence[Any]) -> list[tuple[list[str], list[str]]]:
    """Pair predictions and golds by turn.

    Args:
        outputs: one list per turn.
        golds: LOFT's `answers`: of a single turn, or one list per turn. An id is `[id, relevance]`.

    Raises:
        ValueError: the numbers of turns differ, or a turn has no gold.
    """
    gold_turns = [golds] if len(outputs) == 1 else [*golds]
    if len(gold_turns) != len(outputs):
        raise ValueError(f"{len(outputs)} turns of outputs and {len(gold_turns)} of answers")
    pairs = []
    for turn_outputs, turn_golds in zip(outputs, gold_turns, strict=True):
        # A single id of a turn may come without an enclosing list.
        listed = [turn_golds] if _is_id(turn_golds) or not isinstance(turn_golds, list) else turn_golds
        answers = [str(gold[0] if _is_id(gold) else gold) for gold in listed]
        if not answers:
            raise ValueError("a turn without an answer")
        pairs.append(([str(output) for output in turn_outputs], answers))
    return pairs


def turns_of(golds: Sequence[Any]) -> int:
    """Number of turns of LOFT's `answers`, for queries without a prediction: lists are one per turn."""
    return len(golds) if all(isinstance(gold, list) and not _is_id(gold) for gold in golds) else 1


def _is_id(gold: object) -> bool:
    return isinstance(gold, list) and len(gold) == 2 and isinstance(gold[0], str) and isinstance(gold[1], int)
