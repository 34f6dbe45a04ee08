"""Rows of the needle tasks, over real text (after RULER, Hsieh et al. 2024): codes to look up, variables to trace.

RULER asks one question on each text. Here, where a kind allows it, five questions share one and each one's needles are
distractors of the others, so that a context is read once for five rows. The needles of a length stand at depths that
are spread evenly over all rows, in random order; the values of a key, and keys asked for together, are apart. Texts
of all lengths hide the same needles. Prompts are our own, so scores are not comparable to RULER's.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from lceval.tasks.build import Plan, Request
from lceval.tasks.icr.haystack import SCHEMA, STORIES, Haystack, depth_of, unable
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
class Asked:
    """A question on a context: its answers, and which needles hold them."""

    text: str
    answers: tuple[str, ...]
    needles: tuple[int, ...]


@dataclass(frozen=True)
class Hidden:
    """What one context hides, in the order in which it stands there, and what is asked about it."""

    needles: tuple[str, ...]
    asked: tuple[Asked, ...]


def codes(request: Request) -> Plan:
    """Codes of things. Options: contexts, keys on each, values of a key, questions on each, keys that one asks for."""
    (stories,) = read_sources(request.task, {STORIES: SCHEMA})
    return Plan({"source": stories.identity}, lambda: _build(request, stories, _codes))


def variables(request: Request) -> Plan:
    """Chains of assignments. Options: contexts, chains on each (every one is asked for), variables of a chain."""
    (stories,) = read_sources(request.task, {STORIES: SCHEMA})
    return Plan({"source": stories.identity}, lambda: _build(request, stories, _variables))


def _build(request: Request, stories: SourceFile, hide: Callable[[Request, str, random.Random], Hidden]) -> list[Row]:
    name, count = request.dataset.dataset, int(request.dataset.options["contexts"])
    haystack = Haystack(request, stories)
    made: list[Row] = []
    for number in range(count):
        rng = random.Random(f"{name} {request.seed} {number}")
        hidden = hide(request, haystack.text, rng)
        needles = [Document(pid=f"needle-{place}", title="", text=text) for place, text in enumerate(hidden.needles)]
        # Each stretch of the text holds one needle, at a place that moves through it from context to context.
        depths = [(place + (number + 0.5) / count) / len(needles) for place in range(len(needles))]
        fitted = haystack.context(needles, depths, [asked.text for asked in hidden.asked], rng)
        if fitted is None:
            raise unable(request, f"{len(needles)} needles and text between them")
        documents, totals = fitted
        for place, (asked, total) in enumerate(zip(hidden.asked, totals, strict=True)):
            pids = [needles[needle]["pid"] for needle in asked.needles]
            made.append(
                request.row(
                    id=f"{name}-{number:02d}-{place}",
                    question=asked.text,
                    answers=asked.answers,
                    docs=documents,
                    gold_pids=pids,
                    cluster=f"{name}-{request.fitted[1] // 1024}k-{number:02d}",
                    source=stories.identity,
                    length_tokens=total,
                    depth=depth_of(request.dataset.layout, documents, pids),
                )
            )
    return made


def _codes(request: Request, text: str, rng: random.Random) -> Hidden:
    options = request.dataset.options
    things = [f"{first} {second}" for first in _FIRST.split() for second in _SECOND.split()]
    keys = _absent(text, iter(rng.sample(things, len(things))), options["keys"])
    values = _absent(text, _numbers(rng, 7), options["keys"] * options["values"])
    pairs = [(keys[place % len(keys)], value) for place, value in enumerate(values)]
    rng.shuffle(pairs)
    asked = []
    for first in range(options["questions"]):
        wanted = [keys[(first + step) % len(keys)] for step in range(options["asked"])]
        found = [(place, value) for key in wanted for place, (of, value) in enumerate(pairs) if of == key]
        asked.append(
            Asked(_code_question(wanted, options["values"]), tuple(v for _, v in found), tuple(p for p, _ in found))
        )
    return Hidden(tuple(f"The access code of the {key} is {value}." for key, value in pairs), tuple(asked))


def _code_question(keys: Sequence[str], values: int) -> str:
    if len(keys) > 1:
        return f"What are the access codes of the {', the '.join(keys[:-1])} and the {keys[-1]}?"
    return (
        f"What is the access code of the {keys[0]}?"
        if values == 1
        else f"What are all the access codes of the {keys[0]}?"
    )


def _variables(request: Request, text: str, rng: random.Random) -> Hidden:
    chains, length = request.dataset.options["chains"], request.dataset.options["variables"]
    names = _absent(text, _names(rng), chains * length)
    values = _absent(text, _numbers(rng, 5), chains)
    # The chains are mixed, and each stays in its order: a variable is assigned before another takes its value.
    turns = [chain for chain in range(chains) for _ in range(length)]
    rng.shuffle(turns)
    needles: list[str] = []
    places: list[list[int]] = [[] for _ in range(chains)]
    for turn in turns:
        own, done = names[turn * length : (turn + 1) * length], len(places[turn])
        needles.append(f"VAR {own[done]} = {f'VAR {own[done - 1]}' if done else values[turn]}")
        places[turn].append(len(needles) - 1)
    asked = [
        Asked(
            f'The text assigns variables by lines such as "VAR A = 1" and "VAR B = VAR A". Which variables hold the '
            f"value {values[chain]}, directly or by way of others?",
            tuple(names[chain * length : (chain + 1) * length]),
            tuple(places[chain]),
        )
        for chain in range(chains)
    ]
    return Hidden(tuple(needles), tuple(asked))


def _numbers(rng: random.Random, digits: int) -> Iterator[str]:
    while True:
        yield str(rng.randrange(10 ** (digits - 1), 10**digits))


def _names(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(rng.sample(ascii_uppercase, 5))


def _absent(text: str, offered: Iterator[str], count: int) -> list[str]:
    """The first different words on offer that the text does not hold."""
    found: dict[str, None] = {}
    while len(found) < count:
        word = next(offered)
        if word.lower() not in text:
            found[word] = None
    return [*found]
