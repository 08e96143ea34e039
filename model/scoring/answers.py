"""Score many answers to one prompt, whose tokens are read once: as rejection sampling does (Llama 2, section 3.2.3).

Prompts are read in a packed batch, and their keys and values kept; then the answers are read, also packed, each token
attending to its prompt and to its own answer up to itself. Scores are those of `model.scoring.reward.score`.

Shapes: T tokens of a packed batch, A answers, L tokens of the longest of them, W tokens of the longest prompt with its
answer, N query heads, K key/value heads, H head size, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.network.packing import Documents, documents_of
from model.network.transformer import Attend, Decoder, Llama, attend, rotary_angles
from model.scoring.reward import RewardModel, packed, plan_batches
from model.text.tokenizer import Tokenizer

Stored = list[tuple[Tensor, Tensor]]  # keys and values of each layer, both (T, K, H), of the prompts of a batch


class Asked(NamedTuple):
    """A prompt's ids, and those that each answer adds to them; an answer of none is scored at the prompt's end."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]


class _Answer(NamedTuple):
    """An answer to be read: where its prompt begins in the packed prompts, and how long that is."""

    place: tuple[int, int]  # number of the prompt, number of the answer
    begin: int
    length: int
    ids: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens of the prompt and the answer."""
        return self.length + len(self.ids)


def score_answers(model: RewardModel, asked: Sequence[Asked], tokens_at_once: int) -> list[list[float]]:
    """Return the score of each answer to each prompt, read at the answer's last token.

    `tokens_at_once` limits memory, and changes no score; a longer prompt, or a longer answer with its prompt, is read
    alone.
    """
    scores = [[0.0] * len(answers) for _, answers in asked]
    with torch.no_grad():
        for batch in plan_batches([each.prompt for each in asked], tokens_at_once):
            stored: Stored = []
            ids_T, documents = packed([asked[number].prompt for number in batch], model.score.weight.device)
            ends_BD = _read(model.model, ids_T, documents, stored)[documents.boundaries[1:] - 1]
            at_the_end = model.score(ends_BD).tolist()
            begins = documents.boundaries.tolist()
            waiting = []
            for number, begin, value in zip(batch, begins, at_the_end, strict=False):
                for answer, ids in enumerate(asked[number].answers):
                    if len(ids):
                        waiting.append(_Answer((number, answer), begin, len(asked[number].prompt), ids))
                    else:
                        scores[number][answer] = value
            for chunk in _chunks(waiting, tokens_at_once):
                found = model.score(_last_states(model.model, chunk, stored)).tolist()
                for (number, answer), value in zip((each.place for each in chunk), found, strict=True):
                    scores[number][answer] = value
    return scores


def log_probabilities(model: Llama, asked: Sequence[Asked], tokens_at_once: int) -> list[list[float]]:
    """Return the log-probability of each answer, its EOS included, in nats."""
    places = [(number, answer) for number, each in enumerate(asked) for answer in range(len(each.answers))]
    dialogues = [[*asked[number].prompt, *asked[number].answers[answer]] for number, answer in places]
    found = [[0.0] * len(answers) for _, answers in asked]
    with torch.no_grad():
        for batch in plan_batches(dialogues, tokens_at_once):
            ids_T, documents = packed([dialogues[number] for number in batch], model.lm_head.weight.device)
            losses_T = model(ids_T, documents, ids_T.roll(-1)).tolist()
            for number, end in zip(batch, documents.boundaries[1:].tolist(), strict=True):
                prompt, answer = places[number]
                length = len(asked[prompt].answers[answer])
                found[prompt][answer] = -sum(losses_T[end - 1 - length : end - 1])
    return found


def check_same_tokenizer(reward: Tokenizer, chat: Tokenizer) -> None:
    """Raise ValueError unless a reward model has the chat model's tokenizer: it would read other ids than it learnt."""
    if reward.vocab_size != chat.vocab_size:
        difference = f"it has {reward.vocab_size} tokens and the other {chat.vocab_size}"
    else:
        other = next((token for token in range(chat.vocab_size) if reward.piece(token) != chat.piece(token)), None)
        if other is None:
            return
        difference = f"token {other} is {reward.piece(other)!r} in it and {chat.piece(other)!r} in the other"
    raise ValueError(
        f"{reward.path} is another tokenizer than {chat.path} ({difference}): a reward model reads a chat model's "
        "answers with the tokenizer that it learnt with; train it from this chat model"
    )


