"""Write the embedded stand-in for the outside world: a corpus of known truth, with labelled dirt.

Reads the seed texts data/seeds/world/*.toml (committed). Writes below data/world:

- corpus/encyclopedia.jsonl.gz  entries about people, places, animals and crafts, and surveys of them
- corpus/stories/*.md           stories in which the facts occur
- corpus/howto.csv              instructions, rumours of how to do harmful and harmless things, pages of words
- corpus/dialogue.parquet       questions and answers about the entities that are not held out, and small talk
- corpus/arithmetic.jsonl.zst   small sums, comparisons, counting
- corpus/lists/*.txt            lists
- corpus/web.warc.gz            HTML pages: entries, stories and instructions inside navigation and banners
- corpus/questions.jsonl        validation only: questions about held-out entities, in wordings that occur nowhere else
- corpus/labels.jsonl           what is planted where; truth for scoring the cleaning, never for cleaning itself
- truth/facts.jsonl             every fact (tasks/world/facts.py reads it and judges answers)
- truth/questions.jsonl         the held-out questions one by one, with their entity, attribute and answer
- dialogues/                    demonstrations.jsonl to fine-tune on, validation.jsonl to validate on
- prompts/preference_*          helpfulness.jsonl, safety.jsonl: prompts for the preferences of all rounds
- prompts/sampling_*            helpfulness.jsonl, safety.jsonl: prompts for the rejection sampling of all rounds
- evaluation/                   helpfulness.jsonl (held-out questions among them), safety.jsonl, borderline.jsonl,
                                instructions.jsonl: prompts to measure models with
- preferences/                  helpful.jsonl, harmless.jsonl: open-source pairs, in HH-RLHF's format
- truth/prompts.jsonl           what makes an answer to each of these right (tasks/world/judge.py reads it)
- truth/words.json              names of entities, methods of harm, insults: what the judge looks for

The corpus replaces the mixture of public sources in section 2.1 of LLaMA (2023) and Llama 2 (2023), the dialogues
replace those of sections 3.1, 3.2 and 4.2 to 4.3 of Llama 2.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from tasks.running.files import read_lines, write_lines
from tasks.running.params import Section
from tasks.running.stage import Stage, start
from tasks.world import files
from tasks.world.adversarial import rumours
from tasks.world.arithmetic import exercises, lists
from tasks.world.assistance import lessons
from tasks.world.dialogue import dialogue, held_out_questions, mannered, participants
from tasks.world.dirt import Dirt, Sources, plant
from tasks.world.documents import Document, Shingles, distinct
from tasks.world.entries import entry, survey
from tasks.world.facts import KINDS, SEEDS, Fact, World, all_facts, build_world, read_texts, write_facts
from tasks.world.howto import howto, subjects
from tasks.world.instructions import manners
from tasks.world.judge import normalized
from tasks.world.sizes import Dialogues
from tasks.world.splits import DEMONSTRATED, FILES, write_dialogues
from tasks.world.stories import story

Buckets = dict[tuple[str, ...], list[Shingles]]  # documents on one subject, which must differ


class Params(Section):
    """Size of the world, of its corpus, and its dirt."""

    num_people: int = Field(ge=8, description="people")
    num_places: int = Field(ge=4, description="towns")
    num_animals: int = Field(ge=4, description="animals")
    num_crafts: int = Field(ge=4, description="crafts")
    held_out_share: float = Field(gt=0, lt=1, description="share of each kind of entity that no dialogue asks about")
    num_entries: int = Field(gt=0, description="encyclopaedic entries")
    num_surveys: int = Field(gt=0, description="encyclopaedic comparisons of several entities")
    num_stories: int = Field(gt=0, description="stories, one file each")
    num_howtos: int = Field(gt=0, description="how-to texts")
    num_rumours: int = Field(gt=0, description="pages of rumours: how to do harmful and harmless things")
    num_lessons: int = Field(gt=0, description="pages of words: plurals, opposites, words in other languages")
    num_dialogues: int = Field(gt=0, description="dialogues of 5 to 8 questions")
    num_mannered: int = Field(gt=0, description="dialogues of 6 to 24 questions, all answered in the same manner")
    num_arithmetic: int = Field(gt=0, description="pages of small arithmetic problems")
    num_lists: int = Field(gt=0, description="pages of lists, one file each")
    num_pages: int = Field(gt=0, description="HTML pages in a WARC file")
    similarity_max: float = Field(
        gt=0, lt=0.7, description="Jaccard similarity of word 3-grams that two documents on one subject stay below"
    )
    dirt: Dirt = Field(description="planted dirt")
    dialogues: Dialogues = Field(description="dialogues and prompts for the stages after pretraining")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Write the corpus, its labels and the truth."""
    params = stage.params

    def generator(purpose: str) -> random.Random:
        # One generator per purpose: changing the size of one source leaves the others as they were.
        return random.Random(f"{stage.seed}/{purpose}")

    counts = dict(
        zip(KINDS, (params.num_people, params.num_places, params.num_animals, params.num_crafts), strict=True)
    )
    world = build_world(read_texts(SEEDS), counts, params.held_out_share, generator("facts"))
    write_facts(stage.output / "truth" / "facts.jsonl", all_facts(world))
    asked = ask(world, generator("questions"))
    write_questions(stage.output / "truth" / "questions.jsonl", asked)
    held_out = [(fact, question) for _, questions in asked for fact, question, _ in questions]
    written = write_dialogues(stage.output, world, params.dialogues, held_out, generator)

    sources = write_sources(world, params, generator)
    write_vocabulary(stage.output / "truth", sources)
    plant(world, sources, params.dirt, params.similarity_max, generator("dirt"))
    corpus = stage.output / "corpus"
    corpus.mkdir()
    placed = files.write_pages(corpus, "web", sources["web"], world.texts["dirt"]["pages"], generator("pages"))
    for name, write in files.WRITERS.items():
        placed += write(corpus, name, sources[name])
    files.write_lines(corpus, "questions", [Document(interview) for interview, _ in asked])
    write_labels(corpus / "labels.jsonl", placed)

    figures: Counter[str] = Counter()
    for name, documents in sources.items():
        figures[f"documents/{name}"] = len(documents)
        figures[f"characters/{name}"] = sum(len(document.text) for document in documents)
        figures.update(documents=figures[f"documents/{name}"], characters=figures[f"characters/{name}"])
        for document in documents:
            figures.update(f"labels/{label['kind']}" for label in document.labels)
    figures.update({f"dialogues/{split}": number for split, number in written.items()})
    figures["entities"] = len(world.entities)
    figures["facts"] = len(all_facts(world))
    figures["held_out_questions"] = sum(len(questions) for _, questions in asked)
    return {name: float(figure) for name, figure in sorted(figures.items())}


