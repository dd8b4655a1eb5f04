"""A Transformer's cursor whose rows stand at positions of their own.

Speculative decoding keeps a different number of drafted elements in each row of a batch; with
this cursor one call still reads the weights once for all rows. The arithmetic of a row is that
of `DecoderCursor`; keys beyond a row's position are masked, and overwritten when it goes on.

Legend as in decoder.py; n_b elements known of row b, S slots of the cache that are in use.
"""

import numpy as np
import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Conditional
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.inputs import check_condition, check_values
from chainrule.pipeline.models.kv_cache import grouped_attention
from chainrule.pipeline.models.native_steps import steps_of


class RaggedCursor:
    """Rows of `batch` events at their start. ValueError for a model with a sliding window."""

    def __init__(self, model: Decoder, batch: int, cond: Tensor | None = None) -> None:
        config = model.config
        if config.window is not None and config.window < config.context:
            raise ValueError("rows of their own positions need a cache without a sliding window")
        cond = check_condition(cond, config.classes, batch)
        self.model = model
        weight = next(model.final_norm.parameters())  # of the dtype that is computed in
        shape = (config.layers, batch, config.kv_heads, config.context, config.head_width)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.known = np.zeros(batch, dtype=np.int64)
        """Elements known of each row, (B,)."""
        with torch.no_grad():
            self._native = steps_of(model, self.keys, self.values)
            start = model.start_vector(cond, batch).unsqueeze(1)
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
        if int(self.known.max()) + x.shape[1] >= self.model.config.context:
            raise ValueError(
                f"x has {x.shape[1]} elements and a row stands at {int(self.known.max())}: nothing "
                f"follows the last of {self.model.config.context} elements"
            )
        x = check_values(x, self.model.config.vocabulary_size)
        parameters = self._feed(self.model.embed(x), self.known + 1)
        self.known += x.shape[1]
        config = self.model.config
        return config.head.conditional(parameters, config.vocabulary_size)

    def rewind_rows(self, counts: Tensor) -> None:
        """Forget the last counts[b] elements of row b."""
        left = self.known - counts.cpu().numpy()
        if (counts < 0).any() or (left < 0).any():
            raise ValueError(f"counts is {counts.tolist()}: rows hold {self.known.tolist()}")
        self.known = left

    def _feed(self, h: Tensor, first: np.ndarray) -> Tensor:
        """Inputs (B, t, D) at positions first[b].. through the model; (B, t, P)."""
        model = self.model
        batch, length = h.shape[:2]
        positions_np = first[:, None] + np.arange(length)
        if self._native is not None and positions_np.size <= self._native.most:
            at = positions_np.flatten().tolist()
            if model.config.position == "learned":
                h = h + model.positions[at].view_as(h)
            of_row = np.repeat(np.arange(batch), length).tolist()
            parameters = self._native(h, of_row, at, at, [position + 1 for position in at])
            return parameters.view(batch, length, -1)
        positions = torch.from_numpy(positions_np).to(h.device)
        held = int(positions_np.max()) + 1
        if model.config.position == "learned":
            h = h + model.positions[positions]
        rope = model.rope(0, model.config.context, h)
        if rope is not None:
            rope = rope[:, positions]
        # Row b's input i sees positions up to its own.
        slots = torch.arange(held, device=h.device)
        mask = (slots <= positions.unsqueeze(-1)).unsqueeze(1)
        rows = torch.arange(batch, device=h.device).unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            keys[rows, :, positions] = k.transpose(1, 2)
            values[rows, :, positions] = v.transpose(1, 2)
            return grouped_attention(q, keys[:, :, :held], values[:, :, :held], mask)

        for block in model.blocks:
            h = block(h, rope, attend)
        parameters = model.head(model.final_norm(h))
        return parameters
