"""Loss on held-out examples, with their own pictures and with those of other examples.

Which examples, and in which order, follows from the source alone: stages compare. Training goes on
as if nothing had been measured.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from midstream.config import Amount, Amounts, Budget, Machine, Mixture, Share, Training
from midstream.core.batch import IGNORE
from midstream.data.examples import TextCodec
from midstream.data.lengths import SourceLengths
from midstream.data.rows import Images, RowDataset, load_steps, plan_rows, shares_report
from midstream.data.sources import Source
from midstream.model.vlm import VLM
from midstream.order.plan import RowPlan
from midstream.order.stream import Stream
from midstream.train.parallel import Place
from midstream.train.step import NonFiniteError, features_of, placed

# Of each source so many text tokens are read, in an order of this seed; patches do not count, so
# that models with different encoders read the same examples.
HELD_OUT_TOKENS = 2**16
_SEED = 0
# A token that stands for one byte in tokenizers that fall back to bytes.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of one source; `others`: the same rows with other examples' pictures, None
    where there are not two different ones. `token_bytes` are those of `bytes_of_tokens`."""

    rows: RowDataset
    others: RowDataset | None
    token_bytes: Int64[np.ndarray, " vocab"]


# A plan and the source that it is of, by its name.
Planned = tuple[RowPlan, Mapping[str, Source]]


def plan_held_out(
    sources: Mapping[str, Source], training: Training, num_patches: int
) -> list[Planned]:
    """Filled rows of what each source of a stage holds out, up to HELD_OUT_TOKENS of its text.

    Sources that hold nothing out are left out. A picture's caption is of the kind that the stage
    sees, the first synthetic one where that is drawn. What is longer than a row is cut.
    """
    found: list[Planned] = []
    rows = training.rows.model_copy(update={"layout": "filled"})
    for name, seen in training.budget.captions.items():
        source = replace(sources[name], split="validation")
        if not len(source):
            continue
        caption = "synthetic" if seen == "random" else seen
        source.check_caption(caption)
        lengths = SourceLengths(source, 0, caption)
        tokens = min(HELD_OUT_TOKENS, lengths.total)
        budget: Budget = Amounts(amounts=(Amount(source=name, tokens=tokens),))
        if source.kind != "text":
            number = max(1, Stream(lengths, f"{_SEED}/{name}").count_before(2 * tokens))
            share = Share(source=name, share=1.0, caption=caption)
            budget = Mixture(total_tokens=number * rows.row_length, shares=(share,), by="sequences")
        mine = {name: source}
        found.append((plan_rows(mine, num_patches, budget, rows, _SEED, "cut"), mine))
    return found


def held_out_rows(
    plans: Sequence[Planned], images: Sequence[Images], num_patches: int, codec: TextCodec
) -> dict[str, HeldOut]:
    """By source: its held-out rows, with the pictures that its `images` gives."""
    token_bytes = bytes_of_tokens(codec) if plans else np.zeros(0, np.int64)
    found = {}
    for (plan, sources), own in zip(plans, images, strict=True):
        (name,) = plan.names
        others = _others(plan, sources[name])
        rows, other = (
            RowDataset(plan, sources, num_patches, shown)
            for shown in (own, OtherImages(own, others))
        )
        found[name] = HeldOut(rows, other if others else None, token_bytes)
    return found


@dataclass(frozen=True)
class OtherImages:
    """In place of each picture of an example one of another example; of one source.

    `others` are pictures as (example, number among its pictures).
    """

    images: Images
    others: Mapping[tuple[int, int], tuple[int, int]]

    def __call__(self, images: np.ndarray) -> Float[Tensor, "images ..."]:
        """As `Images`."""
        changed = images.copy()
        if len(images):
            changed[:, 1:] = [self.others[example, at] for example, at in images[:, 1:].tolist()]
        return self.images(changed)


def _others(plan: RowPlan, source: Source) -> dict[tuple[int, int], tuple[int, int]]:
    """For each picture the next different one that another example shows first; empty where there
    is none for some."""
    shown: dict[tuple[int, int], bytes] = {}
    for examples in plan.examples_of(0):
        found = source.pictures_of(examples)
        for (example, at), hashed in zip(found.which.tolist(), found.hashes, strict=True):
            shown[example, at] = hashed.tobytes()
    first: dict[bytes, tuple[int, int]] = {}
    for which, picture in shown.items():
        first.setdefault(picture, which)
    pictures = list(first)
    places = {picture: place for place, picture in enumerate(pictures)}
    others = {}
    for which, picture in shown.items():
        behind = range(places[picture] + 1, places[picture] + len(pictures))
        following = (first[pictures[place % len(pictures)]] for place in behind)
        other = next((one for one in following if one[0] != which[0]), None)
        if other is None:
            return {}
        others[which] = other
    return others


