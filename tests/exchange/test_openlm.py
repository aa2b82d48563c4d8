"""Tiny checkpoints in the layouts that OpenLM and its Hugging Face class write."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from midstream.config import DECODERS, DecoderConfig
from midstream.exchange.hub import LanguageModel
from midstream.exchange.openlm import SIZES, read_openlm
from midstream.model.decoder import Decoder
from midstream.model.weights import fill, generator, initialise
from midstream.study.imported import Position

CONFIG = DecoderConfig(hidden_size=32, num_layers=2, num_heads=4, vocab_size=30)
PLAIN = CONFIG.model_copy(update={"qk_norm": False})
# The order of OpenLM's own modules, in which torch's optimiser numbers parameters; ours differs.
IN_LAYER = (
    "attention.in_proj",
    "attention.out_proj",
    "attention.pos_embed.inv_freq",
    "attention.q_norm",
    "attention.k_norm",
    "feed_forward.w12",
    "feed_forward.w3",
    "attention_norm",
    "ffn_norm",
)
# 40 rows of 16 tokens an epoch, 3 epochs, 4 rows a step: 30 steps.
PARAMS = {
    "model": "d=32_l=2_h=4",
    "model_norm": "gain_only_lp_layer_norm",
    "ffn_type": "swiglu_torch",
    "positional_embedding_type": "rotary",
    "attn_name": "torch_attn",
    "qk_norm": True,
    "vocab_size": 30,
    "seq_len": 16,
    "lr": 0.003,
    "lr_scheduler": "cosine",
    "lr_cooldown_end": 3e-05,
    "force_min_lr": 0.0,
    "warmup": 5,
    "epochs": 3,
    "train_num_samples": 40,
    "global_batch_size": 4,
    "dataset_manifest": ["s3://somewhere: with a colon/manifest.jsonl"],
    "hf_model": None,
    "moe_freq": 0,
    "skip_scheduler": False,
    "wandb_notes": "",
}


def state_of(config: DecoderConfig = CONFIG, *, tables: bool = True) -> dict[str, Tensor]:
    """Weights as OpenLM's model names and orders them; gains are drawn, too."""
    decoder = Decoder(config)
    initialise(decoder, 0)
    drawn = {
        name: torch.rand(value.shape, generator=generator(0, name)) if "norm" in name else value
        for name, value in decoder.state_dict().items()
    }
    state = {"tok_embeddings.weight": drawn["tok_embeddings.weight"]}
    for layer in range(config.num_layers):
        for part in IN_LAYER:
            name = f"layers.{layer}.{part}"
            if f"{name}.weight" in drawn:
                state[f"{name}.weight"] = drawn[f"{name}.weight"]
            elif part.endswith("inv_freq") and tables:
                step = torch.arange(0, config.head_dim, 2).float() / config.head_dim
                state[name] = 1.0 / 10000**step
    state |= {name: drawn[name] for name in ("norm.weight", "output.weight")}
    assert {name for name in state if "inv_freq" not in name} == set(drawn)
    return state


def trained_names(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if not name.endswith("inv_freq")]


def moments_of(state: dict[str, Tensor], step: int) -> dict[str, dict[str, Any]]:
    """Adam's state by name, every number different from every other's."""
    return {
        name: {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.rand(state[name].shape, generator=generator(1, name)),
            "exp_avg_sq": torch.rand(state[name].shape, generator=generator(2, name)),
        }
        for name in trained_names(state)
    }


def numbered(state: dict[str, Tensor], step: int, rate: float) -> dict[str, Any]:
    """torch's optimiser state with OpenLM's two groups: no decay (empty), and decay."""
    moments = list(moments_of(state, step).values())
    return {
        "state": dict(enumerate(moments)),
        "param_groups": [
            {"lr": rate, "weight_decay": 0.0, "params": []},
            {"lr": rate, "weight_decay": 0.1, "params": list(range(len(moments)))},
        ],
    }


def gathered(state: dict[str, Tensor], step: int, rate: float) -> dict[str, Any]:
    """FSDP's optimiser state: by name, in any order."""
    moments = dict(sorted(moments_of(state, step).items(), reverse=True))
    return {
        "state": {f"_orig_mod.{name}": entry for name, entry in moments.items()},
        "param_groups": [
            {"lr": rate, "params": []},
            {"lr": rate, "params": [f"_orig_mod.{name}" for name in moments]},
        ],
    }


