"""Which pronouns and which demographic identities a document mentions (Llama 2, section 4.1, table 9).

A document counts once, however often it mentions a word. Words are matched whole, ignoring case; the words of a term
such as "south african" may be separated by spaces, hyphens or apostrophes, and are also found by themselves. The words
are English, and many have other meanings ("us" the country, "black" the colour): the shares are upper bounds, so the
terms' table says what else a term may mean.
"""

from __future__ import annotations

import csv
import heapq
import re
from dataclasses import dataclass
from pathlib import Path

from tasks.audit.corpus import Counts, Name, Result, fraction_of, read_part
from tasks.audit.toxicity import windows

SHE = "she her hers herself"
HE = "he him his himself"
THEY = "they them their theirs theirself theirselves themself themselves"
PRONOUNS = {
    "gender": {"she": SHE, "he": HE, "unspecified": THEY},
    "person": {
        "first_person": "i me my mine myself we us our ours ourself ourselves",
        "second_person": "you your yours yourself yourselves",
        "third_person": f"{SHE} {HE} {THEY} it its itself",
    },
}
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Term:
    """One demographic identity: a line of the term file."""

    axis: str
    term: str
    forms: tuple[str, ...]
    other_meanings: str


@dataclass(frozen=True)
class Lexicon:
    """What to look for: single words, and phrases by their first word, each with all its words and its pattern."""

    words: dict[str, frozenset[Name]]
    phrases: dict[str, list[tuple[frozenset[str], re.Pattern[str], frozenset[Name]]]]


@dataclass(frozen=True)
class Counting:
    """What every worker needs to count a part."""

    lexicon: Lexicon
    batch_documents: int
    background_languages: tuple[str, ...]
    num_background: int
    window_words: int
    seed: int


def read_terms(path: Path) -> list[Term]:
    """Return the terms of a CSV file with the columns axis, term, other_forms (separated by `|`) and other_meanings.

    Raises ValueError, naming file and line, for a missing file or column, an empty axis or term, or a form that an axis
    has twice.
    """
    if not path.is_file():
        raise ValueError(f"params.yaml: `audit.terms` is {path}, which is not a file: give a CSV file of terms by axis")
    terms: list[Term] = []
    seen: set[tuple[str, str]] = set()
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        columns = ("axis", "term", "other_forms", "other_meanings")
        missing = [column for column in columns if column not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column `{'`, `'.join(missing)}`: line 1 must be {','.join(columns)}")
        for row in rows:
            axis, term, other_forms, other_meanings = (row[column] or "" for column in columns)
            forms = tuple(" ".join(form.lower().split()) for form in (term, *filter(None, other_forms.split("|"))))
            if not axis or not all(WORD.search(form) for form in forms):
                raise ValueError(f"{path}, line {rows.line_num}: axis and term must not be empty")
            for form in forms:
                if (axis, form) in seen:
                    raise ValueError(f"{path}, line {rows.line_num}: the axis {axis} already has `{form}`: keep one")
                seen.add((axis, form))
            terms.append(Term(axis, forms[0], forms, other_meanings))
    if not terms:
        raise ValueError(f"{path} holds no terms: add at least one line")
    return terms


def build_lexicon(terms: list[Term]) -> Lexicon:
    """Return the lexicon of the pronouns and these terms."""
    names: dict[str, set[Name]] = {}
    for kind, groups in PRONOUNS.items():
        for group, pronouns in groups.items():
            for pronoun in pronouns.split():
                names.setdefault(pronoun, set()).update({("pronouns", f"any_{kind}"), ("pronouns", group)})
    for term in terms:
        for form in term.forms:
            names.setdefault(form, set()).update({("identities", term.axis), ("terms", f"{term.axis}/{term.term}")})
    lexicon = Lexicon({}, {})
    for form, wanted in names.items():
        words = WORD.findall(form)
        if len(words) == 1:
            lexicon.words[form] = frozenset(wanted)
        else:
            pattern = re.compile(r"\b" + r"[\s\-'’]+".join(words) + r"\b")
            lexicon.phrases.setdefault(words[0], []).append((frozenset(words), pattern, frozenset(wanted)))
    return lexicon


def find_mentions(text: str, lexicon: Lexicon) -> set[Name]:
    """Return everything a text mentions: ("pronouns", group), ("identities", axis), ("terms", "axis/term")."""
    lowered = text.lower()
    words = set(WORD.findall(lowered))
    found: set[Name] = set()
    for word in words & lexicon.words.keys():
        found |= lexicon.words[word]
    for first in words & lexicon.phrases.keys():
        for parts, pattern, names in lexicon.phrases[first]:
            # the set of words rules out most documents at once; only the rest are searched
            if parts <= words and not names <= found and pattern.search(lowered):
                found |= names
    return found


def count_part(path: Path, shared: Counting) -> Result:
    """Return a part's counts, and its share of the background: sentences of documents drawn by a hash of their id.

    The background of the corpus is the `num_background` lowest (draw, sentence) of all parts.
    """
    counts: Counts = Counts()
    drawn: list[tuple[float, str]] = []
    for documents in read_part(path, shared.batch_documents):
        for document in documents:
            source = document["source"]
            counts[source, "documents", ""] += 1
            counts[source, "languages", document["language"]] += 1
            for measure, name in find_mentions(document["text"], shared.lexicon):
                counts[source, measure, name] += 1
            if document["language"] in shared.background_languages and document["text"].strip():
                drawn.append((fraction_of("background", shared.seed, document["id"]), document["text"]))
        drawn = heapq.nsmallest(shared.num_background, drawn)
    background = []
    for number, text in drawn:
        sentences = windows(text, shared.window_words)
        background.append((number, sentences[int(number * 2**48) % len(sentences)]))
    return counts, background
