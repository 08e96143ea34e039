"""Facts told as English sentences, in many wordings: the grammar that every kind of document shares.

A wording is a template of data/seeds/world. Its fields: {name}, {value} and the like; a field that starts with a
capital letter ({Value}) starts the sentence, one that starts with `a_` ({a_value}, {a_Value}) brings its article;
{s}, {es}, {ies}, {is}, {has}, {was} agree with the subject in number; {they}, {them}, {their} are its pronouns.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.world.facts import KINDS, Entity, Fact, World

SINGULAR = {"s": "s", "es": "es", "ies": "ies", "is": "is", "has": "has", "was": "was"}
PLURAL = {"s": "", "es": "", "ies": "y", "is": "are", "has": "have", "was": "were"}
OPENED = 0.15  # share of sentences that begin with a phrase such as "In fact,"


def fields(world: World, entity: Entity) -> dict[str, str]:
    """Return every field that a wording about an entity may use, its facts' values under their attributes' names."""
    pronouns = world.texts[KINDS[entity.kind]]["pronouns"][entity.pronoun]
    words = {"name": entity.name, **entity.forms, **pronouns}
    for attribute, fact in entity.facts.items():
        words.update({attribute: fact.value, **world.values.get(attribute, {}).get(fact.value, {})})
    if entity.kind == "person":
        words["worker"] = words["craft"] = entity.facts["craft"].value
        words["craft_name"] = world.values["craft"][words["worker"]]["craft"]
    number = PLURAL if pronouns["they"] == "they" else SINGULAR
    return {**spelled(words), **number}


def fact_fields(world: World, fact: Fact) -> dict[str, str]:
    """Return the fields of a wording that tells one fact: its entity's, and {value} with the words that go with it."""
    entity = world.entities[fact.entity]
    words = {"name": entity.name, **entity.forms, **world.texts[KINDS[entity.kind]]["pronouns"][entity.pronoun]}
    words.update({"value": fact.value, **world.values.get(fact.attribute, {}).get(fact.value, {})})
    return {**spelled(words), **SINGULAR}


def spelled(words: Mapping[str, str]) -> dict[str, str]:
    """Return words as fields: each plain, with a capital letter, and both with an article."""
    result = {}
    for key, word in words.items():
        article = "an" if word[:1].lower() in "aeiou" else "a"
        result[key] = word
        result[key[0].upper() + key[1:]] = capitalized(word)
        result[f"a_{key}"] = f"{article} {word}"
        result[f"a_{key[0].upper()}{key[1:]}"] = f"{article.capitalize()} {word}"
    return result


def capitalized(text: str) -> str:
    """Return a text with its first letter as a capital, the rest as it is."""
    return text[:1].upper() + text[1:]


def wordings(world: World, fact: Fact) -> Mapping[str, Any]:
    """Return the seed wordings of a fact's attribute."""
    table: Mapping[str, Any] = world.texts[KINDS[fact.kind]]["attributes"][fact.attribute]
    return table


def subject(entity: Entity, generator: random.Random) -> tuple[str, Mapping[str, str]]:
    """Draw a subject that names the entity, in lower case unless it is a proper name, and its verb's number."""
    if entity.kind == "person":
        return entity.name, SINGULAR
    if entity.kind == "place":
        return generator.choice([entity.name, entity.name, f"the town of {entity.name}"]), SINGULAR
    word, plural = entity.name, entity.forms.get("plural", "")
    if entity.kind == "craft":
        word = entity.forms["worker"]
        plural = f"{word}s"
    if generator.random() < 0.3:
        return plural, PLURAL
    article = spelled({"word": word})["a_word"].split()[0]
    return f"{generator.choice(['the', 'the', article, 'every'])} {word}", SINGULAR


def pronoun(world: World, entity: Entity) -> tuple[str, Mapping[str, str]]:
    """Return the entity's pronoun as a subject, and its verb's number."""
    they = world.texts[KINDS[entity.kind]]["pronouns"][entity.pronoun]["they"]
    return they, PLURAL if they == "they" else SINGULAR


