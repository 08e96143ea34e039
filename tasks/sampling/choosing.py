"""Choose the best candidate of each prompt, and one at random; keep the best of all earlier rounds.

What is chosen, by these rules:

- Equal answers are one candidate, the first. If all samples of a prompt are the same answer, that one is kept.
- A candidate can be chosen if the model ended it and a dialogue can hold it: it is not empty, and has no tag of the
  chat format. A prompt without such a candidate is left out.
- The best is the first by `tasks.judging.ranking`; ties go to the lower number. Candidate 0 is the best of the earlier
  rounds, where they had one: prompts are the same if their ids are, never by their texts.
- The random one is drawn among this round's samples that can be chosen, by a hash of seed and prompt: it shows what
  chance gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from model.text.dialogue import Message, check
from tasks.judging.ranking import Reward, Scales, ranked, reward_of
from tasks.reading.prompts import KINDS, Kind, Prompt, is_message
from tasks.running.digests import number_of
from tasks.running.places import NOTHING
from tasks.sampling.drawing import Candidate, Earlier

Way = Literal["best", "random"]
WAYS: tuple[Way, ...] = ("best", "random")


class Choice(NamedTuple):
    """A prompt with its candidates, and what was chosen; `order` has their numbers, the best first."""

    kind: Kind
    prompt: Prompt
    temperature: float
    candidates: Sequence[Candidate]
    rewards: Sequence[Reward]
    order: Sequence[int]
    eligible: Sequence[bool]
    best: int
    random: int

    @property
    def is_answered(self) -> bool:
        """Whether there was anything to choose from."""
        return any(self.eligible)


def choose(
    kind: Kind,
    prompt: Prompt,
    temperature: float,
    candidates: Sequence[Candidate],
    scales: Scales,
    weight: float,
    seed: int,
) -> Choice:
    """Rank the candidates of a prompt, and choose."""
    rewards = [
        reward_of(kind, each["helpfulness"], each["safety"], each["log_probability"], scales, weight)
        for each in candidates
    ]
    eligible = [can_be_chosen(prompt.messages, each) for each in candidates]
    order = ranked(rewards, eligible)
    possible = [number for number, fits in enumerate(eligible) if fits] or order
    # one of the samples, not of the different answers: what the model says often is what chance gives
    drawn = [number for number in possible for _ in range(candidates[number]["draws"])] or possible
    random = drawn[number_of(f"{seed} random {prompt.id}") % len(drawn)]
    return Choice(kind, prompt, temperature, candidates, rewards, order, eligible, order[0], random)


def can_be_chosen(messages: Sequence[Message], candidate: Candidate) -> bool:
    """Tell whether an answer is finished, not empty, and free of the chat format's tags."""
    if not candidate["finished"]:
        return False
    try:
        check([*messages, {"role": "assistant", "content": candidate["text"]}])
    except ValueError:
        return False
    return True


# --- lines of files ---


def sample_line(choice: Choice, round_name: str, model: str, scales: Scales) -> dict[str, Any]:
    """Return a line of samples.jsonl; without `best` and `random` if nothing could be chosen."""
    prompt = choice.prompt
    line: dict[str, Any] = {
        "id": prompt.id,
        "kind": choice.kind,
        "category": prompt.category,
        "risk": prompt.risk,
        "attack": prompt.attack,
        "difficulty": prompt.difficulty,
        "messages": prompt.messages,
        "round": round_name,
        "model": model,
        "temperature": choice.temperature,
        "candidates": [
            {
                **candidate,
                "safe_probability": scales.safety.probability(candidate["safety"]),
                "branch": reward.branch,
                "reward": reward.value,
            }
            for candidate, reward in zip(choice.candidates, choice.rewards, strict=True)
        ],
    }
    return {**line, "best": choice.best, "random": choice.random} if choice.is_answered else line


def dialogue_of(choice: Choice, way: Way) -> dict[str, Any]:
    """Return a prompt with its best or its random answer, as tasks/reading/dialogues.py reads dialogues."""
    chosen = choice.candidates[choice.best if way == "best" else choice.random]
    return {
        "id": choice.prompt.id,
        "messages": [*choice.prompt.messages, {"role": "assistant", "content": chosen["text"]}],
        "category": choice.prompt.category,
        "safety": choice.kind == "safety",
        "source": chosen["round"],
        "kind": choice.kind,
    }


def merged(earlier: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the dialogues of all rounds, one a prompt: the new one takes the place of an earlier one."""
    return list({line["id"]: line for line in [*earlier, *new]}.values())


def read_chosen(directory: Path, parameter: str) -> dict[Way, list[dict[str, Any]]]:
    """Return the best and the random dialogues in a directory of rejection samples; none for data/seeds/none.

    Raises ValueError, naming file and line, for a file that is missing, and for a line that is no such dialogue.
    """
    if directory == NOTHING:
        return {way: [] for way in WAYS}
    return {way: read_kept(directory / f"{way}.jsonl", parameter, "rejection_sampling") for way in WAYS}


def read_kept(path: Path, parameter: str, stage: str) -> list[dict[str, Any]]:
    """Return the dialogues of a file that a stage wrote, below a directory that `parameter` names.

    Raises ValueError as `read_chosen` does.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, though `{parameter}` names its directory: run the stage `{stage}` of that "
            f"round first, or write {NOTHING} if there is none"
        )
    lines: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
                _check_dialogue(line)
                if line["id"] in lines:
                    raise ValueError(f"its id {line['id']} belongs to another line too")
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not a sample that was chosen: {error}") from None
            lines[line["id"]] = line
    return list(lines.values())


def _check_dialogue(line: Any) -> None:
    texts = ("id", "category", "source")
    if not (isinstance(line, dict) and all(isinstance(line.get(name), str) for name in texts)):
        raise ValueError(f"it needs {', '.join(f'`{name}`' for name in texts)} and `messages`")
    if line.get("kind") not in KINDS or line.get("safety") is not (line["kind"] == "safety"):
        raise ValueError("`kind` is helpfulness or safety, and `safety` says the same")
    messages = line.get("messages")
    if not (isinstance(messages, list) and all(is_message(message) for message in messages)):
        raise ValueError("`messages` is not a list of objects with `role` and `content`")
    check(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("it ends with the prompt: the answer is gone")


def earlier_best(lines: Sequence[Mapping[str, Any]], prompts: Iterable[Prompt], parameter: str) -> dict[str, Earlier]:
    """Return the earlier rounds' best answers to prompts that are asked again, by the prompt's id.

    Raises ValueError for an id that stood for another prompt.
    """
    by_id = {line["id"]: line for line in lines}
    found = {}
    for prompt in prompts:
        if prompt.id in by_id:
            *asked, answer = by_id[prompt.id]["messages"]
            if asked != prompt.messages:
                raise ValueError(
                    f"prompt {prompt.id} asks something else than the prompt of that id in the samples of "
                    f"`{parameter}`: give new prompts ids of their own"
                )
            found[prompt.id] = Earlier(answer["content"], by_id[prompt.id]["source"])
    return found
