"""Parts of the models in C, where there is a compiler: steps of generation, kernels of training.

A source is built once a machine, when it is first wanted, and kept under `TORCH_EXTENSIONS_DIR`
or the user's cache. Without a compiler, outside `allowed()`, and with CHAINRULE_NATIVE=0, torch
does everything.

Roundings differ from torch's in the last bits, so what has to give the same floats elsewhere
(compression) does not ask for it.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_allowed: ContextVar[bool] = ContextVar("native", default=False)


@contextmanager
def allowed() -> Iterator[None]:
    """Inside, C may be used: by the steps of cursors made there, by training."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def is_allowed() -> bool:
    return _allowed.get() and os.environ.get("CHAINRULE_NATIVE") != "0"


def twice() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`: what is recomputed in a backward pass goes the way it went before."""
    return nullcontext(), _Allowed() if is_allowed() else nullcontext()


class _Allowed(AbstractContextManager[None]):
    """`allowed()`, however often something is recomputed."""

    def __enter__(self) -> None:
        self._entered = allowed()
        self._entered.__enter__()

    def __exit__(self, *fault: Any) -> None:
        self._entered.__exit__(*fault)


def is_exact_on_cpu(x: Tensor) -> bool:
    """Float32 on a CPU, not to be cast, where roundings other than torch's are allowed."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and is_allowed()
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed()
    )


def is_read_by_c(weight: Tensor) -> bool:
    """Whether a weight lies as the C reads it."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()


def is_transformed() -> bool:
    """Whether torch.func is at work, which wants plain expressions and shows no values."""
    return torch._C._are_functorch_transforms_active()


def is_watched(module: nn.Module) -> bool:
    """Whether something is to be called when it is, when any is, or in its place."""
    return (
        any(getattr(module, hooks) for hooks in _HOOKS)
        or any(getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS)
        or "forward" in vars(module)
    )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-std=gnu11")
_rooms = threading.local()


def room(floats: int) -> Tensor:
    """Memory to work in, kept by each thread: malloc gives what is large back to the kernel, and
    its pages would come anew for every call. What is in it lasts until the next call."""
    held: Tensor | None = getattr(_rooms, "held", None)
    if held is None or held.numel() < floats:
        held = _rooms.held = torch.empty(floats, dtype=torch.float32, device="cpu")
    return held


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where the numbers of each tensor are."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def functions(source: Path, signatures: dict[str, str]) -> Any:
    """A source's functions by name, None without a compiler. A signature has a letter an argument:
    n an int64, d a double, p an address; "nn->n" gives a number back, the others nothing."""
    library: Any = load(source)
    if library is not None:
        kinds = {"n": ctypes.c_int64, "d": ctypes.c_double, "p": ctypes.c_void_p}
        for name, signature in signatures.items():
            arguments, _, result = signature.replace(" ", "").partition("->")
            function = getattr(library, name)
            function.argtypes = [kinds[letter] for letter in arguments]
            function.restype = kinds[result] if result else None
    return library


def load(source: Path) -> ctypes.CDLL | None:
    """A source as a library, built where it is not yet; None without a compiler, and where what
    was built cannot be loaded (cut short, a cache on a file system without execution)."""
    path = _build(source)
    try:
        return None if path is None else ctypes.CDLL(str(path))
    except OSError:
        return None


def _build(source: Path) -> Path | None:
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    # A home that machines share: what was built for one must not run on another.
    digest = hashlib.sha256(source.read_bytes())
    for included in sorted(source.parent.glob("*.[ch]")):
        digest.update(included.read_bytes())
    digest.update(f"{compiler} {FLAGS} {platform.machine()} {_processor()}".encode())
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        folder = Path(root) if root else _cache_folder()
        path = folder / f"{source.stem}-{digest.hexdigest()[:16]}.so"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / path.name
            for more in (["-fopenmp"], ["-fopenmp-simd"]):  # one thread where there is no OpenMP
                command = [compiler, *FLAGS, *more, str(source), "-o", str(built), "-lm"]
                if subprocess.run(command, capture_output=True).returncode == 0:
                    built.replace(path)  # whole or not at all: others may be building it too
                    return path
    except OSError:  # nowhere to keep it
        pass
    return None


def _cache_folder() -> Path:
    """OSError for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "chainrule"
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))
