"""Settings of the decoder-only Transformers: one config, families that differ in named settings.

Sources, with what each family sets apart:
  gpt2      Radford et al. 2019, section 2.3; GPT-3 (Brown et al. 2020, table 2.1) has its shapes
            (its alternating sparse layers are dense here)
  llama     Touvron et al. 2023, section 2.2; LLaMA 2 (grouped queries); LLaMA 3 (RoPE scaling)
  mistral   Jiang et al. 2023, section 2: LLaMA with sliding-window attention
  falcon    Almazrouei et al. 2023, section 4: attention and MLP in parallel, multi-query (7B) or
            grouped (40B, two norms a block)
  imagegpt  Chen et al. 2020, section 3.2: GPT-2 on a raster of palette colours
"""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from chainrule.pipeline.config import Settings
from chainrule.pipeline.models.heads import CategoricalHead, Head, check_head
from chainrule.pipeline.models.inputs import Captions
from chainrule.pipeline.models.orderings import Ordering


class RopeScaling(Settings):
    """LLaMA 3.1's stretching of RoPE to longer contexts: waves longer than the original
    context are slowed by `factor`, short ones kept, those between blended."""

    factor: float = Field(8.0, ge=1)
    low_frequency_factor: float = Field(1.0, gt=0)
    high_frequency_factor: float = Field(4.0, gt=0)
    original_context: int = Field(8192, ge=1)


def _default_mlp_width(data: dict[str, Any]) -> int:
    width: int = data["width"]
    if data["activation"] != "swiglu":
        return 4 * width
    # LLaMA's reference code: 2/3 of 4 widths (three matrices instead of two), in whole 256s.
    return 256 * math.ceil(8 * width / 3 / 256)


class DecoderConfig(Settings):
    """A decoder. What a family settles (FAMILY_SETTINGS) can still be changed by name."""

    family: Literal["gpt2", "llama", "mistral", "falcon", "imagegpt"]
    vocabulary_size: int | None = Field(None, ge=1, description="none for a density head")
    context: int = Field(ge=1, description="T: the most elements of an event")
    event_shape: tuple[int, ...] = Field(
        default_factory=lambda data: (data["context"],), description="(T,), or a grid (H, W)"
    )

    norm: Literal["layernorm", "rmsnorm"]
    norm_epsilon: float = Field(1e-5, gt=0)
    position: Literal["learned", "rope"]
    rope_base: float = Field(10000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    activation: Literal["gelu", "gelu-tanh", "quick-gelu", "swiglu"]
    block: Literal["sequential", "parallel", "parallel-two-norms"] = "sequential"
    bias: bool = Field(False, description="of the linear layers")
    tied_embeddings: bool = False

    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(
        default_factory=lambda data: data["heads"], ge=1, description="default: as many as heads"
    )
    width: int = Field(ge=1)
    head_width: int = Field(
        default_factory=lambda data: data["width"] // data["heads"],
        ge=1,
        description="default: width / heads",
    )
    mlp_width: int = Field(
        default_factory=_default_mlp_width,
        ge=1,
        description="default: 4 widths; SwiGLU: 8/3 widths in whole 256s",
    )
    window: int | None = Field(
        None, ge=1, description="inputs that one attends to, itself included; none: all before it"
    )
    base_width: int | None = Field(
        None,
        ge=1,
        description="µP: the width whose learning rates hold at this one as well; keep head_width",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the start, and of what a block adds")
    attention_dropout: float = Field(
        default_factory=lambda data: data["dropout"],
        ge=0,
        lt=1,
        description="of attention weights (on a CPU no fused kernel has it); default: dropout",
    )

    classes: int | None = Field(None, ge=1, description="conditioned on one of so many classes")
    class_dropout: float = Field(
        0.0, ge=0, lt=1, description="rate at which training drops the class (for guidance)"
    )
    captions: Captions | None = Field(
        None,
        description="conditioned on a text, which stands before the start (Ramesh et al. 2021)",
    )
    bos: int | None = Field(
        None, ge=0, description="token that precedes every event; none: a learned start vector"
    )
    ordering: Ordering = Ordering()
    head: Head = CategoricalHead()

    @model_validator(mode="before")
    @classmethod
    def _family_settings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {**FAMILY_SETTINGS.get(str(data.get("family")), {}), **data}
        shape = data.get("event_shape")
        given = isinstance(shape, tuple | list) and all(isinstance(n, int) for n in shape)
        if given and "context" not in data:
            data["context"] = math.prod(shape)
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> "DecoderConfig":
        if math.prod(self.event_shape) != self.context:
            raise ValueError(
                f"event_shape {self.event_shape} holds {math.prod(self.event_shape)} elements, "
                f"context is {self.context}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is no multiple of kv_heads ({self.kv_heads})")
        if "head_width" not in self.model_fields_set and self.width % self.heads:
            raise ValueError(f"width ({self.width}) is no multiple of heads ({self.heads})")
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}: RoPE turns pairs, make it even")
        if self.position != "rope" and self.rope_scaling is not None:
            raise ValueError(f"rope_scaling was given: position is '{self.position}'")
        check_head(self.head, self.vocabulary_size)
        if self.tied_embeddings and self.head.kind != "categorical":
            raise ValueError(f"tied_embeddings need a categorical head, not {self.head.kind}")
        if self.base_width is not None and self.tied_embeddings:
            raise ValueError(
                "base_width: tied_embeddings share one matrix that µP scales in two ways; "
                "set tied_embeddings: false"
            )
        if self.base_width is not None and self.base_width % self.head_width:
            raise ValueError(
                f"base_width {self.base_width} is no multiple of head_width {self.head_width}: "
                "widths transfer by the number of heads, keep head_width"
            )
        if self.bos is not None:
            if self.classes is not None:
                raise ValueError("bos and classes: one start symbol, give one of them")
            if self.captions is not None:
                raise ValueError("bos and captions: what follows a caption has a start of its own")
            if self.vocabulary_size is None or self.bos >= self.vocabulary_size:
                raise ValueError(f"bos is {self.bos}: vocabulary_size is {self.vocabulary_size}")
        if self.class_dropout and self.classes is None:
            raise ValueError("class_dropout was given: the model has no classes")
        if self.captions is not None and self.classes is not None:
            raise ValueError("captions and classes: one condition, give one of them")
        if self.captions is not None and (self.window or self.inputs) < self.inputs:
            raise ValueError(
                f"window is {self.window}: elements further on would not see the caption; set "
                f"window: null (or {self.inputs} and more), or captions: null"
            )
        self.ordering.indices(self.event_shape)
        return self

    @property
    def starts(self) -> int:
        """Inputs before the first element: the start symbol, and a caption where there is one."""
        return 1 if self.captions is None else self.captions.length + 1

    @property
    def inputs(self) -> int:
        """Inputs of a whole event: its last element is none."""
        return self.starts + self.context - 1


_GPT2 = {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu-tanh",
    "bias": True,
    "tied_embeddings": True,
}
_LLAMA = {"norm": "rmsnorm", "position": "rope", "activation": "swiglu"}

FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "falcon": {
        "norm": "layernorm",
        "position": "rope",
        "activation": "gelu",
        "block": "parallel",
        "tied_embeddings": True,
    },
    # The published code (openai/image-gpt, src/model.py) has a norm without centring, GELU as
    # x * sigmoid(1.702 x) and an output layer of its own.
    "imagegpt": {
        "norm": "rmsnorm",
        "position": "learned",
        "activation": "quick-gelu",
        "bias": True,
    },
}