def rate_after(step: int, *, steps: int = 30) -> float:
    """OpenLM's cosine with PARAMS' numbers, written down once more."""
    if step < 5:
        return 0.003 * (step + 1) / 5
    turn = math.pi * (step - 5) / (steps - 5)
    return 3e-5 + (0.003 - 3e-5) * 0.5 * (1 + math.cos(turn))


@dataclass
class Run:
    """What a run leaves; `write` puts it down as OpenLM does and returns the epoch's path."""

    folder: Path
    state: dict[str, Tensor]
    step: int = 20
    prefix: str = ""

    def write(
        self,
        *,
        params: dict[str, Any] | None = PARAMS,
        optimizer: dict[str, Any] | None = None,
        params_inside: bool = False,
        step_in: str = "epoch",
    ) -> Path:
        checkpoints = self.folder / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        common = {"epoch": 2, "name": "run", "evaluation_metrics": [{"loss": np.float64(2.5)}]}
        state = {f"{self.prefix}{name}": value for name, value in self.state.items()}
        step = {"step": self.step}
        epoch = common | {"state_dict": state} | (step if step_in == "epoch" else {})
        torch.save(epoch, checkpoints / "epoch_2.pt")
        torch.save(common | step | {"samples_seen": 80}, checkpoints / "stats_2.pt")
        if optimizer is not None:
            torch.save(common | {"optimizer": optimizer}, checkpoints / "optimizer_2.pt")
        if params is not None:
            lines = [f"{name}: {value}" for name, value in sorted(params.items())]
            place = checkpoints if params_inside else self.folder
            (place / "params.txt").write_text("\n".join(lines) + "\n")
        return checkpoints / "epoch_2.pt"


def assert_holds(found: LanguageModel, state: dict[str, Tensor], config: DecoderConfig) -> None:
    assert found.config == config
    assert set(found.tensors) == set(trained_names(state))
    for name, value in found.tensors.items():
        assert torch.equal(value, state[name]), name
    fill(Decoder(found.config), found.tensors, path=Path("checkpoint"))


@pytest.mark.parametrize(
    ("prefix", "config"),
    [("", PLAIN), ("module.", CONFIG), ("_orig_mod.module.", CONFIG), ("module._orig_mod.", PLAIN)],
)
def test_an_epoch_is_read_with_any_wrapping(
    tmp_path: Path, prefix: str, config: DecoderConfig
) -> None:
    state = state_of(config)
    path = Run(tmp_path, state, prefix=prefix).write(params=PARAMS | {"qk_norm": config.qk_norm})
    found = read_openlm(path)
    assert_holds(found, state, config)
    assert found.dropped == tuple(
        f"{prefix}layers.{layer}.attention.pos_embed.inv_freq" for layer in (0, 1)
    )
    assert found.moments is None


@pytest.mark.parametrize(
    ("layout", "nested"), [("bin", True), ("safetensors", False), ("shards", True)]
)
def test_a_hugging_face_folder_is_read_in_every_layout(
    tmp_path: Path, layout: str, nested: bool
) -> None:
    state = state_of(tables=layout == "bin")
    held = {f"model.{name}": value.clone() for name, value in state.items()}
    if layout == "bin":
        torch.save(held, tmp_path / "pytorch_model.bin")
    elif layout == "safetensors":
        save_file(held, tmp_path / "model.safetensors")
    else:
        names = list(held)
        parts = {"one.safetensors": names[:5], "two.safetensors": names[5:]}
        for shard, part in parts.items():
            save_file({name: held[name] for name in part}, tmp_path / shard)
        where = {name: shard for shard, part in parts.items() for name in part}
        index = json.dumps({"weight_map": where})
        (tmp_path / "model.safetensors.index.json").write_text(index)
    kept = {"norm_eps": 1e-5, "attn_name": "auto", "ffn_type": "swiglu_torch", "moe_freq": 0}
    flat = kept | {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 30, "params": None}
    flat |= {"norm_type": "gain_only_lp_layer_norm", "apply_qk_norm": True, "qk_norm": True}
    config = {"params_args_dict": PARAMS} if nested else flat
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "openlm"} | config))
    found = read_openlm(tmp_path)
    assert_holds(found, state, CONFIG)
    assert len(found.dropped) == (2 if layout == "bin" else 0)
    assert "settings: config.json" in found.notes[0]


