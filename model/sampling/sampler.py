"""Sample responses to prompts, with their log-probabilities: the one engine that every stage samples with.

Each row of a batch holds one unfinished response. The keys and values of what a row has read are in a cache that is
allocated once; a finished row leaves at once, and a waiting prompt takes its place. Prompts that enter together are
read in one packed batch, and each is read once, whatever the number of its samples.

What is drawn depends only on the prompt's seed and the sample's number, not on the batch, its order or its size.

Shapes: R rows, T tokens of a packed batch, L cached tokens, D hidden size, N query heads, K key/value heads, G queries
of each of these, H head size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.network.packing import Documents, documents_of
from model.network.transformer import Attend, Llama, attend, rotary_angles
from model.progress.bar import progress_bar
from model.sampling.fused import fused

PREFILL = 8192  # prompt tokens that are read at once; a longer prompt is read alone

Stored = tuple[Tensor, Tensor]  # keys and values of one layer
Place = tuple[Tensor | slice, Tensor | int]  # rows of the cache and positions in them
OnToken = Callable[[int, int, int], None]  # number of the prompt, number of the sample, token


class Sampling(BaseModel):
    """How tokens are drawn, and how many."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: float = Field(ge=0, description="divides the logits; 0: always the likeliest token")
    top_p: float = Field(gt=0, le=1, description="draw from the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw from this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of a response, EOS included")


@dataclass(frozen=True)
class Response:
    """One response: log-probabilities are the model's own, at temperature 1 over all tokens, in nats."""

    ids: list[int]  # including EOS, if it was reached
    log_probabilities: list[float]  # of each id, given all before it
    finished: bool  # EOS was reached; else the response was cut at max_new_tokens or at the context's end


@dataclass
class _Row:
    """An unfinished response."""

    prompt: int
    sample: int
    length: int  # tokens of the prompt
    uniforms: list[float]  # random numbers in [0, 1) that its tokens are drawn with: as many as there is room for
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)


