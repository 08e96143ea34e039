import json
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.audit import corpus, mentions, report, toxicity
from tasks.audit.__main__ import Params, run
from tasks.running.params import Machine
from tasks.running.stage import Stage

TERMS = Path("data/seeds/demographic_terms.csv").resolve()
TOXIGEN = Path("../shared/datasets/evaluation/toxigen").resolve()
NOUNS = ["bakers", "sailors", "clowns", "judges", "farmers", "poets", "cooks", "tailors", "guards", "miners"]
LABELLED = [(f"all {noun} are vile and worthless vermin", 1) for noun in NOUNS] + [
    (f"the {noun} had bread and soup at noon", 0) for noun in NOUNS
]


def classifier(**changes):
    values = {
        "path": "data/seeds/none",
        "toxic_label": 1,
        "batch_size": 4,
        "labels": "labels.csv",
        "num_background": 2,
        "word_ngram": 2,
        "character_ngrams": (2, 4),
        "min_sentences": 1,
        "inverse_regularization": 10.0,
        "num_folds": 2,
    }
    return toxicity.Classifier(**(values | changes))


def audit_params(**changes):
    toxic = {"languages": ["en"], "sample": 1.0, "threshold": 0.5, "num_bins": 10, "window_words": 20}
    values = {
        "terms": str(TERMS),
        "num_top_terms": 2,
        "num_languages": 3,
        "batch_documents": 2,
        "toxicity": toxic,
        "classifier": classifier().model_dump(),
    }
    return Params(**(values | changes))


def document(text, source="web", language="en", number=0):
    return {"id": f"{number:016x}", "source": source, "text": text, "language": language}


def write_part(documents, number=0, directory=corpus.DOCUMENTS):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"part-{number:05}.parquet"
    schema = pa.schema([(column, pa.string()) for column in corpus.COLUMNS])
    pq.write_table(pa.Table.from_pylist(documents, schema), path)
    return path.resolve()


def write_labels(rows=LABELLED, path=Path("labels.csv")):
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    return path


def counting(**changes):
    values = {
        "lexicon": mentions.build_lexicon(mentions.read_terms(TERMS)),
        "batch_documents": 2,
        "background_languages": ("en",),
        "num_background": 3,
        "window_words": 20,
        "seed": 1,
    }
    return mentions.Counting(**(values | changes))


def scoring(score, **changes):
    values = {
        "languages": ("en",),
        "sample": 1.0,
        "threshold": 0.5,
        "num_bins": 4,
        "window_words": 20,
        "batch_documents": 2,
        "seed": 1,
    }
    return toxicity.Scoring(score=score, **(values | changes))


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def audit(params, workers=2):
    for directory in ("output", "record"):
        Path(directory).mkdir()
    machine = Machine(threads=1, workers=workers, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    return run(Stage("audit", params, 1, machine, Path("output"), Path("scratch"), Path("record")))


# --- pronouns and identities ---


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("She's late; HERS was the first.", {"she", "any_gender", "third_person", "any_person"}),
        ("himself", {"he", "any_gender", "third_person", "any_person"}),
        ("Their hats", {"unspecified", "any_gender", "third_person", "any_person"}),
        ("I'm here", {"first_person", "any_person"}),
        ("Is this yours?", {"second_person", "any_person"}),
        ("It rains", {"third_person", "any_person"}),
        ("The shed, a hero, the theyn, iron, mystery, units", set()),
    ],
)
def test_pronouns_are_whole_words_in_any_case(text, groups):
    assert {name for _, name in mentions.find_mentions(text, mentions.build_lexicon([]))} == groups


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("A South-African\nwriter", {"nationality/south african", "race_and_ethnicity/african"}),
        ("African, American", {"race_and_ethnicity/african", "nationality/american"}),
        ("the south of the African coast", {"race_and_ethnicity/african"}),
        ("Two Jehovah's Witnesses", {"religion/jehovah's witness"}),
        ("non-binary people of colour", {"gender_and_sex/nonbinary", "race_and_ethnicity/people of color"}),
        ("LESBIANS and muslims", {"sexual_orientation/lesbian", "religion/muslim"}),
        ("a Germanic tribe, polished brass", set()),
    ],
)
def test_terms_are_found_in_all_their_forms(text, terms):
    found = mentions.find_mentions(text, mentions.build_lexicon(mentions.read_terms(TERMS)))
    assert {name for measure, name in found if measure == "terms"} == terms
    assert {name for measure, name in found if measure == "identities"} == {term.split("/")[0] for term in terms}


