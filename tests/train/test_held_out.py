"""Held-out losses: a plain forward pass's, however a stage is run, and without influence on it."""

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers

import tiny
from midstream.config import ContinuedCosine, Epochs, Mixture, Share
from midstream.core.batch import IGNORE, stack_rows
from midstream.data.examples import Example, TextCodec
from midstream.data.images import LiveImages, encode_fixed
from midstream.data.rows import build_row
from midstream.data.source_writer import Image, ShardWriter, finish_source
from midstream.data.sources import Pictures, Source
from midstream.model.vlm import VLM
from midstream.model.weights import load_weights
from midstream.study.results import TrainingResult
from midstream.study.stages import Continue, ContinueFrom, Finetune, Pretrain
from midstream.study.store import Ledger, Stopped
from midstream.train import checkpoint, held_out, loop, metrics
from midstream.train.held_out import OtherImages, bytes_of_tokens, plan_held_out
from midstream.work.open_model import open_encoder, open_sources, open_tokenizer
from ranked import run_ranks

DATA = tiny.DATA.model_copy(
    update={"world": tiny.DATA.world.model_copy(update={"validation_fraction": 0.12})}
)
PREPARED = (*DATA.laid_out, DATA.vocabulary, *map(DATA.source, ("web", "pictures", "talks")))
ENCODER_STAGE = tiny.encoder_of(DATA, batch_images=8)
TEXT = tiny.text_run(total_tokens=6_000).model_copy(update={"data": DATA})
SEEN = Continue(
    data=DATA,
    encoder=ENCODER_STAGE,
    decoder=tiny.DECODER,
    start=ContinueFrom(stage=TEXT, completion=0.4),
    training=tiny.training(
        budget=tiny.mixture(4_000, pictures=0.5, web=0.5),
        schedule=ContinuedCosine(end_rate=tiny.END_RATE),
    ),
)
CHAT = Finetune(
    start=SEEN,
    training=tiny.training(
        budget=Epochs(sources=("talks",), epochs=1), schedule=tiny.warm(peak_rate=1e-3)
    ),
)
STAGES: tuple[Pretrain | Continue | Finetune, ...] = (TEXT, SEEN, CHAT)
FIELDS = {"loss", "bits_per_byte", "loss_other_picture", "num_targets", "num_examples"}


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A line whose sources hold something out."""
    mine = Ledger(tmp_path_factory.mktemp("held-out"))
    tiny.run_missing(mine, CHAT)
    return mine


def copied(ledger: Ledger, folder: Path) -> Ledger:
    """A store in which all that comes before SEEN is done."""
    return tiny.store_with(ledger, folder, *PREPARED, ENCODER_STAGE, TEXT)


def results_of(ledger: Ledger, stage: Any) -> dict[str, Any]:
    found: dict[str, Any] = ledger.results(stage)["held_out"]
    return found


def test_each_stage_tells_the_held_out_loss_of_its_sources(ledger: Ledger) -> None:
    expected = {"pretrain": {"web"}, "continue": {"web", "pictures"}, "finetune": {"talks"}}
    for stage in STAGES:
        found = results_of(ledger, stage)
        assert found.keys() == expected[stage.kind]
        for name, one in found.items():
            assert one.keys() == FIELDS
            source = ledger.results(DATA.source(name))["validation"]
            assert one["num_examples"] == source["examples"] > 0
            assert (one["loss_other_picture"] is None) == (name == "web")
        typed = ledger.result(stage, TrainingResult).held_out
        assert {name: one.loss for name, one in typed.items()} == {
            name: one["loss"] for name, one in found.items()
        }
        assert ledger.metrics(stage)[-1]["held_out"] == found


def test_a_text_run_is_evaluated_at_its_milestones_too(ledger: Ledger) -> None:
    lines = [line for line in ledger.metrics(TEXT) if "held_out" in line]
    kept = [
        checkpoint.read_progress(checkpoint.milestone(ledger.folder(TEXT), share)).step
        for share in TEXT.milestones
    ]
    assert [line["step"] for line in lines] == sorted(set(kept))
    losses = [line["held_out"]["web"]["loss"] for line in lines]
    assert losses[-1] < losses[0] < math.log(tiny.VOCAB_SIZE) + 1


def plain_loss(ledger: Ledger, stage: Any, source: Source, *, other: bool) -> tuple[float, int]:
    """Mean loss by one forward pass of the whole logits over each row, and the bytes learnt."""
    vlm = VLM(stage.model).eval()
    folder = ledger.folder(stage)
    load_weights(vlm, folder / ("milestones/100" if stage is TEXT else "weights"))
    config = stage.model.encoder
    patches = config.num_patches if config else 0
    training = stage.training
    ((plan, mine),) = (
        planned
        for planned in plan_held_out({source.name: source}, only(training, source.name), patches)
    )
    sums, number, texts = 0.0, 0, 0
    codec = open_tokenizer(DATA, ledger)
    examples = np.concatenate([np.zeros(0, np.int64), *plan.examples_of(0)])
    for index in range(len(plan)):
        row = build_row(plan, mine, index, patches)
        images = torch.zeros((0, 0, 0))
        if config:
            look: Any = LiveImages(mine, plan.names, config)
            if other:
                after = zip(examples.tolist(), np.roll(examples, -1).tolist(), strict=True)
                look = OtherImages(look, {(one, 0): (other, 0) for one, other in after})
            images = look(row.images)
        batch = stack_rows([row], images)
        features = None
        if len(batch.images):
            encoder = open_encoder(ledger, stage.encoder_stage)
            features = encode_fixed(encoder, batch.images, config)
        with torch.no_grad():
            logits = vlm.decoder.output(vlm(batch, features))
        targets = batch.targets.flatten()
        sums += float(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum"
            )
        )
        kept = targets[targets != IGNORE].tolist()
        number, texts = number + len(kept), texts + len(codec.decode(kept).encode())
    return sums / number, texts


def only(training: Any, name: str) -> Any:
    """The training with one of its sources."""
    budget = training.budget
    if not isinstance(budget, Epochs):
        budget = tiny.mixture(1_000, **{name: 1.0})
    return training.model_copy(update={"budget": budget})


@pytest.mark.parametrize(
    ("stage", "name"), [(TEXT, "web"), (SEEN, "web"), (SEEN, "pictures"), (CHAT, "talks")]
)
def test_the_loss_is_that_of_a_plain_forward_pass(ledger: Ledger, stage: Any, name: str) -> None:
    source = open_sources(DATA, [name], ledger)[name]
    found = results_of(ledger, stage)[name]
    loss, num_bytes = plain_loss(ledger, stage, source, other=False)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    bits = loss * found["num_targets"] / math.log(2) / num_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    if found["loss_other_picture"] is not None:
        other, _ = plain_loss(ledger, stage, source, other=True)
        assert found["loss_other_picture"] == pytest.approx(other, rel=1e-5)
        assert other != pytest.approx(loss, abs=1e-7)


def test_a_model_that_ignores_pictures_loses_nothing_by_another(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(self: VLM, features: Any, like: Any) -> torch.Tensor:
        found = project(self, features, like)
        # Its training checks that the projector learns.
        return found if self.training else found * 0

    project = VLM.project
    monkeypatch.setattr(VLM, "project", blind)
    mine = copied(ledger, tmp_path)
    tiny.runner(mine).run(SEEN)
    found = results_of(mine, SEEN)["pictures"]
    assert found["loss_other_picture"] == found["loss"]


@pytest.mark.parametrize("stage", [TEXT, SEEN], ids=lambda stage: stage.kind)
def test_the_weights_are_those_of_a_stage_that_is_not_evaluated(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Any
) -> None:
    monkeypatch.setattr("midstream.work.run_stage.plan_held_out", lambda *given: [])
    mine = tiny.store_with(
        ledger, tmp_path, *PREPARED, ENCODER_STAGE, *([TEXT] if stage is SEEN else [])
    )
    before = torch.random.get_rng_state()
    tiny.runner(mine).run(stage)
    expected, found = tiny.bits(mine, stage), tiny.bits(ledger, stage)
    assert results_of(mine, stage) == {} != found["results"].pop("held_out")
    expected["results"].pop("held_out")
    for line in found["metrics"]:
        line.pop("held_out", None)
    assert found == expected
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("after", [1, 3, -1])
def test_a_stopped_stage_gives_the_same_numbers(ledger: Ledger, tmp_path: Path, after: int) -> None:
    mine = tiny.store_with(ledger, tmp_path, *PREPARED)
    left = after if after > 0 else ledger.results(TEXT)["steps"]

    def should_stop() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    with pytest.raises(Stopped):
        tiny.runner(mine, should_stop=should_stop).run(TEXT)
    tiny.runner(mine).run(TEXT)
    assert tiny.bits(mine, TEXT) == tiny.bits(ledger, TEXT)


def test_a_step_takes_no_time_of_the_evaluation(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    measure = loop.evaluate

    def slow(*given: Any, **options: Any) -> Any:
        clock[0] += 1000.0
        return measure(*given, **options)

    monkeypatch.setattr(loop, "evaluate", slow)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    mine = tiny.store_with(ledger, tmp_path, *PREPARED)
    tiny.runner(mine).run(TEXT)
    assert clock[0] >= 1000.0 * len(TEXT.milestones)
    assert {line["seconds"] for line in mine.metrics(TEXT)} == {0.0}


OWN_ENCODER = SEEN.model_copy(
    update={"training": SEEN.training.model_copy(update={"encoder_rate_factor": 0.1})}
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(2, TEXT), (2, OWN_ENCODER), pytest.param(4, SEEN, marks=pytest.mark.faults)],
    ids=["text", "own-encoder", "four"],
)
def test_ranks_measure_what_one_process_does(
    ledger: Ledger, tmp_path: Path, ranks: int, stage: Any
) -> None:
    tiny.run_missing(ledger, stage)
    mine = tiny.store_with(ledger, tmp_path, *PREPARED, ENCODER_STAGE)
    if stage is not TEXT:
        tiny.store_with(ledger, tmp_path, TEXT)
    ended = run_ranks(mine, stage, ranks, micro_batch_rows=1)
    assert ended.returncode == 0, ended.stderr
    for line, expected in zip(mine.metrics(stage), ledger.metrics(stage), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        found, known = line.get("held_out", {}), expected.get("held_out", {})
        assert found.keys() == known.keys()
        for name, one in known.items():
            for key in FIELDS:
                close = one[key] if one[key] is None else pytest.approx(one[key], rel=1e-6)
                assert found[name][key] == close, (name, key)
    assert results_of(mine, stage) == mine.metrics(stage)[-1]["held_out"]


def test_stored_features_measure_what_live_ones_do(ledger: Ledger, tmp_path: Path) -> None:
    assert not (ledger.store / "features").exists()
    mine = copied(ledger, tmp_path)
    machine = tiny.MACHINE.model_copy(update={"features": "stored"})
    tiny.runner(mine, machine=machine).run(SEEN)
    assert tiny.bits(mine, SEEN) == tiny.bits(ledger, SEEN)
    assert (mine.store / "features").exists()


def test_rows_travel_to_a_loaders_workers(ledger: Ledger) -> None:
    machine = tiny.MACHINE.model_copy(update={"features": "live"})
    job = tiny.runner(ledger, machine=machine).job(SEEN, ledger.folder(SEEN))
    others = job.held_out["pictures"].others
    assert job.held_out["web"].others is None
    for rows in (job.held_out["pictures"].rows, others):
        for (row, images), (again, same) in zip(
            rows, pickle.loads(pickle.dumps(rows)), strict=False
        ):
            assert np.array_equal(row.images, again.images)
            assert torch.equal(images, same)


def test_examples_are_the_same_for_every_encoder_and_end_at_the_limit(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_out, "HELD_OUT_TOKENS", 100)
    sources = open_sources(DATA, ["web", "pictures"], ledger)
    taken = []
    for patches in (0, 4, 100):
        plans = plan_held_out(sources, SEEN.training, patches)
        assert {plan.names for plan, _ in plans} == {("web",), ("pictures",)}
        for plan, mine in plans:
            rows = [build_row(plan, mine, index, patches) for index in range(len(plan))]
            tokens = sum(row.counts.text + row.counts.caption for row in rows)
            assert 80 <= tokens <= 120
            assert all((row.segment_ids >= 0).any() for row in rows)
        ((plan, mine),) = (one for one in plans if one[0].names == ("pictures",))
        taken.append(np.concatenate(list(plan.examples_of(0))).tolist())
    assert taken[0] == taken[1] == taken[2]
    assert 1 < len(taken[0]) < len(mine["pictures"])


def test_a_picture_stands_for_another_only_where_its_bytes_differ(ledger: Ledger) -> None:
    class Few(Source):
        def pictures_of(self, examples: np.ndarray) -> Pictures:
            hashes = np.zeros((len(examples), 16), np.uint8)
            hashes += (examples % pictures)[:, None].astype(np.uint8)
            return Pictures(np.stack([examples, np.zeros_like(examples)], axis=1), hashes)

    sources = open_sources(DATA, ["pictures"], ledger)
    ((plan, mine),) = plan_held_out(sources, only(SEEN.training, "pictures"), 4)
    for pictures in (1, 2, 5):
        source = Few(
            **{
                name: getattr(mine["pictures"], name)
                for name in mine["pictures"].__dataclass_fields__
            }
        )
        others = held_out._others(plan, source)
        assert len(others) == (0 if pictures == 1 else len(source))
        assert all(one % pictures != other % pictures for (one, _), (other, _) in others.items())


TEXTS = ("a plain text\nwith lines", "naïve café 漢字 🦉", " spaces  and tabs\t")


def test_bytes_of_tokens_add_up_to_those_of_the_text(ledger: Ledger) -> None:
    codec = open_tokenizer(DATA, ledger)
    found = bytes_of_tokens(codec)
    for text in TEXTS:
        assert found[codec.encode(text)].sum() == len(text.encode())
    assert found[[codec.end_of_text, codec.separator]].tolist() == [0, 0]


def test_bytes_of_a_tokenizer_that_falls_back_to_bytes() -> None:
    """As Llama 2's: spaces are marks, and what is not in the vocabulary is bytes."""
    characters = sorted(set("".join(TEXTS).replace(" ", "▁")) - set("漢字🦉"))
    vocab = {f"<0x{number:02X}>": number for number in range(256)}
    vocab |= {token: 256 + number for number, token in enumerate([*characters, "▁a", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    codec = TextCodec(tokenizer)
    found = bytes_of_tokens(codec)
    for text in TEXTS:
        assert found[codec.encode(text)].sum() == len(text.encode())


def test_where_captions_are_drawn_the_first_synthetic_one_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    writer = ShardWriter(
        folder / "shards" / "000000",
        kind="caption",
        dtype="<u4",
        input_name="pictures.tar",
        validation_fraction=0.5,
    )
    for number in range(40):
        own = np.arange(9)
        made = [Example(np.arange(size), np.ones(size, np.uint8)) for size in (5, 7, 3)]
        name = f"sample {number}"
        writer.add(
            own,
            np.ones(9, np.uint8),
            name=name,
            content=name.encode(),
            image=Image("pictures.tar", number, 1),
            synthetic=made[: 1 + number % 3],
        )
    writer.close()
    finish_source(folder, tokenizer_digest="made", vocab_size=9, root=str(tmp_path))
    source = Source("pictures", folder, tmp_path)
    held = replace(source, split="validation")
    assert 0 < len(held) < 40
    for caption, number, size in (("original", 0, 9), ("synthetic", 1, 5), ("random", 1, 5)):
        share = Share(source="pictures", share=1.0, caption=caption)
        budget = Mixture(total_tokens=100, shares=(share,))
        training = SEEN.training.model_copy(update={"budget": budget})
        ((plan, _),) = plan_held_out({"pictures": source}, training, 4)
        placed = [one for index in range(len(plan)) for one in plan.layout.row(index)]
        assert sorted(one.example for one in placed) == list(range(len(held)))
        assert {(one.caption, one.length) for one in placed} == {(number, 4 + size)}
