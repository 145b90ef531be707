"""Chat templates that survive any text: conversations to token ids, and token ids back to conversations.

A prompt is data. It may hold ``<|im_end|>``, a mask token or whatever string a program would pick as a placeholder,
and none of these may turn into control tokens or be found in the wrong place. So places are found by rendering the
template with random marks that occur in no text, and where a text does hold the string of a control token, it is
tokenised as the plain text it is. Every other conversation is tokenised as one string, exactly as
``tokenizer.apply_chat_template(..., tokenize=True)`` does.
"""

from __future__ import annotations

import logging
import re
import secrets
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from .plain import control_pattern, ids_of_parts
from .tokens import added_tokens, spellings, token_kind

logger = logging.getLogger("entrgi_kernels")

Conversation = list[dict[str, Any]]

#: A plain template for tokenizers that have none: the turns, one after the other, with nothing around them.
PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
#: The ChatML template of Qwen and Dream, for tokenizers that know ``<|im_start|>`` and ``<|im_end|>``.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_ROLES = ("system", "user", "assistant", "tool", "developer")
_LETTERS, _NUMBER = "abcdefghijklmnopqrstuvwxyz", 5
_PRIVATE = "\U000f0000"  # the first of the private characters that stand for control tokens
said_that_decoded = False
# Tags of whatever brackets, and what their names say. A channel's name stands behind its tag.
_TAG = re.compile(r"[<\[◁⟨【]([^\s<>\[\]◁▷⟨⟩【】]{1,40})[>\]▷⟩】]")
_THOUGHT = re.compile(r"think|thought|reason|reflect|scratchpad|analy[sz]|deliberat", re.IGNORECASE)
_CLOSING = re.compile(r"/|end|stop|close|no_?think|^<[^|]+\|>$", re.IGNORECASE)
_CHANNEL = re.compile(r"<\|channel\|?>\s*(?:analysis|thought|thinking)\b(?!.*(?:<channel\|>|<\|end\|>))", re.DOTALL)


# ---- conversations


def conversation_from(prompt: Any) -> Conversation:
    """A prompt as a list of turns: a string is one user turn, a list of turns is checked and copied.

    Args:
        prompt: a non-empty string, or a list of ``{"role": ..., "content": ...}`` whose last turn is the user's.

    Raises:
        TypeError: it is neither, or a turn is not a dict with a string as content.
        ValueError: it is empty or no Unicode text, a role is unknown, or the last turn is not the user's.
    """
    expected = "expected a non-empty string, or a list of {'role': ..., 'content': ...} that ends with a user turn"
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"the prompt is empty ({prompt!r}): {expected}")
        check_unicode(prompt, "the prompt")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)):
        raise TypeError(f"a prompt cannot be {type(prompt).__name__} ({_short(prompt)}): {expected}")
    if not prompt:
        raise ValueError(f"the prompt has no turns ([]): {expected}")
    turns: Conversation = []
    for place, turn in enumerate(prompt):
        if not isinstance(turn, dict):
            raise TypeError(f"turn {place} of the prompt is {type(turn).__name__} ({_short(turn)}): {expected}")
        missing = [key for key in ("role", "content") if key not in turn]
        if missing:
            raise ValueError(
                f"turn {place} of the prompt has no {' and no '.join(missing)}: {_short(turn)}: {expected}"
            )
        if turn["role"] not in _ROLES:
            raise ValueError(
                f"turn {place} of the prompt has role {turn['role']!r}: expected one of {', '.join(_ROLES)}"
            )
        if not isinstance(turn["content"], str):
            raise TypeError(
                f"turn {place} of the prompt has content of type {type(turn['content']).__name__} "
                f"({_short(turn['content'])}): expected a string"
            )
        check_unicode(turn["content"], f"turn {place} of the prompt")
        turns.append({"role": turn["role"], "content": turn["content"]})
    if turns[-1]["role"] != "user":
        raise ValueError(
            f"the prompt's last turn is the {turns[-1]['role']}'s: expected a conversation that ends with a "
            "user turn, which the model then answers"
        )
    if not turns[-1]["content"].strip():
        raise ValueError(f"the prompt's last user turn is empty ({turns[-1]['content']!r}): {expected}")
    return turns


