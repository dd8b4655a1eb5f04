"""Tables of real numbers through the whole pipeline, and the baselines beside their densities."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.arrays import Table
from chainrule.pipeline.data.batches import joint_vocabulary, mixture_of
from chainrule.pipeline.data.tokens import TokenSet
from chainrule.pipeline.evaluation import densities
from chainrule.pipeline.sampling.store import Store
from chainrule.tokenizers import interface
from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.standardize import StandardizeTokenizer

PIPELINE = """
name: rows
stages:
  table: {job: ingest, source: {kind: table, path: TABLE}, validation: 0.2, samples_per_shard: 300}
  standard: {job: train_tokenizer, inputs: {data: table}, tokenizer: {kind: standardize}}
  tokens: {job: pretokenize, inputs: {data: table, tokenizer: standard}}
  density:
    job: pretrain
    inputs: {tokens: tokens}
    model: {family: FAMILY, head: {kind: mixture-of-gaussians, components: 3}, MORE}
    steps: 150
    batch_size: 64
    optimizer: {learning_rate: 1e-2, weight_decay: 0.0}
  model: {job: handoff, inputs: {decoder: density, tokenizer: standard}}
  evaluation: {job: evaluate, inputs: {model: model, tokens: tokens}}
  samples: {job: sample, inputs: {model: model}, number: 40}
"""
FAMILIES = {
    "made": "hidden: [32]",
    "llama": "layers: 1, width: 16, heads: 2",
    "wavenet": "cycles: 1, layers: 2, residual_width: 8, gate_width: 8, skip_width: 16",
}


def rows(n: int = 900) -> np.ndarray:
    """(n, 3): a column, its square with some noise, and one far away from zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=n)
    return np.stack([x, x**2 + 0.1 * rng.normal(size=n), 1e4 + 5 * rng.normal(size=n)], axis=1)


def run(tmp_path: Path, *words: str) -> None:
    command = [str(Path(sys.executable).with_name("chainrule")), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_through_the_whole_pipeline(family: str, tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", rows())
    text = PIPELINE.replace("TABLE", str(tmp_path / "table.npy"))
    text = text.replace("FAMILY", family).replace("MORE", FAMILIES[family])
    (tmp_path / "p.yaml").write_text(text)
    run(tmp_path, "run", "p.yaml")
    made = tmp_path / "runs" / "rows"
    figures = json.loads((made / "evaluation" / "evaluation.json").read_text())
    assert figures["rows"] == 180
    # the square is no linear function: a Gaussian cannot follow it, the mixture must
    assert figures["nats_per_row"] < figures["gaussian_nats_per_row"] - 0.3
    assert "perplexity" not in figures
    assert "unigram_nats_per_token" not in figures
    card = json.loads((made / "standard" / "card.json").read_text())
    own = figures["nats_per_row"] + sum(math.log(d) for d in card["deviation"])
    assert figures["nats_per_row.own_units"] == pytest.approx(own)
    drawn = np.loadtxt(made / "samples" / "rows.csv", delimiter=",", skiprows=1)
    again = Table(kind="table", path=made / "samples" / "rows.csv").open()
    assert again.columns == ["column0", "column1", "column2"]
    assert np.array_equal(np.frombuffer(again.read(7).members["f64"], "<f8"), drawn[7])
    assert np.array_equal(drawn, Store.open(made / "samples").read("rows"))
    assert drawn.shape == (40, 3)
    assert abs(drawn[:, 2].mean() - 1e4) < 5
    assert abs(np.median(drawn[:, 1] - drawn[:, 0] ** 2)) < 0.5
    tokens = TokenSet.open(made / "tokens")
    assert tokens.vocabulary.continuous
    assert tokens.grid == (3,)
    batch = mixture_of([tokens]).batch(0, 4)
    assert str(batch.x.dtype) == "torch.float32"
    assert batch.mask is None
    tokens.tokenizer_fingerprint = "another"
    with pytest.raises(RequestError, match="not mixed"):
        joint_vocabulary([tokens, TokenSet.open(made / "tokens")])


@pytest.mark.slow
def test_names_of_columns_go_along(tmp_path: Path) -> None:
    lines = [f"{a!r},{b!r},{c!r}" for a, b, c in rows(300).tolist()]
    (tmp_path / "t.csv").write_text("\n".join(["height,weight,time", *lines]))
    text = PIPELINE.replace("TABLE", str(tmp_path / "t.csv")).replace("FAMILY", "made")
    (tmp_path / "p.yaml").write_text(text.replace("MORE", "hidden: [8]").replace("150", "3"))
    run(tmp_path, "run", "p.yaml")
    made = tmp_path / "runs" / "rows"
    drawn = (made / "samples" / "rows.csv").read_text().splitlines()
    assert drawn[0] == "height,weight,time"
    assert len(drawn) == 41

    other = ["weight,height,time", *lines]
    (tmp_path / "t.csv").write_text("\n".join(other))
    (tmp_path / "q.yaml").write_text(
        "name: q\nstages:\n"
        "  table: {job: ingest, source: {kind: table, path: t.csv}, validation: 0.2}\n"
        f"  tokens: {{job: pretokenize, inputs: {{data: table, tokenizer: {made}/standard}}}}\n"
    )
    command = [str(Path(sys.executable).with_name("chainrule")), "run", "q.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "columns weight, height, time; the tokenizer of" in done.stderr
    assert "takes height, weight, time; set `columns` in ingest" in done.stderr


def test_standardize_there_and_back(tmp_path: Path) -> None:
    table = rows().astype(np.float32)
    tokenizer = StandardizeTokenizer.train(table)
    encoded = np.stack(tokenizer.encode(list(table)))
    assert encoded.dtype == np.float32
    np.testing.assert_allclose(encoded.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(encoded.std(axis=0), 1, atol=1e-4)
    np.testing.assert_allclose(tokenizer.decode(list(encoded)), table, rtol=1e-6, atol=1e-5)
    tokenizer.save(tmp_path)
    again = interface.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.encode([table[0]])[0], encoded[0])
    with pytest.raises(TokenizerError, match="takes 3 numbers"):
        tokenizer.encode([table[0][:2]])
    constant = np.array([[0.0, 5.0], [1.0, 5.0]])
    with pytest.raises(TokenizerError, match="column 1 is constant"):
        StandardizeTokenizer.train(constant)
    with pytest.raises(TokenizerError, match="column 'b' is constant"):
        StandardizeTokenizer.train(constant, ["a", "b"])
    card = json.loads((tmp_path / "card.json").read_text())
    card["mean"][0] += 1
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(TokenizerError, match="altered"):
        interface.load(tmp_path)


def test_baselines_of_a_known_density() -> None:
    rng = np.random.default_rng(1)
    factor = np.array([[2.0, 0.0], [1.5, 0.5]])
    train, held_out = (rng.normal(size=(n, 2)) @ factor.T + 3 for n in (8000, 4000))
    entropy = math.log(2 * math.pi * math.e) + math.log(np.linalg.det(factor))
    gaussian = densities.gaussian_nats(train, held_out)
    assert gaussian == pytest.approx(entropy, abs=0.05)
    kernel, width = densities.kernel_nats(train, held_out)
    assert gaussian - 0.01 < kernel < gaussian + 0.1
    assert 0.02 < width < 1.0
    alone = densities.independent_gaussian_nats(train, held_out)
    deviations = np.sqrt((factor**2).sum(axis=1))
    independent = math.log(2 * math.pi * math.e) + math.log(deviations.prod())
    assert alone == pytest.approx(independent, abs=0.05)
