"""Any file in, the same file out: forms, fallbacks, damage, other machines."""

import hashlib
import io
import json
import struct
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from chainrule.pipeline.coding import container
from chainrule.pipeline.coding.archive import pack, unpack
from chainrule.pipeline.coding.blocks import Layout
from chainrule.pipeline.coding.container import ContainerError
from chainrule.pipeline.coding.forms import Adapter, NotForModel
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
    import zlib

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
    extras = {file["name"]: file.get("extra") for file in header["files"]}
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


@pytest.mark.parametrize("kind", ["bytes", "png"])
def test_a_container_is_little_more_than_its_streams(tmp_path, kind):
    """One file: the ideal size, 0.1 % and 64 bytes, beside its name and the model's folder.
    Many: 18 bytes each, their numbers in the names included."""
    model, adapter = image_model(1) if kind == "png" else bytes_model()
    if kind == "png":
        contents = [png(walk(64, i).reshape(8, 8).astype(np.uint8)) for i in range(100)]
    else:
        contents = [walk(400, i).astype(np.uint8).tobytes() for i in range(100)]
    files = [(f"{i:05d}", data) for i, data in enumerate(contents)]
    folder = "runs/some-pipeline/model"
    for some, room in ((files[:1], 64 + len(files[0][0]) + len(folder)), (files, 18 * len(files))):
        header, streams, reports = pack(model, adapter, some, Layout())
        assert {report.how.partition(" ")[0] for report in reports} == {"model"}
        header["model"] = {"fingerprint": hashlib.sha256(b"m").hexdigest(), "folder": folder}
        size = container.write(tmp_path / "x.cr", header, streams)
        assert size == (tmp_path / "x.cr").stat().st_size
        assert size <= sum(report.ideal_bytes for report in reports) * 1.001 + room
        assert unpack(container.read(tmp_path / "x.cr"), model, adapter) == some


def test_an_older_container_is_refused_by_its_format(tmp_path):
    (tmp_path / "old.cr").write_bytes(b"\x89CRL\r\n\x1a\n" + bytes(100))
    with pytest.raises(ContainerError, match="container format 1; this version reads 2"):
        container.read(tmp_path / "old.cr")


def rewritten(path, change):
    """A container whose header was changed by someone who can compute a checksum."""
    found = container.read(path)
    header = json.loads(json.dumps(found.header))
    change(header)
    other = path.with_name("hostile.cr")
    del header["sizes"]
    container.write(other, header, found.streams)
    return container.read(other)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["coded"].update(lengths=[10**12]),
        lambda h: h["coded"].update(lengths=[-5]),
        lambda h: h["coded"].update(owners=[7]),
        lambda h: h["coded"].update(owners=[]),
        lambda h: h["coded"].update(lengths=[399]),
        lambda h: h.pop("coded"),
        lambda h: h.pop("layout"),
        lambda h: h.update(layout={"rows": 0}),
        lambda h: h.update(files=None),
        lambda h: h["files"][0].update(stream=50),
        lambda h: h["files"][0].update(form="executable"),
        lambda h: h["files"][0].update(sha256="0" * 64),
        lambda h: h["files"][0].update(sha256=""),
        lambda h: h.update(originals="0" * 64),
        lambda h: h["contract"].update(threads=0),
        lambda h: h["contract"].update(threads=10**9),
        lambda h: h["files"][1].update(length=10),
        lambda h: h["files"][1].update(how="raw"),
        lambda h: h["files"][1].update(how="model"),
        lambda h: h.pop("contract"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, change):
    model, adapter, path = packed(tmp_path)
    with pytest.raises(ContainerError, match="hostile.cr"):
        unpack(rewritten(path, change), model, adapter)


def test_another_models_floats_are_noticed_and_the_contract_is_named(tmp_path):
    model, adapter, path = packed(tmp_path)
    assert unpack(container.read(path), model, adapter)[0][0] == "a"
    other = Smooth(258, (64,), mixed=0.1001)

    def elsewhere(header):
        header["contract"].update(torch="2.9.0", instructions="AVX2")

    with pytest.raises(ContainerError, match=r"torch '2\.9\.0' there"):
        unpack(rewritten(path, elsewhere), other, adapter)
    # the same floats under another contract are fine: the checksums decide
    assert unpack(rewritten(path, elsewhere), model, adapter)[0][0] == "a"


def test_threads_are_those_of_the_encoder_while_decoding(tmp_path):
    model, adapter = bytes_model()
    header, streams, _ = pack(model, adapter, [("a", walk(200).tobytes())], Layout())
    path = tmp_path / "good.cr"
    container.write(path, header, streams)
    before = torch.get_num_threads()
    seen = []
    unpack(
        rewritten(path, lambda h: h["contract"].update(threads=before + 1)),
        model,
        adapter,
        report=lambda n: seen.append(torch.get_num_threads()),
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
