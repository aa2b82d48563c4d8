"""Options of the data: worlds and tokenizers."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from midstream.config.base import Config, Fraction, Positive
from midstream.core.identity import Kind, Placement, WorldFingerprint, file_sha256

if TYPE_CHECKING:
    import tokenizers


END_OF_TEXT = "<|endoftext|>"
SEPARATOR = "<|separator|>"
# A tokenizer's own end of text is the first of these that it has.
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>", "</s>")
# Choices of the token that begins an example; any other is the token itself.
OWN_RULE, NO_BEGIN = "rule", "none"


class PocketWorld(Config):
    """The generated world (`worlds/pocket_world.py`): how much of each thing, and its seed.

    `num_alt_texts` pictures come a second time with what a web page would say of them, as a caption
    source of its own (`alt_texts`); `num_pages` documents have several pictures among their text
    (`pages`), `num_albums` conversations are about two to four pictures at once (`albums`), and
    with albums come benchmarks of several pictures, and of each benchmark training questions. 0:
    there is none.
    """

    # Raised when the same settings give other bytes; that of the benchmarks of worlds with albums.
    VERSION: ClassVar[int] = 4
    ALBUMS_VERSION: ClassVar[int] = 2
    # What of the world each source is made of, beside the seed.
    SOURCES: ClassVar[Mapping[str, str]] = {
        "web": "num_documents",
        "pictures": "num_captions",
        "alt_texts": "num_alt_texts",
        "talks": "num_conversations",
        "pages": "num_pages",
        "albums": "num_albums",
    }

    kind: Literal["pocket"] = "pocket"
    seed: int = 0
    num_documents: Positive = 20_000
    num_captions: Positive = 12_000
    num_alt_texts: Annotated[int, Field(ge=0)] = 0
    num_conversations: Positive = 4_000
    num_pages: Annotated[int, Field(ge=0)] = 0
    num_albums: Annotated[int, Field(ge=0)] = 0
    num_questions: Positive = 500
    num_text_items: Positive = 500
    validation_fraction: Fraction = 0.0

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources that the world has."""
        return tuple(name for name, number in self.SOURCES.items() if getattr(self, number))

    @property
    def text_names(self) -> tuple[str, ...]:
        """The sources of text alone."""
        return ("web",)

    def source_part(self, name: str) -> Any:
        """What a source's bytes follow from."""
        number = self.SOURCES.get(name)
        part = [self.kind, self.VERSION, self.seed, name, getattr(self, number) if number else 0]
        return [*part, self.validation_fraction] if self.validation_fraction else part

    def benchmark_part(self, name: str) -> Any:
        """What a benchmark's bytes follow from; POPE's popular pairs are those of the captions."""
        numbers = [self.num_questions, self.num_text_items, self.num_captions]
        return [self.kind, self.VERSION, self.seed, *numbers]


class SmallReal(Config):
    """Small real data sets in their owners' layout (`worlds/small_real.py`).

    `fingerprint` stands for the bytes under `root`; a preparation refuses other bytes.
    """

    # What under `root` the world is made of, and what its fingerprint covers.
    FILES: ClassVar[tuple[str, ...]] = (
        "text_novels/*.txt",
        "text_wikitext2/valid.txt",
        "text_web_wiki/c4_demo.jsonl",
        "text_web_wiki/wiki_demo.txt",
        "caption_flickr8k/captions.txt",
        "caption_flickr8k/match_pairs.tsv",
        "caption_flickr8k/images/*.jpg",
        "caption_noto_emoji/captions.csv",
        "caption_noto_emoji/72/*.png",
        "vqa_easy/train/questions.json",
        "vqa_easy/train/images/*.png",
        "vqa_easy/test/questions.json",
        "vqa_easy/test/images/*.png",
        "vqa_daquar/data_train.csv",
        "vqa_daquar/images/*.jpg",
        "bench_text/llm_foundry/arc_easy.jsonl",
        "bench_text/llm_foundry/copa.jsonl",
        "bench_text/piqa/valid.jsonl",
        "bench_text/piqa/valid-labels.lst",
    )

    TEXTS: ClassVar[tuple[str, ...]] = ("novels", "wikitext2", "web_wiki")

    kind: Literal["small_real"] = "small_real"
    root: Annotated[Path, Placement]
    fingerprint: str
    seed: int = 0
    num_questions: Positive = 400

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources that the world has."""
        return (*self.TEXTS, "flickr8k", "emoji", "vqa_easy", "daquar", "flickr_match")

    @property
    def text_names(self) -> tuple[str, ...]:
        """The sources of text alone."""
        return self.TEXTS

    def source_part(self, name: str) -> Any:
        """What a source's bytes follow from: questions are held apart from conversations."""
        return [self.kind, self.fingerprint, self.seed, self.num_questions, name]

    def benchmark_part(self, name: str) -> Any:
        """What a benchmark's bytes follow from."""
        return [self.kind, self.fingerprint, self.seed, self.num_questions]


