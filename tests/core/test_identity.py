import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, create_model

from midstream import config
from midstream.config import (
    Config,
    ContinuedCosine,
    ContrastiveTraining,
    DecoderConfig,
    EncoderConfig,
    Epochs,
    Evaluation,
    Mixture,
    PocketWorld,
    ProjectorConfig,
    PublicFolder,
    Rows,
    Share,
    SmallReal,
    TokenizerFile,
    TrainedTokenizer,
    Training,
    WarmupCosine,
)
from midstream.core import digests
from midstream.core.identity import (
    FORMAT_VERSION,
    Placement,
    canonical,
    digest,
    file_sha256,
    folder_fingerprint,
)
from midstream.study import stages as stage

ENCODER = EncoderConfig(
    image_size=32, patch_size=16, hidden_size=24, num_layers=3, num_heads=2, intermediate_size=40
)
DEFAULTS = Path(__file__).parents[1] / "golden" / "defaults.json"
ROWS = Rows(row_length=8, batch_rows=2)
TRAINING = Training(
    budget=Mixture(total_tokens=100, shares=(Share(source="a", share=1.0),)),
    rows=Rows(row_length=8, batch_rows=2),
    schedule=WarmupCosine(peak_rate=0.1),
)
EXAMPLES: tuple[Config, ...] = (
    DecoderConfig(hidden_size=64, num_layers=2, num_heads=2),
    ENCODER,
    ProjectorConfig(),
    PocketWorld(),
    SmallReal(root=Path("data"), fingerprint="f"),
    PublicFolder(root=Path("data"), fingerprint=None),
    TrainedTokenizer(vocab_size=300),
    TokenizerFile(path=Path("t.json"), sha256="0"),
    TRAINING,
    Training(
        budget=Epochs(sources=("a", "b"), epochs=2),
        rows=Rows(row_length=8, batch_rows=2),
        schedule=ContinuedCosine(),
    ),
    ContrastiveTraining(
        source="captions",
        text_hidden_size=8,
        text_num_layers=1,
        num_steps=5,
        schedule=WarmupCosine(peak_rate=0.1),
    ),
    Evaluation(visual_tasks=("gqa",), text_tasks=("facts",)),
)


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 1 / 1024
    if isinstance(value, str):
        return f"{value}!"
    if isinstance(value, Path):
        return value / "elsewhere"
    if isinstance(value, tuple):
        return (*value, "more")
    if isinstance(value, dict):
        return {**value, "more": "{question}"}
    assert value is None
    return 17


def _variants(model: BaseModel, place: bool = False) -> list[tuple[str, bool, BaseModel]]:
    """Every copy of `model` with one leaf changed, its path, and whether it is placement."""
    found = []
    for name, field in type(model).model_fields.items():
        value, placed = getattr(model, name), place or Placement in field.metadata
        if isinstance(value, BaseModel):
            inner = [
                (f"{name}.{path}", inside, changed)
                for path, inside, changed in _variants(value, placed)
            ]
        else:
            inner = [(name, placed, _other(value))]
        for path, inside, changed in inner:
            found.append((path, inside, model.model_copy(update={name: changed})))
    return found


def test_every_field_but_placement_changes_the_identity() -> None:
    for model in EXAMPLES:
        for path, placed, changed in _variants(model):
            same = digest(model) == digest(changed)
            assert same is placed, f"{type(model).__name__}.{path}"


def test_placement_is_what_says_where_or_how_work_runs() -> None:
    placed = {
        f"{name}.{field}"
        for name, kind in vars(config).items()
        if isinstance(kind, type) and issubclass(kind, Config)
        for field, info in kind.model_fields.items()
        if Placement in info.metadata
    }
    assert placed == {
        "SmallReal.root",
        "PublicFolder.root",
        "TokenizerFile.path",
        "Training.checkpoint_every_steps",
        "Evaluation.batch_size",
    }


def test_the_format_version_is_part_of_every_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(TRAINING)
    monkeypatch.setattr(digests, "FORMAT_VERSION", digests.FORMAT_VERSION + 1)
    assert digest(TRAINING) != before


