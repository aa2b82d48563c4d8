import base64
import io
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from exported import (
    CLIP,
    DINOV2,
    DINOV3,
    INNER,
    OPENLM,
    SIGLIP,
    codec,
    made,
    picture,
    run_fresh,
    stock,
)
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import answerers
from midstream.config import (
    AttentionPool,
    AveragePool,
    FusedEncoder,
    GatedBlocks,
    ImageTransform,
    PatchProjection,
    PixelShuffle,
    ProjectorConfig,
    Resampler,
    VLMConfig,
)
from midstream.core.batch import IGNORE, Batch
from midstream.core.storage import read_json
from midstream.core.tokens import TokenCount
from midstream.data.examples import (
    Example,
    TextCodec,
    Turn,
    asked_example,
    caption_example,
    conversation_example,
    question_ids,
    text_example,
)
from midstream.data.images import decode_pixels
from midstream.exchange.export import write_folder
from midstream.exchange.export_stock import no_llava
from midstream.model.generate import generate
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vision import VisionEncoder
from midstream.model.vlm import VLM
from midstream.work.open_model import look_through

FUSED = FusedEncoder(towers=(SIGLIP, DINOV2))
PATCHES = PatchProjection(image_size=24, patch_size=12, hidden_size=16)
TURNS = [("What colour is the ball?", "The ball is red."), ("How many?", "2"), ("Left?", "no")]
SHOWN = [Turn(*TURNS[0], pictures=(0,)), *TURNS[1:]]


def changed(config: Any, **changes: Any) -> Any:
    return config.model_copy(update=changes)


FUSED_3 = FusedEncoder(
    towers=(SIGLIP, changed(DINOV3, final_norm=True, ffn="swiglu", pixel_std=(0.2, 0.3, 0.25)))
)


def model(decoder: Any, encoder: Any, projector: ProjectorConfig = INNER, **more: Any) -> VLMConfig:
    return VLMConfig(decoder=decoder, encoder=encoder, projector=projector, **more)


LAYERS = {number: ProjectorConfig(num_layers=number) for number in (1, 2, 3)}
REDUCED = {
    one.kind: ProjectorConfig(reduction=one)
    for one in (
        PixelShuffle(window=2),
        AveragePool(window=2),
        AttentionPool(window=2, num_heads=2),
        Resampler(num_latents=3, num_layers=2, num_heads=2, head_dim=4),
    )
}
TIED = {"tie_word_embeddings": True}
STOCK = {
    "siglip": model(stock(), SIGLIP),
    "siglip with a margin": model(stock("qwen2"), changed(SIGLIP, image_size=27)),
    "siglip, last block, linear, tied": model(
        stock(**TIED), changed(SIGLIP, feature_layer=-1), LAYERS[1]
    ),
    "no spare row": model(stock(vocab_size=302), SIGLIP),
    "dinov2, gpt_neox": model(stock("gpt_neox"), DINOV2, attention="causal"),
    "clip": model(stock(), CLIP),
    "dinov2, gated": model(stock("olmo2"), changed(DINOV2, ffn="swiglu")),
}
OWN = {
    "the decoder is OpenLM's": model(OPENLM, SIGLIP),
    "decoder is OpenLM's": model(
        changed(OPENLM, vocab_size=302, qk_norm=False),
        changed(SIGLIP, feature_dtype="int8", final_norm=True),
        LAYERS[1],
    ),
    "Llava does not leave DINOv3's registers out": model(stock(), DINOV3),
    "image and question see each other": model(
        stock(), changed(CLIP, position_size=36), attention="prefix"
    ),
    "not one tower but fused": model(stock("qwen3"), FUSED, LAYERS[3]),
    "one tower but fused": model(stock("smollm3"), FUSED_3),
    "not one tower but patches": model(stock("gpt_neox"), PATCHES, owns_encoder=True),
    "siglip2's patches": model(stock(), changed(SIGLIP, family="siglip2", position_size=36)),
    "registers": model(stock(), changed(DINOV2, num_registers=3, position_size=36, ffn="swiglu")),
    "positions of a picture see each other": model(stock(), SIGLIP, attention="pictures"),
    "sees the latest picture alone": model(stock(), SIGLIP, attention="latest"),
    "Llava has no shuffle connector": model(stock(), SIGLIP, REDUCED["shuffle"]),
    "Llava has no average connector": model(stock(), SIGLIP, REDUCED["average"]),
    "Llava has no attention connector": model(stock(), SIGLIP, REDUCED["attention"]),
    "Llava has no resampler connector": model(stock(), SIGLIP, REDUCED["resampler"]),
    "tied embeddings": model(stock("gpt_neox", **TIED), SIGLIP),
    "is OpenLM's": model(
        OPENLM,
        SIGLIP,
        ProjectorConfig(
            num_layers=0,
            reduction=Resampler(num_latents=3, num_layers=1, num_heads=2, head_dim=4),
            gated=GatedBlocks(every=1, num_heads=2, head_dim=4),
        ),
    ),
}


