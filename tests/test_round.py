from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import migrated_prefect, repro
from ruamel.yaml import YAML
from test_flow import lock, pipeline_runs, stage_runs

from flows import round as rounds
from flows import values
from tasks import controls, reward_drift
from tasks.reading.rounds import round_named
from tasks.running.params import parse_section
from tasks.running.processes import pipeline_lock

PROJECT = Path(__file__).parent.parent
SECTIONS = """\
rounds: {}          # of RLHF

# What versions are
# compared with.
controls: {}

evaluate:
  checkpoints: {sft: data/sft}   # name: directory
  root: prompts                  # directory

compare:
  baseline: sft
  opponents: {}     # version: others
  rewards: v1       # round of the models

self_bleu:
  checkpoints: {}

reward_drift:
  comparisons: {}   # name: models and pairs

responses:
  num_rounds: 3     # that share the prompts
rejection_sampling:
  num_rounds: 3
  init_from: data/sft
fine_tuning:
  num_rounds: 3
  init_from: data/sft
ppo:
  num_rounds: 3
  rounds: {}        # that end with it
"""
THREE = """\
rounds:             # of RLHF
  v1: {newest: data/sft, earlier: data/sft/early, batches: data/world/preferences, samples: data/seeds/none, distil_from: data/seeds/none, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v2: {newest: data/fine_tuning/v1, earlier: data/sft, batches: data/preferences/v1, samples: data/rejection_sampling/v1, distil_from: data/seeds/none, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v3: {newest: data/fine_tuning/v2, earlier: data/fine_tuning/v1, batches: data/preferences/v2, samples: data/rejection_sampling/v2, distil_from: data/seeds/none, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}

# What versions are
# compared with.
controls:
  v1_demonstrations: {init_from: data/sft, steps_of: data/fine_tuning/v1, samples: data/seeds/none, answers: none, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v1_random: {init_from: data/sft, steps_of: data/fine_tuning/v1, samples: data/rejection_sampling/v1, answers: random, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v2_demonstrations: {init_from: data/sft, steps_of: data/fine_tuning/v2, samples: data/seeds/none, answers: none, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v2_random: {init_from: data/sft, steps_of: data/fine_tuning/v2, samples: data/rejection_sampling/v2, answers: random, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v2_again: {init_from: data/sft, steps_of: data/fine_tuning/v2, samples: data/rejection_sampling/v1, answers: best, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v3_demonstrations: {init_from: data/sft, steps_of: data/fine_tuning/v3, samples: data/seeds/none, answers: none, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v3_random: {init_from: data/sft, steps_of: data/fine_tuning/v3, samples: data/rejection_sampling/v3, answers: random, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}
  v3_again: {init_from: data/sft, steps_of: data/fine_tuning/v3, samples: data/rejection_sampling/v2, answers: best, length: steps, ghost_attention: data/seeds/none, context_distillation: data/seeds/none}

evaluate:
  checkpoints: {sft: data/sft, v1: data/fine_tuning/v1, v1_demonstrations: data/controls/v1_demonstrations, \
v1_random: data/controls/v1_random, v2: data/fine_tuning/v2, v2_demonstrations: data/controls/v2_demonstrations, \
v2_random: data/controls/v2_random, v2_again: data/controls/v2_again, v3: data/fine_tuning/v3, \
v3_demonstrations: data/controls/v3_demonstrations, v3_random: data/controls/v3_random, v3_again: data/controls/v3_again} # name: directory
  root: prompts                  # directory

compare:
  baseline: sft
  opponents:        # version: others
    v1: [v1_demonstrations, v1_random]
    v2: [v1, v2_demonstrations, v2_random, v2_again]
    v3: [v2, v3_demonstrations, v3_random, v3_again]
  rewards: v3       # round of the models

self_bleu:
  checkpoints:
    v1: data/fine_tuning/v1
    v2: data/fine_tuning/v2
    v3: data/fine_tuning/v3

reward_drift:
  comparisons:      # name: models and pairs
    v1_on_v2: {model: v1, batch: v2}
    v2_on_v3: {model: v2, batch: v3}

responses:
  num_rounds: 3     # that share the prompts
rejection_sampling:
  num_rounds: 3
  init_from: data/sft
fine_tuning:
  num_rounds: 3
  init_from: data/sft
ppo:
  num_rounds: 3
  rounds: {}        # that end with it
"""  # noqa: E501 - as it stands in params.yaml

