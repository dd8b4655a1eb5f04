"""The parameter counts that stand beside the presets are true."""

import re
from pathlib import Path

import pytest
import torch

from chainrule.pipeline.models import gated_pixelcnn, made, pixelcnn, pixelcnnpp, wavenet
from chainrule.pipeline.models.registry import PRESETS, build

FILES = (made, pixelcnn, gated_pixelcnn, pixelcnnpp, wavenet)


def stated(module) -> dict[str, int]:
    """The number in the comment on the line that opens or holds each preset."""
    source = Path(module.__file__).read_text()
    lines = re.findall(r'^ {4}"([a-z0-9-]+)": \{.*# ([\d,]+)$', source, flags=re.MULTILINE)
    return {name: int(count.replace(",", "")) for name, count in lines}


@pytest.mark.parametrize("module", FILES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_parameter_counts_of_presets(module):
    counts = stated(module)
    assert counts.keys() == module.PRESETS.keys() <= PRESETS.keys()
    for name, count in counts.items():
        with torch.device("meta"):
            model = build(name)
        assert sum(p.numel() for p in model.parameters()) == count, name
