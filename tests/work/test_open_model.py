"""Models out of a store, with the encoder and the scores that are theirs; imported ones' tokens."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import tiny
from midstream.config import DecoderConfig
from midstream.core.storage import CorruptError, write_bytes, write_json
from midstream.data.examples import TextCodec
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.work.evaluate_stage import check_vocabulary
from midstream.work.open_model import evaluations, find_model, open_model

CPU = torch.device("cpu")


@pytest.fixture
def store(tiny_ledger: Ledger, tmp_path: Path) -> Ledger:
    return tiny.store_with(tiny_ledger, tmp_path / "store", tiny.DATA, tiny.TEXT)


def test_a_milestone_is_another_model_than_the_end(store: Ledger) -> None:
    folder = store.folder(tiny.TEXT)
    part, whole = open_model(folder / "milestones" / "40", CPU), open_model(folder, CPU)
    assert (part.completion, whole.completion) == (0.4, 1.0)
    assert part.name == f"{tiny.TEXT.name} at 40 %"
    assert part.encoder is None
    mine, theirs = part.vlm.decoder.output.weight, whole.vlm.decoder.output.weight
    assert not torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="has no encoder; it cannot see pictures"):
        part.encode(torch.zeros(1, 3, 24, 24))


def test_only_finished_evaluations_of_this_very_model_count(store: Ledger) -> None:
    opened = open_model(store.folder(tiny.TEXT), CPU)
    assert evaluations(opened) == []
    asked = tiny.EVALUATION.model_copy(update={"visual_tasks": ()})
    results = [Evaluate(of=tiny.TEXT, completion=part, evaluation=asked) for part in (0.4, 1.0)]
    for stage in results:
        write_json(store.folder(stage) / "stage.json", stage.model_dump(mode="json"))
    write_json(store.store / "evaluate-of-another-version" / "stage.json", {"kind": "evaluate"})
    assert evaluations(opened) == []
    for folder in store.store.glob("evaluate-*"):
        write_bytes(folder / "SUCCESS", b"")
    assert evaluations(opened) == [results[1]]
    assert evaluations(open_model(store.folder(tiny.TEXT) / "milestones" / "40", CPU)) == [
        results[0]
    ]


def test_what_is_no_model_is_refused_by_name(store: Ledger, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no stage of a store"):
        find_model(tmp_path)
    (tmp_path / "import.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"is an imported folder, .* own_model\.fine_tuning"
    ):
        find_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"but a store; give .* such as .*/pretrain-"):
        find_model(store.store)
    with pytest.raises(FileNotFoundError, match=f"a part of one; give .*/{tiny.TEXT.name}$"):
        find_model(store.folder(tiny.TEXT) / "milestones")
    write_json(tmp_path / "model" / "config.json", {})
    with pytest.raises(FileNotFoundError, match="but a model of transformers: midstream eval"):
        find_model(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no language model"):
        find_model(store.folder(tiny.WORLD))
    with pytest.raises(ValueError, match="kept no weights at 33 %; it has 20 %, 40 %"):
        open_model(store.folder(tiny.TEXT) / "milestones" / "33", CPU)
    weights = store.folder(tiny.TEXT) / "milestones" / "40" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match="differs from its manifest"):
        open_model(weights.parent, CPU)


DECODER = DecoderConfig(hidden_size=32, num_layers=2, num_heads=2, vocab_size=300)


def codec(*words: str) -> TextCodec:
    """A byte-level tokenizer with the rule that GPT-2's has: it trims, and adds no token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({word: i for i, word in enumerate([*letters, *words])}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.post_processor = processors.ByteLevel(trim_offsets=False)
    return TextCodec(found)


@pytest.mark.parametrize("rule", ["a", None])
def test_what_begins_a_text_is_no_other_tokenizer(tmp_path: Path, rule: str | None) -> None:
    codec().beginning_with(rule).tokenizer.save(str(tmp_path / "tokenizer.json"))
    for begin in ("a", "<|endoftext|>", "", None):
        check_vocabulary(codec().beginning_with(begin), DECODER, tmp_path)


def test_other_tokens_and_too_many_of_them_are_refused(tmp_path: Path) -> None:
    codec("ab").tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"another tokenizer than .*tokenizer\.json"):
        check_vocabulary(codec("cd"), DECODER, tmp_path)
    small = DECODER.model_copy(update={"vocab_size": 200})
    with pytest.raises(ValueError, match=r"ids up to 258, .* has 200 rows"):
        check_vocabulary(codec("ab"), small, tmp_path)
