"""The texts of lceval's own decoding loop against those of transformers' `generate`, on real questions.

    python tests/peers/generate.py --requests 200 --kv snapkv:0.5 --task lc_squad_ao_1k

The packaged model answers the first questions of a task, one by one and in batches of 8, greedily; the contexts are
prefilled once. Every third question ends at a stop string that begins and ends within tokens. Prints the equal texts
and the seconds of both sides, without prefills; exit code 1 if a text differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any
from unittest import mock

from lm_eval.api.instance import Instance

from lceval import packaged
from lceval.bench.comparison import requests_of
from lceval.models import generation
from lceval.models.lcft import LCFT

# Within " over", " term", " later"; and across the end of a word.
WITHIN = ["er", "s t"]


def requests(model: LCFT, task: str, count: int) -> list[Instance]:
    """The first questions of a task, every third with stop strings of its own."""
    _, contexts = requests_of(task, packaged.NAME, model, template=True)
    every = [request for context in contexts for request in context.requests][:count]
    for number, request in enumerate(every):
        prompt, how = request.args
        until = WITHIN if number % 3 == 2 else how["until"]
        request.arguments = (prompt, {**how, "until": until, "max_gen_toks": 32})
    # Batches share their stop strings.
    return sorted(every, key=lambda request: request.args[1]["until"] == WITHIN)


def answered(model: LCFT, every: list[Instance], loop: Any) -> tuple[list[str], float]:
    """Texts, and seconds of questions and decoding."""
    with mock.patch.object(generation, "selection", loop):
        answers = model.generate_until(every, disable_tqdm=False)
    return [str(text) for text in answers], sum(
        text.meta["kv"]["question_s"] + text.meta["kv"]["decode_s"] for text in answers
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kv", default="snapkv:0.5")
    parser.add_argument("--task", default="lc_squad_ao_1k")
    chosen = parser.parse_args()
    model, differing = LCFT(packaged.NAME, kv=chosen.kv, device="cpu", dtype="float32", prefix_cache_gib=6.0), 0
    every = requests(model, chosen.task, chosen.requests)
    for rows in (1, 8):
        model.batch_size_per_gpu = rows
        started = time.perf_counter()
        ours, our_s = answered(model, every, generation.selection)
        theirs, their_s = answered(model, every, lambda *_: None)
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        differing += len(every) - equal
        print(
            f"batch {rows}: {equal} of {len(every)} texts equal; {our_s:.0f} s, generate {their_s:.0f} s "
            f"({time.perf_counter() - started:.0f} s in all)",
            flush=True,
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
