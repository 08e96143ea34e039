"""Dialogues to token ids, and ids back to answers: the format of Llama 2-Chat (Llama 2, section 3.1, appendix A.1).

    <s>[INST] <<SYS>>
    system
    <</SYS>>

    user [/INST] answer </s><s>[INST] user [/INST] answer </s>

`<s>` and `</s>` stand for the ids of BOS and EOS, which text can't contain. Each pair of turns is encoded separately,
as in Meta's generation.py. model/text/tokenizer.py has the same format as a template for transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

from model.text.tokenizer import Tokenizer

TAGS = re.compile(r"\[/?INST\]|<</?SYS>>")
LONE_SURROGATES = re.compile(r"[\ud800-\udfff]")
Loss = Literal["all", "last"]  # which answers of a dialogue are learnt


class Message(TypedDict):
    """One turn of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: str


class Encoded(NamedTuple):
    """A dialogue's token ids, and which of them are learnt: of an answer also the space after it and its EOS."""

    ids: list[int]
    is_learnt: list[bool]


def check(messages: Sequence[Message]) -> None:
    """Raise ValueError, naming the message, unless user and assistant take turns after at most one system message.

    A message that contains one of the format's tags is refused too: it could pass for another turn.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise ValueError("the dialogue holds no turn: it needs a message of the user")
    for number, message in enumerate(messages, start=1 + len(turns) - len(messages)):  # the system's message is 0
        role, content = message["role"], message["content"]
        if number:
            due = "user" if number % 2 else "assistant"
            if role != due:
                raise ValueError(
                    f"turn {number} is the {role}'s, and it is the {due}'s turn: user and assistant take turns, "
                    "the user first, after at most one message of the system"
                )
        where = f"turn {number} ({role})" if number else "the system message"
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where} is an empty answer")
        tag = TAGS.search(content)
        if tag:
            raise ValueError(f"{where} contains {tag.group()}, a tag of the chat format: remove it")
        if LONE_SURROGATES.search(content):
            raise ValueError(f"{where} contains half a character (a lone surrogate): it was cut or decoded wrongly")


def encode_dialogue(messages: Sequence[Message], tokenizer: Tokenizer, loss: Loss = "all") -> Encoded:
    """Return the ids of a dialogue that ends with an answer, and which of them are learnt.

    They begin with `encode_prompt` of all but the last answer. With a `loss` of `last` only the last answer is learnt;
    earlier ones, which another model or a person wrote, are only read. Raises ValueError as `check` does.
    """
    check(messages)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the dialogue ends with the user's turn: it has no answer to learn from")
    ids: list[int] = []
    is_learnt: list[bool] = []
    exchanges = _exchanges(messages)
    for place, (prompt, answer) in enumerate(exchanges, start=1):
        asked = tokenizer.encode(prompt, bos=True, eos=False)
        both = tokenizer.encode(f"{prompt} {answer} ", bos=True, eos=True)
        assert both[: len(asked)] == asked, f"{tokenizer.path} has a piece that joins `]` and a space"
        ids += both
        learnt = loss == "all" or place == len(exchanges)
        is_learnt += [False] * len(asked) + [learnt] * (len(both) - len(asked))
    return Encoded(ids, is_learnt)


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a dialogue that ends with the user's turn, up to where the answer begins.

    Raises ValueError as `check` does.
    """
    check(messages)
    if messages[-1]["role"] != "user":
        raise ValueError("the dialogue ends with an answer: there is nothing to answer")
    *earlier, (prompt, _) = _exchanges(messages)
    ids = [token for asked, answer in earlier for token in tokenizer.encode(f"{asked} {answer} ", bos=True, eos=True)]
    return ids + tokenizer.encode(prompt, bos=True, eos=False)


def encode_answer(messages: Sequence[Message], answer: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids that an answer adds to those of `encode_prompt`, as `encode_dialogue` has them, EOS included.

    Any text will do, even one that no dialogue can hold.
    """
    *_, (prompt, _) = _exchanges(messages)
    asked = tokenizer.encode(prompt, bos=True, eos=False)
    both = tokenizer.encode(f"{prompt} {answer.strip()} ", bos=True, eos=True)
    assert both[: len(asked)] == asked, f"{tokenizer.path} has a piece that joins `]` and a space"
    return both[len(asked) :]


def decode_answer(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of an answer's ids, up to EOS if there is one."""
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return tokenizer.decode(ids[:end]).strip()


def _exchanges(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return pairs of prompt and answer; prompts carry their tags, the first also the system message.

    The last answer is empty if the dialogue ends with the user's turn.
    """
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        system, first, *rest = contents
        contents = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}", *rest]
    prompts = [f"[INST] {content.strip()} [/INST]" for content in contents[::2]]
    answers = [content.strip() for content in contents[1::2]]
    return list(zip(prompts, answers + [""] * (len(prompts) - len(answers)), strict=True))
