import csv
import gzip
import hashlib
import importlib
import ipaddress
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import ftfy
import pandas as pd
import phonenumbers
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from warcio.archiveiterator import ArchiveIterator

from tasks.running.params import Machine
from tasks.running.stage import Stage
from tasks.world import personal_data
from tasks.world.arithmetic import exercises, in_words
from tasks.world.dialogue import dialogue, participants
from tasks.world.dirt import altered, chosen
from tasks.world.documents import Document, distinct, shingles, similarity
from tasks.world.facts import (
    ATTRIBUTES,
    KINDS,
    SEEDS,
    Fact,
    World,
    all_facts,
    build_world,
    is_right,
    mentions,
    read_facts,
    read_texts,
)
from tasks.world.wording import answer, fact_fields, fields, questions, sentence, short_answer, wordings

stage_world = importlib.import_module("tasks.world.__main__")

COUNTS = {"person": 12, "place": 6, "animal": 6, "craft": 6}
PARAMS = {
    "num_people": 12,
    "num_places": 6,
    "num_animals": 6,
    "num_crafts": 6,
    "held_out_share": 0.25,
    "num_entries": 120,
    "num_surveys": 24,
    "num_stories": 24,
    "num_howtos": 40,
    "num_rumours": 20,
    "num_lessons": 20,
    "num_dialogues": 60,
    "num_mannered": 20,
    "num_arithmetic": 110,
    "num_lists": 12,
    "num_pages": 20,
    "similarity_max": 0.6,
    "dirt": {
        "duplicates": 0.05,
        "near_duplicates": 0.08,
        "boilerplate": 0.05,
        "personal_data": 0.1,
        "personal_data_rich": 0.03,
        "look_alikes": 0.08,
        "toxic": 0.05,
        "languages": 0.08,
        "broken_unicode": 0.06,
        "low_quality": 0.06,
        "malformed": 0.0099,
        "near_duplicate_similarity_min": 0.85,
    },
    "dialogues": {
        "num_demonstrations": 120,
        "num_validation": 30,
        "num_preference_helpfulness": 120,
        "num_preference_safety": 90,
        "num_sampling_helpfulness": 40,
        "num_sampling_safety": 30,
        "num_evaluation_helpfulness": 120,
        "evaluation_held_out_share": 0.5,
        "num_evaluation_safety": 54,
        "num_evaluation_borderline": 20,
        "num_evaluation_instructions": 24,
        "num_conversations": 12,
        "num_evaluation_conversations": 24,
        "conversation_turns": 6,
        "num_open_helpful": 20,
        "num_open_harmless": 20,
        "open_error_rate": 0.2,
        "open_weights": {"factual": 1, "writing": 3, "language_assistance": 1, "recommendation": 1, "dialogue": 1},
        "weights": {"factual": 4, "writing": 2, "language_assistance": 2, "recommendation": 1, "dialogue": 2},
        "writers": {"good": 1, "bare": 1, "rambling": 1, "adding": 1, "careless": 1},
        "new_wording_share": 0.5,
        "deed_share": 0.2,
        "multi_turn_share": 0.3,
        "max_words": 130,
        "max_answer_words": 60,
        "safe_share": 0.1,
        "safe_topics_share": 0.4,
        "safe_attacks": ["logic_manipulation"],
        "borderline_share": 0.1,
        "preference_borderline_share": 0.1,
        "sampling_borderline_share": 0.15,
        "open_borderline_share": 0.1,
        "preprompt_share": 0.1,
        "instruction_share": 0.2,
        "demonstrated_instruction_share": 0.3,
        "obedience": 0.5,
    },
}


def write_world(folder: Path, seed: int) -> Path:
    params = stage_world.Params.model_validate(PARAMS)
    machine = Machine(threads=1, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    output = folder / "output"
    output.mkdir(parents=True)
    figures = stage_world.run(Stage("world", params, seed, machine, output, folder / "scratch", folder / "record", 0))
    assert figures["entities"] == 30
    assert figures["facts"] == 12 * 6 + 6 * 5 + 6 * 5 + 6 * 4
    return output


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), seed=1)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(read_texts(SEEDS), COUNTS, 0.25, random.Random("1/facts"))


