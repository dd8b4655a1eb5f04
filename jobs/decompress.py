"""The files of a container, given back under the model it names, or refused with the reason."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from chainrule.jobs.compress import (
    DTYPES,
    SHOWN,
    CompressError,
    open_adapter,
)
from chainrule.jobs.sample import open_source
from chainrule.pipeline.coding import container
from chainrule.pipeline.coding.archive import unpack
from chainrule.pipeline.coding.container import Container
from chainrule.pipeline.coding.header import ContainerError
from chainrule.pipeline.destinations import require_file_place
from chainrule.pipeline.sampling.request import Source
from chainrule.pipeline.whole_file import whole

DEVICES = ("cpu", "cuda", "mps")


def decompress_file(
    path: Path,
    model_folder: Path | None = None,
    out: Path | None = None,
    device: str | None = None,
    force: bool = False,
    report: Callable[[int], None] = lambda symbols: None,
) -> list[Path]:
    """The container's files, written into the folder `out` (default: the container's own).

    For a container of one file `out` may be a file name with the same suffix. `device`: None for
    the kind of device it was coded on. The model is looked for where it lay, then by its
    fingerprint below the container's folder and the working directory. Nothing is written before
    everything is decoded and compared: CompressError otherwise.
    """
    path = Path(path)
    try:
        packed = container.read(path)
    except ContainerError as error:
        raise CompressError(str(error)) from None
    targets = _targets(packed, out, force)
    model = adapter = None
    if any(entry.how == "model" for entry in packed.header.entries):
        source = _open_same_model(packed, model_folder, device)
        model, adapter = source.model, open_adapter(source)
    try:
        files = unpack(packed, model, adapter, report)
    except ContainerError as error:
        raise CompressError(str(error)) from None
    for target, (_, data) in zip(targets, files, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as temporary:
            temporary.write_bytes(data)
    return targets


def _open_same_model(packed: Container, given: Path | None, device: str | None) -> Source:
    """The model that the container was coded under, as it was then; CompressError."""
    path, header = packed.path, packed.header
    dtype, kind = header.contract["dtype"], header.contract["device"]
    if dtype not in DTYPES:
        raise CompressError(f"{path}: was coded in {dtype!r}; known: {', '.join(DTYPES)}")
    if kind not in DEVICES:
        raise CompressError(f"{path}: was coded on {kind!r}; known: {', '.join(DEVICES)}")
    if device is None and kind == "cuda" and not torch.cuda.is_available():
        raise CompressError(
            f"{path}: was coded on a GPU ({header.contract['accelerator']}), and none is here; "
            "--device cpu tries it nevertheless"
        )
    folder = Path(given) if given is not None else _folder_of(packed)
    if folder is None or not (folder / "card.json").is_file():
        raise CompressError(
            f"{folder or path}: {'not a model folder' if folder else 'its model is not found'}; "
            f"{path} was coded under the model {header.fingerprint}: name its folder with --model"
        )
    source = open_source(folder, device or kind, dtype)
    found = str(source.card.get("fingerprint"))[:SHOWN]
    if found != header.fingerprint:
        remedy = "name the right one with --model"
        if given is not None:
            remedy += ", or leave --model out, and it is looked for"
        raise CompressError(
            f"{path}: was coded under the model {header.fingerprint}, {folder} is {found}; {remedy}"
        )
    return source


def _folder_of(packed: Container) -> Path | None:
    """Where the container's model lies: where it lay, or up to three folders below the
    container's folder or the working directory."""
    hint = packed.header.folder
    mine = re.compile(rf'"fingerprint":\s*"{packed.header.fingerprint}')
    if hint and (Path(hint) / "card.json").is_file():
        return Path(hint)
    for root in (packed.path.parent, Path()):
        for depth in range(4):
            for card in sorted(root.glob("*/" * depth + "card.json")):
                if mine.search(card.read_text(errors="replace")):
                    return card.parent
    return Path(hint) if hint else None


def _targets(packed: Container, out: Path | None, force: bool) -> list[Path]:
    """Where each file goes; CompressError for a name that leads elsewhere or is taken,
    RequestError for one that cannot be written."""
    names = [entry.name for entry in packed.header.entries]
    for name in names:
        parts = name.split("/")
        if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
            raise CompressError(f"{packed.path}: holds a file named {name!r}, which is refused")
    folder = packed.path.parent if out is None else Path(out)
    one_file = len(names) == 1 and out is not None and not Path(out).is_dir()
    if one_file and folder.suffix and folder.suffix == Path(names[0]).suffix:
        targets = [folder]
    else:
        targets = [folder / name for name in names]
    if len(set(targets)) != len(targets):
        raise CompressError(f"{packed.path}: holds two files of one name")
    for target in targets:
        require_file_place(target)
        if target.exists() and not force:
            raise CompressError(f"{target}: exists; name another folder with -o or pass --force")
    return targets
