"""What is done to pictures of every kind, and which are refused."""

import io
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image

from chainrule.pipeline.data.images import Pictures
from chainrule.pipeline.data.sources import Unreadable

GRADIENT = np.add.outer(np.arange(6) * 20, np.arange(8) * 10).astype(np.uint8)
COLOURS = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], axis=2)


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def png(
    width: int, height: int, bits: int, row: bytes, colour: int = 0, transparent: bytes = b""
) -> bytes:
    """A PNG of one row of pixels; `colour` is 0 for grey, 2 for RGB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)),
            chunk(b"tRNS", transparent) if transparent else b"",
            chunk(b"IDAT", zlib.compress(b"\x00" + row)),
            chunk(b"IEND", b""),
        ]
    )


def decode(data: bytes, **settings: object) -> np.ndarray:
    return Pictures(kind="test", **settings).decode(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "shape"), [(3, (6, 8, 3)), (1, (6, 8, 1)), (None, (6, 8, 1))])
def test_grey(channels: int | None, shape: tuple[int, ...]) -> None:
    image = decode(encoded(Image.fromarray(GRADIENT)), channels=channels)
    assert image.shape == shape
    assert (image == GRADIENT[..., None]).all()


def test_colours_to_grey_by_luma() -> None:
    image = decode(encoded(Image.fromarray(COLOURS)), channels=1)
    luma = COLOURS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(image[..., 0] - luma).max() <= 1
    assert np.array_equal(decode(encoded(Image.fromarray(COLOURS)), channels=None), COLOURS)


def test_transparent_pictures_are_laid_over_white() -> None:
    alpha = np.full((6, 8), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    image = decode(encoded(Image.fromarray(np.dstack([COLOURS, alpha]))))
    assert (image[0] == 255).all()
    half = COLOURS[1] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(image[1] - half).max() <= 1
    assert np.array_equal(image[2:], COLOURS[2:])
    grey = decode(encoded(Image.fromarray(np.dstack([GRADIENT, alpha]))), channels=None)
    assert grey.shape == (6, 8, 1)
    assert (grey[0] == 255).all()


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 0, 0, 250])
    palette.putdata([0, 1])
    assert decode(encoded(palette)).tolist() == [[[200, 10, 20], [0, 0, 250]]]
    assert decode(encoded(palette, transparency=1)).tolist() == [[[200, 10, 20], [255, 255, 255]]]
    assert decode(encoded(palette, "GIF", transparency=1))[0, 1].tolist() == [255, 255, 255]


def test_sixteen_bits_are_scaled() -> None:
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(wide)), channels=1)
    assert image[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    image = decode(encoded(Image.fromarray(wide), "TIFF"), channels=1)
    assert image[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


def test_sixteen_bit_colour() -> None:
    """Pillow writes none, so one by hand: 1 x 1, 16 bits, RGB."""
    image = decode(png(1, 1, 16, struct.pack(">HHH", 65535, 0x8000, 0), colour=2))
    assert image.tolist() == [[[255, 128, 0]]]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_value_of_grey_is_white(bits: int) -> None:
    values = [0, 100, 101, 200]
    row = struct.pack(">4B" if bits == 8 else ">4H", *values)
    image = decode(png(4, 1, bits, row, transparent=struct.pack(">H", 101)), channels=None)
    opaque = values if bits == 8 else [(value * 255 + 32767) // 65535 for value in values]
    assert image[0, :, 0].tolist() == [*opaque[:2], 255, opaque[3]]


def test_cmyk_is_converted() -> None:
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 1] = 255  # magenta ink
    image = decode(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF"))
    assert image.shape == (8, 8, 3)
    assert image[0, 0].tolist() == [255, 0, 255]
    image = decode(encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100))
    assert np.abs(image[0, 0].astype(int) - [255, 0, 255]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(GRADIENT)
    turned = {
        2: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: picture.transpose(Image.Transpose.ROTATE_180),
        4: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: picture.transpose(Image.Transpose.TRANSPOSE),
        6: picture.transpose(Image.Transpose.ROTATE_90),
        7: picture.transpose(Image.Transpose.TRANSVERSE),
        8: picture.transpose(Image.Transpose.ROTATE_270),
    }.get(orientation, picture)
    image = decode(encoded(turned, exif=exif), channels=1)
    assert np.array_equal(image[..., 0], GRADIENT)
    tagged = encoded(turned, "TIFF", tiffinfo={0x0112: orientation})
    assert np.array_equal(decode(tagged, channels=1)[..., 0], GRADIENT)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_a_damaged_tag_of_exif_does_not_lose_the_picture(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.5  # orientation; horizontal resolution, a fraction
    picture = Image.fromarray(COLOURS)
    whole = encoded(picture, format, exif=exif)
    for order in ("<", ">"):
        fraction = struct.pack(f"{order}HH", 0x011A, 5)
        at = whole.find(fraction)
        if at >= 0:
            text = struct.pack(f"{order}HH", 0x011A, 2)
            damaged = whole[:at] + text + whole[at + 4 :]
    assert damaged != whole
    assert np.array_equal(decode(damaged), decode(whole))
    assert decode(damaged).shape == (8, 6, 3)


def test_tags_of_tiff_of_another_type_or_past_64_bits() -> None:
    whole = encoded(Image.fromarray(GRADIENT), "TIFF")
    offsets = struct.pack("<HHI", 273, 4, 1)  # StripOffsets, LONG
    at = whole.index(offsets)
    for kind in (2, 5, 11, 12):  # as text, a fraction, a float, a double
        with pytest.raises(Unreadable, match="damaged"):
            decode(whole[:at] + struct.pack("<HHI", 273, kind, 1) + whole[at + 8 :])
    for offset in (2**63, 2**64 - 1):
        with pytest.raises(Unreadable):
            decode(b"II\x2b\0\x08\0\0\0" + struct.pack("<Q", offset) + bytes(100))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((0, 0, 0), (255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert (decode(data) == 0).all()


def test_crop_keeps_proportions_and_stretch_does_not() -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    data = encoded(Image.fromarray(wide))
    assert (decode(data, size=10) == 255).mean() > 0.8
    assert decode(data, size=(5, 15)).shape == (5, 15, 3)
    stretched = decode(data, size=12, resize="stretch")
    assert stretched.shape == (12, 12, 3)
    assert 0.25 < (stretched > 128).mean() < 0.42


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_pictures_are_unreadable(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = encoded(Image.fromarray(noise), format)
    assert decode(whole).shape == (64, 64, 3)
    for kept in (0, 1, 20, len(whole) // 2, len(whole) - 200):
        with pytest.raises(Unreadable):
            decode(whole[:kept])


def test_damaged_bytes_never_get_past_as_another_error() -> None:
    generator = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        whole = np.frombuffer(encoded(Image.fromarray(COLOURS), format), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            spots = generator.integers(0, len(whole), 4)
            damaged[spots] = generator.integers(0, 256, 4)
            try:
                image = decode(damaged.tobytes(), max_pixels=100_000)
            except Unreadable:
                continue
            assert image.dtype == np.uint8
            assert image.ndim == 3


def test_decompression_bombs_are_refused_unopened() -> None:
    bomb = encoded(Image.new("1", (5000, 5000)))
    assert len(bomb) < 10_000
    with pytest.raises(Unreadable, match=r"too large: 5000 x 5000 pixels, max_pixels 1000000"):
        decode(bomb, max_pixels=1_000_000)
    with pytest.raises(Unreadable, match="too large: over twice max_pixels 1000000"):
        decode(png(50_000, 50_000, 8, b""), max_pixels=1_000_000)


@pytest.mark.slow
def test_max_pixels_decides_and_not_pillow_s_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    large = encoded(Image.new("1", (9500, 9500)))
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS < 9500**2
    assert decode(large, channels=1, size=2).shape == (2, 2, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        data = encoded(Image.new("RGB", (60, 50)), format)
        assert decode(data, max_pixels=3000).shape == (50, 60, 3)
        with pytest.raises(Unreadable, match="too large: 60 x 50 pixels, max_pixels 2999"):
            decode(data, max_pixels=2999)
    shapes: list[tuple[int, ...]] = []
    threads = [
        threading.Thread(
            target=lambda n=n: shapes.append(decode(large, max_pixels=n, size=2).shape)
        )
        for n in (9500**2, 10**8, 10**9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shapes == [(2, 2, 3)] * 3
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_other_files_and_ranges_are_refused() -> None:
    with pytest.raises(Unreadable, match="not a picture of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(Unreadable, match="no stated range"):
        decode(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))
    with pytest.raises(Unreadable, match="outside 0..65535"):
        decode(encoded(Image.fromarray(np.full((2, 2), -5, np.int32)), "TIFF"))
