import numpy as np
import pytest

from chainrule.tokenizers.interface import TokenizerError
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer


def test_all_levels_lose_nothing_and_two_are_a_threshold():
    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(256, size=(5, 4, c), dtype=np.uint8) for c in (1, 3))
    lossless = PixelTokenizer(PixelSettings())
    tokens = lossless.encode([grey, colour])
    assert [t.shape for t in tokens] == [(5, 4), (3, 5, 4)]
    for image, decoded in zip((grey, colour), lossless.decode(tokens), strict=True):
        assert np.array_equal(image, decoded)
    (binary,) = PixelTokenizer(PixelSettings(levels=2)).encode([grey])
    assert np.array_equal(binary, (grey[..., 0] >= 128).astype(np.uint8))


@pytest.mark.parametrize("levels", [2, 7])
def test_random_rounding_keeps_the_mean_and_the_seed(levels):
    tokenizer = PixelTokenizer(PixelSettings(levels=levels, rounding_seed=1))
    for value in (0, 30, 128, 200, 255):
        image = np.full((200, 200, 1), value, np.uint8)
        (tokens,) = tokenizer.encode([image])
        exact = value * (levels - 1) / 255
        assert set(np.unique(tokens)) <= {int(np.floor(exact)), int(np.ceil(exact))}
        assert tokens.mean() == pytest.approx(exact, abs=4 * 0.5 / 200)
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16
    again = PixelTokenizer(PixelSettings(levels=levels, rounding_seed=1))
    other = PixelTokenizer(PixelSettings(levels=levels, rounding_seed=2))
    alone = tokenizer.encode([image])[0]
    assert np.array_equal(alone, again.encode([image * 0, image])[1])
    assert not np.array_equal(alone, other.encode([image])[0])
    assert len({t.fingerprint for t in (tokenizer, other, PixelTokenizer(PixelSettings()))}) == 3


def test_random_rounding_is_the_same_for_ever():
    image = np.full((2, 12, 1), 100, np.uint8)
    (tokens,) = PixelTokenizer(PixelSettings(levels=2, rounding_seed=0)).encode([image])
    assert "".join(map(str, tokens.ravel())) == "000110001000000111010100"


def test_other_images_are_refused():
    with pytest.raises(TokenizerError, match="this tokenizer takes uint8"):
        PixelTokenizer(PixelSettings()).encode([np.zeros((2, 2, 4), np.uint8)])
    with pytest.raises(TokenizerError, match=r"tokens of shape \(4,\)"):
        PixelTokenizer(PixelSettings()).decode([np.zeros(4, np.uint8)])