def test_a_new_option_that_has_its_default_renames_nothing() -> None:
    def model(**more: Any) -> type[Config]:
        fields = {"size": (int, ...), "rate": (float, 0.5), **more}
        return create_model("Model", __base__=Config, **fields)

    before = model()
    for new in ((int | None, None), (bool, False), (tuple[str, ...], ("a",)), (Rows, ROWS)):
        after = model(option=new)
        assert digest(before(size=1)) == digest(after(size=1))
        assert digest(before(size=1, rate=0.25)) == digest(after(size=1, rate=0.25))
    other = after(size=1, option=ROWS.model_copy(update={"batch_rows": 3}))
    assert digest(other) != digest(before(size=1))
    made = model(option=(dict[str, str], Field(default_factory=dict)))
    assert digest(made(size=1)) == digest(before(size=1)) != digest(made(size=1, option={"a": "b"}))


def test_defaults_are_those_that_stored_identities_were_made_with() -> None:
    """A default that changes means something else by every name it is left out of: give the option
    another name, or raise FORMAT_VERSION, and write the file anew with this module's `defaults`."""
    stored = json.loads(DEFAULTS.read_text())
    assert stored == {"format": FORMAT_VERSION, "defaults": defaults()}


def defaults() -> dict[str, dict[str, Any]]:
    """By class and field, what identities leave out."""
    kinds = [kind for module in (config, stage) for kind in vars(module).values()]
    models = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)}
    return {
        kind.__name__: {
            name: canonical(field.get_default(call_default_factory=True))
            for name, field in sorted(kind.model_fields.items())
            if not field.is_required() and Placement not in field.metadata
        }
        for kind in sorted(models, key=lambda kind: kind.__name__)
        if not kind.__name__.startswith(("Machine", "Slurm", "_"))
    }


def test_models_of_equal_fields_but_other_classes_differ() -> None:
    class One(Config):
        size: int = 1

    class Two(Config):
        size: int = 1

    assert digest(One()) != digest(Two())


def test_the_order_of_a_dict_is_no_part_of_an_identity_but_that_of_a_tuple_is() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(("a", "b")) != digest(("b", "a"))


def test_numbers_that_differ_have_other_identities() -> None:
    values = [1, 1.0, True, "1", 0.1 + 0.2, 0.3, None, [1], "true"]
    assert len({digest(value) for value in values}) == len(values)


def test_what_has_no_stable_form_is_refused() -> None:
    class Placed(Config):
        mode: Literal["a", "b"] = "a"
        root: Annotated[Path, Placement] = Path("here")

    assert canonical(Placed()) == {"is": "Placed"}
    assert canonical(Placed(mode="b")) == {"is": "Placed", "mode": "b"}
    for value in ({"a", "b"}, Path("x"), len, b"bytes"):
        with pytest.raises(TypeError, match="no stable form"):
            digest(value)
    with pytest.raises(TypeError, match="only text keys"):
        digest({1: "a"})
    with pytest.raises(ValueError, match="NaN"):
        digest(float("nan"))


def test_a_folder_is_known_by_the_names_and_bytes_of_its_files(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return folder_fingerprint(tmp_path / name)

    one = made("one", {"a.txt": "x", "deep/b.txt": "y"})
    assert one == made("same", {"deep/b.txt": "y", "a.txt": "x"})
    others = [
        made("bytes", {"a.txt": "x", "deep/b.txt": "z"}),
        made("names", {"a.txt": "x", "deep/c.txt": "y"}),
        made("more", {"a.txt": "x", "deep/b.txt": "y", "c.txt": ""}),
        made("swapped", {"a.txt": "y", "deep/b.txt": "x"}),
    ]
    assert len({one, *others}) == 5
    assert folder_fingerprint(tmp_path / "one", ("*.txt",)) != one


def test_a_missing_or_empty_folder_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        folder_fingerprint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no file under"):
        folder_fingerprint(tmp_path)


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert file_sha256(path).startswith("ba7816bf")


if __name__ == "__main__":
    values = {"format": FORMAT_VERSION, "defaults": defaults()}
    DEFAULTS.write_text(json.dumps(values, indent=1) + "\n")
