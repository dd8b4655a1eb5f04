"""From a stage's token artifacts to the mixture, the model's config and its description."""

import math
from collections.abc import Container, Sequence
from typing import Any

from chainrule.pipeline.artifact import Artifact
from chainrule.pipeline.config import RequestError, Settings, digest
from chainrule.pipeline.data.batches import (
    Mixture,
    joint_captions,
    joint_vocabulary,
    mixture_of,
)
from chainrule.pipeline.data.reader import OnDamage
from chainrule.pipeline.data.rows import LONGEST_EVENT, one_length
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.models.inputs import has_captions
from chainrule.pipeline.models.registry import FAMILIES, PRESETS, faults_of, resolve

WITHOUT_CLASSES: dict[str, Any] = {"classes": None, "class_dropout": 0.0}
"""Said of a model that is to have none, since a preset may have some."""
NO_CLASS_OF_ITS_OWN = "a row of tokens holds several samples, or a part of one, and so no class"


def known_model(spec: str | dict[str, Any]) -> str | dict[str, Any]:
    """`spec` again; ValueError where its preset or family does not exist, where a key of it is
    wrong by itself, or where it asks for what no token artifact holds."""
    from chainrule.pipeline.config import nearest

    name = spec if isinstance(spec, str) else spec.get("preset")
    if name is not None and name not in PRESETS:
        raise ValueError(f"unknown preset '{name}'{nearest(str(name), list(PRESETS))}")
    if isinstance(spec, dict) and name is None:
        family = spec.get("family")
        if family is None:
            raise ValueError("give a 'preset' or a 'family'")
        if family not in FAMILIES:
            raise ValueError(f"unknown family '{family}'{nearest(str(family), list(FAMILIES))}")
    if isinstance(spec, dict) and spec.get("local_width") is not None:
        raise ValueError(
            f"local_width {spec['local_width']}: token artifacts hold no local features, so that "
            "local conditioning is for use from Python; leave it out"
        )
    faults = faults_of(spec)
    if faults:
        raise ValueError("; ".join(faults))
    return spec


def training_sets(artifacts: Sequence[Artifact], on_damage: OnDamage = "stop") -> list[TokenSet]:
    """The train split of each token artifact."""
    return [TokenSet.open(artifact.folder, "train", on_damage) for artifact in artifacts]


def mixture(
    sets: Sequence[TokenSet], context: int, weights: dict[str, float] | None, seed: int
) -> Mixture:
    """The sets drawn by their weights (by the names of their stages). RequestError."""
    ordered = None
    if weights is not None:
        ordered = ordered_weights(weights, [tokens.name for tokens in sets])
    return mixture_of(sets, context=context, weights=ordered, seed=seed)


def ordered_weights(weights: dict[str, float], names: Sequence[str]) -> list[float]:
    """Each set's weight, in the order of the sets; RequestError where the names are others."""
    if set(weights) != set(names):
        raise RequestError(
            f"mixture_weights names {sorted(weights)}, the tokens are {sorted(names)}"
        )
    return [weights[name] for name in names]


