"""Diagnosis of lost evidence: was it evicted, or kept but not used?

`gold` measures the kept share of the gold passages' slots and the likelihood of the gold answer under the compressed
cache; `attention` the rank of the gold documents by the question's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lceval.models.policies import LayerView, StatsSpec
from lceval.models.policies.snapkv import SnapKV

if TYPE_CHECKING:
    from lceval.models.compressed import CompressedContext, QuestionCache
    from lceval.models.engine import Engine
    from lceval.models.prefill import Prefill
    from lceval.models.prefix import Job

WINDOW = SnapKV.window


class Diagnosis:
    """Extra measurements of a sample; each is None where the sample lacks what it requires.

    Args:
        kind: `none`, `gold` or `attention`.
        tokenizer: a fast tokenizer, whose offsets locate the documents; a slow one disables both measurements.
        encode: tokenizes a text as prompts are tokenized.
    """

    KINDS = ("none", "gold", "attention")

    def __init__(
        self,
        kind: str,
        tokenizer: Any,
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self.kind = kind
        self._tokenizer = tokenizer
        self._encode = encode

    @property
    def stats_spec(self) -> StatsSpec:
        """The prefill statistics it requires."""
        return StatsSpec(queries=WINDOW) if self.needs_prefill else StatsSpec()

    @property
    def needs_prefill(self) -> bool:
        """Whether each question is prefilled over the uncompressed context, whatever the recipe."""
        return self.kind == "attention"

    @property
    def needs_answer(self) -> bool:
        """Whether the gold answer is scored over the compressed context."""
        return self.kind == "gold"

    def of_context(
        self, job: Job, context: CompressedContext, prefill: Prefill | None, question_cache: QuestionCache | None
    ) -> dict[str, Any]:
        """`gold_kept`: the kept share of the gold passages' slots, over layers and KV heads. Or `ndcg10`: NDCG@10 of
        the documents, ranked by the attention of the question's last tokens to the uncompressed context."""
        if self.kind == "none":
            return {}
        documents = self._documents(job)
        gold = [tokens for is_gold, tokens in documents if is_gold]
        if self.kind == "gold":
            return {
                "gold_kept": context.kept_share_of(torch.stack(gold).any(0))
                if gold and context.full_attention_layers
                else None
            }
        if not gold or not context.full_attention_layers or prefill is None or question_cache is None:
            return {"ndcg10": None}
        received = question_attention(prefill, question_cache, min(WINDOW, len(job.question)))
        return {"ndcg10": ndcg([float(received[tokens].sum()) for _, tokens in documents], [g for g, _ in documents])}

    def of_answers(
        self, jobs: Sequence[Job], engine: Engine, cache: QuestionCache, last: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        """`gold_nll`: the NLL per token of the first gold answer, teacher-forced after the prescribed reply prefix.

        Args:
            cache: one row per job, with its question except its `last` tokens already prefilled; consumed.
            last: the same number of tokens in every row, including padding on the left.
        """
        results: list[dict[str, Any]] = [{"gold_nll": None} for _ in jobs]
        gold = {row: str((job.doc.get("answers") or [""])[0]) for row, job in enumerate(jobs)}
        rows = [row for row, answer in gold.items() if answer.strip()]
        if not rows:
            return results
        replies = [
            self._continuation(jobs[row].prompt, jobs[row].doc.get("reply_prefix", ""), gold[row]) for row in rows
        ]
        inputs = [[*last[row], *prefix, *answer[:-1]] for row, (prefix, answer) in zip(rows, replies, strict=True)]
        longest = max(map(len, inputs))
        # Padding on the right: no scored token attends to it.
        ids = torch.tensor([row_ids + [0] * (longest - len(row_ids)) for row_ids in inputs], device=engine.device)
        cache.select(rows)
        first = len(last[0]) - 1  # the position that predicts the reply's first token
        logits = engine.forward(cache, ids, keep=longest - first)
        for place, (row, (_, answer)) in enumerate(zip(rows, replies, strict=True)):
            end = len(inputs[place]) - first
            targets = torch.tensor(answer, device=logits.device)
            nll = torch.nn.functional.cross_entropy(logits[place, end - len(answer) : end].float(), targets)
            results[row] = {"gold_nll": float(nll)}
        return results

    def _continuation(self, prompt: str, prefix: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the reply prefix (none if the prompt already ends with it) and of the answer after it."""
        prefix = "" if prompt.endswith(prefix) else prefix
        prompt_ids, prefixed_ids = self._encode(prompt), self._encode(prompt + prefix)
        space = "" if (prompt + prefix)[-1:].isspace() else " "
        full_ids = self._encode(f"{prompt}{prefix}{space}{answer}")
        return list(prefixed_ids[len(prompt_ids) :]), list(full_ids[len(prefixed_ids) :])

    def _documents(self, job: Job) -> list[tuple[bool, Tensor]]:
        """For each document whether it is gold, and the mask of its tokens in the context."""
        if job.truncated or not job.has_context or not job.context or not self._tokenizer.is_fast:
            return []
        for special in (False, True):
            encoding = self._tokenizer(job.prompt, add_special_tokens=special, return_offsets_mapping=True)
            # The prompt's last token may have merged with a continuation; tokens of the context never do.
            if tuple(encoding["input_ids"][: job.boundary]) == job.context:
                offsets = encoding["offset_mapping"][: job.boundary]
                return document_tokens(job.prompt, offsets, job.doc)
        return []


def question_attention(prefill: Prefill, question_cache: QuestionCache, window: int) -> Tensor:
    """Attention of a question's last `window` tokens to every token of its context: [S] float32 on the CPU, the mean
    over queries, heads and layers.

    Args:
        question_cache: the question prefilled over `prefill` (`Engine.prefill_question`) with at least `window`
            queries kept in its statistics.
    """
    received = []
    for layer, keys, tail in zip(prefill.layers, prefill.keys, question_cache.layers, strict=True):
        if keys is not None:
            k, v = (torch.cat(x, 2) for x in zip((keys, layer.values[:, :, : layer.seen]), tail.tail, strict=True))
            view = LayerView(k, v, tail.collector.stats.queries, layer.softmax, 0, 1, kernels=prefill.kernels)
            received.append(view.window_scores(window).mean((0, 1))[: prefill.tokens])
    return torch.stack([x.to(received[0].device) for x in received]).mean(0).cpu()


def document_tokens(
    prompt: str, offsets: Sequence[tuple[int, int]], doc: Mapping[str, Any]
) -> list[tuple[bool, Tensor]]:
    """For each document of a row whether it is gold, and the mask of its tokens in the prompt (bool [n]).

    Args:
        offsets: character span of each token, as fast tokenizers return them.
        doc: a row with its `context`, its `docs` in the order of the prompt (each with `pid` and `text`), and
            `gold_pids`.

    Returns:
        An empty list where the row has no documents, or one of them is not in the context verbatim.
    """
    context = str(doc.get("context", ""))
    at = prompt.rfind(context)
    end, documents = at + len(context), []
    starts, ends = (torch.tensor(x) for x in zip(*offsets, strict=True))
    for document in doc.get("docs") or []:
        begin = prompt.find(document["text"], at, end)
        if begin < 0 or not document["text"]:
            return []
        at = begin + len(document["text"])
        documents.append((document["pid"] in doc["gold_pids"], (ends > begin) & (starts < at)))
    return documents


def ndcg(received: Sequence[float], gold: Sequence[bool], at: int = 10) -> float:
    """NDCG of documents ranked by received attention, gold ones being relevant (Järvelin and Kekäläinen 2002, log2)."""
    ranked = [g for _, g in sorted(zip(received, gold, strict=True), key=lambda x: -x[0])]

    def gain(relevant: Sequence[bool]) -> float:
        return sum(1 / math.log2(place + 2) for place, g in enumerate(relevant[:at]) if g)

    return gain(ranked) / gain(sorted(gold, reverse=True))
