"""How alike a checkpoint's answers to one prompt are, against temperature: Self-BLEU (Llama 2, section 5.1, figure 21).

Many samples of each prompt are drawn; each sample's BLEU against all others is averaged (Zhu et al. 2018, Texygen). 100
means that all are the same. The paper finds that after RLHF answers to factual prompts stay alike at any temperature,
while those to creative ones still differ. BLEU is sacrebleu's, of words up to four in a row, or as many as a short
answer has.

Run once for each checkpoint (`self_bleu@sft`). Reads the checkpoint and the evaluation's prompts.
Writes self_bleu.csv: kind, temperature, prompts, samples, self_bleu, low, high (Student's interval over prompts), and
plots/self_bleu.csv.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from pydantic import Field

from model.network.checkpoint import open_checkpoint
from model.network.ranks import from_all_ranks, join_ranks
from model.network.transformer import Llama
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.judging.wins import Estimate, mean_of
from tasks.reading.prompts import Prompt, read_prompts
from tasks.running.digests import number_of
from tasks.running.files import read_json, write_json
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start


class Params(Section):
    """Which checkpoints are asked what, and how often."""

    checkpoints: dict[str, str] = Field(description="Hugging Face Llama directory of each, by its name")
    root: str = Field(min_length=1, description="directory of the prompt files, which DVC watches")
    prompts: list[str] = Field(min_length=1, description="prompt files below `root`, JSON lines")
    kinds: dict[str, list[str]] = Field(min_length=1, description="kind of prompts: their categories")
    num_prompts: int = Field(gt=1, description="prompts of each kind")
    num_samples: int = Field(gt=1, description="samples of each prompt at each temperature")
    temperatures: list[float] = Field(min_length=1, description="temperatures; 0 would give one answer only")
    top_p: float = Field(gt=0, le=1, description="draw from the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw from this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of a sample, EOS included")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="samples generated at once; more need more memory")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Sample at each temperature, measure, report."""
    params = stage.params
    if stage.entry not in params.checkpoints:
        names = ", ".join(f"self_bleu@{name}" for name in params.checkpoints)
        raise ValueError(f"`self_bleu.checkpoints` has no `{stage.entry}`: ask one of {names}")
    asked = take_prompts(params)
    model, tokenizer = open_checkpoint(Path(params.checkpoints[stage.entry]), params.precision, join_ranks())
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for temperature in params.temperatures:
        prompts = [prompt for own in asked.values() for prompt in own]
        values = iter(self_bleus(stage, model, tokenizer, prompts, temperature))
        for kind, own in asked.items():
            found = mean_of([next(values) for _ in own])
            rows.append({"kind": kind, "temperature": temperature, "samples": params.num_samples, **columns_of(found)})
            place = metric_name(kind, f"temperature_{temperature:g}", "self_bleu")
            figures |= {place: found.value, f"{place}/low": found.low or 0.0, f"{place}/high": found.high or 0.0}
    if stage.rank == 0:
        write_rows(stage, rows)
    return {"prompts": sum(map(len, asked.values())), **figures}


def take_prompts(params: Params) -> dict[str, list[Prompt]]:
    """Return the prompts of each kind, single questions; a digest of the id decides which.

    Raises ValueError when a kind has fewer than are asked for.
    """
    prompts = read_prompts([Path(params.root) / name for name in params.prompts], "self_bleu.prompts")
    single = [prompt for prompt in prompts if len(prompt.messages) == 1]
    asked = {}
    for kind, categories in params.kinds.items():
        own = sorted(
            (prompt for prompt in single if prompt.category in categories),
            key=lambda prompt: number_of(f"self_bleu {prompt.id}"),
        )
        if len(own) < params.num_prompts:
            raise ValueError(
                f"`self_bleu.prompts` holds {len(own)} single questions of the categories {', '.join(categories)}, and "
                f"`self_bleu.num_prompts` asks for {params.num_prompts}: lower it, or correct `self_bleu.kinds.{kind}`"
            )
        asked[kind] = own[: params.num_prompts]
    return asked


def self_bleus(
    stage: Stage[Params], model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], temperature: float
) -> list[float]:
    """Return the Self-BLEU of samples of each prompt, on every rank; the ranks share the prompts.

    They are saved below `stage.scratch`. Raises ValueError for a prompt that leaves no room in the context.
    """
    params = stage.params
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = range(rank, len(prompts), world)
    saved = stage.scratch / "values" / f"{world}-{rank}-{temperature}.json"
    if not saved.exists():
        encoded = [encode_prompt(prompts[number].messages, tokenizer) for number in own]
        for number, ids in zip(own, encoded, strict=True):
            if len(ids) >= model.config.max_position_embeddings:
                raise ValueError(
                    f"prompt {prompts[number].id} has {len(ids)} tokens, and the context of "
                    f"{params.checkpoints[stage.entry]} is {model.config.max_position_embeddings}: leave it out"
                )
        sampling = Sampling(
            temperature=temperature, top_p=params.top_p, top_k=params.top_k, max_new_tokens=params.max_new_tokens
        )
        responses = sample(
            model,
            encoded,
            sampling,
            num_samples=params.num_samples,
            eos_id=tokenizer.eos_id,
            seeds=[number_of(f"{stage.seed} self_bleu {prompts[number].id} {temperature}") for number in own],
            max_rows=params.max_rows,
            description=f"{stage.name} at {temperature}" if rank == 0 else None,
        )
        texts = [[decode_answer(each.ids, tokenizer) for each in own_samples] for own_samples in responses]
        write_json(saved, [self_bleu(own_texts) for own_texts in texts])
    return from_all_ranks(dict(zip(own, read_json(saved), strict=True)))


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU, 0 to 100, of each of several texts against all others.

    A text that occurs twice is its own reference: 100 without asking.
    """
    from sacrebleu.metrics.bleu import BLEU

    assert len(texts) > 1
    bleu = BLEU(effective_order=True)  # a text of two words has no four in a row
    values = {
        text: 100.0
        if texts.count(text) > 1
        else bleu.sentence_score(text, [each for each in texts if each != text]).score
        for text in dict.fromkeys(texts)
    }
    return fmean(values[text] for text in texts)


def columns_of(found: Estimate) -> dict[str, float | None]:
    """Return an estimate as columns."""
    return {"prompts": found.prompts, "self_bleu": found.value, "low": found.low, "high": found.high}


def write_rows(stage: Stage[Params], rows: Sequence[dict[str, Any]]) -> None:
    """Write Self-BLEU by kind and temperature, and plot it."""
    import pandas

    table = pandas.DataFrame(rows)
    for directory in (stage.output, stage.tables):
        table.to_csv(directory / "self_bleu.csv", index=False)
    title = "Self-BLEU of samples of one prompt, by temperature"
    stage.plot(
        "self_bleu", table, Plot("curves", title, "temperature", "self_bleu", "temperature", "Self-BLEU", "kind")
    )


if __name__ == "__main__":
    start(Params, run)
