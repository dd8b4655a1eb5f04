"""A model as a folder: `weights.safetensors` and `card.json`, nothing else needed.

Weights of more than `SHARD_BYTES` lie in several files, `weights-00001-of-00004.safetensors` and
so on, with `weights.safetensors.index.json` to say which tensor is where (Hugging Face's form).

The card says what the model is (`family`, `model`: its whole config) and whatever its maker
adds (vocabulary, tokenizer, lineage, validation figures). Its `fingerprint` is a hash of the
config and the weights: a folder that was altered is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chainrule.pipeline.artifact import (
    A_TRAINING,
    ArtifactError,
    is_training,
    read_json,
    sha256_file,
    write_json,
)
from chainrule.pipeline.config import Settings, digest
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.decoder_config import DecoderConfig
from chainrule.pipeline.models.registry import build, resolve
from chainrule.pipeline.whole_file import as_usual, whole

FORMAT = 1
WEIGHTS = "weights.safetensors"
INDEX = "weights.safetensors.index.json"
CARD = "card.json"
SHARD_BYTES = 5_000_000_000


def save(
    model: Autoregressive,
    folder: str | Path,
    card: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the model into `folder` (made if missing) and return the whole card.

    `card` holds what the model does not know itself; keys of the model's own are refused.
    The card is written last: a folder without one is no model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    _write_weights(weights_of(model), folder, shard_bytes)
    config = model.config.model_dump(mode="json")
    own = {
        "kind": "model",
        "format": FORMAT,
        "family": config["family"],
        "model": config,
        "event_shape": list(model.event_shape),
        "fingerprint": _fingerprint(config, folder),
    }
    if taken := own.keys() & card.keys():
        raise ValueError(f"card: {', '.join(sorted(taken))} are written by save itself")
    card = {**own, **card}
    write_json(folder / CARD, card)
    return card


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Autoregressive:
    """The model in `folder`, in eval mode: one that `save` wrote, or a `transformers` folder of
    GPT-2, LLaMA, Mistral, Falcon or ImageGPT.

    `dtype` defaults to that of the stored weights. ArtifactError where the folder is not a
    model, was altered, or is of a version or family that is not known here.
    """
    folder = Path(folder)
    if not (folder / CARD).is_file():
        if (folder / "config.json").is_file():
            from chainrule.pipeline.models.transformers_format import from_transformers

            return from_transformers(folder, device, dtype)
        what = f"has no {CARD}: not a model folder" if folder.is_dir() else "no such folder"
        raise ArtifactError(f"{folder}: {A_TRAINING if is_training(folder) else what}")
    card = read_card(folder)
    found = _fingerprint(card["model"], folder)
    if found != card["fingerprint"]:
        raise ArtifactError(
            f"{folder}: altered: config and weights have fingerprint {found[:16]}, "
            f"{CARD} says {card['fingerprint'][:16]}; take a fresh copy"
        )
    try:
        model = build_empty(card["model"])
    except ValueError as error:
        raise ArtifactError(f"{folder / CARD}: {error}") from None
    source = folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS)
    place_weights(model, read_model_weights(folder), source, dtype)
    return model.to(device).eval()


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a model folder, checked for kind and format; ArtifactError."""
    path = Path(folder) / CARD
    if not path.is_file():
        raise ArtifactError(f"{folder}: has no {CARD}: not a model folder")
    card: dict[str, Any] = read_json(path)
    if not isinstance(card, dict) or card.get("kind") != "model":
        kind = card.get("kind") if isinstance(card, dict) else None
        raise ArtifactError(f"{path}: kind {kind!r}, a model's card was wanted")
    if card.get("format") != FORMAT:
        raise ArtifactError(f"{path}: format {card.get('format')!r}, this version reads {FORMAT}")
    for key in ("model", "fingerprint"):
        if key not in card:
            raise ArtifactError(f"{path}: has no '{key}'; the file was altered or cut")
    return card


def build_empty(config: dict[str, Any] | Settings) -> Autoregressive:
    """A model whose weights are about to be put in place; a decoder, which may be large, does
    not draw initial ones first."""
    settings = resolve(config)
    if isinstance(settings, DecoderConfig):
        with torch.device("meta"):
            return build(settings)
    return build(settings)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model on the CPU; a tensor under two names (tied embeddings) once."""
    return {name: t.detach().cpu().contiguous() for name, t in _distinct(model).items()}


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def _write_weights(weights: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """One file, or several of at most `shard_bytes` (but for a tensor that is larger) and their
    index. Files of a model that lay here before are removed."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in weights.items():
        if shards[-1] and held + tensor.nbytes > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    for old in [folder / INDEX, *folder.glob("weights*.safetensors")]:
        old.unlink(missing_ok=True)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [
            f"weights-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for name, shard in zip(names, shards, strict=True):
        with whole(folder / name) as temporary:
            write_tensors(temporary, shard)
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / INDEX, index)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, with the permissions of any other (the library makes it private)."""
    save_file(dict(tensors), path, metadata)
    as_usual(path)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights; ArtifactError where one is missing."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise ArtifactError(f"{folder / INDEX}: has no 'weight_map'; take a fresh copy")
        names = sorted({str(name) for name in places.values()})
    for name in names:
        if "/" in name or not (folder / name).is_file():
            raise ArtifactError(f"{folder / name}: no such file")
    return [folder / name for name in names]


def read_model_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, of one file or several; ArtifactError."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        weights.update(read_weights(path))
    return weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """A safetensors file; ArtifactError names one that is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path}: not a whole safetensors file ({error})") from None


def place_weights(
    model: nn.Module, weights: dict[str, Tensor], source: Path, dtype: torch.dtype | None
) -> None:
    """Put `weights` into `model`, all of them and nothing else; ArtifactError names the first
    tensor that does not fit. The model takes `dtype`, or that of the weights."""
    wanted = _distinct(model)
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise ArtifactError(f"{source}: has no tensor '{name}'")
        if name not in wanted:
            raise ArtifactError(f"{source}: tensor '{name}' has no place in the model")
        if weights[name].shape != wanted[name].shape:
            raise ArtifactError(
                f"{source}: tensor '{name}' has shape {tuple(weights[name].shape)}, "
                f"the config asks for {tuple(wanted[name].shape)}"
            )
    if dtype is None:
        dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), None)
    if dtype is not None:
        model.to(dtype)
        weights = {k: t.to(dtype) if t.is_floating_point() else t for k, t in weights.items()}
    # Tied names are missing, rightly; assigned, since what stands there may be without storage.
    model.load_state_dict(weights, strict=False, assign=True)
    if isinstance(model, Decoder):
        model.tie()


def _fingerprint(config: dict[str, Any], folder: Path) -> str:
    hashes = {path.name: sha256_file(path) for path in weight_files(folder)}
    # One file is hashed as it was before there were several.
    return digest({"model": config, "weights": hashes.get(WEIGHTS, hashes)})
