"""The language model that explains features and tests explanations: loaded here, or behind an address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from threading import Lock
from typing import Any

import openai
import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.inspection.explanations.delphi import Client, Response
from sae_toolkit.inspection.explanations.local import find_judge
from sae_toolkit.model.devices import choose_lm_dtype, out_of_memory_answered
from sae_toolkit.model.loading import load_language_model
from sae_toolkit.settings.inspection import ExplanationSettings

Messages = list[dict[str, str]]

_RETRIES = 5  # of a request, with growing pauses
_TIMEOUT = 600.0  # seconds for one reply
_KEY = "OPENAI_API_KEY"
_TYPICAL_EXPLANATION = "[EXPLANATION]: " + "words " * 30


class Judge(Client):
    """A client of delphi's.

    delphi takes a request that fails for a reply that cannot be read. `failure` holds the first error, so that the work
    can stop there instead. `on_reply` is called after each reply.
    """

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.failure: UserError | None = None
        self.on_reply: Callable[[], None] = lambda: None

    async def generate(self, prompt: Messages, **kwargs: Any) -> Response:
        """Returns the reply to a conversation, always of the likeliest tokens, as delphi asks for it.

        Args:
            prompt: messages with `role` and `content`.
            kwargs: `max_tokens` of the reply, and a `temperature` of 0.

        Raises:
            UserError: there is no reply.
        """
        try:
            text = await self.reply(prompt, kwargs["max_tokens"])
        except UserError as error:
            self.failure = self.failure or error
            raise
        self.on_reply()
        return Response(text=text)

    async def reply(self, messages: Messages, max_tokens: int) -> str:
        """Returns the text of the reply. Raises a UserError if there is none."""
        raise NotImplementedError


class ServedJudge(Judge):
    """A model behind an OpenAI-compatible address.

    Args:
        model: its name there.
        url: the address, such as http://127.0.0.1:8000/v1.
    """

    def __init__(self, model: str, url: str) -> None:
        super().__init__(model)
        self._where = f"--explain_url {url}"
        key = os.environ.get(_KEY) or "none"
        self._client = openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=_RETRIES, timeout=_TIMEOUT)

    async def reply(self, messages: Messages, max_tokens: int) -> str:
        try:
            completion = await self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=0.0,
            )
        except openai.AuthenticationError as error:
            raise UserError(f"{self._where}: refuses the key in {_KEY}: {one_line(error)}") from error
        except openai.APIConnectionError as error:
            raise UserError(f"{self._where}: cannot be reached: {one_line(error.__cause__ or error)}") from error
        except (openai.OpenAIError, ValueError) as error:
            raise UserError(f"{self._where}: --explain {self.model}: {one_line(error)}") from error
        choices = getattr(completion, "choices", None)  # another kind of server may answer with anything
        if not choices or getattr(choices[0], "message", None) is None:
            raise UserError(f"{self._where}: its answer is not that of an OpenAI-compatible server; name one")
        return choices[0].message.content or ""


class LocalJudge(Judge):
    """A model that Transformers runs in this process, one request at a time.

    Args:
        model: the model's name or directory.
        causal_lm: the model.
        tokenizer: its tokenizer, with a chat template.
    """

    def __init__(self, model: str, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(model)
        self._model = causal_lm
        self._tokenizer = tokenizer
        self._one_at_a_time = Lock()

    @classmethod
    def load(cls, name: str, device: str, lm_dtype: str) -> LocalJudge:
        """Loads a judge.

        Raises:
            UserError: it cannot be loaded, or it has no chat template.
        """
        source, tokenizer = find_judge(name)
        try:  # A LanguageModel needs some hook, and every decoder has this one.
            model = load_language_model(source, "blocks.0.hook_resid_post", device, choose_lm_dtype(lm_dtype, device))
        except UserError as error:
            raise UserError(str(error).replace("--model_name", "--explain")) from error
        return cls(name, model.model, tokenizer)

    def count(self, messages: Messages) -> int:
        return len(self._ids(messages))

    def _ids(self, messages: Messages) -> list[int]:
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        try:
            text = self._tokenizer.apply_chat_template(messages, **how)
        except TemplateError:  # some templates have no place for a system prompt
            first = messages[0]["content"] + "\n\n" + messages[1]["content"]
            text = self._tokenizer.apply_chat_template([{"role": "user", "content": first}, *messages[2:]], **how)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    async def reply(self, messages: Messages, max_tokens: int) -> str:
        return await asyncio.to_thread(self.answer, messages, max_tokens)

    @torch.no_grad()
    def answer(self, messages: Messages, max_tokens: int) -> str:
        """Returns the text of the reply, as `reply`."""
        ids = self._ids(messages)
        longest = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and len(ids) + max_tokens > longest:
            raise UserError(
                f"--explain {self.model}: {len(ids)} tokens of a prompt and {max_tokens} of a reply are more than the"
                f" {longest} that it was made for; lower --explain_examples or --explain_new_tokens, or name another"
            )
        ids_1T = torch.tensor([ids], device=self._model.device)
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        where = f"--explain {self.model}: a reply"
        lower = "serve it elsewhere and give --explain_url, or lower --explain_examples"
        with self._one_at_a_time, out_of_memory_answered(where, lower):
            written = self._model.generate(  # type: ignore[operator]
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=max_tokens,
                **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
                pad_token_id=eos if pad is None else pad,
            )
        return str(self._tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))


class Counted(Judge):
    """Counts what a judge would read, and answers each request with something of the usual length.

    Args:
        n_tests: values in a list that scores.
        judge: counts tokens of its own tokenizer, if it runs here.
        tokenizer: counts them otherwise.
    """

    def __init__(self, n_tests: int, judge: Judge, tokenizer: Any) -> None:
        super().__init__("")
        self._judge = judge
        self._tokenizer = tokenizer
        # One reply for both kinds of request: delphi looks for the first list, and for what comes after the heading.
        self._answer = f"[{','.join('0' * n_tests)}]\n{_TYPICAL_EXPLANATION}"
        self.requests = 0
        self.tokens = 0

    async def reply(self, messages: Messages, max_tokens: int) -> str:
        self.requests += 1
        self.tokens += self._count(messages)
        return self._answer

    def _count(self, messages: Messages) -> int:
        if isinstance(self._judge, LocalJudge):
            return self._judge.count(messages)
        text = "\n".join(message["content"] for message in messages)
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def make_judge(settings: ExplanationSettings, device: str, lm_dtype: str) -> Judge:
    """Returns the judge that the settings name.

    Raises:
        UserError: it cannot be loaded.
    """
    assert settings.explain is not None
    if settings.explain_url:
        return ServedJudge(settings.explain, settings.explain_url)
    return LocalJudge.load(settings.explain, device, lm_dtype)
