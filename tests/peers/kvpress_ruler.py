"""Answer RULER rows with kvpress's own pipeline: context, question and answer prefix as texts, one row at a time.

    PEER_PYTHON tests/peers/kvpress_ruler.py MODEL_FOLDER ROWS.jsonl ANSWERS.jsonl --rows 2 --keep 0.5

PEER_PYTHON is the path printed by make_env.sh; ROWS.jsonl has the fields of the data set simonjegou/ruler. The first
rows of each task are answered under every press of `SIDES`; each answer is written as it arrives, so that rerunning the
same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kvpress import KVPressTextGenerationPipeline
from kvpress_presses import build, versions
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

# lceval's name of each side -> the press, and what differs from its defaults in kvpress_presses.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    **{name: (name, {}) for name in ("snapkv", "knorm", "streaming", "keydiff", "tova", "pyramidkv", "adakv")},
    "adakv of expected_attention": ("adakv", {"of": "expected_attention", "epsilon": 0.01}),
    "kvzip": ("kvzip", {}),
}


def token_by_token(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that feeds the tokens after the context one at a time.

    pyramidkv leaves layers of different lengths, and transformers makes the mask of several tokens from the length of
    the first layer: kvpress's pipeline ends with an error at the question. One token needs no mask.
    """

    def stepwise(input_ids: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        for index in range(input_ids.shape[1]):
            one = slice(index, index + 1)
            outputs = forward(input_ids=input_ids[:, one], position_ids=position_ids[:, one], **kwargs)
        return outputs

    return stepwise


def first_rows(file: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of each task, with their numbers in the file."""
    taken: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, line in enumerate(file.read_text().splitlines()):
        row = json.loads(line)
        if len(taken[row["task"]]) < count:
            taken[row["task"]].append({**row, "id": f"{row['task']}-{number}"})
    return [row for rows in taken.values() for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("rows_file", type=Path, help="RULER rows")
    parser.add_argument("answers", type=Path, help="JSON Lines file of answers")
    parser.add_argument("--rows", type=int, default=2, help="rows of each task")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the context tokens to keep")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    done = set()
    if args.answers.exists():
        done = {(row["side"], row["id"]) for row in map(json.loads, args.answers.read_text().splitlines())}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer, device="cpu")
    # lceval protects what the chat template puts before the user's message; kvpress protects a number of tokens.
    messages = [{"role": "user", "content": "#"}]
    prefix = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split("#")[0]
    protected = len(tokenizer.encode(prefix, add_special_tokens=False))
    forward = model.forward
    with args.answers.open("a") as out:
        for row in first_rows(args.rows_file, args.rows):
            for side, (press, changed) in SIDES.items():
                if (side, row["id"]) in done:
                    continue
                more = {**changed, "n_sink": protected} if press == "kvzip" else changed
                built, parameters = build(press, args.keep, **more)
                model.forward = token_by_token(forward) if press == "pyramidkv" else forward
                start = time.perf_counter()
                answer = pipeline(
                    row["context"],
                    question=row["question"],
                    answer_prefix=row["answer_prefix"],
                    press=built,
                    max_new_tokens=row["max_new_tokens"],
                )["answer"]
                seconds = time.perf_counter() - start
                record = {"side": side, "id": row["id"], "answer": answer, "seconds": seconds}
                out.write(json.dumps({**record, "parameters": parameters, "versions": versions()}) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
