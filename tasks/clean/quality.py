"""Quality rules: C4's (Raffel et al. 2020, section 2.2) on lines and pages, then Gopher's (Rae et al. 2021, table A1).

Each limit is a parameter; null switches its rule off. Words are separated by whitespace, as in Gopher.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import Field

from tasks.running.params import Section

TERMINAL = (".", "!", "?", '"', "”", "'", "’", "…")
ELLIPSES = ("...", "…")
BULLETS = ("•", "●", "‣", "▪", "■", "-", "*", "–")
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")


class C4(Section):
    """Raffel et al. 2020, section 2.2."""

    terminal_punctuation: bool = Field(description="drop lines that don't end with sentence punctuation")
    min_line_words: int = Field(ge=0, description="drop lines of fewer words")
    drop_boilerplate: bool = Field(description="drop lines that contain one of `clean.boilerplate_terms`")
    document_terms: list[str] = Field(description="reject documents that contain one of these, case-insensitive")
    curly_bracket: bool = Field(description="reject documents that contain an opening curly bracket: program code")
    min_sentences: int = Field(ge=0, description="reject documents with fewer sentences")


class Gopher(Section):
    """Rae et al. 2021, table A1, quality."""

    min_words: int = Field(ge=0, description="words of a document")
    max_words: int = Field(gt=0, description="words of a document")
    min_mean_word_length: float = Field(ge=0, description="characters")
    max_mean_word_length: float = Field(gt=0, description="characters")
    max_symbol_share: float | None = Field(gt=0, description="`#` per word, and ellipses per word")
    max_bullet_line_share: float | None = Field(gt=0, le=1, description="lines that start with a bullet")
    max_ellipsis_line_share: float | None = Field(gt=0, le=1, description="lines that end with an ellipsis")
    min_alphabetic_word_share: float | None = Field(gt=0, le=1, description="words with at least one letter")
    min_stop_words: int = Field(ge=0, description="distinct stop words, in languages that have a list")


Verdict = tuple[str, str] | None  # the rule that rejects a document, and what it found


def drop_lines(text: str, boilerplate_terms: Sequence[str], params: C4) -> tuple[str, int]:
    """Return the text without the lines that C4 drops, and how many those were. Blank lines stay."""
    lowered = text.lower() if params.drop_boilerplate else ""
    terms = [term for term in boilerplate_terms if term in lowered]
    if not terms and not params.terminal_punctuation and params.min_line_words == 0:
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if not line.strip() or _is_prose(line, terms, params)]
    if len(kept) == len(lines):
        return text, 0
    return "\n".join(kept).strip("\n"), len(lines) - len(kept)


def _is_prose(line: str, terms: Sequence[str], params: C4) -> bool:
    if params.terminal_punctuation and not line.rstrip().endswith(TERMINAL):
        return False
    if params.min_line_words and len(line.split()) < params.min_line_words:
        return False
    lowered = line.lower() if terms else ""
    return not any(term in lowered for term in terms)


def judge_page(text: str, num_dropped: int, params: C4) -> Verdict:
    """Apply C4's rules on a whole page."""
    if not text.strip():
        return "empty", f"all {num_dropped} lines dropped" if num_dropped else "no text"
    lowered = text.lower() if params.document_terms else ""
    for term in params.document_terms:
        if term in lowered:
            return "c4_document_term", term
    if params.curly_bracket and "{" in text:
        return "c4_curly_bracket", "{"
    if params.min_sentences:
        num_sentences = len(_SENTENCE_END.findall(text))
        if num_sentences < params.min_sentences:
            return "c4_sentences", f"{num_sentences} sentences"
    return None


def judge_words(
    text: str, words: Sequence[str], language: str, stop_words: Mapping[str, Sequence[str]], params: Gopher
) -> Verdict:
    """Apply Gopher's quality rules."""
    num_words = len(words)
    if not params.min_words <= num_words <= params.max_words:
        return "gopher_words", f"{num_words} words"
    mean_length = sum(map(len, words)) / num_words if num_words else 0.0
    if not params.min_mean_word_length <= mean_length <= params.max_mean_word_length:
        return "gopher_word_length", f"{mean_length:.2f} characters a word"
    if params.max_symbol_share is not None:
        for symbol, count in (("#", text.count("#")), ("ellipsis", sum(text.count(mark) for mark in ELLIPSES))):
            if count > params.max_symbol_share * num_words:
                return "gopher_symbols", f"{symbol}: {count / num_words:.3f} a word"
    if params.max_bullet_line_share is not None or params.max_ellipsis_line_share is not None:
        lines = [line for line in map(str.strip, text.split("\n")) if line]
        bullets = sum(line.startswith(BULLETS) for line in lines) / len(lines)
        if params.max_bullet_line_share is not None and bullets > params.max_bullet_line_share:
            return "gopher_bullets", f"{bullets:.3f} of the lines"
        ellipses = sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
        if params.max_ellipsis_line_share is not None and ellipses > params.max_ellipsis_line_share:
            return "gopher_ellipses", f"{ellipses:.3f} of the lines"
    if params.min_alphabetic_word_share is not None:
        alphabetic = sum(word.isalpha() or _LETTER.search(word) is not None for word in words) / num_words
        if alphabetic < params.min_alphabetic_word_share:
            return "gopher_alphabetic", f"{alphabetic:.3f} of the words"
    if params.min_stop_words and language in stop_words:
        found = set(stop_words[language]).intersection(word.lower() for word in words)
        if len(found) < params.min_stop_words:
            return "gopher_stop_words", f"{len(found)} different ones"
    return None
