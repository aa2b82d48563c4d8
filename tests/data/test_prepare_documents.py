"""`midstream prepare documents`, and documents as a source of a world."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from made_inputs import OPTIONS, contents, run, tokenizer_file

from inputs import png
from midstream.config import Epochs, PublicFolder, Rows, TokenizerFile
from midstream.core.identity import world_fingerprint
from midstream.core.storage import read_json
from midstream.data.examples import TextCodec
from midstream.data.rows import build_row, plan_rows
from midstream.data.sources import Source
from preparing import open_sources, prepare


def write_pages(folder: Path, pages: Sequence[Sequence[str | int]]) -> Path:
    """OBELICS's layout as JSON lines: texts, and pictures by their numbers, as files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for page in pages:
        for number in (part for part in page if isinstance(part, int)):
            path = folder / f"{number}.png"
            path.write_bytes(png(number) if number < 90 else b"no picture")
        texts = [part if isinstance(part, str) else None for part in page]
        images = [f"{part}.png" if isinstance(part, int) else None for part in page]
        lines.append(json.dumps({"texts": texts, "images": images}) + "\n")
    (folder / "pages.jsonl").write_text("".join(lines))
    return folder


def said(codec: TextCodec, ids: list[int]) -> str:
    """What tokens of single bytes say."""
    return codec.decode(ids).replace(" ", "").replace("Ġ", " ").replace("Ċ", "\n")


def words_of(source: Source, codec: TextCodec, example: int) -> list[Any]:
    """A document's texts and the numbers of its pictures, and what ends them, in their order."""
    ids, found, at = source.input_ids(example).tolist(), list[Any](), 0
    for number, place in enumerate(source.places_of(example)):
        found += [said(codec, ids[at:place])] * (place > at)
        data = source.image_bytes(example, number)
        found.append(next(n for n in range(90) if png(n) == data))
        assert ids[place] == codec.separator
        at = place + 1
    assert ids[-1] == codec.end_of_text
    return found + [said(codec, ids[at:-1])] * (len(ids) - 1 > at)


PAGES = [
    ["Two boats.", 1, "One sails.", 2],
    [3, 3, "The same twice."],
    ["A text alone."],
    [4, 5],
    [1, "A boat again"],
]


def test_documents_are_prepared_with_their_pictures_in_place(tmp_path: Path) -> None:
    write_pages(tmp_path / "in", PAGES)
    out = tmp_path / "out"
    done = run("documents", tmp_path / "in", out, max_reject_fraction=0.5)
    assert (done["kind"], done["records"]) == ("interleaved", 5)
    assert done["rejects"] == {"no picture": 1, "pictures without a text": 1}
    # The picture that stands twice in one document, and one that two documents show.
    assert (done["train"]["images"], done["distinct_images"]) == (5, 3)
    source, codec = Source("pages", out), TextCodec.from_file(tokenizer_file())
    kept = [PAGES[0], PAGES[1], PAGES[4]]
    assert [words_of(source, codec, n) for n in range(len(source))] == kept
    # All texts and the end are learnt, no separator behind a picture is.
    shard = source.locate(0)[0]
    assert shard.supervised is not None
    places = [place for n in range(3) for place in source.places_of(n)]
    assert int(np.count_nonzero(shard.supervised == 0)) == len(places) == 5
    before = contents(out)
    run("documents", tmp_path / "in", tmp_path / "again", max_reject_fraction=0.5)
    assert (
        contents(tmp_path / "again")["shards/000000/pictures.npy"]
        == (before["shards/000000/pictures.npy"])
    )
    # A shard of another version of the preparation is made anew, and no other one.
    made = out / "shards/000000/made_from.json"
    versions = read_json(made)
    for version, shards in ((0, {"kept": 1, "new": 0}), (1, {"kept": 0, "new": 1})):
        preparation = versions["preparation"] - version
        made.write_text(json.dumps(versions | {"preparation": preparation}))
        done = run("documents", tmp_path / "in", out, max_reject_fraction=0.5)
        assert done["shards"] == shards