def bytes_of_tokens(codec: TextCodec) -> Int64[np.ndarray, " vocab"]:
    """The UTF-8 bytes of each token's text, 0 for special tokens and for ids that no token has.

    A space at a word's head counts where it is part of the token.
    """
    tokenizer, found = codec.tokenizer, np.zeros(codec.size, dtype=np.int64)
    added = tokenizer.get_added_tokens_decoder()
    parts = json.loads(tokenizer.to_str())
    in_bytes = '"ByteLevel"' in json.dumps([parts["pre_tokenizer"], parts["decoder"]])
    # Some decoders write a token otherwise at the beginning of a text.
    anchor = codec.encode("a")
    before = len(codec.decode(anchor).encode())
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            found[number] = 0 if added[number].special else len(token.encode())
        elif in_bytes:
            # One character stands for one byte.
            found[number] = len(token)
        elif _BYTE.fullmatch(token):
            found[number] = 1
        else:
            found[number] = max(0, len(codec.decode([*anchor, number]).encode()) - before)
    return found


def evaluate(
    model: VLM,
    held_out: Mapping[str, HeldOut],
    *,
    encode: Callable[[Tensor], Tensor] | None,
    machine: Machine,
    place: Place,
    at: Callable[[str], None] = lambda doing: None,
) -> dict[str, dict[str, Any]]:
    """By source what `study/results.py` calls a HeldOutResult; on every rank that of all.

    Losses are means over the targets, in nats; `bits_per_byte` is all their loss, that of special
    tokens too, over the bytes of the others. None stands for a mean of nothing, and for other
    pictures where there are none. `encode` is that of `train_step`; `at` hears what is done.
    Raises NonFiniteError with the source.
    """
    was_training = model.training
    model.eval()
    found = {}
    for name, held in held_out.items():
        sums = [
            _measure(model, rows, held.token_bytes, encode, machine, place, at)
            for rows in (held.rows, held.others)
            if rows is not None
        ]
        if not all(math.isfinite(one.nats) for one in sums):
            raise NonFiniteError(f"the held-out loss of {name} is not finite: {sums}")
        found[name] = _result(held.rows, *sums)
    model.train(was_training)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward pass without a backward one leaves the outermost weights gathered.
            module.reshard()
    return found


@dataclass(frozen=True)
class _Sums:
    """Over all ranks: cross-entropy in nats, targets, and the bytes of their texts."""

    nats: float
    targets: int
    bytes: int


@torch.no_grad()
def _measure(
    model: VLM,
    rows: RowDataset,
    token_bytes: Int64[np.ndarray, " vocab"],
    encode: Callable[[Tensor], Tensor] | None,
    machine: Machine,
    place: Place,
    at: Callable[[str], None],
) -> _Sums:
    nats = torch.zeros((), dtype=torch.float64, device=place.device)
    num_targets = num_bytes = 0
    steps = load_steps(
        rows,
        first_row=0,
        micro_rows=machine.micro_batch_rows or rows.plan.rows.batch_rows,
        # So few rows that processes of their own would take longer to start.
        workers=machine.data_workers or 0,
        rank=place.rank,
        world_size=place.world_size,
        device=place.device,
    )
    for micro_batches in steps:
        num_images = place.sum([len(batch.images) for batch in micro_batches])
        for cpu_batch, shown in zip(micro_batches, num_images, strict=True):
            targets = cpu_batch.targets[cpu_batch.targets != IGNORE].numpy()
            num_targets += len(targets)
            num_bytes += int(token_bytes[targets].sum())
            batch, ahead = placed(model, cpu_batch, place)
            with place.autocast():
                features = features_of(model, batch, encode, int(shown))
                nats += model.losses(batch, features, 0.0, ahead)[1]
        at("computing held-out losses")
    sums = place.sum([float(nats), num_targets, num_bytes])
    return _Sums(sums[0], int(sums[1]), int(sums[2]))


def _result(rows: RowDataset, own: _Sums, other: _Sums | None = None) -> dict[str, Any]:
    (shares,) = shares_report(rows.plan, rows.sources, rows.num_patches).values()
    return {
        "loss": own.nats / own.targets if own.targets else None,
        "bits_per_byte": own.nats / math.log(2) / own.bytes if own.bytes else None,
        "loss_other_picture": other.nats / other.targets if other and other.targets else None,
        "num_targets": own.targets,
        "num_examples": shares["examples"],
    }
