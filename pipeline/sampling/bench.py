"""How fast decoding is, as ratios within one run: `chainrule bench decode`, `bench speculative`.

    decode        this sampler against `transformers`' generate with its cache, equal weights,
                  and the share of the memory-bandwidth bound that each reaches
    images        pictures a second from a decoder of 16 x 16 codes, with guidance and without
    speculative   acceptance, cost of the draft, the formula's speed-up and the measured one

Contestants take turns, round after round, and lower quartiles are compared: on a shared machine
absolute times drift, ratios of neighbours hold, and what others take only adds. One token at
batch 1 reads every weight once (embedding rows apart); the bound is the time of a sum over as
many bytes, by as many threads, which takes its turn with the others.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainrule.pipeline.models.contract import Autoregressive
from chainrule.pipeline.models.registry import build
from chainrule.pipeline.sampling.drafts import Draft, ModelDraft
from chainrule.pipeline.sampling.filters import Filters, Guidance
from chainrule.pipeline.sampling.int8 import Int8Linear, quantise
from chainrule.pipeline.sampling.sampler import Drawn, Plan, Rules, draw, pack_prompts
from chainrule.pipeline.sampling.speculative import Gamma, Statistics, expected_speedup, speculate
from chainrule.pipeline.sampling.uniforms import sample_seeds

PROMPT = 16
"""Tokens before those that are timed."""

_SHAPE_10M = {"vocabulary_size": 512, "layers": 6, "heads": 6, "width": 384}
_SHAPE_124M = {"vocabulary_size": 50257, "layers": 12, "heads": 12, "width": 768}
_BOTH = {"context": 256, "bos": 0, "tied_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2-10m": {"family": "gpt2", **_SHAPE_10M, **_BOTH},  # 10,942,464
    "llama-10m": {"family": "llama", **_SHAPE_10M, **_BOTH},  # 10,818,432
    "gpt2-124m": {"family": "gpt2", **_SHAPE_124M, **_BOTH},  # 123,849,984
    "llama-124m": {"family": "llama", **_SHAPE_124M, **_BOTH},  # 123,551,232
}


_SHAPE_IMAGES: dict[str, Any] = {
    "family": "gpt2",
    "event_shape": (16, 16),
    "classes": 10,
    "class_dropout": 0.1,
    "tied_embeddings": False,
}
IMAGE_MODELS: dict[str, dict[str, Any]] = {
    # Codes of a VQ-VAE's size, and of LlamaGen's.
    "images-11m": {**_SHAPE_IMAGES, "vocabulary_size": 512, "layers": 6, "heads": 6, "width": 384},
    "images-111m": {
        **_SHAPE_IMAGES,
        "vocabulary_size": 16384,
        "layers": 12,
        "heads": 12,
        "width": 768,
    },
}


def reading(size: int, device: torch.device, times: int) -> Callable[[], object]:
    """Read `size` bytes, `times` over, by a sum: what a step of decoding cannot be faster than."""
    x = torch.ones(size // 4, device=device)

    def read() -> None:
        for _ in range(times):
            x.sum().item()

    return read


def weight_bytes(model: Autoregressive) -> int:
    """Bytes read for a token: all weights but tables of which one row is looked up."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    quantised = [m for m in model.modules() if isinstance(m, Int8Linear)]
    if quantised or not getattr(model.config, "tied_embeddings", True):
        sizes.pop("embedding.weight", None)
    sizes.pop("positions", None)
    return sum(sizes.values()) + sum(b.nbytes for m in quantised for b in m.buffers())


def _plan(model: Autoregressive, batch: int, tokens: int, seed: int = 0) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vocabulary_size
    prompts = torch.randint(size, (batch, PROMPT), generator=generator).tolist()
    known, given = pack_prompts(prompts)
    return Plan(
        sample_seeds(seed, np.arange(batch)),
        np.full(batch, PROMPT + tokens),
        known=known,
        given=given,
    )


def take_turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Lower quartile of each contestant's seconds; all run once before the clock starts."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: sorted(found)[(len(found) - 1) // 4] for name, found in times.items()}


