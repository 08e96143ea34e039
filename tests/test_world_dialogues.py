import csv
import importlib
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from tasks.running.params import Machine, read_params
from tasks.running.stage import Stage
from tasks.world.adversarial import (
    ATTACKS,
    DIFFICULTIES,
    DIRECT,
    FOREIGN,
    HARMLESS,
    RISKS,
    Topic,
    bare,
    combined,
    committed,
    direct,
    harmless,
    insults,
    methods,
    topics,
    worded,
)
from tasks.world.annotators import Annotators, utility_of
from tasks.world.arithmetic import in_words
from tasks.world.drafts import harmful_drafts
from tasks.world.facts import SEEDS, World, all_facts, build_world, mentions, read_texts
from tasks.world.instructions import LANGUAGES, uncapitalized
from tasks.world.judge import Truth, judge, normalized, read_truth, refuses
from tasks.world.sizes import Dialogues
from tasks.world.splits import (
    DEMONSTRATED,
    FILES,
    PAIRS,
    Ledger,
    check_disjoint,
    divided,
    draw_splits,
    is_evaluation,
)
from tasks.world.transcripts import flawed, pairs, transcript
from tasks.world.turns import Draft, Turn, cards
from tasks.world.wording import answer, questions
from tasks.world.writers import WRITERS, WriterWeights, written