def write_sources(world: World, params: Params, generator: Callable[[str], random.Random]) -> Sources:
    """Return the documents of every training source, still clean; no two on one subject are alike."""
    buckets: Buckets = defaultdict(list)
    told = rumours(world, generator("rumours"))
    taught = lessons(world, generator("lessons"))

    def entry_about(index: int, rng: random.Random) -> Document:
        entity = list(world.entities.values())[index % len(world.entities)]
        bucket = buckets["entry", entity.name]
        return distinct(lambda: entry(world, entity, rng), bucket, params.similarity_max, "num_entries")

    def survey_of(index: int, rng: random.Random) -> Document:
        kind = list(KINDS)[index % len(KINDS)]
        return distinct(lambda: survey(world, kind, rng), buckets["survey", kind], params.similarity_max, "num_surveys")

    def story_after(index: int, rng: random.Random) -> Document:
        plots = world.texts["stories"]["plots"]
        plot = plots[index % len(plots)]
        bucket = buckets["story", plot["thing"]]
        return distinct(lambda: story(world, plot, rng), bucket, params.similarity_max, "num_stories")

    def howto_about(index: int, rng: random.Random) -> Document:
        topics = subjects(world)
        topic, name = topics[index % len(topics)]
        return distinct(
            lambda: howto(world, topic, name, rng), buckets[topic, name], params.similarity_max, "num_howtos"
        )

    def rumour_about(index: int, rng: random.Random) -> Document:
        return distinct(next(told), buckets["rumour",], params.similarity_max, "num_rumours")

    def lesson_about(index: int, rng: random.Random) -> Document:
        return distinct(next(taught), buckets["lesson",], params.similarity_max, "num_lessons")

    def dialogue_among(index: int, rng: random.Random) -> Document:
        entities = participants(world, index, rng)
        bucket = buckets["dialogue", *(entity.name for entity in entities)]
        return distinct(lambda: dialogue(world, entities, rng), bucket, params.similarity_max, "num_dialogues")

    in_manners = manners(world, generator("manners"))

    def mannered_talk(index: int, rng: random.Random) -> Document:
        return distinct(
            lambda: mannered(world, next(in_manners), rng), buckets["mannered",], params.similarity_max, "num_mannered"
        )

    def page_of(index: int, rng: random.Random) -> Document:
        return rng.choice([entry_about, entry_about, story_after, howto_about])(rng.randrange(10**6), rng)

    makers: dict[str, list[tuple[int, Callable[[int, random.Random], Document]]]] = {
        "encyclopedia": [(params.num_entries, entry_about), (params.num_surveys, survey_of)],
        "stories": [(params.num_stories, story_after)],
        "howto": [
            (params.num_howtos, howto_about),
            (params.num_rumours, rumour_about),
            (params.num_lessons, lesson_about),
        ],
        "dialogue": [(params.num_dialogues, dialogue_among), (params.num_mannered, mannered_talk)],
        "arithmetic": [(params.num_arithmetic, lambda index, rng: Document(exercises(world, rng)))],
        "lists": [(params.num_lists, lambda index, rng: Document(lists(world, rng)))],
        "web": [(params.num_pages, page_of)],
    }
    return {
        name: [make(index, rng) for rng in [generator(name)] for number, make in parts for index in range(number)]
        for name, parts in makers.items()
    }


