"""Pictures and text for an exported Midstream model."""

from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs


class MidstreamProcessor(ProcessorMixin):  # type: ignore[misc]  # transformers is not typed
    """Fits pictures to the encoder's square, and repeats `image_token` once a patch of each."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 729,
        image_token: str = "<image>",
        chat_template: Any = None,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`input_ids`, `attention_mask` and, with pictures, `pixel_values`.

        `images` are what `image_processing_midstream.opened` takes, in the order in which the
        texts name them by `image_token`, nested or not; `kwargs` are those of every processor of
        transformers. Raises ValueError if their number is not that of the marks.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        given = self._merge_kwargs(
            ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )["text_kwargs"]
        given.pop("return_mm_token_type_ids", None)
        tensors = given.pop("return_tensors", None)
        data: dict[str, Any] = {}
        pictures = [] if images is None else self.image_processor(images)["pixel_values"]
        marks = sum(one.count(self.image_token) for one in texts)
        if text is not None and marks != len(pictures):
            raise ValueError(f"{len(pictures)} pictures were given, the texts name {marks}")
        if texts:
            places = self.image_token * self.num_image_tokens
            if tensors is not None and len(texts) > 1:
                given.setdefault("padding", True)
            # A conversation's tokenizer output stays nested, as that of a list of texts.
            data |= self.tokenizer(
                [one.replace(self.image_token, places) for one in texts], **given
            )
        if len(pictures):
            data["pixel_values"] = np.stack(pictures)
        return BatchFeature(data, tensor_type=tensors)
