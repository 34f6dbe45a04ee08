"""Speed on this device: decoding steps over long contexts, the kernels' bandwidth, and prefills.

A step's host time is what queueing it takes; its wall time includes the device. Where the first is as long as the
second, the host is what decoding waits for, whatever the kernels do.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from engine_checks import QUESTION, EngineChecks
from recording import NEEDS_CUDA, LeftOutError, bounded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workload import relative_error, token_ids

from lceval.bench import kernel_times as bench
from lceval.models.policies import StatsSpec
from lceval.models.recipe import parse
from lceval.models.replay import BEFORE, Steps

RECIPES = ("full", "snapkv:0.25", "int4", "snapkv:0.25+int4", "fier:0.1")
ROWS = 8
# The questions of a batch: rows that share a context, rows of two lengths, rows with a context each.
BATCHES = ("1 row", f"{ROWS} rows", f"{ROWS} rows, padded", f"{ROWS} contexts")
# What is also measured as a CUDA graph, with room for so many steps.
RECORDED, STEPS = ("full", "snapkv:0.25", "int4"), 256
WARM_UP = 3
TOP_KERNELS = 8
QWEN_7B = bench.Shape(heads=28, kv_heads=4, dim=128, hidden=3584, inner=18944)
SMALL = bench.Shape(heads=4, kv_heads=2, dim=64, hidden=64, inner=64)


class Operations(TorchDispatchMode):
    """Counts PyTorch operations that compute or copy: what on CUDA is a launch or more. Views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        self.count += not any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        return func(*args, **(kwargs or {}))


