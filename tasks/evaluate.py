"""Answer the evaluation's prompts with one checkpoint, and judge the answers (Llama 2, sections 3.4 and 4.4).

Answers are drawn with random numbers of each prompt's own, the same for all checkpoints: these differ by their weights,
not by luck. In the default world each answer is judged by the known truth: whether it is right, is safe, does as the
system message asked, or refuses where no refusal was due, and what it is worth to the average annotator, its utility.
Answers to adversarial prompts are rated on five points, of which 1 and 2 are violations. A few annotators, who err,
rate each answer, too: their majority says whether there is a violation, and Gwet's AC1 and AC2 how far they agree.
Elsewhere there is no truth, and only what can be told of any answer is reported. Shares are of all prompts of their
kind, with Wilson's interval; means have Student's. A prompt that is too long for the model counts as unanswered. The
multi-turn prompts of stage `multi_turn` have figures of their own. Answers are saved every few hundred prompts; a
stopped run goes on after those. Perplexity is that of the held-out texts of pretraining.

Run once for each checkpoint (`evaluate@sft`). Reads the checkpoint, the prompt files, data/multi_turn, data/tokenize,
data/world/truth, and the tastes of the annotators (`preferences.simulated`).
Writes answers.jsonl, parts.csv (every figure of every part of the prompts, with the numbers of prompts and raters),
perplexity.csv, plots/ and tables/; for MLflow also the tables of answers and of shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from model.network.checkpoint import open_checkpoint
from model.network.ranks import join_ranks
from tasks.judging.answering import Judged, Known, Params, answer_all, judge_answer, rate_answer
from tasks.judging.outcomes import (
    Part,
    Share,
    agreement_figures,
    figures_of,
    means_of,
    outcomes_of,
    parts_of,
    shares_of,
    turns_of,
)
from tasks.judging.perplexity import Perplexity, perplexities_of, perplexity_figures
from tasks.judging.wins import in_words
from tasks.reading.prompts import Prompt, as_text, read_prompts
from tasks.running.files import read_lines, write_lines
from tasks.running.places import NOTHING
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start
from tasks.world.annotators import read_annotators
from tasks.world.judge import read_truth

SHOWN = {  # tables of parts.csv's figures
    "safety": "Answers to adversarial prompts: violations and mean rating on five points, with 95% intervals",
    "helpfulness": "Answers to helpful and borderline prompts, with 95% intervals",
}


def run(stage: Stage[Params]) -> dict[str, float]:
    """Answer, judge, report."""
    params = stage.params
    checkpoint = checkpoint_of(stage)
    prompts = read_prompts([Path(params.root) / name for name in params.prompts], "evaluate.prompts")
    gathered = read_gathered(Path(params.gathered))
    asked = [*prompts, *(prompt for prompt, _, _ in gathered)]
    known = None if params.truth is None else Known(read_truth(Path(params.truth)), read_annotators())
    device = join_ranks()
    model, tokenizer = open_checkpoint(checkpoint, params.precision, device)
    answers = answer_all(stage, params, model, tokenizer, asked)
    judged = [judge_answer(prompt, answer, known) for prompt, answer in zip(prompts, answers, strict=False)]
    for (prompt, way, original), answer in zip(gathered, answers[len(prompts) :], strict=True):
        # the truth knows the dialogue's last question, whoever gave the earlier answers
        judged.append(judge_answer(prompt._replace(id=original), answer, known)._replace(gathered=way))
    if known is not None:
        judged = [rate_answer(each, known, params.num_raters, stage.seed) for each in judged]
    judged = [each._replace(prompt=prompt) for each, prompt in zip(judged, asked, strict=True)]
    shares = shares_of(outcomes_of(each) for each in judged)
    perplexities = {}
    if Path(params.text) != NOTHING:
        text, its_tokenizer = Path(params.text), Path(params.text_tokenizer)
        perplexities = perplexities_of(
            model, tokenizer, text, its_tokenizer, params.max_text_tokens, params.tokens_at_once
        )
    if stage.rank == 0:
        write_answers(stage, judged)
        write_shares(stage, shares)
        write_parts(stage, parts_of(judged))
        write_perplexities(stage, perplexities)
    return {
        "prompts": len(prompts),
        "prompts_gathered": len(gathered),
        "prompts_too_long": sum(answer.num_tokens == 0 for answer in answers),
        "answer_tokens": fmean(answer.num_tokens for answer in answers[: len(prompts)]),
        **means_of(judged),
        **figures_of(shares),
        **agreement_figures([each for each in judged if each.gathered is None]),
        **perplexity_figures(perplexities),
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


def read_gathered(directory: Path) -> list[tuple[Prompt, str, str]]:
    """Return the prompts of stage `multi_turn`, each with the way of gathering and the id that the truth knows it by.

    Raises ValueError as `read_prompts` does.
    """
    if directory == NOTHING:
        return []
    path = directory / "prompts.jsonl"
    prompts = read_prompts([path], "evaluate.gathered")
    return [(prompt, line["gathered"], line["asks"]) for prompt, line in zip(prompts, read_lines(path), strict=True)]


# --- files ---


def write_answers(stage: Stage[Params], judged: Sequence[Judged]) -> None:
    """Write each prompt with its answer and the judgement, as JSON lines and as a table."""
    import pandas

    lines, table = [], []
    for each in judged:
        prompt, answer = each.prompt, each.answer
        found = {} if each.judgement is None else asdict(each.judgement)
        row = {
            "id": prompt.id,
            "category": prompt.category,
            "risk": prompt.risk,
            "attack": prompt.attack,
            "difficulty": prompt.difficulty,
            "held_out": each.held_out,
            "turns": turns_of(each),
            "gathered": each.gathered,
        }
        replied = {"answer": answer.text, "num_tokens": answer.num_tokens, "finished": answer.finished}
        value = {"utility": each.utility, "rating": each.rating}
        raters = None if each.raters is None else {name: seen._asdict() for name, seen in each.raters.items()}
        lines.append(
            {**row, "messages": prompt.messages, **replied, **value, "raters": raters, "judgement": found or None}
        )
        table.append({**row, "prompt": as_text(prompt.messages), **replied, **value, **found})
    write_lines(stage.output / "answers.jsonl", lines)
    pandas.DataFrame(table).to_csv(stage.tables / "answers.csv", index=False)


def write_shares(stage: Stage[Params], shares: Mapping[str, Share]) -> None:
    """Write the shares as a plot and as a table."""
    import pandas

    table = pandas.DataFrame({"figure": name, **share._asdict()} for name, share in shares.items())
    kinds = "share of the prompts of their kind"
    stage.plot("shares", table, Plot("bars", "Answers by their judgements", "share", "figure", kinds, "figure"))
    table.to_csv(stage.tables / "shares.csv", index=False)


def write_parts(stage: Stage[Params], parts: Sequence[Part]) -> None:
    """Write every figure of every part of the prompts as a row, and two tables in words."""
    import pandas

    names = ["kind", "parted_by", "part", "figure", "raters", "prompts", "value", "low", "high"]
    rows = [{**part._asdict(), **part.estimate._asdict()} for part in parts]
    for directory in (stage.output, stage.tables):
        pandas.DataFrame(rows, columns=names).to_csv(directory / "parts.csv", index=False)
    for kind, title in SHOWN.items():
        words: dict[tuple[str, str], dict[str, str]] = {}
        for part in parts:
            if part.kind == kind and part.raters:
                place = words.setdefault((part.parted_by, part.part), {"by": part.parted_by, "part": part.part})
                place.setdefault("prompts", str(part.estimate.prompts))
                is_mean = "rating" in part.figure or part.figure == "utility"
                place[part.figure] = in_words(part.estimate, "{:.2f}" if is_mean else "{:.1%}")
        if words:
            stage.show(kind, pandas.DataFrame(words.values()).fillna(""), title)


def write_perplexities(stage: Stage[Params], perplexities: Mapping[str, Perplexity]) -> None:
    """Write the perplexities by source, and plot them; nothing without a text."""
    import pandas

    if not perplexities:
        return
    table = pandas.DataFrame({"source": name, **each._asdict()} for name, each in perplexities.items())
    for directory in (stage.output, stage.tables):
        table.to_csv(directory / "perplexity.csv", index=False)
    title = "Perplexity on held-out text, with 95% intervals by document"
    stage.plot("perplexity", table, Plot("bars", title, "perplexity", "source", "perplexity", "source"))


if __name__ == "__main__":
    start(Params, run)
