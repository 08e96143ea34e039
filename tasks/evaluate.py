"""Answer the evaluation's prompts with one checkpoint, and judge the answers (Llama 2, sections 3.4 and 4.4).

Answers are drawn with random numbers of each prompt's own, the same for all checkpoints: these differ by their weights,
not by luck. In the default world each answer is judged by the known truth: whether it is right, is safe, does as the
system message asked, or refuses where no refusal was due, and what it is worth to the average annotator, its utility.
Elsewhere there is no truth, and only what can be told of any answer is reported. Shares are of all prompts of their
kind, with Wilson's interval; mean utilities have Student's. A prompt that is too long for the model counts as
unanswered. Answers are saved every few hundred prompts; a stopped run goes on after those.

Run once for each checkpoint (`evaluate@sft`). Reads the checkpoint, the prompt files, data/world/truth, and the tastes
of the annotators (`preferences.simulated`).
Writes answers.jsonl and plots/shares.csv; for MLflow also the tables of answers and of shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from model.network.checkpoint import open_checkpoint
from model.network.ranks import join_ranks
from tasks.judging.answering import (
    Judged,
    Known,
    Params,
    Share,
    answer_all,
    figures_of,
    judge_answer,
    outcomes_of,
    shares_of,
    utilities_of,
)
from tasks.reading.prompts import as_text, read_prompts
from tasks.running.files import write_lines
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start
from tasks.world.annotators import read_annotators
from tasks.world.judge import read_truth


def run(stage: Stage[Params]) -> dict[str, float]:
    """Answer, judge, report."""
    params = stage.params
    checkpoint = checkpoint_of(stage)
    prompts = read_prompts([Path(params.root) / name for name in params.prompts], "evaluate.prompts")
    known = None if params.truth is None else Known(read_truth(Path(params.truth)), read_annotators())
    device = join_ranks()
    model, tokenizer = open_checkpoint(checkpoint, params.precision, device)
    answers = answer_all(stage, params, model, tokenizer, prompts)
    judged = [judge_answer(prompt, answer, known) for prompt, answer in zip(prompts, answers, strict=True)]
    shares = shares_of(outcomes_of(each) for each in judged)
    if stage.rank == 0:
        write_answers(stage, judged)
        write_shares(stage, shares)
    return {
        "prompts": len(prompts),
        "prompts_too_long": sum(answer.num_tokens == 0 for answer in answers),
        "answer_tokens": fmean(answer.num_tokens for answer in answers),
        **utilities_of(judged),
        **figures_of(shares),
    }


def checkpoint_of(stage: Stage[Params]) -> Path:
    """Return the checkpoint that this run of the stage evaluates.

    Raises ValueError when params.yaml has no checkpoint of that name.
    """
    item = stage.entry
    known = stage.params.checkpoints
    if item not in known:
        names = ", ".join(f"evaluate@{name}" for name in known)
        raise ValueError(f"`evaluate.checkpoints` has no `{item}`: evaluate one of {names}")
    return Path(known[item])


# --- files ---


def write_answers(stage: Stage[Params], judged: Sequence[Judged]) -> None:
    """Write each prompt with its answer and the judgement, as JSON lines and as a table."""
    import pandas

    lines, table = [], []
    for prompt, answer, judgement, utility, held_out in judged:
        found = {} if judgement is None else asdict(judgement)
        row = {
            "id": prompt.id,
            "category": prompt.category,
            "risk": prompt.risk,
            "attack": prompt.attack,
            "difficulty": prompt.difficulty,
            "held_out": held_out,
        }
        replied = {"answer": answer.text, "num_tokens": answer.num_tokens, "finished": answer.finished}
        lines.append({**row, "messages": prompt.messages, **replied, "utility": utility, "judgement": found or None})
        table.append({**row, "prompt": as_text(prompt.messages), **replied, "utility": utility, **found})
    write_lines(stage.output / "answers.jsonl", lines)
    pandas.DataFrame(table).to_csv(stage.tables / "answers.csv", index=False)


def write_shares(stage: Stage[Params], shares: Mapping[str, Share]) -> None:
    """Write the shares as a plot and as a table."""
    import pandas

    table = pandas.DataFrame({"figure": name, **share._asdict()} for name, share in shares.items())
    kinds = "share of the prompts of their kind"
    stage.plot("shares", table, Plot("bars", "Answers by their judgements", "share", "figure", kinds, "figure"))
    table.to_csv(stage.tables / "shares.csv", index=False)


if __name__ == "__main__":
    start(Params, run)
