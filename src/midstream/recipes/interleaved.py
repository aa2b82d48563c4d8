"""Pictures among text: do documents of several pictures teach more than single ones do?

The paper leaves them to future work (its appendix K); six of the nine recipes of its Table 1 were
trained on them. Beside that: the same tokens of pictures through other connectors.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Literal, Unpack

from midstream.config import (
    AnyEncoderConfig,
    AttentionPool,
    AveragePool,
    FewShot,
    PatchProjection,
    PixelShuffle,
    ProjectorConfig,
    Resampler,
)
from midstream.recipes.pocket import SEVERAL_TASKS
from midstream.recipes.scales import DATACOMP_DR, Model, Scale, Settings, find_scale, line, percent
from midstream.study.studies import Axis, Claim, Figure, Study

# Ours (U): three tenths of the image-text tokens are of pictures and what is said of them.
PICTURES = 0.3
PARTS = (0.0, 0.5, 1.0)
# Rows of the pocket scale hold four questions with their pictures.
SHOTS = (0, 4)
# Benchmarks of several pictures from their official files, at the scales of people's own data.
PUBLISHED = ("nlvr2", "blink", "muirbench", "mantis_eval")
# Interleaved data is said to help few-shot and text, captions zero-shot (G: not read again).
MM1 = "MM1, arXiv 2403.09611"


def share(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: int = 4,
    parts: Sequence[float] = PARTS,
    pictures: float = PICTURES,
    shots: Sequence[int] = SHOTS,
    shrink: float = 1.0,
    **given: Unpack[Settings],
) -> Study:
    """At what share of captions and of documents do models come to compare several pictures?

    `pictures` of the image-text tokens are captions and documents, of which `parts` are documents;
    the rest is text. Each model is asked as it is and, of VQAv2, behind each number of `shots`
    (another line of the same model). Raises ValueError for fewer than two parts, or one outside of
    0 to 1.
    """
    if len(set(parts)) < 2 or not all(0 <= part <= 1 for part in parts):
        raise ValueError(f"parts is {list(parts)}; give two different ones or more from 0 to 1")
    at = _with_documents(find_scale(scale, shrink, **given))
    _check_tokens(at)
    lines = []
    for part, seed in product(parts, seeds or at.seeds):
        model = Model(
            captions=round(pictures * (1 - part), 10),
            interleaved=round(pictures * part, 10),
            epochs=epochs,
            seed=seed,
        )
        for number in (None, *shots):
            asked = at if number is None else _behind(at, number)
            told = "none" if number is None else str(number)
            lines.append(line(asked, model, interleaved=percent(part), shots=told))
    low, high = percent(min(parts)), percent(max(parts))
    several = [task for task in at.asked.visual_tasks if task in (*SEVERAL_TASKS, *PUBLISHED)]
    return Study(
        name=f"interleaved.share.{at.name}",
        question="Do documents with pictures among their text teach to compare several pictures?",
        lines=tuple(lines),
        figure=Figure(
            x="interleaved",
            x_label="documents among captions and documents, in tokens (%)",
            by="shots",
        ),
        claims=(
            *(_claim(f"Documents help {task}", task, high, low) for task in several),
            _claim("Documents help text", "stable.text", high, low),
            _claim("Captions help questions about one picture", "vqav2", low, high),
            *(_claim(f"Documents help with {n} shots", "vqav2", high, low, str(n)) for n in shots),
        ),
        notes=(
            "shots: none asks all benchmarks; behind shots VQAv2 alone is asked, so that curves of "
            "other numbers of shots are of other tasks.",
            f"Captions and documents are {pictures:.0%} of the image-text tokens at every place, "
            "the rest is text; fine-tuning is the same, with conversations about several pictures "
            "among the others.",
            *at.notes,
        ),
    )


def _check_tokens(scale: Scale) -> None:
    if scale.by != "tokens":
        raise ValueError(
            "shares are of tokens here, and rows='paper' makes them of sequences; leave it out"
        )


def _claim(text: str, score: str, higher: float, lower: float, shots: str = "none") -> Claim:
    places: list[dict[str, Axis]] = [
        {"interleaved": part, "shots": shots} for part in (higher, lower)
    ]
    return Claim(text=text, higher=places[0], lower=places[1], score=score, source=MM1)


def _behind(scale: Scale, number: int) -> Scale:
    """The scale asked about single pictures behind so many shots."""
    update = {"visual_tasks": ("vqav2",), "text_tasks": (), "few_shot": FewShot(num_shots=number)}
    return replace(scale, asked=scale.asked.model_copy(update=update))


def connectors(
    scale: str = "pocket",
    seeds: Sequence[int] = (),
    epochs: int = 4,
    vision_tokens: Sequence[float] = (0.025, 0.05),
    by: Literal["tokens", "patches"] = "tokens",
    shrink: float = 1.0,
    **given: Unpack[Settings],
) -> Study:
    """Many pictures in few positions, or few in many? Connectors at equal tokens of pictures.

    `vision_tokens`: the positions of pictures over all image-text tokens; the captions behind them
    come on top, more of them where a picture takes fewer positions. by="patches" counts before the
    connector's reduction: all connectors then see the same examples, in fewer positions. Raises
    ValueError where captions would be more than all, or the scale does not say how long its
    captions are.
    """
    at = find_scale(scale, shrink, **given)
    _check_tokens(at)
    at = replace(at, by=by)
    source = at.captions[DATACOMP_DR].source
    held = next((one for one in at.data.expected if one.name == source), None)
    if held is None or not held.num_images:
        raise ValueError(
            f"scale {scale} as it is asked for does not say what {source!r} holds; leave shrink out"
        )
    text = held.num_tokens / held.num_images
    lines = []
    for (name, projector), tokens, seed in product(
        _connectors(at), vision_tokens, seeds or at.seeds
    ):
        positions = _encoder(at).num_patches
        if by == "tokens":
            positions = projector.num_features(positions)
        captions = round(tokens * (positions + text) / positions, 6)
        if captions > 1:
            raise ValueError(
                f"{tokens:.0%} of all tokens as pictures of {positions} positions need captions of "
                f"{captions:.0%}; lower vision_tokens"
            )
        model = Model(captions=captions, epochs=epochs, seed=seed, projector=projector)
        lines.append(line(at, model, connector=name, vision_tokens=percent(tokens)))
    return Study(
        name=f"interleaved.connectors.{at.name}" + ".patches" * (by == "patches"),
        question=(
            "At equal tokens of pictures: many pictures in few positions, or few in many?"
            if by == "tokens"
            else "The same pictures in fewer positions: what does each connector lose?"
        ),
        lines=tuple(lines),
        figure=Figure(x="connector", x_label="connector", by="vision_tokens"),
        notes=(
            "vision_tokens: positions of pictures over all image-text tokens (%), "
            + (
                "after the connector's reduction. A connector with fewer positions shows more "
                "pictures for them."
                if by == "tokens"
                else "before the connector's reduction: every connector is shown the same examples."
            ),
            *at.notes,
        ),
    )


def _with_documents(scale: Scale) -> Scale:
    """The scale with documents among its sources, and benchmarks of several pictures."""
    made = scale.others.get("interleaved")
    if made is not None:
        return made
    tasks = dict.fromkeys((*scale.asked.visual_tasks, *PUBLISHED))
    asked = scale.asked.model_copy(update={"visual_tasks": tuple(tasks)})
    return replace(scale, asked=asked)


def _encoder(scale: Scale) -> AnyEncoderConfig:
    found = scale.encoders["SigLIP"]
    assert not isinstance(found, PatchProjection), "SigLIP is an encoder"
    return found.encoder


def _connectors(scale: Scale) -> list[tuple[str, ProjectorConfig]]:
    """The paper's own, and those that make fewer features, the same number where they can."""
    encoder = _encoder(scale)
    side = round(encoder.num_patches**0.5)
    window = next(one for one in (3, 2, 4) if side % one == 0)
    heads = next(one for one in (16, 8, 4, 2, 1) if encoder.hidden_size % one == 0)
    latents = max(1, encoder.num_patches // window**2)
    found = {
        "MLP": None,
        "pixel shuffle": PixelShuffle(window=window),
        "average": AveragePool(window=window),
        "attention": AttentionPool(window=window, num_heads=heads),
        "resampler": Resampler(num_latents=latents, num_layers=2, num_heads=heads),
    }
    return [(name, ProjectorConfig(reduction=one)) for name, one in found.items()]
