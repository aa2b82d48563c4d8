"""Whole vision-language models taken apart: exports come back bit for bit, others as they are."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exported import OPENLM, codec, made
from safetensors.torch import load_file, save_file
from test_export_vlm import OWN, PATCHES, STOCK, changed, written

import peer_checkpoints
import tiny
from checkpoints import build_tokenizer, edit
from midstream.config import DecoderConfig, EncoderConfig, FusedEncoder, VLMConfig
from midstream.core.storage import write_json
from midstream.exchange.export import prompt_logits, write_folder
from midstream.exchange.import_model import import_model
from midstream.exchange.import_source import ImportRequest, summary
from midstream.model.vision import VisionEncoder, build_encoder, load_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import load_weights
from midstream.study.imported import ImportRecord, load_model, tower_folders
from midstream.study.stages import InitFrom
from midstream.study.store import Ledger
from midstream.work.evaluate_stage import put_together
from midstream.work.open_model import look_through, open_tokenizer

TEXT = peer_checkpoints.SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
TOWER = peer_checkpoints.VISION | {"num_hidden_layers": 3}


def bring(source: Path, out: Path, **options: Any) -> tuple[ImportRecord, list[str]]:
    return import_model(ImportRequest(source=str(source), out=out, pad_vocab_to=1, **options))


def opened(record: ImportRecord, out: Path) -> VisionEncoder:
    assert isinstance(record.config, EncoderConfig)
    encoder = build_encoder(record.config)
    load_encoder(encoder, out / "model.safetensors")
    return encoder


def some_pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def opened_whole(record: ImportRecord, folder: Path) -> tuple[VLM, VisionEncoder]:
    """A model as a stage that loads it opens it."""
    assert record.model is not None
    vlm = VLM(record.model)
    load_weights(vlm, folder)
    if vlm.encoder is not None:
        return vlm, vlm.encoder
    towers = [folder / name for name in tower_folders(record.model)]
    encoder, _ = put_together(record.model.encoder, towers)  # type: ignore[arg-type]
    return vlm, encoder


# What these two hold, others of their kind hold beside more.
@pytest.mark.parametrize("name", sorted({*STOCK, *OWN} - {"siglip", "the decoder is OpenLM's"}))
@torch.no_grad()
def test_what_is_exported_computes_the_same_and_comes_back(name: str, tmp_path: Path) -> None:
    # Stock classes do not round features, and neither does the model that comes back from them.
    config = changed(STOCK[name], owns_encoder=True) if name in STOCK else OWN[name]
    vlm, encoder, report = written(tmp_path / "export", config, codec())
    assert report.kind == ("llava" if name in STOCK else "own")
    assert report.architecture.startswith("Llava" if name in STOCK else "Midstream")
    assert (name in STOCK) != bool(list((tmp_path / "export").glob("*.py")))
    assert report.largest_difference <= 1e-5
    assert name in STOCK or name in report.reason
    assert any("one more row, 302" in note for note in report.notes) == (name == "no spare row")

    record, _ = bring(tmp_path / "export", tmp_path / "decoder", part="decoder")
    held = load_file(tmp_path / "decoder" / "model.safetensors")
    expected = vlm.decoder.state_dict()
    assert record.config.num_parameters == config.decoder.num_parameters  # type: ignore[union-attr]
    assert all(torch.equal(value, expected[key[8:]]) for key, value in held.items())

    # SigLIP 2 comes back as a SigLIP, whose patches a convolution cuts.
    exact = getattr(config.encoder, "family", None) != "siglip2"
    same = torch.equal if exact else partial(torch.allclose, atol=1e-5)
    pixels = some_pixels(config.encoder.image_size)
    if isinstance(config.encoder, EncoderConfig):
        record, _ = bring(tmp_path / "export", tmp_path / "encoder", part="encoder")
        assert same(opened(record, tmp_path / "encoder")(pixels), encoder(pixels))
        for field in ("resize", "final_norm", "pixel_mean", "pixel_std", "image_size"):
            assert getattr(record.config, field) == getattr(config.encoder, field), field

    record, notes = bring(tmp_path / "export", tmp_path / "whole", part="model")
    again, tower = opened_whole(record, tmp_path / "whole")
    assert again.config.projector.widths(1, 1) == config.projector.widths(1, 1)
    assert not any("left out" in note for note in notes)
    before = prompt_logits(vlm, codec(), look_through(vlm, encoder)(pixels[:1]))
    after = prompt_logits(again, codec(), look_through(again, tower)(pixels[:1]))
    assert same(after, before, **({} if exact else {"rtol": 1e-5, "atol": 1e-5}))
    stage = load_model(tmp_path / "whole", tiny.DATA)
    assert stage.model == again.config
    assert stage.encoder_stage is None or stage.encoder_stage in stage.parents


@torch.no_grad()
def test_fused_towers_come_back_one_by_one(tmp_path: Path) -> None:
    config = OWN["not one tower but fused"]
    _, encoder, _ = written(tmp_path / "export", config, codec())
    assert isinstance(config.encoder, FusedEncoder)
    with pytest.raises(
        ValueError, match=r"--part model or --part decoder or --part encoder1 or --part encoder2$"
    ):
        bring(tmp_path / "export", tmp_path / "none")
    parts = []
    for number, tower in enumerate(config.encoder.towers):
        out = tmp_path / f"tower{number}"
        record, _ = bring(tmp_path / "export", out, part=f"encoder{number + 1}")
        again, pixels = opened(record, out), some_pixels(24)
        assert torch.equal(again(pixels), encoder.towers[number](pixels))  # type: ignore[index,operator]
        assert record.config.pixel_mean == tower.pixel_mean  # type: ignore[union-attr]
        parts.append(record.family)
    assert parts == ["siglip", "dinov2"]


def test_patches_are_no_part_and_a_text_export_of_openlm_is_whole(tmp_path: Path) -> None:
    written(tmp_path / "export", OWN["not one tower but patches"], codec())
    with pytest.raises(ValueError, match=r"--part model or --part decoder, it has no 'encoder'$"):
        bring(tmp_path / "export", tmp_path / "out", part="encoder")
    vlm, _ = made(VLMConfig(decoder=OPENLM))
    (tmp_path / "text").mkdir()
    write_folder(vlm, codec(), None, tmp_path / "text")
    with pytest.raises(ValueError, match="leave --part out"):
        bring(tmp_path / "text", tmp_path / "out", part="decoder")
    record, _ = bring(tmp_path / "text", tmp_path / "out")
    assert isinstance(record.config, DecoderConfig)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(held[f"decoder.{key}"], one) for key, one in vlm.decoder.named_parameters()
    )


def save_llava(folder: Path, *, half: bool = False, kind: str = "Llava", **changes: Any) -> Any:
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    settings |= {"vision_config": transformers.CLIPVisionConfig(**TOWER)} | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            text_config=transformers.LlamaConfig(**TEXT | {"vocab_size": 301}),
            image_token_index=300,
            **settings,
        )
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if half:
        model = model.bfloat16()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    pictures = {"do_center_crop": True, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    if kind == "LlavaNext":
        pictures |= {"do_pad": True}
    write_json(folder / "processor_config.json", {"image_processor": pictures})
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


@pytest.fixture
def llava(saved: Path, tmp_path: Path) -> Path:
    """A LLaVA's folder, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "source"))