def model_config(spec: str | dict[str, Any], sets: Sequence[TokenSet]) -> Settings:
    """The model's whole config: what the tokens settle is filled in.

    - vocabulary_size: that of the (joint) vocabulary; a larger one that was asked for stays
    - event_shape: the grid, where all sets are grids of one shape
    - classes: their number, where the sets have labels and the family takes a condition
    - captions: vocabulary_size and length, where the sets have captions and the family takes
      some; they go before classes that were not asked for
    - bos: the vocabulary's special `bos`, where there is one and the family can start on it

    RequestError, one line, where spec and tokens contradict each other.
    """
    asked = {} if isinstance(spec, str) else dict(spec)
    vocabulary, _ = joint_vocabulary(sets)
    filled: dict[str, Any] = {"vocabulary_size": vocabulary.values}
    size = asked.get("vocabulary_size")
    if size is not None:
        if vocabulary.continuous:
            raise RequestError(
                f"model.vocabulary_size {size}: the elements are real numbers; leave it out"
            )
        if size < vocabulary.size:
            raise RequestError(
                f"model.vocabulary_size {size}: the tokens go up to {vocabulary.size - 1}; "
                "leave it out"
            )
        filled["vocabulary_size"] = size
    fields = FAMILIES[_family(spec)][0].model_fields
    grids = {_shape_of(tokens, asked, fields) for tokens in sets}
    if len(grids) == 1 and None not in grids:
        (grid,) = grids
        assert grid is not None
        shape = asked.get("event_shape")
        if shape is not None and math.prod(shape) != math.prod(grid):
            raise RequestError(
                f"model.event_shape {tuple(shape)}: the tokens are grids of {grid}; leave it out"
            )
        filled["event_shape"] = tuple(shape) if shape is not None else grid
        if "context" in asked and asked["context"] != math.prod(grid):
            raise RequestError(
                f"model.context {asked['context']}: the tokens are grids of {grid}, "
                f"{math.prod(grid)} elements; leave it out"
            )
    wanted = "captions" in fields and asked.get("captions") is not None
    captions = joint_captions(sets) if "captions" in fields else None
    if captions is not None and "event_shape" not in filled:
        if wanted:
            raise RequestError(
                "model.captions: a row of tokens holds several samples, since not all of them are "
                "grids of one shape; leave it out, or set `size` in ingest"
            )
        captions = None
    labelled = [tokens for tokens in sets if tokens.classes is not None]
    count = max((len(tokens.classes or ()) for tokens in labelled), default=None)
    conditions = condition_settings(asked, fields, count, captions)
    bos = vocabulary.specials.get("bos")
    config = _resolved(spec, {**filled, **conditions}, bos)
    if not labelled or getattr(config, "classes", None) is None:
        return config
    if any(one_length(tokens) == _elements(config) for tokens in labelled):
        _require_same_classes(labelled)
        return config
    if asked.get("classes") is not None or asked.get("class_dropout"):
        raise RequestError(
            f"model.classes: {NO_CLASS_OF_ITS_OWN}; leave classes and class_dropout out, or give "
            "samples of one length (ingest: `seconds` of recordings, `size` of pictures)"
        )
    without = {key: value for key, value in WITHOUT_CLASSES.items() if key in fields}
    return _resolved(spec, {**filled, **without}, bos)


def _resolved(spec: str | dict[str, Any], filled: dict[str, Any], bos: int | None) -> Settings:
    """The config, starting on `bos` where the family can and nothing else stands there."""
    asked = {} if isinstance(spec, str) else spec
    fields = FAMILIES[_family(spec)][0].model_fields
    if "bos" in fields and "bos" not in asked:
        conditioned = any(
            filled.get(name, asked.get(name)) is not None for name in ("classes", "captions")
        )
        filled = {**filled, "bos": None if conditioned else bos}
    try:
        return resolve(spec, **filled)
    except ValueError as error:
        raise RequestError(str(error)) from None


def _elements(config: Settings) -> int:
    shape = getattr(config, "event_shape", None) or [getattr(config, "context", 0)]
    return math.prod(shape)


def _shape_of(
    tokens: TokenSet, asked: dict[str, Any], fields: Container[str]
) -> tuple[int, ...] | None:
    """The shape of every sample, where rows are to be samples: grids always are, recordings of one
    length where that length was asked for, or none was and they have classes to be given."""
    length = one_length(tokens)
    if tokens.grid is not None or length is None:
        return tokens.grid
    if asked.get("context") or asked.get("event_shape"):
        wanted = asked.get("context") or math.prod(asked["event_shape"])
        return (length,) if wanted == length else None
    classes = tokens.classes is not None and "classes" in fields
    meant = classes and asked.get("classes", 0) is not None
    return (length,) if meant and length <= LONGEST_EVENT else None


