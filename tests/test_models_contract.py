"""The contract, proved for every family and head by the same tests.

Each case is a tiny model; its weights are moved away from their initial values, since a layer
that starts at zero would hide a leak.
"""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chainrule.pipeline import build
from chainrule.pipeline.models import native
from chainrule.pipeline.models.contract import Autoregressive, Conditional, Cursor
from chainrule.pipeline.models.wavenet import WaveNet

SMALL = {"layers": 2, "heads": 2, "width": 16, "mlp_width": 24}
MOG = {"kind": "mixture-of-gaussians", "components": 3}
MOL = {"kind": "mixture-of-logistics", "components": 3}
DMOL = {"kind": "discretized-mixture-of-logistics", "components": 3}
PIXELS = {"vocabulary_size": 4, "width": 4, "output_width": 8, "kernel": 3, "first_kernel": 3}
TINY_PPP = {"preset": "pixelcnnpp-debug", "width": 4, "scales": 2}
TINY_WAVE = {
    "preset": "wavenet-debug",
    "cycles": 2,
    "layers": 2,
    "residual_width": 6,
    "gate_width": 6,
    "skip_width": 8,
}


def _decoder(preset: str, **changes: Any) -> dict[str, Any]:
    if "event_shape" not in changes:
        changes["context"] = 9
    return {"preset": preset, "vocabulary_size": 5, **SMALL, **changes}


def _density(preset: str, head: dict[str, Any]) -> dict[str, Any]:
    return _decoder(preset, vocabulary_size=None, head=head, tied_embeddings=False)


CASES: dict[str, dict[str, Any]] = {
    "gpt2": _decoder("gpt2-debug"),
    "gpt2-bos": _decoder("gpt2-debug", bos=0),
    "gpt2-classes": _decoder("gpt2-debug", classes=3, class_dropout=0.2),
    "gpt2-captions": _decoder(
        "gpt2-debug", event_shape=(3, 3), captions={"vocabulary_size": 7, "length": 4}
    ),
    "llama-captions": _decoder(
        "llama-debug", kv_heads=1, captions={"vocabulary_size": 7, "length": 3, "dropout": 0.5}
    ),
    "gpt2-hilbert": _decoder("gpt2-debug", event_shape=(3, 3), ordering="hilbert"),
    "gpt2-gaussian": _density("gpt2-debug", {"kind": "gaussian"}),
    "gpt2-discretized": _decoder("gpt2-debug", head=DMOL, tied_embeddings=False),
    "llama": _decoder("llama-debug", kv_heads=1),
    "llama-mog": _density("llama-debug", MOG),
    "llama-permuted": _decoder(
        "llama-debug",
        kv_heads=2,
        event_shape=(3, 3),
        ordering={"kind": "permutation", "seed": 2},
    ),
    "mistral": _decoder("mistral-debug", window=3, kv_heads=1),
    "mistral-mol": _density("mistral-debug", MOL) | {"window": 2},
    "falcon": _decoder("falcon-debug"),
    "falcon-40b": _decoder("falcon-debug", block="parallel-two-norms", kv_heads=2, heads=4),
    "imagegpt": _decoder("imagegpt-debug", event_shape=(3, 3)),
    "vqgan-transformer": _decoder("vqgan-transformer-debug", event_shape=(3, 3)),
    "pixelcnn": {"preset": "pixelcnn-debug", "event_shape": (3, 3, 3), **PIXELS, "width": 6},
    "pixelcnn-embedding": {
        "preset": "pixelcnn-debug",
        "event_shape": (4, 4),
        "input": "embedding",
        **PIXELS,
    },
    "pixelcnn-mog": {
        "preset": "pixelcnn-debug",
        "event_shape": (3, 3),
        **PIXELS,
        "vocabulary_size": None,
        "head": MOG,
    },
    "gated-pixelcnn": {
        "preset": "gated-pixelcnn-debug",
        "event_shape": (3, 3, 3),
        **PIXELS,
        "width": 6,
    },
    "gated-pixelcnn-classes": {
        "preset": "gated-pixelcnn-debug",
        "event_shape": (4, 4),
        **PIXELS,
        "classes": 3,
        "class_dropout": 0.2,
    },
    "pixelcnnpp": {**TINY_PPP, "event_shape": (3, 4, 4)},
    "pixelcnnpp-grey": {**TINY_PPP, "event_shape": (4, 4), "classes": 3},
    "pixelcnnpp-mog": {**TINY_PPP, "event_shape": (4, 4), "vocabulary_size": None, "head": MOG},
    "wavenet": {**TINY_WAVE, "event_shape": (12,), "vocabulary_size": 5},
    "wavenet-mol": {**TINY_WAVE, "event_shape": (12,), "vocabulary_size": None, "head": MOL},
    "wavenet-mog": {**TINY_WAVE, "event_shape": (12,), "vocabulary_size": None, "head": MOG},
    "wavenet-gaussian": {
        **TINY_WAVE,
        "event_shape": (12,),
        "vocabulary_size": None,
        "head": {"kind": "gaussian"},
    },
    "wavenet-discretized-classes": {
        **TINY_WAVE,
        "event_shape": (12,),
        "vocabulary_size": 16,
        "head": DMOL,
        "classes": 3,
    },
    "wavenet-local": {
        **TINY_WAVE,
        "event_shape": (12,),
        "vocabulary_size": 5,
        "classes": 3,
        "local_width": 2,
        "local_hop": 3,
    },
    "made": {"preset": "made-debug", "event_shape": (3, 3), "vocabulary_size": 3},
    "made-binary-classes": {"preset": "made-debug", "event_shape": (3, 3), "classes": 3},
    "made-spiral": {"preset": "made-debug", "event_shape": (3, 3), "ordering": "spiral"},
    "made-discretized": {
        "preset": "made-debug",
        "event_shape": (6,),
        "vocabulary_size": 7,
        "head": DMOL,
    },
    "made-mog": {"preset": "made-mog-debug"},
    "made-gaussian": {"preset": "made-mog-debug", "head": {"kind": "gaussian"}},
    "made-mol": {"preset": "made-mog-debug", "head": MOL},
}