def decode(
    names: Sequence[str] = tuple(MODELS),
    batches: Sequence[int] = (1, 32),
    dtypes: Sequence[str] = ("float32",),
    tokens: int = 32,
    rounds: int = 9,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row for each model, dtype and batch: greedy tokens a second, ours and theirs.

    With int8 weights, theirs are float32: `transformers` has none of its own on a CPU.
    """
    where = torch.device(device)
    rows = []
    for name in names:
        for dtype in dtypes:
            kept = torch.float32 if dtype == "int8" else getattr(torch, dtype)
            model = build(MODELS[name], seed=0).to(where, kept).eval()
            theirs = _transformers_twin(model, where, kept)
            parameters = sum(p.numel() for p in model.parameters())
            if dtype == "int8":
                quantise(model)
            rows += [
                {
                    "model": name,
                    "parameters": parameters,
                    "dtype": dtype,
                    "batch": batch,
                    **_decode_row(model, theirs, batch, tokens, rounds),
                }
                for batch in batches
            ]
    return rows


def _decode_row(
    model: Autoregressive, theirs: Any, batch: int, tokens: int, rounds: int
) -> dict[str, Any]:
    plan, rules = _plan(model, batch, tokens), Rules(Filters(temperature=0))
    size = weight_bytes(model)
    contestants: dict[str, Callable[[], object]] = {
        "bound": reading(size, next(model.parameters()).device, tokens),
        "ours": lambda: draw(model, plan, rules),
    }
    same = None
    if theirs is not None:
        contestants["transformers"] = lambda: _generate(theirs, plan, tokens)
        equal = draw(model, plan, rules).x == _generate(theirs, plan, tokens)
        same = float(equal[:, PROMPT:].float().mean())
    seconds = take_turns(contestants, rounds)
    row: dict[str, Any] = {
        "bandwidth GB/s": size * tokens / seconds["bound"] / 1e9,
        **{who: batch * tokens / s for who, s in seconds.items()},
    }
    if theirs is not None:
        row["ratio"] = row["ours"] / row["transformers"]
        row["same tokens"] = same
    for who in ("ours", "transformers"):
        if who in row:
            row[f"{who} of bound"] = row[who] / row["bound"]
    return row


def images(
    names: Sequence[str] = tuple(IMAGE_MODELS),
    batches: Sequence[int] = (1, 16),
    dtypes: Sequence[str] = ("float32",),
    guidance: float = 3.0,
    rounds: int = 5,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row for each model, dtype and batch: pictures (of codes) a second."""
    rows = []
    for name in names:
        for dtype in dtypes:
            model = build(IMAGE_MODELS[name], seed=0).eval()
            model.to(device, torch.float32 if dtype == "int8" else getattr(torch, dtype))
            parameters = sum(p.numel() for p in model.parameters())
            if dtype == "int8":
                quantise(model)
            codes = torch.Size(model.event_shape).numel()
            for batch in batches:
                cond = torch.arange(batch) % model.config.classes
                plan = Plan(sample_seeds(0, np.arange(batch)), np.full(batch, codes), cond=cond)
                seconds = take_turns(
                    {
                        "guided": partial(
                            draw, model, plan, Rules(guidance=Guidance(scale=guidance))
                        ),
                        "plain": partial(draw, model, plan, Rules()),
                    },
                    rounds,
                )
                rows.append(
                    {
                        "model": name,
                        "parameters": parameters,
                        "dtype": dtype,
                        "batch": batch,
                        "guided images/s": batch / seconds["guided"],
                        "plain images/s": batch / seconds["plain"],
                        "guided codes/s": batch * codes / seconds["guided"],
                    }
                )
    return rows


def _transformers_twin(model: Autoregressive, device: torch.device, dtype: torch.dtype) -> Any:
    """The same weights in `transformers`; None where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    from chainrule.pipeline.models.transformers_format import to_transformers

    with tempfile.TemporaryDirectory() as folder:
        to_transformers(model, Path(folder))
        twin: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return twin.to(device).eval()


@torch.no_grad()
def _generate(theirs: Any, plan: Plan, tokens: int) -> Tensor:
    assert plan.known is not None
    device = next(theirs.parameters()).device
    bos = torch.full((plan.rows, 1), theirs.config.bos_token_id)
    prompt = torch.cat([bos, plan.known], dim=1).to(device)
    whole: Tensor = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return whole[:, 1:].cpu()


def speculative(
    model: Autoregressive,
    drafts: dict[str, Draft],
    plan_of: Callable[[int], Plan],
    rules: Rules,
    batches: Sequence[int] = (1, 8),
    gammas: Sequence[Gamma] = (Gamma(),),
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """A row for each draft, gamma and batch: acceptance, cost, expected and measured speed-up.

    `plan_of(batch)` says what a batch of samples is to be.
    """
    rows = []
    for batch in batches:
        for name, draft in drafts.items():
            for gamma in gammas:
                found = _speculative_row(model, draft, plan_of(batch), rules, gamma, rounds)
                most = f"{'up to ' if gamma.adapt else ''}{gamma.most}"
                rows.append({"draft": name, "gamma": most, "batch": batch, **found})
    return rows


def _speculative_row(
    model: Autoregressive,
    draft: Draft,
    plan: Plan,
    rules: Rules,
    gamma: Gamma,
    rounds: int,
) -> dict[str, Any]:
    found: list[Statistics] = []
    drawn: list[Drawn] = []

    def speculated() -> None:
        found.append(speculate(model, draft, plan, rules, gamma)[1])

    contestants: dict[str, Callable[[], object]] = {
        "plain": lambda: drawn.append(draw(model, plan, rules)),
        "speculative": speculated,
    }
    if isinstance(draft, ModelDraft):
        contestants["draft"] = lambda: draw(draft.source, plan, rules)
    seconds = take_turns(contestants, rounds)
    given = 0 if plan.given is None else int(plan.given.sum())
    # Texts that end by themselves are of other lengths with a draft: rates are compared.
    plain = (int(drawn[-1].lengths.sum()) - given) / seconds["plain"]
    cost = seconds["draft"] / seconds["plain"] if "draft" in seconds else 0.0
    seen = found[-1]
    mean_gamma = statistics.fmean(seen.windows) if seen.windows else 0.0
    return {
        "acceptance": seen.acceptance,
        "draft cost": cost,
        "mean gamma": mean_gamma,
        "tokens a call": seen.drawn / max(seen.rounds, 1),
        "formula": expected_speedup(seen.acceptance, mean_gamma, cost),
        "plain tokens/s": plain,
        "speculative tokens/s": seen.drawn / seconds["speculative"],
        "measured": seen.drawn / seconds["speculative"] / plain,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text in columns, in the order of the first row's keys."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_shown(column, row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def _shown(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if column.endswith("of bound") or column in ("same tokens", "acceptance"):
            return f"{value:.0%}"
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
