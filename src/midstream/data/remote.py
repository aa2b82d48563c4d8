"""Files at addresses (s3://, gs://, hf://, https://, ...) through `fsspec`.

Servers that are busy and connections that break are asked again, with longer and longer waits;
what they still refuse, and what asking again does not mend, is one error that names the address.
"""

import errno
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal, TypeVar, cast

import fsspec
from fsspec.spec import AbstractBufferedFile

Answer = TypeVar("Answer")
# Size, and what of a file changes with its bytes; of a local file its time (ns).
Stamp = list[int | str | None]

# How often a server is asked, and the wait after the first time, which doubles: a minute in all.
TRIES, FIRST_WAIT_SECONDS = 8, 0.5
# Some clients ask several times themselves: no more tries after this.
_MOST_SECONDS = 120
# Requests that are under way at once, where many files are asked about.
NUM_REQUESTS = 16
# What one request asks for: where a connection breaks, so much is asked for again.
PIECE_BYTES = 4 * 2**20
# Pieces of an open file that stay in memory; the next one is on its way.
_NUM_PIECES = 4
_BUFFER_BYTES = 2**20
# What file systems call the things that change with a file's bytes, and its times, where none do:
# a listing and a file of its own tell times of unequal precision.
_VERSIONS = ("ETag", "etag", "md5", "md5Hash", "checksum", "CRC", "generation", "blob_id")
_TIMES = ("mtime", "created", "modified", "LastModified", "last_modified", "Last-Modified")
_BUSY = frozenset((408, 425, 429, 500, 502, 503, 504))
_REFUSED, _ABSENT, _NO_RANGE = (401, 403), (404, 410), 416
# What clients call the errors of connections, and that of a mode in which they ask for nothing.
_BROKEN = re.compile(
    "Connect|Timeout|Payload|IncompleteRead|ChunkedEncoding|HTTPClientError|Transport|MaxRetry"
)
_OFFLINE = "Offline"
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PACKAGES |= dict.fromkeys(("http", "https"), "aiohttp")
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    """of a bucket that anyone may read, FSSPEC_S3='{"anon": true}'""",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS; "
    """of a bucket that anyone may read, FSSPEC_GS='{"token": "anon"}'""",
    "hf": "correct its name, or run `hf auth login` (or set HF_TOKEN) and ask for access to it",
}
_OTHER_CREDENTIALS = "give an address that may be read from here"

Verdict = Literal["busy", "absent", "refused", "no range", "offline", "other"]


class RemoteError(OSError):
    """A server does not give what an address names, and says so or is not reached."""


class ChangedError(RemoteError):
    """A file is another than when it was first looked at."""


def system_of(url: str) -> tuple[Any, str]:
    """The `fsspec` file system of an address, and the file's name in it.

    Raises ValueError for a kind of address that is not known, or whose package is not there.
    """
    scheme = scheme_of(url)
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        package = _PACKAGES.get(scheme, "")
        way = "pip install 'midstream[objects]'" if package else f"install it ({error})"
        raise ValueError(
            f"{url}: {scheme}:// needs the package {package or 'of its file system'}, which is not "
            f"there; {way}"
        ) from None
    except ValueError as error:
        if "not known" not in str(error):
            raise
        raise ValueError(
            f"{url}: {scheme}:// is no known kind of address; known are s3://, gs://, hf://, "
            "https:// and what else fsspec reads"
        ) from None


def refuse_absent_bucket(url: str) -> None:
    """Raises FileNotFoundError if what an object store's address begins with is not there."""
    bucket = re.match(r"(?:s3a?|gc?s)://[^/]+", url)
    if bucket and not kind_of(bucket[0]):
        raise FileNotFoundError(f"{url}: there is no bucket {bucket[0]}; correct its name")


def scheme_of(url: str) -> str:
    """What stands before "://", of the outermost file system that is on another machine."""
    return url.rpartition("::")[2].partition("://")[0]