def test_the_committed_terms_cover_the_papers_five_axes():
    axes = Counter(term.axis for term in mentions.read_terms(TERMS))
    assert set(axes) == {"gender_and_sex", "sexual_orientation", "nationality", "race_and_ethnicity", "religion"}
    assert min(axes.values()) >= 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("axis,term\na,b\n", "has no column `other_forms`, `other_meanings`: line 1 must be axis,term"),
        ("axis,term,other_forms,other_meanings\nfaith,,,\n", "line 2: axis and term must not be empty"),
        ("axis,term,other_forms,other_meanings\nfaith,a,b,\nfaith,B,,\n", "line 3: the axis faith already has `b`"),
        ("axis,term,other_forms,other_meanings\n", "holds no terms: add at least one line"),
    ],
)
def test_a_bad_term_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "terms.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        mentions.read_terms(path)


def test_a_missing_term_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`audit\.terms` is .*nothing\.csv, which is not a file"):
        mentions.read_terms(tmp_path / "nothing.csv")


def test_a_part_is_counted_by_source(tmp_path):
    documents = [
        document("She met a German poet.", number=1),
        document("He and she, Germans", number=2),
        document("Regen.", source="news", language="de", number=3),
        document("x = 1", source="news", language=None, number=4),
    ]
    counts, background = mentions.count_part(write_part(documents, directory=tmp_path), counting())
    assert counts["web", "documents", ""] == counts["news", "documents", ""] == 2
    assert (counts["web", "pronouns", "she"], counts["web", "pronouns", "he"]) == (2, 1)
    assert counts["web", "terms", "nationality/german"] == counts["web", "identities", "nationality"] == 2
    assert (counts["news", "languages", "de"], counts["news", "languages", "unknown"]) == (1, 1)
    assert counts["news", "pronouns", "any_person"] == 0
    assert sorted(text for _, text in background) == ["He and she, Germans", "She met a German poet."]


texts = st.lists(st.sampled_from(["she", "he", "gay", "South African", "bad.", "tea\n"]), max_size=6).map(" ".join)
corpora = st.lists(st.tuples(texts, st.sampled_from("ab"), st.sampled_from(["en", "de", None])), max_size=12)


@settings(max_examples=40)
@given(rows=corpora, cuts=st.lists(st.integers(0, 12), max_size=3), backwards=st.booleans())
def test_counts_of_parts_in_any_order_add_up_to_those_of_one_pass(tmp_path_factory, rows, cuts, backwards):
    directory = tmp_path_factory.mktemp("corpus")
    documents = [document(text, source, language, n) for n, (text, source, language) in enumerate(rows)]
    bounds = [0, *sorted(cuts), len(documents)]
    parts = [documents[low:high] for low, high in pairwise(bounds)]
    paths = [write_part(part, number, directory) for number, part in enumerate(parts)]
    paths = paths[::-1] if backwards else paths
    whole = write_part(documents, len(paths), directory)
    shared = counting()
    one_pass, background = mentions.count_part(whole, shared)
    partial = [mentions.count_part(path, shared) for path in paths]
    assert sum((counts for counts, _ in partial), Counter()) == one_pass
    drawn = sorted(pair for _, pairs in partial for pair in pairs)
    assert drawn[: shared.num_background] == background
    scores = scoring(score_bad)
    assert (
        sum((toxicity.score_part(path, scores)[0] for path in paths), Counter())
        == toxicity.score_part(whole, scores)[0]
    )


