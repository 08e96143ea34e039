from typing import Any

import pytest
import torch

from tasks.learning.loop import log_training, peak_flops


def test_peak_is_measured_or_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e9 < peak_flops(torch.device("cpu"), "fp32") < 1e14
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(torch.device("cuda"), "bf16") == 989e12


def test_what_is_logged_is_the_mean_of_the_steps_since_the_last_time_but_the_newest_rate() -> None:
    logged: list[Any] = []

    class Recorder:
        def log(self, metrics: dict[str, float], **at: int) -> None:
            logged.append((metrics, at))

    steps = [
        {"loss": 3.0, "accuracy": 0.5, "learning_rate": 0.1},
        {"loss": 1.0, "accuracy": 1.0, "learning_rate": 0.2},
    ]
    recorder: Any = Recorder()
    row = log_training(recorder, steps, {"step": 7, "pairs": 4, "tokens": 90}, {"mfu": 0.4})
    assert row == {"step": 7, "pairs": 4, "tokens": 90, "loss": 2.0, "accuracy": 0.75, "learning_rate": 0.2}
    found = {"train/loss": 2.0, "train/accuracy": 0.75, "train/learning_rate": 0.2, "train/mfu": 0.4}
    assert logged == [(found, {"step": 7, "tokens": 90})]
    assert steps == []
