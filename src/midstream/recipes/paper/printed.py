"""Scores that the paper prints for models other than those a study trains (Tables 7 and 8)."""

from midstream.study.studies import Published


def _percent(**scores: float) -> dict[str, float]:
    return {name: round(value / 100, 6) for name, value in scores.items()}


_TASKS_7 = (
    "agieval_sat_en",
    "arc_easy",
    "bigbench_conceptual_combinations_multiple_choice",
    "bigbench_cs_algorithms_multiple_choice",
    "copa",
    "hellaswag",
    "mathqa",
    "piqa",
    "pubmedqa",
    "stable.text",
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
TABLE_8 = (
    Published(
        name="paper, 1.4B",
        scores=_percent(
            textvqa=49.05, refcoco=61.29, pope=87.33, gqa=61.11, vqav2=76.82, ocid_ref=40.80
        )
        | {"stable.vision": 0.4608},
        source="paper, Table 8",
    ),
    Published(
        name="Prismatic 7B",
        scores=_percent(
            textvqa=51.78, refcoco=73.62, pope=88.28, gqa=64.16, vqav2=79.05, ocid_ref=50.56
        )
        | {"stable.vision": 0.5125},
        source="Karamcheti et al. 2024, as quoted in the paper's Table 8",
    ),
    Published(
        name="PaliGemma 3B",
        scores=_percent(textvqa=73.2, refcoco=77.9, pope=87.0, gqa=67.0, vqav2=85.6),
        source="Beyer et al. 2024, as quoted in the paper's Table 8; without OCID-Ref",
    ),
)
