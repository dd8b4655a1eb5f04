"""How fast the models are, as ratios within one run: `chainrule bench step`, `bench cursor`.

    step     a training step of a decoder against the same shape in `transformers`: forward,
             backward, fused AdamW, same weights and batch
    cursor   an element through the cursor against evaluating the whole network for it, in
             every family, at growing lengths; 4,000 samples of a WaveNet and a 32 x 32 picture
             of a PixelCNN++ by name

Contestants take turns; the ratio is the median of the rounds' ratios. On a shared machine
absolute times drift, neighbours in time are slowed alike.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chainrule.pipeline.devices import synchronise
from chainrule.pipeline.models import native
from chainrule.pipeline.models.contract import Autoregressive, Cursor
from chainrule.pipeline.models.decoder import Decoder
from chainrule.pipeline.models.registry import build

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    # name: batch, settings. nanoGPT's sizes for a CPU and for a small GPU.
    "4x128": (12, {"layers": 4, "heads": 4, "width": 128, "context": 64, "vocabulary_size": 65}),
    "6x384": (8, {"layers": 6, "heads": 6, "width": 384, "context": 256, "vocabulary_size": 65}),
}
FAMILIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gpt2": lambda shape: {},
    "llama": lambda shape: {"mlp_width": _two_thirds(shape), "kv_heads": shape["heads"] // 2},
    "mistral": lambda shape: {
        "mlp_width": _two_thirds(shape),
        "kv_heads": shape["heads"] // 2,
        "window": shape["context"] // 2,
    },
    "falcon": lambda shape: {"kv_heads": 1},
    "imagegpt": lambda shape: {},
}


def _two_thirds(shape: dict[str, Any]) -> int:
    """8/3 of the width in whole 32s: the parameters of an MLP of 4 widths."""
    return int(8 * shape["width"] / 3) // 32 * 32


def _turns(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int
) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio theirs / ours of the rounds."""
    for run in (ours, theirs) * 2:
        run()
    gc.collect()
    gc.freeze()  # whose turn it is should not pay for all that stands
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, found in zip((ours, theirs), times, strict=True):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    gc.unfreeze()
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratio


