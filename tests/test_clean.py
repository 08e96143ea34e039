import http.server
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st
from stages import Workspace

from tasks.clean import __main__ as stage_clean
from tasks.clean.duplicates import (
    Deduplication,
    band_hashes,
    connect,
    exact_hash,
    first_of_each,
    minhash,
    mix,
    permutations,
    shingle,
    sign,
)
from tasks.clean.language import Identification, check_languages, identify
from tasks.clean.partition import Params, clean_files
from tasks.clean.personal_data import PersonalData, find_personal_data, is_rich, luhn, mask
from tasks.clean.quality import C4, Gopher, drop_lines, judge_page, judge_words
from tasks.clean.repair import repair
from tasks.clean.repetition import Repetition, encode, extend, judge_repetition, repeated_share, top_share
from tasks.reading.sources import File
from tasks.running.params import Machine
from tasks.running.stage import Stage

C4_OFF = {
    "terminal_punctuation": False,
    "min_line_words": 0,
    "drop_boilerplate": False,
    "document_terms": [],
    "curly_bracket": False,
    "min_sentences": 0,
}
GOPHER = {
    "min_words": 5,
    "max_words": 1000,
    "min_mean_word_length": 3,
    "max_mean_word_length": 10,
    "max_symbol_share": 0.1,
    "max_bullet_line_share": 0.9,
    "max_ellipsis_line_share": 0.3,
    "min_alphabetic_word_share": 0.8,
    "min_stop_words": 2,
}
REPETITION = {
    "max_line_share": 0.3,
    "max_line_character_share": 0.2,
    "max_paragraph_share": 0.3,
    "max_paragraph_character_share": 0.2,
    "max_top_ngram_shares": [0.2, 0.18, 0.16],
    "max_repeated_ngram_shares": [0.15, 0.14, 0.13, 0.12, 0.11, 0.10],
}
DEDUPLICATION = {"shingle_words": 3, "num_bands": 30, "rows_a_band": 5, "min_similarity": 0.72}
PERSONAL_DATA = {"phone_regions": ["US", "GB"], "local_addresses": True, "rich_min_finds": 3, "rich_share": 0.05}
LANGUAGE = {"candidates": ["de", "en", "es", "fr"], "expected_odds": 10, "min_score": 0.2, "num_characters": 2000}
STOP_WORDS = {"en": ["the", "be", "to", "of", "and", "that", "have", "with"]}


# Unicode


@pytest.mark.parametrize(
    ("broken", "right"),
    [
        ("Ã¼ber das cafÃ©, â€œzitiertâ€\x9d.", "über das café, “zitiert”."),
        ("schÃ¶n\nplain line", "schön\nplain line"),
        ("bell\x07 and null\x00 and mark\ufeff", "bell and null and mark"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("caf&eacute; &amp; bar", "café & bar"),
    ],
)
def test_broken_text_is_repaired_and_counted(broken, right):
    assert repair(broken, unescape_html=True) == (right, True)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a\r\nb\rc\u2028d\fe", "a\nb\nc\nd\ne"),
        ("cafe\u0301", "café"),
        ("naïve “Größe” – 漢字 नमस्ते \u200c", "naïve “Größe” – 漢字 नमस्ते \u200c"),
        ("if a &lt; b: <b>", "if a &lt; b: <b>"),
        ("\n\ntext\n", "text"),
    ],
)
def test_sound_text_is_normalised_without_counting_as_broken(text, same):
    assert repair(text, unescape_html=True) == (same, False)


def test_html_escapes_stay_where_they_are_meant():
    assert repair("a &amp; b", unescape_html=False) == ("a &amp; b", False)


@given(st.text(st.characters(codec="utf-8"), max_size=80))
def test_repairing_twice_is_repairing_once(text):
    once, _ = repair(text, unescape_html=False)
    twice, broken = repair(once, unescape_html=False)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", once)
    assert twice == once or broken


# Language


