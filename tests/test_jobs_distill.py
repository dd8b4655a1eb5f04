"""Distillation: the draft comes nearer to the model, and a cut run ends where a whole one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from chainrule.jobs import distill
from chainrule.jobs.distill import Config, main
from chainrule.pipeline import build, load
from chainrule.pipeline.artifact import Artifact, LineageError
from chainrule.pipeline.cli_model import app
from chainrule.pipeline.models.folder import save
from chainrule.pipeline.sampling import speculative
from chainrule.pipeline.sampling.distillation import Rows, divergence, new_draft
from chainrule.pipeline.sampling.sampler import SamplingError
from chainrule.pipeline.stage import Stage
from chainrule.tokenizers.bytes import ByteTokenizer

SHAPE = {"vocabulary_size": 258, "context": 24, "heads": 2, "width": 32, "mlp_width": 64}


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    model = build({"family": "llama", "layers": 4, **SHAPE}, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head" in name or "embedding" in name:
                parameter.mul_(10)
    tokenizer = ByteTokenizer()
    tokenizer.save(folder / "tokenizer")
    card = {
        "modality": "text",
        "vocabulary": tokenizer.vocabulary,
        "grid": None,
        "classes": None,
        "tokenizer": {"kind": "bytes", "fingerprint": tokenizer.fingerprint, "path": "tokenizer"},
    }
    save(model, folder, card)
    return folder


def stage_for(folder: Path, teacher: Path) -> Stage:
    inputs = {"model": [Artifact.bare(teacher)]}
    return Stage("draft", "test", "distill", folder, "", inputs)


SETTINGS: dict[str, Any] = {
    "steps": 40,
    "batch_size": 8,
    "own_samples": 40,
    "learning_rate": 3e-3,
    "warmup": 5,
    "checkpoint_every": 10,
}


def test_the_draft_comes_nearer(teacher: Path, tmp_path: Path) -> None:
    stage = stage_for(tmp_path / "draft", teacher)
    main(Config(**SETTINGS), stage)
    model, draft = load(teacher), load(tmp_path / "draft")
    assert draft.config.layers == 1
    x = torch.randint(258, (20, 24), generator=torch.Generator().manual_seed(0))
    start = new_draft(model, 1, None, 0)
    with torch.no_grad():
        before, before_overlap, _ = divergence(model, start, Rows(x))
        after, overlap, _ = divergence(model, draft, Rows(x))
    assert after < before
    assert overlap > before_overlap
    assert 0 < stage.summary["acceptance"] <= 1
    assert sorted(p.name for p in (tmp_path / "draft").iterdir()) == [
        "card.json",
        "metrics.jsonl",
        "tokenizer",
        "weights.safetensors",
    ]


def test_a_cut_run_ends_as_the_whole_one(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(**SETTINGS)
    main(config, stage_for(tmp_path / "whole", teacher))
    rate = distill.learning_rate

    def stop_at_27(config: Config, step: int) -> float:
        if step == 27:
            raise KeyboardInterrupt
        return rate(config, step)

    monkeypatch.setattr(distill, "learning_rate", stop_at_27)
    with pytest.raises(KeyboardInterrupt):
        main(config, stage_for(tmp_path / "cut", teacher))
    monkeypatch.setattr(distill, "learning_rate", rate)
    main(config, stage_for(tmp_path / "cut", teacher))
    for name in ("weights.safetensors", "metrics.jsonl", "card.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_micro_batches_change_rounding_only(teacher: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": 3}
    main(Config(**settings), stage_for(tmp_path / "one", teacher))
    main(Config(**settings, micro_batch=3), stage_for(tmp_path / "two", teacher))
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_divergence_is_zero_for_the_model_itself_and_counts_what_is_masked_in(
    teacher: Path,
) -> None:
    model = load(teacher)
    x = torch.randint(258, (3, 24), generator=torch.Generator().manual_seed(0))
    nats, overlap, count = divergence(model, model, Rows(x))
    assert float(nats.detach().abs()) < 1e-3
    assert float(overlap) == pytest.approx(count, rel=1e-5)
    draft = new_draft(model, 2, None, 0)
    mask = torch.zeros(3, 24, dtype=torch.bool)
    mask[1, :5] = True
    part, _, count = divergence(model, draft, Rows(x, mask=mask))
    alone, _, _ = divergence(model, draft, Rows(x[1:2, :5]))
    assert count == 5
    torch.testing.assert_close(part, alone)


def test_a_fresh_draft_shares_what_an_element_is(teacher: Path) -> None:
    model = load(teacher)
    spec = {"family": "gpt2", "layers": 1, "heads": 1, "width": 8}
    draft = new_draft(model, None, spec, 0)
    assert draft.config.family == "gpt2"
    assert draft.config.vocabulary_size == 258
    assert draft.event_shape == model.event_shape
    with pytest.raises(SamplingError, match="layers is 5: the model has 4"):
        new_draft(model, 5, None, 0)
    with pytest.raises(SamplingError, match="did you mean 'width'"):
        new_draft(model, None, {"family": "gpt2", "layers": 1, "heads": 1, "widht": 8}, 0)


def test_the_command_line_takes_a_draft(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chainrule sample --draft`: greedy text is the model's own, streamed and in files."""
    main(Config(**{**SETTINGS, "steps": 3, "own_samples": 8}), stage_for(tmp_path / "d", teacher))
    rounds: list[int] = []
    plain_round = speculative._Run.round

    def counted(run: Any) -> None:
        rounds.append(1)
        plain_round(run)

    monkeypatch.setattr(speculative._Run, "round", counted)
    asked = ["sample", str(teacher), "--prompt", "ab", "--length", "12", "--temperature", "0"]
    runner = CliRunner()
    plain = runner.invoke(app, asked)
    assert plain.exit_code == 0
    assert not rounds
    with_draft = [*asked, "--draft", str(tmp_path / "d"), "--set", "gamma.adapt=false"]
    drafted = runner.invoke(app, with_draft)
    assert drafted.exit_code == 0
    assert drafted.output == plain.output
    assert rounds
    rounds.clear()
    written = runner.invoke(app, [*with_draft, "--out", str(tmp_path / "out"), "--n", "2"])
    assert written.exit_code == 0
    assert rounds
    text = (tmp_path / "out" / "text" / "00000.txt").read_text(errors="replace")
    assert text.strip() in plain.output

    other = build({"family": "llama", "layers": 1, **SHAPE}, seed=0)
    card = {key: Artifact.bare(teacher).card[key] for key in ("modality", "vocabulary")}
    save(other, tmp_path / "o", {**card, "tokenizer": {"kind": "bytes", "fingerprint": "x"}})
    refused = runner.invoke(app, [*asked, "--draft", str(tmp_path / "o")])
    assert isinstance(refused.exception, LineageError)
    assert "tokenizers of model and draft" in str(refused.exception)
