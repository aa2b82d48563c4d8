"""Image-text training in two stages, fine-tuning of a text model, a language model kept frozen."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from midstream.chat.session import describe
from midstream.config import ContinuedCosine, Training, WarmupCosine
from midstream.exchange.export import _history
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.report.line_rows import line_rows, parts_of
from midstream.study.stages import (
    Continue,
    ContinueFrom,
    Evaluate,
    Finetune,
    InitFrom,
    StartText,
    came_from,
)
from midstream.study.store import Ledger, Stopped
from midstream.study.studies import Figure, Line, Study
from midstream.train import checkpoint
from midstream.work.open_model import open_encoder, open_model
from midstream.work.profile_stage import ProfileRequest, profile
from midstream.work.protocol import Channel
from tiny import TEXT

# Down to a rate above the end of the stage behind it.
HIGH_END = WarmupCosine(peak_rate=tiny.RATE, end_rate=1e-3, warmup_fraction=0.1)
FROM_TEXT = ContinueFrom(stage=TEXT, completion=0.4)
ALIGNED = tiny.image_run(
    FROM_TEXT, total_tokens=4_000, schedule=HIGH_END, freeze_decoder=True, encoder_rate_factor=0.5
)


def stage_of(start: ContinueFrom | InitFrom, **changes: object) -> Continue:
    """As `tiny.image_run`, on what may come first or second."""
    made = tiny.image_run(FROM_TEXT, total_tokens=4_000, **changes)
    return Continue(**{**dict(made), "start": start})


SECOND = stage_of(InitFrom(stage=ALIGNED))
CHAT = Finetune(
    start=ALIGNED, training=tiny.CHAT.training.model_copy(update={"schedule": ContinuedCosine()})
)
DIRECT = Finetune(
    start=StartText(stage=TEXT, completion=0.4, encoder=tiny.ENCODER_STAGE),
    training=tiny.CHAT.training,
)


@pytest.fixture(scope="module")
def ledger(tiny_ledger: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """Each of the stages above, and evaluations of two."""
    folder = tmp_path_factory.mktemp("starts")
    mine = tiny.begun(tiny_ledger, folder)
    tiny.run_missing(mine, asked(SECOND), CHAT, asked(DIRECT))
    return mine


def asked(stage: Continue | Finetune) -> Evaluate:
    return Evaluate(of=stage, evaluation=tiny.EVALUATION)


def starting_digest(ledger: Ledger, stage: Continue | Finetune) -> str:
    """What stood for the weights before the first step."""
    first, *_ = (ledger.folder(stage) / "starts.jsonl").read_text().splitlines()
    return str(json.loads(first)["weights_digest"])


def test_a_stage_that_keeps_the_decoder_saves_it_bit_equal_beside_what_learnt(
    ledger: Ledger,
) -> None:
    parent = load_file(checkpoint.milestone(ledger.folder(TEXT), 0.4) / "model.safetensors")
    after = tiny.weights(ledger, ALIGNED)
    assert {name.split(".")[0] for name in after} == {"decoder", "projector", "encoder"}
    for name, value in parent.items():
        assert torch.equal(after[name], value), name
    encoder = open_encoder(ledger, tiny.ENCODER_STAGE).state_dict()
    assert any(not torch.equal(after[f"encoder.{name}"], encoder[name]) for name in encoder)


def test_a_frozen_decoder_has_no_moments_and_the_stage_resumes_without_them(
    ledger: Ledger, tmp_path: Path
) -> None:
    own = tiny.begun(ledger, tmp_path)
    with pytest.raises(Stopped):
        tiny.runner(own, should_stop=lambda: True).run(ALIGNED)
    (folder,) = checkpoint.by_age(own.folder(ALIGNED) / "checkpoints")
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.split(".")[1] for name in moments} == {"projector", "encoder"}
    tiny.runner(own).run(ALIGNED)
    assert tiny.bits(own, ALIGNED)["weights"] == tiny.bits(ledger, ALIGNED)["weights"]
    assert own.results(ALIGNED)["weights_digest"] == ledger.results(ALIGNED)["weights_digest"]


def test_the_start_says_how_many_parameters_are_frozen(ledger: Ledger) -> None:
    line = json.loads((ledger.folder(ALIGNED) / "starts.jsonl").read_text().splitlines()[0])
    table = line["parameters"]
    assert table["decoder"] == {"trained": 0, "frozen": tiny.DECODER.num_parameters}
    assert table["projector"]["frozen"] == table["encoder"]["frozen"] == 0


def test_a_frozen_decoder_that_is_shown_no_picture_is_refused(ledger: Ledger) -> None:
    stage = stage_of(FROM_TEXT, budget=tiny.mixture(2_000, web=1.0), freeze_decoder=True)
    with pytest.raises(ValueError, match="shows no picture, so it would learn nothing; web hold"):
        tiny.runner(ledger).run(stage)


def test_moments_cannot_be_carried_to_a_frozen_decoder() -> None:
    with pytest.raises(ValueError, match="decoder is frozen and has no moments"):
        tiny.image_run(
            ContinueFrom(stage=TEXT, completion=0.4, optimizer="carry"), freeze_decoder=True
        )


def test_a_text_run_with_a_frozen_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="a text run has nothing else to train"):
        tiny.text_run(freeze_decoder=True)


def test_a_stage_with_a_frozen_decoder_can_be_profiled(ledger: Ledger, tmp_path: Path) -> None:
    request = ProfileRequest(
        store=ledger.store, stage=ALIGNED, machine=tiny.MACHINE, steps=1, out=tmp_path
    )
    found = profile(request, Channel(None))
    assert found["model_flops_per_second"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameters"]["decoder"]["trained"] == 0


def test_a_second_stage_starts_from_all_weights_of_the_first_at_its_last_rate(
    ledger: Ledger,
) -> None:
    first = ledger.results(ALIGNED)
    assert starting_digest(ledger, SECOND) == first["weights_digest"]
    assert SECOND.model.owns_encoder
    assert first["last_rate"] == 1e-3
    assert ledger.metrics(SECOND)[0]["rate"] == first["last_rate"]
    assert ledger.results(SECOND)["last_rate"] == tiny.END_RATE
    before, after = tiny.weights(ledger, ALIGNED), tiny.weights(ledger, SECOND)
    assert before.keys() == after.keys()
    for name, value in before.items():
        # The encoder is the model's own since the first stage; this one keeps it.
        assert torch.equal(after[name], value) == name.startswith("encoder."), name


def test_a_second_stage_may_warm_up_again_and_hold_its_rate_back(ledger: Ledger) -> None:
    start = InitFrom(stage=ALIGNED, optimizer="warm")
    stage = stage_of(start, schedule=tiny.warm(warmup_fraction=0.0))
    job = tiny.runner(ledger).job(stage, ledger.folder(stage))
    assert job.start.moments == "warm"
    assert job.rate_at(0) == tiny.RATE  # a step is more than a hundredth of this stage
    assert job.start.parts == ("decoder", "projector", "encoder")


def test_fine_tuning_may_go_on_with_the_rate_of_the_stage_before(ledger: Ledger) -> None:
    assert ledger.metrics(CHAT)[0]["rate"] == ledger.results(ALIGNED)["last_rate"] == 1e-3
    assert starting_digest(ledger, CHAT) == ledger.results(ALIGNED)["weights_digest"]


def test_a_rate_that_cannot_go_on_is_refused_with_both_rates() -> None:
    message = r"the stage before ends, 3e-05, which is not above its own end rate 3e-05"
    with pytest.raises(ValueError, match=message):
        stage_of(InitFrom(stage=tiny.SEEN))
    with pytest.raises(ValueError, match=message):
        Finetune(start=tiny.SEEN, training=CHAT.training)


@pytest.mark.parametrize("part", ["decoder", "projector"])
def test_a_second_stage_must_have_the_firsts_model(part: str) -> None:
    change = {"decoder": {"num_layers": 3}, "projector": {"num_layers": 1}}[part]
    other = getattr(ALIGNED, part).model_copy(update=change)
    with pytest.raises(ValueError, match=rf"the {part} differs from that of {ALIGNED.name}"):
        Continue(**{**dict(stage_of(InitFrom(stage=ALIGNED))), part: other})


def test_a_text_model_is_fine_tuned_with_a_fresh_projector_and_a_frozen_encoder(
    ledger: Ledger,
) -> None:
    folder = checkpoint.milestone(ledger.folder(TEXT), 0.4)
    fresh = VLM(DIRECT.model)
    initialise(fresh, DIRECT.training.seed)
    assert fresh.projector is not None
    fresh.decoder.load_state_dict(
        {
            name.removeprefix("decoder."): value
            for name, value in load_file(folder / "model.safetensors").items()
        }
    )
    expected = checkpoint.digests(fresh, None)["model"]
    assert starting_digest(ledger, DIRECT) == expected
    assert {name.split(".")[0] for name in tiny.weights(ledger, DIRECT)} == {"decoder", "projector"}
    assert not DIRECT.model.owns_encoder
    assert DIRECT.encoder_stage == tiny.ENCODER_STAGE


def test_a_fine_tuning_of_a_text_model_may_train_its_encoder_and_go_on_with_its_rate(
    ledger: Ledger,
) -> None:
    training = Training(
        **{
            **dict(DIRECT.training),
            "schedule": ContinuedCosine(end_rate=tiny.END_RATE),
            "encoder_rate_factor": 0.5,
        }
    )
    start = StartText(stage=TEXT, completion=0.4, encoder=tiny.ENCODER_STAGE, optimizer="carry")
    stage = Finetune(start=start, training=training)
    assert stage.model.owns_encoder
    job = tiny.runner(ledger).job(stage, ledger.folder(stage))
    assert job.start.encoder is not None
    assert job.start.moments == "carry"
    assert (
        job.rate_at(0)
        == ledger.metrics(TEXT)[
            checkpoint.read_progress(checkpoint.milestone(ledger.folder(TEXT), 0.4)).step
        ]["rate"]
    )


def test_every_start_leads_back_to_the_text_run() -> None:
    assert came_from(SECOND) == (ALIGNED, 1.0)
    assert came_from(ALIGNED) == (TEXT, 0.4)
    assert came_from(DIRECT) == (TEXT, 0.4)
    assert came_from(TEXT) is None
    data = ("prepare_tokenizer", "prepare_source")
    kinds = [stage.kind for stage in DIRECT.parents]
    assert kinds == ["pretrain", *data, "train_encoder"]
    kinds = list(dict.fromkeys(stage.kind for stage in SECOND.parents))
    assert kinds == [*data, "train_encoder", "continue"]


def test_a_row_of_the_report_adds_both_image_text_stages_up(ledger: Ledger) -> None:
    results = {"two": asked(SECOND), "none": asked(DIRECT)}
    study = Study(
        name="s",
        question="?",
        lines=tuple(
            Line(name=name, axes={"way": name}, result=result) for name, result in results.items()
        ),
        figure=Figure(x="way", x_label="way"),
    )
    two, none = line_rows(study, ledger)
    seen = [ledger.results(stage)["tokens_seen"] for stage in (ALIGNED, SECOND)]
    assert two.values["tokens.continue"] == sum(seen)
    assert none.values["tokens.continue"] is None
    assert none.values["tokens.finetune"] == ledger.results(DIRECT)["tokens_seen"]
    share = checkpoint.read_progress(checkpoint.milestone(ledger.folder(TEXT), 0.4)).tokens_seen
    assert two.values["tokens.pretrain"] == none.values["tokens.pretrain"] == share
    assert parts_of(results["two"])["continue"].before == (ALIGNED,)
    assert list(parts_of(results["none"])) == [
        "prepare_world",
        "prepare_tokenizer",
        "prepare_source",
        "train_encoder",
        "pretrain",
        "finetune",
        "evaluate",
    ]


def test_models_of_every_start_open_answer_and_tell_where_they_come_from(ledger: Ledger) -> None:
    chains = {
        SECOND: ["pretrain", "train_encoder", "continue", "continue"],
        DIRECT: ["pretrain", "train_encoder", "finetune"],
    }
    for stage, chain in chains.items():
        opened = open_model(ledger.folder(stage), torch.device("cpu"))
        assert opened.encoder is not None
        assert [one.kind for one, _ in _history(opened)] == chain
        told = [line for line in describe(opened) if line.startswith("trained on")]
        assert len(told) == len(chain) - 1
        assert f"40 % of {TEXT.name}" in told[0]
        assert set(ledger.results(asked(stage))["tasks"]) == {"vqav2", "pope", "pocket_facts"}
