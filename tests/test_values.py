from pathlib import Path

import pytest

from flows import values


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
