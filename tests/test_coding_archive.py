"""Any file in, the same file out: forms, fallbacks, damage, other machines."""

import hashlib
import io
import struct
import wave
import zlib
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from chainrule.pipeline.coding import container
from chainrule.pipeline.coding.archive import pack, unpack
from chainrule.pipeline.coding.blocks import Layout
from chainrule.pipeline.coding.entropy import CodingError
from chainrule.pipeline.coding.forms import Adapter, NotForModel
from chainrule.pipeline.coding.header import (
    _DICTIONARY,
    LARGEST_HEADER,
    WORDS,
    ContainerError,
    Entry,
    Header,
    _typical,
    fold_header,
    unfold_header,
)
from chainrule.pipeline.models.contract import Autoregressive, Conditional, Cursor
from chainrule.tokenizers.bytes import ByteTokenizer
from chainrule.tokenizers.mulaw import MuLawSettings, MuLawTokenizer
from chainrule.tokenizers.pixels import PixelSettings, PixelTokenizer
from chainrule.tokenizers.text import SentencePieceSettings, SentencePieceTokenizer


class Decaying(Conditional):
    """A discretised Laplace around the last symbol: sharp on smooth data, never zero."""

    def __init__(self, centre: torch.Tensor, size: int, mixed: float) -> None:
        distance = (torch.arange(size) - centre.unsqueeze(-1)).abs().float()
        peaked = torch.softmax(-distance / 2, dim=-1)
        self.logits = ((1 - mixed) * peaked + mixed / size).log()
        self.shape = centre.shape

    def log_prob(self, x):
        return self.logits.gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def pmf(self):
        return self.logits.exp()

    def sample(self, generator=None, temperature=1.0, top_k=None, top_p=None):
        return self.logits.argmax(-1)


class Smooth(Autoregressive):
    """The next symbol is near the one `lag` before it: an honest model of walks and tones."""

    def __init__(
        self, size: int, event_shape: tuple[int, ...], mixed: float = 0.1, lag: int = 1
    ) -> None:
        super().__init__()
        self.size, self.event_shape, self.lag = size, event_shape, lag
        self.mixed = torch.nn.Parameter(torch.tensor(mixed), requires_grad=False)

    def conditionals(self, x, cond=None):
        raise NotImplementedError

    def cursor(self, batch, cond=None):
        return SmoothCursor(self, batch)


class SmoothCursor(Cursor):
    def __init__(self, model, batch):
        self.model = model
        self.seen = torch.zeros(batch, model.lag, dtype=torch.long)

    @property
    def position(self):
        return self.seen.shape[1] - self.model.lag

    @property
    def next(self):
        return Decaying(self.seen[:, -self.model.lag], self.model.size, float(self.model.mixed))

    def advance(self, x):
        self.seen = torch.cat([self.seen, x], dim=1)
        return self.next

    def rewind(self, n):
        raise NotImplementedError

    @property
    def nbytes(self):
        return self.seen.nbytes


def bytes_model():
    return Smooth(258, (64,)), Adapter(ByteTokenizer())


def image_model(channels: int):
    shape = (8, 8) if channels == 1 else (3, 8, 8)
    model = Smooth(256, shape)
    model.to_sequence = lambda x: x.flatten(1).flip(1)  # an order of its own
    model.to_event = lambda s: s.flip(1).reshape(len(s), *shape)
    return model, Adapter(
        PixelTokenizer(PixelSettings()),
        (8, 8, channels),
        lambda t: t.astype(np.int64).ravel()[::-1].copy(),
        lambda s: s[::-1].reshape(shape),
    )


def through_a_container(tmp_path, model, adapter, files, **layout):
    header, streams, reports = pack(model, adapter, files, Layout(**layout))
    path = tmp_path / "files.cr"
    container.write(path, header, streams)
    back = unpack(container.read(path), model, adapter)
    assert [name for name, _ in back] == [name for name, _ in files]
    return back, reports


def png(array: np.ndarray, level: int = 6) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", compress_level=level)
    return stream.getvalue()


