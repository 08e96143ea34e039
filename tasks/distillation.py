"""Study how much smaller models gain from a larger one's samples (Llama 2, section 3.2.3).

In the paper only the largest model is sampled from, and the smaller ones are fine-tuned on its answers. A study off the
main path: no other stage reads it, and it runs only by name, `dvc repro studies/dvc.yaml`. The smaller models are a
chat model with only its first layers kept. Each is trained with the parameters of `fine_tuning`:

- base: on demonstrations, until it works again with fewer layers,
- distilled: from the base, on the larger model's best samples, with demonstrations,
- own: the same number of steps on the base's own best samples of the same prompts, drawn, scored and chosen as
  `rejection_sampling` does; a control,
- demonstrations: the same number of steps on demonstrations alone; a control.

A run that was stopped goes on with the training that it was at.

Reads the chat model, the larger model's best.jsonl, a round's reward models, demonstrations, and the evaluation's
prompts. Writes a directory of each model, <n>_layers/<name>/, like those of `fine_tuning`, which `evaluate.checkpoints`
can name, <n>_layers/own.jsonl, and plots/loss.csv.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from model.network.checkpoint import open_checkpoint, read_config, save_model
from model.network.ranks import join_ranks
from tasks.judging.ranking import Scales
from tasks.judging.scales import calibrate
from tasks.learning import versions
from tasks.learning.answers import train
from tasks.learning.versions import folders_of
from tasks.reading.prompts import KINDS, Prompt
from tasks.reading.rounds import NAME
from tasks.running.files import read_json, write_json, write_lines
from tasks.running.params import Section, parse_section, read_params
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start
from tasks.sampling import params as sampling
from tasks.sampling.choosing import dialogue_of, read_chosen
from tasks.sampling.drawing import check_models, draw_and_score
from tasks.sampling.params import choices_of, job_of, settings_of

LOSS = Plot(
    kind="curves",
    title="Smaller models, validation loss by what they learn from",
    x="tokens",
    y="loss",
    x_label="tokens",
    y_label="nats per token",
    series="model",
)


class Params(Section):
    """Which smaller models are trained, and on whose samples."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory of the chat model to make smaller")
    distil_from: str = Field(min_length=1, description="directory of the larger model's samples, with best.jsonl")
    rewards: str = Field(
        pattern=NAME.pattern, description="round whose reward models score the smaller models' own samples"
    )
    temperature: float = Field(gt=0, description="at which the smaller models draw them")
    num_layers: list[int] = Field(min_length=1, description="sizes: how many of the first layers are kept")
    base_epochs: int = Field(gt=0, description="epochs of demonstrations for a base, which has lost layers")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train all models, report."""
    params = stage.params
    join_ranks()
    check_sizes(params)
    values = parse_section(versions.Params, read_params(), versions.SECTION)
    sampled = parse_section(sampling.Params, read_params(), sampling.SECTION)
    samples = Path(params.distil_from) / "best.jsonl"
    folders_of(values, samples, {})  # raises before anything is trained
    scales, _ = calibrate(params.rewards, sampled.threshold_precision)
    prompts = read_chosen(samples.parent, "distillation.distil_from")["best"]
    found: dict[str, dict[str, float]] = {}
    for num_layers in params.num_layers:
        size = f"{num_layers}_layers"
        first = stage.scratch / size / "first"
        keep_first_layers(stage, num_layers, first)
        longer = values.model_copy(update={"epochs": params.base_epochs})
        found[f"{size}/base"] = train_once(stage, f"{size}/base", longer, first, None, None)
        base = trained(stage, f"{size}/base")
        distilled = train_once(stage, f"{size}/distilled", values, base, samples, None)
        found[f"{size}/distilled"], num_steps = distilled, int(distilled["steps"])
        drawn = draw_own(stage, size, sampled, scales, prompts)
        for name, learnt in (("own", drawn), ("demonstrations", None)):
            found[f"{size}/{name}"] = train_once(stage, f"{size}/{name}", values, base, learnt, num_steps)
    return report(stage, found)


def check_sizes(params: Params) -> None:
    """Raise ValueError for more layers than the model has, and for a size that is there twice."""
    most = read_config(Path(params.init_from)).num_hidden_layers
    for num_layers in params.num_layers:
        if not 1 <= num_layers <= most:
            raise ValueError(
                f"params.yaml: `distillation.num_layers` has {num_layers}, but {params.init_from} has {most} layers: "
                "keep between 1 and that many"
            )
    if len(set(params.num_layers)) < len(params.num_layers):
        raise ValueError(f"params.yaml: `distillation.num_layers` has a size twice: {params.num_layers}")


# --- one training ---


def keep_first_layers(stage: Stage[Params], num_layers: int, directory: Path) -> None:
    """Write the chat model with only its first layers."""
    if stage.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    torch.distributed.barrier()
    model, tokenizer = open_checkpoint(Path(stage.params.init_from), "fp32", torch.device("cpu"))
    del model.model.layers[num_layers:]
    model.config = model.config.model_copy(update={"num_hidden_layers": num_layers})
    save_model(model, tokenizer, directory, {}, max_shard_bytes=1 << 40)


def trained(stage: Stage[Params], name: str) -> Path:
    """Return where a training's model is until the end."""
    return stage.scratch / name / "output"