def _shape(family: str, layers: int, heads: int, width: int, **more: Any) -> dict[str, Any]:
    return {"family": family, "layers": layers, "heads": heads, "width": width, **more}


def _gpt2(layers: int, heads: int, width: int, context: int = 1024) -> dict[str, Any]:
    # 50256 is <|endoftext|>, which GPT-2 was trained to see before every document.
    return _shape("gpt2", layers, heads, width, vocabulary_size=50257, context=context, bos=50256)


def _llama(
    layers: int, heads: int, width: int, context: int, vocabulary_size: int = 32000, **more: Any
) -> dict[str, Any]:
    bos = 1 if vocabulary_size == 32000 else 128000
    base = {"vocabulary_size": vocabulary_size, "context": context, "bos": bos}
    return _shape("llama", layers, heads, width, **base, **more)


def _llama3(layers: int, heads: int, width: int, mlp_width: int, **more: Any) -> dict[str, Any]:
    return _llama(
        layers,
        heads,
        width,
        vocabulary_size=128256,
        kv_heads=8,
        mlp_width=mlp_width,
        rope_base=500000.0,
        **{"context": 8192, **more},
    )


def _imagegpt(layers: int, width: int) -> dict[str, Any]:
    return _shape("imagegpt", layers, 8, width, vocabulary_size=512, event_shape=(32, 32))


_LONG = {"context": 131072}

