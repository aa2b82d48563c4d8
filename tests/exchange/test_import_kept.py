"""Folders as people keep them: read where nothing is in doubt, else refused with what helps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from checkpoints import VOCAB_SIZE, build_tokenizer, edit, save_checkpoint
from midstream.data.examples import TextCodec
from midstream.exchange.import_model import import_model, serve
from midstream.exchange.import_source import ImportRequest
from midstream.exchange.towers import read_encoder
from midstream.model.weights import read_tensors
from midstream.study.imported import ImportRecord
from midstream.work.protocol import Channel
from vision_checkpoints import save_tower

Tensors = dict[str, torch.Tensor]
HEAD, ROWS = "lm_head.weight", "model.embed_tokens.weight"


def bring(source: Path) -> tuple[ImportRecord, list[str]]:
    return import_model(ImportRequest(source=str(source), out=source.parent / "out"))


def store(source: Path, tensors: Tensors) -> None:
    kept = {name: one.clone().contiguous() for name, one in tensors.items()}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("kept") / "llama")


@pytest.fixture
def source(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "source"))


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {name.replace(old, new): one for name, one in held.items()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held | {ROWS: held[ROWS].to(torch.float8_e4m3fn)}, "as float8_e4m3fn; imp"),
        (lambda held: held | {ROWS: held[ROWS].double()}, "as float64; import the checkpoint"),
        (renamed("mlp.up_proj.weight", "mlp.up_proj.qweight"), "qweight as float32; import the"),
        (renamed("q_proj.weight", "q_proj.base_layer.weight"), "not merged with its weights"),
    ],
)
def test_packed_and_unmerged_weights_are_refused_with_what_to_import(
    source: Path, change: Callable[[Tensors], Tensors], told: str
) -> None:
    store(source, change(load_file(source / "model.safetensors")))
    with pytest.raises(ValueError, match=told):
        bring(source)


def test_settings_that_the_file_contradicts_are_named_and_the_remedy_works(source: Path) -> None:
    held = load_file(source / "model.safetensors")
    config = source / "config.json"
    edit(config, vocab_size=VOCAB_SIZE - 8)
    with pytest.raises(ValueError, match=f"set vocab_size to {VOCAB_SIZE} in "):
        bring(source)
    edit(config, vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="set tie_word_embeddings to false in"):
        bring(source)
    edit(config, tie_word_embeddings=False)
    untied = bring(source)[0].config
    store(source, {name: one for name, one in held.items() if name != HEAD})
    with pytest.raises(ValueError, match=r"no output layer .* set tie_word_embeddings to true in"):
        bring(source)
    edit(config, tie_word_embeddings=True)
    assert bring(source)[0].config.num_parameters < untied.num_parameters
    # A head that was kept in another type and is the same is tied.
    half = held[ROWS].bfloat16()
    store(source, held | {ROWS: half, HEAD: half.float()})
    assert bring(source)[0].kind == "decoder"


def test_shards_without_their_index_are_read_where_all_are_there(source: Path) -> None:
    path = source / "model.safetensors"
    held = load_file(path)
    path.unlink()
    parts = [dict(list(held.items())[number::2]) for number in range(2)]
    names = [source / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, name)
    read = read_tensors(source)
    assert read.keys() == held.keys()
    assert all(torch.equal(read[name], held[name]) for name in held)
    save_file(parts[0], names[1])
    with pytest.raises(ValueError, match="which another shard holds as well"):
        read_tensors(source)
    names[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json is missing, and of 00002 shards m.*2"):
        read_tensors(source)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        (
            "m-Q4_K_M.gguf",
            r"holds GGUF \(m-Q4_K_M\.gguf\) and no weights that are read; import the c",
        ),
        ("consolidated.00.pth", "Meta's own files .* with -hf"),
        ("zero_to_fp32.py", r"DeepSpeed's shards .*; run its zero_to_fp32\.py"),
        ("fsdp_0/__0_0.distcp", r"distributed checkpoint of torch \(fsdp_0/.*accelerate merge"),
        ("open_clip_config.json", "open_clip's files"),
        ("checkpoint-20/config.json", r"checkpoints of a trainer \(checkpoint-20\).*give one"),
        ("checkpoint-9/adapter_config.json", r"of a trainer \(checkpoint-9\).*give one"),
        ("snapshots/abc/config.json", r"the hub's cache \(snapshots/abc\).*; give its snapshot"),
    ],
)
def test_what_others_save_is_called_what_it_is(tmp_path: Path, file: str, told: str) -> None:
    path = tmp_path / "source" / file
    path.parent.mkdir(parents=True)
    path.write_text("x")
    with pytest.raises(FileNotFoundError, match=told):
        bring(tmp_path / "source")


@pytest.mark.parametrize("name", ["ft-model-00001-of-00001.safetensors", "pytorch_model_fsdp.bin"])
def test_a_model_under_another_name_is_read_under_the_one_that_is_told(
    name: str, source: Path
) -> None:
    path = source / "model.safetensors"
    torch.save({"state": {}}, source / "optimizer.bin")
    torch.save(load_file(path), source / name) if ".bin" in name else shutil.copy(
        path, source / name
    )
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"if {name} is the whole model, call it") as caught:
        bring(source)
    (source / name).rename(source / str(caught.value).split()[-1])
    assert bring(source)[0].kind == "decoder"


def test_settings_that_are_no_json_are_named(source: Path) -> None:
    path = source / "tokenizer_config.json"
    path.write_text('{"add_bos_token": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON \(line 1"):
        bring(source)
    path.unlink()
    path = source / "config.json"
    edit(path, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"/config\.json: this llama model has attention_dropout"):
        bring(source)
    edit(path, attention_dropout=0.0)
    assert bring(source)[0].kind == "decoder"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"config\.json begins with a byte order mark, .* without"):
        bring(source)


def test_a_link_to_nothing_and_a_tower_of_timm_are_named(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to(source / "blobs" / "gone")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors point to files that are not"):
        bring(source)
    (source / "config.json").write_text('{"architecture": "vit_so400m_patch14_siglip_384"}')
    save_file({"x": torch.zeros(1)}, source / "other_model.safetensors")
    (source / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"config\.json is timm's, whose files are not read"):
        bring(source)
    edit(source / "config.json", model_type="llava", mm_vision_tower="openai/clip")
    with pytest.raises(ValueError, match=r"is of LLaVA's own code .*llava-hf/"):
        bring(source)


def test_tokens_that_stand_beside_the_tokenizer_keep_their_ids(source: Path) -> None:
    edit(source / "added_tokens.json", **{"[PAD]": VOCAB_SIZE})
    stated = {str(VOCAB_SIZE + 1): {"content": "<|im_start|>", "special": True}}
    edit(source / "tokenizer_config.json", added_tokens_decoder=stated)
    record, _ = bring(source)
    assert record.vocabulary is not None
    added = {one["token"]: one["id"] for one in record.vocabulary["added"]}
    assert (added["[PAD]"], added["<|im_start|>"]) == (VOCAB_SIZE, VOCAB_SIZE + 1)
    assert added["<|separator|>"] > VOCAB_SIZE + 1
    edit(source / "tokenizer_config.json", added_tokens_decoder=["<|im_start|>"])
    with pytest.raises(ValueError, match=r"in a form that transformers does not write; let it"):
        bring(source)
    edit(source / "tokenizer_config.json", added_tokens_decoder={})
    edit(source / "added_tokens.json", **{"[PAD]": VOCAB_SIZE + 9})
    with pytest.raises(ValueError, match=r"has .* beside its tokenizer\.json, which has no place"):
        bring(source)


def test_a_begin_of_text_that_two_files_tell_otherwise_and_own_code_are_told(source: Path) -> None:
    begins = TextCodec.from_file(source / "tokenizer.json").begin_of_text is not None
    edit(source / "tokenizer_config.json", add_bos_token=begins)
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    notes = bring(source)[1]
    assert not [note for note in notes if "add_bos_token" in note]
    assert [note for note in notes if "code of its own, which is not run: llama" in note]
    edit(source / "tokenizer_config.json", add_bos_token=not begins)
    assert [note for note in bring(source)[1] if "add_bos_token" in note]


def test_a_tokenizer_that_leaves_merges_out_at_random_always_gives_the_same_ids() -> None:
    content = json.loads(build_tokenizer().backend_tokenizer.to_str())
    content["model"]["dropout"] = 0.5
    texts = ["an answer to a question about a picture of the cat"] * 20
    found = TextCodec(Tokenizer.from_str(json.dumps(content))).encode_many(texts)
    assert len(set(map(tuple, found))) == 1


def test_pixels_are_scaled_as_the_towers_own_processor_scales_them(tmp_path: Path) -> None:
    folder = save_tower("siglip", tmp_path / "tower")
    path = folder / "preprocessor_config.json"
    path.write_text("{}")
    edit(path, image_mean=[0.4, 0.5, 0.6], image_std=0.25, rescale_factor=1 / 255)
    config = read_encoder(folder).config
    assert (config.pixel_mean, config.pixel_std) == ((0.4, 0.5, 0.6), (0.25,) * 3)
    # (byte / 127.5 - 1) / 1 is (byte / 255 - 0.5) / 0.5.
    edit(path, image_mean=[1.0] * 3, image_std=[1.0] * 3, rescale_factor=1 / 127.5)
    config = read_encoder(folder).config
    assert config.pixel_mean == pytest.approx((0.5,) * 3)
    assert config.pixel_std == pytest.approx((0.5,) * 3)
    edit(path, do_normalize=False, rescale_factor=1 / 255)
    config = read_encoder(folder).config
    assert (config.pixel_mean, config.pixel_std) == ((0.0,) * 3, (1.0,) * 3)
    edit(path, image_std=[0.5, 0.0, 0.5])
    with pytest.raises(ValueError, match=r"has image_std .*; give three, std above 0"):
        read_encoder(folder)
    edit(path, image_mean=["0.5"] * 3)
    with pytest.raises(ValueError, match=r"has image_mean .*; give three"):
        read_encoder(folder)
    edit(path, image_mean=[0.5], image_std=[0.5], do_normalize=True)
    assert read_encoder(folder).config.pixel_std == (0.5,) * 3


def test_layers_and_channels_that_the_config_does_not_know_are_named(tmp_path: Path) -> None:
    folder = save_tower("siglip", tmp_path / "tower")
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    edit(folder / "config.json", num_hidden_layers=layers - 1)
    with pytest.raises(ValueError, match=rf"layers\.{layers - 1}\..* and 13 more, .*how many lay"):
        read_encoder(folder)
    edit(folder / "config.json", num_hidden_layers=layers, num_channels=1)
    with pytest.raises(ValueError, match="sees 1 channels; pictures have three"):
        read_encoder(folder)


def test_quantised_towers_and_an_error_of_the_library_are_one_line(tmp_path: Path) -> None:
    folder = save_tower("siglip", tmp_path / "tower")
    held = load_file(folder / "model.safetensors")
    name = next(one for one in held if one.endswith("q_proj.weight"))
    store(folder, held | {name: held[name].to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"q_proj\.weight as float8_e4m3fn; import the checkpoint"):
        read_encoder(folder)
    store(folder, held)
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=r"has quantization_config .*; import the checkpoint"):
        read_encoder(folder)
    edit(folder / "config.json", quantization_config=None, hidden_act="nonsense")
    request = ImportRequest(source=str(folder), out=tmp_path / "out")
    with pytest.raises(ValueError, match="tower cannot be imported: KeyError: 'nonsense'"):
        serve(request, Channel(None))
