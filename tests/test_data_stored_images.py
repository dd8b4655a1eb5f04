"""Pictures in raw shards: every value comes back, small ones cost no decoding, others read them."""

import io

import numpy as np
import pytest
from PIL import Image

from chainrule.pipeline.data.reader import Sample
from chainrule.pipeline.data.stored_images import HEADER_BYTES, SMALL, restore, shape_of, store


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (64, 64), (1, SMALL), (64, 65), (2, SMALL)])
def test_every_value_comes_back(size: tuple[int, int], channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, channels)).astype(np.uint8)
    members = store(image)
    small = size[0] * size[1] <= SMALL
    assert list(members) == [{1: "pgm", 3: "ppm"}[channels] if small else "png"]
    assert np.array_equal(Sample("0", members).image(), image)
    ((extension, data),) = members.items()
    assert shape_of(extension, data[:HEADER_BYTES]) == image.shape
    assert shape_of(extension, data[:7]) is None
    assert shape_of(extension, b"x" * HEADER_BYTES) is None


def test_a_part_of_a_picture_is_stored_as_it_looks() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3)).astype(np.uint8)
    turned = image[::-1, 2:7].transpose(1, 0, 2)
    assert np.array_equal(restore(store(turned)), turned)


@pytest.mark.parametrize("channels", [1, 3])
def test_webdataset_reads_them(channels: int) -> None:
    webdataset = pytest.importorskip("webdataset")
    image = np.random.default_rng(0).integers(0, 256, (6, 4, channels)).astype(np.uint8)
    ((extension, data),) = store(image).items()
    found = webdataset.autodecode.imagehandler("rgb8")(f"0.{extension}", data)
    assert np.array_equal(found, np.broadcast_to(image, (6, 4, 3)))
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (4, 6)


def test_sets_that_were_stored_as_png_are_read() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(buffer, "PNG")
    assert np.array_equal(restore({"png": buffer.getvalue()}), np.full((4, 4, 1), 7))


@pytest.mark.parametrize(
    ("members", "error", "said"),
    [
        ({"ppm": b"P6\n2 2\n255\n" + bytes(11)}, ValueError, ".ppm of 2x2 holds 22 bytes"),
        ({"ppm": b"P5\n2 2\n255\n" + bytes(4)}, ValueError, "not a .ppm as ingest writes it"),
        ({"pgm": b"P5\n2 2\n65535\n" + bytes(8)}, ValueError, "not a .pgm as ingest writes it"),
        ({"pgm": b""}, ValueError, "not a .pgm as ingest writes it"),
        ({"png": b"P6\n2 2\n255\n" + bytes(12)}, OSError, "cannot identify"),
        ({"txt": b"a"}, KeyError, "png"),
    ],
)
def test_damaged_ones_are_errors(
    members: dict[str, bytes], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        restore(members)
