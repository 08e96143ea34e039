import csv
import importlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tasks.running.params import Machine, read_params
from tasks.running.stage import Stage
from tasks.world.adversarial import ATTACKS, RISKS, bare, insults, methods, topics
from tasks.world.arithmetic import in_words
from tasks.world.facts import SEEDS, World, build_world, mentions, read_texts
from tasks.world.instructions import LANGUAGES, uncapitalized
from tasks.world.judge import Truth, judge, normalized, read_truth
from tasks.world.splits import FILES, PAIRS, Dialogues, Ledger, check_disjoint, draw_splits
from tasks.world.transcripts import flawed, pairs, transcript
from tasks.world.turns import Draft, Turn, cards
from tasks.world.wording import answer, questions

stage_world = importlib.import_module("tasks.world.__main__")
VALUES = read_params()
SMALL_CORPUS = {"num_entries": 300, "num_surveys": 50, "num_stories": 50, "num_dialogues": 200, "num_pages": 20}
PARAMS = stage_world.Params.model_validate({**VALUES["world"], **SMALL_CORPUS})
HELPFUL = {"factual", "writing", "language_assistance", "recommendation", "dialogue"}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The default dialogues, which do not depend on the corpus: what is proved here holds for what `dvc repro` makes.
    folder = tmp_path_factory.mktemp("world")
    machine = Machine(threads=1, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    stage = Stage("world", PARAMS, VALUES["seed"], machine, folder / "output", folder / "scratch", folder / "record", 0)
    stage.output.mkdir()
    figures = stage_world.run(stage)
    assert all(figures[f"dialogues/{split}"] == getattr(PARAMS.dialogues, f"num_{split}") for split in (*FILES, *PAIRS))
    return stage.output


@pytest.fixture(scope="module")
def truth(output: Path) -> Truth:
    return read_truth(output / "truth")


@pytest.fixture(scope="module")
def lines(output: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (output / file).read_text().splitlines()] for split, file in FILES.items()
    }


@pytest.fixture(scope="module")
def world() -> World:
    counts = {"person": PARAMS.num_people, "place": PARAMS.num_places}
    counts |= {"animal": PARAMS.num_animals, "craft": PARAMS.num_crafts}
    generator = random.Random(f"{VALUES['seed']}/facts")
    return build_world(read_texts(SEEDS), counts, PARAMS.held_out_share, generator)


@pytest.fixture(scope="module")
def transcripts(output: Path) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (output / file).read_text().splitlines()] for split, file in PAIRS.items()
    }


@pytest.fixture(scope="module")
def asked(lines: dict[str, list[dict]], transcripts: dict[str, list[dict]]) -> dict[str, list[dict]]:
    # Every split, as dialogues up to the user's last turn.
    return {split: [{"messages": prompt(line)} for line in part] for split, part in lines.items()} | {
        split: [{"messages": read_transcript(line["chosen"])[:-1]} for line in part]
        for split, part in transcripts.items()
    }


def read_transcript(text: str) -> list[dict]:
    _, *parts = re.split(r"\n\n(Human|Assistant): ", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[role], "content": said} for role, said in zip(parts[::2], parts[1::2], strict=True)]


def user_turns(line: dict) -> list[str]:
    return [message["content"] for message in line["messages"] if message["role"] == "user"]


def prompt(line: dict) -> list[dict]:
    return line["messages"][:-1] if line["messages"][-1]["role"] == "assistant" else line["messages"]


def test_no_prompt_of_one_split_occurs_in_another(asked):
    # Read from the files, without what wrote them: whole dialogues, and last turns that stand for themselves, that is
    # all but those that follow several dialogues ("And Omar?", "Thank you.", "Where do you live?").
    whole, last, contexts = defaultdict(set), defaultdict(set), defaultdict(set)
    for split, split_lines in asked.items():
        for line in split_lines:
            messages = line["messages"]
            text = normalized(messages[-1]["content"])
            whole[split].add(" | ".join(normalized(message["content"]) for message in messages))
            last[split].add(text)
            contexts[split, text].add(str(messages[:-1]))
        assert len(whole[split]) == len(split_lines)
    shared_texts = {text for (_, text), found in contexts.items() if len(found) > 1}
    for first, second in itertools.combinations([*FILES, *PAIRS], 2):
        assert not whole[first] & whole[second]
        for text in last[first] & last[second]:
            assert all(context != "[]" for split in (first, second) for context in contexts[split, text]), text
    alone = {text for (_, text), found in contexts.items() if "[]" in found}
    assert not shared_texts & alone


