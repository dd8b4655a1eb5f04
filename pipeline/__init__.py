"""The parts that jobs are made of. Public: ``load`` and ``build``.

``load(folder)`` gives any handed-off model; ``build("llama-debug")`` a fresh one.
They are imported on first use, so that the command line does not pay for torch
where it only reads artifacts.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainrule.pipeline.models.folder import load
    from chainrule.pipeline.models.registry import build

__all__ = ["build", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from chainrule.pipeline.models.folder import load

        return load
    if name == "build":
        from chainrule.pipeline.models.registry import build

        return build
    raise AttributeError(f"module 'chainrule.pipeline' has no attribute {name!r}")
