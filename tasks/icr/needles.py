"""Rows of the needle tasks on real text (after RULER, Hsieh et al. 2024): codes to look up, variables to trace.

RULER has one question per context. Here, except in `niah_single`, five questions share a context, so that it is
prefilled once for five rows; the needles of one question are distractors of the others. Needle depths are uniform
over all rows of a length, in random order. Contexts of all lengths have the same needles. Prompts are ours, so scores
are not comparable to RULER's.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from lceval.tasks.icr.haystack import SCHEMA, STORIES, Haystack, depth_of, unable
from lceval.tasks.request import Request, RowPlan
from lceval.tasks.rows import Document, Row
from lceval.tasks.sources import SourceFile, read_sources

_FIRST = (
    "amber brisk cobalt dusty eager frozen gentle hollow ivory jagged knotted lunar mellow nimble olive patient quiet "
    "rustic scarlet tender umber velvet wooden yellow zesty"
)
_SECOND = (
    "anchor badger candle dolphin easel falcon glacier harbor inkwell jasmine kettle lantern magnet needle orchard "
    "pebble quiver ribbon saddle teapot umbrella violin walnut yarrow zither"
)


@dataclass(frozen=True)
class NeedleQuestion:
    """A question with its answers and the indices of the needles that contain them."""

    text: str
    answers: tuple[str, ...]
    needles: tuple[int, ...]


@dataclass(frozen=True)
class Needles:
    """The needles of one context, in order, and its questions."""

    texts: tuple[str, ...]
    questions: tuple[NeedleQuestion, ...]


def codes(request: Request) -> RowPlan:
    """Access codes. Options: contexts; keys, values per key and questions per context; keys asked per question."""
    return _plan(request, _codes)


def variables(request: Request) -> RowPlan:
    """Variable assignments. Options: contexts; chains per context (one question each); variables per chain."""
    return _plan(request, _variables)


def _plan(request: Request, draw: Callable[[Request, str, random.Random], Needles]) -> RowPlan:
    (stories,) = read_sources(request.task, {STORIES: SCHEMA})
    return RowPlan({"source": stories.identity}, lambda: _build(request, stories, draw))


def _build(request: Request, stories: SourceFile, draw: Callable[[Request, str, random.Random], Needles]) -> list[Row]:
    name, count = request.dataset.dataset, int(request.dataset.options["contexts"])
    haystack = Haystack(request, stories)
    built_rows: list[Row] = []
    for number in range(count):
        rng = random.Random(f"{name} {request.seed} {number}")
        hidden = draw(request, haystack.text, rng)
        needles = [Document(pid=f"needle-{place}", title="", text=text) for place, text in enumerate(hidden.texts)]
        # One needle per segment of the text, at an offset that moves through the segment from context to context.
        depths = [(place + (number + 0.5) / count) / len(needles) for place in range(len(needles))]
        fitted = haystack.context(needles, depths, [question.text for question in hidden.questions], rng)
        if fitted is None:
            raise unable(request, f"{len(needles)} needles")
        documents, totals = fitted
        for place, (question, total) in enumerate(zip(hidden.questions, totals, strict=True)):
            pids = [needles[needle]["pid"] for needle in question.needles]
            built_rows.append(
                request.row(
                    id=f"{name}-{number:02d}-{place}",
                    question=question.text,
                    answers=question.answers,
                    docs=documents,
                    gold_pids=pids,
                    cluster=f"{name}-{request.meter_and_limit[1] // 1024}k-{number:02d}",
                    source=stories.identity,
                    length_tokens=total,
                    depth=depth_of(request.dataset.layout, documents, pids),
                )
            )
    return built_rows


def _codes(request: Request, text: str, rng: random.Random) -> Needles:
    options = request.dataset.options
    things = [f"{first} {second}" for first in _FIRST.split() for second in _SECOND.split()]
    keys = _absent(text, iter(rng.sample(things, len(things))), options["keys"])
    values = _absent(text, _numbers(rng, 7), options["keys"] * options["values"])
    pairs = [(keys[place % len(keys)], value) for place, value in enumerate(values)]
    rng.shuffle(pairs)
    questions = []
    for first in range(options["questions"]):
        asked_keys = [keys[(first + step) % len(keys)] for step in range(options["asked"])]
        matches = [(place, value) for key in asked_keys for place, (owner, value) in enumerate(pairs) if owner == key]
        questions.append(
            NeedleQuestion(
                _code_question(asked_keys, options["values"]),
                tuple(value for _, value in matches),
                tuple(place for place, _ in matches),
            )
        )
    return Needles(tuple(f"The access code of the {key} is {value}." for key, value in pairs), tuple(questions))


def _code_question(keys: Sequence[str], values: int) -> str:
    if len(keys) > 1:
        return f"What are the access codes of the {', the '.join(keys[:-1])} and the {keys[-1]}?"
    return (
        f"What is the access code of the {keys[0]}?"
        if values == 1
        else f"What are all the access codes of the {keys[0]}?"
    )


def _variables(request: Request, text: str, rng: random.Random) -> Needles:
    chains, length = request.dataset.options["chains"], request.dataset.options["variables"]
    names = _absent(text, _names(rng), chains * length)
    values = _absent(text, _numbers(rng, 5), chains)
    # Chains are interleaved, each in order: a variable is assigned before another takes its value.
    chain_order = [chain for chain in range(chains) for _ in range(length)]
    rng.shuffle(chain_order)
    needles: list[str] = []
    places: list[list[int]] = [[] for _ in range(chains)]
    for chain_index in chain_order:
        chain_names, step = names[chain_index * length : (chain_index + 1) * length], len(places[chain_index])
        value = f"VAR {chain_names[step - 1]}" if step else values[chain_index]
        needles.append(f"VAR {chain_names[step]} = {value}")
        places[chain_index].append(len(needles) - 1)
    questions = [
        NeedleQuestion(
            f'The text assigns variables by lines such as "VAR A = 1" and "VAR B = VAR A". Which variables hold the '
            f"value {values[chain]}, directly or by way of others?",
            tuple(names[chain * length : (chain + 1) * length]),
            tuple(places[chain]),
        )
        for chain in range(chains)
    ]
    return Needles(tuple(needles), tuple(questions))


def _numbers(rng: random.Random, digits: int) -> Iterator[str]:
    while True:
        yield str(rng.randrange(10 ** (digits - 1), 10**digits))


def _names(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(rng.sample(ascii_uppercase, 5))


def _absent(text: str, candidates: Iterator[str], count: int) -> list[str]:
    """The first `count` distinct candidates that do not occur in the text."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = next(candidates)
        if word.lower() not in text:
            words[word] = None
    return [*words]
