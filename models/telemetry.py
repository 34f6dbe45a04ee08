"""The `meta` of an answer: its part that the compressed context determines."""

from __future__ import annotations

from typing import Any

from lceval.models.compressed import CompressedContext
from lceval.models.prefix import Job


def telemetry(job: Job, context: CompressedContext, *, shared: bool, prefill_s: float) -> dict[str, Any]:
    """The context's part of a sample's `meta`; the cost of its question and answer is added later.

    Args:
        shared: whether an earlier sample was charged with the prefill.
        prefill_s: seconds of the prefill that are charged to this sample.
    """
    return {
        "kv_bytes": context.kept_bytes,
        "kv_bytes_full": context.full_bytes,
        "kv": {
            "status": "ok",
            "kept_share": context.kept_share,
            "kv_dtype": str(context.dtype).removeprefix("torch."),
            "bytes_allocated": context.allocated_bytes,
            "bytes_read_per_step": context.read_bytes,
            "state_bytes": context.state_bytes,
            "kept_tokens": context.kept_tokens(),
            "context_tokens": context.tokens,
            "prefill_s": prefill_s,
            "prefill_tokens": 0 if shared else context.tokens,
            "shared_prefix": shared,
            "compress_s": 0.0 if shared else context.compress_s,
            "question_s": 0.0,
            "first_token_s": 0.0,
            "batch": 1,
            "decode_s": 0.0,
            "decode_tokens": 0,
            "new_tokens": 0,
            "peak_bytes": context.peak_bytes,
            "truncated": job.truncated,
            "boundary": job.has_context,
        },
    }


def failed(reason: str) -> dict[str, Any]:
    """The `meta` of a sample that was not answered."""
    return {"kv_bytes": 0, "kv_bytes_full": 0, "kv": {"status": "error", "error": reason, "kept_share": 1.0}}
