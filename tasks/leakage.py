"""Answer leakage: find the passages whose normalised text contains a normalised answer."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from lceval.tasks.parsing import normalize


class LeakIndex:
    """Substring search over a pool of passages, each normalised once.

    The texts are joined by line feeds, which normalised text never contains, and searched as one string.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.normalized = [normalize(text) for text in texts]
        self._joined = "\n".join(self.normalized)
        self._starts: list[int] = []
        start = 0
        for text in self.normalized:
            self._starts.append(start)
            start += len(text) + 1
        self._starts.append(start)  # past the end: str.find then returns -1

    def containing(self, answers: Iterable[str]) -> set[int]:
        """Indices of the passages that contain any of the answers (already normalised, not empty)."""
        passages: set[int] = set()
        for answer in answers:
            offset = self._joined.find(answer)
            while offset >= 0:
                passage = bisect_right(self._starts, offset) - 1
                passages.add(passage)
                offset = self._joined.find(answer, self._starts[passage + 1])
        return passages
