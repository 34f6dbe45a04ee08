"""Short contexts: a prefill of the packaged model on one thread takes half a second, a training step a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from short_contexts import short_contexts

from lceval.tasks import prompts
from lceval.training import data

TOWNS = {"Rena": ("harbour", "Turku"), "Tam": ("tower", "Bergen")}
SENTENCES = "The {what} of {town} was built by a firm from {firm}. It is open to visitors in spring and in autumn."


def row(context_number: int, town: str) -> Any:
    texts = [
        SENTENCES.format(what=what, town=f"{name} {context_number}", firm=firm) for name, (what, firm) in TOWNS.items()
    ]
    what, firm = TOWNS[town]
    question = f"Where is the firm from that built the {what} of {town} {context_number}?"
    return {
        "id": f"{context_number}-{town}",
        "cluster": str(context_number),
        "source": "test",
        "licence": "none",
        "instruction": prompts.instruction("documents", "ao"),
        "context": prompts.block("documents", texts),
        "ask": prompts.ask("ao", question),
        "target": f"Answer: {firm}",
    }


@pytest.fixture(scope="session")
def short_rows(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> Path:
    """A file of two contexts of about 130 tokens with two questions each."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [row(number, town) for number in (1, 2) for town in TOWNS]
    data.write(file, data.spec(datasets=["squad"], tokenizer=smollm2), rows, {"rows": len(rows)})
    return file


@pytest.fixture(scope="module")
def requests(instances: Any) -> list[Any]:
    """Eight questions on two contexts of about 250 tokens, with at most eight new tokens."""
    with short_contexts():
        built: list[Any] = instances("lc_filings_ao_1k", 8)
    assert len({request.doc["cluster"] for request in built}) == 2
    for request in built:
        request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": 8})
    return built
