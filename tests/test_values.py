import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import values
from tasks.running.fingerprint import fingerprint


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(
        "seed: 1  # of everything\nsft:\n  learning_rate: 2.0e-5  # section 3.1\n  sources: {a: 1}\n"
    )
    Path("profiles").mkdir()
    Path("profiles/big.yaml").write_text("sft.learning_rate: 1e-6\nsft.sources: {b: 2}\n")
    return tmp_path


def test_a_profile_replaces_values_and_keeps_comments(project: Path) -> None:
    text = values.compose(["big"], {"seed": 7})
    assert values.parse(text) == {"seed": 7, "sft": {"learning_rate": 1e-6, "sources": {"b": 2}}}
    assert "# section 3.1" in text
    assert "# of everything" in text


def test_later_overrides_win_over_the_profile(project: Path) -> None:
    text = values.compose(["big"], {"sft.learning_rate": 3e-4})
    assert values.parse(text)["sft"]["learning_rate"] == 3e-4


def test_a_text_whose_values_do_not_change_is_left_to_the_letter(project: Path) -> None:
    before = Path("params.yaml").read_text()
    assert values.compose([], {"sft.learning_rate": 2e-5}) == before
    assert values.write(before) is False


def test_writing_changes_the_file(project: Path) -> None:
    assert values.write(values.compose([], {"seed": 3})) is True
    assert values.parse(Path("params.yaml").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("name", "near"), [("sft.learning_rat", "sft.learning_rate"), ("sfd.learning_rate", "sft.learning_rate")]
)
def test_a_misspelt_override_names_the_near_match(project: Path, name: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=rf"overrides: `{name}` is not a parameter of params.yaml; did you mean `{near}`"
    ):
        values.compose([], {name: 1})