class PublicFolder(Config):
    """A user's own folder in the public formats (see `docs/data.md` for its layout).

    `fingerprint` is `world_fingerprint(root)`; None: planned before the data is there. More bad
    records than `max_reject_fraction` of a source stop its preparation; fewer are left out, counted
    and listed.
    """

    kind: Literal["folder"] = "folder"
    root: Annotated[Path, Placement]
    fingerprint: WorldFingerprint | None
    max_reject_fraction: Fraction = 0.001
    validation_fraction: Fraction = 0.0

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources that the world has; none where it is only planned."""
        return () if self.fingerprint is None else tuple(self.fingerprint.sources)

    @property
    def text_names(self) -> tuple[str, ...]:
        """The sources of text alone."""
        listed = () if self.fingerprint is None else self.fingerprint.sources.items()
        return tuple(name for name, source in listed if source.kind == "text")

    def source_part(self, name: str) -> Any:
        """What a prepared source follows from: its files, and which records are left out."""
        found = None if self.fingerprint is None else self.fingerprint.sources.get(name)
        return [
            found.digest if found else f"absent {name}",
            self.max_reject_fraction,
            self.validation_fraction,
        ]

    def benchmark_part(self, name: str) -> Any:
        """What a benchmark's bytes follow from; None for one that the world does not hold."""
        return None if self.fingerprint is None else self.fingerprint.benchmarks.get(name)


World = Annotated[PocketWorld | SmallReal | PublicFolder, Field(discriminator="kind")]


class ExpectedSource(Config):
    """What a source is expected to hold, for plans that are made before it is prepared.

    `num_tokens` are text positions, separators included, patches not; `num_targets` those among
    them with a loss.
    """

    name: str
    kind: Kind
    num_examples: Positive
    num_tokens: Positive
    num_targets: Positive
    num_images: Annotated[int, Field(ge=0)] = 0


class TrainedTokenizer(Config):
    """A byte-level BPE trained on `sources` of the world; without any, on all of its text.

    Another caption or conversation then changes no token of the text.
    """

    kind: Literal["trained"] = "trained"
    vocab_size: Positive
    sources: tuple[str, ...] = ()


class TokenizerFile(Config):
    """A `tokenizers` JSON file, known by its sha256.

    begin_of_text: the token that begins each example, before its picture, and each text that the
    model is asked about (Llama's `<s>`); "": none. It must be said of a file whose own rule puts
    one there (`read` says it); None is for files that have no such rule.
    """

    kind: Literal["file"] = "file"
    path: Annotated[Path, Placement]
    sha256: str
    begin_of_text: str | None = None

    @classmethod
    def read(cls, path: Path, begin_of_text: str = OWN_RULE) -> "TokenizerFile":
        """The file as it is now; `begin_of_text` is a token, "rule" (the file's own) or "none".

        Raises FileNotFoundError without the file, ValueError for another file or an unknown token.
        """
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer file {path} does not exist; give its path")
        begins = begin_of_text_named(read_tokenizer(path), begin_of_text, str(path))
        return cls(path=path, sha256=file_sha256(path), begin_of_text=begins)


def read_tokenizer(path: Path) -> "tokenizers.Tokenizer":
    """A `tokenizers` JSON file; ValueError names it if it is none."""
    # Here, since most plans train their tokenizer.
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        is_pointer = path.is_file() and path.read_bytes().startswith(b"version https://git-lfs")
        remedy = "git lfs pull gets the file itself" if is_pointer else "give a tokenizer.json"
        raise ValueError(
            f"{path} is not a tokenizer file of `tokenizers`: {error}; {remedy}"
        ) from None


def add_own_tokens(tokenizer: "tokenizers.Tokenizer") -> str:
    """Give a tokenizer the separator and, where it has none of its own, an end of text; returns
    that."""
    from tokenizers import AddedToken

    held = [token for token in _ENDS_OF_TEXT if tokenizer.token_to_id(token) is not None]
    end_of_text = held[0] if held else END_OF_TEXT
    tokenizer.add_special_tokens(
        [AddedToken(end_of_text, special=True), AddedToken(SEPARATOR, special=True)]
    )
    return end_of_text


@cache
def num_ids(path: Path) -> int:
    """How many ids the data of a tokenizer's file have, those of `add_own_tokens` among them;
    ValueError for another file."""
    tokenizer = read_tokenizer(path)
    add_own_tokens(tokenizer)
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())


def own_begin_of_text(tokenizer: "tokenizers.Tokenizer") -> int | None:
    """The token that a tokenizer's own rule puts before each text (Llama's `<s>`); None for a
    tokenizer without such a rule."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    return int(whole[0]) if plain and whole[1 : 1 + len(plain)] == plain else None


def begin_of_text_named(tokenizer: "tokenizers.Tokenizer", choice: str, name: str) -> str | None:
    """What a choice ("rule", "none" or a token) means for a tokenizer called `name`, as
    `TokenizerFile.begin_of_text` says it.

    Raises ValueError for a token that the tokenizer does not have.
    """
    own = own_begin_of_text(tokenizer)
    if choice == OWN_RULE:
        return None if own is None else str(tokenizer.id_to_token(own))
    if choice == NO_BEGIN:
        return None if own is None else ""
    if tokenizer.token_to_id(choice) is None:
        raise ValueError(
            f"tokenizer {name} has no token {choice!r} to begin texts with; give one of its own, "
            f"{OWN_RULE!r} for its own rule or {NO_BEGIN!r} for none"
        )
    return choice


Tokenizer = Annotated[TrainedTokenizer | TokenizerFile, Field(discriminator="kind")]
