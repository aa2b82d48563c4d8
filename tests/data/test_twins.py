"""Two files that are one are refused with both names; files that only look alike are read."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from made_inputs import run

from midstream.data.formats import files as formats_files
from midstream.data.formats.files import refuse_twins

Put = Callable[[str, bytes], str]


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def parquet(*texts: str) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), stream)
    return stream.getvalue()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def check(put: Put, files: Iterable[tuple[str, bytes]]) -> None:
    refuse_twins({put(name, data): len(data) for name, data in files})


ONE, TWO = lines("one", "first"), lines("two")
RIVER = lines(*(f"The river {n} is wide." for n in range(300)))


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"a.jsonl": ONE, "a.jsonl.gz": gzip.compress(ONE)}, "by their names"),
        ({"d/a.jsonl": ONE, "d/a.jsonl.zst": zstd(ONE)}, "by their names"),
        ({"a.json.gz": gzip.compress(ONE), "a.json.zstd": zstd(ONE)}, "by their names"),
        ({"a.json": ONE, "a.jsonl": TWO}, "by their names"),
        ({"a.parquet": parquet("one"), "a.jsonl.gz": gzip.compress(ONE)}, "by their names"),
        ({"a.jsonl": ONE, "backup/a.jsonl": ONE}, "the same 34 bytes"),
        ({"a.jsonl": ONE, "a (1).jsonl": ONE}, "the same 34 bytes"),
        ({"b/novel.txt": b"Call me", "c/old.txt": b"Call me"}, "the same 7 bytes"),
        ({"raw/a.jsonl": ONE, "a.jsonl.gz": gzip.compress(ONE)}, "once compressed"),
        ({"a.jsonl": RIVER, "packed/a.jsonl.zst": zstd(RIVER)}, "once compressed"),
    ],
)
def test_two_files_that_are_one_are_refused_with_both_names(
    put: Put, files: dict[str, bytes], why: str
) -> None:
    others = {"x.jsonl": lines("x"), "y.jsonl": lines("y"), "z.txt": b"z"}
    check(put, others.items())
    with pytest.raises(ValueError, match="would count twice; remove one") as caught:
        check(put, {**others, **files}.items())
    assert why in str(caught.value)
    assert all(put(name, data) in str(caught.value) for name, data in files.items())


def test_files_that_are_alike_and_differ_are_read(put: Put) -> None:
    big, changed = bytearray(b"x" * 400_000), bytearray(b"x" * 400_000)
    changed[200_000] = ord("y")
    check(
        put,
        {
            "a/part-0.jsonl": lines("one"),
            "b/part-0.jsonl": lines("two"),
            "c/part-0.jsonl.gz": gzip.compress(lines("six")),
            "c/part-1.jsonl.gz": gzip.compress(lines("ten")),
            "empty-0.jsonl": b"",
            "empty-1.jsonl": b"",
            "thesis.tex": b"tex",
            "thesis.txt": b"txt",
            "big.txt": bytes(big),
            "changed.txt": bytes(changed),
        }.items(),
    )


def test_a_link_and_what_it_leads_to_are_one_file_and_empty_ones_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl and .*b\.jsonl are one file"):
        refuse_twins({str(tmp_path / name): 0 for name in ("a.jsonl", "b.jsonl")})


def test_only_files_of_one_size_and_equal_ends_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    whole = formats_files.read_range

    def counted(path: str, offset: int, size: int) -> bytes:
        read.append((Path(path).name, size))
        return whole(path, offset, size)

    monkeypatch.setattr(formats_files, "read_range", counted)
    sizes = {}
    for number in range(20):
        path = tmp_path / f"{number:02d}.tar"
        path.write_bytes(number.to_bytes(2, "big") * (150_000 + number % 10))
        sizes[str(path)] = path.stat().st_size
    refuse_twins(sizes)
    assert {size for _, size in read} == {2**16}
    assert len(read) == 40
    read.clear()
    sizes.pop(str(tmp_path / "03.tar"))
    refuse_twins(sizes)
    assert "13.tar" not in {name for name, _ in read}


def tar(folder: Path, name: str, number: int) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as archive:
        info = tarfile.TarInfo(f"{number}.txt")
        data = json.dumps([number, 5, 6]).encode()
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


def test_every_kind_of_source_refuses_copies_before_it_writes_anything(tmp_path: Path) -> None:
    talk = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}
    talks = tmp_path / "talks"
    talks.mkdir()
    (talks / "train.json").write_text(json.dumps([talk]))
    (talks / "train.jsonl").write_text(json.dumps(talk) + "\n")
    tar(tmp_path / "tars", "0.tar", 1)
    tar(tmp_path / "tars", "1.tar", 2)
    tar(tmp_path / "tars", "old/0.tar", 1)
    for section, folder, both in (
        ("conversations", talks, ("train.json ", "train.jsonl ")),
        ("text", tmp_path / "tars", ("/0.tar", "old/0.tar")),
        ("captions", tmp_path / "tars", ("/0.tar", "old/0.tar")),
    ):
        with pytest.raises(ValueError, match="would count twice") as caught:
            run(section, folder, tmp_path / "out")  # type: ignore[arg-type]
        assert all(name in str(caught.value) for name in both)
        assert not (tmp_path / "out").exists()


def test_what_is_named_alone_is_read_beside_its_copy(tmp_path: Path) -> None:
    for name in ("a.jsonl", "backup/a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ONE if name.endswith("l") else gzip.compress(ONE))
    found = run("text", tmp_path / "a.jsonl", tmp_path / "out")
    assert found["train"]["examples"] == 2
