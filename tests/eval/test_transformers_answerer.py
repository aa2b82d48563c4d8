import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast

import peer_checkpoints
from answerers import chosen, written
from midstream.data.images import decode
from midstream.eval import foreign_model
from midstream.eval.foreign_model import digest_of
from midstream.eval.tasks import Ask, reply_tokens
from midstream.eval.transformers_answerer import TransformersAnswerer, _turn

Folders = Callable[[str], Path]
Peers = Callable[[str], TransformersAnswerer]
PROMPTS = ["Is there a cat in the image?", "What colour is it? Answer with a single word.", "A"]
FAMILIES = ["LLaVA 1.5", "LLaVA-NeXT", "Gemma 3", "Llama 3.2 Vision", "Idefics 3", "PaliGemma"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        place = root / family.replace(" ", "-")
        if not place.is_dir():
            peer_checkpoints.build(family, place)
        return place

    return folder


@pytest.fixture(scope="module")
def peers(folders: Folders) -> Peers:
    """Each family's model, opened once and left as it is."""
    return cache(lambda family: opened(folders(family)))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = []
    for number, (width, height) in enumerate([(64, 48), (40, 90), (32, 32)]):
        raster = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(raster).save(paths[-1])
    return paths


def opened(folder: Path, batch_size: int = 4) -> TransformersAnswerer:
    return TransformersAnswerer(
        str(folder), torch.device("cpu"), max_new_tokens=8, batch_size=batch_size
    )


def documented(peer: TransformersAnswerer, prompt: str, picture: Path) -> Any:
    content = [{"type": "image", "image": Image.open(picture).convert("RGB")}]
    message = {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}
    return peer.processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_pictures_is_answered_as_the_library_answers_one_by_one(
    peers: Peers, pictures: list[Path], family: str
) -> None:
    peer = peers(family)
    expected = []
    for prompt, picture in zip(PROMPTS, pictures, strict=True):
        inputs = documented(peer, prompt, picture)
        ours = peer._inputs([Ask(prompt, picture)])
        for key, value in inputs.items():
            if key != "labels":
                torch.testing.assert_close(ours[key], value)
        new = peer.model.generate(**inputs, do_sample=False, max_new_tokens=8)
        new = new[0, inputs["input_ids"].shape[1] :]
        expected.append(peer.tokenizer.decode(new, skip_special_tokens=True).strip())
    assert written(peer, PROMPTS, list(pictures)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("family", ["LLaVA 1.5", "Gemma 3", "Llama 3.2 Vision"])
def test_a_whole_reply_has_the_probability_that_one_pass_over_it_gives(
    peers: Peers, pictures: list[Path], family: str
) -> None:
    peer = peers(family)
    options = ("red cat", "red dog in the image")
    found = chosen(peer, PROMPTS, list(pictures), [options] * 3)
    for prompt, picture, values in zip(PROMPTS, pictures, found, strict=True):
        inputs = documented(peer, prompt, picture)
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        head = peer.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        length = inputs["input_ids"].shape[1]
        for text, value in zip(options, values, strict=True):
            lead = "" if head[-1].isspace() else " "
            whole = peer.processor(
                text=[head + lead + text],
                images=[[Image.open(picture).convert("RGB")]],
                add_special_tokens=family == "LLaVA 1.5",
                return_tensors="pt",
            )
            ids = whole["input_ids"][0]
            assert ids[:length].tolist() == inputs["input_ids"][0].tolist()
            with torch.no_grad():
                logits = peer.model(**whole).logits[0, length - 1 : -1].log_softmax(dim=-1)
            total = logits.gather(1, ids[length:, None]).sum()
            assert value == pytest.approx(float(total), abs=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_choice_is_what_a_plain_model_writes(
    peers: Peers, pictures: list[Path], family: str
) -> None:
    peer = peers(family)
    written = ["Yes", "No", "yes", "no", "True", "False", "A", "B", "C", "D", "red", "blue"]
    for prompt, picture in zip(PROMPTS, pictures, strict=True):
        inputs = documented(peer, prompt, picture)
        end = peer.tokenizer.decode(inputs["input_ids"][0, -1:])
        ids = [own[0] for own in peer._replies(Ask(prompt, picture), written, end)]
        with torch.no_grad():
            logits = peer.model(**inputs).logits[0, -1]
        chances = logits.log_softmax(dim=-1)[ids]
        [found] = chosen(peer, [prompt], [picture], [written])
        assert found == pytest.approx(chances.tolist(), abs=1e-3)
        texts = peer.tokenizer.batch_decode([[one] for one in ids])
        assert [text.strip() for text in texts] == written


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    start = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    marked = {
        name: peer_checkpoints.fast(
            peer_checkpoints.sentencepiece(name), ["<x>"], adds_start=True, **start
        )
        for name in ("legacy", "first", "always", None)
    }
    level = peer_checkpoints.fast(peer_checkpoints.byte_level(), ["<x>"], adds_start=True, **start)
    return {**{f"sentencepiece {name}": one for name, one in marked.items()}, "byte level": level}


@pytest.mark.parametrize("reply", ["Yes", "No", "A", "True", "red"])
@pytest.mark.parametrize("head", ["USER: What? ASSISTANT:", "user\nWhat?<x>\n", "a [/INST]"])
def test_a_reply_is_one_word_that_stands_where_it_is_written(head: str, reply: str) -> None:
    for name, one in tokenizers().items():

        def encode(text: str, one: PreTrainedTokenizerFast = one) -> list[int]:
            return list(one(text, add_special_tokens=False)["input_ids"])

        lead = "" if head[-1].isspace() else " "
        [ids] = reply_tokens(encode, head, [lead + reply])
        spelt = one.convert_ids_to_tokens(ids)
        if lead:
            assert spelt == [("Ġ" if name == "byte level" else "▁") + reply], name
        else:
            assert reply.startswith("".join(spelt)), name


def test_a_reply_that_melts_into_its_prompt_is_taken_without_a_space_of_its_own() -> None:
    for name, one in tokenizers().items():
        ids = reply_tokens(
            lambda text, one=one: list(one(text, add_special_tokens=False)["input_ids"]),
            "Answer with a ",
            ["Yes", "No"],
        )
        for row in ids:
            assert one.convert_ids_to_tokens(row)[0][0] in "YN", name


def test_a_picture_is_opened_as_the_stages_open_it(peers: Peers, tmp_path: Path) -> None:
    peer = peers("LLaVA 1.5")
    scene = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    clear = np.dstack([scene, np.where(scene[..., 0] > 99, 255, 0).astype(np.uint8)])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    Image.fromarray(scene[..., 0].astype(np.uint16) * 257).save(tmp_path / "grey.png")
    Image.fromarray(scene).save(tmp_path / "turned.jpg", exif=turned)
    for path in sorted(tmp_path.iterdir()):
        upright = decode(path.read_bytes(), path.name)
        expected = peer.processor.image_processor(upright, return_tensors="pt")["pixel_values"]
        assert peer._inputs([Ask("A", path)])["pixel_values"].equal(expected), path.name


def test_a_model_without_eyes_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    peer_checkpoints.language_model(tmp_path / "blind")
    peer = opened(tmp_path / "blind")
    with pytest.raises(ValueError, match=r"takes no pictures .* text tasks"):
        peer.check_pictures()
    with pytest.raises(ValueError, match="takes no pictures"):
        chosen(peer, ["A"], [tmp_path / "none.png"], [["Yes", "No"]])
    assert len(written(peer, ["A", "What colour"], [None, None])) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no chat template.*known: none"),
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "drops the picture"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "drops the picture"),
        ("{% for m in messages %}{{ 'a' + m.content }}{% endfor %}", "cannot lay a question out"),
    ],
)
def test_a_template_that_cannot_ask_about_pictures_is_refused(
    tmp_path: Path, text: str | None, told: str
) -> None:
    peer_checkpoints.llava(tmp_path / "odd", chat_template=text)
    with pytest.raises(ValueError, match=told) as caught:
        opened(tmp_path / "odd").check_pictures()
    assert "odd" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_templates_that_are_known_are_named(tmp_path: Path) -> None:
    peer_checkpoints.llava(tmp_path / "odd", chat_template=None)
    peer = opened(tmp_path / "odd")
    peer.tokenizer.chat_template = peer_checkpoints.VICUNA
    with pytest.raises(ValueError, match="known: its tokenizer's"):
        peer.check_pictures()
    peer.processor.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(ValueError, match="known: 'rag', 'tool_use'"):
        peer.check_pictures()


