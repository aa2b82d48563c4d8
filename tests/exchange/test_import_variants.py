"""Folders a small step away from a plain one: wrapped names, adapters, a token too many, twins."""

import shlex
import sys
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from exported import cache, cached
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints import VOCAB_SIZE, build_model, build_tokenizer, edit, save_checkpoint
from inputs import midstream
from midstream.config import TransformersDecoderConfig
from midstream.core.storage import write_json
from midstream.exchange.import_model import import_model
from midstream.exchange.import_source import ImportRequest, summary
from midstream.study.imported import ImportRecord
from vision_checkpoints import save_tower

__all__ = ["cache"]
PYTHIA = "EleutherAI/pythia-410m"


def bring(source: object, out: Path, **options: Any) -> tuple[ImportRecord, list[str]]:
    return import_model(ImportRequest(source=str(source), out=out, **options))


@lru_cache
def plain_digest(family: str) -> str:
    """Of a family's weights as they are imported."""
    with TemporaryDirectory() as folder:
        record, notes = bring(save_checkpoint(family, Path(folder) / "source"), Path(folder) / "o")
    assert not [note for note in notes if note.startswith("took ")]
    return record.weights_digest


def plainly(folder: Path, family: str = "llama") -> tuple[Path, str, dict[str, torch.Tensor]]:
    """A checkpoint, the digest of its weights as they are imported, and its tensors."""
    source = save_checkpoint(family, folder / "source")
    return source, plain_digest(family), load_file(source / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "start", "taken"),
    [
        ("llama", "_orig_mod.", "_orig_mod."),
        ("gpt_neox", "module.", "module."),
        ("llama", "model._orig_mod.", "_orig_mod. and model."),
        ("llama", "_fsdp_wrapped_module.module.", "_fsdp_wrapped_module. and module."),
        ("gpt_neox", "student.", "student."),
    ],
)
def test_what_wrappers_put_before_names_comes_off_and_is_said(
    family: str, start: str, taken: str, tmp_path: Path
) -> None:
    source, plain, held = plainly(tmp_path, family)
    save_file({start + name: one for name, one in held.items()}, source / "model.safetensors")
    record, notes = bring(source, tmp_path / "out")
    assert f"took {taken} off the names of {len(held)} tensors" in notes
    assert record.weights_digest == plain


