"""Answer questions from contexts the way kvpress does, and time it: the peer of `lceval bench eval --peer`.

    peers/kvpress/bin/python tests/peers/kvpress_eval.py MODEL_FOLDER JOBS.json --press snapkv --keep 0.25

JOBS.json is a list of `{"context": ids, "questions": [ids, …], "max_new_tokens": n}`; a text instead of token ids is
tokenised as it stands, without a chat template. kvpress's own pipeline prefills, compresses and decodes; this file only
passes it token ids and measures. One JSON object goes to stdout: seconds leave out loading the model, `kv_bytes` is the
cache after compression, `peak_kv_bytes` also counts a question and its answer, each the maximum over all jobs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from kvpress import KVPressTextGenerationPipeline
from kvpress_presses import NAMES, PRESSES, build, versions
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from transformers.utils import logging


def kv_bytes(cache: Cache) -> int:
    """Bytes of all keys and values in a cache."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


class Watched(KVPressTextGenerationPipeline):
    """kvpress's pipeline, which returns texts; this subclass also records token ids, seconds and bytes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answers: list[dict[str, Any]] = []
        self.stored_bytes = self.peak_bytes = 0
        self.entered = 0.0
        self._steps: list[float] = []
        self._ids: list[int] = []
        self._decode, self.tokenizer.decode = self.tokenizer.decode, self._remember
        # The context is prefilled by the decoder below this module, so these are the question and each new token.
        self.model.register_forward_hook(self._step)

    def answer_all(self, context: Tensor, questions: list[Tensor], press: Any, max_new_tokens: int) -> dict[str, Any]:
        """One context and its questions; context, questions: [1, T] int64."""
        self.answers, self.stored_bytes, self.peak_bytes, self.entered = [], 0, 0, 0.0
        start, error = self._now(), None
        inputs = {"context_ids": context, "questions_ids": questions}
        try:
            self.forward(inputs, press=press, max_new_tokens=max_new_tokens)
        except (RuntimeError, ValueError) as raised:
            # A press that fails on this job is reported; the other jobs still run.
            error = f"{type(raised).__name__}: {raised}"
        end = self._now()
        return {
            "seconds": end - start,
            "prefill_s": (self.entered or end) - start,
            "context_tokens": context.shape[1],
            "kv_bytes": self.stored_bytes,
            "peak_kv_bytes": self.peak_bytes,
            "answers": self.answers,
            "error": error,
        }

    def generate_answer(self, question_ids: Tensor, cache: Cache, context_length: int, max_new_tokens: int) -> str:
        start, self._steps = self._now(), []
        self.entered = self.entered or start
        self.stored_bytes = self.stored_bytes or kv_bytes(cache)
        self.peak_bytes = max(self.peak_bytes, self.stored_bytes)
        answer = super().generate_answer(question_ids, cache, context_length, max_new_tokens)
        self.peak_bytes = max(self.peak_bytes, kv_bytes(cache))
        self.answers.append(
            {
                "ids": self._ids,
                "text": answer,
                "question_s": self._steps[0] - start,
                "decode_s": self._now() - self._steps[0],
                "decode_tokens": len(self._ids) - 1,
            }
        )
        return answer

    def _step(self, *_: Any) -> None:
        self._steps.append(self._now())

    def _remember(self, ids: Tensor, **kwargs: Any) -> str:
        self._ids = ids.tolist()
        return str(self._decode(ids, **kwargs))

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def read_jobs(file: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The jobs, with every text turned into ids [1, T]."""

    def ids(value: str | list[int]) -> Tensor:
        tokens = tokenizer.encode(value, add_special_tokens=False) if isinstance(value, str) else value
        return torch.tensor([tokens])

    return [
        {
            "context": ids(job["context"]),
            "questions": [ids(question) for question in job["questions"]],
            "max_new_tokens": job["max_new_tokens"],
        }
        for job in json.loads(file.read_text())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("jobs", type=Path, help="JSON file: a list of contexts with questions")
    parser.add_argument("--press", choices=NAMES, required=True)
    parser.add_argument("--keep", type=float, default=1.0, help="share of the context tokens to keep")
    parser.add_argument(
        "--of",
        choices=[p for p in PRESSES if p != "kvzip"],
        default="snapkv",
        help="the press whose scores adakv pools",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warmup", type=int, default=0, help="jobs run once before anything is timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    load_s = time.perf_counter() - start
    pipeline = Watched(model=model, tokenizer=tokenizer, device=args.device)
    jobs = read_jobs(args.jobs, tokenizer)
    press, parameters = build(args.press, args.keep, **({"of": args.of} if args.press == "adakv" else {}))
    for job in jobs[: args.warmup]:
        pipeline.answer_all(press=press, **job)
    results = [pipeline.answer_all(press=press, **job) for job in jobs]
    answers = [answer for result in results for answer in result["answers"]]
    print(
        json.dumps(
            {
                "press": args.press,
                "keep": args.keep,
                "parameters": parameters,
                # Head-wise presses mask slots and free no memory.
                "frees_memory": args.press != "adakv",
                "versions": versions(),
                "threads": args.threads,
                "dtype": args.dtype,
                "device": args.device,
                "load_s": load_s,
                "seconds": sum(result["seconds"] for result in results),
                "prefill_s": sum(result["prefill_s"] for result in results),
                "question_s": sum(answer["question_s"] for answer in answers),
                "decode_s": sum(answer["decode_s"] for answer in answers),
                "decode_tokens": sum(answer["decode_tokens"] for answer in answers),
                "kv_bytes": max((result["kv_bytes"] for result in results), default=0),
                "peak_kv_bytes": max((result["peak_kv_bytes"] for result in results), default=0),
                "errors": sum(result["error"] is not None for result in results),
                "jobs": results,
            }
        )
    )


if __name__ == "__main__":
    main()
