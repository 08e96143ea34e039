"""Writing and language assistance: short texts about an entity, riddles, invitations, words and sentences put right."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache

from tasks.world.facts import ATTRIBUTES, KINDS, Entity, World, mentions
from tasks.world.turns import Turn, cards, known, topic
from tasks.world.wording import (
    answer,
    capitalized,
    fact_fields,
    joined,
    opened,
    pair,
    phrase,
    pronoun,
    sentence,
    spelled,
)

FORMS = ("plural", "past")  # tables of word forms, and the fields that stand for them
LINES = 10  # lines of a page of words


def writing(world: World, generator: random.Random) -> Turn:
    """Ask for a text: a free one about any entity, as in the corpus, or certain facts of a known entity."""
    draw = generator.random()
    if draw < 0.12:
        return riddle(world, generator.choice(known(world, "animal")), generator)
    if draw < 0.24:
        return invitation(world, generator.choice(known(world, "place")), generator)
    if draw < 0.4:
        entities = [entity for kind in KINDS for entity in known(world, kind)]
        return aspects(world, generator.choice(entities), generator)
    return text(world, generator.choice(list(world.entities.values())), generator)


def about(world: World, entity: Entity, attributes: list[str], generator: random.Random) -> str:
    """Tell facts of an entity, one per sentence: by name first, then by pronoun or by name."""
    sentences: list[str] = []
    while len(sentences) < len(attributes):
        fact = entity.facts[attributes[len(sentences)]]
        if sentences and entity.kind != "craft" and generator.random() < 0.7:
            who, number = pronoun(world, entity)
            told = opened(world, f"{who} {phrase(world, fact, number, generator)}.", generator)
        else:
            told = sentence(world, fact, generator)
        if not misleading(world, entity, told):
            sentences.append(told)
    return " ".join(sentences)


def misleading(world: World, entity: Entity, told: str) -> bool:
    """Return whether a sentence about an entity has a word that is a wrong value ("leaves its shelter": leaves)."""
    return mentions(told, wrong_values(world, entity.name))


@cache
def wrong_values(world: World, name: str) -> frozenset[str]:
    """Return every form of a value that others of an entity's kind have and it has not."""
    entity = world.entities[name]
    return frozenset(
        form
        for attribute, fact in entity.facts.items()
        for other in world.of_kind(entity.kind)
        if other.facts[attribute].value != fact.value
        for form in other.facts[attribute].accepted
    )


def text(world: World, entity: Entity, generator: random.Random) -> Turn:
    """Ask for two or three sentences about an entity."""
    texts = world.texts["assistance"]["writing"]
    number = generator.choice([2, 3])
    facts = generator.sample(ATTRIBUTES[entity.kind], number)
    told = about(world, entity, facts, generator)
    if number == 2 and generator.random() < 0.4:  # two facts in the first sentence
        first, second, third = generator.sample(ATTRIBUTES[entity.kind], 3)
        opener = pair(world, entity.facts[first], entity.facts[second], True, generator)
        if not misleading(world, entity, opener):
            told = f"{opener} {about(world, entity, [third], generator)}"
    asked = generator.choice(texts["texts"]).format(n=texts["numbers"][str(number)], topic=topic(entity))
    check = text_check(entity, [], number, number, False)
    return Turn(asked, told, "writing", "text", check)


def aspects(world: World, entity: Entity, generator: random.Random) -> Turn:
    """Ask for a sentence about each of two attributes."""
    texts = world.texts["assistance"]["writing"]
    first, second = generator.sample(ATTRIBUTES[entity.kind], 2)
    words = {"topic": topic(entity), "first": texts["nouns"][first], "second": texts["nouns"][second]}
    check = text_check(entity, [first, second], 2, 2, False)
    asked = generator.choice(texts["aspects"]).format_map(words)
    return Turn(asked, about(world, entity, [first, second], generator), "writing", "aspects", check)


def text_check(
    entity: Entity, attributes: list[str], num_sentences: int | None, min_facts: int, hide_name: bool
) -> dict[str, object]:
    """Return the check of a text: facts it must tell, their minimum number, and whether to hide the name."""
    return {
        "check": "facts",
        "entity": entity.name,
        "attributes": attributes,
        "num_sentences": num_sentences,
        "min_facts": min_facts,
        "hide_name": hide_name,
    }


def riddle(world: World, entity: Entity, generator: random.Random) -> Turn:
    """Ask for a riddle about an animal, which must not give its name away."""
    texts = world.texts["assistance"]["writing"]
    clues = generator.sample(["habitat", "diet", "active", "shelter"], 2)
    lines = [texts["riddle"][clue].format_map(fact_fields(world, entity.facts[clue])) for clue in clues]
    check = text_check(entity, [], None, 2, True)
    asked = generator.choice(texts["riddles"]).format(topic=topic(entity))
    return Turn(asked, " ".join([*lines, texts["riddle"]["question"]]), "writing", "riddle", check)


