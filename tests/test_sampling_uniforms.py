"""The counter-based generator: known answers, and independence of everything but coordinates."""

import numpy as np
import pytest

from chainrule.pipeline.sampling.uniforms import (
    LANE_ACCEPT,
    philox,
    sample_seeds,
    uniforms,
)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # Random123, tests/kat_vectors, philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert philox(np.array(counter), np.array(key)).tolist() == expected


def test_a_number_depends_on_its_coordinates_alone() -> None:
    seeds = sample_seeds(3, np.arange(40))
    whole = uniforms(seeds[:, None], np.arange(30)[None])
    assert uniforms(seeds[17], 21) == whole[17, 21]
    np.testing.assert_array_equal(uniforms(seeds[10:20, None], np.arange(30)), whole[10:20])


def test_uniform_independent_and_open() -> None:
    seeds = sample_seeds(0, np.arange(1000))
    u = uniforms(seeds[:, None], np.arange(100)[None])
    assert u.min() > 0
    assert u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 90  # 49 degrees of freedom: P < 0.0003
    accept = uniforms(seeds[:, None], np.arange(100)[None], LANE_ACCEPT)
    assert abs(np.corrcoef(u.ravel(), accept.ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.015
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.015


def test_runs_share_no_seed() -> None:
    runs = [set(sample_seeds(seed, np.arange(5000)).tolist()) for seed in (0, 1, 2**40)]
    assert all(len(run) == 5000 for run in runs)
    assert len(set.union(*runs)) == 15000
    assert min(min(run) for run in runs) >= 0
