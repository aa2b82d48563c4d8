"""Evaluation against batch-1 `generate` and against every ending as a row of its own.

    python benchmarks/evaluate.py --threads 2 --pictures 4

Greedy answers: the same exported model answers the same questions, several a picture, with the
export's own `generate`, one prompt at a time, and with Midstream's batched decoding, which reads a
picture once. Multiple choice: Midstream's decoder scores endings that share a context, against the
plain way of the same decoder: every ending a row with its context, logits at every position.
Continuous outcomes: answers with the log-likelihood of a gold answer of three tokens beside each,
against the answers alone. Both sides live in this process and take turns; the first round is not
counted. A ratio is the median over the rounds of the sides' CPU seconds in the same round. Answers
are compared, and the run ends with 1 where they differ.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from midstream.config import DecoderConfig, EncoderConfig, ProjectorConfig, VLMConfig
from midstream.data.examples import TextCodec, question_ids
from midstream.exchange.export import write_folder
from midstream.model.generate import choice_logprobs, generate, generate_and_score
from midstream.model.read_prompts import Part, Prompt
from midstream.model.vision import build_encoder
from midstream.model.vlm import VLM
from midstream.model.weights import initialise
from midstream.work.open_model import look_through

VOCABULARY = 50_432
# As many words as a prompt of a benchmark has tokens, with the turn around it.
QUESTION_WORDS, NEW_TOKENS = 25, 10
# As many rows at a time as `midstream eval` has where nothing is said.
BATCH_SIZE = 16
CONTEXT, ENDINGS, ENDING = 60, 4, 12
GOLD = [5, 6, 7]


def main() -> int:
    """Print the ratios; 1 where answers differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--questions", type=int, default=4, help="about each picture")
    parser.add_argument("--items", type=int, default=16, help="of multiple choice, a round")
    parser.add_argument("--tower", type=int, default=729, help="patches of a picture")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    vlm, codec, encoder = _model(given.tower)
    table = Table("work", "Midstream, CPU s", "the other way, CPU s", "ratio", "quartiles")
    same = _answers(vlm, codec, encoder, given, table)
    same = _choices(vlm, given, table) and same
    same = _outcomes(vlm, codec, encoder, given, table) and same
    Console().print(table)
    if not same:
        print("answers differ")
    return 0 if same else 1


