import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from model.text.tokenizer import Tokenizer

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"
LLAMA = DATASETS / "interop" / "tokenizer.model"

WORDS = ["the", "llama", "walks", "over", "a", "high", "mountain", "and", "rests", "1999", "times", "beside", "it"]

# any text that UTF-8 can hold but for U+2581, SentencePiece's own sign for a space
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
TRICKY_TEXT = st.lists(
    st.sampled_from(
        [
            "the",
            "llama",
            " ",
            "  ",
            "\n",
            "\t",
            "a",
            "aa",
            "é",
            "日本",
            "😀",
            "42",
            "</s>",
            "<s>",
            "<unk>",
            "<0x41>",
            ".",
        ]
    )
).map("".join)


def train(path, **options):
    rng = random.Random(0)
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(rng.choices(WORDS, k=9)) for _ in range(300)),
            model_writer=file,
            **{
                "model_type": "bpe",
                "vocab_size": 320,
                "byte_fallback": True,
                "split_digits": True,
                "allow_whitespace_only_pieces": True,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "minloglevel": 2,
                **options,
            },
        )
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@pytest.fixture(scope="module")
def llama():
    if not LLAMA.exists():
        pytest.skip(f"Llama 2's tokenizer.model isn't at {LLAMA}")
    return Tokenizer(LLAMA)


def open_in_transformers(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@given(ANY_TEXT)
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text


@given(TRICKY_TEXT)
def test_bos_and_eos_stand_around_the_text_and_never_in_it(tokenizer, text):
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids[1:-1] == tokenizer.encode(text, bos=False, eos=False)
    assert not {0, 1, 2} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_the_sign_for_a_space_comes_back_as_a_space(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a▁b", bos=False, eos=False)) == "a b"


def test_digits_stand_alone_and_unknown_characters_become_bytes(tokenizer):
    pieces = [tokenizer.piece(token) for token in tokenizer.encode("1999", bos=False, eos=False)]
    assert pieces == ["▁", "1", "9", "9", "9"]
    ids = tokenizer.encode("é", bos=False, eos=False)
    assert [tokenizer.piece(token) for token in ids] == ["▁", "<0xC3>", "<0xA9>"]
    assert [tokenizer.is_byte(token) for token in ids] == [False, True, True]


def test_llama_2_ids_are_those_of_its_own_files(llama, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = DATASETS / "interop" / f"llama2-7b-hf_{name}"
        (tmp_path / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    theirs = open_in_transformers(tmp_path)
    texts = [
        "Hello world",
        "def f(x):\n    return x ** 2\t# squared\n\n",
        "In 1999, 31 llamas crossed the Andes.",
        "日本語 und Größe ☃ 😀 e\u0301 ﬁ",
        "",
    ]
    assert llama.vocab_size == 32000
    for text in texts:
        assert llama.encode(text, bos=True, eos=False) == theirs.encode(text)
        assert llama.decode(llama.encode(text, bos=True, eos=True)) == text


def test_saved_merges_of_llama_2_are_those_of_its_own_tokenizer_json(llama, tmp_path):
    llama.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    published = json.loads((DATASETS / "interop" / "llama2-7b-hf_tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert saved["vocab"] == published["vocab"]
    assert set(saved["merges"]) == set(published["merges"])


@pytest.mark.parametrize("which", ["tokenizer", "llama"])
def test_transformers_gives_the_same_ids_to_any_text(which, request, tmp_path):
    ours = request.getfixturevalue(which)
    ours.save(tmp_path)
    theirs = open_in_transformers(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.vocab_size == ours.vocab_size

    @settings(max_examples=300)
    @given(ANY_TEXT | TRICKY_TEXT)
    def same(text):
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs.encode(text, split_special_tokens=True) == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text

    same()


def test_transformers_reads_the_same_ids_beside_a_llama_configuration(tokenizer, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    tokenizer.save(tmp_path)
    text = " a text that begins with a space"
    assert open_in_transformers(tmp_path).encode(text) == tokenizer.encode(text, bos=True, eos=False)


def test_saving_beside_itself_keeps_the_model(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.model").read_bytes()
    Tokenizer(tmp_path / "tokenizer.model").save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == before


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"token id 320 is outside the vocabulary of .*tokenizer\.model \(0 to 319\)"):
        tokenizer.decode([5, 320])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\x00 not a model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bos_id": -1}, "it lacks one of the tokens BOS, EOS and unknown"),
        ({"byte_fallback": False, "vocab_size": 60}, "it has no tokens for single bytes"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it changes the text before encoding"),
        ({"remove_extra_whitespaces": True}, "it changes the text before encoding"),
        ({"split_by_whitespace": False, "vocab_size": 420}, "it has tokens that reach past a word's end"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(options, reason, tmp_path):
    path = train(tmp_path / "tokenizer.model", **options)
    with pytest.raises(ValueError, match=f"not a tokenizer of Llama's kind: {reason}"):
        Tokenizer(path)