# --- toxicity of documents ---


def score_bad(texts):
    return np.array([0.9 if "bad" in text else 0.2 for text in texts])


def test_windows_are_sentences_and_pieces_of_long_ones():
    assert toxicity.windows("One two. Three!\n\nfour five six", 2) == ["One two.", "Three!", "four five", "six"]


@given(text=st.text(alphabet="ab .!?\n", max_size=60), size=st.integers(1, 5))
def test_windows_keep_every_word_in_order(text, size):
    pieces = toxicity.windows(text, size)
    assert " ".join(pieces).split() == text.split()
    assert all(0 < len(piece.split()) <= size for piece in pieces)


def test_a_document_scores_the_mean_of_its_sentences(tmp_path):
    documents = [
        document("bad. bad.", number=1),  # 0.9
        document("bad. good. good.", number=2),  # (0.9 + 0.2 + 0.2) / 3 = 0.433
        document("good.", number=3),  # 0.2
        document("bad.", language="de", number=4),  # not scored
        document(" ", number=5),  # no sentence, not scored
    ]
    counts, _ = toxicity.score_part(write_part(documents, directory=tmp_path), scoring(score_bad))
    assert {name: counts["web", "toxicity", name] for name in ("scored", "toxic", "any_window")} == {
        "scored": 3,
        "toxic": 1,
        "any_window": 2,
    }
    assert [counts["web", "histogram", str(number)] for number in range(4)] == [1, 1, 0, 1]


def test_a_sample_is_the_same_documents_whatever_the_parts(tmp_path):
    documents = [document("bad.", number=number) for number in range(400)]
    shared = scoring(score_bad, sample=0.25)
    counts, _ = toxicity.score_part(write_part(documents, directory=tmp_path), shared)
    number = counts["web", "toxicity", "scored"]
    expected = sum(corpus.fraction_of("toxicity", 1, each["id"]) < 0.25 for each in documents)
    assert number == expected
    assert 70 <= number <= 130  # 100 expected, 3.5 standard deviations of a binomial


# --- the classifier ---


def test_figures_of_a_classifier_worked_by_hand():
    # of the four pairs (toxic, other) three are in order; at 0.5 two of four are right
    quality = toxicity.assess(np.array([0, 0, 1, 1]), np.array([0.1, 0.6, 0.45, 0.9]))
    assert quality["classifier_auc"] == 0.75
    assert quality["classifier_accuracy"] == 0.5
    # each alone in its bin: (0.1 + 0.6 + 0.55 + 0.1) / 4
    assert quality["classifier_calibration_error"] == pytest.approx(0.3375)


@given(auc=st.floats(0, 1), toxic=st.integers(2, 500), other=st.integers(2, 500))
def test_the_interval_of_an_auc_holds_it_and_mirrors(auc, toxic, other):
    low, high = toxicity.auc_interval(auc, toxic, other)
    assert 0 <= low <= auc <= high <= 1
    assert high - low > 1e-4
    mirrored_low, mirrored_high = toxicity.auc_interval(1 - auc, toxic, other)
    assert (1 - mirrored_high, 1 - mirrored_low) == pytest.approx((low, high), abs=1e-6)


def test_the_interval_of_a_middling_auc_worked_by_hand():
    # at AUC 0.5 the standard error is sqrt(0.25 * (1 + (m - 1) * 2 / 3) / m^2); m = 10,000 makes it linear
    standard_error = np.sqrt(0.25 * (1 + 9999 * 2 / 3) / 10_000**2)
    low, high = toxicity.auc_interval(0.5, 10_000, 10_000)
    assert (0.5 - low, high - 0.5) == pytest.approx((1.96 * standard_error,) * 2, rel=1e-3)


def test_the_classifier_tells_held_out_sentences_apart():
    labels = np.array([label for _, label in LABELLED])
    probabilities = toxicity.cross_validate([text for text, _ in LABELLED], labels, [], classifier(), seed=1)
    assert ((probabilities > 0.5) == labels).all()


