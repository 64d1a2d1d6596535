"""Tests run on the CPU, whatever this machine has, unless they are marked gpu: their processes too."""

import pytest
import torch


@pytest.fixture(autouse=True)
def only_gpu_tests_see_a_gpu(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