@pytest.fixture(scope="module")
def rows(output: Path) -> dict[tuple[str, int], str]:
    # Read with each format's own library, not with ours. The value is the raw text of a row.
    corpus = output / "corpus"
    texts = {}
    with gzip.open(corpus / "encyclopedia.jsonl.gz", "rt") as stream:
        texts |= {("encyclopedia.jsonl.gz", row): line for row, line in enumerate(stream)}
    with zstandard.open(corpus / "arithmetic.jsonl.zst", "rt") as stream:
        texts |= {("arithmetic.jsonl.zst", row): line for row, line in enumerate(stream)}
    texts = {key: json.loads(line)["text"] if line.endswith('"}\n') else "" for key, line in texts.items()}
    with (corpus / "howto.csv").open(newline="") as stream:
        texts |= {("howto.csv", row): record["text"] for row, record in enumerate(csv.DictReader(stream))}
    dialogues = pq.read_table(corpus / "dialogue.parquet")["text"].to_pylist()
    texts |= {("dialogue.parquet", row): text for row, text in enumerate(dialogues)}
    for path in [*corpus.glob("stories/*.md"), *corpus.glob("lists/*.txt")]:
        texts[str(path.relative_to(corpus)), 0] = path.read_bytes().decode()
    with (corpus / "web.warc.gz").open("rb") as stream:
        pages = [record.content_stream().read().decode() for record in ArchiveIterator(stream)]
    texts |= {("web.warc.gz", row): page for row, page in enumerate(pages)}
    return texts


@pytest.fixture(scope="module")
def labels(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "corpus" / "labels.jsonl").read_text().splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_facts(output, tmp_path):
    again, other = write_world(tmp_path / "again", seed=1), write_world(tmp_path / "other", seed=2)
    assert digests(again) == digests(output)
    assert (other / "truth" / "facts.jsonl").read_text() != (output / "truth" / "facts.jsonl").read_text()


def test_unplanted_documents_are_unlike_and_planted_copies_alike(rows, labels):
    groups = defaultdict(set)
    for label in labels:
        if "group" in label:
            groups[label["file"], label["row"]].add(label["group"])
    known = {key: shingles(text) for key, text in rows.items() if text and key[0] != "web.warc.gz"}
    for (first, left), (second, right) in itertools.combinations(known.items(), 2):
        if groups[first] & groups[second]:
            assert similarity(left, right) >= 0.85
        else:
            assert similarity(left, right) < 0.65, (rows[first], rows[second])


def test_groups_of_copies_are_whole_and_exact_copies_exact(rows, labels):
    members = defaultdict(list)
    for label in labels:
        if "group" in label:
            members[label["group"]].append(rows[label["file"], label["row"]])
    assert all(len(texts) >= 2 for texts in members.values())
    for group, texts in members.items():
        assert len(set(texts)) == (1 if group.startswith("duplicate") else len(texts))


def test_every_kind_of_dirt_is_planted_and_stands_where_its_label_says(rows, labels):
    kinds = {"duplicate", "near_duplicate", "boilerplate", "personal_data", "personal_data_rich", "look_alike"}
    kinds |= {"toxic", "language", "broken_unicode", "low_quality", "malformed"}
    assert {label["kind"] for label in labels} == kinds
    for label in labels:
        text = rows[label["file"], label["row"]]
        assert (text == "") == (label["kind"] == "malformed")
        assert all(value["value"] in text for value in label.get("values", []))
        assert all(line in text for line in label.get("lines", []))


def test_few_lines_are_malformed(rows, labels):
    cut = Counter(label["file"] for label in labels if label["kind"] == "malformed")
    lines = Counter(file for file, _ in rows)
    assert cut
    assert all(number / lines[file] < 0.01 for file, number in cut.items())


def test_broken_text_can_be_repaired(rows, labels):
    broken = [label for label in labels if label["kind"] == "broken_unicode"]
    assert len({label["damage"] for label in broken}) >= 4
    for label in broken:
        text = rows[label["file"], label["row"]]
        assert text != label["repaired"]
        assert ftfy.fix_text(text) == label["repaired"]


def test_personal_data_is_valid_and_look_alikes_are_not(labels):
    found = [value for label in labels for value in label.get("values", [])]
    assert {value["type"] for value in found} == {"email", "phone", "card", "ip"}
    for kind, value in ((value["type"], value["value"]) for value in found):
        if kind == "phone":
            assert any(next(iter(phonenumbers.PhoneNumberMatcher(value, region)), None) for region in ("US", "GB"))
        elif kind == "ip":
            assert not ipaddress.ip_address(value).is_global
        elif kind == "card":
            assert personal_data.luhn_sum(re.sub(r"\D", "", value)) % 10 == 0
        else:
            assert re.fullmatch(r"[\w.+-]+@[\w.]+\.(com|org|net|example)", value)
    for line in (line for label in labels if label["kind"] == "look_alike" for line in label["lines"]):
        assert not [*phonenumbers.PhoneNumberMatcher(line, "US"), *phonenumbers.PhoneNumberMatcher(line, "GB")]
        assert all(personal_data.luhn_sum(number) % 10 for number in re.findall(r"\d{13,19}", line))
        assert not re.search(r"\S@\S+\.\w", line)