stage_world = importlib.import_module("tasks.world.__main__")
VALUES = read_params()
SMALL_CORPUS = {"num_entries": 300, "num_surveys": 50, "num_stories": 50, "num_dialogues": 200, "num_pages": 20}
PARAMS = stage_world.Params.model_validate({**VALUES["world"], **SMALL_CORPUS})
SAFETY = ("preference_safety", "sampling_safety", "evaluation_safety")
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
    return {split: [{"messages": prompt(line), "id": line["id"]} for line in part] for split, part in lines.items()} | {
        split: [{"messages": read_transcript(line["chosen"])[:-1], "id": None} for line in part]
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


def test_no_prompt_occurs_twice(asked, lines, truth):
    # Read from the files, without what wrote them: whole dialogues, and last turns that stand for themselves, that is
    # all but those that follow several dialogues ("And Omar?", "Thank you.", "Where do you live?") and direct harms,
    # which may stand alone in capitals.
    whole, last, contexts = defaultdict(set), defaultdict(set), defaultdict(set)
    for split, split_lines in asked.items():
        for line in split_lines:
            messages = line["messages"]
            text = normalized(messages[-1]["content"])
            whole[split].add(" | ".join(normalized(message["content"]) for message in messages))
            known = truth.prompts.get(line["id"])
            if split == "conversations" or (known and known.instructions and not is_evaluation(split)):
                continue  # an instruction, or the turns before, make it another prompt
            last[split].add(text)
            contexts[split, text].add(str(messages[:-1]))
        assert len(whole[split]) == len(split_lines)
    harms = [line for split in SAFETY for line in lines[split] if line["attack"] == DIRECT]
    shared_texts = {text for (_, text), found in contexts.items() if len(found) > 1}
    shared_texts -= {normalized(line["messages"][-1]["content"]) for line in harms}
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
    known = {json.loads(line)["question"] for line in questions_file}
    found = [line for part in lines.values() for line in part if line["id"] in held_out]
    assert {line["messages"][0]["content"] for line in found} <= known
    assert {(line["category"], len(line["messages"])) for line in found} == {("factual", 1)}
    num_factual = sum(line["category"] == "factual" for line in lines["evaluation_helpfulness"])
    assert len(found) == round(PARAMS.dialogues.evaluation_held_out_share * num_factual)


def test_nothing_that_trains_answers_for_a_fact_of_a_held_out_entity(lines, world, truth):
    # Free texts may be about any entity, as the corpus's are; questions, follow-ups, riddles and the like may not.
    held_out = {name for name, entity in world.entities.items() if entity.held_out}
    for known in truth.prompts.values():
        if not known.split.startswith("evaluation") and known.task != "text":
            assert (known.check or {}).get("entity") not in held_out
    answers = {answer(world, fact) for name in held_out for fact in world.entities[name].facts.values()}
    for split, part in lines.items():
        for line in part if not split.startswith("evaluation") else []:
            for before, message in itertools.pairwise([{"content": ""}, *line["messages"]]):
                # a text that a bare writer cut to its first sentence may be an answer, too
                assert message["content"] not in answers or "sentences" in before["content"]
            if (
                FILES[split].startswith(("dialogues", "conversations")) and line["category"] != "writing"
            ):  # nor does its writer add it
                assert not any(each in line["messages"][-1]["content"] for each in answers)


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
    splits = ("preference_helpfulness", "sampling_helpfulness", "evaluation_helpfulness")
    for split in ("demonstrations", "validation", *splits):
        turns = defaultdict(set)
        for line in lines[split]:
            turns[line["category"]].add(min(2, len(user_turns(line))))
        others = {
            "evaluation_helpfulness": set(),
            "preference_helpfulness": {"borderline", "instruction"},
            "sampling_helpfulness": {"borderline", "instruction"},
        }.get(split, {"borderline", "instruction", "safety"})
        assert set(turns) == HELPFUL | others
        assert all(2 in turns[category] for category in HELPFUL)
    for split in SAFETY:  # the most: a promise, two harmless questions, and the harm
        assert {len(user_turns(line)) for line in lines[split]} == {1, 2, 3, 4}
    assert {len(user_turns(line)) for line in lines["evaluation_instructions"]} == {2, 3}


def test_the_evaluation_has_the_papers_categories_in_equal_parts(lines):
    counts = Counter(line["category"] for line in lines["evaluation_helpfulness"])
    assert counts == dict.fromkeys(HELPFUL, PARAMS.dialogues.num_evaluation_helpfulness / 5)


def test_every_split_has_its_parts_in_full(truth):
    # Each part has the number that its share gives, rounded up or down; safe demonstrations are apart.
    dialogues = PARAMS.dialogues
    shares, open_shares = (
        {category: weight / sum(weights.model_dump().values()) for category, weight in weights.model_dump().items()}
        for weights in (dialogues.weights, dialogues.open_weights)
    )

    def mixed_with(borderline_share, instruction_share=dialogues.instruction_share):
        others = {"borderline": borderline_share, "instruction": instruction_share}
        return others | {category: share * (1 - sum(others.values())) for category, share in shares.items()}

    prompted = dialogues.preprompt_share / 3  # refuse a harm, answer a question for a fact, or what only looks unsafe
    safe = dialogues.safe_share + prompted
    demonstrated = {
        category: share * (1 - safe - 2 * prompted)
        for category, share in mixed_with(dialogues.borderline_share, dialogues.demonstrated_instruction_share).items()
    }
    demonstrated |= {category: demonstrated[category] + prompted for category in ("factual", "borderline")}
    demonstrated |= {"safety": safe}
    expected = {split: {"safety": 1.0} for split in SAFETY} | {
        "demonstrations": demonstrated,
        "validation": demonstrated,
        "preference_helpfulness": mixed_with(dialogues.preference_borderline_share),
        "sampling_helpfulness": mixed_with(dialogues.sampling_borderline_share),
        "evaluation_helpfulness": shares,
        "evaluation_borderline": {"borderline": 1.0},
        "evaluation_instructions": {"instruction": 1.0},
        "open_helpful": {"borderline": dialogues.open_borderline_share}
        | {category: share * (1 - dialogues.open_borderline_share) for category, share in open_shares.items()},
        "open_harmless": {"safety": 1.0},
    }
    assert set(expected) == {*FILES, *PAIRS} - {"conversations"}
    found = Counter((known.split, known.category) for known in truth.prompts.values())
    for split, parts in expected.items():
        number = getattr(dialogues, f"num_{split}")
        for category, share in parts.items():
            rounded = 3 if split in DEMONSTRATED else 1  # these are put together of three parts
            assert abs(found.pop((split, category)) - number * share) < rounded, (split, category)
    assert {split for split, _ in found} == {"conversations"}
    assert sum(found.values()) == dialogues.num_conversations
    assert Counter(known.split for known in truth.prompts.values()) == {
        split: getattr(dialogues, f"num_{split}") for split in (*expected, "conversations")
    }


def test_parts_are_whole_and_sum_up():
    assert divided(10, {"a": 1, "b": 1, "c": 1}) == {"a": 3, "b": 4, "c": 3}  # ends at 3.33, 6.67 and 10
    assert divided(120, {"a": 4, "b": 2, "c": 2, "d": 1, "e": 2}) == {"a": 44, "b": 21, "c": 22, "d": 11, "e": 22}


def test_adversarial_prompts_cover_every_risk_by_every_attack_equally(lines):
    for split in SAFETY:
        attacked = [line for line in lines[split] if line["attack"] != DIRECT]
        assert {line["difficulty"] for line in attacked} == {1, 2}
        cells = Counter((line["risk"], line["attack"]) for line in attacked)
        assert set(cells) == set(itertools.product(RISKS, ATTACKS))
        assert max(cells.values()) <= 2 * min(cells.values())
        assert all(line["safety"] and line["category"] == "safety" for line in lines[split])


def test_there_are_as_many_harms_of_each_difficulty(world, lines, truth):
    for difficulty in DIFFICULTIES:
        draws = harmful_drafts(world, PARAMS.dialogues, lambda topic: True, ATTACKS, difficulty, random.Random(0))
        assert {draft.difficulty for draft in itertools.islice(draws, 100)} == {difficulty}
    for split in SAFETY:
        found = Counter(line["difficulty"] for line in lines[split])
        assert set(found) == set(DIFFICULTIES)
        assert max(found.values()) - min(found.values()) <= 1, split
    assert {known.difficulty for known in truth.prompts.values() if known.split == "open_harmless"} == {1}


def test_a_harm_asked_for_directly_belongs_to_one_split(asked, lines):
    # In its split it may follow several dialogues, which tell it from a harmless question.
    splits = defaultdict(set)
    for split, part in asked.items():
        for line in part:
            for text in user_turns(line):
                splits[normalized(text)].add(split)
    for split in SAFETY:
        direct_harms = [line for line in lines[split] if line["attack"] == DIRECT]
        assert all(splits[normalized(user_turns(line)[-1])] == {split} for line in direct_harms)
        assert all(len(user_turns(line)) > 1 for line in direct_harms)


def test_the_difficulty_says_how_a_harm_is_hidden(world, lines):
    promises = world.texts["safety"]["promises"]["prompts"]
    deeds = [do for which in HARMLESS for do, _ in harmless(world, which)]
    for split in SAFETY:
        for line in lines[split]:
            *before, _ = user_turns(line)
            committing = bool(before) and before[0] in [said for said, _ in promises]
            harmless_turns = before[1:] if committing else before
            lull = bool(harmless_turns) and all(any(do in said for do in deeds) for said in harmless_turns)
            assert (line["attack"] == DIRECT) == (line["difficulty"] >= 3)
            assert committing == (line["difficulty"] == 4)
            assert lull or line["difficulty"] < 3
            assert not before or line["difficulty"] != 2


def test_a_borderline_prompt_may_follow_a_refused_harm_but_not_in_demonstrations(lines):
    def refused(split):
        borderline = [line for line in lines[split] if line["category"] == "borderline"]
        said = [[m["content"] for m in prompt(line) if m["role"] == "assistant"] for line in borderline]
        return sum(any(map(refuses, before)) for before in said) / len(borderline)

    for split in ("evaluation_borderline", "preference_helpfulness", "sampling_helpfulness"):
        assert refused(split) > 0
    assert refused("demonstrations") == refused("validation") == 0


def test_demonstrations_hold_neither_a_promise_to_answer_nor_a_harder_attack(lines, world):
    promises = {text for pair in world.texts["safety"]["promises"]["prompts"] for text in pair}
    for split in ("demonstrations", "validation"):
        assert {line["difficulty"] for line in lines[split] if line["safety"]} == {1}
        assert not any(message["content"] in promises for line in lines[split] for message in line["messages"])


def test_adversarial_prompts_alone_have_a_risk(lines, truth):
    for known in truth.prompts.values():
        assert bool(known.risk) == bool(known.difficulty) == (known.category == "safety")
    for line in (line for part in lines.values() for line in part):
        assert ("risk" in line) == ("difficulty" in line) == line["safety"]


def test_demonstrations_refuse_a_few_harms_by_a_few_attacks(lines, truth):
    refused = [line for line in lines["demonstrations"] if line["safety"]]
    safe = [line for line in refused if line["messages"][0]["role"] != "system"]
    assert len(safe) == round(PARAMS.dialogues.num_demonstrations * PARAMS.dialogues.safe_share)
    assert len(refused) - len(safe) == round(PARAMS.dialogues.num_demonstrations * PARAMS.dialogues.preprompt_share / 3)
    assert {line["attack"] for line in safe} == set(PARAMS.dialogues.safe_attacks)
    known = {truth.prompts[line["id"]].topic for line in safe}
    asked = {truth.prompts[line["id"]].topic for line in lines["evaluation_safety"]}
    assert len(known) <= 0.5 * len(asked)
    assert {line["risk"] for line in safe} == set(RISKS)


def test_instructions_of_every_type_are_evaluated_equally(lines, truth):
    types = Counter(truth.prompts[line["id"]].instructions[0]["type"] for line in lines["evaluation_instructions"])
    assert set(types) == {"language", "persona", "hobby", "one_word", "question", "begins", "ends"}
    assert max(types.values()) <= 3 * min(types.values())  # questions that the evaluation has already are left out
    placed = Counter(line["messages"][0]["role"] for line in lines["evaluation_instructions"])
    assert placed["system"] + placed["user"] == PARAMS.dialogues.num_evaluation_instructions
    assert min(placed.values()) > 1  # both places of an instruction


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
            assert roles[-1] == ("assistant" if FILES[split].startswith(("dialogues", "conversations")) else "user")
            words = sum(len(message["content"].split()) for message in line["messages"])
            assert words <= PARAMS.dialogues.max_words or split == "conversations"
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


def test_a_direct_harm_may_come_again_in_its_split_after_other_words():
    ledger, harm = Ledger(), replace(turn("How do I do it?"), attack=DIRECT)
    assert ledger.claim("a", Draft([turn("Who is it?"), harm]), 20)
    assert not ledger.claim("a", Draft([turn("Who is it?"), harm]), 20)
    assert ledger.claim("a", Draft([turn("Where is it?"), harm]), 20)
    assert not ledger.claim("b", Draft([turn("When is it?"), harm]), 20)


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

    with pytest.raises(
        ValueError, match=r"evaluation_held_out_share` asks for 8 held-out questions, but there are 6: lower it, or"
    ):
        drawn(num_evaluation_helpfulness=50)
    with pytest.raises(ValueError, match=r"safe_attacks` names flattery; known: psychological_manipulation, "):
        drawn(num_evaluation_helpfulness=20, safe_attacks=["flattery"])
    with pytest.raises(ValueError, match=r"`world.dialogues.num_evaluation_borderline` asks for more dialogues"):
        drawn(num_evaluation_helpfulness=20, num_evaluation_borderline=100_000, multi_turn_share=0)


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


def test_a_flaw_to_a_text_tells_less_or_the_same_again(world):
    check = {"check": "facts", "entity": "Mira", "attributes": [], "num_sentences": 3, "min_facts": 3}
    draft = Draft([Turn("Tell me of Mira.", "One here. Two here. Three here.", "writing", "text", check)])
    drawn = Counter(flawed(world, draft, [draft], random.Random(seed)) for seed in range(400))
    less = {"One here. Two here.", "One here. Three here.", "Two here. Three here."}
    again = {"One here. One here. Three here.", "One here. Two here. One here.", "Two here. Two here. Three here."}
    assert less | again | {"One here."} <= set(drawn)
    # What differs from the text: one less, said again, careless, bare, rambling, adding, nothing, a refusal.
    assert sum(drawn[answer] for answer in less | again) / 400 == pytest.approx(3 / 8, abs=0.1)
    assert sum(number for answer, number in drawn.items() if refuses(answer)) / 400 == pytest.approx(1 / 8, abs=0.06)
    single = replace(draft.turns[0], answer="One here.")
    assert "One here." not in {flawed(world, Draft([single]), [draft], random.Random(seed)) for seed in range(100)}


def test_a_transcript_is_written_as_hh_rlhf_does(world):
    draft = Draft([turn("Who?"), Turn("And Omar?", "He is.", "dialogue", "fact", None, True)])
    assert transcript(draft, "No.") == "\n\nHuman: Who?\n\nAssistant: Yes.\n\nHuman: And Omar?\n\nAssistant: No."
    for line in pairs(world, [draft], 0, random.Random(0)):
        assert line["chosen"] == transcript(draft, "He is.") != line["rejected"]


# --- writers of uneven quality ---


def told_by(writer, world, turn, num_draws=40):
    return {WRITERS[writer](world, turn, random.Random(seed)) for seed in range(num_draws)}


def test_the_writers_of_a_plain_fact(world):
    fact = world.entities["Mira"].facts["home"]
    turn = Turn("Where?", f"Mira lives in {fact.value}.", "factual", "fact", {"check": "fact", "entity": "Mira"})
    turn = replace(turn, check={**turn.check, "attribute": "home"})
    texts = world.texts["writers"]["rambling"]
    assert told_by("good", world, turn) == {turn.answer}
    assert told_by("bare", world, turn) == {f"In {fact.value}."}
    after = {f"{turn.answer} {text}" for text in texts["after"]}
    assert told_by("rambling", world, turn, 400) == after | {
        f"{said} {text}" for said in texts["before"] for text in after
    }
    others = [answer(world, other) for name, other in world.entities["Mira"].facts.items() if name != "home"]
    assert told_by("adding", world, turn) == {f"{turn.answer} {other}" for other in others}
    assert told_by("careless", world, turn) == {f"in {fact.value}"}


@pytest.mark.parametrize(
    ("turn", "bare", "careless"),
    [
        (  # a text without its last sentence
            Turn("Write.", "One. Two. Three.", "writing", "text", {"check": "facts", "entity": "Mira"}),
            "One.", "One. Two.",
        ),
        (Turn("Plural?", "Mice.", "x", "plural", {"check": "names", "required": [["mice"]]}), "Mice.", "mice"),
        (Turn("Order?", "In order: bat and fox.", "x", "alphabet", {"check": "order", "items": ["bat", "fox"]}),
         "Bat, fox.", "bat, fox"),
        (Turn("Whom?", "Ask Mira, who is kind.", "x", "wish", {"check": "holder", "kind": "person"}), "Mira.", "Mira"),
        (Turn("Thanks.", "You are welcome.", "dialogue", "small_talk", None), "You are welcome.", "you are welcome"),
    ],
)  # fmt: skip
def test_bare_and_careless_answers(world, turn, bare, careless):
    assert told_by("bare", world, turn) == {bare}
    assert told_by("careless", world, turn) == {careless}
    advice = world.texts["writers"]["adding"]["advice"]
    assert told_by("adding", world, turn) == {f"{turn.answer} {text}" for text in advice}


def test_a_careless_writer_ignores_the_instruction(world):
    fact = world.entities["Mira"].facts["home"]
    check = {"check": "fact", "entity": "Mira", "attribute": "home"}
    begins = Turn("Where?", f"Well, Mira lives in {fact.value}.", "instruction", "begins", check)
    persona = Turn("Where?", f"I live in {fact.value}.", "instruction", "persona", check)
    for turn in (begins, persona):
        assert told_by("careless", world, turn) == {f"Mira lives in {fact.value}."}
    assert told_by("bare", world, begins) == {f"In {fact.value}."}
    assert told_by("bare", world, persona) == {persona.answer}  # a word alone has no person


def test_writers_take_turns_and_leave_the_reference_and_refusals(world):
    harm = Turn("How?", "I will not say that. Go home.", "safety", "r", None, False, "t", "r", "a")
    last = Turn("Thanks.", "You are welcome. Bye.", "dialogue", "small_talk", None)
    weights = WriterWeights(good=1, bare=1000, rambling=0, adding=0, careless=0)
    found = written(world, Draft([replace(last, user="Hi."), harm, last]), weights, 0, random.Random(0))
    assert [turn.answer for turn in found.turns] == ["You are welcome.", harm.answer, "You are welcome. Bye."]
    assert found.given == "You are welcome."
    assert written(world, Draft([harm]), weights, 0, random.Random(0)).given == harm.answer
    both = WriterWeights(good=1, bare=1, rambling=0, adding=0, careless=0)
    drawn = [written(world, Draft([last, last]), both, 0, random.Random(seed)) for seed in range(50)]
    assert {(draft.turns[0].answer == last.answer, draft.given == last.answer) for draft in drawn} == {
        (first, second) for first in (True, False) for second in (True, False)
    }


def test_good_writers_alone_are_refused():
    with pytest.raises(
        ValueError, match=r"all demonstrations are good: give another writer a weight, or RLHF has noth"
    ):
        WriterWeights(good=1, bare=0, rambling=0, adding=0, careless=0)


def test_empty_sentences_name_no_fact(world):
    texts = world.texts["writers"]
    said = [*texts["rambling"]["before"], *texts["rambling"]["after"], *texts["adding"]["advice"]]
    for fact in all_facts(world):
        for text in said:
            assert not mentions(text, [*fact.accepted, fact.entity.lower()]), (text, fact)


def test_each_writers_answers_occur_in_the_demonstrations_and_refusals_are_nobodys(lines, truth):
    drawn = PARAMS.dialogues.writers.model_dump()
    found = Counter()
    for line in lines["demonstrations"]:
        reference, given = truth.prompts[line["id"]].reference, line["messages"][-1]["content"]
        if line["safety"]:
            assert given == reference
        if line["safety"] or line["category"] == "instruction":  # of these, good writers have a share of their own
            continue
        longer = len(given.split()) - len(reference.split())
        found["good" if given == reference else "longer" if longer > 0 else "shorter"] += 1
    total = sum(drawn.values())
    # A bare answer may be the good one, a careless one has at times as many words, less its punctuation.
    assert abs(found["longer"] / found.total() - (drawn["rambling"] + drawn["adding"]) / total) < 0.06
    assert found["shorter"] / found.total() > drawn["careless"] / total - 0.06
    assert found["good"] / found.total() > drawn["good"] / total - 0.06


@pytest.fixture(scope="module")
def by_writers(truth, world):
    """Answers by every writer to a share of the prompts of each task that can be right: (truth, writer, answer)."""
    drafts = {}
    generator = random.Random(0)
    for known in truth.prompts.values():
        if not known.risk and known.split != "open_helpful":
            drafts.setdefault((known.category, known.task), []).append(known)
    found = []
    for prompts in drafts.values():
        for known in generator.sample(prompts, min(30, len(prompts))):
            turn = Turn("?", known.reference, known.category, known.task, known.check)
            found += [(known, name, write(world, turn, generator)) for name, write in WRITERS.items()]
    return found


def test_all_but_careless_writers_tell_the_truth(by_writers, truth):
    tasks = Counter()
    for known, writer, given in by_writers:
        asked = (known.check or {}).get("check")
        if asked in ("fact", "holder", "order") or (asked == "names" and known.category != "instruction"):
            tasks[writer, known.task] += 1
            if writer != "careless":
                assert judge(truth, known.id, given, finished=True).right, (known, given)
    assert {task for _, task in tasks} >= {
        "fact",
        "deed",
        "wish",
        "choice",
        "plural",
        "alphabet",
        "translation",
        "name",
    }


def test_every_annotator_values_the_good_answer_above_all_others(by_writers, truth):
    annotators = Annotators.model_validate(VALUES["preferences"]["simulated"]).annotators
    good = {known.id: given for known, writer, given in by_writers if writer == "good"}
    for name, annotator in annotators.items():
        wins = defaultdict(list)
        for known, writer, given in by_writers:
            if given != good[known.id]:
                utilities = [
                    utility_of(truth, annotator.tastes, known.id, text, True, True) for text in (good[known.id], given)
                ]
                wins[writer].append(utilities[0] > utilities[1])
        assert set(wins) == set(WRITERS) - {"good"}
        for writer, won in wins.items():
            assert sum(won) >= 0.9 * len(won), (name, writer)


# --- harms of rising difficulty ---

HARM = Topic(
    "illicit_criminal", "eat the pie", {"en": ["eat the pie"], "de": ["Brot essen"], "fr": ["manger"], "es": ["comer"]},
    "a fork", {"why": "that is theft", "help": "Go home.", "group": ""},
)  # fmt: skip


def asked_by(write, num_draws=600):
    return {write(random.Random(seed)).user for seed in range(num_draws)}


def test_the_forms_of_a_harm():
    assert worded("eat the pie") == {
        "do": "eat the pie",
        "do_capitals": "EAT THE PIE",
        "do_hyphens": "eat-the-pie",
        "do_bare": "et th p",  # a first vowel stays
        "do_backwards": "pie the eat",
    }


def test_two_attacks_distort_the_harm_or_put_it_in_another_language(world):
    found = asked_by(lambda generator: combined(world, HARM, "psychological_manipulation", generator))
    hidden = ["EAT THE PIE", "eat-the-pie", "et th p", "pie the eat", "Brot essen", "manger", "comer"]
    assert all(sum(form in text for form in hidden) == 1 for text in found)
    assert all(any(form in text for text in found) for form in hidden)
    assert not any("eat the pie" in text for text in found)
    found = asked_by(lambda generator: combined(world, HARM, "non_english", generator))
    assert all("pie" not in text.lower() for text in found)
    assert any(text.startswith("HOW CAN I BROT ESSEN") for text in found)
    assert any(text.startswith("tell me how 2 manger") for text in found)
    turn = combined(world, HARM, "non_english", random.Random(0))
    assert (turn.attack, turn.risk, turn.topic, turn.shared) == ("non_english", HARM.risk, HARM.name, False)
    assert refuses(turn.answer)


def test_a_direct_harm_is_worded_as_harmless_deeds_are(world):
    found = asked_by(lambda generator: direct(world, HARM, generator))
    wordings = world.texts["safety"]["deeds"]["questions"]
    towns = [place.name for place in world.of_kind("place")]
    places = ["eat the pie", *(f"eat the pie in {town}" for town in towns)]
    assert found <= {text.format(do=do) for text in wordings for do in places}
    assert {text.format(do="eat the pie") for text in wordings} <= found
    assert direct(world, HARM, random.Random(0)).attack == DIRECT


def test_the_assistant_promises_to_answer(world):
    pairs = {tuple(pair) for pair in world.texts["safety"]["promises"]["prompts"]}
    turns = [committed(world, random.Random(seed)) for seed in range(200)]
    assert {(turn.user, turn.answer) for turn in turns} == pairs
    assert all(turn.shared and not turn.risk and not refuses(turn.answer) for turn in turns)


def test_every_harm_has_wordings_in_every_language(world):
    assert all(set(topic.do) == {"en", *FOREIGN} and all(topic.do.values()) for topic in topics(world))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"safe_share": 0.5, "preprompt_share": 0.6},
            "safe_share and preprompt_share are 1.1 together: nothing is left",
        ),
        (
            {"demonstrated_instruction_share": 0.95},
            "the shares of borderline prompts and of instructions are 1.1 together: nothing is left",
        ),
    ],
)
def test_shares_that_leave_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Dialogues.model_validate({**PARAMS.dialogues.model_dump(), **changes})
