"""What a file is to a model: its bytes as sequences of symbols, and the way back.

Every form is exact. `split` gives the items (symbol sequences in the model's generation
order) and a small `side` record; `join` gives the bytes back from the two. A file that no
form of the model fits raises `NotForModel` with the reason, and is stored without a model.

    text    UTF-8 text that the tokenizer gives back exactly; one item
    bytes   anything, for a tokenizer of kind "bytes"; one item
    image   8-bit grey or RGB PNG, PGM, PPM and uint8 .npy whose sides are multiples of the
            model's: one item a tile, row by row
    wav     16-bit mono PCM: the samples as codes, and each sample's place within its code's
            values coded uniformly (a two-part code; the second part is empty for a lossless
            tokenizer); of a header as most programs write it, the rate alone is kept

A header of PGM, PPM and .npy as most programs write it is made again, not kept.

A PNG comes back byte for byte if Pillow's encoder, at one of its levels, writes what the
original holds; otherwise with equal pixels and its other chunks kept (`exact: "pixels"`).
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.int64]


class NotForModel(Exception):
    """The model was not made for this file; the message says why."""


class Tokenizer(Protocol):
    """What coding needs of a tokenizer (`chainrule.tokenizers.interface.Tokenizer`)."""

    kind: str
    modality: str

    @property
    def vocabulary(self) -> dict[str, Any]: ...

    def encode(self, batch: Sequence[Any]) -> list[np.ndarray]: ...

    def decode(self, batch: Sequence[np.ndarray]) -> list[Any]: ...

    def card(self) -> dict[str, Any]: ...


@dataclass
class Split:
    """A file taken apart."""

    form: str
    items: list[Symbols]
    side: dict[str, Any] = field(default_factory=dict)
    """JSON values that `join` needs beside the symbols."""
    extra: bytes = b""
    """Bytes outside the coded part (headers, metadata), stored as they are."""
    places: tuple[Symbols, Symbols] | None = None
    """Second part of a two-part code: (sizes, places) with 0 <= place < size."""
    exact: str = "bytes"
    restored: bytes | None = None
    """What `join` gives, where that is not the file's bytes."""