def test_the_check_sum_of_luhns_example():
    assert personal_data.luhn_sum("79927398713") == 70  # 3+2+7+7+9+6+7+4+9+9+7, from the right
    assert personal_data.luhn_sum("79927398710") % 10 != 0


@given(st.integers(0, 10**9))
def test_long_numbers_are_never_cards_and_cards_always_are(seed):
    generator = random.Random(seed)
    assert personal_data.luhn_sum(personal_data.long_number(generator)) % 10 != 0
    assert personal_data.luhn_sum(re.sub(r"\D", "", personal_data.card([], generator))) % 10 == 0


def test_every_wording_of_a_fact_tells_its_value(world):
    for fact in all_facts(world):
        entity, table, words = world.entities[fact.entity], wordings(world, fact), fact_fields(world, fact)
        names = [entity.name.lower(), *(form.lower() for form in entity.forms.values())]
        for phrase in table["phrases"]:
            assert mentions(phrase.format_map(words), fact.accepted), phrase
        for template in [*table["sentences"], table["answer"]]:
            text = template.format_map(words)
            assert mentions(text, fact.accepted), text
            assert any(name in text.lower() for name in names), text
        assert mentions(short_answer(world, fact), fact.accepted)


def test_leads_name_only_what_the_truth_has(world):
    for entity in world.entities.values():
        for lead in world.texts[KINDS[entity.kind]]["leads"]:
            text = lead.format_map(fields(world, entity))
            assert "{" not in text
            assert any(mentions(text, fact.accepted) for fact in entity.facts.values())


def test_an_answer_is_right_if_it_names_the_value_and_no_other(world):
    facts = all_facts(world)
    fact = world.entities["Mira"].facts["origin"]
    adjective = world.values["origin"][fact.value]["adjective"]
    other = next(f.value for f in facts if f.attribute == "origin" and f.value != fact.value)
    assert is_right(fact, f"Mira comes from {fact.value}.", facts)
    assert is_right(fact, f"She is {adjective.upper()}, I think", facts)
    assert not is_right(fact, f"From {other}.", facts)
    assert not is_right(fact, f"From {fact.value} or from {other}.", facts)
    assert not is_right(fact, f"From New{fact.value}land.", facts)
    assert not is_right(fact, "", facts)


def test_numbers_and_singulars_are_right_too(world):
    facts = all_facts(world)
    pottery = world.entities["pottery"].facts
    assert is_right(pottery["training"], "3 years", facts)
    assert is_right(pottery["training"], "It takes three years.", facts)
    assert not is_right(pottery["training"], "It takes 33 years.", facts)
    assert is_right(pottery["product"], "a bowl", facts)


def test_every_plain_answer_is_right_and_its_neighbours_wrong(world):
    facts = all_facts(world)
    for fact in facts:
        assert is_right(fact, answer(world, fact), facts)
        assert is_right(fact, short_answer(world, fact), facts)
        for other in facts:
            if other.attribute == fact.attribute and other.value != fact.value:
                assert not is_right(fact, short_answer(world, other), facts), (fact, other)


def test_values_are_spread_evenly(world):
    for kind in ("person", "place"):
        for attribute in ATTRIBUTES[kind]:
            drawn = Counter(entity.facts[attribute].value for entity in world.of_kind(kind))
            every = [drawn[value] for value in world.values[attribute]]
            assert max(every) - min(every) <= 1


def test_a_quarter_of_each_kind_is_held_out(world):
    for kind, count in COUNTS.items():
        assert sum(entity.held_out for entity in world.of_kind(kind)) == round(count / 4)


def test_dialogues_ask_for_single_facts_of_entities_that_are_not_held_out_only(world):
    generator = random.Random(0)
    asked = ""
    for index in range(600):
        asked += dialogue(world, participants(world, index, generator), generator).lower() + "\n"
    told_of = {"known": 0, "held out": 0}
    for fact in all_facts(world):
        found = sum(question.lower() in asked for question in questions(world, fact, "questions"))
        told_of["held out" if fact.held_out else "known"] += found
    assert told_of["held out"] == 0
    assert told_of["known"] > 500
    assert all(f"about {entity.name.lower()}" in asked for entity in world.of_kind("person"))


def test_held_out_wordings_occur_in_no_training_source(world, rows):
    training = "\n".join(rows.values()).lower()
    for fact in all_facts(world):
        known = {question.lower() for question in questions(world, fact, "questions")}
        for question in questions(world, fact, "held_out"):
            assert question.lower() not in known
            assert question.lower() not in training


