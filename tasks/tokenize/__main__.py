"""Turn the corpus into one stream of tokens, mixed by weight (LLaMA section 2.1 and table 1).

Every document becomes BOS, its tokens, EOS. A share of each source is held out for validation, chosen by the
document's id, so that a held-out document stays held out when others are added. The rest is cut into pieces, so that
no whole book fills batch after batch, and drawn into the stream: the sources in proportion to their weights, each
source's pieces in a new random order every epoch.

What a source can't fill within `max_epochs` is shared among the others, in proportion to their weights. That is
settled before the first piece is drawn, so the proportions are the same throughout the stream.

Reads data/clean/documents/part-*.parquet, data/train_tokenizer/tokenizer.model.
Writes train-*.npy (one stream, cut into shards), documents.parquet (where each piece starts in it),
validation-<source>.npy, validation.parquet, mixture.json, plots/mixture.csv.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from model.progress.bar import progress_bar
from model.text.tokenizer import Tokenizer
from tasks.running.digests import fraction_of
from tasks.running.files import write_json
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.plots import Plot, picture
from tasks.running.stage import Stage, start
from tasks.tokenize.encoding import Index, Tokens, encode_parts, open_tokens, read_index
from tasks.tokenize.mixture import draw, plan_targets, shuffled
from tasks.workers.finished import finish_once, link

DOCUMENTS = DATA / "clean" / "documents"
TOKENIZER = DATA / "train_tokenizer" / "tokenizer.model"
MIXTURE = Plot("bars", "Parts of the stream", "share_reached", "source", "share of tokens", "source")


class Source(Section):
    """One source's part in the mixture."""

    weight: float = Field(ge=0, description="its part of the stream's tokens, relative to the other sources' weights")
    max_epochs: float = Field(ge=0, description="maximum number of times its text is used")
    validation_share: float = Field(ge=0, le=1, description="share of its documents held out of the stream")

    @model_validator(mode="after")
    def _is_trained_on_or_not(self) -> Source:
        if len({self.weight == 0, self.max_epochs == 0, self.validation_share == 1}) > 1:
            raise ValueError(
                "a source for validation only has weight 0, max_epochs 0 and validation_share 1, "
                "a source to train on has none of these"
            )
        return self


