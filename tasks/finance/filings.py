"""Rows of `lc_filings_ao_*`: look-ups in annual reports of invented companies, four questions per context.

Generated from a seed, without hub or data folder. The questions on a context are on different kinds of fact, each from
a filing in its own quarter of the context (or shared, with fewer than four filings). A normalised answer occurs once in
all filings and remarks of the context.
"""

import random
from collections.abc import Sequence
from functools import partial

from lceval.core.errors import UserError
from lceval.tasks.compose import Contract, Fitter
from lceval.tasks.finance.companies import Fact, Filing, filings
from lceval.tasks.parsing import normalize
from lceval.tasks.prompts import block
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row

CONTEXTS = 12
QUESTIONS_PER_CONTEXT = 4

_REMARK_SHARE = 0.05  # minimum share of the limit for remarks, which are selected to reach the length
_DRAWS = 4  # attempts to draw questions of similar length, before a wider contract is used


def rows(request: Request) -> RowPlan:
    """All rows of one length: 12 contexts with 4 questions each."""
    return RowPlan({}, lambda: [row for number in range(CONTEXTS) for row in _context_rows(request, number)])


def _context_rows(request: Request, number: int) -> list[Row]:
    meter, limit = request.meter_and_limit
    rng = random.Random(f"filings {request.seed} {limit} {number}")
    included = _as_many_as_fit(request, list(filings(rng)))
    remarks = [(filing, remark) for filing, item in enumerate(included) for remark in item.remarks]
    rng.shuffle(remarks)
    costs = meter.pieces([f" {remark}" for _, remark in remarks])

    cluster = f"filings-{limit // 1024}k-{number:02d}"

    def arrange(questions: Sequence[str], chosen: Sequence[int]) -> tuple[list[Document], list[int]]:
        added: list[list[str]] = [[] for _ in included]
        for filing, remark in (remarks[index] for index in chosen):
            added[filing].append(remark)
        docs = [
            Document(pid=f"{cluster}-{index:02d}", title=filing.title, text=" ".join((filing.body, *more)))
            for index, (filing, more) in enumerate(zip(included, added, strict=True))
        ]
        return docs, request.totals(docs, questions)

    for contract in [Contract.preferred(limit, meter)] * _DRAWS + [Contract.guaranteed(limit)]:
        facts = choose_facts(included, rng)
        fitted = Fitter(contract).fit(costs, partial(arrange, [fact.question for _, fact in facts]))
        if fitted is not None:
            break
    else:
        raise UserError(f"{request.task} cannot reach {limit} tokens of this tokenizer within 2%: use a longer task.")
    docs, lengths = fitted
    return [
        request.row(
            id=f"{cluster}-q{index}",
            question=fact.question,
            answers=[fact.answer],
            docs=docs,
            gold_pids=[docs[filing]["pid"]],
            cluster=cluster,
            length_tokens=length,
            source=f"lceval filings, seed {request.seed}",
        )
        for index, ((filing, fact), length) in enumerate(zip(facts, lengths, strict=True))
    ]


def _as_many_as_fit(request: Request, candidates: Sequence[Filing]) -> list[Filing]:
    """The first filings that leave room for the longest question, the reply and some remarks."""
    meter, limit = request.meter_and_limit
    longest = max((fact.question for filing in candidates for fact in filing.facts), key=len)
    remaining = limit * (1 - _REMARK_SHARE) - request.totals([], [longest])[0]
    included: list[Filing] = []
    costs = meter.pieces([f"{block(request.dataset.layout, [filing.body])}\n\n" for filing in candidates])
    for filing, cost in zip(candidates, costs, strict=True):
        remaining -= cost
        if remaining < 0:
            break
        included.append(filing)
    if not included:
        raise UserError(f"{request.task} cannot fit a filing into {limit} tokens of this tokenizer: use a longer task.")
    return included


def choose_facts(included: Sequence[Filing], rng: random.Random) -> list[tuple[int, Fact]]:
    """Draw facts of different kinds, spread over the context; each with the index of its filing."""
    full_text = "\n".join(normalize(" ".join((filing.body, *filing.remarks))) for filing in included)
    facts: list[tuple[int, Fact]] = []
    for quarter in range(QUESTIONS_PER_CONTEXT):
        start = len(included) * quarter // QUESTIONS_PER_CONTEXT
        end = len(included) * (quarter + 1) // QUESTIONS_PER_CONTEXT
        filing = rng.randrange(start, max(end, start + 1))
        kinds = {fact.kind for _, fact in facts}
        unique = [fact for fact in included[filing].facts if full_text.count(normalize(fact.answer)) == 1]
        # city and officers are always unique, so one list is never empty
        facts.append((filing, rng.choice([fact for fact in unique if fact.kind not in kinds] or unique)))
    return facts
