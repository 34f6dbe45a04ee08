"""Figures on training rows: tokens, depth of the gold, likeness of gold and negatives in length, what leaks."""

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from lceval.tasks import prompts
from lceval.tasks.parsing import normalize
from lceval.tasks.tokens import TokenMeter
from lceval.training.data import Spec, TrainingRow, kept_out
from lceval.training.promotion import Promotion

DEPTHS = 10


def report(
    spec: Spec, rows: Sequence[TrainingRow], promotion: Promotion, meter: TokenMeter, judge: str | None = None
) -> dict[str, Any]:
    """All that `lceval train data` says; `judge` is who was asked about the promotion.

    `tokens.packed` reads a context once with all its questions and replies, `tokens.one_by_one` once a question;
    neither counts a chat template. `depth` is the share of gold documents in each tenth of the context. `lengths` sets
    gold documents beside the others in tokens; `gold_longer` is the chance that of one of each the gold is the longer
    (a tie is half; 0.5: nothing to learn from length), with Mann-Whitney's p. `leaks` counts, per context, passages
    kept out as they hold an answer (`kept_out`; pools alone), and documents that are there, hold an answer of the
    question and are not gold (`left`).
    """
    contexts: dict[str, list[TrainingRow]] = {}
    for row in rows:
        contexts.setdefault(row["cluster"], []).append(row)
    sizes = [len(of) for of in contexts.values()]
    return {
        "rows": len(rows),
        "contexts": len(contexts),
        "distinct_questions": len({(row["dataset"], row["question"]) for row in rows}),
        "questions_per_context": {"least": min(sizes), "mean": fmean(sizes), "most": max(sizes)},
        "by": _counts(rows),
        "tokens": _tokens(list(contexts.values()), meter),
        "gold_per_question": fmean(len(row["gold_pids"]) for row in rows),
        "depth": _depths(rows),
        "lengths": lengths(list(contexts.values()), meter),
        "promotion": {
            "compared": promotion.compared,
            "matched": promotion.matched,
            "judge": judge,
            "refused": promotion.refused,
            "unjudged": promotion.unjudged,
            "promoted": promotion.promoted,
        },
        "leaks": {"kept_out": kept_out(spec, rows), "left": sum(_leaking(row) for row in rows)},
    }


def _counts(rows: Sequence[TrainingRow]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows:
        key = f"{row['dataset']} {row['output_format']}"
        found[key] = found.get(key, 0) + 1
    return found


def _tokens(contexts: Sequence[Sequence[TrainingRow]], meter: TokenMeter) -> dict[str, int]:
    heads = meter.pieces([prompts.join(of[0]["instruction"], of[0]["context"], "") for of in contexts])
    asks = [sum(meter.pieces([row["ask"] for row in of])) for of in contexts]
    targets = [sum(meter.pieces([row["target"] for row in of])) for of in contexts]
    tails = sum(asks) + sum(targets)
    repeated = sum(head * len(of) for head, of in zip(heads, contexts, strict=True))
    return {
        "context": sum(heads),
        "questions": sum(asks),
        "targets": sum(targets),
        "packed": sum(heads) + tails,
        "one_by_one": repeated + tails,
    }


def _depths(rows: Sequence[TrainingRow]) -> list[float]:
    """Of the gold documents, the share in each tenth of the context; one that spans several counts in parts."""
    found, golds = [0.0] * DEPTHS, 0
    for row in rows:
        wide = DEPTHS / max(len(row["docs"]), 1)  # of a document, in tenths
        for place, document in enumerate(row["docs"]):
            if document["pid"] in row["gold_pids"]:
                golds += 1
                for tenth in range(DEPTHS):
                    found[tenth] += max(0.0, min(tenth + 1, (place + 1) * wide) - max(tenth, place * wide)) / wide
    return [share / golds for share in found] if golds else found


def lengths(contexts: Sequence[Sequence[TrainingRow]], meter: TokenMeter) -> dict[str, float | int] | None:
    """Gold documents beside the others, in tokens; None where there are not both."""
    from scipy.stats import mannwhitneyu

    golds: list[int] = []
    others: list[int] = []
    for of in contexts:
        pids = {pid for row in of for pid in row["gold_pids"]}
        counts = meter.pieces([document["text"] for document in of[0]["docs"]])
        for document, count in zip(of[0]["docs"], counts, strict=True):
            (golds if document["pid"] in pids else others).append(count)
    if not golds or not others:
        return None
    test = mannwhitneyu(golds, others)
    return {
        "golds": len(golds),
        "others": len(others),
        "mean_ratio": fmean(golds) / fmean(others),
        "median_ratio": median(golds) / median(others),
        "gold_longer": float(test.statistic) / (len(golds) * len(others)),
        "p": float(test.pvalue),
    }


def _leaking(row: TrainingRow) -> int:
    answers = [said for answer in row["answers"] if (said := normalize(answer))]
    if not row["gold_pids"]:
        return 0
    texts = (normalize(document["text"]) for document in row["docs"] if document["pid"] not in row["gold_pids"])
    return sum(any(answer in text for answer in answers) for text in texts)


def text(found: Mapping[str, Any]) -> str:
    """The report for people."""
    per, tokens, lengths, leaks = (found[key] for key in ("questions_per_context", "tokens", "lengths", "leaks"))
    by = ", ".join(f"{name} {count:,}" for name, count in found["by"].items())
    lines = [
        f"rows       {found['rows']:,} on {found['contexts']:,} contexts ({by}); "
        f"{found['distinct_questions']:,} different questions",
        f"questions  {per['least']} to {per['most']} on a context, {per['mean']:.1f} on average",
        f"tokens     {tokens['context']:,} of contexts, {tokens['questions']:,} of questions, {tokens['targets']:,} of "
        f"replies: {tokens['packed']:,} packed, {tokens['one_by_one']:,} one by one",
        f"gold       {found['gold_per_question']:.2f} documents a question; percent in each tenth of the context: "
        f"{' '.join(f'{100 * share:.0f}' for share in found['depth'])}",
    ]
    if lengths is not None:
        lines.append(
            f"lengths    gold / other documents: mean {lengths['mean_ratio']:.2f}, "
            f"median {lengths['median_ratio']:.2f}; gold the longer of two: "
            f"{lengths['gold_longer']:.2f} (p = {lengths['p']:.2g})"
        )
    promotion = found["promotion"]
    judged = "no judge"
    if promotion["judge"]:
        judged = f"{promotion['judge']}: {promotion['refused']} refused, {promotion['unjudged']} unjudged"
    lines.append(
        f"promoted   {promotion['promoted']} of {promotion['compared']:,} negatives "
        f"({promotion['matched']} matched; {judged})"
    )
    if leaks["kept_out"] is not None:
        lines.append(f"leaks      {leaks['kept_out']:.1f} passages a context kept out; {leaks['left']} left")
    else:
        lines.append(f"leaks      {leaks['left']} left")
    return "\n".join(lines)