def _model(patches: int) -> tuple[VLM, TextCodec, Any]:
    """A decoder of 30 million parameters beside its vocabulary, random, and a small tower."""
    side = round(patches**0.5)
    tower = EncoderConfig(
        image_size=14 * side,
        patch_size=14,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
    )
    config = VLMConfig(
        decoder=DecoderConfig(hidden_size=384, num_layers=8, num_heads=6, vocab_size=VOCABULARY),
        encoder=tower,
        projector=ProjectorConfig(num_layers=2),
        attention="segments",
    )
    vlm = VLM(config).eval()
    initialise(vlm, 0)
    encoder = build_encoder(tower).eval()
    initialise(encoder, 1)
    words = {f"w{index}": index for index in range(VOCABULARY - 64)}
    tokenizer = Tokenizer(models.WordLevel({**words, "[UNK]": len(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return vlm, TextCodec(tokenizer), encoder


def _questions(
    vlm: VLM, codec: TextCodec, given: argparse.Namespace
) -> tuple[list[list[int]], torch.Tensor, list[int]]:
    """Prompts, pixels, and which prompt is about which picture."""
    source = torch.Generator().manual_seed(3)
    assert vlm.config.encoder is not None
    size = vlm.config.encoder.image_size
    pixels = torch.randn(given.pictures, 3, size, size, generator=source)
    number = given.pictures * given.questions
    picture_of = [index // given.questions for index in range(number)]
    drawn = torch.randint(0, VOCABULARY - 64, (number, QUESTION_WORDS), generator=source)
    prompts = [
        question_ids(codec, " ".join(f"w{word}" for word in row), has_image=True)
        for row in drawn.tolist()
    ]
    return prompts, pixels, picture_of


def _about(prompts: list[list[int]], picture_of: list[int]) -> list[Prompt]:
    """Each prompt behind its picture."""
    pairs = zip(prompts, picture_of, strict=True)
    return [Prompt(Part((), ((0, picture),)), Part(tuple(ids))) for ids, picture in pairs]


def _answers(
    vlm: VLM, codec: TextCodec, encoder: Any, given: argparse.Namespace, table: Table
) -> bool:
    """Greedy answers to several questions a picture."""
    prompts, pixels, picture_of = _questions(vlm, codec, given)
    number = len(prompts)
    look = look_through(vlm, encoder)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(vlm, codec, encoder, Path(folder))
        exported, token = _load(Path(folder))

        def midstream() -> list[list[int]]:
            return generate(
                vlm,
                _about(prompts, picture_of),
                look(pixels),
                max_new_tokens=NEW_TOKENS,
                stop_ids=frozenset(),
                batch_size=BATCH_SIZE,
            )

        def one_by_one() -> list[list[int]]:
            found = []
            for prompt, picture in zip(prompts, picture_of, strict=True):
                ids = torch.tensor([[token] * given.tower + prompt])
                new = exported.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=pixels[picture][None],
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    eos_token_id=None,
                )
                found.append(new[0, ids.shape[1] :].tolist())
            return found

        return _compare(
            f"{number} answers, {given.questions} a picture",
            midstream,
            one_by_one,
            given.rounds,
            table,
        )


def _load(folder: Path) -> tuple[Any, int]:
    """The exported model, and the id of an image's place."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    token = getattr(config, "image_token_index", None) or config.image_token_id
    return model.eval(), token


@torch.no_grad()
def _choices(vlm: VLM, given: argparse.Namespace, table: Table) -> bool:
    """Multiple choice on text: which of four endings is the likeliest."""
    source = torch.Generator().manual_seed(5)
    contexts = torch.randint(0, VOCABULARY, (given.items, CONTEXT), generator=source).tolist()
    endings = torch.randint(0, VOCABULARY, (given.items, ENDINGS, ENDING), generator=source)

    def midstream() -> list[int]:
        found = choice_logprobs(
            vlm, contexts, None, endings.tolist(), batch_size=given.items, plain=True
        )
        return [max(range(ENDINGS), key=lambda at, own=own: own[at][0]) for own in found]  # type: ignore[misc]

    def every_ending_a_row() -> list[int]:
        chosen = []
        for context, own in zip(contexts, endings, strict=True):
            rows = torch.cat((torch.tensor(context).expand(ENDINGS, -1), own), dim=1)
            places = torch.arange(rows.shape[1]).expand_as(rows)
            hidden = vlm.decoder(vlm.decoder.embed(rows), places, None)
            logits = vlm.decoder.output(hidden).float().log_softmax(dim=-1)
            likely = logits[:, CONTEXT - 1 : -1].gather(2, own[:, :, None])[..., 0].sum(dim=1)
            chosen.append(int(likely.argmax()))
        return chosen

    return _compare(
        f"{given.items} items, {ENDINGS} endings of {ENDING} behind {CONTEXT}",
        midstream,
        every_ending_a_row,
        given.rounds,
        table,
    )


def _outcomes(
    vlm: VLM, codec: TextCodec, encoder: Any, given: argparse.Namespace, table: Table
) -> bool:
    """Answers with what continuous outcomes need beside them, written and chosen."""
    prompts, pixels, picture_of = _questions(vlm, codec, given)
    features = look_through(vlm, encoder)(pixels)
    shown, how = _about(prompts, picture_of), {"batch_size": given.questions}
    same = True
    for name, limit, choices in (("written", NEW_TOKENS, []), ("of two", 0, [[5], [8]])):
        own: dict[str, Any] = how | {"max_new_tokens": limit, "stop_ids": frozenset()}

        def answers(
            asked: list[list[int]], own: dict[str, Any] = own, cut: int = len(choices)
        ) -> list[Any]:
            found = generate_and_score(vlm, shown, features, [asked] * len(prompts), **own)
            return [(tokens, scores[:cut]) for tokens, scores in found]

        same = (
            _compare(
                f"{len(prompts)} answers {name}, with the gold | alone",
                partial(answers, [*choices, GOLD]),
                partial(answers, choices),
                given.rounds,
                table,
            )
            and same
        )
    return same


def _compare(
    name: str, one: Callable[[], Any], other: Callable[[], Any], rounds: int, table: Table
) -> bool:
    """Both sides in turn; one row of the table, and whether they gave the same."""
    times: list[tuple[float, float]] = []
    same = True
    for turn in range(rounds + 1):
        (mine, first), (theirs, second) = _timed(one), _timed(other)
        same = same and first == second
        if turn:
            times.append((mine, theirs))
    ratios = sorted(theirs / mine for mine, theirs in times)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    middle = [statistics.median(column) for column in zip(*times, strict=True)]
    table.add_row(
        name,
        f"{middle[0]:.2f}",
        f"{middle[1]:.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{low:.2f} to {high:.2f}",
    )
    return same


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


if __name__ == "__main__":
    sys.exit(main())
