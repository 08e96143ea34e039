"""Language identification (recipe section 1), by py3langid, weighted by what the source is expected to hold.

LLaMA 1 (section 2.1) identifies languages with fastText's linear classifier of character n-grams; py3langid is naive
Bayes over byte n-grams, and ships with its model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import Field

from tasks.running.params import Section


class Identification(Section):
    """How languages are identified."""

    candidates: list[str] = Field(min_length=2, description="ISO 639-1 codes among which the identifier chooses")
    expected_odds: float = Field(ge=1, description="prior odds of a wanted language against another one")
    min_score: float = Field(ge=0, lt=1, description="probability below which a language counts as not identified")
    num_characters: int = Field(gt=0, description="characters from the middle of the document that are read")


@lru_cache(maxsize=8)
def _identifier(candidates: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(candidates)
    return identifier


def check_languages(candidates: list[str], wanted: list[str]) -> None:
    """Raise ValueError for a language that the identifier doesn't know, or that is wanted but not a candidate."""
    try:
        _identifier(tuple(candidates))
    except ValueError as error:
        raise ValueError(f"`clean.language.candidates`: {error}: take it out") from None
    missing = sorted(set(wanted) - set(candidates))
    if missing:
        raise ValueError(f"`clean.rules`: {', '.join(missing)} must be among `clean.language.candidates` to be found")


def identify(text: str, wanted: list[str], params: Identification) -> tuple[str, float]:
    """Return the likeliest language and its probability.

    The identifier's probabilities are calibrated by length. A few words say little, so there the prior decides: each of
    the `wanted` languages is `expected_odds` times as likely as another one. A long text overrides it.
    """
    start = max(0, (len(text) - params.num_characters) // 2)
    ranks = _identifier(tuple(params.candidates)).rank(text[start : start + params.num_characters])
    weights = {code: score * (params.expected_odds if code in wanted else 1.0) for code, score in ranks}
    best = max(weights, key=lambda code: weights[code])
    return best, weights[best] / sum(weights.values())
