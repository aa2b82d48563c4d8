"""The paper's data as sources: captions, texts and their shares, what plans expect of them, and
where they and imported models lie.

K, I and U as in `paper_scale.py`.
"""

from collections.abc import Mapping
from pathlib import Path

from midstream.config import Caption, ExpectedSource, PublicFolder, TokenizerFile
from midstream.identity import WorldFingerprint, world_fingerprint
from midstream.recipes.scale import DATACOMP_DR, CaptionSet, TextMixture
from midstream.study.imported import as_imported
from midstream.study.stage import PLANNED, Imported, Prepare

# One source's name, or shares by source.
TextGiven = str | Mapping[str, float | int] | None
# K: DCLM-baseline, StarCoder and ProofPile in the text run, MathPile in the image-text stage
# (paper, 2.1.1 and 2.1.2; its appendix A names DCLM alone). I: 3.8T and 0.3T tokens put one behind
# the other (run records), so that DCLM is 92 %. U: how the rest is divided; about as the public
# sizes of StarCoder (250B tokens) and ProofPile-2 (55B) are.
_DCLM, _CODE, _MATHS = 0.92, 0.065, 0.015
TEXT_RUN: TextMixture = (("dclm", _DCLM), ("starcoder", _CODE), ("proofpile", _MATHS))
IMAGE_TEXT: TextMixture = (("dclm", _DCLM), ("starcoder", _CODE), ("mathpile", _MATHS))
PRIVATE = "Shutterstock"
# K: tokens of the text run's data as the records tokenised it.
_TEXT_TOKENS = 4_172_903_282_931


def caption_sets(datacomp_dr: Caption) -> dict[str, CaptionSet]:
    """The caption sets of Table 4 by their names there.

    DataComp-DR has five synthetic captions a picture and no text of its own (K); which of them the
    paper saw is U. The others have the texts that their pictures came with (I).
    """
    return {
        "DataComp": CaptionSet("datacomp"),
        DATACOMP_DR: CaptionSet("datacompdr", datacomp_dr),
        "CC12M": CaptionSet("cc12m"),
        PRIVATE: CaptionSet("shutterstock"),
    }


def text_mixture_of(given: TextGiven) -> TextMixture | None:
    """A user's text mixture; None where there is none.

    Raises ValueError for shares that are not positive or do not add up to 1.
    """
    if not given:
        return None
    shares = {given: 1.0} if isinstance(given, str) else dict(given)
    if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(
            f"text_mixture's shares are above 0 and add up to 1, these are {shares} and add up to "
            f"{sum(shares.values()):g}"
        )
    return tuple((source, float(share)) for source, share in shares.items())


def _text(name: str, examples: int, tokens: int) -> ExpectedSource:
    return ExpectedSource(
        name=name, kind="text", num_examples=examples, num_tokens=tokens, num_targets=tokens
    )


# K: numbers of pictures (DataComp-1B and its DR, CC12M as on the hub, LLaVA's without text-only
# conversations) and of all text tokens. I: tokens by text source, from the shares. U: documents of
# a text source, MathPile's 9.5B tokens, caption length (30 tokens with its separators), text of a
# conversation (the 295 positions that 729 patches leave of 1,024, 120 of them answers).
# Shutterstock is private: as many as CC12M.
EXPECTED = (
    _text("dclm", 2_950_000_000, round(_DCLM * _TEXT_TOKENS)),
    _text("starcoder", 207_000_000, round(_CODE * _TEXT_TOKENS)),
    _text("proofpile", 22_000_000, round(_MATHS * _TEXT_TOKENS)),
    _text("mathpile", 900_000, 9_500_000_000),
    *(
        ExpectedSource(
            name=name,
            kind="caption",
            num_examples=number,
            num_images=number,
            num_tokens=30 * number,
            num_targets=29 * number,
        )
        for name, number in (
            ("datacompdr", 1_280_000_000),
            ("datacomp", 1_280_000_000),
            ("cc12m", 10_970_000),
            ("shutterstock", 10_970_000),
        )
    ),
    ExpectedSource(
        name="llava",
        kind="instruct",
        num_examples=624_610,
        num_images=624_610,
        num_tokens=295 * 624_610,
        num_targets=120 * 624_610,
    ),
)


def world(inputs: Path | None, tokenizer: Path | None) -> Prepare:
    """The world of `inputs`, in the tokens of its own tokenizer.json or of another file.

    Raises FileNotFoundError where `inputs` is given and the tokenizer is not there.
    """
    root = Path("data") if inputs is None else inputs / "data"
    path = tokenizer or root / "tokenizer.json"
    fingerprint: WorldFingerprint | None = None
    tokenizer_file = TokenizerFile(path=path, sha256=PLANNED)
    if inputs is not None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; `inputs` is the folder of recipes/scales.py, its world "
                "has the tokenizer's file beside its sources"
            )
        fingerprint, tokenizer_file = world_fingerprint(root), TokenizerFile.read(path)
    return Prepare(
        world=PublicFolder(root=root, fingerprint=fingerprint),
        tokenizer=tokenizer_file,
        expected=EXPECTED,
    )


def imported(inputs: Path | None, part: str, name: str, source: str) -> Imported:
    """A folder of `midstream import` under `inputs`; planned where it is not there.

    A study that does not use a checkpoint or an encoder can be run without its folder. `source` is
    what an import makes it of; empty: nothing public.
    """
    folder = Path(part) / name if inputs is None else inputs / part / name
    if inputs is None or not folder.is_dir():
        return Imported(folder=folder, content=f"{PLANNED} {part}/{name}", source=source)
    return as_imported(folder).model_copy(update={"source": source})
