"""The reward function in the form that TRL calls: a batch of samples in, rewards out, one logged line per sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lceval.training import rewards
from lceval.training.rewards import Grader, Reward, Row

COMPLETIONS = "completions.jsonl"
"""File in the output folder: one line per sample, with its reward and the components of it."""


class LoggedReward:
    """Computes and logs the rewards of samples, given the indices of their rows.

    Each process scores its own samples. If the samples of a prompt are spread over processes, a sample without grades
    receives the mean of those on its process.

    Attributes:
        unjudged: number of samples without grades so far.
    """

    __name__ = "total"

    def __init__(
        self, reward: Reward, rows: Sequence[Row], train_rows: int, grader: Grader | None, output: Path, process: int
    ) -> None:
        self._reward, self._rows, self._train_rows, self._grader = reward, rows, train_rows, grader
        self._file = output / (COMPLETIONS if process == 0 else f"{process}-{COMPLETIONS}")
        self.unjudged = 0

    def resume_from(self, step: int) -> None:
        """Remove the logged samples that a run resumed from `step` will draw again."""
        kept = []
        if step and self._file.is_file():
            lines = self._file.read_text(encoding="utf-8").splitlines(keepends=True)
            # The last line may be truncated if the process was killed; its step is drawn again.
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < step]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(kept), encoding="utf-8")

    def __call__(
        self, completions: Sequence[Any], row_index: Sequence[int], trainer_state: Any, log_metric: Any, **_: Any
    ) -> list[float | None]:
        outputs = [_text(completion) for completion in completions]
        rows = [self._rows[index] for index in row_index]
        graded: Sequence[float | None] = [None] * len(rows)
        if self._grader is not None and self._reward.judged:
            graded = self._grader(rows, outputs)
        parts = [self._reward.parts(row, output, j) for row, output, j in zip(rows, outputs, graded, strict=True)]
        totals = rewards.totals(parts, row_index)
        for name in parts[0]:
            if known := [value for part in parts if (value := part[name]) is not None]:
                log_metric(f"parts/{name}", sum(known) / len(known))
        if self._reward.judged:
            missing = sum(part[rewards.JUDGE] is None for part in parts)
            self.unjudged += missing
            log_metric("unjudged", missing / len(parts))
        with self._file.open("a", encoding="utf-8") as file:
            for index, row, output, part, total in zip(row_index, rows, outputs, parts, totals, strict=True):
                line = {"step": trainer_state.global_step, "split": "train" if index < self._train_rows else "held_out"}
                line |= {"id": row["id"], "completion": output, "reward": total, "parts": part}
                file.write(json.dumps(line) + "\n")
        return totals


def _text(completion: Any) -> str:
    """The text of a completion: TRL returns messages if the prompt was one."""
    return (
        completion if isinstance(completion, str) else "".join(message.get("content") or "" for message in completion)
    )