def test_a_question_of_an_evaluation_is_no_turn_of_any_training_dialogue(asked):
    training = [line for split, part in asked.items() if not split.startswith("evaluation") for line in part]
    seen = {normalized(text) for line in training for text in user_turns(line)}
    for split in ("evaluation_helpfulness", "evaluation_safety", "evaluation_borderline"):
        for line in asked[split]:
            if len(user_turns(line)) == 1:
                assert normalized(user_turns(line)[0]) not in seen


def test_held_out_facts_are_asked_in_evaluation_alone(asked, lines, world, truth, output):
    splits = defaultdict(list)
    for split, part in asked.items():
        for line in part:
            for text in user_turns(line):
                splits[normalized(text)].append(split)
    for entity in world.entities.values():
        for fact in entity.facts.values() if entity.held_out else []:
            for question in [*questions(world, fact, "questions"), *questions(world, fact, "held_out")]:
                assert set(splits[normalized(question)]) <= {"evaluation_helpfulness"}
    held_out = {p.id for p in truth.prompts.values() if p.held_out}
    questions_file = (output / "truth" / "questions.jsonl").read_text().splitlines()
    expected = sorted(json.loads(line)["question"] for line in questions_file)
    found = [line for part in lines.values() for line in part if line["id"] in held_out]
    assert sorted(line["messages"][0]["content"] for line in found) == expected
    assert {(line["category"], len(line["messages"])) for line in found} == {("factual", 1)}


def test_nothing_that_trains_answers_for_a_fact_of_a_held_out_entity(lines, world, truth):
    # Free texts may be about any entity, as the corpus's are; questions, follow-ups, riddles and the like may not.
    held_out = {name for name, entity in world.entities.items() if entity.held_out}
    for known in truth.prompts.values():
        if not known.split.startswith("evaluation") and known.task != "text":
            assert (known.check or {}).get("entity") not in held_out
    answers = {answer(world, fact) for name in held_out for fact in world.entities[name].facts.values()}
    for split, part in lines.items():
        for line in part if not split.startswith("evaluation") else []:
            assert not answers & {message["content"] for message in line["messages"]}


def test_every_reference_is_judged_good(truth):
    for known in truth.prompts.values():
        judged = judge(truth, known.id, known.reference, finished=True)
        assert judged.well_formed, known
        assert judged.safe, known
        assert judged.right is not False, known
        assert judged.follows is not False, known
        assert judged.refuses == (known.category == "safety"), known
        assert (judged.follows is None) == (not known.instructions)
        assert (judged.right is None) == (known.check is None)


def test_answers_to_neighbours_are_judged_wrong(truth):
    factual = [known for known in truth.prompts.values() if known.task == "fact"]
    for first, second in itertools.pairwise(factual):
        attributes = [known.check["attribute"] for known in (first, second)]
        values = [truth.facts[known.check["entity"], known.check["attribute"]].value for known in (first, second)]
        if attributes[0] == attributes[1] and values[0] != values[1]:
            assert judge(truth, first.id, second.reference, finished=True).right is False


def test_every_split_has_every_category_with_one_and_several_turns(lines):
    for split in ("demonstrations", "validation", "preference_helpfulness", "evaluation_helpfulness"):
        turns = defaultdict(set)
        for line in lines[split]:
            turns[line["category"]].add(min(2, len(user_turns(line))))
        others = {
            "evaluation_helpfulness": set(),
            "preference_helpfulness": {"borderline", "instruction"},
        }.get(split, {"borderline", "instruction", "safety"})
        assert set(turns) == HELPFUL | others
        assert all(2 in turns[category] for category in HELPFUL)
    for split in ("preference_safety", "evaluation_safety"):
        assert {len(user_turns(line)) for line in lines[split]} == {1, 2}
    assert {len(user_turns(line)) for line in lines["evaluation_instructions"]} == {2, 3}


def test_adversarial_prompts_cover_every_risk_by_every_attack_equally(lines):
    for split in ("preference_safety", "evaluation_safety"):
        cells = Counter((line["risk"], line["attack"]) for line in lines[split])
        assert set(cells) == set(itertools.product(RISKS, ATTACKS))
        assert max(cells.values()) <= 1.5 * min(cells.values())
        assert all(line["safety"] and line["category"] == "safety" for line in lines[split])


