# SPDX-License-Identifier: Apache-2.0

"""Text and bytes of single tokens."""

import re

from transformers import PreTrainedTokenizerBase


BROKEN = "\ufffd"  # what a tokenizer decodes a part of a character to
SPACE = "\u0120"  # how byte-level vocabularies spell a space


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TokenTexts:
    """
    Text and bytes of the tokens of a tokenizer.

    A part of a character is a token in byte-level vocabularies and in those with byte fallback. It has bytes, but no text.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase):
        self.processing_class = processing_class
        self.special = set(processing_class.all_special_ids)
        self.added = set(processing_class.get_added_vocab().values())  # spelled as they are in every vocabulary
        space = processing_class.get_vocab().get(SPACE)
        is_byte_level = space is not None and processing_class.decode([space]) == " "
        self._byte_of = _byte_of() if is_byte_level else None

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        return self.processing_class.decode(ids, skip_special_tokens=True)

    def continuation(self, before: list[int], ids: list[int]) -> str:
        """The text of tokens that follow others: with the space between them, and the end of a character begun there."""
        size = 8
        while size < len(before) and self.decode(before[-size:]).startswith(BROKEN):
            size *= 2  # until it begins with a whole character
        lead = self.decode(before[-size:]).rstrip(BROKEN) if before else ""
        whole = self.decode([*before[-size:], *ids])
        return whole[len(lead) :] if whole.startswith(lead) else self.decode(ids)

    def spell(self, token_id: int, before: int | None = None) -> tuple[str, bytes]:
        """
        Text and bytes of a token.

        Args:
            token_id (`int`):
                The token.
            before (`int`, *optional*):
                The token before it; `None` at the beginning of a text.

        Returns:
            `tuple[str, bytes]`: the bytes of successive tokens are those of their text, so a special token has none. The
            text of a part of a character is `bytes:` and its bytes, as in OpenAI's interface.
        """
        if token_id in self.special:
            return self.processing_class.decode([token_id]), b""
        token = self.processing_class.convert_ids_to_tokens(token_id) or ""  # an embedding may have no token
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