def check_unicode(text: str, name: str) -> None:
    """Raise ValueError for a text with half of a surrogate pair in it, which stands for no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate, {text[error.start]!a}, at character {error.start}, which is half of a "
            "character: expected Unicode text (text.encode('utf-8', 'replace').decode() puts '?' in its place)"
        ) from None


def render(
    tokenizer: Any,
    conversation: Conversation,
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **variables: Any,
) -> str:
    """The conversation as the tokenizer's chat template writes it; ``variables`` are further ones of the template.

    Raises:
        ValueError: there is no chat template, or it refuses this conversation.
    """
    from jinja2.exceptions import TemplateError

    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__!r} has no chat "
            "template; "
            "set tokenizer.chat_template to the Jinja template the model was trained with "
            "(entrgi_kernels.text.template.CHATML and .PLAIN are two common ones), "
            "or, for a reward model, pass chat_template= to rewards.wrap"
        )
    try:
        return tokenizer.apply_chat_template(
            conversation,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **variables,
        )
    except TemplateError as error:
        roles = [turn["role"] for turn in conversation]
        raise ValueError(f"the chat template refuses a conversation with the roles {roles}: {error}") from error


# ---- conversations to ids


def encode_prompt(
    tokenizer: Any, conversation: Conversation, *, chat_template: str | None = None, **variables: Any
) -> list[int]:
    """Token ids of a conversation up to where the model answers, for the diffusion LM.

    Args:
        tokenizer: the diffusion LM's tokenizer.
        conversation: turns as :func:`conversation_from` returns them.
        chat_template: a template to use instead of the tokenizer's own.
        variables: further ones of the template.

    Raises:
        ValueError: no chat template, or it refuses this conversation.
    """
    return _encode(tokenizer, conversation, add_generation_prompt=True, chat_template=chat_template, **variables)


def encode_answered(
    tokenizer: Any, conversation: Conversation, response: str, *, chat_template: str | None = None
) -> list[int]:
    """Token ids of a conversation with the assistant's answer at its end, for a reward model.

    The template brings its own beginning-of-sequence token where the model wants one; none is added.
    """
    answered = [*conversation, {"role": "assistant", "content": response}]
    return _encode(tokenizer, answered, add_generation_prompt=False, chat_template=chat_template)


def split_template(
    tokenizer: Any, conversation: Conversation, *, chat_template: str | None = None
) -> tuple[list[int], list[int]]:
    """Token ids before and after the assistant's answer to a conversation: ``(prefix, suffix)``.

    Args:
        tokenizer: the reward model's tokenizer.
        conversation: turns that end with the user's.
        chat_template: a template to use instead of the tokenizer's own.

    Raises:
        ValueError: no chat template, or one that does not write the assistant's answer exactly once.
    """
    mark = new_mark(turn["content"] for turn in conversation)
    return split_at(
        tokenizer, [*conversation, {"role": "assistant", "content": mark}], mark, chat_template=chat_template
    )


def split_at(
    tokenizer: Any,
    conversation: Conversation,
    mark: str,
    *,
    add_generation_prompt: bool = False,
    chat_template: str | None = None,
    **variables: Any,
) -> tuple[list[int], list[int]]:
    """Token ids before and after a mark, which stands in one of a conversation's turns: ``(prefix, suffix)``.

    Args:
        tokenizer: the reward model's tokenizer.
        conversation: any turns.
        mark: of :func:`new_mark`.
        add_generation_prompt: end where the model would answer.
        chat_template: a template to use instead of the tokenizer's own.
        variables: further ones of the template.

    Raises:
        ValueError: no chat template, or one that does not write the marked content exactly once.
    """
    arguments = {"add_generation_prompt": add_generation_prompt, "chat_template": chat_template, **variables}
    if _is_safe(tokenizer, conversation):
        pieces = [(render(tokenizer, conversation, **arguments), False)]
    else:
        pieces = _parts(tokenizer, conversation, **arguments)
    _check_once(sum(text.count(mark) for text, _ in pieces))
    place = next(place for place, (text, _) in enumerate(pieces) if mark in text)
    (text, written) = pieces[place]
    before, after = text.split(mark)
    return (
        ids_of_parts(tokenizer, [*pieces[:place], (before, written)]),
        ids_of_parts(tokenizer, [(after, written), *pieces[place + 1 :]], continuation=True),
    )


def surroundings(tokenizer: Any, *, chat_template: str | None = None, **variables: Any) -> tuple[str, str | None]:
    """What a template writes behind a user's turn where an answer is asked for, and where one stands.

    Returns:
        The generation prompt, and what comes before an assistant's content; None where the template refuses one.
    """
    user, assistant = _marks(2, ())
    turns = [{"role": "user", "content": user}]
    asked = render(tokenizer, turns, add_generation_prompt=True, chat_template=chat_template, **variables)
    try:
        turns.append({"role": "assistant", "content": assistant})
        answered: str | None = render(tokenizer, turns, chat_template=chat_template, **variables)
    except ValueError:
        answered = None
    before = None if answered is None else answered.rpartition(user)[2].partition(assistant)[0]
    return asked.rpartition(user)[2], before


def open_tag(text: str, *, thoughts: bool = True) -> str | None:
    """The last tag that a text leaves open: ``<think>``, ``[THINK]``, ``<|START_THINKING|>``; None without one.

    Args:
        text: of a template.
        thoughts: look at tags that name a thought alone.
    """
    opened = None
    for found in _TAG.finditer(text):
        if not thoughts or _THOUGHT.search(found[0]):
            opened = None if _CLOSING.search(found[0]) else found[0]
    channel = _CHANNEL.search(text)
    return channel[0] if channel and opened is None else opened


def new_mark(texts: Iterable[str]) -> str:
    """A random word that occurs in none of the texts, to stand for a content in a conversation."""
    return _marks(1, texts)[0]


def _check_once(count: int) -> None:
    if count != 1:
        raise ValueError(
            f"the chat template writes the response {count} times; guidance needs a template that writes it "
            "exactly once (pass another with chat_template=)"
        )


def _encode(tokenizer: Any, conversation: Conversation, **arguments: Any) -> list[int]:
    if _is_safe(tokenizer, conversation):
        text = render(tokenizer, conversation, **arguments)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids_of_parts(tokenizer, _parts(tokenizer, conversation, **arguments))


def _parts(tokenizer: Any, conversation: Conversation, **arguments: Any) -> list[tuple[str, bool]]:
    """The rendered conversation as ``(text, whether somebody wrote it)``: template text and contents, in order.

    White space around a content goes through the template with its mark, since templates may strip it.
    """
    bodies = [turn["content"].strip() for turn in conversation]
    marks = _marks(len(bodies), bodies)
    marked = []
    for turn, body, mark in zip(conversation, bodies, marks, strict=True):
        content = turn["content"]
        if body:
            start = content.index(body)
            content = content[:start] + mark + content[start + len(body) :]
        marked.append({**turn, "content": content})
    text = render(tokenizer, marked, **arguments)
    contents = dict(zip(marks, bodies, strict=True))
    # One pattern for all of them: as many alternatives as there are turns would be tried at every letter.
    pieces: list[str] = re.split(f"({marks[0][:-_NUMBER]}[a-z]{{{_NUMBER}}})", text)
    return [(contents.get(piece, piece), piece in contents) for piece in pieces if piece]


def _is_safe(tokenizer: Any, conversation: Conversation) -> bool:
    """Whether no content holds the string of a control token.

    In what a user or a system message says, every added token counts, ``<tool_call>`` as much as ``<|im_end|>``. In
    an assistant's turn only special tokens do: a model does write ``<think>``, and templates look for it.
    """
    for turn in conversation:
        pattern = control_pattern(tokenizer, special_only=turn["role"] == "assistant")
        if pattern is not None and pattern.search(turn["content"]):
            return False
    return True


def _marks(count: int, texts: Iterable[str]) -> list[str]:
    """Lower-case words, of which none occurs in any of the texts nor within another mark.

    They begin alike, at random, and end with their number in `_NUMBER` letters: one look at each text is enough.
    """
    texts = list(texts)
    while True:
        start = "".join(secrets.choice(_LETTERS) for _ in range(24))
        if not any(start in text for text in texts):
            return [
                "".join([start, *(_LETTERS[k // 26**place % 26] for place in range(_NUMBER))]) for k in range(count)
            ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- ids to conversations


def conversation_from_ids(tokenizer: Any, ids: Sequence[int], *, chat_template: str | None = None) -> Conversation:
    """The conversation that a prompt's token ids came from, for loops that hand over ids only.

    The template's own text is learnt by rendering it with marks for a system, a user and an assistant turn; the ids
    are then cut at the control tokens it puts between turns. A control token's string inside a user's text was
    tokenised as text, so it cuts nothing. Left padding is skipped.

    Ids that do not follow the template (a bare prompt, say) give one user turn with the decoded text, without special
    tokens; that is logged once.

    Args:
        tokenizer: the tokenizer that made the ids.
        ids: the prompt's token ids, without response slots.
        chat_template: a template to use instead of the tokenizer's own.

    Raises:
        ValueError: the ids are empty or decode to nothing.
    """
    global said_that_decoded
    ids = [int(index) for index in ids]
    if not ids:
        raise ValueError("the prompt has no tokens: expected at least one token id")
    if chat_template is not None or getattr(tokenizer, "chat_template", None):
        conversation = _parse(tokenizer, ids, chat_template)
        if conversation is not None:
            return conversation
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if not text:
        raise ValueError(f"the prompt's {len(ids)} token ids decode to no text, and its rewards cannot be computed")
    if not said_that_decoded:
        said_that_decoded = True
        logger.warning(
            "a prompt's token ids do not follow the tokenizer's chat template; its decoded text is taken as one user "
            "turn: %s",
            _short(text),
        )
    return [{"role": "user", "content": text}]


class _Reader:
    """Turns ids into text in which each control token is one private character, so that text is searched safely."""

    def __init__(self, tokenizer: Any) -> None:
        self._kind = token_kind(tokenizer)
        self._tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        control = control_pattern(tokenizer, special_only=False)
        self._control: dict[int, str] = {}
        self._words: dict[int, str] = {}
        for content, (index, _) in added_tokens(tokenizer).items():
            if control is not None and control.fullmatch(content):
                self._control[index] = chr(ord(_PRIVATE) + len(self._control))
            else:
                self._words[index] = content

    def __call__(self, ids: Sequence[int]) -> str:
        text, run = "", b""
        for index in ids:
            if index in self._control:
                text += run.decode("utf-8", errors="replace") + self._control[index]
                run = b""
            elif index in self._words:
                run += self._words[index].encode("utf-8")
            elif index in self._tokens:
                run += spellings(self._tokens[index], self._kind)[0]
        return text + run.decode("utf-8", errors="replace")


_readers: weakref.WeakKeyDictionary[Any, tuple[int, _Reader]] = weakref.WeakKeyDictionary()


_structures: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _reader(tokenizer: Any) -> _Reader:
    cached = _readers.get(tokenizer)
    if cached is None or cached[0] != len(tokenizer):
        cached = len(tokenizer), _Reader(tokenizer)
        _readers[tokenizer] = cached
    return cached[1]


def _parse(tokenizer: Any, ids: list[int], chat_template: str | None) -> Conversation | None:
    """The turns that a prompt's ids hold, None when they do not follow the template."""
    read = _reader(tokenizer)
    key = getattr(tokenizer, "chat_template", None), chat_template, len(tokenizer)
    cached = _structures.get(tokenizer)
    if cached is None or cached[0] != key:
        cached = key, _structure(tokenizer, read, chat_template)
        _structures[tokenizer] = cached
    starts, between, ends = cached[1]
    text = read(ids)
    pad = getattr(tokenizer, "pad_token_id", None)
    padding = read([pad]) if pad is not None else ""
    candidates = [text]
    if padding and text.startswith(padding):
        candidates.append(text.lstrip(padding))
    for candidate in candidates:
        # The longest beginning first: a template's default system message also starts like a system turn.
        for role, start in sorted(starts.items(), key=lambda item: -len(item[1])):
            if candidate.startswith(start):
                turns = _turns(candidate[len(start) :], role, between, ends)
                if turns is not None:
                    return turns
    return None


