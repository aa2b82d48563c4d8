"""Imports of tiny local checkpoints, of a fake hub cache, and everything that is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from exported import cache, cached
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file
from test_openlm import CONFIG, PARAMS, Run, numbered, rate_after, state_of
from torch import Tensor

from checkpoints import FAMILIES, VOCAB_SIZE, build_model, build_tokenizer, edit, save_checkpoint
from in_process import events_of
from midstream.config import DecoderConfig, EncoderConfig, TransformersDecoderConfig, VLMConfig
from midstream.core.storage import read_json, verify, write_json
from midstream.data.examples import AGENT_STOP, SEPARATOR, TextCodec
from midstream.exchange.import_model import import_model
from midstream.exchange.import_source import ImportRequest, summary
from midstream.model.vision import build_encoder, load_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import load_weights, weights_digest
from midstream.study.imported import ImportRecord, as_imported, open_imported, read_import
from midstream.train.checkpoint import load_moments, read_progress
from vision_checkpoints import build_tower, save_tower, vision_part

__all__ = ["cache"]
TOLERANCE = 1e-5
HUB = "https://huggingface.co/"
BIG = CONFIG.model_copy(update={"vocab_size": VOCAB_SIZE})


@pytest.fixture(scope="module")
def pythia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-NeoX folder; read it, never change it."""
    return save_checkpoint("gpt_neox", tmp_path_factory.mktemp("models") / "gpt_neox")


def bring(source: object, out: Path, **options: Any) -> ImportRecord:
    """Import, and the record that a stage will read."""
    import_model(ImportRequest(source=str(source), out=out, **options))
    assert open_imported(as_imported(out)) == read_import(out)
    return read_import(out)


def opened(out: Path) -> VLM:
    """The imported language model, as a LoadDecoder stage opens it."""
    config = read_import(out).config
    assert isinstance(config, DecoderConfig | TransformersDecoderConfig)
    vlm = VLM(VLMConfig(decoder=config))
    load_weights(vlm, out / "model.safetensors")
    return vlm.eval()


@torch.no_grad()
def logits(vlm: VLM, ids: Tensor) -> Tensor:
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    return vlm.decoder.output(vlm.decoder(vlm.decoder.embed(ids), places, None))


def some_ids(vocab_size: int = VOCAB_SIZE) -> Tensor:
    return torch.randint(0, vocab_size, (2, 24), generator=torch.Generator().manual_seed(3))