def draw_own(
    stage: Stage[Params],
    size: str,
    sampled: sampling.Params,
    scales: Scales,
    prompts: Sequence[Mapping[str, Any]],
) -> Path:
    """Write the base's own best samples of the larger model's prompts; return the file.

    Raises ValueError when none can be chosen.
    """
    params, path = stage.params, stage.scratch / size / "own.jsonl"
    settings = settings_of(sampled, trained(stage, f"{size}/base"), params.rewards, stage.seed, path.with_suffix(""))
    check_models(settings)
    jobs = [
        job_of(sampled, kind, params.temperature, [prompt_of(line) for line in prompts if line["kind"] == kind], "own")
        for kind in KINDS
    ]
    description = f"{stage.name} {size}" if stage.rank == 0 else None
    candidates = draw_and_score(settings, jobs, {}, description)
    choices = [choice for job in jobs for choice in choices_of(sampled, job, candidates[job.name], scales, stage.seed)]
    if not any(choice.is_answered for choice in choices):
        raise ValueError(
            f"the model of {size} has no answer that can be chosen to any of {len(choices)} prompts: raise "
            "`distillation.base_epochs`, of the demonstrations that mend it, or keep more layers"
        )
    if stage.rank == 0:
        write_lines(path, (dialogue_of(choice, "best") for choice in choices if choice.is_answered))
    torch.distributed.barrier()
    return path


def prompt_of(line: Mapping[str, Any]) -> Prompt:
    """Return what a chosen sample answers."""
    return Prompt(line["id"], line["category"], line["messages"][:-1], None, None, None)


def train_once(
    stage: Stage[Params],
    name: str,
    values: versions.Params,
    base: Path,
    samples: Path | None,
    num_steps: int | None,
) -> dict[str, float]:
    """Train one model, unless a stopped run has finished it; return its figures, on every rank.

    The training has states and curves of its own, below the study's scratch.
    """
    place, output = stage.scratch / name, trained(stage, name)
    finished = place / "figures.json"
    done = [read_json(finished) if stage.rank == 0 and finished.exists() else None]
    torch.distributed.broadcast_object_list(done, src=0)
    if done[0] is not None:
        return dict(done[0])
    if stage.rank == 0:
        shutil.rmtree(output, ignore_errors=True)
        for directory in (output, place / "record"):
            directory.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    own: Stage[Any] = replace(
        stage,
        name=f"{versions.SECTION}@{name}",  # messages then name the section whose values are used
        params=values,  # type: ignore[arg-type]
        output=output,
        scratch=place,
        record=place / "record",
        _last_step={},
    )
    figures = train(own, base, folders_of(values, samples, {}), num_steps, notes={})
    if stage.rank == 0:
        write_json(finished, figures)
    return figures


# --- the report ---


def report(stage: Stage[Params], found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Move the models to the output, plot their validation losses, return the figures."""
    import pandas

    figures = {
        f"{name}/{what}": own[what] for name, own in found.items() for what in ("parameters", "steps", "answer_tokens")
    }
    figures |= {f"{name}/validation_loss": own["validation/all/loss"] for name, own in found.items()}
    if stage.rank != 0:
        return figures
    curves = []
    for name in found:
        shutil.copytree(trained(stage, name), stage.output / name)  # not moved: the run may still be killed
        if name.endswith("/own"):
            shutil.copy(stage.scratch / f"{name}.jsonl", stage.output / f"{name}.jsonl")
        losses = pandas.read_csv(stage.output / name / "plots" / "validation.csv")
        curves.append(losses[losses["category"] == "all"].assign(model=name.replace("_layers/", " layers, ")))
    stage.plot("loss", pandas.concat(curves)[["model", "tokens", "loss"]], LOSS)
    return figures


if __name__ == "__main__":
    start(Params, run)
