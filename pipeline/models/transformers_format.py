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
from torch import Tensor

from chainrule.pipeline.artifact import ArtifactError, read_json, write_json
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.decoder_config import DecoderConfig
from chainrule.pipeline.models.folder import (
    build_empty,
    place_weights,
    read_weights,
    write_tensors,
)
from chainrule.pipeline.models.transformers_config import (
    check_expressible,
    read_config,
    their_config,
)


@dataclass(frozen=True)
class Pair:
    """One of our tensors and those of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    how: Literal["same", "transposed", "stacked", "interleaved"] = "same"


_NAMES = {  # family: (embedding, layer prefix, final norm)
    "gpt2": ("transformer.wte", "transformer.h", "transformer.ln_f"),
    "imagegpt": ("transformer.wte", "transformer.h", "transformer.ln_f"),
    "llama": ("model.embed_tokens", "model.layers", "model.norm"),
    "mistral": ("model.embed_tokens", "model.layers", "model.norm"),
    "falcon": ("transformer.word_embeddings", "transformer.h", "transformer.ln_f"),
}


def pairs(config: DecoderConfig) -> list[Pair]:
    """All of the blocks' tensors and the final norm. The embedding, the positions and the
    output layer depend on the start symbol and are dealt with one by one."""
    _, prefix, final = _NAMES[config.family]
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
    config, start_row = read_config(folder)
    weights = _read_weights(folder)
    prefix = _NAMES[config.family][0].split(".")[0] + "."
    if not any(name.startswith(prefix) for name in weights):
        weights = {prefix + name: tensor for name, tensor in weights.items()}

    unread = set(weights)

    def take(name: str) -> Tensor:
        if name not in weights:
            raise ArtifactError(f"{folder}: has no tensor '{name}'")
        unread.discard(name)
        return weights[name]

    ours: dict[str, Tensor] = {}
    for pair in pairs(config):
        ours[pair.ours] = _gather(pair, [take(name) for name in pair.theirs], config)
    table = take(_NAMES[config.family][0] + ".weight")
    size = config.vocabulary_size
    assert size is not None
    rows = size if start_row is None else size + 1
    if len(table) != rows:
        raise ArtifactError(
            f"{folder}: the embedding has {len(table)} rows, vocab_size in config.json is {rows}"
        )
    ours["embedding.weight"] = table[:size].contiguous()
    if config.position == "learned":
        ours["positions"] = take("transformer.wpe.weight")
    if start_row is not None:
        ours["start"] = table[start_row]
    if config.tied_embeddings:
        unread.discard("lm_head.weight")  # the embedding again
    else:
        ours["head.weight"] = take("lm_head.weight")
    unknown = sorted(name for name in unread if not name.endswith(_BUFFERS))
    if unknown:
        raise ArtifactError(
            f"{folder}: tensor '{unknown[0]}' (one of {len(unknown)}) is none of a {config.family} "
            "decoder's: not a language model, or one that is not known here"
        )
    model = build_empty(config)
    place_weights(model, ours, folder, dtype)
    return model.to(device).eval()


_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
"""What older files hold besides weights: tables that follow from the settings."""


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


def to_transformers(model: Autoregressive, folder: str | Path, eos: int | None = None) -> None:
    """Write a decoder as a `transformers` folder; ValueError where theirs has no such model.

    Their logits of [start, x_1, ...] are our conditionals of x in generation order.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"family '{model.config.family}' has no counterpart in transformers")
    config = model.config
    check_expressible(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().cpu() for name, t in model.state_dict().items()}
    size = state["embedding.weight"].shape[0]
    if config.classes is not None:
        starts = state["class_embedding.table.weight"]
    elif config.bos is None:
        starts = state["start"].unsqueeze(0)
    elif config.family == "imagegpt":  # theirs is never one of the values
        starts = state["embedding.weight"][config.bos].unsqueeze(0)
    else:
        starts = state["embedding.weight"][:0]
    weights: dict[str, Tensor] = {}
    for pair in pairs(config):
        parts = _scatter(pair, state[pair.ours], config)
        weights.update(zip(pair.theirs, parts, strict=True))
    table = torch.cat([state["embedding.weight"], starts])
    weights[_NAMES[config.family][0] + ".weight"] = table
    if config.position == "learned":
        weights["transformer.wpe.weight"] = state["positions"]
    if not config.tied_embeddings:
        # ImageGPT has one output less than inputs.
        unused = len(starts) - (config.family == "imagegpt")
        head = state["head.weight"]
        weights["lm_head.weight"] = torch.cat([head, head.new_zeros(unused, head.shape[1])])
    write_tensors(folder / "model.safetensors", weights, {"format": "pt"})

    bos = size + len(starts) - 1 if len(starts) or config.bos is None else config.bos
    generation: dict[str, Any] = {"bos_token_id": bos}
    if eos is not None:
        generation["eos_token_id"] = eos
    outputs = len(table) - (config.family == "imagegpt")
    if outputs > size:
        generation["suppress_tokens"] = list(range(size, outputs))
    theirs = {**their_config(config), "vocab_size": len(table), "bos_token_id": bos}
    theirs["eos_token_id"] = eos
    theirs["dtype"] = str(table.dtype).removeprefix("torch.")
    write_json(folder / "config.json", theirs)
    write_json(folder / "generation_config.json", generation)
