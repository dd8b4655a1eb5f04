"""Copies are found, strangers are not."""

import numpy as np

from chainrule.pipeline.sampling.memory import RUNS, copied, nearest


def test_nearest_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    training = rng.integers(0, 256, (5000, 4, 4, 1), dtype=np.uint8)
    samples = rng.integers(0, 256, (7, 4, 4, 1), dtype=np.uint8)
    samples[3] = training[4321]
    found = nearest(samples, training, k=3)
    difference = samples[:, None].astype(float) - training[None]
    distance = np.sqrt((difference**2).mean(axis=(2, 3, 4)))
    order = np.argsort(distance, axis=1)[:, :3]
    np.testing.assert_array_equal(found.index, order)
    np.testing.assert_allclose(found.distance, np.take_along_axis(distance, order, 1), atol=0.05)
    assert found.index[3, 0] == 4321
    in_parts = nearest(samples, (training[start : start + 70] for start in range(0, 5000, 70)))
    np.testing.assert_array_equal(in_parts.index, order)
    few = nearest(samples, iter([training[:1], training[1:2]]))
    np.testing.assert_array_equal(few.index, np.argsort(distance[:, :2], axis=1))
    assert found.distance[3, 0] < 0.05


def test_copied_text_is_found_with_its_place_and_length() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzäß \n"))
    training = ["".join(rng.choice(letters, 4000)) for _ in range(20)]
    stolen = training[7][1000:1070]
    texts = ["".join(rng.choice(letters, 200)), "".join(rng.choice(letters, 50)) + stolen, "x"]
    first, second, third = copied(texts, training)
    assert (first.longest, first.spans) == (0, [])
    assert second.longest == max(run for run in RUNS if run <= 70)
    (start, stop), *more = second.spans
    assert not more
    assert start <= 50
    assert stop == 120
    assert texts[1][start:stop].endswith(stolen)
    assert (third.longest, third.spans) == (0, [])


def test_two_training_texts_do_not_join() -> None:
    a, b = "abcdefghijklmnopqrst", "0123456789ABCDEFGHIJ"
    assert copied([a[-10:] + b[:10]], [a, b])[0].longest == 0
    assert copied([a], [a, b])[0].spans == [(0, 20)]
    assert copied([a], [])[0].longest == 0
