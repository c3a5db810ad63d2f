"""Find the program in a completion, fence by fence in time linear in its length: completions may be hostile."""

from __future__ import annotations

import ast
import itertools
import re
from typing import Any, NamedTuple

_PYTHON = re.compile(r"(?:python|pypy|py)[0-9.]*")
_TAG = re.compile(r"[\w+.#-]*")
_BEGINS_LIKE_CODE = re.compile(
    r"(?:(?:def|class|import|from|for|while|if|try|with|async) |[@#]|[rR]?(?:\"\"\"|''')|[\w, .\[\]]+=|print\()"
)
_FIRST_LINE = 200
_FENCE_LINE = re.compile(r"^[ \t]{0,40}(?:```|~~~)", re.MULTILINE)
_MAX_FENCES = 1000
_QUOTES = ('"""', "'''")
_MAX_QUOTED_FENCES = 20


class Fence(NamedTuple):
    """A line that opens or closes a code block."""

    start: int
    end: int
    indent: int
    mark: str
    length: int
    info: str

    def closes(self, opening: Fence) -> bool:
        """Return True if this fence ends the block of `opening`; followed by words, it also opens the next block."""
        return self.mark == opening.mark and self.length >= opening.length


def fenced(text: str) -> list[tuple[str, str]]:
    """Return the tag, in lower case, and the text of every fenced block, without the fence's indentation.

    Fences are backticks or tildes; if the last one is missing, the block ends with the text. A closing fence inside a
    triple-quoted string belongs to the program if the string and the block end within the next 20 fences. A text with
    more than 1000 fences is noise and has no blocks.
    """
    found = list(itertools.islice(_FENCE_LINE.finditer(text), _MAX_FENCES + 1))
    if len(found) > _MAX_FENCES:
        return []
    fences = [fence for match in found if (fence := _fence(text, match.start())) is not None]
    blocks, at = [], 0
    while at < len(fences):
        opening = fences[at]
        last = _closing(text, fences, at)
        end = fences[last].start if last < len(fences) else len(text)
        tag = _TAG.match(opening.info.lstrip("{."))
        body = text[opening.end : end]
        if opening.indent:
            body = re.sub(rf"^[ \t]{{1,{opening.indent}}}", "", body, flags=re.MULTILINE)
        blocks.append((tag[0].lower() if tag else "", body))
        # A closing fence followed by words opens the next block.
        at = last if last < len(fences) and fences[last].info else last + 1
    return blocks


def program_in(completion: str) -> str | None:
    """Return the last Python block, else the last untagged one, else a text without blocks that starts like code."""
    blocks = fenced(completion)
    marked = [text for tag, text in blocks if _PYTHON.fullmatch(tag)] or [text for tag, text in blocks if not tag]
    if marked:
        return marked[-1]
    first = completion.lstrip()[:_FIRST_LINE].partition("\n")[0]
    return completion if not blocks and _BEGINS_LIKE_CODE.match(first) else None


def code_in_prompt(prompt: Any, function: str, *, whole: bool) -> str:
    """Return the code at the end of a prompt (text or messages) that contains `function`; "" if it is not code.

    With `whole`, a function without a body gets `pass` as its body.
    """
    if not isinstance(prompt, str):
        prompt = next((m["content"] for m in reversed(prompt or ()) if m["role"] == "user"), "")
    blocks = [body for _, body in fenced(prompt) if f"def {function}" in body]
    code = blocks[-1] if blocks else prompt
    start = re.search(r"^(?:from|import|def|class|@)\b.*", code, re.DOTALL | re.MULTILINE)
    code = start[0] if start else ""
    for closed in (code, f"{code.rstrip()}\n    pass\n"):
        try:
            ast.parse(closed)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return closed if whole else code
    return ""  # words around the code: the completion must work alone


def _fence(text: str, start: int) -> Fence | None:
    end = text.find("\n", start) + 1 or len(text)
    line = text[start:end]
    bare = line.lstrip(" \t")
    mark = bare[0]
    info = bare.lstrip(mark)
    if mark == "`" and "`" in info:
        return None  # inline code
    return Fence(start, end, len(line) - len(bare), mark, len(bare) - len(info), info.strip())


def _closing(text: str, fences: list[Fence], opening: int) -> int:
    """Return the index of the fence that closes the block, or the number of fences if none does."""
    first, is_open, at = len(fences), dict.fromkeys(_QUOTES, False), fences[opening].end
    for i in range(opening + 1, len(fences)):
        for quotes in _QUOTES:
            is_open[quotes] ^= text.count(quotes, at, fences[i].start) % 2 == 1
        at = fences[i].end
        if fences[i].closes(fences[opening]):
            if not any(is_open.values()):
                return i
            first = min(first, i)
        if i - first > _MAX_QUOTED_FENCES:
            break
    return first