# Of parts that the others have as well.
ALIKE = {
    "before the tower's final norm": model(stock(), changed(DINOV2, final_norm=True)),
    "interpolated from 36 pixels": model(stock(), changed(SIGLIP, position_size=36)),
    "inner width is not": model(stock(), SIGLIP, LAYERS[2]),
    "three layers": model(stock(), SIGLIP, LAYERS[3]),
}


def test_what_is_no_stock_llava_says_why() -> None:
    for told, config in (OWN | ALIKE).items():
        assert told in str(no_llava(config))
    assert {no_llava(config) for config in STOCK.values()} == {None}


def written(folder: Path, config: VLMConfig, words: TextCodec) -> tuple[VLM, VisionEncoder, Any]:
    vlm, encoder = made(config)
    assert isinstance(encoder, VisionEncoder)
    folder.mkdir()
    return vlm, encoder, write_folder(vlm, words, encoder, folder)


def test_stock_llava_says_how_far_unrounded_features_take_it(tmp_path: Path) -> None:
    _, _, report = written(tmp_path / "out", STOCK["siglip"], codec())
    assert 1e-5 < report.largest_difference < 0.1
    assert any("not rounded as in training" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["clip", "siglip, last block, linear, tied"])
def test_a_stock_llava_says_what_others_ask_of_it(kind: str, tmp_path: Path) -> None:
    written(tmp_path / "out", STOCK[kind], codec())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    starts = {".".join(name.split(".")[:2]) for name in names}
    vision = {"vision_tower.vision_model"}
    projector = {f"multi_modal_projector.linear_{number}" for number in (1, 2)}
    words = {"language_model.model"} | ({"language_model.lm_head"} if kind == "clip" else set())
    assert starts == vision | projector | words
    text = read_json(tmp_path / "out" / "config.json")["text_config"]
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("name", ["siglip", "the decoder is OpenLM's"])
def test_the_chat_template_lays_turns_out_as_training_does(tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    words = codec(adds_start=True)
    written(tmp_path / "out", (STOCK | OWN)[name], words)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    messages: list[dict[str, Any]] = []
    for question, reply in TURNS:
        messages += [{"role": "user", "content": [{"type": "text", "text": question}]}]
        messages += [{"role": "assistant", "content": f"  {reply} "}]
    messages[0]["content"].insert(0, {"type": "image"})
    token = tokenizer.convert_tokens_to_ids("<image>")
    for turns in range(1, 4):
        laid = tokenizer.apply_chat_template(messages[: 2 * turns], tokenize=False)
        begin, *rest = conversation_example(words, SHOWN[:turns]).input_ids.tolist()
        # A processor hands it to its tokenizer, which begins each text.
        assert tokenizer(laid)["input_ids"] == [begin, token, *rest]
    image, text = {"type": "image"}, {"type": "text", "text": "Is "}
    content = [image, image, text, image, {"type": "text", "text": "red?"}, image]
    asked = [*messages[:2], {"role": "user", "content": content}]
    turn = Turn("Is red?", "", pictures=(0, 0, 3, 7))
    head, whole = asked_example(words, turn, [Turn(*TURNS[0], pictures=(0,))])
    expected = list[int]()
    for part in (head, whole):
        for place, one in enumerate(part.input_ids.tolist()):
            expected += [token, one] if place in part.pictures else [one]
    laid = tokenizer.apply_chat_template(asked, tokenize=False)
    assert tokenizer(laid)["input_ids"] == expected
    seen = [messages[0], {"role": "assistant", "content": [image]}]
    with pytest.raises(Exception, match="images stand in a user's turns"):
        tokenizer.apply_chat_template(seen, tokenize=False)


# ------------------------------------------------------------------- who sees whom, turn by turn


def batch_of(example: Example, num_patches: int) -> Batch:
    """One row; each of the example's pictures stands before its token."""
    ids, learnt, slots, done = list[int](), list[int](), list[list[int]](), 0
    for place in (*example.pictures, len(example.input_ids)):
        ids += example.input_ids[done:place].tolist()
        learnt += example.supervised[done:place].tolist()
        if place < len(example.input_ids):
            slots.append([0, len(ids)])
            ids += [0] * num_patches
            learnt += [0] * num_patches
        done = place
    targets = np.full(len(ids), IGNORE)
    targets[:-1] = np.where(learnt[1:], ids[1:], IGNORE)
    rows = torch.from_numpy(np.stack([np.array(ids), targets]))
    return Batch(
        input_ids=rows[:1],
        targets=rows[1:],
        position_ids=torch.arange(len(ids))[None],
        segment_ids=torch.zeros((1, len(ids)), dtype=torch.int64),
        image_slots=torch.tensor(slots).reshape(-1, 2).long(),
        images=torch.zeros(len(slots), 1),
        counts=TokenCount(),
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "decoder", "begins"),
    [
        *(("causal", "llama", True), ("segments", "openlm", False)),
        *(("prefix", "openlm", False), ("prefix", "llama", True)),
    ],
)
def test_conversations_captions_and_text_have_the_logits_of_training(
    tmp_path: Path, attention: str, decoder: str, begins: bool
) -> None:
    from midstream.exchange.modeling.modeling_midstream import MidstreamForConditionalGeneration

    words = codec(adds_start=begins)
    text = OPENLM if decoder == "openlm" else stock()
    config = model(text, FUSED, LAYERS[3], attention=attention)
    vlm, encoder, _ = written(tmp_path / "out", config, words)
    again = MidstreamForConditionalGeneration.from_pretrained(tmp_path / "out")
    token = again.config.image_token_id
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    features = look_through(vlm, encoder)(pixels)
    both = [Turn("Is  like the ball?", "no", pictures=(0, 3)), Turn("Left?", "no")]
    caption, plain = words.encode("The big round ball"), words.encode("The ball is red.")
    for example in (
        conversation_example(words, SHOWN),
        conversation_example(words, TURNS),
        conversation_example(words, both),
        caption_example(words, caption),
        text_example(words, plain),
    ):
        batch, shown = batch_of(example, FUSED.num_patches), len(example.pictures)
        expected = vlm.decoder.output(vlm(batch, features[:shown] if shown else None))
        ids = batch.input_ids.clone()
        for _, place in batch.image_slots.tolist():
            ids[:, place : place + FUSED.num_patches] = token
        # Padding on the left, as the processor puts it, changes nothing.
        padded = torch.cat((torch.full((1, 3), words.end_of_text), ids), dim=1)
        held = (torch.arange(padded.shape[1]) >= 3).long()[None]
        found = again(
            input_ids=padded, attention_mask=held, pixel_values=pixels[:shown] if shown else None
        ).logits[:, 3:]
        assert (found - expected).abs().max() <= 1e-5
    for pictures in (0, 2):
        told = f"{pictures} pictures fill {4 * pictures} places, the prompts have 4"
        with pytest.raises(ValueError, match=told):
            again(
                input_ids=torch.full((1, 4), token),
                pixel_values=torch.zeros(2, 3, 24, 24) if pictures else None,
            )


