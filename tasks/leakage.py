"""Which passages give an answer away: those whose normalised text contains the normalised answer."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from lceval.tasks.parsing import normalize


class LeakIndex:
    """Substring search over a pool of passages, all normalised once.

    The texts are searched as one string with line feeds between, which normalised text never contains.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.normalized = [normalize(text) for text in texts]
        self._joined = "\n".join(self.normalized)
        self._starts: list[int] = []
        start = 0
        for text in self.normalized:
            self._starts.append(start)
            start += len(text) + 1
        self._starts.append(start)  # past the end, where a search finds nothing

    def holders(self, answers: Iterable[str]) -> set[int]:
        """Indices of the passages that contain any of the answers (already normalised, not empty)."""
        found: set[int] = set()
        for answer in answers:
            at = self._joined.find(answer)
            while at >= 0:
                passage = bisect_right(self._starts, at) - 1
                found.add(passage)
                at = self._joined.find(answer, self._starts[passage + 1])
        return found
