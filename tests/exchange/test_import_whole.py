"""Whole vision-language models: they see and answer as before, or are refused before writing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported import codec
from safetensors.torch import load_file, save_file
from test_export_vlm import OWN, PATCHES, STOCK, changed, written
from test_import_parts import TOWER, bring, save_llava, some_pixels

import tiny
from midstream.config import VLMConfig
from midstream.core.storage import read_json, write_json
from midstream.exchange.export import prompt_logits
from midstream.exchange.import_source import summary
from midstream.model.vision import VisionEncoder
from midstream.model.vlm import VLM
from midstream.model.weights import load_weights
from midstream.study.imported import ImportRecord, load_model, tower_folders
from midstream.study.stages import InitFrom
from midstream.study.store import Ledger
from midstream.work.evaluate_stage import put_together
from midstream.work.open_model import look_through, open_tokenizer


def opened(record: ImportRecord, folder: Path) -> tuple[VLM, VisionEncoder]:
    """A model as a stage that loads it opens it."""
    assert record.model is not None
    vlm = VLM(record.model)
    load_weights(vlm, folder)
    if vlm.encoder is not None:
        return vlm, vlm.encoder
    towers = [folder / name for name in tower_folders(record.model)]
    encoder, _ = put_together(record.model.encoder, towers)  # type: ignore[arg-type]
    return vlm, encoder


@pytest.mark.parametrize("name", [*STOCK, *OWN])
@torch.no_grad()
def test_what_is_exported_comes_back_whole(name: str, tmp_path: Path) -> None:
    # Stock classes do not round features, and neither does the model that comes back from them.
    config = changed(STOCK[name], owns_encoder=True) if name in STOCK else OWN[name]
    vlm, encoder, _ = written(tmp_path / "export", config, codec())
    record, notes = bring(tmp_path / "export", tmp_path / "whole", part="model")
    again, tower = opened(record, tmp_path / "whole")
    assert again.config.projector.widths(1, 1) == vlm.config.projector.widths(1, 1)
    assert not any("left out" in note for note in notes)
    pixels = some_pixels(vlm.config.encoder.image_size)[:1]  # type: ignore[union-attr]
    before = prompt_logits(vlm, codec(), look_through(vlm, encoder)(pixels))
    after = prompt_logits(again, codec(), look_through(again, tower)(pixels))
    if getattr(config.encoder, "family", None) == "siglip2":
        # It comes back as a SigLIP, whose patches a convolution cuts.
        torch.testing.assert_close(after, before)
    else:
        assert torch.equal(after, before)
    stage = load_model(tmp_path / "whole", tiny.DATA)
    assert stage.model == again.config
    assert stage.encoder_stage is None or stage.encoder_stage in stage.parents


@torch.no_grad()
def test_a_llava_computes_what_transformers_does(tmp_path: Path) -> None:
    model = save_llava(tmp_path / "source", vision_feature_layer=2)
    record, notes = bring(tmp_path / "source", tmp_path / "whole", part="model")
    vlm, encoder = opened(record, tmp_path / "whole")
    pixels = some_pixels(32)[:1]
    features = look_through(vlm, encoder)(pixels)
    ids = [300] * 16 + list(range(20))
    theirs = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits
    words = vlm.decoder.embed(torch.arange(20)[None])
    rows = torch.cat((vlm.project(features, words), words), dim=1)  # type: ignore[arg-type]
    found = vlm.decoder.output(vlm.decoder(rows, torch.arange(36)[None], None))
    torch.testing.assert_close(found[..., :301], theirs, rtol=0, atol=2e-6)
    lines = list(summary(tmp_path / "whole", record, notes))
    assert "  sees 16 patches of a picture of 32 x 32 (crop), projector widths 32, 32, 32" in lines
    assert lines[-1] == (
        f"next: midstream plan own_model.fine_tuning --set model={tmp_path}/whole --set data=WORLD"
    )


SIGLIP = transformers.SiglipVisionConfig(**TOWER)
REGISTERS = transformers.Dinov2WithRegistersConfig(
    **{key: value for key, value in TOWER.items() if key != "intermediate_size"},
    mlp_ratio=2,
    num_register_tokens=2,
)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": "LlavaNext"}, "it sees tiles of a picture"),
        ({"projector_hidden_act": "relu"}, "'relu' between layers"),
        ({"projector_hidden_act": "linear"}, "'linear' between layers"),
        ({"multimodal_projector_bias": False}, "lacks linear_1.bias, linear_2.bias"),
        ({"vision_feature_layer": [-2, -3]}, r"features of the layers \[-2, -3\]"),
        ({"vision_feature_select_strategy": "full"}, "'full' does not leave its tower's patches"),
        ({"vision_config": SIGLIP}, "'default' does not leave its tower's patches, of 0 other"),
        ({"vision_config": REGISTERS}, "'default' does not leave its tower's patches, of 3 other"),
    ],
)
def test_what_ours_would_compute_otherwise_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    save_llava(tmp_path / "source", **changes)
    ways = f"imported whole: .*{told}.*import parts of it with --part decoder or --part encoder$"
    with pytest.raises(ValueError, match=ways):
        bring(tmp_path / "source", tmp_path / "out", part="model")
    assert not (tmp_path / "out").exists()


def test_a_projector_of_other_widths_or_with_norms_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "export", OWN["the decoder is OpenLM's"], codec())
    settings = read_json(tmp_path / "export" / "config.json")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    wide = torch.zeros(40, 16), torch.zeros(40), torch.zeros(32, 40)
    names = ("layers.0.weight", "layers.0.bias", "layers.1.weight")
    weights |= {f"projector.{name}": one for name, one in zip(names, wide, strict=True)}
    save_file(weights, tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    settings["projector_widths"] = [16, 40, 32]
    write_json(tmp_path / "export" / "config.json", settings)
    with pytest.raises(ValueError, match="its projector has the widths 16, 40, 32; import parts"):
        bring(tmp_path / "export", tmp_path / "out", part="model")
    save_llava(tmp_path / "llava")
    weights = load_file(tmp_path / "llava" / "model.safetensors")
    weights["model.multi_modal_projector.norm.weight"] = torch.ones(32)
    save_file(weights, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its projector has or lacks norm\.weight; import parts"):
        bring(tmp_path / "llava", tmp_path / "out", part="model")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_part_is_no_whole_model(tmp_path: Path) -> None:
    save_llava(tmp_path / "source")
    bring(tmp_path / "source", tmp_path / "tower", part="encoder")
    with pytest.raises(ValueError, match=r"holds no whole vision-language model; .*--part model"):
        load_model(tmp_path / "tower", tiny.DATA)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tower", "patches"])
def test_image_text_training_goes_on_from_an_imported_model(
    name: str, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    ledger = tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA)
    sees = {"tower": tiny.ENCODER, "patches": PATCHES}[name]
    config = VLMConfig(decoder=tiny.DECODER, encoder=sees, owns_encoder=name == "patches")
    vlm, _, _ = written(tmp_path / "export", config, open_tokenizer(tiny.DATA, ledger))
    record, _ = bring(tmp_path / "export", tmp_path / "whole", part="model", rate=2e-3)
    loaded = load_model(tmp_path / "whole", tiny.DATA)
    parts = {"encoder": loaded.encoder, "projector": loaded.projector}
    goes_on = tiny.SEEN.model_copy(update=parts | {"start": InitFrom(stage=loaded)})
    tiny.run_missing(ledger, goes_on)
    results = ledger.results(goes_on)
    # At the rate that the import was told, from these weights, the map of patches with them.
    assert results["first_rate"] == 2e-3
    assert ledger.results(loaded)["weights_digest"] == record.weights_digest
    after = load_file(ledger.folder(goes_on) / "weights" / "model.safetensors")
    assert after.keys() == vlm.state_dict().keys()
    for key, value in vlm.state_dict().items():
        assert 0 < (after[key] - value).abs().max() < 0.1, key
