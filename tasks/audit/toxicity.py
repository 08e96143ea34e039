"""How toxic a text is: a classifier, its own accuracy, and the scores of documents (Llama 2, section 4.1, figure 13).

The paper scores each line of a document with HateBERT tuned on ToxiGen, and a document by the mean of its lines, in
English only. Here the classifier is trained on labelled sentences (TF-IDF of words and of characters, calibrated
logistic regression) or is any Hugging Face sequence classifier; it reads short windows, since it learned from
sentences. The mean is kept: a maximum grows with a document's length, so with a classifier that has false positives it
measures length. Documents with any toxic window are counted as well.

Labelled sentences are only about sensitive subjects; a classifier trained on them alone knows nothing of ordinary prose
and calls a third of it toxic (measured: C4, ToxiGen). So ordinary sentences of the corpus itself, the background, are
added as neutral ones. The few toxic ones among them do little harm. Held-out figures are on labelled sentences alone.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from tasks.audit.corpus import Counts, Result, fraction_of, read_part
from tasks.judging.intervals import NORMAL_QUANTILE
from tasks.running.params import Section

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Score = Callable[[list[str]], Floats]  # texts -> probability that each is toxic

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


class Classifier(Section):
    """The classifier: trained here on labelled sentences, or loaded."""

    path: str = Field(
        min_length=1,
        description="directory of a Hugging Face sequence classifier; data/seeds/none: train one on `labels`",
    )
    toxic_label: int = Field(ge=0, description="which output of the loaded classifier means toxic, counted from 0")
    batch_size: int = Field(gt=0, description="sentences that the loaded classifier scores at once")
    labels: str = Field(
        min_length=1,
        description="labelled sentences: CSV of text,label (1 toxic, 0 not), or ToxiGen's hate_*.txt, neutral_*.txt",
    )
    num_background: int = Field(ge=0, description="sentences of the corpus that are added to the neutral ones")
    word_ngram: int = Field(gt=0, description="longest n-gram of words")
    character_ngrams: tuple[int, int] = Field(description="shortest and longest n-gram of characters, within words")
    min_sentences: int = Field(gt=0, description="sentences in which an n-gram must occur to be used")
    inverse_regularization: float = Field(gt=0, description="C of scikit-learn's LogisticRegression")
    num_folds: int = Field(ge=2, description="folds of the cross-validation behind the held-out figures")


@dataclass(frozen=True)
class Scoring:
    """What every worker needs to score a part."""

    score: Score
    languages: tuple[str, ...]
    sample: float
    threshold: float
    num_bins: int
    window_words: int
    batch_documents: int
    seed: int


# --- labelled sentences ---


def read_labelled(path: Path) -> tuple[list[str], Integers]:
    """Return labelled sentences, each once, and their labels (1 toxic, 0 not).

    Raises ValueError, naming file and line, for what is missing, malformed or labelled both ways, and when all
    sentences have the same label.
    """
    if path.is_dir():
        rows = [row for kind in (("hate", 1), ("neutral", 0)) for row in _read_toxigen(path, *kind)]
    elif path.is_file():
        rows = _read_csv(path)
    else:
        raise ValueError(
            f"params.yaml: `audit.classifier.labels` is {path}, which doesn't exist: name a file or directory"
        )
    labelled: dict[str, tuple[str, int]] = {}
    for place, text, label in rows:
        if not text.strip():
            raise ValueError(f"{place}: the sentence is empty: take the line out")
        if labelled.setdefault(key(text), (text, label))[1] != label:
            raise ValueError(f"{place}: this sentence is labelled both toxic and not: keep one of them: {text}")
    labels = np.array([label for _, label in labelled.values()], np.int64)
    if len(set(labels.tolist())) < 2:
        found = f"only the label {labels[0]}" if len(labels) else "no sentence"
        raise ValueError(f"{path} has {found}: a classifier needs toxic sentences (1) and others (0)")
    return [text for text, _ in labelled.values()], labels


def _read_csv(path: Path) -> list[tuple[str, str, int]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        missing = [column for column in ("text", "label") if column not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} has no column `{'`, `'.join(missing)}`: its first line must be text,label")
        result = []
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if row["label"] not in ("0", "1"):
                raise ValueError(f"{place}: the label is {row['label']!r}: it must be 1 (toxic) or 0")
            result.append((place, row["text"], int(row["label"])))
    return result


def _read_toxigen(path: Path, kind: str, label: int) -> list[tuple[str, str, int]]:
    files = sorted(path.glob(f"{kind}_*.txt"))
    if not files:
        raise ValueError(f"{path} has no {kind}_*.txt: name ToxiGen's directory of sentences, or a CSV with text,label")
    lines = ((file, line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return [(str(file), line.strip(), label) for file, line in lines if line.strip()]


def key(text: str) -> str:
    """Return the key by which two sentences are the same: their words, in lower case."""
    return " ".join(text.lower().split())


# --- the classifier trained here ---


def train(texts: list[str], labels: Integers, background: list[str], params: Classifier, seed: int) -> Any:
    """Return a scikit-learn pipeline trained on the sentences, the background counted as not toxic."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline, make_union

    words = TfidfVectorizer(ngram_range=(1, params.word_ngram), min_df=params.min_sentences, sublinear_tf=True)
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=params.character_ngrams, min_df=params.min_sentences, sublinear_tf=True
    )
    # with fewer sentences than n-grams, the dual is solved in a fiftieth of the time
    regression = LogisticRegression(C=params.inverse_regularization, solver="liblinear", dual=True, random_state=seed)
    folds = StratifiedKFold(params.num_folds, shuffle=True, random_state=seed)
    calibrated = CalibratedClassifierCV(regression, method="sigmoid", cv=folds, ensemble=False)
    pipeline = make_pipeline(make_union(words, characters), calibrated)
    return pipeline.fit([*texts, *background], np.concatenate([labels, np.zeros(len(background), np.int64)]))