@pytest.mark.parametrize(
    ("text", "wanted", "found"),
    [
        ("12 + 30 = 42", ["en"], "en"),  # nothing to read: the prior decides
        ("12 + 30 = 42", ["de"], "de"),
        ("Der Bäcker am Markt verkauft jeden Morgen frisches Brot an seine Nachbarn.", ["en"], "de"),
        ("The baker at the market sells fresh bread to his neighbours every morning.", ["de"], "en"),
    ],
)
def test_the_wanted_language_wins_only_where_the_text_says_little(text, wanted, found):
    assert identify(text, wanted, Identification(**LANGUAGE))[0] == found


def test_scores_are_probabilities_weighed_by_the_prior():
    params = Identification(**LANGUAGE)
    _, plain = identify("xyz", ["en", "de", "fr", "es"], params)
    _, again = identify("xyz", ["en", "de", "fr", "es"], params.model_copy(update={"expected_odds": 1.0}))
    assert plain == pytest.approx(again)  # odds that all languages share cancel out
    language, score = identify("12", ["en"], params)
    assert (language, score) == ("en", pytest.approx(10 / 13))  # four languages alike, one of them ten times


def test_a_language_that_nobody_can_tell_is_named():
    with pytest.raises(ValueError, match=re.escape("`clean.language.candidates`: Unknown language code(s): {'xx'}")):
        check_languages(["en", "xx"], ["en"])
    with pytest.raises(ValueError, match=re.escape("`clean.rules`: it must be among `clean.language.candidates`")):
        check_languages(["en", "de"], ["en", "it"])


# Quality


def test_lines_that_c4_drops_are_dropped_and_blank_ones_stay():
    params = C4(**C4_OFF | {"terminal_punctuation": True, "min_line_words": 3, "drop_boilerplate": True})
    text = "A heading of four\n\nThis line stays.\nToo short.\nThis site uses cookies.\nShe said “yes, it stays.”"
    cleaned, num_dropped = drop_lines(text, ["uses cookies"], params)
    assert cleaned == "This line stays.\nShe said “yes, it stays.”"
    assert num_dropped == 3
    assert drop_lines(text, ["uses cookies"], C4(**C4_OFF)) == (text, 0)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "empty"),
        ("Some Lorem Ipsum here. Two. Three.", "c4_document_term"),
        ("int main() { return 0; } One. Two. Three.", "c4_curly_bracket"),
        ("One sentence. And 3.5 is no end; two!", "c4_sentences"),
        ("One. Two? “Three!” ", None),
    ],
)
def test_c4_judges_pages(text, rule):
    params = C4(**C4_OFF | {"document_terms": ["lorem ipsum"], "curly_bracket": True, "min_sentences": 3})
    verdict = judge_page(text, 0, params)
    assert (verdict and verdict[0]) == rule


SOUND = "The weaver of the valley and the smith have bread with cheese today"  # 13 words


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (SOUND, None),
        ("too few words here", "gopher_words"),
        (SOUND + " word" * 988, "gopher_words"),
        ("a be to of an it is", "gopher_word_length"),
        (
            "extraordinarily incomprehensible counterrevolutionary misunderstandings notwithstanding",
            "gopher_word_length",
        ),
        (SOUND + " #tag #tag", "gopher_symbols"),  # 2 in 15 > 0.1
        (SOUND + " #tag", None),  # 1 in 14 < 0.1
        (SOUND + "... and ...", "gopher_symbols"),
        ("\n".join(f"- {SOUND}" for _ in range(10)), "gopher_bullets"),
        ("\n".join([f"- {SOUND}"] * 9 + [SOUND]), None),
        (f"{SOUND}\n{SOUND}…\n{SOUND}\n{SOUND}…", "gopher_ellipses"),
        (SOUND + " 1 22 333", None),  # 13 of 16 have letters: 0.8125
        (SOUND + " 1 22 333 4444", "gopher_alphabetic"),  # 13 of 17: 0.765
        ("Weavers make cloth today, smiths make nails tomorrow", "gopher_stop_words"),
        ("The weavers make cloth today, The smiths make nails tomorrow", "gopher_stop_words"),  # one, twice
    ],
)
def test_gopher_judges_words(text, rule):
    verdict = judge_words(text, text.split(), "en", STOP_WORDS, Gopher(**GOPHER))
    assert (verdict and verdict[0]) == rule