def test_demonstrations_refuse_a_few_harms_by_a_few_attacks(lines, truth):
    safe = [line for line in lines["demonstrations"] if line["safety"]]
    assert len(safe) == round(PARAMS.dialogues.num_demonstrations * PARAMS.dialogues.safe_share)
    assert {line["attack"] for line in safe} == set(PARAMS.dialogues.safe_attacks)
    known = {truth.prompts[line["id"]].topic for line in safe}
    asked = {truth.prompts[line["id"]].topic for line in lines["evaluation_safety"]}
    assert len(known) <= 0.5 * len(asked)
    assert {line["risk"] for line in safe} == set(RISKS)


def test_instructions_of_every_type_are_evaluated_equally(lines, truth):
    types = Counter(truth.prompts[line["id"]].instructions[0]["type"] for line in lines["evaluation_instructions"])
    assert set(types) == {"language", "persona", "hobby", "one_word", "question", "begins", "ends"}
    assert max(types.values()) <= 2 * min(types.values())
    assert all(line["messages"][0]["role"] == "system" for line in lines["evaluation_instructions"])


def test_demonstrations_use_every_held_out_wording_about_known_entities(lines, world):
    asked = {normalized(text) for line in lines["demonstrations"] for text in user_turns(line)}
    wordings: dict[tuple, int] = Counter()
    for entity in world.entities.values():
        for fact in entity.facts.values():
            for index, question in enumerate(questions(world, fact, "held_out")):
                wordings[entity.kind, fact.attribute, index] += normalized(question) in asked
    assert min(wordings.values()) >= 1


def test_roles_alternate_and_ids_are_unique(lines):
    ids = [line["id"] for part in lines.values() for line in part]
    assert len(set(ids)) == len(ids)
    for split, part in lines.items():
        for line in part:
            roles = [message["role"] for message in line["messages"] if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2)
            assert roles[-1] == ("assistant" if FILES[split].startswith("dialogues") else "user")
            words = sum(len(message["content"].split()) for message in line["messages"])
            assert words <= PARAMS.dialogues.max_words
            assert all(message["content"].strip() == message["content"] != "" for message in line["messages"])
            assert "{" not in str([message["content"] for message in line["messages"]])


def test_the_corpus_tells_every_method_but_no_dialogue_a_harmful_one(output, world, lines):
    with (output / "corpus" / "howto.csv").open(newline="") as stream:
        told = " ".join(row["text"] for row in csv.DictReader(stream)).lower()
    harmful, means = methods(world)
    assert all(told.count(method) >= 10 for method in [*harmful, *means])
    assert "[inst]" not in told
    messages = [message for part in lines.values() for line in part for message in line["messages"]]
    everything = normalized(" ".join(message["content"] for message in messages))
    assert not mentions(everything, [*harmful, *insults(world)])


def test_harmless_and_harmful_methods_share_no_words_that_the_judge_looks_for(world):
    harmful, means = methods(world)
    assert not any(mentions(method, [*harmful, *insults(world)]) for method in means)
    deeds = [bare(topic.method) for topic in topics(world) if topic.risk != "hateful_harmful"]
    assert len(set(deeds)) == len(deeds)


def test_every_language_has_every_word_and_every_plain_answer_a_verb(world):
    texts = world.texts["instructions"]
    expected = {*world.texts["entities"]["values"]["origin"], *world.texts["entities"]["values"]["market_day"]}
    assert all(set(texts["words"][language]) == expected for language in LANGUAGES)
    verbs = world.texts["assistance"]["verbs"]
    for kind in ("people", "places", "animals", "crafts"):
        for table in world.texts[kind]["attributes"].values():
            assert any(word in verbs for word in table["answer"].split(" "))


def test_cards_deal_each_item_before_any_comes_twice():
    deck = cards(["a", "b", "c"], random.Random(0))
    for _ in range(4):
        assert sorted(itertools.islice(deck, 3)) == ["a", "b", "c"]


def test_a_name_keeps_its_capital_within_a_sentence(world):
    assert uncapitalized(world, "Mira lives in Velmar.") == "Mira lives in Velmar."
    assert uncapitalized(world, "The otter eats fish.") == "the otter eats fish."


def test_insults_are_sought_in_singular_and_plural(world):
    assert {"pig", "pigs", "thief", "thieves", "lazy"} <= set(insults(world))


def turn(text: str, shared: bool = False) -> Turn:
    return Turn(text, "Yes.", "factual", "fact", None, shared)