@torch.no_grad()
@pytest.mark.parametrize("name", ["is OpenLM's", "the decoder is OpenLM's"])
def test_prompts_of_several_pictures_are_answered_together_and_several_times(
    tmp_path: Path, name: str
) -> None:
    from midstream.exchange.modeling.modeling_midstream import MidstreamForConditionalGeneration

    words = codec(adds_start=True)
    vlm, encoder, report = written(tmp_path / "out", OWN[name], words)
    assert report.own_code
    again = MidstreamForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    pixels = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    features, size = look_through(vlm, encoder)(pixels), vlm.config.image_tokens
    rows, prompts, taken = list[list[int]](), list[Prompt](), 0
    for shown in ((0, 5, 5), (), (2,)):
        turn = Turn("How many balls?", "", pictures=shown)
        head, rest = asked_example(words, turn, [Turn("Left?", "no")])
        ids = np.concatenate((head.input_ids, rest.input_ids))
        places = (*head.pictures, *(len(head.input_ids) + place for place in rest.pictures))
        assert len(places) == len(shown)
        batch = batch_of(Example(ids, np.zeros(len(ids)), places), size)
        mine = slice(taken, taken + len(shown))
        expected = vlm.decoder.output(vlm(batch, features[mine]))
        row = batch.input_ids.clone()
        for _, place in batch.image_slots.tolist():
            row[:, place : place + size] = again.config.image_token_id
        found = again(input_ids=row, pixel_values=pixels[mine] if shown else None).logits
        assert (found[..., : expected.shape[-1]] - expected).abs().max() <= 1e-5
        rows += row.tolist()
        numbered = tuple((place, taken + at) for at, place in enumerate(places))
        prompts.append(Prompt(Part(), Part(tuple(ids.tolist()), numbered)))
        taken += len(shown)
    longest = max(map(len, rows))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    held = torch.tensor([[int(at >= longest - len(row)) for at in range(longest)] for row in rows])
    options: Any = {"max_new_tokens": 8, "do_sample": False}
    new = again.generate(input_ids=padded, attention_mask=held, pixel_values=pixels, **options)[
        :, longest:
    ]
    stops = words.stop_ids
    ours = generate(vlm, prompts, features, max_new_tokens=8, stop_ids=stops, batch_size=2)
    assert cut(new.tolist(), stops) == ours
    assert len({tuple(one) for one in ours}) == 3
    options |= {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    twice = again.generate(input_ids=padded, attention_mask=held, pixel_values=pixels, **options)
    assert cut(twice[:, longest:].tolist(), stops) == [one for one in ours for _ in range(2)]


# -------------------------------------------------------------------------------- pictures


def as_file(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("resize", ["letterbox", "square", "crop"])
def test_the_processor_makes_midstreams_pixels_bit_for_bit(tmp_path: Path, resize: str) -> None:
    from midstream.exchange.modeling.processing_midstream import MidstreamImageProcessor

    words = codec()
    config = changed(OWN["the decoder is OpenLM's"], encoder=changed(SIGLIP, resize=resize))
    written(tmp_path / "out", config, words)
    processor = MidstreamImageProcessor.from_pretrained(tmp_path / "out")
    transform = ImageTransform(size=24, resize=resize, mean=SIGLIP.pixel_mean)  # type: ignore[arg-type]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [
        *[as_file(Image.fromarray(picture(*size))) for size in SIZES],
        as_file(Image.fromarray(picture(30, 41)), exif=exif),
        as_file(Image.fromarray(np.dstack([picture(30, 41), picture(30, 41)[..., 0]]))),
        as_file(Image.fromarray(picture(30, 41)[..., 0].astype(np.uint16) * 250)),
    ]
    for data in files:
        found = processor.pixels(Image.open(io.BytesIO(data)))
        np.testing.assert_array_equal(found, decode_pixels(data, "here", transform))


def forms(path: Path, url: str) -> dict[str, Any]:
    """One picture in every form that stock processors take."""
    data = path.read_bytes()
    held = np.asarray(Image.open(path))
    written = base64.b64encode(data).decode()
    return {
        "path": str(path),
        "Path": path,
        "URL": url,
        "base64": written,
        "data URI": f"data:image/png;base64,{written}",
        "Pillow": Image.open(path),
        "channels last": held,
        "channels first": held.transpose(2, 0, 1),
        "tensor": torch.from_numpy(held.transpose(2, 0, 1).copy()),
        "fractions": torch.from_numpy(held.copy()).float() / 255,
    }


def test_the_image_processor_takes_what_stock_ones_take(tmp_path: Path) -> None:
    from midstream.exchange.modeling.processing_midstream import MidstreamImageProcessor

    path = tmp_path / "clear.png"
    Image.fromarray(np.dstack([picture(30, 41), picture(30, 41)[..., 0]])).save(path)
    processor = MidstreamImageProcessor(image_size=24, image_mean=SIGLIP.pixel_mean)
    expected = decode_pixels(path.read_bytes(), "here", SIGLIP.transform)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(path.read_bytes())) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        given = forms(path, f"http://127.0.0.1:{server.server_port}/clear.png")
        for name, one in given.items():
            found = processor(one, return_tensors="np")["pixel_values"]
            np.testing.assert_array_equal(found, expected[None], err_msg=name)
        server.shutdown()
    array = given["channels last"]
    for batch in ([[array], [str(path), array.copy()]], [array] * 3, np.stack([array] * 3)):
        found = processor(batch, return_tensors="pt")["pixel_values"]
        assert found.shape == (3, 3, 24, 24)
        assert np.abs(found.numpy() - expected).max() == 0
    grey = picture(30, 41)[..., 0]
    by_row = processor([grey, grey[..., None], grey.astype(np.uint16) << 8])["pixel_values"]
    np.testing.assert_array_equal(by_row[0], by_row[1])
    np.testing.assert_array_equal(by_row[0], by_row[2])
    for wrong, told in (("nowhere.png", "'nowhere.png' is no file"), (7, "not <class 'int'>")):
        with pytest.raises(ValueError, match=told):
            processor(wrong)
    with pytest.raises(ValueError, match="are no bytes"):
        processor(np.full((4, 5, 3), 300))


