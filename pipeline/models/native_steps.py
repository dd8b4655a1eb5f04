"""A cursor's steps in C (native_steps.c): one call a token, not hundreds of operations.

For layers of other kinds, on a GPU, and wherever native.py gives no library, generation goes
through torch. Weights are read where they are, so that nothing is held twice; small vectors of
a bfloat16 model are widened when a cursor is made.
"""

import copy
import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from chainrule.pipeline.models import native
from chainrule.pipeline.models.kernels import Linear, RMSNorm

if TYPE_CHECKING:
    from chainrule.pipeline.models.decoder import Decoder

SOURCE = Path(__file__).with_suffix(".c")
MOST_INPUTS = 32
"""Inputs in one call: more are cut into calls of so many, which bounds the scratch memory. No
number depends on what goes along in a call, so that a sample is the same in any batch."""

_WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_NORMS = {"layernorm": 0, "rmsnorm": 1}
_ACTIVATIONS = {"gelu": 0, "gelu-tanh": 1, "quick-gelu": 2, "swiglu": 3}
_BLOCKS = {"sequential": 0, "parallel": 1, "parallel-two-norms": 2}


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "mlp_norm")),
        *((name, _Matrix) for name in ("qkv", "attended", "mlp_in", "mlp_out")),
    ]


_SIZES = ("layers", "width", "heads", "kv_heads", "head_width", "mlp_width", "outputs", "slots")
_KINDS = ("batch", "weights", "cached", "norm", "activation", "block")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, *_KINDS)),
        ("epsilon", ctypes.c_double),
        ("layer", ctypes.POINTER(_Layer)),
        ("final_norm", _Norm),
        ("head", _Matrix),
        *((name, ctypes.c_void_p) for name in ("rope", "keys", "values")),
    ]


class NativeSteps:
    """A model's steps over one cache: keys and values (L, B, K, S, d)."""

    def __init__(
        self, library: ctypes.CDLL, model: "Decoder", keys: Tensor, values: Tensor
    ) -> None:
        config = model.config
        self._made_of = library, model, keys, values
        self._step, self._scratch_size = library.step, library.scratch_size
        self._held: list[Tensor] = [keys, values]
        head = model.head
        assert isinstance(head, nn.Module)
        weight = _tensor(head, "weight")
        self._layers = (_Layer * config.layers)()
        for layer, block in zip(self._layers, model.blocks, strict=True):
            modules: Any = block
            layer.attention_norm = self._norm(modules.attention_norm)
            if modules.mlp_norm is not None:
                layer.mlp_norm = self._norm(modules.mlp_norm)
            layer.qkv = self._matrix(modules.attention.qkv)
            layer.attended = self._matrix(modules.attention.output)
            layer.mlp_in = self._matrix(modules.mlp.input)
            layer.mlp_out = self._matrix(modules.mlp.output)
        self.rope = model.rope(0, config.inputs, torch.empty(0))  # float32
        self.outputs = len(weight)
        self._model = _Model(
            layers=config.layers,
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            mlp_width=config.mlp_width,
            outputs=self.outputs,
            slots=keys.shape[3],
            batch=keys.shape[1],
            weights=_WEIGHTS[weight.dtype],
            cached=_WEIGHTS[keys.dtype],
            norm=_NORMS[config.norm],
            activation=_ACTIVATIONS[config.activation],
            block=_BLOCKS[config.block],
            epsilon=config.norm_epsilon,
            layer=self._layers,
            final_norm=self._norm(model.final_norm),
            head=self._matrix(head),
            rope=None if self.rope is None else self.rope.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
        )
        self._inputs = config.inputs
        self._scratch = torch.empty(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NativeSteps":
        """Of a cursor that is copied: addresses are those of the copy's tensors."""
        library, model, keys, values = self._made_of
        copied = copy.deepcopy((model, keys, values), memo)
        return NativeSteps(library, *copied)

    def __call__(
        self, h: Tensor, rows: list[int], positions: list[int], oldest: list[int]
    ) -> Tensor:
        """h (..., D), M embedded inputs, to (M, P) float32.

        Input i belongs to row rows[i] of the cache, stands at positions[i], is kept in slot
        positions[i] mod S and sees positions oldest[i]..positions[i]. All of those must still
        lie in the cache when every input of the call has been kept. A row's inputs come in order.
        """
        # A copy: the residual stream is added up in place.
        h = h.to(torch.float32, copy=True).reshape(len(rows), -1).contiguous()
        logits = torch.empty(len(rows), self.outputs)
        for first in range(0, len(rows), MOST_INPUTS):
            part = slice(first, first + MOST_INPUTS)
            self._call(h[part], rows[part], positions[part], oldest[part], logits[part])
        return logits

    def _call(
        self, h: Tensor, rows: list[int], positions: list[int], oldest: list[int], logits: Tensor
    ) -> None:
        """Up to MOST_INPUTS of them; `h` is overwritten, `logits` is written."""
        inputs, threads = len(rows), torch.get_num_threads()
        size = self._scratch_size(ctypes.byref(self._model), inputs, threads)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size)
        numbers = ctypes.c_int64 * inputs
        self._step(
            ctypes.byref(self._model),
            inputs,
            threads,
            numbers(*rows),
            numbers(*positions),
            numbers(*oldest),
            self._inputs,
            h.data_ptr(),
            self._scratch.data_ptr(),
            logits.data_ptr(),
        )

    def _norm(self, norm: nn.Module) -> _Norm:
        return _Norm(self._vector(norm.weight), self._vector(getattr(norm, "bias", None)))

    def _matrix(self, layer: nn.Module) -> _Matrix:
        weight = _tensor(layer, "weight")
        self._held.append(weight)
        return _Matrix(
            weight.data_ptr(),
            self._vector(getattr(layer, "scale", None)),
            self._vector(layer.bias),
        )

    def _vector(self, vector: Any) -> int | None:
        """Where float32 numbers of a small tensor lie."""
        if vector is None:
            return None
        kept = vector.detach().float().contiguous()
        self._held.append(kept)
        return int(kept.data_ptr())