def wav(samples: np.ndarray, rate: int = 8000, channels: int = 1) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()


def walk(n: int, seed: int = 0) -> np.ndarray:
    """A random walk in 0..255: near the last value, and nothing that zstd could repeat."""
    steps = np.random.default_rng(seed).integers(-2, 3, n)
    return np.abs((128 + np.cumsum(steps)) % 510 - 255).astype(np.uint8)


def test_any_bytes_come_back(tmp_path):
    rng = np.random.default_rng(0)
    files = [
        ("empty", b""),
        ("one", b"\x00"),
        ("all", bytes(range(256)) * 3),
        ("walk", walk(2000).tobytes()),
        ("short", walk(150).tobytes()),
        ("noise", rng.bytes(1000)),
        ("run", b"\xff" * 3000),
        ("text", "grüße, 世界\u2581\r\n\0".encode() * 20),
    ]
    back, reports = through_a_container(tmp_path, *bytes_model(), files, rows=4, least_row=100)
    assert back == files
    how = {r.name: r.how for r in reports}
    assert how["walk"] == how["short"] == "model (bytes)"
    assert how["empty"] == "raw"  # zstd of nothing is larger than nothing
    assert how["noise"] == "raw"  # neither the model nor zstd gains on it
    assert how["run"] == "zstd"
    for r in reports:
        if r.ideal_bytes is not None:
            assert r.coded_bytes <= r.ideal_bytes * 1.001 + 64
        else:
            assert r.why


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back(tmp_path, channels):
    model, adapter = image_model(channels)
    pixels = walk(24 * 16 * channels).reshape(24, 16, channels)
    flat = pixels[:, :, 0] if channels == 1 else pixels
    buffer = io.BytesIO()
    np.save(buffer, flat)
    pnm = b"P%d\n# a comment\n16 24\n255\n" % (5 if channels == 1 else 6) + flat.tobytes()
    cut = png(flat)[:-20]
    # a PNG of an encoder that Pillow cannot imitate (one filter, zlib 1), with a text chunk
    foreign = _foreign_png(flat)
    odd = np.zeros((9, 8) if channels == 1 else (9, 8, 3), dtype=np.uint8)
    files = [
        ("a.png", png(flat)),
        ("b.png", png(flat, level=1)),
        ("c.pnm", pnm),
        ("d.npy", buffer.getvalue()),
        ("e.png", foreign),
        ("f.png", cut),
        ("g.png", png(odd)),
        ("h.txt", b"no image"),
        ("i.npy", b"\x93NUMPY" + bytes(40)),
    ]
    back, reports = through_a_container(tmp_path, model, adapter, files, rows=3)
    by_name = dict(back)
    for name, data in files:
        if name != "e.png":
            assert by_name[name] == data, name
    assert [r.how.startswith("model") for r in reports] == [True] * 5 + [False] * 4
    assert [r.exact for r in reports[:5]] == ["bytes"] * 4 + ["pixels"]
    with Image.open(io.BytesIO(by_name["e.png"])) as image:
        np.testing.assert_array_equal(np.asarray(image), flat)
        assert image.text == {"Title": "kept"}