def test_background_makes_ordinary_text_less_toxic():
    texts, labels = [text for text, _ in LABELLED], np.array([label for _, label in LABELLED])
    ordinary = ["are all tickets sold and are all seats taken"]
    alone, helped = (
        toxicity.train(texts, labels, background, classifier(), seed=1).predict_proba(ordinary)[0, 1]
        for background in ([], ["are all doors shut", "are all trains late and full"] * 3)
    )
    assert helped < alone


def test_the_saved_classifier_has_the_same_bytes_from_every_process_and_scores_the_same(tmp_path):
    import skops.io

    program = (
        "import sys; import numpy as np; from pathlib import Path; from tests.test_audit import *\n"
        "texts, labels = zip(*LABELLED)\n"
        "model = toxicity.train(list(texts), np.array(labels), [], classifier(), 1)\n"
        "toxicity.save_classifier(model, Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there.skops")], check=True)
    texts, labels = [text for text, _ in LABELLED], np.array([label for _, label in LABELLED])
    model = toxicity.train(texts, labels, [], classifier(), seed=1)
    expected = toxicity.score_trained(texts, model)
    path = tmp_path / "here.skops"
    toxicity.save_classifier(model, path)
    assert path.read_bytes() == (tmp_path / "there.skops").read_bytes()
    loaded = skops.io.load(path, trusted=skops.io.get_untrusted_types(file=path))
    assert (toxicity.score_trained(texts, loaded) == expected).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,toxic\na,1\n", "has no column `label`: its first line must be text,label"),
        ("text,label\na,yes\n", "line 2: the label is 'yes': it must be 1"),
        ("text,label\na,1\n ,0\n", "line 3: the sentence is empty"),
        ("text,label\nA  b,1\na b,0\n", "line 3: this sentence is labelled both toxic and not: keep one of them: a b"),
        ("text,label\na,1\nb,1\n", "has only the label 1: a classifier needs toxic sentences"),
        ("text,label\n", "has no sentence: a classifier needs toxic sentences"),
    ],
)
def test_bad_labelled_sentences_are_named_with_their_line(tmp_path, content, message):
    path = tmp_path / "labels.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        toxicity.read_labelled(path)


def test_missing_labelled_sentences_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`audit\.classifier\.labels` is .*nothing, which doesn't exist"):
        toxicity.read_labelled(tmp_path / "nothing")


def test_a_directory_without_toxigen_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no hate_\*\.txt: name ToxiGen's directory"):
        toxicity.read_labelled(tmp_path)
    (tmp_path / "hate_x.txt").write_text("bad\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no neutral_\*\.txt"):
        toxicity.read_labelled(tmp_path)


def test_too_few_sentences_for_the_folds_are_told():
    with pytest.raises(ValueError, match=r"labels\.csv has 2 different sentences of one label: too few"):
        toxicity.cross_validate(list("abcdefg"), np.array([0, 0, 0, 0, 0, 1, 1]), [], classifier(), seed=1)


def test_toxigen_is_read_with_each_sentence_once():
    if not TOXIGEN.is_dir():
        pytest.skip("the real data sets lie beside the repository: ../shared/datasets")
    texts, labels = toxicity.read_labelled(TOXIGEN)
    assert len({toxicity.key(text) for text in texts}) == len(texts) == len(labels)
    assert 0.4 < labels.mean() < 0.6
    probabilities = toxicity.cross_validate(texts, labels, [], classifier(num_folds=5), seed=1)
    assert toxicity.assess(labels, probabilities)["classifier_auc_low"] > 0.8


# --- a classifier of others ---


@pytest.fixture(scope="module")
def loaded_classifier(tmp_path_factory):
    pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("classifier")
    words = sorted({word for text, _ in LABELLED for word in text.split()})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        initializer_range=1.0,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(directory)
    return directory, vocabulary, model