class Params(Section):
    """The stream and what it is mixed from."""

    num_tokens: int = Field(gt=0, description="maximum tokens to draw")
    min_filled_share: float = Field(
        gt=0, le=1, description="share of num_tokens that the sources must fill within their max_epochs"
    )
    max_piece_tokens: int = Field(gt=1, description="tokens; longer documents are cut into pieces")
    shard_tokens: int = Field(gt=0, description="tokens in one file of the stream")
    mixture: dict[str, Source] = Field(min_length=1, description="the sources and their parts in the stream")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Encode the documents, hold some out, plan the mixture, write the stream."""
    params = stage.params
    tokenizer = Tokenizer(TOKENIZER)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    documents = sorted(DOCUMENTS.glob("part-*.parquet"))
    ids = read_ids(documents)
    check_sources(params.mixture, set(ids))
    held_out = {name: hold_out(ids[name], name, params.mixture[name].validation_share) for name in sorted(ids)}

    started = time.monotonic()
    parts = encode_parts(documents, TOKENIZER, stage.scratch / "encoded", dtype, stage.machine)
    encoded = [open_tokens(part, dtype) for part in parts]
    stage.log({"encoded_tokens_per_second": sum(map(len, encoded)) / (time.monotonic() - started)}, step=0)

    index = read_index(parts)
    train = {name: index[name].select(~held_out[name]).cut(params.max_piece_tokens) for name in held_out}
    validation = {name: index[name].select(held_out[name]) for name in held_out}
    plan = plan_stream(params, train, stage.seed)

    started = time.monotonic()
    write_stream(stage.output, stage.scratch / "shards", params.shard_tokens, plan, train, encoded)
    write_validation(stage.output, validation, encoded)
    stage.log({"stream_tokens_per_second": plan.num_tokens / (time.monotonic() - started)}, step=0)
    return report(stage, plan, train, validation)


# --- the sources ---


def read_ids(documents: list[Path]) -> dict[str, npt.NDArray[np.uint64]]:
    """Return the ids of every source's documents, in ascending order.

    Raises ValueError when there is no document, or one occurs twice: it could then be both held out and trained on.
    """
    import pyarrow as pa
    import pyarrow.parquet

    tables = [pyarrow.parquet.read_table(part, columns=["id", "source"]) for part in documents]
    if not any(len(table) for table in tables):
        raise ValueError(f"{DOCUMENTS} holds no documents: see data/clean/rejected for the rules that rejected them")
    rows = pa.concat_tables(tables, promote_options="permissive").to_pandas()
    twice = rows["id"][rows["id"].duplicated()]
    if len(twice):
        raise ValueError(
            f"{DOCUMENTS} holds document {twice.min()} more than once ({len(twice)} surplus copies): identical texts "
            "must be removed first, see `clean.deduplication` in params.yaml"
        )
    rows["id"] = [int(document, 16) for document in rows["id"]]
    return {str(name): np.sort(group.to_numpy(np.uint64)) for name, group in rows.groupby("source")["id"]}


def check_sources(mixture: dict[str, Source], found: set[str]) -> None:
    """Raise ValueError when the mixture and the corpus don't name the same sources."""
    for name in sorted(set(mixture) - found):
        near = get_close_matches(name, sorted(found - set(mixture)) or sorted(found), n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"the corpus has {', '.join(sorted(found))}"
        raise ValueError(
            f"params.yaml: `tokenize.mixture.{name}` names a source without documents in {DOCUMENTS}; {hint}"
        )
    for name in sorted(found - set(mixture)):
        raise ValueError(
            f"params.yaml: `tokenize.mixture` doesn't name the source `{name}` that {DOCUMENTS} has: add "
            f"`tokenize.mixture.{name}` (weight 0 keeps it for validation), or take it out of clean's sources"
        )
    if not any(source.weight for source in mixture.values()):
        raise ValueError("params.yaml: `tokenize.mixture` gives every source weight 0: nothing is left to train on")


def hold_out(ids: npt.NDArray[np.uint64], name: str, share: float) -> npt.NDArray[np.bool_]:
    """Tell which documents of a source are held out: only a hash of each one's id decides.

    Raises ValueError when the source should have documents held out, or left to train on, and has none.
    """
    fractions = (fraction_of(f"held out {document:016x}") for document in ids.tolist())
    held_out: npt.NDArray[np.bool_] = np.fromiter(fractions, np.float64, len(ids)) < share
    for wanted, chosen, kind, change in (
        (share > 0, held_out, "held out", "raise"),
        (share < 1, ~held_out, "left to train on", "lower"),
    ):
        if wanted and not chosen.any():
            raise ValueError(
                f"params.yaml: `tokenize.mixture.{name}.validation_share` is {share:g}, but none of the source's "
                f"{len(ids)} documents is {kind}: {change} it, or add documents"
            )
    return held_out


# --- the mixture ---


@dataclass(frozen=True)
class Plan:
    """The stream's pieces in order: the number of the source in `names`, and the piece's number in the source."""

    names: list[str]
    sources: npt.NDArray[np.int16]
    pieces: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream."""
        return int(self.lengths.sum())

    def tokens_of(self, name: str) -> int:
        """Return the tokens that a source gives."""
        return int(self.lengths[self.sources == self.names.index(name)].sum()) if name in self.names else 0


def plan_stream(params: Params, train: dict[str, Index], seed: int) -> Plan:
    """Decide the order of all pieces in the stream.

    Raises ValueError when a source gives nothing, or all together give too little.
    """
    names = sorted(name for name, source in params.mixture.items() if source.weight > 0)
    capacities = {name: int(params.mixture[name].max_epochs * train[name].num_tokens) for name in names}
    weights = {name: params.mixture[name].weight for name in names}
    targets = plan_targets(weights, capacities, params.num_tokens)
    drawn = draw(
        [train[name].lengths.tolist() for name in names],
        [targets[name] for name in names],
        [capacities[name] for name in names],
        params.num_tokens,
        [shuffled(len(train[name]), name, seed) for name in names],
    )
    order = np.fromiter(drawn, np.dtype([("source", np.int16), ("piece", np.int64)]))
    lengths = np.zeros(len(order), np.int64)
    for number, name in enumerate(names):
        chosen = order["source"] == number
        lengths[chosen] = train[name].lengths[order["piece"][chosen]]
        if not chosen.any():
            shortest, longest = train[name].lengths.min(), train[name].lengths.max()
            raise ValueError(
                f"params.yaml: `tokenize.num_tokens` is {params.num_tokens}, of which source `{name}` may give "
                f"{targets[name]:.0f}, too little for its next piece (its pieces have {shortest} to {longest} tokens): "
                f"raise num_tokens, or weight or max_epochs in `tokenize.mixture.{name}`"
            )
    plan = Plan(names, order["source"], order["piece"], lengths)
    share = plan.num_tokens / params.num_tokens
    if share < params.min_filled_share:
        raise ValueError(
            f"params.yaml: `tokenize.num_tokens` is {params.num_tokens}, but the sources give {plan.num_tokens} within "
            f"their max_epochs: a share of {share:.3f}, below `tokenize.min_filled_share` ({params.min_filled_share}); "
            "add text, raise max_epochs, or lower num_tokens"
        )
    return plan


# --- the files ---


def write_stream(
    output: Path, finished: Path, shard_tokens: int, plan: Plan, train: dict[str, Index], encoded: list[Tokens]
) -> None:
    """Write train-*.npy, the stream in shards, and documents.parquet.

    Shards are kept below `finished`; those that an earlier run left there are not written again.
    """
    total = plan.num_tokens
    by_number = [train[name] for name in plan.names]
    starts = np.cumsum(plan.lengths) - plan.lengths
    with progress_bar(total, "writing the stream", "token", scaled=True) as bar:
        for number, begin in enumerate(range(0, total, shard_tokens)):
            size = min(shard_tokens, total - begin)
            fill = partial(write_shard, begin, size, plan, starts, by_number, encoded)
            finish_once(finished / f"{number:05d}", fill)
            link(finished / f"{number:05d}" / "tokens.npy", output / f"train-{number:05d}.npy")
            bar.update(size)
    ids, numbers = np.zeros(len(plan.pieces), np.uint64), np.zeros(len(plan.pieces), np.int32)
    for number, index in enumerate(by_number):
        chosen = plan.sources == number
        ids[chosen] = index.ids[plan.pieces[chosen]]
        numbers[chosen] = index.pieces[plan.pieces[chosen]]
    write_table(output / "documents.parquet", plan.names, plan.sources, starts, ids, numbers)


def write_shard(
    begin: int,
    size: int,
    plan: Plan,
    starts: npt.NDArray[np.int64],
    by_number: list[Index],
    encoded: list[Tokens],
    directory: Path,
) -> None:
    """Write tokens.npy, the `size` tokens of the stream from `begin` on; `starts` says where each piece starts."""
    shard = np.lib.format.open_memmap(directory / "tokens.npy", "w+", encoded[0].dtype, (size,))
    first, last = int(np.searchsorted(starts, begin, "right")) - 1, int(np.searchsorted(starts, begin + size))
    cut = begin - int(starts[first])  # tokens of the first piece that are in the previous shard
    filled = 0
    for source, piece in zip(plan.sources[first:last].tolist(), plan.pieces[first:last].tolist(), strict=True):
        tokens = by_number[source].read(piece, encoded)[cut:][: size - filled]
        shard[filled : filled + len(tokens)] = tokens
        filled, cut = filled + len(tokens), 0
    shard.flush()


def write_validation(output: Path, validation: dict[str, Index], encoded: list[Tokens]) -> None:
    """Write validation-<source>.npy, and validation.parquet with each document's start in its source's file."""
    validation = {name: index for name, index in validation.items() if len(index)}
    names = list(validation)
    for name, index in validation.items():
        shape = (index.num_tokens,)
        tokens = np.lib.format.open_memmap(output / f"validation-{name}.npy", "w+", encoded[0].dtype, shape)
        for document, end in enumerate(np.cumsum(index.lengths)):
            tokens[end - index.lengths[document] : end] = index.read(document, encoded)
        tokens.flush()
    sources = np.repeat(np.arange(len(names), dtype=np.int16), [len(index) for index in validation.values()])
    starts = [np.cumsum(index.lengths) - index.lengths for index in validation.values()]
    ids, pieces = [index.ids for index in validation.values()], [index.pieces for index in validation.values()]
    empty = [np.empty(0, np.int64)]
    columns = [np.concatenate(column or empty) for column in (starts, ids, pieces)]
    write_table(output / "validation.parquet", names, sources, *columns)


def write_table(
    path: Path,
    names: list[str],
    sources: npt.NDArray[np.int16],
    starts: npt.NDArray[np.int64],
    ids: npt.NDArray[np.uint64],
    pieces: npt.NDArray[np.int32],
) -> None:
    """Write where documents start: `source`, `start` (in tokens), `id`, `piece` (of a document that was cut)."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = {
        "source": pa.DictionaryArray.from_arrays(pa.array(sources), pa.array(names, pa.string())),
        "start": pa.array(starts, pa.int64()),
        "id": pa.array([f"{document:016x}" for document in ids.tolist()], pa.string()),
        "piece": pa.array(pieces, pa.int32()),
    }
    pyarrow.parquet.write_table(pa.table(columns), path)


