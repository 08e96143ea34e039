"""What must hold between dvc.yaml, params.yaml, profiles/ and the code."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import chat, values
from tasks.running.fingerprint import fingerprint
from tasks.running.params import Machine, Tracking, parse_section
from tasks.running.places import NOTHING

ROOT = Path(__file__).parent.parent
DVC = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
PARAMS = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
STUDIES = YAML(typ="safe").load((ROOT / "studies" / "dvc.yaml").read_text())["stages"]  # off the main path
MAIN = sorted(DVC["stages"])
DVC["stages"].update(STUDIES)
STAGES = sorted(DVC["stages"])
TRAINING = {
    "pretrain",
    "sft",
    "reward_helpfulness",
    "reward_safety",
    "fine_tuning",
    "controls",
    "ppo",
    "distillation",
}
LEAVE_OUT = {  # read what the evaluation asks, to leave it out
    "sft",
    "preferences",
    "rejection_sampling",
    "context_distillation",
    "fine_tuning",
    "controls",
    "ppo",
    "distillation",
    "safety_scaling",
}
AS_OTHERS = {  # stages that train as another one does, or judge its outputs: that one's section
    "promote": {"evaluate.checkpoints"},
    "controls": {"fine_tuning"},
    "distillation": {"fine_tuning", "rejection_sampling"},
    "safety_scaling": {
        "fine_tuning",
        *(f"evaluate.{name}" for name in ("max_rows", "precision", "prompts", "root", "sampling", "truth")),
    },
}
WEIGH = {"evaluate", "compare", "safety_scaling"}  # ask what answers are worth to the annotators
LAUNCHED = TRAINING | {
    "evaluate",
    "multi_turn",
    "self_bleu",
    "rejection_sampling",
    "context_distillation",
    "ghost_attention",
    "conversations",
    "safety_scaling",
    "responses",
    "reward_drift",
    "reward_scaling",
    "compare",
}  # on the accelerators
# folders of tasks/ that are no stage
SHARED = {"conversing", "judging", "learning", "reading", "running", "sampling", "steering", "workers"}
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))


def module_file(name: str) -> Path | None:
    """The file of one of our modules, if `name` is one."""
    path = ROOT / Path(*name.split("."))
    if (path / "__init__.py").exists():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").exists() else None


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_names(tree: ast.AST) -> set[str]:
    """Modules that running this code may import, those of functions included, those for type checkers left out."""
    names: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        if is_type_checking(node):
            todo += node.orelse  # type: ignore[attr-defined]
        else:
            todo += list(ast.iter_child_nodes(node))
    return names


@cache
def imported_files(path: Path) -> frozenset[Path]:
    """Our own files that a file imports, directly or through others; packages count with their __init__.py."""
    found: set[Path] = set()
    todo = [path]
    while todo:
        current = todo.pop()
        if current in found:
            continue
        found.add(current)
        for name in imported_names(ast.parse(current.read_text())):
            parts = name.split(".")
            if parts[0] in ("tasks", "model", "flows"):
                prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
                todo += [file for file in map(module_file, prefixes) if file is not None]
    return frozenset(found)


def stage_definition(name: str) -> dict[str, Any]:
    definition = DVC["stages"][name]
    return definition.get("do", definition)


def entries(name: str) -> list[str]:
    """A stage's name, or those of its entries where dvc.yaml has it for several: `evaluate@sft`."""
    items = DVC["stages"][name].get("foreach")
    return [name] if items is None else [f"{name}@{item}" for item in value_of(items)]


def value_of(text: str) -> Any:
    """The value of params.yaml that a text of dvc.yaml names (${section.key})."""
    return reduce(lambda values, key: values[key], text.strip("${}").split("."), PARAMS)


def paths_of(name: str, dependency: str) -> list[Path]:
    """What a dependency of dvc.yaml stands for, in each of the stage's entries."""
    if dependency.startswith("${item"):
        items = value_of(DVC["stages"][name]["foreach"])
        named, _, below = dependency.partition("}")
        keys = named.strip("${").split(".")[1:]
        return [Path(f"{item[keys[0]] if keys else item}{below}") for item in items.values()]
    return [Path(value_of(dependency) if dependency.startswith("${") else dependency)]


def place(entry: str) -> str:
    return f"data/{entry.replace('@', '/')}"


