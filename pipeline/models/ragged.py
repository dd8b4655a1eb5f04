"""A Transformer's cursor whose rows stand at positions of their own.

Speculative decoding keeps a different number of drafted elements in each row of a batch; with
this cursor one call still reads the weights once for all rows. The arithmetic of a row is that
of `DecoderCursor`; keys beyond a row's position are masked, and overwritten when it goes on.

Legend as in decoder.py; n_b elements known of row b, S slots of the cache that are in use.
"""

import numpy as np
import torch
from torch import Tensor

from chainrule.pipeline.models.attention import grouped_attention
from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.inputs import check_values
from chainrule.pipeline.models.kv_cache import SPARE, ring_window, slots_of
from chainrule.pipeline.models.native_steps import steps_of


class RaggedCursor:
    """Rows of `batch` events at their start.

    With a window, `advance` takes up to `most` elements at once, and a row can only forget what
    the ring of its cache has not lost; ValueError beyond.
    """

    def __init__(self, model: Decoder, batch: int, cond: Tensor | None = None) -> None:
        config = model.config
        cond = model.check_condition(cond, batch)
        self.model = model
        self.slots = slots_of(config, SPARE)
        self.window = ring_window(config) or config.inputs
        self.most = self.slots - self.window + 1 if self.slots < config.inputs else config.context
        weight = next(model.final_norm.parameters())  # of the dtype that is computed in
        shape = (config.layers, batch, config.kv_heads, self.slots, config.head_width)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.known = np.zeros(batch, dtype=np.int64)
        """Elements known of each row, (B,)."""
        self._written = np.zeros(batch, dtype=np.int64)
        """Inputs ever fed to each row, (B,): a ring has lost all before the last `slots`."""
        with torch.no_grad():
            self._native = steps_of(model, self.keys, self.values)
            start = model.start_vectors(cond, batch)
            self._feed(start.to(weight.dtype), np.zeros(batch, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @torch.no_grad()
    def advance(self, x: Tensor) -> Conditional:
        """Feed k elements to every row (B, k); the conditionals that follow each, (B, k).

        ValueError for elements that are not the model's, and where a row would be fed to the
        last element of its event.
        """
        if x.shape[1] > self.most:
            raise ValueError(f"x has {x.shape[1]} elements: the ring takes {self.most} at once")
        if int(self.known.max()) + x.shape[1] >= self.model.config.context:
            raise ValueError(
                f"x has {x.shape[1]} elements and a row stands at {int(self.known.max())}: nothing "
                f"follows the last of {self.model.config.context} elements"
            )
        x = check_values(x, self.model.config.vocabulary_size)
        parameters = self._feed(self.model.embed(x), self.known + self.model.config.starts)
        self.known += x.shape[1]
        config = self.model.config
        return config.head.conditional(parameters, config.vocabulary_size)

    def rewind_rows(self, counts: Tensor) -> None:
        """Forget the last counts[b] elements of row b."""
        left = self.known - counts.cpu().numpy()
        if (counts < 0).any() or (left < 0).any():
            raise ValueError(f"counts is {counts.tolist()}: rows hold {self.known.tolist()}")
        # The next input stands at left + 1 and sees a window, its own position included.
        if (self._written - self.slots > np.maximum(0, left + 2 - self.window)).any():
            raise ValueError(
                f"counts is {counts.tolist()}: a ring of {self.slots} slots has lost what a window "
                f"of {self.window} needs there"
            )
        self.known = left

    def _feed(self, h: Tensor, first: np.ndarray) -> Tensor:
        """Inputs (B, t, D) at positions first[b].. through the model; (B, t, P)."""
        model = self.model
        batch, length = h.shape[:2]
        positions_np = first[:, None] + np.arange(length)
        self._written = np.maximum(self._written, first + length)
        if self._native is not None:
            at = positions_np.flatten().tolist()
            if model.config.position == "learned":
                h = h + model.positions[at].view_as(h)
            of_row = np.repeat(np.arange(batch), length).tolist()
            oldest = [max(0, position + 1 - self.window) for position in at]
            parameters = self._native(h, of_row, at, oldest)
            return parameters.view(batch, length, -1)
        positions = torch.from_numpy(positions_np).to(h.device)
        held = min(int(positions_np.max()) + 1, self.slots)
        if model.config.position == "learned":
            h = h + model.positions[positions]
        rope = model.rope(0, model.config.inputs, h)
        if rope is not None:
            rope = rope[:, positions]
        # Row b's input i sees a window of positions up to its own.
        slots = torch.arange(held, device=h.device)
        distance = (positions.unsqueeze(-1) - slots) % self.slots
        seen = (positions + 1).clamp(max=self.window).unsqueeze(-1)
        mask = (distance < seen).unsqueeze(1)
        into = positions % self.slots
        rows = torch.arange(batch, device=h.device).unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, into] = k.transpose(1, 2)
            values[rows, :, into] = v.transpose(1, 2)
            return grouped_attention(q, keys[:, :, :held], values[:, :, :held], mask)

        for block in model.blocks:
            h = block(h, rope, attend)
        parameters = model.head(model.final_norm(h))
        return parameters