def test_half_precision_is_widened_and_the_precision_of_norms_kept(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in state_of().items()}
    path = Run(tmp_path, state).write()
    found = read_openlm(path)  # The rotary table in bfloat16 is within its rounding.
    assert all(value.dtype == torch.float32 for value in found.tensors.values())
    assert all(torch.equal(found.tensors[name], state[name].float()) for name in found.tensors)


def test_sizes_come_from_params_tables_and_the_caller_and_must_agree(tmp_path: Path) -> None:
    bare = {name: value for name, value in PARAMS.items() if name != "model"}
    with_tables, without = state_of(), state_of(tables=False)
    assert read_openlm(Run(tmp_path / "a", with_tables).write(params=bare)).config == CONFIG
    path = Run(tmp_path / "b", without).write(params=None)
    with pytest.raises(ValueError, match=r"does not tell the number of heads; give num_heads"):
        read_openlm(path)
    assert read_openlm(path, num_heads=4).config == CONFIG
    assert read_openlm(path, num_heads=2).config.num_heads == 2
    path = Run(tmp_path / "c", with_tables).write()
    with pytest.raises(ValueError, match=r"'given': 2, 'settings': 4, 'rotary table': 4"):
        read_openlm(path, num_heads=2)
    assert "num_heads: settings" in read_openlm(path).notes[0]


