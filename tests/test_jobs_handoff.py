"""handoff and export: any checkpoint as a model folder, and that as a `transformers` folder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chainrule.jobs import handoff, pretrain
from chainrule.jobs.export import export
from chainrule.pipeline import build, load
from chainrule.pipeline.artifact import Artifact, ArtifactError, LineageError, read_json
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.models import folder as model_folder
from chainrule.pipeline.stage import Stage
from chainrule.pipeline.training.checkpoints import Checkpoint, average, step_folder
from chainrule.tokenizers import transformers_format as tokenizer_format
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.characters import CharacterTokenizer
from chainrule.tokenizers.interface import Tokenizer, load as load_tokenizer
from chainrule.tokenizers.text import SentencePieceSettings, SentencePieceTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_ranks as ranks

DOCUMENTS = [f"def f{i}(x):\n    return x + {i}  # été {i * 7}\n" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    settings = SentencePieceSettings(vocabulary_size=300)
    trained = SentencePieceTokenizer.train(settings, DOCUMENTS)
    trained.facts["compression"] = 3.5
    trained.save(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    """A trained run with averaged weights, validated at every checkpoint."""
    root = tmp_path_factory.mktemp("run")
    of = load_tokenizer(tokenizer)
    tokens = ranks.write_tokens(
        root / "tokens",
        "text",
        40,
        of.vocabulary,
        {"fingerprint": of.fingerprint, "kind": "sentencepiece"},
    )
    config = {
        "model": {"preset": "llama-debug", "layers": 1, "heads": 2, "width": 16, "context": 16},
        "steps": 12,
        "batch_size": 8,
        "optimizer": {"learning_rate": 0.03},
        "checkpoint_every": 3,
        "validate_every": 3,
        "keep": 4,
        "ema": 0.9,
    }
    stage = ranks.stage_of(root / "decoder", [tokens])
    pretrain.main(pretrain.Config.model_validate(config), stage)
    return root / "decoder"


def hand_off(folder: Path, decoder: Path, *tokenizers: Path, **config: Any) -> Stage:
    stage = Stage(
        name="model",
        pipeline="test",
        job="handoff",
        folder=folder,
        fingerprint="f" * 64,
        inputs={
            "decoder": [Artifact.bare(decoder)],
            "tokenizer": [Artifact.bare(path) for path in tokenizers],
        },
    )
    handoff.main(handoff.Config.model_validate(config), stage)
    return stage


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).state_dict())


def test_a_model_folder_stands_alone(tmp_path, decoder, tokenizer):
    hand_off(tmp_path / "model", decoder, tokenizer)
    moved = (tmp_path / "model").rename(tmp_path / "elsewhere")
    model = load(moved)
    card = read_json(moved / "card.json")
    expected = dict(Checkpoint.open(step_folder(decoder / "checkpoints", 12)).tensors("model"))
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert card["step"] == 12
    assert card["weights"] == "raw"
    assert card["validation"]["loss"] > 0
    assert card["lineage"]["tokens"]
    assert card["tokenizer"]["path"] == "tokenizer"
    copy = load_tokenizer(moved / "tokenizer")
    assert copy.fingerprint == card["tokenizer"]["fingerprint"]
    assert copy.decode(copy.encode(["x = 1\n"])) == ["x = 1\n"]
    assert read_json(moved / "tokenizer" / "card.json")["compression"] == 3.5


@pytest.mark.parametrize("kind", ["raw", "ema", "best", "average"])
def test_every_kind_of_weights(tmp_path, decoder, kind):
    hand_off(tmp_path / "model", decoder, weights=kind, average_of=3)
    checkpoints = decoder / "checkpoints"
    last = Checkpoint.open(step_folder(checkpoints, 12))
    if kind == "average":
        expected = average([Checkpoint.open(step_folder(checkpoints, s)) for s in (12, 9, 6)])
    elif kind == "best":
        best = last.state["best_step"]
        expected = dict(Checkpoint.open(step_folder(checkpoints, best)).tensors("model"))
    else:
        expected = dict(last.tensors("ema" if kind == "ema" else "model"))
    found = weights(tmp_path / "model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    card = read_json(tmp_path / "model" / "card.json")
    if kind == "ema":
        assert card["validation"]["loss"] == last.state["final"]["ema_validation_loss"]
    assert ("loss" in card["validation"]) == (kind != "average")
    assert card.get("averaged_steps") == ([12, 9, 6] if kind == "average" else None)


def test_a_step_of_ones_own_choice(tmp_path, decoder):
    stage = hand_off(tmp_path / "model", decoder, step=6)
    assert stage.summary["step"] == 6
    with pytest.raises(ArtifactError, match="no checkpoint of step 7; there are 3, 6, 9, 12"):
        hand_off(tmp_path / "other", decoder, step=7)


def test_half_the_bytes(tmp_path, decoder):
    hand_off(tmp_path / "model", decoder, dtype="bfloat16")
    assert {t.dtype for t in load(tmp_path / "model").parameters()} == {torch.bfloat16}


def test_another_tokenizer_is_refused_with_both_fingerprints(tmp_path, decoder):
    other = tmp_path / "other"
    SentencePieceTokenizer.train(SentencePieceSettings(vocabulary_size=290), DOCUMENTS).save(other)
    theirs = read_json(other / "card.json")["fingerprint"]
    ours = read_json(decoder / "model.json")["tokenizers"][0]["fingerprint"]
    with pytest.raises(LineageError, match=f"{ours[:16]}.*{theirs[:16]}"):
        hand_off(tmp_path / "model", decoder, other)


def test_an_altered_checkpoint_is_passed_over(tmp_path, decoder, caplog):
    copy = tmp_path / "decoder"
    for path in decoder.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(decoder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(decoder)).write_bytes(path.read_bytes())
    file = step_folder(copy / "checkpoints", 12) / "state-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    stage = hand_off(tmp_path / "model", copy)
    assert stage.summary["step"] == 9
    assert "step-00000012" in caplog.text


def test_averaged_weights_that_were_not_kept_are_refused(tmp_path, decoder):
    copy = tmp_path / "decoder"
    (copy / "checkpoints" / "step-00000012").mkdir(parents=True)
    (copy / "model.json").write_bytes((decoder / "model.json").read_bytes())
    source = step_folder(decoder / "checkpoints", 12)
    manifest = read_json(source / "checkpoint.json")
    for entry in manifest["files"].values():
        entry["tensors"] = [name for name in entry["tensors"] if not name.startswith("ema/")]
    target = copy / "checkpoints" / "step-00000012"
    (target / "checkpoint.json").write_text(json.dumps(manifest))
    file = "state-00000.safetensors"
    (target / file).write_bytes((source / file).read_bytes())
    with pytest.raises(RequestError, match="holds no averaged weights"):
        hand_off(tmp_path / "model", copy, weights="ema")


def test_transformers_loads_what_export_writes(tmp_path, decoder, tokenizer):
    transformers = pytest.importorskip("transformers")
    hand_off(tmp_path / "model", decoder, tokenizer)
    export(tmp_path / "model", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ours, our_tokenizer = load(tmp_path / "model"), load_tokenizer(tmp_path / "model" / "tokenizer")
    text = "def f7(x):\n"
    ids = our_tokenizer.encode([text])[0].tolist()
    assert their_tokenizer(text)["input_ids"] == [their_tokenizer.bos_token_id, *ids]
    assert their_tokenizer.decode(ids) == text
    x = torch.tensor([ids[:16]])
    with torch.no_grad():
        mine = ours.conditionals(x).logits
        logits = theirs(torch.tensor([[their_tokenizer.bos_token_id, *ids[:15]]])).logits
    assert torch.allclose(mine, logits[:, : mine.shape[1], : mine.shape[2]], atol=1e-4)


def model_with(tokenizer: Tokenizer, folder: Path) -> Path:
    """A model folder of an untrained decoder over the tokenizer's vocabulary."""
    vocabulary = tokenizer.vocabulary
    config = {"preset": "gpt2-debug", "vocabulary_size": vocabulary["size"]}
    model = build({**config, "bos": vocabulary["specials"]["bos"]}, seed=0)
    entry = {"path": "tokenizer", "fingerprint": tokenizer.fingerprint}
    card = {"modality": "text", "vocabulary": vocabulary, "tokenizer": entry}
    model_folder.save(model, folder, card)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharacterTokenizer("abc \n🙂")], ids=["bytes", "characters"]
)
def test_other_tokenizers_go_along(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "theirs").mkdir()  # an empty folder will do
    assert export(model_with(tokenizer, tmp_path / "model"), tmp_path / "theirs") == []
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    ids = theirs("cab\n🙂 ba", return_tensors="pt")["input_ids"]
    ours = tokenizer.encode(["cab\n🙂 ba"])[0].tolist()
    assert ids[0].tolist() == [tokenizer.vocabulary["specials"]["bos"], *ours]
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
        mine = load(tmp_path / "model").conditionals(torch.tensor([ours])).logits
    assert torch.allclose(mine, logits, atol=1e-4)