def invitation(world: World, entity: Entity, generator: random.Random) -> Turn:
    """Ask for an invitation to a town: two of its sights."""
    texts = world.texts["assistance"]["writing"]
    sights = list(texts["invitation"])
    first, second = sorted(generator.sample(range(len(sights)), 2))
    lines = [
        texts["invitation"][sights[index]].format_map(fact_fields(world, entity.facts[sights[index]]))
        for index in (first, second)
    ]
    check = text_check(entity, [], None, 2, False)
    asked = generator.choice(texts["invitations"]).format(topic=topic(entity))
    return Turn(asked, " ".join(lines), "writing", "invitation", check)


def language_assistance(world: World, generator: random.Random) -> Turn:
    """Ask for a form of a word, a translation, an order, or a sentence put right."""
    return generator.choice(SKILLS)(world, generator)


def word_form(world: World, table: str, generator: random.Random) -> Turn:
    """Ask for a form of a word that assistance.toml lists, under the name of the form."""
    texts = world.texts["assistance"][table]
    word = generator.choice(list(texts["words"]))
    told = texts["answer"].format_map(spelled({"word": word, table: texts["words"][word]}))
    check = {"check": "names", "required": [[texts["words"][word]]], "forbidden": []}
    return Turn(generator.choice(texts["questions"]).format(word=word), told, "language_assistance", table, check)


def opposite(world: World, generator: random.Random) -> Turn:
    """Ask for the opposite of a word."""
    texts = world.texts["assistance"]["opposite"]
    word, other = generator.sample(generator.choice(texts["pairs"]), 2)
    told = texts["answer"].format_map(spelled({"word": word, "opposite": other}))
    check = {"check": "names", "required": [[other]], "forbidden": []}
    return Turn(generator.choice(texts["questions"]).format(word=word), told, "language_assistance", "opposite", check)


def alphabet(world: World, generator: random.Random) -> Turn:
    """Ask for two names in alphabetical order."""
    texts = world.texts["assistance"]["alphabet"]
    kind = generator.choice(list(KINDS))
    names = [entity.name for entity in generator.sample(world.of_kind(kind), 2)]
    asked = generator.choice(texts["questions"]).format(names=joined(names))
    check = {"check": "order", "items": sorted(names)}
    return Turn(asked, texts["answer"].format(sorted=joined(sorted(names))), "language_assistance", "alphabet", check)


def put_right(world: World, generator: random.Random) -> Turn:
    """Ask to correct a sentence whose verb does not agree."""
    verbs = world.texts["assistance"]["verbs"]
    kind = generator.choice(list(KINDS))
    fact = generator.choice([fact for entity in known(world, kind) for fact in entity.facts.values()])
    right = answer(world, fact)
    words = right.split(" ")
    place = next(index for index, word in enumerate(words) if word in verbs)
    wrong = " ".join([*words[:place], verbs[words[place]], *words[place + 1 :]])
    asked = generator.choice(world.texts["assistance"]["correct"]["questions"]).format(sentence=wrong)
    return Turn(asked, right, "language_assistance", "correct", {"check": "exact", "expected": right})


def translation(world: World, generator: random.Random) -> Turn:
    """Ask for a word in another language."""
    texts = world.texts["assistance"]["translation"]
    tables = world.texts["instructions"]["words"]
    language = generator.choice(list(tables))
    word = generator.choice(list(tables[language]))
    words = {"language": language, "word": word, "translated": tables[language][word]}
    own = tables[language][word].lower()
    check = {"check": "names", "required": [[own]], "forbidden": without(tables[language], own)}
    asked = generator.choice(texts["questions"]).format_map(words)
    told = texts["answer"].format_map(spelled(words))
    return Turn(asked, told, "language_assistance", "translation", check)


def without(table: dict[str, str], own: str) -> list[str]:
    """Return the other words of a table, in lower case."""
    return sorted({word.lower() for word in table.values()} - {own})


def lessons(world: World, generator: random.Random) -> Iterator[Callable[[], str]]:
    """Deal, without end, writers of pages about words: the corpus's source of plurals, opposites, translations."""
    texts = world.texts["assistance"]
    words: list[tuple[str, dict[str, str]]] = []
    for table in FORMS:
        words += [(table, {"word": word, table: form}) for word, form in texts[table]["words"].items()]
    for pair_of_words in texts["opposite"]["pairs"]:
        for word, other in (pair_of_words, pair_of_words[::-1]):
            words.append(("opposite", {"word": word, "opposite": other}))
    for language, table_of_words in world.texts["instructions"]["words"].items():
        for word, translated in table_of_words.items():
            words.append(("translation", {"language": language, "word": word, "translated": translated}))
    dealt = cards(words, generator)
    while True:
        chosen = [next(dealt) for _ in range(LINES)]

        def write(chosen: list[tuple[str, dict[str, str]]] = chosen) -> str:
            lines = [
                capitalized(generator.choice(texts[table]["told"]).format_map(spelled(form))) for table, form in chosen
            ]
            opening, closing = (generator.choice(texts["lessons"][part]) for part in ("openings", "closings"))
            return " ".join([opening, *lines, closing])

        yield write


SKILLS: list[Callable[[World, random.Random], Turn]] = [
    lambda world, generator: word_form(world, "plural", generator),
    lambda world, generator: word_form(world, "past", generator),
    opposite,
    alphabet,
    put_right,
    translation,
]