@torch.no_grad()
def test_parts_of_a_llava_are_those_of_transformers(tmp_path: Path) -> None:
    model = save_llava(tmp_path / "source")
    record, notes = bring(tmp_path / "source", tmp_path / "tower", part="encoder")
    encoder, pixels = opened(record, tmp_path / "tower"), some_pixels(32)
    theirs = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(encoder(pixels), theirs, rtol=0, atol=2e-6)
    assert record.config.resize == "crop"  # type: ignore[union-attr]
    assert record.config.pixel_mean == (0.4, 0.4, 0.4)  # type: ignore[union-attr]
    assert "the projector is left out; --part model takes the whole model" in notes
    assert any(name.startswith("multi_modal_projector") for name in record.dropped)
    lines = list(summary(tmp_path / "tower", record, notes))
    assert lines[-1].endswith(" --set data=WORLD --set resize=crop")
    record, _ = bring(tmp_path / "source", tmp_path / "text", part="decoder")
    held = load_file(tmp_path / "text" / "model.safetensors")
    # The last row is of weights, not of zeros: it stays, though it stands for pictures.
    assert record.config.vocab_size == 301  # type: ignore[union-attr]
    mine = held["decoder.model.model.embed_tokens.weight"]
    assert torch.equal(mine[:301], model.get_input_embeddings().weight)
    assert torch.equal(held["decoder.model.lm_head.weight"][:301], model.lm_head.weight)


