"""Rows of `lc_filings_ao_*`: simple look-ups in annual reports of invented companies, four a context.

Generated from a seed; needs neither the hub nor a data folder. The questions on a context ask for
different kinds of fact, each from a filing in its own quarter of the context (with fewer than four filings
they share them); an answer, normalised, stands once in all the text that the context could have shown.
"""

import random
from collections.abc import Sequence
from functools import partial

from lceval.errors import UserError
from lceval.tasks.build import Plan, Request
from lceval.tasks.compose import Contract, Fitter
from lceval.tasks.finance.companies import Fact, Filing, filings
from lceval.tasks.parsing import normalize
from lceval.tasks.prompts import block
from lceval.tasks.rows import Document, Row

CONTEXTS = 12
QUESTIONS_PER_CONTEXT = 4

_REMARK_SHARE = 0.05  # of the limit, left at least for remarks, whose choice makes the length exact
_DRAWS = 4  # of questions, whose lengths must lie close together, before a wider contract is accepted


def rows(request: Request) -> Plan:
    """All rows of one length: twelve contexts with four questions each."""
    return Plan({}, lambda: [row for number in range(CONTEXTS) for row in _context_rows(request, number)])


def _context_rows(request: Request, number: int) -> list[Row]:
    meter, limit = request.fitted
    rng = random.Random(f"filings {request.seed} {limit} {number}")
    shown = _as_many_as_fit(request, list(filings(rng)))
    remarks = [(filing, remark) for filing, of in enumerate(shown) for remark in of.remarks]
    rng.shuffle(remarks)
    costs = meter.pieces([f" {remark}" for _, remark in remarks])

    def texts(chosen: Sequence[int]) -> list[str]:
        added: list[list[str]] = [[] for _ in shown]
        for filing, remark in (remarks[index] for index in chosen):
            added[filing].append(remark)
        return [" ".join((filing.body, *more)) for filing, more in zip(shown, added, strict=True)]

    def totals(questions: Sequence[str], chosen: Sequence[int]) -> list[int]:
        return request.totals([Document(pid="", title="", text=text) for text in texts(chosen)], questions)

    for contract in [Contract.preferred(limit, meter)] * _DRAWS + [Contract.promised(limit)]:
        asked = choose_facts(shown, rng)
        questions = [fact.question for _, fact in asked]
        fitted = Fitter(contract).fit(costs, partial(totals, questions))
        if fitted is not None:
            break
    else:
        raise UserError(f"{request.task} cannot come within 2% of {limit} tokens of this tokenizer: use a longer task.")
    chosen, lengths = fitted
    cluster = f"filings-{limit // 1024}k-{number:02d}"
    docs = [
        Document(pid=f"{cluster}-{index:02d}", title=filing.title, text=text)
        for index, (filing, text) in enumerate(zip(shown, texts(chosen), strict=True))
    ]
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
        for index, ((filing, fact), length) in enumerate(zip(asked, lengths, strict=True))
    ]


def _as_many_as_fit(request: Request, offered: Sequence[Filing]) -> list[Filing]:
    """The first filings whose bodies leave room for the longest question, the answer and some remarks."""
    meter, limit = request.fitted
    longest = max((fact.question for filing in offered for fact in filing.facts), key=len)
    room = limit * (1 - _REMARK_SHARE) - request.totals([], [longest])[0]
    shown: list[Filing] = []
    costs = meter.pieces([f"{block(request.dataset.layout, [filing.body])}\n\n" for filing in offered])
    for filing, cost in zip(offered, costs, strict=True):
        room -= cost
        if room < 0:
            break
        shown.append(filing)
    if not shown:
        raise UserError(f"{request.task} cannot place a filing in {limit} tokens of this tokenizer: use a longer task.")
    return shown


def choose_facts(shown: Sequence[Filing], rng: random.Random) -> list[tuple[int, Fact]]:
    """The facts to ask for, with the index of their filing: spread over the context, of different kinds."""
    everything = "\n".join(normalize(" ".join((filing.body, *filing.remarks))) for filing in shown)
    asked: list[tuple[int, Fact]] = []
    for quarter in range(QUESTIONS_PER_CONTEXT):
        start = len(shown) * quarter // QUESTIONS_PER_CONTEXT
        end = len(shown) * (quarter + 1) // QUESTIONS_PER_CONTEXT
        filing = rng.randrange(start, max(end, start + 1))
        kinds = {fact.kind for _, fact in asked}
        clear = [fact for fact in shown[filing].facts if everything.count(normalize(fact.answer)) == 1]
        # city and officers are always clear, so that one list is never empty
        asked.append((filing, rng.choice([fact for fact in clear if fact.kind not in kinds] or clear)))
    return asked
