from functools import partial
from pathlib import Path

import pytest

import tiny
from answerers import answering
from midstream.config import VLMConfig
from midstream.data.examples import TextCodec
from midstream.data.images import Encode, encode_fixed
from midstream.data.prepare import open_codec
from midstream.eval.predict import ModelAnswerer
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.study.store import Ledger
from midstream.work.open_model import on_device, open_encoder


@pytest.fixture(scope="module")
def codec(tiny_ledger: Ledger) -> TextCodec:
    return open_codec(tiny_ledger.folder(tiny.TOKENIZER))


@pytest.fixture(scope="module")
def encode(tiny_ledger: Ledger) -> Encode:
    encoder = on_device(open_encoder(tiny_ledger, tiny.ENCODER_STAGE).eval())
    return partial(encode_fixed, encoder, config=tiny.ENCODER)


@pytest.fixture(scope="module")
def answerer(codec: TextCodec, encode: Encode) -> ModelAnswerer:
    """A model that sees and has learnt nothing."""
    model = VLM(VLMConfig(decoder=tiny.DECODER, encoder=tiny.ENCODER))
    initialise(model, 0)
    return answering(model, codec, encode)


@pytest.fixture(scope="module")
def pictures(tiny_ledger: Ledger) -> list[Path]:
    """Six pictures of a benchmark."""
    folder = tiny_ledger.folder(tiny.WORLD) / "world" / "bench" / "vqav2" / "val2014"
    return sorted(folder.glob("*.jpg"))[:6]
