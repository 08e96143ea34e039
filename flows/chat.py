"""Talk to a checkpoint in the terminal: `python -m flows.chat [CHECKPOINT]`.

CHECKPOINT is a Hugging Face Llama directory, for instance data/sft; by default the champion, which the stage `promote`
has chosen, or the newest one in data/ while there is none. The settings are those of section `chat` in params.yaml.
Input may come from a pipe: then each line is printed as it is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from tasks.running.params import Machine, Section, parse_section, read_params
from tasks.running.places import DATA

if TYPE_CHECKING:
    from model.network.transformer import Llama
    from model.text.dialogue import Message
    from model.text.tokenizer import Tokenizer

COMMANDS = """\
/system TEXT      set the system message, which applies to the whole dialogue; without TEXT, remove it
/temperature X    set the temperature; higher draws more freely, 0 always takes the likeliest token
/reset            start a new dialogue; the system message stays
/save FILE        append the dialogue to a file, as a JSON line that the stage sft can read
/help             show this list
/quit             leave, as does Ctrl-D; Ctrl-C stops an answer"""
REPLACEMENT = "\ufffd"  # stands for bytes that are not valid UTF-8, or not yet
# A model may write what a terminal would interpret as a control sequence.
HARMLESS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], REPLACEMENT)


class Params(Section):
    """How a chat answers."""

    temperature: float = Field(ge=0, description="divides the logits; 0: always the likeliest token")
    top_p: float = Field(gt=0, le=1, description="draw from the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw from this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of an answer, EOS included")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")


@dataclass
class Chat:
    """One chat: the model that answers, and the dialogue so far."""

    model: Llama
    tokenizer: Tokenizer
    params: Params
    seed: int
    write: Callable[[str], object]  # shows text at once
    system: str = ""
    turns: list[Message] = field(default_factory=list)  # of user and assistant, alternating
    num_answers: int = 0  # over all dialogues, so that the same question again gets a new draw

    @property
    def messages(self) -> list[Message]:
        """The dialogue so far."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]  # type: ignore[list-item]

    @property
    def context(self) -> int:
        """Number of tokens that the model can see."""
        return self.model.config.max_position_embeddings

    @property
    def used(self) -> int:
        """Number of tokens of the context that the dialogue takes."""
        from model.text.dialogue import encode_dialogue

        return len(encode_dialogue(self.messages, self.tokenizer).ids) if self.turns else 0


# --- messages ---


def say(chat: Chat, text: str) -> None:
    """Send the text to the model, show its answer token by token, and keep both.

    Raises ValueError when the text contains a tag of the chat format, or the context has no room for an answer.
    """
    from model.sampling.sampler import Sampling, sample
    from model.text.dialogue import check, decode_answer, encode_prompt

    asked: Message = {"role": "user", "content": text}
    ids = encode_prompt([*chat.messages, asked], chat.tokenizer)
    if len(ids) >= chat.context:
        raise ValueError(
            f"the context is full: the dialogue and this message take {len(ids)} of {chat.context} tokens, and leave "
            "no room for an answer; /reset starts a new dialogue"
        )
    values = chat.params.model_dump(exclude={"precision"})
    drawn: list[int] = []
    shown = ""
    note = ""

    def show(prompt: int, number: int, token: int) -> None:
        nonlocal shown
        drawn.append(token)
        text = visible(drawn, chat.tokenizer)
        chat.write(text[len(shown) :].translate(HARMLESS))
        shown = text

    try:
        ((response,),) = sample(
            chat.model,
            [ids],
            Sampling(**values),
            num_samples=1,
            eos_id=chat.tokenizer.eos_id,
            seeds=[chat.seed + chat.num_answers],
            max_rows=1,
            description=None,
            on_token=show,
        )
        if not response.finished:
            full = len(ids) + len(drawn) >= chat.context
            limit = "the context is full, /reset starts a new dialogue" if full else "chat.max_new_tokens is reached"
            note = f"[cut off: {limit}]"
    except KeyboardInterrupt:
        note = "[stopped]"
    chat.num_answers += 1
    answer = decode_answer(drawn, chat.tokenizer)
    chat.write(answer[len(shown) :].translate(HARMLESS) + "\n")
    if note:
        chat.write(f"{note}\n")
    turns: list[Message] = [*chat.turns, asked, {"role": "assistant", "content": answer}]
    try:
        check(turns)
    except ValueError as error:
        chat.write(f"[the answer and your message are not kept: {error}]\n")
    else:
        chat.turns = turns


