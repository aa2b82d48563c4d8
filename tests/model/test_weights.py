from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from midstream.config import DecoderConfig, VLMConfig
from midstream.model.decoder import Decoder
from midstream.model.initialise import initialise
from midstream.model.vlm import VLM
from midstream.model.weights import load_openlm, load_weights, save_weights, weights_digest

CONFIG = DecoderConfig(hidden_size=16, num_layers=2, num_heads=2, vocab_size=30)


def decoder_of(seed: int) -> Decoder:
    decoder = Decoder(CONFIG)
    initialise(decoder, seed)
    return decoder


def test_saved_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    first, second = decoder_of(0), decoder_of(1)
    save_weights(first, tmp_path / "new" / "model.safetensors")
    assert weights_digest(first) != weights_digest(second)
    load_weights(second, tmp_path / "new" / "model.safetensors")
    assert weights_digest(first) == weights_digest(second)
    assert torch.equal(first.output.weight, second.output.weight)


def test_a_part_reads_the_file_of_a_model_that_had_only_this_part(tmp_path: Path) -> None:
    vlm = VLM(VLMConfig(decoder=CONFIG))
    initialise(vlm, 0)
    path = tmp_path / "model.safetensors"
    save_weights(vlm, path)
    decoder = decoder_of(1)
    load_weights(decoder, path, prefix="decoder.")
    assert weights_digest(decoder) == weights_digest(vlm.decoder)
    save_file(load_file(path) | {"projector.0.bias": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"unexpected: projector\.0\.bias"):
        load_weights(decoder, path, prefix="decoder.")


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    decoder = decoder_of(0)
    save_weights(decoder_of(1), path)
    tensors = load_file(path)
    del tensors["norm.weight"]
    tensors["norm.bias"] = torch.zeros(16)
    tensors["output.weight"] = torch.zeros(31, 16)
    tensors["layers.0.ffn_norm.weight"] = tensors["layers.0.ffn_norm.weight"].half()
    save_file(tensors, path)
    before = weights_digest(decoder)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(decoder, path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "missing: norm.weight",
        "unexpected: norm.bias",
        "mismatched: layers.0.ffn_norm.weight is torch.float16 [16] in the file, "
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
    with pytest.raises(FileNotFoundError, match=r"epoch_1\.pt"):
        load_openlm(decoder_of(0), tmp_path / "epoch_1.pt")


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


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_openlm_checkpoint_is_read_with_any_wrapping(tmp_path: Path, prefix: str) -> None:
    source = decoder_of(0)
    state = {f"{prefix}{name}": value for name, value in source.state_dict().items()}
    for layer in range(2):
        state[f"{prefix}layers.{layer}.attention.pos_embed.inv_freq"] = torch.ones(4)
    path = tmp_path / "epoch_7.pt"
    torch.save({"epoch": 7, "name": "run", "state_dict": state, "evaluation_metrics": []}, path)
    decoder = decoder_of(1)
    load_openlm(decoder, path)
    assert weights_digest(decoder) == weights_digest(source)


def test_openlm_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    state = dict(decoder_of(0).state_dict())
    state["norm.bias"] = torch.zeros(16)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match=r"unexpected: norm\.bias"):
        load_openlm(decoder_of(1), path)
    torch.save({"optimizer": {}}, path)
    with pytest.raises(ValueError, match="no 'state_dict', only optimizer"):
        load_openlm(decoder_of(1), path)
    torch.save({"state_dict": {"norm.weight": 0, "module.norm.weight": 0}}, path)
    with pytest.raises(ValueError, match=r"norm\.weight twice"):
        load_openlm(decoder_of(1), path)
