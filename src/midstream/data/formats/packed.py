"""Files of gzip, bzip2 and xz, which may be several streams one behind the other."""

import bz2
import io
import lzma
from collections.abc import Callable
from gzip import GzipFile
from typing import IO, Any

_PIECE_BYTES = 2**20
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


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
