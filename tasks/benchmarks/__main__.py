"""Benchmarks of the field on their own harness, lm_eval (Llama 2, sections 4.1, 5.1 and A.4.7), without a network.

A study off the main path: it runs only by name, `dvc repro studies/dvc.yaml`. A task is a definition in lm_eval's own
format, whose data are local files; those of `definitions` have this project's, and a user can name any other. The
checkpoint is scored by its own network and answers by its own sampler. Shares of prompts have Wilson's 95% intervals
and means Student's, also by the group that a prompt is about; a figure that is no mean over prompts has none.

Run once for each checkpoint (`benchmarks@sft`). Reads the checkpoint, the definitions, and their files.
Writes tasks.json (each task's data, prompts, template and settings, by digest), scores.csv, samples.jsonl.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from tasks.judging.intervals import mean_interval, wilson
from tasks.running.files import write_json, write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.stage import Stage, start


class Params(Section):
    """Which checkpoints do which tasks, and how."""

    checkpoints: dict[str, str] = Field(min_length=1, description="Hugging Face Llama directory, by name")
    tasks: list[str] = Field(min_length=1, description="definitions of tasks, YAML files in lm_eval's format")
    root: str = Field(min_length=1, description="what ROOT stands for in the definitions' `data_files`")
    chat: bool = Field(description="prompts are turns of a dialogue; false: they are plain text")
    limit: int | None = Field(gt=0, description="prompts of each task; null: all")
    max_new_tokens: int = Field(gt=0, description="tokens of an answer, at most, whatever a task allows")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers generated at once; more need more memory")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more need more memory")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Do all tasks, report."""
    params = stage.params
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("benchmarks need lm_eval: install it, `pip install arriero[lm_eval]`")
    # read as the libraries are imported: nothing is looked up outside, and their copies of data go with the run
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(stage.scratch / "hub")}
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from model.network.checkpoint import open_checkpoint
    from tasks.benchmarks.harness import Checkpoint

    checkpoint = params.checkpoints.get(stage.entry)
    if checkpoint is None:
        raise ValueError(f"`benchmarks.checkpoints` has no `{stage.entry}`: it has {', '.join(params.checkpoints)}")
    tasks = [read_task(Path(path), params.root) for path in params.tasks]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = open_checkpoint(Path(checkpoint), params.precision, device)
    harness = Checkpoint(model, tokenizer, stage.seed, params.max_new_tokens, params.max_rows, params.tokens_at_once)
    found = simple_evaluate(
        harness,
        tasks=tasks,
        task_manager=TaskManager(include_defaults=False),  # it would read the thousands of lm_eval's own
        limit=params.limit,
        bootstrap_iters=0,
        apply_chat_template=params.chat,
        random_seed=stage.seed,
        numpy_random_seed=stage.seed,
        torch_random_seed=stage.seed,
        fewshot_random_seed=stage.seed,
    )
    rows = scores_of(found["samples"], found["results"])
    write(stage, found, rows)
    figures = {"prompts_cut": float(harness.num_cut)}
    for row in rows:
        name = metric_name(row["task"], *(part for part in row["group"].split("/") if part), row["metric"])
        figures[name] = row["value"]
        if not row["group"] and row["low"] is not None:
            figures |= {f"{name}/low": row["low"], f"{name}/high": row["high"]}
    return figures


def read_task(path: Path, root: str) -> dict[str, Any]:
    """Return a task's definition with the paths of its data.

    Raises ValueError, naming the file, when the definition or its data are missing or the data are not local files.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise ValueError(f"{path}, named by `benchmarks.tasks`, is missing: name a task's definition, a YAML file")
    task = load_yaml(path)
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if not files or not task.get("task"):
        raise ValueError(f"{path} has no `task` or no `dataset_kwargs.data_files`: tasks read local files, name them")
    placed = json.loads(json.dumps(files).replace("ROOT/", json.dumps(f"{root}/")[1:-1]))
    for name in paths_in(placed):
        if not Path(name).exists():
            raise ValueError(
                f"{name}, the data of task {task['task']} ({path}), is missing: put it there, or set `benchmarks.root` "
                f"(now {root}) to the directory that holds it"
            )
    return {**task, "dataset_kwargs": {**task["dataset_kwargs"], "data_files": placed}}


def paths_in(files: Any) -> list[str]:
    """Return the paths of `data_files`, which can be one, a list, or a mapping from splits to either."""
    if isinstance(files, str):
        return [files]
    return [path for each in (files.values() if isinstance(files, Mapping) else files) for path in paths_in(each)]


def scores_of(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each figure of each task, over all prompts and by group.

    The interval is by number of prompts; there is none where lm_eval's figure is not the mean of the prompts' values.
    """
    rows = []
    for task, own in samples.items():
        values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for sample in own:
            for metric in sample["metrics"]:
                if isinstance(sample[metric], bool | int | float):
                    for group in dict.fromkeys(("", str(sample["doc"].get("group", "")))):
                        values[metric, sample["filter"], group].append(float(sample[metric]))
        for key, value in results[task].items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            name = metric if chosen == "none" else f"{metric}-{chosen}"
            whole = values.get((metric, chosen, ""), [])
            if not whole or abs(fmean(whole) - value) > 1e-9:
                rows.append({"task": task, "group": "", "metric": name, "prompts": len(own), "value": float(value),
                             "low": None, "high": None})  # fmt: skip
                continue
            for (_, _, group), part in sorted(item for item in values.items() if item[0][:2] == (metric, chosen)):
                low, high = interval(part)
                rows.append({"task": task, "group": group, "metric": name, "prompts": len(part), "value": fmean(part),
                             "low": low, "high": high})  # fmt: skip
    return rows


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95% interval of a share, or of a mean; none for a mean of one value."""
    if set(values) <= {0.0, 1.0}:
        return wilson(sum(values), len(values))
    return mean_interval(values) if len(values) > 1 else (None, None)


def write(stage: Stage[Params], found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the figures, the answers, and what they depend on."""
    import lm_eval
    import pandas

    params = stage.params
    template = json.loads((Path(params.checkpoints[stage.entry]) / "tokenizer_config.json").read_text())
    about: dict[str, Any] = {
        "lm_eval": lm_eval.__version__,
        "chat_template": digest(template.get("chat_template") or "") if params.chat else None,
        "max_new_tokens": params.max_new_tokens,
        "tasks": {},
    }
    lines = []
    for task, samples in found["samples"].items():
        config = found["configs"][task]
        about["tasks"][task] = {
            "version": found["versions"][task],
            "documents": digest(*(each["doc_hash"] for each in samples)),
            "prompts": digest(*(each["prompt_hash"] for each in samples)),
            "targets": digest(*(each["target_hash"] for each in samples)),
            "num_prompts": len(samples),
            "num_fewshot": config["num_fewshot"],
            "generation": config.get("generation_kwargs") if config["output_type"] == "generate_until" else None,
        }
        for each in samples:
            answer = {name: each[name] for name in each["metrics"]}
            lines.append({"task": task, "number": each["doc_id"], "prompt": each["arguments"][0][0],
                          "answers": each["filtered_resps"], **answer})  # fmt: skip
    write_json(stage.output / "tasks.json", about)
    write_lines(stage.output / "samples.jsonl", lines)
    table = pandas.DataFrame(rows)
    table.to_csv(stage.output / "scores.csv", index=False)
    stage.show("scores", table, "Benchmarks of the field")


def digest(*texts: str) -> str:
    """Return one SHA-256 digest of several texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    start(Params, run)
