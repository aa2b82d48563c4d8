"""Tables 3 to 8, with the numbers that the paper prints.

Table 7's HellaSwag is normalised by length: no model of these sizes has such a plain accuracy.
"""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Unpack

from midstream.recipes.lines import text_only
from midstream.recipes.scales import (
    DATACOMP_DR,
    Model,
    Settings,
    claims_of,
    find_scale,
    image_text_stage,
    line,
    models,
    percent,
    share_label,
    text_baselines,
)
from midstream.study.stages import Evaluate
from midstream.study.studies import Figure, Line, Printed, Published, Study, Table


def _percent(values: tuple[float | None, ...]) -> dict[str, float]:
    rows = zip(TABLE_8_SCORES, values, strict=True)
    return {score: round(value / 100, 6) for score, value in rows if value is not None}


_TASKS_7 = (
    "agieval_sat_en",
    "arc_easy",
    "bigbench_conceptual_combinations_multiple_choice",
    "bigbench_cs_algorithms_multiple_choice",
    "copa",
    "hellaswag:acc_norm",
    "mathqa",
    "piqa",
    "pubmedqa",
    "suite:text, Table 7",
)
TABLE_7 = tuple(
    Published(
        name=name,
        scores=dict(zip(_TASKS_7, (round(value / 100, 6) for value in values), strict=True)),
        source="paper, Table 7",
    )
    for name, values in {
        "paper, fine-tuned": (32.5, 59.3, 27.2, 35.8, 71.0, 58.2, 22.9, 70.5, 35.0, 15.44),
        "paper, image-text": (27.7, 72.3, 30.1, 46.2, 83.0, 66.5, 25.9, 74.4, 38.6, 21.26),
        "paper, text 80%": (19.4, 74.7, 40.8, 44.6, 86.0, 69.2, 26.9, 76.6, 66.2, 25.73),
        "paper, text 100%": (28.2, 77.1, 47.6, 46.7, 92.0, 72.8, 27.3, 79.1, 69.6, 29.67),
        "Llama 3.2 1B": (21.4, 69.5, 27.2, 46.5, 83.0, 65.1, 30.52, 76.0, 65.8, 23.52),
        "Qwen 2.5 1.5B": (63.6, 80.6, 57.3, 56.5, 85.0, 67.78, 40.84, 76.22, 66.6, 35.68),
    }.items()
)
FIVE, SIX = "suite:vision, Table 8", "suite:vision with OCID-Ref, Table 8"
# Rows in the order that the paper prints them.
TABLE_8_SCORES = ("textvqa", "refcoco", "pope", "gqa", "vqav2", "ocid_ref", FIVE, SIX)
_QUOTED = "as quoted in the paper's Table 8"
TABLE_8 = (
    Published(
        name="paper, 1.4B",
        scores=_percent((49.05, 61.29, 87.33, 61.11, 76.82, 40.80, 47.13, 46.08)),
        source="paper, Table 8",
    ),
    Published(
        name="Prismatic 7B",
        scores=_percent((51.78, 73.62, 88.28, 64.16, 79.05, 50.56, 51.38, 51.25)),
        source=f"Karamcheti et al. 2024, {_QUOTED}",
    ),
    Published(
        name="PaliGemma 3B",
        scores=_percent((73.2, 77.9, 87.0, 67.0, 85.6, None, 58.14, None)),
        errors={"textvqa": 0.002, "refcoco": 0.001, "gqa": 0.003, "vqav2": 0.002},
        source=f"Beyer et al. 2024, {_QUOTED}; without OCID-Ref",
    ),
)