@pytest.mark.parametrize("name", ["my_model", "my_model.json"])
def test_a_models_own_json_gives_the_sizes_and_outranks_params(tmp_path: Path, name: str) -> None:
    path = Run(tmp_path, state_of(tables=False)).write(
        params=PARAMS | {"model": name, "model_norm": "default_layer_norm"}
    )
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 30}
    own = sizes | {"model_norm": "gain_only_lp_layer_norm"}
    (tmp_path / "my_model.json").write_text(json.dumps(own))
    assert read_openlm(path).config == CONFIG
    (tmp_path / "my_model.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="default_layer_norm"):
        read_openlm(path)


VARIANTS = {
    "model_norm": "rms_norm",
    "ffn_type": "gelu",
    "moe_freq": 2,
    "positional_embedding_type": "llama_rotary",
    "attn_name": "custom_attn",
    "weight_tying": True,
    "post_embed_norm": True,
    "hf_model": "gpt2",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "open_lm_79m_v2"}, r"has hidden_dim 32, its settings say 512"),
        ({"model": "d=32_l=3_h=4"}, r"has n_layers 2, its settings say 3"),
        ({"vocab_size": 31}, r"has vocab_size 30, its settings say 31"),
        ({"qk_norm": False}, r"has qk_norm True, its settings say False"),
        ({"model": "mamba_1b"}, "Mamba model mamba_1b"),
        ({"lr_scheduler": "const-cooldown"}, "unknown lr_scheduler 'const-cooldown'"),
        *(
            ({name: value}, rf"variant of OpenLM.*\n  {name} {value!r}")
            for name, value in VARIANTS.items()
        ),
    ],
)
def test_settings_of_another_run_or_model_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_openlm(Run(tmp_path, state_of()).write(params=PARAMS | changes))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("norm.bias", "layers.0.ffn_norm.bias"), r"bias \(.*\): norm\.bias and 1 more"),
        (("layers.0._ff_w1.weight",), "ffn_type 'gelu'"),
        (("layers.0.feed_forward.gate_proj.weight",), "ffn_type 'gemma_geglu'"),
        (("layers.0.feed_forward.router.layer.weight",), "ffn_type 'moe'"),
        (("post_embed_norm.weight",), "post_embed_norm"),
    ],
)
def test_tensors_of_other_variants_are_refused_by_name(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    state = state_of() | {name: torch.zeros(32) for name in names}
    path = Run(tmp_path, state).write(params=None)
    with pytest.raises(ValueError, match=rf"variant of OpenLM[^\n]*\n  {message}"):
        read_openlm(path)


def test_tied_embeddings_and_other_angles_are_refused(tmp_path: Path) -> None:
    state = state_of()
    state["output.weight"] = state["tok_embeddings.weight"]
    with pytest.raises(ValueError, match="weight_tying: output"):
        read_openlm(Run(tmp_path / "a", state).write(params=None))
    state = state_of()
    state["layers.1.attention.pos_embed.inv_freq"] = 1.0 / 500000 ** (torch.arange(4) / 4)
    with pytest.raises(ValueError, match="other angles than base 10000"):
        read_openlm(Run(tmp_path / "b", state).write())


def test_known_names_hold_the_presets_sizes() -> None:
    for name, preset in DECODERS.items():
        sizes = [preset.hidden_size, preset.num_layers, preset.num_heads]
        assert SIZES[name] == sizes
        assert SIZES.get(f"open_lm_{name}_v2", SIZES.get(f"open_lm_{name}")) == sizes


@pytest.mark.parametrize(("layout", "config"), [(numbered, PLAIN), (gathered, CONFIG)])
def test_moments_come_back_bit_for_bit_under_our_names(
    tmp_path: Path, layout: Callable[..., dict[str, Any]], config: DecoderConfig
) -> None:
    state = state_of(config)
    path = Run(tmp_path, state).write(
        params=PARAMS | {"qk_norm": config.qk_norm}, optimizer=layout(state, 20, rate_after(20))
    )
    found = read_openlm(path)
    expected = {
        f"{key}.{name}": value
        for name, entry in moments_of(state, 20).items()
        for key, value in entry.items()
    }
    assert found.moments is not None
    assert found.moments.keys() == expected.keys()
    for name, value in found.moments.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name
    assert "moments: optimizer_2.pt" in found.notes[0]


def test_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    state = state_of()
    rate = rate_after(20)
    path = Run(tmp_path, state).write(optimizer=numbered(state_of(PLAIN), 20, rate))
    with pytest.raises(
        ValueError, match=r"optimizer_2\.pt numbers 15 parameters .* the model has 19"
    ):
        read_openlm(path)
    wide = state_of(CONFIG.model_copy(update={"vocab_size": 31}))
    Run(tmp_path, state).write(optimizer=numbered(wide, 20, rate))
    with pytest.raises(ValueError, match=r"exp_avg .*\n  mismatched: output\.weight .*\[31, 32\]"):
        read_openlm(path)
    half = gathered(state, 20, rate)
    del half["state"]["_orig_mod.norm.weight"]
    half["state"]["other.weight"] = {"step": 1}
    Run(tmp_path, state).write(optimizer=half)
    with pytest.raises(
        ValueError, match=r"missing: step\.norm\.weight\n  unexpected: other\.weight$"
    ):
        read_openlm(path)


def test_an_optimisers_other_state_is_named_and_one_without_state_gives_no_moments(
    tmp_path: Path,
) -> None:
    state = state_of()
    optimizer = numbered(state, 20, rate_after(20))
    optimizer["state"][0]["max_exp_avg_sq"] = torch.zeros(30, 32)
    found = read_openlm(Run(tmp_path, state).write(optimizer=optimizer))
    assert "max_exp_avg_sq.tok_embeddings.weight" in found.dropped
    empty = numbered(state, 0, rate_after(0)) | {"state": {}}
    found = read_openlm(Run(tmp_path, state, step=0).write(optimizer=empty))
    assert found.moments is None
    assert "moments" not in found.notes[0]


@pytest.mark.parametrize(
    ("step", "params_inside", "step_in"),
    [
        *((0, True, "epoch"), (3, False, "stats"), (4, True, "stats")),
        *((5, False, "epoch"), (20, False, "stats"), (30, True, "epoch")),
    ],
)
def test_position_is_that_of_openlms_schedule(
    tmp_path: Path, step: int, params_inside: bool, step_in: str
) -> None:
    state = state_of()
    path = Run(tmp_path, state, step=step).write(
        params_inside=params_inside,
        step_in=step_in,
        optimizer=numbered(state, step, rate_after(step)),
    )
    model = read_openlm(path)
    found = model.position
    assert (model.step, found.tokens_seen, found.total_tokens) == (step, step * 64, 30 * 64)
    assert found.rate == pytest.approx(rate_after(step), rel=1e-12)
    assert (found.peak_rate, found.end_rate) == (0.003, 3e-5)
    assert "position: params.txt" in model.notes[0]


@pytest.mark.parametrize(
    ("changes", "rate", "end"),
    [
        ({"lr_scheduler": "const"}, 0.003, 0.003),
        ({"skip_scheduler": True, "warmup": 100}, 0.003, 0.003),
        ({"force_min_lr": 0.002}, 0.002, 0.002),
        ({"warmup": 100}, 0.003 * 21 / 100, 3e-5),
    ],
)
def test_other_schedules_are_openlms_too(
    tmp_path: Path, changes: dict[str, Any], rate: float, end: float
) -> None:
    found = read_openlm(Run(tmp_path, state_of()).write(params=PARAMS | changes)).position
    assert found.rate == pytest.approx(rate, rel=1e-12)
    assert found.end_rate == end


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        # 40 rows in batches of 4 by 3 workers: 3.33, so 4 batches each and 12 an epoch.
        ({"train_data": ["a"], "workers": 3}, 36),
        ({"train_data": ["a", "b"], "workers": 0}, 30),
        # 28 rows and 12 rows, 7 and 3 batches by 2 workers: 8 and 4.
        ({"train_data": ["a", "b"], "workers": 2, "train_data_mix_weights": [0.7, 0.3]}, 36),
        ({"train_data": ["a"], "train_num_samples": None}, None),
        ({"dataset_type": "synthetic", "train_data": None}, None),
    ],
)
def test_length_of_a_run_without_manifest_rounds_up_as_its_loader_does(
    tmp_path: Path, changes: dict[str, Any], steps: int | None
) -> None:
    params = PARAMS | {"dataset_manifest": None} | changes
    found = read_openlm(Run(tmp_path, state_of()).write(params=params)).position
    assert found.total_tokens == (None if steps is None else steps * 64)
    expected = None if steps is None else pytest.approx(rate_after(20, steps=steps), rel=1e-12)
    assert found.rate == expected
    assert found.tokens_seen == 20 * 64


