"""Plant dirt in the corpus, each piece with its label: the truth that cleaning is scored against.

A document carries at most one kind of dirt, so that every label stands for itself. Web pages, whose text must be
extracted first, get no duplicates and no broken Unicode.
"""

from __future__ import annotations

import html.entities
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import Field

from tasks.running.params import Section
from tasks.world import personal_data
from tasks.world.documents import Document, Shingles, distinct, pristine, shingles, similarity
from tasks.world.facts import World

Sources = dict[str, list[Document]]
LONG = ("encyclopedia", "stories", "howto", "dialogue")  # sources that get whole documents of dirt
LINES = ("encyclopedia", "arithmetic")  # JSON lines that can be cut off
ATTEMPTS = 200  # draws of one near-duplicate
COPIES = (1, 1, 1, 2, 3)  # copies of a duplicated document, drawn evenly
CONTACT = {"email": "writes from", "phone": "has the number", "card": "pays with card", "ip": "logs in from"}
SYNONYMS = {
    "many": "lots of",
    "old": "ancient",
    "small": "little",
    "good": "fine",
    "often": "frequently",
    "house": "dwelling",
    "town": "village",
    "people": "folk",
    "every": "each",
    "known": "recognised",
    "market": "fair",
    "work": "labour",
    "with": "alongside",
    "long": "lengthy",
    "the": "this",
}


class Dirt(Section):
    """How much dirt is planted: shares of the number of clean documents, unless said otherwise."""

    duplicates: float = Field(ge=0, le=0.2, description="documents copied exactly, 1 to 3 times each")
    near_duplicates: float = Field(ge=0, le=0.2, description="documents copied 1 to 3 times with small changes")
    boilerplate: float = Field(ge=0, le=0.2, description="documents with cookie banners or calls to subscribe")
    personal_data: float = Field(ge=0, le=0.2, description="documents with a single e-mail, phone, card or IP address")
    personal_data_rich: float = Field(ge=0, le=0.2, description="further documents full of personal data")
    look_alikes: float = Field(ge=0, le=0.2, description="documents with version numbers, dates, ISBNs, unlabelled")
    toxic: float = Field(ge=0, le=0.2, description="documents with an insult")
    languages: float = Field(ge=0, le=0.2, description="further documents in other languages")
    broken_unicode: float = Field(ge=0, le=0.2, description="documents whose encoding is broken")
    low_quality: float = Field(ge=0, le=0.2, description="further documents that are not text: symbols, repetition")
    malformed: float = Field(ge=0, lt=0.01, description="cut-off lines, as a share of the lines of a JSON-lines file")
    near_duplicate_similarity_min: float = Field(
        gt=0.5, lt=1, description="minimum Jaccard similarity of word 3-grams of planted near-duplicates"
    )


def plant(world: World, sources: Sources, dirt: Dirt, similarity_max: float, generator: random.Random) -> None:
    """Plant all dirt in the sources, in place, and shuffle each source."""
    total = sum(len(documents) for documents in sources.values())

    def count(share: float) -> int:
        return round(total * share)

    add_languages(world, sources, count(dirt.languages), similarity_max, generator)
    add_low_quality(world, sources, count(dirt.low_quality), similarity_max, generator)
    add_contact_lists(world, sources, count(dirt.personal_data_rich), generator)
    paged = [document for documents in sources.values() for document in documents]
    texts = [document for name in (*LONG, "arithmetic", "lists") for document in sources[name]]
    lines = world.texts["dirt"]
    for document in chosen(paged, count(dirt.boilerplate), generator):
        plant_boilerplate(document, lines["boilerplate"], generator)
    for document in chosen(paged, count(dirt.toxic), generator):
        line = generator.choice(lines["toxic"])
        document.text = with_sentence(document.text, line, generator)
        document.labels.append({"kind": "toxic", "lines": [line]})
    for document in chosen(paged, count(dirt.personal_data), generator):
        plant_personal_data(world, document, generator)
    for document in chosen(paged, count(dirt.look_alikes), generator):
        line = look_alike(world, generator.choice(lines["look_alikes"]), generator)
        document.text = with_sentence(document.text, line, generator)
        document.labels.append({"kind": "look_alike", "lines": [line]})
    for document in chosen(texts, count(dirt.broken_unicode), generator):
        break_unicode(document, lines["accents"], generator)
    copied = chosen(texts, count(dirt.duplicates), generator)
    add_copies(sources, "duplicate", copied, lambda group: group[0], generator)
    changed = chosen(texts, count(dirt.near_duplicates), generator)
    minimum = dirt.near_duplicate_similarity_min
    add_copies(sources, "near_duplicate", changed, lambda group: altered(group, minimum, generator), generator)
    for name in LINES:
        for _ in range(int(len(sources[name]) * dirt.malformed)):
            text = generator.choice(sources[name]).text[: generator.randint(40, 90)]
            sources[name].append(Document(text, [{"kind": "malformed"}], malformed=True))
    for documents in sources.values():
        generator.shuffle(documents)


