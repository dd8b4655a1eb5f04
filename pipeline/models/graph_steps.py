"""A cursor's steps on a GPU as CUDA graphs: one launch a token, not hundreds.

At batch 1 a GPU computes a layer faster than Python can ask for its kernels. A step whose shapes
and addresses never change is recorded once and replayed: the position is a number on the GPU, the
attention is over a fixed number of slots, and those that hold nothing yet are masked
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs; gpt-fast does the same).

So that a short text does not pay for the longest, there is a graph for 256 slots, one for 512, and
so on, each recorded when the first step needs it: some three ordinary steps' time.

Roundings differ from those of ordinary steps in the last bits, so that it is used where C would be
on a CPU (native.py): to draw samples, not to code. CHAINRULE_GRAPHS=0 does without.

Legend as in decoder.py; S slots of the cache.
"""

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chainrule.pipeline.models import native
from chainrule.pipeline.models.attention import grouped_attention

if TYPE_CHECKING:
    from chainrule.pipeline.models.decoder import Decoder
    from chainrule.pipeline.models.kv_cache import KVCache

LEAST_HELD = 256
"""Slots of the smallest graph."""


class StaticStep:
    """One input of every row over the first `held` slots of a cache, from `h` and `position` to
    what `run` returns: no shape, address or branch depends on where the cursor stands."""

    def __init__(self, model: "Decoder", cache: "KVCache", held: int) -> None:
        self.model, self.cache, self.held = model, cache, held
        like = cache.keys
        self.h = torch.zeros(like.shape[1], 1, model.config.width, dtype=like.dtype).to(like.device)
        """(B, 1, D) embedded inputs."""
        self.position = torch.zeros(1, dtype=torch.long, device=like.device)
        """Where they stand."""
        self._rope = model.rope(0, model.config.inputs, self.h)

    def run(self) -> Tensor:
        """(B, 1, P) numbers of the conditionals; keys and values are kept."""
        cache, position = self.cache, self.position
        slot = position % cache.slots
        # Slot s holds the position `distance` before this one, where that is not before the first.
        distance = (position - torch.arange(self.held, device=position.device)) % cache.slots
        mask = (distance < (position + 1).clamp(max=cache.window)).unsqueeze(0)
        rope = None if self._rope is None else self._rope.index_select(1, position)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys.index_copy_(2, slot, k)
            values.index_copy_(2, slot, v)
            return grouped_attention(q, keys[:, :, : self.held], values[:, :, : self.held], mask)

        h = self.h
        for block in self.model.blocks:
            h = block(h, rope, attend)
        parameters: Tensor = self.model.head(self.model.final_norm(h))
        return parameters


class GraphSteps:
    """The steps of one cursor, recorded as they are needed."""

    def __init__(self, model: "Decoder", cache: "KVCache") -> None:
        self.model, self.cache = model, cache
        # What is masked is still multiplied, by nothing: it must be a number.
        cache.keys.zero_()
        cache.values.zero_()
        self._recorded: dict[int, tuple[StaticStep, torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, h: Tensor, position: int) -> Tensor:
        """`h` (B, 1, D), the inputs at `position`, to (B, 1, P)."""
        held = held_at(position, self.cache.slots)
        if held not in self._recorded:
            self._recorded[held] = self._record(held, h, position)
        step, graph, parameters = self._recorded[held]
        step.h.copy_(h)
        step.position.fill_(position)
        graph.replay()
        return parameters.clone()  # the next replay writes there

    def _record(
        self, held: int, h: Tensor, position: int
    ) -> tuple[StaticStep, torch.cuda.CUDAGraph, Tensor]:
        step = StaticStep(self.model, self.cache, held)
        # Kernels pick their algorithms and workspaces in a first run, which must not be recorded.
        # It does this very step: what it writes into the cache is written there again.
        step.h.copy_(h)
        step.position.fill_(position)
        aside = torch.cuda.Stream(h.device)
        aside.wait_stream(torch.cuda.current_stream(h.device))
        with torch.cuda.stream(aside):
            step.run()
        torch.cuda.current_stream(h.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._recorded.values()))[1].pool() if self._recorded else None
        with torch.cuda.device(h.device), torch.cuda.graph(graph, pool=pool):
            parameters = step.run()
        return step, graph, parameters


def held_at(position: int, slots: int) -> int:
    """Slots of the graph for a position: 256, 512, 1024, ... up to all there are. A ring that has
    come round is in use as a whole."""
    held = LEAST_HELD
    while held <= position:
        held *= 2
    return min(held, slots)


def graph_steps_of(model: "Decoder", cache: "KVCache") -> GraphSteps | None:
    """Steps as CUDA graphs over this cache, None where there is no such GPU (see the head)."""
    if not native.is_allowed() or os.environ.get("CHAINRULE_GRAPHS") == "0":
        return None
    # An AMD GPU is "cuda" to torch as well; HIP's graphs were never tried.
    if cache.keys.device.type != "cuda" or torch.version.cuda is None:
        return None
    if torch.is_autocast_enabled("cuda"):
        return None
    return GraphSteps(model, cache)
