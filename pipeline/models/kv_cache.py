"""Generation with a Transformer: keys and values of what is known are kept, so that an element
costs one pass over the weights, however long the event is.

The cache is allocated once: 2 * L * B * K * slots * d numbers, slots = min(inputs, window + spare)
(as many inputs as elements, and the tokens of a caption).
With a window it is a ring: the input at position p lies in slot p mod slots, over one that has
left the window. Slots further on than the position are never read, so that `rewind` only
moves the position; where a ring has already lost what is needed, the inputs are fed again
(as few as decide the window: L windows of them). With spare slots, which whoever goes back often
asks for, a ring loses nothing when that many elements are forgotten.

Legend as in decoder.py.
"""

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chainrule.pipeline.models.attention import grouped_attention
from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.cursors import CachedCursor
from chainrule.pipeline.models.graph_steps import graph_steps_of
from chainrule.pipeline.models.native_steps import NativeSteps, steps_of

if TYPE_CHECKING:
    from chainrule.pipeline.models.decoder import Decoder
    from chainrule.pipeline.models.decoder_config import DecoderConfig

LARGEST_FEED = 1024
"""Inputs fed at once: bounds the memory that attention takes for a long prompt."""
SPARE = 128
"""Spare slots of a sampler's ring: it feeds up to 64 inputs at once, of which a row may take
back all, and may then go back over up to 64 that it knows (sampling/rows.py)."""


