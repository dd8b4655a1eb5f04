"""What is particular to the decoders: documents, windows, starts, captions, fast paths, shapes."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chainrule.pipeline import build
from chainrule.pipeline.models import kernels, native
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.kernels import (
    Linear,
    RMSNorm,
    quick_gelu,
    rotate,
    swiglu,
)
from chainrule.pipeline.models.ragged import RaggedCursor
from chainrule.pipeline.models.registry import PRESETS, resolve

SMALL: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "mlp_width": 24, "context": 16}


def _decoder(preset: str, **changes: Any) -> Decoder:
    model = build(preset, seed=0, **{**SMALL, **changes}).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert isinstance(model, Decoder)
    return model


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2-debug": {},
    "llama-debug": {"kv_heads": 1},
    "mistral-debug": {"kv_heads": 1, "window": 3},
    "falcon-debug": {},
}


@pytest.mark.parametrize("preset", FAMILIES)
def test_packed_documents_are_as_likely_as_alone(preset: str) -> None:
    """Each document of a window has the nats it would have by itself, and moves no other."""
    model = _decoder(preset, **FAMILIES[preset])
    x = torch.randint(256, (2, 16))
    documents = torch.tensor([[7] * 5 + [2] + [3] * 10, [0] * 16])
    packed = model.log_prob(x, documents=documents)
    alone = [model.log_prob(x[:1, a:b]) for a, b in ((0, 5), (5, 6), (6, 16))]
    assert torch.allclose(packed[:1], torch.cat(alone, dim=1), atol=1e-5)
    assert torch.allclose(packed[1:], model.log_prob(x[1:]), atol=1e-5)

    other = x.clone()
    other[0, :6] = (other[0, :6] + 1) % 256
    assert torch.equal(model.log_prob(other, documents=documents)[0, 6:], packed[0, 6:])
    with pytest.raises(ValueError, match=r"documents has shape \(2, 15\)"):
        model.log_prob(x, documents=documents[:, :15])


def test_documents_of_a_conditioned_model_each_know_their_class() -> None:
    model = _decoder("gpt2-debug", classes=3)
    x, cond = torch.randint(256, (1, 8)), torch.tensor([2])
    documents = torch.tensor([[0] * 3 + [1] * 5])
    packed = model.log_prob(x, cond, documents=documents)
    alone = torch.cat([model.log_prob(x[:, :3], cond), model.log_prob(x[:, 3:], cond)], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)


@torch.no_grad()
def test_a_window_sees_so_far_and_no_farther() -> None:
    """With L layers of window w, x_t depends on the L (w - 1) + 1 inputs before it."""
    model = _decoder("mistral-debug", window=3, context=16)
    x = torch.randint(256, (1, 16))
    moved = []
    for s in range(16):
        other = x.clone()
        other[0, s] = (other[0, s] + 1) % 256
        difference = model.conditionals(other).log_prob(x) - model.conditionals(x).log_prob(x)
        moved.append(difference[0] != 0)
    # Element s is input s + 1; output t looks at inputs t - 4 .. t.
    for s, row in enumerate(moved):
        for t in range(16):
            assert bool(row[t]) == (s + 1 <= t <= s + 1 + 4)


@torch.no_grad()
def test_a_ring_goes_back_farther_than_it_remembers() -> None:
    model = _decoder("mistral-debug", window=3, context=64, layers=3)
    x = torch.randint(256, (2, 64))
    wanted = model.log_prob(x)
    cursor = model.cursor(2)
    cursor.advance(x[:, :50])
    for back in (1, 2, 20, 29):
        cursor.rewind(back)
        at = cursor.position
        assert torch.allclose(cursor.next.log_prob(x[:, at]), wanted[:, at], atol=1e-5)
        following = cursor.advance(x[:, at:50])
        assert torch.allclose(
            following.log_prob(x[:, at + 1 : 51]), wanted[:, at + 1 : 51], atol=1e-5
        )
    assert cursor.nbytes == 2 * 2 * 3 * 2 * 3 * 8 * 4


@torch.no_grad()
def test_long_prompts_are_fed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.pipeline.models.kv_cache.LARGEST_FEED", 4)
    for preset in ("llama-debug", "mistral-debug"):
        model = _decoder(preset, **FAMILIES[preset])
        x = torch.randint(256, (2, 16))
        following = model.cursor(2).advance(x[:, :15])
        assert torch.allclose(following.log_prob(x[:, 1:]), model.log_prob(x)[:, 1:], atol=1e-5)


@torch.no_grad()
@torch.no_grad()
def test_rows_of_their_own_positions_take_ids_of_any_integer_dtype_and_no_other() -> None:
    model = build("gpt2-debug", seed=0, context=8).eval()
    x = torch.randint(model.config.vocabulary_size, (2, 4))
    wanted = RaggedCursor(model, 2).advance(x).logits  # type: ignore[attr-defined]
    short = RaggedCursor(model, 2).advance(x.to(torch.uint16)).logits  # type: ignore[attr-defined]
    assert torch.equal(short, wanted)
    size = model.config.vocabulary_size
    with pytest.raises(ValueError, match=rf"x holds {size}: elements lie in 0\.\.{size - 1}"):
        RaggedCursor(model, 2).advance(torch.full((2, 1), size))
    with pytest.raises(ValueError, match="cond was given"):
        RaggedCursor(model, 2, torch.zeros(2, dtype=torch.long))


CAPTIONS = {"captions": {"vocabulary_size": 11, "length": 5}}


@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "falcon-debug"])
@torch.no_grad()
def test_a_caption_is_seen_by_every_element(preset: str) -> None:
    """A token of it changed moves every conditional; what follows its end counts too."""
    model = _decoder(preset, **CAPTIONS)
    x = torch.randint(256, (1, 12))
    caption = torch.tensor([[3, 1, 4]])
    plain = model.log_prob(x, caption)
    assert torch.equal(plain, model.log_prob(x, torch.tensor([[3, 1, 4, -1, -1]])))
    for other in ([[3, 1, 5]], [[2, 1, 4]], [[3, 1]], [[3, 1, 4, 4]]):
        moved = (model.log_prob(x, torch.tensor(other)) - plain).abs()
        assert (moved > 0).all()
    none = model.log_prob(x, torch.full((1, 5), -1))
    assert torch.equal(none, model.log_prob(x))


@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "falcon-debug"])
@torch.no_grad()
def test_captions_in_every_cursor(preset: str) -> None:
    """With steps in C and without, rows together and each at a position of its own."""
    model = _decoder(preset, **CAPTIONS)
    x = torch.randint(256, (3, 12))
    cond = torch.tensor([[3, 1, 4, -1, -1], [-1] * 5, [0, 9, 2, 6, 5]])
    wanted = model.log_prob(x, cond)
    for allowed in (native.allowed, contextlib.nullcontext):
        with allowed():
            together, rows = model.cursor(3, cond), RaggedCursor(model, 3, cond)
        assert torch.allclose(together.next.log_prob(x[:, 0]), wanted[:, 0], atol=1e-5)
        for cursor in (together, rows):
            got = cursor.advance(x[:, :9]).log_prob(x[:, 1:10])  # type: ignore[attr-defined]
            assert torch.allclose(got, wanted[:, 1:10], atol=1e-5)
        together.rewind(9)
        assert torch.allclose(together.next.log_prob(x[:, 0]), wanted[:, 0], atol=1e-5)
        rows.rewind_rows(torch.tensor([3, 0, 8]))
        following = torch.stack([x[0, 6:8], x[1, 9:11], x[2, 1:3]])
        after = torch.stack([x[0, 7:9], x[1, 10:12], x[2, 2:4]])
        expected = torch.stack([wanted[0, 7:9], wanted[1, 10:12], wanted[2, 2:4]])
        assert torch.allclose(rows.advance(following).log_prob(after), expected, atol=1e-5)


def test_a_caption_is_dropped_whole_and_in_training_only() -> None:
    model = _decoder("gpt2-debug", captions={"vocabulary_size": 11, "length": 5, "dropout": 0.5})
    x = torch.randint(256, (1, 8)).expand(64, -1)
    cond = torch.tensor([[3, 1, 4, 1, 5]]).expand(64, -1)
    given, none = model.log_prob(x[:1], cond[:1]), model.log_prob(x[:1])
    assert not torch.allclose(given, none, atol=1e-4)
    model.train()
    torch.manual_seed(0)
    nats = model.log_prob(x, cond)
    of_given = torch.isclose(nats, given, atol=1e-5).all(dim=1)
    of_none = torch.isclose(nats, none, atol=1e-5).all(dim=1)
    assert (of_given ^ of_none).all()
    assert 16 < int(of_none.sum()) < 48
    with torch.no_grad():
        cursor = model.cursor(1, cond[:1])  # of a model that is being trained
    assert torch.allclose(cursor.next.log_prob(x[:1, 0]), given[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": 3}, "captions and classes"),
        ({"bos": 0}, "bos and captions"),
        ({"window": 4}, "window is 4: elements further on would not see the caption"),
        ({"captions": {"vocabulary_size": 0, "length": 5}}, "vocabulary_size"),
        ({"captions": {"vocabulary_size": 3}}, "length"),
    ],
)
def test_what_captions_do_not_go_with_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build("gpt2-debug", **{**CAPTIONS, **changes})


def test_the_condition_is_dropped_in_training_only() -> None:
    model = _decoder("gpt2-debug", classes=3, class_dropout=0.999)
    x, cond = torch.randint(256, (4, 6)), torch.tensor([0, 1, 2, 2])
    kept, free = model.log_prob(x, cond), model.log_prob(x)
    assert torch.equal(free, model.log_prob(x, torch.full((4,), -1)))
    assert not torch.allclose(kept, free, atol=1e-4)
    model.train()
    assert torch.allclose(model.log_prob(x, cond), free, atol=1e-5)
    cursor = model.cursor(4, cond)
    assert torch.allclose(cursor.next.log_prob(x[:, 0]), kept[:, 0], atol=1e-5)


@torch.no_grad()
def test_dropout_works_in_training_and_never_in_a_cursor() -> None:
    model = _decoder("gpt2-debug", dropout=0.5)
    x = torch.randint(256, (2, 8))
    wanted = model.log_prob(x)
    assert torch.equal(wanted, model.log_prob(x))
    model.train()
    assert not torch.equal(model.log_prob(x), model.log_prob(x))
    following = model.cursor(2).advance(x[:, :7])
    assert torch.allclose(following.log_prob(x[:, 1:]), wanted[:, 1:], atol=1e-5)


def test_recomputed_activations_give_the_same_gradients() -> None:
    model = _decoder("llama-debug", kv_heads=1).train()
    x = torch.randint(256, (2, 16))
    gradients = []
    for recompute in (False, True):
        model.activation_checkpointing = recompute
        gradients.append(torch.autograd.grad(model(x).sum(), list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_features_are_causal_and_end_in_the_conditionals() -> None:
    model = build("imagegpt-debug", seed=0, layers=2, heads=2, width=16).eval()
    assert isinstance(model, Decoder)
    x = torch.randint(64, (2, 8, 8))
    features = model.features(x)
    assert [tuple(f.shape) for f in features] == [(2, 64, 16)] * 3
    nats = model.config.head.conditional(model.head(features[-1]), 64).log_prob(x.flatten(1))
    assert torch.equal(nats, model.log_prob(x))
    other = x.clone()
    other[:, 4, 0] = (other[:, 4, 0] + 1) % 64
    for before, after in zip(features, model.features(other), strict=True):
        assert torch.equal(before[:, :33], after[:, :33])
        assert not torch.equal(before[:, 33:], after[:, 33:])


def test_gradients_by_hand_are_those_of_autograd() -> None:
    """In float64, against the plain expressions."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, 1e-5).double()
    with torch.no_grad():
        norm.weight.normal_()
    angle = torch.rand(3, 1, 4, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    rope = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    heads = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)

    def plain_rotation(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    pairs: list[tuple[Any, Any, list[torch.Tensor]]] = [
        (norm(x), F.rms_norm(x, (8,), norm.weight, 1e-5), [x, norm.weight]),
        (rotate(heads, rope), plain_rotation(heads), [heads]),
        (swiglu(x), plain_swiglu(x), [x]),
        (quick_gelu(x), x * torch.sigmoid(1.702 * x), [x]),
    ]
    for ours, theirs, inputs in pairs:
        assert torch.allclose(ours, theirs, atol=1e-12)
        direction = torch.randn_like(ours)
        for a, b in zip(
            torch.autograd.grad(ours, inputs, direction),
            torch.autograd.grad(theirs, inputs, direction),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("preset", FAMILIES)
def test_bf16_training_follows_float32(preset: str) -> None:
    model = _decoder(preset, **FAMILIES[preset]).train()
    x = torch.randint(256, (4, 16))
    documents = torch.arange(16).div(6, rounding_mode="floor").expand(4, -1)
    wanted = model(x, documents=documents)
    expected = torch.autograd.grad(-wanted.mean(), model.blocks[0].attention.qkv.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, documents=documents)
    assert found.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=0.1)
    gradient = torch.autograd.grad(-found.mean(), model.blocks[0].attention.qkv.weight)[0]
    assert float(F.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)) > 0.99