def refused(source: object, out: Path, match: str, **options: Any) -> None:
    """An import that must fail with this message and leave nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises((ValueError, OSError), match=match):
        import_model(ImportRequest(source=str(source), out=out, **options))
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_decoder_has_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    source = save_checkpoint(family, tmp_path / "source", shard=family in ("olmo2", "llama3"))
    record = bring(source, tmp_path / "out", add_tokens=(AGENT_STOP,))
    vlm, ids = opened(tmp_path / "out"), some_ids()
    found = logits(vlm, ids)
    with torch.no_grad():
        expected = build_model(family)(ids).logits
    assert found.shape[-1] == 320
    torch.testing.assert_close(found[..., :VOCAB_SIZE], expected, rtol=0, atol=TOLERANCE)
    assert record.family == read_json(source / "config.json")["model_type"]
    assert record.config.vocab_size == 320
    assert record.weights_digest == weights_digest(vlm)
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


def test_old_weights_are_bit_equal_and_the_tokenizer_comes_along(
    pythia: Path, tmp_path: Path
) -> None:
    record = bring(pythia, tmp_path / "out", add_tokens=(AGENT_STOP,))
    old = load_file(pythia / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    assert set(new) == {f"decoder.model.{name.replace('embed_out', 'lm_head')}" for name in old}
    for name, value in old.items():
        kept = new[f"decoder.model.{name.replace('embed_out', 'lm_head')}"]
        if name in ("embed_out.weight", "gpt_neox.embed_in.weight"):
            mean = value.double().mean(dim=0).float()
            assert torch.equal(kept[VOCAB_SIZE:], mean.expand(20, 32))
            kept = kept[:VOCAB_SIZE]
        assert torch.equal(kept, value), name
    added = [{"token": SEPARATOR, "id": 300}, {"token": AGENT_STOP, "id": 301}]
    assert record.vocabulary == {"rows_before": 300, "rows_after": 320, "added": added}
    codec = TextCodec.from_file(tmp_path / "out" / "tokenizer.json")
    assert codec.stop_ids == {0, 300, 301}
    text = "A red circle is left of the blue square."
    assert codec.encode(text) == build_tokenizer()(text)["input_ids"]


def test_a_tokenizer_may_be_given_and_without_one_the_user_is_told(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "words")
    for given, added in (
        ("words/tokenizer.json", [{"token": SEPARATOR, "id": 300}]),
        ("words", [{"token": SEPARATOR, "id": 300}]),
        (None, []),
    ):
        place = None if given is None else str(tmp_path / given)
        request = ImportRequest(
            source=str(tmp_path / "source"), out=tmp_path / "out", tokenizer=place
        )
        record, notes = import_model(request)
        assert record.vocabulary == {"rows_before": 300, "rows_after": 320, "added": added}
        assert (tmp_path / "out" / "tokenizer.json").exists() == (given is not None)
        assert any(note.startswith("no tokenizer:") for note in notes) == (given is None)


def test_another_end_of_text_than_the_models_is_told(pythia: Path, tmp_path: Path) -> None:
    source = shutil.copytree(pythia, tmp_path / "source")
    edit(source / "config.json", eos_token_id=7)
    _, notes = import_model(ImportRequest(source=str(source), out=tmp_path / "out"))
    assert "its config.json ends texts with 7, Midstream with 0 of the tokenizer" in notes


def test_what_the_user_gives_is_the_position(pythia: Path, tmp_path: Path) -> None:
    numbers = {"tokens_seen": 1000, "total_tokens": 4000, "rate": 1e-4, "peak_rate": 1e-3}
    record = bring(pythia, tmp_path / "out", **numbers, end_rate=0.0)
    assert record.position is not None
    assert set(record.position.origins.values()) == {"given"}
    progress = read_progress(tmp_path / "out")
    assert (progress.tokens_seen, progress.total_tokens, progress.rate) == (1000, 4000, 1e-4)
    assert progress.counts.text == progress.counts.target == 1000
    request = ImportRequest(source=str(pythia), out=tmp_path / "out", tokens_seen=1000)
    record, notes = import_model(request)
    assert record.position is not None
    assert read_progress(tmp_path / "out").rate is record.position.rate is None
    assert "the learning rate is unknown: give it with --rate, or warm up again" in notes


def test_content_stands_for_weights_and_position_and_not_for_the_place(
    pythia: Path, tmp_path: Path
) -> None:
    first = bring(pythia, tmp_path / "a", rate=1e-4)
    again = bring(shutil.copytree(pythia, tmp_path / "copy"), tmp_path / "b", rate=1e-4)
    assert again.content == first.content
    assert len(first.content) == 16
    assert bring(pythia, tmp_path / "c", rate=2e-4).content != first.content
    assert bring(pythia, tmp_path / "c", rate=1e-4, pad_vocab_to=1).content != first.content
    other = save_checkpoint("gpt_neox", tmp_path / "other", seed=1)
    assert bring(other, tmp_path / "d", rate=1e-4).content != first.content


def test_a_revision_of_a_known_family_brings_its_position(
    cache: Path, pythia: Path, tmp_path: Path
) -> None:
    cached(cache, pythia, "EleutherAI/pythia-410m", "step71000", "c" * 40)
    request = ImportRequest(
        source="EleutherAI/pythia-410m", revision="step71000", out=tmp_path / "out", rate=1e-4
    )
    record, notes = import_model(request)
    assert (record.source, record.revision) == ("EleutherAI/pythia-410m", "step71000")
    assert record.position is not None
    assert record.position.tokens_seen == 71_000 * 2_097_152
    assert record.position.peak_rate == 3e-4
    assert record.position.origins["rate"] == "given"
    assert record.position.origins["peak_rate"] == "known family"
    assert "known family: Pythia" in notes
    assert [note for note in notes if note.startswith("rate is 0.0001 (given); known family says")]
    lines = "\n".join(summary(tmp_path / "out", record, notes))
    assert "tokens seen: 148,897,792,000 (known family)" in lines
    assert "EleutherAI/pythia-410m at step71000" in lines
    assert f"next: midstream plan own_model.image_shares --set checkpoint={tmp_path}/out" in lines


def test_a_revision_that_the_cache_lacks_is_named_with_the_way_to_get_it(
    cache: Path, pythia: Path, tmp_path: Path
) -> None:
    cached(cache, pythia, "a/model", "main", "c" * 40)
    assert bring("a/model", tmp_path / "main").revision == "c" * 40
    way = r"model at revision step7 .*HF_HUB_OFFLINE.*hf download a/model --revision step7"
    refused("a/model", tmp_path / "out", way, revision="step7")


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (errors.RevisionNotFoundError, r"has no revision 'step7'; .*/tree/main lists them"),
        (errors.GatedRepoError, r"accept its terms.*hf auth login"),
        (errors.RepositoryNotFoundError, r"no file or folder here, and the hub has no public"),
        (errors.HfHubHTTPError, r"the hub did not answer \(404"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_remedy(
    error: type[errors.HfHubHTTPError], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> str:
        response: Any = SimpleNamespace(headers={}, request=None, status_code=404)
        raise error("404 of the hub", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused("EleutherAI/pythia-410m", tmp_path / "out", match, revision="step7")


def test_torch_files_are_asked_for_only_where_there_are_no_safetensors(
    pythia: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(pythia, tmp_path / "source")
    held = load_file(source / "model.safetensors")
    wanted: list[list[str]] = []

    def download(name: str, *, revision: str, allow_patterns: list[str], **options: Any) -> str:
        wanted.append(allow_patterns)
        if "pytorch_model.bin" in allow_patterns:
            torch.save(held, source / "pytorch_model.bin")
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    bring("a/model", tmp_path / "one", revision="x")
    assert len(wanted) == 1
    assert "model.safetensors" in wanted[0]
    (source / "model.safetensors").unlink()
    first = weights_digest(opened(tmp_path / "one"))
    record = bring("a/model", tmp_path / "two", revision="x")
    assert len(wanted) == 3
    assert record.weights_digest == first


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["README.md", "x-Q4_K_M.gguf"], r"a/model holds GGUF \(x-Q4_K_M.gguf\) and no weights"),
        (["final/model.safetensors"], r"hf download a/model --include 'final/\*' --local-dir DIR"),
        (
            ["epoch_7.pt", "training_args.bin"],
            r"hf download a/model epoch_7\.pt .* give the file epoch_7",
        ),
        ([], r"has no config\.json, only nothing"),
    ],
)
def test_what_a_hub_model_holds_in_place_of_weights_is_told(
    files: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot")
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    refused("a/model", tmp_path / "out", told)


def test_an_openlm_epoch_comes_with_moments_position_and_more_rows(tmp_path: Path) -> None:
    state = state_of(BIG)
    params = PARAMS | {"vocab_size": VOCAB_SIZE}
    run = Run(tmp_path / "run", state, prefix="module.")
    theirs = numbered(state, 20, rate_after(20))
    source = run.write(params=params, optimizer=theirs)
    build_tokenizer().save_pretrained(tmp_path / "words")
    record = bring(source, tmp_path / "out", tokenizer=str(tmp_path / "words"))
    assert record.family == "openlm"
    assert record.config == BIG.model_copy(update={"vocab_size": 320})
    assert record.position is not None
    assert record.position.tokens_seen == 20 * 4 * 16
    assert record.position.rate == pytest.approx(rate_after(20))
    assert set(record.position.origins.values()) == {"checkpoint"}
    assert len(record.dropped) == 2
    assert all(name.endswith("inv_freq") for name in record.dropped)
    progress = read_progress(tmp_path / "out")
    assert (progress.step, progress.rate) == (20, record.position.rate)

    vlm = opened(tmp_path / "out")
    mine = dict(vlm.decoder.state_dict())
    for name in ("tok_embeddings.weight", "output.weight"):
        assert torch.equal(mine.pop(name)[:VOCAB_SIZE], state[name])
    assert all(torch.equal(value, state[name]) for name, value in mine.items())

    assert record.has_moments
    optimizer = torch.optim.AdamW(vlm.parameters())
    load_moments(tmp_path / "out", vlm, optimizer)
    names = [name for name in state if not name.endswith("inv_freq")]
    for number, name in enumerate(names):
        held = optimizer.state[vlm.decoder.get_parameter(name)]
        given = theirs["state"][number]
        rows = len(given["exp_avg"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held[key][:rows], given[key])
            assert not held[key][rows:].any()
        assert held["step"] == 20


def test_moments_are_part_of_the_content(tmp_path: Path) -> None:
    state = state_of()
    plain = Run(tmp_path / "a", state).write()
    other = Run(tmp_path / "b", state).write(optimizer=numbered(state, 20, rate_after(20)))
    first, second = bring(plain, tmp_path / "one"), bring(other, tmp_path / "two")
    assert first.weights_digest == second.weights_digest
    assert first.position == second.position
    assert (first.has_moments, second.has_moments) == (False, True)
    assert first.content != second.content


def test_heads_may_be_given_for_openlm_alone(pythia: Path, tmp_path: Path) -> None:
    state = state_of(tables=False)
    torch.save(state, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", tmp_path / "out", "number of heads")
    record = bring(tmp_path / "weights.pt", tmp_path / "out", num_heads=4)
    assert record.config == CONFIG.model_copy(update={"vocab_size": 64})
    # Safetensors alone tell no more.
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    for number, source in enumerate((tmp_path / "folder", tmp_path / "folder/model.safetensors")):
        refused(source, tmp_path / "other", "--num-heads")
        again = bring(source, tmp_path / f"again{number}", num_heads=4)
        assert (again.config, again.weights_digest) == (record.config, record.weights_digest)
    refused(pythia, tmp_path / "other", "--num-heads is for OpenLM", num_heads=4)


def test_a_tower_is_imported_whole_and_its_encoder_loads(tmp_path: Path) -> None:
    source = save_tower("whole siglip", tmp_path / "source", shard=True)
    record = bring(source, tmp_path / "out")
    assert isinstance(record.config, EncoderConfig)
    assert (record.kind, record.vocabulary, record.position) == ("encoder", None, None)
    held = load_file(tmp_path / "out" / "model.safetensors")
    expected = vision_part(build_tower("whole siglip")).state_dict()
    assert held.keys() == expected.keys()
    assert all(torch.equal(held[name], value) for name, value in expected.items())
    load_encoder(build_encoder(record.config), tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("text_model.") for name in record.dropped)
    assert {"logit_scale", "logit_bias"} <= set(record.dropped)


def test_what_has_no_sense_for_a_tower_is_refused(tmp_path: Path) -> None:
    source = save_tower("siglip", tmp_path / "source")
    given: Any = {"rate": 1e-4, "tokenizer": "words", "add_tokens": ("<|x|>",)}
    refused(source, tmp_path / "out", "leave --rate, --tokenizer, --add-token out", **given)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    source = save_tower("siglip", tmp_path / "source", shard=True)
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused(source, tmp_path / "out", f"half downloaded.*{shard.name}")


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Other tensors in a folder's file, under names with __ for dots; None takes one out."""
    held = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        held.pop(name.replace("__", "."), None)
        if value is not None:
            held[name.replace("__", ".")] = value
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def halve(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def under_way(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"part")


LFS = "version https://git-lfs.github.com/spec/v1\n"
DENSE = {"gpt_neox__layers__0__attention__dense__weight": None}
DENS = {"gpt_neox__layers__0__attention__dens__weight": torch.ones(32, 32)}
INFINITE = {"gpt_neox__final_layer_norm__bias": torch.full((32,), torch.inf)}
CACHE = ".cache/huggingface/download/ab.incomplete"
# What is done to a folder, and what the error names.
AMISS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (halve, r"model.safetensors is no readable safetensors file"),
    "under way": (lambda f: under_way(f, "a.part"), "half downloaded: a.part"),
    "under way, in a cache": (lambda f: under_way(f, CACHE), f"half downloaded: {CACHE}"),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text(LFS),
        r"Git LFS in place of model.safetensors.*git lfs pull",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "holds neither model.safetensors nor pytorch_model.bin",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "family": (
        lambda f: write_json(f / "config.json", {"model_type": "mamba"}),
        r"model_type 'mamba'.*openlm, llama .*gpt_neox.*dinov2",
    ),
    "names": (
        lambda f: change(f, **DENSE, **DENS),
        r"missing: .*dense.weight \[32, 32\]; nearest.*dens.weight",
    ),
    "infinite": (
        lambda f: change(f, **INFINITE),
        r"final_layer_norm.bias holds numbers that are not finite",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"),
        r"has tokenizer.model but no tokenizer.json.*--tokenizer",
    ),
}