def _foreign_png(array: np.ndarray) -> bytes:
    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    h, w = array.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    colour = 0 if array.ndim == 2 else 2
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, colour, 0, 0, 0))
        + chunk(b"tEXt", b"Title\0kept")
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_recordings_come_back_to_the_sample(tmp_path, bits):
    tokenizer = MuLawTokenizer(MuLawSettings(bits=bits), sample_rate=8000)
    model = Smooth(256, (100,), lag=bits // 8)
    t = np.arange(900)
    rng = np.random.default_rng(0)
    tone = (9000 * np.sin(t / 40) + rng.normal(0, 300, 900)).astype(np.int16)
    extremes = np.array([-32768, 32767, 0, -1, 1] * 50, dtype=np.int16)
    listed = wav(tone)[:-6] + struct.pack("<h", 5)  # cut within its last samples
    files = [
        ("tone.wav", wav(tone)),
        ("extremes.wav", wav(extremes)),
        ("tail.wav", wav(tone) + b"LIST\x04\0\0\0abcd"),
        ("cut.wav", listed),
        ("stereo.wav", wav(tone, channels=2)),
        ("fast.wav", wav(tone, rate=44100)),
        ("empty.wav", wav(tone[:0])),
    ]
    back, reports = through_a_container(tmp_path, model, Adapter(tokenizer), files)
    assert back == files
    assert reports[0].how == "model (wav)"
    header = container.read(tmp_path / "files.cr").header
    extras = {entry.name: entry.extra for entry in header.entries}
    assert extras["tone.wav"] == 0
    assert extras["tail.wav"] == 44 + 12
    assert reports[0].coded_bytes <= reports[0].ideal_bytes * 1.001 + 64
    assert [r.how.startswith("model") for r in reports[4:]] == [False] * 3
    assert "44100 Hz" in reports[5].why


def test_a_lossy_tokenizer_falls_back(tmp_path):
    model = Smooth(4, (8, 8))
    adapter = Adapter(PixelTokenizer(PixelSettings(levels=4)), (8, 8, 1), None,
                      lambda s: s.reshape(8, 8))  # fmt: skip
    lossy = png(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    kept = png(np.full((8, 8), 255, dtype=np.uint8))
    back, reports = through_a_container(
        tmp_path, model, adapter, [("a.png", lossy), ("b.png", kept)]
    )
    assert back == [("a.png", lossy), ("b.png", kept)]
    assert "lossy" in reports[0].why
    assert reports[1].how == "model (png)"


@pytest.mark.parametrize("normalization", ["identity", "nfkc"])
def test_text_through_sentencepiece_is_exact_or_not_for_the_model(normalization):
    settings = SentencePieceSettings(vocabulary_size=300, normalization=normalization)
    corpus = ["def f(x):\n    return x\n", "the words that it learned, and spaces  too. "] * 50
    tokenizer = SentencePieceTokenizer.train(settings, corpus)
    adapter = Adapter(tokenizer)
    texts = [corpus[0], corpus[1] * 3, "\u2581 \r\n\0 ü 世界 \ufffd", " ", "ﬁ \u00a0x"]
    exact = []
    for text in texts:
        data = text.encode()
        try:
            split = adapter.split(data)
        except NotForModel as reason:
            exact.append(False)
            assert "exactly" in str(reason)  # noqa: PT017
            continue
        exact.append(True)
        assert adapter.join(split.form, split.items, split.side, split.extra, None) == data
    assert exact == [True] * 4 + [normalization == "identity"]
    with pytest.raises(NotForModel, match="UTF-8"):
        adapter.split(b"\xff\xfe")


# --- the container's own bytes ----------------------------------------------------------------

GPU = {
    "threads": 72,
    "device": "cuda",
    "accelerator": "NVIDIA H100 80GB HBM3",
    "machine": "aarch64",
    "instructions": "SVE128",
    "torch": "2.9.1+cu128",
    "numpy": "2.3.5",
    "constriction": "0.4.2",
}


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def one_of_each():
    """(model, adapter, file) of every form, each as its usual programs write it."""
    grey, colours = image_model(1), image_model(3)
    tone = np.random.default_rng(0).normal(9000 * np.sin(np.arange(900) / 40), 300)
    recording = wav(tone.astype(np.int16))
    yield "bytes", *bytes_model(), ("a note.txt", walk(700).tobytes())
    yield "a byte", *bytes_model(), ("x", walk(1).tobytes())
    yield "grey png", *grey, ("00001.png", png(walk(64).reshape(8, 8)))
    yield "png of tiles", *grey, ("00001.png", png(walk(576).reshape(24, 24), level=9))
    yield "colour png", *colours, ("00001.png", png(walk(192).reshape(8, 8, 3)))
    yield "npy", *colours, ("00001.npy", npy(walk(192).reshape(8, 8, 3)))
    yield "ppm", *colours, ("1.ppm", b"P6\n8 8\n255\n" + walk(192).tobytes())
    for bits in (8, 16):
        tokenizer = MuLawTokenizer(MuLawSettings(bits=bits), sample_rate=8000)
        model = Smooth(256, (100,), lag=bits // 8)
        yield f"wav {bits}", model, Adapter(tokenizer), ("00001.wav", recording)


@pytest.mark.slow
@pytest.mark.parametrize("contract", [{}, GPU], ids=["here", "gpu"])
def test_the_container_of_one_file_is_the_models_bits_and_64_bytes(tmp_path, contract):
    path = tmp_path / "one.cr"
    for what, model, adapter, (name, data) in one_of_each():
        header, streams, [report] = pack(model, adapter, [(name, data)], Layout())
        header.contract.update(contract)
        size = container.write(path, header, streams)
        assert size == path.stat().st_size
        if what != "a byte":
            assert report.how.startswith("model"), what
        ideal = report.coded_bytes if report.ideal_bytes is None else report.ideal_bytes
        assert size <= 1.001 * ideal + 64 + len(name.encode()), what
        assert container.read(path).header.contract == header.contract
        assert unpack(container.read(path), model, adapter) == [(name, data)]


@pytest.mark.slow
def test_a_container_of_many_files_adds_a_few_bytes_to_each(tmp_path):
    pictures = [(f"{i:08d}.png", png(walk(64, i).reshape(8, 8))) for i in range(300)]
    recordings = [(f"{i:08d}.txt", walk(300 + i, i).tobytes()) for i in range(300)]
    path = tmp_path / "many.cr"
    for (model, adapter), files in (
        (image_model(1), pictures),
        (bytes_model(), recordings),
    ):
        header, streams, reports = pack(model, adapter, files, Layout())
        size = container.write(path, header, streams)
        assert unpack(container.read(path), model, adapter) == files
        assert sum(r.how.startswith("model") for r in reports) > 290
        beside = size - sum(r.coded_bytes for r in reports)
        assert beside <= 64 + 6 * len(files)  # names included


def test_headers_of_every_kind_are_read_as_they_were_written():
    entries = [
        Entry("a/b c\udcff.bin", 0, "raw"),
        Entry("", 7, "zstd"),
        Entry("ü", 1 << 40, "model", "png", "pixels", {"level": None, "x": [1, "y"]}, 9, [5, 0]),
        Entry("ü", 3, "model", "png", "pixels", {"level": None, "x": [1, "y"]}, 0, [1 << 50]),
    ]
    streams = [(b"", b"", b""), (b"zz", b"", b""), (b"s", b"places", b"e"), (b"", b"", b"")]
    for changed in ({}, GPU, {"torch": "2.14.0a0+git123", "accelerator": "an own", "dtype": "x"}):
        contract = {**GPU, "dtype": "bfloat16", "device": "cpu", "accelerator": "", **changed}
        for classes in ([[], []], [[3, -1], [0]]):
            entries[2].classes, entries[3].classes = classes
            layout = Layout(rows=3, adapt={"every": 7}).model_dump(mode="json")
            header = Header(contract, layout, [0, 65535, 7], entries, folder="runs/x/model")
            read, parts = unfold_header(fold_header(header, streams) + b"zzsplacese")
            assert read == header
            assert parts == streams
    with pytest.raises(ContainerError, match="no file name"):
        fold_header(Header(contract, {}, [], [Entry("a\0b", 0, "raw")]), [(b"", b"", b"")])


def test_the_dictionary_of_format_3_stays_what_it_is():
    """Another dictionary reads other headers: a change of it is another `FORMAT`."""
    assert container.FORMAT == 3
    digest = hashlib.sha256(repr((WORDS, _DICTIONARY)).encode()).hexdigest()
    assert digest[:16] == "eae58c185fcf0468"


def test_other_formats_are_refused_by_name(tmp_path):
    _, _, path = packed(tmp_path)
    good = path.read_bytes()
    for written in (2, 7):
        path.write_bytes(good[:4] + bytes([written]) + good[5:])
        with pytest.raises(ContainerError, match=f"format {written}; this version reads 3"):
            container.read(path)
    path.write_bytes(b"\x89CRL\r\n\x1a\n" + bytes(100))
    with pytest.raises(ContainerError, match="format 1; this version reads 3"):
        container.read(path)


def packed(tmp_path):
    model, adapter = bytes_model()
    data = walk(400).tobytes()
    header, streams, _ = pack(model, adapter, [("a", data), ("b", b"\0" * 900)], Layout())
    path = tmp_path / "good.cr"
    container.write(path, header, streams)
    return model, adapter, path


def test_every_damaged_container_is_refused(tmp_path):
    model, adapter, path = packed(tmp_path)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad.cr"
    cases = [good[:n] for n in range(0, len(good), 7)] + [b"", b"PK\x03\x04", good + b"\0"]
    for _ in range(300):
        flipped = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            flipped[rng.integers(len(good))] ^= 1 << int(rng.integers(8))
        cases.append(bytes(flipped))
    refused = 0
    for case in cases:
        if case == good:  # two flips of one bit
            continue
        bad.write_bytes(case)
        with pytest.raises(ContainerError, match="bad.cr"):
            unpack(container.read(bad), model, adapter)
        refused += 1
    assert refused > 300


def rewritten(path, change):
    """A container whose header was changed by someone who can compute a checksum."""
    found = container.read(path)
    change(found.header)
    other = path.with_name("hostile.cr")
    container.write(other, found.header, found.streams)
    return container.read(other)


def setting(path: str, value):
    """A change of the header: `path` is attributes and indices, like entries.0.length."""

    def change(header):
        *way, last = path.split(".")
        for step in way:
            header = header[int(step)] if step.isdecimal() else getattr(header, step)
        if isinstance(header, dict):
            header[last] = value
        else:
            setattr(header, last, value)

    return change


LIES = [
    ("entries.0.items", [10**12]),
    ("entries.0.items", [1 << 62, 1 << 62]),
    ("entries.0.items", [70_000_000]),  # its stream could hold them: hours of decoding
    ("entries.0.items", []),
    ("entries.0.items", [399]),
    ("entries.0.items", [1] * 400),
    ("entries.0.classes", [3]),
    ("entries.0.form", "executable"),
    ("entries.0.form", "png"),
    ("entries.0.form", "wav"),
    ("entries.0.how", "zstd"),
    ("entries.0.length", 401),
    ("entries.0.name", "c"),
    ("entries.1.length", 10),
    ("entries.1.length", 1 << 62),
    ("entries.1.how", "model"),
    ("layout.rows", 0),
    ("layout.rows", "many"),
    ("layout.overlap", 7),
    ("layout.least_row", 10),
    ("layout.adapt", {"every": 1}),
    ("contract.threads", 0),
    ("contract.threads", 1 << 40),
    ("digest", bytes(8)),
]


@pytest.mark.parametrize(("path", "value"), LIES, ids=lambda v: str(v)[:24])
def test_a_header_that_lies_is_refused(tmp_path, path, value):
    model, adapter, good = packed(tmp_path)
    with pytest.raises(ContainerError, match="hostile.cr"):
        unpack(rewritten(good, setting(path, value)), model, adapter)


def signed(body: bytes) -> bytes:
    """Bytes as a container whose checksum is right."""
    return body + hashlib.sha256(body).digest()[: container.CHECKSUM]


@pytest.mark.slow
def test_damage_under_a_right_checksum_is_refused_or_harmless(tmp_path):
    """Header, digest and streams changed by someone who can compute a checksum."""
    model, adapter = bytes_model()
    files = [("a", walk(60).tobytes()), ("b", b"\0" * 900)]
    header, streams, _ = pack(model, adapter, files, Layout())
    path = tmp_path / "good.cr"
    container.write(path, header, streams)
    body = path.read_bytes()[: -container.CHECKSUM]
    head = 5 + container.KEPT  # magic, format and the model's fingerprint, which `unpack` is given
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(900):
        case = bytearray(body)
        at = int(rng.integers(head, len(body)))
        if i % 3 == 0:
            case[at] ^= 1 << int(rng.integers(8))
        elif i % 3 == 1:
            del case[at : at + int(rng.integers(1, 9))]
        else:
            case[at : at + 4] = rng.bytes(4)
        try:
            found = container.parse(path, signed(bytes(case)))
            assert unpack(found, model, adapter) == files
        except ContainerError as error:
            assert path.name in str(error)  # noqa: PT017
            refused += 1
    assert refused > 800


def hostile_headers():
    """Unfolded headers that claim the world, or end where they should not."""
    start = _typical(1, "AVX2")
    whole = b'[{"rows":64},0,[["raw"]]]\0'
    yield b""
    yield start
    yield start + b"[" * 100_000 + b"\0"
    yield start + b"{}\0"
    yield start + b"[{},0,3]\0\1\0"
    yield start + b'[{},0,[["raw",1]]]\0\1\0\1\0x\0'
    yield start + b'[{},0,[["model","png","bytes",3,0,0]]]\0\1\0\1\0x\0'
    yield start + whole + b"\xff" * 8 + b"\x7f"  # 2**63 files
    yield start + whole + b"\xff" * 20
    yield start + whole + b"\xff\xff\xff\x07" + bytes(1000)
    yield start + whole + b"\1\5\0\0x\0"  # a manner that is none
    yield start + whole + b"\1\0\0\xff\xff\3x\0"  # checks
    yield start + whole + b"\1\0\0\0x"  # no folder
    yield start + whole + b"\1\0\0\0x\0y\0z"
    yield bytes([3, 99]) + start[2:] + whole
    yield bytes(LARGEST_HEADER + 1)


@pytest.mark.parametrize("data", list(hostile_headers()), ids=range(16))
def test_headers_that_claim_the_world_are_refused(tmp_path, data):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=_DICTIONARY)
    folded = deflater.compress(data) + deflater.flush()
    body = container.MAGIC + bytes([container.FORMAT]) + bytes(2 * container.KEPT) + folded
    with pytest.raises(ContainerError, match=r"x\.cr: its header cannot be read"):
        container.parse(tmp_path / "x.cr", signed(body))


def test_another_models_floats_are_noticed_and_the_contract_is_named(tmp_path):
    model, adapter, path = packed(tmp_path)
    assert unpack(container.read(path), model, adapter)[0][0] == "a"
    other = Smooth(258, (64,), mixed=0.1001)

    def elsewhere(header):
        header.contract.update(torch="2.9.0", instructions="AVX2")

    with pytest.raises(ContainerError, match=r"torch '2\.9\.0' there"):
        unpack(rewritten(path, elsewhere), other, adapter)
    # the same floats under another contract are fine: the checksums decide
    assert unpack(rewritten(path, elsewhere), model, adapter)[0][0] == "a"


def test_the_contract_names_every_library_that_takes_part(tmp_path):
    model, adapter, path = packed(tmp_path)
    here = container.read(path).header.contract
    assert here["numpy"] == np.__version__
    assert here["constriction"] == version("constriction")
    assert here["torch"] == torch.__version__
    other = Smooth(258, (64,), mixed=0.1001)
    for library in ("torch", "numpy", "constriction"):
        wrong = rewritten(path, setting(f"contract.{library}", "0.0.1"))
        with pytest.raises(ContainerError, match=f"{library} '0.0.1' there, '"):
            unpack(wrong, other, adapter)
        assert unpack(wrong, model, adapter)[0][0] == "a"  # tried, and the digest is right


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory\nat 0x0")])
def test_a_machine_that_cannot_hold_it_refuses(tmp_path, error, monkeypatch):
    model, adapter, path = packed(tmp_path)

    def fails(*_):
        raise error

    monkeypatch.setattr("chainrule.pipeline.coding.archive.decode", fails)
    with pytest.raises(ContainerError, match=r"good\.cr: .*more memory.*Error"):
        unpack(container.read(path), model, adapter)


def test_threads_are_those_of_the_encoder_while_decoding(tmp_path):
    model, adapter = bytes_model()
    header, streams, _ = pack(model, adapter, [("a", walk(200).tobytes())], Layout())
    path = tmp_path / "good.cr"
    container.write(path, header, streams)
    before = torch.get_num_threads()
    seen = []
    unpack(
        rewritten(path, lambda h: h.contract.update(threads=before + 1)),
        model,
        adapter,
        report=lambda n: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


# --- files that a model cannot code beside files that it can ------------------------------------


class Breaking(Smooth):
    """Gives no distribution once it has seen the symbol 200."""

    def cursor(self, batch, cond=None):
        return BreakingCursor(self, batch)


class BreakingCursor(SmoothCursor):
    @property
    def next(self):
        conditional = super().next
        conditional.logits[(self.seen == 200).any(1)] = float("nan")
        return conditional


def test_a_file_on_which_probabilities_are_none_is_stored_the_others_are_coded(tmp_path):
    low = [walk(400, seed) // 2 for seed in range(4)]
    bad = low[1].copy()
    bad[150] = 200
    files = [("a", low[0].tobytes()), ("bad", bad.tobytes()), ("c", low[2].tobytes())]
    last = low[3].copy()
    last[-1] = 200  # after the last symbol nothing is asked of the model
    files.append(("last", last.tobytes()))
    model, adapter = Breaking(258, (64,)), Adapter(ByteTokenizer())
    for layout in ({}, {"rows": 2, "least_row": 100}):
        back, reports = through_a_container(tmp_path, model, adapter, files, **layout)
        assert back == files
        assert [r.how.startswith("model") for r in reports] == [True, False, True, True]
        assert "not a distribution" in reports[1].why
    back, reports = through_a_container(tmp_path, model, adapter, files[1:2])
    assert back == files[1:2]


def test_a_model_that_gives_no_distribution_at_all_is_refused():
    model = Smooth(258, (64,), mixed=float("nan"))
    with pytest.raises(CodingError, match="not a distribution"):
        pack(model, Adapter(ByteTokenizer()), [("a", b"abc")], Layout())


def test_tokens_outside_the_models_alphabet_are_stored(tmp_path):
    model = Smooth(100, (64,))
    files = [("low", (walk(300) // 4).tobytes()), ("high", walk(300).tobytes())]
    back, reports = through_a_container(tmp_path, model, Adapter(ByteTokenizer()), files)
    assert back == files
    assert [r.how.startswith("model") for r in reports] == [True, False]
    assert "the model's alphabet has 100" in reports[1].why


def test_a_large_alphabet_is_coded_and_one_too_large_refused(tmp_path):
    class Wide(ByteTokenizer):
        """Bytes far apart in an alphabet of 150,000."""

        kind = "wide"

        def encode(self, batch):
            return [
                np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) * 588
                for text in batch
            ]

        def decode(self, batch):
            return [(tokens // 588).astype(np.uint8).tobytes().decode() for tokens in batch]

    class Rare(Smooth):
        """The printable characters alone are likely."""

        def cursor(self, batch, cond=None):
            return RareCursor(self, batch)

    class RareCursor(SmoothCursor):
        @property
        def next(self):
            flat = Decaying(torch.zeros(len(self.seen)), self.model.size, 1.0)
            flat.logits[:, 32 * 588 : 127 * 588 : 588] += 14
            flat.logits = flat.logits.log_softmax(-1)
            return flat

    text = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 300)))
    files = [("a.txt", text.encode())]
    back, [report] = through_a_container(tmp_path, Rare(150_000, (64,)), Adapter(Wide()), files)
    assert back == files
    assert report.coded_bytes <= 1.001 * report.ideal_bytes + 4
    with pytest.raises(CodingError, match="V <= 262144"):
        pack(Smooth((1 << 18) + 1, (64,)), Adapter(Wide()), files, Layout())