@pytest.mark.parametrize("rows", [1, 2, 32, 33])
@torch.no_grad()
def test_few_rows_in_bf16_are_the_same_product(rows: int) -> None:
    torch.manual_seed(0)
    layer = Linear(64, 48).bfloat16()
    x = torch.randn(rows, 1, 64).bfloat16()
    wanted = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    found = layer(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == wanted.shape
    assert torch.allclose(found.float(), wanted, atol=2e-2)


PARAMETERS = {
    # As published, in millions: Radford et al. 2019 table 2 (corrected in its repository),
    # Touvron et al. 2023 a and b, Dubey et al. 2024, Jiang et al. 2023, Almazrouei et al. 2023,
    # Chen et al. 2020 section 3, Esser et al. 2021 table 8.
    "gpt2": 124,
    "gpt2-medium": 355,
    "gpt2-large": 774,
    "gpt2-xl": 1558,
    "gpt3-175b": 175_000,
    "llama-7b": 6_700,
    "llama-13b": 13_000,
    "llama-33b": 32_500,
    "llama-65b": 65_200,
    "llama2-70b": 69_000,
    "llama3-8b": 8_030,
    "llama3-70b": 70_600,
    "llama3.1-405b": 406_000,
    "llama3.2-1b": 1_236,
    "llama3.2-3b": 3_213,
    "mistral-7b": 7_242,
    "falcon-7b": 6_922,
    "falcon-40b": 41_300,
    "imagegpt-small": 76,
    "imagegpt-medium": 455,
    "imagegpt-large": 1_362,
    "vqgan-transformer": 1_400,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_published_shapes_have_their_number_of_parameters(preset: str) -> None:
    with torch.device("meta"):
        model = build(preset)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[preset], rel=0.012)


def test_every_preset_is_a_config() -> None:
    for name, settings in PRESETS.items():
        config = resolve(name)
        assert config.family == settings["family"]
        assert resolve(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 3}, "unknown key 'layer'; did you mean 'layers'"),
        ({"heads": 3}, r"width \(16\) is no multiple of heads \(3\)"),
        ({"kv_heads": 3}, r"heads \(2\) is no multiple of kv_heads \(3\)"),
        ({"event_shape": (3, 3), "context": 16}, "holds 9 elements, context is 16"),
        ({"ordering": "hilbert"}, "needs a grid"),
        ({"bos": 256}, "bos is 256: vocabulary_size is 256"),
        ({"bos": 1, "classes": 2}, "one start symbol"),
        ({"class_dropout": 0.1}, "no classes"),
        ({"head": {"kind": "gaussian"}}, "vocabulary_size is 256"),
        ({"head": {"kind": "gausian"}}, "'gaussian'"),
        ({"vocabulary_size": None}, "needs at least 2 values"),
        ({"width": "wide"}, "'width'"),
        ({"rope_scaling": {"factor": 2.0}}, "position is 'learned'"),
        ({"family": "llama"}, "preset is of family 'gpt2'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        resolve({"preset": "gpt2-debug", **{**SMALL, **changes}})
    assert "\n" not in str(raised.value)
    assert "default factory" not in str(raised.value)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'llama-debug'"):
        resolve("lama-debug")
    with pytest.raises(ValueError, match="did you mean 'mistral'"):
        resolve({"family": "mistrall"})
    with pytest.raises(ValueError, match="'family' or 'preset' is missing"):
        resolve({"layers": 2})


def test_a_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    first, second = (build("gpt2-debug", seed=1, **SMALL) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "falcon-debug"])
def test_a_model_that_was_evaluated_in_inference_mode_can_be_trained(preset: str) -> None:
    model = build(preset)
    x = torch.zeros(1, 8, dtype=torch.long)
    with torch.inference_mode():
        model.log_prob(x)
        model.cursor(1)
    model.log_prob(x).sum().backward()
    model = build(preset, layers=1)
    model.compile(backend="aot_eager")
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    torch.compiler.reset()


