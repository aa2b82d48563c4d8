import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import OPENLM, SIGLIP, codec, made, run_fresh, stock
from torch import Tensor

from answerers import run_text_tasks
from midstream.config import GatedBlocks, PatchProjection, ProjectorConfig, VLMConfig
from midstream.core.storage import read_json, write_json
from midstream.data.examples import TextCodec, conversation_example, question_ids
from midstream.eval import text
from midstream.eval.predict import ModelAnswerer
from midstream.exchange import export
from midstream.exchange.export import refuse, write_folder
from midstream.model.generate import generate
from midstream.model.vlm import VLM

QUESTIONS = ("What colour is the ball?", "How many?", "Is the big round ball on the left red?")
PAIRS = [("The ball is", " red"), ("The ball is", " on the left"), ("", "How many?"), ("In: ", "2")]


@torch.no_grad()
def logits_of(vlm: VLM, ids: list[int]) -> Tensor:
    rows = torch.tensor([ids])
    hidden = vlm.decoder(vlm.decoder.embed(rows), torch.arange(len(ids))[None], None)
    return vlm.decoder.output(hidden)[0]


def generated(vlm: VLM, words: TextCodec, prompts: list[list[int]]) -> list[list[int]]:
    stops = frozenset({words.end_of_text})
    return generate(vlm, prompts, None, max_new_tokens=12, stop_ids=stops, batch_size=2)


def written(folder: Path, config: VLMConfig, words: TextCodec) -> tuple[VLM, Any]:
    vlm, _ = made(config)
    folder.mkdir()
    return vlm, write_folder(vlm, words, None, folder)