def _model(spec: dict[str, Any]) -> Autoregressive:
    model = build(spec, seed=0).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return _with_local(model) if isinstance(model, WaveNet) and model.upsample else model


def _with_local(model: WaveNet) -> Autoregressive:
    """The model under features of its own, the same in every row: one without that argument."""
    conditionals, cursor = model.conditionals, model.cursor
    frames = -(-model.event_shape[0] // model.config.local_hop)
    features = torch.randn(1, frames, model.config.local_width)

    def conditionals_given(x: Tensor, cond: Tensor | None = None) -> Conditional:
        rows = len(x) if torch.as_tensor(x).dim() else 1
        return conditionals(x, cond, local=features.expand(rows, -1, -1))

    def log_prob_given(x: Tensor, cond: Tensor | None = None) -> Tensor:
        return conditionals_given(x, cond).log_prob(x)

    def cursor_given(batch: int, cond: Tensor | None = None) -> Cursor:
        return cursor(batch, cond, features.expand(batch, -1, -1))

    model.conditionals = conditionals_given  # type: ignore[assignment, method-assign]
    model.log_prob = log_prob_given  # type: ignore[assignment, method-assign]
    model.cursor = cursor_given  # type: ignore[assignment, method-assign]
    return model


def _event(model: Autoregressive, batch: int) -> Tensor:
    """Random events; those of densities are put in generation order only by the model."""
    shape = (batch, *model.event_shape)
    if model.config.vocabulary_size is None:
        return torch.randn(shape)
    return torch.randint(model.config.vocabulary_size, shape)


def _condition(model: Autoregressive, batch: int) -> Tensor | None:
    if (captions := getattr(model.config, "captions", None)) is not None:
        # one without tokens, then such of 1, 2, ... of them
        cond = torch.full((batch, captions.length), -1)
        for row in range(batch):
            ids = torch.arange(row % (captions.length + 1)) + row
            cond[row, : len(ids)] = ids % captions.vocabulary_size
        return cond
    if getattr(model.config, "classes", None) is None:
        return None
    return torch.arange(batch) % (model.config.classes + 1) - 1


def _in_every_row(cond: Tensor | None, rows: int) -> Tensor | None:
    return None if cond is None else cond.expand(rows, *cond.shape[1:])


def _length(model: Autoregressive) -> int:
    return math.prod(model.event_shape)


def _changed(model: Autoregressive, values: Tensor) -> Tensor:
    """Other values, each different from the one given."""
    if model.config.vocabulary_size is None:
        return values + 1.7
    return (values + 1) % model.config.vocabulary_size


every = pytest.mark.parametrize("name", CASES)


@every
@torch.no_grad()
def test_an_element_moves_nothing_before_or_at_itself(name: str) -> None:
    """Exact zeros, at every position. Each event of the batch has one element changed."""
    model = _model(CASES[name])
    length = _length(model)
    x = _event(model, 1)
    sequence = model.to_sequence(x).expand(length, -1).clone()
    perturbed = sequence.clone()
    at = torch.arange(length)
    perturbed[at, at] = _changed(model, sequence[at, at])
    cond = _in_every_row(_condition(model, 1), length)
    before = model.conditionals(model.to_event(sequence), cond)
    after = model.conditionals(model.to_event(perturbed), cond)
    # Both measured at the same elements: what differs is the conditional alone.
    moved = (before.log_prob(sequence) - after.log_prob(sequence)).abs()
    assert torch.equal(moved.tril(), torch.zeros_like(moved))
    later = moved[at[:-1], at[1:]]
    assert (later > 0).any(), "nothing depends on anything: the test would see no leak"


DENSITIES = [name for name, spec in CASES.items() if build(spec).config.vocabulary_size is None]
DISCRETE = [name for name in CASES if name not in DENSITIES]


@pytest.mark.parametrize("name", DENSITIES)
def test_gradients_reach_no_later_value(name: str) -> None:
    """d log p(x_t | x_<t) / d x_s is exactly zero for s >= t, for every t."""
    model = _model(CASES[name])
    inputs = model.to_sequence(_event(model, 1)).requires_grad_(True)
    conditional = model.conditionals(model.to_event(inputs), _condition(model, 1))
    values = conditional.log_prob(inputs.detach())[0]
    jacobian = torch.stack(
        [torch.autograd.grad(value, inputs, retain_graph=True)[0][0] for value in values]
    )
    assert torch.equal(jacobian.triu(), torch.zeros_like(jacobian))
    assert jacobian.tril(-1).any(), "nothing depends on anything: the test would see no leak"


@pytest.mark.parametrize("name", DISCRETE)
def test_gradients_reach_no_later_id(name: str) -> None:
    """Ids have no gradient, what they index has: the gradient of log p(x_t | x_<t) in every
    weight, an embedding's rows among them, is exactly that of a sequence with other ids from
    t on, for every t. Row t of the batch asks for element t; each with a weight of its own,
    so that no two leaks cancel."""
    model = _model(CASES[name])
    length = _length(model)
    sequence = model.to_sequence(_event(model, 1)).expand(length, -1).clone()
    later = torch.ones_like(sequence, dtype=torch.bool).triu()
    cond = _in_every_row(_condition(model, 1), length)
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = 0.5 + torch.rand(length)

    def gradients(given: Tensor) -> tuple[Tensor, ...]:
        nats = model.conditionals(model.to_event(given), cond).log_prob(sequence).diagonal()
        return torch.autograd.grad((weights * nats).sum(), parameters, materialize_grads=True)

    wanted = gradients(sequence)
    got = gradients(torch.where(later, _changed(model, sequence), sequence))
    for parameter, a, b in zip(names, wanted, got, strict=True):
        assert torch.equal(a, b), parameter
    # Ids before the element do count: the test sees what there is to be seen.
    earlier = gradients(torch.where(later, sequence, _changed(model, sequence)))
    assert any(not torch.equal(a, b) for a, b in zip(wanted, earlier, strict=True))


INTEGERS = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@pytest.mark.parametrize("dtype", INTEGERS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", DISCRETE)
@torch.no_grad()
def test_ids_may_have_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    """Shards hold uint8 and uint16, numpy likes int32: the same as int64, to the bit."""
    model = _model(CASES[name])
    x, cond = _event(model, 2), _condition(model, 2)
    cond = None if cond is None else cond.clamp(min=0)
    short, short_cond = x.to(dtype), None if cond is None else cond.to(dtype)
    wanted = model.log_prob(x, cond)
    assert torch.equal(model.log_prob(short, short_cond), wanted)
    sequence = model.to_sequence(short)
    assert torch.equal(model.conditionals(short, short_cond).log_prob(sequence), wanted)

    ours, theirs = model.cursor(2, cond), model.cursor(2, short_cond)
    for first, end in ((0, 1), (1, 4)):
        block = model.to_sequence(x)[:, first:end]
        assert torch.equal(
            theirs.next.log_prob(block[:, 0].to(dtype)), ours.next.log_prob(block[:, 0])
        )
        a, b = ours.advance(block), theirs.advance(block.to(dtype))
        following = model.to_sequence(x)[:, first + 1 : end + 1]
        assert torch.equal(b.log_prob(following.to(dtype)), a.log_prob(following))
    with pytest.raises(ValueError, match=f"x holds {model.config.vocabulary_size}"):
        model.log_prob(torch.full_like(x, model.config.vocabulary_size).to(dtype))


SPACES: dict[str, dict[str, Any]] = {
    # case: changes that make its space small enough to be summed whole
    **{
        name: {"context": 4, "vocabulary_size": 3}
        for name in ("gpt2", "gpt2-classes", "gpt2-discretized", "llama", "mistral", "falcon")
    },
    "gpt2-bos": {"context": 4, "vocabulary_size": 3},
    "gpt2-captions": {"event_shape": (2, 2), "vocabulary_size": 3},
    "llama-captions": {"context": 4, "vocabulary_size": 3},
    "gpt2-hilbert": {"event_shape": (2, 2), "vocabulary_size": 3},
    "llama-permuted": {"event_shape": (2, 2), "vocabulary_size": 3},
    "falcon-40b": {"context": 4, "vocabulary_size": 3},
    "imagegpt": {"event_shape": (2, 2), "vocabulary_size": 3},
    "vqgan-transformer": {"event_shape": (2, 2), "vocabulary_size": 3},
    "pixelcnn": {"event_shape": (3, 1, 2), "vocabulary_size": 3},
    "pixelcnn-embedding": {"event_shape": (2, 2)},
    "gated-pixelcnn": {"event_shape": (3, 2, 1), "vocabulary_size": 3},
    "gated-pixelcnn-classes": {"event_shape": (2, 2)},
    "pixelcnnpp": {"event_shape": (3, 1, 2), "vocabulary_size": 3, "scales": 1},
    "pixelcnnpp-grey": {"event_shape": (2, 2), "vocabulary_size": 4},
    "wavenet": {"event_shape": (4,), "vocabulary_size": 4},
    "wavenet-discretized-classes": {"event_shape": (4,), "vocabulary_size": 4},
    "wavenet-local": {"event_shape": (4,), "vocabulary_size": 4},
    "made": {"event_shape": (2, 3)},
    "made-binary-classes": {},
    "made-spiral": {},
    "made-discretized": {"event_shape": (4,), "vocabulary_size": 4},
}


@pytest.mark.parametrize("name", SPACES)
@torch.no_grad()
def test_all_events_sum_to_one(name: str) -> None:
    model = _model({**CASES[name], **SPACES[name]})
    length, size = _length(model), model.config.vocabulary_size
    space = torch.tensor(list(itertools.product(range(size), repeat=length)))
    for row in (0, 2):  # unconditional, then given something
        given = _condition(model, 3)
        given = None if given is None else _in_every_row(given[row : row + 1], len(space))
        nats = model.log_prob(model.to_event(space), given).double().sum(dim=1)
        assert float(nats.exp().sum()) == pytest.approx(1, abs=1e-5)


@every
@torch.no_grad()
def test_each_conditional_is_normalised(name: str) -> None:
    """pmf rows sum to 1 and agree with log_prob; densities integrate to 1 numerically."""
    model = _model(CASES[name])
    x = _event(model, 2)
    sequence = model.to_sequence(x)
    conditional = model.conditionals(x, _condition(model, 2))
    assert tuple(conditional.shape) == tuple(sequence.shape)
    if model.config.vocabulary_size is not None:
        pmf = conditional.pmf()
        assert torch.allclose(pmf.sum(dim=-1), torch.ones(pmf.shape[:-1]), atol=1e-5)
        named = pmf.gather(-1, sequence.unsqueeze(-1)).squeeze(-1)
        assert torch.allclose(named.log(), conditional.log_prob(sequence), atol=1e-4)
        return
    with pytest.raises(TypeError, match="density"):
        conditional.pmf()
    # A wide grid: with x = sinh(u), even steps in u reach +-4000.
    u = torch.linspace(-9, 9, 2401, dtype=torch.float64)
    density = torch.stack(
        [conditional.log_prob(value.float().expand(sequence.shape)) for value in u.sinh()]
    )
    weights = (u.cosh() * (u[1] - u[0])).view(-1, 1, 1)
    total = (density.double().exp() * weights).sum(dim=0)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-4)


@every
@torch.no_grad()
def test_the_cursor_gives_the_conditionals(name: str) -> None:
    model = _model(CASES[name])
    x = _event(model, 3)
    cond = _condition(model, 3)
    sequence, length = model.to_sequence(x), _length(model)
    wanted = model.log_prob(x, cond)

    cursor = model.cursor(3, cond)
    for t in range(length):
        assert cursor.position == t
        assert tuple(cursor.next.shape) == (3,)
        assert torch.allclose(cursor.next.log_prob(sequence[:, t]), wanted[:, t], atol=1e-5)
        following = cursor.advance(sequence[:, t : t + 1])
        assert tuple(following.shape) == (3, 1 if t + 1 < length else 0)
    with pytest.raises(ValueError, match="complete"):
        _ = cursor.next
    with pytest.raises(ValueError, match=f"position {length}"):
        cursor.advance(sequence[:, :1])


@every
@torch.no_grad()
def test_blocks_and_rewind_change_nothing(name: str) -> None:
    """Blocks of every size, with a way back after each: to anywhere, read or not, on with
    other elements first and then with the right ones."""
    model = _model(CASES[name])
    x = _event(model, 2)
    cond = _condition(model, 2)
    sequence, length = model.to_sequence(x), _length(model)
    wanted = model.log_prob(x, cond)
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for largest in (2, 5, length):
        cursor = model.cursor(2, cond)
        while cursor.position < length:
            start = cursor.position
            stop = start + draw(1, min(largest, length - start))
            following = cursor.advance(sequence[:, start:stop])
            known = min(stop + 1, length)
            values = sequence[:, start + 1 : known]
            assert tuple(following.shape) == tuple(values.shape)
            if values.numel():
                got = following.log_prob(values)
                assert torch.allclose(got, wanted[:, start + 1 : known], atol=1e-5)
            back = draw(0, stop)
            cursor.rewind(back)
            assert cursor.position == stop - back
            if cursor.position < length and draw(0, 1):
                got = cursor.next.log_prob(sequence[:, cursor.position])
                assert torch.allclose(got, wanted[:, cursor.position], atol=1e-5)
            if cursor.position < length and draw(0, 1):  # a wrong turn, taken back
                wrong = _changed(model, sequence[:, cursor.position : cursor.position + 1])
                cursor.advance(wrong)
                cursor.rewind(1)
            if back > 2 or (back and stop == length):
                cursor.advance(sequence[:, cursor.position : stop])
    with pytest.raises(ValueError, match=f"n is {length + 1}"):
        cursor.rewind(length + 1)


@every
def test_gradients_are_finite_and_reach_every_weight(name: str) -> None:
    model = _model(CASES[name]).train()
    x = _event(model, 4)
    nats = model(x, _condition(model, 4))
    assert tuple(nats.shape) == (4, _length(model))
    (-nats.mean()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@every
@torch.no_grad()
def test_samples_are_events_that_a_seed_decides(name: str) -> None:
    model = _model(CASES[name]).train()
    cond = _condition(model, 3)
    first = model.sample(3, cond, seed=5)
    assert tuple(first.shape) == (3, *model.event_shape)
    assert model.training, "sample leaves the mode as it was"
    assert torch.equal(first, model.sample(3, cond, seed=5))
    assert not torch.equal(first, model.sample(3, cond, seed=6))
    assert torch.isfinite(model.log_prob(first, cond)).all()


LONG: dict[str, dict[str, Any]] = {
    "gpt2": _decoder("gpt2-debug", context=64),
    "llama": _decoder("llama-debug", kv_heads=1, context=64),
    "mistral": _decoder("mistral-debug", kv_heads=1, context=64, window=8),
    "falcon": _decoder("falcon-debug", context=64),
    "imagegpt": _decoder("imagegpt-debug", event_shape=(8, 8)),
    "pixelcnn": {"preset": "pixelcnn-debug", **PIXELS, "event_shape": (8, 8)},
    "gated-pixelcnn": {"preset": "gated-pixelcnn-debug", **PIXELS, "event_shape": (8, 8)},
    "pixelcnnpp": {**TINY_PPP, "event_shape": (8, 8)},
    "wavenet": {**TINY_WAVE, "event_shape": (64,), "vocabulary_size": 5},
    "made": {"preset": "made-debug", "event_shape": (8, 8)},
}


@pytest.mark.parametrize("name", LONG)
@torch.no_grad()
@sdpa_kernel(SDPBackend.MATH)  # the counter sees no products inside the fused kernel
def test_a_step_of_the_cursor_recomputes_nothing(name: str) -> None:
    """Floating point operations a step, as torch counts them: a step of the second half costs
    no more than one of the first, but for attention's own look at what is kept."""
    model = _model(LONG[name])
    sequence = model.to_sequence(_event(model, 1))
    cursor = model.cursor(1)
    costs = []
    for t in range(_length(model) - 1):
        with FlopCounterMode(display=False) as counter:
            cursor.advance(sequence[:, t : t + 1])
        costs.append(counter.get_total_flops())
    half = len(costs) // 2
    early, late = costs[4:half], costs[half:]
    config = model.config
    if hasattr(config, "kv_heads"):
        # Two products of one query with one more key a layer: 2 * 2 * H * d each.
        a_key = 4 * config.layers * config.heads * config.head_width
        window = config.window or config.context
        growth = {b - a for a, b in itertools.pairwise(costs[: window - 1])}
        assert growth == {a_key}
        assert len(set(costs[window:])) <= 1
    else:
        assert max(late) <= max(early)
    with FlopCounterMode(display=False) as counter:
        model.conditionals(model.to_event(sequence))
    whole = counter.get_total_flops()
    assert sum(costs) <= 3 * whole, "all steps together cost about one evaluation of the model"


class _Written(TorchDispatchMode):
    """Bytes of what operations make anew: no views, nothing written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        self.nbytes += sum(
            leaf.nbytes
            for leaf in tree_leaves(made)
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given
        )
        return made


@pytest.mark.parametrize("name", ["pixelcnn", "gated-pixelcnn", "pixelcnnpp", "wavenet", "made"])
@torch.no_grad()
def test_a_step_of_the_cursor_copies_no_cache(name: str) -> None:
    """Bytes made by the dearest step grow at most as a row does, where a picture's caches grow
    fourfold, and are fewer than those: counting floating point operations sees no copy."""
    spec, larger = LONG[name], (256,) if name == "wavenet" else (16, 16)
    most, caches = [], []
    for shape in (spec["event_shape"], larger):
        model = _model({**spec, "event_shape": shape})
        sequence = model.to_sequence(_event(model, 1))
        cursor = model.cursor(1)
        steps = []
        for t in range(_length(model) - 1):
            with _Written() as written:
                cursor.advance(sequence[:, t : t + 1])
            steps.append(written.nbytes)
        most.append(max(steps))
        caches.append(cursor.nbytes)
    assert most[1] <= 2.1 * most[0]
    assert 0 < most[1] < caches[1] / 2


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral", "falcon", "falcon-40b", "imagegpt", "gpt2-gaussian"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_bytes_of_a_transformer_cursor(name: str, dtype: torch.dtype) -> None:
    model = _model(CASES[name]).to(dtype)
    config = model.config
    slots = min(config.inputs, config.window or config.inputs)
    wanted = 2 * config.layers * config.kv_heads * config.head_width * slots * dtype.itemsize
    for batch in (1, 3):
        cursor = model.cursor(batch)
        assert cursor.nbytes == batch * wanted
        cursor.advance(model.to_sequence(_event(model, batch)))
        assert cursor.nbytes == batch * wanted


def _bad(model: Autoregressive) -> dict[str, tuple[Any, str]]:
    """What is wrong, the call that does it, words that the message must hold."""
    x = _event(model, 2)
    size = model.config.vocabulary_size
    classes = getattr(model.config, "classes", None)
    sequence = model.to_sequence(x)
    too_long = torch.cat([sequence, sequence[:, :1]], dim=1)
    flat = len(model.event_shape) == 1
    bad = {
        "shape": (lambda: model.log_prob(too_long), rf"x has shape \(2, {too_long.shape[1]}\)"),
        "array": (lambda: model.log_prob(x.numpy()), "x is a ndarray: .*torch.Tensor"),  # type: ignore[arg-type]
        "list": (lambda: model.log_prob(x.tolist()), "x is a list: .*torch.Tensor"),
        "cursor array": (lambda: model.cursor(2).advance(sequence.numpy()), "x is a ndarray"),  # type: ignore[arg-type]
        "no batch": (lambda: model.log_prob(x[0] if not flat else x[0, 0]), "x has shape"),
        "past the end": (
            lambda: model.cursor(2).advance(too_long),
            f"x has {too_long.shape[1]} elements at position 0: the event has {len(sequence[0])}",
        ),
        "rows": (lambda: model.cursor(3).advance(sequence), r"x has shape \(2, "),
        "rewind": (lambda: model.cursor(2).rewind(1), "n is 1: 0 elements"),
        "batch": (lambda: model.cursor(0), "batch is 0"),
    }
    if size is None:
        bad["dtype"] = (lambda: model.log_prob(x.long()), "x has dtype torch.int64")
        for value in (math.nan, math.inf):
            wrong = x.clone()
            wrong.view(-1)[-1] = value
            last = model.to_sequence(wrong)
            bad[f"{value}"] = (lambda w=wrong: model.log_prob(w), f"x holds {value}: .*finite")
            bad[f"cursor {value}"] = (
                lambda last=last: model.cursor(2).advance(last),
                f"x holds {value}: .*finite",
            )
    else:
        above, below = x.clone(), x.clone()
        above.view(-1)[-1], below.view(-1)[0] = size, -1
        bound = rf"0\.\.{size - 1}"
        bad["above"] = (lambda: model.log_prob(above), f"x holds {size}: .*{bound}")
        bad["below"] = (lambda: model.log_prob(below), f"x holds -1: .*{bound}")
        bad["dtype"] = (lambda: model.log_prob(x.float()), "x has dtype torch.float32")
        bad["cursor value"] = (
            lambda: model.cursor(2).advance(torch.full((2, 1), size)),
            f"x holds {size}: .*{bound}",
        )
    captions = getattr(model.config, "captions", None)
    if captions is not None:
        words = rf"cond holds 7: tokens of captions are 0\.\.{captions.vocabulary_size - 1}"
        given = torch.full((2, 2), 7)
        bad["caption"] = (lambda: model.log_prob(x, given), words)
        bad["cursor caption"] = (lambda: model.cursor(2, given), words)
        bad["classes"] = (lambda: model.log_prob(x, given[:, 0]), r"cond has shape \(2,\)")
        hole = torch.tensor([[-1, 0], [0, -1]])
        bad["caption with a hole"] = (lambda: model.log_prob(x, hole), "cond holds tokens after -1")
        complex_ = torch.zeros(2, 2, dtype=torch.complex64)
        bad["complex caption"] = (lambda: model.log_prob(x, complex_), "dtype torch.complex64")
        long = torch.zeros(2, captions.length + 1, dtype=torch.long)
        bad["long caption"] = (lambda: model.log_prob(x, long), "integers of shape .* or shorter")
        documents = torch.zeros_like(x)
        bad["documents"] = (
            lambda: model.conditionals(x, documents=documents),
            "documents were given",
        )
    elif classes is None:
        bad["no classes"] = (
            lambda: model.log_prob(x, torch.zeros(2, dtype=torch.long)),
            "cond was given",
        )
    else:
        given = torch.tensor([0, classes])
        words = rf"cond holds {classes}: classes are 0\.\.{classes - 1}"
        bad["class"] = (lambda: model.log_prob(x, given), words)
        bad["class list"] = (lambda: model.log_prob(x, [0, 0]), "cond is a list")  # type: ignore[arg-type]
        bad["cursor class"] = (lambda: model.cursor(2, given), words)
        for dtype in (torch.bool, torch.complex64, torch.float32):
            other = torch.zeros(2, dtype=dtype)
            bad[f"class {dtype}"] = (lambda o=other: model.log_prob(x, o), f"dtype {dtype}")
        bad["classes"] = (lambda: model.log_prob(x, given[:1] - 1), r"cond has shape \(1,\)")
    return bad


@every
def test_no_events_have_no_likelihoods(name: str) -> None:
    model = _model(CASES[name])
    x = _event(model, 2)[:0]
    nats = model.log_prob(x)
    assert nats.shape == (0, model.to_sequence(_event(model, 1)).shape[1])
    nats.sum().backward()


@every
def test_a_copy_of_a_cursor_goes_its_own_way(name: str) -> None:
    model = _model(CASES[name])
    sequence = model.to_sequence(_event(model, 2))
    with torch.no_grad(), native.allowed():
        cursor = model.cursor(2)
        cursor.advance(sequence[:, :2])
        copied = copy.deepcopy(cursor)
        for column in range(2, sequence.shape[1]):  # the copy keeps what was before these
            cursor.advance(sequence[:, column : column + 1])
        again = model.cursor(2)
        again.advance(sequence[:, :2])
        following = [each.advance(sequence[:, 2:3]) for each in (copied, again)]
        if sequence.shape[1] > 3:
            nats = [each.log_prob(sequence[:, 3:4]) for each in following]
            torch.testing.assert_close(*nats, atol=1e-5, rtol=0)


@every
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    model = _model(CASES[name])
    for call, words in _bad(model).values():
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    "name",
    ["gpt2", "gpt2-gaussian", "gpt2-discretized", "llama-mog", "mistral-mol", "made-mog"],
)
def test_filters_that_make_no_sense_are_refused(name: str) -> None:
    model = _model(CASES[name])
    distribution = model.cursor(2).next
    for temperature in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature is"):
            distribution.sample(temperature=temperature)
    words = {"top_k": "top_k is 0", "top_p": "top_p is 0.0"}
    if model.config.vocabulary_size is None:
        words = {"top_k": "top_k was given", "top_p": "top_p was given"}
    for argument, value in (("top_k", 0), ("top_p", 0.0)):
        with pytest.raises(ValueError, match=words[argument]):
            distribution.sample(**{argument: value})
