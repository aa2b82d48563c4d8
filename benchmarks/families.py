# ruff: noqa: E402  (the builders of tests/ are found once the path is set)
"""Other people's models behind `TransformersAnswerer`, and asked as the library documents it.

Tiny random checkpoints of each family answer the same questions twice, and a table says whether
every answer is the same. `--write` puts it into docs/evaluation.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "exchange")]

import exported
import test_export_vlm

import peer_checkpoints
from midstream.eval.tasks import Ask
from midstream.eval.transformers_answerer import TransformersAnswerer

DOCUMENT = ROOT / "docs" / "evaluation.md"
MARKS = ("<!-- families -->", "<!-- end of families -->")
PROMPTS = (
    "Is there a cat in the image?",
    "What colour is it?",
    "Is there a red dog in the image? Answer with a single word.",
    "A",
    "What colour is the car in the image? Answer the question with a single word or phrase.",
)
SHAPES = ((64, 48), (40, 90), (32, 32), (96, 30), (64, 64))
CHOICES = ("Yes", "No")
# The exports' tokenizer has other words.
EXPORT_CHOICES = ("red", "ball")
MAX_NEW_TOKENS = 12
COLUMNS = ("family", "one by one", "batches", "batches as one by one", "choices", "texts")
# What text tasks ask: how likely is the continuation of a context.
TEXTS = (
    ("What colour is it?", " red"),
    ("What colour is it?", " blue cat"),
    ("Is there a cat?", " Yes"),
    ("Is there a red dog on the left? Answer:", " no"),
    ("A", " big round ball"),
)


@dataclass
class Side:
    """A processor and a model as the library opens them."""

    processor: Any
    model: Any
    documented: str = "chat"

    def inputs(self, prompts: list[str], pictures: list[Image.Image]) -> Any:
        """The tensors that the library's documentation hands over."""
        if self.documented == "text":
            texts = [f"<image>{prompt}" for prompt in prompts]
            return self.processor(
                text=texts,
                images=[[picture] for picture in pictures],
                padding=True,
                return_tensors="pt",
            )
        messages = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": picture},
                        {"type": "text", "text": prompt},
                    ],
                }
            ]
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        return self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )

    @torch.no_grad()
    def answers(self, prompts: list[str], pictures: list[Image.Image]) -> list[str]:
        """Greedy answers."""
        inputs = self.inputs(prompts, pictures)
        new = self.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = new[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def first_logprobs(self, prompt: str, picture: Image.Image) -> torch.Tensor:
        """Log-probabilities [vocabulary] of the first token of an answer."""
        inputs = self.inputs([prompt], [picture])
        logits: torch.Tensor = self.model(**inputs).logits[0, -1]
        return logits.float().log_softmax(dim=-1)

    @torch.inference_mode()
    def logprob(self, context: str, continuation: str) -> float:
        """Log-probability of a continuation, in one pass over the whole text."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(context + continuation)["input_ids"]
        first = len(tokenizer(context)["input_ids"])
        step = self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)
        return sum(float(step[at - 1, ids[at]]) for at in range(first, len(ids)))


def pictures(folder: Path) -> list[Path]:
    """Bright shapes on noise, no two alike."""
    folder.mkdir()
    source = torch.Generator().manual_seed(3)
    paths = []
    for number, (width, height) in enumerate(SHAPES):
        raster = torch.randint(0, 120, (height, width, 3), generator=source, dtype=torch.uint8)
        raster[: height // 2, : width // 2, number % 3] = 255
        paths.append(folder / f"{number}.png")
        Image.fromarray(raster.numpy()).save(paths[-1])
    return paths


@contextmanager
def without_videos(family: str, folder: Path) -> Iterator[None]:
    """Within it, AutoProcessor gives the folder's own processor without its part for videos."""
    class_name = {"Qwen2-VL": "Qwen2VL", "Qwen2.5-VL": "Qwen2_5_VL"}.get(family, "SmolVLM")
    smol = class_name == "SmolVLM"
    kind = f"{'SmolVLM' if smol else 'Qwen2VL'}ImageProcessorPil"
    parts = {
        "image_processor": getattr(transformers, kind).from_pretrained(folder),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
    }
    text = (folder / "chat_template.jinja").read_text()
    more = {"image_seq_len": 4} if smol else {}
    whole = peer_checkpoints.put_together(f"{class_name}Processor", parts, text, more)
    # SmolVLM's asks it for its settings also where there are no videos.
    whole.video_processor = SimpleNamespace(num_frames=1, fps=1)
    with mock.patch("transformers.AutoProcessor.from_pretrained", return_value=whole):
        yield


def compared(
    folder: Path,
    paths: list[Path],
    *,
    documented: str = "chat",
    trusted: bool = False,
    choices: tuple[str, str] = CHOICES,
) -> list[str]:
    """A row's columns: how many answers of ours are the library's."""
    remote = {"trust_remote_code": trusted}
    kind = transformers.AutoModelForImageTextToText
    theirs = Side(
        transformers.AutoProcessor.from_pretrained(folder, **remote),
        kind.from_pretrained(folder, dtype=torch.float32, **remote).eval(),
        documented,
    )
    theirs.processor.tokenizer.padding_side = "left"
    opened = [Image.open(path).convert("RGB") for path in paths]
    prompts = list(PROMPTS)
    single = [theirs.answers([p], [i])[0] for p, i in zip(prompts, opened, strict=True)]
    if len(set(single)) < 3:
        raise ValueError(f"{folder.name}: its answers hardly differ and compare nothing: {single}")
    ours = TransformersAnswerer(
        str(folder),
        torch.device("cpu"),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=1,
        trust_remote_code=trusted,
    )
    asked = [Ask(*pair, choices) for pair in zip(prompts, paths, strict=True)]
    by_one = [reply.text for reply in ours.reply(asked)]
    ours.batch_size = len(prompts)
    found = ours.reply(asked)
    by_batch = [reply.text for reply in found]
    likelier = []
    for (_, pair, _), prompt, picture in zip(found, prompts, opened, strict=True):
        step = theirs.first_logprobs(prompt, picture)
        ids = [reply_id(ours, prompt, text, documented) for text in choices]
        likelier.append(max(abs(float(step[ids[n]]) - pair[n]) for n in range(len(choices))) < 1e-3)
    pairs = [(by_one, single), (by_batch, theirs.answers(prompts, opened)), (by_batch, by_one)]
    counts = [sum(a == b for a, b in zip(*both, strict=True)) for both in pairs]
    answers = [f"{count} of {len(prompts)}" for count in (*counts, sum(likelier))]
    return [*answers, texts(folder, ours, theirs, trusted)]


def texts(folder: Path, ours: TransformersAnswerer, theirs: Side, trusted: bool) -> str:
    """How many likelihoods of texts are those that lm-evaluation-harness's own `hf` model gives,
    or, where that opens no such model, the library's forward pass (c); "refused" by ours."""
    try:
        harness = HFLM(str(folder), dtype="float32", device="cpu", trust_remote_code=trusted)
    except ValueError:
        expected, mark = [theirs.logprob(*pair) for pair in TEXTS], " (c)"
    else:
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in TEXTS]
        found = harness.loglikelihood(requests, disable_tqdm=True)
        expected, mark = [value for value, _ in found], ""
    try:
        ours.check_texts()
    except ValueError as error:
        print(error, file=sys.stderr)
        return "refused (d)"
    pairs = zip(ours.loglikelihood(TEXTS), expected, strict=True)
    count = sum(abs(value - other) < 1e-3 for (value, _), other in pairs)
    return f"{count} of {len(TEXTS)}{mark}"


