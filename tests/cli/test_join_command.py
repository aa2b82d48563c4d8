"""`midstream join captions` from the command line, and `midstream prepare` of what it writes."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from inputs import byte_tokenizer, midstream, tar

# Each starts processes.
pytestmark = pytest.mark.slow


def test_what_the_command_writes_is_prepared_as_it_is(tmp_path: Path) -> None:
    pictures, captions = {}, {}
    for number in range(6):
        stream, about = io.BytesIO(), {"uid": f"{number:032x}", "sha256": f"{number + 1:064x}"}
        Image.new("RGB", (8, 6), (40 * number, 0, 0)).save(stream, "JPEG")
        pictures |= {f"{number:09d}.jpg": stream.getvalue(), f"{number:09d}.txt": b"its own"}
        pictures[f"{number:09d}.json"] = json.dumps(about).encode()
        made = json.dumps({"syn_text": [f"{k} of {number}" for k in range(5)]})
        captions[f"{number:032x}.syn.json"] = made.encode()
        captions[f"{number:032x}.json"] = json.dumps(about).encode()
    places = [tmp_path / name for name in ("pictures", "synthetic", "joined", "source")]
    for folder, members in zip(places, (pictures, dict(reversed(captions.items()))), strict=False):
        folder.mkdir()
        (folder / "00000.tar").write_bytes(tar(members))
    command = ["join", "captions", "--by", "uid", *places[:2], "--out", places[2]]
    result = midstream(*command, "--workers", "1")
    assert result.exit_code == 0, result.stderr
    assert "6 pictures with synthetic captions" in result.stdout
    command = ["prepare", "captions", places[2], "--out", places[3], "--workers", "1"]
    result = midstream(*command, "--tokenizer", byte_tokenizer(tmp_path), "--require", "synthetic")
    assert result.exit_code == 0, result.stderr
    index = json.loads((tmp_path / "source/source.json").read_text())
    assert index["captions"] == {"original": 6, "synthetic": 6, "left_out": 0}
    assert "is not read" not in result.stdout
    result = midstream("join", "captions", *places[:2], "--out", tmp_path)
    assert result.exit_code == 2
    assert "holds something else; give a new folder with --out" in result.stderr