def start_file(name: str) -> Path:
    package = ROOT / "tasks" / name / "__main__.py"
    return package if package.exists() else ROOT / "tasks" / f"{name}.py"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_it_imports_and_on_no_other(name: str) -> None:
    listed: set[Path] = set()
    for dependency in stage_definition(name)["deps"]:
        path = ROOT / dependency
        if path.suffix == ".py":
            listed.add(path)
        elif path.is_dir() and dependency.split("/")[0] in ("tasks", "model"):
            listed.update(path.glob("*.py"))
    needed = {path for path in imported_files(start_file(name)) if path.read_text().count("\n") > 1}
    if name in LAUNCHED:
        needed.add(ROOT / "tasks" / "workers" / "launch.py")
    listed = {path for path in listed if path.read_text().count("\n") > 1}
    # a package's directory may hold what other stages alone import, and list
    others = {ROOT / path for other in set(STAGES) - {name} for path in stage_definition(other)["deps"]}
    unused = {path for path in listed - needed if not (path.parent.name == name and path in others)}
    assert {str(path.relative_to(ROOT)) for path in needed - listed | unused} == set()


def test_tasks_holds_the_stages_and_the_shared_folders_and_nothing_else() -> None:
    found = {path.stem for path in (ROOT / "tasks").iterdir()} - {"__init__", "__pycache__"}
    assert found == set(STAGES) | SHARED
    assert all(start_file(name).exists() for name in STAGES)
    assert not any(start_file(name).exists() for name in SHARED)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_one_output_and_depends_on_its_own_section(name: str) -> None:
    definition = stage_definition(name)
    # A persisted output is the one that DVC's run cache leaves alone: MLflow must be told, not publish's file restored.
    assert definition["outs"] == (
        [{"data/publish": {"persist": True}}]
        if name == "publish"
        else [place(f"{name}@${{key}}" if "do" in DVC["stages"][name] else name)]
    )
    others = {param for param in definition["params"] if param.startswith("reward_${")}  # whose training is studied
    others |= AS_OTHERS.get(name, set())
    if name == "report":  # what is gone from them leaves the report
        others = {stage["foreach"].strip("${}") for stage in DVC["stages"].values() if "foreach" in stage}
        others |= {"consistency.compared"}  # which of its checkpoints are a version and the one that it is set against
    if name == "consistency":  # what there is to judge
        others |= {"conversations.checkpoints"}
    if name in {"rejection_sampling", "context_distillation"}:  # what the judge's verdict is worth to them
        others |= {"preferences.simulated"}
    if name in LEAVE_OUT:
        others |= {"evaluate.prompts", "evaluate.root"}
        assert others <= set(definition["params"])
    if name in WEIGH:
        others |= {"preferences.simulated"} | ({"evaluate.checkpoints"} if name == "compare" else set())
        assert others <= set(definition["params"])
    assert {param.split(".")[0] for param in set(definition["params"]) - others} <= {"seed", "machine", name}
    if DVC["stages"][name].get("foreach", "").startswith(f"${{{name}."):  # entries of its own
        own = {param.partition(".")[2] for param in definition["params"] if param.startswith(f"{name}.")}
        (items,) = set(PARAMS[name]) - own
        assert DVC["stages"][name]["foreach"] == f"${{{name}.{items}}}"
    elif DVC["stages"][name].get("foreach") == f"${{{name}}}":  # nothing but entries: each depends on its own
        assert f"{name}.${{key}}" in definition["params"]
    else:
        assert name in definition["params"]


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_training_sees_the_evaluations_prompts_to_leave_them_out_only_and_never_the_judges_truth(name: str) -> None:
    evaluation = PARAMS["evaluate"]
    secret = [Path("data/world/truth"), *(Path(evaluation["root"], file) for file in evaluation["prompts"])]
    dependencies = list(stage_definition(name)["deps"])
    if name in LEAVE_OUT:
        dependencies.remove("${evaluate.root}")
    for dependency in dependencies:
        for path in paths_of(name, dependency):
            read = [file for file in secret if file.is_relative_to(path) or path.is_relative_to(file)]
            assert not read, f"{name} could read {path}"