def test_names_of_older_llavas_wrapped_and_in_half_precision_are_read(tmp_path: Path) -> None:
    model = save_llava(tmp_path / "source", half=True)
    held = load_file(tmp_path / "source" / "model.safetensors")
    old = {
        f"module.{name.replace('vision_tower.', 'vision_tower.vision_model.')}": value
        for name, value in held.items()
    }
    save_file(old, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    _, notes = bring(tmp_path / "source", tmp_path / "tower", part="encoder")
    assert any(note.startswith("took module. off the names") for note in notes)
    found = load_file(tmp_path / "tower" / "model.safetensors")
    expected = model.model.vision_tower.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value.float()) for name, value in expected.items())


def test_a_llava_says_what_is_amiss_in_one_line(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"import --part model or --part decoder or --part encoder$"
    ):
        bring(llava, tmp_path / "out")
    with pytest.raises(ValueError, match=r"or --part encoder, it has no 'projector'$"):
        bring(llava, tmp_path / "out", part="projector")
    held = load_file(llava / "model.safetensors")
    name = next(name for name in held if name.endswith("vision_tower.pre_layrnorm.weight"))
    held.pop(name)
    save_file(held, llava / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing .*pre_layrnorm.weight; mismatched nothing"):
        bring(llava, tmp_path / "out", part="encoder")
    edit(llava / "config.json", vision_feature_layer=[-2, -5])
    with pytest.raises(ValueError, match=r"features of the layers \[-2, -5\]"):
        bring(llava, tmp_path / "out", part="encoder")
    assert not (tmp_path / "out").exists()


def test_a_positive_feature_layer_is_counted_from_behind(tmp_path: Path) -> None:
    save_llava(tmp_path / "source", vision_feature_layer=3)
    record, _ = bring(tmp_path / "source", tmp_path / "out", part="encoder")
    assert record.config.feature_layer == -1  # type: ignore[union-attr]


@pytest.mark.parametrize("layer", [-1, 2])
@torch.no_grad()
def test_parts_of_a_llava_next_are_those_of_transformers(layer: int, tmp_path: Path) -> None:
    model = save_llava(tmp_path / "source", kind="LlavaNext", vision_feature_layer=layer)
    record, notes = bring(tmp_path / "source", tmp_path / "tower", part="encoder")
    pixels = some_pixels(32)
    theirs = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    again = opened(record, tmp_path / "tower")
    torch.testing.assert_close(again(pixels), theirs[:, 1:], rtol=0, atol=2e-6)
    # Its processor pads batches, and squeezes the whole picture into the tower's square.
    assert record.config.resize == "square"  # type: ignore[union-attr]
    assert any("saw tiles of a picture, too" in note for note in notes)
    record, _ = bring(tmp_path / "source", tmp_path / "text", part="decoder")
    vlm = VLM(VLMConfig(decoder=record.config))  # type: ignore[arg-type]
    load_weights(vlm, tmp_path / "text")
    ids = torch.arange(20)[None]
    found = vlm.decoder.output(vlm.decoder(vlm.decoder.embed(ids), ids, None))
    torch.testing.assert_close(found[..., :301], model(input_ids=ids).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "tower", "strategy", "told"),
    [
        *(("Llava", "CLIP", "default", None), ("Llava", "CLIP", "full", "class token")),
        *(("Llava", "Siglip", "default", "first patch"), ("Llava", "Siglip", "full", None)),
        ("LlavaNext", "CLIP", "full", "class token"),
    ],
)
def test_features_that_a_projector_saw_otherwise_are_told(
    kind: str, tower: str, strategy: str, told: str | None, tmp_path: Path
) -> None:
    vision = getattr(transformers, f"{tower}VisionConfig")(**TOWER)
    changes = {"vision_config": vision, "vision_feature_select_strategy": strategy}
    save_llava(tmp_path / "source", kind=kind, **changes)
    _, notes = bring(tmp_path / "source", tmp_path / "tower", part="encoder")
    found = {text for text in ("class token", "first patch") if text in " ".join(notes)}
    assert found == ({told} if told else set())


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *((kind, None) for kind in ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "gemma3")),
        *(("paligemma", "decoder"), ("mllama", "encoder")),
    ],
)
def test_whole_models_of_other_kinds_are_refused_by_name(
    kind: str, part: str | None, tmp_path: Path
) -> None:
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path / "source")
    save_file({"weight": torch.zeros(1)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(ValueError, match=f"{kind!r}, a whole vision-language model of which no"):
        bring(tmp_path / "source", tmp_path / "out", part=part)
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_llava_computes_what_transformers_does(tmp_path: Path) -> None:
    model = save_llava(tmp_path / "source", vision_feature_layer=2)
    record, notes = bring(tmp_path / "source", tmp_path / "whole", part="model")
    vlm, encoder = opened_whole(record, tmp_path / "whole")
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


@pytest.mark.parametrize(
    ("written", "resize", "told"),
    [
        # Files that do not say what their class does by itself.
        ({"image_processor_type": "CLIPImageProcessor"}, "crop", None),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 32}, "crop", None),
        ({"image_processor_type": "SiglipImageProcessor", "size": {"height": 32}}, "square", None),
        (
            {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}},
            "crop",
            "pictures of 40 x 40; here they are 32 x 32",
        ),
        (
            {"do_center_crop": True, "size": {"shortest_edge": 40}, "crop_size": {"height": 32}},
            "crop",
            "resizes the shorter side to 40 and cuts out 32 x 32; here all",
        ),
        (None, "crop", r"no preprocessor_config\.json says .* usual for its tower \(crop\)"),
    ],
)
def test_pictures_are_fitted_as_the_models_processor_fits_them_or_the_user_is_told(
    written: dict[str, Any] | None, resize: str, told: str | None, llava: Path, tmp_path: Path
) -> None:
    (llava / "processor_config.json").unlink()
    if written is not None:
        write_json(llava / "preprocessor_config.json", written)
    record, notes = bring(llava, tmp_path / "whole", part="model")
    assert record.model is not None
    assert record.model.encoder.transform.resize == resize  # type: ignore[union-attr]
    found = [note for note in notes if re.search(told or "processor|its tower", note)]
    assert len(found) == (told is not None), notes


