"""Record which tokens of one text kvpress's presses keep, as the fixture of tests/model/test_peers.py.

    peers/kvpress/bin/python tests/peers/kvpress_indices.py MODEL_FOLDER [--text FILE] [--output FILE]

For each press and some layers: the kept tokens of every KV head as a bit mask (bit i of the hex number is token i),
and the distance between the scores on both sides of the threshold, so that a test can separate ties from disagreements.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from kvpress import CompactorPress, DecodingPress, KVzipPress, ScorerPress
from kvpress.presses import duo_attention_press
from kvpress_presses import build, versions
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

HERE = Path(__file__).parent
# First, second, and a spread over the rest of the 30 layers.
LAYERS = (0, 1, 7, 14, 22, 29)
# lceval's recipe and the arguments of `build`. With the default beta a pyramid over so short a text exists only at 0.5;
# key norms differ most between heads, so pooling them activates AdaKV's floor.
CASES: dict[str, dict[str, Any]] = {
    recipe: case
    for keep in (0.5, 0.25)
    for recipe, case in {
        **{
            f"{name}:{keep}": {"name": name, "keep": keep}
            for name in ("snapkv", "tova", "knorm", "keydiff", "streaming", "expected_attention", "pyramidkv", "adakv")
        },
        f"adakv:{keep}:of=knorm": {"name": "adakv", "keep": keep, "of": "knorm"},
        f"pyramidkv:{keep}:beta=2": {"name": "pyramidkv", "keep": keep, "beta": 2},
    }.items()
}
# kvzip on the same text as a user's message in the chat template; chunks of 512, so that both requests occur. `n_sink`
# is the length of the template's prefix, which lceval protects.
ZIPPED: dict[str, dict[str, Any]] = {
    f"kvzip:{keep}{key}": {"name": "kvzip", "keep": keep, "kvzip_plus_normalization": bool(key), "chunk_size": 512}
    for keep in (0.5, 0.25)
    for key in ("", ":plus=true")
}
# The other methods, some over fewer tokens, so that both budgets are the same and no score at the threshold is shared:
# complete chunks of chunkkv and compactor, equal counts from every partition of lagkv.
MORE: dict[str, dict[str, Any]] = {
    "criticalkv:0.5": {"name": "criticalkv", "keep": 0.5},
    "criticalkv:0.25": {"name": "criticalkv", "keep": 0.25},
    "criticalkv:0.25:of=knorm": {"name": "criticalkv", "keep": 0.25, "of": "knorm"},
    "chunkkv:0.5": {"name": "chunkkv", "keep": 0.5, "tokens": 880},
    "chunkkv:0.25": {"name": "chunkkv", "keep": 0.25, "tokens": 880},
    "chunkkv:0.25:of=knorm": {"name": "chunkkv", "keep": 0.25, "of": "knorm", "tokens": 880},
    "lagkv:0.5": {"name": "lagkv", "keep": 0.5},
    "lagkv:0.25:cross=true": {"name": "lagkv", "keep": 0.25, "cross_scoring": True},
    "compactor:0.5": {"name": "compactor", "keep": 0.5, "tokens": 780},
    "compactor:0.25": {"name": "compactor", "keep": 0.25, "tokens": 780},
    "keydiff:0.5:block=128": {"name": "block", "keep": 0.5, "of": "keydiff"},
    "keydiff:0.25:block=128": {"name": "block", "keep": 0.25, "of": "keydiff"},
    # The last tokens are the question.
    "finch:0.5": {"name": "finch", "keep": 0.5, "question": 40},
    "finch:0.25": {"name": "finch", "keep": 0.25, "question": 40},
    # Half of the 90 heads stream, which keep 384 of 900 tokens: 642 tokens a head.
    "duo:642": {"name": "duo", "keep": 0.5},
}
# While tokens are written: 300 of context, then evictions after 16 and 32 tokens. kvpress rotates all queries of a
# window to the current position, so the window has one.
WRITTEN: dict[str, dict[str, Any]] = {
    "knorm:200:when=decode:every=16:prompt=evict": {"name": "knorm"},
    "snapkv:200:when=decode:every=16:prompt=evict:window=1": {"name": "snapkv", "window_size": 1},
}
CONTEXT, EVERY, EVICTIONS, TARGET = 300, 16, 2, 200
# Slots within this relative distance of the threshold are listed in the fixture.
NEAR = 1e-4


class Observed:
    """A press that records, per layer, its last scores and the mask [Hkv, S] of kept tokens."""

    def __init__(self, press: Any) -> None:
        self.press = press
        self.scores: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        if isinstance(press, KVzipPress):
            self._compress, press.compress_post = press.compress_post, self._watch_all
            return
        # CriticalKV has scores of its own, the other wrappers use those of their inner press.
        scorer = press if isinstance(press, ScorerPress) else getattr(press, "press", press)
        if hasattr(scorer, "score"):
            self._score, scorer.score = scorer.score, self._remember
        self._compress, press.compress = press.compress, self._watch

    def _watch_all(self, model: Any) -> None:
        """KVzip selects once, after all layers."""
        self._compress(model)
        for index, layer in enumerate(model.model.layers):
            self.scores[index] = self.press.score_val[index, 0].clone()
            self.kept[index] = self._unmasked(layer.self_attn, self.scores[index])

    @staticmethod
    def _unmasked(module: Any, like: Tensor) -> Tensor:
        kept = torch.ones(like.shape[:2], dtype=torch.bool)
        _, heads, slots = module.masked_key_indices
        kept[heads, slots] = False
        return kept

    def _remember(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.press, CompactorPress):
            # Its random sketch; lceval draws from the same generator with the same seed.
            torch.manual_seed(module.layer_idx)
        scores = self._score(module, *args, **kwargs)
        # AdaKV writes into them afterwards.
        self.scores[module.layer_idx] = scores[0].clone()
        return scores

    def _watch(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out = self._compress(module, hidden, keys, values, *args)
        if out[0] is keys:
            kept = self._unmasked(module, keys[0])
        else:
            # The press does not report the kept tokens: find its keys among those of the context, all different.
            kept = torch.zeros(keys.shape[1:3], dtype=torch.bool)
            for head, (dense, compressed) in enumerate(zip(keys[0], out[0][0], strict=True)):
                rows = {tuple(row): index for index, row in enumerate(dense.tolist())}
                places = [rows[tuple(row)] for row in compressed.tolist()]
                assert len(rows) == dense.shape[0]
                assert torch.equal(values[0, head, places], out[1][0, head])
                kept[head, places] = True
        self.kept[module.layer_idx] = kept
        return out


def edges(scores: Tensor, kept: Tensor, floor: int = 0) -> list[tuple[float, float]]:
    """Per head the lowest kept and the highest evicted score; scores: [Hkv, S].

    With a floor, heads compete: the threshold is per layer, except for a head that keeps only its floor.
    """
    extremes = [(float(s[k].min()), float(s[~k].max())) for s, k in zip(scores, kept, strict=True)]
    if not floor:
        return extremes
    free = [count > floor for count in kept.sum(-1).tolist()]
    lowest = min((low for (low, _), f in zip(extremes, free, strict=True) if f), default=0.0)
    highest = max(high for _, high in extremes)
    return [(lowest, highest) if f else extreme for extreme, f in zip(extremes, free, strict=True)]


def common_edges(observed: Observed) -> list[tuple[float, float]]:
    """As `edges`, where all heads of all layers compete."""
    scores, kept = (torch.cat([x[layer] for layer in sorted(x)]) for x in (observed.scores, observed.kept))
    return [(float(scores[kept].min()), float(scores[~kept].max()))] * observed.kept[0].shape[0]


def layer_record(scores: Tensor | None, kept: Tensor, thresholds: list[tuple[float, float]]) -> dict[str, Any]:
    """One layer's kept masks, and, where scores decide, per head the margin at the threshold and the slots near it."""
    masks = [f"{sum(1 << i for i in k.nonzero().squeeze(-1).tolist()):x}" for k in kept]
    if scores is None:
        return {"kept": masks, "near": [{} for _ in masks]}
    record: dict[str, Any] = {"kept": masks, "margin": [], "near": []}
    for s, k, (lowest, highest) in zip(scores.double(), kept, thresholds, strict=True):
        scale = max(abs(lowest), abs(highest))
        distance = torch.where(k, s - highest, lowest - s) / scale
        near = (distance < NEAR).nonzero().squeeze(-1).tolist()
        record["margin"].append(float(f"{(lowest - highest) / scale:.3g}"))
        record["near"].append({str(i): float(f"{distance[i]:.3g}") for i in near})
    return record


