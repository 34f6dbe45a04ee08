"""What became of the evidence: was it evicted, or kept and not used?

`gold` measures the share of the gold passages' slots that survived, and how well the compressed cache still predicts
the gold answer; `attention` how high the question's attention ranks the gold documents.
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
    from lceval.models.cache import CompressedContext, Prefill, QuestionCache
    from lceval.models.engine import Engine
    from lceval.models.prefix import Job

WINDOW = SnapKV.window


class Diagnosis:
    """Extra measurements of a sample; each is None where the sample does not allow it.

    Args:
        kind: `none`, `gold` or `attention`.
        tokenizer: a fast one: its offsets say where documents stand.
        encode: tokens of a text, as the prompts are encoded.
        context_field: the field of a row that holds its context.
    """

    KINDS = ("none", "gold", "attention")

    def __init__(
        self,
        kind: str,
        tokenizer: Any,
        encode: Callable[[str], Sequence[int]],
        context_field: str,
    ) -> None:
        self.kind = kind
        self._tokenizer = tokenizer
        self._encode = encode
        self._context_field = context_field

    @property
    def stats_spec(self) -> StatsSpec:
        """What the prefill must observe for it."""
        return StatsSpec(queries=WINDOW) if self.needs_prefill else StatsSpec()

    @property
    def needs_prefill(self) -> bool:
        """Whether each question is read over the whole context, whatever the recipe."""
        return self.kind == "attention"

    @property
    def needs_answer(self) -> bool:
        """Whether the gold answer is read over the compressed context."""
        return self.kind == "gold"

    def of_context(
        self, job: Job, context: CompressedContext, prefill: Prefill | None, question_cache: QuestionCache | None
    ) -> dict[str, Any]:
        """`gold_kept`: the share of the gold passages' slots that survived, over layers and KV heads. Or `ndcg10`:
        of the documents, ranked by the attention that the question's last tokens pay to the whole context."""
        if self.kind == "none":
            return {}
        documents = self._documents(job)
        gold = [tokens for is_gold, tokens in documents if is_gold]
        if self.kind == "gold":
            return {
                "gold_kept": context.kept_of(torch.stack(gold).any(0))
                if gold and context.full_attention_layers
                else None
            }
        if not gold or not context.full_attention_layers or prefill is None or question_cache is None:
            return {"ndcg10": None}
        received = attention_paid(prefill, question_cache, min(WINDOW, len(job.question)))
        return {"ndcg10": ndcg([float(received[tokens].sum()) for _, tokens in documents], [g for g, _ in documents])}

    def of_answers(
        self, jobs: Sequence[Job], engine: Engine, cache: QuestionCache, last: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        """`gold_nll`: the NLL per token of the first gold answer, teacher-forced, where the reply begins as it should.

        Args:
            cache: one row a job; each has read its question but for its `last` tokens. It is used up.
            last: as many tokens in every row, padding on the left included.
        """
        found: list[dict[str, Any]] = [{"gold_nll": None} for _ in jobs]
        gold = {row: str((job.doc.get("answers") or [""])[0]) for row, job in enumerate(jobs)}
        rows = [row for row, answer in gold.items() if answer.strip()]
        if not rows:
            return found
        said = [self._continuation(jobs[row].prompt, jobs[row].doc.get("reply_prefix", ""), gold[row]) for row in rows]
        read = [[*last[row], *lead, *answer[:-1]] for row, (lead, answer) in zip(rows, said, strict=True)]
        longest = max(map(len, read))
        # Padding stands to the right, where no scored token can see it.
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in read], device=engine.device)
        cache.select(rows)
        first = len(last[0]) - 1  # predicts the reply's first token
        logits = engine.forward(cache, ids, keep=longest - first)
        for place, (row, (_, answer)) in enumerate(zip(rows, said, strict=True)):
            predicts = slice(len(read[place]) - first - len(answer), len(read[place]) - first)
            wanted = torch.tensor(answer, device=logits.device)
            nll = torch.nn.functional.cross_entropy(logits[place, predicts].float(), wanted)
            found[row] = {"gold_nll": float(nll)}
        return found

    def _continuation(self, prompt: str, begin: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the reply's beginning, none where the prompt has it already, and of the answer after it."""
        begin = "" if prompt.endswith(begin) else begin
        question_cache, led = self._encode(prompt), self._encode(prompt + begin)
        space = "" if (prompt + begin)[-1:].isspace() else " "
        whole = self._encode(f"{prompt}{begin}{space}{answer}")
        return list(led[len(question_cache) :]), list(whole[len(led) :])

    def _documents(self, job: Job) -> list[tuple[bool, Tensor]]:
        """For each document whether it is gold, and which of the context's tokens are its text."""
        if job.truncated or not job.found or not self._tokenizer.is_fast:
            return []
        for special in (False, True):
            read = self._tokenizer(job.prompt, add_special_tokens=special, return_offsets_mapping=True)
            # A continuation may have taken the prompt's last token, never one of the context.
            if tuple(read["input_ids"][: job.boundary]) == job.context:
                offsets = read["offset_mapping"][: job.boundary]
                return document_tokens(job.prompt, offsets, job.doc, job.doc[self._context_field])
        return []


def attention_paid(prefill: Prefill, question_cache: QuestionCache, window: int) -> Tensor:
    """Attention of a question's last `window` tokens to every token of its context: [S], the mean over rows, heads and
    layers.

    Args:
        asked: the question, read over all of `prefill` by `Engine.ask` with at least `window` queries observed.
    """
    total, layers = torch.zeros(prefill.tokens), 0
    for layer, keys, tail in zip(prefill.layers, prefill.keys, question_cache.layers, strict=True):
        if keys is not None:
            k, v = (torch.cat(x, 2) for x in zip((keys, layer.values[:, :, : layer.seen]), tail.tail, strict=True))
            view = LayerView(k, v, tail.collector.stats.queries, layer.scaling, 0, 1, kernels=prefill.kernels)
            total += view.window_scores(window).mean((0, 1))[: prefill.tokens].cpu()
            layers += 1
    return total / layers


def document_tokens(
    prompt: str, offsets: Sequence[tuple[int, int]], doc: Mapping[str, Any], context: str
) -> list[tuple[bool, Tensor]]:
    """For each document of a row whether it is gold, and which of the prompt's tokens are its text (bool [n]).

    Args:
        offsets: the characters of each token, as fast tokenizers give them.
        doc: a row with `docs` in the order of the prompt, each with `pid` and `text`, and `gold_pids`.

    Returns:
        Nothing where the row names no documents, or one of them does not stand in the context word for word.
    """
    at = prompt.rfind(context)
    end, found = at + len(context), []
    starts, ends = (torch.tensor(x) for x in zip(*offsets, strict=True))
    for document in doc.get("docs") or []:
        begin = prompt.find(document["text"], at, end)
        if begin < 0 or not document["text"]:
            return []
        at = begin + len(document["text"])
        found.append((document["pid"] in doc["gold_pids"], (ends > begin) & (starts < at)))
    return found


def ndcg(received: Sequence[float], gold: Sequence[bool], at: int = 10) -> float:
    """NDCG of documents ranked by the attention they received; gold ones are relevant (Jarvelin 2002, log2)."""
    ranked = [g for _, g in sorted(zip(received, gold, strict=True), key=lambda x: -x[0])]

    def gain(relevant: Sequence[bool]) -> float:
        return sum(1 / math.log2(place + 2) for place, g in enumerate(relevant[:at]) if g)

    return gain(ranked) / gain(sorted(gold, reverse=True))