def table_3(
    scale: str = "79m",
    seeds: Sequence[int] = (),
    shares: Sequence[float] = (0.05, 0.3, 0.5),
    **given: Unpack[Settings],
) -> Study:
    """Table 3: should the encoder stay frozen?"""
    at = find_scale(scale, **given)
    varied = {"trains_encoder": (False, True), "captions": shares}
    lines = [
        line(
            at, one, image_share=percent(one.captions), frozen="no" if one.trains_encoder else "yes"
        )
        for one in models(at, seeds, epochs=(3,), **varied)
    ]
    printed = {"yes": (0.5871, 0.6022, 0.6085), "no": (0.6855, 0.6942, 0.71)}
    return at.study(
        "table_3",
        "Should the vision encoder stay frozen?",
        lines,
        figure=Figure(x="image_share", x_label=share_label(at), by="frozen"),
        table=Table(
            title="Frozen or trained encoder",
            rows="frozen",
            columns="image_share",
            scores=("vqav2",),
            printed=tuple(
                Printed(at={"frozen": frozen, "image_share": share}, score="vqav2", value=value)
                for frozen, row in printed.items()
                for share, value in zip((5.0, 30.0, 50.0), row, strict=True)
            ),
            source="paper, Table 3 (79M)",
        ),
        claims=claims_of(
            "frozen",
            "paper, appendix H (its text; its printed rows say the opposite)",
            ("vqav2", "A frozen encoder gives better VQAv2 scores than a trained one", "yes", "no"),
        ),
        notes=(
            "The rows that the paper prints as frozen score lower than those it prints as trained, "
            "while its text and caption say the opposite: they may be exchanged.",
        ),
    )