def cross_validate(texts: list[str], labels: Integers, background: list[str], params: Classifier, seed: int) -> Floats:
    """Return each labelled sentence's probability from a classifier that hasn't seen it.

    Raises ValueError when a label has too few sentences for the folds.
    """
    from sklearn.model_selection import StratifiedKFold

    rarest = int(np.bincount(labels).min())
    # every fold's classifier is in turn calibrated by folds within its training sentences
    if rarest - -(-rarest // params.num_folds) < params.num_folds:
        raise ValueError(
            f"{params.labels} has {rarest} different sentences of one label: too few for `audit.classifier.num_folds` "
            f"({params.num_folds}); add sentences or lower it"
        )
    probabilities = np.zeros(len(texts))
    folds = StratifiedKFold(params.num_folds, shuffle=True, random_state=seed)
    for training, held_out in folds.split(texts, labels):
        model = train([texts[i] for i in training], labels[training], background, params, seed)
        probabilities[held_out] = model.predict_proba([texts[i] for i in held_out])[:, 1]
    return probabilities


def assess(labels: Integers, probabilities: Floats) -> dict[str, float]:
    """Return AUC with its 95% interval, accuracy at 0.5, and the expected calibration error over ten bins."""
    from sklearn.metrics import roc_auc_score

    auc = float(roc_auc_score(labels, probabilities))
    low, high = auc_interval(auc, int(labels.sum()), int((1 - labels).sum()))
    bins = np.minimum((probabilities * 10).astype(int), 9)
    gaps = [abs((probabilities - labels)[bins == number].sum()) for number in range(10)]
    return {
        "classifier_auc": auc,
        "classifier_auc_low": low,
        "classifier_auc_high": high,
        "classifier_accuracy": float(np.mean((probabilities >= 0.5) == labels)),
        "classifier_calibration_error": float(sum(gaps) / len(labels)),
    }


def auc_interval(auc: float, num_toxic: int, num_other: int) -> tuple[float, float]:
    """Return the 95% confidence interval of an AUC (Newcombe 2006, part 2, method 5).

    It solves |auc - x| = 1.96 * standard error at x, so it has a width even at an AUC of 1.
    """
    from scipy.optimize import brentq  # type: ignore[import-untyped]

    def distance(x: float, sign: float) -> float:
        size = (num_toxic + num_other) / 2 - 1
        variance = x * (1 - x) * (1 + size * ((1 - x) / (2 - x) + x / (1 + x))) / (num_toxic * num_other)
        return float(x - auc + sign * NORMAL_QUANTILE * np.sqrt(variance))

    # the error also vanishes at 0 and 1, which are not bounds
    edge = 1e-12
    low = brentq(distance, 0.0, min(auc, 1 - edge), (1.0,)) if auc > 0 else 0.0
    high = brentq(distance, max(auc, edge), 1.0, (-1.0,)) if auc < 1 else 1.0
    return float(low), float(high)


def save_classifier(model: Any, path: Path) -> None:
    """Write the classifier as skops does, but with the same bytes for the same classifier.

    skops names objects by their memory addresses and dates its archive, and scikit-learn stores an address in each
    vectorizer: all differ from run to run. To load it with `skops.io.load`, check and trust the types that
    `skops.io.get_untrusted_types` names: they are scikit-learn's own, for calibration and folds.
    """
    import skops.io

    for _, vectorizer in model[0].transformer_list:
        vars(vectorizer).pop("_stop_words_id", None)
    numbers: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        return match[1] + numbers.setdefault(match[2], str(len(numbers)))

    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        zipfile.ZipFile(io.BytesIO(skops.io.dumps(model))) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as result,
    ):
        schema = re.sub(r'("__id__": |"file": ")(\d+)', renumber, archive.read("schema.json").decode())
        result.writestr(zipfile.ZipInfo("schema.json"), schema, zipfile.ZIP_DEFLATED)
        for member in archive.namelist():
            if member != "schema.json":
                name = f"{numbers[member.removesuffix('.npy')]}.npy"
                result.writestr(zipfile.ZipInfo(name), archive.read(member), zipfile.ZIP_DEFLATED)


