"""Decoders from and to the folders of Hugging Face `transformers` (which is not needed here):
`config.json`, `model.safetensors` (whole or sharded), `generation_config.json`.

Each family is a table of pairs, our tensor and theirs, with how one becomes the other:

    same            as it is
    transposed      GPT-2 and ImageGPT keep linear layers as (in, out)
    stacked         several of theirs are one of ours: q, k, v; gate, up
    interleaved     Falcon's q, k, v of each key/value head lie together

Start symbols: theirs is a BOS token. A model that has a learned start vector or classes is
written with further tokens behind its vocabulary whose embeddings are those vectors; their
ids are in `generation_config.json` (`bos_token_id`, `suppress_tokens`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from chainrule.pipeline.artifact import ArtifactError, read_json, write_json
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.decoder_config import FAMILY_SETTINGS, DecoderConfig
from chainrule.pipeline.models.folder import place_weights, read_weights
from chainrule.pipeline.models.registry import build


@dataclass(frozen=True)
class Pair:
    """One of our tensors and those of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    how: Literal["same", "transposed", "stacked", "interleaved"] = "same"


_SELF_NAMED = {  # family: (embedding, layer prefix, final norm)
    "gpt2": ("transformer.wte", "transformer.h", "transformer.ln_f"),
    "imagegpt": ("transformer.wte", "transformer.h", "transformer.ln_f"),
    "llama": ("model.embed_tokens", "model.layers", "model.norm"),
    "mistral": ("model.embed_tokens", "model.layers", "model.norm"),
    "falcon": ("transformer.word_embeddings", "transformer.h", "transformer.ln_f"),
}


def pairs(config: DecoderConfig) -> list[Pair]:
    """All of the blocks' tensors and the final norm. The embedding, the positions and the
    output layer depend on the start symbol and are dealt with one by one."""
    _, prefix, final = _SELF_NAMED[config.family]
    norm_parts = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    linear_parts = ("weight", "bias") if config.bias else ("weight",)
    norms, linears = _layer(config)
    found = [Pair(f"final_norm.{part}", (f"{final}.{part}",)) for part in norm_parts]
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"{prefix}.{layer}"
        for name, other in norms.items():
            found += [
                Pair(f"{ours}.{name}.{part}", (f"{theirs}.{other}.{part}",)) for part in norm_parts
            ]
        for name, (others, how) in linears.items():
            for part in linear_parts:
                way = "same" if how == "transposed" and part == "bias" else how
                full = tuple(f"{theirs}.{other}.{part}" for other in others)
                found.append(Pair(f"{ours}.{name}.{part}", full, way))  # type: ignore[arg-type]
    return found