def _tensor(module: nn.Module, name: str) -> Tensor:
    found: Any = getattr(module, name)
    return found.detach()  # type: ignore[no-any-return]


def steps_of(model: "Decoder", keys: Tensor, values: Tensor) -> NativeSteps | None:
    """Steps in C over this cache, None where they are not to be had (see the head of the file)."""
    if not native.is_allowed():
        return None
    if keys.device.type != "cpu" or keys.dtype not in (torch.float32, torch.bfloat16):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if not _plain(model, keys.dtype):
        return None
    library = load()
    return None if library is None else NativeSteps(library, model, keys, values)


def _plain(model: "Decoder", dtype: torch.dtype) -> bool:
    """Whether every part is what the C code takes it for: nothing watches it, has taken its place
    or changed what it computes."""
    from chainrule.pipeline.models.decoder import MLP, Attention, Block

    norm_kind = nn.LayerNorm if model.config.norm == "layernorm" else RMSNorm
    kinds = set()
    for part in (*model.blocks, model.final_norm, model.head):
        for module in part.modules():
            if native.is_watched(module):
                return False
            if type(module) in (Block, Attention, MLP):
                continue
            if type(module) in (nn.LayerNorm, RMSNorm):
                epsilon = getattr(module, "epsilon", getattr(module, "eps", None))
                if type(module) is not norm_kind or epsilon != model.config.norm_epsilon:
                    return False
                continue
            weight = getattr(module, "weight", None)
            quantised = isinstance(weight, Tensor) and weight.dtype == torch.int8
            known = type(module) in (nn.Linear, Linear) or (quantised and hasattr(module, "scale"))
            if not known or not isinstance(weight, Tensor) or not weight.is_contiguous():
                return False
            kinds.add(weight.dtype)
    return kinds == {dtype} or kinds == {torch.int8}


@cache
def load() -> ctypes.CDLL | None:
    """The C code, None where it cannot be built."""
    library = native.load(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.scratch_size.argtypes = [pointer, number, number]
    library.scratch_size.restype = number
    library.step.argtypes = [pointer, number, number, *[pointer] * 3, number, *[pointer] * 3]
    library.step.restype = None
    return library