def visible(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the part of an answer that later tokens can't change.

    A character of several bytes may arrive as several tokens, and trailing spaces are stripped only if nothing follows.
    """
    from model.text.dialogue import decode_answer

    return decode_answer(ids, tokenizer).rstrip(REPLACEMENT).rstrip()


# --- commands ---


def obey(chat: Chat, line: str) -> None:
    """Carry out a command.

    Raises ValueError, saying what would work, for an unknown command and for an argument that it can't use.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/system":
            set_system(chat, argument)
        case "/temperature":
            set_temperature(chat, argument)
        case "/reset":
            chat.turns = []
            chat.write("A new dialogue.\n")
        case "/save":
            save(chat, argument)
        case "/help":
            chat.write(f"{COMMANDS}\n")
        case _:
            raise ValueError(f"{name} is not a command; /help lists them")


def set_system(chat: Chat, text: str) -> None:
    """Set the system message; the dialogue continues as if it had begun with it."""
    from model.text.dialogue import check

    if text:
        check([{"role": "system", "content": text}, {"role": "user", "content": ""}])
    chat.system = text
    chat.write("The system message is set.\n" if text else "The system message is removed.\n")


def set_temperature(chat: Chat, text: str) -> None:
    """Set the temperature."""
    try:
        chat.params = Params.model_validate({**chat.params.model_dump(), "temperature": text})
    except ValidationError:
        raise ValueError(f"temperature {text!r}: give a number >= 0, for instance /temperature 0.7") from None
    chat.write(f"The temperature is {chat.params.temperature:g}.\n")


def save(chat: Chat, name: str) -> None:
    """Append the dialogue to a file, by replacing it in one step: DVC may hold a link to the old file's content."""
    if not name:
        raise ValueError("name the file: /save FILE")
    if not chat.turns:
        raise ValueError("nothing has been said yet: there is nothing to save")
    path = Path(name).expanduser()
    messages = chat.messages
    identity = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    line: dict[str, Any] = {"id": identity, "messages": messages, "category": "dialogue", "safety": False}
    text = json.dumps({**line, "source": "chat"}, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        temporary.write_text(before + text, encoding="utf-8")
        temporary.replace(path)
    except (OSError, UnicodeDecodeError) as error:
        temporary.unlink(missing_ok=True)
        raise ValueError(f"{path} can't be written: {error}") from None
    chat.write(f"Saved to {path}.\n")


# --- the loop ---


def talk(chat: Chat, read: Callable[[str], str]) -> None:
    """Read lines and answer them until there are no more; `read` shows a prompt, and raises EOFError at the end."""
    while True:
        try:
            line = read(f"\n[{room(chat)}] > ").strip()
        except EOFError:
            chat.write("\n")
            return
        except KeyboardInterrupt:
            chat.write("\n/quit or Ctrl-D ends the chat.\n")
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                obey(chat, line)
            elif line:
                say(chat, line)
        except ValueError as error:
            chat.write(f"{error}\n")
        except KeyboardInterrupt:
            chat.write("\n")


def room(chat: Chat) -> str:
    """Return how much of the context the dialogue takes, as text."""
    used = chat.used
    return f"{used}/{chat.context}" if used < chat.context else f"{chat.context}/{chat.context}, full: /reset"


def read_line(prompt: str) -> str:
    """Read a line from the terminal, with history and editing; if it comes from elsewhere, print it."""
    line = input(prompt)
    if not sys.stdin.isatty():
        show(f"{line}\n")
    return line


def show(text: str) -> None:
    """Print text at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def choose(name: str | None) -> tuple[Path, str]:
    """Return the checkpoint that was named, or the champion, or while there is none the newest, and what to say of it.

    Raises ValueError when there is none, or when no directory has this name.
    """
    directory, why = (Path(name), "") if name else champion() or (newest_checkpoint(), "")
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: name a checkpoint, for instance data/sft")
    return directory, why


def champion() -> tuple[Path, str] | None:
    """Return the champion's directory and why it is the champion, or None while there is none.

    Raises ValueError when its checkpoint is gone.
    """
    decision_file = DATA / "promote" / "decision.json"
    if not decision_file.exists():
        return None
    decision = json.loads(decision_file.read_text(encoding="utf-8"))
    name, directory = decision["champion"], decision_file.with_name("champion")
    if not (directory / "config.json").exists():
        raise ValueError(
            f"{directory}, the checkpoint of the champion {name}, is gone: `dvc checkout promote` brings it back, or "
            "name a Hugging Face directory"
        )
    passed = [each for each in decision["ladder"] if each["challenger"] == name]
    why = "; ".join(rule["text"] for each in passed for rule in each["rules"]) or "no version has passed the gate"
    return directory, f"the champion, {name}: {why}"


def newest_checkpoint() -> Path:
    """Return the newest checkpoint in data/ of a model that answers.

    One inside another checkpoint doesn't count, nor one that is there only for a version to be compared with.
    Raises ValueError when there is none.
    """
    checkpoints = [path.parent for path in (*DATA.glob("*/training.json"), *DATA.glob("*/*/training.json"))]
    found = [path / "training.json" for path in checkpoints if answers(path) and path.parent not in checkpoints]
    if not found:
        raise ValueError(f"{DATA} holds no checkpoint yet: `make run` trains one, or name a Hugging Face directory")
    return max(found, key=lambda path: (path.stat().st_mtime, str(path))).parent


def answers(checkpoint: Path) -> bool:
    """Return whether a checkpoint's model is one to talk to; a reward model only scores."""
    config, training = (
        json.loads((checkpoint / name).read_text(encoding="utf-8")) for name in ("config.json", "training.json")
    )
    return "LlamaForCausalLM" in config["architectures"] and "control_of" not in training


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.chat", description="Talk to a checkpoint.")
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a directory; default: the champion")
    name = parser.parse_args(arguments).checkpoint
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        values = read_params()
        params, machine = parse_section(Params, values, "chat"), parse_section(Machine, values, "machine")
        directory, why = choose(name)
        show(f"Opening {directory}{f' ({why})' if why else ''}. /help lists the commands.\n")
        talk(open_chat(directory, params, machine.threads, values["seed"]), read_line)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:  # before the chat began
        return 130
    return 0


def open_chat(directory: Path, params: Params, threads: int, seed: int) -> Chat:
    """Open a checkpoint; slow imports happen here, after the greeting."""
    import torch

    from model.network.checkpoint import open_checkpoint

    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` history and editing

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = open_checkpoint(directory, params.precision, device)
    return Chat(model, tokenizer, params, seed, show)


if __name__ == "__main__":
    sys.exit(main())
