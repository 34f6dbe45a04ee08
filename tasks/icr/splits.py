"""Train/test split of a pool by source document.

Connected components of passages stay together: passages with the same title (one article) or the same text, and the
gold passages of one question or of identical questions. The hash of a component's first title determines its split, so
a document keeps its split when the pool grows, unless new passages join its component to another.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lceval.tasks.parsing import normalize

TEST_SHARE = 1 / 3
_SALT = "lceval split 1"


def sides(passages: Sequence[Mapping[str, Any]], questions: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return `train` or `test` by pid.

    Args:
        passages: records with pid, title and text; a passage without a title is a separate document.
        questions: records with question and gold_pids.
    """
    links: list[tuple[str, str]] = []
    for passage in passages:
        links.append((f"pid {passage['pid']}", f"text {normalize(passage['text'])}"))
        if title := normalize(passage["title"].replace("_", " ")):
            links.append((f"pid {passage['pid']}", f"article {title}"))
    for question in questions:
        links += [(f"pid {pid}", f"question {normalize(question['question'])}") for pid in question["gold_pids"]]
    component = _components(links)
    lowest: dict[int, str] = {}
    for key, number in component.items():
        if key.startswith(("article ", "text ")):  # titles sort before texts; pids depend on the file
            lowest[number] = min(lowest.get(number, key), key)
    side = {number: "test" if _unit(key) < TEST_SHARE else "train" for number, key in lowest.items()}
    return {passage["pid"]: side[component[f"pid {passage['pid']}"]] for passage in passages}


def _components(links: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The number of the connected component of each key."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    keys = {key: index for index, key in enumerate(dict.fromkeys(key for link in links for key in link))}
    rows, columns = [keys[one] for one, _ in links], [keys[other] for _, other in links]
    graph = coo_array(([True] * len(links), (rows, columns)), shape=(len(keys), len(keys)))
    return dict(zip(keys, connected_components(graph, directed=False)[1].tolist(), strict=True))


def _unit(key: str) -> float:
    """Deterministic number in [0, 1) of a key."""
    return int.from_bytes(hashlib.sha256(f"{_SALT}\n{key}".encode()).digest()[:8]) / 2**64