TOY_STAGE = """\
from pydantic import Field
from tasks.running.params import Section
from tasks.running.stage import Stage, start


class Params(Section):
    num_rounds: int = Field(gt=0, description="that share the prompts")
    init_from: str = Field(min_length=1, description="start of versions")


def run(stage: Stage[Params]) -> dict[str, float]:
    (stage.output / "round.txt").write_text(stage.entry)
    if stage.params.num_rounds > 2:
        (stage.output / "config.json").write_text("{}")
    return {"rounds": stage.params.num_rounds}


if __name__ == "__main__":
    start(Params, run)
"""
TOY_DVC = f"""\
stages:
  rejection_sampling:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.rejection_sampling ${{key}}
      deps: ["${{item.newest}}"]
      params: [seed, rejection_sampling]
      outs: ["data/rejection_sampling/${{key}}"]
  fine_tuning:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.fine_tuning ${{key}}
      deps: ["data/rejection_sampling/${{key}}"]
      params: [seed, fine_tuning]
      outs: ["data/fine_tuning/${{key}}"]
"""


@pytest.fixture
def project(workspace: Path) -> Path:
    """A pipeline of rounds whose two stages do next to nothing; there is no round yet."""
    with Path("params.yaml").open("a") as file:
        file.write(SECTIONS)
    Path("dvc.yaml").write_text(TOY_DVC)
    for name in ("tasks/rejection_sampling", "tasks/fine_tuning.py"):
        Path(name).unlink()  # a link to ours
        Path(name).with_suffix(".py").write_text(TOY_STAGE)
    Path("data/sft").mkdir(parents=True)
    Path("data/sft/model").write_text("weights")
    return workspace


def sections() -> str:
    """What params.yaml holds from its rounds on."""
    return "rounds:" + Path("params.yaml").read_text().partition("\nrounds:")[2]


# --- entries ---


def test_the_entries_of_three_rounds_are_those_that_one_would_write_and_comments_stay() -> None:
    assert rounds.with_entries(SECTIONS, range(3)) == THREE
    one_by_one = SECTIONS
    for number in range(3):
        one_by_one = rounds.with_entries(one_by_one, range(number, number + 1))
    assert one_by_one == THREE
    assert rounds.with_entries(THREE, range(3)) == THREE


def test_entries_that_are_there_stay_as_they_are() -> None:
    (line,) = [line for line in THREE.splitlines() if line.startswith("  v1_random: {")]
    own = f"{line}   # mine"
    text = THREE.replace(line, own).replace("rewards: v3", "rewards: v2")
    assert rounds.with_entries(text, range(3)) == text
    without = text.replace("    v2_on_v3: {model: v2, batch: v3}\n", "")
    assert rounds.with_entries(without, range(3)) == text


def test_a_round_after_one_that_ended_with_ppo_starts_there_and_ends_so_too() -> None:
    two = rounds.with_entries(SECTIONS, range(2))
    with_ppo = two.replace("rounds: {}        # that", "rounds: {v2: {init_from: data/fine_tuning/v2}}    # that")
    parsed = values.parse(rounds.with_entries(with_ppo, range(2, 3)))
    assert parsed["rounds"]["v3"]["newest"] == "data/ppo/v2"
    assert parsed["ppo"]["rounds"]["v3"] == {"init_from": "data/fine_tuning/v3"}
    own = {name: path for name, path in parsed["evaluate"]["checkpoints"].items() if name.startswith("v3")}
    assert own == {
        "v3": "data/ppo/v3",
        "v3_before_ppo": "data/fine_tuning/v3",
        "v3_further": "data/controls/v3_further",
    }
    assert parsed["controls"]["v3_further"] == {
        "init_from": "data/fine_tuning/v3",
        "steps_of": "data/ppo/v3",
        "samples": "data/rejection_sampling/v3",
        "answers": "best",
        "length": "steps",
        "ghost_attention": "data/seeds/none",
        "context_distillation": "data/seeds/none",
    }
    assert parsed["compare"]["opponents"]["v3"] == ["v2", "v3_before_ppo", "v3_further"]


