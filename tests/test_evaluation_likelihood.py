"""Windows, sums and baselines: every element scored once, under what the caller says."""

import math

import numpy as np
import pytest
import torch

from chainrule.pipeline.evaluation.factors import Parts
from chainrule.pipeline.evaluation.figures import Figures
from chainrule.pipeline.evaluation.likelihood import (
    Tally,
    position_picture,
    score_documents,
    score_events,
    unigram_nats,
    windows,
)
from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.stage import StageFailed


class Positional(Autoregressive):
    """log p(x_t) depends on t within the window and on x_t: shows where each was scored."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.event_shape = (context,)
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[torch.Tensor] = []

    def conditionals(self, x, cond=None):
        raise NotImplementedError

    def cursor(self, batch, cond=None):
        raise NotImplementedError

    def log_prob(self, x, cond=None):
        self.seen.append(x)
        position = torch.arange(x.shape[1]).expand(x.shape)
        given = 0 if cond is None else 100_000 * cond.unsqueeze(1)
        return -(position + 1000 * x + given).float()


@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_each_element_is_scored_once_with_the_context_promised(stride):
    context = 8
    for length in range(1, 40):
        scored = np.zeros(length, dtype=int)
        for window in windows(length, context, stride):
            assert window.stop - window.start <= context
            scored[window.scored : window.stop] += 1
            if window.scored:
                assert window.scored - window.start >= min(context - stride, window.scored)
        assert (scored == 1).all()
    with pytest.raises(ValueError, match="stride"):
        list(windows(10, context, 0))
    with pytest.raises(ValueError, match="stride"):
        list(windows(10, context, 9))


def test_scores_come_back_in_order_from_their_own_windows():
    model = Positional(8)
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 50, n), None) for n in [3, 0, 20, 8, 1, 100, 9]]
    found = list(score_documents(model, iter(documents), stride=4, batch_size=3))
    assert [len(f) for f in found] == [3, 0, 20, 8, 1, 100, 9]
    for (document, _), nats in zip(documents, found, strict=True):
        np.testing.assert_array_equal(nats // 1000, document)
        # the first window scores its places 0..7, each later one its last four at most
        places = nats % 1000
        np.testing.assert_array_equal(places[:8], np.arange(min(8, len(places))))
        assert (places[8:] >= 4).all()


def test_labels_reach_their_documents():
    model = Positional(8)
    documents = [(np.array([1, 2]), 3), (np.array([4]), 0), (np.array([5, 5, 5]), 2)]
    found = list(score_documents(model, iter(documents), stride=4, batch_size=8))
    assert [int(nats[0] // 100_000) for nats in found] == [3, 0, 2]
    batches = [(torch.ones(2, 8, dtype=torch.long), torch.tensor([1, 0]))]
    events = list(score_events(model, iter(batches)))
    assert [int(nats[0] // 100_000) for nats in events] == [1, 0]


def test_batches_bound_what_is_held():
    model = Positional(8)
    list(score_documents(model, ((np.zeros(8), None) for _ in range(200)), 4, batch_size=5))
    assert max(len(x) for x in model.seen) == 5


def test_tally_sums_by_position_and_class():
    tally = Tally(positions=3)
    tally.add(np.array([1.0, 2.0, 3.0, 4.0], dtype=np.float32), label=1)
    tally.add(np.array([3.0], dtype=np.float32), label=0)
    assert tally.nats == 13
    assert tally.mean == 13 / 5
    assert tally.curve() == [(0, 2.0), (1, 2.0), (2, 3.0)]
    assert tally.by_class == {1: [10.0, 4], 0: [3.0, 1]}


def test_unigram_is_a_cross_entropy():
    counts = np.array([6, 2, 0])
    q = np.array([7, 3, 1]) / 11
    held_out = np.array([1, 1, 2])
    expected = -(np.log(q) * held_out).sum() / 4
    assert unigram_nats(counts, held_out) == pytest.approx(expected)
    many = np.array([10**6, 10**6])
    assert unigram_nats(many, many) == pytest.approx(math.log(2), rel=1e-5)


def test_parts_of_several_ranks_and_a_restart_give_one_ranks_samples(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, 50)
    truth = [rng.normal(size=n).astype(np.float32) for n in lengths]
    for world_size in (1, 2, 3, 7):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        for rank in range(world_size):
            parts = Parts(folder, lengths, rank, world_size)
            todo = parts.resume()
            half = range(todo.start, (todo.start + todo.stop) // 2)
            assert list(parts.append(truth[i] for i in half)) == [lengths[i] for i in half]
            growing = folder / "factors" / f"part-{rank}-of-{world_size}.f32.partial"
            with open(growing, "ab") as file:
                file.write(b"\x01\x02\x03")  # killed in the middle of a value
            again = Parts(folder, lengths, rank, world_size)
            rest = again.resume()
            assert rest.start <= half.stop or lengths[half.stop : rest.start].sum() == 0
            assert rest.stop == todo.stop
            list(again.append(truth[i] for i in rest))
            again.complete()
            assert len(Parts(folder, lengths, rank, world_size).resume()) == 0
        parts = Parts(folder, lengths, 0, world_size)
        parts.wait(0.0)
        for a, b in zip(parts.samples(), truth, strict=True):
            np.testing.assert_array_equal(a, b)


def test_factors_land_in_zarr(tmp_path, monkeypatch):
    import zarr

    monkeypatch.setattr("chainrule.pipeline.evaluation.factors.CHUNK", 16)
    lengths = np.array([5, 0, 40, 7])
    truth = [np.arange(n, dtype=np.float32) + 100 * i for i, n in enumerate(lengths)]
    parts = Parts(tmp_path, lengths)
    list(parts.append(iter(truth)))
    parts.complete()
    parts.to_zarr(keep=True)
    group = zarr.open_group(str(tmp_path / "factors.zarr"), mode="r")
    np.testing.assert_array_equal(np.asarray(group["nats"]), np.concatenate(truth))
    np.testing.assert_array_equal(np.asarray(group["offsets"]), [0, 5, 5, 45, 52])
    assert not (tmp_path / "factors").exists()


def test_a_rank_that_never_comes_is_named(tmp_path):
    parts = Parts(tmp_path, np.array([3, 3]), rank=0, world_size=2)
    list(parts.append(iter([np.zeros(3, dtype=np.float32)])))
    parts.complete()
    with pytest.raises(StageFailed, match=r"ranks \[1\]"):
        parts.wait(patience_s=0.0, poll_s=0.0)


def test_figures_are_flat_and_each_has_split_and_unit(tmp_path):
    import json

    figures = Figures()
    figures.put("psnr", math.inf, "validation", "dB")
    figures.put("nats", 1.5, "validation", "nats a token")
    figures.fact("model", "abc")
    path = figures.write(tmp_path)
    values = json.loads(path.read_text())
    assert values["nats"] == 1.5
    assert values["nats.split"] == "validation"
    assert values["nats.unit"] == "nats a token"
    assert values["psnr"] is None
    assert values["psnr.unit"] == "dB (here inf)"
    assert all(not isinstance(value, dict | list) for value in values.values())
    assert figures.numbers == {"nats": 1.5}


def test_the_curve_is_a_picture_and_the_same_twice(tmp_path):
    curve = [(i, 4.0 / (i + 1)) for i in range(300)]
    for name in ("a.png", "b.png"):
        position_picture(tmp_path / name, curve, "token", "validation")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
