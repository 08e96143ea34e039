from pathlib import Path

import pytest
from test_stage import set_value

from tasks.steering.check import problems

ROOT = Path(__file__).parent.parent


def test_every_wrong_value_is_found_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    stages = ["world", "clean", "train_tokenizer", "tokenize", "report"]
    assert problems(stages) == []
    set_value("  vocab_size: ", "  vocab_sise: ")
    set_value("  shard_tokens: ", "  shard_tokens: -")
    set_value("  workers: 2", "  workers: 0")
    found = problems([*stages, "report@v2"])
    assert [line.partition(" is ")[0] for line in found] == [
        "params.yaml: `machine.workers`",
        "params.yaml: `train_tokenizer.vocab_sise`",
        "params.yaml: `tokenize.shard_tokens`",
    ]