def _layer(config: DecoderConfig) -> tuple[dict[str, str], dict[str, tuple[tuple[str, ...], str]]]:
    """Their names of one layer's norms and linear layers."""
    if config.family in ("gpt2", "imagegpt"):
        return (
            {"attention_norm": "ln_1", "mlp_norm": "ln_2"},
            {
                "attention.qkv": (("attn.c_attn",), "transposed"),
                "attention.output": (("attn.c_proj",), "transposed"),
                "mlp.input": (("mlp.c_fc",), "transposed"),
                "mlp.output": (("mlp.c_proj",), "transposed"),
            },
        )
    if config.family in ("llama", "mistral"):
        attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        return (
            {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
            {
                "attention.qkv": (attention, "stacked"),
                "attention.output": (("self_attn.o_proj",), "same"),
                "mlp.input": (("mlp.gate_proj", "mlp.up_proj"), "stacked"),
                "mlp.output": (("mlp.down_proj",), "same"),
            },
        )
    norms = {
        "sequential": {
            "attention_norm": "input_layernorm",
            "mlp_norm": "post_attention_layernorm",
        },
        "parallel": {"attention_norm": "input_layernorm"},
        "parallel-two-norms": {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
    }[config.block]
    return (
        norms,
        {
            "attention.qkv": (("self_attention.query_key_value",), "interleaved"),
            "attention.output": (("self_attention.dense",), "same"),
            "mlp.input": (("mlp.dense_h_to_4h",), "same"),
            "mlp.output": (("mlp.dense_4h_to_h",), "same"),
        },
    )


def _gather(pair: Pair, theirs: list[Tensor], config: DecoderConfig) -> Tensor:
    if pair.how == "transposed":
        return theirs[0].t().contiguous()
    if pair.how == "stacked":
        return torch.cat(theirs)
    if pair.how == "interleaved":
        grouped = theirs[0].view(
            config.kv_heads, config.heads // config.kv_heads + 2, config.head_width, -1
        )
        q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
        parts = [part.reshape(-1, grouped.shape[-1]) for part in (q, k, v)]
        return torch.cat(parts).view(theirs[0].shape)
    return theirs[0]


def _scatter(pair: Pair, ours: Tensor, config: DecoderConfig) -> list[Tensor]:
    inner, shared = config.heads * config.head_width, config.kv_heads * config.head_width
    if pair.how == "transposed":
        return [ours.t().contiguous()]
    if pair.how == "stacked":
        sizes = [inner, shared, shared] if "qkv" in pair.ours else [config.mlp_width] * 2
        return [part.contiguous() for part in ours.split(sizes)]
    if pair.how == "interleaved":
        groups = (config.kv_heads, -1, config.head_width, ours[0].numel())
        q, k, v = (part.reshape(groups) for part in ours.split([inner, shared, shared]))
        return [torch.cat([q, k, v], dim=1).reshape(ours.shape).contiguous()]
    return [ours.contiguous()]


def from_transformers(
    folder: Path, device: str | torch.device, dtype: torch.dtype | None
) -> Autoregressive:
    """The model of a `transformers` folder; ArtifactError where it cannot be ours."""
    config, start_row = _read_config(folder)
    weights = _read_weights(folder)
    prefix = _SELF_NAMED[config.family][0].split(".")[0] + "."
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: tensor for name, tensor in weights.items()}

    def take(name: str) -> Tensor:
        if name not in weights:
            raise ArtifactError(f"{folder}: has no tensor '{name}'")
        return weights[name]

    ours: dict[str, Tensor] = {}
    for pair in pairs(config):
        ours[pair.ours] = _gather(pair, [take(name) for name in pair.theirs], config)
    table = take(_SELF_NAMED[config.family][0] + ".weight")
    size = config.vocabulary_size
    ours["embedding.weight"] = table[:size].contiguous()
    if config.position == "learned":
        ours["positions"] = take("transformer.wpe.weight")
    if config.bos is None:
        ours["start"] = table[start_row] if start_row is not None else torch.zeros_like(table[0])
    if not config.tied_embeddings:
        head = weights.get("lm_head.weight", table)  # theirs are tied where the file has none
        ours["head.weight"] = head[:size].contiguous()
    model = build(config)
    place_weights(model, ours, folder, dtype)
    return model.to(device).eval()


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_weights(folder / "model.safetensors")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(read_json(index)["weight_map"].values())):
        if Path(name).name != name:
            raise ArtifactError(f"{index}: '{name}' leaves the folder")
        weights.update(read_weights(folder / name))
    return weights


def _read_config(folder: Path) -> tuple[DecoderConfig, int | None]:
    """Our config of theirs, and the row of their embedding that is our start vector, if any."""
    path = folder / "config.json"
    theirs = read_json(path)
    family = theirs.get("model_type")
    if family not in FAMILY_SETTINGS:
        raise ArtifactError(
            f"{path}: model_type {family!r}; decoders known here: {', '.join(FAMILY_SETTINGS)}"
        )
    for key, value in _REFUSED.get(family, {}).items():
        if theirs.get(key, value) != value:
            raise ArtifactError(f"{path}: {key} is {theirs[key]!r}, only {value!r} is known here")
    try:
        settings = {"gpt2": _from_gpt2, "imagegpt": _from_gpt2, "falcon": _from_falcon}.get(
            family, _from_llama
        )(theirs)
    except KeyError as error:
        raise ArtifactError(f"{path}: has no {error}") from None
    size, start_row = theirs["vocab_size"], None
    bos = theirs.get("bos_token_id")
    if family == "imagegpt":
        # The last row of their table is the start symbol, which is never predicted.
        size, start_row, bos = size - 1, size - 1, None
    elif bos is None:
        bos = theirs.get("eos_token_id")
        bos = bos[0] if isinstance(bos, list) else bos
    if bos is not None and not 0 <= bos < size:
        bos = None
    try:
        return (
            DecoderConfig.model_validate(
                {"family": family, "vocabulary_size": size, "bos": bos, **settings}
            ),
            start_row,
        )
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None