@torch.inference_mode()
def run(model: Any, ids: Tensor, tokens: int | None = None, question: int = 0, **case: Any) -> dict[str, Any]:
    """One prefill of the first `tokens` under one press; the last `question` of them are finch's question."""
    press, parameters = build(**case)
    if question:
        # Instead of a delimiter between context and question; no token is -1.
        press.window_size, press.delimiter_token_id = question, -1
    observed = Observed(press)
    with press(model):
        model.model(input_ids=ids[:, :tokens], past_key_values=DynamicCache())
    # Whole chunks, heads or blocks: no scores at a threshold.
    alone = case["name"] in ("chunkkv", "duo", "block")
    if case["name"] == "kvzip":
        thresholds = dict.fromkeys(LAYERS, common_edges(observed))
    else:
        floor = 0
        if case["name"] == "adakv":
            floor = max(1, int(int(ids.shape[1] * case["keep"]) * parameters["alpha_safeguard"]))
        thresholds = {} if alone else {i: edges(observed.scores[i], observed.kept[i], floor) for i in LAYERS}
    return {
        "press": parameters,
        **({"tokens": tokens} if tokens else {}),
        **({"question": question} if question else {}),
        "counts": [observed.kept[layer].sum(-1).tolist() for layer in sorted(observed.kept)],
        "layers": {
            str(i): layer_record(None if alone else observed.scores[i], observed.kept[i], thresholds.get(i, []))
            for i in LAYERS
        },
    }


