"""Writes conversations as text by the chat template of a tokenizer, and finds what the assistant says in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.text.records import Bad, Conversation, Document
from sae_toolkit.text.sources import TextSource

# Unicode sets these characters aside for use within a program. They stand around a message while it is looked for.
_START, _END = "\ufdd0", "\ufdd1"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def by_chat_template(
    text: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    chat_tokens: Literal["all", "assistant"] | None,
    *,
    flag: str,
    model_name: str,
) -> TextSource:
    """Returns a text whose conversations are written by the tokenizer's chat template.

    Conversations that the template refuses are bad records, as are those without an assistant if only what it says is
    asked for. A text that holds no conversations is returned as it is.

    Args:
        text: the text.
        tokenizer: the language model's tokenizer.
        chat_tokens: with `assistant`, the conversations say where the assistant speaks.
        flag: the flag that named the text, for messages.
        model_name: name of the language model, for messages.

    Raises:
        UserError: the tokenizer has no chat template, or cannot say which characters a token is from; or only what the
            assistant says is asked for, and the text holds no conversations.
    """
    if not text.is_chat:
        if chat_tokens == "assistant":
            raise UserError(
                f"--chat_tokens assistant: {text.name} holds no conversations in its {text.described()}; leave it out,"
                " or choose another column by --text_column"
            )
        return text
    try:
        template = tokenizer.get_chat_template()
    except (ValueError, AttributeError):
        raise UserError(
            f"{flag} {text.name}: its column {text.column} holds conversations, and the tokenizer of {model_name} has"
            " no chat template; use the model's chat version, or choose a column of text by --text_column"
        ) from None
    if chat_tokens == "assistant" and not tokenizer.is_fast:
        raise UserError(
            f"--chat_tokens assistant: the tokenizer of {model_name} does not say which characters a token is from; use"
            " --chat_tokens all"
        )
    write: Callable[[Conversation], Conversation | Bad] = partial(_write, tokenizer=tokenizer)
    if chat_tokens == "assistant":
        write = partial(_write_with_spans, tokenizer=tokenizer, template=template)

    def read() -> Iterator[Document | Bad | None]:
        for document in text.read():
            yield _written(document, write) if isinstance(document, Conversation) and len(document) else document

    return replace(text, read=read)


def _written(conversation: Conversation, write: Callable[[Conversation], Conversation | Bad]) -> Conversation | Bad:
    try:
        return write(conversation)
    except Exception as error:  # a template is a program of the model's author, and can raise anything
        return Bad(f"the chat template refuses it ({one_line(error)})")


def _write(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> Conversation:
    return replace(conversation, text=_render(conversation.messages, tokenizer))


def _render(messages: tuple[tuple[str, str], ...], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.apply_chat_template(_as_dicts(messages), tokenize=False))


def _as_dicts(messages: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


def _write_with_spans(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, template: str
) -> Conversation | Bad:
    """Returns the conversation with what the assistant says in it.

    Some templates say it with `{% generation %}`. With others, it is the text of the assistant's messages, which is
    found by writing the conversation again with marks around them. Writing the beginning of the conversation would not
    show it: many templates write the last message in another way than the others.
    """
    if _GENERATION.search(template):
        render: Any = render_jinja_template  # its annotations are wrong
        (text,), (generated,) = render(
            conversations=[_as_dicts(conversation.messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        spans = tuple((start, end) for start, end in generated if end > start)
    else:
        text = _render(conversation.messages, tokenizer)
        if any(mark in text for mark in (_START, _END)):
            return Bad("it holds the characters U+FDD0 or U+FDD1, which no text should hold")
        marked = tuple((role, _marked(said) if role == "assistant" else said) for role, said in conversation.messages)
        found = _spans(_render(marked, tokenizer), text)
        if found is None:
            return Bad("the chat template changes what the assistant says, so only --chat_tokens all can use it")
        spans = found
    if not spans:
        return Bad("the assistant says nothing in it, which --chat_tokens assistant asks for")
    return replace(conversation, text=text, assistant_spans=spans)


def _marked(said: str) -> str:
    """Returns a message with marks around it, within the white space around it, which templates may strip."""
    core = said.strip()
    return said.replace(core, f"{_START}{core}{_END}", 1) if core else said


def _spans(marked: str, text: str) -> tuple[tuple[int, int], ...] | None:
    """Returns the spans of a text that are marked in a copy of it; None if the copy differs in more than the marks."""
    pieces = re.split(f"([{_START}{_END}])", marked)
    if "".join(pieces[::2]) != text or pieces[1::2] != [_START, _END] * (len(pieces) // 4):
        return None
    ends = [0]
    for piece in pieces[::2]:
        ends.append(ends[-1] + len(piece))
    return tuple(zip(ends[1::2], ends[2::2], strict=False))
