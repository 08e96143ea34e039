"""Exact and near-duplicates: MinHash signatures, and banding to find the candidates (Broder 1997; Lee et al. 2022).

Texts never travel. Each document leaves a signature of a few hundred bytes; band hashes are shuffled by Dask, which
spills to disk; the signatures of documents that share a band are compared from memory-mapped files.

Shapes: D documents, S shingles of a document, P permutations = B bands * R rows per band.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks.running.params import Section

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

KEYS = {"key": "uint64", "document": "int64", "exact": "bool"}
EDGES = {"first": "int64", "second": "int64", "exact": "bool"}
INDEX = "index.json"
_WORD = re.compile(r"\w+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd: 2**64 / golden ratio


class Deduplication(Section):
    """How alike two documents are before the later one is rejected."""

    shingle_words: int = Field(gt=0, description="words of a shingle, the unit that documents share")
    num_bands: int = Field(gt=0, description="bands: two documents that share one are compared")
    rows_a_band: int = Field(gt=0, description="hashes that must all be equal for a band to be shared")
    min_similarity: float = Field(
        gt=0, le=1, description="Jaccard similarity of shingles at which two documents are duplicates"
    )


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers, one to one (the finaliser of SplitMix64)."""
    import numpy as np

    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def permutations(num: int, seed: int) -> NDArray[np.uint32]:
    """Return permutations h -> a * h + b mod 2**32, a odd, as datasketch 2 draws them: [2, P]."""
    import numpy as np

    generator = np.random.RandomState(seed)
    a = generator.randint(0, 1 << 31, num, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return np.array([a, generator.randint(0, 1 << 32, num, dtype=np.uint32)])


def exact_hash(text: str) -> int:
    """Return a hash that is the same for texts that differ only in case and whitespace."""
    normalised = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normalised.encode(), digest_size=8).digest(), "little")


def sign(texts: Sequence[str], seed: int, params: Deduplication) -> NDArray[np.uint32]:
    """Return the MinHash signatures of the texts' word shingles: [D, P].

    A text shorter than a shingle is one shingle. Case, and whatever separates words, are ignored.
    """
    import numpy as np
    import pandas as pd

    tokens_by_text = [_WORD.findall(text.casefold()) or [text.strip()] for text in texts]
    tokens = np.array([token for tokens in tokens_by_text for token in tokens], dtype=object)
    codes, vocabulary = pd.factorize(tokens)
    hashes = pd.util.hash_array(np.asarray(vocabulary, dtype=object), categorize=False)[codes]
    a, b = permutations(params.num_bands * params.rows_a_band, seed)
    signatures = np.empty((len(texts), len(a)), dtype=np.uint32)
    start = 0
    for index, words in enumerate(tokens_by_text):
        shingles = shingle(hashes[start : start + len(words)], params.shingle_words)
        signatures[index] = minhash(shingles, a, b)
        start += len(words)
    return signatures


def shingle(hashes: NDArray[np.uint64], num_words: int) -> NDArray[np.uint32]:
    """Hash each run of words: [W] -> [S], S = max(1, W - num_words + 1)."""
    import numpy as np

    num = max(1, len(hashes) - num_words + 1)
    combined = np.zeros(num, dtype=np.uint64)
    for offset in range(min(num_words, len(hashes))):
        combined = combined * np.uint64(_MULTIPLIER) + hashes[offset : offset + num]
    return (mix(combined) >> np.uint64(32)).astype(np.uint32)