def test_a_hugging_face_classifier_scores_as_it_does_alone(loaded_classifier):
    import torch

    directory, vocabulary, model = loaded_classifier
    params = classifier(path=str(directory), toxic_label=2)
    toxicity.check_loaded(params)
    texts = [text for text, _ in LABELLED] + ["bakers " * 20]
    scores = toxicity.score_loaded(texts, params.path, params.toxic_label, params.batch_size)
    for text, score in zip(texts, scores, strict=True):
        ids = torch.tensor([[vocabulary[word] for word in text.split()][:8]])
        assert score == pytest.approx(model(ids).logits.softmax(1)[0, 2].item(), abs=1e-5)


@pytest.mark.slow
def test_the_stage_scores_documents_with_a_hugging_face_classifier(loaded_classifier, workspace):
    directory = loaded_classifier[0]
    write_labels()
    write_part([document(text, number=number) for number, (text, _) in enumerate(LABELLED)])
    params = audit_params(classifier=classifier(path=str(directory), toxic_label=0).model_dump())
    figures = audit(params, workers=1)
    scores = toxicity.score_loaded([text for text, _ in LABELLED], str(directory), 0, 4)
    assert figures["toxicity/share"] == np.mean(scores >= 0.5)
    assert figures["toxicity/classifier_accuracy"] == np.mean((scores >= 0.5) == [label for _, label in LABELLED])
    assert figures["toxicity/classifier_background"] == 0
    assert not Path("output/classifier").exists()


def test_an_output_that_the_hugging_face_classifier_lacks_is_told(loaded_classifier):
    with pytest.raises(
        ValueError, match=r"`audit\.classifier\.toxic_label` is 3, but .* has 3 outputs, counted from 0"
    ):
        toxicity.check_loaded(classifier(path=str(loaded_classifier[0]), toxic_label=3))


def test_a_directory_that_is_no_classifier_is_told(tmp_path, monkeypatch):
    params = classifier(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"which has no config\.json: name a Hugging Face sequence classifier"):
        toxicity.check_loaded(params)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}), encoding="utf-8")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"which has no \*\.safetensors: other formats of weights can run code"):
        toxicity.check_loaded(params)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"whose architecture is BertModel: a \.\.\.ForSequenceClassification is needed"
    ):
        toxicity.check_loaded(params)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.setattr(sys, "path", [])
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=r"install transformers, `pip install arriero\[classifier\]`"):
        toxicity.check_loaded(params)


# --- the corpus and the whole stage ---


def test_a_corpus_without_parts_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no part-\*\.parquet: run `dvc repro clean` first"):
        corpus.find_parts(tmp_path)


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    path = tmp_path / "part-00000.parquet"
    path.write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"part-00000\.parquet can't be read as Parquet .*`dvc repro -f clean`"):
        next(corpus.read_part(path, 1))


def test_a_part_without_a_column_is_named(tmp_path):
    path = tmp_path / "part-00000.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["b"]}), path)
    with pytest.raises(ValueError, match=r"part-00000\.parquet has no column `source`, `language`"):
        next(corpus.read_part(path, 1))


def test_a_source_called_all_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no source can be called `all`: rename it"):
        next(corpus.read_part(write_part([document("a", source="all")], directory=tmp_path), 1))


def test_an_empty_corpus_is_told(workspace):
    write_part([])
    write_labels()
    with pytest.raises(ValueError, match="holds no documents: data/clean/rejected says which rule rejected each"):
        audit(audit_params(), workers=1)


