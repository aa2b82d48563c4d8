"""A model's vocabulary: which tokens are added, and rows for them in the embeddings.

Old rows stay as they are. A new row, of the input and of the output matrix alike, is the mean of
the old ones: its logit is then the mean of the old logits, and as the exponential is convex the new
token is at most as likely as one of all tokens drawn at random, whatever the model has read. A row
of zeros could be the most likely of all, and a random one would need a seed. As an input it lies
where the others do. Adam's moments of a new row are zero.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from midstream.data.examples import TextCodec


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embeddings before and after, the tokens that came in, and the tokenizer.

    `rows_after` is at least `rows_before` and covers every id. Without a tokenizer `codec` is None.
    `behind` are the tokenizer's own tokens that the model had no rows for.
    """

    rows_before: int
    rows_after: int
    added: tuple[tuple[str, int], ...] = ()
    codec: TextCodec | None = None
    behind: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What stands in import.json."""
        return {
            "rows_before": self.rows_before,
            "rows_after": self.rows_after,
            "added": [{"token": token, "id": number} for token, number in self.added],
        }


def plan_vocabulary(
    tokenizer: Tokenizer | None, rows: int, *, add_tokens: Sequence[str], multiple: int
) -> Vocabulary:
    """Add Midstream's special tokens and `add_tokens` to a model's tokenizer, which is changed.

    Rows that the model has to spare are used first; then rows become a multiple of `multiple`, and
    never fewer. Special tokens behind the model's last row (a pad token that was added to the
    tokenizer alone) get rows as new ones do. Raises ValueError if the tokenizer has other ids that
    the model has no rows for (it is another model's), if there is none to add tokens to, or if a
    token to add is empty.
    """
    if tokenizer is None:
        if add_tokens:
            raise ValueError(
                f"there is no tokenizer to add {', '.join(add_tokens)} to; give --tokenizer"
            )
        return Vocabulary(rows, _padded(rows, multiple))
    before = tokenizer.get_vocab(with_added_tokens=True)
    ids = 1 + max(before.values(), default=-1)
    special = {
        number for number, one in tokenizer.get_added_tokens_decoder().items() if one.special
    }
    behind = {token for token, number in before.items() if number >= rows}
    if any(before[token] not in special for token in behind):
        raise ValueError(
            f"the tokenizer has ids up to {ids - 1:,}, the model's embedding {rows:,} rows: it is "
            "another model's tokenizer; give the model's own with --tokenizer"
        )
    empty = [token for token in add_tokens if not token.strip()]
    if empty:
        raise ValueError(f"{empty[0]!r} is no token to add; give its text, such as <|agent_stop|>")
    codec = TextCodec(tokenizer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in add_tokens])
    after = tokenizer.get_vocab(with_added_tokens=True)
    added = sorted(
        (number, token) for token, number in after.items() if token not in before or token in behind
    )
    return Vocabulary(
        rows_before=rows,
        rows_after=_padded(max(rows, codec.size), multiple),
        added=tuple((token, number) for number, token in added),
        codec=codec,
        behind=tuple(sorted(behind)),
    )


def without_token(tokenizer: Tokenizer, number: int) -> Tokenizer:
    """A tokenizer that lacks one added token."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if one["id"] != number]
    return Tokenizer.from_str(json.dumps(content))


def with_mean_rows(value: Shaped[Tensor, "rows *more"], rows: int) -> Tensor:
    """A tensor of `rows` rows: the old ones bit-equal, then their mean, in the tensor's dtype."""
    mean = value.mean(dim=0, dtype=torch.float64, keepdim=True).to(value.dtype)
    return torch.cat([value, mean.expand(rows - len(value), *value.shape[1:])])


def with_zero_rows(value: Shaped[Tensor, "rows *more"], rows: int) -> Tensor:
    """A tensor of `rows` rows: the old ones bit-equal, then zeros."""
    return torch.cat([value, value.new_zeros((rows - len(value), *value.shape[1:]))])


def resize(
    tensors: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None, rows: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Weights and Adam's moments (`exp_avg.<name>`) with more rows where `rows` says how many.

    Of the names of a tied weight, those that `tensors` lacks are passed over.
    """
    grown = dict(tensors)
    carried = None if moments is None else dict(moments)
    for name, number in rows.items():
        if name not in tensors:
            continue
        grown[name] = with_mean_rows(tensors[name], number)
        for key in ("exp_avg", "exp_avg_sq"):
            if carried is not None:
                carried[f"{key}.{name}"] = with_zero_rows(carried[f"{key}.{name}"], number)
    return grown, carried


def _padded(rows: int, multiple: int) -> int:
    return multiple * -(-rows // multiple)