def report(stage: Stage[Params], plan: Plan, train: dict[str, Index], validation: dict[str, Index]) -> dict[str, float]:
    """Write the mixture as asked for and as reached (JSON, table, plot); return its figures."""
    import pandas

    mixture = stage.params.mixture
    total_weight = sum(source.weight for source in mixture.values())
    rows: list[dict[str, Any]] = []
    for name, source in sorted(mixture.items()):
        tokens = plan.tokens_of(name)
        rows.append(
            {
                "source": name,
                "share_asked": source.weight / total_weight,
                "share_reached": tokens / plan.num_tokens,
                "tokens": tokens,
                "epochs": tokens / train[name].num_tokens if source.weight else 0.0,
                "max_epochs": source.max_epochs,
                "source_tokens": train[name].num_tokens,
                "source_documents": len(np.unique(train[name].ids)),
                "validation_tokens": validation[name].num_tokens,
                "validation_documents": len(validation[name]),
            }
        )
    summary = {"tokens": plan.num_tokens, "tokens_asked": stage.params.num_tokens, "pieces": len(plan.pieces)}
    write_json(stage.output / "mixture.json", {**summary, "sources": {row["source"]: row for row in rows}})
    table = pandas.DataFrame(rows)
    stage.plot("mixture", table, MIXTURE)
    table.to_csv(stage.tables / "mixture.csv", index=False)
    plot_mixture(table, stage.artifacts / "mixture.png")
    figures: dict[str, float] = {
        "tokens": plan.num_tokens,
        "documents": sum(row["source_documents"] for row in rows if row["max_epochs"]),
        "filled_share": plan.num_tokens / stage.params.num_tokens,
        "validation_tokens": sum(index.num_tokens for index in validation.values()),
        "validation_documents": sum(map(len, validation.values())),
    }
    for row in rows:
        if row["max_epochs"]:
            name = metric_name(row["source"])
            figures[f"epochs/{name}"] = row["epochs"]
            figures[f"share/{name}"] = row["share_reached"]
            figures[f"tokens/{name}"] = row["tokens"]
    return figures


def plot_mixture(table: Any, path: Path) -> None:
    """Plot the shares asked and reached as bars."""
    trained = table[table["max_epochs"] > 0]
    places = np.arange(len(trained))
    with picture(path, 8, 4) as axes:
        axes.bar(places - 0.2, trained["share_asked"], 0.4, label="share_asked")
        axes.bar(places + 0.2, trained["share_reached"], 0.4, label="share_reached")
        for place, share, epochs in zip(places, trained["share_reached"], trained["epochs"], strict=True):
            axes.text(place, share, f"{epochs:.2g} epochs", rotation=30, fontsize=7)
        axes.set_xticks(places, trained["source"], rotation=90)
        axes.set(xlabel="source", ylabel="share of the stream's tokens")
        axes.legend()


if __name__ == "__main__":
    start(Params, run)