def test_the_stage_reports_shares_worked_by_hand_over_all_sources_and_by_source(workspace):
    write_labels()
    toxic = "All bakers are vile and worthless vermin. All poets are vile and worthless vermin."
    write_part([document(f"{toxic} She knew.", number=1), document("The Germans had bread at noon.", number=2)], 0)
    write_part([document("We had soup at noon.", number=3), document("Regen.", "news", "de", number=4)], 1)
    figures = audit(audit_params())
    assert figures["documents"] == 4
    assert (figures["source/web/documents"], figures["source/news/documents"]) == (3, 1)
    assert (figures["pronouns/she"], figures["pronouns/he"], figures["pronouns/first_person"]) == (0.25, 0, 0.25)
    assert figures["source/web/pronouns/she"] == pytest.approx(1 / 3)
    assert (figures["identities/nationality"], figures["source/news/identities/nationality"]) == (0.25, 0)
    assert (figures["languages/en"], figures["languages/de"], figures["source/news/languages/de"]) == (0.75, 0.25, 1)
    assert (figures["toxicity/documents_scored"], figures["toxicity/share"]) == (3, pytest.approx(1 / 3))
    assert "source/news/toxicity/share" not in figures
    assert figures["toxicity/classifier_auc"] == 1
    assert 0 < figures["toxicity/classifier_auc_low"] < 1
    assert (figures["toxicity/classifier_sentences"], figures["toxicity/classifier_background"]) == (20, 2)

    terms = pd.read_csv("output/tables/identity_terms.csv")
    assert terms[["source", "term", "documents", "share_of_group"]].to_numpy().tolist() == [
        ["all", "german", 1, 1],
        ["web", "german", 1, 1],
    ]
    pronouns = pd.read_csv("output/plots/pronouns.csv").set_index("group")
    assert pronouns.loc["she"].to_dict() == {"kind": "gender", "documents": 1, "share": 0.25, "share_of_group": 1}
    assert pd.read_csv("output/plots/toxicity_histogram.csv")["documents"].sum() == 3
    assert set(pd.read_csv("output/plots/languages_by_source.csv")["bar"]) == {"web: en", "news: de"}
    assert {path.name for path in Path("record/tables").iterdir()} == {
        path.name for path in Path("output/tables").iterdir()
    }
    pictures = {"pronouns", "identities", "identity_terms", "languages", "toxicity"}
    assert {path.stem for path in Path("record/artifacts").glob("*.png")} == pictures
    assert Path("output/classifier/classifier.skops").exists()


def test_a_corpus_that_names_nobody_in_another_language_is_audited_too(workspace):
    write_labels()
    write_part([document("Regen.", language="de")])
    figures = audit(audit_params(), workers=1)
    assert (figures["languages/de"], figures["toxicity/documents_scored"]) == (1, 0)
    assert "toxicity/share" not in figures
    assert pd.read_csv("output/tables/identity_terms.csv").empty


def test_a_labelled_sentence_of_the_corpus_is_no_background(workspace):
    write_labels()
    write_part([document(LABELLED[0][0].upper(), number=1), document("Rain fell.", number=2)])
    assert audit(audit_params(), workers=1)["toxicity/classifier_background"] == 1


@given(st.dictionaries(st.tuples(st.sampled_from("ab"), st.just("terms"), st.sampled_from("xyz")), st.integers(1, 9)))
def test_the_sum_over_sources_is_the_sum_of_the_sources(counts):
    total = report.add_up(Counter(counts))
    for name in "xyz":
        assert total["all", "terms", name] == sum(counts.get((source, "terms", name), 0) for source in "ab")


def test_a_run_that_was_killed_keeps_the_parts_that_it_has_counted_and_scored(workspace):
    write_labels()
    for number, (text, _) in enumerate(LABELLED[8:12]):
        write_part([document(f"She said: {text}", number=number)], number)
    figures = audit(audit_params(), workers=1)
    written = {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()}
    finished = sorted(Path("scratch").glob("*ing/*.json"))
    assert [str(path.relative_to("scratch")) for path in finished[:2]] == [
        "counting/part-00000.json",
        "counting/part-00001.json",
    ]
    assert len(finished) == 8
    for path in finished[1::2]:  # as a run left it that was killed half way
        path.unlink()
    kept = [path.stat().st_ino for path in finished[::2]]
    for directory in ("output", "record"):
        shutil.rmtree(directory)
    assert audit(audit_params(), workers=1) == figures
    assert [path.stat().st_ino for path in finished[::2]] == kept
    assert {path: path.read_bytes() for path in Path("output").rglob("*") if path.is_file()} == written
