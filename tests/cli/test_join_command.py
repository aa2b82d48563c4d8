"""`midstream join captions` from the command line, and `midstream prepare` of what it writes."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from midstream.cli.app import app

# Each starts processes.
pytestmark = pytest.mark.slow


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


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
    write_tar(tmp_path / "pictures/00000.tar", pictures)
    write_tar(tmp_path / "synthetic/00000000.tar", dict(reversed(captions.items())))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    places = [str(tmp_path / name) for name in ("pictures", "synthetic", "joined", "source")]
    runner = CliRunner()
    command = ["join", "captions", "--by", "uid", *places[:2], "--out", places[2]]
    result = runner.invoke(app, [*command, "--workers", "1"])
    assert result.exit_code == 0, result.stderr
    assert "6 pictures with synthetic captions" in result.stdout
    command = ["prepare", "captions", places[2], "--out", places[3], "--workers", "1"]
    more = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--require", "synthetic"]
    result = runner.invoke(app, [*command, *more])
    assert result.exit_code == 0, result.stderr
    index = json.loads((tmp_path / "source/source.json").read_text())
    assert index["captions"] == {"original": 6, "synthetic": 6, "left_out": 0}
    assert "is not read" not in result.stdout
    result = runner.invoke(app, ["join", "captions", *places[:2], "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds something else; give a new folder with --out" in result.stderr