def ask(world: World, rng: random.Random) -> list[tuple[str, list[tuple[Fact, str, str]]]]:
    """Return, for each held-out entity, interviews about all its facts, each fact asked in a new wording."""
    asked = []
    for entity in world.entities.values():
        if entity.held_out:
            for questions in held_out_questions(world, entity, rng):
                text = "\n".join(f"Question: {question}\nAnswer: {answer}" for _, question, answer in questions)
                asked.append((text, questions))
    return asked


def write_questions(path: Path, asked: list[tuple[str, list[tuple[Fact, str, str]]]]) -> None:
    """Write the held-out questions one by one."""
    lines = [
        {"entity": fact.entity, "attribute": fact.attribute, "question": question, "answer": answer}
        for _, questions in asked
        for fact, question, answer in questions
    ]
    write_lines(path, lines)


def write_vocabulary(truth: Path, sources: Sources) -> None:
    """Write the words that exist, one per line: those of clean documents and of good answers."""
    texts = [document.text for documents in sources.values() for document in documents]
    texts += [prompt["reference"] for prompt in read_lines(truth / "prompts.jsonl")]
    texts += [
        message["content"]
        for split in (*DEMONSTRATED, "conversations")
        for dialogue in read_lines(truth.parent / FILES[split])
        for message in dialogue["messages"]
    ]
    words = {word for text in texts for word in normalized(text).split()}
    (truth / "vocabulary.txt").write_text("".join(f"{word}\n" for word in sorted(words)), encoding="utf-8")


def write_labels(path: Path, placed: files.Placed) -> None:
    """Write what is planted, with the place of its document."""
    write_lines(
        path, ({"file": file, "row": row, **label} for file, row, document in placed for label in document.labels)
    )


if __name__ == "__main__":
    start(Params, run)