def test_a_llava_that_does_not_say_it_is_tied_is_told_the_setting(
    llava: Path, tmp_path: Path
) -> None:
    weights = load_file(llava / "model.safetensors")
    weights = {name: one for name, one in weights.items() if "lm_head" not in name}
    save_file(weights, llava / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing lm_head\.weight;.*set tie_word_embeddings to"):
        bring(llava, tmp_path / "out", part="decoder")
    edit(llava / "config.json", tie_word_embeddings=True)
    record, _ = bring(llava, tmp_path / "out", part="decoder")
    assert record.config.tied_embeddings  # type: ignore[union-attr]


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


def test_a_projector_of_other_widths_or_with_norms_is_refused(llava: Path, tmp_path: Path) -> None:
    written(tmp_path / "export", OWN["the decoder is OpenLM's"], codec())
    edit(tmp_path / "export" / "config.json", projector_widths=[16, 40, 32])
    with pytest.raises(ValueError, match="its projector has the widths 16, 40, 32; import parts"):
        bring(tmp_path / "export", tmp_path / "out", part="model")
    weights = load_file(llava / "model.safetensors")
    weights["model.multi_modal_projector.norm.weight"] = torch.ones(32)
    save_file(weights, llava / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"its projector has or lacks norm\.weight; import parts"):
        bring(llava, tmp_path / "out", part="model")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_part_is_no_whole_model(llava: Path, tmp_path: Path) -> None:
    bring(llava, tmp_path / "tower", part="encoder")
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
    seen = tiny.image_run(total_tokens=2_000)
    goes_on = seen.model_copy(update=parts | {"start": InitFrom(stage=loaded)})
    tiny.run_missing(ledger, goes_on)
    results = ledger.results(goes_on)
    # At the rate that the import was told, from these weights, the map of patches with them.
    assert results["first_rate"] == 2e-3
    assert ledger.results(loaded)["weights_digest"] == record.weights_digest
    after = load_file(ledger.folder(goes_on) / "weights" / "model.safetensors")
    assert after.keys() == vlm.state_dict().keys()
    for key, value in vlm.state_dict().items():
        assert 0 < (after[key] - value).abs().max() < 0.1, key
