"""Answers of a model: batched greedy generation and log-likelihoods from text and pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from midstream.config import AnyEncoderConfig
from midstream.data.examples import TextCodec, question_ids
from midstream.data.features import FILL_BATCH, Encode
from midstream.data.images import decode_pixels
from midstream.model.generate import generate, sequence_logprobs
from midstream.model.vlm import VLM
from midstream.model.weights import weights_digest


class ModelAnswerer:
    """A model behind the `eval.task.Answerer` protocol; questions are asked as in fine-tuning.

    `encode` gives features as the model's projector takes them, each picture's whatever stands
    beside it (`OpenedModel.encode`); pixels are those of `encoder`. None for a model that sees
    nothing.
    """

    def __init__(
        self,
        model: VLM,
        codec: TextCodec,
        *,
        encode: Encode | None,
        encoder: AnyEncoderConfig | None,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self.model, self.codec = model.eval(), codec
        self.encode, self.encoder = encode, encoder
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.weights_digest = weights_digest(model)
        self._features: dict[Path, np.ndarray] = {}

    def generate(self, prompts: Sequence[str], images: Sequence[Path | None]) -> list[str]:
        """Greedy replies up to a separator, end-of-text or agent-stop, special tokens left out.

        Prompts with a picture and prompts without are answered in batches of their own; a picture
        is encoded once. Raises ValueError for a picture given to a model without an encoder.
        """
        replies = [""] * len(prompts)
        for shown in (True, False):
            chosen = [i for i, image in enumerate(images) if (image is not None) is shown]
            if not chosen:
                continue
            paths = sorted({path for i in chosen if (path := images[i]) is not None})
            number = {path: index for index, path in enumerate(paths)}
            found = generate(
                self.model,
                [question_ids(self.codec, prompts[i], has_image=shown) for i in chosen],
                self._look(paths) if shown else None,
                image_of=[number[path] for i in chosen if (path := images[i])] if shown else None,
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.codec.stop_ids,
                batch_size=self.batch_size,
            )
            for i, ids in zip(chosen, found, strict=True):
                replies[i] = self.codec.decode(ids).strip()
        return replies

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): summed log-probability, and whether it is greedy.

        An empty context is the end-of-text token, as lm-evaluation-harness has it.
        """
        sequences, starts = [], []
        for context, continuation in pairs:
            # Trailing spaces of the context belong to the continuation's first token.
            trimmed = context.rstrip()
            tail = context[len(trimmed) :] + continuation
            head = self.codec.encode(trimmed) or [self.codec.end_of_text]
            sequences.append(head + self.codec.encode(tail))
            starts.append(len(head))
        return sequence_logprobs(self.model, sequences, starts, batch_size=self.batch_size)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The summed log-probability of each text, after an end-of-text token."""
        sequences = [[self.codec.end_of_text, *self.codec.encode(text)] for text in texts]
        starts = [1] * len(sequences)
        found = sequence_logprobs(self.model, sequences, starts, batch_size=self.batch_size)
        return [total for total, _ in found]

    def _look(self, paths: Sequence[Path]) -> torch.Tensor:
        if self.encode is None or self.encoder is None:
            raise ValueError(f"this model has no encoder and cannot see {paths[0]}")
        new = [path for path in paths if path not in self._features]
        for low in range(0, len(new), FILL_BATCH):
            part = new[low : low + FILL_BATCH]
            pixels = [
                decode_pixels(path.read_bytes(), str(path), self.encoder.transform) for path in part
            ]
            features = self.encode(torch.from_numpy(np.stack(pixels))).float().cpu().numpy()
            self._features.update(zip(part, features, strict=True))
        return torch.from_numpy(np.stack([self._features[path] for path in paths]))
