"""Ten thousand inputs there and back, and as many damaged containers refused."""

from pathlib import Path

import numpy as np
import pytest

from chainrule.pipeline.coding import container
from chainrule.pipeline.coding.archive import pack, unpack
from chainrule.pipeline.coding.blocks import Layout, decode, encode
from chainrule.pipeline.coding.forms import Adapter
from chainrule.pipeline.coding.header import ContainerError
from chainrule.pipeline.models.registry import build
from chainrule.tokenizers.bytes import ByteTokenizer


@pytest.fixture(scope="module")
def model():
    return build("gpt2-debug", seed=0, vocabulary_size=258, context=24, layers=1, width=16, heads=2)


def adversarial(number: int) -> list[bytes]:
    """Small inputs of every kind that breaks coders: short, flat, rare, repeated, binary."""
    rng = np.random.default_rng(0)
    fixed = [b"", bytes(range(256)), b"\0" * 300, b"\xff" * 100, b"\x89PNG\r\n\x1a\n", b"RIFF"]
    fixed += [bytes([value]) for value in range(256)]
    made = []
    for i in range(number - len(fixed)):
        n = int(rng.integers(0, 40))
        kind = i % 5
        if kind == 0:
            made.append(rng.bytes(n))
        elif kind == 1:
            made.append(bytes([int(rng.integers(256))]) * n)
        elif kind == 2:
            made.append("".join(map(chr, rng.integers(32, 0x2FF, n))).encode())
        elif kind == 3:
            made.append(bytes(rng.choice([0, 255], n).astype(np.uint8)))
        else:
            made.append((rng.bytes(3) * 14)[:n])
    return fixed + made


@pytest.mark.slow
def test_ten_thousand_inputs_are_coded_and_come_back(model):
    inputs = adversarial(10_000)
    items = [np.frombuffer(data, dtype=np.uint8).astype(np.int64) for data in inputs]
    owners = list(range(len(items)))
    layout = Layout(rows=1000)
    coded = encode(model, items, owners, layout)
    for stream, bits in zip(coded.streams, coded.ideal_bits, strict=True):
        assert len(stream) <= bits / 8 * 1.001 + 64
    back = decode(model, coded.streams, [len(i) for i in items], owners, coded.checks, layout)
    for item, other in zip(items, back, strict=True):
        assert np.array_equal(item, other)


def test_a_container_of_many_inputs_comes_back(model, tmp_path):
    files = [(f"{i:05d}", data) for i, data in enumerate(adversarial(1500))]
    adapter = Adapter(ByteTokenizer())
    header, streams, reports = pack(model, adapter, files, Layout(rows=250))
    path = tmp_path / "many.cr"
    container.write(path, header, streams)
    assert unpack(container.read(path), model, adapter) == files
    assert {r.how for r in reports} >= {"raw", "zstd"}


def test_ten_thousand_damaged_containers_are_refused(model, tmp_path):
    adapter = Adapter(ByteTokenizer())
    files = [("a", bytes(range(200))), ("b", b"text " * 9)]
    header, streams, _ = pack(model, adapter, files, Layout())
    path = tmp_path / "good.cr"
    container.write(path, header, streams)
    good = path.read_bytes()
    rng = np.random.default_rng(1)
    bad = Path("bad.cr")
    for i in range(10_000):
        case = bytearray(good)
        kind = i % 4
        at = int(rng.integers(len(good)))
        if kind == 0:
            case[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            case = case[:at]
        elif kind == 2:
            case[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            other = rng.bytes(8)
            if bytes(case[at : at + 8]) == other[: len(case) - at]:
                continue
            case[at : at + 8] = other
        if bytes(case) == good:
            continue
        with pytest.raises(ContainerError, match="bad.cr"):
            container.parse(bad, bytes(case))


@pytest.mark.slow
def test_a_megabyte_of_zeros(model):
    zeros = np.zeros(1 << 20, dtype=np.int64)
    layout = Layout(rows=512, least_row=256)
    coded = encode(model, [zeros], [0], layout)
    assert len(coded.streams[0]) <= coded.ideal_bits[0] / 8 * 1.001 + 64
    back = decode(model, coded.streams, [len(zeros)], [0], coded.checks, layout)
    assert not back[0].any()