def test_without_params_the_rate_is_what_the_optimiser_held(tmp_path: Path) -> None:
    state = state_of()
    path = Run(tmp_path, state).write(params=None, optimizer=numbered(state, 20, 0.00123))
    found = read_openlm(path)
    assert (found.step, found.position) == (20, Position(rate=0.00123))
    assert "position: rate alone, from optimizer_2.pt" in found.notes[0]
    assert "cannot tell" in found.notes[0]


def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path: Path) -> None:
    state = state_of()
    path = Run(tmp_path, state).write(optimizer=numbered(state, 20, 0.0005))
    with pytest.raises(ValueError, match=r"give the rate 0\.0010\d+, the optimiser held 0\.0005"):
        read_openlm(path)
    path = Run(tmp_path / "b", state, step=31).write()
    with pytest.raises(ValueError, match="step 31 of a run of 30 steps"):
        read_openlm(path)
    path = Run(tmp_path / "d", state).write()
    (path.parent.parent / "params.txt").write_text("lr: 0.1\nnot a setting\n")
    with pytest.raises(ValueError, match=r"params\.txt, line 2: 'not a setting'"):
        read_openlm(path)


def test_files_of_different_epochs_are_refused(tmp_path: Path) -> None:
    path = Run(tmp_path, state_of()).write()
    other = {"epoch": 3, "name": "run", "optimizer": numbered(state_of(), 20, 0.001)}
    torch.save(other, path.with_name("optimizer_2.pt"))
    with pytest.raises(ValueError, match=r"optimizer_2\.pt is of epoch 3, epoch_2\.pt of 2"):
        read_openlm(path)
    torch.save({"epoch": 2, "name": "run"}, path.with_name("optimizer_2.pt"))
    with pytest.raises(ValueError, match=r"optimizer_2\.pt has no 'optimizer', only epoch, name"):
        read_openlm(path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = state_of() | {"norm.weight": torch.zeros(33)}
    with pytest.raises(ValueError, match=r"epoch_2\.pt does not fit this Decoder.*\n.* \[33\]"):
        read_openlm(Run(tmp_path, state).write())


def test_what_is_no_openlm_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "epoch_1.pt"
    with pytest.raises(FileNotFoundError, match=r"epoch_1\.pt"):
        read_openlm(path)
    twice = {"norm.weight": torch.zeros(2), "module.norm.weight": torch.zeros(2)}
    for content, told in (
        ({"optimizer": {}}, "no 'state_dict', only optimizer"),
        ([1, 2], "no 'state_dict', only list"),
        ({"state_dict": {"wte.weight": torch.zeros(3, 4)}}, r"no OpenLM decoder: .*wte\.weight"),
        ({"state_dict": twice}, r"norm\.weight twice, .* module\.norm\.weight"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=told):
            read_openlm(path)


def test_folders_of_other_kinds_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"only nothing"):
        read_openlm(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config\.json is of model_type 'llama', not 'openlm'"):
        read_openlm(folder)
