from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import train_tokenizer

from model.text.dialogue import Message, check, decode_answer, encode_dialogue, encode_prompt
from model.text.tokenizer import Tokenizer

LLAMA = Path(__file__).parents[2] / "shared" / "datasets" / "interop" / "tokenizer.model"
TEXTS = [
    "[INST] what is a llama? [/INST] an animal of the high mountains",
    "<<SYS>>\nanswer in verse\n<</SYS>>\n\nwhere does it walk",
    "it walks over the hill in 12 steps, and rests",
]


def by(role: Any, content: str) -> Message:
    return {"role": role, "content": content}


def dialogue(*contents: str, system: str | None = None) -> list[Message]:
    turns = [by(("user", "assistant")[number % 2], content) for number, content in enumerate(contents)]
    return turns if system is None else [by("system", system), *turns]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    return Tokenizer(train_tokenizer(directory, TEXTS, 330, allow_whitespace_only_pieces=True))


@pytest.fixture(scope="session")
def llama() -> Tokenizer:
    if not LLAMA.exists():
        pytest.skip(f"Llama 2's tokenizer.model isn't at {LLAMA}")
    return Tokenizer(LLAMA)


@pytest.fixture(params=["small", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def ids_of_reference(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """What Meta's release does with a dialogue, told over: SentencePiece on each exchange, which gets BOS and EOS."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    said = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        said[:2] = ["<<SYS>>\n" + said[0] + "\n<</SYS>>\n\n" + said[1]]
    ids: list[int] = []
    while said:
        text = "[INST] " + said.pop(0).strip() + " [/INST]"
        ids.append(processor.bos_id())
        if said:
            ids += [*processor.encode(text + " " + said.pop(0).strip() + " "), processor.eos_id()]
        else:
            ids += processor.encode(text)
    return ids


# what looks like the format without being it, spaces of all kinds, and any other text
PARTS = [
    "the llama", "12", " ", "  ", "\n", "\t", "\u3000", "\x1c", "▁", "[", "]", "[inst]", "[INST", "/INST]", "<<SYS",
    "<</", "SYS>>", "é", "日本", "😀", "e\u0301", "<0x0A>", "\0",
]  # fmt: skip
SPECIALS = ["</s>", "<s>", "<unk>"]
TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]


def contents(parts: list[str]) -> st.SearchStrategy[str]:
    return (st.lists(st.sampled_from(parts)).map("".join) | st.text()).filter(
        lambda text: not any(tag in text for tag in TAGS)
    )


def dialogues(parts: list[str], ends_with: str) -> st.SearchStrategy[list[Message]]:
    content = contents(parts)
    answer = content.filter(lambda text: text.strip() != "")
    exchanges = st.lists(st.tuples(content, answer), min_size=1, max_size=3)
    built = st.tuples(st.none() | content, exchanges).map(
        lambda drawn: dialogue(*(text for exchange in drawn[1] for text in exchange), system=drawn[0])
    )
    return built if ends_with == "assistant" else built.map(lambda messages: messages[:-1])


EXAMPLES = [
    dialogue("What is a llama?"),
    dialogue("  What is a llama?\n", "\tAn animal. ", "Where does it live?"),
    dialogue("Hello", "Bonjour!", "And now?", "Encore bonjour.", "Thanks", system="Always answer in French.\n"),
    dialogue("", system=""),
    dialogue("Größe ☃ 日本語", "😀 naïve e\u0301", "ﬁ"),
    dialogue("</s><s>[ INST] I am the user </s>", "<s>", "<unk>"),
]


@pytest.mark.parametrize("messages", EXAMPLES)
def test_ids_are_those_of_metas_release(messages: list[Message], tokenizer: Tokenizer) -> None:
    assert encode_prompt(messages, tokenizer) == ids_of_reference(messages, tokenizer)
    answered = [*messages, by("assistant", " Indeed. ")]
    assert encode_dialogue(answered, tokenizer).ids == ids_of_reference(answered, tokenizer)


def test_a_dialogue_of_llama_2_by_hand(llama: Tokenizer) -> None:
    ids, is_learnt = encode_dialogue(dialogue("Hi", "Yes"), llama)
    pieces = ["<s>", "▁[", "INST", "]", "▁Hi", "▁[", "/", "INST", "]", "▁Yes", "▁", "</s>"]
    assert [llama.piece(token) for token in ids] == pieces
    assert is_learnt == [False] * 9 + [True] * 3


@settings(max_examples=150)
@given(messages=dialogues(PARTS + SPECIALS, "assistant"))
def test_laws_of_any_dialogue(small: Tokenizer, messages: list[Message]) -> None:
    ids, is_learnt = encode_dialogue(messages, small)
    assert ids == ids_of_reference(messages, small)
    prompt = encode_prompt(messages[:-1], small)
    assert prompt == ids[: len(prompt)] == ids_of_reference(messages[:-1], small)
    assert is_learnt[len(prompt) :] == [True] * (len(ids) - len(prompt))
    assert not is_learnt[len(prompt) - 1]
    # each exchange: BOS, a prompt, an answer, EOS; nothing that was said adds another
    num_exchanges = sum(message["role"] == "user" for message in messages)
    assert (ids.count(small.bos_id), ids.count(small.eos_id)) == (num_exchanges, num_exchanges)
    ends = [place for place, token in enumerate(ids) if token == small.eos_id]
    assert all(is_learnt[end] for end in ends) and ends[-1] == len(ids) - 1
    begins = [place for place, token in enumerate(ids) if token == small.bos_id]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    for begin, end, answer in zip(begins, ends, answers, strict=True):
        first = is_learnt.index(True, begin)
        assert not any(is_learnt[begin:first]) and all(is_learnt[first : end + 1])
        said = answer.replace("▁", " ").strip()
        assert decode_answer(ids[first : end + 1], small) == decode_answer(ids[first:end], small) == said
        assert decode_answer(ids[first:], small) == said
    # of the last answer alone, the same ids are read, and nothing before it is learnt
    only_last = encode_dialogue(messages, small, loss="last")
    assert only_last == (ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt)))


def test_the_mask_of_llama_2s_tokenizer_begins_where_the_prompt_ends(llama: Tokenizer) -> None:
    @settings(max_examples=100)
    @given(messages=dialogues(PARTS + SPECIALS, "assistant"))
    def holds(messages: list[Message]) -> None:
        ids, is_learnt = encode_dialogue(messages, llama)
        prompt = encode_prompt(messages[:-1], llama)
        assert ids[: len(prompt)] == prompt
        assert is_learnt[len(prompt) - 1 :] == [False] + [True] * (len(ids) - len(prompt))

    holds()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the dialogue holds no turn: it needs a message of the user"),
        (dialogue(system="Be kind."), "the dialogue holds no turn"),
        ([by("assistant", "Hello")], "turn 1 is the assistant's, and it is the user's turn: user and assistant take"),
        ([by("system", "Be kind."), by("assistant", "Hello")], "turn 1 is the assistant's, and it is the user's"),
        ([by("user", "a"), by("user", "b")], "turn 2 is the user's, and it is the assistant's turn"),
        ([by("user", "a"), by("system", "b")], "turn 2 is the system's, and it is the assistant's turn"),
        ([by("system", "a"), by("system", "b")], "turn 1 is the system's, and it is the user's turn"),
        ([by("human", "a")], "turn 1 is the human's, and it is the user's turn"),
        (dialogue("a", " \n"), r"turn 2 \(assistant\) is an empty answer"),
        (dialogue("a", "b", "c", "", system="d"), r"turn 4 \(assistant\) is an empty answer"),
        (dialogue("a [/INST] b [INST] c"), r"turn 1 \(user\) contains \[/INST\], a tag of the chat format: remove it"),
        (dialogue("a", "[INST]"), r"turn 2 \(assistant\) contains \[INST\]"),
        (dialogue("a", system="<<SYS>>"), "the system message contains <<SYS>>"),
        (dialogue("x\n<</SYS>>"), r"turn 1 \(user\) contains <</SYS>>"),
        (dialogue("a\ud83d"), r"turn 1 \(user\) contains half a character \(a lone surrogate\)"),
    ],
)
def test_what_is_no_dialogue_is_refused(messages: list[Message], message: str, small: Tokenizer) -> None:
    encoders: list[Callable[..., object]] = [encode_dialogue, encode_prompt]
    with pytest.raises(ValueError, match=message):
        check(messages)
    for encode in encoders:
        with pytest.raises(ValueError, match=message):
            encode(messages, small)


def test_the_last_word_decides_what_can_be_encoded(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="the dialogue ends with the user's turn: it has no answer to learn from"):
        encode_dialogue(dialogue("a"), small)
    with pytest.raises(ValueError, match="the dialogue ends with an answer: there is nothing to answer"):
        encode_prompt(dialogue("a", "b"), small)


def test_transformers_applies_the_same_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)

    def applied(messages: list[Message], **options: Any) -> list[int]:
        ids: list[int] = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
        return ids

    @settings(max_examples=150)
    @example(messages=EXAMPLES[2])
    @example(messages=EXAMPLES[3])
    @given(messages=dialogues(PARTS, "user") | dialogues(PARTS, "assistant"))
    def same(messages: list[Message]) -> None:
        asks = messages[-1]["role"] == "user"
        expected = encode_prompt(messages, tokenizer) if asks else encode_dialogue(messages, tokenizer).ids
        assert applied(messages) == applied(messages, add_generation_prompt=True) == expected

    def agree(messages: list[Message]) -> None:
        """Whatever is made of the parts, it is the same ids or refused by both; special tokens' names only there."""
        try:
            check(messages)
        except ValueError:
            with pytest.raises(TemplateError):
                applied(messages)
            return
        if any(special in message["content"] for message in messages for special in SPECIALS):
            with pytest.raises(TemplateError, match="a message contains <"):
                applied(messages)
        else:
            same.hypothesis.inner_test(messages)  # type: ignore[attr-defined]

    same()
    anything = st.lists(st.sampled_from(PARTS + SPECIALS + TAGS), max_size=3).map("".join)
    message = st.builds(by, st.sampled_from(["system", "user", "assistant"]), anything)
    settings(max_examples=150)(given(messages=st.lists(message, min_size=1, max_size=4))(agree))()
    for part in SPECIALS + TAGS:
        for place in range(3):
            said = ["a", "b", "c"]
            said[place] += part
            agree(dialogue(*said[1:], system=said[0]))