class StepChecks:
    """Timings of one model; the prefill of a length is kept until another length is asked for."""

    def __init__(self, engine_checks: EngineChecks) -> None:
        self.engine_checks = engine_checks
        self.setup = engine_checks.setup
        self._prefills: dict[int, Any] = {}
        self._whole_keys: dict[int, Tensor] = {}

    def step_checks(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Decoding steps at every length: transformers first, then recipes over batches."""
        for tokens in self.setup.step_tokens:
            yield f"step {tokens} transformers SDPA, 1 row", partial(self._sdpa_step, tokens)
            for recipe in RECIPES:
                for batch in BATCHES:
                    yield f"step {tokens} {recipe}, {batch}", partial(self._step, tokens, recipe, batch)
            for recipe in RECORDED:
                yield f"step {tokens} {recipe}, 1 row, recorded", partial(self._recorded_step, tokens, recipe)

    def bandwidth_checks(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Decode kernels as CUDA graphs, against a copy and against SDPA over the uncompressed cache."""
        yield "bandwidth copy", self._copy
        lengths, batches, keeps = (self.setup.step_tokens, (1, ROWS), (1.0, 0.25))
        for case in bench.cases(lengths, batches[:1] if self.setup.small else batches, keeps):
            name = f"bandwidth {case.recipe} kept {case.keep}, {case.length} tokens, batch {case.batch}"
            yield name, partial(self._bandwidth, case)

    def prefill_checks(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """In one piece, at a length that the libraries have not planned for yet, and in chunks."""
        short, chunk = self.setup.step_tokens[0], self.setup.chunk_tokens
        yield f"prefill {short} whole", partial(self._prefill, short, 0)
        yield f"prefill {short - 1} whole, unseen length", partial(self._prefill, short - 1, 0)
        yield f"prefill {short - 1} whole, seen length", partial(self._prefill, short - 1, 0)
        yield f"prefill {short} in chunks of {chunk}", partial(self._prefill, short, chunk)
        for tokens in self.setup.step_tokens[1:]:
            for size in (chunk, 4 * chunk):
                yield f"prefill {tokens} in chunks of {size}", partial(self._prefill, tokens, size)

    def _long_prefill(self, tokens: int) -> Any:
        if tokens not in self._prefills:
            self._prefills.clear()
            self.engine_checks.forget_wide()
            engine = self.engine_checks.engine(chunk_tokens=self.setup.chunk_tokens)
            self._prefills[tokens] = engine.prefill(token_ids(tokens), parse("snapkv:0.25").stats_spec)
        return self._prefills[tokens]

    def _step(self, tokens: int, recipe: str, batch: str) -> dict[str, Any]:
        prefill, engine = self._long_prefill(tokens), self.engine_checks.engine()
        rows = 1 if batch == BATCHES[0] else ROWS
        questions = [QUESTION[: len(QUESTION) - (row % 2 if "padded" in batch else 0)] for row in range(rows)]
        contexts = [prefill.compress(parse(recipe), consume=False) for _ in range(ROWS if "contexts" in batch else 1)]
        cache = engine.batch(contexts * (rows // len(contexts)), questions, 64)
        question_ids = torch.zeros(rows, len(QUESTION), dtype=torch.long, device=self.setup.device)
        self.setup.synchronize()
        start = time.perf_counter()
        engine.forward(cache, question_ids, keep=1)
        self.setup.synchronize()
        question_ms = 1e3 * (time.perf_counter() - start)
        one = question_ids[:, :1]
        values = self._timed(lambda: engine.forward(cache, one, keep=1))
        sizes = {"read_gib": contexts[0].read_bytes / 2**30, "compress_ms": 1e3 * contexts[0].compress_s}
        return {**values, "question_ms": question_ms, **sizes}

    def _recorded_step(self, tokens: int, recipe: str) -> dict[str, Any]:
        """A step as a CUDA graph, and its logits against those of a step that runs launch by launch."""
        if self.setup.device != "cuda":
            raise LeftOutError(NEEDS_CUDA)
        engine = self.engine_checks.engine()
        context = self._long_prefill(tokens).compress(parse(recipe), consume=False)
        ids = torch.zeros(1, len(QUESTION), dtype=torch.long, device=self.setup.device)
        caches = [engine.batch([context], [QUESTION], STEPS) for _ in range(2)]
        for cache in caches:
            engine.forward(cache, ids, keep=1)
        replayed, one = Steps(engine, caches[0], STEPS), ids[:, :1]
        errors = [
            relative_error(replayed(one), engine.forward(caches[1], one, keep=1)[:, -1]) for _ in range(2 * BEFORE)
        ]
        recorded = int(replayed.is_recorded)
        values = {**self._timed(lambda: replayed(one)), "error": max(errors), "not_recorded": 1 - recorded}
        return bounded(values, error=1e-2, not_recorded=0)

    @torch.inference_mode()
    def _sdpa_step(self, tokens: int) -> dict[str, Any]:
        from transformers import DynamicCache

        from lceval.models import attention

        prefill, model = self._long_prefill(tokens), self.engine_checks.model
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(prefill.layers):
            cache.update(layer.keys[:, :, : layer.seen].clone(), layer.values[:, :, : layer.seen].clone(), index)
        one = torch.zeros(1, 1, dtype=torch.long, device=self.setup.device)
        model.set_attn_implementation("sdpa")
        try:
            return self._timed(lambda: model(input_ids=one, cache=cache, use_cache=True, logits_to_keep=1))
        finally:
            model.set_attn_implementation(attention.NAME)

    def _timed(self, step: Callable[[], Any]) -> dict[str, Any]:
        """Times of a step (medians), PyTorch operations in it, and on CUDA its kernels and how often the host waits."""
        for _ in range(WARM_UP):
            step()
        self.setup.synchronize()
        host, wall = [], []
        for _ in range(self.setup.step_repeats):
            start = time.perf_counter()
            step()
            host.append(time.perf_counter() - start)
            self.setup.synchronize()
            wall.append(time.perf_counter() - start)
        with Operations() as operations:
            step()
        values = {"host_ms": 1e3 * statistics.median(host), "wall_ms": 1e3 * statistics.median(wall)}
        values["operations"] = operations.count
        if self.setup.device != "cuda":
            return values | dict.fromkeys(("kernel_ms", "launches", "waits"), NEEDS_CUDA)
        return values | {"waits": _waits(step)} | _kernels(step)

    def _copy(self) -> dict[str, Any]:
        return {"gb_s": bench.copy_bandwidth(self.setup.device) / 1e9}

    def _bandwidth(self, case: bench.KernelCase) -> dict[str, Any]:
        self._prefills.clear()
        self.engine_checks.forget_wide()
        shape = SMALL if self.setup.small else QWEN_7B
        row = bench.measure([case], device=self.setup.device, dtype=self.setup.dtype, shape=shape)[0]
        if "error" in row:
            return {"failed": row["error"]}
        keys = ("us", "floor_us", "sdpa_us", "bandwidth_share", "speedup_vs_sdpa")
        values = {key: row[key] for key in keys}
        return values if row["us"] > 0 else {**values, "failed": "no time was measured"}

    def _prefill(self, tokens: int, chunk_tokens: int) -> dict[str, Any]:
        self._prefills.clear()
        self.engine_checks.forget_wide()
        engine = self.engine_checks.engine(chunk_tokens=chunk_tokens)
        cuda = self.setup.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        prefill = engine.prefill(token_ids(tokens), StatsSpec())
        values: dict[str, Any] = {"wall_s": prefill.prefill_s, "tokens_s": tokens / prefill.prefill_s}
        values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else NEEDS_CUDA
        keys = prefill.layers[-1].keys[:, :, :tokens]
        if not chunk_tokens:
            self._whole_keys[tokens] = keys.clone()
        elif tokens in self._whole_keys:
            values["key_error"] = relative_error(keys, self._whole_keys[tokens])
            # Chunks change the order of sums, and the last layer's keys have every layer's rounding in them.
            return bounded(values, key_error=0.1 if cuda else 1e-5)
        return values


def _waits(step: Callable[[], Any]) -> int:
    """How often the host waits for the device in a step, by PyTorch's own warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _kernels(step: Callable[[], Any]) -> dict[str, Any]:
    """Time and number of the device's kernels and copies in a step, and those that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    events = [x for x in profiled.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    time_us, launches = Counter[str](), Counter[str]()
    for event in events:
        time_us[event.name[:60]] += event.time_range.elapsed_us()
        launches[event.name[:60]] += 1
    longest = [[name, us / 1e3, launches[name]] for name, us in time_us.most_common(TOP_KERNELS)]
    return {"kernel_ms": sum(time_us.values()) / 1e3, "launches": len(events), "longest": longest}
