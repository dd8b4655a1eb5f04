"""Every way of spreading one training, what each takes, and the smallest change that fits."""

import itertools
from dataclasses import replace
from typing import Any

from chainrule.pipeline.plan_memory import Activations, Scheme, training_memory


def choices(scheme: Scheme) -> list[Scheme]:
    """Every way of spreading the same training: strategies, checkpointing, offload."""
    names = ["ddp" if scheme.ranks > 1 else "single"]
    if not scheme.whole_matrices:
        names += ["zero1", "zero2", "zero3"]
    if scheme.strategy not in names:
        names.insert(0, scheme.strategy)
    found = []
    for name, checkpointing in itertools.product(names, (False, True)):
        zero = name in ("zero1", "zero2", "zero3")
        for offload, everything in ((False, False), (True, False), (True, True)):
            if (offload and not zero) or (everything and name != "zero3"):
                continue
            found.append(
                replace(
                    scheme,
                    strategy=name,
                    checkpointing=checkpointing,
                    offload_optimizer=offload,
                    offload_parameters=everything,
                )
            )
    if scheme not in found:
        found.append(scheme)
    return found


def words(scheme: Scheme) -> str:
    said = [scheme.strategy]
    if scheme.checkpointing:
        said.append("activation checkpointing")
    if scheme.offload_parameters:
        said.append("optimiser and weights on the host")
    elif scheme.offload_optimizer:
        said.append("optimiser on the host")
    return ", ".join(said)


def option(
    parameters: int, scheme: Scheme, activations: Activations, limit: float | None
) -> dict[str, Any]:
    of, heap = (f(scheme.rows, scheme.checkpointing) for f in (activations.of, activations.heap))
    memory = training_memory(parameters, scheme, of, heap)
    return {
        "scheme": words(scheme),
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "buffers": memory.buffers,
        "activations": memory.activations,
        "total": memory.device,
        "host": memory.host,
        "fits": limit is None or memory.device <= limit,
    }


def remedy(parameters: int, scheme: Scheme, activations: Activations, limit: float) -> str:
    """The smallest change under which the training fits: fewest settings, cheapest first."""

    def total(choice: Scheme) -> float:
        return option(parameters, choice, activations, limit)["total"]

    candidates = []
    for choice in choices(scheme):
        rows = scheme.rows
        while rows >= 1:
            candidates.append(replace(choice, rows=rows))
            rows = rows // 2 if rows % 2 == 0 else 0
    order = {"single": 0, "ddp": 0, "zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3}

    def cost(choice: Scheme) -> tuple[int, int, int, int]:
        changed = (
            (choice.strategy != scheme.strategy)
            + (choice.checkpointing != scheme.checkpointing)
            + (choice.offload_optimizer != scheme.offload_optimizer)
            + (choice.offload_parameters != scheme.offload_parameters)
            + (choice.rows != scheme.rows)
        )
        offloads = choice.offload_optimizer + choice.offload_parameters
        return changed, offloads, order[choice.strategy], scheme.rows // choice.rows

    for choice in sorted(candidates, key=cost):
        if total(choice) <= limit:
            return _change(scheme, choice)
    if scheme.whole_matrices:
        return "optimizer.name: adamw, which ZeRO can spread; Muon needs every matrix whole"
    for factor in (2, 4, 8, 16, 32, 64, 128):
        more = replace(
            scheme, strategy="zero3", checkpointing=True, rows=1, ranks=scheme.ranks * factor
        )
        if total(more) <= limit:
            return f"{factor} times the ranks, with {_change(scheme, more)}"
    return "nothing here: one layer alone is too large for this device"


def _change(scheme: Scheme, choice: Scheme) -> str:
    said = []
    if choice.strategy != scheme.strategy:
        said.append(f"engine.strategy: {choice.strategy}")
    if choice.checkpointing and not scheme.checkpointing:
        said.append("engine.activation_checkpointing: true")
    if choice.rows != scheme.rows:
        said.append(f"accumulate x {scheme.rows // choice.rows} ({choice.rows} rows at once)")
    if choice.offload_optimizer and not scheme.offload_optimizer:
        said.append("engine.offload_optimizer: cpu")
    if choice.offload_parameters and not scheme.offload_parameters:
        said.append("engine.offload_parameters: cpu")
    return ", ".join(said)