def minhash(shingles: NDArray[np.uint32], a: NDArray[np.uint32], b: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the least value of the shingles under each permutation, [S] -> [P], in blocks that fit in the cache."""
    import numpy as np

    block = 1024
    least = np.full(len(a), np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles), block):
        values = shingles[None, start : start + block] * a[:, None] + b[:, None]
        np.minimum(least, values.min(axis=1), out=least)
    return least


def band_hashes(signatures: NDArray[np.uint32], params: Deduplication) -> NDArray[np.uint64]:
    """Hash each band together with its number: [D, P] -> [D, B]."""
    import numpy as np

    bands = signatures.reshape(len(signatures), params.num_bands, params.rows_a_band).astype(np.uint64)
    hashed = np.broadcast_to(np.arange(1, params.num_bands + 1, dtype=np.uint64), bands.shape[:2])
    for row in range(params.rows_a_band):
        hashed = mix(hashed * np.uint64(_MULTIPLIER) + bands[:, :, row])
    return hashed


def save(directory: Path, texts: Sequence[str], numbers: NDArray[np.int64], seed: int, params: Deduplication) -> None:
    """Write what the search for duplicates needs to know about documents, in ascending order of their numbers."""
    import numpy as np

    np.save(directory / "numbers.npy", numbers)
    np.save(directory / "exact.npy", np.array([exact_hash(text) for text in texts], dtype=np.uint64))
    np.save(directory / "signatures.npy", sign(texts, seed, params))


def read_keys(path: str, params: Deduplication) -> pd.DataFrame:
    """Return the keys that documents of one partition may share with others: [D * (1 + B)] rows to shuffle by key."""
    import numpy as np
    import pandas as pd

    exact = np.load(f"{path}/exact.npy")
    keys = np.concatenate([exact[:, None], band_hashes(np.load(f"{path}/signatures.npy"), params)], axis=1)
    return pd.DataFrame(
        {
            "key": keys.ravel(),
            "document": np.repeat(np.load(f"{path}/numbers.npy"), keys.shape[1]),
            "exact": np.tile(np.arange(keys.shape[1]) == 0, len(keys)),
        }
    )


def find_edges(keys: pd.DataFrame, directory: str, params: Deduplication) -> pd.DataFrame:
    """Return pairs of duplicates among the documents that share a key here, enough of them to connect each group."""
    import pandas as pd

    read = signature_reader(directory)
    edges: list[tuple[int, int, bool]] = []
    compared: set[bytes] = set()
    shared = keys[keys.duplicated(["exact", "key"], keep=False)].sort_values(["exact", "key", "document"])
    for (exact, _), group in shared.groupby(["exact", "key"], sort=True):
        documents = group["document"].to_numpy()
        if not exact and documents.tobytes() in compared:
            continue  # they shared another band
        if not exact:
            compared.add(documents.tobytes())
        least = 1.0 if exact else params.min_similarity
        edges += [(documents[i], documents[j], bool(exact)) for i, j in connect(read(documents), least)]
    return pd.DataFrame(edges, columns=list(EDGES)).astype(EDGES).drop_duplicates()


def write_index(directory: Path, paths: Sequence[str], starts: Sequence[int]) -> None:
    """Write where the signatures are: the files in order, and the number of the first document in each."""
    (directory / INDEX).write_text(json.dumps({"paths": list(paths), "starts": list(starts)}), encoding="utf-8")


def signature_reader(directory: str) -> Callable[[NDArray[np.int64]], NDArray[np.uint32]]:
    """Return a function from document numbers to signatures, [D] -> [D, P], that maps files instead of reading them."""
    import numpy as np

    index = json.loads((Path(directory) / INDEX).read_text(encoding="utf-8"))

    @lru_cache(maxsize=256)
    def mapped(file: int) -> tuple[Any, Any]:
        path = index["paths"][file]
        return np.load(f"{path}/numbers.npy", mmap_mode="r"), np.load(f"{path}/signatures.npy", mmap_mode="r")

    def read(documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        rows = []
        for document, file in zip(
            documents, np.searchsorted(index["starts"], documents, side="right") - 1, strict=True
        ):
            numbers, signatures = mapped(int(file))
            rows.append(signatures[np.searchsorted(numbers, document)])
        return np.stack(rows)

    return read


def connect(signatures: NDArray[np.uint32], least: float) -> list[tuple[int, int]]:
    """Return edges that connect all rows whose estimated Jaccard similarity reaches `least`, if only through others.

    The estimate is the share of equal hashes. A connected row isn't compared again, so a heap of copies costs one pass.
    """
    import numpy as np

    edges = []
    loose = np.arange(len(signatures))
    while len(loose) > 1:
        queue, loose = [int(loose[0])], loose[1:]
        while queue and len(loose):
            current = queue.pop()
            alike = (signatures[loose] == signatures[current]).mean(axis=1) >= least
            found = loose[alike].tolist()
            edges += [(current, other) for other in found]
            queue += found
            loose = loose[~alike]
    return edges


def find_duplicates(directory: Path, num_partitions: int, params: Deduplication) -> pd.DataFrame:
    """Return the documents to reject: columns document, first (the one of its group that stays), rule.

    Reads the signatures that the index in `directory` lists. The first document of a group stays: the one with the
    lowest number. Runs on the current Dask client; memory holds only pairs of duplicates.
    """
    import dask.dataframe as dd
    import pandas as pd

    paths = json.loads((directory / INDEX).read_text(encoding="utf-8"))["paths"]
    keys: Any = dd.from_map(  # type: ignore[no-untyped-call,unused-ignore]
        read_keys, paths, params=params, meta=pd.DataFrame(columns=list(KEYS)).astype(KEYS)
    )
    edges = (
        keys.shuffle(on="key", npartitions=num_partitions)
        .map_partitions(find_edges, str(directory), params, meta=pd.DataFrame(columns=list(EDGES)).astype(EDGES))
        .compute()
    )
    exact = first_of_each(edges[edges["exact"]])
    near = first_of_each(edges)
    near = near[~near["document"].isin(exact["document"])]
    rejected = pd.concat([exact.assign(rule="duplicate"), near.assign(rule="near_duplicate")])
    return rejected.sort_values("document", ignore_index=True)


def first_of_each(edges: pd.DataFrame) -> pd.DataFrame:
    """Return the first document of its connected component for every other document: columns document, first."""
    import numpy as np
    import pandas as pd
    from scipy.sparse import coo_matrix  # type: ignore[import-untyped,unused-ignore]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped,unused-ignore]

    documents, places = np.unique(edges[["first", "second"]].to_numpy(dtype=np.int64), return_inverse=True)
    rows, columns = places.reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(documents), len(documents)))
    _, labels = connected_components(graph, directed=False)
    first = pd.Series(documents).groupby(labels).transform("min").to_numpy()
    later = documents != first
    return pd.DataFrame({"document": documents[later], "first": first[later]})
