"""Rows as a person reads them, the mixture table, and the command that prints both."""

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import Result

import tiny
from in_process import events_of, stay_here
from inputs import midstream, png
from midstream.cli.catalogue import training_stage
from midstream.config import Amount, Amounts, Budget, Epochs, ImageTransform, Mixture, Rows
from midstream.core.batch import IGNORE
from midstream.core.tokens import TokenCount
from midstream.cost.graph import order
from midstream.data.examples import (
    END_OF_TEXT,
    SEPARATOR,
    TextCodec,
    caption_example,
    conversation_example,
    text_example,
)
from midstream.data.images import decode_pixels
from midstream.data.rows import build_row, plan_rows, shares_report
from midstream.data.source_writer import Image as Placed
from midstream.data.source_writer import ShardWriter, finish_source
from midstream.data.sources import Kind, Source
from midstream.study.label import label
from midstream.study.stages import Evaluate
from midstream.study.store import Ledger
from midstream.work.show_data import KINDS, Piece, Shown, Span, pieces_of, print_row, print_stats
from own_studies import study_of

PATCHES, SIZE = 4, 12
TEXTS = [f"Text {n}: {'the river is wide, ' * (n % 9)}and it ends." for n in range(40)]
CAPTIONS = [f"a boat number {n} on {'very ' * (n % 4)}blue water" for n in range(30)]
TURNS = [[("What is it?", f"A boat, {n}."), ("Which one?", "The red one.")] for n in range(12)]


def mixture(total_tokens: int, **shares: float) -> Mixture:
    """A budget by the sources' names, each of which may be repeated."""
    return tiny.mixture(total_tokens, **shares).model_copy(update={"max_epochs": 9})


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END_OF_TEXT, SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*TEXTS, *CAPTIONS], trainer)
    return TextCodec(bpe)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, codec: TextCodec) -> dict[str, Source]:
    """Texts, captions and conversations in words."""
    base = tmp_path_factory.mktemp("words")
    examples = {
        "web": [text_example(codec, codec.encode(text)) for text in TEXTS],
        "pics": [caption_example(codec, codec.encode(text)) for text in CAPTIONS],
        "talks": [conversation_example(codec, turns) for turns in TURNS],
    }
    found = {}
    kinds: dict[str, Kind] = {"web": "text", "pics": "caption", "talks": "instruct"}
    for name, items in examples.items():
        writer = ShardWriter(
            base / name / "shards" / "000000", kind=kinds[name], dtype="<u2", input_name=f"{name}.x"
        )
        for number, item in enumerate(items):
            content, image = name.encode() + bytes([number]), None
            if name == "pics":
                content = png(number, (8, 5))
                (base / f"{number}.png").write_bytes(content)
                image = Placed(f"{number}.png", 0, len(content))
            writer.add(
                item.input_ids,
                item.supervised,
                name=f"{name}.x, sample {number}",
                content=content,
                image=image,
            )
        writer.close()
        folder = base / name
        finish_source(folder, tokenizer_digest="x", vocab_size=codec.size, root=str(base))
        found[name] = Source(name, folder, base)
    return found


def spans_of(piece: Piece) -> list[Span]:
    """All texts of a piece, without what stands before its pictures."""
    return [span for part in piece.parts if not isinstance(part, int) for span in part]


def shown_of(
    sources: dict[str, Source],
    codec: TextCodec,
    budget: Budget,
    layout: str = "filled",
    row_length: int = 96,
) -> Shown:
    rows = Rows(row_length=row_length, batch_rows=2, layout=layout)
    return Shown(
        name="continue-1",
        plan=plan_rows(sources, PATCHES, budget, rows, 3),
        sources=sources,
        codec=codec,
        budget=budget,
        num_patches=PATCHES,
        transform=ImageTransform(size=SIZE),
    )


MIXED = mixture(2400, web=0.4, pics=0.4, talks=0.2)
CASES = [
    (MIXED, "filled", 96),
    (MIXED, "padded", 96),
    (mixture(900, web=1.0), "joined", 32),
    (mixture(900, web=1.0), "filled", 32),
]


def printed(shown: Shown, index: int, out: Path, **changes: object) -> str:
    stream = io.StringIO()
    print_row(shown, index, out, Console(file=stream, highlight=False, **changes))  # type: ignore[arg-type]
    return stream.getvalue()