_GPT2_ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2_ONLY,
    "imagegpt": _GPT2_ONLY,
    "llama": {"hidden_act": "silu"},
    "mistral": {"hidden_act": "silu"},
    "falcon": {"alibi": False},
}
_ACTIVATIONS = {
    "gelu_new": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "gelu": "gelu",
    "quick_gelu": "quick-gelu",
}
_THEIR_ACTIVATIONS = {"gelu-tanh": "gelu_new", "gelu": "gelu", "quick-gelu": "quick_gelu"}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise KeyError(f"activation '{name}' here; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _from_gpt2(theirs: dict[str, Any]) -> dict[str, Any]:
    image = theirs["model_type"] == "imagegpt"
    default = "quick_gelu" if image else "gelu_new"
    return {
        "context": theirs["n_positions"],
        "layers": theirs["n_layer"],
        "heads": theirs["n_head"],
        "width": theirs["n_embd"],
        "mlp_width": theirs.get("n_inner") or 4 * theirs["n_embd"],
        "activation": _activation(theirs.get("activation_function", default)),
        "norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "tied_embeddings": not image and theirs.get("tie_word_embeddings", True),
    }


def _rope(theirs: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of version 5, or `rope_theta` and `rope_scaling` of those before."""
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    base = rope.get("rope_theta", theirs.get("rope_theta", 10000.0))
    found: dict[str, Any] = {"rope_base": float(base)}
    if kind == "llama3":
        found["rope_scaling"] = {
            "factor": rope["factor"],
            "low_frequency_factor": rope["low_freq_factor"],
            "high_frequency_factor": rope["high_freq_factor"],
            "original_context": rope["original_max_position_embeddings"],
        }
    elif kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise KeyError(f"RoPE of type '{kind}' here; known: default, llama3")
    return found


def _from_llama(theirs: dict[str, Any]) -> dict[str, Any]:
    bias = theirs.get("attention_bias", False)
    if theirs.get("mlp_bias", False) != bias:
        raise KeyError("bias of attention or of the MLP alone here; both or none is known")
    heads, width = theirs["num_attention_heads"], theirs["hidden_size"]
    return {
        "context": theirs["max_position_embeddings"],
        "layers": theirs["num_hidden_layers"],
        "heads": heads,
        "kv_heads": theirs.get("num_key_value_heads") or heads,
        "width": width,
        "head_width": theirs.get("head_dim") or width // heads,
        "mlp_width": theirs["intermediate_size"],
        "norm_epsilon": theirs.get("rms_norm_eps", 1e-6),
        "bias": bias,
        "tied_embeddings": theirs.get("tie_word_embeddings", False),
        "window": theirs.get("sliding_window") if theirs["model_type"] == "mistral" else None,
        **_rope(theirs),
    }


def _from_falcon(theirs: dict[str, Any]) -> dict[str, Any]:
    heads = theirs["num_attention_heads"]
    new = theirs.get("new_decoder_architecture", False)
    if new:
        kv_heads = theirs.get("num_kv_heads") or heads
        two = theirs.get("num_ln_in_parallel_attn") in (None, 2)
        block = "parallel-two-norms" if two else "parallel"
    else:
        kv_heads = 1 if theirs.get("multi_query", True) else heads
        block = "parallel" if theirs.get("parallel_attn", True) else "sequential"
    return {
        "context": theirs.get("max_position_embeddings", 2048),
        "layers": theirs["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "width": theirs["hidden_size"],
        "mlp_width": theirs.get("ffn_hidden_size") or 4 * theirs["hidden_size"],
        "activation": _activation(theirs.get("activation", "gelu")),
        "block": block,
        "bias": theirs.get("bias", False),
        "norm_epsilon": theirs.get("layer_norm_epsilon", 1e-5),
        "tied_embeddings": theirs.get("tie_word_embeddings", True),
        **_rope(theirs),
    }


def to_transformers(model: Autoregressive, folder: str | Path, eos: int | None = None) -> None:
    """Write a decoder as a `transformers` folder; ValueError where theirs has no such model.

    Their logits of [start, x_1, ...] are our conditionals of x in generation order.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"family '{model.config.family}' has no counterpart in transformers")
    config = model.config
    _check_expressible(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    size = state["embedding.weight"].shape[0]
    if config.classes is not None:
        starts = state["class_embedding.table.weight"]
    elif config.bos is None:
        starts = state["start"].unsqueeze(0)
    else:
        starts = state["embedding.weight"][:0]
    weights: dict[str, Tensor] = {}
    for pair in pairs(config):
        parts = _scatter(pair, state[pair.ours], config)
        weights.update(zip(pair.theirs, parts, strict=True))
    table = torch.cat([state["embedding.weight"], starts])
    weights[_SELF_NAMED[config.family][0] + ".weight"] = table
    if config.position == "learned":
        weights["transformer.wpe.weight"] = state["positions"]
    if not config.tied_embeddings:
        # ImageGPT has one output less than inputs.
        unused = len(starts) - (config.family == "imagegpt")
        head = state["head.weight"]
        weights["lm_head.weight"] = torch.cat([head, head.new_zeros(unused, head.shape[1])])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    bos = config.bos if config.bos is not None else size + len(starts) - 1
    generation: dict[str, Any] = {"bos_token_id": bos}
    if eos is not None:
        generation["eos_token_id"] = eos
    outputs = len(table) - (config.family == "imagegpt")
    if outputs > size:
        generation["suppress_tokens"] = list(range(size, outputs))
    theirs = {**_their_config(config), "vocab_size": len(table), "bos_token_id": bos}
    theirs["eos_token_id"] = eos
    theirs["dtype"] = str(table.dtype).removeprefix("torch.")
    write_json(folder / "config.json", theirs)
    write_json(folder / "generation_config.json", generation)


def _check_expressible(config: DecoderConfig) -> None:
    own = FAMILY_SETTINGS[config.family]
    free = {"tied_embeddings"}
    if config.family in ("gpt2", "imagegpt"):
        free |= {"activation"}
        free -= {"tied_embeddings"} if config.family == "imagegpt" else set()
    elif config.family == "llama":
        free |= {"bias"}
    elif config.family == "falcon":
        free |= {"bias", "activation", "block"}
    faults = [
        f"{name} {getattr(config, name)!r}"
        for name in ("norm", "position", "activation", "block", "bias", "tied_embeddings")
        if name not in free and getattr(config, name) != own.get(name, _DEFAULTS[name])
    ]
    square = config.heads * config.head_width == config.width
    if config.family in ("gpt2", "imagegpt", "falcon") and not square:
        faults.append(f"head_width {config.head_width}")
    if config.family in ("gpt2", "imagegpt") and config.kv_heads != config.heads:
        faults.append(f"kv_heads {config.kv_heads}")
    if config.window is not None and config.family != "mistral":
        faults.append(f"window {config.window}")
    if config.rope_scaling is not None and config.family != "llama":
        faults.append("rope_scaling")
    if config.activation == "swiglu" and config.family not in ("llama", "mistral"):
        faults.append("activation 'swiglu'")
    if config.head.kind != "categorical":
        faults.append(f"head {config.head.kind}")
    if faults:
        raise ValueError(f"transformers' {config.family} has no {', '.join(dict.fromkeys(faults))}")


_DEFAULTS = {"block": "sequential", "bias": False, "tied_embeddings": False}


def _their_config(config: DecoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency_factor,
            "high_freq_factor": config.rope_scaling.high_frequency_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    if config.family in ("gpt2", "imagegpt"):
        image = config.family == "imagegpt"
        return {
            "model_type": config.family,
            "architectures": ["ImageGPTForCausalImageModeling" if image else "GPT2LMHeadModel"],
            "n_positions": config.context,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_embd": config.width,
            "n_inner": config.mlp_width,
            "activation_function": _THEIR_ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_epsilon,
            "tie_word_embeddings": config.tied_embeddings,
        }
    if config.family == "falcon":
        plain = config.kv_heads in (1, config.heads) and config.block != "parallel-two-norms"
        return {
            "model_type": "falcon",
            "architectures": ["FalconForCausalLM"],
            "max_position_embeddings": config.context,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_kv_heads": config.kv_heads,
            "hidden_size": config.width,
            "ffn_hidden_size": config.mlp_width,
            "activation": _THEIR_ACTIVATIONS[config.activation],
            "new_decoder_architecture": not plain,
            "num_ln_in_parallel_attn": 2 if config.block == "parallel-two-norms" else 1,
            "multi_query": config.kv_heads == 1,
            "parallel_attn": config.block != "sequential",
            "alibi": False,
            "bias": config.bias,
            "layer_norm_epsilon": config.norm_epsilon,
            "tie_word_embeddings": config.tied_embeddings,
            "rope_parameters": rope,
            "rope_theta": config.rope_base,
        }
    theirs = {
        "model_type": config.family,
        "architectures": ["LlamaForCausalLM" if config.family == "llama" else "MistralForCausalLM"],
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.width,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        # Both the names of version 5 and those of version 4.
        "rope_parameters": rope,
        "rope_theta": config.rope_base,
    }
    if config.rope_scaling is not None:
        theirs["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if config.family == "llama":
        theirs |= {"attention_bias": config.bias, "mlp_bias": config.bias}
    else:
        theirs["sliding_window"] = config.window
    return theirs