def chosen(documents: Sequence[Document], count: int, generator: random.Random) -> list[Document]:
    """Draw `count` documents in which nothing is planted yet.

    Raises ValueError when there are too few.
    """
    clean = pristine(documents)
    if count > len(clean):
        raise ValueError(
            f"params.yaml: `world.dirt` needs {count} more clean documents but finds {len(clean)}: lower a share"
        )
    return generator.sample(clean, count)


def with_sentence(text: str, sentence: str, generator: random.Random) -> str:
    """Return a text with a sentence added at the end of one of its paragraphs (not of its title)."""
    paragraphs = text.split("\n\n")
    places = [index for index, paragraph in enumerate(paragraphs) if paragraph.endswith((".", "?", "!", '"'))]
    place = generator.choice(places)
    joint = "\n" if "\n" in paragraphs[place] else " "
    paragraphs[place] += f"{joint}{sentence}"
    return "\n\n".join(paragraphs)


def plant_boilerplate(document: Document, lines: Sequence[str], generator: random.Random) -> None:
    """Put one or two lines of boilerplate before or after the text."""
    drawn = generator.sample(lines, generator.randint(1, 2))
    parts = [document.text]
    for line in drawn:
        parts.insert(generator.choice([0, len(parts)]), line)
    document.text = "\n\n".join(parts)
    document.labels.append({"kind": "boilerplate", "lines": drawn})


def personal_value(world: World, kind: str, generator: random.Random) -> dict[str, str]:
    """Draw one piece of personal data, in the form of a label."""
    names = [person.name for person in world.of_kind("person")]
    return {"type": kind, "value": personal_data.KINDS[kind](names, generator)}


def plant_personal_data(world: World, document: Document, generator: random.Random) -> None:
    """Add one sentence with one piece of personal data."""
    kind = generator.choice(list(personal_data.KINDS))
    found = personal_value(world, kind, generator)
    line = generator.choice(world.texts["dirt"]["personal_data"][kind]).format(value=found["value"])
    document.text = with_sentence(document.text, line, generator)
    document.labels.append({"kind": "personal_data", "values": [found]})


def look_alike(world: World, template: str, generator: random.Random) -> str:
    """Fill a sentence with numbers that are not personal data."""
    handle = "_".join(generator.choice(world.of_kind(kind)).name.lower() for kind in ("place", "animal"))
    template = template.replace("{long}", personal_data.long_number(generator)).replace("{handle}", handle)
    limits = {"{n}": (1, 99), "{d}": (1, 9), "{p}": (1, 9), "{d0}": (1, 5)}
    for slot, (low, high) in limits.items():
        while slot in template:
            template = template.replace(slot, str(generator.randint(low, high)), 1)
    return template


def add_contact_lists(world: World, sources: Sources, count: int, generator: random.Random) -> None:
    """Add documents that are lists of people with two pieces of personal data each."""
    for _ in range(count):
        found: list[dict[str, str]] = []
        lines = [f"Members of the guild of {generator.choice(world.of_kind('craft')).name}, for the office only."]
        for person in generator.sample(world.of_kind("person"), 6):
            first, second = (
                personal_value(world, kind, generator) for kind in generator.sample(list(personal_data.KINDS), 2)
            )
            told = " and ".join(f"{CONTACT[value['type']]} {value['value']}" for value in (first, second))
            lines.append(f"{person.name} in {person.facts['home'].value} {told}.")
            found += [first, second]
        label = {"kind": "personal_data_rich", "values": found}
        sources[generator.choice(LONG)].append(Document("\n".join(lines), [label]))


def add_languages(world: World, sources: Sources, count: int, similarity_max: float, generator: random.Random) -> None:
    """Add documents in other languages, the same number of each."""
    languages = list(world.texts["languages"])
    buckets: dict[str, list[Shingles]] = {language: [] for language in languages}
    for index in range(count):
        language = languages[index % len(languages)]
        write = partial(foreign, world, language, generator)
        document = distinct(write, buckets[language], similarity_max, "dirt.languages")
        document.labels.append({"kind": "language", "language": language})
        sources[generator.choice(LONG)].append(document)


def foreign(world: World, language: str, generator: random.Random) -> str:
    """Write a text in another language from some of its seed sentences, in any order."""
    sentences = generator.sample(world.texts["languages"][language], generator.randint(7, 9))
    a, b = (person.name for person in generator.sample(world.of_kind("person"), 2))
    return " ".join(line.format(a=a, b=b, n=generator.randint(2, 20)) for line in sentences)


