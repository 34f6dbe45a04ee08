"""Statistics on training rows: tokens, depth of gold documents, lengths of gold and negatives, leaks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from lceval.tasks import prompts
from lceval.tasks.parsing import normalize
from lceval.tasks.rows import by_context
from lceval.tasks.tokens import TokenMeter
from lceval.training.data import Spec, TrainingRow, kept_out
from lceval.training.promotion import Promotion

DEPTHS = 10


def report(
    spec: Spec, rows: Sequence[TrainingRow], promotion: Promotion, meter: TokenMeter, judge: str | None = None
) -> dict[str, Any]:
    """The report of `lceval train data`.

    `tokens.packed` counts a context once with all its questions and replies, `tokens.one_by_one` once per question;
    both without a chat template. `depth` is the share of gold documents in each tenth of the context. `lengths`
    compares gold with other documents in tokens; `gold_longer` is the probability that a random gold document is longer
    than a random other (ties count half; 0.5: length carries no information), with the p-value of Mann-Whitney's test.
    `leaks.kept_out` is the mean number of passages excluded per context because they contain an answer (pools only);
    `leaks.left` is the number of documents that contain an answer of the question and are not gold.

    Args:
        judge: name of the judge that confirmed relabelled negatives.
    """
    contexts = [*by_context(rows).values()]
    sizes = [len(group) for group in contexts]
    return {
        "rows": len(rows),
        "contexts": len(contexts),
        "distinct_questions": len({(row["dataset"], row["question"]) for row in rows}),
        "questions_per_context": {"least": min(sizes), "mean": fmean(sizes), "most": max(sizes)},
        "by": dict(Counter(f"{row['dataset']} {row['output_format']}" for row in rows)),
        "tokens": _tokens(contexts, meter),
        "gold_per_question": fmean(len(row["gold_pids"]) for row in rows),
        "depth": _depths(rows),
        "lengths": lengths(contexts, meter),
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


def _tokens(contexts: Sequence[Sequence[TrainingRow]], meter: TokenMeter) -> dict[str, int]:
    prefixes = meter.pieces([prompts.join(rows[0]["instruction"], rows[0]["context"], "") for rows in contexts])
    questions = [sum(meter.pieces([row["ask"] for row in rows])) for rows in contexts]
    targets = [sum(meter.pieces([row["target"] for row in rows])) for rows in contexts]
    suffixes = sum(questions) + sum(targets)
    repeated = sum(prefix * len(rows) for prefix, rows in zip(prefixes, contexts, strict=True))
    return {
        "context": sum(prefixes),
        "questions": sum(questions),
        "targets": sum(targets),
        "packed": sum(prefixes) + suffixes,
        "one_by_one": repeated + suffixes,
    }


def _depths(rows: Sequence[TrainingRow]) -> list[float]:
    """Share of the gold documents in each tenth of the context; a document that spans several counts in parts."""
    sums, golds = [0.0] * DEPTHS, 0
    for row in rows:
        width = DEPTHS / max(len(row["docs"]), 1)  # of a document, in tenths of the context
        for number, document in enumerate(row["docs"]):
            if document["pid"] in row["gold_pids"]:
                golds += 1
                for tenth in range(DEPTHS):
                    overlap = min(tenth + 1, (number + 1) * width) - max(tenth, number * width)
                    sums[tenth] += max(0.0, overlap) / width
    return [total / golds for total in sums] if golds else sums


def lengths(contexts: Sequence[Sequence[TrainingRow]], meter: TokenMeter) -> dict[str, float | int] | None:
    """Lengths of gold against other documents in tokens; None unless there are both."""
    from scipy.stats import mannwhitneyu

    golds: list[int] = []
    others: list[int] = []
    for rows in contexts:
        pids = {pid for row in rows for pid in row["gold_pids"]}
        counts = meter.pieces([document["text"] for document in rows[0]["docs"]])
        for document, count in zip(rows[0]["docs"], counts, strict=True):
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
    answers = [normalized for answer in row["answers"] if (normalized := normalize(answer))]
    if not row["gold_pids"]:
        return 0
    texts = (normalize(document["text"]) for document in row["docs"] if document["pid"] not in row["gold_pids"])
    return sum(any(answer in text for answer in answers) for text in texts)


def text(report: Mapping[str, Any]) -> str:
    """The report as text."""
    per, tokens, lengths, leaks = (report[key] for key in ("questions_per_context", "tokens", "lengths", "leaks"))
    by = ", ".join(f"{name} {count:,}" for name, count in report["by"].items())
    lines = [
        f"rows       {report['rows']:,} on {report['contexts']:,} contexts ({by}); "
        f"{report['distinct_questions']:,} distinct questions",
        f"questions  {per['least']} to {per['most']} per context, mean {per['mean']:.1f}",
        f"tokens     contexts {tokens['context']:,}, questions {tokens['questions']:,}, "
        f"replies {tokens['targets']:,}; packed {tokens['packed']:,}, one by one {tokens['one_by_one']:,}",
        f"gold       {report['gold_per_question']:.2f} documents per question; percent in each tenth of the context: "
        f"{' '.join(f'{100 * share:.0f}' for share in report['depth'])}",
    ]
    if lengths is not None:
        lines.append(
            f"lengths    gold / other documents: mean {lengths['mean_ratio']:.2f}, "
            f"median {lengths['median_ratio']:.2f}; "
            f"P(gold longer) {lengths['gold_longer']:.2f} (p = {lengths['p']:.2g})"
        )
    promotion = report["promotion"]
    judged = "no judge"
    if promotion["judge"]:
        judged = f"{promotion['judge']}: {promotion['refused']} refused, {promotion['unjudged']} unjudged"
    lines.append(
        f"promoted   {promotion['promoted']} of {promotion['compared']:,} negatives relabelled as gold "
        f"({promotion['matched']} matched; {judged})"
    )
    if leaks["kept_out"] is not None:
        lines.append(f"leaks      {leaks['kept_out']:.1f} passages excluded per context; {leaks['left']} left")
    else:
        lines.append(f"leaks      {leaks['left']} left")
    return "\n".join(lines)
