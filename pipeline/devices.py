"""Devices: which one a setting means, and waiting until one has done its work."""

import os
from typing import TYPE_CHECKING

from chainrule.pipeline.config import RequestError

if TYPE_CHECKING:
    import torch


def chosen_device(wanted: str) -> str:
    """A `device` setting as torch takes it: auto is a GPU where there is one, else the CPU; cuda
    without a number is this rank's own GPU, of those on its node. RequestError where it is no
    device's name, or there is no such device here."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted in ("auto", "cuda") and found:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % found}"
    if wanted == "auto":
        return "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise RequestError(
            f"device '{wanted}': no such name; take auto, cpu, cuda or cuda:1"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= found:
        raise RequestError(f"device '{wanted}': torch sees {found} GPUs here; take auto or cpu")
    return wanted


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None


def synchronise(device: "torch.device") -> None:
    """Wait for a GPU, whose work goes on behind the clock's back."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
