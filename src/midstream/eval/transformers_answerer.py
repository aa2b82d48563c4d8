"""Models of `transformers` behind the `Answerer` protocol: exported folders, and other people's.

Prompts are what the model's own processor makes of a conversation by its chat template.
"""

import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from midstream.data.images import decode
from midstream.eval.answers import NotNumbers
from midstream.eval.benchmark_records import Shot, Shown, all_pictures, places
from midstream.eval.foreign_model import (
    amend,
    digest_of,
    open_config,
    open_processor,
    open_weights,
    without_thoughts,
)
from midstream.eval.tasks import Ask, GoOn, Reply, reply_tokens, telling

# Made by some processors for models that do not take them, or for training alone.
_UNASKED = ("token_type_ids", "labels")


class TransformersAnswerer:
    """A vision-language model of the image-text-to-text auto class, or a causal language model.

    name: a folder, or a name on the hub. A model with eyes whose processor is missing, or needs a
    package that is, is asked about texts alone. Raises FileNotFoundError where there is no model.
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
        self.name, self.device = name, device
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        trusted = {"trust_remote_code": trust_remote_code}
        self.config = open_config(name, trusted)
        amend(self.config, device.type)
        # Why it cannot be asked about pictures.
        self._blind: str | None = None
        self.processor, self.tokenizer, self.model = self._open(trusted)
        self.model = self.model.to(device).eval()
        self.tokenizer.padding_side = "left"
        held, rows = self.tokenizer.pad_token_id, len(self.model.get_input_embeddings().weight)
        # Padding is masked: any token with a row will do.
        if held is None or held >= rows:
            first = self.tokenizer.convert_ids_to_tokens(0)
            self.tokenizer.pad_token = self.tokenizer.eos_token or first
        self._checked = False
        self.weights_digest = digest_of(Path(name), self.config, self.model.dtype)

    def _open(self, trusted: dict[str, bool]) -> tuple[Any, Any, Any]:
        import transformers

        options = {**trusted, "dtype": torch.float32 if self.device.type == "cpu" else "auto"}
        processor, kind = None, "AutoModelForCausalLM"
        mapped = getattr(self.config, "auto_map", None) or {}
        sees = getattr(self.config, "vision_config", None) is not None
        sees = sees or type(self.config) in transformers.AutoModelForImageTextToText._model_mapping
        if not (sees or "AutoModelForImageTextToText" in mapped):
            why = (
                "its own code has no AutoModelForImageTextToText"
                if mapped
                else "is a language model"
            )
            self._blind = (
                f"{self.name} takes no pictures here ({self.config.model_type}: {why}); "
                "ask it text tasks, or name a vision-language model"
            )
        else:
            kind = "AutoModelForImageTextToText"
            try:
                processor = open_processor(self.name, self.config, trusted)
            except ValueError as error:  # texts need none
                self._blind = f"{error}, or ask it text tasks alone"
        model = open_weights(self.name, self.config, kind, options)
        if processor is not None:
            return processor, processor.tokenizer, model
        return None, transformers.AutoTokenizer.from_pretrained(self.name, **trusted), model

    def check_pictures(self) -> None:
        """Raises ValueError, with what to do, for a model that cannot be asked about pictures: it
        takes none, its processor cannot be opened, it has no chat template, or that drops them."""
        if self._blind is not None:
            raise ValueError(self._blind)
        self._check_template()
        shown = self._rendered([_turn("user", "What?", [{}])])
        bare = self._rendered([_turn("user", "What?", [])])
        if shown == bare or "'type': 'image'" in shown:
            raise ValueError(
                f"{self.name}: its chat template drops the picture; put the one it was trained "
                "with into its folder as chat_template.jinja"
            )
        self._checked = True

    def _check_template(self) -> None:
        held = getattr(self.processor or self.tokenizer, "chat_template", None)
        if held is None or (isinstance(held, dict) and "default" not in held):
            known = ", ".join(map(repr, held or {}))
            if held is None and getattr(self.tokenizer, "chat_template", None) is not None:
                known = "its tokenizer's, which the processor does not use"
            raise ValueError(
                f"{self.name} has no chat template (known: {known or 'none'}); put one into "
                "its folder as chat_template.jinja"
            )

    @torch.no_grad()
    def reply(self, asked: Sequence[Ask]) -> list[Reply]:
        """See `eval.tasks.Answerer`; what is likely is read off a generation of its own."""
        replies = [Reply("", [], None)] * len(asked)
        for part in self._parts(asked, [i for i, one in enumerate(asked) if one.writes]):
            for i, text in zip(part, self._write([asked[i] for i in part]), strict=True):
                replies[i] = Reply(text, [], None)
        weighed = [i for i, one in enumerate(asked) if one.choices or one.gold is not None]
        for part in self._parts(asked, weighed):
            for i, values in zip(part, self._likely([asked[i] for i in part]), strict=True):
                gold = None if asked[i].gold is None else values.pop()
                replies[i] = replies[i]._replace(choices=values, gold=gold)
        return replies

    def _write(self, asked: Sequence[Ask]) -> list[str]:
        """Greedy answers, one a question; thoughts (`<think>`) before them are left out."""
        inputs = self._inputs(asked)
        found = self.model.generate(
            **inputs, **self._stops, do_sample=False, max_new_tokens=self.max_new_tokens
        )
        new = found[:, inputs["input_ids"].shape[1] :]
        told = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [without_thoughts(text) for text in told]

    def _likely(self, asked: Sequence[Ask]) -> list[list[float]]:
        """Log-probabilities of the choices, and of the gold answer behind them where there is
        one; a question has one of these at least."""
        results: list[list[float]] = [[] for _ in asked]
        inputs = self._inputs(asked)
        # Padding stands on the left.
        ends = self.tokenizer.batch_decode(inputs["input_ids"][:, -1:])
        replies, short = [], True
        for one, end in zip(asked, ends, strict=True):
            texts = [*one.choices, *([] if one.gold is None else [one.gold])]
            whole = self._replies(one, texts, end)
            own = telling(whole[: len(one.choices)])
            short = short and all(len(ids) == 1 for ids in own)
            replies.append(own + whole[len(one.choices) :])
        # First tokens are read off the first step of writing the last reply, the gold one.
        for place in [-1] if short else range(max(map(len, replies))):
            logprobs = self._written(inputs, [own[min(place, len(own) - 1)] for own in replies])
            for row, own in enumerate(replies):
                for ids in own if short else own[place : place + 1]:
                    steps = zip(logprobs, ids, strict=False)
                    results[row].append(sum(float(step[row, token]) for step, token in steps))
        return results

    def _written(self, inputs: dict[str, Any], replies: list[list[int]]) -> list[torch.Tensor]:
        """Log-probabilities [rows, vocabulary] at each step of a generation that writes these."""
        start = inputs["input_ids"].shape[1]

        def only(row: int, ids: torch.Tensor) -> list[int]:
            return replies[row][len(ids) - start :][:1] or replies[row][-1:]

        found = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(map(len, replies)),
            stop_strings=None,
            prefix_allowed_tokens_fn=only,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [logits.float().log_softmax(dim=-1).cpu() for logits in found.logits]

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Of continuations of plain texts, by lm-evaluation-harness's `hf` model."""
        return self._asked("loglikelihood", pairs)

    def num_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """As lm-evaluation-harness's `hf` model cuts them."""
        pair_ids = self._harness_model._encode_pair
        return [len(pair_ids(*p)[1]) if p[0] else len(self._encode(p[1])) for p in pairs]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Of whole texts, by lm-evaluation-harness's `hf` model."""
        return self._asked("loglikelihood_rolling", [(text,) for text in texts])

    def generate_until(self, asked: Sequence[GoOn]) -> list[str]:
        """Greedy continuations of plain texts, by lm-evaluation-harness's `hf` model.

        Raises ValueError for as many new tokens as the model holds in all.
        """
        longest = max((limit for _, _, limit in asked), default=0)
        if longest >= (room := self._harness_model.max_length):
            raise ValueError(
                f"{self.name} holds {room:,} tokens and is asked for {longest:,} new ones; "
                "leave tasks with written answers out"
            )
        requests = [
            (context, {"until": list(stops), "max_gen_toks": limit, "do_sample": False})
            for context, stops, limit in asked
        ]
        return self._asked("generate_until", requests)

    @cached_property
    def _harness_model(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=self.model,
            tokenizer=self.tokenizer,
            backend="causal",
            batch_size=self.batch_size,
        )

    @torch.inference_mode()
    def check_texts(self) -> None:
        """Raises ValueError for a model whose text sees what follows: likelihoods say nothing;
        NotNumbers for one that gives NaN."""
        ids = self._encode("Is there a cat on the left of the dog?")
        rows = torch.tensor([ids, [*ids[:-1], ids[0]]], device=self.device)
        first, other = self.model(input_ids=rows).logits[:, :-1].float()
        if first.isnan().any():
            raise NotNumbers
        if not torch.allclose(first, other, atol=1e-2, rtol=1e-2):
            raise ValueError(
                f"{self.name} reads texts in both directions ({self.config.model_type}), and knows "
                "what it is asked to continue with; leave text tasks out"
            )

    def _asked(self, kind: str, requests: Sequence[tuple[Any, ...]]) -> list[Any]:
        from lm_eval.api.instance import Instance

        instances = [Instance(kind, {}, request, 0) for request in requests]
        found: list[Any] = getattr(self._harness_model, kind)(instances, disable_tqdm=True)
        return found

    def _encode(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _parts(self, asked: Sequence[Ask], wanted: Sequence[int]) -> Iterator[list[int]]:
        # Processors want as many pictures of each prompt of a batch.
        counts = {i: len(all_pictures(asked[i].image)) for i in wanted}
        for count in sorted(set(counts.values()), key=lambda count: (count == 0, count)):
            own = [i for i in wanted if counts[i] == count]
            for start in range(0, len(own), self.batch_size):
                yield own[start : start + self.batch_size]

    def _inputs(self, asked: Sequence[Ask]) -> dict[str, Any]:
        """Questions with equally many pictures, as the processor makes them.

        Raises ValueError that names a question which the processor cannot take.
        """
        if asked[0].image is not None and not self._checked:
            self.check_pictures()
        self._check_template()
        turns = [self._turns(one, opened=True) for one in asked]
        try:
            return self._processed(turns)
        except Exception:  # whatever a processor's own code raises
            for one, own in zip(asked, turns, strict=True):
                self._check_one(one, own)
            raise

    def _check_one(self, ask: Ask, turns: list[dict[str, Any]]) -> None:
        try:
            self._processed([turns])
        except Exception as error:
            shown = " and ".join(map(str, all_pictures(ask.image))) or "no picture"
            raise ValueError(
                f"{self.name}: its processor cannot take the question {ask.prompt[:80]!r} about "
                f"{shown} ({type(error).__name__}: {' '.join(str(error).split())}); mend the "
                "question or the picture, or leave it out of the benchmark's files"
            ) from error

    def _processed(self, asked: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """What the processor makes of conversations, as the model takes it."""
        options: dict[str, Any] = {"padding": True}
        if self.processor is not None:
            options = {"processor_kwargs": options}
        inputs = (self.processor or self.tokenizer).apply_chat_template(
            asked,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self._template,
            **options,
        )
        floats = {"dtype": self.model.dtype} if self.processor is not None else {}
        moved = inputs.to(self.device, **floats)
        return {
            key: value for key, value in moved.items() if key in self._taken or key not in _UNASKED
        }

    @cached_property
    def _stops(self) -> dict[str, Any]:
        """What texts that end an answer need, where generation_config.json names any."""
        told = getattr(getattr(self.model, "generation_config", None), "stop_strings", None)
        return {"tokenizer": self.tokenizer} if told else {}

    @cached_property
    def _template(self) -> dict[str, Any]:
        """What the template is told: where it can, to ask for an answer without thoughts, and no
        date of today, which Llama 3's writes into each prompt, but the one that stands in it."""
        held = str(getattr(self.processor or self.tokenizer, "chat_template", None))
        told = {"enable_thinking": False, "date_string": "26 Jul 2024"}
        return {name: value for name, value in told.items() if name in held}

    @cached_property
    def _taken(self) -> set[str]:
        """The names of what the model takes."""
        ways = (self.model.forward, self.model.prepare_inputs_for_generation)
        return {name for way in ways for name in inspect.signature(way).parameters} - {"labels"}

    def _turns(self, ask: Ask, *, opened: bool = False) -> list[dict[str, Any]]:
        """The shots, and the question, each with its pictures in their places."""
        image = ask.image
        shots = image.shots if isinstance(image, Shown) else ()
        shown = image.pictures if isinstance(image, Shown) else all_pictures(image)
        turns: list[dict[str, Any]] = []
        for question, reply, pictures in (*shots, Shot(ask.prompt, "", shown)):
            if self.processor is None:
                turns += [{"role": "user", "content": question}]
                turns += [{"role": "assistant", "content": reply}] if reply else []
                continue
            text, at = (
                (question, (0,)) if isinstance(image, Path) else places(question, len(pictures))
            )
            content = [
                {"image": decode(path.read_bytes(), str(path))} if opened else {}
                for path in pictures
            ]
            turns += [_turn("user", text, content, at)]
            turns += [_turn("assistant", reply, [])] if reply else []
        return turns

    def _rendered(self, conversation: list[dict[str, Any]], *, asks: bool = True) -> str:
        """The text of a conversation; with `asks` up to where the model's reply begins."""
        teller = self.processor or self.tokenizer
        try:
            text = teller.apply_chat_template(
                conversation, add_generation_prompt=asks, tokenize=False, **self._template
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"{self.name}: its chat template cannot lay a question out ({error}); put "
                "one that can into its folder as chat_template.jinja"
            ) from None
        return str(text)

    def _replies(self, ask: Ask, texts: Sequence[str], end: str) -> list[list[int]]:
        """Tokens of the replies behind their prompt, whose last token is `end`."""
        asked = self._turns(ask)
        head = self._rendered(asked)
        reply = {"role": "assistant", "content": texts[0]}
        if self.processor is not None:
            reply = _turn("assistant", texts[0], [])
        try:
            whole = self._rendered([*asked, reply], asks=False)
        except ValueError:
            whole = ""
        # A space parts them where the template writes one, or where it has no word on replies.
        between, known, _ = whole[len(head) :].partition(texts[0])
        told = whole.startswith(head) and known and not between.strip()
        # PaliGemma's processor ends a prompt with a line that its text does not have.
        if end.isspace() and not head.endswith(end):
            head += end
        lead = between if told else "" if head[-1:].isspace() else " "
        return reply_tokens(self._encode, head, [lead + text for text in texts])


def _turn(
    role: str, text: str, pictures: Sequence[dict[str, Any]], at: Sequence[int] = ()
) -> dict[str, Any]:
    """A turn whose pictures stand behind so many of its characters, else before it."""
    content: list[dict[str, Any]] = []
    done = 0
    for number, picture in enumerate(pictures):
        place = at[number] if at else 0
        content += [{"type": "text", "text": text[done:place]}] if place > done else []
        content.append({"type": "image", **picture})
        done = place
    return {"role": role, "content": [*content, {"type": "text", "text": text[done:]}]}
