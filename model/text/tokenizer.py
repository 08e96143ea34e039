"""Text to token ids and back: a SentencePiece model of Llama 2's kind (LLaMA section 2.1, Llama 2 section 2.2.1).

Byte-pair encoding of unnormalised text: each text gets a leading space, spaces occur only at the start of tokens,
numbers are split into digits, and characters outside the vocabulary become bytes. So every text survives,
`decode(encode(text)) == text`, except for U+2581 (`▁`), which SentencePiece uses for the space and decodes as one.

A checkpoint directory holds three files of the tokenizer: tokenizer.model (read here, and by llama.cpp) and, written
by `save`, tokenizer.json with tokenizer_config.json (read by transformers and vLLM).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

SPACE = "▁"

# The format of dialogue.py for transformers, in Jinja. It refuses what dialogue.py refuses, and also the names of the
# special tokens, which transformers would read as the tokens themselves.
CHAT_TEMPLATE = r"""
{%- set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else none %}
{%- set turns = messages if system is none else messages[1:] %}
{%- if not turns %}
    {{- raise_exception('the dialogue holds no turn') }}
{%- endif %}
{%- for message in messages %}
    {%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>', bos_token, eos_token, unk_token] %}
        {%- if tag in message['content'] %}
            {{- raise_exception('a message contains ' + tag) }}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
{%- for turn in turns %}
    {%- if turn['role'] != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant take turns, the user first, after at most one message of the system') }}
    {%- endif %}
    {%- set content = turn['content'] %}
    {%- if loop.first and system is not none %}
        {%- set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}
    {%- endif %}
    {%- set content = content.strip() %}
    {%- if turn['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content + ' [/INST]' }}
    {%- elif content %}
        {{- ' ' + content + ' ' + eos_token }}
    {%- else %}
        {{- raise_exception('an answer is empty') }}
    {%- endif %}
{%- endfor %}
""".strip()


class Tokenizer:
    """A tokenizer.model in memory, with the ids of the three tokens that text can never contain."""

    def __init__(self, path: Path) -> None:
        """Read a tokenizer.model.

        Raises ValueError, naming the file, when it is missing, not a SentencePiece model, or not of Llama's kind.
        """
        if not path.is_file():
            raise ValueError(f"{path} is missing: a SentencePiece tokenizer.model is needed there")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model: it is damaged or another kind of file") from None
        self.path = path
        self.vocab_size: int = self._processor.vocab_size()
        self.unk_id: int = self._processor.unk_id()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        difference = _difference_from_llama(self._processor)
        if difference:
            raise ValueError(f"{path} is not a tokenizer of Llama's kind: {difference}")

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Return the ids of `text`, with BOS and EOS if requested; `</s>` in the text is text, never EOS."""
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; BOS and EOS give none, and bytes that are not valid UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"token id {outside[0]} is outside the vocabulary of {self.path} (0 to {self.vocab_size - 1})"
            )
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def piece(self, token: int) -> str:
        """Return a token as SentencePiece writes it: `▁the`, `<0x0A>`, `</s>`."""
        piece: str = self._processor.id_to_piece(token)
        return piece

    def is_byte(self, token: int) -> bool:
        """Return whether a token is a single byte, used for characters outside the vocabulary."""
        return bool(self._processor.is_byte(token))

    def save(self, directory: Path) -> None:
        """Write tokenizer.model, tokenizer.json and tokenizer_config.json into a checkpoint directory.

        transformers can convert a bare tokenizer.model, but then gives different ids for texts that begin with a space;
        tokenizer.json spells out SentencePiece's own rules. One difference remains: transformers reads `</s>` in a
        text as EOS unless called with `split_special_tokens=True`. tokenizer_config.json holds the chat template.
        """
        target = directory / "tokenizer.model"
        if not (target.exists() and target.samefile(self.path)):
            shutil.copyfile(self.path, target)
        specials = {
            "bos_token": self.piece(self.bos_id),
            "eos_token": self.piece(self.eos_id),
            "unk_token": self.piece(self.unk_id),
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
            **specials,
        }
        _write(directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))
        _write(directory / "tokenizer.json", json.dumps(self._as_tokenizers_library(), ensure_ascii=False, indent=1))

    def _as_tokenizers_library(self) -> dict[str, Any]:
        """Return the same tokenizer in the format of Hugging Face's `tokenizers` library."""
        bos = self.piece(self.bos_id)
        added = [
            {
                "id": token,
                "content": self.piece(token),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in sorted((self.unk_id, self.bos_id, self.eos_id))
        ]
        first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        begin = [{"SpecialToken": {"id": bos, "type_id": type_id}} for type_id in (0, 1)]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": SPACE},
                    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [begin[0], first],
                "pair": [begin[0], first, begin[1], second],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos_id], "tokens": [bos]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": self.piece(self.unk_id),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {self.piece(token): token for token in range(self.vocab_size)},
                "merges": [f"{left} {right}" for left, right in self._merges()],
            },
        }

    def _merges(self) -> list[tuple[str, str]]:
        """Return the pairs that merge into a piece of the vocabulary, in merge order.

        SentencePiece stores pieces with scores, not merges: it first joins the two neighbours that form the piece with
        the highest score. So each way to split a piece into two pieces is a merge, and the scores give the order.
        """
        processor = self._processor
        ordinary = {
            processor.id_to_piece(token): token
            for token in range(self.vocab_size)
            if not (processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token))
        }
        merges = []
        for piece, token in ordinary.items():
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in ordinary and right in ordinary:
                    merges.append((-processor.get_score(token), ordinary[left], ordinary[right], left, right))
        return [(left, right) for *_, left, right in sorted(merges)]


def _difference_from_llama(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Return how a SentencePiece model differs from Llama's kind, breaking the guarantees above; "" if it does not."""
    if min(processor.bos_id(), processor.eos_id(), processor.unk_id()) < 0:
        return "it lacks one of the tokens BOS, EOS and unknown"
    if not processor.is_byte(processor.piece_to_id("<0x00>")):
        return "it has no tokens for single bytes; train it with byte_fallback"
    if processor.normalize(" ﬁ  x ") != "▁▁ﬁ▁▁x▁":
        return "it changes the text before encoding; train it with normalization_rule_name=identity, spaces kept"
    pieces = (processor.id_to_piece(token) for token in range(processor.vocab_size()))
    if any(SPACE in piece.lstrip(SPACE) for piece in pieces):
        return "it has tokens that reach past a word's end; train it with split_by_whitespace"
    return ""


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
