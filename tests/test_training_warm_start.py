"""A training that begins with a handed-off model: its weights, and what is refused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chainrule.jobs import handoff, pretrain
from chainrule.pipeline.artifact import Artifact, LineageError
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.models.folder import load
from chainrule.pipeline.stage import Stage
from chainrule.pipeline.training.checkpoints import newest

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_ranks as ranks

TINY = {"preset": "gpt2-debug", "layers": 1, "heads": 2, "width": 16, "context": 16}


def train(folder: Path, tokens: Path, initial: Path | None = None, **changes: Any) -> None:
    stage = ranks.stage_of(folder, [tokens])
    if initial is not None:
        stage.inputs["initial"] = [Artifact.bare(initial)]  # type: ignore[index]
    asked: dict[str, Any] = {"model": TINY, "steps": 30, "batch_size": 12, "ema": 0.9}
    asked["optimizer"] = {"learning_rate": 1e-2}
    pretrain.main(pretrain.Config.model_validate(asked | changes), stage)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks.write_tokens(tmp_path_factory.mktemp("data") / "text", "text")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A model that was trained for a while, as handoff leaves it."""
    root = tmp_path_factory.mktemp("before")
    train(root / "decoder", tokens)
    inputs = {"decoder": [Artifact.bare(root / "decoder")]}
    stage = Stage("model", "test", "handoff", root / "model", "f" * 64, inputs)
    handoff.main(handoff.Config(), stage)
    return root / "model"


def test_it_begins_with_the_weights_of_the_model(model: Path, tokens: Path, tmp_path: Path) -> None:
    unmoved = {"learning_rate": 1e-30, "weight_decay": 0.0}
    train(tmp_path / "still", tokens, model, steps=2, optimizer=unmoved, seed=7)
    saved = newest(tmp_path / "still" / "checkpoints")
    assert saved is not None
    given = dict(load(model).named_parameters())
    for kind in ("model", "ema"):
        found = dict(saved.tensors(kind))
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], given[name]) for name in given), kind

    train(tmp_path / "more", tokens, model, model={**TINY, "dropout": 0.1})
    train(tmp_path / "fresh", tokens)
    more, fresh = (ranks.losses_of(tmp_path / name)[0] for name in ("more", "fresh"))
    assert more[0] == fresh[0] == 1  # the step
    assert more[1] < fresh[1] - 0.5
    # Once it has a checkpoint of its own, it goes on with that.
    train(tmp_path / "still", tokens, model, steps=2, optimizer=unmoved, seed=7)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({**TINY, "width": 32}, "is another model than `model` asks for: width: 16 → 32"),
        ({**TINY, "preset": "llama-debug"}, "is another model than `model` asks for: "),
        ("wavenet-debug", "is of another family than `model` asks for"),
    ],
)
def test_another_model_is_refused(
    model: Path, tokens: Path, tmp_path: Path, asked: Any, words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        train(tmp_path / "decoder", tokens, model, model=asked)


def test_tokens_of_another_tokenizer_are_refused(model: Path, tmp_path: Path) -> None:
    other = ranks.write_tokens(
        tmp_path / "other", "text", tokenizer={"fingerprint": "of-another", "kind": "test"}
    )
    with pytest.raises(LineageError, match=r"of-text, .* of-another; pretokenize with the model's"):
        train(tmp_path / "decoder", other, model)
