"""Published runs with intermediate checkpoints on the hub: a revision's tokens and rate.

Numbers are the publishers' own, named beside each; what they do not say, or say twice, is None.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from midstream.config import TransformersDecoderConfig
from midstream.study.imported import Position

Steps = int | float
_BILLION = 10**9


@dataclass(frozen=True)
class Run:
    """One published run, or a stage of one.

    `repositories` and `revisions` are patterns of whole names; the group `step` of a revision (of
    the name, for a run that has a repository a checkpoint) counts steps, `billions` are the tokens
    that it names. `tokens_before` were seen before step 0. `rate` is the learning rate at a step,
    `final_step` the one of the branch main.
    """

    family: str
    repositories: str
    revisions: str | None
    tokens_per_step: int | None
    tokens_before: int = 0
    total_tokens: int | None = None
    peak_rate: float | None = None
    end_rate: float | None = None
    rate: Callable[[Steps], float] | None = None
    final_step: int | None = None


@dataclass(frozen=True)
class Known:
    """What is public about one checkpoint; the position's origins name the family."""

    family: str
    position: Position


# -------------------------------------------------------------------------------- the schedules


def _cosine(
    peak: float, end: float, warmup: Steps, total: Steps, *, start: float = 0.0
) -> Callable[[Steps], float]:
    """Linear warm-up from `start`, then half a cosine from peak to end."""

    def rate(step: Steps) -> float:
        if step < warmup:
            return start + (peak - start) * step / warmup
        part = min((step - warmup) / (total - warmup), 1.0)
        return end + (peak - end) * (1 + math.cos(math.pi * part)) / 2

    return rate


def _neox_cosine(peak: float) -> Callable[[Steps], float]:
    # GPT-NeoX before August 2023 (megatron/learning_rates.py up to 3a4af67c; Pythia's README asks
    # for v1.0): the cosine goes towards zero over all steps, its count held at steps - warm-up,
    # and is cut at min_lr, a tenth of the peak.
    steps, warmup = 143_000, 1_430

    def rate(step: Steps) -> float:
        held = min(step, steps - warmup)
        if step <= warmup:
            return peak * held / warmup
        turn = math.pi * (held - warmup) / steps
        return max(peak * (1 + math.cos(turn)) / 2, peak / 10)

    return rate


def _stable(peak: float, warmup: Steps, decay: Steps, total: Steps) -> Callable[[Steps], float]:
    """Linear warm-up from zero, the peak, and from step `decay` on a line down to zero."""

    def rate(step: Steps) -> float:
        return peak * max(0.0, min(step / warmup, 1.0, (total - step) / (total - decay)))

    return rate


# ------------------------------------------------------------------------------------- the runs

_PYTHIA_STEP = 2_097_152
# lr of EleutherAI/pythia models/*/*.yml at sizes where its README states the same and the library
# that trained them is known (14m and 31m came later). For 1b the yml says 2.5e-4, the README 3e-4.
_PYTHIA_PEAKS = {
    **{"70m": 1e-3, "160m": 6e-4, "410m": 3e-4, "1.4b": 2e-4},
    **{"2.8b": 1.6e-4, "6.9b": 1.2e-4, "12b": 1.2e-4},
}
# The cards of PolyPythias (-seed1 to -seed9) say the tokens and the steps, no rate.
_PYTHIA_OTHERS = (
    r"(14m|31m|1b(-deduped)?|(160m|410m|1\.4b)-v0|"
    r"(14m|31m|70m|160m|410m)-seed[1-9]|160m-(data|weight)-seed[1-3])"
)


def _pythia(sizes: str, peak: float | None) -> Run:
    return Run(
        family="Pythia",
        repositories=rf"EleutherAI/pythia-{sizes}",
        revisions=r"step(?P<step>\d+)",
        tokens_per_step=_PYTHIA_STEP,
        total_tokens=143_000 * _PYTHIA_STEP,
        peak_rate=peak,
        end_rate=None if peak is None else peak / 10,
        rate=None if peak is None else _neox_cosine(peak),
        final_step=143_000,
    )


