"""The tensors of a sharded model dealt out over its ranks, each gathered whole on one of them."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from midstream.model.weights import shard_of, shard_rows
from midstream.train.parallel import Place

# A file holds about so many bytes at most: several are written, and hashed, at a time.
FILE_BYTES = 2**31


def deal(tensors: Mapping[str, Tensor], world_size: int) -> list[list[str]]:
    """The names in each file, large tensors first, each into the file with the fewest bytes so far;
    file i is rank i % world_size's."""
    sizes = {name: value.numel() * value.element_size() for name, value in tensors.items()}
    files = world_size * max(1, math.ceil(sum(sizes.values()) / (world_size * FILE_BYTES)))
    load, names = [0] * files, [list[str]() for _ in range(files)]
    for name in sorted(sizes, key=lambda one: -sizes[one]):
        at = load.index(min(load))
        names[at].append(name)
        load[at] += sizes[name]
    return names


def gathered(
    tensors: Mapping[str, Tensor], files: list[list[str]], place: Place
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors one by one, each on the rank of its file alone; all ranks go to the end.

    The parts of a sharded tensor travel once. Beside it a rank holds the parts of one more.
    """
    if place.mesh is None:
        yield from ((name, tensors[name].detach()) for names in files for name in names)
        return
    # Each copy of the model gathers what its own ranks write.
    group = place.mesh.get_group(place.mesh.ndim - 1)
    members = dist.get_process_group_ranks(group)
    me = members.index(place.rank)
    queues = [chain.from_iterable(files[rank :: place.world_size]) for rank in members]
    for names in zip_longest(*queues):
        wanted = [None if name is None else tensors[name].detach() for name in names]
        received, name = _exchange(wanted, me, group), names[me]
        if name is not None and received is not None:
            yield name, received


def _exchange(wanted: list[Tensor | None], me: int, group: dist.ProcessGroup) -> Tensor | None:
    """What this rank of the group wants, whole; `wanted` is what each of them does."""
    mine = wanted[me]
    if not any(isinstance(value, DTensor) for value in wanted):
        return mine
    parts, sizes = [], [0] * len(wanted)
    for value in wanted:
        part = value.to_local() if isinstance(value, DTensor) else torch.empty(0)
        parts.append(part.contiguous().reshape(-1).view(torch.uint8))
    if isinstance(mine, DTensor):
        row = mine.element_size() * mine.shape[1:].numel()
        number, _ = shard_of(mine)
        cuts = [shard_rows(mine.shape[0], number, index) for index in range(number)]
        sizes = [(cut.stop - cut.start) * row for cut in cuts]
    device = next(value.device for value in wanted if value is not None)
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    sent = torch.cat([part.to(device) for part in parts])
    dist.all_to_all_single(whole, sent, sizes, [len(part) for part in parts], group=group)
    return whole.view(mine.dtype).view(mine.shape) if isinstance(mine, DTensor) else mine
