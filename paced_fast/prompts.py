"""Data sources -> prompt table: compact source strings, rows from many formats, templates, and token ids.

A source is `kind:name?key=value&key=value` (values may be percent-encoded):

    task:signed_sums?split=train&size=4000&seed=42         split is train, eval or demonstrations
    rg:chain_sum?size=500&seed=1&min_terms=2               other keys are parameters of the reasoning-gym task
    jsonl:gsm8k_train.jsonl?prompt=question&answer=answer&answer_after=####&reward=math&rows=0:400&slice=gsm8k
    parquet:train.parquet?answer=reward_model.ground_truth&reward=math&template=chat
    hf:openai/gsm8k?config=main&split=train&prompt=question&answer=answer&answer_after=####

`rows=start:stop` keeps those rows (from 0, stop excluded), `share=low:high` those of them whose prompt hashes into that
part of [0, 1), then `seed` shuffles and `size` keeps the first. Shares that do not overlap have no prompt in common,
repeated prompts included: `share=0:0.8` to train on and `share=0.8:1` to evaluate on. `demonstration` is a field with
text to imitate, `@answer` for the bare answer, or `@equation` for one line of arithmetic that ends in it. A file with
`optional=true` may be absent (`drop_missing`). `reward` is math unless given. Text of users is never encoded into
control tokens: those of every row are compared with those of its bare template.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from paced_fast.batch import PromptRow, PromptTable
from paced_fast.errors import InputError
from paced_fast.tasks import equation, nearest, reasoning_gym_rows, signed_sums_demonstrations, signed_sums_rows

logger = logging.getLogger(__name__)

_SHARED_KEYS = ("reward", "slice", "size", "seed", "rows", "share", "template")
_FIELD_KEYS = ("prompt", "answer", "answer_after", "demonstration")
_KEYS = {
    "task": (*_SHARED_KEYS, "split", "flip_probability"),
    "rg": (*_SHARED_KEYS, "demonstration"),
    "jsonl": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "parquet": (*_SHARED_KEYS, *_FIELD_KEYS, "optional"),
    "hf": (*_SHARED_KEYS, *_FIELD_KEYS, "split", "config"),
}
_REWARDS_WITHOUT_ANSWER = ("signed_sums", "reasoning_gym")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
_ENCODE_CHUNK = 4096
_DATA_FOLDERS = ("data", "../shared/data")
_ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One parsed source string; `rows` is (start, stop) and None means open."""

    kind: str
    name: str
    prompt: str = "prompt"
    answer: str | None = None
    """Field with the answer; `answer` unless given, and then a row may lack it when its reward needs none."""
    answer_after: str | None = None
    demonstration: str | None = None
    reward: str | None = None
    slice: str | None = None
    size: int | None = None
    seed: int | None = None
    rows: tuple[int | None, int | None] = (None, None)
    share: tuple[float, float] = (0.0, 1.0)
    split: str | None = None
    config: str | None = None
    template: str | None = None
    flip_probability: float = 0.0
    optional: bool = False
    params: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of a reasoning-gym task."""

    @property
    def slice_name(self) -> str:
        """The slice of rows that name none themselves."""
        return self.slice or Path(self.name).stem


def parse_source(spec: str) -> Source:
    """The source that `kind:name?key=value&...` describes.

    Raises:
        InputError: unknown kind or key (with the nearest match), a repeated key, or a value that cannot be read.
    """
    kind, colon, rest = spec.partition(":")
    name, _, query = rest.partition("?")
    if not colon or kind not in _KEYS:
        raise InputError(
            f"source {spec!r} must start with one of {', '.join(f'{k}:' for k in _KEYS)}{nearest(kind, list(_KEYS))}"
        )
    if not name:
        raise InputError(f"source {spec!r} has no name after {kind}:")
    values: dict[str, Any] = {}
    params: dict[str, Any] = {}
    for pair in query.split("&") if query else ():
        key, equals, text = pair.partition("=")
        text = unquote(text)
        if not equals or not key or not text:
            raise InputError(f"source {spec!r}: {pair!r} is not key=value")
        if key in values or key in params:
            raise InputError(f"source {spec!r} gives {key!r} twice")
        if key in _KEYS[kind]:
            values[key] = _value(spec, key, text)
        elif kind == "rg":
            params[key] = _literal(text)
        else:
            raise InputError(
                f"source {spec!r} has the unknown key {key!r}{nearest(key, _KEYS[kind])}: "
                f"{kind} knows {', '.join(_KEYS[kind])}"
            )
    return Source(kind=kind, name=name, params=params, **values)


def load_table(
    sources: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_prompt_tokens: int,
    data_dir: str | None = None,
    too_long: Literal["error", "skip"] = "error",
) -> PromptTable:
    """All rows of all sources, in order, with the token ids that the policy reads.

    `template` is `chat` (the tokenizer's chat template with a generation prompt), `plain`, or text with
    `{prompt}` in it; a source's own `template=` comes first. Relative paths are looked up in `data_dir`, then in the
    working directory; without a `data_dir` also in `data` and `../shared/data`.

    Raises:
        InputError: a source, file, field, template or prompt length is wrong; the message names it and the remedy.
    """
    if not sources:
        raise InputError("no data source given: name at least one, such as rg:chain_sum?size=500")
    repeated = [spec for i, spec in enumerate(sources) if spec in sources[:i]]
    if repeated:
        raise InputError(
            f"data source {repeated[0]!r} is given twice: remove one, or give it another seed or other rows"
        )
    encoder = _Encoder(tokenizer)
    rows: list[PromptRow] = []
    for spec in sources:
        source = parse_source(spec)
        drafts = [_draft(source, where, data) for where, data in _read(source, spec, data_dir)]
        if not drafts:
            raise InputError(f"data source {spec!r} has no rows")
        ids = encoder.encode([d.prompt for d in drafts], source.template or template, [d.where for d in drafts])
        kept = _within_limit(drafts, ids, max_prompt_tokens, too_long)
        if not kept:
            raise InputError(f"every row of {spec!r} is longer than max_prompt_tokens={max_prompt_tokens}: raise it")
        if len(kept) < len(drafts):
            skipped = len(drafts) - len(kept)
            logger.warning("%s: skipped %d of %d rows over %d tokens", spec, skipped, len(drafts), max_prompt_tokens)
        rows += kept
    return PromptTable(rows=tuple(rows))


def drop_missing(sources: Sequence[str], data_dir: str | None) -> tuple[tuple[str, ...], tuple[Source, ...]]:
    """The sources without the optional ones whose file is absent, and those."""
    parsed = [(spec, parse_source(spec)) for spec in sources]
    missing = [item for item in parsed if item[1].optional and find_file(item[1], data_dir) is None]
    return tuple(spec for spec, _ in parsed if spec not in dict(missing)), tuple(source for _, source in missing)


def find_file(source: Source, data_dir: str | None) -> Path | None:
    """The file that a jsonl or parquet source names, None when it is absent."""
    return next((place for place in _places(source.name, data_dir) if place.is_file()), None)


def character_tokenizer(alphabet: str, *, pad: str, stop: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character, ids in the order of `alphabet`; `pad` and `stop` are two of them.

    Raises:
        InputError: a character occurs twice, or `pad` or `stop` is not one character of the alphabet.
    """
    if len(set(alphabet)) != len(alphabet):
        twice = next(c for i, c in enumerate(alphabet) if c in alphabet[:i])
        raise InputError(f"the alphabet {alphabet!r} has {twice!r} twice")
    for name, character in (("pad", pad), ("stop", stop)):
        if len(character) != 1 or character not in alphabet:
            raise InputError(f"{name} {character!r} must be one character of the alphabet {alphabet!r}")
    # No unknown token: text outside the alphabet is an error, not a guess.
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(alphabet)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=stop, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub name; code of the repository is never run.

    Raises:
        InputError: there is none, or it needs its own code.
    """
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if looks_local and not path.is_dir():
        raise InputError(f"no tokenizer at {name_or_path!r}: there is no such folder")
    try:
        return AutoTokenizer.from_pretrained(path if path.is_dir() else name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load the tokenizer {name_or_path!r}: {reason}") from error


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The end-of-text token first, then the end-of-turn tokens that the tokenizer knows.

    Raises:
        InputError: the tokenizer names no end-of-text token.
    """
    first: Any = tokenizer.eos_token_id
    if first is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no eos_token: set one, completions must be able to end"
        )
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    ids = [*(first if isinstance(first, list) else [first]), *(added[token] for token in _TURN_ENDS if token in added)]
    return tuple(dict.fromkeys(ids))


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of a completion without stop and other special tokens; a special token that is a space stays a space."""
    special = {token for token in tokenizer.all_special_ids if str(tokenizer.convert_ids_to_tokens(token)).strip()}
    hidden = special | set(stop_token_ids(tokenizer))
    kept = [token for token in token_ids if token not in hidden]
    return str(tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """A row before its prompt is encoded; `where` names it in errors."""

    where: str
    prompt: str | Messages
    reward: str
    slice: str
    columns: dict[str, Any]
    demonstration: str | None


def _value(spec: str, key: str, text: str) -> Any:
    try:
        if key in ("size", "seed"):
            number = int(text)
            if number < (1 if key == "size" else 0):
                raise ValueError
            return number
        if key == "flip_probability":
            return float(text)
        if key == "rows":
            start, stop = (int(part) if part else None for part in text.split(":"))
            if min(start or 0, stop or 0) < 0 or (stop is not None and stop <= (start or 0)):
                raise ValueError
            return start, stop
        if key == "share":
            low, high = (float(part) for part in text.split(":"))
            if not 0 <= low < high <= 1:
                raise ValueError
            return low, high
        if key == "optional":
            return {"true": True, "false": False}[text]
    except (ValueError, KeyError):
        wanted = {
            "rows": "start:stop with 0 <= start < stop",
            "share": "low:high with 0 <= low < high <= 1",
            "optional": "true or false",
            "size": "a whole number >= 1",
            "seed": "a whole number >= 0",
        }
        raise InputError(f"source {spec!r}: {key}={text} must be {wanted.get(key, 'a number')}") from None
    return text


def _literal(text: str) -> Any:
    """A JSON value when the text is one (2, 0.5, true, ["+"]), else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _read(source: Source, spec: str, data_dir: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The rows that a source selects, each with the words that name it."""
    if source.kind in ("task", "rg"):
        made = _made_rows(source)
        rows: Iterator[tuple[str, dict[str, Any]]] = ((f"{spec} row {i}", row) for i, row in enumerate(made))
    elif source.kind == "hf":
        rows = _hf_rows(source)
    else:
        path = _find(source, data_dir)
        rows = _jsonl_rows(path) if source.kind == "jsonl" else _parquet_rows(path)
    start, stop = source.rows
    chosen = list(itertools.islice(rows, start or 0, stop))
    if stop is not None and len(chosen) < stop - (start or 0):
        raise InputError(
            f"source {spec!r} asks for rows up to {stop} and has {(start or 0) + len(chosen)}: lower rows="
        )
    if source.share != (0.0, 1.0):
        low, high = source.share
        chosen = [(where, row) for where, row in chosen if low <= _place(row, source.prompt, where) < high]
    if source.kind in ("task", "rg"):
        return chosen  # seed and size went into making them
    if source.seed is not None:
        random.Random(source.seed).shuffle(chosen)
    if source.size is not None and len(chosen) < source.size:
        raise InputError(f"source {spec!r} asks for size={source.size} and has {len(chosen)} rows: lower size=")
    return chosen[: source.size]


def _place(row: Mapping[str, Any], name: str, where: str) -> float:
    """A number in [0, 1) that depends on the row's prompt and nothing else."""
    text = json.dumps(_lookup(row, name, where, "prompt"), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _made_rows(source: Source) -> list[dict[str, Any]]:
    if source.kind == "rg":
        return reasoning_gym_rows(source.name, source.size or 500, source.seed or 0, **source.params)
    if source.name != "signed_sums":
        raise InputError(f"no task {source.name!r}{nearest(source.name, ['signed_sums'])}: the tasks are signed_sums")
    split, seed = source.split or "train", 42 if source.seed is None else source.seed
    if split == "demonstrations":
        return signed_sums_demonstrations(size=source.size or 4000, seed=seed, flip_probability=source.flip_probability)
    if split not in ("train", "eval"):
        raise InputError(f"task signed_sums has no split {split!r}: use train, eval or demonstrations")
    return signed_sums_rows(split, size=source.size, seed=seed)


def _places(name: str, data_dir: str | None) -> list[Path]:
    """Where a file is looked up, in this order."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return [path]
    if data_dir is not None:
        return [Path(data_dir).expanduser() / path, path]
    return [path, *(Path(folder, path) for folder in _DATA_FOLDERS)]


def _find(source: Source, data_dir: str | None) -> Path:
    found = find_file(source, data_dir)
    if found is not None:
        return found
    looked = " and ".join(str(place.absolute()) for place in _places(source.name, data_dir))
    raise InputError(f"source {source.kind}:{source.name}: no such file (looked at {looked}); set data_dir or the path")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number} is not JSON ({error}): one object a line is expected") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number} is a JSON {type(row).__name__}, not an object with fields")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"reading {path} needs pyarrow: install the extra, pip install 'paced-fast[data]'") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a parquet file: {' '.join(str(error).split())}") from error
    rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _hf_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"hf:{source.name} needs datasets: install the extra, pip install 'paced-fast[data]'"
        ) from error
    split = source.split or "train"
    try:
        rows = datasets.load_dataset(source.name, source.config, split=split)
    except Exception as error:  # the hub client fails in many ways
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot load hf:{source.name} split {split!r}: {type(error).__name__}: {reason}") from error
    for number, row in enumerate(rows):
        yield f"hf:{source.name} row {number}", dict(row)


def _draft(source: Source, where: str, data: dict[str, Any]) -> _Draft:
    made = source.kind in ("task", "rg")
    reward = source.reward or (data["reward"] if made else "math")
    prompt = _checked_prompt(_lookup(data, source.prompt, where, "prompt"), source.prompt, where)
    columns = {key: value for key, value in data.items() if key not in ("prompts", "completions", source.prompt)}
    if made:
        columns = {key: value for key, value in columns.items() if key not in ("reward", "slice", "demonstration")}
        demonstration = data.get("demonstration")
    else:
        columns["answer"] = _answer(source, data, where)
        demonstration = None
    if source.demonstration is not None:
        demonstration = _demonstration(source.demonstration, data, prompt, columns["answer"], where)
    slice_name = source.slice or (data["slice"] if made else source.slice_name)
    return _Draft(
        where=where, prompt=prompt, reward=reward, slice=slice_name, columns=columns, demonstration=demonstration
    )


def _answer(source: Source, data: dict[str, Any], where: str) -> Any:
    name = source.answer or "answer"
    needless = ":" in (source.reward or "") or source.reward in _REWARDS_WITHOUT_ANSWER
    if source.answer is None and needless and data.get(name) is None:
        return None
    answer = _lookup(data, name, where, "answer")
    if source.answer_after is None:
        return answer
    if not isinstance(answer, str) or source.answer_after not in answer:
        raise InputError(f"{where}: the answer in {name!r} has no {source.answer_after!r}: change answer_after=")
    return answer.rpartition(source.answer_after)[2].strip()


def _demonstration(name: str, data: dict[str, Any], prompt: str | Messages, answer: Any, where: str) -> str:
    if name in ("@answer", "@equation"):
        text = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
        return text if name == "@answer" else equation(str(prompt), text)
    text = _lookup(data, name, where, "demonstration")
    if not isinstance(text, str):
        raise InputError(f"{where}: the demonstration in {name!r} is not text: {text!r}")
    return text


def _lookup(data: Mapping[str, Any], name: str, where: str, key: str) -> Any:
    """The field `name`, which may be dotted; never None."""
    value: Any = data.get(name)
    if value is None:
        value = data
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        raise InputError(f"{where} has no field {name!r}: it has {', '.join(map(str, data))}; name the field by {key}=")
    return value


def _checked_prompt(prompt: Any, name: str, where: str) -> str | Messages:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError(f"{where}: the prompt in {name!r} is empty")
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        messages = [{"role": message.get("role"), "content": message.get("content")} for message in prompt]
        # A role comes out of the template between control tokens, so only known ones are let through.
        if all(message["role"] in _ROLES and isinstance(message["content"], str) for message in messages):
            return messages
    raise InputError(
        f"{where}: the prompt in {name!r} is neither text nor a list of messages, "
        f"each with a role ({', '.join(_ROLES)}) and text as content"
    )


def _within_limit(
    drafts: Sequence[_Draft], ids: Sequence[list[int]], limit: int, too_long: Literal["error", "skip"]
) -> list[PromptRow]:
    rows = []
    for draft, token_ids in zip(drafts, ids, strict=True):
        if len(token_ids) <= limit:
            rows.append(
                PromptRow(
                    prompt=draft.prompt,
                    token_ids=tuple(token_ids),
                    reward=draft.reward,
                    slice=draft.slice,
                    columns=draft.columns,
                    demonstration=draft.demonstration,
                )
            )
        elif too_long == "error":
            raise InputError(
                f"{draft.where}: the prompt has {len(token_ids)} tokens and max_prompt_tokens is {limit}: "
                "raise it, or set too_long=skip"
            )
    return rows


class _Encoder:
    """Prompts to ids. Control tokens (added tokens that are not blank) come from templates only, never from a row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        self.control = added
        self.control_ids = set(added.values())
        self.control_pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        begin = tokenizer.bos_token_id
        self.begins = begin is not None and tokenizer("", verbose=False)["input_ids"][:1] == [begin]
        self._bare: dict[tuple[str, ...], tuple[list[str | int], list[int]]] = {}
        self._plain: Tokenizer | None = None

    def encode(self, prompts: Sequence[str | Messages], template: str, wheres: Sequence[str]) -> list[list[int]]:
        """The ids of each prompt in the template.

        The usual path is the tokenizer's own, in bulk. A row whose control tokens are not those of its bare template
        has text that reads like one; it is encoded again with that text as plain text.
        """
        template = "{prompt}" if template == "plain" else template
        if template == "chat" and not self.tokenizer.chat_template:
            name = self.tokenizer.name_or_path
            raise InputError(
                f"the tokenizer {name!r} has no chat template: give a template with {{prompt}} in it, or plain"
            )
        if template != "chat" and "{prompt}" not in template:
            raise InputError(f"template {template!r} must be chat, plain or text with {{prompt}} in it")
        texts = [self._render(prompt, template, where) for prompt, where in zip(prompts, wheres, strict=True)]
        result: list[list[int]] = []
        for start in range(0, len(texts), _ENCODE_CHUNK):
            result += self._bulk(texts[start : start + _ENCODE_CHUNK], wheres[start : start + _ENCODE_CHUNK])
        for i, ids in enumerate(result):
            parts, expected = self._bare_template(prompts[i], template)
            if self._controls(ids) != expected:
                result[i] = self._encode_plainly(prompts[i], texts[i], parts, expected, wheres[i])
        if template != "chat" and self.begins:
            begin = cast(int, self.tokenizer.bos_token_id)
            return [[begin, *ids] for ids in result]
        return result

    def _render(self, prompt: str | Messages, template: str, where: str) -> str:
        if template != "chat":
            if not isinstance(prompt, str):
                raise InputError(f"{where}: the prompt is a chat of {len(prompt)} messages: use template=chat")
            return template.replace("{prompt}", prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of their own
            raise InputError(
                f"{where}: the chat template refuses the prompt: {' '.join(str(error).split())}"
            ) from error
        return str(text)

    def _bulk(self, texts: Sequence[str], wheres: Sequence[str]) -> list[list[int]]:
        try:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
            return cast(list[list[int]], encoded["input_ids"])
        except Exception as error:  # the Rust library raises plain Exception
            if len(texts) == 1:
                raise InputError(f"{wheres[0]}: the tokenizer cannot encode {texts[0]!r}: {error}") from error
            middle = len(texts) // 2
            return self._bulk(texts[:middle], wheres[:middle]) + self._bulk(texts[middle:], wheres[middle:])

    def _bare_template(self, prompt: str | Messages, template: str) -> tuple[list[str | int], list[int]]:
        """The template as pieces of text and message numbers, and the control tokens of its pieces."""
        roles = ("user",) if isinstance(prompt, str) else tuple(message["role"] for message in prompt)
        key = (template, *roles)
        if key not in self._bare:
            if template == "chat":
                marked = [{"role": role, "content": f"\ue000{i}\ue001"} for i, role in enumerate(roles)]
                pieces = re.split("\ue000([0-9]+)\ue001", self._render(marked, template, "the bare template"))
            else:
                pieces = re.split(r"\{(prompt)\}", template)
            parts = [piece if i % 2 == 0 else int(piece.replace("prompt", "0")) for i, piece in enumerate(pieces)]
            texts = [part for part in parts if isinstance(part, str)]
            controls = [
                token
                for ids in self._bulk(texts, [f"template {template!r}"] * len(texts))
                for token in self._controls(ids)
            ]
            self._bare[key] = parts, controls
        return self._bare[key]

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in self.control_ids]

    def _encode_plainly(
        self, prompt: str | Messages, text: str, parts: Sequence[str | int], expected: list[int], where: str
    ) -> list[int]:
        """The ids with control tokens from the template's pieces only."""
        contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        for users in (contents, [content.strip() for content in contents]):
            if text == "".join(part if isinstance(part, str) else users[part] for part in parts):
                break
        else:
            raise InputError(
                f"{where}: the text holds a control token and the chat template rewrites it: clean the row"
            )
        ids: list[int] = []
        pending = ""
        for part in parts:
            if isinstance(part, int):
                pending += users[part]
                continue
            begin = 0
            for match in self.control_pattern.finditer(part):
                ids += [*self._encode_text(pending + part[begin : match.start()]), self.control[match[0]]]
                pending, begin = "", match.end()
            pending += part[begin:]
        ids += self._encode_text(pending)
        if self._controls(ids) != expected:
            raise InputError(f"{where}: the tokenizer can only read some of the text as a control token: clean the row")
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token."""
        if self._plain is None:
            backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
            if backend is None:
                encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
                return cast(list[int], encoded["input_ids"])
            state = json.loads(backend.to_str())
            state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].strip()]
            state["truncation"] = state["padding"] = None
            self._plain = Tokenizer.from_str(json.dumps(state))
        return cast(Any, self._plain).encode(text, add_special_tokens=False).ids if text else []
