"""Models of `transformers` behind the `Answerer` protocol: exported folders, and other people's.

Prompts go through the model's own processor and chat template. An answer may depend in its last
bits on what stands beside it: only Midstream's own models are asked in batches of fixed shape.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from midstream.identity import file_sha256
from midstream.source_files import is_hidden, is_note


class TransformersAnswerer:
    """A vision-language model of the image-text-to-text auto class, or a causal language model.

    name: a folder, or a name on the hub. Raises ValueError for a model without a chat template
    when it is asked about pictures, OSError where `transformers` finds no model.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        max_new_tokens: int,
        batch_size: int,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoConfig

        self.name, self.device = name, device
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        trusted = {"trust_remote_code": trust_remote_code}
        self.config = AutoConfig.from_pretrained(name, **trusted)
        self.processor, self.tokenizer, self.model = self._open(trusted)
        self.model = self.model.to(device).eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.weights_digest = _digest(Path(name), self.config, self.model.dtype)

    def _open(self, trusted: dict[str, bool]) -> tuple[Any, Any, Any]:
        import transformers

        options = {**trusted, "dtype": torch.float32 if self.device.type == "cpu" else "auto"}
        sees = getattr(self.config, "vision_config", None) is not None or _maps_pictures(
            self.config
        )
        if not sees:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.name, **trusted)
            model = transformers.AutoModelForCausalLM.from_pretrained(self.name, **options)
            return None, tokenizer, model
        processor = transformers.AutoProcessor.from_pretrained(self.name, **trusted)
        model = transformers.AutoModelForImageTextToText.from_pretrained(self.name, **options)
        return processor, processor.tokenizer, model

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], images: Sequence[Path | None]) -> list[str]:
        """Greedy answers, one a prompt; see `eval.task.Answerer`."""
        replies: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = self._inputs(prompts[part], images[part])
            found = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=self.max_new_tokens
            )
            new = found[:, inputs["input_ids"].shape[1] :]
            replies += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [reply.strip() for reply in replies]

    @torch.no_grad()
    def choose(
        self,
        prompts: Sequence[str],
        images: Sequence[Path | None],
        choices: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Log-probabilities of fixed replies; see `eval.task.Answerer`."""
        results = []
        for prompt, image, own in zip(prompts, images, choices, strict=True):
            inputs = self._inputs([prompt], [image])
            head = inputs.pop("input_ids")
            inputs.pop("attention_mask", None)
            whole = [self._reply(head[0], text) for text in own]
            firsts = {ids[0] for ids in whole}
            replies = [ids[:1] for ids in whole] if len(firsts) == len(whole) else whole
            row = []
            for ids in replies:
                tail = torch.tensor([ids], device=self.device)
                logits = self.model(input_ids=torch.cat((head, tail), dim=1), **inputs).logits
                row.append(_logprob(logits[0, -len(ids) - 1 : -1], tail[0])[0])
            results.append(row)
        return results

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of continuations of plain texts, by lm-evaluation-harness's `hf` model."""
        return self._asked("loglikelihood", pairs)

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of whole texts, by lm-evaluation-harness's `hf` model."""
        return self._asked("loglikelihood_rolling", [(text,) for text in texts])

    def generate_until(
        self, contexts: Sequence[str], stops: Sequence[Sequence[str]], max_new_tokens: Sequence[int]
    ) -> list[str]:
        """Greedy continuations of plain texts, by lm-evaluation-harness's `hf` model.

        Raises ValueError for as many new tokens as the model holds in all.
        """
        longest, room = max(max_new_tokens, default=0), self._harness_model.max_length
        if longest >= room:
            raise ValueError(
                f"{self.name} holds {room:,} tokens and is asked for {longest:,} new ones; leave "
                "tasks with written answers out"
            )
        settings = [
            {"until": list(own), "max_gen_toks": limit, "do_sample": False}
            for own, limit in zip(stops, max_new_tokens, strict=True)
        ]
        return self._asked("generate_until", list(zip(contexts, settings, strict=True)))

    @cached_property
    def _harness_model(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            backend="causal",
            batch_size=self.batch_size,
        )

    def _asked(self, kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        from lm_eval.api.instance import Instance

        instances = [Instance(kind, {}, request, 0) for request in requests]
        found: list[Any] = getattr(self._harness_model, kind)(instances, disable_tqdm=True)
        return found

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _reply(self, head: torch.Tensor, text: str) -> list[int]:
        """A reply's tokens behind a prompt; a space comes first unless the prompt ends in one."""
        ends = self.tokenizer.decode(head[-1:])
        return self._encode(text if ends[-1:].isspace() else f" {text}")

    def _inputs(self, prompts: Sequence[str], images: Sequence[Path | None]) -> dict[str, Any]:
        """Prompts laid out by the model's chat template, with their pictures."""
        texts = []
        for prompt, image in zip(prompts, images, strict=True):
            if image is not None and self.processor is None:
                raise ValueError(f"{self.name} sees nothing and cannot be asked about {image}")
            if getattr(self.processor or self.tokenizer, "chat_template", None) is None:
                raise ValueError(
                    f"{self.name} has no chat template, so that nobody knows how it is asked; put "
                    "a chat_template.jinja into its folder"
                )
            shown: list[dict[str, str]] = [{"type": "image"}] if image is not None else []
            content: Any = [*shown, {"type": "text", "text": prompt}]
            teller = self.processor or self.tokenizer
            message = {"role": "user", "content": content if self.processor else prompt}
            texts.append(
                teller.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
            )
        shown_images = [_open(image) for image in images if image is not None]
        options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
        if shown_images:
            inputs = self.processor(text=texts, images=shown_images, **options)
        else:
            inputs = self.tokenizer(texts, add_special_tokens=False, **options)
        inputs.pop("token_type_ids", None)
        return {key: value.to(self.device) for key, value in inputs.items()}


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _maps_pictures(config: Any) -> bool:
    known = getattr(config, "auto_map", None) or {}
    return "AutoModelForImageTextToText" in known


def _logprob(logits: torch.Tensor, ids: torch.Tensor) -> tuple[float, bool]:
    chances = logits.float().log_softmax(dim=-1).gather(1, ids[:, None])
    return float(chances.double().sum()), bool((logits.argmax(dim=-1) == ids).all())


def _digest(folder: Path, config: Any, dtype: torch.dtype) -> str:
    """Stands for what answers depend on: weights, configurations, templates, tokenizer and code in
    a folder, or the commit on the hub; the weights' type in memory, and the versions of what turns
    a question into tensors.

    Of a folder every file counts that is no note, and code and templates below it. torch is left
    out: its versions differ in last bits alone.
    """
    found = [f"{name} {_version(name)}" for name in ("transformers", "tokenizers", "torchvision")]
    found += [f"pillow {_version('pillow')}", str(dtype)]
    if any("--" in str(place) for place in (getattr(config, "auto_map", None) or {}).values()):
        found.append(type(config).__module__)  # code of another repository, with its commit
    if folder.is_dir():
        below = [*folder.glob("*"), *folder.rglob("*.py"), *folder.glob("*/*.jinja")]
        for path in sorted({path for path in below if path.is_file()}):
            name = path.relative_to(folder)
            if not any(map(is_hidden, name.parts)) and not is_note(path.name):
                found.append(f"{name.as_posix()} {file_sha256(path)}")
    else:
        # Where no commit is known, nothing that was asked before is known to be the same.
        found.append(f"hub {getattr(config, '_commit_hash', None) or os.urandom(16).hex()}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
