"""The text run of each size of the paper, or its checkpoints: tokens, schedule, rates.

K, I and U as in `paper_scale.py`.
"""

from pathlib import Path

from midstream.config import DECODERS, AdamW, Mixture, Rows, Share, Training, WarmupCosine
from midstream.recipes.line import END_RATE
from midstream.recipes.paper_sources import imported
from midstream.recipes.scale import COMPLETIONS, TextMixture
from midstream.schedule import rate_at
from midstream.study.stage import LoadDecoder, Prepare, Pretrain

# K: OpenLM's batches of 512 sequences of 2,048 (run records; Table 2: 256).
_TEXT_ROWS = Rows(row_length=2048, batch_rows=512, layout="joined")
# K: text run of 1.4B and its peak; multiplier 150 (x 20) of 79M. I: the same for the other sizes.
_TEXT_TOKENS = {"1b": 4_319_385_600_000}
_TEXT_MULTIPLE = 3000
_TEXT_PEAK = {"1b": 1e-2}
_TEXT_DECAY = {"1b": 0.01}
# K at 1b (records of the hero run), and at 411m (411m_1x.json); I: the others as that.
_TEXT_Z_LOSS = {"1b": 1e-6}
_TEXT_WARMUP_STEPS = {"1b": 5000, "154m": 1000, "411m": 2500}
# K: rates of the records at 20, 40, 60 and 80 % of the text runs; at 100 % their end.
_RATES = {
    name: dict(zip(COMPLETIONS, (*rates, END_RATE), strict=True))
    for name, rates in {
        "154m": (
            0.0027302113853274333,
            0.002032983979588796,
            0.001150377107417605,
            0.000388134179188036,
        ),
        "411m": (
            0.0027314818349182604,
            0.002010618392029235,
            0.0011054291676185495,
            0.0003519129789093403,
        ),
        "1b": (
            0.009080349589287376,
            0.006499974971416897,
            0.0034466737184832607,
            0.0009788970261355868,
        ),
    }.items()
}


def text_run(name: str, data: Prepare, mixture: TextMixture) -> Pretrain:
    """The text run, with weights kept where image-text training may start."""
    return Pretrain(
        data=data,
        decoder=DECODERS[name],
        milestones=COMPLETIONS,
        training=Training(
            budget=Mixture(
                total_tokens=_text_tokens(name),
                shares=tuple(Share(source=source, share=share) for source, share in mixture),
                max_epochs=2,
            ),
            rows=_TEXT_ROWS,
            optimizer=AdamW(
                weight_decay=_TEXT_DECAY.get(name, 0.033), z_loss=_TEXT_Z_LOSS.get(name, 1e-4)
            ),
            schedule=_text_schedule(name),
        ),
    )


def checkpoints(name: str, data: Prepare, inputs: Path | None) -> dict[float, LoadDecoder]:
    """The run's imported checkpoints by their share of its tokens; planned where absent."""
    known = _RATES.get(name, {})
    return {
        share: LoadDecoder(
            data=data,
            checkpoint=imported(
                inputs,
                "checkpoints",
                f"{share * 100:.0f}",
                "TRI-ML/DCLM-1B" if (name, share) == ("1b", 1.0) else "",
            ),
            decoder=DECODERS[name],
            planned_rate=known.get(share, _text_rate(name, share)),
            planned_tokens=round(share * _text_tokens(name)),
            planned_total_tokens=_text_tokens(name),
        )
        for share in COMPLETIONS
    }


def _text_tokens(name: str) -> int:
    return _TEXT_TOKENS.get(name, _TEXT_MULTIPLE * DECODERS[name].num_parameters)


def _text_schedule(name: str) -> WarmupCosine:
    steps = _text_tokens(name) / (_TEXT_ROWS.row_length * _TEXT_ROWS.batch_rows)
    return WarmupCosine(
        peak_rate=_TEXT_PEAK.get(name, 3e-3),
        end_rate=END_RATE,
        warmup_fraction=_TEXT_WARMUP_STEPS.get(name, 400) / steps,
    )


def _text_rate(name: str, share: float) -> float:
    total = _text_tokens(name)
    return rate_at(_text_schedule(name), round(share * total), total)


def rates_along(name: str) -> tuple[tuple[int, float], ...]:
    """The text run's rate at some of its tokens, the end of its warm-up among them."""
    shares = {_text_schedule(name).warmup_fraction, *(part / 100 for part in range(101))}
    return tuple(
        (round(share * _text_tokens(name)), _text_rate(name, share)) for share in sorted(shares)
    )