TEXTS = [
    ("What colour is it ?", " red"),
    ("What colour is it ?", " blue cat"),
    ("Is there a cat ?", " Yes"),
    ("", "no cat"),
]


def check_texts(peer: TransformersAnswerer) -> None:
    """Its likelihoods are those of one pass of the library's model over each text."""
    found = peer.loglikelihood(TEXTS)
    for (context, reply), (value, greedy) in zip(TEXTS, found, strict=True):
        head = peer.tokenizer(context)["input_ids"]
        ids = peer.tokenizer(context + reply)["input_ids"]
        if not head:
            head, ids = [peer.tokenizer.eos_token_id], [peer.tokenizer.eos_token_id, *ids]
        with torch.no_grad():
            logits = peer.model(input_ids=torch.tensor([ids])).logits[0, len(head) - 1 : -1]
        new = torch.tensor(ids[len(head) :])
        expected = logits.log_softmax(dim=-1).gather(1, new[:, None]).sum()
        assert value == pytest.approx(float(expected), abs=1e-3)
        assert greedy == bool((logits.argmax(dim=-1) == new).all())


@pytest.mark.parametrize("family", ["LLaVA 1.5", "Gemma 3", "Llama 3.2 Vision"])
def test_a_model_with_eyes_gives_texts_the_likelihoods_of_the_library(
    folders: Folders, peers: Peers, family: str
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = peers(family)
    check_texts(peer)
    if family == "LLaVA 1.5":  # no causal model of the library, which the harness would open
        return
    theirs = HFLM(pretrained=str(folders(family)), dtype="float32", device="cpu", batch_size=2)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in TEXTS]
    for (value, greedy), (expected, same) in zip(
        peer.loglikelihood(TEXTS), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert (value, greedy) == (pytest.approx(expected, abs=1e-3), same)


def test_a_model_that_reads_texts_in_both_directions_is_asked_none(peers: Peers) -> None:
    with pytest.raises(ValueError, match=r"both directions \(paligemma\).*leave text tasks out"):
        peers("PaliGemma").check_texts()
    peers("Gemma 3").check_texts()


def test_weights_without_a_processor_are_asked_about_texts_alone(tmp_path: Path) -> None:
    peer_checkpoints.llava(tmp_path / "bare")
    (tmp_path / "bare" / "processor_config.json").unlink()
    peer = opened(tmp_path / "bare")
    for ask in (peer.check_pictures, lambda: written(peer, ["A"], [tmp_path / "none.png"])):
        with pytest.raises(
            ValueError, match=r"weights and no processor.*text tasks alone"
        ) as error:
            ask()
        assert "\n" not in str(error.value)
    check_texts(peer)


@pytest.mark.skipif(
    transformers.utils.is_torchvision_available(), reason="torchvision is installed"
)
def test_a_processor_that_needs_torchvision_says_so_where_pictures_are_asked(
    folders: Folders,
) -> None:
    peer = opened(folders("Qwen2-VL"))
    with pytest.raises(ValueError, match=r"needs torchvision.*pip install torchvision, or ask"):
        peer.check_pictures()
    check_texts(peer)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "gone"), str(tmp_path / "empty"), "no-such-owner/no-such-model"):
        with pytest.raises(
            FileNotFoundError, match=r"holds no config\.json.*; give a model"
        ) as error:
            opened(Path(name))
        assert str(error.value).startswith(name)
        assert "\n" not in str(error.value)