def test_stop_words_are_asked_of_languages_that_have_a_list():
    text = "Weavers make cloth today, smiths make nails tomorrow"
    assert judge_words(text, text.split(), "de", STOP_WORDS, Gopher(**GOPHER)) is None


# Repetition


def ngrams(words, n):
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def top_share_by_definition(words, n):
    gram, count = Counter(ngrams(words, n)).most_common(1)[0]  # of those that tie, the first met
    characters = sum(map(len, gram)) * count
    return min(1.0, characters / sum(map(len, words))) if count > 1 else 0.0


def repeated_share_by_definition(words, n):
    seen, covered = set(), set()
    for start, gram in enumerate(ngrams(words, n)):
        if gram in seen:
            covered.update(range(start, start + n))
        seen.add(gram)
    return sum(len(words[place]) for place in covered) / sum(map(len, words))


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=2, max_size=60), st.integers(2, 5))
def test_shares_of_ngrams_are_those_of_their_definition(words, n):
    if n > len(words):
        return
    codes, lengths = encode(words)
    hashes = codes
    for reach in range(1, n):
        hashes = extend(hashes, codes, reach)
    assert top_share(hashes, lengths, n) == pytest.approx(top_share_by_definition(words, n))
    assert repeated_share(hashes, lengths, n) == pytest.approx(repeated_share_by_definition(words, n))


def test_repeated_lines_paragraphs_and_ngrams_are_rejected():
    params = Repetition(**REPETITION)
    letters = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
    distinct = " ".join(letters)

    def rule(text):
        verdict = judge_repetition(text, text.split(), params)
        return verdict and verdict[0]

    assert rule(distinct) is None
    assert rule("\n".join(["one", "two", "one", "one"])) == "gopher_repeated_lines"
    assert rule(
        "\n".join(["a", "b", "c", "d", "e", "a long line that comes again", "a long line that comes again"])
    ) == ("gopher_repeated_line_characters")
    assert rule(distinct + "\n\nthe\n\nthe\n\nthe\n\nx").startswith("gopher_repeated_")
    assert rule(distinct + " red fox" * 60) == "gopher_top_2_gram"
    assert rule(f"{distinct} {' '.join(letters[:60])}") == "gopher_repeated_5_grams"  # 60 of 260 words again
    off = Repetition(**dict.fromkeys(REPETITION))
    assert judge_repetition("one one one one", ["one"] * 4, off) is None


# Duplicates


