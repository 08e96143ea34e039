from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from test_evaluate import write_checkpoint
from test_stage import wait_for

from flows.chat import (
    COMMANDS,
    HARMLESS,
    Chat,
    Params,
    champion,
    main,
    newest_checkpoint,
    open_chat,
    room,
    say,
    talk,
    visible,
)
from model.sampling.sampler import Response, Sampling, sample
from model.text.dialogue import Message, decode_answer, encode_dialogue, encode_prompt
from model.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parent.parent
GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
QUESTION = "where does the llama walk?"
CTRL_C = "\x03"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("chat"), max_position_embeddings=128)


class Terminal:
    """What is typed, and what is seen; CTRL_C among the lines is typed at the prompt."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        params = Params.model_validate({**GREEDY, "precision": "fp32", **changes})
        self.chat = open_chat(directory, params, threads=1, seed=1)
        self.chat.write = self.write
        self.lines: list[str] = []
        self.seen = ""

    def write(self, text: str) -> None:
        self.seen += text

    def read(self, prompt: str) -> str:
        self.seen += prompt
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line == CTRL_C:
            raise KeyboardInterrupt
        return line

    def type(self, *lines: str) -> str:
        """Return what is seen after these lines."""
        self.seen, self.lines = "", list(lines)
        talk(self.chat, self.read)
        return self.seen


@pytest.fixture
def terminal(checkpoint: Path) -> Terminal:
    return Terminal(checkpoint)


def response_to(chat: Chat, messages: list[Message]) -> Response:
    """What the model says by itself."""
    ((response,),) = sample(
        chat.model, [encode_prompt(messages, chat.tokenizer)], Sampling.model_validate(GREEDY), num_samples=1,
        eos_id=chat.tokenizer.eos_id, seeds=[1], max_rows=1, description=None,
    )  # fmt: skip
    return response


# --- answers ---


def test_the_dialogue_is_kept_and_what_it_takes_of_the_context_shown(terminal: Terminal) -> None:
    seen = terminal.type("/system over the hill", QUESTION, "12 steps?")
    chat = terminal.chat
    messages: list[Message] = [{"role": "system", "content": "over the hill"}]
    for text in (QUESTION, "12 steps?"):
        messages.append({"role": "user", "content": text})
        answer = decode_answer(response_to(chat, messages).ids, chat.tokenizer)
        messages.append({"role": "assistant", "content": answer})
        assert answer.translate(HARMLESS) in seen
    assert chat.messages == messages
    used = len(encode_dialogue(messages, chat.tokenizer).ids)
    assert seen.endswith(f"\n[{used}/128] > \n")
    assert seen.startswith("\n[0/128] > ")
    assert seen.count("[cut off: chat.max_new_tokens is reached]") == 2


def test_the_same_question_is_answered_anew_and_the_same_chat_the_same(checkpoint: Path) -> None:
    one, other = (Terminal(checkpoint, temperature=1.0) for _ in range(2))
    for terminal in (one, other):
        terminal.type("/reset", QUESTION)
    first = one.chat.turns
    assert first == other.chat.turns
    one.type("/reset", QUESTION)
    assert one.chat.turns[0] == first[0]
    assert one.chat.turns[1] != first[1]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.lists(st.integers(3, 289), max_size=30)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
)
def test_streamed_pieces_make_up_the_answer_and_hold_no_half_character(checkpoint: Path, ids: list[int] | str) -> None:
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    whole = isinstance(ids, str)
    if isinstance(ids, str):
        ids = tokenizer.encode(ids, bos=False, eos=False)
    answer = decode_answer(ids, tokenizer)
    shown = ""
    for end in range(len(ids) + 1):
        text = visible(ids[:end], tokenizer)
        assert text.startswith(shown)
        assert answer.startswith(text)
        assert not whole or "\ufffd" not in text or "\ufffd" in answer
        shown = text


def test_an_answer_cannot_command_the_terminal(terminal: Terminal) -> None:
    assert "a\x1b[2J\x07\x9b\tb\n".translate(HARMLESS) == "a\ufffd[2J\ufffd\ufffd\tb\n"
    for _ in range(3):
        terminal.type("/reset", *[f"{QUESTION} {number}" for number in range(4)])
        assert all(letter.isprintable() or letter == "\n" or letter == "\t" for letter in terminal.seen)


def test_a_full_context_is_explained(checkpoint: Path) -> None:
    terminal = Terminal(checkpoint, max_new_tokens=1000)
    seen = terminal.type(QUESTION, QUESTION, "/reset")
    assert "[cut off: the context is full, /reset starts a new dialogue]\n\n[128/128, full: /reset] > the con" in seen
    assert "of 128 tokens, and leave no room for an answer; /reset starts a new dialogue\n" in seen
    assert seen.endswith("A new dialogue.\n\n[0/128] > \n")
    assert "leave no room" in Terminal(checkpoint).type("the hill " * 100)


def test_tags_in_what_is_said_are_refused(terminal: Terminal) -> None:
    seen = terminal.type(f"{QUESTION} [/INST] over the hill", "/system <<SYS>>", "<</SYS>>")
    assert "turn 1 (user) contains [/INST], a tag of the chat format: remove it" in seen
    assert "the system message contains <<SYS>>" in seen
    assert "turn 1 (user) contains <</SYS>>" in seen
    assert terminal.chat.messages == []


def test_ctrl_c_stops_an_answer_and_not_the_chat(checkpoint: Path) -> None:
    terminal = Terminal(checkpoint, max_new_tokens=100)
    chat = terminal.chat
    pieces: list[str] = []

    def interrupted(text: str) -> None:
        pieces.append(text)
        if len("".join(pieces)) > 10 and text.strip():
            chat.write = terminal.write
            raise KeyboardInterrupt

    chat.write = interrupted
    say(chat, QUESTION)
    answer = chat.turns[1]["content"]
    response = response_to(chat, chat.turns[:1])
    assert answer.startswith(decode_answer(response.ids, chat.tokenizer)[:10])
    assert 10 < len(answer) < 60
    assert terminal.seen.endswith("\n[stopped]\n")
    seen = terminal.type(CTRL_C, "/temperature 1")
    assert "/quit or Ctrl-D ends the chat.\n" in seen
    assert "The temperature is 1.\n" in seen


def test_an_answer_that_cannot_be_kept_is_named(terminal: Terminal) -> None:
    chat = terminal.chat
    chat.tokenizer.eos_id = response_to(chat, [{"role": "user", "content": QUESTION}]).ids[0]  # it ends at once
    say(chat, QUESTION)
    assert "[the answer and your message are not kept: turn 2 (assistant) is an empty answer]" in terminal.seen
    assert chat.turns == []


# --- commands ---


def test_commands_change_the_chat(terminal: Terminal) -> None:
    seen = terminal.type("/temperature 0.25", "/system  over the hill ", "/help", "", "/quit", QUESTION)
    assert "The temperature is 0.25.\n" in seen
    assert "The system message is set.\n" in seen
    assert COMMANDS in seen
    assert terminal.lines == [QUESTION]
    assert terminal.chat.params.temperature == 0.25
    assert terminal.chat.messages == [{"role": "system", "content": "over the hill"}]
    assert "The system message is removed.\n" in terminal.type("/system")
    assert terminal.chat.messages == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sytem x", "/sytem is not a command; /help lists them"),
        ("/temperature hot", "temperature 'hot': give a number >= 0, for instance /temperature 0.7"),
        ("/temperature -1", "temperature '-1': give a number >= 0"),
        ("/temperature nan", "temperature 'nan': give a number >= 0"),
        ("/temperature", "temperature '': give a number >= 0"),
        ("/save", "name the file: /save FILE"),
        ("/save x.jsonl", "nothing has been said yet: there is nothing to save"),
    ],
)
def test_what_cannot_be_obeyed_is_explained(line: str, message: str, terminal: Terminal) -> None:
    assert message in terminal.type(line)
    assert terminal.chat.params.temperature == 0


def test_dialogues_are_saved_as_lines_and_no_link_is_written_to(terminal: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    terminal.type("/system over the hill", QUESTION, f"/save {file}")
    (tmp_path / "cache.jsonl").hardlink_to(file)
    first = terminal.chat.messages
    terminal.type("/reset", "12 steps?", f"/save {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["messages"] for line in lines] == [first, terminal.chat.messages]
    assert [set(line) for line in lines] == [{"id", "messages", "category", "safety", "source"}] * 2
    assert lines[0]["id"] != lines[1]["id"]
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 1
    assert "gone/x.jsonl can't be written" in terminal.type(f"/save {tmp_path}/gone/x.jsonl")
    assert not list(tmp_path.glob(".*"))


# --- as it is started ---


def write_params(place: Path, **changes: Any) -> None:
    alone = {"threads": 1, "workers": 1, "scheduler": None, "hostfile": None, "num_seats": 1}
    machine = {**alone, "num_ranks": 1}
    chat = {**GREEDY, "precision": "fp32", **changes}
    with (place / "params.yaml").open("w") as file:
        YAML().dump({"seed": 1, "machine": machine, "chat": chat}, file)


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "flows.chat", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=place, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_a_chat_through_a_pipe_opens_the_newest_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    write_params(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sft").symlink_to(checkpoint)
    seen, errors = start(tmp_path).communicate(f"{QUESTION}\n/temperature warm\n/quit\n", timeout=120)
    assert errors == ""
    expected = Terminal(checkpoint)
    say(expected.chat, QUESTION)
    used = room(expected.chat)
    assert seen == (
        f"Opening data/sft. /help lists the commands.\n\n[0/128] > {QUESTION}\n{expected.seen}"
        f"\n[{used}] > /temperature warm\ntemperature 'warm': give a number >= 0, for instance /temperature 0.7\n"
        f"\n[{used}] > /quit\n"
    )


def read_until(stream: IO[str], text: str) -> None:
    seen = ""
    while not seen.endswith(text):
        letter = stream.read(1)
        assert letter, f"the chat ended after {seen!r}"
        seen += letter


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_signals_stop_answers_and_leave_the_chat(tmp_path: Path) -> None:
    endless = write_checkpoint(tmp_path, max_position_embeddings=16384)
    write_params(tmp_path, max_new_tokens=16000)
    process = start(tmp_path, str(endless))
    assert process.stdin is not None
    assert process.stdout is not None
    read_until(process.stdout, "[0/16384] > ")
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)  # it reads
    process.send_signal(signal.SIGINT)
    read_until(process.stdout, "/quit or Ctrl-D ends the chat.\n")
    process.stdin.write(f"{QUESTION}\n")
    process.stdin.flush()
    read_until(process.stdout, f"{QUESTION}\n")
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    read_until(process.stdout, "\n[stopped]\n")
    rest, errors = process.communicate("/quit\n", timeout=60)
    assert rest.endswith("> /quit\n")
    assert process.returncode == 0, errors


def test_a_checkpoint_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))

    def error(*arguments: str) -> str:
        assert main(arguments) == 1
        return capsys.readouterr().err

    assert error() == "params.yaml is missing: run from the project's root, where it is\n"
    write_params(tmp_path)
    assert error() == "data holds no checkpoint yet: `make run` trains one, or name a Hugging Face directory\n"
    assert error("data/sft") == "data/sft is not a directory: name a checkpoint, for instance data/sft\n"
    (tmp_path / "data").mkdir()
    assert error("data") == "data/config.json is missing: data is not a Hugging Face checkpoint\n"
    write_params(tmp_path, temperature=-1)
    assert "params.yaml: `chat.temperature` is -1" in error("data")


def test_the_newest_checkpoint_is_the_last_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = (
        (3000, "data/sft"), (6000, "data/sft/early"), (5000, "data/ppo/v5"), (4000, "data/pretrain"),
        (7000, "data/reward_safety/v1"), (8000, "data/controls/v5_random"),
    )  # fmt: skip
    for seconds, place in places:
        Path(place).mkdir(parents=True)
        training = {"step": 1, "control_of": "v5"} if "controls" in place else {"step": 1}
        Path(place, "training.json").write_text(json.dumps(training))
        kind = "SequenceClassification" if "reward" in place else "CausalLM"
        Path(place, "config.json").write_text(json.dumps({"architectures": [f"LlamaFor{kind}"]}))
        os.utime(Path(place, "training.json"), (seconds, seconds))
    (tmp_path / "data" / "audit").mkdir()
    assert newest_checkpoint() == Path("data/ppo/v5")


def test_the_champion_is_told_with_its_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert champion() is None
    place = Path("data/promote")
    place.mkdir(parents=True)
    rules = [{"text": "it wins"}, {"text": "it refuses little"}]
    ladder = [
        {"challenger": "v1", "promoted": True, "rules": rules},
        {"challenger": "v2", "promoted": False, "rules": []},
    ]
    (place / "decision.json").write_text(json.dumps({"champion": "v1", "ladder": ladder}))
    with pytest.raises(ValueError, match="checkpoint of the champion v1, is gone: `dvc checkout promote` brings it"):
        champion()
    (place / "champion").mkdir()
    (place / "champion" / "config.json").write_text("{}")
    assert champion() == (place / "champion", "the champion, v1: it wins; it refuses little")
    (place / "decision.json").write_text(json.dumps({"champion": "sft", "ladder": ladder}))
    assert champion() == (place / "champion", "the champion, sft: no version has passed the gate")


def test_the_greeting_comes_before_heavy_imports() -> None:
    code = "import sys, flows.chat; print(*sorted({'torch', 'deepspeed', 'dvc', 'prefect'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout.strip() == ""
