"""A checkpoint behind lm_eval's interface: its network scores, its sampler generates.

Shapes: T tokens of a packed batch, V vocabulary.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from torch.nn.functional import cross_entropy

from model.network.transformer import Llama
from model.sampling.sampler import Sampling, sample
from model.scoring.reward import packed, plan_batches
from model.text.dialogue import encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.running.digests import number_of

DIALOGUE = "\0messages: "  # begins a prompt that is a dialogue, as JSON: special tokens can't be written as text


class Checkpoint(TemplateLM):  # type: ignore[misc,unused-ignore]
    """A model for lm_eval, whose evaluator takes nothing but subclasses of its own.

    A prompt too long for the context loses its beginning, as with lm_eval's own models; `num_cut` counts those.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, seed: int, max_new_tokens: int, max_rows: int, tokens_at_once: int
    ) -> None:
        super().__init__()
        self.model, self.pieces, self.seed = model, tokenizer, seed
        self.max_new_tokens, self.max_rows, self.tokens_at_once = max_new_tokens, max_rows, tokens_at_once
        self.num_cut = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.pieces.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that begins a text."""
        return self.pieces.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's cache, which is off."""
        return str(self.pieces.path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Return a text's ids, or those of a dialogue and of what follows it."""
        if not string.startswith(DIALOGUE):
            return self.pieces.encode(string, bos=add_special_tokens is not False, eos=False)
        messages, end = json.JSONDecoder().raw_decode(string.removeprefix(DIALOGUE))
        after = string.removeprefix(DIALOGUE)[end:]
        return encode_prompt(messages, self.pieces) + (self.pieces.encode(after, bos=False, eos=False) if after else [])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a dialogue as `tok_encode` reads it. Raises ValueError for a prompt that begins the answer."""
        if not add_generation_prompt:
            raise ValueError("a task with `gen_prefix` begins the answer, which a chat prompt can't: set `chat: false`")
        return DIALOGUE + json.dumps(chat_history)

    def _fitting(self, ids: Sequence[int], room: int) -> list[int]:
        """Return the last ids that leave room in the context."""
        kept = self.model.config.max_position_embeddings - room
        self.num_cut += len(ids) > kept
        return list(ids[-kept:])

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability in nats, and whether each of its tokens is the likeliest."""
        texts = [self._fitting([*context, *continuation], 0) for _, context, continuation in requests]
        lengths = [min(len(each[2]), len(text) - 1) for each, text in zip(requests, texts, strict=True)]
        found = [(0.0, True)] * len(texts)
        with torch.no_grad():
            for batch in plan_batches(texts, self.tokens_at_once):
                ids_T, documents = packed([texts[number] for number in batch], self.model.lm_head.weight.device)
                logits_TV = self.model(ids_T, documents).float()
                next_T = ids_T.roll(-1)
                losses_T = cross_entropy(logits_TV, next_T, reduction="none")
                is_likeliest_T = logits_TV.argmax(dim=-1) == next_T
                for number, end in zip(batch, documents.boundaries[1:].tolist(), strict=True):
                    own = slice(end - 1 - lengths[number], end - 1)
                    found[number] = (-float(losses_T[own].sum()), bool(is_likeliest_T[own].all()))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts. Raises ValueError for one longer than the context."""
        ids = [self.tok_encode(request.args[0]) for request in requests]
        longest, context = max(map(len, ids)), self.model.config.max_position_embeddings
        if longest > context:
            raise ValueError(f"a text of {longest} tokens is longer than the context of {context}: shorten the texts")
        return [value for value, _ in self._loglikelihood_tokens([(None, each[:1], each[1:]) for each in ids])]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt, up to the first of its stop texts."""
        texts = [""] * len(requests)
        alike: dict[Sampling, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[self.sampling_of(request.args[1])].append(number)
        for sampling, numbers in alike.items():
            prompts = [self._fitting(self.tok_encode(requests[n].args[0]), sampling.max_new_tokens) for n in numbers]
            seeds = [number_of(f"{self.seed} benchmarks {requests[n].args[0]}") for n in numbers]
            responses = sample(
                self.model, prompts, sampling, num_samples=1, eos_id=self.pieces.eos_id, seeds=seeds,
                max_rows=self.max_rows, description=None,
            )  # fmt: skip
            for number, (response,) in zip(numbers, responses, strict=True):
                ids = response.ids[: -1 if response.finished else None]
                until = requests[number].args[1].get("until")
                texts[number] = postprocess_generated_text(self.pieces.decode(ids), until, None)
        return texts

    def sampling_of(self, settings: Mapping[str, Any]) -> Sampling:
        """Return a task's generation settings as the sampler's: never more than `max_new_tokens`."""
        wanted = normalize_gen_kwargs(dict(settings), self.max_new_tokens)
        num_tokens = min(wanted["max_gen_toks"], self.max_new_tokens)
        top_p, top_k = wanted.get("top_p") or 1, wanted.get("top_k") or 0
        return Sampling(temperature=wanted["temperature"], top_p=top_p, top_k=top_k, max_new_tokens=num_tokens)