@pytest.mark.parametrize("what", AMISS)
def test_what_is_amiss_with_a_folder_is_named(what: str, pythia: Path, tmp_path: Path) -> None:
    spoil, match = AMISS[what]
    source = shutil.copytree(pythia, tmp_path / "source")
    spoil(source)
    refused(source, tmp_path / "out", match)


def test_code_of_a_checkpoint_is_never_run(pythia: Path, tmp_path: Path) -> None:
    source = shutil.copytree(pythia, tmp_path / "source")
    edit(
        source / "config.json",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    bring(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_tokenizers_that_cannot_be_read_or_are_another_models_are_refused(
    pythia: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text("{}")
    build_tokenizer().save_pretrained(tmp_path / "words")
    of_30_rows = Run(tmp_path / "run", state_of()).write()
    for source, tokenizer, match in (
        (pythia, "nowhere.json", "no file nowhere.json"),
        (pythia, tmp_path / "bad.json", "is not a tokenizer file"),
        (of_30_rows, tmp_path / "words", r"ids up to 299, the model's embedding 30 rows"),
    ):
        refused(source, tmp_path / "out", match, tokenizer=str(tokenizer))


def test_an_out_that_holds_something_else_is_left_alone(pythia: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    bring(pythia, tmp_path / "out")  # An empty folder is nothing.
    bring(pythia, tmp_path / "out", rate=1e-4)  # An earlier import is replaced.
    refused(pythia, tmp_path / "out", "--rate|is above", rate=1e-2, peak_rate=1e-4)
    assert read_progress(tmp_path / "out").rate == 1e-4
    verify(tmp_path / "out")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("two years")
    for place in (mine, mine / "thesis.tex"):
        refused(pythia, place, "exists and is no imported folder")
    assert (mine / "thesis.tex").read_text() == "two years"


def test_wrong_sources_are_refused(pythia: Path, tmp_path: Path) -> None:
    Run(tmp_path / "run", state_of()).write()
    bring(pythia, tmp_path / "done")
    write_json(tmp_path / "stage" / "stage.json", {})
    for source, match in (
        ("runs/nowhere/epoch_3.pt", "epoch_3.pt does not exist"),
        ("/no/such/folder", "does not exist; give an epoch_N.pt, a folder or a hub name"),
        ("a/b/c", "does not exist; give an epoch"),
        (f"{HUB}EleutherAI/pythia-70m/tree/step9", "name: EleutherAI/pythia-70m --revision step9$"),
        ("EleutherAI/pythia-70m@step9", "by its name: EleutherAI/pythia-70m --revision step9$"),
        (f"{HUB}EleutherAI/pythia-70m/", "by its name: EleutherAI/pythia-70m$"),
        (pythia / "model.safetensors", "give the folder with its config.json"),
        (tmp_path / "run", r"training run; give one of .*epoch_2.pt"),
        (tmp_path / "done", "is imported already"),
        (tmp_path / "stage", "is a stage of a store.*what midstream export writes"),
    ):
        refused(source, tmp_path / "out", match)
    refused(pythia, tmp_path / "out", r"has no revisions; leave --revision step7", revision="step7")


def test_the_process_prints_what_it_wrote(pythia: Path, tmp_path: Path) -> None:
    # As the command sends it: every option, unset ones as null.
    request = {
        "source": str(pythia),
        "out": str(tmp_path / "out"),
        "add_tokens": ["<|agent_stop|>"],
        "pad_vocab_to": 64,
        "tokens_seen": 5,
        "rate": 0.001,
    }
    *notes, last = events_of("import", request)
    assert last["code"] == 0
    lines = "".join(note["text"] for note in notes).splitlines()
    assert lines[0] == f"{tmp_path}/out: {pythia.resolve()}"
    assert lines[1] == "  gpt_neox language model, 35,552 parameters"
    assert lines[2] == (
        "  vocabulary: 300 rows, now 320; added <|separator|> = 300, <|agent_stop|> = 301"
    )
    assert "  rate: 0.001 (given)" in lines
    assert "  unknown: total tokens, peak rate, end rate" in lines
    assert lines[-1].startswith("next: midstream plan own_model.image_shares --set checkpoint=")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"source": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({"rate": -1}, "rate: Input should be greater than or equal to 0"),
        ({"ratio": 1}, "request: ImportRequest has no field 'ratio'; did"),
    ],
)
def test_an_error_is_one_line_and_exit_code_two(
    change: dict[str, Any], match: str, pythia: Path, tmp_path: Path
) -> None:
    request = {"source": str(pythia), "out": str(tmp_path / "out")} | change
    (last,) = events_of("import", request)
    assert last["code"] == 2
    assert last["error"].startswith(match)
    assert "\n" not in last["error"]
    assert not (tmp_path / "out").exists()
