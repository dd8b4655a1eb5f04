"""Steps in C: the numbers of torch's in every family, and torch's own without a compiler."""

from pathlib import Path
from typing import Any

import pytest
import torch

from chainrule.pipeline import build
from chainrule.pipeline.models import (
    native,
    native_attention,
    native_block,
    native_product,
    native_steps,
)
from chainrule.pipeline.models.attention import FullAttention, visible
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.kernels import (
    Linear,
    RMSNorm,
    gelu,
    gelu_tanh,
    quick_gelu,
    split_heads,
    swiglu,
)
from chainrule.pipeline.models.kv_cache import DecoderCursor
from chainrule.pipeline.models.ragged import RaggedCursor
from chainrule.pipeline.sampling.int8 import quantise
from chainrule.pipeline.training.engine import Engine, EngineSettings

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2-debug"},
    "llama": {"preset": "llama-debug"},
    "mistral": {"preset": "mistral-debug", "window": 5},
    "falcon": {"preset": "falcon-debug"},
    "falcon 40b": {"preset": "falcon-debug", "block": "parallel-two-norms", "kv_heads": 2},
    "imagegpt": {"preset": "imagegpt-debug"},
    "classes": {"preset": "vqgan-transformer-debug"},
    "density": {
        "preset": "llama-debug",
        "vocabulary_size": None,
        "head": {"kind": "mixture-of-gaussians", "components": 2},
    },
    # No whole vectors anywhere: widths, heads and outputs that are no multiples of 16 or 4.
    "odd": {
        "preset": "llama-debug",
        "width": 42,
        "heads": 3,
        "kv_heads": 3,
        "mlp_width": 99,
        "vocabulary_size": 77,
    },
    "wide heads": {"preset": "gpt2-debug", "width": 60, "heads": 1, "head_width": 90},
}

needs_compiler = pytest.mark.skipif(native_steps.load() is None, reason="no C compiler here")


def make(name: str, dtype: str = "float32") -> tuple[Decoder, torch.Tensor, torch.Tensor | None]:
    model = build(SHAPES[name], seed=0, layers=2, **{"context": 40} if "image" in name else {})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if dtype == "bfloat16":
        model.bfloat16()
    if dtype == "int8":
        quantise(model)
    assert isinstance(model, Decoder)
    x = torch.randint(60, (3, 40), generator=generator)
    if model.config.vocabulary_size is None:
        x = torch.randn(3, 40, generator=generator)
    cond = torch.tensor([0, 4, -1]) if model.config.classes else None
    return model.eval(), x, cond


