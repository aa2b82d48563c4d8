"""Token ids of an answer -> whole characters as they come, harmless to whoever shows them."""

import re
import unicodedata

from midstream.data.examples import TextCodec

# A byte in the vocabularies that spell unknown characters out (sentencepiece's byte fallback).
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_INCOMPLETE = "\ufffd"
# Controls that turn the direction of what follows them, beyond the answer.
_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


class TextPieces:
    """The text of a growing list of ids, in pieces that are never taken back.

    The pieces together are `codec.decode(ids).strip()`, as an evaluation reads an answer.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """What one more token adds; empty where it ends in the middle of a character."""
        self.ids.append(token)
        if _BYTE.fullmatch(self.codec.tokenizer.id_to_token(token) or ""):
            # Such bytes are read together: a later one may turn all of them into other characters.
            return ""
        # White space waits as well, since at the end of an answer it is left out.
        return self._grow(self.codec.decode(self.ids).rstrip(_INCOMPLETE))

    def finish(self) -> str:
        """What was held back: the replacement character for bytes that never became a character."""
        return self._grow(self.codec.decode(self.ids))

    def _grow(self, text: str) -> str:
        known, self.text = len(self.text), text.strip()
        return self.text[known:]


def harmless(text: str) -> str:
    """Text with its control characters written out (`\\x1b`), all but line breaks and tabs.

    Those that turn the reading direction are written out too; joiners of emoji and scripts stay.
    """
    return "".join(_written_out(character) for character in text)


def _written_out(character: str) -> str:
    controls = unicodedata.category(character) == "Cc" and character not in "\n\t"
    if controls or unicodedata.bidirectional(character) in _TURNS:
        return character.encode("unicode_escape").decode()
    return character
