"""A plan as text for people."""

from typing import Any


def text(plans: list[dict[str, Any]]) -> str:
    """Every stage's plan, a paragraph each."""
    return "\n\n".join("\n".join(_stage(found)) for found in plans)


def _stage(found: dict[str, Any]) -> list[str]:
    where = f"{found['ranks']} x {found['gpu']}" if found["gpu"] else f"{found['ranks']} on CPU"
    nodes = f", {found['nodes']} nodes" if found["nodes"] > 1 else ""
    lines = [f"{found['stage']}  ({found['job']}; {where}{nodes})"]
    if found["job"] == "pretrain" and "memory" in found:
        return lines + _pretrain(found)
    if found["job"] == "train_tokenizer" and "memory" in found:
        return lines + _tokenizer(found)
    if found.get("parameters") is not None:
        lines.append(f"  parameters   {count(found['parameters'])}")
    if "weights_bytes" in found:
        cache = found["kv_cache_bytes"]
        lines.append(
            f"  memory       weights {size(found['weights_bytes'])}"
            + (f", keys and values {size(cache)}" if cache is not None else "")
        )
    if found.get("shards") is not None:
        tokens = f", {count(found['tokens'])} tokens" if "tokens" in found else ""
        lines.append(
            f"  shards       {found['shards']} of {found['samples']:,} samples, "
            f"{size(found['bytes'])}{tokens}"
        )
    if "note" in found:
        lines.append(f"  {found['note']}")
    return lines


def _tokenizer(found: dict[str, Any]) -> list[str]:
    second = found["discriminator_parameters"]
    height, width, channels = found["image"]
    limit = f" of {size(found['limit'])}" if found["limit"] is not None else ""
    names = ("parameters", "gradients", "optimizer", "buffers", "activations")
    parts = ", ".join(f"{name} {size(found['memory'][name])}" for name in names)
    lines = [
        f"  parameters   {count(found['parameters'])}"
        + (f", discriminator {count(second)}" if second else ""),
        f"  a step       {found['rows_per_micro_batch']} images of {height} x {width} x {channels} "
        "a rank",
        f"  compute      {found['flops_per_image']:.3g} FLOP an image, {found['flops']:.3g} "
        f"for {count(found['images'])} images",
        f"  time         {hours(found['hours'])} at {found['utilisation']:.0%} of "
        f"{found['peak'] / 1e12:,.3g} TFLOP/s",
        f"  memory       {size(found['memory']['total'])} a rank{limit}: {parts}",
        f"  checkpoints  {size(found['checkpoint_bytes'])} each",
    ]
    if "remedy" in found:
        lines.append(f"  DOES NOT FIT. The smallest change that would: {found['remedy']}")
    return lines


def _pretrain(found: dict[str, Any]) -> list[str]:
    assumed = ", ".join(found["assumed"])
    unsettled = f" ({assumed}: assumed until the tokens are made)" if assumed else ""
    per_day = count(found["tokens_per_day"])
    lines = [
        f"  parameters   {count(found['parameters'])}, {found['length']:,} elements{unsettled}",
        f"  a step       {found['tokens_per_step']:,} tokens, "
        f"{found['rows_per_micro_batch']} rows a rank at once",
        f"  compute      {found['flops_per_token']:.3g} FLOP a token, {found['flops']:.3g} "
        f"for {count(found['tokens'])} tokens",
        f"  time         {hours(found['hours'])} at {found['utilisation']:.0%} of "
        f"{found['peak'] / 1e12:,.3g} TFLOP/s ({per_day} tokens a day)",
    ]
    if "calibrated_hours" in found:
        lines.append(
            f"               {hours(found['calibrated_hours'])} by "
            f"{found['calibrated_step_s']:.3g} s a micro-batch, measured on "
            f"{found['calibrated_on']}"
        )
        error = found["predicted_memory"] / found["measured_memory"] - 1
        lines.append(
            f"               memory of that: {size(found['measured_memory'])} measured, "
            f"{size(found['predicted_memory'])} predicted ({error:+.1%})"
        )
    limit = f" of {size(found['limit'])}" if found["limit"] is not None else ""
    head = ("memory a rank" + limit, "weights", "gradients", "optimizer", "buffers")
    rows: list[tuple[str, ...]] = [(*head, "activations", "total", "on the host")]
    for option in found["memory"]:
        mark = "*" if option["scheme"] == found["chosen"]["scheme"] else " "
        name = f"{mark} {option['scheme']}{'' if option['fits'] else '  (too much)'}"
        keys = ("parameters", "gradients", "optimizer", "buffers", "activations", "total", "host")
        rows.append((name, *(size(option[key]) if option[key] else "-" for key in keys)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells))
    lines.append(
        f"  checkpoints  {size(found['checkpoint_bytes'])} each, "
        f"{size(found['checkpoints_bytes'])} kept"
    )
    if "remedy" in found:
        lines.append(f"  DOES NOT FIT. The smallest change that would: {found['remedy']}")
    return lines


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.4g} TB"


def count(value: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:,.4g} {unit}"
    return f"{value:,.0f}"


def hours(value: float) -> str:
    if value < 1 / 60:
        return f"{value * 3600:.0f} s"
    if value < 2:
        return f"{value * 60:.0f} min"
    return f"{value:.1f} h" if value < 72 else f"{value / 24:.1f} days"
