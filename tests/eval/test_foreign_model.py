"""Folders of other people's models a step away from whole: refused, or asked as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import peer_checkpoints
from answerers import written
from checkpoints import edit
from midstream.eval.foreign_model import open_config, open_weights, without_thoughts
from midstream.eval.transformers_answerer import TransformersAnswerer

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "llava"
    peer_checkpoints.build("LLaVA 1.5", folder)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def opened(folder: Path) -> TransformersAnswerer:
    return TransformersAnswerer(str(folder), torch.device("cpu"), max_new_tokens=8, batch_size=4)


def answers(folder: Path) -> list[str]:
    pictures = []
    for number, size in enumerate([(48, 32), (32, 64)]):
        pictures.append(folder.parent / f"{number}.png")
        Image.new("RGB", size, (200, 40 * number, 90)).save(pictures[-1])
    return written(opened(folder), ["Is there a cat in the image?", "What colour?"], pictures)


@pytest.fixture(scope="module")
def expected(whole: Path) -> list[str]:
    return answers(whole)


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda held: {name: one for name, one in held.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("lm_head"), r"lack .*lm_head\.weight of a LlavaForConditionalGeneration; nothing"),
        (without("projector"), r"lack .*multi_modal_projector\.linear_1\.bias.* and 1 more of a"),
        (
            lambda held: {f"_orig_mod.{name}": one for name, one in held.items()},
            r"lack .* and hold _orig_mod\..* in their place",
        ),
        (
            lambda held: held | {key: held[key][:9] for key in held if "lm_head" in key},
            r"do not fit its config\.json: .*lm_head\.weight is \[9, 32\], not",
        ),
    ],
)
def test_a_model_whose_files_lack_tensors_is_never_asked(
    copied: Path, change: Callable[[Tensors], Tensors], told: str
) -> None:
    held = change(load_file(copied / "model.safetensors"))
    kept = {name: one.clone() for name, one in held.items()}
    save_file(kept, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=told) as caught:
        opened(copied)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_short_is_told(copied: Path) -> None:
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"a weight file is broken .* downloaded to its end"):
        opened(copied)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 1.5, "top_p": 0.5, "num_beams": 3}
        | {"num_return_sequences": 2, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3, "stop_strings": ["never written"]},
        {"penalty_alpha": 0.6, "top_k": 4},
    ],
)
def test_a_folders_own_way_of_generating_leaves_one_greedy_answer(
    expected: list[str], copied: Path, settings: dict[str, Any]
) -> None:
    edit(copied / "generation_config.json", **settings)
    assert answers(copied) == expected


@pytest.mark.parametrize("tokens", [{"pad_token": None}, {"pad_token": None, "eos_token": None}])
def test_prompts_of_other_lengths_need_no_pad_token(
    expected: list[str], copied: Path, tokens: dict[str, Any]
) -> None:
    edit(copied / "tokenizer_config.json", **tokens)
    assert answers(copied) == expected


def test_a_pad_token_without_a_row_pads_nothing(expected: list[str], copied: Path) -> None:
    peer = opened(copied)
    rows = peer.model.get_input_embeddings().num_embeddings
    peer.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert peer.tokenizer.pad_token_id == rows
    peer.processor.save_pretrained(copied)
    assert answers(copied) == expected


@pytest.mark.parametrize("pad", [-1, 100_000])
def test_a_pad_token_of_the_configs_without_a_row_ends_no_run(
    expected: list[str], copied: Path, pad: int
) -> None:
    text = json.loads((copied / "config.json").read_text())["text_config"]
    edit(copied / "config.json", pad_token_id=pad, text_config=text | {"pad_token_id": pad})
    # The first answer ends with its first token.
    peer = opened(copied)
    first = peer.tokenizer(expected[0], add_special_tokens=False)["input_ids"][0]
    edit(copied / "generation_config.json", pad_token_id=pad, eos_token_id=[first])
    assert answers(copied) != expected


def test_a_template_that_can_is_asked_for_an_answer_without_thoughts(
    expected: list[str], copied: Path
) -> None:
    path = copied / "chat_template.jinja"
    opens = "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    path.write_text(path.read_text() + opens)
    assert answers(copied) == expected
    path.write_text(path.read_text().replace("enable_thinking", "always"))
    assert answers(copied) != expected
    assert without_thoughts("A cat? No.</think>\n\nYes") == "Yes"
    assert without_thoughts(" Yes ") == "Yes"
    assert without_thoughts("<think>\nNo, it may be") == ""


@pytest.mark.parametrize("lacks", [("patch_size", "vision_feature_select_strategy"), ()])
def test_what_an_older_llavas_processor_does_not_say_is_the_models(
    expected: list[str], copied: Path, lacks: tuple[str, ...]
) -> None:
    path = copied / "processor_config.json"
    held = json.loads(path.read_text())
    for name in (*lacks, "num_additional_image_tokens"):
        del held[name]
    path.write_text(json.dumps(held))
    assert answers(copied) == expected


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_an_attention_that_is_not_here_is_not_asked_for(
    expected: list[str], copied: Path, key: str
) -> None:
    edit(copied / "config.json", **{key: "flash_attention_2"})
    assert answers(copied) == expected


def test_a_question_that_the_processor_cannot_take_is_named(copied: Path) -> None:
    pictures = [copied.parent / f"{number}.png" for number in range(2)]
    for path in pictures:
        Image.new("RGB", (48, 32)).save(path)
    asked = ["What colour?", "What does <image> mean?"]
    with pytest.raises(ValueError, match=r"cannot take the question 'What does <ima.*1\.png \(Val"):
        written(opened(copied), asked, pictures)


def test_a_template_that_writes_the_day_writes_the_same_one_each_time(copied: Path) -> None:
    path = copied / "chat_template.jinja"
    day = "{% if date_string is not defined %}{% set date_string = 'today' %}{% endif %}"
    path.write_text(day + "{{ date_string }}" + path.read_text())
    shown = opened(copied)._rendered([{"role": "user", "content": [{"type": "text", "text": "?"}]}])
    assert shown.startswith("26 Jul 2024")


def test_a_head_called_head_alone_is_one(tmp_path: Path) -> None:
    config = transformers.RwkvConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2)
    model = transformers.RwkvForCausalLM(config)
    held = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}
    model.save_pretrained(tmp_path / "m")
    save_file(held, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack .*head\.weight of a RwkvForCausalLM"):
        open_weights(str(tmp_path / "m"), config, "AutoModelForCausalLM", {})


def test_what_writes_no_text_or_wants_its_own_code_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.CLIPConfig()
    with pytest.raises(ValueError, match=r"is a clip, of which .* has no model that writes text"):
        open_weights("somebody/clip", config, "AutoModelForImageTextToText", {})
    config.auto_map = {"AutoModel": "modeling_x.Y"}
    with pytest.raises(ValueError, match=r"own code offers AutoModel, not AutoModelForImageT"):
        open_weights("somebody/clip", config, "AutoModelForImageTextToText", {})
    folder = tmp_path / "model"
    folder.mkdir()
    edit(folder / "adapter_config.json", peft_type="LORA")
    with pytest.raises(ValueError, match="an adapter without its model; merge the two"):
        open_config(str(folder), {"trust_remote_code": False})
    edit(folder / "config.json", model_type="llava", mm_vision_tower="openai/clip")
    with pytest.raises(ValueError, match=r"is of LLaVA's own code .*llava-hf/"):
        open_config(str(folder), {"trust_remote_code": False})
    (folder / "config.json").unlink()
    own = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.Y"}
    edit(folder / "config.json", model_type="internvl_chat", auto_map=own)
    with pytest.raises(ValueError, match=r"code of its own, .* say --trust-remote-code$"):
        open_config(str(folder), {"trust_remote_code": False})
    edit(folder / "config.json", model_type="brand_new", auto_map={})
    with pytest.raises(ValueError, match=r"cannot read its config\.json .*brand_new.*newer"):
        open_config(str(folder), {"trust_remote_code": False})