class KVCache:
    """Keys and values of every layer, (L, B, K, slots, d) each."""

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        slots: int,
        head_width: int,
        window: int | None,
        like: Tensor,
    ) -> None:
        shape = (layers, batch, kv_heads, slots, head_width)
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)
        self.slots = slots
        self.window = window or slots
        """Positions that an input sees, its own among them."""
        self.ring = window is not None
        self.oldest = 0
        """First position that was fed: 0, or later in a ring that had to be fed again."""

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def attend(self, layer: int, first: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Inputs at positions first.. look at themselves and at what is kept; then they are
        kept too. q (B, H, t, d), k and v (B, K, t, d) -> (B, H, t, d)."""
        keys, values = self.keys[layer], self.values[layer]
        length = k.shape[2]
        if not self.ring or length == 1:
            slot = first % self.slots if self.ring else first
            keys[:, :, slot : slot + length] = k
            values[:, :, slot : slot + length] = v
            held = min(first + length, self.slots)
            k, v = keys[:, :, :held], values[:, :, :held]
            mask = self._causal(held, length, q.device)
            if held > self.window:
                distance = (first - torch.arange(held, device=q.device)) % self.slots
                mask = (distance < min(self.window, first + 1)).unsqueeze(0)
            return grouped_attention(q, k, v, mask)
        oldest = max(self.oldest, first - self.window + 1)
        order = self._slots_of(oldest, first)
        old = len(order)
        k_all = torch.cat([keys[:, :, order], k], dim=2)
        v_all = torch.cat([values[:, :, order], v], dim=2)
        mask = self._causal(old + length, length, q.device)
        if mask is not None:
            mask = mask & mask.new_ones(mask.shape).triu(old + 1 - self.window)
        kept = min(length, self.slots)
        order = self._slots_of(first + length - kept, first + length)
        keys[:, :, order] = k[:, :, length - kept :].to(keys.dtype)  # autocast
        values[:, :, order] = v[:, :, length - kept :].to(values.dtype)
        return grouped_attention(q, k_all, v_all, mask)

    def _slots_of(self, first: int, end: int) -> Tensor:
        return torch.arange(first, end, device=self.keys.device) % self.slots

    @staticmethod
    def _causal(held: int, length: int, device: torch.device) -> Tensor | None:
        """(t, held) bool: the last `length` of `held` positions see those up to themselves."""
        if length == 1:
            return None
        return torch.ones(length, held, dtype=torch.bool, device=device).tril(held - length)


def ring_window(config: "DecoderConfig") -> int | None:
    """The window of a model that does not see a whole event, None for others."""
    return config.window if config.window is not None and config.window < config.inputs else None


def slots_of(config: "DecoderConfig", spare: int) -> int:
    """Slots of a cache: of every input, or of a window and those to spare."""
    window = ring_window(config)
    return config.inputs if window is None else min(config.inputs, window + spare)


class DecoderCursor(CachedCursor):
    """Elements known so far and the cache of their keys and values.

    `spare` slots of a ring let that many elements be forgotten without feeding any again.
    """

    def __init__(self, model: "Decoder", batch: int, cond: Tensor | None, spare: int = 0) -> None:
        config = model.config
        super().__init__(
            batch,
            config.context,
            config.vocabulary_size,
            lambda parameters: config.head.conditional(parameters, config.vocabulary_size),
        )
        self.model = model
        weight = next(model.final_norm.parameters())  # of the dtype that is computed in
        window = ring_window(config)
        self.cache = KVCache(
            config.layers,
            batch,
            config.kv_heads,
            slots_of(config, spare),
            config.head_width,
            window,
            like=weight,
        )
        discrete = config.vocabulary_size is not None
        self.elements = torch.zeros(
            batch,
            config.context,
            dtype=torch.long if discrete else torch.float32,
            device=weight.device,
        )
        self.fed = 0
        """Inputs whose keys and values are kept: the starts, then elements from the first on."""
        self._written = 0
        """Inputs that were ever fed: a ring has lost all before the last `slots` of them."""
        self._spare = self.cache.slots - self.cache.window
        self._stale = False
        with torch.no_grad():
            self.start = model.start_vectors(cond, batch)
            self._native = steps_of(model, self.cache.keys, self.cache.values)
            self._graphs = graph_steps_of(model, self.cache)
        self._start()

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    @property
    def in_c(self) -> bool:
        """Whether steps are taken in C, which rounds alike in any batch."""
        return self._native is not None

    def _write(self, first: int, x: Tensor) -> None:
        self.elements[:, first : first + x.shape[1]] = x

    def _predict(self, first: int, end: int) -> Tensor:
        # Element t is predicted from input t + before.
        before = self.model.config.starts - 1
        first, end = first + before, end + before
        begin = min(first, self.fed)  # earlier: the starts, and where a ring has to be fed again
        if end - begin <= LARGEST_FEED:
            return self._feed(begin, end)[:, first - begin :]
        cuts = [*range(begin, end, LARGEST_FEED), end]
        parts = [self._feed(a, b) for a, b in itertools.pairwise(cuts)]
        return torch.cat(parts, dim=1)[:, first - begin :]

    def _feed(self, first: int, end: int) -> Tensor:
        """Inputs first..end-1 through the model; the numbers of their conditionals."""
        model = self.model
        starts = model.config.starts
        h = model.embed(self.elements[:, max(first - starts, 0) : max(end - starts, 0)])
        if first < starts:
            h = torch.cat([self.start[:, first:end].to(h.dtype), h], dim=1)
        if model.config.position == "learned":
            h = h + model.positions[first:end]
        cache = self.cache
        length = end - first
        self._written = max(self._written, end)
        self.fed = end
        # In C all inputs are kept before the first one looks back.
        if self._native is not None and (not cache.ring or length <= self._spare + 1):
            return self._feed_native(self._native, first, length, h)
        if self._graphs is not None and length == 1:
            return self._graphs(h, first)
        rope = model.rope(first, end, h)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cache.attend(layer, first, q, k, v)

        for block in model.blocks:
            h = block(h, rope, attend)
        parameters: Tensor = model.head(model.final_norm(h))
        return parameters

    def _feed_native(self, native: NativeSteps, first: int, length: int, h: Tensor) -> Tensor:
        positions = list(range(first, first + length)) * self.batch
        parameters = native(
            h,
            [row for row in range(self.batch) for _ in range(length)],
            positions,
            [max(0, position + 1 - self.cache.window) for position in positions],
        )
        return parameters.view(self.batch, length, -1)

    @property
    def next(self) -> Conditional:
        if self._stale:
            with torch.no_grad():
                self._next = self._predict(self.position, self.position + 1)[:, -1]
            self._stale = False
        return super().next

    def advance(self, x: Tensor) -> Conditional:
        conditional = super().advance(x)
        self._stale = self._stale and not x.shape[1]
        return conditional

    @torch.no_grad()
    def rewind(self, n: int) -> None:
        if not 0 <= n <= self.position:
            raise ValueError(f"n is {n}: {self.position} elements can be forgotten")
        if n == 0:
            return
        self.position -= n
        # The inputs' keys are kept; the prediction is made again when it is asked for, since
        # whoever rewinds mostly goes on at once with another element.
        self._stale = True
        self.fed = min(self.fed, self.position + self.model.config.starts)
        cache = self.cache
        if not cache.ring:
            return
        lost = self._written - cache.slots
        # A key of layer l depends on the inputs of l windows.
        reach = self.model.config.layers * (cache.window - 1)
        needed = max(0, self.position - reach)
        if lost > max(0, self.position + 1 - cache.window) or cache.oldest > needed:
            cache.oldest = max(0, needed - self._spare)
            self.fed = cache.oldest
            self._written = self.position + 1  # what lay beyond is out of sight once that is fed
