"""Compressed files, and texts in UTF-16: how they are told, and read as what is inside.

Of several compressed streams one behind the other all are read.
"""

import bz2
import codecs
import io
import lzma
import re
from collections.abc import Callable
from gzip import GzipFile
from typing import IO, Any

# How compressed files begin; of zstd also what some of its programs put before its frames.
_BEGINS = {
    "gzip": rb"\x1f\x8b",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\x00",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
    "lz4": rb"\x04\x22\x4d\x18",
}
_ENDS = dict.fromkeys((".gz", ".gzip", ".bgz", ".tgz"), "gzip")
_ENDS |= dict.fromkeys((".bz2", ".tbz", ".tbz2"), "bz2") | dict.fromkeys((".xz", ".txz"), "xz")
_ENDS |= dict.fromkeys((".zst", ".zstd", ".tzst"), "zstd") | {".lz4": "lz4"}
_PLAIN = re.compile(rb"(?!BZ)(\xef\xbb\xbf)?[\t\r\n\x20-\x7e]{7}")
_PIECE_BYTES = 2**20
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


def packed_as(name: str, head: bytes) -> str:
    """What a file of this name that begins with `head` is compressed with; "" if it is not.

    One that is named as if it were, and begins like no text, is a damaged one.
    """
    begins = (kind for kind, pattern in _BEGINS.items() if re.match(pattern, head, re.DOTALL))
    named = (kind for end, kind in _ENDS.items() if name.lower().endswith(end))
    return next(begins, "" if _PLAIN.match(head) else next(named, ""))


def open_packed(stream: IO[bytes], kind: str) -> Any:
    """The bytes that a file of "gzip", "bz2" or "xz" unpacks to; zeros may stand between and behind
    its streams.

    Reading raises EOFError for a file that is cut, OSError or LZMAError for what is no stream.
    """
    return GzipFile(fileobj=stream) if kind == "gzip" else _Streams(stream, _DECOMPRESSORS[kind])


class _Streams(io.RawIOBase):
    # Python's own readers take a stream that is damaged at its head, and xz's padding before
    # another one, for the end of the file.

    def __init__(self, stream: IO[bytes], make: Callable[[], Any]) -> None:
        self._stream, self._make = stream, make
        self._one, self._ahead = make(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b""
        while not found:
            if self._one.eof:
                self._ahead = self._one.unused_data.lstrip(b"\0")
                while not self._ahead and (piece := self._stream.read(_PIECE_BYTES)):
                    self._ahead = piece.lstrip(b"\0")
                if not self._ahead:
                    return 0
                self._one = self._make()
            piece, self._ahead = self._ahead, b""
            if (
                not piece
                and self._one.needs_input
                and not (piece := self._stream.read(_PIECE_BYTES))
            ):
                raise EOFError("it ends inside a stream")
            found = self._one.decompress(piece, len(buffer))
        buffer[: len(found)] = found
        return len(found)


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