class Cache:
    """Keys and values of what each row has read; key/value heads that several query heads share are stored once."""

    def __init__(self, model: Llama, max_rows: int, max_length: int) -> None:
        config, weight = model.config, model.lm_head.weight
        layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_size
        # on CPUs torch's attention to one token is up to seven times as fast in float32 as in bfloat16
        dtype = weight.dtype if weight.is_cuda else torch.float32
        # zeros: what is masked gets weight 0, and 0 times a number that is not finite would be NaN
        self.keys = weight.new_zeros((layers, max_rows, heads, max_length, size), dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.cos_L1H, self.sin_L1H = rotary_angles(config, torch.arange(max_length, device=weight.device))

    def angles_of(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary angles of each position."""
        return self.cos_L1H[positions_T], self.sin_L1H[positions_T]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a row to another row."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]

    def reading(self, rows_T: Tensor, documents: Documents) -> Iterator[Attend]:
        """Yield each layer's attention to whole prompts: as in training, but keys and values are stored."""
        for stored in zip(self.keys, self.values, strict=True):
            yield partial(_read, stored, (rows_T, documents.positions), documents)

    def going_on(self, rows_R: Tensor, positions_R: Tensor, lengths: Sequence[int]) -> Iterator[Attend]:
        """Yield each layer's attention for one more token of each of the first rows; lengths include that token."""
        longest, mask_R11L = max(lengths), None
        if min(lengths) < longest:
            unseen_RL = torch.arange(longest, device=rows_R.device) > positions_R[:, None]
            mask_R11L = self.keys.new_zeros(unseen_RL.shape).masked_fill_(unseen_RL, -math.inf)[:, None, None]
        # writing one slice is several times as fast as writing single places; samples of one prompt often allow it
        alike = mask_R11L is None
        place = (slice(len(lengths)), longest - 1) if alike else (rows_R, positions_R)
        for stored in zip(self.keys, self.values, strict=True):
            yield partial(_go_on, stored, place, longest, mask_R11L)


def _write(stored: Stored, place: Place, k_TKH: Tensor, v_TKH: Tensor) -> None:
    rows, positions = place
    for stored_RKLH, x_TKH in zip(stored, (k_TKH, v_TKH), strict=True):
        stored_RKLH[rows, :, positions] = x_TKH.to(stored_RKLH.dtype)


def _read(stored: Stored, place: Place, documents: Documents, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    _write(stored, place, k_TKH, v_TKH)
    return attend(q_TNH, k_TKH, v_TKH, documents)


def _go_on(
    stored: Stored,
    place: Place,
    longest: int,
    mask_R11L: Tensor | None,
    q_RNH: Tensor,
    k_RKH: Tensor,
    v_RKH: Tensor,
) -> Tensor:
    """Attend from one token of each row; queries that share a key/value head stand where the kernel expects tokens."""
    _write(stored, place, k_RKH, v_RKH)
    k_RKLH, v_RKLH = (x_RKLH[: len(q_RNH), :, :longest] for x_RKLH in stored)
    q_RKGH = q_RNH.reshape(*k_RKH.shape[:2], -1, q_RNH.shape[-1]).to(k_RKLH.dtype)
    return scaled_dot_product_attention(q_RKGH, k_RKLH, v_RKLH, attn_mask=mask_R11L).reshape(q_RNH.shape)


def probabilities(log_probabilities_RV: Tensor, sampling: Sampling) -> Tensor:
    """Return the probabilities that tokens are drawn from (R, V), not normalised after some are cut off.

    First the temperature applies, then the top_k likeliest are kept, then the fewest of these that hold top_p of the
    probability (Holtzman et al. 2020). Tokens exactly as likely as the last one kept are kept too, so the order of ties
    doesn't matter.
    """
    kept_RV = (log_probabilities_RV / sampling.temperature).softmax(dim=-1)
    num_tokens = kept_RV.shape[-1]
    top_k = sampling.top_k or num_tokens
    if top_k >= num_tokens and sampling.top_p == 1:
        return kept_RV
    ascending_RV = _ascending(kept_RV)
    ascending_RV[:, : max(0, num_tokens - top_k)] = 0
    below_RV = ascending_RV.cumsum(dim=-1, dtype=torch.float64)
    first_R1 = torch.searchsorted(below_RV, (1 - sampling.top_p) * below_RV[:, -1:], right=True)
    least_R1 = ascending_RV.gather(1, first_R1.clamp_(max=num_tokens - 1))
    return kept_RV * (kept_RV >= least_R1)


# On CPUs numpy sorts thirty times as fast as torch, and finds the maximum ten times as fast.


def _ascending(x_RV: Tensor) -> Tensor:
    if x_RV.device.type == "cpu":
        return torch.from_numpy(np.sort(x_RV.numpy(), axis=-1))
    return x_RV.sort(dim=-1).values


def _greatest(x_RV: Tensor) -> Tensor:
    if x_RV.device.type == "cpu":
        return torch.from_numpy(x_RV.numpy().argmax(axis=-1))
    return x_RV.argmax(dim=-1)


def draw(log_probabilities_RV: Tensor, uniforms: Sequence[float], sampling: Sampling) -> Tensor:
    """Return one token for each row (R,): the likeliest, or the one that the row's uniform number selects."""
    if sampling.temperature == 0:
        return _greatest(log_probabilities_RV)
    sums_RV = probabilities(log_probabilities_RV, sampling).cumsum(dim=-1, dtype=torch.float64)
    uniforms_R1 = torch.tensor(uniforms, dtype=torch.float64, device=sums_RV.device)[:, None]
    ids_R1 = torch.searchsorted(sums_RV, uniforms_R1 * sums_RV[:, -1:], right=True)
    return ids_R1.clamp_(max=sums_RV.shape[-1] - 1).squeeze(1)


def uniform_numbers(seed: int, sample: int, count: int) -> list[float]:
    """Return the random numbers that a sample's tokens are drawn with; a larger count only appends to them."""
    numbers = np.random.default_rng([seed, sample]).integers(0, 2**32, size=count, dtype=np.uint32)
    return [float(number) for number in numbers / 2**32]


class _Batch:
    """The responses being sampled, each in a row of the cache, and those that wait."""

    def __init__(self, model: Llama, prompts: Sequence[Sequence[int]], waiting: deque[_Row], max_rows: int) -> None:
        self.model, self.prompts, self.waiting = model, prompts, waiting
        self.cache = Cache(model, max_rows, max(row.length + len(row.uniforms) for row in waiting))
        self.device = model.lm_head.weight.device
        self.rows: list[_Row | None] = [None] * max_rows
        # the prompt that was read and still has samples waiting: its number, a row that begins with it, and the
        # distribution of each sample's first token
        self.begun: tuple[int, int, Tensor] | None = None

    def enter(self) -> tuple[list[int], Tensor]:
        """Move waiting responses into free rows; return these rows and their first log-probabilities (R, V)."""
        free = [number for number, row in enumerate(self.rows) if row is None]
        if self.begun:  # if its row is free, it still holds the prompt that waiting samples share: use it first
            free.sort(key=lambda number: number != self.begun[1])  # type: ignore[index]
        entered: dict[int, list[int]] = {}  # prompt -> rows
        for number in free[: len(self.waiting)]:
            self.rows[number] = row = self.waiting.popleft()
            entered.setdefault(row.prompt, []).append(number)
        first = {}
        if self.begun and self.begun[0] in entered:
            prompt, source, first[prompt] = self.begun
            self.share(source, entered[prompt])
        new = {prompt: numbers for prompt, numbers in entered.items() if prompt not in first}
        for prompts in _together(new, self.prompts):
            log_probabilities_PV = self.read(prompts, [new[prompt][0] for prompt in prompts])
            first.update(zip(prompts, log_probabilities_PV, strict=True))
        for source, *others in new.values():
            self.share(source, others)
        last = next(reversed(entered))
        more = bool(self.waiting) and self.waiting[0].prompt == last
        self.begun = (last, entered[last][0], first[last]) if more else None
        numbers = [number for rows in entered.values() for number in rows]
        return numbers, torch.stack([first[prompt] for prompt, rows in entered.items() for _ in rows])

    def share(self, source: int, targets: Sequence[int]) -> None:
        """Copy the prompt that one row has read to other rows."""
        for target in targets:
            if target != source:
                self.cache.copy(source, target, self.row(target).length)

    def row(self, number: int) -> _Row:
        """Return a row that isn't free."""
        row = self.rows[number]
        assert row is not None, "the row is free"
        return row

    def read(self, prompts: Sequence[int], numbers: Sequence[int]) -> Tensor:
        """Read prompts into rows, in one packed batch; return the log-probabilities of the next tokens (R, V)."""
        lengths = [len(self.prompts[prompt]) for prompt in prompts]
        documents = documents_of(lengths, self.device)
        ids_T = torch.tensor([token for prompt in prompts for token in self.prompts[prompt]], device=self.device)
        rows_T = torch.tensor(numbers, device=self.device).repeat_interleave(torch.tensor(lengths, device=self.device))
        attends = self.cache.reading(rows_T, documents)
        hidden_TD = self.model.model.run_layers(ids_T, self.cache.angles_of(documents.positions), attends)
        return self.log_probabilities(hidden_TD[documents.boundaries[1:] - 1])

    def go_on(self) -> tuple[list[int], Tensor]:
        """Read the last token of each row; return the rows and the log-probabilities of the next tokens (R, V)."""
        numbers = self.close_up()
        rows = [self.row(number) for number in numbers]
        lengths = [row.length + len(row.ids) for row in rows]
        ids_R = torch.tensor([row.ids[-1] for row in rows], device=self.device)
        positions_R = torch.tensor(lengths, device=self.device) - 1
        attends = self.cache.going_on(torch.tensor(numbers, device=self.device), positions_R, lengths)
        hidden_RD = self.model.model.run_layers(ids_R, self.cache.angles_of(positions_R), attends)
        return numbers, self.log_probabilities(hidden_RD)

    def close_up(self) -> list[int]:
        """Move the last rows into free ones, so that rows start at 0 without gaps; return their numbers."""
        numbers = [number for number, row in enumerate(self.rows) if row is not None]
        gaps = [number for number in range(len(numbers)) if self.rows[number] is None]
        for target in gaps:
            source = numbers.pop()
            row = self.row(source)
            self.cache.copy(source, target, row.length + len(row.ids))
            self.rows[target], self.rows[source] = row, None
        return list(range(len(numbers) + len(gaps)))

    def log_probabilities(self, hidden_RD: Tensor) -> Tensor:
        """Return the model's own distribution (R, V), float32."""
        logits_RV: Tensor = self.model.lm_head(hidden_RD)
        return logits_RV.float().log_softmax(dim=-1)


def _together(chosen: Iterable[int], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Join prompts while their sum stays within PREFILL tokens."""
    joined: list[int] = []
    total = 0
    for prompt in chosen:
        if joined and total + len(prompts[prompt]) > PREFILL:
            yield joined
            joined, total = [], 0
        joined.append(prompt)
        total += len(prompts[prompt])
    if joined:
        yield joined


def sample(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_samples: int,
    eos_id: int,
    seeds: Sequence[int],
    max_rows: int,
    description: str | None,
    on_token: OnToken | None = None,
) -> list[list[Response]]:
    """Return `num_samples` responses to each prompt.

    A response ends with EOS, or is cut after max_new_tokens or at the end of the model's context. `seeds` has one
    number per prompt; `max_rows` limits the responses sampled at once, and with them the memory; `description` names
    the progress bar (None: no bar); `on_token` is called with each token as it is drawn.
    Raises ValueError for an empty prompt, one that leaves no room for a response, and a model that computes NaN.
    """
    assert len(seeds) == len(prompts) and num_samples > 0 and max_rows > 0
    context = model.config.max_position_embeddings
    waiting: deque[_Row] = deque()
    for prompt, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
        if not ids:
            raise ValueError(f"prompt {prompt} is empty: begin it with BOS")
        if len(ids) >= context:
            raise ValueError(
                f"prompt {prompt} has {len(ids)} tokens and leaves no room for a response in the model's context of "
                f"{context}: shorten it"
            )
        room = min(sampling.max_new_tokens, context - len(ids))
        for number in range(num_samples):
            waiting.append(_Row(prompt, number, len(ids), uniform_numbers(seed, number, room)))
    if not waiting:
        return []
    responses: dict[tuple[int, int], Response] = {}
    num_tokens, started = 0, time.perf_counter()
    with (
        torch.inference_mode(),
        progress_bar(len(waiting), description, "response") as bar,
    ):
        batch = _Batch(fused(model), prompts, waiting, min(max_rows, len(waiting)))
        while len(responses) < len(prompts) * num_samples:
            numbers, log_probabilities_RV = batch.enter() if waiting and None in batch.rows else batch.go_on()
            rows = [batch.row(number) for number in numbers]
            ids_R = draw(log_probabilities_RV, [row.uniforms[len(row.ids)] for row in rows], sampling)
            drawn = zip(ids_R.tolist(), log_probabilities_RV.gather(1, ids_R[:, None])[:, 0].tolist(), strict=True)
            num_tokens += len(rows)
            for number, row, (token, log_probability) in zip(numbers, rows, drawn, strict=True):
                if math.isnan(log_probability):
                    raise ValueError(f"the model's logits after prompt {row.prompt} are NaN: its weights are damaged")
                row.ids.append(token)
                row.log_probabilities.append(log_probability)
                if on_token:
                    on_token(row.prompt, row.sample, token)
                if token == eos_id or len(row.ids) == len(row.uniforms):
                    batch.rows[number] = None
                    responses[row.prompt, row.sample] = Response(row.ids, row.log_probabilities, token == eos_id)
                    bar.set_postfix(
                        tokens_per_second=f"{num_tokens / (time.perf_counter() - started):.0f}", refresh=False
                    )
                    bar.update()
    return [[responses[prompt, number] for number in range(num_samples)] for prompt in range(len(prompts))]