def parameters(cursor: DecoderCursor, x: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """What the model says of each element of x, fed in pieces."""
    found = [cursor._next.unsqueeze(1)]
    for piece in x.split(pieces, dim=1):
        cursor.advance(piece)
        found.append(cursor._next.unsqueeze(1))
    return torch.cat(found, dim=1).float()


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_steps_in_c_are_those_of_torch(name: str, dtype: str) -> None:
    model, x, cond = make(name, dtype)
    pieces = [1, 3, 1, 1, 2, 1, 12, 1, 1, 1]  # 12 for 3 rows: two calls
    x = x[:, : sum(pieces)]
    plain = model.cursor(3, cond)
    with native.allowed():
        quick = model.cursor(3, cond, spare=11)
    assert isinstance(plain, DecoderCursor)
    assert isinstance(quick, DecoderCursor)
    assert plain._native is None
    assert quick._native is not None
    wanted, found = parameters(plain, x, pieces), parameters(quick, x, pieces)
    scale = float(wanted.abs().max())
    assert (found - wanted).abs().max() <= (1e-5 if dtype == "float32" else 0.05) * scale
    # A ring of 5 and 11 to spare has gone round more than once, forwards and back.
    last = quick._next
    quick.rewind(9)
    quick.advance(x[:, -9:])
    assert torch.equal(quick._next, last)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_neither_threads_nor_company_move_a_bit(threads: int, dtype: str) -> None:
    """A row alone gives the floats that it gives among others, with any number of threads."""
    model, x, _ = make("llama", dtype)
    before = torch.get_num_threads()
    try:
        with native.allowed():
            torch.set_num_threads(1)
            alone = parameters(model.cursor(1), x[:1, :9], [1] * 9)  # type: ignore[arg-type]
            torch.set_num_threads(threads)
            among = parameters(model.cursor(3), x[:, :9], [1, 4, 3, 1])  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(among[:1], alone[:, [0, 1, 5, 8, 9]])


@needs_compiler
@torch.no_grad()
def test_rows_of_their_own_positions_in_c() -> None:
    model, x, _ = make("gpt2")
    wanted = model.log_prob(x)
    with native.allowed():
        rows = RaggedCursor(model, 3)
    assert rows._native is not None
    rows.advance(x[:, :6])
    rows.rewind_rows(torch.tensor([0, 2, 5]))
    starts = (6, 4, 1)
    following = torch.stack([x[b, s : s + 4] for b, s in enumerate(starts)])
    after = torch.stack([x[b, s + 1 : s + 5] for b, s in enumerate(starts)])
    expected = torch.stack([wanted[b, s + 1 : s + 5] for b, s in enumerate(starts)])
    found = rows.advance(following).log_prob(after)
    assert torch.allclose(found, expected, atol=1e-5)


@needs_compiler
@torch.no_grad()
def test_a_new_cursor_sees_new_weights_and_rewinds() -> None:
    model, x, _ = make("gpt2", "bfloat16")
    with native.allowed():
        model.cursor(1)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        cursor = model.cursor(3)
    cursor.advance(x[:, :5])
    cursor.advance(x[:, 7:9])
    cursor.rewind(2)
    wanted = model.cursor(3).advance(x[:, :5]).log_prob(x[:, 1:6])[:, -1]
    assert torch.allclose(cursor.next.log_prob(x[:, 5]), wanted, atol=0.05)


def test_without_a_compiler_torch_takes_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert native.load(native_steps.SOURCE) is None
    monkeypatch.setattr(native_steps, "load", lambda: None)
    model, _, _ = make("gpt2")
    assert model.sample(2, seed=3).shape == (2, 256)
    with native.allowed():
        cursor = model.cursor(1)
    assert isinstance(cursor, DecoderCursor)
    assert cursor._native is None


@needs_compiler
@pytest.mark.parametrize("fault", ["no home", "a home that others may not enter"])
def test_a_user_without_a_cache_goes_without_c(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> Any:
        raise RuntimeError("Could not determine home directory.")

    def closed(*_: object) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if fault == "no home":
        monkeypatch.setattr(Path, "home", refuse)
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(Path, "exists", closed)
    assert native.load(native_steps.SOURCE) is None


@needs_compiler
def test_a_norm_in_c_reads_its_weight_as_torch_does() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    norm = RMSNorm(4, 1e-5)
    for weight in (
        torch.arange(8.0)[::2],
        torch.arange(4.0, dtype=torch.float64),
        torch.arange(4.0, dtype=torch.bfloat16),
    ):
        norm.weight = torch.nn.Parameter(weight)
        wanted = norm(x)
        with native.allowed():
            assert torch.equal(norm(x), wanted)


@needs_compiler
def test_other_layers_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = make("gpt2")

    def steps() -> object:
        with native.allowed(), torch.no_grad():
            cursor = model.cursor(1)
        assert isinstance(cursor, DecoderCursor)
        return cursor._native

    assert steps() is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert steps() is None
    monkeypatch.setenv("CHAINRULE_NATIVE", "0")
    assert steps() is None
    monkeypatch.delenv("CHAINRULE_NATIVE")
    for part in (model.head, model.final_norm, *model.blocks[1].modules()):
        hook = part.register_forward_hook(lambda *_: None)
        assert steps() is None
        hook.remove()
    block: Any = model.blocks[1]
    for module, name, other in (
        (block.mlp, "forward", block.mlp.forward),
        (block.attention_norm, "eps", 0.5),
        (block, "mlp_norm", torch.nn.Identity()),
        (block, "mlp", torch.nn.Sequential(block.mlp)),
        (block.attention, "qkv", torch.nn.Sequential(block.attention.qkv)),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(module._modules if name in module._modules else vars(module), name, other)
            assert steps() is None, name
    assert steps() is not None
    head: Any = model.head
    head.weight = torch.nn.Parameter(head.weight.t().contiguous().t())
    assert steps() is None


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("width", [8, 42])
def test_kernels_of_training_and_their_gradients(width: int, threads: int) -> None:
    """Against the same functions outside `allowed()`, on rows that no block divides."""
    torch.manual_seed(0)
    norm = RMSNorm(width, 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    angle = torch.rand(5, 1, width // 2)
    cos, sin = angle.cos(), angle.sin()
    rope = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    x = torch.randn(3, 5, 2 * width, requires_grad=True)
    qkv = torch.randn(3, 5, 7 * width, requires_grad=True)

    def attend(qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = split_heads(qkv, rope, 3, 2, width)
        # Gradients that are transposed, broadcast and contiguous.
        return torch.cat([q.transpose(1, 2).flatten(1), k.sum(3).flatten(1), v.flatten(1)], dim=1)

    cases: list[tuple[Any, list[torch.Tensor]]] = [
        (lambda: norm(x[..., ::2]), [x, norm.weight]),
        (lambda: swiglu(x), [x]),
        (lambda: quick_gelu(x), [x]),
        (lambda: gelu(4 * x), [x]),
        (lambda: gelu_tanh(4 * x), [x]),
        (lambda: attend(qkv), [qkv]),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for function, inputs in cases:
            wanted = function()
            with native.allowed():
                found = function()
            assert "InC" not in str(wanted.grad_fn)
            assert torch.allclose(found, wanted, atol=1e-5)
            direction = torch.randn_like(wanted)
            for a, b in zip(
                torch.autograd.grad(found, inputs, direction),
                torch.autograd.grad(wanted, inputs, direction),
                strict=True,
            ):
                assert torch.allclose(a, b, atol=1e-5)
    finally:
        torch.set_num_threads(before)


ATTENTIONS: dict[str, dict[str, Any]] = {
    # heads, heads of keys, length, width of a head; what is seen
    "one block": {"sizes": (4, 4, 32, 16)},
    "grouped": {"sizes": (6, 2, 70, 32)},
    "one key head, no whole vectors": {"sizes": (3, 1, 77, 48)},
    "two inputs": {"sizes": (2, 2, 2, 16)},
    "window": {"sizes": (4, 2, 130, 64), "window": 40},
    "window of one": {"sizes": (2, 2, 50, 16), "window": 1},
    "documents": {"sizes": (2, 1, 100, 32), "documents": True},
    "documents, window": {"sizes": (4, 4, 100, 16), "documents": True, "window": 17},
}


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_in_c_and_its_gradients(name: str, threads: int) -> None:
    """Against torch's in float64; q, k and v stand together, as a decoder has them."""
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, length, width = ATTENTIONS[name]["sizes"]
    window = ATTENTIONS[name].get("window")
    documents = None
    if "documents" in ATTENTIONS[name]:  # of another length in each row
        documents = (torch.rand(3, length, generator=generator) < 0.1).cumsum(1)
    shape = (3, length, heads + 2 * kv_heads, width)
    qkv = (2 * torch.randn(shape, generator=generator)).requires_grad_()
    direction = torch.randn(3, length, heads, width, generator=generator).transpose(1, 2)
    direction = direction * (torch.rand(direction.shape[:-1], generator=generator) < 0.8)[..., None]

    def parts(x: torch.Tensor) -> list[torch.Tensor]:
        return [t.transpose(1, 2) for t in x.split([heads, kv_heads, kv_heads], dim=2)]

    mask = visible(length, window, documents, qkv.device)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *parts(qkv.double()), attn_mask=mask, enable_gqa=True
    )
    (slope,) = torch.autograd.grad(wanted, qkv, direction.double())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with native.allowed():
            found = FullAttention(length, window, documents, 0.0, qkv.device)(0, *parts(qkv))
        assert "AttentionInC" in str(found.grad_fn)
        (found_slope,) = torch.autograd.grad(found, qkv, direction)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found, wanted.float(), atol=1e-5)
    assert torch.allclose(found_slope, slope.float(), atol=3e-5, rtol=1e-4)


BLOCKS: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2-debug"},
    "llama": {"preset": "llama-debug", "kv_heads": 1},
    "mistral": {"preset": "mistral-debug", "window": 5},
    "falcon": {"preset": "falcon-debug"},
    "falcon 40b": {"preset": "falcon-debug", "block": "parallel-two-norms", "kv_heads": 2},
    "imagegpt": {"preset": "imagegpt-debug"},
}


def of_training(name: str, **more: Any) -> tuple[Decoder, torch.Tensor]:
    """Heads of 16; weights large enough that every part is heard."""
    model = build(BLOCKS[name], seed=0, layers=2, width=32, heads=2, **more).train()
    assert isinstance(model, Decoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, torch.randint(60, (3, model.config.context), generator=generator)[:, :40]


def blocks_by_hand(value: torch.Tensor) -> int:
    """How many there are in the graph that gave the value."""
    found, seen, waiting = 0, set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += "BlockInC" in str(node)
            waiting += [following for following, _ in node.next_functions]
    return found


@needs_compiler
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_by_hand_is_the_block(name: str, packed: bool) -> None:
    model, x = of_training(name, **{"context": 40} if name == "imagegpt" else {})
    documents = (torch.arange(40) // 7).expand(3, -1) if packed else None
    weights = dict(model.named_parameters())
    wanted = model.log_prob(x, documents=documents)
    slopes = torch.autograd.grad(wanted.mean(), list(weights.values()))
    with native.allowed():
        found = model.log_prob(x, documents=documents)
    assert (blocks_by_hand(wanted), blocks_by_hand(found)) == (0, 2)
    assert torch.allclose(found, wanted, atol=1e-5)
    gradients = torch.autograd.grad(found.mean(), list(weights.values()))
    for (parameter, a), b in zip(zip(weights, gradients, strict=True), slopes, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-8, parameter


@needs_compiler
def test_a_block_is_one_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = of_training("llama")
    with native.allowed():
        assert blocks_by_hand(model(x)) == 2
        assert blocks_by_hand(model(x[:1, :3])) == 0
        monkeypatch.setattr(native_block, "MOST_WEIGHTS", 1000)
        assert blocks_by_hand(model(x)) == 0


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_a_block_gives_the_same_bits_on_any_number_of_threads(name: str) -> None:
    model, x = of_training(name)
    x = x.repeat(4, 1)
    model.final_norm = torch.nn.Identity()  # LayerNorm is torch's
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            with native.allowed():
                loss = model(x).double().sum()
            assert blocks_by_hand(loss) == 2
            found.append(torch.autograd.grad(loss, list(model.blocks.parameters())))
        finally:
            torch.set_num_threads(before)
    for more in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], more, strict=True))


@needs_compiler
def test_of_frozen_weights_no_gradient_is_made() -> None:
    model, x = of_training("gpt2")
    weights = dict(model.named_parameters())
    with native.allowed():
        wanted = torch.autograd.grad(model(x).mean(), list(weights.values()))
        for name, weight in weights.items():
            weight.requires_grad_("mlp" not in name)
        loss = model(x).mean()
        assert blocks_by_hand(loss) == 2
        loss.backward()
    for (name, weight), gradient in zip(weights.items(), wanted, strict=True):
        assert weight.grad is None if "mlp" in name else torch.equal(weight.grad, gradient), name


@needs_compiler
def test_what_is_no_number_stays_so() -> None:
    """Whatever its bits are: a GPU's have all of them set."""
    q, k, v = (torch.randn(2, 1, 8, 16) for _ in range(3))
    k.view(torch.int32)[:, :, 3] = 0x7FFFFFFF
    first = torch.zeros(2, 8, dtype=torch.long)
    y, _ = native_attention.attention(q, k, v, first)
    assert y[:, :, 3:].isnan().all()


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_torch_makes_by_default_does_not_matter(name: str) -> None:
    model, x = of_training(name)
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            with native.allowed():
                loss = model(x).mean()
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_compiler
def test_a_block_that_is_watched_or_drops_out_is_taken_in_parts() -> None:
    model, x = of_training("llama")

    def by_hand() -> int:
        with native.allowed():
            return blocks_by_hand(model(x))

    assert by_hand() == 2
    first: Any = model.blocks[0]
    for part in (first.attention, first.attention.qkv, first.mlp_norm):
        called = []
        hook = part.register_forward_pre_hook(lambda *_, called=called: called.append(1))
        assert by_hand() == 1
        assert called
        hook.remove()
    first.mlp.forward = first.mlp.forward
    assert by_hand() == 1
    del first.mlp.forward
    first.attention_norm.epsilon *= 2
    assert by_hand() == 1
    first.attention_norm.epsilon /= 2
    plain, first.attention = (
        first.attention,
        type("Other", (type(first.attention),), {})(model.config, 0),
    )
    assert by_hand() == 1
    first.attention = plain
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert by_hand() == 0
    hook.remove()
    assert by_hand() == 2
    plain, first.mlp.input = first.mlp.input, torch.nn.utils.skip_init(torch.nn.Linear, 1, 1)
    first.mlp.input.weight = torch.nn.Parameter(plain.weight.detach() + 0)
    first.mlp.input.bias = None
    assert by_hand() == 1
    first.mlp.input = plain
    with torch.autocast("cpu", torch.bfloat16):
        assert by_hand() == 0
    with torch.no_grad():
        assert by_hand() == 0
    assert blocks_by_hand(model(x)) == 0
    for dropout in ("dropout", "attention_dropout"):
        model, x = of_training("llama", **{dropout: 0.1})
        assert by_hand() == 0


@needs_compiler
def test_what_is_in_c_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    model, _ = of_training("llama")
    assert model.is_faster_uncompiled(cpu, "fp32")
    assert not model.is_faster_uncompiled(cpu, "bf16")
    assert not model.is_faster_uncompiled(cuda, "fp32")
    assert not of_training("llama", dropout=0.1)[0].is_faster_uncompiled(cpu, "fp32")
    with Engine(EngineSettings(strategy="single", compile=True)) as engine:
        engine.prepare(model, lambda m: torch.optim.AdamW(m.parameters()))
    assert model._compiled_call_impl is None
    monkeypatch.setenv("CHAINRULE_NATIVE", "0")
    assert not model.is_faster_uncompiled(cpu, "fp32")


@needs_compiler
def test_what_attention_in_c_is_not_for() -> None:
    x = torch.randn(2, 4)
    with native.allowed():
        assert native_attention.fits(x, 8, 16, 2)
        assert not native_attention.fits(x.bfloat16(), 8, 16, 2)
        assert not native_attention.fits(x, 8, 8, 2)
        assert not native_attention.fits(x, 4000, 16, 2)
        with torch.no_grad():
            assert not native_attention.fits(x, 8, 16, 2)
    assert not native_attention.fits(x, 8, 16, 2)


# Below, at and beyond a tile, a block and a slice of the depth; rows apart by a page.
PRODUCTS = [(1, 1, 1), (7, 33, 5), (12, 32, 512), (97, 65, 513), (200, 31, 1030), (3, 1024, 1024)]


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
def test_products_in_c_are_products(m: int, n: int, k: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (k, n), (n,)))
    wanted = a.double() @ b.double()
    before, found = torch.get_num_threads(), {}
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            found[count] = [
                native_product.product(a, b),
                native_product.product(a.t().contiguous().t(), b, bias),
                native_product.product(a, b.t().contiguous().t(), bias),
            ]
        finally:
            torch.set_num_threads(before)
    for y, more in zip(found[threads], (0, bias, bias), strict=True):
        assert torch.allclose(y.double(), wanted + more, atol=1e-5 * k**0.5, rtol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(found[1], found[threads], strict=True))


@needs_compiler
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_trained_in_c_is_a_linear_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(40, 24, bias=bias)
    x = torch.randn(3, 7, 40, requires_grad=True)
    wanted = layer(x)
    with native.allowed():
        found = layer(x)
        only = layer(x.detach())  # the first layer of a network: no gradient by its input
    assert "LinearInC" in str(found.grad_fn)
    assert torch.allclose(found, wanted, atol=1e-5)
    direction = torch.randn_like(wanted)
    inputs = [layer.weight, x, *([layer.bias] if bias else [])]
    slopes = torch.autograd.grad(wanted, inputs, direction)
    for a, b in zip(torch.autograd.grad(found, inputs, direction), slopes, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    (by_weight,) = torch.autograd.grad(only, layer.weight, direction)
    assert torch.allclose(by_weight, slopes[0], atol=1e-5)


@needs_compiler
def test_recomputed_activations_are_computed_as_before() -> None:
    model, x, _ = make("llama")
    model.train()
    gradients = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        with native.allowed():
            loss = model(x).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for a, b in zip(plain, gradients[0], strict=True):
        assert torch.allclose(a, b, atol=1e-3, rtol=1e-3)
