"""Pictures that no range of a file holds as they are: the prepared source keeps them itself."""

import base64
import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_captions import outcome, read
from made_inputs import as_lines, contents, run

from inputs import png, tar
from midstream.core.storage import read_json
from midstream.data.sources import Source

ENDS = ("png", "txt")


def inline(number: int) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(png(number)).decode()}"
    asked = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"No {number}."}]
    return {"messages": turns}


def test_pictures_inside_records_are_kept_once_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    records = [inline(number) for number in (1, 2, 1, 3)]
    (tmp_path / "in/talks.jsonl").write_bytes(as_lines(records))
    out = tmp_path / "out"
    done = run("conversations", tmp_path / "in", out)
    assert (done["train"]["images"], done["distinct_images"]) == (4, 3)
    shard = out / "shards/000000"
    assert (shard / "pictures.bin").read_bytes() == png(1) + png(2) + png(3)
    assert "pictures.bin" in read_json(shard / "manifest.json")
    before = contents(out)
    out.rename(tmp_path / "moved")
    (tmp_path / "in/talks.jsonl").rename(tmp_path / "in/gone")
    source = Source("talks", tmp_path / "moved")
    assert [source.image_bytes(n) for n in range(4)] == [png(n) for n in (1, 2, 1, 3)]
    (tmp_path / "in/gone").rename(tmp_path / "in/talks.jsonl")
    run("conversations", tmp_path / "in", out, validation_fraction=0.9)
    run("conversations", tmp_path / "in", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "pack"),
    [("a.tgz", gzip.compress), ("a.tar.bz2", bz2.compress), ("a.TAR.XZ", lzma.compress)],
)
def test_a_packed_tar_gives_its_samples_and_the_source_keeps_their_pictures(
    tmp_path: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    members = {f"{n}.{end}": png(n) if end == "png" else b"a" for n in (0, 1) for end in ENDS}
    folder = tmp_path / "in"
    path = folder / name
    folder.mkdir()
    path.write_bytes(pack(tar(members)))
    run("captions", folder, tmp_path / "out")
    source = Source("s", tmp_path / "out")
    assert [source.image_bytes(n) for n in (0, 1)] == [png(0), png(1)]
    path.write_bytes(pack(tar(members))[:-30])
    with pytest.raises(ValueError, match="cut short or damaged"):
        read(str(folder))
    path.unlink()
    for other in ("a.tar.gz", "a.TBZ2", "a.txz", "a.tar.gzip", "a.tar"):
        (folder / other).write_bytes(pack(tar(members)))
        assert outcome(read(str(folder))) == ["a"] * 2, other
        (folder / other).unlink()


def test_names_that_are_no_utf8_are_read_and_a_picture_that_moved_says_what_to_run(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "b\udcff.png").write_bytes(png(1))
    (folder / "captions.csv").write_bytes(b"image,caption\nb\xff.png,a box\n")
    run("captions", [str(folder)], tmp_path / "out")
    assert run("captions", [str(folder)], tmp_path / "out")["shards"] == {"kept": 1, "new": 0}
    source = Source("s", tmp_path / "out")
    assert source.image_bytes(0) == png(1)
    (folder / "b\udcff.png").rename(folder / "c.png")
    with pytest.raises(
        FileNotFoundError, match=r"'s', .*record 0: its picture .*midstream prepare"
    ):
        source.image_bytes(0)