@pytest.fixture(params=CASES, ids=str)
def shown(request: pytest.FixtureRequest, sources: dict[str, Source], codec: TextCodec) -> Shown:
    return shown_of(sources, codec, *request.param)


def test_a_rows_texts_are_whole_or_say_that_they_are_cut_and_marked_where_they_are_targets(
    shown: Shown,
) -> None:
    row_length, layout = shown.plan.rows.row_length, shown.plan.rows.layout
    decode = shown.codec.tokenizer.decode
    whole = {
        f"source {name!r}, {name}.x, {'document' if name == 'web' else 'sample'} {number}": decode(
            source.input_ids(number).tolist(), skip_special_tokens=False
        )
        for name, source in shown.sources.items()
        for number in range(len(source))
    }
    num_cut = num_joined = num_continued = 0
    for index in range(len(shown.plan)):
        row, pieces = pieces_of(shown, index)
        targets = [int(token) for token in row.targets if token != IGNORE]
        spans = [span for piece in pieces for span in (*spans_of(piece), *piece.following)]
        marked = "".join(span.text for span in spans if span.supervised)
        assert marked == decode(targets, skip_special_tokens=False)
        assert sum(piece.num_targets for piece in pieces) == row.counts.target == len(targets)
        assert sum(len(piece.columns) for piece in pieces) == row.counts.seen
        num_joined += sum(spans_of(piece)[0].supervised for piece in pieces[1:])
        joined = shown.plan.layout.sees_all(index)
        assert joined or not any(spans_of(piece)[0].supervised for piece in pieces)
        for piece in pieces:
            text, full = "".join(span.text for span in spans_of(piece)), whole[piece.where]
            assert text in full
            assert (text == full) == (not piece.continued and not piece.goes_on)
            assert full.endswith(text) or piece.goes_on
            assert full.startswith(text) or piece.continued
            num_cut += bool(piece.following)
            num_continued += piece.continued
    assert row_length == 96 or (num_cut and num_continued)
    assert (num_joined > 0) == (layout != "filled")


def test_a_printed_row_names_sources_special_tokens_cuts_and_pictures(
    tmp_path: Path, shown: Shown
) -> None:
    for index in range(len(shown.plan)):
        text = printed(shown, index, tmp_path / "out")
        row, pieces = pieces_of(shown, index)
        assert f"row {index} of {len(shown.plan)} (0 to {len(shown.plan) - 1})" in text
        for piece in pieces:
            assert piece.where in text
        specials = np.isin(row.input_ids, [shown.codec.end_of_text, shown.codec.separator])
        specials &= row.segment_ids >= 0
        for image in row.image_starts:
            specials[image : image + PATCHES] = False
        following = sum(span.special for piece in pieces for span in piece.following)
        found = text.count(END_OF_TEXT) + text.count(SEPARATOR)
        assert found == specials.sum() + following
        assert text.count("cut here, goes on in another row") == sum(p.goes_on for p in pieces)
        assert text.count("(goes on from another row)") == sum(p.continued for p in pieces)
        names = re.findall(rf"\[image {PATCHES} positions -> (\S+)\]", text)
        assert names == [f"row-{index}-image-{n}.png" for n in range(len(row.images))]
        assert (f"({row.counts.pad} positions of padding)" in text) == (row.counts.pad > 0)


