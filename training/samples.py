"""The reward as TRL calls it: a batch of samples in, what each is worth out, and a line in a file for every one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lceval.training import rewards
from lceval.training.rewards import Grader, Reward, Row

COMPLETIONS = "completions.jsonl"
"""In the output folder: a line for every sample, with its reward and the parts of it."""


class Scores:
    """Scores samples by their rows' places.

    A process scores its own samples; where a prompt's are spread over several, an unjudged one takes the mean of those
    that its process has.

    Attributes:
        unjudged: samples without a verdict, so far.
    """

    __name__ = "total"

    def __init__(
        self, reward: Reward, rows: Sequence[Row], seen: int, grader: Grader | None, output: Path, process: int
    ) -> None:
        self._reward, self._rows, self._seen, self._grader = reward, rows, seen, grader
        self._file = output / (COMPLETIONS if process == 0 else f"{process}-{COMPLETIONS}")
        self.unjudged = 0

    def go_on_from(self, step: int) -> None:
        """Forget the samples that a run which goes on from `step` will draw again."""
        kept = []
        if step and self._file.is_file():
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line may be cut where the process was killed; it is of a step that is drawn again.
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < step]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(kept), encoding="utf-8")

    def __call__(
        self, completions: Sequence[Any], place: Sequence[int], trainer_state: Any, log_metric: Any, **_: Any
    ) -> list[float | None]:
        outputs = [_text(completion) for completion in completions]
        rows = [self._rows[p] for p in place]
        graded: Sequence[float | None] = [None] * len(rows)
        if self._grader is not None and self._reward.judged:
            graded = self._grader(rows, outputs)
        parts = [self._reward.parts(row, output, j) for row, output, j in zip(rows, outputs, graded, strict=True)]
        made = rewards.totals(parts, place)
        for name in parts[0]:
            if known := [value for part in parts if (value := part[name]) is not None]:
                log_metric(f"parts/{name}", sum(known) / len(known))
        if self._reward.judged:
            missing = sum(part[rewards.JUDGE] is None for part in parts)
            self.unjudged += missing
            log_metric("unjudged", missing / len(parts))
        with self._file.open("a", encoding="utf-8") as file:
            for p, row, output, part, total in zip(place, rows, outputs, parts, made, strict=True):
                line = {"step": trainer_state.global_step, "split": "train" if p < self._seen else "held_out"}
                line |= {"id": row["id"], "completion": output, "reward": total, "parts": part}
                file.write(json.dumps(line) + "\n")
        return made


def _text(completion: Any) -> str:
    """What was said: TRL gives messages where the prompt was one."""
    return (
        completion if isinstance(completion, str) else "".join(message.get("content") or "" for message in completion)
    )
