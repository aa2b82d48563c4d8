"""Public models along whose own checkpoints a study can go: their sizes and revisions.

Five revisions of each, nearest to 20, 40, 60, 80 and 100 % of the run. Tokens and rates at them are
those of `families.py`. Sizes are of the published model: an import adds rows for new tokens where
its embedding has none to spare.
"""

from collections.abc import Mapping
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


def _neox(hidden: int, layers: int, heads: int) -> TransformersDecoderConfig:
    # Biases and two norms a block, both matrices of the vocabulary (modelling file of gpt_neox).
    vocabulary = 50_304
    block = 12 * hidden**2 + 13 * hidden
    return TransformersDecoderConfig(
        model_type="gpt_neox",
        settings={"max_position_embeddings": 2048},
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocabulary,
        num_parameters=2 * vocabulary * hidden + layers * block + 2 * hidden,
        tied_embeddings=False,
    )


def _pythia(size: str, hidden: int, layers: int, heads: int) -> PublicModel:
    # Of 143,000 steps every thousandth is kept; some repositories have the last one as main alone.
    steps = (29_000, 57_000, 86_000, 114_000)
    named: dict[float, str | None] = {
        share: f"step{step}" for share, step in zip(SHARES, steps, strict=False)
    }
    return PublicModel(
        f"EleutherAI/pythia-{size}", _neox(hidden, layers, heads), named | {1.0: None}
    )


def _smollm2(size: str, hidden: int, layers: int, heads: int, kv: int, wide: int) -> PublicModel:
    # The card of 360M: every 160,000 of its 2,600,000 steps.
    vocabulary = 49_152
    block = 2 * hidden**2 + 2 * hidden * hidden * kv // heads + 3 * hidden * wide + 2 * hidden
    decoder = TransformersDecoderConfig(
        model_type="llama",
        settings={"max_position_embeddings": 8192},
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocabulary,
        num_parameters=vocabulary * hidden + layers * block + hidden,
        tied_embeddings=True,
    )
    steps = (480_000, 1_120_000, 1_600_000, 2_080_000, 2_560_000)
    return PublicModel(
        f"HuggingFaceTB/SmolLM2-{size}-intermediate-checkpoints",
        decoder,
        {share: f"step-{step}" for share, step in zip(SHARES, steps, strict=True)},
    )


def _olmo2_1b() -> PublicModel:
    hidden, layers, wide, vocabulary = 2048, 16, 8192, 100_352
    block = 4 * hidden**2 + 3 * hidden * wide + 4 * hidden
    decoder = TransformersDecoderConfig(
        model_type="olmo2",
        settings={"max_position_embeddings": 4096},
        hidden_size=hidden,
        num_layers=layers,
        num_heads=16,
        vocab_size=vocabulary,
        num_parameters=2 * vocabulary * hidden + layers * block + hidden,
        tied_embeddings=False,
    )
    # Stage 1 alone: stage 2 anneals on other data. Names round tokens up (publishers' scripts).
    steps = (
        "380000-tokens797B",
        "760000-tokens1594B",
        "1140000-tokens2391B",
        "1530000-tokens3209B",
        "1907359-tokens4001B",
    )
    return PublicModel(
        "allenai/OLMo-2-0425-1B",
        decoder,
        {share: f"stage1-step{step}" for share, step in zip(SHARES, steps, strict=True)},
    )


PUBLIC_MODELS: Mapping[str, PublicModel] = {
    "pythia-70m": _pythia("70m", 512, 6, 8),
    "pythia-160m": _pythia("160m", 768, 12, 12),
    "pythia-410m": _pythia("410m", 1024, 24, 16),
    "pythia-1.4b": _pythia("1.4b", 2048, 24, 16),
    "smollm2-360m": _smollm2("360M", 960, 32, 15, 5, 2560),
    "olmo2-1b": _olmo2_1b(),
}