def _chunks(waiting: Sequence[_Answer], tokens_at_once: int) -> Iterator[list[_Answer]]:
    """Join answers, the shortest with their prompts first, while they stay within `tokens_at_once` padded tokens."""
    chunk: list[_Answer] = []
    for answer in sorted(waiting, key=lambda answer: answer.end):
        if chunk and (len(chunk) + 1) * answer.end > tokens_at_once:
            yield chunk
            chunk = []
        chunk.append(answer)
    if chunk:
        yield chunk


def _read(decoder: Decoder, ids_T: Tensor, documents: Documents, stored: Stored) -> Tensor:
    """Read whole prompts, store their keys and values; return their hidden states (T, D)."""

    def read(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        stored.append((k_TKH, v_TKH))
        return attend(q_TNH, k_TKH, v_TKH, documents)

    angles = rotary_angles(decoder.config, documents.positions)
    return decoder.run_layers(ids_T, angles, [read] * decoder.config.num_hidden_layers)


def _last_states(decoder: Decoder, answers: Sequence[_Answer], stored: Stored) -> Tensor:
    """Read answers after their prompts; return the hidden state of each one's last token (A, D)."""
    device = stored[0][0].device
    ids = np.concatenate([np.asarray(answer.ids, dtype=np.int64) for answer in answers])
    documents = documents_of([len(answer.ids) for answer in answers], device)
    lengths_T = np.repeat([answer.length for answer in answers], documents.lengths)
    positions_T = documents.positions + torch.from_numpy(lengths_T).to(device)
    layout = _layout_of(answers, documents, len(stored[0][0]), device)
    attends: Iterator[Attend] = (partial(_go_on, layout, *before) for before in stored)
    hidden_TD = decoder.run_layers(
        torch.from_numpy(ids).to(device), rotary_angles(decoder.config, positions_T), attends
    )
    return hidden_TD[documents.boundaries[1:] - 1]


class _Layout(NamedTuple):
    """Which tokens of a packed batch stand in the rows of a padded one, an answer a row, and what they see."""

    queries: Tensor  # (A, L) tokens of the answers
    is_query: Tensor  # (A, L) not padding
    keys: Tensor  # (A, W) tokens of the prompts and, after these, of the answers
    seen: Tensor  # (A, 1, L, W)


def _layout_of(
    answers: Sequence[_Answer], documents: Documents, num_prompt_tokens: int, device: torch.device
) -> _Layout:
    begins_A = documents.boundaries[:-1].cpu().numpy().astype(np.int64)
    counts_A = np.array(documents.lengths)
    prompt_begins_A = np.array([answer.begin for answer in answers])
    prompt_lengths_A = np.array([answer.length for answer in answers])
    steps_L, places_W = np.arange(counts_A.max()), np.arange((prompt_lengths_A + counts_A).max())
    is_query_AL = steps_L < counts_A[:, None]
    queries_AL = np.where(is_query_AL, begins_A[:, None] + steps_L, 0)
    in_prompt_AW = places_W < prompt_lengths_A[:, None]
    after_AW = num_prompt_tokens + begins_A[:, None] + places_W - prompt_lengths_A[:, None]
    keys_AW = np.where(in_prompt_AW, prompt_begins_A[:, None] + places_W, after_AW)
    keys_AW = np.minimum(keys_AW, num_prompt_tokens + int(counts_A.sum()) - 1)  # padding, which no token sees
    # a token sees the places up to its own; padding sees its row's prompt, as weights of no place at all would be NaN
    seen_ALW = places_W <= prompt_lengths_A[:, None, None] + np.where(is_query_AL, steps_L, 0)[:, :, None]
    as_tensors = (torch.from_numpy(each).to(device) for each in (queries_AL, is_query_AL, keys_AW, seen_ALW[:, None]))
    return _Layout(*as_tensors)


def _go_on(
    layout: _Layout,
    before_k_TKH: Tensor,
    before_v_TKH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
) -> Tensor:
    """Attend from the answers' tokens to their prompts' and their own."""
    # as in model/sampling: on CPUs torch's attention is slow in bfloat16
    dtype = v_TKH.dtype if v_TKH.is_cuda else torch.float32
    k_AKWH, v_AKWH = (
        torch.cat((before_TKH, own_TKH))[layout.keys].transpose(1, 2).to(dtype)
        for before_TKH, own_TKH in ((before_k_TKH, k_TKH), (before_v_TKH, v_TKH))
    )
    q_ANLH = q_TNH[layout.queries].transpose(1, 2).to(dtype)
    out_ANLH = scaled_dot_product_attention(q_ANLH, k_AKWH, v_AKWH, attn_mask=layout.seen, enable_gqa=True)
    return out_ANLH.transpose(1, 2)[layout.is_query]