class Adapter:
    """The forms of one model: chosen by its tokenizer's modality and kind.

    For images: `image_shape` is (H, W, C) of the model's images, `to_sequence` gives the
    symbols of a token array in the model's generation order, `to_tokens` undoes it.
    `classes`: how many classes the model has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_shape: tuple[int, int, int] | None = None,
        to_sequence: Callable[[np.ndarray], Symbols] | None = None,
        to_tokens: Callable[[Symbols], np.ndarray] | None = None,
        classes: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.classes = classes
        self.image_shape = image_shape
        self.to_sequence = to_sequence or (lambda tokens: tokens.astype(np.int64).ravel())
        self.to_tokens = to_tokens or (lambda sequence: sequence)
        self._bins: tuple[Symbols, Symbols, Symbols] | None = None

    @property
    def cut(self) -> bool:
        """Whether items may be cut into rows: yes for text and audio, no for images."""
        return self.tokenizer.modality != "image"

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that `split` gives, and `join` takes."""
        if self.tokenizer.kind == "bytes":
            return ("bytes",)
        return {"text": ("text",), "image": ("png", "pnm", "npy")}.get(
            self.tokenizer.modality, ("wav",)
        )

    def split(self, data: bytes) -> Split:
        """The file as items; NotForModel with the reason where the model is not made for it."""
        if not data:
            raise NotForModel("empty")
        if self.tokenizer.kind == "bytes":
            start, _ = self.tokenizer.vocabulary["ranges"]["text"]
            return Split("bytes", [np.frombuffer(data, dtype=np.uint8).astype(np.int64) + start])
        if self.tokenizer.modality == "text":
            return self._split_text(data)
        if self.tokenizer.modality == "image":
            return self._split_image(data)
        return self._split_wav(data)

    def join(
        self,
        form: str,
        items: list[Symbols],
        side: dict[str, Any],
        extra: bytes,
        places: Symbols | None,
    ) -> bytes:
        """The bytes of the file that `split` took apart. NotForModel for a form of other models."""
        if form not in self.forms:
            raise NotForModel(f"form {form!r} is none of this model's ({', '.join(self.forms)})")
        if form == "bytes":
            start, _ = self.tokenizer.vocabulary["ranges"]["text"]
            return (items[0] - start).astype(np.uint8).tobytes()
        if form == "text":
            return str(self.tokenizer.decode([items[0]])[0]).encode()
        if form == "wav":
            return self._join_wav(items, side, extra, places)
        return self._join_image(form, items, side, extra)

    # text

    def _split_text(self, data: bytes) -> Split:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise NotForModel("not UTF-8 text") from None
        tokens = self.tokenizer.encode([text])[0]
        if len(tokens) == 0 or self.tokenizer.decode([tokens])[0] != text:
            raise NotForModel("the tokenizer does not give this text back exactly")
        return Split("text", [np.asarray(tokens, dtype=np.int64)])

    # images

    def _split_image(self, data: bytes) -> Split:
        form, pixels, side, extra = read_image(data)
        assert self.image_shape is not None
        h, w, c = self.image_shape
        if pixels.shape[2] != c or pixels.shape[0] % h or pixels.shape[1] % w:
            raise NotForModel(
                f"{pixels.shape[0]} x {pixels.shape[1]} x {pixels.shape[2]} pixels; "
                f"the model's images are {h} x {w} x {c}"
            )
        rows, columns = pixels.shape[0] // h, pixels.shape[1] // w
        tiles = list(
            pixels.reshape(rows, h, columns, w, c).swapaxes(1, 2).reshape(rows * columns, h, w, c)
        )
        tokens = self.tokenizer.encode(tiles)
        back = self.tokenizer.decode(tokens)
        if not all(np.array_equal(a, b) for a, b in zip(tiles, back, strict=True)):
            raise NotForModel(f"the tokenizer ({self.tokenizer.kind}) is lossy for this image")
        side["tiles"] = [rows, columns]
        split = Split(form, [self.to_sequence(t) for t in tokens], side, extra)
        if form == "png" and side["level"] is None:
            split.exact = "pixels"
            split.restored = self._join_image(form, split.items, side, extra)
        return split

    def _join_image(
        self, form: str, items: list[Symbols], side: dict[str, Any], extra: bytes
    ) -> bytes:
        rows, columns = side["tiles"]
        tiles = np.stack(self.tokenizer.decode([self.to_tokens(item) for item in items]))
        h, w, c = tiles.shape[1:]
        pixels = tiles.reshape(rows, columns, h, w, c).swapaxes(1, 2)
        return write_image(form, pixels.reshape(rows * h, columns * w, c), side, extra)

    # audio

    def _code_bins(self) -> tuple[Symbols, Symbols, Symbols]:
        """Each int16 value's code; the values sorted by code; each code's first place there."""
        if self._bins is None:
            values = np.arange(-(1 << 15), 1 << 15, dtype=np.int16)
            code = np.asarray(self.tokenizer.encode([values])[0], dtype=np.int64)
            if code.shape != values.shape:
                raise NotForModel("the tokenizer does not code sample by sample")
            order = np.argsort(code, kind="stable")
            first = np.searchsorted(code[order], np.arange(int(code.max()) + 2))
            self._bins = code, order - (1 << 15), first
        return self._bins

    def _split_wav(self, data: bytes) -> Split:
        head, samples, tail, rate = read_wav(data)
        expected = self.tokenizer.card().get("sample_rate", rate)
        if rate != expected:
            raise NotForModel(f"{rate} Hz; the model's audio has {expected} Hz")
        tokens = self.tokenizer.encode([samples])[0]
        symbols = np.asarray(tokens, dtype=np.int64)
        if head + tail == _wav_header(rate, len(samples)):
            split = Split("wav", [symbols], {"rate": rate, "parts": 1})
        else:
            split = Split("wav", [symbols], {"head": len(head), "parts": 1}, head + tail)
        if not np.array_equal(self.tokenizer.decode([tokens])[0], samples):
            _, values, first = self._code_bins()
            rank = np.empty(1 << 16, dtype=np.int64)
            rank[values + (1 << 15)] = np.arange(1 << 16)
            places = rank[samples.astype(np.int64) + (1 << 15)] - first[symbols]
            split.places = (first[symbols + 1] - first[symbols], places)
            split.side["parts"] = 2
        return split

    def place_sizes(self, symbols: Symbols) -> Symbols:
        """How many sample values share each symbol (the second part of the code)."""
        _, _, first = self._code_bins()
        return first[symbols + 1] - first[symbols]

    def _join_wav(
        self, items: list[Symbols], side: dict[str, Any], extra: bytes, places: Symbols | None
    ) -> bytes:
        if places is None:
            samples = np.asarray(self.tokenizer.decode([items[0]])[0]).astype("<i2")
        else:
            _, values, first = self._code_bins()
            samples = values[first[items[0]] + places].astype("<i2")
        if "rate" in side:
            return write_wav(samples, side["rate"])
        return extra[: side["head"]] + samples.tobytes() + extra[side["head"] :]


# files of pixels


def read_image(data: bytes) -> tuple[str, npt.NDArray[np.uint8], dict[str, Any], bytes]:
    """(form, pixels (H, W, C) uint8, side, extra); NotForModel for what is not exact 8-bit."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png(data)
    pnm = re.match(rb"P([56])\s(?:#[^\n]*\n)*\s*(\d+)\s+(\d+)\s+(\d+)\s", data)
    if pnm:
        channels = 1 if pnm[1] == b"5" else 3
        width, height, top = int(pnm[2]), int(pnm[3]), int(pnm[4])
        body = data[pnm.end() :]
        if top != 255 or len(body) != width * height * channels or not body:
            raise NotForModel("a PNM of other than 8 bits, or with bytes after its pixels")
        pixels = np.frombuffer(body, dtype=np.uint8).reshape(height, width, channels)
        head = data[: pnm.end()]
        return "pnm", pixels, {}, b"" if head == _pnm_header(pixels) else head
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(data)
    raise NotForModel("not an image of a lossless form (PNG, PGM, PPM, .npy)")


def write_image(
    form: str, pixels: npt.NDArray[np.uint8], side: dict[str, Any], extra: bytes
) -> bytes:
    if form == "png":
        return _write_png(pixels, side["level"], extra)
    if form == "npy":
        pixels = pixels.reshape(side["shape"])
        return (extra or _npy_header(pixels)) + pixels.tobytes()
    return (extra or _pnm_header(pixels)) + pixels.tobytes()


def _pnm_header(pixels: npt.NDArray[np.uint8]) -> bytes:
    """As most programs write it: kept in a file only where it is another."""
    height, width, channels = pixels.shape
    return b"P%d\n%d %d\n255\n" % (5 if channels == 1 else 6, width, height)


def _npy_header(array: npt.NDArray[np.uint8]) -> bytes:
    """As numpy writes it: kept in a file only where it is another."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    return stream.getvalue()