@pytest.mark.parametrize("preset", ["gpt2-debug", "mistral-debug", "wavenet-debug"])
@pytest.mark.parametrize("in_c", [False, True])
@torch.no_grad()
def test_a_number_that_comes_back_is_another_document(preset: str, in_c: bool) -> None:
    model = build(preset, seed=0)
    for parameter in model.parameters():
        parameter.mul_(2)
    x = torch.randint(8, (2, 24), generator=torch.Generator().manual_seed(0))
    again = torch.tensor([0] * 9 + [1] * 5 + [0] * 10).expand(2, -1)
    fresh = torch.tensor([0] * 9 + [1] * 5 + [2] * 10).expand(2, -1)
    with torch.enable_grad(), native.allowed() if in_c else contextlib.nullcontext():
        found = [model.log_prob(x, documents=numbers).detach() for numbers in (again, fresh)]
    assert torch.equal(*found)
    for wrong in (again.float(), again[:, :3], again.tolist(), again.bool()):
        with pytest.raises(ValueError, match="documents "):
            model.log_prob(x, documents=wrong)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "falcon-debug", "imagegpt-debug"])
@pytest.mark.parametrize("in_c", [False, True])
def test_transforms_of_functions_go_through(preset: str, in_c: bool) -> None:
    """torch.func: gradients of each row apart, as for influence or private training."""
    model = build(preset, layers=1, width=32, heads=2)
    parameters = dict(model.named_parameters())
    shape = model.event_shape if len(model.event_shape) > 1 else (6,)
    x = torch.randint(8, (3, *shape), generator=torch.Generator().manual_seed(0))

    def nats(parameters: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        found = torch.func.functional_call(model, parameters, (row.unsqueeze(0),))
        return -found.sum()

    with native.allowed() if in_c else contextlib.nullcontext():
        each = torch.func.vmap(torch.func.grad(nats), (None, 0))(parameters, x)
        for i, row in enumerate(x):
            wanted = torch.autograd.grad(nats(parameters, row), list(parameters.values()))
            for (name, found), gradient in zip(each.items(), wanted, strict=True):
                torch.testing.assert_close(found[i], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "mistral-debug", "falcon-debug"])