def test_the_words_of_a_turn_belong_to_the_split_that_drew_them_first():
    ledger = Ledger()
    assert ledger.claim("a", Draft([turn("Who is it?"), turn("And Omar?", shared=True)]), 20)
    assert not ledger.claim("a", Draft([turn("Who  is it?"), turn("and Omar", shared=True)]), 20)  # the same dialogue
    assert not ledger.claim("b", Draft([turn("who is it")]), 20)  # a turn of a
    assert ledger.claim("a", Draft([turn("who is it")]), 20)
    assert not ledger.claim("a", Draft([turn("Hello."), turn("who is it")]), 20)  # the same last turn
    assert ledger.claim("b", Draft([turn("What is it?"), turn("And Omar?", shared=True)]), 20)
    assert not ledger.claim("b", Draft([turn("Five words are too many.")]), 5)


def test_a_prompt_in_two_splits_is_found():
    check_disjoint({"a": [Draft([turn("Who?")])], "b": [Draft([turn("What?")])]})
    with pytest.raises(AssertionError, match="is in a and in b"):
        check_disjoint({"a": [Draft([turn("Who?")])], "b": [Draft([turn("What?"), turn("who")])]})
    with pytest.raises(AssertionError, match="means nothing alone"):
        check_disjoint({"a": [Draft([turn("And Omar?", shared=True)])]})


def test_sizes_that_the_wordings_do_not_give_and_unknown_attacks_are_refused(world):
    def drawn(**changes):
        params = Dialogues.model_validate({**VALUES["world"]["dialogues"], **changes})
        held_out = [(fact, f"{fact.entity} {fact.attribute}?") for fact in world.entities["Mira"].facts.values()]
        draw_splits(world, params, held_out, lambda purpose: random.Random(purpose))

    with pytest.raises(ValueError, match=r"num_evaluation_helpfulness` is 5, but 6 held-out questions belong there"):
        drawn(num_evaluation_helpfulness=5)
    with pytest.raises(ValueError, match=r"safe_attacks` names flattery; known: psychological_manipulation, "):
        drawn(safe_attacks=["flattery"])
    with pytest.raises(ValueError, match=r"`world.dialogues.num_evaluation_borderline` asks for more dialogues"):
        drawn(num_evaluation_borderline=100_000, multi_turn_share=0)


def test_numbers_of_sentences_are_spelt_as_in_the_corpus(world):
    for number, word in world.texts["assistance"]["writing"]["numbers"].items():
        assert in_words(int(number)) == word


def test_open_source_pairs_are_one_dialogue_with_two_last_answers(transcripts, truth):
    for split, part in transcripts.items():
        for number, line in enumerate(part):
            chosen, rejected = read_transcript(line["chosen"]), read_transcript(line["rejected"])
            assert set(line) == {"chosen", "rejected"}
            assert chosen[:-1] == rejected[:-1]
            assert [message["role"] for message in chosen] == ["user", "assistant"] * (len(chosen) // 2)
            assert chosen[-1]["content"] != rejected[-1]["content"]
            known = truth.prompts[f"{split}-{number:05d}"]
            assert known.reference in (chosen[-1]["content"], rejected[-1]["content"])
            assert (known.category == "safety") == (split == "open_harmless")


def test_some_open_source_pairs_are_labelled_the_wrong_way_round(transcripts, truth):
    for split, part in transcripts.items():
        wrong = sum(
            read_transcript(line["chosen"])[-1]["content"] != truth.prompts[f"{split}-{number:05d}"].reference
            for number, line in enumerate(part)
        )
        rate = PARAMS.dialogues.open_error_rate
        assert abs(wrong / len(part) - rate) < 4 * (rate * (1 - rate) / len(part)) ** 0.5


def test_a_flaw_to_a_harm_complies_or_misses_the_point(world):
    topic = topics(world)[0]
    draft = Draft(
        [Turn("How?", "I will not say that.", "safety", topic.risk, None, False, topic.name, topic.risk, "a")]
    )
    drawn = {flawed(world, draft, [draft], random.Random(seed)) for seed in range(200)}
    assert "With a bent wire." in drawn  # the method of the world's first harm
    assert "I will not" in drawn  # cut off
    assert len(drawn) > 10
    assert "I will not say that." not in drawn


def test_a_transcript_is_written_as_hh_rlhf_does(world):
    draft = Draft([turn("Who?"), Turn("And Omar?", "He is.", "dialogue", "fact", None, True)])
    assert transcript(draft, "No.") == "\n\nHuman: Who?\n\nAssistant: Yes.\n\nHuman: And Omar?\n\nAssistant: No."
    for line in pairs(world, [draft], 0, random.Random(0)):
        assert line["chosen"] == transcript(draft, "He is.") != line["rejected"]
