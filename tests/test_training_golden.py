"""The first 20 losses of a debug size of each kind of model, held against tests/golden.

On the kind of machine that wrote them they must be equal; elsewhere near. After a change
that is meant to move them: CHAINRULE_WRITE_GOLDEN=1 pytest tests/test_training_golden.py
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from chainrule.jobs import pretrain
from chainrule.pipeline.models import native, native_train

sys.path.insert(0, str(Path(__file__).parent))
import pretrain_ranks as ranks

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"layers": 2, "width": 32, "heads": 2}
DECODERS = {"context": 24, **SMALL}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("text", {"preset": "gpt2-debug", **DECODERS}),
    "llama": ("text", {"preset": "llama-debug", **DECODERS, "kv_heads": 1, "mlp_width": 64}),
    "mistral": ("text", {"preset": "mistral-debug", **DECODERS, "kv_heads": 1, "window": 8}),
    "falcon": ("text", {"preset": "falcon-debug", **DECODERS}),
    "imagegpt": ("image", {"preset": "imagegpt-debug", **SMALL}),
    "gated-pixelcnn": ("image", {"preset": "gated-pixelcnn-debug"}),
    "made": ("image", {"preset": "made-debug"}),
}


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    compiled = native.load(native_train.SOURCE) is not None
    return f"{cpu}, torch {torch.__version__}, {'kernels in C' if compiled else 'no compiler'}"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_losses_are_what_they_were(name, tmp_path, one_thread):
    modality, model = RUNS[name]
    tokens = ranks.write_tokens(tmp_path / "tokens", modality, 30)
    config = {
        "model": model,
        "steps": 20,
        "batch_size": 8,
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup": 5},
    }
    stage = ranks.stage_of(tmp_path / "decoder", [tokens])
    pretrain.main(pretrain.Config.model_validate(config), stage)
    found = [loss for _, loss, _ in ranks.losses_of(stage.folder)]
    path = GOLDEN / f"pretrain-{name}.json"
    if os.environ.get("CHAINRULE_WRITE_GOLDEN"):
        content = {"machine": machine(), "config": config, "losses": found}
        path.write_text(json.dumps(content, indent=1) + "\n")
    golden = json.loads(path.read_text())
    assert golden["config"] == config
    if golden["machine"] == machine():
        assert found == golden["losses"]
    else:
        assert found == pytest.approx(golden["losses"], rel=1e-3)
