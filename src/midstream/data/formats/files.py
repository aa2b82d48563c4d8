"""Input files: where they lie, what they are, how they are read.

A name with "://" in it is an `fsspec` URL. One piece of a file is in memory at a time.
"""

import io
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from glob import glob
from itertools import chain, takewhile
from pathlib import PurePosixPath
from typing import IO, Any
from urllib.parse import unquote

import pyarrow

from midstream.core.digests import (
    PACKED,
    TEXT_SUFFIXES,
    is_hidden,
    is_note,
    is_unnamed,
    plain_name,
    walk,
)
from midstream.core.tokens import name_some
from midstream.data.formats.packed import AsUtf8, is_utf16, open_packed, packed_as
from midstream.data.remote import (
    NUM_REQUESTS,
    RemoteError,
    ask,
    fetch,
    kind_of,
    open_url,
    refuse_absent_bucket,
    stamp_of_url,
    system_of,
)

# How files begin whose names do not say what they are.
_STARTS = {
    ".parquet": rb"PAR1",
    ".arrow": rb"ARROW1|\xff{4}",
    ".json": rb"(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*\"",
}
_ARCHIVES = (".zip", ".rar", ".7z")
_HEAD = 16
_DAMAGE = (EOFError, OSError, UnicodeError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
# A file in place of another: version https://git-lfs.github.com/spec/v1, oid, size.
_POINTER, _POINTER_BYTES = b"version https://", 512
# What servers send in place of a file; a text may begin so.
_PAGES, _DOCUMENTS = (b"<!doctype html", b"<html", b"<?xml"), TEXT_SUFFIXES["txt"]
MAX_LINE_BYTES = 256 * 2**20
_PIECE_BYTES = 2**20
_MAGIC = re.compile(r"[*?[]")
_BRACES = re.compile(r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<list>[^{},]*(?:,[^{},]*)+))\}")
# A folder among its files: a page that lists it, sorted some way or other, or a bucket's marker.
_LISTING = re.compile(r"/(\?[^/]*)?\Z")
_FILE_URL = re.compile(r"\Afile:(//(localhost)?)?(?=/)")


def is_url(name: str) -> bool:
    """Whether `fsspec` reads it."""
    return "://" in name


def find_files(source: str, suffixes: tuple[str, ...], known: Collection[str] = ()) -> list[str]:
    """The files that `source` stands for, sorted by name.

    A file is itself, whatever its name; a folder or a glob pattern is those of `shown_files` whose
    names end in one of `suffixes` (see `full_name`), and that are no notes (README, LICENSE.txt).
    `known`: as of `shown_files`.
    Raises FileNotFoundError with `source` and `suffixes` if there is none, and ValueError for an
    archive that has to be unpacked first.
    """
    found = shown = shown_files(source, known)
    if found != [source]:
        found = [
            file
            for file in shown
            if not is_note(base_name(file)) and full_name(file).endswith(suffixes)
        ]
        found = _once(found)
    if found == [source] and base_name(source).lower().endswith(_ARCHIVES):
        raise ValueError(f"{source} is an archive that no reader opens; unpack it into a folder")
    if not found:
        others = f", but with {name_some(map(base_name, shown), 5)}" if shown else ""
        raise FileNotFoundError(
            f"{source} is no file, folder or pattern with a file named *{', *'.join(suffixes)} "
            f"(or compressed: {', '.join(PACKED)})"
            f"{others}; give the file or the folder that holds them"
        )
    return found


def _once(files: list[str]) -> list[str]:
    """Without what has no name of its own but that of a link to it, as in the hub's cache."""
    bare = {file for file in files if not is_url(file) and is_unnamed(plain_name(base_name(file)))}
    linked = {os.path.realpath(file) for file in files if file not in bare} if bare else set()
    return [file for file in files if file not in bare or os.path.realpath(file) not in linked]


