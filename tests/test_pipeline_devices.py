"""Which device a setting means."""

import pytest
import torch

from chainrule.pipeline import devices
from chainrule.pipeline.config import RequestError


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.chosen_device("auto") == "cpu"
    assert devices.chosen_device("cpu") == "cpu"
    with pytest.raises(RequestError, match="device 'cuda': torch sees 0 GPUs here"):
        devices.chosen_device("cuda")
    with pytest.raises(RequestError, match="device 'bogus': no such name"):
        devices.chosen_device("bogus")


def test_every_rank_of_a_node_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.chosen_device("auto") == "cuda:1"
    assert devices.chosen_device("cuda") == "cuda:1"
    assert devices.chosen_device("cuda:0") == "cuda:0"
    assert devices.chosen_device("cuda:1") == "cuda:1"
    with pytest.raises(RequestError, match="device 'cuda:2': torch sees 2 GPUs here"):
        devices.chosen_device("cuda:2")