PRESETS: dict[str, dict[str, Any]] = {
    # Each with its number of parameters (a test counts them).
    "gpt2-debug": _shape("gpt2", 4, 4, 128, vocabulary_size=256, context=256),  # 0.86 M
    "llama-debug": _shape(  # 0.80 M
        "llama", 4, 4, 128, kv_heads=2, mlp_width=352, vocabulary_size=256, context=256
    ),
    "mistral-debug": _shape(  # 0.80 M
        "mistral", 4, 4, 128, kv_heads=2, mlp_width=352, vocabulary_size=256, context=256, window=64
    ),
    "falcon-debug": _shape(  # 0.72 M
        "falcon", 4, 4, 128, kv_heads=1, vocabulary_size=256, context=256
    ),
    "imagegpt-debug": _shape("imagegpt", 4, 4, 128, vocabulary_size=64, event_shape=(8, 8)),
    "gpt2": _gpt2(12, 12, 768),  # 124 M
    "gpt2-medium": _gpt2(24, 16, 1024),  # 355 M
    "gpt2-large": _gpt2(36, 20, 1280),  # 774 M
    "gpt2-xl": _gpt2(48, 25, 1600),  # 1,558 M
    "gpt3-small": _gpt2(12, 12, 768, 2048),  # 125 M
    "gpt3-medium": _gpt2(24, 16, 1024, 2048),  # 356 M
    "gpt3-large": _gpt2(24, 16, 1536, 2048),  # 760 M
    "gpt3-xl": _gpt2(24, 16, 2048, 2048),  # 1.3 B (the table's 24 heads of 128 do not fit 2048)
    "gpt3-2.7b": _gpt2(32, 32, 2560, 2048),  # 2.7 B
    "gpt3-6.7b": _gpt2(32, 32, 4096, 2048),  # 6.7 B
    "gpt3-13b": _gpt2(40, 40, 5120, 2048),  # 12.9 B (the table's width 5140 is no multiple of 40)
    "gpt3-175b": _gpt2(96, 96, 12288, 2048),  # 175 B
    "llama-7b": _llama(32, 32, 4096, 2048, norm_epsilon=1e-6),  # 6.7 B
    "llama-13b": _llama(40, 40, 5120, 2048, norm_epsilon=1e-6),  # 13.0 B
    "llama-33b": _llama(60, 52, 6656, 2048, norm_epsilon=1e-6),  # 32.5 B
    "llama-65b": _llama(80, 64, 8192, 2048),  # 65.3 B
    "llama2-7b": _llama(32, 32, 4096, 4096),  # 6.7 B
    "llama2-13b": _llama(40, 40, 5120, 4096),  # 13.0 B
    "llama2-70b": _llama(80, 64, 8192, 4096, kv_heads=8, mlp_width=28672),  # 69.0 B
    "llama3-8b": _llama3(32, 32, 4096, 14336),  # 8.0 B
    "llama3-70b": _llama3(80, 64, 8192, 28672),  # 70.6 B
    "llama3.1-8b": _llama3(32, 32, 4096, 14336, **_LONG, rope_scaling={"factor": 8.0}),  # 8.0 B
    "llama3.1-70b": _llama3(80, 64, 8192, 28672, **_LONG, rope_scaling={"factor": 8.0}),  # 70.6 B
    "llama3.1-405b": _llama3(  # 406 B
        126, 128, 16384, 53248, **_LONG, rope_scaling={"factor": 8.0}
    ),
    "llama3.2-1b": _llama3(  # 1.24 B
        16, 32, 2048, 8192, **_LONG, tied_embeddings=True, rope_scaling={"factor": 32.0}
    ),
    "llama3.2-3b": _llama3(  # 3.21 B
        28, 24, 3072, 8192, **_LONG, tied_embeddings=True, rope_scaling={"factor": 32.0}
    ),
    "mistral-7b": _shape(  # 7.2 B
        "mistral",
        32,
        32,
        4096,
        kv_heads=8,
        mlp_width=14336,
        window=4096,
        vocabulary_size=32000,
        context=32768,
        bos=1,
    ),
    "falcon-7b": _shape(  # 6.9 B
        "falcon", 32, 71, 4544, kv_heads=1, vocabulary_size=65024, context=2048, bos=11
    ),
    "falcon-40b": _shape(  # 41.3 B
        "falcon",
        60,
        128,
        8192,
        kv_heads=8,
        block="parallel-two-norms",
        vocabulary_size=65024,
        context=2048,
        bos=11,
    ),
    "imagegpt-small": _imagegpt(24, 512),  # 76 M
    "imagegpt-medium": _imagegpt(36, 1024),  # 455 M
    "imagegpt-large": _imagegpt(48, 1536),  # 1,362 M
    # VQ-GAN's class-conditional ImageNet transformer (Esser et al. 2021, table 8: 1.4 B): a
    # GPT-2 over 16 x 16 codes; the class is dropped at LlamaGen's rate (Sun et al. 2024).
    "vqgan-transformer": _shape(  # 1.4 B
        "gpt2",
        48,
        24,
        1536,
        vocabulary_size=16384,
        event_shape=(16, 16),
        classes=1000,
        class_dropout=0.1,
        tied_embeddings=False,
    ),
    "vqgan-transformer-debug": _shape(  # 0.82 M
        "gpt2",
        4,
        4,
        128,
        vocabulary_size=64,
        event_shape=(8, 8),
        classes=10,
        class_dropout=0.1,
        tied_embeddings=False,
    ),
}
