"""Reading rows and pictures: Midstream's prepared sources against `webdataset` over the same data.

Five comparisons, seconds of CPU time in one process, both sides in turns, medians of the rounds:

tokens   rows of 2,048 tokens in shuffled order, from OpenLM's tokenised shards (tar members, each
         a gzipped or plain JSON list of 2,049 ids; a shuffle buffer of 1,000) and from the source
         that was prepared from the same ids
records  picture bytes and caption, from a WebDataset tar and from the source over that tar
rows     whole image rows: decoded, letterboxed, normalised pixels and the caption's ids, by
         webdataset, Pillow and `tokenizers`, and by Midstream's dataset
prepared captions and pictures made ready to train on, every picture decoded once: webdataset reads
         them, Pillow decodes, img2dataset's way of writing (webdataset's TarWriter) copies them;
         Midstream's preparation, which tokenises as well and leaves pictures where they are
shards   the ids and the picture bytes of an example in random order, from a source of one shard and
         archive and from one of `--shards`, of as many examples of 50 kB

Pictures are generated unless `--tars` names WebDataset shards of your own.
"""

import argparse
import gzip
import io
import json
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image as Pillow
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from midstream.config import Epochs, ImageTransform, Rows
from midstream.data.examples import TextCodec, caption_example
from midstream.data.formats.read_captions import caption_units, read_captions
from midstream.data.formats.records import CaptionRecord, ReadOptions
from midstream.data.images import LiveImages
from midstream.data.prepare_source import plan_source
from midstream.data.rows import RowDataset, plan_rows
from midstream.data.shards import make_shard
from midstream.data.source_writer import Image, ShardWriter, finish_source
from midstream.data.sources import Source
from midstream.recipes.paper_scale import SIGLIP

CHUNK = 2049
NOTHING = torch.zeros((0, 0, 0))
SHARD_EXAMPLES = 4


