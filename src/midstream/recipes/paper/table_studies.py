"""Tables 3 to 8, with the numbers that the paper prints."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Unpack

from midstream.recipes.models import Model, image_text_stage, line, text_baselines, text_only
from midstream.recipes.paper.common import share_label
from midstream.recipes.paper.printed import TABLE_7, TABLE_8, TABLE_8_SCORES
from midstream.recipes.scales import DATACOMP_DR, Settings, find_scale
from midstream.study.stage import Evaluate
from midstream.study.studies import Claim, Figure, Line, Printed, Study, Table


def table_3(
    scale: str = "79m",
    seeds: Sequence[int] = (),
    shares: Sequence[float] = (0.05, 0.3, 0.5),
    **given: Unpack[Settings],
) -> Study:
    """Table 3: should the encoder stay frozen?"""
    at = find_scale(scale, **given)
    trained = {"yes": False, "no": True}
    lines = [
        line(
            at,
            Model(captions=share, epochs=3, seed=seed, trains_encoder=trained[frozen]),
            image_share=round(100 * share, 10),
            frozen=frozen,
        )
        for frozen, share, seed in product(trained, shares, seeds or at.seeds)
    ]
    printed = {
        "yes": {5.0: 0.5871, 30.0: 0.6022, 50.0: 0.6085},
        "no": {5.0: 0.6855, 30.0: 0.6942, 50.0: 0.71},
    }
    return Study(
        name=f"paper.table_3.{at.name}",
        question="Should the vision encoder stay frozen?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label=share_label(at), by="frozen"),
        table=Table(
            title="Frozen or trained encoder",
            rows="frozen",
            columns="image_share",
            scores=("vqav2",),
            printed=tuple(
                Printed(at={"frozen": frozen, "image_share": share}, score="vqav2", value=value)
                for frozen, row in printed.items()
                for share, value in row.items()
            ),
            source="paper, Table 3 (79M)",
        ),
        claims=(
            Claim(
                text="A frozen encoder gives better VQAv2 scores than a trained one",
                score="vqav2",
                higher={"frozen": "yes"},
                lower={"frozen": "no"},
                source="paper, appendix H (its text; its printed rows say the opposite)",
            ),
        ),
        notes=(
            "The rows that the paper prints as frozen score lower than those it prints as trained, "
            "while its text and caption say the opposite: they may be exchanged.",
            *at.notes,
        ),
        text_rates=at.text_rates,
    )


def table_4(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 4: which captions? (80 %, 10 % captions, 4 epochs: recipe facts 9.3)"""
    at = find_scale(scale, **given)
    at = at.others.get("captions", at)
    lines = [
        line(at, Model(caption_set=name, seed=seed), captions=name)
        for name, seed in product(at.captions, seeds or at.seeds)
    ]
    printed = {
        "DataComp": (0.4603, 0.1168),
        DATACOMP_DR: (0.4607, 0.1503),
        "CC12M": (0.4556, 0.1298),
        "Shutterstock": (0.4518, 0.1310),
    }
    claims = (
        Claim(
            text="Regenerated captions (DataComp-DR) are better for text than alt texts (DataComp)",
            score="stable.text",
            higher={"captions": DATACOMP_DR},
            lower={"captions": "DataComp"},
            source="paper, appendix I.1",
        ),
        Claim(
            text="Regenerated captions are better for vision than alt texts",
            higher={"captions": DATACOMP_DR},
            lower={"captions": "DataComp"},
            source="paper, appendix I.1",
        ),
    )
    return Study(
        name=f"paper.table_4.{at.name}",
        question="Which captions should image-text training use?",
        lines=tuple(lines),
        figure=Figure(x="captions", x_label="caption data set"),
        table=_stable_table("Caption data set", "captions", printed, at.captions, "Table 4 (1.4B)"),
        claims=claims,
        notes=at.notes,
        text_rates=at.text_rates,
    )