def test_a_start_token_that_the_template_writes_is_not_written_twice(tmp_path: Path) -> None:
    peer_checkpoints.llava(
        tmp_path / "bos", chat_template="{{ bos_token }}" + peer_checkpoints.VICUNA
    )
    peer = opened(tmp_path / "bos")
    config = json.loads((tmp_path / "bos" / "config.json").read_text())
    image = tmp_path / "0.png"
    Image.new("RGB", (32, 32), "red").save(image)
    ids = peer._inputs([Ask("A", image)])["input_ids"][0].tolist()
    assert ids.count(config["text_config"]["bos_token_id"]) == 1


PARTS = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "modeling_own.py",
    "parts/tower.py",
)
CONFIG = SimpleNamespace()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in PARTS:
        path = tmp_path / "model" / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(part))
    return tmp_path / "model"


def test_every_part_of_a_model_counts(folder: Path) -> None:
    found = [digest_of(folder, CONFIG, torch.float32)]
    for part in PARTS:
        (folder / part).write_text("another")
        found.append(digest_of(folder, CONFIG, torch.float32))
        (folder / part).unlink()
        found.append(digest_of(folder, CONFIG, torch.float32))
        assert len(set(found)) == len(found), part


def test_notes_hidden_files_results_and_the_place_do_not_count(folder: Path) -> None:
    before = digest_of(folder, CONFIG, torch.float32)
    for name in ("README.md", ".gitattributes", "LICENSE"):
        (folder / name).write_text("about")
    (folder / "evaluations/model-1").mkdir(parents=True)
    (folder / "evaluations/model-1/results.json").write_text("{}")
    assert digest_of(folder, CONFIG, torch.float32) == before
    assert digest_of(folder.rename(folder.parent / "moved"), CONFIG, torch.float32) == before


def test_versions_that_change_answers_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(folder, CONFIG, torch.float32)
    assert digest_of(folder, CONFIG, torch.bfloat16) != before
    monkeypatch.setattr(
        foreign_model, "version", lambda name: {"transformers": "99"}.get(name, "1")
    )
    assert digest_of(folder, CONFIG, torch.float32) != before


def test_a_hub_model_is_its_commit_and_one_without_is_never_the_same(tmp_path: Path) -> None:
    name = tmp_path / "org/model"
    one, other = (SimpleNamespace(_commit_hash=commit) for commit in ("abc", "def"))
    assert (
        digest_of(name, one, torch.float32)
        == digest_of(name, one, torch.float32)
        != digest_of(name, other, torch.float32)
    )
    assert digest_of(name, CONFIG, torch.float32) != digest_of(name, CONFIG, torch.float32)


def test_pictures_of_a_turn_stand_between_its_texts() -> None:
    one, two = {"image": 1}, {"image": 2}
    told = _turn("user", "Is  like ?", [one, two], (3, 9))["content"]
    assert told == [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": 1},
        {"type": "text", "text": " like "},
        {"type": "image", "image": 2},
        {"type": "text", "text": "?"},
    ]
    assert [part["type"] for part in _turn("user", "What?", [one, two])["content"]] == (
        ["image", "image", "text"]
    )
