import pytest
import torch

from tasks.training import peak_flops


def test_peak_is_measured_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), "fp32") < 1e14
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16") == 989e12
