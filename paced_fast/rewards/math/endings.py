r"""Extract the final answer of a completion, which the reward `math` judges.

A box has priority. Next come <answer>, ####, "the answer is" and a heading "Answer"; then a closing sentence or line
that states or computes one value, a choice, or values listed as the solutions: `So x = 73.`, `\[73\]`. The last one of
a kind counts. Text before </think> is ignored, and so are questions, doubted answers and retracted answers. A list of
guesses is returned as a list, which equals no single answer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from paced_fast.rewards.math import phrases
from paced_fast.rewards.math.answers import DATE, MAX_CHARACTERS, braced, has_words, tidy, value_of_quantity

_MAX_BOXES = 20
_TAIL_CHARACTERS = 4000
_SOON_CHARACTERS = 300
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|([0-9A-Za-z]))")
_JOINED = re.compile(r"(?:[\s$,;&/]|\\[()\[\]]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)*")
_COMMANDS = re.compile(r"\\[A-Za-z]+")
_PLAIN_NUMBER = re.compile(r"[-+]?[0-9][0-9.,/]*")
_LONE_DOLLAR = re.compile(r"\\[()\[\]](?!\d+pt)|\$\$|(?<!\\)\$(?=\s*$)")
_TUPLE = re.compile(r"[(\[][-+0-9., /]{3,40}[)\]]")
_GAP = re.compile(r"[\s*_`:=>\uff1a]*")


def final_answer(text: str) -> str:
    """Return the final answer of a completion, "" if there is none. One line without a marker is returned whole."""
    text = phrases.ANNOTATION.sub("", _spoken(text)).rstrip()
    while found := phrases.SPECIAL.search(text, max(0, len(text) - 50)):
        text = text[: found.start()].rstrip()
    rest = text
    boxed = _boxed(text)
    if boxed is not None:
        answer, end = boxed
        rest = text[end:]
        taken_back = phrases.TAKEN_BACK.search(rest[:_SOON_CHARACTERS])
        if not taken_back:
            later = _marked(rest, only_final=True)
            return later[0] if later and later[0] and _is_bare(later[0]) else answer
        rest = rest[taken_back.start() :]
    found = _marked(rest)
    if found is not None:
        answer, follows = found
        if _is_bare(answer) or not answer or DATE.fullmatch(answer):
            return answer
        concluded = _concluded(follows)
        return concluded or answer
    if boxed is not None:
        return _concluded(rest)
    concluded = _concluded(text)
    if concluded:
        return concluded
    text = text.strip()
    if "\n" in text or len(text) > MAX_CHARACTERS:
        return ""
    return _undressed(text) if phrases.STRESSED.fullmatch(text) else text


def _spoken(text: str) -> str:
    """Return the text after the reasoning; text from a reasoning tag that is never closed is dropped."""
    begin = 0
    for last in phrases.THOUGHTS_END.finditer(text):
        begin = last.end()
    opened = phrases.THOUGHTS.search(text, begin)
    return text[begin : opened.start() if opened else len(text)]


def _boxed(text: str) -> tuple[str, int] | None:
    """Return the content of the last box, or of the boxes listed with it, and the end position; None without a box."""
    starts = list(_BOX.finditer(text))[-_MAX_BOXES:]
    if not starts:
        return None
    found: list[tuple[str, int, int]] = []  # inside, begin, end
    for match in starts:
        if found and match.start() < found[-1][2]:
            continue
        inside = match[2] if match[1] is None else braced(text, match.end())
        if inside is None:
            found = []  # a box that is not closed: the ones before it are not final
            continue
        found.append((inside, match.start(), match.end() + (len(inside) + 1 if match[1] else 0)))
    if not found or starts[-1].start() >= found[-1][2]:
        return "", len(text)
    group = [found[-1]]
    for one in reversed(found[:-1]):
        if not _JOINED.fullmatch(text[one[2] : group[0][1]]):
            break
        group.insert(0, one)
    insides = list(dict.fromkeys(re.sub(r"\s", "", inside) for inside, _, _ in group))
    answer = found[-1][0] if len(insides) == 1 else ", ".join(inside for inside, _, _ in group)
    nested = _BOX.match(answer.strip())
    if nested and nested[1] and braced(answer.strip(), nested.end()) == answer.strip()[nested.end() : -1]:
        answer = answer.strip()[nested.end() : -1]
    return answer, found[-1][2]


class _Said(NamedTuple):
    """Marker of kind `kind` from `begin` to `end`, with the answer of its sentence; that sentence ends at `stop`."""

    begin: int
    end: int
    kind: int
    stop: int
    answer: str


def _marked(text: str, *, only_final: bool = False) -> tuple[str, str] | None:
    """Return the answer that the last marker announces, and the text from that marker on; None without a marker."""
    marks: list[tuple[int, int, int]] = []
    for kind, pattern in enumerate((phrases.MARK, phrases.HEADING, phrases.HASHES, phrases.TAG)):
        for match in list(pattern.finditer(text))[-3:]:
            is_final = (
                pattern in (phrases.HASHES, phrases.TAG)
                or "final" in text[max(0, match.start() - 9) : match.end()].lower()
            )
            if is_final or not only_final:
                marks.append((*match.span(), kind))
    said: list[_Said] = []
    for begin, end, kind in sorted(marks):
        if said and said[-1].stop > begin and text[said[-1].begin] == "<":
            continue  # inside the tag
        if (one := _said(text, begin, end)) is not None:
            said.append(_Said(begin, end, kind, *one))
    if not said:
        return None
    last, before = said[-1], said[-2] if len(said) > 1 else said[-1]
    if before.answer != last.answer and before.kind == last.kind and _is_next_guess(text, before, last):
        return "", ""
    rest = text[last.stop :]
    if phrases.ALTERNATIVE.search(rest[:_SOON_CHARACTERS]):
        return "", ""
    if phrases.TAKEN_BACK.search(rest[:_SOON_CHARACTERS]):
        return _concluded(rest), ""
    return last.answer, text[last.begin :]


def _is_next_guess(text: str, before: _Said, last: _Said) -> bool:
    """Return True if the text between two markers of one kind contains no reasoning, only another guess."""
    since, between = text[before.end : last.begin], text[before.stop : last.begin]
    if phrases.TAKEN_BACK.search(since):
        return False
    if not between:  # one sentence
        return re.search("[0-9]", since) is not None
    return not re.search(r"[0-9=]|[A-Za-z]{3,}.*[A-Za-z]{5,}", between, re.DOTALL)


def _said(text: str, begin: int, end: int) -> tuple[int, str] | None:
    """Return the end of the sentence after a marker, and the answer in it; None for a question or a doubt."""
    if text[begin : begin + 1] == "<":
        closing = phrases.TAG_END.search(text, end)
        inside = text[end : closing.start() if closing else len(text)].strip()
        return (closing.end() if closing else len(text)), final_answer(inside) or _value(inside)
    before = re.split(r"[.!?\n]", text[max(0, begin - 200) : begin])[-1]
    if phrases.QUESTION.search(before):
        return None
    sentence, stop = _sentence(text, end)
    if "?" in text[stop - 1 : stop + 2] or not sentence.strip():
        return None
    alone = _undressed(sentence)
    return stop, alone if DATE.fullmatch(alone) else _value(sentence)


def _sentence(text: str, begin: int) -> tuple[str, int]:
    """Return the text from `begin` to the end of the sentence, displayed formula or line, and that end position."""
    gap = _GAP.match(text, begin)
    assert gap is not None
    fence = text.rfind("```", begin, gap.end())
    begin = fence if fence >= 0 else gap.end()
    block = phrases.BLOCK.match(text, begin)
    if block:
        return next(part for part in block.groups() if part is not None), block.end()
    for match in phrases.NEXT.finditer(text, begin, begin + 2 * MAX_CHARACTERS):
        if match["end"]:
            return text[begin : match.start()], match.end()
    stop = min(len(text), begin + 2 * MAX_CHARACTERS)
    return text[begin:stop], stop


def _value(sentence: str) -> str:
    """Return the answer in a sentence without the words around it; the whole sentence if the answer is unclear."""
    text = _undressed(sentence)
    remark = phrases.REMARK.search(text)
    cut = text[: remark.start()] if remark else text
    if remark and "(" in remark[0] and phrases.DOUBT.search(remark[0]):
        return text
    is_remark = remark and (re.search("[0-9]", cut) or re.match(r"\s*(?:[,;(]|because|since)", remark[0]))
    if _is_bare(text) and not is_remark:
        return _reduced(text)
    if phrases.DOUBT.search(cut):
        return text
    cut = _undressed(cut)
    if cut and _is_bare(cut):
        return _reduced(cut)
    return _only_value(sentence) or text


def _undressed(text: str) -> str:
    """Return the text without emphasis, math delimiters, symbols, filler words and closing punctuation."""
    text = phrases.SYMBOLS.sub("", phrases.ALIGNED.sub("", text))
    text = phrases.STRESSED.sub(r"\2", text).rstrip(" !")  # 10! is a factorial only between dollar signs
    text = re.sub(phrases.MATH, lambda match: match[0].strip("$"), text)
    text = _LONE_DOLLAR.sub("", text)
    text = phrases.FILLER.sub("", text.strip())
    text = text.strip().strip("`*\"'").strip().rstrip(".,;:\u3002").strip().removesuffix("**").strip()
    text = text.removesuffix("\u3067\u3059")
    return text.rstrip("}\"' ") if text.count("}") > text.count("{") else text


def _is_bare(text: str) -> bool:
    """Return True if a text is mathematics or a word or two, not a sentence."""
    if phrases.UNFINISHED.search(text) or phrases.SMALL_WORDS.search(text):
        return False
    return not has_words(tidy(text)) or not re.search(r"[0-9]", text)


def _only_value(sentence: str) -> str:
    """Return the only value in a sentence, or the value after its last "=" or verb such as "is"; "" if none."""
    if phrases.DOUBT.search(sentence) or phrases.UNFINISHED.search(sentence):
        return ""
    plain = phrases.STRESSED.sub(r"\2", phrases.SYMBOLS.sub("", sentence))
    chunks = [
        chunk for chunk in phrases.CHUNK.finditer(plain) if chunk["number"] or not phrases.NAME.fullmatch(chunk["math"])
    ]
    if len(chunks) == 1:
        chunk = chunks[0]
        if (chunk["after"] and phrases.CHANGES.match(chunk["after"])) or phrases.SUBJECT.match(
            plain, chunk.end("math" if chunk["math"] else "number")
        ):
            return ""
        if phrases.OF_ANOTHER.search(plain[: chunk.start()]):
            return ""
        answer = _reduced(_undressed(chunk["math"] or chunk["number"]))
        return answer if _is_bare(answer) else value_of_quantity(answer)
    if len(phrases.STATED.findall(plain)) > 1 and re.search(r"[,;]|\b(?:and|or)\b", plain):
        return ""
    ending = _undressed(phrases.COPULA.sub("", plain.rstrip().rstrip(".!"), count=1))
    is_one = len(list(phrases.CHUNK.finditer(ending))) == 1 or _TUPLE.fullmatch(ending)
    return ending if is_one and _is_bare(ending) else ""


def _concluded(text: str) -> str:
    """Return the value with which the last sentence or line of a text concludes, "" if there is none."""
    text = text[-_TAIL_CHARACTERS:].strip()
    lines = [line for line in _joined_lines(text) if not phrases.CLOSER.match(line)]
    if not lines:
        return ""
    line, before = lines[-1], lines[-2] if len(lines) > 1 else ""
    choice = phrases.CHOICE.fullmatch(line)
    if choice and choice[1].isupper():
        return "" if phrases.CHOICE.fullmatch(before) else _undressed(line)
    alone = _reduced(_undressed(line))
    if _is_value(alone) and not phrases.SETS_OUT.search(_COMMANDS.sub("", line)):
        previous = tidy(_undressed(before))
        return "" if _PLAIN_NUMBER.fullmatch(previous) and previous != tidy(alone) and line[:1] != "=" else alone
    if not re.search("[0-9]", line) and len(alone.split()) < 4 and phrases.STRESSED.fullmatch(line.strip(" .!")):
        return alone
    label = phrases.LABEL.match(line)
    if (
        label
        and not phrases.DOUBT.search(label[0])
        and not phrases.SETS_OUT.search(label[0])
        and (value := _value(line[label.end() :]))
        and _is_value(value)
    ):
        return "" if phrases.LABEL.match(before) and re.search("[0-9]", before) else value
    sentences = [one for one in _sentences(line) if not phrases.CLOSER.match(one)]
    if not sentences:
        return ""
    last = sentences[-1]
    if (match := phrases.IS_ANSWER.fullmatch(last)) and _is_value(answer := _undressed(match[1])):
        return answer
    if last.rstrip().endswith("?") or phrases.DOUBT.search(last) or phrases.SETS_OUT.search(last):
        return ""
    return _stated(last)


def _stated(sentence: str) -> str:
    """Return the value that a closing sentence concludes with, states or computes, "" if there is none."""
    states = phrases.CONCLUDES.match(sentence) or phrases.NAMES_RESULT.match(sentence) or phrases.STATES.match(sentence)
    if states and (listed := phrases.LISTED.search(sentence)):
        values = [_undressed(one) for one in re.split(r",|\band\b|\bor\b", listed[1]) if one.strip()]
        if all(_is_value(one) for one in values):
            return ", ".join(values)
    is_last = phrases.STRESSED.search(sentence) or phrases.AT_LAST.search(sentence)
    if (states or is_last) and (found := _only_value(sentence)):
        return found
    if found := _stressed(sentence):
        return found
    clause = list(phrases.CLAUSE.finditer(sentence))
    if clause and (found := _only_value(sentence[clause[-1].end() :])):
        return found
    if found := _worked_out(sentence):
        return found
    word = phrases.IN_WORDS.search(sentence) if states and not re.search("[0-9$]", sentence) else None
    return word[1] if word else ""


def _stressed(sentence: str) -> str:
    """Return the only emphasised value of a sentence, "" if there is none: `**$64** for the 16 glasses`."""
    pieces = [one for one in phrases.STRESSED.finditer(sentence) if re.search("[0-9]", one[2])]
    if len(pieces) != 1 or phrases.STATED.search(phrases.STRESSED.sub("", sentence)):
        return ""
    value, after = _reduced(_undressed(pieces[0][2])), sentence[pieces[0].end() :]
    word = re.match(r"\s*[A-Za-z]+", after)
    is_changed = phrases.SUBJECT.match(after) or (word and phrases.CHANGES.match(word[0]))
    if is_changed or phrases.OF_ANOTHER.search(sentence[: pieces[0].start()]):
        return ""
    return value if _is_value(value) else ""


def _worked_out(sentence: str) -> str:
    """Return the result of the only calculation in a sentence, `they had 70 + 3 = 73 birds`, "" if there is none."""
    first, *others = phrases.STRESSED.sub(r"\2", sentence).split("=")
    if (
        not others
        or not re.search("[0-9]", first)
        or any(re.search("[A-Za-z]{2}", _COMMANDS.sub("", one)) for one in others[:-1])
    ):
        return ""
    return _only_value(others[-1])


def _joined_lines(text: str) -> list[str]:
    """Return the lines that are not blank, with each displayed formula joined into one line."""
    text = phrases.BLOCK.sub(lambda match: " ".join(match[0].strip("`").removeprefix("text").split()), text)
    return [line for line in text.splitlines() if line.strip()]


def _sentences(line: str) -> list[str]:
    found, begin = [], 0
    for match in phrases.NEXT.finditer(line):
        if match["end"]:
            found.append(line[begin : match.end()])
            begin = match.end()
    return [one for one in (*found, line[begin:]) if one.strip()]


def _reduced(text: str) -> str:
    """Return the last member of a chain of equations or of a computed sum; any other text unchanged."""
    if "&" in text and r"\begin" not in text:
        text = text.split("\\\\")[-1].replace("&", "")
    members = text.split("=")
    if (
        len(members) < 2
        or members[0].strip() == members[-1].strip()
        or re.search(r"[,;<>]|\\(?:le|ge|ne|text|cup|quad)|\b(?:or|and)\b", text)
    ):
        return text
    if (
        not members[0].strip()
        or len(members) > 2
        or (re.search("[0-9]", members[0]) and not re.search("[A-Za-z]", _COMMANDS.sub("", members[0])))
    ):
        return members[-1].strip()
    return text


def _is_value(text: str) -> bool:
    """Return True if a text is a value or an equation and nothing else."""
    if (
        not re.search(r"[0-9]|\\[a-z]|[A-Za-z]\s*=", text)
        or phrases.UNFINISHED.search(text)
        or len(text) > MAX_CHARACTERS
    ):
        return False
    return not has_words(tidy(text)) and not re.match(r"[0-9]+[.)]\s|[A-Za-z]{2,}\s|[A-Za-z]+'", text)
