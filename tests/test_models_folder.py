"""Models as folders: what is saved is what is loaded, and nothing else is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from chainrule.pipeline import build, load
from chainrule.pipeline.artifact import ArtifactError
from chainrule.pipeline.models.folder import read_card, save

CARD = {"modality": "text", "step": 3}


@pytest.mark.parametrize(
    "preset",
    [
        "gpt2-debug",
        "llama-debug",
        "imagegpt-debug",
        "pixelcnn-debug",
        "gated-pixelcnn-debug",
        "pixelcnnpp-debug",
        "wavenet-debug",
        "made-debug",
        "made-mog-debug",
    ],
)
def test_a_loaded_model_is_the_saved_one(preset: str, tmp_path: Path) -> None:
    model = build(preset, seed=3)
    card = save(model, tmp_path, CARD)
    again = load(tmp_path)
    assert again.config == model.config
    assert not again.training
    for (name, mine), (other, yours) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, yours)
    assert read_card(tmp_path) == card
    assert card["family"] == model.config.family
    assert card["modality"] == "text"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "weights.safetensors"]


def test_weights_above_a_size_lie_in_several_files(tmp_path: Path) -> None:
    model = build("llama-debug", seed=3)
    one = save(model, tmp_path, CARD)
    card = save(model, tmp_path, CARD, shard_bytes=1_000_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files][:2] == [
        f"weights-{i:05d}-of-{len(files):05d}.safetensors" for i in (1, 2)
    ]
    assert all(path.stat().st_size < 1_010_000 for path in files)
    index = json.loads((tmp_path / "weights.safetensors.index.json").read_text())
    state = load(tmp_path).state_dict()
    for name, mine in model.state_dict().items():
        assert torch.equal(mine, state[name])
        assert name in load_file(tmp_path / index["weight_map"][name])

    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        load(tmp_path)
    files[1].unlink()
    with pytest.raises(ArtifactError, match=f"{files[1].name}: no such file"):
        load(tmp_path)
    again = save(model, tmp_path, CARD)  # nothing of the other form is left behind
    assert again["fingerprint"] == one["fingerprint"] != card["fingerprint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "weights.safetensors"]


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save(build("gpt2-debug", seed=0), tmp_path, CARD)
    assert "head.weight" not in load_file(tmp_path / "weights.safetensors")
    model: Any = load(tmp_path)
    assert model.head.weight is model.embedding.weight


def test_dtypes(tmp_path: Path) -> None:
    model = build("gpt2-debug", seed=0)
    save(model, tmp_path / "float32", CARD)
    assert next(load(tmp_path / "float32").parameters()).dtype == torch.float32
    half = load(tmp_path / "float32", dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    save(half, tmp_path / "bfloat16", CARD)
    assert next(load(tmp_path / "bfloat16").parameters()).dtype == torch.bfloat16


def test_a_fingerprint_depends_on_config_and_weights_alone(tmp_path: Path) -> None:
    first = save(build("made-debug", seed=0), tmp_path / "a", CARD)
    same = save(build("made-debug", seed=0), tmp_path / "b", {"step": 9})
    other = save(build("made-debug", seed=1), tmp_path / "c", CARD)
    assert first["fingerprint"] == same["fingerprint"] != other["fingerprint"]


def _folder(tmp_path: Path) -> Path:
    save(build("made-debug", seed=0), tmp_path, CARD)
    return tmp_path


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_altered_folders_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    weights = load_file(folder / "weights.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-6}, folder / "weights.safetensors")
    with pytest.raises(ArtifactError, match="altered: .* fingerprint"):
        load(folder)
    folder = _folder(tmp_path)
    _edit(folder, model={**read_card(folder)["model"], "hidden": [64, 64]})
    with pytest.raises(ArtifactError, match="altered"):
        load(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"has no card\.json"):
        load(tmp_path / "empty")
    folder = _folder(tmp_path / "model")
    _edit(folder, kind="tokenizer")
    with pytest.raises(ArtifactError, match="kind 'tokenizer'"):
        load(folder)
    _folder(folder)
    _edit(folder, format=99)
    with pytest.raises(ArtifactError, match="format 99"):
        load(folder)
    _folder(folder)
    (folder / "card.json").write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        load(folder)
    _folder(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        load(folder)


def test_cut_or_foreign_weights_are_named(tmp_path: Path) -> None:
    from chainrule.pipeline.models.folder import place_weights, read_weights, weights_of

    folder = _folder(tmp_path)
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        read_weights(path)
    model = build("made-debug")
    weights = weights_of(model)
    name = sorted(weights)[0]
    lacking = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(ArtifactError, match=f"has no tensor '{name}'"):
        place_weights(model, lacking, path, None)
    with pytest.raises(ArtifactError, match="'more' has no place"):
        place_weights(model, {**weights, "more": weights[name]}, path, None)
    with pytest.raises(ArtifactError, match=f"'{name}' has shape"):
        place_weights(model, {**weights, name: weights[name][:1]}, path, None)


def test_save_refuses_a_card_that_contradicts_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family, fingerprint are written by save"):
        save(build("made-debug"), tmp_path, {"family": "x", "fingerprint": "y"})
