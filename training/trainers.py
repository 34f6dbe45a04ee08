"""What the trainers share: where a run goes on from, and that stdout is left to results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

LOGGED = ("reward", "eval_reward", "kl", "loss", "eval_loss")


def processes() -> int:
    """How many processes train together, as torchrun and `accelerate launch` tell each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_lead() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint under an output folder."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = output / "checkpoints"
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return found


def speak_on_stderr(trainer: Any) -> None:
    """A line a step on stderr, in place of what the trainer prints on stdout."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            kept = {name: logs[name] for name in LOGGED if (logs or {}).get(name) is not None}
            if state.is_world_process_zero and kept:
                said = ", ".join(f"{name} {value:.4g}" for name, value in kept.items())
                print(f"step {state.global_step} of {state.max_steps}: {said}", file=sys.stderr)

    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    trainer.add_callback(Progress())