# Steps whose branch serves the weights of the run's end instead of its own (by the files' sha256:
# EleutherAI/pythia issues 205 of 2.8b, 206 of 12b, there the first of three files).
_FINAL_WEIGHTS = {
    "EleutherAI/pythia-2.8b": {
        *(0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        *range(1_000, 65_000, 1_000),
        *(65_000, 70_000, 80_000, 90_000, 100_000, 103_000, 110_000, 120_000, 130_000, 140_000),
    },
    "EleutherAI/pythia-12b": {50_000, 58_000},
}


def holds_final_weights(repository: str, revision: str | None) -> bool:
    """Whether a branch named for a step is publicly known to serve the last one's weights."""
    step = re.fullmatch(r"step(\d+)", revision or "")
    return step is not None and int(step[1]) in _FINAL_WEIGHTS.get(repository, ())


_OLMO_REVISION = r"step(?P<step>\d+)-tokens(?P<billions>\d+)B"
_OLMO2_STAGE1 = rf"(stage1-)?{_OLMO_REVISION}"
_OLMO2_STAGE2 = rf"stage2-ingredient\d+-{_OLMO_REVISION}"


def _olmo2(name: str, per_step: int, last_step: int, peak: float | None) -> Run:
    # allenai/OLMo configs/official-1124 and official-0425, OLMo2-*-stage1.yaml: 8,388,608,000
    # tokens of warm-up from zero, a cosine over 5e12 to a tenth, whether or not the run is as long.
    # Stage 2 of 1B starts at the very rate that this gives after the last step, stage 2 of 7B at
    # one 0.25 % above it. 13B's peak is unknown: its file says 3e-4, its stage 2 starts at 9e-5.
    warmup, total = 8_388_608_000 / per_step, 5 * 10**12 / per_step
    return Run(
        family="OLMo 2",
        repositories=rf"allenai/OLMo-2-{name}",
        revisions=_OLMO2_STAGE1,
        tokens_per_step=per_step,
        total_tokens=last_step * per_step,
        peak_rate=peak,
        end_rate=None if peak is None else peak / 10,
        rate=None if peak is None else _cosine(peak, peak / 10, warmup, total),
    )


def _olmo2_stage2(name: str, per_step: int, last_steps: tuple[int, int], start: float) -> Run:
    # allenai/OLMo configs, OLMo2-*-stage2-*.yaml: from `start` on a line to zero over 50e9 tokens,
    # and on for ten steps (stop_at).
    before = last_steps[0] * per_step
    return Run(
        family="OLMo 2, stage 2",
        repositories=rf"allenai/OLMo-2-{name}",
        revisions=_OLMO2_STAGE2,
        tokens_per_step=per_step,
        tokens_before=before,
        total_tokens=before + last_steps[1] * per_step,
        peak_rate=start,
        end_rate=0.0,
        rate=lambda step: start * max(0.0, 1 - step * per_step / (50 * _BILLION)),
    )


def _smollm2(size: str, per_step: int, peak: float, decay: int, total: int) -> Run:
    # huggingface/smollm text/pretraining/smollm2/config_smollm2_*.yaml: dp x micro_batch_size x
    # sequence_length tokens a step, lr, lr_decay_starting_step, train_steps.
    return Run(
        family="SmolLM2",
        repositories=rf"HuggingFaceTB/SmolLM2-{size}-intermediate-checkpoints",
        revisions=r"step-(?P<step>\d+)",
        tokens_per_step=per_step,
        total_tokens=total * per_step,
        peak_rate=peak,
        end_rate=0.0,
        rate=_stable(peak, 2_000, decay, total),
    )


# Amber counts checkpoints, ckpt_000 to ckpt_359: LLM360/amber-train main.py has 360 chunks of
# 1,706,976 rows, 2,048 tokens long, in 762 steps of 2,240 rows each, 2,000 steps of warm-up.
_AMBER_CHUNK = 1_706_976 * 2_048

RUNS = (
    *(_pythia(rf"{re.escape(size)}(-deduped)?", peak) for size, peak in _PYTHIA_PEAKS.items()),
    _pythia(_PYTHIA_OTHERS, None),
    # allenai/OLMo configs/official-0724/OLMo-1B.yaml: 739,328 steps of 2,048 rows, 2,048 long.
    # 2,000 steps of warm-up, from a tenth of the peak where nothing else is said (olmo/optim.py).
    Run(
        family="OLMo",
        repositories=r"allenai/OLMo-1B(-hf)?",
        revisions=_OLMO_REVISION,
        tokens_per_step=2_048 * 2_048,
        total_tokens=739_328 * 2_048 * 2_048,
        peak_rate=4e-4,
        end_rate=4e-5,
        rate=_cosine(4e-4, 4e-5, 2_000, 739_328, start=4e-5),
    ),
    # Several runs under one kind of name, with changes of schedule on the way: tokens alone.
    Run("OLMo", r"allenai/OLMo-(1B|7B)-.*|allenai/OLMo-7B", _OLMO_REVISION, None),
    _olmo2("0425-1B", 512 * 4_096, 1_907_359, 4e-4),
    _olmo2("1124-7B", 1_024 * 4_096, 928_646, 3e-4),
    _olmo2("1124-13B", 2_048 * 4_096, 596_057, None),
    _olmo2_stage2("0425-1B", 512 * 4_096, (1_907_359, 23_852), 7.4487e-5),
    _olmo2_stage2("1124-7B", 1_024 * 4_096, (928_646, 11_931), 6.1499e-5),
    Run("OLMo 2", r"allenai/OLMo-2-0325-32B", _OLMO2_STAGE1, None),
    # Steps 0 to 37,000; nobody says whether the rates are those of 1B.
    Run("OLMo 2", r"allenai/OLMo-2-0425-1B-early-training", _OLMO2_STAGE1, 512 * 4_096),
    _smollm2("135M", 64 * 8 * 2_048, 3e-3, 1_600_000, 2_000_000),
    _smollm2("360M", 128 * 6 * 2_048, 3e-3, 2_080_000, 2_600_000),
    _smollm2("1.7B", 256 * 4 * 2_048, 5e-4, 4_716_000, 5_240_000),
    # The card of SmolLM3-3B-checkpoints (steps go on through the stages), and huggingface/smollm
    # text/pretraining/smollm3/stage*.yaml. Its later long-context stages count anew: unknown.
    Run(
        family="SmolLM3",
        repositories=r"HuggingFaceTB/SmolLM3-3B-checkpoints",
        revisions=r"stage[123]-step-(?P<step>\d+)",
        tokens_per_step=192 * 3 * 4_096,
        total_tokens=4_720_000 * 192 * 3 * 4_096,
        peak_rate=2e-4,
        end_rate=0.0,
        rate=_stable(2e-4, 2_000, 4_198_001, 4_720_001),
    ),
    # jzhang38/TinyLlama README: 2,048 x 1,024 tokens a step, peak 4e-4, 3 trillion tokens. Its
    # issue 27 is a fault in the schedule that was run, so the rate is unknown.
    Run(
        family="TinyLlama",
        repositories=r"(TinyLlama|PY007)/TinyLlama-1\.1B-(intermediate-)?step-(?P<step>\d+)[kK]-.*",
        revisions=None,
        tokens_per_step=1_000 * 2_048 * 1_024,
        total_tokens=2 * 715_256 * 2_048 * 1_024,
        peak_rate=4e-4,
    ),
    Run(
        family="Amber",
        repositories=r"LLM360/Amber",
        revisions=r"ckpt_(?P<step>\d{3})",
        tokens_per_step=_AMBER_CHUNK,
        tokens_before=_AMBER_CHUNK,
        total_tokens=360 * _AMBER_CHUNK,
        peak_rate=3e-4,
        end_rate=3e-5,
        rate=lambda chunk: _cosine(3e-4, 3e-5, 2_000 / 762, 360)(chunk + 1),
        final_step=359,
    ),
    # The card of the checkpoints: 4,194,304 tokens a step. Annealing starts after an unnamed step.
    Run(
        family="OpenCoder",
        repositories=r"[^/]+/OpenCoder-(1\.5B|8B)-Base-Checkpoints",
        revisions=r"pretrain_iter_(?P<step>\d+)",
        tokens_per_step=4_194_304,
    ),
    Run(
        family="FineWeb ablations",
        repositories=r"HuggingFaceFW/ablation-model-.*",
        revisions=r"step-(?P<step>\d+)-(?P<billions>\d+)BT",
        tokens_per_step=None,
    ),
)

# ---------------------------------------------------------------------------------- the position


def known_checkpoint(name: str, revision: str | None) -> Known | None:
    """What is public about a hub name at a revision; None where the table has nothing.

    Tokens are counted from the step where the revision's own number, in whole billions, agrees;
    else that number is taken and the rate stays unknown.
    """
    for run in RUNS:
        repository = re.fullmatch(run.repositories, name)
        found = None if repository is None else _step(run, repository, revision)
        if found is None:
            continue
        step, billions = found
        tokens, agrees = _tokens(run, step, billions)
        numbers = {
            "tokens_seen": tokens,
            "total_tokens": run.total_tokens,
            "rate": run.rate(step) if run.rate is not None and agrees else None,
            "peak_rate": run.peak_rate,
            "end_rate": run.end_rate,
        }
        origins = {one: "known family" for one, value in numbers.items() if value is not None}
        return Known(run.family, Position.model_validate(numbers | {"origins": origins}))
    return None


def _step(
    run: Run, repository: re.Match[str], revision: str | None
) -> tuple[int, str | None] | None:
    """The step of a checkpoint, and the billions of tokens that its revision names."""
    if run.revisions is None:
        return int(repository["step"]), None
    if revision is None or revision == "main":
        return None if run.final_step is None else (run.final_step, None)
    found = re.fullmatch(run.revisions, revision)
    return None if found is None else (int(found["step"]), found.groupdict().get("billions"))


def _tokens(run: Run, step: int, billions: str | None) -> tuple[int | None, bool]:
    before = run.tokens_before
    named = None if billions is None else int(billions) * _BILLION
    if run.tokens_per_step is None:
        return (None if named is None else before + named), True
    counted = step * run.tokens_per_step
    # The names round up or to the nearest.
    if named is not None and abs(counted - named) > _BILLION:
        return before + named, False
    # TinyLlama names thousands of steps, the last of them rounded up.
    return min(before + counted, run.total_tokens or before + counted), True


def rates_along(name: str) -> tuple[tuple[int, float], ...]:
    """(tokens seen, rate) along a hub name's first run, from its start to its end.

    Nothing for a run whose length or rates are not public. Raises ValueError for an unknown name.
    """
    for run in RUNS:
        if re.fullmatch(run.repositories, name) is None:
            continue
        if run.rate is None or run.total_tokens is None or run.tokens_per_step is None:
            return ()
        steps = run.total_tokens / run.tokens_per_step
        return tuple(
            (round(part * run.total_tokens / 200), run.rate(part * steps / 200))
            for part in range(201)
        )
    raise ValueError(f"no run of {name!r} is known; study/families.py lists those that are")


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


# Five revisions of each, nearest to 20, 40, 60, 80 and 100 % of the run; their tokens and rates
# are in the tables above. Of Pythia's 143,000 steps every thousandth is kept, the last one as main.
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
