"""Files by local path and by URL: what a name stands for, what leads out, and cut archives."""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.data.formats.files import (
    base_name,
    exists,
    find_files,
    folder_of,
    inside,
    is_folder,
    join,
    open_binary,
    read_lines,
    read_range,
    size_of,
)

NAMES = ("a.jsonl", "b/c.jsonl.gz", "b/d/e.jsonl", "b/notes.md", "z.txt")


@pytest.fixture(params=["local", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, local or of a URL, that holds files with their names as bytes."""
    if request.param == "local":
        for name in NAMES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        yield str(tmp_path)
        return
    memory = fsspec.filesystem("memory")
    root = f"/files-{tmp_path.name}"
    for name in NAMES:
        memory.pipe(f"{root}/{name}", name.encode())
    yield f"memory:/{root}"
    memory.rm(root, recursive=True)


def short(found: list[str], base: str) -> list[str]:
    root = base.removeprefix("memory://").strip("/")
    return [name.partition(root)[2].lstrip("/") for name in found]


def test_a_folder_is_all_files_under_it_with_such_names_in_order(base: str) -> None:
    found = find_files(base, (".jsonl", ".gz"))
    assert short(found, base) == ["a.jsonl", "b/c.jsonl.gz", "b/d/e.jsonl"]
    assert find_files(f"{base}/", (".jsonl", ".gz"))[0].endswith("a.jsonl")
    assert [read_range(name, 0, 99).decode() for name in found] == short(found, base)


def test_a_file_is_itself_whatever_its_name(base: str) -> None:
    assert find_files(f"{base}/b/notes.md", (".jsonl",)) == [f"{base}/b/notes.md"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b/d/e.jsonl"]),
        ("b/*", ["b/c.jsonl.gz", "b/d/e.jsonl"]),
        ("[ab].jsonl", ["a.jsonl"]),
    ],
)
def test_a_pattern_is_the_files_that_match_and_those_in_folders_that_match(
    base: str, pattern: str, expected: list[str]
) -> None:
    assert short(find_files(f"{base}/{pattern}", (".jsonl", ".gz")), base) == expected


@pytest.mark.parametrize("name", ["", "/b/d", "/nowhere", "/*.tar", "/b/notes.tar"])
def test_a_name_that_stands_for_nothing_is_refused_with_what_was_looked_for(
    base: str, name: str
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        find_files(f"{base}{name}", (".tar", ".parquet"))
    assert f"{base}{name}" in str(caught.value)
    assert "*.tar, *.parquet" in str(caught.value)


def test_linked_folders_are_entered_once_and_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far/x.txt").write_text("x")
    (tmp_path / "near").mkdir()
    (tmp_path / "near/link").symlink_to(tmp_path / "far")
    (tmp_path / "near/loop").symlink_to(tmp_path / "near")
    (tmp_path / "near/gone.txt").symlink_to(tmp_path / "nowhere")
    found = find_files(str(tmp_path / "near"), (".txt",))
    assert [Path(name).name for name in found] == ["gone.txt", "x.txt"]
    with pytest.raises(FileNotFoundError):
        open_binary(found[0])


def test_files_in_an_archive_behind_a_url_are_found_and_read() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("q/a.jsonl", "one\ntwo\n")
        archive.writestr("q/b.txt", "b")
    fsspec.filesystem("memory").pipe("/chain/z.zip", packed.getvalue())
    chain = "::memory://chain/z.zip"
    assert find_files(f"zip://q{chain}", (".jsonl",)) == [f"zip://q/a.jsonl{chain}"]
    assert list(read_lines(f"zip://q/a.jsonl{chain}")) == [b"one\n", b"two\n"]
    assert folder_of(f"zip://q/a.jsonl{chain}") == f"zip://q{chain}"
    assert join(f"zip://q{chain}", "b.txt", "here") == f"zip://q/b.txt{chain}"
    assert base_name(f"zip://q/a.jsonl{chain}") == "a.jsonl"


def test_bytes_are_read_at_any_place_and_the_size_is_known(base: str) -> None:
    path, data = f"{base}/b/d/e.jsonl", b"b/d/e.jsonl"
    assert size_of(path) == len(data)
    for offset in range(len(data) + 2):
        for size in (0, 1, 4, 2**40):
            assert read_range(path, offset, size) == data[offset : offset + size]
    with open_binary(path) as stream:
        stream.seek(4)
        assert stream.read() == data[4:]
    assert exists(path)
    assert not exists(f"{base}/b")
    assert is_folder(f"{base}/b")
    assert not is_folder(path)
    for read in (open_binary, size_of):
        with pytest.raises(FileNotFoundError):
            read(f"{base}/nothing")


def test_a_file_lies_in_its_folder() -> None:
    assert [folder_of(x) for x in ("/a/b.txt", "b.txt", "/b.txt", "a/b/c")] == [
        "/a",
        ".",
        "/",
        "a/b",
    ]
    assert [folder_of(x) for x in ("s3://a/b/c.txt", "memory://c.txt", "memory:///d/c.txt")] == [
        "s3://a/b",
        "memory://",
        "memory:///d",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        "s3://b/x",
        "file:///x",
        "a\0b",
        "..\\x",
    ],
)
@pytest.mark.parametrize("root", ["folder", "memory://folder"])
def test_a_name_that_leads_out_is_refused_by_its_record(root: str, name: str) -> None:
    for find in (join, inside):
        with pytest.raises(ValueError, match=r"^list\.json, record 3: .*inside .*folder"):
            find(root, name, "list.json, record 3")


@pytest.mark.parametrize("name", ["%2e%2e/x", "a/%2E%2E/x", "..%2fx", "x::file", "a::/etc/x"])
def test_a_url_has_further_ways_out_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^here: "):
        join("https://host/folder", name, "here")


@given(
    parts=st.lists(st.sampled_from(["..", ".", "", "a", "a..", "..a", "é", " "]), max_size=5),
)
@settings(max_examples=200, deadline=None)
def test_no_name_reaches_outside_its_folder(parts: list[str]) -> None:
    name = "/".join(parts)
    try:
        found = inside("/some/root", name, "here")
    except ValueError:
        assert ".." in parts or name[:1] in ("", "/")
        return
    assert f"{os.path.normpath(found)}/".startswith("/some/root/")


def test_a_link_may_lead_about_inside_the_folder_but_not_out_of_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/a.png").write_bytes(b"a")
    (tmp_path / "rooted").mkdir()
    (tmp_path / "rooted/secret.png").write_bytes(b"s")
    (root / "in").symlink_to(root / "sub")
    (root / "out").symlink_to(tmp_path / "rooted")
    (root / "secret.png").symlink_to(tmp_path / "rooted/secret.png")
    (tmp_path / "linked").symlink_to(root)
    for folder in (root, tmp_path / "linked"):
        assert Path(inside(str(folder), "in/a.png", "here")).read_bytes() == b"a"
        for name in ("out/secret.png", "secret.png"):
            with pytest.raises(ValueError, match=f"^here: '{name}' is a link that leads out of"):
                inside(str(folder), name, "here")
            assert Path(join(str(folder), name, "here")).read_bytes() == b"s"
