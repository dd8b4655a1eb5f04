"""Classes that a training gives its rows: by sample, or not at all; never a class untrained."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainrule.jobs.pretrain import unlikely
from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.batches import mixture_of
from chainrule.pipeline.data.shards import ShardWriter, finish, key_of
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.training.assembly import model_config
from chainrule.pipeline.training.validation import Validation
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer

WAVENET = {"family": "wavenet", "cycles": 1, "layers": 3, "residual_width": 8, "skip_width": 8}


def recordings(folder: Path, lengths: list[int], classes: list[str] | None = None) -> TokenSet:
    """A set of one shard; sample i has class i modulo their number."""
    classes = classes or ["high", "low"]
    tokenizer = MuLawTokenizer(MuLawSettings(kind="mulaw"), 8000)
    folder.mkdir(parents=True)
    with ShardWriter(folder, 0, "train") as shard:
        for i, length in enumerate(lengths):
            tokens = np.full(length, i, np.uint8)
            members = {"tokens.npy": tokens, "json": {"label": i % len(classes)}}
            shard.write(key_of(i), members, length)
    finish(
        folder,
        kind="tokens",
        modality="audio",
        shards=1,
        vocabulary=tokenizer.vocabulary,
        tokenizer={"kind": "mulaw", "fingerprint": tokenizer.fingerprint},
        grid=None,
        classes=classes,
    )
    return TokenSet.open(folder)


@pytest.fixture
def alike(tmp_path: Path) -> TokenSet:
    return recordings(tmp_path / "alike", [20] * 6)


@pytest.fixture
def unlike(tmp_path: Path) -> TokenSet:
    return recordings(tmp_path / "unlike", [20, 30, 20, 25])


def test_recordings_of_one_length_make_a_row_each_and_give_it_their_class(alike: TokenSet) -> None:
    config: Any = model_config(WAVENET, [alike])
    assert (config.event_shape, config.classes) == ((20,), 2)
    batch = mixture_of([alike], context=20).batch(0, 6)
    assert batch.cond is not None
    assert batch.documents is None
    assert batch.cond.tolist() == [int(row[0]) % 2 for row in batch.x]
    assert not list(unlikely(mixture_of([alike], context=20), 6, WAVENET, config))


@pytest.mark.parametrize("shape", [10, 40])
def test_packed_recordings_have_no_class(alike: TokenSet, unlike: TokenSet, shape: int) -> None:
    for tokens in (alike, unlike):
        spec = {**WAVENET, "event_shape": [shape]}
        config: Any = model_config(spec, [tokens])
        assert (config.event_shape, config.classes) == ((shape,), None)
        drawn = mixture_of([tokens], context=shape)
        said = list(unlikely(drawn, 1, spec, config))
        assert "the classes are left out" in said[0]
        assert not list(unlikely(drawn, 1, {**spec, "classes": None}, config))
        with pytest.raises(RequestError, match="model.classes: a row of tokens holds several"):
            model_config({**spec, "classes": 2}, [tokens])


def test_what_is_hardly_meant_is_said(unlike: TokenSet) -> None:
    config: Any = model_config({**WAVENET, "classes": None}, [unlike])
    drawn = mixture_of([unlike], context=config.event_shape[0])
    [long, short] = unlikely(drawn, 8, {"classes": None}, config)
    assert "a step of 8 rows goes 8.0 times through all there are (1)" in long
    assert "a row of 16000 elements holds 533 recordings of unlike or more" in short


def test_too_few_classes_are_refused(alike: TokenSet) -> None:
    with pytest.raises(RequestError, match="model.classes 1: the tokens have 2"):
        model_config({**WAVENET, "classes": 1}, [alike])
    assert model_config({**WAVENET, "classes": 5}, [alike]).classes == 5  # type: ignore[attr-defined]


def test_sets_of_other_classes_are_not_mixed(alike: TokenSet, tmp_path: Path) -> None:
    other = recordings(tmp_path / "other", [20] * 4, ["low", "high"])
    with pytest.raises(RequestError, match=r"alike .high, low. are not those of .*other .low"):
        model_config(WAVENET, [alike, other])


def test_classes_that_no_row_is_given_are_not_held_against_each_other(tmp_path: Path) -> None:
    sets = [
        recordings(tmp_path / "a" / "tokens", [20, 30] * 4),
        recordings(tmp_path / "b" / "tokens", [20, 25] * 4, ["other", "names"]),
    ]
    for spec in ({**WAVENET, "event_shape": [40]}, {**WAVENET, "classes": None}):
        assert model_config(spec, sets).classes is None  # type: ignore[attr-defined]


def test_a_class_dropout_of_rows_without_a_class_is_refused(unlike: TokenSet) -> None:
    spec = {"preset": "vqgan-transformer-debug", "context": 16}
    assert model_config(spec, [unlike]).classes is None  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="leave classes and class_dropout out"):
        model_config({**spec, "class_dropout": 0.2}, [unlike])


def test_a_presets_context_stands_where_no_class_is_to_be_given(tmp_path: Path) -> None:
    unlabelled = recordings(tmp_path / "tokens", [300] * 4)
    unlabelled.classes = None
    config: Any = model_config("llama-debug", [unlabelled])
    assert config.context == 256
    config = model_config({"preset": "llama-debug", "classes": None}, [unlabelled])
    assert config.context == 256


def test_two_sets_of_one_name_are_validated_each(tmp_path: Path) -> None:
    sets = [recordings(tmp_path / name / "tokens", [16] * 4) for name in "ab"]
    validation = Validation(sets, 16, 2, 0, [Fraction(3, 4), Fraction(1, 4)])

    class Engine:
        rank, world_size, device = 0, 1, "cpu"

        def sum(self, *values: float) -> tuple[float, ...]:
            return values

        class wrapped:
            eval = train = staticmethod(lambda: None)

    losses = iter([1.0, 1.0, 5.0, 5.0])

    def objective(model: object, batch: Any) -> tuple[None, torch.Tensor]:
        return None, torch.tensor(next(losses) * batch.tokens)

    found = validation.losses(Engine(), objective)  # type: ignore[arg-type]
    assert found["validation_loss"] == pytest.approx(0.75 * 1 + 0.25 * 5)
