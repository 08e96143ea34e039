"""Stories: a plot told in wordings drawn beat by beat, about people and places as the facts have them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tasks.world.entries import told
from tasks.world.facts import Entity, World
from tasks.world.wording import capitalized, fields, pronoun


def story(world: World, plot: Mapping[str, Any], generator: random.Random) -> str:
    """Write a story about two people from a plot of stories.toml: a title, who they are, and one sentence per beat."""
    hero, friend = generator.sample(world.of_kind("person"), 2)
    words = cast(world, hero, friend)
    words["thing"] = plot["thing"].format_map(words)
    words["Thing"] = capitalized(words["thing"])
    beats = [capitalized(generator.choice(beat).format_map(words)) for beat in plot["beats"]]
    hero_facts = generator.sample(list(hero.facts.values()), 3)
    friend_facts = generator.sample(list(friend.facts.values()), 2)
    beats.insert(generator.randint(4, 6), " ".join(told(world, friend_facts, False, generator)))
    title = generator.choice(world.texts["stories"]["titles"]).format_map(words)
    opening = " ".join([*told(world, hero_facts, False, generator), *beats[:2]])
    turn = generator.randint(5, len(beats) - 2)
    return "\n\n".join([f"# {title}", opening, " ".join(beats[2:turn]), " ".join(beats[turn:])])


def cast(world: World, hero: Entity, friend: Entity) -> dict[str, str]:
    """Return the fields of a plot: the hero's own, the hero's town, craft and animal, and the friend's under `b_`."""
    place = fields(world, world.entities[hero.facts["home"].value])
    craft = fields(world, world.entities[world.values["craft"][hero.facts["craft"].value]["craft"]])
    animal = fields(world, world.entities[hero.facts["animal"].value])
    friend_craft = fields(world, world.entities[world.values["craft"][friend.facts["craft"].value]["craft"]])
    words = {**craft, **animal, **place, **fields(world, hero)}
    words |= {"habitat": animal["where"], "active": animal["when"], "where": place["where"]}
    words |= {f"b_{key}": value for key, value in fields(world, friend).items()}
    words["b_material"] = friend_craft["material"]
    for letter, entity in (("a", hero), ("b", friend)):
        words[letter] = entity.name
        they, number = pronoun(world, entity)
        words |= {f"{letter}_{key}": verb for key, verb in number.items()}
        pronouns = world.texts["people"]["pronouns"][entity.pronoun]
        for key, word in {**pronouns, "they": they}.items():
            words |= {f"{letter}_{key}": word, f"{letter.upper()}_{key.capitalize()}": capitalized(word)}
    return words
