"""What the trainers share: processes, the checkpoint to resume from, and progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOGGED = ("reward", "eval_reward", "kl", "loss", "eval_loss")


def processes() -> int:
    """Number of training processes, as set by torchrun and `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_lead() -> bool:
    """Whether this is the main process, which writes files and stdout."""
    return int(os.environ.get("RANK", "0")) == 0


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint in an output folder."""
    from transformers.trainer_utils import get_last_checkpoint

    folder = output / "checkpoints"
    checkpoint: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return checkpoint


def common_settings(output: Path, seed: int, report_to: Sequence[str]) -> dict[str, Any]:
    """The settings that the configurations of both trainers share."""
    import torch

    return {
        "output_dir": str(output / "checkpoints"),
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "report_to": list(report_to) or "none",
        "project": "lceval",
        "trackio_static_space_id": False,  # log locally only
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def log_to_stderr(trainer: Any) -> None:
    """Print one line per step to stderr, instead of the trainer's own output on stdout."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            values = {name: logs[name] for name in LOGGED if (logs or {}).get(name) is not None}
            if state.is_world_process_zero and values:
                line = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                print(f"step {state.global_step} of {state.max_steps}: {line}", file=sys.stderr)

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())
