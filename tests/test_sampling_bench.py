"""The benchmarks measure what they say: the same tokens on both sides, rows that add up."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from chainrule.pipeline import build
from chainrule.pipeline.sampling import bench
from chainrule.pipeline.sampling.drafts import ModelDraft, NgramDraft, first_layers
from chainrule.pipeline.sampling.filters import Filters
from chainrule.pipeline.sampling.sampler import Plan, Rules
from chainrule.pipeline.sampling.speculative import Gamma
from chainrule.pipeline.sampling.uniforms import sample_seeds

TINY = {"vocabulary_size": 64, "context": 40, "layers": 2, "heads": 2, "width": 32, "bos": 0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_sides_say_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(bench.MODELS, "tiny", {"family": family, **TINY})
    rows = bench.decode(["tiny"], (1, 3), tokens=16, rounds=1)
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert row["same tokens"] == 1
        assert row["ratio"] == pytest.approx(row["ours"] / row["transformers"])
        share = row["ours"] / row["bound"]
        assert row["ours of bound"] == pytest.approx(share)
    text = bench.table(rows).splitlines()
    assert len({len(line) for line in text}) == 1
    assert "100%" in text[1]


@pytest.mark.parametrize("command", ["decode", "images"])
def test_a_batch_of_none_is_refused(command: str, run: Callable[..., tuple[int, str]]) -> None:
    code, said = run("bench", command, "--batch", 0)
    assert code == 2
    assert said.startswith("error: Invalid value for '--batch'")


def test_pictures_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {**bench.IMAGE_MODELS["images-11m"], "layers": 1, "heads": 2, "width": 16}
    monkeypatch.setitem(bench.IMAGE_MODELS, "tiny", {**tiny, "event_shape": (3, 3)})
    rows = bench.images(["tiny"], (1, 2), rounds=1)
    assert [row["batch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["guided codes/s"] == pytest.approx(9 * row["guided images/s"])
        assert row["plain images/s"] > 0


def test_the_named_models_have_the_size_of_their_names() -> None:
    for name, spec in {**bench.MODELS, **bench.IMAGE_MODELS}.items():
        with torch.device("meta"):
            model = build(spec)
        parameters = sum(p.numel() for p in model.parameters())
        millions = int(name.rsplit("-", 1)[1].removesuffix("m"))
        assert parameters / 1e6 == pytest.approx(millions, rel=0.1)


def test_weights_that_a_token_reads() -> None:
    model = build({"family": "gpt2", **TINY, "tied_embeddings": False})
    whole = sum(p.nbytes for p in model.parameters())
    tables = (40 + 64) * 32 * 4
    assert bench.weight_bytes(model) == whole - tables


def test_speculative_rows() -> None:
    model = build({"family": "llama", **TINY}, seed=0).eval()
    drafts = {"itself": ModelDraft(model), "n-gram": NgramDraft()}

    def plan_of(batch: int) -> Plan:
        return Plan(sample_seeds(0, np.arange(batch)), np.full(batch, 21))

    rows = bench.speculative(
        model, drafts, plan_of, Rules(), (1, 2), (Gamma(most=3, adapt=False),), rounds=1
    )
    assert len(rows) == 4
    itself = rows[0]
    assert itself["acceptance"] > 0.95
    assert itself["gamma"] == "3"
    expected = bench.expected_speedup(
        itself["acceptance"], itself["mean gamma"], itself["draft cost"]
    )
    assert itself["formula"] == pytest.approx(expected)
    assert rows[1]["draft cost"] == 0
    early = {"early": ModelDraft(first_layers(model, 1))}
    greedy = bench.speculative(model, early, plan_of, Rules(Filters(temperature=0)), (1,), rounds=1)
    assert greedy[0]["speculative tokens/s"] > 0