def ask(url: str, question: Callable[[Any, str], Answer]) -> Answer:
    """What `question` gets from the file system and the name in it; asked again where that helps.

    Raises FileNotFoundError for what is not there, and RemoteError for what is refused, or not
    given in `TRIES` tries, or two minutes.
    """
    system, path = system_of(url)
    wait, started, draws = FIRST_WAIT_SECONDS, time.monotonic(), Random(f"{os.getpid()} {url}")
    for tries in range(1, TRIES + 1):
        try:
            return question(system, path)
        except Exception as error:
            verdict = _verdict(error)
            own = verdict == "other" and not any(map(_status, _chain(error)))
            if own and isinstance(error, ValueError | OSError | AssertionError):
                raise
            if verdict != "busy":
                raise _final(url, verdict, error) from error
            seconds = time.monotonic() - started
            if tries == TRIES or seconds > _MOST_SECONDS:
                raise RemoteError(
                    f"{url}: asked {tries} times in {seconds:,.0f} s, the last "
                    f"answer was: {_words(error)}; run the same again later, with fewer processes "
                    "at a time if the server is too busy"
                ) from error
        # Processes that were refused together do not come back together.
        time.sleep(wait * draws.uniform(0.5, 1))
        wait *= 2
    raise AssertionError


def _final(url: str, verdict: Verdict, error: Exception) -> OSError:
    if verdict == "absent":
        said = "" if str(error) in url or url in str(error) else f" ({_words(error)})"
        return FileNotFoundError(f"{url} does not exist{said}; correct its name")
    if verdict == "no range":
        return RemoteError(f"{url} ends before the bytes that are asked for ({_words(error)})")
    if verdict == "offline":
        return RemoteError(
            f"{url} is not asked for, since HF_HUB_OFFLINE is set; set HF_HUB_OFFLINE=0 (a study's "
            "processes set it to 1 where it is not)"
        )
    if verdict == "other":
        return RemoteError(f"{url} is not read: {type(error).__name__}, {_words(error)}")
    remedy = _CREDENTIALS.get({"s3a": "s3", "gcs": "gs"}.get(s := scheme_of(url), s))
    return RemoteError(
        f"{url} may not be read with the credentials that are set here, if any ({_words(error)}); "
        f"{remedy or _OTHER_CREDENTIALS}"
    )