def test_a_wrapper_inside_a_name_comes_off(tmp_path: Path) -> None:
    source, plain, held = plainly(tmp_path)
    inner = {name.replace("layers.1.", "layers.1._orig_mod."): one for name, one in held.items()}
    save_file(inner, source / "model.safetensors")
    record, notes = bring(source, tmp_path / "out")
    assert record.weights_digest == plain
    assert "took _orig_mod. off the names of 9 tensors" in notes
    inner = {name: one.clone() for name, one in inner.items()}
    save_file(held | inner, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds model\.layers\.1\..* twice"):
        bring(source, tmp_path / "twice")


def test_a_training_checkpoint_is_read_where_it_holds_one_set_of_tensors(tmp_path: Path) -> None:
    source, plain, held = plainly(tmp_path)
    (source / "model.safetensors").unlink()
    for key in ("model", "state_dict", "module"):
        torch.save({key: held, "step": 500}, source / "pytorch_model.bin")
        record, notes = bring(source, tmp_path / "out")
        assert record.weights_digest == plain
        assert f"took {key}. off the names of {len(held)} tensors" in notes
    torch.save({"model": held, "ema": held}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"several sets of tensors, model, ema; save the one"):
        bring(source, tmp_path / "other")


def test_names_that_do_not_fit_are_few_lines_and_those_of_the_file(tmp_path: Path) -> None:
    source, _, held = plainly(tmp_path)
    save_file({f"{name}.x": one for name, one in held.items()}, source / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit this LlamaForCausalLM") as caught:
        bring(source, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 9
    assert f"  missing: {len(held) - 3} more" in lines
    assert f"  unexpected: {len(held) - 3} more" in lines
    assert lines[5].split()[1] in {f"{name}.x" for name in held}


def test_a_pad_token_behind_the_last_row_gets_one_and_is_told(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    words = build_tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    assert words.pad_token_id == VOCAB_SIZE
    words.save_pretrained(source)
    record, notes = bring(source, tmp_path / "out")
    assert record.vocabulary is not None
    assert record.vocabulary["added"][0] == {"token": "[PAD]", "id": VOCAB_SIZE}
    assert record.vocabulary["rows_after"] == 320
    assert "the tokenizer has [PAD] behind the model's last row; new rows were made" in notes
    held = load_file(tmp_path / "out" / "model.safetensors")["decoder.model.lm_head.weight"]
    torch.testing.assert_close(held[VOCAB_SIZE], held[:VOCAB_SIZE].mean(dim=0))


def save_adapter(folder: Path, base: str) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base}
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 32)}, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_without_peft_is_refused_with_the_way_to_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    source = save_adapter(tmp_path / "lora", "somebody/base")
    with pytest.raises(ValueError, match=r"LoRA adapter of somebody/base; .*merge") as caught:
        bring(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged_by_peft_where_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Merging:
        """What peft does, for a test without it: one weight becomes another."""

        base_model = SimpleNamespace(prefix="lora_")

        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def state_dict(self) -> dict[str, object]:
            return dict.fromkeys(made)

        @classmethod
        def from_pretrained(cls, model: nn.Module, folder: Path) -> "Merging":
            assert (folder / "adapter_model.safetensors").is_file()
            assert model.get_parameter("lm_head.weight").shape == (rows, 32)
            return cls(model)

        def merge_and_unload(self) -> nn.Module:
            with torch.no_grad():
                self.model.get_parameter("model.layers.0.self_attn.q_proj.weight").add_(1)
            return self.model

    peft = ModuleType("peft")
    peft.__spec__ = ModuleSpec("peft", None)
    peft.PeftModel = Merging  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft", peft)
    save_checkpoint("llama", tmp_path / "base")
    source, rows = save_adapter(tmp_path / "lora", "../base"), VOCAB_SIZE
    place = "base_model.model.model.layers.0.self_attn.q_proj"
    made = [f"{place}.lora_A.default.weight", f"{place}.base_layer.weight"]
    record, notes = bring(source, tmp_path / "out")
    assert "merged with ../base by peft" in notes
    assert record.vocabulary is not None
    assert record.vocabulary["added"]
    held = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    theirs = build_model("llama").state_dict()[name]
    assert torch.equal(held[f"decoder.model.{name}"], theirs + 1)
    # One that was trained with further tokens has whole embeddings.
    rows = VOCAB_SIZE + 5
    further = {"base_model.model.lm_head.weight": torch.zeros(rows, 32)}
    made.clear()
    save_file(further, source / "adapter_model.safetensors")
    assert bring(source, tmp_path / "out")[0].vocabulary["rows_before"] == rows  # type: ignore[index]
    # What is added to a tied head alone parts it from the embeddings; rows of tokens are in both.
    rows = VOCAB_SIZE
    save_checkpoint("qwen2", tmp_path / "tied")
    save_adapter(source, "../tied")
    for changed, tied in (("lm_head.lora_A", False), ("embed_tokens.trainable_tokens_delta", True)):
        made[:] = [f"base_model.model.{changed}"]
        save_file({made[0]: torch.zeros(4, 32)}, source / "adapter_model.safetensors")
        assert bring(source, tmp_path / "out")[0].config.tied_embeddings is tied
    # peft would leave out what fits nothing, and what the file lacks as it was.
    rows = VOCAB_SIZE
    save_adapter(source, "../base")
    for names, told in (
        (["model.layers.1.self_attn.q_proj.lora_A.weight"], "which ../base has not"),
        ([f"{place}.lora_A.weight", "x.lora_A.weight"], "x and the like, which the file"),
    ):
        made[:] = names
        with pytest.raises(ValueError, match=f"do not belong together: 1 of the .*{told}"):
            bring(source, tmp_path / "out")
    del Merging.merge_and_unload
    with pytest.raises(
        ValueError, match=r"cannot be merged with \.\./base: a LORA adapter changes"
    ):
        bring(source, tmp_path / "out")


def test_a_base_that_is_not_here_or_quantised_is_told_with_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = ModuleType("peft")
    peft.PeftModel = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peft", peft)
    source = save_adapter(tmp_path / "lora", "/elsewhere/Llama-2-7b")
    remedy = "base_model_name_or_path in its adapter_config.json: put there the folder or"
    with pytest.raises(FileNotFoundError, match=rf"lora cannot .*elsewhere.*nor.*; .*{remedy}"):
        bring(source, tmp_path / "out")
    base = save_checkpoint("llama", tmp_path / "base")
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match=f"quantization_config.*{remedy}"):
        bring(save_adapter(source, "../base"), tmp_path / "out")


def test_a_pad_token_of_the_config_alone_is_dropped(tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    edit(source / "config.json", pad_token_id=VOCAB_SIZE)
    record, _ = bring(source, tmp_path / "out")
    assert isinstance(record.config, TransformersDecoderConfig)
    assert record.config.settings["pad_token_id"] is None


@pytest.mark.parametrize(
    ("name", "revision"),
    [("pythia-2.8b", "step0"), ("pythia-2.8b", "step29000"), ("pythia-12b", "step58000")],
)
def test_a_branch_that_is_known_to_hold_the_final_weights_is_refused_before_it_is_fetched(
    tmp_path: Path, name: str, revision: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name} at {revision} is publicly known .*--allow-same"):
        bring(f"EleutherAI/{name}", tmp_path, revision=revision)


def test_a_step_with_the_final_weights_is_refused_unless_allowed(
    cache: Path, tmp_path: Path
) -> None:
    source = save_checkpoint("gpt_neox", tmp_path / "source")
    cached(cache, source, PYTHIA, "step1000", "a" * 40)
    assert not [
        note for note in bring(PYTHIA, tmp_path / "a", revision="step1000")[1] if "same" in note
    ]
    cached(cache, source, PYTHIA, "main", "b" * 40)
    cached(
        cache, save_checkpoint("gpt_neox", tmp_path / "other", seed=1), PYTHIA, "step2000", "c" * 40
    )
    match = r"pythia-410m at step1000 holds the same weights as main, .*--allow-same-weights"
    with pytest.raises(ValueError, match=match):
        bring(PYTHIA, tmp_path / "out", revision="step1000")
    assert not (tmp_path / "out").exists()
    said = f"{PYTHIA} at step1000 holds the same weights as main"
    assert said in bring(PYTHIA, tmp_path / "b", revision="step1000", allow_same_weights=True)[1]
    # The last one is what it says it is, and another step is its own.
    assert (
        f"{PYTHIA} at main holds the same weights as step1000" in bring(PYTHIA, tmp_path / "c")[1]
    )
    _, notes = bring(PYTHIA, tmp_path / "d", revision="step2000")
    assert not [note for note in notes if "same" in note]


def test_twins_of_a_model_that_is_not_known_are_told_alone(cache: Path, tmp_path: Path) -> None:
    source = save_checkpoint("llama", tmp_path / "source")
    cached(cache, source, "a/model", "main", "a" * 40)
    cached(cache, source, "a/model", "v1", "b" * 40)
    _, notes = bring("a/model", tmp_path / "out", revision="v1")
    assert "a/model at v1 holds the same weights as main" in notes


@pytest.mark.parametrize("same", [True, False])
def test_the_hub_is_asked_for_the_final_weights_that_are_not_here(
    same: bool, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(self: HfApi, name: str, *, revision: str, files_metadata: bool) -> Any:
        digest = "1" if same or revision == "main" else "2"
        lfs = SimpleNamespace(sha256=digest * 64)
        one = SimpleNamespace(rfilename="model.safetensors", lfs=lfs)
        return SimpleNamespace(siblings=[one])

    import huggingface_hub

    cached(cache, save_checkpoint("gpt_neox", tmp_path / "s"), PYTHIA, "step1000", "a" * 40)
    folder = cache / f"models--{PYTHIA.replace('/', '--')}" / "snapshots" / ("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setattr(HfApi, "model_info", info)
    if same:
        with pytest.raises(ValueError, match="the same weights as main"):
            bring(PYTHIA, tmp_path / "out", revision="step1000")
    else:
        bring(PYTHIA, tmp_path / "out", revision="step1000")


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_next_command_goes_through_a_shell_as_it_stands(kind: str, tmp_path: Path) -> None:
    save = save_tower if kind == "encoder" else save_checkpoint
    source = save("siglip" if kind == "encoder" else "llama", tmp_path / "source")
    out = tmp_path / "it's a größer 'out' $HOME"
    record, notes = bring(source, out)
    label, command = list(summary(out, record, notes))[-1].split(": ", 1)
    assert label == "next"
    words = shlex.split(command)
    assert words[:3] == ["midstream", "plan", "own_model.image_shares"]
    assert not set("<>|&;`") & set(command.replace(shlex.quote(f"checkpoint={out}"), ""))
    expected = f"checkpoint={out}" if kind == "decoder" else f'encoders=["{out}"]'
    assert expected in words
    # What is still to be filled in is one line, not a traceback.
    done = midstream(*words[1:], "--store", tmp_path / "store")
    assert done.exit_code == 2, done.output