def step(
    families: Sequence[str] = tuple(FAMILIES),
    shapes: Sequence[str] = ("4x128",),
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    rounds: int = 15,
    device: str = "cpu",
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """A row a family, shape and dtype (bfloat16: autocast over float32 weights)."""
    rows = []
    for family in families:
        for name in shapes:
            batch, shape = SHAPES[name]
            settings = {"family": family, **shape, "bos": 0, **FAMILIES[family](shape)}
            if family == "imagegpt":
                settings.pop("bos")
            for dtype in dtypes:
                ours, theirs = _step_contestants(settings, batch, dtype, device, compiled)
                mine, other, ratio = _turns(ours, theirs, rounds)
                rows.append(
                    {
                        "family": family,
                        "shape": name,
                        "dtype": dtype,
                        "compiled": compiled,
                        "ours ms": 1e3 * mine,
                        "transformers ms": 1e3 * other,
                        "ratio": ratio,
                    }
                )
    return rows


def _step_contestants(
    settings: dict[str, Any], batch: int, dtype: str, device: str, compiled: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    import transformers

    from chainrule.pipeline.models.transformers_format import to_transformers

    model = build(settings, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        to_transformers(model, Path(folder))
        kind: Any = transformers.AutoModelForCausalLM
        if settings["family"] == "imagegpt":
            kind = transformers.ImageGPTForCausalImageModeling
        quiet = {name: 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
        if settings["family"] not in ("gpt2", "imagegpt"):
            quiet = {}
        twin = kind.from_pretrained(folder, **quiet)
    size, length = settings["vocabulary_size"], settings["context"]
    x = torch.randint(size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    start = torch.full((batch, 1), twin.config.bos_token_id, device=device)
    inputs = torch.cat([start, x[:, :-1]], dim=1)

    def run(network: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
        network.to(device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        precision = "bf16" if dtype == "bfloat16" else "fp32"
        stays = isinstance(network, Decoder) and network.is_faster_uncompiled(
            torch.device(device), precision
        )
        if compiled and not stays:
            network.compile()

        def once() -> float:
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return float(loss.detach())  # waits for a GPU, too

        return once

    def their_loss() -> Tensor:
        logits = twin(input_ids=inputs, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), x.flatten())

    @native.allowed()
    def our_loss() -> Tensor:
        loss: Tensor = -model(x).mean()
        return loss

    return run(model, our_loss), run(twin, their_loss)


CURSORS: dict[str, Callable[[int], dict[str, Any]]] = {
    # side -> a config whose event has side * side elements (a third more for RGB's channels)
    "gpt2": lambda side: {"preset": "gpt2-debug", "context": side * side},
    "llama": lambda side: {"preset": "llama-debug", "context": side * side},
    "mistral": lambda side: {"preset": "mistral-debug", "context": side * side, "window": 32},
    "falcon": lambda side: {"preset": "falcon-debug", "context": side * side},
    "imagegpt": lambda side: {"preset": "imagegpt-debug", "event_shape": (side, side)},
    "pixelcnn": lambda side: {"preset": "pixelcnn-mnist", "event_shape": (side, side)},
    "gated-pixelcnn": lambda side: {
        "preset": "gated-pixelcnn-mnist",
        "event_shape": (side, side),
    },
    "pixelcnnpp": lambda side: {"preset": "pixelcnnpp-small", "event_shape": (3, side, side)},
    "wavenet": lambda side: {
        "preset": "wavenet-debug",
        "event_shape": (side * side,),
        "cycles": 2,
        "layers": 8,
        "residual_width": 32,
        "gate_width": 32,
        "skip_width": 64,
    },
    "made": lambda side: {"preset": "made-500", "event_shape": (side, side)},
}


CASES: dict[str, dict[str, Any]] = {
    # one size each: a quarter of a second at 16 kHz, and a picture of CIFAR-10's size
    "wavenet-4000": {"preset": "wavenet", "event_shape": (4000,)},
    "pixelcnnpp-32": {"preset": "pixelcnnpp-small", "event_shape": (3, 32, 32)},
    "pixelcnnpp-32-paper": {"preset": "pixelcnnpp-cifar10", "event_shape": (3, 32, 32)},
}


@torch.no_grad()
def cursor(
    families: Sequence[str] = (*CURSORS, *CASES),
    sides: Sequence[int] = (8, 16, 32),
    evaluations: int = 5,
    batch: int = 1,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row a family and length (CASES have their own, `sides` are not theirs): an element
    through the cursor, over a whole event and each with a draw, against two naive loops.

        event    the loop that evaluates the whole network over the whole event for each
                 element, as the first published samplers do (4,000 evaluations over 4,000
                 samples): milliseconds and ratio "event"
        known    the loop that evaluates it over no more than what is known, t elements for
                 element t: half the work, and only a sequence can be cut so. "known"

    Both are evaluated at `evaluations` evenly spread places of the walk, in turns with it, and
    counted as often as there are elements. Elements a second count all rows of the batch."""
    rows = []
    for family in families:
        specs = [CASES[family]] if family in CASES else [CURSORS[family](side) for side in sides]
        for spec in specs:
            model = build(spec, seed=0).to(device).eval()
            length = torch.Size(model.event_shape).numel()
            x = _elements(model, batch, length).to(device)
            cached, event, known = _walk(model, x, evaluations)
            rows.append(
                {
                    "family": family,
                    "elements": length,
                    "cursor ms": 1e3 * cached,
                    "event ms": 1e3 * event,
                    "known ms": None if known is None else 1e3 * known,
                    "cursor/s": batch / cached,
                    "event/s": batch / event,
                    "ratio event": event / cached,
                    "ratio known": None if known is None else known / cached,
                    "cache KB": model.cursor(batch).nbytes / 1024,
                }
            )
    return rows


def _elements(model: Autoregressive, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocabulary_size, (batch, length), generator=generator)


def _walk(model: Autoregressive, x: Tensor, evaluations: int) -> tuple[float, float, float | None]:
    """Seconds an element: through the cursor, each conditional asked for a draw; and of the
    network over the whole event and over what is known (None: not for pictures), the mean over
    places spread over the event, where the walk pauses for them."""
    generator = torch.Generator(device=x.device).manual_seed(0)
    length = x.shape[1]
    places = {round(length * (i + 0.5) / evaluations) for i in range(evaluations)}
    sequence = len(model.event_shape) == 1
    cached, event, known = 0.0, [], []
    event_x = model.to_event(x)
    walk: Cursor | None = None
    for t in range(length):
        if t in places:
            event.append(_evaluation(model, event_x))
            if sequence:
                known.append(_evaluation(model, x[:, : max(t, 1)]))
        synchronise(x.device)
        began = time.perf_counter()
        walk = walk or model.cursor(len(x))
        walk.next.sample(generator)
        walk.advance(x[:, t : t + 1])
        synchronise(x.device)
        cached += time.perf_counter() - began
    return cached / length, statistics.mean(event), statistics.mean(known) if known else None


def _evaluation(model: Autoregressive, x: Tensor) -> float:
    model.conditionals(x)
    synchronise(x.device)
    began = time.perf_counter()
    model.conditionals(x)
    synchronise(x.device)
    return time.perf_counter() - began
