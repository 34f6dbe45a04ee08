"""The study of docs/longlora.md: the packaged model's window of 8,192 tokens, doubled, on the text of filings.

python studies/longlora.py run [MINUTES]   train (default: 8 minutes) if no trained model exists, then evaluate
python studies/longlora.py table           print the table of docs/longlora.md from the committed samples

Companies of the evaluation are not in the training set. The trained model stays in runs/.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from lceval.stats.estimates import cluster_bootstrap

HERE = Path(__file__).parent
SAMPLES, STEPS = HERE / "longlora-samples.jsonl", HERE / "longlora-steps.jsonl"
MODEL = Path("runs/longlora-study")
TOKENS, WINDOW = 10240, 16384
BANDS = ((0, 4096), (4096, 8192), (8192, 10240))
LR, WARMUP, SEED = 5e-4, 2, 0
HELD_OUT = ("MGMRESORTS", "Pfizer", "JOHNSON")
WINDOWS = 1  # per held-out filing, at most
ARMS = ("base", "scaled", "trained")


def texts(held_out: bool) -> dict[str, str]:
    """Full texts of filings, by name."""
    pages: dict[str, list[str]] = defaultdict(list)
    for line in (Path(os.environ["LCEVAL_DATA"]) / "financebench" / "document_pages.jsonl").open():
        page = json.loads(line)
        if page["doc_name"].startswith(HELD_OUT) == held_out:
            pages[page["doc_name"]].append(page["text"])
    return {name: "\n\n".join(parts) for name, parts in pages.items()}


def windows(held_out: bool, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Windows of TOKENS tokens: all of the training filings, shuffled, or the first WINDOWS of each held-out filing."""
    rows = []
    for name, text in texts(held_out).items():
        ids = tokenizer(text, verbose=False).input_ids
        starts = range(0, len(ids) - TOKENS + 1, TOKENS)
        rows += [(f"{name}-{start}", ids[start : start + TOKENS]) for start in starts[: WINDOWS if held_out else None]]
    if not held_out:
        random.Random(SEED).shuffle(rows)
    return rows


def nll(model: Any, ids: list[int]) -> Any:
    """NLL of each token after the first. Logits are computed for 1,024 tokens at a time to bound memory."""
    import torch
    from torch.utils.checkpoint import checkpoint

    tokens = torch.tensor([ids])
    hidden = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
    head = model.get_output_embeddings()

    def part(states: Any, targets: Any) -> Any:
        return torch.nn.functional.cross_entropy(head(states).float(), targets, reduction="none")

    pairs = zip(hidden.split(1024), tokens[0, 1:].split(1024), strict=True)
    return torch.cat([checkpoint(part, states, targets, use_reentrant=False) for states, targets in pairs])


def train(folder: str, minutes: float) -> None:
    """Train for `minutes` and save the model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lceval.training.longlora import LongLora, prepare, save

    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LongLora(window_tokens=WINDOW)
    model = prepare(AutoModelForCausalLM.from_pretrained(folder), config).train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    log, began = [], time.monotonic()
    for step, (name, ids) in enumerate(windows(False, tokenizer)):
        start = time.monotonic()
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nll(model.get_base_model(), ids).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "text": name, "loss": round(float(loss.detach()), 4)})
        log[-1]["seconds"] = round(time.monotonic() - start, 1)
        print(log[-1], file=sys.stderr, flush=True)
        if time.monotonic() - began > 60 * minutes:
            break
    save(model, config, MODEL, tokenizer)
    STEPS.write_text("".join(json.dumps(row) + "\n" for row in log))


def measure(folder: str) -> None:
    """Measure the missing NLLs by arm, held-out window and position band."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lceval.training.longlora import extend

    tokenizer = AutoTokenizer.from_pretrained(folder)
    done = {(row["arm"], row["id"]) for row in rows()}
    models = {}
    for arm in ARMS:
        models[arm] = AutoModelForCausalLM.from_pretrained(MODEL if arm == "trained" else folder).eval()
    extend(models["scaled"], WINDOW)
    # Windows in the outer loop, so that an interrupted run has the same windows for all arms.
    for name, ids in windows(True, tokenizer):
        for arm in ARMS:
            if (arm, name) in done:
                continue
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                losses = nll(models[arm], ids)
            bands = [round(float(losses[start:stop].mean()), 5) for start, stop in BANDS]
            with SAMPLES.open("a") as out:
                out.write(json.dumps({"arm": arm, "id": name, "cluster": name.split("_")[0], "nll": bands}) + "\n")
            print(arm, name, bands, file=sys.stderr, flush=True)


def rows() -> list[dict[str, Any]]:
    """Committed samples; empty before the first."""
    return [json.loads(line) for line in SAMPLES.read_text().splitlines()] if SAMPLES.exists() else []


def table() -> str:
    """One row per arm: NLL per token by position band, and its difference to the base, paired by window."""
    by_arm: dict[str, dict[str, dict[str, Any]]] = {arm: {} for arm in ARMS}
    for row in rows():
        by_arm[row["arm"]][row["id"]] = row
    shared = set.intersection(*(set(own) for own in by_arm.values()))
    bands = [f"{start // 1024}k-{stop // 1024}k" for start, stop in BANDS]
    head = ["arm", "n", *(title for band in bands for title in (band, "Δ vs base"))]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for arm, own in by_arm.items():
        cells = [arm, str(len(shared))]
        for place in range(len(bands)):
            values = [own[key]["nll"][place] for key in sorted(shared)]
            deltas = [own[key]["nll"][place] - by_arm["base"][key]["nll"][place] for key in sorted(shared)]
            clusters = [own[key]["cluster"] for key in sorted(shared)]
            cells.append(f"{sum(values) / len(values):.3f}")
            mean, low, high = cluster_bootstrap(deltas, clusters)
            cells.append("" if arm == "base" else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"] and len(sys.argv) <= 3:
        from lceval import packaged

        if not MODEL.exists():
            train(str(packaged.folder()), float(sys.argv[2]) if len(sys.argv) == 3 else 8)
        measure(str(packaged.folder()))
    elif sys.argv[1:] == ["table"]:
        print(table())
    else:
        raise SystemExit(__doc__)