def full_name(path: str) -> str:
    """The file's own name as of `plain_name`; where its end says nothing (part-00000, x.ndjson),
    with the suffix that its content has, if any. What is damaged has none."""
    asked = re.split("[?#]", path)[0] if path.startswith("http") else path  # a.tar?download=true
    name = plain_name(base_name(asked))
    # A pipe would be waited for.
    if not is_unnamed(name) or not (is_url(path) or os.path.isfile(path)):
        return name
    try:
        head = read_head(path, 512)
    except ValueError:
        return name
    if head[257:262] == b"ustar":
        return f"{name}.tar"
    return name + next((end for end, start in _STARTS.items() if re.match(start, head)), "")


def shown_files(source: str, known: Collection[str] = ()) -> list[str]:
    """All files that `source` could mean, sorted by name: a file is itself; a folder is all under
    it, a glob pattern what matches it or lies in folders that match it, but for what is hidden.

    Linked folders are entered. What the source itself names is never hidden. {0000..0123} and {a,b}
    stand for each of their names; FileNotFoundError tells one that is not there. Servers are not
    asked again about `known` files.
    """
    names = _names_in_braces(source)

    def files_of(name: str) -> list[str]:
        if name in known:
            return [name]
        files = _url_files(name) if is_url(name) else _local_files(name)
        if not files and name != source:
            raise FileNotFoundError(f"{name} is not there, which {source} stands for; correct it")
        return files

    if len(names) == 1 or not is_url(source):
        return sorted({*chain.from_iterable(map(files_of, names))})
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return sorted({*chain.from_iterable(pool.map(files_of, names))})


def _names_in_braces(source: str) -> list[str]:
    """What a name with shell-like braces stands for; itself where there is such a file, or none."""
    braces = _BRACES.search(source)
    if braces is None or (not is_url(source) and os.path.exists(source)):
        return [source]
    first, last, listed = braces.groups()
    parts = (listed or "").split(",")
    if first:
        width = max(len(end) if end.startswith("0") else 1 for end in (first, last))
        parts = [f"{n:0{width}}" for n in range(int(first), int(last) + 1)]
    before, after = source[: braces.start()], source[braces.end() :]
    return [name for part in parts for name in _names_in_braces(f"{before}{part}{after}")]


def is_folder(source: str) -> bool:
    """Whether `source` is an existing folder."""
    return kind_of(source) == "directory" if is_url(source) else os.path.isdir(source)


def names_folders(source: str, known: Collection[str]) -> bool:
    """Whether `source` is a folder or a pattern that matches one, and not of `known` files."""
    if source in known:
        return False
    if (names := _names_in_braces(source)) != [source]:
        return any(names_folders(name, known) for name in names)
    if not is_url(source):
        return any(map(os.path.isdir, [source, *glob(source, recursive=True)]))
    matches = _url_matches(source).values() if _MAGIC.search(source) else ()
    return is_folder(source) or any(info["type"] == "directory" for info in matches)


def exists(path: str) -> bool:
    """Whether `path` is an existing file."""
    return kind_of(path) == "file" if is_url(path) else os.path.isfile(path)


def open_binary(path: str) -> io.BufferedReader:
    """The file's bytes as a seekable stream; FileNotFoundError names a file that is not there."""
    return open_url(path) if is_url(path) else open(path, "rb")


def size_of(path: str) -> int:
    """Bytes of the file."""
    if not is_url(path):
        return os.path.getsize(path)
    size = stamp_of_url(path)[0]
    if size is None:
        raise ValueError(f"{path}: its server does not tell its size; copy it to a local disk")
    return int(size)


def read_range(path: str, offset: int, size: int) -> bytes:
    """Up to `size` bytes from `offset` on; fewer where the file ends."""
    if is_url(path):
        return fetch(path, offset, offset + size)
    with open(path, "rb") as stream:
        stream.seek(offset)
        # Memory for `size` bytes is taken before they are read.
        return stream.read(max(0, min(size, os.fstat(stream.fileno()).st_size - offset)))


def folder_of(path: str) -> str:
    """The folder or URL that a file lies in."""
    if not is_url(path):
        return os.path.dirname(path) or "."
    head, mark, tail = _split_chain(path)
    scheme, colon, name = head.partition("://")
    return f"{scheme}{colon}{name.rpartition('/')[0]}{mark}{tail}"


def base_name(path: str) -> str:
    """The file's own name."""
    return _split_chain(path)[0].rpartition("/")[2]