def test_a_round_starts_as_the_one_before_says() -> None:
    text = THREE.replace("v1: {newest: data/sft", "v1: {newest: data/imported").partition("  v2: {newest")
    text = text[0] + "\n#" + text[2].partition("\n#")[2]
    parsed = values.parse(rounds.with_entries(text, range(1, 2)))
    assert parsed["rounds"]["v2"]["earlier"] == "data/imported"


def test_the_sixth_round_of_our_parameters_adds_lines_and_changes_only_who_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (PROJECT / "params.yaml").read_text()
    assert rounds.with_entries(before, range(5)) == before
    after = rounds.with_entries(before, range(5, 6))
    old, new = before.splitlines(), after.splitlines()
    removed = [line for line in old if line not in new]
    assert [line.partition("#")[0].strip() for line in removed] == ["rewards: v5"]
    added = [line for line in new if line not in old]
    assert [line for line in new if line not in added] == [line for line in old if line not in removed]
    # round, ghost_attention, ppo, control, evaluations, opponents, Self-BLEU, conversations, judge, drift
    # distillation: v2's
    assert len(added) == 1 + 1 + 1 + 1 + 3 + 1 + 1 + 1 + 1 + 1
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(after)
    parsed = values.parse(after)
    assert round_named("v6").number == 5
    assert parsed["rounds"]["v6"]["newest"] == "data/ppo/v5"
    assert list(parse_section(controls.Params, parsed, "controls").root)[-1] == "v6_further"
    assert "v5_on_v6" in parse_section(reward_drift.Params, parsed, "reward_drift").comparisons
    named = {name for opponents in parsed["compare"]["opponents"].values() for name in opponents}
    assert named | set(parsed["rounds"]) | {"sft"} == set(parsed["evaluate"]["checkpoints"])
    assert parsed["rounds"]["v6"]["ghost_attention"] == "data/ghost_attention/v6"
    assert parsed["ghost_attention"]["rounds"]["v6"] == {"newest": "data/ppo/v5", "earlier": "data/ghost_attention/v5"}
    assert parsed["rounds"]["v6"]["context_distillation"] == "data/context_distillation/v2"  # as v5 has it


@pytest.mark.parametrize("section", ["responses", "rejection_sampling", "ppo"])
def test_a_round_for_which_no_prompts_are_left_is_refused(section: str) -> None:
    text = SECTIONS.replace(f"{section}:\n  num_rounds: 3", f"{section}:\n  num_rounds: 2")
    with pytest.raises(ValueError, match=rf"`{section}.num_rounds` is 2, .*: none are left for v3; raise it, which gi"):
        rounds.with_entries(text, range(3))


def test_a_round_without_the_one_before_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`rounds` has no v2, from which v3 would start: add it first"):
        rounds.with_entries(SECTIONS, range(2, 3))


@pytest.mark.parametrize(("line", "name"), [("rounds: {}", "rounds"), ("  opponents: {}", "compare.opponents")])
def test_a_section_that_holds_no_entries_is_refused(line: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"params.yaml: `{name}` is None: it must hold entries, or be \{{\}}"):
        rounds.with_entries(SECTIONS.replace(line, line.removesuffix(" {}")), range(1))


# --- the command ---


