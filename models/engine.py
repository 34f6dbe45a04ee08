"""Runs a causal LM over the caches: prefill of contexts and questions, and batched forward passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from lceval.core.errors import UserError
from lceval.models.compressed import CompressedContext, QuestionCache
from lceval.models.few_rows import FewRows
from lceval.models.geometry import Geometry
from lceval.models.policies import StatsSpec
from lceval.models.prefill import Prefill, synchronize
from lceval.models.prefill_stats import SCORING, QueryAwareStats
from lceval.models.question import Rows
from lceval.models.recipe import Recipe
from lceval.models.reconstruction import ReconstructionStats, Repetition, output_norms, output_weight
from lceval.models.scorer import Scorer, attention_inputs, attention_modules, dimensions_of, output_projections


class Engine:
    """A causal LM that attends through lceval's attention function.

    Attributes:
        scorers: those that prefills can apply, by digest.
        records_steps: whether decoding steps can be recorded; False once one could not.
        key_dim: channels of a key of the first layer that has some; 0 before the first prefill.
        token_bytes: bytes of a token's keys and values in all layers; the same.
        state_bytes: bytes of all states of one row; the same.

    Args:
        model: the model that generates: a transformers model, or a PEFT model around it.
        base: the transformers model itself.
        chunk: tokens per forward pass during prefill; 0 prefills a context in one pass.
        kernels: score, compact and decode with the Triton kernels.
        autocast: returns the context manager for forward passes.
        repetition: how the model is asked to repeat a context (`StatsSpec.reconstruction`).
    """

    def __init__(
        self,
        model: Any,
        base: Any,
        *,
        chunk: int,
        kernels: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
        repetition: Repetition,
    ) -> None:
        self.model = model
        self.geometry = Geometry.of(base)
        self.kernels = kernels
        self.scorers: dict[str, Scorer] = {}
        self._base = base
        self._decoder = base.get_decoder()
        _make_input_contiguous(base.get_output_embeddings())
        self._few_rows = FewRows(base)
        self._chunk = chunk
        self.autocast = autocast
        self._repetition = repetition
        self.device = base.device
        self.dtype = base.dtype
        self.records_steps = True
        self.key_dim = 0
        self.token_bytes = 0
        self.state_bytes = 0

    def check(self, kv: Recipe) -> None:
        """Check that the model has what a recipe requires.

        Raises:
            UserError: it has not.
        """
        geometry, stats_spec = self.geometry, kv.stats_spec
        if kv != Recipe() and not geometry.full:
            raise UserError(f"{geometry.model_type} has no full-attention layer that {kv} could compress: use kv=full")
        if kv.evicts_always and geometry.shares:
            raise UserError(f"{geometry.model_type} shares keys between layers, which excludes when=always: remove it")
        geometry.check(stats_spec)
        if geometry.latent and (stats_spec.reconstruction_plus or stats_spec.output_norms):
            raise UserError(f"{kv} requires the values of each head; {geometry.model_type} caches latents: use snapkv")
        if stats_spec.reconstruction_plus or stats_spec.output_norms:
            output_projections(self._base, self.geometry.full)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], stats_spec: StatsSpec) -> Prefill:
        """Prefill a context of at least one token and collect the statistics of `stats_spec`."""
        start_s = time.perf_counter()
        prefill = Prefill(self.geometry, len(ids), stats_spec, kernels=self.kernels)
        prefill.protected = self.protected_tokens(ids)
        step = self._chunk or len(ids)
        layers = prefill.layers
        with self.scored(stats_spec, lambda index, digest, scores: layers[index].stats.add_scores(digest, scores)):
            for start in range(0, len(ids), step):
                self.decode(prefill, [ids[start : start + step]])
        with record_function(SCORING):
            if stats_spec.reconstruction:
                self._reconstruct(prefill, ids)
            if stats_spec.output_norms:
                prefill.output_norms = self._output_norms(prefill)
        self.key_dim = prefill.first.keys.shape[3]
        self.token_bytes, self.state_bytes = prefill.token_bytes, sum(state.nbytes for state in prefill.states)
        synchronize(prefill.devices)
        prefill.prefill_s = time.perf_counter() - start_s
        return prefill

    def _output_norms(self, prefill: Prefill) -> list[Tensor]:
        """Per full-attention layer [B, Hkv, S] float32 (`LayerView.output_norms`)."""
        norms = []
        for index, projection in output_projections(self._base, self.geometry.full).items():
            values = prefill.layers[index].values[:, :, : prefill.tokens]
            with self.autocast():
                weight = output_weight(projection, values)
            norms.append(output_norms(values, weight, order=1).mean(2))
        return norms

    def protected_tokens(self, ids: Sequence[int]) -> int:
        """How many tokens of a context the chat template puts before the user's message."""
        return self._repetition.chat.prefix_tokens(ids)

    def scored(
        self, stats_spec: StatsSpec, receive: Callable[[int, str, Tensor], None]
    ) -> AbstractContextManager[None]:
        """Within the block, every full-attention layer's attention input is scored by the scorers of `stats_spec`.

        receive: gets the index of a layer in the model, the digest of a scorer and its scores [B, Hkv, T] float32.
        """
        digests = sorted(stats_spec.scorers)
        if not digests:
            return nullcontext()
        places = self.geometry.full

        def score(index: int, hidden: Tensor) -> None:
            with record_function(SCORING):
                for digest in digests:
                    receive(index, digest, self.scorers[digest].score(places.index(index), hidden))

        return attention_inputs(self._base, places, score)

    def add_scorer(self, scorer: Scorer) -> None:
        """Let prefills compute its scores, on the devices of the model's layers.

        Raises:
            UserError: it is of another model.
        """
        digest = scorer.digest  # of the stored weights, before they are converted
        scorer.check(self.geometry, self._base.config.get_text_config())
        places = self.geometry.full
        modules = attention_modules(self._base)
        for module, index in zip(scorer.layers, places, strict=True):
            module.to(device=next(modules[index].parameters()).device, dtype=self.dtype)
        self.scorers[digest] = scorer

    @property
    def kv_heads(self) -> list[int]:
        """The number of KV heads of each full-attention layer."""
        sizes = dimensions_of(self.geometry, self._base.config.get_text_config())
        return [sizes["output_dim"]] * sizes["n_modules"]

    @contextmanager
    def after_passes(self, call: Callable[[], None]) -> Iterator[None]:
        """Within the block, `call` is called after every pass of the decoder."""
        handle = self._decoder.register_forward_hook(lambda *_: call())
        try:
            yield
        finally:
            handle.remove()

    def empty_context(self) -> CompressedContext:
        """The context of a prompt that is a question only."""
        return CompressedContext.empty(self.geometry, self.dtype, self.device)

    @cached_property
    def layer_devices(self) -> list[torch.device]:
        """The device of each layer; several under `parallelize=True`."""
        indexed = [m for m in self._decoder.modules() if isinstance(getattr(m, "layer_idx", None), int)]
        devices = {m.layer_idx: p.device for m in indexed for p in m.parameters()}
        return [devices.get(index, self.device) for index in range(len(self.geometry.layers))]

    @torch.inference_mode()
    def decode(self, cache: Any, ids: Sequence[Sequence[int]]) -> None:
        """Run the decoder, without its output layer, over ids [B, T] that continue `cache`."""
        with self.autocast():
            self._decoder(input_ids=torch.tensor(ids, device=self.device), cache=cache, use_cache=True)

    def _reconstruct(self, prefill: Prefill, ids: Sequence[int]) -> None:
        """Let the model repeat the context chunk by chunk, and store the scores of each token in `prefill`."""
        whole = prefill.compress(Recipe(), consume=False)
        full, plus = self.geometry.full, prefill.stats_spec.reconstruction_plus
        projections = output_projections(self._base, full) if plus else {}
        received = [k.new_zeros(k.shape[:3], dtype=torch.float32) for k in prefill.keys if k is not None]
        prefill.reconstruction_attention = received
        prefill.reconstruction_plus = [torch.zeros_like(x) for x in received] if plus else None
        for chunk, input_ids in self._repetition.passes(ids, prefill.protected):
            cache = whole.fork(len(input_ids))
            collectors = {
                index: ReconstructionStats(k, chunk, prefill.protected)
                for index, k in enumerate(prefill.keys)
                if k is not None
            }
            cache.collect([collectors.get(index) for index in range(len(prefill.layers))])
            with attention_inputs(self._base, full, partial(_norms, collectors)) if plus else nullcontext():
                self.decode(cache, [input_ids])
            for place, (index, collector) in enumerate(collectors.items()):
                prefill.reconstruction_attention[place][..., chunk] = collector.attention
                if prefill.reconstruction_plus is not None:
                    assert collector.relative is not None
                    values = prefill.layers[index].values[:, :, chunk]
                    with self.autocast():
                        weight = output_weight(projections[index], values)
                    relative = collector.relative * output_norms(values, weight)
                    prefill.reconstruction_plus[place][..., chunk] = relative.amax(2)

    @torch.inference_mode()
    def attention_paid(self, prefill: Prefill, continuations: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per full-attention layer [B, Hkv, S] float32, the most attention that each token of a context receives from
        continuations of it, over their tokens and the query heads of a KV head.

        Args:
            continuations: token ids, each after the context alone; at least one.
        """
        whole, paid = prefill.compress(Recipe(), consume=False), None
        for ids in continuations:
            cache = whole.fork(len(ids))
            every = slice(0, prefill.tokens)
            collectors = [None if k is None else ReconstructionStats(k, every, 0) for k in prefill.keys]
            cache.collect(collectors)
            self.decode(cache, [ids])
            received = [c.attention for c in collectors if c is not None]
            paid = received if paid is None else [torch.maximum(*pair) for pair in zip(paid, received, strict=True)]
        assert paid is not None, "at least one continuation"
        return paid

    @torch.inference_mode()
    def prefill_question(self, prefill: Prefill, question: Sequence[int], capacity: int) -> QuestionCache:
        """A question prefilled over the uncompressed context, with the same statistics collected as for the context."""
        cache = prefill.compress(Recipe(), consume=False).fork(capacity, kernels=self.kernels)
        cache.collect(
            [
                None if k is None else QueryAwareStats(layer.stats, k)
                for layer, k in zip(prefill.layers, prefill.keys, strict=True)
            ]
        )
        if self.geometry.has_states and question[:-1]:
            self.decode(cache, [question[:-1]])
            question = question[-1:]
        cache.mark()
        self.decode(cache, [question])
        return cache

    def batch(
        self, contexts: Sequence[CompressedContext], questions: Sequence[Sequence[int]], capacity: int
    ) -> QuestionCache:
        """A cache with one row per question over its context; rows of the same context must be adjacent.

        Args:
            capacity: tokens after the longest question.
        """
        distinct = list({id(context): context for context in contexts}.values())
        owners = tuple(next(i for i, d in enumerate(distinct) if d is context) for context in contexts)
        longest = max(len(q) for q in questions)
        pads = tuple(longest - len(q) for q in questions)
        rows = Rows(owners, tuple(c.tokens for c in contexts), pads if any(pads) else None)
        return QuestionCache(distinct, rows, longest + capacity, self.kernels)

    @torch.inference_mode()
    def forward(self, cache: QuestionCache, ids: Tensor, keep: int = 0) -> Tensor:
        """Logits [B, T or `keep`, V] of ids [B, T] that continue `cache`; `keep` = 0 returns all T."""
        with self.autocast(), self._few_rows.active():
            out = self.model(
                input_ids=ids,
                position_ids=cache.next_positions(ids.shape[1], ids.device),
                cache=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
        cache.progress.advance(ids.shape[1])
        logits: Tensor = out.logits
        return logits


def _norms(collectors: Mapping[int, ReconstructionStats], layer: int, hidden: Tensor) -> None:
    """Give a layer's collector the norms of its attention input [1, T, d]."""
    collectors[layer].hidden_norms = hidden.float().norm(dim=-1)


def _make_input_contiguous(head: torch.nn.Module | None) -> None:
    """Make the input of an output layer contiguous.

    transformers slices the last positions of a batch; PyTorch multiplies such a slice by a frozen matrix as a batched
    product, with a copy of the matrix for every row (under an adapter all matrices are frozen).
    """
    if head is not None and _contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_contiguous)


def _contiguous(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(), *inputs[1:])