def reply_id(ours: TransformersAnswerer, prompt: str, text: str, documented: str) -> int:
    """The token that a published family writes first: with a space where its turn has one."""
    question = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
    head = ours.processor.apply_chat_template(question, add_generation_prompt=True)
    head += "\n" if documented == "text" else ""
    lead = " " if head.endswith(":") or head.endswith("<|separator|>") else ""
    with_reply = ours.tokenizer(head + lead + text, add_special_tokens=False)["input_ids"]
    return int(with_reply[len(ours.tokenizer(head, add_special_tokens=False)["input_ids"])])


def family_rows(folder: Path, paths: list[Path]) -> Iterator[list[str]]:
    """A row for each of the library's families."""
    for family in peer_checkpoints.BUILD:
        place = folder / family.replace(" ", "-")
        peer_checkpoints.build(family, place)
        documented = "text" if family == "PaliGemma" else "chat"
        try:
            TransformersAnswerer(
                str(place), torch.device("cpu"), max_new_tokens=1, batch_size=1
            ).check_pictures()
        except ValueError as error:
            print(f"{family}: {error}", file=sys.stderr)
            with without_videos(family, place):
                yield [f"{family} (a)", *compared(place, paths)]
        else:
            mark = " (b)" if documented == "text" else ""
            yield [family + mark, *compared(place, paths, documented=documented)]


def export_rows(folder: Path, paths: list[Path]) -> Iterator[list[str]]:
    """A row for each form of Midstream's exports."""
    forms = {
        "our export, stock LLaVA": test_export_vlm.STOCK["siglip"],
        "our export, own files": test_export_vlm.OWN["the decoder is OpenLM's"],
    }
    for name, config in forms.items():
        place = folder / name.replace(" ", "-").replace(",", "")
        test_export_vlm.written(place, config, exported.codec())
        yield [name, *compared(place, paths, trusted="own" in name, choices=EXPORT_CHOICES)]


def main() -> None:
    """Print the table; with --write put it into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into the document")
    write = parser.parse_args().write
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        paths = pictures(Path(scratch) / "pictures")
        rows = [*family_rows(Path(scratch), paths), *export_rows(Path(scratch), paths)]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n\n{table}")
    if write:
        text = DOCUMENT.read_text()
        before, rest = text.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        DOCUMENT.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