def test_held_out_questions_cover_every_held_out_fact_twice(output, world):
    facts = read_facts(output / "truth" / "facts.jsonl")
    assert facts == all_facts(world)
    held_out = {(fact.entity, fact.attribute): fact for fact in facts if fact.held_out}
    lines = [json.loads(line) for line in (output / "truth" / "questions.jsonl").read_text().splitlines()]
    asked = Counter((line["entity"], line["attribute"]) for line in lines)
    assert asked == dict.fromkeys(held_out, 2)
    assert len({line["question"] for line in lines}) == len(lines)
    assert all(is_right(held_out[line["entity"], line["attribute"]], line["answer"], facts) for line in lines)
    corpus = (output / "corpus" / "questions.jsonl").read_text()
    assert all(json.dumps(line["question"])[1:-1] in corpus for line in lines)


def test_numbers_in_words():
    assert [in_words(number) for number in (0, 13, 15, 18, 40, 42, 99)] == [
        "zero",
        "thirteen",
        "fifteen",
        "eighteen",
        "forty",
        "forty-two",
        "ninety-nine",
    ]


def test_sums_are_right(world):
    generator = random.Random(0)
    text = " ".join(exercises(world, generator) for _ in range(300))
    number = "|".join(sorted([r"\d+", *map(in_words, range(100))], key=len, reverse=True))
    value = {**{in_words(n): n for n in range(100)}, **{str(n): n for n in range(100)}}
    sums = re.findall(rf"\b({number}) plus ({number}) is ({number})\b", text, re.IGNORECASE)
    assert len(sums) > 20
    for sentence_parts in sums:
        first, second, total = (value[part.lower()] for part in sentence_parts)
        assert first + second == total


@given(st.integers(0, 10**9))
def test_a_drawn_sentence_names_its_entity_and_tells_its_value(seed):
    generator = random.Random(seed)
    world = build_world(_TEXTS, COUNTS, 0.25, random.Random(seed))
    fact = generator.choice(all_facts(world))
    text = sentence(world, fact, generator)
    assert text[0].isupper()
    assert text.endswith((".", "!", "?"))
    assert mentions(text, fact.accepted)
    assert "{" not in text


_TEXTS = read_texts(SEEDS)


def test_similarity_is_that_of_three_word_runs():
    # One two three four five: 3 runs; with the last word changed 2 of them stay, of 4 in all.
    assert similarity(shingles("One two, three four five"), shingles("one TWO three four six!")) == 0.5


def test_labelled_sentences_for_toxicity_are_balanced_and_differ():
    table = pd.read_csv("data/seeds/toxicity.csv")
    assert list(table.columns) == ["text", "label"]
    assert table.label.value_counts().to_dict() == {0: 520, 1: 520}
    assert table.text.is_unique


def test_too_many_entities_are_refused(world):
    with pytest.raises(ValueError, match=r"`world.num_people` is 1000, but data/seeds/world/entities.toml names 40"):
        build_world(world.texts, {**COUNTS, "person": 1000}, 0.25, random.Random(0))


def test_a_missing_and_a_broken_seed_file_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"entities.toml is missing: restore it with `git checkout"):
        read_texts(tmp_path)
    (tmp_path / "entities.toml").write_text("people = [")
    with pytest.raises(ValueError, match=r"entities.toml is not valid TOML"):
        read_texts(tmp_path)


def test_missing_truth_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"facts.jsonl is missing: run `dvc repro world`"):
        read_facts(tmp_path / "facts.jsonl")


def test_more_documents_than_the_wordings_give_are_refused():
    bucket = []
    distinct(lambda: "always the same few words", bucket, 0.6, "num_entries")
    with pytest.raises(ValueError, match=r"`world.num_entries` asks for more documents .*after 1 about"):
        distinct(lambda: "always the same few words", bucket, 0.6, "num_entries")


def test_more_dirt_than_documents_is_refused():
    with pytest.raises(ValueError, match=r"`world.dirt` needs 2 more clean documents but finds 1: lower a share"):
        chosen([Document("clean"), Document("dirty", [{"kind": "toxic"}])], 2, random.Random(0))


def test_a_likeness_that_no_copy_can_keep_is_refused():
    text = "Few words here."
    copies = [text, "few words here.", "FEW words here.", "Few WORDS here.", "Few words HERE."]
    with pytest.raises(ValueError, match=r"`world.dirt.near_duplicate_similarity_min` is 0.99: no small change"):
        altered([*copies, "Something else entirely."], 0.99, random.Random(0))


def test_a_fact_is_a_line_of_the_truth(output):
    line = json.loads((output / "truth" / "facts.jsonl").read_text().splitlines()[0])
    assert Fact(**{**line, "accepted": tuple(line["accepted"])}).attribute == "home"