def test_a_tokenizer_without_a_counterpart_stays_behind_and_is_named(tmp_path):
    settings = SentencePieceSettings(vocabulary_size=300, normalization="nfkc")
    model = model_with(SentencePieceTokenizer.train(settings, DOCUMENTS), tmp_path / "model")
    [said] = export(model, tmp_path / "theirs")
    assert said.endswith("chainrule: normalization 'nfkc' has no form in transformers")
    assert "\n" not in said
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_classes_and_tokenizers_without_a_counterpart_are_said(tmp_path):
    """The token that is named for a class starts what our model draws given that class."""
    transformers = pytest.importorskip("transformers")
    config = {"preset": "imagegpt-debug", "vocabulary_size": 16, "event_shape": [4, 4]}
    model = build({**config, "classes": 2}, seed=0)
    about = {"modality": "image", "classes": ["cat", "dog"]}
    entry = {"path": "tokenizer", "fingerprint": "f", "kind": "pixels"}
    model_folder.save(model, tmp_path / "model", {**about, "tokenizer": entry})
    left_out, start = export(tmp_path / "model", tmp_path / "theirs")
    assert left_out.startswith(f"{tmp_path / 'model' / 'tokenizer'}: left out")
    assert start == (
        "start with the token of a class: 16 for cat, 17 for dog; 18 (bos_token_id) for none"
    )
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "theirs").eval()
    x = torch.randint(0, 16, (1, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for token, cond in ((16, torch.tensor([0])), (17, torch.tensor([1])), (18, None)):
            ours = model.eval().conditionals(x, cond).logits
            ids = torch.cat([torch.tensor([[token]]), model.to_sequence(x)[:, :-1]], 1)
            assert torch.allclose(ours.reshape(1, 16, 16), theirs(ids).logits[..., :16], atol=1e-4)
    joint = [{"modality": "text"}, {"modality": "image"}]
    model_folder.save(model, tmp_path / "joint", {**about, "tokenizer": None, "tokenizers": joint})
    said = export(tmp_path / "joint", tmp_path / "theirs of joint")
    assert "a vocabulary of several (text, image) has no form in transformers" in said[0]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = model_with(ByteTokenizer(), tmp_path / "model")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(tokenizer_format, "to_transformers", full)
    with pytest.raises(OSError, match="No space"):
        export(model, tmp_path / "theirs")
    monkeypatch.undo()
    (model / "tokenizer" / "card.json").write_text("{}")
    with pytest.raises(RequestError, match="tokenizer"):
        export(model, tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_without_a_counterpart_is_refused(tmp_path):
    model_folder.save(build("made-debug", seed=0), tmp_path / "model", {})
    with pytest.raises(RequestError, match="has no counterpart in transformers"):
        export(tmp_path / "model", tmp_path / "theirs")