def _turns(text: str, role: str, between: dict[tuple[str, str], str], ends: tuple[str, ...]) -> Conversation | None:
    """Cut a text that begins with a content of ``role`` at what the template puts between and after contents."""
    turns: Conversation = []
    while True:
        following = [
            (text.find(separator), -len(separator), after)
            for (before, after), separator in between.items()
            if before == role and separator in text
        ]
        place, length, after = min(following, default=(len(text) + 1, 0, ""))
        if role == "user":
            # What ends a prompt often is what begins an assistant's turn, so the end is looked for first.
            end = next((end for end in ends if text.endswith(end) and len(text) - len(end) <= place), None)
            if end is not None:
                content = text[: len(text) - len(end)]
                turns.append({"role": role, "content": content})
                return turns if content.strip() else None
        if not following:
            return None
        turns.append({"role": role, "content": text[:place]})
        text, role = text[place - length :], after


def _structure(
    tokenizer: Any, read: _Reader, chat_template: str | None
) -> tuple[dict[str, str], dict[tuple[str, str], str], tuple[str, ...]]:
    """What the template writes before, between and after contents: ``(starts, between, ends)``, as read from ids.

    ``starts[role]`` comes before a first turn of that role, ``between[role, next role]`` between two contents;
    ``ends`` after the last user turn, with the generation prompt and without.
    """
    starts: dict[str, str] = {}
    between: dict[tuple[str, str], str] = {}
    ends: list[str] = []
    shapes = [
        ["user"],
        ["user", "assistant", "user"],
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["user", "user"],
    ]
    for roles in shapes:
        for generation in (True, False):
            marks = _marks(len(roles), ())
            turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
            try:
                text = render(tokenizer, turns, add_generation_prompt=generation, chat_template=chat_template)
            except ValueError:  # a template may refuse a system message or two user turns in a row
                break
            text = read(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
            # The pieces must come in the order of the turns, each once, or nothing can be learnt from this shape.
            pieces: list[str] = re.split("(" + "|".join(marks) + ")", text)
            if pieces[1::2] != marks:
                break
            structure = pieces[0::2]
            starts.setdefault(roles[0], structure[0])
            for pair, separator in zip(zip(roles, roles[1:], strict=False), structure[1:-1], strict=True):
                # A bare line break between turns could as well be part of a content, so it cuts nothing.
                if any(c.isalpha() or c >= _PRIVATE for c in separator):
                    between.setdefault(pair, separator)
            if structure[-1] not in ends:
                ends.append(structure[-1])
    return starts, between, tuple(sorted(ends, key=len, reverse=True))
