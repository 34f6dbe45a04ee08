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
from kvpress import KVzipPress
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
# Slots within this relative distance of the threshold are listed in the fixture.
NEAR = 1e-4


class Observed:
    """A press that records, per layer, its scores and the mask [Hkv, S] of kept tokens."""

    def __init__(self, press: Any) -> None:
        self.press = press
        self.scores: dict[int, Tensor] = {}
        self.kept: dict[int, Tensor] = {}
        if isinstance(press, KVzipPress):
            self._compress, press.compress_post = press.compress_post, self._watch_all
            return
        # AdaKV uses the scores of its inner press.
        scorer = getattr(press, "press", press)
        self._score, scorer.score = scorer.score, self._remember
        self._compress, press.compress = press.compress, self._watch

    def _watch_all(self, model: Any) -> None:
        """KVzip selects once, after all layers."""
        self._compress(model)
        for index, layer in enumerate(model.model.layers):
            self.scores[index] = self.press.score_val[index, 0].clone()
            self.kept[index] = self._unmasked(layer.self_attn, self.scores[index])

    @staticmethod
    def _unmasked(module: Any, scores: Tensor) -> Tensor:
        kept = torch.ones_like(scores, dtype=torch.bool)
        _, heads, slots = module.masked_key_indices
        kept[heads, slots] = False
        return kept

    def _remember(self, module: Any, *args: Any) -> Tensor:
        scores = self._score(module, *args)
        # AdaKV writes into them afterwards.
        self.scores[module.layer_idx] = scores[0].clone()
        return scores

    def _watch(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out = self._compress(module, hidden, keys, values, *args)
        scores = self.scores[module.layer_idx]
        if out[0] is keys:
            kept = self._unmasked(module, scores)
        else:
            kept = torch.zeros_like(scores, dtype=torch.bool)
            # The press does not report the kept tokens: derive them from its scores and verify them with its cache.
            order = scores.topk(out[0].shape[2]).indices
            for dense, compressed in zip((keys, values), out, strict=True):
                assert torch.equal(dense[0].gather(1, order[..., None].expand_as(compressed[0])), compressed[0])
            kept.scatter_(-1, order, True)
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


def layer_record(scores: Tensor, kept: Tensor, thresholds: list[tuple[float, float]]) -> dict[str, Any]:
    """One layer's kept masks, and per head the relative margin at the threshold and the slots near it."""
    record: dict[str, Any] = {"kept": [], "margin": [], "near": []}
    for s, k, (lowest, highest) in zip(scores.double(), kept, thresholds, strict=True):
        scale = max(abs(lowest), abs(highest))
        distance = torch.where(k, s - highest, lowest - s) / scale
        near = (distance < NEAR).nonzero().squeeze(-1).tolist()
        record["kept"].append(f"{sum(1 << i for i in k.nonzero().squeeze(-1).tolist()):x}")
        record["margin"].append(float(f"{(lowest - highest) / scale:.3g}"))
        record["near"].append({str(i): float(f"{distance[i]:.3g}") for i in near})
    return record


@torch.inference_mode()
def run(model: Any, ids: Tensor, case: dict[str, Any]) -> dict[str, Any]:
    """One prefill under one press."""
    press, parameters = build(**case)
    observed = Observed(press)
    with press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
    if case["name"] == "kvzip":
        thresholds = dict.fromkeys(LAYERS, common_edges(observed))
    else:
        floor = 0
        if case["name"] == "adakv":
            floor = max(1, int(int(ids.shape[1] * case["keep"]) * parameters["alpha_safeguard"]))
        thresholds = {i: edges(observed.scores[i], observed.kept[i], floor) for i in LAYERS}
    return {
        "press": parameters,
        "counts": [observed.kept[layer].sum(-1).tolist() for layer in sorted(observed.kept)],
        "layers": {str(i): layer_record(observed.scores[i], observed.kept[i], thresholds[i]) for i in LAYERS},
    }


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
    cases = {recipe: run(model, torch.tensor([ids]), case) for recipe, case in CASES.items()}
    cases |= {
        recipe: run(model, torch.tensor([chat_ids]), {**case, "n_sink": prefix}) for recipe, case in ZIPPED.items()
    }
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
    }
    lines = json.dumps(fixture, separators=(",", ":")).replace('{"press"', '\n{"press"').replace('{"kept"', '\n{"kept"')
    args.output.write_text(lines + "\n")


if __name__ == "__main__":
    main()