@torch.inference_mode()
def write(model: Any, ids: Tensor, name: str, **changed: Any) -> dict[str, Any]:
    """Tokens fed one by one after a context, under a press that evicts every EVERY of them."""
    inner, parameters = build(name, 1.0, **changed)
    press = DecodingPress(base_press=inner, compression_interval=EVERY, target_size=TARGET)
    places: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}
    kept: dict[int, Tensor] = {}
    score, compress = inner.score, press.compress

    def remember(module: Any, *args: Any) -> Tensor:
        scores[module.layer_idx] = score(module, *args).clone()
        return scores[module.layer_idx]

    def watch(module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = compress(module, hidden, keys, values, *args)
        index, heads = module.layer_idx, range(keys.shape[1])
        before = places.get(index, torch.arange(CONTEXT).expand(len(heads), -1))
        first = int(before.max()) + 1 if index not in kept else CONTEXT + EVERY
        new = torch.arange(first, first + keys.shape[2] - before.shape[1])
        before = torch.cat([before, new.expand(len(heads), -1)], 1)
        after = []
        for head in heads:
            rows = {tuple(row): slot for slot, row in enumerate(keys[0, head].tolist())}
            after.append(sorted(rows[tuple(row)] for row in out[0][0, head].tolist()))
        slots = torch.tensor(after)
        kept[index] = torch.zeros(keys.shape[1:3], dtype=torch.bool).scatter_(1, slots, True)
        places[index] = before.gather(1, slots)
        order = slots[..., None].expand(-1, -1, keys.shape[3])
        # In the order of their positions, which topk does not keep.
        return keys[0].gather(1, order)[None], values[0].gather(1, order)[None]

    inner.score, press.compress = remember, watch
    cache = DynamicCache()
    model.model(input_ids=ids[:, :CONTEXT], past_key_values=cache)
    with press(model):
        for at in range(CONTEXT, CONTEXT + EVERY * EVICTIONS):
            position = torch.tensor([[at]])
            model.model(input_ids=ids[:, at : at + 1], past_key_values=cache, position_ids=position)
    layers = {}
    for index in LAYERS:
        record = layer_record(scores[index][0], kept[index], edges(scores[index][0], kept[index]))
        masks = [f"{sum(1 << i for i in of_head):x}" for of_head in places[index].tolist()]
        # An evicted slot has no position here, so ties are only counted.
        layers[str(index)] = {"kept": masks, "ties": [*map(len, record["near"])], "margin": record["margin"]}
    return {"press": {"class": "DecodingPress", "press": parameters}, "layers": layers}


class Texts:
    """What DuoAttentionPress asks of a data set: pandas' sample of a column."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def to_pandas(self) -> Texts:
        return self

    def sample(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"chapter": self}

    def tolist(self) -> list[str]:
        return self.texts


def in_chat(tokenizer: Any, text: str) -> tuple[list[int], int]:
    """The tokens of a chat prompt up to the end of a user's message, and how many precede the message."""
    messages = [{"role": "user", "content": text + "###"}]
    before, separator, _ = str(tokenizer.apply_chat_template(messages, tokenize=False)).partition(text + "###")
    assert separator
    ids = [tokenizer.encode(part, add_special_tokens=False) for part in (before, before + text)]
    return ids[1], len(ids[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct; `lceval model smollm2-135m` prints it")
    parser.add_argument("--text", type=Path, default=HERE / "text.txt")
    parser.add_argument("--output", type=Path, default=HERE / "kvpress-0.5.5.json")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    text = args.text.read_text()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    # A multiple of four, so that halves and quarters are integers and rounding cannot differ.
    ids = ids[: len(ids) // 4 * 4]
    chat_ids, prefix = in_chat(tokenizer, text)
    chat_ids = chat_ids[: len(ids)]
    cases = {recipe: run(model, torch.tensor([ids]), **case) for recipe, case in CASES.items()}
    cases |= {recipe: run(model, torch.tensor([chat_ids]), **case, n_sink=prefix) for recipe, case in ZIPPED.items()}
    # DuoAttention finds its heads on this text instead of 50 chapters of BookSum, which only divides its scores.
    duo_attention_press.load_dataset = lambda *_, **__: Texts([text])
    cases |= {recipe: run(model, torch.tensor([ids]), **case) for recipe, case in MORE.items()}
    written = {recipe: write(model, torch.tensor([ids]), **case) for recipe, case in WRITTEN.items()}
    fixture = {
        "about": "made by kvpress_indices.py; bit i of a hex mask in `kept` says that token i stayed",
        "model": "SmolLM2-135M-Instruct",
        "versions": versions(),
        "dtype": "float32",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "chat_ids_sha256": hashlib.sha256(json.dumps(chat_ids).encode()).hexdigest(),
        "near_within": NEAR,
        "ids": ids,
        "cases": cases,
        "written": {"context": CONTEXT, "tokens": EVERY * EVICTIONS, "cases": written},
    }
    lines = json.dumps(fixture, separators=(",", ":")).replace('{"press"', '\n{"press"').replace('{"kept"', '\n{"kept"')
    args.output.write_text(lines + "\n")


if __name__ == "__main__":
    main()
