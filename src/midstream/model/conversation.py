"""One conversation, token by token, with a cache over its turns."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from midstream.model.generate import AnyCache, id_tensor, new_cache, project_images
from midstream.model.sampling import Sampling, choose
from midstream.model.vlm import VLM


class Conversation:
    """The cache of one conversation, about one image or none; each turn goes on where it ended.

    `features` are the encoder's, `begin` is a token that stands before the image.
    `max_positions` bounds image, turns and replies together.
    Under prefix attention the image and the first turn see each other, as in training.
    """

    def __init__(
        self,
        vlm: VLM,
        features: Float[Tensor, "1 patches width"] | None,
        *,
        max_positions: int,
        begin: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        self.vlm, self.sampling, self.max_positions = vlm, sampling, max_positions
        with torch.no_grad():
            self._image = None if features is None else project_images(vlm, features, begin)
        self._num_patches = 0 if self._image is None else self._image.shape[1]
        self._cache: AnyCache | None = None
        self._num_drawn = 0
        # Turns and replies so far; the cache holds the image and the first of them.
        self.ids: list[int] = []

    @property
    def room(self) -> int:
        """Positions that are left."""
        return self.max_positions - self._num_patches - len(self.ids)

    def reply(
        self, ids: Sequence[int], *, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        """Add a turn; then its reply, token by token, up to a stop id (left out), `max_new_tokens`
        or the end of the room.

        The stop id is not kept either: a later turn begins with what ends a reply in training.
        Leaving the iterator early keeps the reply so far.
        Raises ValueError for an empty turn, or one that leaves no room for a reply.
        """
        if not ids:
            raise ValueError("a turn is empty; start it with the end-of-text token")
        if len(ids) >= self.room:
            raise ValueError(
                f"the turn has {len(ids)} tokens, the conversation has room for {self.room} of "
                f"{self.max_positions}; start a new one"
            )
        self.ids += ids
        return self._tokens(max_new_tokens, stop_ids)

    def _tokens(self, max_new_tokens: int, stop_ids: frozenset[int]) -> Iterator[int]:
        for _ in range(min(max_new_tokens, self.room)):
            token = self._next()
            if token in stop_ids:
                return
            self.ids.append(token)
            yield token

    @torch.no_grad()
    def _next(self) -> int:
        decoder = self.vlm.decoder
        start = 0 if self._cache is None else self._cache.length
        new = self.ids[max(0, start - self._num_patches) :]
        embeddings = decoder.embed(id_tensor([new], self.vlm))
        if self._cache is None:
            if self._image is not None:
                embeddings = torch.cat((self._image, embeddings), dim=1)
            self._cache = new_cache(self.vlm, embeddings, self.max_positions)
        width = embeddings.shape[1]
        position_ids = torch.arange(start, start + width, device=embeddings.device)[None]
        seen = torch.ones(width, start + width, dtype=torch.bool, device=embeddings.device)
        if start > 0 or self.vlm.config.attention != "prefix":
            seen = seen.tril(diagonal=start)
        hidden = decoder(embeddings, position_ids, seen[None, None], self._cache)
        (token,) = choose(decoder.output(hidden[:, -1]), self.sampling, [0], self._num_drawn)
        self._num_drawn += 1
        return token
