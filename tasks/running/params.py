"""A stage's parameters: params.yaml, its sections as pydantic models, and the messages about wrong values."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

PARAMS_FILE = Path("params.yaml")

SectionType = TypeVar("SectionType", bound=BaseModel)
ParamsType = TypeVar("ParamsType", bound=BaseModel)


class Section(BaseModel):
    """Base of every section of params.yaml: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(Section):
    """The machine to run on. Nothing here may change a result, except `threads` and `num_ranks` through rounding."""

    threads: int = Field(gt=0, description="CPU threads of one process")
    workers: int = Field(gt=0, description="processes that clean the corpus")
    scheduler: str | None = Field(description="address of a Dask scheduler; null starts local processes")
    num_ranks: int = Field(gt=0, description="training processes on this host: one per GPU, or CPU processes")
    hostfile: str | None = Field(description="DeepSpeed hostfile for several hosts; null trains on this one")
    num_seats: int = Field(gt=0, description="stages on the accelerators (without any: the processors) at once")


def num_ranks_of(values: Mapping[str, Any], section: str, machine: Machine) -> int:
    """Return how many processes on this host run a stage: what its section says, or else `machine`."""
    own = values.get(section)
    return (own.get("num_ranks") if isinstance(own, Mapping) else None) or machine.num_ranks


class Tracking(Section):
    """Where runs are recorded; MLFLOW_TRACKING_URI, MLflow's own variable, chooses the server."""

    experiment: str = Field(min_length=1, description="name of the MLflow experiment")


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Return params.yaml as a dictionary, read as YAML 1.2 as DVC does (`2e-5` is a number).

    Raises ValueError, naming the file and what to do, when it is missing, not valid YAML, or not a mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run from the project's root, where it is") from None
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not sections: restore it with `git checkout {path}`")
    return values


def seed_of(values: Mapping[str, Any]) -> int:
    """Return the seed of every random draw. Raises ValueError when it is no integer of 0 or more."""
    seed = values.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"params.yaml: `seed` is {seed!r}: an integer >= 0 is needed")
    return seed


def parse_section(model: type[SectionType], values: Mapping[str, Any], name: str) -> SectionType:
    """Return section `name` of params.yaml as its model.

    Raises ValueError with one line for each wrong value; for a misspelt key it names the closest match.
    """
    if name not in values:
        near = get_close_matches(name, list(values), n=1)
        hint = f"; did you mean to rename `{near[0]}`?" if near else ""
        raise ValueError(f"params.yaml: section `{name}` is missing{hint}")
    try:
        return model.model_validate(values[name])
    except ValidationError as error:
        lines = [_explain(model, name, detail) for detail in error.errors()]
        # The parameter that a misspelt name was meant for is also missing: report it once only.
        meant = [line.rpartition("did you mean ")[2].removesuffix("?") for line in lines if "did you mean" in line]
        lines = [line for line in lines if line not in [f"params.yaml: {dotted} is missing" for dotted in meant]]
        raise ValueError("\n".join(lines)) from None


def _explain(model: type[BaseModel], section: str, detail: Any) -> str:
    """Return a line about one wrong value: its dotted name, what was found, what it must be."""
    keys = [str(part) for part in detail["loc"]]
    dotted = ".".join([section, *keys])
    owner = _model_at(model, keys[:-1])
    fields = list(owner.model_fields) if owner is not None else []
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(keys[-1], fields, n=1)
        hint = (
            f"did you mean `{'.'.join([section, *keys[:-1], near[0]])}`?"
            if near
            else f"known here: {', '.join(fields)}"
        )
        return f"params.yaml: `{dotted}` is not a parameter; {hint}"
    if detail["type"] == "missing":
        return f"params.yaml: `{dotted}` is missing"
    meaning = ""
    if owner is not None and keys and keys[-1] in owner.model_fields:
        description = owner.model_fields[keys[-1]].description
        meaning = f" ({description})" if description else ""
    message = detail["msg"].removeprefix("Value error, ")
    return f"params.yaml: `{dotted}` is {detail['input']!r}: {message}{meaning}"


def _model_at(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """Return the pydantic model at a dotted path of keys, through nested models and dictionaries of models."""
    current: Any = _content(model)
    for key in keys:
        if isinstance(current, type) and issubclass(current, BaseModel) and key in current.model_fields:
            current = current.model_fields[key].annotation
        arguments = [a for a in getattr(current, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        if arguments and not (isinstance(current, type) and issubclass(current, BaseModel)):
            current = arguments[0]
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _content(model: type[BaseModel]) -> Any:
    """Return what a model holds: itself, or the dictionary of a section whose keys are names that users choose."""
    return model.model_fields["root"].annotation if issubclass(model, RootModel) else model


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters by their dotted names: `{"sft": {"epochs": 2}}` -> `{"sft.epochs": 2}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat
