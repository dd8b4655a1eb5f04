"""The settings of decoders as `transformers` names them in `config.json`, and as we do."""

from pathlib import Path
from typing import Any

from chainrule.pipeline.artifact import ArtifactError, read_json
from chainrule.pipeline.models.decoder_config import FAMILY_SETTINGS, DecoderConfig


def read_config(folder: Path) -> tuple[DecoderConfig, int | None]:
    """Our config of theirs, and the row of their embedding that is our start vector, if any."""
    path = folder / "config.json"
    theirs = read_json(path)
    if not isinstance(theirs, dict):
        raise ArtifactError(f"{path}: holds a {type(theirs).__name__}, not the settings of a model")
    family = theirs.get("model_type")
    if family not in FAMILY_SETTINGS:
        raise ArtifactError(
            f"{path}: model_type {family!r}; decoders known here: {', '.join(FAMILY_SETTINGS)}"
        )
    for key, value in _REFUSED.get(family, {}).items():
        if theirs.get(key, value) != value:
            raise ArtifactError(f"{path}: {key} is {theirs[key]!r}, only {value!r} is known here")
    if theirs.get("quantization_config") is not None:
        raise ArtifactError(
            f"{path}: has a quantization_config: weights are read as they are; save the model in "
            "float32 or bfloat16"
        )
    try:
        settings = {"gpt2": _from_gpt2, "imagegpt": _from_gpt2, "falcon": _from_falcon}.get(
            family, _from_llama
        )(theirs)
        size, start_row = int(theirs["vocab_size"]), None
        bos = _start_symbol(theirs)
    except KeyError as error:
        raise ArtifactError(f"{path}: has no {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{path}: not what transformers writes of {family}: {error}") from None
    if family == "imagegpt":
        # The last row of their table is the start symbol, which is never predicted.
        size, start_row, bos = size - 1, size - 1, None
    elif bos is None or not 0 <= bos < size:
        raise ArtifactError(
            f"{path}: nothing stands before the first element: bos_token_id is {bos}, and tokens "
            f"are 0..{size - 1}; set bos_token_id (or eos_token_id) to the token that texts begin "
            "with"
        )
    try:
        return (
            DecoderConfig.model_validate(
                {"family": family, "vocabulary_size": size, "bos": bos, **settings}
            ),
            start_row,
        )
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from None


def _start_symbol(theirs: dict[str, Any]) -> int | None:
    """The token that stands before a text: theirs is BOS, or where they have none EOS."""
    for key in ("bos_token_id", "eos_token_id"):
        tokens = theirs.get(key)
        if isinstance(tokens, list) and tokens:
            tokens = tokens[0]
        if tokens is not None and tokens != []:
            if not isinstance(tokens, int):
                raise TypeError(f"{key} is {tokens!r}")
            return tokens
    return None


_PLAIN_GPT2 = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_REFUSED: dict[str, dict[str, Any]] = {
    "gpt2": _PLAIN_GPT2,
    "imagegpt": _PLAIN_GPT2,
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
    elif kind != "default":
        raise KeyError(f"RoPE of type '{kind}' here; known: default, llama3")
    part = rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor", 1.0))
    if part != 1.0:
        raise KeyError(f"RoPE of a part of each head here: partial_rotary_factor is {part}")
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
        # Mistral 7B's, where theirs says nothing; null is none.
        "window": theirs.get("sliding_window", 4096) if theirs["model_type"] == "mistral" else None,
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


def check_expressible(config: DecoderConfig) -> None:
    """ValueError naming the settings that the family has not in `transformers`."""
    own = {**_DEFAULTS, **FAMILY_SETTINGS[config.family]}
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
        if name not in free and getattr(config, name) != own[name]
    ]
    square = config.heads * config.head_width == config.width
    if config.family in ("gpt2", "imagegpt", "falcon") and not square:
        faults.append(f"head_width {config.head_width}")
    if config.family in ("gpt2", "imagegpt") and config.kv_heads != config.heads:
        faults.append(f"kv_heads {config.kv_heads}")
    if config.window is not None and config.family != "mistral":
        faults.append(f"window {config.window}")
    if config.rope_scaling is not None and config.family not in ("llama", "mistral"):
        faults.append("rope_scaling")
    grouped = config.kv_heads not in (1, config.heads)
    if config.family == "falcon" and config.block == "sequential" and grouped:
        faults.append(f"kv_heads {config.kv_heads} in sequential blocks")
    if config.activation == "swiglu" and config.family not in ("llama", "mistral"):
        faults.append("activation 'swiglu'")
    if config.head.kind != "categorical":
        faults.append(f"head {config.head.kind}")
    if config.captions is not None:
        raise ValueError(
            "transformers has no model like this one, which is conditioned on captions"
        )
    if faults:
        raise ValueError(f"transformers' {config.family} has no {', '.join(dict.fromkeys(faults))}")


_DEFAULTS = {"block": "sequential", "bias": False, "tied_embeddings": False}


def their_config(config: DecoderConfig) -> dict[str, Any]:
    """Their `config.json`, but for the vocabulary and its special tokens."""
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
    theirs: dict[str, Any] = {
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
