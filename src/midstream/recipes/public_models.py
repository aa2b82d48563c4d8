"""Public models along whose checkpoints a study goes, by their names as scales."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from midstream.config import TransformersDecoderConfig
from midstream.study.families import known_checkpoint
from midstream.study.imported import Position

SHARES = (0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class PublicModel:
    """A repository of the hub, its sizes, and by share of its run the revision to import.

    None as a revision is the branch main.
    """

    repository: str
    decoder: TransformersDecoderConfig
    revisions: Mapping[float, str | None]

    def position(self, share: float) -> Position:
        """Tokens and rates at a share's revision, as published."""
        known = known_checkpoint(self.repository, self.revisions[share])
        assert known is not None, f"{self.repository} is in the table of families"
        return known.position

    def source(self, share: float) -> str:
        """What `midstream import` is given: the repository and its revision."""
        revision = self.revisions[share]
        return self.repository if revision is None else f"{self.repository} --revision {revision}"


# model_type, hidden size, layers, heads, vocabulary, positions, parameters, whether tied; as
# published: an import adds rows for new tokens where the embedding has none to spare.
_DECODERS: Mapping[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "EleutherAI/pythia-70m": ("gpt_neox", 512, 6, 8, 50_304, 2048, 70_426_624, False),
    "EleutherAI/pythia-160m": ("gpt_neox", 768, 12, 12, 50_304, 2048, 162_322_944, False),
    "EleutherAI/pythia-410m": ("gpt_neox", 1024, 24, 16, 50_304, 2048, 405_334_016, False),
    "EleutherAI/pythia-1.4b": ("gpt_neox", 2048, 24, 16, 50_304, 2048, 1_414_647_808, False),
    "HuggingFaceTB/SmolLM2-360M-intermediate-checkpoints": (
        *("llama", 960, 32, 15, 49_152, 8192, 361_821_120, True),
    ),
    "allenai/OLMo-2-0425-1B": ("olmo2", 2048, 16, 16, 100_352, 4096, 1_484_916_736, False),
}


def _public(repository: str, revisions: Sequence[str | None]) -> PublicModel:
    kind, hidden, layers, heads, vocabulary, positions, parameters, tied = _DECODERS[repository]
    decoder = TransformersDecoderConfig(
        model_type=kind,
        settings={"max_position_embeddings": positions},
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocabulary,
        num_parameters=parameters,
        tied_embeddings=tied,
    )
    return PublicModel(repository, decoder, dict(zip(SHARES, revisions, strict=True)))


# Five revisions of each, nearest to 20, 40, 60, 80 and 100 % of the run; their tokens and rates are
# in `study/families.py`. Of Pythia's 143,000 steps every thousandth is kept, the last one as main.
_PYTHIA_STEPS = (*(f"step{step}" for step in (29_000, 57_000, 86_000, 114_000)), None)
PUBLIC_MODELS: Mapping[str, PublicModel] = {
    **{
        f"pythia-{size}": _public(f"EleutherAI/pythia-{size}", _PYTHIA_STEPS)
        for size in ("70m", "160m", "410m", "1.4b")
    },
    # The card: every 160,000 of its 2,600,000 steps.
    "smollm2-360m": _public(
        "HuggingFaceTB/SmolLM2-360M-intermediate-checkpoints",
        [f"step-{step}" for step in (480_000, 1_120_000, 1_600_000, 2_080_000, 2_560_000)],
    ),
    # Stage 1 alone: stage 2 anneals on other data. Names round tokens up (publishers' scripts).
    "olmo2-1b": _public(
        "allenai/OLMo-2-0425-1B",
        [
            f"stage1-step{step}B"
            for step in (
                "380000-tokens797",
                "760000-tokens1594",
                "1140000-tokens2391",
                "1530000-tokens3209",
                "1907359-tokens4001",
            )
        ],
    ),
}