def test_signatures_are_those_of_datasketch():
    words = np.random.default_rng(0).integers(0, 2**63, size=50, dtype=np.uint64)
    shingles = shingle(words, 3)
    reference = MinHash(num_perm=64, seed=7, scheme="affine32", hashfunc=int)
    reference.update_batch(shingles.tolist())

    def murmur(values):  # datasketch scrambles what it is given; ours are scrambled already
        values = (values ^ (values >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        values = (values ^ (values >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return values ^ (values >> np.uint32(16))

    a, b = permutations(64, 7)
    assert np.array([a, b]).tolist() == reference.permutations.tolist()
    assert minhash(murmur(shingles), a, b).tolist() == reference.hashvalues.tolist()


def test_the_share_of_equal_hashes_estimates_the_jaccard_similarity():
    params = Deduplication(shingle_words=1, num_bands=256, rows_a_band=8, min_similarity=0.5)
    words = [f"w{number}" for number in range(300)]
    for shared in (0, 100, 200, 300):  # of 300 words each: similarity = shared / (600 - shared)
        texts = [" ".join(words), " ".join([*words[:shared], *(f"v{number}" for number in range(300 - shared))])]
        first, second = sign(texts, 1, params)
        expected = shared / (600 - shared)
        assert (first == second).mean() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 2048))


def test_signatures_do_not_depend_on_the_company_of_a_text():
    params = Deduplication(**DEDUPLICATION)
    texts = ["One of a kind, this text is.", "Another", "", "A third one that is longer than the others by far."]
    together = sign(texts, 1, params)
    assert all((sign([text], 1, params)[0] == row).all() for text, row in zip(texts, together, strict=True))
    assert (sign(["ONE of a kind - this text is!"], 1, params)[0] == together[0]).all()


def test_equal_rows_share_all_bands_and_others_none():
    params = Deduplication(**DEDUPLICATION)
    signatures = sign(["a b c d e", "a b c d e", "f g h i j"], 1, params)
    hashes = band_hashes(signatures, params)
    assert hashes.shape == (3, 30)
    assert (hashes[0] == hashes[1]).all()
    assert not (hashes[0] == hashes[2]).any()
    assert len(np.unique(hashes)) == 60


def test_mixing_is_one_to_one_on_a_sample():
    assert len(np.unique(mix(np.arange(100_000, dtype=np.uint64)))) == 100_000


def test_case_and_blanks_do_not_make_a_text_another_one():
    assert exact_hash("The  Text\nis one.") == exact_hash("the text is ONE.")
    assert exact_hash("2 + 2") != exact_hash("2 - 2")


@given(st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=12))
def test_edges_connect_exactly_the_components_of_similar_rows(rows):
    signatures = np.array(rows, dtype=np.uint32)

    def components(edges):
        label = list(range(len(rows)))
        for first, second in edges:
            old, new = label[second], label[first]
            label = [new if value == old else value for value in label]
        return {frozenset(place for place, value in enumerate(label) if value == own) for own in label}

    alike = [(i, j) for i in range(len(rows)) for j in range(i) if (signatures[i] == signatures[j]).mean() >= 0.7]
    assert components(connect(signatures, 0.7)) == components(alike)


def test_of_each_group_all_but_the_first_are_named():
    edges = pd.DataFrame({"first": [7, 3, 20], "second": [3, 9, 21], "exact": False})
    assert first_of_each(edges).to_dict("list") == {"document": [7, 9, 21], "first": [3, 3, 20]}
    assert first_of_each(edges[:0]).to_dict("list") == {"document": [], "first": []}


# Personal data


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to ann.lee+x@mail.example.org.", "Write to [EMAIL]."),
        ("Call (202) 555-0143 or 020 7946 0958.", "Call [PHONE] or [PHONE]."),
        ("Reach us (+1 (416) 555-0139).", "Reach us ([PHONE])."),
        ("Fax: +49 30 23125 123; phone 2025550143.", "Fax: [PHONE]; phone [PHONE]."),
        ("Card 4111 1111 1111 1111, or 3782-822463-10005.", "Card [CARD], or [CARD]."),
        ("From 203.0.113.7 and 2001:db8::8a2e:370:7334.", "From [IP] and [IP]."),
    ],
)
def test_personal_data_is_masked(text, masked):
    assert mask(text, find_personal_data(text, PersonalData(**PERSONAL_DATA))) == masked


@pytest.mark.parametrize(
    "text",
    [
        "Version 1.8.9.1 follows 1.8.8.",
        "Born 1876-05-13, at 10:15:30, on 12/03/1998.",
        "Pages 1200-1345, ISBN 978-3-16-148410-0.",
        "Card 4111 1111 1111 1112 has a wrong check digit.",
        "About 0.333333333 of 2147483647, or 3,141,592,653 in all.",
        "See section 3:: and std::vector, at 12:30:45.",
        "@handle and a @ b.c",
        "Commit 5f2504e04f8911d39a0c0305e82c3301",
    ],
)
def test_what_only_looks_like_personal_data_stays(text):
    assert find_personal_data(text, PersonalData(**PERSONAL_DATA)) == []


