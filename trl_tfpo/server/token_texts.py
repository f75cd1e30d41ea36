# SPDX-License-Identifier: Apache-2.0

"""Decoded text and bytes of tokens."""

import re

from transformers import PreTrainedTokenizerBase


REPLACEMENT = "\ufffd"  # decoded text of an incomplete character
SPACE = "\u0120"  # a space in byte-level vocabularies


def _bytes_by_character() -> dict[str, int]:
    """Map each character of a byte-level vocabulary to its byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenTexts:
    """
    Text and bytes of the tokens of a tokenizer.

    With a byte-level vocabulary or byte fallback, a token may be part of a character. The bytes of such a token cannot
    be decoded.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase):
        self.processing_class = processing_class
        self.special = set(processing_class.all_special_ids)
        self.added = set(processing_class.get_added_vocab().values())  # plain text in all vocabularies
        space = processing_class.get_vocab().get(SPACE)
        is_byte_level = space is not None and processing_class.decode([space]) == " "
        self._byte_of = _bytes_by_character() if is_byte_level else None

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        return str(self.processing_class.decode(ids, skip_special_tokens=skip_special_tokens))

    def continuation(self, before: list[int], ids: list[int]) -> str:
        """
        Return the text that tokens add to the text of earlier tokens.

        It includes a space between the two, and a character that the tokens complete.
        """
        size = 8
        while size < len(before) and self.decode(before[-size:]).startswith(REPLACEMENT):
            size *= 2  # the context must begin with a whole character
        context = self.decode(before[-size:]).rstrip(REPLACEMENT) if before else ""
        whole = self.decode([*before[-size:], *ids])
        return whole[len(context) :] if whole.startswith(context) else self.decode(ids)

    def spell(self, token_id: int, before: int | None = None) -> tuple[str, bytes]:
        """
        Return the text of a token after the token `before`, and the bytes that it adds.

        A special token adds no bytes. The text of an incomplete character is `bytes:` with its bytes, as in OpenAI's
        API.
        """
        if token_id in self.special:
            return self.decode([token_id], skip_special_tokens=False), b""
        token = str(self.processing_class.convert_ids_to_tokens(token_id) or "")  # None for padding of the vocabulary
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", token):
            spelled = bytes.fromhex(fallback[1])
        elif self._byte_of and token and token_id not in self.added:
            spelled = bytes(self._byte_of[character] for character in token)
        else:
            spelled = self.continuation([] if before is None else [before], [token_id]).encode()
        try:
            return spelled.decode(), spelled
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), spelled
