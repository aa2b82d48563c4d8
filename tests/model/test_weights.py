import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midstream.config import DecoderConfig
from midstream.model.decoder import Decoder
from midstream.model.weights import (
    check,
    fill,
    initialise,
    load_weights,
    read_pickle,
    read_tensors,
    save_weights,
    weights_digest,
)

CONFIG = DecoderConfig(hidden_size=16, num_layers=2, num_heads=2, vocab_size=30)


def decoder_of(seed: int) -> Decoder:
    decoder = Decoder(CONFIG)
    initialise(decoder, seed)
    return decoder


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    decoder = decoder_of(0)
    save_weights(decoder_of(1), path)
    tensors = load_file(path)
    del tensors["norm.weight"]
    tensors["norm.bias"] = torch.zeros(16)
    tensors["output.weight"] = torch.zeros(31, 16)
    tensors["layers.0.ffn_norm.weight"] = tensors["layers.0.ffn_norm.weight"].double()
    save_file(tensors, path)
    before = weights_digest(decoder)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(decoder, path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing: norm.weight [16]; nearest unexpected: norm.bias [16]",
        "unexpected: norm.bias [16]",
        "mismatched: layers.0.ffn_norm.weight is torch.float64 [16] in the file, "
        "torch.float32 [16] in the model",
        "mismatched: output.weight is torch.float32 [31, 16] in the file, "
        "torch.float32 [30, 16] in the model",
    ]
    assert weights_digest(decoder) == before


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_weights(decoder_of(0), tmp_path / "none.safetensors")
    path = tmp_path / "cut.safetensors"
    save_weights(decoder_of(0), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is no readable"):
        load_weights(decoder_of(0), path)
    with pytest.raises(FileNotFoundError, match=r"holds neither .*, only cut\.safetensors"):
        load_weights(decoder_of(0), tmp_path)


@torch.no_grad()
def test_files_and_digests_are_those_of_every_earlier_version(tmp_path: Path) -> None:
    module = nn.ModuleDict({"b": nn.Linear(3, 2), "a": nn.LayerNorm(4)})
    module.register_buffer("table", torch.arange(3))
    for index, parameter in enumerate(module.parameters()):
        parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 8 + index)
    module["a"].half()
    save_weights(module, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    file = "e57728987dfacba803e4dcee3f7ba2bd7f0e1a260e98d484c2abb8c8efe1e6ad"
    assert hashlib.sha256(content).hexdigest() == file
    digest = "22a174f0098780aa62ce82007711220d32646a541d92b12e5cdf2b1e4eef20a6"
    assert weights_digest(module) == digest


@torch.no_grad()
def test_digest_sees_every_value_dtype_and_name() -> None:
    digests = {weights_digest(decoder_of(0))}
    changed = decoder_of(0)
    changed.norm.weight[3] += 1e-6
    digests.add(weights_digest(changed))
    digests.add(weights_digest(decoder_of(0).half()))
    plain = decoder_of(0)
    digests.add(weights_digest(torch.nn.ModuleDict({"other": plain})))
    # Equal bytes in another dtype or another shape.
    for dtype in (torch.float16, torch.bfloat16):
        for shape in ((4,), (2, 2)):
            zeros = torch.nn.ParameterDict({"a": torch.zeros(shape, dtype=dtype)})
            digests.add(weights_digest(zeros))
    assert len(digests) == 8
    assert weights_digest(decoder_of(0)) in digests


class Tied(nn.Module):
    """Embeddings that are the output layer's weights, and a buffer of two names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5)
        self.output.weight = self.embed.weight
        self.register_buffer("table", torch.rand(2, generator=source))
        self.register_buffer("again", self.table)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=source))


def test_tied_tensors_are_stored_once_and_fill_both_names(tmp_path: Path) -> None:
    first, second = Tied(0), Tied(1)
    save_weights(first, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == {
        "embed.weight",
        "output.bias",
        "table",
    }
    load_weights(second, tmp_path / "model.safetensors")
    assert second.output.weight is second.embed.weight
    assert second.again is second.table
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert weights_digest(first) == weights_digest(second) != weights_digest(Tied(2))


def test_tied_tensors_are_read_from_either_name_but_not_if_they_differ(tmp_path: Path) -> None:
    source = Tied(0)
    both = {name: value.clone() for name, value in source.state_dict().items()}
    for left_out in ((), ("embed.weight",), ("output.weight", "again")):
        tensors = {name: value for name, value in both.items() if name not in left_out}
        target = Tied(1)
        fill(target, tensors, path=tmp_path)
        assert weights_digest(target) == weights_digest(source)
    both["output.weight"] = both["output.weight"] + 1
    target = Tied(1)
    with pytest.raises(ValueError, match=r"output\.weight differs from embed\.weight"):
        fill(target, both, path=tmp_path)
    assert weights_digest(target) == weights_digest(Tied(1))
    del both["output.weight"], both["embed.weight"]
    with pytest.raises(ValueError, match=r"missing: embed\.weight \[5, 3\]"):
        fill(target, both, path=tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_without_changing_a_value(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = decoder_of(0)
    tensors = {name: value.to(dtype) for name, value in source.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    target = decoder_of(1)
    load_weights(target, tmp_path)
    for name, value in target.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, tensors[name].float()), name
    assert not torch.equal(target.output.weight, source.output.weight)


@pytest.mark.parametrize(
    ("theirs", "mine"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.int64, torch.float32),
    ],
)
def test_a_dtype_that_would_lose_digits_is_refused(
    tmp_path: Path, theirs: torch.dtype, mine: torch.dtype
) -> None:
    module = nn.ParameterDict({"a": torch.zeros(2, dtype=mine)})
    with pytest.raises(ValueError, match=f"a is {theirs} .* in the file, {mine}"):
        fill(module, {"a": torch.zeros(2, dtype=theirs)}, path=tmp_path)


def test_a_missing_tensor_names_the_nearest_of_its_shape_first(tmp_path: Path) -> None:
    tensors, attention = dict(decoder_of(0).state_dict()), "layers.1.attention"
    tensors[f"{attention}.k_gain.weight"] = tensors.pop(f"{attention}.k_norm.weight")
    tensors[f"{attention}.k_norm.scale"] = torch.zeros(7)
    near = r"missing: \S*k_norm.weight \[16\]; nearest unexpected: \S*k_gain.weight \[16\]\n"
    with pytest.raises(ValueError, match=f"file does not fit this Decoder.*\n.*{near}"):
        check(decoder_of(0), tensors, path=tmp_path / "file")


def in_shards(folder: Path, tensors: dict[str, Tensor], *, kind: str = "safetensors") -> Path:
    """Two shards and their index, as Hugging Face writes them; returns the index."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    folder.mkdir()
    where = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{number:05}-of-00002.{kind}"
        held = {name: tensors[name].clone() for name in part}
        save_file(held, folder / shard) if kind == "safetensors" else torch.save(
            held, folder / shard
        )
        where |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_as_one_by_folder_and_by_index(tmp_path: Path, kind: str) -> None:
    source = decoder_of(0)
    index = in_shards(tmp_path / "a", dict(source.state_dict()), kind=kind)
    for path in (index, index.parent):
        target = decoder_of(1)
        load_weights(target, path)
        assert weights_digest(target) == weights_digest(source)


def test_a_half_downloaded_folder_names_every_missing_shard(tmp_path: Path) -> None:
    index = in_shards(tmp_path / "a", dict(decoder_of(0).state_dict()))
    (tmp_path / "a" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"half downloaded: .* 1 are missing: model-00002-of-00002"
    ):
        read_tensors(index)
    (tmp_path / "a" / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 are missing: model-00001-.*, model-00002-"):
        read_tensors(tmp_path / "a")
    # The index alone came along with whole files of torch.
    torch.save({"a": torch.ones(2)}, tmp_path / "a" / "pytorch_model.bin")
    assert list(read_tensors(tmp_path / "a")) == ["a"]


def test_an_index_may_name_more_or_fewer_tensors_but_not_others(tmp_path: Path) -> None:
    tensors = dict(decoder_of(0).state_dict())
    index = in_shards(tmp_path / "a", tensors)
    where = json.loads(index.read_text())["weight_map"]
    first = next(name for name, shard in where.items() if "00001" in shard)
    extra = where | {"extra.weight": where[first]}
    without = {name: shard for name, shard in where.items() if name != first}
    for said in (extra, without):
        index.write_text(json.dumps({"weight_map": said}))
        found = read_tensors(index)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], one) for name, one in tensors.items())
    for wrong, told in (
        (without | {"extra.weight": where[first]}, f"lack extra.weight and hold {first} unasked"),
        ({"a": "../other.safetensors"}, "no file beside it"),
        ({}, "no 'weight_map'"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=told):
            read_tensors(index)


def test_of_two_shards_with_one_name_the_one_that_the_index_says_is_taken(tmp_path: Path) -> None:
    names = ("a", "b")
    for name, other in zip(names, reversed(names), strict=True):
        save_file({name: torch.ones(2), other: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{name}.safetensors" for name in names}}))
    assert all(one.tolist() == [1, 1] for one in read_tensors(index).values())


class WantsToRun:
    """Asks the one who unpickles it to make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(
    tmp_path: Path, zipped: bool
) -> None:
    path = tmp_path / "epoch_1.pt"
    content = {"state_dict": {"a": torch.zeros(2)}, "more": WantsToRun(tmp_path / "made")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"epoch_1\.pt wants to run code .* (posix|nt|os)\.mkdir"):
        read_pickle(path)
    assert not (tmp_path / "made").exists()


def test_numbers_of_numpy_are_plain_values(tmp_path: Path) -> None:
    content = {"loss": np.float64(2.5), "tokens": np.int64(3), "tensor": torch.arange(3)}
    torch.save(content, tmp_path / "stats_1.pt")
    found = read_pickle(tmp_path / "stats_1.pt")
    assert (found["loss"], found["tokens"], found["tensor"].tolist()) == (2.5, 3, [0, 1, 2])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_half_written_pickle_is_named(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "epoch_1.pt"
    torch.save({"a": torch.arange(3000)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 3, 40, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"epoch_1\.pt is no readable checkpoint"):
            read_pickle(path)
    with pytest.raises(FileNotFoundError, match=r"epoch_2\.pt"):
        read_pickle(tmp_path / "epoch_2.pt")


def test_a_torch_file_of_anything_but_tensors_is_refused_as_weights(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path)
    assert read_tensors(tmp_path)["a"].tolist() == [0, 0]
    torch.save({"a": torch.zeros(2), "step": 3}, path)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .* not tensors: step"):
        read_tensors(tmp_path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError, match="holds a list"):
        read_tensors(path)