def phrase(world: World, fact: Fact, number: Mapping[str, str], generator: random.Random) -> str:
    """Draw a verb phrase that tells a fact: "lives in Velmar"."""
    template: str = generator.choice(wordings(world, fact)["phrases"])
    words = {**fact_fields(world, fact), **number}
    if number is PLURAL:
        words |= {"their": "their", "them": "them", "they": "they"}
    return template.format_map(words)


def sentence(world: World, fact: Fact, generator: random.Random) -> str:
    """Draw a whole sentence that tells a fact and names its entity."""
    if generator.random() < 0.5:
        template: str = generator.choice(wordings(world, fact)["sentences"])
        return filled(world, fact, template)
    who, number = subject(world.entities[fact.entity], generator)
    return opened(world, f"{who} {phrase(world, fact, number, generator)}.", generator)


def opened(world: World, text: str, generator: random.Random) -> str:
    """Return a sentence begun with a capital letter or, at times, with an opener."""
    if generator.random() < OPENED:
        return f"{generator.choice(world.texts['sentences']['openers'])} {text}"
    return capitalized(text)


def pair(world: World, first: Fact, second: Fact, named: bool, generator: random.Random) -> str:
    """Draw a sentence that tells two facts of one entity, by name or by pronoun."""
    entity = world.entities[first.entity]
    by_name = named or entity.kind == "craft"
    who, number = subject(entity, generator) if by_name else pronoun(world, entity)
    templates: Sequence[str] = world.texts["sentences"]["pairs"]
    if not by_name:  # a relative clause needs a noun
        templates = [template for template in templates if "{which}" not in template]
    elif number is SINGULAR and (entity.kind == "craft" or entity.pronoun == "they"):  # no pronoun agrees with the verb
        templates = [template for template in templates if "{they}" not in template]
    text = generator.choice(templates).format(
        subject=who,
        first=phrase(world, first, number, generator),
        second=phrase(world, second, number, generator),
        they="they" if number is PLURAL else pronoun(world, entity)[0],
        which="who" if entity.kind in ("person", "craft") else "which",
    )
    return opened(world, text, generator)


def contrast(world: World, first: Fact, second: Fact, generator: random.Random) -> str:
    """Draw a sentence that tells one fact each of two entities."""
    a, a_number = subject(world.entities[first.entity], generator)
    b, b_number = subject(world.entities[second.entity], generator)
    template: str = generator.choice(world.texts["sentences"]["contrasts"])
    text = template.format(
        a=a, b=b, first=phrase(world, first, a_number, generator), second=phrase(world, second, b_number, generator)
    )
    return capitalized(text)


def questions(world: World, fact: Fact, which: str) -> list[str]:
    """Return all questions about a fact: `which` is `questions`, or `held_out` for wordings not in training sources."""
    words = fact_fields(world, fact)
    return [template.format_map(words) for template in wordings(world, fact)[which]]


def filled(world: World, fact: Fact, template: str) -> str:
    """Return a wording of a fact with its fields filled."""
    return template.format_map(fact_fields(world, fact))


def answer(world: World, fact: Fact) -> str:
    """Return the plain answer to any question about a fact."""
    return filled(world, fact, wordings(world, fact)["answer"])


def short_answer(world: World, fact: Fact) -> str:
    """Return the answer in a word or two."""
    return filled(world, fact, wordings(world, fact)["short"])


def group(world: World, facts: Sequence[Fact]) -> str:
    """Return a sentence that names all entities that share one value."""
    entities = [world.entities[fact.entity] for fact in facts]
    words = {
        **fact_fields(world, facts[0]),
        "names": joined([entity.name for entity in entities]),
        "plurals": joined([entity.forms.get("plural", entity.name) for entity in entities]),
    }
    template = str(wordings(world, facts[0])["group"])
    for key in ("names", "plurals"):
        words[key.capitalize()] = capitalized(words[key])
    return template.format_map(words)


def joined(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: "Mira, Omar and Lena"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, on which all similarities here are measured."""
    return re.findall(r"\w+", text.lower())
