"""Encyclopaedic entries: portraits of one entity, and surveys that compare several."""

from __future__ import annotations

import random

from tasks.world.facts import ATTRIBUTES, KINDS, Entity, Fact, World, mentions
from tasks.world.wording import capitalized, contrast, fields, group, opened, pair, phrase, pronoun, sentence

TITLED = 0.3  # share of entries that begin with a title


def entry(world: World, entity: Entity, generator: random.Random) -> str:
    """Write an entry about one entity: its facts once each in random order, and some of a related entity."""
    texts = world.texts[KINDS[entity.kind]]
    words = fields(world, entity)
    facts = list(entity.facts.values())
    generator.shuffle(facts)
    paragraph = []
    if generator.random() < 0.6:
        lead = generator.choice(texts["leads"]).format_map(words)
        facts = [fact for fact in facts if not mentions(lead, fact.accepted)]
        paragraph.append(lead)
    paragraph += told(world, facts, bool(paragraph), generator)
    fillers = [filler.format_map(words) for filler in generator.sample(texts["fillers"], 2)]
    notes = texts["notes"][entity.pronoun]
    if generator.random() < 0.2:
        fillers[0] = generator.choice(notes)
    for filler in fillers:
        paragraph.insert(generator.randint(1, len(paragraph)), filler)
    paragraphs = [" ".join(paragraph), *related(world, entity, generator)]
    if generator.random() < TITLED:
        title = generator.choice(world.texts["sentences"]["titles"][entity.kind]).format_map(words)
        paragraphs.insert(0, title)
    return "\n\n".join(paragraphs)


def told(world: World, facts: list[Fact], introduced: bool, generator: random.Random) -> list[str]:
    """Tell facts of one entity, one or two per sentence, by its name or, once it is introduced, by pronoun."""
    sentences: list[str] = []
    rest = list(facts)
    while rest:
        fact = rest.pop()
        named = not (introduced or sentences) or generator.random() < 0.5
        entity = world.entities[fact.entity]
        if rest and generator.random() < 0.35:
            sentences.append(pair(world, fact, rest.pop(), named, generator))
        elif named or entity.kind == "craft" or generator.random() < 0.3:
            sentences.append(sentence(world, fact, generator))
        else:
            who, number = pronoun(world, entity)
            sentences.append(opened(world, f"{who} {phrase(world, fact, number, generator)}.", generator))
    return sentences


def related(world: World, entity: Entity, generator: random.Random) -> list[str]:
    """Write a paragraph about an entity that is linked to this one: a person's town, a craft's worker."""
    links = world.texts["sentences"]["links"][entity.kind]
    if entity.kind == "person":
        attribute = generator.choice(sorted(links))
        value = entity.facts[attribute].value
        others = [world.values["craft"][value]["craft"] if attribute == "craft" else value]
    else:
        attribute = "people"
        names = {"place": entity.name, "animal": entity.name, "craft": entity.forms.get("worker")}
        key = {"place": "home", "animal": "animal", "craft": "craft"}[entity.kind]
        others = [p.name for p in world.of_kind("person") if p.facts[key].value == names[entity.kind]]
    if not others:
        return []
    other = world.entities[generator.choice(others)]
    facts = generator.sample(list(other.facts.values()), 3)
    link = generator.choice(links[attribute]).format_map({**fields(world, entity), "other": other.name})
    return [" ".join([capitalized(link), *told(world, facts, False, generator)])]


def survey(world: World, kind: str, generator: random.Random) -> str:
    """Write a comparison of several entities of a kind by two of their attributes."""
    sentences = [generator.choice(world.texts["sentences"]["surveys"][kind])]
    entities = world.of_kind(kind)
    for attribute in generator.sample(ATTRIBUTES[kind], 2):
        some = generator.sample(entities, min(len(entities), 7))
        facts = [entity.facts[attribute] for entity in some]
        while facts:
            fact = facts.pop()
            same = [other for other in facts if other.value == fact.value]
            if same and generator.random() < 0.8:
                sentences.append(group(world, [fact, *same]))
                facts = [other for other in facts if other not in same]
            elif facts and generator.random() < 0.5:
                sentences.append(contrast(world, fact, facts.pop(), generator))
            else:
                sentences.append(sentence(world, fact, generator))
    return " ".join(sentences)
