import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from midstream.core import storage
from midstream.core.storage import (
    CorruptError,
    append_line,
    new_folder,
    num_cores,
    read_json,
    remove_leftovers,
    verify,
    write_bytes,
    write_json,
)


def _everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_is_written_with_its_folder_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert _everything(tmp_path) == ["deep", "deep/file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_while_writing_keeps_the_old_file_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert _everything(tmp_path) == ["file"]


def test_json_comes_back_and_what_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    value = {"text": "äöü ✓", "numbers": [1, 0.1, -2e-30], "none": None}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == value
    path.write_text('{"a": 1,\n"b" 2}')
    with pytest.raises(ValueError, match=r"value\.json is not JSON \(line 2"):
        read_json(path)


def test_json_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}


def _fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "deep" / "b.bin").write_bytes(b"xyz")


def test_a_new_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with new_folder(path) as temporary:
        _fill(temporary)
        assert not path.exists()
    assert _everything(path) == ["a.bin", "deep", "deep/b.bin", "manifest.json"]
    assert read_json(path / "manifest.json")["deep/b.bin"]["bytes"] == 3
    verify(path)
    assert _everything(tmp_path)[0] == "weights"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with new_folder(path) as temporary:
        _fill(temporary)
    with new_folder(path) as temporary:
        (temporary / "c.bin").write_bytes(b"new")
    assert _everything(path) == ["c.bin", "manifest.json"]
    assert [item.name for item in tmp_path.iterdir()] == ["weights"]


def _interrupted(path: Path, reason: BaseException) -> None:
    with new_folder(path) as temporary:
        (temporary / "c.bin").write_bytes(b"half")
        raise reason


@pytest.mark.parametrize("reason", [ValueError("no"), KeyboardInterrupt()])
def test_an_exception_leaves_no_new_folder_and_keeps_the_old_one(
    tmp_path: Path, reason: BaseException
) -> None:
    path = tmp_path / "weights"
    with pytest.raises(type(reason)):
        _interrupted(path, reason)
    assert _everything(tmp_path) == []
    with new_folder(path) as temporary:
        _fill(temporary)
    before = _everything(tmp_path)
    with pytest.raises(type(reason)):
        _interrupted(path, reason)
    assert _everything(tmp_path) == before
    verify(path)


def test_a_killed_writer_leaves_no_folder_and_its_leftovers_can_be_removed(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from midstream.core.storage import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_bytes(b'x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "weights"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    (tmp_path / f".results.json.{'0f' * 16}.tmp").write_text("{")
    others = [".bashrc.old", ".hidden", ".mine.tmp"]
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    assert remove_leftovers(tmp_path) == 2
    assert _everything(tmp_path) == others
    assert remove_leftovers(tmp_path) == 0


def test_verify_detects_any_flipped_byte(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with new_folder(path) as temporary:
        _fill(temporary)
    for name in ("a.bin", "deep/b.bin"):
        whole = (path / name).read_bytes()
        for index in range(len(whole)):
            for bit in (1, 128):
                flipped = bytearray(whole)
                flipped[index] ^= bit
                (path / name).write_bytes(flipped)
                with pytest.raises(CorruptError, match=f"{name} differs"):
                    verify(path)
        (path / name).write_bytes(whole)
    verify(path)


def test_verify_names_what_is_missing_cut_or_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with new_folder(path) as temporary:
        _fill(temporary)
    (path / "a.bin").write_bytes(b"012345678")
    with pytest.raises(CorruptError, match=r"a\.bin differs"):
        verify(path)
    (path / "a.bin").unlink()
    with pytest.raises(CorruptError, match=r"a\.bin is missing"):
        verify(path)
    (path / "manifest.json").unlink()
    with pytest.raises(CorruptError, match="never finished"):
        verify(path)


def test_the_files_reach_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    synced: list[str] = []
    sync = storage._sync_file

    def noted(file: Path) -> None:
        if not path.exists():
            synced.append(file.name)
        sync(file)

    monkeypatch.setattr(storage, "_sync_file", noted)
    with new_folder(path) as temporary:
        _fill(temporary)
    assert {"a.bin", "b.bin"} <= set(synced)


def test_lines_are_added_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    add = append_line(path)
    add({"step": 1})
    assert path.read_text() == '{"step": 1}\n'
    add({"step": 2, "note": "ä"})
    assert path.read_text() == '{"step": 1}\n{"step": 2, "note": "ä"}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        add({"loss": float("inf")})
    assert len(path.read_text().splitlines()) == 2


def test_the_cores_of_a_process_are_those_that_its_container_has_the_time_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    limit = tmp_path / "cpu.max"
    assert num_cores(limit) == 6
    for text, cores in (("max 100000", 6), ("250000 100000", 3), ("50000 100000", 1)):
        limit.write_text(f"{text}\n")
        assert num_cores(limit) == cores