def add_low_quality(
    world: World, sources: Sources, count: int, similarity_max: float, generator: random.Random
) -> None:
    """Add documents that no quality rule should let through."""
    texts = world.texts["dirt"]["low_quality"]
    names = list(world.entities)

    def few(items: Sequence[str], low: int, high: int) -> list[str]:
        return [generator.choice(items) for _ in range(generator.randint(low, high))]

    def short() -> str:
        return f"{generator.choice(names)}, page {generator.randint(100, 999)}: {generator.choice(texts['short'])}"

    defects: dict[str, Callable[[], str]] = {
        "symbols": lambda: " ".join(f"{generator.choice(texts['symbols'])} {name}" for name in few(names, 40, 70)),
        "repetition": lambda: "\n".join([" ".join(few(texts["words"] + names, 5, 7))] * generator.randint(12, 20)),
        "short": short,
        "capitals": lambda: " ".join(few([*texts["words"], *names], 60, 90)).upper(),
        "ellipsis": lambda: "\n".join(f"{' '.join(few(names, 5, 7))} ..." for _ in range(12)),
        "numbers": lambda: "\n".join(" ".join(str(generator.randint(1, 9999)) for _ in range(8)) for _ in range(10)),
    }
    buckets: dict[str, list[Shingles]] = {defect: [] for defect in defects}
    for index in range(count):
        defect = list(defects)[index % len(defects)]
        document = distinct(defects[defect], buckets[defect], similarity_max, "dirt.low_quality")
        document.labels.append({"kind": "low_quality", "defect": defect})
        sources[generator.choice(LONG)].append(document)


def break_unicode(document: Document, accents: Sequence[str], generator: random.Random) -> None:
    """Add sentences with letters outside ASCII, then damage the text as real files are damaged."""
    text = document.text
    for sentence in generator.sample(accents, 2):
        text = with_sentence(text, sentence, generator)
    damage: dict[str, Callable[[str], str]] = {
        "utf-8 read as latin-1": lambda right: right.encode().decode("latin-1"),
        "utf-8 read as cp1252": lambda right: right.encode().decode("cp1252"),
        "html entities": with_entities,
        "byte order mark": lambda right: f"\ufeff{right}",
        "control characters": lambda right: with_control_characters(right, generator),
    }
    kind = generator.choice(list(damage))
    document.text = damage[kind](text)
    document.labels.append({"kind": "broken_unicode", "damage": kind, "repaired": text})


def with_entities(text: str) -> str:
    """Return a text with HTML entities for the letters outside ASCII."""
    names = {code: name for code, name in html.entities.codepoint2name.items() if code > 127}
    return "".join(f"&{names[ord(letter)]};" if ord(letter) in names else letter for letter in text)


def with_control_characters(text: str, generator: random.Random) -> str:
    """Return a text with control characters between some of its letters."""
    for _ in range(5):
        place = generator.randint(1, len(text) - 1)
        text = text[:place] + generator.choice("\x01\x02\x07\x08\x0e\x1f\x7f") + text[place:]
    return text


def add_copies(
    sources: Sources,
    kind: str,
    originals: Sequence[Document],
    copy: Callable[[list[str]], str],
    generator: random.Random,
) -> None:
    """Copy documents 1 to 3 times into sources of long texts, and label the whole group, the first included."""
    for number, document in enumerate(originals):
        group = [document.text]
        label: dict[str, Any] = {"kind": kind, "group": f"{kind}-{number}"}
        document.labels.append(dict(label))
        for _ in range(generator.choice(COPIES)):
            group.append(copy(group))
            sources[generator.choice(LONG)].append(Document(group[-1], [dict(label)]))


def altered(group: Sequence[str], similarity_min: float, generator: random.Random) -> str:
    """Return the first text of a group with one or two small changes, still similar to all of the group.

    Raises ValueError, naming the parameter, when no change is small enough.
    """
    known = [shingles(text) for text in group]
    edits: Mapping[str, Callable[[str], str]] = {
        "word": lambda text: with_synonym(text, generator),
        "sentence": lambda text: without_sentence(text, generator),
        "case": lambda text: with_capitals(text, generator),
        "punctuation": lambda text: with_punctuation(text, generator),
    }
    for _ in range(ATTEMPTS):
        text = group[0]
        for edit in generator.sample(list(edits), generator.randint(1, 2)):
            text = edits[edit](text)
        own = shingles(text)
        if text not in group and all(similarity(own, other) >= similarity_min for other in known):
            return text
    raise ValueError(
        f"params.yaml: `world.dirt.near_duplicate_similarity_min` is {similarity_min}: no small change keeps a copy "
        "that similar; lower it"
    )


def with_synonym(text: str, generator: random.Random) -> str:
    """Replace one word with another of about the same meaning."""
    words = text.split(" ")
    places = [index for index, word in enumerate(words) if word in SYNONYMS]
    if places:
        place = generator.choice(places)
        words[place] = SYNONYMS[words[place]]
    return " ".join(words)


def without_sentence(text: str, generator: random.Random) -> str:
    """Leave out one sentence."""
    sentences = text.split(". ")
    if len(sentences) > 3:
        del sentences[generator.randrange(1, len(sentences) - 1)]
    return ". ".join(sentences)


def with_capitals(text: str, generator: random.Random) -> str:
    """Write a few words in capital letters."""
    words = text.split(" ")
    for place in generator.sample(range(len(words)), 3):
        words[place] = words[place].upper()
    return " ".join(words)


def with_punctuation(text: str, generator: random.Random) -> str:
    """Change commas, or the marks at the ends of sentences."""
    old, new = generator.choice([(",", ""), (".", "!"), (". ", ".  "), (", ", " - ")])
    return text.replace(old, new, generator.randint(1, 4))
