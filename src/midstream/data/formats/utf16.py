"""Text in UTF-16 that begins with its mark, as programs of Windows write it."""

import codecs
import io
from typing import IO, Any

_PIECE_BYTES = 2**20


def is_utf16(head: bytes) -> bool:
    """Whether what begins so (4 bytes do) is UTF-16 by its mark, with which UTF-32's may begin."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return head.startswith(marks) and not head.startswith(codecs.BOM_UTF32_LE)


def decoded(data: bytes) -> str:
    """A text in UTF-8, or by its mark in UTF-16, without the mark; else UnicodeDecodeError."""
    return data.decode("utf-16" if is_utf16(data) else "utf-8-sig")


class AsUtf8(io.RawIOBase):
    """A stream of UTF-16 as one of UTF-8."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._rest = stream, b""
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = b"first"
        while not self._rest and piece:
            piece = self._stream.read(_PIECE_BYTES)
            self._rest = self._decoder.decode(piece, not piece).encode("utf-8", "surrogatepass")
        given, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)