def score_trained(texts: list[str], model: Any) -> Floats:
    """Return the probability that each text is toxic, by a classifier trained here."""
    probabilities: Floats = model.predict_proba(texts)[:, 1]
    return probabilities


# --- a loaded classifier ---


def check_loaded(params: Classifier) -> None:
    """Raise ValueError when `audit.classifier.path` can't be used, before any work is done."""
    place = f"params.yaml: `audit.classifier.path` is {params.path}"
    directory = Path(params.path)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{place}, which has no config.json: name a Hugging Face sequence classifier's directory")
    if not list(directory.glob("*.safetensors")):
        raise ValueError(f"{place}, which has no *.safetensors: other formats of weights can run code and aren't read")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["unnamed"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise ValueError(f"{place}, whose architecture is {architecture}: a ...ForSequenceClassification is needed")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"{place}: to load it, install transformers, `pip install arriero[classifier]`")
    num_outputs = _load(params.path)[1].config.num_labels
    if params.toxic_label >= num_outputs:
        raise ValueError(
            f"params.yaml: `audit.classifier.toxic_label` is {params.toxic_label}, but {params.path} has {num_outputs} "
            "outputs, counted from 0"
        )


@lru_cache(maxsize=1)
def _load(path: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True, use_safetensors=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model.eval()


def score_loaded(texts: list[str], path: str, toxic_label: int, batch_size: int) -> Floats:
    """Return the probability that each text is toxic, by a Hugging Face sequence classifier.

    With one output it is that output's sigmoid, else the softmax's share of `toxic_label`.
    """
    import torch

    tokenizer, model = _load(path)
    longest = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    )
    probabilities = []
    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits_BC = model(**inputs).logits.double()  # B texts, C outputs
        shares_BC = logits_BC.sigmoid() if logits_BC.shape[1] == 1 else logits_BC.softmax(1)
        probabilities.append(shares_BC[:, toxic_label].numpy())
    return np.concatenate(probabilities)


# --- documents ---


def windows(text: str, max_words: int) -> list[str]:
    """Return a text's sentences and lines, cut into pieces of at most `max_words`."""
    result = []
    for sentence in SENTENCE_END.split(text):
        words = sentence.split()
        result += [" ".join(words[start : start + max_words]) for start in range(0, len(words), max_words)]
    return result


def score_part(path: Path, shared: Scoring) -> Result:
    """Return how many of a part's documents are `scored`, `toxic`, have `any_window` toxic, and the histogram.

    No sentence is drawn.
    """
    counts: Counts = Counts()
    for batch in read_part(path, shared.batch_documents):
        documents = [
            (document["source"], pieces)
            for document in batch
            if document["language"] in shared.languages
            and fraction_of("toxicity", shared.seed, document["id"]) < shared.sample
            and (pieces := windows(document["text"], shared.window_words))
        ]
        if not documents:
            continue
        scores = shared.score([piece for _, pieces in documents for piece in pieces])
        position = 0
        for source, pieces in documents:
            own = scores[position : position + len(pieces)]
            position += len(pieces)
            mean = float(own.mean())
            counts[source, "toxicity", "scored"] += 1
            counts[source, "toxicity", "toxic"] += int(mean >= shared.threshold)
            counts[source, "toxicity", "any_window"] += int(own.max() >= shared.threshold)
            counts[source, "histogram", str(min(int(mean * shared.num_bins), shared.num_bins - 1))] += 1
    return counts, []
