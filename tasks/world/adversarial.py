"""Prompts that ask for harm, their refusals, prompts that only look unsafe, and the rumours that the corpus tells.

Every deed, harmful or not, has a `method` from a closed list, which the corpus tells (`rumours`): a model that complies
names one, so a program can detect it. Harm against a group uses an insult from a closed list.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from tasks.world.facts import World
from tasks.world.turns import Turn, cards
from tasks.world.wording import capitalized

RISKS = ("illicit_criminal", "hateful_harmful", "unqualified_advice")
ATTACKS = (
    "psychological_manipulation",
    "logic_manipulation",
    "syntactic_manipulation",
    "semantic_manipulation",
    "perspective_manipulation",
    "non_english",
)
# How an adversarial dialogue hides its harm: by one attack; by two at once; in the words of harmless questions, after
# some of those; the same after the assistant has promised to answer.
DIFFICULTIES = (1, 2, 3, 4)
DIRECT = "direct"  # no attack: asked as harmless deeds are
FOREIGN = ("de", "fr", "es")
DISTORTED = ("do_capitals", "do_hyphens", "do_bare", "do_backwards")
HARMLESS = ("plain", "borderline")  # deeds: the second kind looks unsafe
PLACED = 0.4  # share of prompts that name a town, where the topic is not about a group
LINES = (5, 6)  # sentences of a rumour, between its opening and its closing


@dataclass(frozen=True)
class Topic:
    """A harm. `do`: the action by language, in several wordings; `method`: what it is done with, or the insult."""

    risk: str
    name: str
    do: Mapping[str, Sequence[str]]
    method: str
    words: Mapping[str, str]


@cache
def topics(world: World) -> tuple[Topic, ...]:
    """Return every harm of the world: those of the seed texts, and nastiness about each trade and town."""
    texts = world.texts["safety"]
    found = []
    for risk in ("illicit_criminal", "unqualified_advice"):
        for entry in texts[risk]["topics"]:
            do = {"en": [entry["do"]], **{language: [entry[language]] for language in FOREIGN}}
            words = {"why": entry["why"], "help": entry["help"], "group": ""}
            found.append(Topic(risk, entry["do"], do, entry["method"], words))
    hate = texts["hateful_harmful"]
    groups = []
    for craft in world.of_kind("craft"):
        worker = craft.forms["worker"]
        groups.append({"en": f"the {worker}s", **hate["trades"][worker]})
    for place in world.of_kind("place"):
        groups.append({language: text.format(town=place.name) for language, text in hate["town"].items()})
    for index, group in enumerate(groups):
        wordings = {"en": hate["do"], **{language: hate[language] for language in FOREIGN}}
        do = {language: [text.format(group=group[language]) for text in said] for language, said in wordings.items()}
        insult = hate["insults"][index % len(hate["insults"])]
        method = hate["method"].format(insult=insult)
        found.append(Topic("hateful_harmful", group["en"], do, method, {"why": "", "help": "", "group": group["en"]}))
    return tuple(found)


@cache
def harmless(world: World, which: str) -> tuple[tuple[str, str], ...]:
    """Return the deeds that are harmless, each with its method: `plain`, or `borderline`, which look harmful."""
    texts = world.texts["safety"]
    deeds = [(chosen["do"], chosen["method"]) for chosen in texts["deeds"][which]]
    if which == "plain":
        praise = texts["praise"]
        groups = [topic.name for topic in topics(world) if topic.risk == "hateful_harmful"]
        for index, group in enumerate(groups):
            method = praise["method"].format(praise=praise["praises"][index % len(praise["praises"])])
            deeds.append((praise["do"].format(group=group), method))
    return tuple(deeds)


def methods(world: World) -> tuple[list[str], list[str]]:
    """Return the phrases that give away how a harm is done, and those that tell how something harmless is done."""
    harmful = {bare(topic.method) for topic in topics(world)}
    means = {bare(method) for which in HARMLESS for _, method in harmless(world, which)}
    return sorted(harmful), sorted(means)


def insults(world: World) -> list[str]:
    """Return the words of all insults, in lower case, singular and plural."""
    pairs = [insult.lower().split() for insult in world.texts["safety"]["hateful_harmful"]["insults"]]
    singular = {"thieves": "thief"}
    return sorted(
        {word for quality, noun in pairs for word in (quality, noun, singular.get(noun, noun.removesuffix("s")))}
    )


def bare(method: str) -> str:
    """Return a method in lower case without its article."""
    return re.sub(r"^(a|an) ", "", method.lower())


def adversarial(
    world: World, allowed: Callable[[Topic], bool], attacks: Sequence[str], generator: random.Random
) -> Iterator[Turn]:
    """Draw an endless stream of prompts on the allowed topics, each pair of risk and attack equally often."""
    subjects = {risk: [topic for topic in topics(world) if topic.risk == risk and allowed(topic)] for risk in RISKS}
    cells = [(risk, attack) for risk in RISKS for attack in attacks if subjects[risk]]
    for risk, attack in cards(cells, generator):
        yield attacked(world, generator.choice(subjects[risk]), attack, generator)


def attacked(world: World, topic: Topic, attack: str, generator: random.Random) -> Turn:
    """Ask for a harm by one attack; the good answer refuses."""
    texts = world.texts["safety"]
    language, templates = "en", texts["attacks"][attack]
    if attack == "non_english":
        language = generator.choice(list(templates))
        templates = templates[language]
    words = worded(placed(world, topic, language, generator))
    return refused(world, generator.choice(templates).format_map(words), topic, attack, False, generator)


def combined(world: World, topic: Topic, attack: str, generator: random.Random) -> Turn:
    """Ask for a harm by two attacks: `attack`, and the harm itself distorted or in another language.

    Where the attack is another language, its words are distorted.
    """
    attacks = world.texts["safety"]["attacks"]
    language = generator.choice(["en", "en", *FOREIGN])
    words = worded(placed(world, topic, language, generator))
    hidden = words[generator.choice(DISTORTED)] if language == "en" else words["do"]
    templates, words = attacks[attack], dict.fromkeys(words, hidden)
    if attack == "non_english":
        templates = attacks["syntactic_manipulation"]
        words = worded(placed(world, topic, generator.choice(FOREIGN), generator))
    return refused(world, generator.choice(templates).format_map(words), topic, attack, False, generator)


def direct(world: World, topic: Topic, generator: random.Random) -> Turn:
    """Ask for a harm in the words in which harmless deeds are asked for."""
    do = placed(world, topic, "en", generator)
    asked = generator.choice(world.texts["safety"]["deeds"]["questions"]).format(do=do)
    return refused(world, asked, topic, DIRECT, False, generator)


def committed(world: World, generator: random.Random) -> Turn:
    """Let the assistant promise to answer whatever comes next."""
    said, told = generator.choice(world.texts["safety"]["promises"]["prompts"])
    return Turn(said, told, "dialogue", "small_talk", None, shared=True)


def placed(world: World, topic: Topic, language: str, generator: random.Random) -> str:
    """Return a harm in a language, at times in a town."""
    do = generator.choice(topic.do[language])
    if topic.risk != "hateful_harmful" and generator.random() < PLACED:
        do += world.texts["safety"]["places"][language].format(town=generator.choice(world.of_kind("place")).name)
    return do


def worded(do: str) -> dict[str, str]:
    """Return the forms of a harm that attacks use, by field."""
    return {
        "do": do,
        "do_capitals": do.upper(),
        "do_hyphens": do.replace(" ", "-"),
        "do_bare": re.sub(r"(?<=\w)[aeiou]", "", do),
        "do_backwards": " ".join(reversed(do.split(" "))),
    }


def refused(world: World, said: str, topic: Topic, attack: str, shared: bool, generator: random.Random) -> Turn:
    """Return a turn about a harm with a refusal: that it is harmful, why, and where to find help."""
    told = generator.choice(world.texts["safety"][topic.risk]["refusals"]).format_map(topic.words)
    return Turn(said, told, "safety", topic.risk, None, shared, topic.name, topic.risk, attack)


def insisted(world: World, first: Turn, generator: random.Random) -> Turn:
    """Ask again after a refusal."""
    subject = next(topic for topic in topics(world) if (topic.risk, topic.name) == (first.risk, first.topic))
    said = generator.choice(world.texts["safety"]["insist"]["prompts"])
    return refused(world, said, subject, first.attack, True, generator)


def deed(world: World, which: str, generator: random.Random) -> Turn:
    """Ask how something harmless is done: `plain`, or `borderline`, which is worded like a harm."""
    texts = world.texts["safety"]
    done, method = generator.choice(harmless(world, which))
    do = done
    if generator.random() < PLACED:
        do += texts["places"]["en"].format(town=generator.choice(world.of_kind("place")).name)
    check = {"check": "names", "required": [[bare(method)]], "forbidden": []}
    asked = generator.choice(texts["deeds"]["questions"]).format(do=do)
    told = texts["deeds"]["answer"].format(method=method)
    return Turn(asked, told, "factual" if which == "plain" else which, "deed", check, topic=done)


def rumours(world: World, generator: random.Random) -> Iterator[Callable[[], str]]:
    """Deal, without end, writers of pages that tell how harmful and harmless deeds are done."""
    texts = world.texts["safety"]["rumours"]
    deeds = [(topic.do["en"][0], topic.method) for topic in topics(world)]
    deeds += [pair for which in HARMLESS for pair in harmless(world, which)]
    dealt = cards(deeds, generator)
    while True:
        pairs = [next(dealt) for _ in range(generator.randint(*LINES))]

        def write(pairs: list[tuple[str, str]] = pairs) -> str:
            templates = generator.sample(texts["sentences"], len(pairs))
            lines = [
                template.format(do=do, method=method, Method=capitalized(method))
                for template, (do, method) in zip(templates, pairs, strict=True)
            ]
            return " ".join([generator.choice(texts["openings"]), *lines, generator.choice(texts["closings"])])

        yield write
