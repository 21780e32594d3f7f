"""Chat messages of calibration data: the forms in which they are written, and their way through the chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ALLOWED = 'allowed are text, or chat messages such as [{"role": "user", "content": "..."}]'
# ShareGPT's words for the roles; its messages have `from` and `value`.
_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool", "function": "tool"}


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of one conversation, and the tools that its system offers (empty: none)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def spoken(self) -> str:
        """What was said, without the template."""
        return "\n".join(str(message["content"]) for message in self.messages if message.get("content"))


def read_messages(value: list[Any]) -> tuple[Message, ...] | int:
    """The messages in `value`, less what is null in them; the number of the first that is none, from 1.

    A message has a role, and content or calls of tools. ShareGPT's form is taken too.
    """
    messages = []
    for number, raw in enumerate(value, start=1):
        if not isinstance(raw, dict):
            return number
        message = {name: item for name, item in raw.items() if item is not None}  # Arrow gives every field a value
        if "role" not in message and message.get("from") in _ROLES:
            message = {"role": _ROLES[message["from"]], "content": message.get("value")}
        if not isinstance(message.get("role"), str) or not (message.get("content") or message.get("tool_calls")):
            return number
        messages.append(message | {"content": message.get("content") or ""})
    return tuple(messages)


def read_tools(value: object) -> tuple[dict[str, Any], ...] | None:
    """The tools of one conversation: a list of objects, or the same as JSON text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError:
            return None
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return tuple(_without_nulls(tool) for tool in value)
    return None


def render_chat(chat: Chat, tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    """The conversation as the model reads it.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses this conversation; says why.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    more: dict[str, Any] = {"tools": list(chat.tools)} if chat.tools else {}
    messages = [dict(message) for message in chat.messages]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt, **more)
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