def test_local_addresses_stay_where_they_are_nobodys():
    params = PersonalData(**PERSONAL_DATA | {"local_addresses": False})
    text = "From 192.168.100.1, 127.0.0.1 and 128.133.123.83"
    assert mask(text, find_personal_data(text, params)) == "From 192.168.100.1, 127.0.0.1 and [IP]"


def test_finds_stand_in_order_and_apart():
    text = "call 020 7946 0958, ann@example.org or 4111111111111111; " * 300
    finds = find_personal_data(text, PersonalData(**PERSONAL_DATA))
    assert [kind for _, _, kind in finds] == ["phone", "email", "card"] * 300
    assert all(first[1] <= second[0] for first, second in pairwise(finds))


@pytest.mark.parametrize(("number", "right"), [("79927398713", True), ("79927398710", False), ("0", True)])
def test_luhn_checks_the_last_digit(number, right):
    assert luhn([int(digit) for digit in number]) is right


def test_rich_is_many_finds_in_few_words():
    params = PersonalData(**PERSONAL_DATA)
    assert is_rich(3, 50, params)
    assert not is_rich(2, 10, params)
    assert not is_rich(3, 60, params)


# The stage


def story(number):
    """A text of its own: no two share many words in a row."""
    generator = random.Random(number)
    names = ["weaver", "smith", "baker", "miller", "potter", "sailor", "tailor", "farmer", "hunter", "painter"]
    verbs = ["sold", "found", "lost", "carried", "painted", "mended", "stole", "hid", "bought", "borrowed"]
    things = ["basket", "lantern", "ladder", "kettle", "blanket", "hammer", "mirror", "saddle", "barrel", "candle"]
    places = ["market", "bridge", "harbour", "mill", "garden", "tower", "forest", "church", "river", "meadow"]
    return " ".join(
        f"The {generator.choice(names)} {generator.choice(verbs)} the {generator.choice(things)} of the "
        f"{generator.choice(names)} with that {generator.choice(things)} at the {generator.choice(places)}."
        for _ in range(8)
    )


def near(text):
    return text.replace("The", "A", 1) + " That was all."


def corpus():
    """Documents of two sources, and labels: (text, labels) by source."""
    german = "Der Bäcker am Markt verkauft jeden Morgen frisches Brot an alle Nachbarn. Sie freuen sich. So ist es."
    contacts = (
        "Ann: ann@example.org, Bo: bo@example.org, Cy: cy@example.org. The list is of the guild. It is kept. With care."
    )
    sound = "Café Größe, the naïve façade, was the pride of that street. " + story(900)
    first = [
        (story(0), [{"kind": "duplicate", "group": 1}, {"kind": "near_duplicate", "group": 2}]),
        (story(1), []),
        (story(0), [{"kind": "duplicate", "group": 1}]),
        (story(2) + " Write to ann@example.org.", [
            {"kind": "personal_data", "values": [{"type": "email", "value": "ann@example.org"}]}]),
        (sound.encode().decode("latin-1"), [{"kind": "broken_unicode", "repaired": sound}]),
        (german, [{"kind": "language", "language": "de"}]),
        ("This site uses cookies.\n" + story(3), [{"kind": "boilerplate", "lines": ["This site uses cookies."]}]),
    ]  # fmt: skip
    second = [
        (near(story(0)), [{"kind": "near_duplicate", "group": 2}]),
        ("Too short.", [{"kind": "low_quality"}]),
        (contacts, [{"kind": "personal_data_rich", "values": [{"type": "email", "value": "bo@example.org"}]}]),
        *((story(number), []) for number in range(10, 40)),
        (story(1).upper(), [{"kind": "duplicate", "group": 3}]),
    ]
    first[1][1].append({"kind": "duplicate", "group": 3})
    return {"first": first, "second": second}