def _read_npy(data: bytes) -> tuple[str, npt.NDArray[np.uint8], dict[str, Any], bytes]:
    stream = io.BytesIO(data)
    try:
        array = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        raise NotForModel("a .npy that cannot be read") from None
    body = array.nbytes
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.size == 0:
        raise NotForModel(f"a .npy of {array.dtype} {array.shape}; images are uint8 (H, W[, C])")
    if not array.flags.c_contiguous or stream.tell() != len(data):
        raise NotForModel("a .npy in Fortran order, or with bytes after its array")
    pixels = array if array.ndim == 3 else array[:, :, None]
    head = data[: len(data) - body]
    extra = b"" if head == _npy_header(array) else head
    return "npy", pixels, {"shape": list(array.shape)}, extra


def _read_png(data: bytes) -> tuple[str, npt.NDArray[np.uint8], dict[str, Any], bytes]:
    from PIL import Image

    chunks = list(_png_chunks(data))
    header = chunks[0][1] if chunks and chunks[0][0] == b"IHDR" else b""
    if len(header) != 13:
        raise NotForModel("a PNG without a header")
    depth, colour, interlace = header[8], header[9], header[12]
    others = [(kind, body) for kind, body in chunks if kind not in (b"IHDR", b"IDAT", b"IEND")]
    if depth != 8 or colour not in (0, 2) or interlace or any(k == b"tRNS" for k, _ in others):
        raise NotForModel("a PNG that is not plain 8-bit grey or RGB")
    try:
        with Image.open(io.BytesIO(data)) as image:
            array = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise NotForModel("a PNG that cannot be read") from None
    pixels = array if array.ndim == 3 else array[:, :, None]
    if pixels.dtype != np.uint8 or pixels.size == 0:
        raise NotForModel("a PNG without pixels")
    extra = b"".join(_png_chunk(kind, body) for kind, body in others)
    level = next((n for n in range(10) if _write_png(pixels, n, extra) == data), None)
    return "png", pixels, {"level": level}, extra


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        chunks.append((kind, body))
        at += 12 + length
    if at != len(data) or not chunks or chunks[-1][0] != b"IEND":
        raise NotForModel("a PNG that is cut, or with bytes after its end")
    return chunks


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _write_png(pixels: npt.NDArray[np.uint8], level: int | None, extra: bytes) -> bytes:
    """Pillow's PNG at `level` (None: 6), with the chunks `extra` put back after the header."""
    from PIL import Image

    stream = io.BytesIO()
    array = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(array).save(stream, "PNG", compress_level=6 if level is None else level)
    data = stream.getvalue()
    after_header = 8 + 12 + 13
    return data[:after_header] + extra + data[after_header:]


# files of samples


def write_wav(samples: np.ndarray, rate: int) -> bytes:
    """int16 (T,) as 16-bit mono PCM behind the plainest header."""
    return _wav_header(rate, len(samples)) + samples.astype("<i2").tobytes()


def _wav_header(rate: int, samples: int) -> bytes:
    """44 bytes: RIFF, fmt, data."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16)
    size = 2 * samples
    riff = struct.pack("<4sI4s", b"RIFF", 36 + size, b"WAVE")
    return riff + form + struct.pack("<4sI", b"data", size)


def read_wav(data: bytes) -> tuple[bytes, npt.NDArray[np.int16], bytes, int]:
    """(bytes before the samples, samples, bytes after, sample rate) of 16-bit mono PCM."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise NotForModel("not a WAV file")
    at, rate = 12, None
    while at + 8 <= len(data):
        kind, (length,) = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])
        body = at + 8
        if kind == b"fmt " and length >= 16 and body + 16 <= len(data):
            tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", data[body : body + 16])
            if tag != 1 or channels != 1 or bits != 16:
                raise NotForModel(f"WAV format {tag}, {channels} channels, {bits} bits")
        if kind == b"data":
            length = min(length, len(data) - body) // 2 * 2
            if rate is None or length == 0:
                raise NotForModel("a WAV file without samples or without a format")
            samples = np.frombuffer(data[body : body + length], dtype="<i2").astype(np.int16)
            return data[:body], samples, data[body + length :], rate
        at = body + length + length % 2
    raise NotForModel("a WAV file without samples")