def _words(error: BaseException) -> str:
    chain = list(_chain(error))
    said = next((one for one in chain if _status(one)), chain[0])
    status = _status(said)
    text = getattr(said, "message", "") or str(said) or type(said).__name__
    return f"{status} {text}" if status and str(status) not in str(text) else str(text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int:
    """The HTTP status that an error of any client stands for; 0 where it says none."""
    response = getattr(error, "response", None)
    told: list[Any] = [getattr(error, "status", None), getattr(response, "status_code", None)]
    if isinstance(response, dict):
        told.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    if type(error).__module__.partition(".")[0] == "gcsfs":
        told.append(getattr(error, "code", None))
    return next((int(one) for one in told if str(one).isdigit()), 0)


def _verdict(error: Exception) -> Verdict:
    # File systems put their own words over what the server said: that comes first.
    chain = list(_chain(error))
    if status := next(filter(None, map(_status, chain)), 0):
        said: dict[bool, Verdict] = {
            status in _BUSY: "busy",
            status in _ABSENT: "absent",
            status in _REFUSED: "refused",
            status == _NO_RANGE: "no range",
        }
        return said.get(True, "other")
    if any(_OFFLINE in type(one).__name__ for one in chain):
        return "offline"
    if any(map(_is_refused, chain)):
        return "refused"
    if any(map(_is_broken, chain)):
        return "busy"
    return "absent" if isinstance(error, FileNotFoundError) else "other"


def _is_refused(error: BaseException) -> bool:
    # gcsfs has no number in this one.
    forbidden = isinstance(error, OSError) and str(error).startswith("Forbidden")
    return forbidden or isinstance(error, PermissionError) or "Credential" in type(error).__name__


def _is_broken(error: BaseException) -> bool:
    """Whether an error is that of a connection, not of what is asked for."""
    if isinstance(error, FileNotFoundError):
        return False
    names = " ".join(kind.__name__ for kind in type(error).__mro__)
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return True
    return isinstance(error, EOFError) or _BROKEN.search(names) is not None


def fetch(url: str, start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of a file, fewer where it ends; errors as of `ask`."""
    return b"".join(_pieces(url, start, end, whole=False))


def fetch_whole(url: str, start: int, end: int) -> bytes:
    """All bytes from `start` to `end`, wherever connections break; errors as of `ask`.

    Raises RemoteError if the file ends before, and ValueError if its server gives no ranges.
    """
    return b"".join(_pieces(url, start, end, whole=True))


def _pieces(url: str, start: int, end: int, *, whole: bool) -> Iterator[bytes]:
    for low in range(start, end, PIECE_BYTES):
        high = min(low + PIECE_BYTES, end)
        piece = ask(url, lambda system, path: _piece(system, path, low, high, whole))  # noqa: B023
        if len(piece) > high - low:
            raise ValueError(
                f"{url}: its server gives no ranges of files, but {len(piece):,} bytes for the "
                f"{high - low:,} that were asked for; copy it to a local disk"
            )
        yield piece
        if len(piece) < high - low:
            return


def _piece(system: Any, path: str, start: int, end: int, whole: bool) -> bytes:
    try:
        data: bytes = system.cat_file(path, start=start, end=end)
    except Exception as error:
        if _verdict(error) != "no range":
            raise
        data = b""
    if whole and len(data) < end - start:
        # A connection that ended as if all were told; a file that is shorter stays so.
        raise EOFError(f"{len(data):,} of {end - start:,} bytes from byte {start:,} on")
    return data


def kind_of(url: str) -> Literal["file", "directory", ""]:
    """What an address names; "" where there is nothing. Raises RemoteError as `ask`."""

    def question(system: Any, path: str) -> Literal["file", "directory"]:
        info = system.info(path)
        # A web server's list of a folder is a file of its own to the file system.
        listed = info.get("mimetype") == "text/html" and system.isdir(path)
        return "directory" if listed or info["type"] == "directory" else "file"

    try:
        return ask(url, question)
    except FileNotFoundError:
        return ""


def stamp_of_url(url: str, *, fresh: bool = False) -> Stamp:
    """Size and versions of a file; `fresh`: as it is now, whatever a listing said before.

    Raises as `ask`.
    """

    def question(system: Any, path: str) -> Stamp:
        if fresh:
            system.invalidate_cache()
        return _stamp(system.info(path))

    return ask(url, question)


def _stamp(info: dict[str, Any]) -> Stamp:
    for names in (_VERSIONS, _TIMES):
        if told := [str(info[name]) for name in names if info.get(name)]:
            return [info.get("size"), *told]
    return [info.get("size")]


def refuse_changed(url: str, before: Stamp, when: str, remedy: str) -> None:
    """Raises ChangedError, with what it was and is, if a file is another than its stamp says."""
    now = stamp_of_url(url, fresh=True)
    # Stamps once had the time behind the version.
    if now != before[: max(2, len(now))]:
        was, has = (", ".join(map(str, stamp)) for stamp in (before, now))
        raise ChangedError(
            f"{url} changed since {when} (size and version were {was}, are {has}); {remedy}"
        )


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    """An open file that is read piece by piece, the next one ahead of time."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        url, stamp = self.kwargs["url"], self.kwargs["stamp"]
        try:
            return fetch_whole(url, start, min(end, self.size))
        except RemoteError:
            refuse_changed(url, stamp, "it was opened", "run the same again")
            raise


def open_url(url: str) -> io.BufferedReader:
    """A file's bytes as a seekable stream; errors, in opening and reading, as of `fetch_whole`.

    Members of archives (`zip://...::...`), and files whose servers tell no size or give no ranges,
    are read from their beginning to their end by their file system's own stream.
    """
    system, path = system_of(url)
    info = {} if "::" in url else ask(url, lambda system, path: system.info(path))
    if info.get("size") is None or not info.get("partial", True):
        # A file system of a chain is made anew for each question.
        system, raw = ask(url, lambda system, path: (system, system.open(path, "rb")))
    else:
        raw = _Ranges(
            system,
            path,
            block_size=PIECE_BYTES,
            cache_type="background",
            cache_options={"maxblocks": _NUM_PIECES},
            size=info["size"],
            url=url,
            stamp=_stamp(info),
        )
    # Remote streams' own `readline` does not keep to a limit.
    stream = io.BufferedReader(raw, _BUFFER_BYTES)
    # An archive's file system closes its file when nothing holds it any more.
    stream.system = system  # type: ignore[attr-defined]
    return stream