def test_a_picture_that_cannot_be_decoded_is_lost_as_one_that_is_not_there(
    tmp_path: Path,
) -> None:
    write_pages(tmp_path / "in", [["z", "a", 91, "b", 1, "c"], ["d", 2], [92, "all are lost"]])
    undecoded, codec = "picture cannot be decoded", TextCodec.from_file(tokenizer_file())
    beside = {undecoded: 1, "text beside a lost picture": 2}
    expected: dict[Any, tuple[list[Any], int, dict[str, int]]] = {
        "picture": ([["z\n\na\n\nb", 1, "c"], ["d", 2]], 1, {undecoded: 1}),
        "text": ([["z", 1, "c"], ["d", 2]], 1, beside),
        "document": ([["d", 2]], 2, {}),
    }
    for lost, (kept, rejects, left_out) in expected.items():
        options, out = replace(OPTIONS, lost=lost), tmp_path / lost
        done = run("documents", tmp_path / "in", out, options=options, max_reject_fraction=0.9)
        source = Source("pages", out)
        assert [words_of(source, codec, n) for n in range(len(source))] == kept
        assert (done["rejects"], done["dropped_turns"]) == ({undecoded: rejects}, left_out)
    # Documents that are too long are rejects with both numbers.
    options, out = replace(OPTIONS, max_tokens=9), tmp_path / "short"
    done = run("documents", tmp_path / "in", out, options=options, max_reject_fraction=0.9)
    assert done["rejects"] == {"too many tokens": 1, undecoded: 1}
    assert "10, the limit is 9" in (out / "rejects.jsonl").read_text()


def test_sentences_around_a_picture_that_cannot_be_decoded_are_joined_as_others(
    tmp_path: Path,
) -> None:
    write_pages(tmp_path / "in", [[1, 91]])
    infos = [{"image_name": f"{n}.png", "matched_text_index": at} for n, at in ((91, 1), (1, 2))]
    record = {"text_list": ["One.", "Two.", "Three."], "image_info": infos}
    (tmp_path / "in/pages.jsonl").write_text(json.dumps(record))
    run("documents", tmp_path / "in", tmp_path / "out")
    source, codec = Source("pages", tmp_path / "out"), TextCodec.from_file(tokenizer_file())
    assert words_of(source, codec, 0) == ["One. Two.", 1, "Three."]


def test_documents_of_a_world_are_a_source_of_its_own_kind(tmp_path: Path) -> None:
    write_pages(tmp_path / "world/documents/pages", [[n, f"Page {n} shows it."] for n in range(9)])
    world = PublicFolder(
        root=tmp_path / "world",
        fingerprint=world_fingerprint(tmp_path / "world"),
        validation_fraction=0.3,
    )
    assert world.fingerprint is not None
    assert {name: one.kind for name, one in world.fingerprint.sources.items()} == {
        "pages": "interleaved"
    }
    done = prepare(world, TokenizerFile.read(tokenizer_file()), tmp_path / "out")["sources"]
    held = done["pages"]["validation"]
    assert (held["examples"], held["images"]) == (9 - done["pages"]["num_examples"],) * 2
    assert done["pages"]["kind"] == "interleaved"
    assert [part[0] for part in done["pages"]["lengths"]["image"]] == [
        done["pages"]["num_examples"]
    ]
    sources = open_sources(world, tmp_path / "out")
    plan = plan_rows(
        sources, 4, Epochs(sources=("pages",), epochs=1), Rows(row_length=48, batch_rows=2), 0
    )
    rows = [build_row(plan, sources, k, 4) for k in range(len(plan))]
    assert sum(len(row.images) for row in rows) == done["pages"]["num_images"]
    index = read_json(tmp_path / "out/sources/pages/source/source.json")
    assert sum(row.counts.interleaved for row in rows) == index["train"]["tokens"]


def test_what_was_missing_is_looked_for_again_and_no_shard_is_made_anew_for_nothing(
    tmp_path: Path,
) -> None:
    source, fetched = tmp_path / "in", tmp_path / "fetched"
    write_pages(source, [["One.", 1, "Two.", 2]])
    address = "https://nowhere.example/3 has.png"
    page = {"texts": ["Far.", None, None], "images": [None, "1.png", address]}
    (source / "far.jsonl").write_text(json.dumps(page))
    fetched.mkdir()
    for name in ("0", "1"):
        (fetched / f"{name}.png").write_bytes(png(int(name)))
        (fetched / f"{name}.json").write_text(json.dumps({"url": f"https://other.example/{name}"}))
    options = replace(OPTIONS, images=str(fetched))
    done = run("documents", source, tmp_path / "out", options=options)
    assert done["dropped_turns"] == {"missing picture": 2}
    assert done["train"]["images"] == 2
    again = run("documents", source, tmp_path / "out", options=options)
    assert again["shards"] == {"kept": 2, "new": 0}
    (fetched / "2.png").write_bytes(png(2))
    again = run("documents", source, tmp_path / "out", options=options)
    assert again["shards"] == {"kept": 1, "new": 1}
    (fetched / "3.png").write_bytes(png(3))
    (fetched / "3.json").write_text(json.dumps({"url": address}))
    again = run("documents", source, tmp_path / "out", options=options)
    assert again["shards"] == {"kept": 1, "new": 1}
    assert again["dropped_turns"] == {}
    assert again["train"]["images"] == 4
