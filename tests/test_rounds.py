from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tasks.reading.rounds import round_named, round_of

NOTHING = "data/seeds/none"
FIRST = {
    "newest": "data/sft", "earlier": "data/sft/early", "batches": "data/world/preferences", "samples": NOTHING,
    "distil_from": NOTHING, "ghost_attention": NOTHING, "context_distillation": NOTHING,
}  # fmt: skip


def after(number: int, **changes: str) -> dict[str, str]:
    """The entry of a round that follows another one."""
    before = f"v{number - 1}"
    values = {
        "newest": f"data/fine_tuning/{before}", "batches": f"data/preferences/{before}",
        "samples": f"data/rejection_sampling/{before}",
        "earlier": f"data/fine_tuning/v{number - 2}" if number > 2 else "data/sft",
    }  # fmt: skip
    return {**FIRST, **values, **changes}


def write_rounds(directory: Path, **rounds: Any) -> None:
    with (directory / "params.yaml").open("w") as file:
        YAML().dump({"rounds": rounds}, file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_round_starts_from_the_one_before(place: Path) -> None:
    rounds = {"v1": FIRST, "v2": after(2), "v3": after(3), "v4": after(4, distil_from="../large/data/samples/v9")}
    write_rounds(place, **rounds)
    for number, name in enumerate(rounds):
        assert round_of(f"fine_tuning@{name}") == round_named(name) == (name, number, round_named(name).round)
        assert round_named(name).round.model_dump() == rounds[name]


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("newest", "data/fine_tuning/v2"),
        ("newest", "./data/ppo/v2/"),
        ("earlier", "data/fine_tuning/v2"),
        ("batches", "data/preferences/v2"),
        ("samples", "data/rejection_sampling/v2"),
        ("distil_from", "data/rejection_sampling/v2"),
    ],
)
def test_a_round_that_is_its_own_source_is_refused(place: Path, field: str, path: str) -> None:
    write_rounds(place, v1=FIRST, v2=after(2, **{field: path}))
    with pytest.raises(
        ValueError, match=rf"params.yaml: `rounds.v2.{field}` is {path}, which the round makes itself: name what an ear"
    ):
        round_of("responses@v2")
    assert round_of("responses@v1").number == 0  # the other rounds are as good as before


def test_a_round_whose_predecessor_does_not_exist_is_refused(place: Path) -> None:
    write_rounds(place, v1=FIRST, v2=after(2), v4=after(4))
    with pytest.raises(
        ValueError, match=r"`rounds.v4.newest` is data/fine_tuning/v3, but `rounds` has no v3: add that round, or name"
    ):
        round_of("responses@v4")


def test_a_round_that_starts_from_a_later_one_is_refused(place: Path) -> None:
    write_rounds(place, v1=FIRST, v2=after(2, earlier="data/fine_tuning/v3"), v3=after(3))
    with pytest.raises(ValueError, match=r"`rounds.v2.earlier` is data/fine_tuning/v3, which a later round makes"):
        round_of("responses@v2")