def test_a_model_is_compiled_whole(preset: str) -> None:
    model = build(preset, layers=2, width=32, heads=2, context=32)
    x = torch.zeros(4, 32, dtype=torch.long)
    for context in (contextlib.nullcontext(), native.allowed()):
        torch.compiler.reset()
        with context:
            found = torch._dynamo.explain(model)(x)
        assert found.graph_count == 1, found.break_reasons
    torch.compiler.reset()


def test_a_norm_that_is_applied_twice_has_the_gradients_of_torch() -> None:
    norm = RMSNorm(6, 1e-5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for create_graph in (False, True):
        y = norm(norm(x).sin()).square().sum()
        found.append(torch.autograd.grad(y, (x, norm.weight), create_graph=create_graph))
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, again)
    assert torch.autograd.gradgradcheck(lambda x: norm(norm(x).sin()), (x,))


@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug"])
def test_recomputed_activations_can_be_differentiated_again(preset: str) -> None:
    model = build(preset, layers=2, width=16, heads=2, mlp_width=24).train()
    model.activation_checkpointing = True
    x = torch.zeros(2, 8, dtype=torch.long)
    with native.allowed(), sdpa_kernel(SDPBackend.MATH):
        loss = model.log_prob(x).sum()
        for _ in range(2):  # each goes through the blocks anew
            torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


@pytest.mark.parametrize("preset", ["gpt2-debug", "llama-debug", "falcon-debug", "imagegpt-debug"])
def test_gradients_can_be_differentiated_again(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a penalty on gradients and products with the Hessian want it."""
    model = build(preset, layers=1, width=16, heads=2, mlp_width=24).double()
    shape = model.event_shape if len(model.event_shape) > 1 else (6,)
    x = torch.randint(8, (2, *shape), generator=torch.Generator().manual_seed(0))
    weights = list(model.parameters())
    direction = [torch.randn_like(weight) for weight in weights]

    def along_the_hessian() -> tuple[torch.Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no second derivative
            nats = -model.log_prob(x).sum()
            first = torch.autograd.grad(nats, weights, create_graph=True)
            along = torch.stack([(g * d).sum() for g, d in zip(first, direction, strict=True)])
            return torch.autograd.grad(along.sum(), weights)

    found = along_the_hessian()
    monkeypatch.setattr(kernels, "_by_hand", lambda: False)
    for by_hand, plain in zip(found, along_the_hessian(), strict=True):
        torch.testing.assert_close(by_hand, plain, atol=1e-6, rtol=1e-4)
