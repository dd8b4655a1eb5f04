import pytest
import torch
from pydantic import ValidationError

from chainrule.pipeline.models.orderings import Ordering, inverse

KINDS = ["raster", "column", "hilbert", "spiral", "spiral-out", "subsampled", "permutation"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 3), (3, 4, 4), (2, 3, 5)])
def test_an_order_visits_each_element_once(kind, shape):
    order = Ordering(kind=kind).indices(shape)
    length = torch.Size(shape).numel()
    assert order.dtype == torch.long
    assert sorted(order.tolist()) == list(range(length))
    assert inverse(order)[order].tolist() == list(range(length))


def test_orders_of_a_small_grid():
    def steps(kind, shape=(4, 4)):
        return inverse(Ordering(kind=kind).indices(shape)).reshape(shape).tolist()

    assert steps("raster", (2, 3)) == [[0, 1, 2], [3, 4, 5]]
    assert steps("column", (2, 3)) == [[0, 2, 4], [1, 3, 5]]
    assert steps("spiral", (3, 3)) == [[0, 1, 2], [7, 8, 3], [6, 5, 4]]
    assert steps("spiral-out", (3, 3)) == [[8, 7, 6], [1, 0, 5], [2, 3, 4]]
    assert steps("hilbert") == [[0, 1, 14, 15], [3, 2, 13, 12], [4, 7, 8, 11], [5, 6, 9, 10]]
    assert steps("subsampled") == [[0, 4, 1, 5], [8, 12, 9, 13], [2, 6, 3, 7], [10, 14, 11, 15]]


def test_hilbert_and_spiral_move_to_a_neighbour_each_step():
    for kind, shape in [("hilbert", (16, 16)), ("spiral", (5, 8)), ("spiral-out", (7, 4))]:
        order = Ordering(kind=kind).indices(shape)
        rows, columns = order // shape[1], order % shape[1]
        assert (rows.diff().abs() + columns.diff().abs() == 1).all(), kind


def test_subsampled_begins_with_the_coarse_grid():
    order = Ordering(kind="subsampled").indices((8, 8))
    first = order[:16]
    assert ((first // 8) % 2 == 0).all()
    assert ((first % 8) % 2 == 0).all()


def test_channels_of_a_pixel_are_generated_together():
    order = Ordering(kind="raster").indices((3, 2, 2))
    assert order.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_permutations_follow_their_seed_for_ever():
    drawn = Ordering(kind="permutation", seed=7).indices((8,)).tolist()
    assert drawn == [2, 5, 0, 6, 3, 1, 4, 7]
    one = Ordering(kind="permutation", seed=1).indices((50,))
    assert not torch.equal(one, Ordering(kind="permutation", seed=2).indices((50,)))


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="'hilbert' needs a grid"):
        Ordering(kind="hilbert").indices((16,))
    with pytest.raises(ValidationError, match=r"seed \(3\) is for kind 'permutation'"):
        Ordering(kind="raster", seed=3)
    with pytest.raises(ValidationError, match="raster"):
        Ordering.model_validate("zigzag")
    assert Ordering.model_validate("spiral").kind == "spiral"