def write_corpus(root, documents):
    root.mkdir(parents=True, exist_ok=True)
    with (root / "labels.jsonl").open("w") as labels:
        for source, own in documents.items():
            lines = [json.dumps({"text": text}) for text, _ in own]
            (root / f"{source}.jsonl").write_text("\n".join(lines) + "\n")
            for row, (_, found) in enumerate(own):
                labels.writelines(json.dumps({"file": f"{source}.jsonl", "row": row} | label) + "\n" for label in found)


def parameters(root, **changes):
    return Params.model_validate(
        {
            "root": str(root),
            "sources": {
                name: {"files": [f"{name}.jsonl"], "format": "auto", "text_field": "text", "rules": "prose"}
                for name in ("first", "second")
            },
            "rules": {
                "prose": {
                    "languages": ["en"],
                    "unescape_html": True,
                    "c4": C4_OFF | {"drop_boilerplate": True, "min_sentences": 3},
                    "gopher": GOPHER,
                    "repetition": dict.fromkeys(REPETITION),
                }
            },
            "boilerplate_terms": ["uses cookies"],
            "stop_words": STOP_WORDS,
            "language": LANGUAGE,
            "deduplication": DEDUPLICATION,
            "personal_data": PERSONAL_DATA,
            "max_malformed_share": 0.1,
            "partition_megabytes": 1,
        }
        | changes
    )


def clean(place, params, scheduler=None, workers=1):
    machine = Machine(threads=1, workers=workers, scheduler=scheduler, num_ranks=1, hostfile=None, num_seats=1)
    stage = Stage("clean", params, 1, machine, place / "output", place / "scratch", place / "record")
    return stage_clean.run(stage)