# Logits of one text; tokens that follow several texts at once, padded on the left.
ASK = """
from transformers import AutoModelForCausalLM, AutoTokenizer
trust = {"trust_remote_code": True} if request["trust"] else {}
tokenizer = AutoTokenizer.from_pretrained(request["folder"], **trust)
model = AutoModelForCausalLM.from_pretrained(request["folder"], **trust)
ids = [tokenizer(one)["input_ids"] for one in request["texts"]]
with torch.no_grad():
    logits = model(torch.tensor(ids[:1])).logits[0]
    tables = model(torch.tensor(ids[:1]), labels=torch.tensor(ids[:1]))
batch = tokenizer(request["texts"], return_tensors="pt", padding=True)
new = model.generate(**batch, max_new_tokens=12)[:, batch["input_ids"].shape[1]:].tolist()
stop = tokenizer.eos_token_id
new = [row[:row.index(stop)] if stop in row else row for row in new]
print(json.dumps([type(model).__name__, ids, logits.tolist(), tables.loss.item(), new]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["openlm", pytest.param("llama", marks=pytest.mark.faults)])
def test_a_fresh_python_without_midstream_gives_its_logits_and_tokens(
    tmp_path: Path, kind: str
) -> None:
    words = codec(adds_start=True)
    config = VLMConfig(decoder=OPENLM if kind == "openlm" else stock())
    vlm, report = written(tmp_path / "out", config, words)
    request = {
        "folder": str(tmp_path / "out"),
        "texts": list(QUESTIONS),
        "trust": kind == "openlm",
    }
    name, ids, logits, loss, new = run_fresh(ASK, request, tmp_path)
    assert name == report.architecture
    assert report.own_code == (kind == "openlm")
    assert ids == [[words.begin_of_text, *words.encode(one)] for one in QUESTIONS]
    expected = logits_of(vlm, ids[0])
    assert (torch.tensor(logits) - expected).abs().max() <= 1e-5
    targets = torch.tensor(ids[0][1:])
    assert loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(expected[:-1], targets)), abs=1e-5
    )
    assert new == generated(vlm, words, ids)
    assert len({token for row in new for token in row}) > 3


HARNESS = """
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
model = HFLM(request["folder"], trust_remote_code=True, device="cpu", batch_size=2)
asked = [Instance("loglikelihood", {}, tuple(pair), 0) for pair in request["pairs"]]
scores = [[float(score), bool(best)] for score, best in model.loglikelihood(asked)]
rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in request["texts"]]
until = {"until": [" b", "\\n"], "max_gen_toks": 6, "do_sample": False}
goes_on = [Instance("generate_until", {}, (text, until), 0) for text in request["texts"]]
tasks = TaskManager(include_path=request["tasks"], include_defaults=False)
found = evaluate(lm=model, task_dict=tasks.load(["choices"]), bootstrap_iters=0)
print(json.dumps([
    scores,
    found["results"]["choices"]["acc,none"],
    model.loglikelihood_rolling(rolling),
    model.generate_until(goes_on),
]))
"""


@pytest.mark.slow
def test_the_stock_model_of_lm_evaluation_harness_gives_midstreams_likelihoods(
    tmp_path: Path,
) -> None:
    words = codec(adds_start=True)
    vlm, _ = written(tmp_path / "out", VLMConfig(decoder=OPENLM), words)
    answerer = ModelAnswerer(vlm, words, encode=None, encoder=None, max_new_tokens=4, batch_size=2)
    items = [
        {"query": query, "choices": [" red", " the big round ball", " left"], "gold": one % 3}
        for one, query in enumerate([*QUESTIONS, "The", "ball is", "on the", "how many", "is"])
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    # Midstream's own way to say a task of lm-evaluation-harness.
    task = text.own_task(items, "choices", 1 / 3)
    text._write_task(tasks, "choices", task)
    texts = [*QUESTIONS, "on the ball", "how many"]
    request = {"folder": str(tmp_path / "out"), "pairs": PAIRS, "tasks": str(tasks)}
    answered = run_fresh(HARNESS, {**request, "texts": texts}, tmp_path)
    found, accuracy, rolling, goes_on = answered
    assert answerer.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=1e-4)
    ours_on = answerer.generate_until([(text, [" b", "\n"], 6) for text in texts])
    assert ours_on == goes_on
    assert len(set(goes_on)) > 1
    expected = answerer.loglikelihood(PAIRS)
    assert [best for _, best in found] == [best for _, best in expected]
    for (score, _), (ours, _) in zip(found, expected, strict=True):
        assert score == pytest.approx(ours, abs=1e-4)
    ours = run_text_tasks(answerer, [task])["choices"].metrics["acc"]
    assert 0 < ours < 1
    assert accuracy == ours


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("gpt_neox", True), ("gpt_neox", False), ("qwen3", False)]
)
def test_a_decoder_of_transformers_becomes_a_folder_of_its_own_class_without_code(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    decoder = stock(kind, tie_word_embeddings=tied)
    _, report = written(tmp_path / "out", VLMConfig(decoder=decoder), codec())
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert report.largest_difference <= 1e-5
    assert report.num_parameters == decoder.num_parameters


@pytest.mark.parametrize(
    ("kind", "rope", "older"),
    [
        ("olmo2", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 5e3, "rotary_pct": 0.5},
        ),
        (
            "llama",
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_rotary_settings_stand_by_the_names_of_older_programs_too(
    kind: str, rope: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    decoder = stock(kind, rope_parameters=dict(rope))
    written(tmp_path / "out", VLMConfig(decoder=decoder), codec())
    held = read_json(tmp_path / "out" / "config.json")
    assert {name: held.get(name) for name in older} == older
    assert ("rope_scaling" in held) == ("rope_scaling" in older)
    expected = AutoConfig.from_pretrained(tmp_path / "out").to_dict()
    assert expected["rope_parameters"] == rope == held.pop("rope_parameters")
    # Alone they say the same.
    write_json(tmp_path / "out" / "config.json", held)
    assert AutoConfig.from_pretrained(tmp_path / "out").to_dict() == expected


@pytest.mark.parametrize("begins", [True, False])
def test_the_text_part_of_a_model_that_sees_stops_at_separators_and_refuses_pictures(
    tmp_path: Path, begins: bool
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    sees = PatchProjection(image_size=24, patch_size=12, hidden_size=16)
    words = codec(adds_start=begins)
    plain, seeing = tmp_path / "plain", tmp_path / "seeing"
    written(plain, VLMConfig(decoder=OPENLM), words)
    written(seeing, VLMConfig(decoder=OPENLM, encoder=sees, owns_encoder=True), words)
    assert GenerationConfig.from_pretrained(plain).eos_token_id == [words.end_of_text]
    assert set(GenerationConfig.from_pretrained(seeing).eos_token_id) == words.stop_ids
    assert not (plain / "chat_template.jinja").exists()
    tokenizer = AutoTokenizer.from_pretrained(seeing, trust_remote_code=True)
    turns = [("How many?", "2"), ("  And  now?", " none ")]
    messages = []
    for question, reply in turns:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": reply}]

    def ids(part: list[dict[str, Any]]) -> list[int]:
        return tokenizer.apply_chat_template(part, tokenize=True, return_dict=False)

    assert ids(messages[:1]) == question_ids(words, turns[0][0], has_image=False)
    expected = conversation_example(words, turns).input_ids.tolist()
    assert ids(messages) == expected
    with pytest.raises(Exception, match="images stand in a user"):
        ids([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}])
    with pytest.raises(Exception, match="no system turn"):
        ids([{"role": "system", "content": "Be brief."}, *messages])


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    vlm, _ = made(VLMConfig(decoder=OPENLM))
    out = tmp_path / "out"
    refuse(vlm, codec(), None, out)
    with torch.no_grad():
        vlm.decoder.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight holds numbers that are not fin"):
        refuse(vlm, codec(), None, out)
    gated = ProjectorConfig(num_layers=1, gated=GatedBlocks())
    seeing, _ = made(VLMConfig(decoder=OPENLM, encoder=SIGLIP, projector=gated))
    with pytest.raises(ValueError, match="gated blocks of this model change text, too"):
        refuse(seeing, codec(), None, out)
    small, _ = made(VLMConfig(decoder=OPENLM.model_copy(update={"vocab_size": 300})))
    with pytest.raises(ValueError, match="302 ids, the model 300 rows"):
        refuse(small, codec(), None, out)


def test_a_tokenizer_that_transformers_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    # Qwen's own cuts each digit off; here three of them are one token.
    words = codec(texts=("In 2049 there were 100 and 200 and 300 of them", "and 400 more of them"))
    config = VLMConfig(decoder=stock("qwen2"))
    with pytest.raises(ValueError, match=r"Qwen2Tokenizer, by which transformers reads.*qwen2 mo"):
        written(tmp_path / "out", config, words)
    written(tmp_path / "llama", VLMConfig(decoder=stock()), words)


def test_a_folder_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, _ = made(VLMConfig(decoder=OPENLM))
    write = export.write_text

    def spoilt(*given: Any, **options: Any) -> Any:
        model = write(*given, **options)
        with torch.no_grad():
            model.model.norm.weight *= 1.01
        return model

    monkeypatch.setattr(export, "write_text", spoilt)
    with pytest.raises(RuntimeError, match="gives logits that differ by"):
        write_folder(vlm, codec(), None, tmp_path)
