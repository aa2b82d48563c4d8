"""How files of conversations are cut into units, and which files a name stands for."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midstream.data.formats import read_captions as module
from midstream.data.formats.read_captions import conversation_units, read_conversations
from midstream.data.formats.records import ReadOptions

OPTIONS = ReadOptions()
Put = Callable[[str, bytes], str]


def talk(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"{number}?"}, {"from": "gpt", "value": "Yes."}]
    return {"id": str(number), "conversations": turns}


def as_list(records: Sequence[Any]) -> bytes:
    return json.dumps(records, indent=2).encode()


def as_lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def read(source: str, options: ReadOptions = OPTIONS) -> list[Any]:
    units = conversation_units([source], options)
    return [item for unit in units for item in read_conversations(unit, options)]


@given(num_records=st.integers(0, 25), unit_records=st.integers(1, 9), lines=st.booleans())
@settings(max_examples=40, deadline=None)
def test_units_hold_each_record_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, num_records: int, unit_records: int, lines: bool
) -> None:
    records = [talk(number) for number in range(num_records)]
    path = tmp_path_factory.getbasetemp() / ("talks.jsonl" if lines else "talks.json")
    # A blank line in the middle of a file is no record.
    path.write_bytes(as_lines(records).replace(b"\n", b"\n\n", 1) if lines else as_list(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "UNIT_RECORDS", unit_records)
        units = conversation_units([str(path)], OPTIONS)
    assert len(units) == max(1, -(-num_records // unit_records))
    parts = [list(read_conversations(unit, OPTIONS)) for unit in units]
    assert all(len(part) <= unit_records for part in parts)
    found = [item for part in parts for item in part]
    assert [item.turns[0][0] for item in found] == [f"{n}?" for n in range(num_records)]
    assert len({item.where for item in found}) == num_records


def test_a_folder_is_its_llava_json_or_all_its_json_files(put: Put) -> None:
    put("b/two.json", as_list([talk(2)]))
    put("one.jsonl", as_lines([talk(1)]))
    put("notes.txt", b"[]")
    root = put("", b"")
    assert sorted(item.turns[0][0] for item in read(root)) == ["1?", "2?"]
    assert [item.turns[0][0] for item in read(f"{root}/*.jsonl")] == ["1?"]
    put("llava.json", as_list([talk(3)]))
    assert [item.turns[0][0] for item in read(root)] == ["3?"]


def test_a_json_file_that_holds_no_list_is_refused_by_name(put: Put) -> None:
    put("talks.json", as_list([talk(1)]))
    put("dataset_info.json", b'{"talks": {}}')
    with pytest.raises(ValueError, match=r"dataset_info\.json begins with .*list of records"):
        conversation_units([put("", b"")], OPTIONS)


def test_what_is_not_there_unknown_or_given_twice_is_refused(put: Put) -> None:
    path, other = put("a.json", b"[]"), put("a.csv", b"a,b")
    assert read(path) == []
    with pytest.raises(FileNotFoundError, match="nothing"):
        conversation_units([f"{put('', b'')}/nothing"], OPTIONS)
    with pytest.raises(ValueError, match=r"a\.csv is of no known format"):
        conversation_units([other], OPTIONS)
    with pytest.raises(ValueError, match=r"a\.json is given 2 times"):
        conversation_units([path, path], OPTIONS)


@pytest.mark.parametrize("unit_records", [1, 20_000])
def test_a_list_that_is_cut_at_any_byte_is_refused(
    put: Put, unit_records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_RECORDS", unit_records)
    data = as_list([talk(1), talk(2)])
    units = conversation_units([put("a.json", data)], OPTIONS)
    for wrong in (*(data[:end] for end in range(0, len(data), 5)), data + b"x"):
        path = put("a.json", wrong)
        with pytest.raises(ValueError, match=r"a\.json"):
            conversation_units([path], OPTIONS)
        # Also where it is cut between the two readings.
        with pytest.raises(ValueError, match=r"a\.json"):
            [list(read_conversations(unit, OPTIONS)) for unit in units]