def test_saved_pictures_are_what_the_encoder_sees(
    tmp_path: Path, sources: dict[str, Source], codec: TextCodec
) -> None:
    shown = shown_of(sources, codec, MIXED)
    changed = ImageTransform(size=SIZE, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    seen = 0
    for transform in (
        ImageTransform(size=SIZE),
        ImageTransform(size=SIZE, resize="square"),
        changed,
    ):
        for index in range(len(shown.plan)):
            printed(replace(shown, transform=transform), index, tmp_path)
            row = build_row(shown.plan, sources, index, PATCHES)
            for number, (which, example, at) in enumerate(row.images.tolist()):
                data = sources[shown.plan.names[which]].image_bytes(example, at)
                path = tmp_path / f"row-{index}-image-{number}.png"
                picture = np.asarray(Image.open(path)).astype(np.float32) / 255
                assert picture.shape == (SIZE, SIZE, 3)
                pixels = (picture - np.array(transform.mean)) / np.array(transform.std)
                expected = decode_pixels(data, "here", transform).transpose(1, 2, 0)
                # An 8-bit picture is within half a step of what the encoder sees.
                assert np.abs(pixels - expected).max() <= 0.51 / 255 / min(transform.std)
                seen += 1
    assert seen >= 30


def test_markers_stand_for_colours_where_there_are_none(
    tmp_path: Path, sources: dict[str, Source], codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = shown_of(sources, codec, mixture(300, talks=1.0))
    plain = printed(shown, 0, tmp_path)
    coloured = printed(shown, 0, tmp_path, force_terminal=True, color_system="truecolor")
    without = printed(shown, 0, tmp_path, force_terminal=True, no_color=True)
    assert "⟦ The red one.<|separator|>⟧" in plain
    assert "\x1b[" not in plain
    assert "⟦" not in coloured
    styled = re.findall(r"\x1b\[1;4[0-9;]*m([^\x1b]*)", coloured)
    assert " The red one." in styled
    assert not any("Which one?" in text for text in styled)
    assert "⟦" in without
    # Apart from the markers and the styles, all three say the same.
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert bare == re.sub("[⟦⟧]", "", plain)
    assert re.sub(r"\x1b\[[0-9;]*m", "", without) == plain


def test_text_cannot_steer_the_terminal_or_the_markup(tmp_path: Path, codec: TextCodec) -> None:
    text = "\x1b[2J[bold]wide[/bold]\x07 \x9b1m\r\ttab\nline"
    example = text_example(codec, codec.encode(text))
    folder = tmp_path / "odd"
    writer = ShardWriter(folder / "shards" / "0", kind="text", dtype="<u2", input_name="\x1b[3J.x")
    writer.add(example.input_ids, example.supervised, name="a", content=b"a")
    writer.close()
    finish_source(folder, tokenizer_digest="x", vocab_size=codec.size, root=str(tmp_path))
    sources = {"odd": Source("odd", folder, tmp_path)}
    shown = shown_of(sources, codec, Epochs(sources=("odd",), epochs=1), row_length=128)
    found = printed(shown, 0, tmp_path)
    found = re.sub("[⟦⟧]", "", found)
    assert "\\x1b[2J[bold]wide[/bold]\\x07 \\x9b1m\\r  tab\nline" in found
    assert not set("\x1b\x07\x9b\r") & set(found)


def table_after(text: str, start: str) -> dict[str, list[str]]:
    """The cells of the table behind a line that begins so, by their first one."""
    lines = text[text.index(start) :].splitlines()[1:]
    heads = re.split(r"\s{2,}", lines[0])
    assert heads[0] == "source"
    cells = {}
    for line in lines[1:]:
        name, *rest = re.split(r"\s{2,}", line)
        cells[name] = [cell.replace(",", "") for cell in rest]
        if name == "all":
            return cells
    raise AssertionError(text)


@pytest.mark.parametrize("num_rows", [7, 10_000])
def test_the_mixture_table_counts_what_the_rows_hold(
    sources: dict[str, Source], shown: Shown, num_rows: int
) -> None:
    stream, row_length = io.StringIO(), shown.plan.rows.row_length
    print_stats(shown, num_rows, Console(file=stream, highlight=False))
    text, total = stream.getvalue(), len(shown.plan)
    chosen = min(num_rows, total)
    rows = [build_row(shown.plan, sources, k * total // chosen, PATCHES) for k in range(chosen)]
    counts = sum((row.counts for row in rows), TokenCount())
    assert f"sample: {chosen} of {total} rows" in text
    sampled = table_after(text, "sample:")
    assert sampled["all"][: len(KINDS)] == [str(getattr(counts, kind)) for kind in KINDS]
    for name in shown.plan.names:
        own = sum((row.sources.get(name, TokenCount()) for row in rows), TokenCount())
        assert sampled[name][KINDS.index("image")] == str(own.image)
        assert sampled[name][len(KINDS)] == f"{own.seen / counts.seen:.4%}"
    pads = [row.counts.pad for row in rows if len(row.images)]
    expected = f"padding {sum(pads):,} of {len(pads) * row_length:,} positions"
    assert f"of them with a picture: {len(pads)}; {expected}" in text
    planned = table_after(text, "continue-1:")
    for quota in shown.plan.quotas:
        assert planned[quota.name][2:4] == [str(quota.planned_tokens), str(quota.tokens)]
        assert int(planned[quota.name][4]) == quota.tokens - (quota.planned_tokens or 0)
    if num_rows >= total:
        assert planned["all"][0] == str(counts.seen)
        padding = f"{counts.pad:,} of {total * row_length:,} positions"
        assert text.count(f"padding {padding}") >= 2


def test_a_pool_and_how_often_its_pictures_come_are_told_before_anything_runs(
    sources: dict[str, Source], codec: TextCodec
) -> None:
    amounts = (Amount(source="pics", epochs=5, pool=3), Amount(source="web", tokens=50))
    shown, stream = shown_of(sources, codec, Amounts(amounts=amounts)), io.StringIO()
    print_stats(shown, 4, Console(file=stream, highlight=False, width=200))
    text = stream.getvalue()
    assert "5 epochs, pool 3" in text
    assert "pics: 3 pictures, 5.00 views each: 3 seen 5 times" in text
    assert "web: " not in text


def test_a_stage_is_chosen_by_kind_or_by_how_its_name_begins() -> None:
    late = tiny.image_run(total_tokens=9_000)
    other = Evaluate(of=late, evaluation=tiny.EVALUATION)
    study = study_of(tiny.RESULT, other)
    assert training_stage(study) == tiny.SEEN
    assert training_stage(study, "pretrain") == tiny.TEXT
    assert training_stage(study, "finetune") == tiny.CHAT
    for stage in (tiny.TEXT, tiny.SEEN, late, tiny.CHAT):
        assert training_stage(study, stage.name) == stage
        assert training_stage(study, stage.name[:-3]) == stage
    for wanted in ("prepare", "evaluate", "nothing"):
        with pytest.raises(ValueError, match=f"no training stage begins with '{wanted}'"):
            training_stage(study, wanted)
    with pytest.raises(ValueError, match="2 training stages begin with 'cont'") as error:
        training_stage(study, "cont")
    assert tiny.SEEN.identity[:7] in str(error.value)
    assert late.identity[:7] in str(error.value)
    text = Evaluate(of=tiny.TEXT, evaluation=tiny.EVALUATION)
    assert training_stage(study_of(text)) == tiny.TEXT
    with pytest.raises(ValueError, match="trains nothing"):
        training_stage(study_of())


STUDY_FILE = """
import tiny
from midstream.study.stages import *
from midstream.study.studies import *


def study(tokens: int = 8_000) -> Study:
    seen = tiny.image_run(total_tokens=tokens)
    chat = Finetune(start=seen, training=tiny.CHAT.training)
    line = Line(name="a", axes={}, result=Evaluate(of=chat, evaluation=tiny.EVALUATION))
    return Study(name="s", question="?", lines=(line,), figure=Figure(x="x", x_label="x"))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "my_study.py"
    path.write_text(STUDY_FILE)
    return f"{path}:study"


def show_data(*arguments: object) -> Result:
    return midstream("show-data", *arguments)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command starts is done in this process."""
    stay_here(monkeypatch)


def contents(store: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in store.rglob("*")}


@pytest.mark.slow
def test_the_command_shows_any_training_stage_before_it_has_run_and_changes_no_store(
    recipe: str, tiny_ledger: Ledger, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    before, out = contents(tiny_ledger.store), tmp_path / "pictures"
    # Without options: the first row of the first continue, in a process as for everybody.
    result = show_data(recipe, "--store", tiny_ledger.store, "--set", "tokens=9000")
    stage = tiny.image_run(total_tokens=9_000)
    assert f"{stage.identity[:7]}: row 0 of " in result.stdout
    request.getfixturevalue("in_process")
    asked = (recipe, "--store", tiny_ledger.store, "--out", out)
    for kind, stage in (("continue", tiny.SEEN), ("pretrain", tiny.TEXT), ("finetune", tiny.CHAT)):
        result = show_data(*asked, "--stage", kind, "--row", 1, "--stats", "--rows", 5)
        text = result.stdout
        assert result.exit_code == 0, result.output
        assert f"{stage.identity[:7]}: row 1 of " in text
        assert "sample: 5 of " in text
        assert "⟦" in text
        patches = tiny.ENCODER.num_patches
        names = re.findall(rf"\[image {patches} positions -> (\S+)\]", text)
        assert sorted(path.name for path in out.glob("*")) == sorted(names)
        assert bool(names) == (kind != "pretrain")
        for path in out.glob("*"):
            path.unlink()
    assert contents(tiny_ledger.store) == before


@pytest.mark.usefixtures("in_process")
def test_bad_use_is_one_line_that_says_what_to_do(
    recipe: str, tiny_ledger: Ledger, tmp_path: Path
) -> None:
    store = tmp_path / "new store"
    cases = [
        *(
            ((tiny_ledger.store, "--row", row), rf"row {row:,} is not .*has \d+ rows, 0 to \d+")
            for row in (99_999, -1)
        ),
        ((store, "--set", "tokens=9000"), r"is not prepared: .* · \w{7} is new in .*--prepare"),
    ]
    for arguments, message in cases:
        result = show_data(recipe, "--out", tmp_path / "out", "--store", *arguments)
        errors = result.stderr
        assert result.exit_code == 2
        assert result.stdout == ""
        assert re.search(message, errors), errors
        assert errors.count("\n") == 1
    assert errors.endswith(f"midstream run {recipe} --store '{store}' --set tokens=9000\n")
    assert not store.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_the_data_is_prepared_on_demand_and_only_once(recipe: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "store")
    asked = (recipe, "--store", ledger.store, "--out", tmp_path / "out", "--prepare")
    result = show_data(*asked)
    assert result.exit_code == 0, result.stderr
    assert f"{label(tiny.SEEN)}: row 0 of " in result.stdout
    done = [stage.kind for stage in order(study_of(tiny.RESULT)) if ledger.is_done(stage)]
    assert {"prepare_world", "prepare_tokenizer", "prepare_source"} == set(done)
    before = contents(ledger.store)
    assert show_data(*asked).exit_code == 0
    assert contents(ledger.store) == before


@pytest.mark.slow
def test_a_preparation_that_fails_is_told_with_its_reason(tmp_path: Path) -> None:
    root, store = tmp_path / "empty", tmp_path / "store"
    root.mkdir()
    sources = {"web": {"kind": "text", "digest": "0" * 16}}
    stage = tiny.TEXT.model_dump(mode="json")
    stage["data"]["world"] = {"kind": "folder", "root": str(root)}
    stage["data"]["world"]["fingerprint"] = {"sources": sources}
    request = {"store": store, "stage": stage, "row": 0, "stats": None, "out": tmp_path / "out"}
    *_, last = events_of("show-data", request | {"prepare": True, "remedy": "midstream run"})
    assert (last["event"], last["code"]) == ("failed", 2)
    assert re.fullmatch(rf".* · \w{{7}} is not prepared: \w+Error: .*{root}.*", last["error"])


def test_what_is_cut_off_of_a_conversation_is_said_in_its_row_and_in_the_mixture(
    tmp_path: Path, sources: dict[str, Source], codec: TextCodec
) -> None:
    longest = max(len(sources["talks"].input_ids(n)) for n in range(len(TURNS)))
    rows, budget = Rows(row_length=longest - 1, batch_rows=2), Epochs(sources=("talks",), epochs=1)
    plan = plan_rows(sources, PATCHES, budget, rows, 3, "cut")
    shown = Shown("finetune-1", plan, sources, codec, budget, PATCHES)
    report = shares_report(plan, sources, PATCHES)["talks"]["cut"]
    assert 1 <= report["examples"] <= len(TURNS)
    text = "".join(printed(shown, index, tmp_path) for index in range(len(plan)))
    assert text.count("(cut to fit into a row: ") == report["examples"]
    assert "goes on in another row" not in text
    stream = io.StringIO()
    print_stats(shown, 4, Console(file=stream, highlight=False))
    expected = f"{report['examples']} of {len(TURNS)} examples are cut to fit into a row, "
    assert f"talks: {expected}{report['tokens']} tokens are left out" in stream.getvalue()