def written(place, folder):
    parts = [pd.read_parquet(path) for path in sorted((place / "output" / folder).glob("part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def scheduler():
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        yield cluster.scheduler_address


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    place = tmp_path_factory.mktemp("clean")
    write_corpus(place / "corpus", corpus())
    return place, clean(place, parameters(place / "corpus"), workers=2)


def test_each_planted_thing_is_found_and_nothing_else(cleaned):
    _, figures = cleaned
    scores = {name: value for name, value in figures.items() if name.endswith(("_recall", "_precision", "_accuracy"))}
    assert len(scores) == 20
    assert set(scores.values()) == {1.0}, scores


def test_every_document_is_kept_or_rejected_once_with_its_rule(cleaned):
    place, figures = cleaned
    kept, rejected = written(place, "documents"), written(place, "rejected")
    keys = pd.concat([kept, rejected])[["file", "row"]].apply(tuple, axis=1).tolist()
    assert sorted(keys) == sorted((f"{name}.jsonl", row) for name, own in corpus().items() for row in range(len(own)))
    rules = {(row.file, row.row): (row.rule, row.detail) for row in rejected.itertuples()}
    assert rules == {
        ("first.jsonl", 2): ("duplicate", "copy of first.jsonl, row 0"),
        ("first.jsonl", 5): ("language", rules["first.jsonl", 5][1]),
        ("second.jsonl", 0): ("near_duplicate", "copy of first.jsonl, row 0"),
        ("second.jsonl", 1): ("c4_sentences", "1 sentences"),
        ("second.jsonl", 2): ("personal_data", rules["second.jsonl", 2][1]),
        ("second.jsonl", 33): ("duplicate", "copy of first.jsonl, row 1"),
    }
    assert figures["documents_read"] == 41 == figures["documents_kept"] + len(rejected)
    assert figures["first/documents_read"] == 7
    assert figures["second/rejected_personal_data"] == 1
    assert figures["characters_read"] == sum(len(text) for own in corpus().values() for text, _ in own)


def test_kept_documents_carry_what_was_measured(cleaned):
    kept = written(cleaned[0], "documents").set_index(["file", "row"])
    assert kept.loc[("first.jsonl", 3), "text"] == story(2) + " Write to [EMAIL]."
    assert kept.loc[("first.jsonl", 3), "masked_email"] == kept.loc[("first.jsonl", 3), "personal_data_masked"] == 1
    assert kept.loc[("first.jsonl", 6), "text"] == story(3)
    assert kept.loc[("first.jsonl", 6), "num_lines_dropped"] == 1
    assert kept["repaired"].sum() == 1
    assert (kept["num_words"] == kept["text"].str.split().str.len()).all()
    assert set(kept["language"]) == {"en"}


def test_the_funnel_counts_what_is_left_after_each_step(cleaned):
    funnel = pd.read_csv(cleaned[0] / "output" / "plots" / "funnel.csv").set_index(["source", "after"])["documents"]
    assert funnel["first"].tolist() == [7, 6, 6, 6, 5, 5, 5]
    assert funnel["second"].tolist() == [34, 34, 33, 33, 32, 31, 30]
    assert (cleaned[0] / "record" / "artifacts" / "funnel.png").stat().st_size > 1000


def test_neither_workers_nor_the_size_of_partitions_change_the_result(cleaned, scheduler, tmp_path):
    place, figures = cleaned
    other = clean(tmp_path, parameters(place / "corpus", partition_megabytes=0.002), scheduler)
    assert other == figures
    assert len(list((tmp_path / "output" / "documents").iterdir())) > 5
    for folder in ("documents", "rejected"):
        pd.testing.assert_frame_equal(written(tmp_path, folder), written(place, folder))


def test_cleaning_twice_writes_the_same_bytes(cleaned, scheduler, tmp_path):
    place, _ = cleaned
    clean(tmp_path, parameters(place / "corpus"), scheduler)
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in sorted((root / "output").rglob("*")) if path.is_file()}
        for root in (place, tmp_path)
    )
    assert first == second


def test_malformed_rows_are_kept_and_too_many_stop_the_stage(scheduler, tmp_path):
    write_corpus(tmp_path / "corpus", {"first": corpus()["first"], "second": [(story(n), []) for n in range(50, 60)]})
    with (tmp_path / "corpus" / "second.jsonl").open("a") as lines:
        lines.write('{"text": "cut off')
    (tmp_path / "corpus" / "labels.jsonl").unlink()
    figures = clean(tmp_path, parameters(tmp_path / "corpus"), scheduler)
    assert figures["rows_malformed"] == figures["second/rows_malformed"] == 1
    assert "duplicates_recall" not in figures
    line = json.loads((tmp_path / "output" / "malformed.jsonl").read_text())
    assert (line["file"], line["row"], line["raw"]) == ("second.jsonl", 10, '{"text": "cut off')
    assert line["error"].startswith("invalid JSON")
    message = (
        "`clean.sources.second`: 1 of 11 rows are malformed, more than `clean.max_malformed_share` (0.05). "
        "The first is row 10 of second.jsonl: invalid JSON"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        clean(tmp_path / "again", parameters(tmp_path / "corpus", max_malformed_share=0.05), scheduler)


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (["\n\n", None], {}, "`clean.sources.first` holds no documents: fill its files, or take the source out"),
        (["{broken", None], {}, "`clean.sources.first`: 1 of 1 rows are malformed"),
        (["\0\0", None], {}, "first.jsonl is a binary file"),
        ([json.dumps({"text": "Short."})] * 2, {}, "`clean.rules` reject every document: loosen them"),
        ([None, None], {"rules": {}}, None),
    ],
)
def test_a_corpus_that_cannot_be_cleaned_is_told_why(scheduler, tmp_path, texts, changes, message):
    if message is None:
        params = parameters(tmp_path)
        with pytest.raises(ValueError, match=re.escape("`clean.sources.first.rules` is 'prose': choose one of code")):
            clean(tmp_path, params.model_copy(update={"rules": {"code": params.rules["prose"]}}), scheduler)
        return
    write_corpus(tmp_path / "corpus", corpus())
    for name, text in zip(("first", "second"), texts, strict=True):
        if text is not None:
            (tmp_path / "corpus" / f"{name}.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        clean(tmp_path, parameters(tmp_path / "corpus", **changes), scheduler)


DVC_STAGE = """\
stages:
  clean:
    cmd: exec python -m tasks.clean
    deps: [corpus]
    params: [seed, clean]
    outs: [data/clean]
"""
MOMENTS = {  # below .scratch/clean/<fingerprint>/
    "a partition is cleaned": "cleaned/*-*",
    "duplicates are found": "duplicates",
    "a partition is parted": "parted/*",
    "all is in the output": "output/plots/funnel.csv",
}


def finished_pieces(scratch):
    """The files of finished pieces, each with what changes when it is written anew."""
    pieces = [path for name in ("cleaned", "duplicates", "parted") for path in (scratch / name).glob("**/*.*")]
    return {
        str(path.relative_to(scratch)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in pieces
        if path.name != "index.json" and not any(part.startswith(".") for part in path.relative_to(scratch).parts)
    }


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_does_nothing_twice_and_ends_in_the_same_bytes(scheduler, tmp_path):
    params = parameters("corpus", partition_megabytes=0.01)
    workspace = Workspace(tmp_path, "clean", DVC_STAGE, clean=params.model_dump(mode="json"))
    more = {"first": range(1000, 1100), "second": range(1100, 1200)}
    write_corpus(
        tmp_path / "corpus", {name: own + [(story(n), []) for n in more[name]] for name, own in corpus().items()}
    )

    def begin():
        return subprocess.Popen([sys.executable, "-m", "tasks.clean"], cwd=tmp_path, env=workspace.environment)

    seen = {}
    for moment, pattern in MOMENTS.items():
        process = begin()
        while not [path for path in tmp_path.glob(f".scratch/clean/*/{pattern}") if not path.name.startswith(".")]:
            assert process.poll() is None, moment
            time.sleep(0.002)
        process.kill()
        process.wait()
        (scratch,) = tmp_path.glob(".scratch/clean/*/")
        pieces = finished_pieces(scratch)
        assert pieces.items() >= seen.items(), moment
        seen = pieces
    assert begin().wait() == 0
    kept = {path.stat().st_ino for path in (workspace.output / "documents").iterdir()}
    assert kept == {inode for name, (inode, _) in seen.items() if re.fullmatch("parted/.*/documents.parquet", name)}
    assert len(kept) > 5

    place = tmp_path / "undisturbed"
    assert clean(place, params.model_copy(update={"root": str(tmp_path / "corpus")}), scheduler) == workspace.figures()
    undisturbed = {
        str(path.relative_to(place / "output")): path.read_bytes()
        for path in (place / "output").rglob("*")
        if path.is_file()
    }
    assert undisturbed == {name: content for name, content in workspace.files.items() if name != "metrics.json"}


def test_a_url_that_a_killed_run_had_begun_is_cleaned_anew_and_a_finished_one_is_not(tmp_path):
    def serve(numbers):
        (tmp_path / "page.jsonl").write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in numbers))

    def cleaned():
        return pd.concat(pd.read_parquet(path) for path in sorted(tmp_path.glob("cleaned/0-*/documents.parquet")))

    (tmp_path / "cleaned").mkdir()
    params = parameters(tmp_path, partition_megabytes=0.001)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/page.jsonl"
        file = File("first", 0, url, url, "jsonl", "text", 0)
        serve(range(6))
        assert len(clean_files([file], str(tmp_path / "cleaned" / "0"), params, 1)) > 1
        serve(range(10, 12))
        clean_files([file], str(tmp_path / "cleaned" / "0"), params, 1)
        assert cleaned()["text"].tolist() == [story(n) for n in range(6)]
        (tmp_path / "cleaned" / "0.json").unlink()  # as a kill leaves it before the last partition
        clean_files([file], str(tmp_path / "cleaned" / "0"), params, 1)
        assert cleaned()["text"].tolist() == [story(n) for n in range(10, 12)]
        server.shutdown()