def seconds_each(sides: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """CPU seconds an item of each side: the median of the rounds, which the sides take in turns."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, read in sides.items():
            before = time.process_time()
            number = read()
            found[name].append((time.process_time() - before) / number)
    return {name: statistics.median(times) for name, times in found.items()}


def say(what: str, times: dict[str, float]) -> None:
    """One line a side and the ratio of the first to each other one."""
    ours = times.pop("midstream")
    print(f"{what}\n  midstream{'':<37} {1 / ours:>12,.0f} a CPU second")
    for name, each in times.items():
        print(f"  {name:<46} {1 / each:>12,.0f} a CPU second   ratio {each / ours:.1f}")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member from bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tokens(folder: Path, chunks: int, rounds: int) -> None:
    """Rows of token ids."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 50_000, (chunks, CHUNK))
    shards = {name: folder / f"{name}.tar" for name in ("json.gz", "json")}
    for name, path in shards.items():
        with tarfile.open(path, "w") as tar:
            for number, chunk in enumerate(ids.tolist()):
                data = json.dumps(chunk).encode()
                add(tar, f"{number:012d}.{name}", gzip.compress(data) if "gz" in name else data)
    writer = ShardWriter(
        folder / "ids" / "shards" / "000000", kind="text", dtype="<u2", input_name="ids"
    )
    for number, chunk in enumerate(ids):
        writer.add(chunk, np.ones(CHUNK), name="", content=str(number).encode())
    writer.close()
    finish_source(folder / "ids", tokenizer_digest="", vocab_size=50_000, root="")
    source = {"ids": Source("ids", folder / "ids")}
    rows = Rows(row_length=CHUNK - 1, batch_rows=1, layout="joined")
    plan = plan_rows(source, 0, Epochs(sources=("ids",), epochs=1), rows, 0)
    dataset = RowDataset(plan, source, 0, no_images)

    def ours() -> int:
        for index in range(len(dataset)):
            row, _ = dataset[index]
            torch.from_numpy(row.input_ids), torch.from_numpy(row.targets)
        return len(dataset)

    def theirs(key: str) -> int:
        number = 0
        dataset = webdataset.WebDataset(str(shards[key]), shardshuffle=False)
        for sample in dataset.shuffle(1000, initial=1000).decode():
            chunk = torch.tensor(sample[key])
            _ = chunk[:-1], chunk[1:]
            number += 1
        return number

    peers = {f"webdataset, {key} (as OpenLM)": partial(theirs, key) for key in shards}
    say("token rows of 2,048", seconds_each({"midstream": ours, **peers}, rounds))


def no_images(images: np.ndarray) -> torch.Tensor:
    """What a text row shows."""
    return NOTHING


def photograph(random: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG with smooth areas, edges and some grain, of a photograph's size in bytes."""
    small = random.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    picture = Pillow.fromarray(small).resize(size, Pillow.Resampling.BICUBIC)
    grain = random.normal(0, 6, (size[1], size[0], 3))
    noisy = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Pillow.fromarray(noisy).save(stream, "JPEG", quality=85)
    return stream.getvalue()


def write_pictures(path: Path, number: int) -> None:
    """A tar as img2dataset writes it."""
    random = np.random.default_rng(0)
    words = ["a", "small", "red", "boat", "near", "the", "bridge", "with", "two", "people"]
    with tarfile.open(path, "w") as tar:
        for sample in range(number):
            size = [(512, 384), (512, 341), (384, 512), (512, 512)][sample % 4]
            caption = " ".join(random.choice(words, 12))
            add(tar, f"{sample:09d}.jpg", photograph(random, size))
            add(tar, f"{sample:09d}.txt", caption.encode())
            add(tar, f"{sample:09d}.json", json.dumps({"caption": caption}).encode())


def small_codec() -> TextCodec:
    """A byte-level BPE, so that no file is needed."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["a small red boat near the old bridge with two people"], trainer)
    return TextCodec(bpe)


def index(tars: list[Path], folder: Path, codec: TextCodec) -> Source:
    """The prepared source over these tars; the picture bytes stay where they are."""
    writer = ShardWriter(
        folder / "shards" / "000000", kind="caption", dtype="<u2", input_name="tars"
    )
    options = ReadOptions()
    for unit in caption_units([str(path) for path in tars], options):
        for record in read_captions(unit, options):
            if isinstance(record, CaptionRecord):
                example = caption_example(codec, codec.encode(record.caption))
                place = Image(record.picture.file, record.picture.offset, len(record.picture.data))
                writer.add(
                    example.input_ids,
                    example.supervised,
                    name=record.where,
                    content=record.picture.data,
                    image=place,
                )
    writer.close()
    finish_source(folder, tokenizer_digest="", vocab_size=codec.size, root="/")
    return Source("pictures", folder)


def samples(tars: list[Path], decode: bool) -> Iterator[dict[str, Any]]:
    """What webdataset reads."""
    found = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False)
    yield from found.decode("pil") if decode else found


def records(source: Source, tars: list[Path], rounds: int) -> None:
    """Encoded pictures and captions, before decoding."""
    order = np.random.default_rng(0).permutation(len(source)).tolist()

    def ours() -> int:
        for example in order:
            source.image_bytes(example)
            source.input_ids(example)
        return len(order)

    def theirs() -> int:
        return sum(len(sample["jpg"]) > 0 for sample in samples(tars, decode=False))

    say(
        "picture bytes and caption (midstream: random order, content hash checked)",
        seconds_each({"midstream": ours, "webdataset": theirs}, rounds),
    )


def preparing(tars: list[Path], folder: Path, codec: TextCodec, rounds: int) -> None:
    """Tars of pictures with captions to what training reads, one process."""
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(codec.tokenizer.to_str())

    def ours() -> int:
        out = folder / "made"
        shutil.rmtree(out, ignore_errors=True)
        plan = plan_source(
            "captions",
            [str(path) for path in tars],
            out,
            tokenizer_file=tokenizer,
            options=ReadOptions(),
            root="/",
            validation_fraction=0.0,
        )
        plan.job.shards.mkdir(parents=True)
        for item in plan.wanted:
            make_shard(plan.job, TextCodec.from_file(tokenizer), item, lambda *counts: True)
        made = finish_source(out, tokenizer_digest="", vocab_size=codec.size, root="/")
        return int(made["train"]["examples"])

    def theirs() -> int:
        number = 0
        with webdataset.TarWriter(str(folder / "theirs.tar")) as writer:
            for sample in samples(tars, decode=False):
                with Pillow.open(io.BytesIO(sample["jpg"])) as picture:
                    picture.convert("RGB")
                writer.write({key: sample[key] for key in ("__key__", "jpg", "txt", "json")})
                number += 1
        return number

    say(
        "captions prepared, every picture decoded",
        seconds_each({"midstream": ours, "webdataset, Pillow, its writer": theirs}, rounds),
    )


def image_rows(source: Source, tars: list[Path], codec: TextCodec, rounds: int) -> None:
    """Whole image rows."""
    rows = Rows(row_length=1024, batch_rows=1, layout="padded")
    sources = {"pictures": source}
    budget = Epochs(sources=("pictures",), epochs=1)
    plan = plan_rows(sources, SIGLIP.num_patches, budget, rows, 0)
    images = LiveImages(sources, plan.names, SIGLIP)
    dataset = RowDataset(plan, sources, SIGLIP.num_patches, images)
    transform = SIGLIP.transform

    def ours() -> int:
        for row in range(len(dataset)):
            dataset[row]
        return len(dataset)

    def theirs(pixels_of: Callable[[Pillow.Image, ImageTransform], torch.Tensor]) -> int:
        number = 0
        for sample in samples(tars, decode=True):
            pixels_of(sample["jpg"], transform)
            encoded = codec.tokenizer.encode(sample["txt"])
            ids = torch.zeros(1024, dtype=torch.int64)
            targets = torch.full((1024,), -100)
            ids[729 : 729 + len(encoded.ids)] = torch.tensor(encoded.ids)
            targets[729 : 729 + len(encoded.ids)] = ids[729 : 729 + len(encoded.ids)]
            number += 1
        return number

    say(
        "whole image rows, 3x384x384",
        seconds_each(
            {
                "midstream": ours,
                "webdataset, Pillow padding first, tokenizers": partial(theirs, padded_first),
                "webdataset, Pillow padding last, tokenizers": partial(theirs, padded_last),
            },
            rounds,
        ),
    )


def padded_first(picture: Pillow.Image, transform: ImageTransform) -> torch.Tensor:
    """Letterboxed as Prismatic does it, the picture that Midstream gives; normalised."""
    picture = picture.convert("RGB")
    side = max(picture.size)
    square = Pillow.new("RGB", (side, side), (127, 127, 127))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    size = (transform.size, transform.size)
    return normalised(square.resize(size, Pillow.Resampling.BICUBIC))


def padded_last(picture: Pillow.Image, transform: ImageTransform) -> torch.Tensor:
    """Letterboxed by resizing first, which is cheaper and has other borders; normalised."""
    picture = picture.convert("RGB")
    scale = transform.size / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    square = Pillow.new("RGB", (transform.size, transform.size), (127, 127, 127))
    corner = ((transform.size - size[0]) // 2, (transform.size - size[1]) // 2)
    square.paste(picture.resize(size, Pillow.Resampling.BICUBIC), corner)
    return normalised(square)


def normalised(square: Pillow.Image) -> torch.Tensor:
    """From -1 to 1, channels first."""
    pixels = np.asarray(square, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def sharded(folder: Path, shards: int, total: int) -> Source:
    """A source of so many shards, each with an archive of its own, of bytes by chance."""
    random, ids, size, each = np.random.default_rng(0), np.arange(20), 50_000, total // shards
    (folder / "archives").mkdir(parents=True)
    for number in range(shards):
        data = random.bytes(512 + each * size)
        (folder / f"archives/{number}").write_bytes(data)
        path = folder / "s/shards" / f"{number:06d}"
        writer = ShardWriter(path, kind="caption", dtype="<u2", input_name=str(number))
        for start in range(512, len(data), size):
            place = Image(f"archives/{number}", start, size)
            content = data[start : start + size]
            writer.add(ids, np.ones(20), name=str(start), content=content, image=place)
        writer.close()
    finish_source(folder / "s", tokenizer_digest="", vocab_size=50_000, root=str(folder))
    return Source("s", folder / "s")


def many_shards(folder: Path, shards: int, rounds: int) -> None:
    """A random read of one shard and of many; each round has an order of its own.

    A shard holds a few examples: of one, its archive would be so small a file that the kernel keeps
    it in smaller pieces of memory than those of the large one, which no real shard's is.
    """
    random, total = np.random.default_rng(0), SHARD_EXAMPLES * shards
    sources = {n: sharded(folder / str(n), n, total) for n in (1, shards)}

    def read(source: Source) -> int:
        for example in random.permutation(total).tolist():
            source.input_ids(example)
            source.image_bytes(example)
        return total

    sides = {str(n): partial(read, source) for n, source in sources.items()}
    seconds_each(sides, 1)  # opens what stays open
    times = seconds_each(sides, rounds)
    one, many = times["1"] * 1e6, times[str(shards)] * 1e6
    print(
        f"ids and picture bytes of a random example of {total:,}\n  one shard{one:45.1f} us\n"
        f"  {shards:,} shards{many:40.1f} us   ratio {many / one:.2f}; "
        f"{len(list(Path('/proc/self/fd').iterdir())):,} files open"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1500, help="token chunks")
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--tars", type=Path, nargs="+", help="WebDataset shards with JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=500, help="of the last comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens(folder, options.chunks, options.rounds)
        tars = options.tars or [folder / "000000000.tar"]
        if not options.tars:
            write_pictures(tars[0], options.pictures)
        codec = small_codec()
        source = index([path.resolve() for path in tars], folder / "pictures", codec)
        each = sum(len(source.image_bytes(k)) for k in range(len(source))) / len(source)
        print(f"{len(source):,} pictures of {each / 1000:.0f} kB")
        records(source, tars, options.rounds)
        preparing(tars, folder, codec, max(1, options.rounds // 2))
        image_rows(source, tars, codec, max(1, options.rounds // 2))
        many_shards(folder / "many", options.shards, options.rounds)


if __name__ == "__main__":
    main()