def join(root: str, name: str, where: str) -> str:
    """The file `name` under the folder or URL `root`; links are followed wherever they lead.

    Raises ValueError that names `where` if the name is empty, absolute or a URL, or goes up ("..").
    """
    parts = re.split(r"[/\\]", unquote(name) if is_url(root) else name)
    # "::" joins one file system to another in `fsspec`.
    forbidden = "\0" in name or is_url(name) or (is_url(root) and "::" in name)
    forbidden = forbidden or not (is_url(root) or _is_file_name(name))
    if not name or PurePosixPath(name).is_absolute() or ".." in parts or forbidden:
        raise ValueError(
            f"{where}: {name!r} is no name of a file inside {root}; "
            "names are relative, without '..'"
        )
    head, mark, tail = _split_chain(root)
    slash = "/" if head and not head.endswith("/") else ""
    return f"{head}{slash}{name}{mark}{tail}"


def _is_file_name(name: str) -> bool:
    # Halves of surrogate pairs, other than those that stand for bytes, are in no file's name.
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _is_one(folder: str, other: str) -> bool:
    try:
        return os.path.samefile(folder, other)
    except (OSError, ValueError):  # ValueError: what is no name of a file
        return False


def inside(roots: Sequence[str], name: str, where: str) -> str:
    """The file that a record at `where` calls `name`: under the first of `roots` (folders, URLs).

    An absolute name (or a file:// URL) is itself where it lies under any of them, by whatever links
    it comes there. Links are followed wherever they lead: it is the name that must not leave.
    Raises ValueError as `join`.
    """
    plain = _FILE_URL.sub("", name)
    plain = unquote(plain) if plain != name else name
    if os.path.isabs(plain):
        plain = re.sub(r"/(\.?/)+", "/", plain)
        folders = [root for root in roots if not is_url(root)]
        for root in folders:
            for folder in (os.path.abspath(root), os.path.realpath(root)):
                if plain.startswith(under := folder.rstrip("/") + "/"):
                    return join(root, plain.removeprefix(under), where)
        for above in PurePosixPath(plain).parents:
            for root in folders:
                if _is_one(str(above), root):
                    return join(root, plain.removeprefix(str(above)).lstrip("/"), where)
        raise ValueError(
            f"{where}: {name!r} lies in none of {', '.join(dict.fromkeys(roots))}; name the folder "
            "that it starts from, or write names that are relative to it"
        )
    return join(roots[0], name, where)


def read_lines(path: str) -> Iterator[bytes]:
    """The lines of a file, unpacked as its content says, each with its line end.

    Raises ValueError that names the file if it is compressed and empty, cut short or damaged, or
    if a line is longer than 256 MiB.
    """
    with unpacked(path) as lines:
        number = 0
        while line := _checked(path, lines.readline, MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}: line {number:,} is longer than {MAX_LINE_BYTES:,} bytes; "
                    "give one record a line"
                )
            yield line


def read_pieces(path: str, stream: IO[bytes]) -> Callable[[int], bytes]:
    """`stream.read` of an `unpacked` file with the errors of `read_lines`."""
    return lambda size: _checked(path, stream.read, size)


def read_head(path: str, size: int) -> bytes:
    """The first `size` bytes of a file, unpacked as its content says; errors as of `read_lines`."""
    with unpacked(path) as stream:
        return _checked(path, stream.read, size)


@contextmanager
def open_whole(path: str) -> Iterator[tuple[IO[bytes], int, bool]]:
    """The file's bytes as a seekable stream, how many they are, and whether they were packed.

    What is packed is unpacked into a temporary file first; errors as of `read_lines`.
    """
    with open_binary(path) as stream:
        if not packing(path, stream.peek(_HEAD)[:_HEAD]):
            yield stream, size_of(path), False
            return
    with tempfile.TemporaryFile() as whole, unpacked(path) as stream:
        while piece := _checked(path, stream.read, _PIECE_BYTES):
            whole.write(piece)
        size = whole.tell()
        whole.seek(0)
        yield whole, size, True