def table_4(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 4: which captions? (80 %, 10 % captions, 4 epochs: recipe facts 9.3)"""
    at = find_scale(scale, **given)
    at = at.others.get("captions", at)
    lines = [
        line(at, one, captions=one.caption_set)
        for one in models(at, seeds, caption_set=tuple(at.captions))
    ]
    printed = {
        "DataComp": (0.4603, 0.1168),
        DATACOMP_DR: (0.4607, 0.1503),
        "CC12M": (0.4556, 0.1298),
        "Shutterstock": (0.4518, 0.1310),
    }
    claims = claims_of(
        "captions",
        "paper, appendix I.1",
        (
            "stable.text",
            "Regenerated captions (DataComp-DR) are better for text than alt texts (DataComp)",
            DATACOMP_DR,
            "DataComp",
        ),
        (
            "stable.vision",
            "Regenerated captions are better for vision than alt texts",
            DATACOMP_DR,
            "DataComp",
        ),
    )
    return at.study(
        "table_4",
        "Which captions should image-text training use?",
        lines,
        figure=Figure(x="captions", x_label="caption data set"),
        table=_stable_table("Caption data set", "captions", printed, at.captions, "Table 4 (1.4B)"),
        claims=claims,
    )


def table_5(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 5: which encoder? (80 %, 10 % captions, 4 epochs: recipe facts 9.3)"""
    at = find_scale(scale, **given)
    lines = [
        line(at, one, encoder=one.encoder) for one in models(at, seeds, encoder=tuple(at.encoders))
    ]
    printed = {
        "SigLIP": (0.4607, 0.1503),
        "SigLIP + DINOv2": (0.4696, 0.1347),
        "patch projection": (0.1564, 0.1503),
    }
    return at.study(
        "table_5",
        "Which vision encoder should a model have?",
        lines,
        figure=Figure(x="encoder", x_label="vision encoder"),
        table=_stable_table("Vision encoder", "encoder", printed, at.encoders, "Table 5 (1.4B)"),
        claims=claims_of(
            "encoder",
            "paper, appendix I.2",
            (
                "stable.vision",
                "A pre-trained encoder gives better vision scores than projected patches",
                "SigLIP",
                "patch projection",
            ),
            (
                "stable.vision",
                "SigLIP with DINOv2 gives better vision scores than SigLIP alone",
                "SigLIP + DINOv2",
                "SigLIP",
            ),
        ),
    )


def table_6(
    scale: str = "1b",
    seeds: Sequence[int] = (7, 365),
    shares: Sequence[float] = (0.01, 0.05, 0.1),
    epochs: Sequence[int] = (1, 2),
    **given: Unpack[Settings],
) -> Study:
    """Table 6: what do seeds change? (20 % of text training; seeds of fine-tuning)"""
    at = find_scale(scale, **given)
    lines = [
        line(at, one, image_share=percent(one.captions), epochs=one.epochs)
        for seed in seeds
        for one in models(at, (seed,), completion=(0.2,), captions=shares, epochs=epochs)
    ]
    # By share of captions, then by epochs.
    places = tuple(product((1.0, 5.0, 10.0), (1, 2)))
    printed = {
        7: (0.7383, 0.7539, 0.7536, 0.7639, 0.7539, 0.765),
        365: (0.7446, 0.759, 0.7539, 0.7647, 0.7555, 0.7658),
    }
    return at.study(
        "table_6",
        "How much do seeds change?",
        lines,
        figure=Figure(x="image_share", x_label=share_label(at), by="epochs"),
        table=Table(
            title="Seeds",
            rows="image_share",
            columns="epochs",
            scores=("vqav2",),
            printed=tuple(
                Printed(
                    at={"seed": seed, "image_share": share, "epochs": number},
                    score="vqav2",
                    value=value,
                )
                for seed, row in printed.items()
                for (share, number), value in zip(places, row, strict=True)
            ),
            source="paper, Table 6 (1.4B)",
        ),
    )


def table_7(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 7: what becomes of text ability from stage to stage of one model?"""
    at = find_scale(scale, **given)
    asked = text_only(at.asked)
    # Its rows have BIG-bench CS algorithms in place of BoolQ.
    tasks = tuple("bigbench_cs_algorithms_multiple_choice" if task == "boolq" else task
                  for task in asked.text_tasks)  # fmt: skip
    asked = asked.model_copy(update={"text_tasks": tasks})
    lines: list[Line] = []
    for seed in seeds or at.seeds:
        model = Model(seed=seed)
        stages = {
            "fine-tuned": line(at, model).result.of,
            "image-text": image_text_stage(at, model),
        }
        lines += [
            Line(
                name=f"{name}, seed {seed}",
                axes={"stage": name, "seed": seed},
                result=Evaluate(of=stage, evaluation=asked),
            )
            for name, stage in stages.items()
        ]
    bases = {
        name.replace("text only,", "text"): result.model_copy(update={"evaluation": asked})
        for name, result in text_baselines(at, (0.8, 1.0)).items()
    }
    # The metric that the paper's numbers are of.
    shown = tuple("hellaswag:acc_norm" if task == "hellaswag" else task for task in tasks)
    return at.study(
        "table_7",
        "What becomes of a model's text ability from stage to stage?",
        lines,
        figure=Figure(x="stage", x_label="stage of one model"),
        table=Table(
            title="Text tasks by stage",
            rows="scores",
            columns="stage",
            scores=(*shown, "stable.text", "suite:text, Table 7"),
            published=TABLE_7,
            source="paper, Table 7 (1.4B)",
        ),
        claims=claims_of(
            "stage",
            "paper, Table 7",
            ("stable.text", "Fine-tuning costs text", "image-text", "fine-tuned"),
        ),
        baselines=bases,
    )


def table_8(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 8: the paper's model beside published ones, whose numbers are quoted."""
    at = find_scale(scale, **given)
    further = [task for task in at.asked.visual_tasks if task not in TABLE_8_SCORES]
    return at.study(
        "table_8",
        "How does a model of this recipe compare with published ones?",
        [line(at, Model(seed=seed), model="ours") for seed in seeds or at.seeds],
        figure=Figure(x="model", x_label="model"),
        table=Table(
            title="Beside published models",
            rows="scores",
            columns="model",
            scores=(*TABLE_8_SCORES, *further),
            published=TABLE_8,
            source="paper, Table 8",
        ),
        notes=(
            "The stable scores are those of the published sets of tasks; VizWiz is in neither.",
        ),
    )


def _stable_table(
    title: str,
    axis: str,
    printed: dict[str, tuple[float, float]],
    here: Collection[str],
    source: str,
) -> Table:
    return Table(
        title=title,
        rows=axis,
        scores=("stable.vision", "stable.text"),
        printed=tuple(
            Printed(at={axis: name}, score=score, value=value)
            for name, values in printed.items()
            if name in here
            for score, value in zip(("stable.vision", "stable.text"), values, strict=True)
        ),
        source=f"paper, {source}",
    )