def handler(data: bytes) -> type[BaseHTTPRequestHandler]:
    class One(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return One


SIZES = [(24, 24), (24, 31), (31, 24), (60, 90), (91, 60), (7, 200), (5, 5), (100, 100)]

# Pixels of pictures; logits behind Midstream's pixels; replies to the pictures, all at once.
LOOK = """
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
found = {}
for folder, trusted in request["folders"].items():
    trust = {"trust_remote_code": True} if trusted else {}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
    pictures = [Image.open(path) for path in request["pictures"]]

    def asked(question, sees):
        content = [{"type": "image"}] * sees + [{"type": "text", "text": question}]
        return [{"role": "user", "content": content}]

    prompts = [processor.apply_chat_template(asked(one, 1)) for one in request["questions"]]
    inputs = processor(images=pictures, text=prompts, return_tensors="pt", padding=True)
    given = torch.tensor(request["pixels"])
    with torch.no_grad():
        first = processor(images=pictures[0], text=prompts[0], return_tensors="pt")
        first["pixel_values"] = given[:1]
        logits = model(**first).logits[0]
        start = inputs["input_ids"].shape[1]
        new = model.generate(**inputs, max_new_tokens=10)[:, start:]
        inputs["pixel_values"] = given
        exact = model.generate(**inputs, max_new_tokens=10)[:, start:]
        alone = processor(text=processor.apply_chat_template(asked(request["questions"][0], 0)),
                          return_tensors="pt")
        blind = model.generate(**alone, max_new_tokens=10)[:, alone["input_ids"].shape[1]:]
    whole = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "path": request["pictures"][0]},
                                      {"type": "text", "text": request["questions"][0]}]}],
        tokenize=True, return_dict=True, return_tensors="pt")
    pixels = np.concatenate([
        np.asarray(processor(images=one, text=prompts[0], return_tensors="pt")["pixel_values"])
        for one in pictures])
    found[folder] = {
        "class": type(model).__name__, "logits": logits.tolist(), "pixels": pixels.tolist(),
        "ids": first["input_ids"][0].tolist(), "whole": whole["input_ids"][0].tolist(),
        "new": new.tolist(), "exact": exact.tolist(), "blind": blind.tolist(),
    }
print(json.dumps(found))
"""


@torch.no_grad()
def expected_logits(vlm: VLM, features: Tensor, head: list[int], ids: list[int]) -> Tensor:
    row = Example(np.array(head + ids), np.zeros(len(head + ids)), pictures=(len(head),))
    return vlm.decoder.output(vlm(batch_of(row, vlm.config.image_tokens), features))[0]


def looked(tmp_path: Path, configs: dict[str, VLMConfig]) -> dict[str, Any]:
    """What a fresh Python makes of these models, and checks of what all of them share."""
    words, folders, models = codec(adds_start=True), {}, {}
    paths = []
    for number, size in enumerate(SIZES):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(picture(*size)).save(paths[-1])
    questions = [("What colour is the ball?", "How many?", "Left?")[one % 3] for one in range(8)]
    for name, config in configs.items():
        *models[name], report = written(tmp_path / name, config, words)
        folders[str(tmp_path / name)] = report.own_code
    transform = SIGLIP.transform
    pixels = np.stack([decode_pixels(path.read_bytes(), "here", transform) for path in paths])
    request = {
        "folders": folders,
        "pictures": [str(path) for path in paths],
        "questions": questions,
        "pixels": pixels.tolist(),
    }
    answers = run_fresh(LOOK, request, tmp_path)
    stops = words.stop_ids
    prompts = [question_ids(words, one, has_image=True) for one in questions]
    for name, (vlm, encoder) in models.items():
        found = answers[str(tmp_path / name)]
        features = look_through(vlm, encoder)(torch.from_numpy(pixels))
        patches = vlm.config.image_tokens
        assert found["ids"] == found["whole"]
        head = words.begin_ids
        assert found["ids"][: len(head)] == head
        assert found["ids"][len(head) + patches :] == prompts[0]
        assert len(set(found["ids"][len(head) : len(head) + patches])) == 1
        rows = vlm.config.decoder.vocab_size
        logits = torch.tensor(found["logits"])[:, :rows]
        expected = expected_logits(vlm, features[:1], head, prompts[0])
        assert (logits - expected).abs().max() <= 1e-5
        options: Any = {"max_new_tokens": 10, "stop_ids": stops, "batch_size": 4}
        shown = [answerers.about(one, at, words.begin_of_text) for at, one in enumerate(prompts)]
        made_ = generate(vlm, shown, features, **options)
        assert cut(found["exact"], stops) == made_
        assert len({tuple(row) for row in made_}) > 1
        blind = question_ids(words, questions[0], has_image=False)
        told = generate(vlm, [blind], None, **options)
        assert cut(found["blind"], stops) == told
        found["difference"] = np.abs(np.array(found["pixels"]) - pixels).max(axis=(1, 2, 3))
        found["expected"] = made_
    return {name: answers[str(tmp_path / name)] for name in configs}


def cut(rows: list[list[int]], stops: frozenset[int]) -> list[list[int]]:
    return [row[: next((i for i, one in enumerate(row) if one in stops), None)] for row in rows]


@pytest.mark.slow
def test_own_modelling_files_answer_as_midstream_does_in_a_fresh_python(tmp_path: Path) -> None:
    configs = {
        "norow": changed(OWN["decoder is OpenLM's"], attention="prefix"),
        "fused": changed(OWN["one tower but fused"], owns_encoder=True),
        "gated": OWN["is OpenLM's"],
    }
    for name, found in looked(tmp_path, configs).items():
        assert found["class"] == "MidstreamForConditionalGeneration", name
        assert found["difference"].max() == 0
        assert found["new"] == found["exact"]


@pytest.mark.slow
def test_stock_llava_folders_answer_as_midstream_does_in_a_fresh_python(tmp_path: Path) -> None:
    configs = {
        name.replace(" ", "_"): changed(STOCK[name], owns_encoder=True)
        for name in ("no spare row", "dinov2, gpt_neox")
    }
    for name, found in looked(tmp_path, configs).items():
        assert found["class"] == "LlavaForConditionalGeneration", name
        if "dinov2" not in name:
            # A picture of the encoder's size keeps its pixels.
            assert found["difference"][0] <= 1e-6
            # Sides that differ by an even number, or not at all: a few of 255 levels.
            assert found["difference"][[3, 7]].max() <= 6 / 127.5


# The stock pipeline, one by one and two at a time; a saved processor read again.
PIPE = """
import transformers
from transformers import AutoProcessor, pipeline
folder = request["folder"]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")

def chat(question, **part):
    content = [{"type": "image", **part}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]

def asked(processor, conversation):
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt")
    return {name: value.tolist() for name, value in inputs.items()}

one, other = request["pictures"]
chats = [chat("What colour?", image=one), chat("how many balls on the left?", url=other)]
found = {}
for size in (1, 2):
    answers = pipe(text=chats, max_new_tokens=6, return_full_text=False, batch_size=size)
    found[str(size)] = [answer[0]["generated_text"] for answer in answers]
held = asked(pipe.processor, chats)
pipe.processor.save_pretrained("again")
again = AutoProcessor.from_pretrained("again", trust_remote_code=True)
found["same"] = asked(again, chats) == held
found["pictures"] = len(held["pixel_values"])
found["names"] = sorted(held)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_stock_pipeline_answers_in_batches_and_the_processor_is_saved(tmp_path: Path) -> None:
    written(tmp_path / "out", OWN["the decoder is OpenLM's"], codec())
    paths = []
    for number in range(2):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(picture(30, 41) // (number + 1)).save(paths[-1])
    request = {"folder": str(tmp_path / "out"), "pictures": paths}
    found = run_fresh(PIPE, request, tmp_path)
    assert found["1"] == found["2"]
    assert found["same"]
    assert found["pictures"] == 2
    assert found["names"] == ["attention_mask", "input_ids", "pixel_values"]