def packing(path: str, head: bytes) -> str:
    """What a file that begins with `head` is compressed with (`packed_as`).

    Raises ValueError for what stands for a file that was not fetched, such as a page about it.
    """
    if head == _POINTER and size_of(path) < _POINTER_BYTES:
        raise ValueError(
            f"{path} is not the file but a pointer of Git LFS to it; run git lfs pull in its folder"
        )
    if head.lower().startswith(_PAGES) and not plain_name(base_name(path)).endswith(_DOCUMENTS):
        raise ValueError(
            f"{path} is not the file but a page or an answer of a server; fetch the file itself (a "
            "hub's addresses of files have /resolve/, those of pages /blob/)"
        )
    return packed_as(base_name(path), head)


@contextmanager
def unpacked(path: str) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked as its content says; read it with `read_pieces`."""
    with ExitStack() as stack:
        stream = stack.enter_context(open_binary(path))
        head = stream.peek(_HEAD)[:_HEAD]
        if kind := packing(path, head):
            if not head:
                raise ValueError(f"{path} is an empty file, not a compressed one; fetch it again")
            # pyarrow and not zstandard, whose reader takes the end of a cut file for its end.
            source: Any = (
                pyarrow.input_stream(stream if is_url(path) else path, compression=kind)
                if kind in ("zstd", "lz4")
                else open_packed(stream, kind)
            )
            stream = stack.enter_context(io.BufferedReader(source, _PIECE_BYTES))
            head = _checked(path, stream.peek, _HEAD)[:_HEAD]
            if packed_as("", head):
                raise ValueError(f"{path} is compressed twice; unpack it once, and give the result")
        if is_utf16(_checked(path, stream.peek, 4)[:4]):
            stream = stack.enter_context(io.BufferedReader(AsUtf8(stream), _PIECE_BYTES))
        yield stream


def _checked(path: str, read: Callable[[int], bytes], size: int) -> bytes:
    try:
        return read(size)
    except RemoteError:
        raise
    except _DAMAGE as error:
        if "too much memory" in str(error):  # of zstd: for a window of more than 128 MiB
            raise ValueError(f"{path} has a long window; unpack it: zstd -d --long=31") from None
        raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from None


def _local_files(source: str) -> list[str]:
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        return list(walk(source))
    if not _MAGIC.search(source):
        return []
    matches = [match for match in glob(source, recursive=True) if _is_shown(match, source)]
    # A link to nowhere stays in the list: opening it says so.
    found = (walk(match) if os.path.isdir(match) else [match] for match in matches)
    return list(chain.from_iterable(found))


def _url_files(source: str) -> list[str]:
    kind = kind_of(source)
    if kind == "file":
        return [source]
    if kind == "directory":
        files = ask(source, lambda system, path: system.find(path))
    elif _MAGIC.search(source):
        found = _url_matches(source)
        folders = [name for name, info in found.items() if info["type"] == "directory"]
        files = [name for name in found if name not in folders]
        for folder in folders:
            files += ask(source, lambda system, _: system.find(folder))  # noqa: B023
    else:
        refuse_absent_bucket(source)
        files = []
    system, path = system_of(source)
    files = [file for file in files if not _LISTING.search(file)]
    return [_full_name(system, file, source) for file in files if _is_shown(file, path)]


def _url_matches(pattern: str) -> dict[str, Any]:
    found: dict[str, Any] = ask(pattern, lambda system, path: system.glob(path, detail=True))
    return found


def _is_shown(file: str, source: str) -> bool:
    """Whether nothing is hidden of what a folder or pattern leaves open of a file's name."""
    asked = source.rstrip("/").split("/")
    fixed = sum(1 for _ in takewhile(lambda part: not _MAGIC.search(part), asked))
    parts = file.split("/")[fixed:]
    return not any(is_hidden(part) and part not in asked[fixed:] for part in parts)


def _full_name(system: Any, file: str, source: str) -> str:
    # A chain such as zip://*.jsonl::file.zip keeps what stands behind its first file system.
    _, mark, tail = _split_chain(source)
    return f"{system.unstrip_protocol(file)}{mark}{tail}"


def _split_chain(name: str) -> tuple[str, str, str]:
    return name.partition("::") if is_url(name) else (name, "", "")