def table_5(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 5: which encoder? (80 %, 10 % captions, 4 epochs: recipe facts 9.3)"""
    at = find_scale(scale, **given)
    lines = [
        line(at, Model(encoder=name, seed=seed), encoder=name)
        for name, seed in product(at.encoders, seeds or at.seeds)
    ]
    printed = {
        "SigLIP": (0.4607, 0.1503),
        "SigLIP + DINOv2": (0.4696, 0.1347),
        "patch projection": (0.1564, 0.1503),
    }
    return Study(
        name=f"paper.table_5.{at.name}",
        question="Which vision encoder should a model have?",
        lines=tuple(lines),
        figure=Figure(x="encoder", x_label="vision encoder"),
        table=_stable_table("Vision encoder", "encoder", printed, at.encoders, "Table 5 (1.4B)"),
        claims=(
            Claim(
                text="A pre-trained encoder gives better vision scores than projected patches",
                higher={"encoder": "SigLIP"},
                lower={"encoder": "patch projection"},
                source="paper, appendix I.2",
            ),
            Claim(
                text="SigLIP with DINOv2 gives better vision scores than SigLIP alone",
                higher={"encoder": "SigLIP + DINOv2"},
                lower={"encoder": "SigLIP"},
                source="paper, appendix I.2",
            ),
        ),
        notes=at.notes,
        text_rates=at.text_rates,
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
        line(
            at,
            Model(completion=0.2, captions=share, epochs=number, seed=seed),
            image_share=round(100 * share, 10),
            epochs=number,
        )
        for seed, share, number in product(seeds, shares, epochs)
    ]
    printed = {
        7: {(1, 1): 0.7383, (1, 2): 0.7539, (5, 1): 0.7536, (5, 2): 0.7639, (10, 1): 0.7539}
        | {(10, 2): 0.765},
        365: {(1, 1): 0.7446, (1, 2): 0.759, (5, 1): 0.7539, (5, 2): 0.7647, (10, 1): 0.7555}
        | {(10, 2): 0.7658},
    }
    return Study(
        name=f"paper.table_6.{at.name}",
        question="How much do seeds change?",
        lines=tuple(lines),
        figure=Figure(x="image_share", x_label=share_label(at), by="epochs"),
        table=Table(
            title="Seeds",
            rows="image_share",
            columns="epochs",
            scores=("vqav2",),
            printed=tuple(
                Printed(
                    at={"seed": seed, "image_share": float(share), "epochs": number},
                    score="vqav2",
                    value=value,
                )
                for seed, row in printed.items()
                for (share, number), value in row.items()
            ),
            source="paper, Table 6 (1.4B)",
        ),
        notes=at.notes,
        text_rates=at.text_rates,
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
    return Study(
        name=f"paper.table_7.{at.name}",
        question="What becomes of a model's text ability from stage to stage?",
        lines=tuple(lines),
        figure=Figure(x="stage", x_label="stage of one model"),
        table=Table(
            title="Text tasks by stage",
            rows="scores",
            columns="stage",
            scores=(*shown, "stable.text", "suite:text, Table 7"),
            published=TABLE_7,
            source="paper, Table 7 (1.4B)",
        ),
        claims=(
            Claim(
                text="Fine-tuning costs text",
                score="stable.text",
                higher={"stage": "image-text"},
                lower={"stage": "fine-tuned"},
                source="paper, Table 7",
            ),
        ),
        baselines=bases,
        notes=at.notes,
        text_rates=at.text_rates,
    )


def table_8(scale: str = "1b", seeds: Sequence[int] = (), **given: Unpack[Settings]) -> Study:
    """Table 8: the paper's model beside published ones, whose numbers are quoted."""
    at = find_scale(scale, **given)
    further = [task for task in at.asked.visual_tasks if task not in TABLE_8_SCORES]
    return Study(
        name=f"paper.table_8.{at.name}",
        question="How does a model of this recipe compare with published ones?",
        lines=tuple(line(at, Model(seed=seed), model="ours") for seed in seeds or at.seeds),
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
            *at.notes,
        ),
        text_rates=at.text_rates,
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