@pytest.mark.parametrize(
    ("stage", "parameter"), [("pretrain", "pretrain.init_from"), ("audit", "audit.classifier.path")]
)
def test_other_weights_at_the_same_path_are_out_of_date(
    stage: str, parameter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = values.compose([], {parameter: "weights"})
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    for path in (path for dependency in stage_definition(stage)["deps"] for path in paths_of(stage, dependency)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Path("weights").mkdir()
    Path("weights/model.safetensors").write_text("old")
    before, _, datasets = fingerprint(stage)
    assert "weights" in {dataset["path"] for dataset in datasets}
    Path("weights/model.safetensors").write_text("new")
    assert fingerprint(stage)[0] != before


def test_where_no_model_is_read_dvc_watches_a_path_that_stands_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert PARAMS["pretrain"]["init_from"] == PARAMS["audit"]["classifier"]["path"] == str(NOTHING)
    assert NOTHING.is_file()
    for section, change in (("pretrain", {"init_from": None}), ("audit", {"classifier": {"path": None}})):
        model = importlib.import_module(f"tasks.{section}.__main__").Params
        with pytest.raises(ValueError, match=r"is None: Input should be a valid string .*; data/seeds/none: "):
            parse_section(model, {section: {**PARAMS[section], **change}}, section)


@pytest.mark.parametrize("reader", ["report", "publish"])
def test_what_comes_last_waits_for_every_output_and_all_that_it_shows(reader: str) -> None:
    dependencies = stage_definition(reader)["deps"]
    others = sorted(set(MAIN) - {"report", "publish"})
    needed = [f"{place(entry)}/metrics.json" for name in others for entry in entries(name)]
    if reader == "report":
        for call, folder in (("stage.plot(", "plots"), ("stage.show(", "tables")):
            writers = [
                name for name in others if any(call in file.read_text() for file in imported_files(start_file(name)))
            ]
            needed += [f"{place(entry)}/{folder}" for name in writers for entry in entries(name)]
    else:
        needed += [place(entry) for name in others for entry in entries(name)] + ["data/report"]
    for path in needed:
        assert any(Path(path).is_relative_to(each) for each in dependencies), f"{reader} does not wait for {path}"


@pytest.mark.parametrize("reader", ["report", "publish"])
def test_what_comes_last_waits_for_every_round(reader: str) -> None:
    severals = {f"data/{name}" for name in MAIN if "foreach" in DVC["stages"][name]}
    assert severals <= set(stage_definition(reader)["deps"])


@pytest.mark.parametrize("name", STAGES)
def test_a_command_holds_no_value_and_no_double_space(name: str) -> None:
    command = stage_definition(name)["cmd"]
    module = f"tasks.workers.launch {name}" if name in LAUNCHED else f"tasks.{name}"
    module += " ${key}" if "do" in DVC["stages"][name] else ""
    # `exec`: without it some shells stay between DVC and the stage, which then neither dies with DVC nor knows it
    assert command == f"exec python -m {module}"


@pytest.mark.parametrize("name", sorted(set(STAGES) - LAUNCHED))
def test_a_stage_that_does_not_train_starts_without_heavy_imports(name: str) -> None:
    module = ".".join(start_file(name).relative_to(ROOT).with_suffix("").parts)
    heavy = {"torch", "deepspeed", "mlflow", "prefect", "dask", "sklearn", "trafilatura", "transformers", "dvc"}
    program = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_every_profile_gives_valid_parameters(profile: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params = values.parse(values.compose([profile] if profile else [], {}))
    models = {"machine": Machine, "tracking": Tracking, "chat": chat.Params}
    for name in STAGES:
        module = ".".join(start_file(name).relative_to(ROOT).with_suffix("").parts)
        models[name] = importlib.import_module(module).Params
    for name, model in models.items():
        assert isinstance(parse_section(model, params, name), model)


def test_params_hold_a_section_for_each_stage_and_nothing_else() -> None:
    shared = {"seed", "machine", "tracking", "training", "plan", "chat", "serve", "rounds"}
    assert set(PARAMS) == shared | set(STAGES)


ONE_ROUND = {  # the others are alike, but for PPO, which only the last one has
    "rounds": {
        "v1": PARAMS["rounds"]["v1"] | {name: f"data/{name}/v1" for name in ("ghost_attention", "context_distillation")}
    },
    "ghost_attention.rounds": {"v1": {"newest": "data/sft", "earlier": "data/seeds/none"}},
    "conversations.checkpoints": {"v1": "data/ppo/v1"},
    "self_bleu.checkpoints": {"v1": "data/ppo/v1"},
    "consistency.compared": {},
    "context_distillation.rounds": {"v1": {"newest": "data/sft", "earlier": "data/seeds/none"}},
    "controls": {},
    "ppo.rounds": {"v1": {"init_from": "data/fine_tuning/v1"}},
    "evaluate.checkpoints": {"sft": "data/sft", "v1": "data/ppo/v1"},
    "compare.opponents": {"v1": []},
    "compare.rewards": "v1",
    "reward_drift.comparisons": {},
}


def test_the_readmes_picture_is_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text()
    monkeypatch.chdir(ROOT)
    text = values.compose([], ONE_ROUND)
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, check=True)
    command = [sys.executable, "-m", "dvc", "dag", "--mermaid", "publish"]
    picture = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    edges = {line.strip() for line in picture.splitlines() if "-->" in line}
    nodes = {line.strip() for line in picture.splitlines() if "[" in line}
    drawn = {line.strip() for line in readme.split("```mermaid")[1].split("```")[0].splitlines()}
    assert edges | nodes <= drawn


def test_writing_one_value_changes_one_line_of_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = Path("params.yaml").read_text().splitlines()
    after = values.compose([], {"tokenize.num_tokens": 7}).splitlines()
    assert len(before) == len(after)
    assert [new.split("#")[0].strip() for old, new in zip(before, after, strict=True) if old != new] == [
        "num_tokens: 7"
    ]