def test_entries_alone_are_written_whether_or_not_rounds_are_done(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rounds.main(["--only-write", "v2", "--set", "seed=7"]) == 0
    assert "params.yaml has new entries; `git diff params.yaml` shows them" in capsys.readouterr().out
    assert list(values.parse(sections())["rounds"]) == ["v1", "v2"]
    assert values.parse(Path("params.yaml").read_text())["seed"] == 7
    assert rounds.main(["--only-write", "v3"]) == 0
    assert sections() == THREE
    assert rounds.main(["--only-write", "v3"]) == 0
    assert capsys.readouterr().out.endswith("params.yaml has all entries of rounds v1 to v3\n")
    assert rounds.main(["--only-write", "third"]) == 1
    assert "`third` is not a round's name: call rounds v1, v2" in capsys.readouterr().err
    assert not Path("dvc.lock").exists()


def test_the_next_round_is_refused_until_the_one_before_is_done(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rounds.main(["--only-write", "v2"]) == 0
    done = repro("fine_tuning@v1", "rejection_sampling@v2")
    assert done.returncode == 0, done.stderr
    before = Path("params.yaml").read_text()
    capsys.readouterr()
    assert rounds.main(["--set", "seed=2"]) == 1
    assert capsys.readouterr().err == (
        "round v2 is not done, and the next one starts from it; out of date: fine_tuning@v2; "
        "`python -m flows.recipe` brings them up to date\n"
    )
    assert Path("params.yaml").read_text() == before
    Path("data/rejection_sampling/v1/round.txt").unlink()  # what it was made from is gone
    assert rounds.main([]) == 1
    assert "rejection_sampling@v1, fine_tuning@v1" in capsys.readouterr().err
    assert Path("params.yaml").read_text() == before


def test_a_round_that_asked_no_prompts_is_followed_by_none(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rounds.main(["--only-write", "v1", "--set", "fine_tuning.num_rounds=1"]) == 0  # writes no model
    assert repro().returncode == 0
    assert rounds.main([]) == 1
    assert "round v1 has no version, from which the next one would start: its rejection" in capsys.readouterr().err


def test_a_pipeline_that_runs_keeps_its_parameters(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_text()
    with pipeline_lock("a test"):
        assert rounds.main([]) == 1
        assert rounds.main(["--only-write", "v1"]) == 1
    assert capsys.readouterr().err.count("another pipeline is running in this workspace (a test, process") == 2
    assert Path("params.yaml").read_text() == before


@pytest.mark.slow
def test_each_call_appends_and_runs_the_next_round_until_no_prompts_are_left(project: Path, tmp_path: Path) -> None:
    shutil.copytree(migrated_prefect(), tmp_path / "prefect")

    def next_round(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.round", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    first = next_round("--set", "seed=3")
    assert first.returncode == 0, first.stderr
    assert "The pipeline is up to date" in first.stdout
    assert " fine_tuning@v1         ran in" in first.stdout
    assert values.parse(Path("params.yaml").read_text())["seed"] == 3
    assert list(values.parse(sections())["rounds"]) == ["v1"]
    for number in (2, 3):
        done = next_round()
        assert done.returncode == 0, done.stderr
        assert f" fine_tuning@v{number - 1}         up to date" in done.stdout
        assert Path(f"data/fine_tuning/v{number}/round.txt").read_text() == f"v{number}"
    assert sections() == THREE
    locked: Any = lock()
    assert set(locked["stages"]) == {
        f"{name}@v{n}" for name in ("rejection_sampling", "fine_tuning") for n in (1, 2, 3)
    }
    last = next_round()
    assert last.returncode == 1
    assert last.stderr.startswith("params.yaml: `responses.num_rounds` is 3, and its prompts are divided")
    assert sections() == THREE
    assert pipeline_runs() == ["FINISHED"] * 3, stage_runs()  # one parent run a call


def test_the_deployments_do_not_start_together() -> None:
    deployments = YAML(typ="safe").load((PROJECT / "prefect.yaml").read_text())["deployments"]
    assert [(each["name"], each["entrypoint"]) for each in deployments] == [
        ("nightly", "flows/recipe.py:recipe"),
        ("weekly-round", "flows/round.py:next_round"),
    ]
    assert rounds.next_round.name == "round"
    hours = [each["schedules"][0]["cron"].split()[1] for each in deployments]
    assert hours[0] != hours[1]