def test_a_missing_profile_names_those_there_are(project: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no profile `bog` .*; profiles: big"):
        values.compose(["bog"], {})


def test_an_assignment_is_read_as_yaml() -> None:
    assert values.parse_assignment("sft.learning_rate=2e-5") == ("sft.learning_rate", 2e-5)
    assert values.parse_assignment("clean.languages=[en, de]") == ("clean.languages", ["en", "de"])
    assert values.parse_assignment("a.b=null") == ("a.b", None)


@pytest.mark.parametrize("text", ["a: [", "- 1\n"])
def test_a_profile_that_is_no_mapping_is_named(project: Path, text: str) -> None:
    Path("profiles/big.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"profiles/big.yaml (is not valid YAML|holds list, not)"):
        values.compose(["big"], {})


def test_missing_parameters_are_explained(project: Path) -> None:
    Path("params.yaml").unlink()
    with pytest.raises(ValueError, match=r"params.yaml is missing: run from the project's root"):
        values.compose([], {})


def test_an_assignment_that_is_not_yaml_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--set seed=\[1: the value is not valid YAML"):
        values.parse_assignment("seed=[1")


def test_an_assignment_without_equals_sign_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--set seed: write it as NAME=VALUE"):
        values.parse_assignment("seed")


# --- entries that are added ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: {}\n", "a:\n  new: {x: 1}\n"),
        ("a: {}   # its\n\n# of b\nb: 1\n", "a:      # its\n  new: {x: 1}\n\n# of b\nb: 1\n"),
        ("a: {old: 1}   # its\n\nb: 1\n", "a: {old: 1, new: {x: 1}} # its\n\nb: 1\n"),
        ("a:\n  old: 1   # own\n\n# of b\nb: 1\n", "a:\n  old: 1   # own\n  new: {x: 1}\n\n# of b\nb: 1\n"),
        ("a:\n  old: 1\n\n# of b\nb: 1\n", "a:\n  old: 1\n  new: {x: 1}\n\n# of b\nb: 1\n"),
        ("a:\n  old: {y: 2}   # own\n\n# of b\nb: 1\n", "a:\n  old: {y: 2}   # own\n  new: {x: 1}\n\n# of b\nb: 1\n"),
        ("a:\n  old: [2]\n\n# of b\nb: 1\n", "a:\n  old: [2]\n  new: {x: 1}\n\n# of b\nb: 1\n"),
        (
            "a:\n  old:\n    y:\n      z: 2   # own\n\n# of b\nb: 1\n",
            "a:\n  old:\n    y:\n      z: 2   # own\n  new: {x: 1}\n\n# of b\nb: 1\n",
        ),
        ("a:\n  old: {}   # own\n\n# of b\nb: 1\n", "a:\n  old: {}   # own\n  new: {x: 1}\n\n# of b\nb: 1\n"),
        ("a:\n  old: 1", "a:\n  old: 1\n  new: {x: 1}\n"),
    ],
)
def test_an_entry_is_added_before_what_follows_its_mapping(before: str, after: str) -> None:
    assert values.edit(before, lambda params: values.append(params["a"], "new", {"x": 1})) == after


# --- values that sections share ---

SHARED = """\
seed: 1
training:       # what sections share
  adamw: &adamw
    beta1: 0.9  # section 2.2
    beta2: 0.95
  engine: &engine
    precision: bf16

sft:
  epochs: 2     # section 3.1
  <<: [*adamw, *engine]
  learning_rate: 2e-5

pretrain:
  <<: [*adamw, *engine]
  num_layers: 2
"""


@pytest.fixture
def sharing(project: Path) -> Path:
    Path("params.yaml").write_text(SHARED)
    return project


def test_a_section_has_what_it_shares_and_its_own(sharing: Path) -> None:
    parsed = values.parse(SHARED)
    assert parsed["sft"] == {"epochs": 2, "beta1": 0.9, "beta2": 0.95, "precision": "bf16", "learning_rate": 2e-5}
    assert parsed["pretrain"] == {"beta1": 0.9, "beta2": 0.95, "precision": "bf16", "num_layers": 2}


@pytest.mark.parametrize("way", ["set", "profile"])
def test_a_shared_value_set_in_one_section_becomes_a_line_of_it_and_leaves_the_others(sharing: Path, way: str) -> None:
    Path("profiles/big.yaml").write_text("sft.beta1: 0.8\n")
    text = values.compose([], {"sft.beta1": 0.8}) if way == "set" else values.compose(["big"], {})
    assert text == SHARED.replace(
        "  <<: [*adamw, *engine]\n  learning", "  <<: [*adamw, *engine]\n  beta1: 0.8\n  learning"
    )
    assert values.parse(text)["sft"]["beta1"] == 0.8
    assert values.parse(text)["pretrain"]["beta1"] == 0.9


def test_setting_a_shared_value_sets_it_for_all_but_a_section_with_its_own(sharing: Path) -> None:
    text = values.compose([], {"training.adamw.beta1": 0.7})
    assert text == SHARED.replace("beta1: 0.9  #", "beta1: 0.7  #")
    assert [values.parse(text)[name]["beta1"] for name in ("sft", "pretrain")] == [0.7, 0.7]
    text = values.compose([], {"sft.beta1": 0.8, "training.adamw.beta1": 0.7})
    assert [values.parse(text)[name]["beta1"] for name in ("sft", "pretrain")] == [0.8, 0.7]


def test_a_whole_shared_mapping_cannot_be_replaced(sharing: Path) -> None:
    with pytest.raises(ValueError, match=r"overrides: `training.adamw` is shared by several sections: set its values "):
        values.compose([], {"training.adamw": {"beta1": 0.5}})


def test_a_value_below_a_mapping_that_was_just_replaced_can_be_set(project: Path) -> None:
    assert values.parse(values.compose(["big"], {"sft.sources.b": 3}))["sft"]["sources"] == {"b": 3}


def test_dvc_reads_shared_values_under_each_sections_names(workspace: Path) -> None:
    Path("params.yaml").write_text(SHARED)
    Path("dvc.yaml").write_text(
        "stages:\n  sft: {cmd: echo > out, params: [sft], outs: [out]}\n"
        '  named: {cmd: "echo ${pretrain.beta1} > own", params: [pretrain.beta1], outs: [own]}\n'
    )

    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    dvc("repro", "-q")
    locked = YAML(typ="safe").load(Path("dvc.lock"))["stages"]
    assert locked["sft"]["params"]["params.yaml"] == {"sft": values.parse(SHARED)["sft"]}
    assert locked["named"]["params"]["params.yaml"] == {"pretrain.beta1": 0.9}
    assert Path("own").read_text() == "0.9\n"
    assert fingerprint("sft")[1] == {
        f"sft.{key}": value for key, value in values.parse(SHARED)["sft"].items()
    }  # MLflow's
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-qm", "shared"], check=True)
    values.write(values.compose([], {"sft.beta1": 0.8}))
    assert [line.split() for line in dvc("params", "diff").splitlines()][1:] == [
        ["params.yaml", "sft.beta1", "0.9", "0.8"]
    ]
    assert "sft:" in dvc("status", "sft")
    assert "up to date" in dvc("status", "named")
    values.write(values.compose([], {"training.adamw.beta1": 0.7}))
    changed = {tuple(line.split()[1:]) for line in dvc("params", "diff").splitlines()[1:]}
    assert changed == {
        ("sft.beta1", "0.9", "0.8"), ("training.adamw.beta1", "0.9", "0.7"), ("pretrain.beta1", "0.9", "0.7"),
    }  # fmt: skip
