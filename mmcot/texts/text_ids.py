"""Token ids of texts: whatever a text contains is text, also what looks like a token of the tokenizer.

    encode_text(tokenizer, "It closes <s> and </s> ends it.")    # ends in the end token, and has no other

Ordinary texts have the ids that ``tokenizer(text).input_ids`` gives. Special tokens (``</s>``, ``<pad>``, ``<unk>``,
``<extra_id_0>``) are never found in a text, neither as it is written nor as a normaliser changes it, because they
have names there that no text contains. Tokens that somebody added to the vocabulary and that are not special, such as
``{`` for a T5, remain words of it: they are read back as they are written.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmcot.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, with the special tokens around it that the tokenizer adds, such as the end token.

    Args:
        tokenizer: one of transformers; it must not be changed after its first text.

    Raises:
        InputError: the tokenizer is none of the fast ones, and cannot write the text without its special tokens.
    """
    plain = _without_special_tokens(tokenizer)
    return plain.encode(text).ids if plain is not None else _encode_slowly(tokenizer, text)


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of several texts, as ``encode_text`` does, on all processors.

    Raises:
        InputError: as ``encode_text``.
    """
    plain = _without_special_tokens(tokenizer)
    if plain is None:
        return [_encode_slowly(tokenizer, text) for text in texts]
    return [encoding.ids for encoding in plain.encode_batch(list(texts))]


@functools.lru_cache(8)
def _without_special_tokens(tokenizer: Any) -> Tokenizer | None:
    """A copy of a fast tokenizer with the same ids, whose special tokens no text contains; None of another one.

    ``split_special_tokens`` of transformers does not suffice: a Unigram model, as T5's, has the special tokens among
    its pieces and finds them there, and so does any model after a normaliser that makes ``<`` of a wide one.
    """
    from tokenizers import Tokenizer

    if not getattr(tokenizer, "is_fast", False):
        return None
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {tokenizer.convert_ids_to_tokens(number): _unwritten() for number in _special_ids(tokenizer)}
    for token in written["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    _rename(written["model"], names)
    written["truncation"] = written["padding"] = None  # a tokenizer's file may set both
    return Tokenizer.from_str(json.dumps(written))


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _unwritten() -> str:
    return f" \uffff{secrets.token_hex(16)}"


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a model of the library tokenizers, in its JSON; ids and scores stay."""
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint((*pair, "".join(pair)))]


def _encode_slowly(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    if found := set(ids) & _special_ids(tokenizer) - {tokenizer.unk_token_id}:
        raise InputError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path} makes the special tokens "
            f"{tokenizer.convert_ids_to_tokens(sorted(found))} of the text {text[:80]!r}, expected none; use one of "
            "transformers' fast tokenizers"
        )
    return tokenizer(text, split_special_tokens=True).input_ids