def _require_same_classes(labelled: Sequence[TokenSet]) -> None:
    first = labelled[0]
    for tokens in labelled[1:]:
        if tokens.classes != first.classes:
            raise RequestError(
                f"the classes of {first.shards.folder} ({_listed(first.classes or ())}) are not "
                f"those of {tokens.shards.folder} ({_listed(tokens.classes or ())}): their numbers "
                "would mean different things; ingest them as one set, or set model.classes: null"
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", …" if len(names) > 6 else "")


def condition_settings(
    asked: dict[str, Any],
    fields: Container[str],
    classes: int | None,
    captions: dict[str, Any] | None,
) -> dict[str, Any]:
    """What is filled in of a family's `fields`, where the tokens have so many classes and such
    captions (TokenSet.captions). Captions go before classes that were not asked for."""
    wanted = asked.get("captions")
    unasked = captions is not None and "captions" not in asked and asked.get("classes") is None
    if "captions" in fields and (wanted is not None or unasked):
        filled = {"captions": _captions(wanted or {}, captions)}
        without = {key: value for key, value in WITHOUT_CLASSES.items() if key not in asked}
        return filled | without
    if classes is not None and "classes" in fields:
        given = asked.get("classes", classes)
        if given is not None and given < classes:
            raise RequestError(f"model.classes {given}: the tokens have {classes}; leave it out")
        return {"classes": given}
    return {}


def _captions(wanted: dict[str, Any], given: dict[str, Any] | None) -> dict[str, Any]:
    """model.captions: what was asked for, filled in from what the sets have."""
    if given is None:
        raise RequestError(
            "model.captions: the tokens have no captions; set `captions` of ingest's source, or "
            "leave it out"
        )
    least = {"vocabulary_size": given["vocabulary_size"], "length": given["longest"]}
    for name, value in least.items():
        if isinstance(wanted, dict) and wanted.get(name, value) < value:
            raise RequestError(
                f"model.captions.{name} {wanted[name]}: the captions have {value}; leave it out"
            )
    return {**least, **wanted}


def _family(spec: str | dict[str, Any]) -> str:
    if isinstance(spec, str):
        return str(PRESETS[spec]["family"])
    if "preset" in spec:
        return str(PRESETS[spec["preset"]]["family"])
    return str(spec["family"])


def describe(
    config: Settings, drawn: Mixture, sets: Sequence[TokenSet], artifacts: Sequence[Artifact]
) -> dict[str, Any]:
    """`model.json`: what handoff needs to know of the model beside its weights."""
    classes = next((tokens.classes for tokens in sets if tokens.classes is not None), None)
    captions = joint_captions(sets) if has_captions(config) else None
    modalities = list(dict.fromkeys(tokens.modality for tokens in sets))
    seen = dict.fromkeys((t.tokenizer_kind, t.tokenizer_fingerprint, t.modality) for t in sets)
    tables: dict[str, list[list[int]]] = {}
    for member in drawn.members:
        if member.table is not None:
            tables[member.tokens.tokenizer_fingerprint] = _runs(member.table.tolist())
    return {
        "model": config.model_dump(mode="json"),
        "vocabulary": drawn.vocabulary.as_dict(),
        "modality": modalities[0] if len(modalities) == 1 else "mixed",
        "grid": list(sets[0].grid) if sets[0].grid is not None and len(sets) == 1 else None,
        "classes": classes if getattr(config, "classes", None) is not None else None,
        "captions": captions and {name: captions[name] for name in ("kind", "fingerprint")},
        "tokenizers": [
            {
                "kind": kind,
                "fingerprint": fingerprint,
                "modality": modality,
                "ids": tables.get(fingerprint),
            }
            for kind, fingerprint, modality in seen
        ],
        "tokens": [artifact.fingerprint or digest(artifact.index) for artifact in artifacts],
    }


def _runs(table: list[int]) -> list[list[int]]:
    """A table of joint ids as [first own id, first joint id, how many] runs."""
    runs: list[list[int]] = []
    for own, joint in enumerate(table):
        if runs and runs[-1][1] + runs[-1][2] == joint and runs[-1][0] + runs[-1][2] == own:
            runs[-1][2] += 1
        else:
            runs.append([own, joint, 1])
    return runs
