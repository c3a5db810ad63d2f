"""Data sources: compact source strings, and rows from many formats.

A source is `kind:name?key=value&key=value` (values may be percent-encoded):

    task:signed_sums?split=train&size=4000&seed=42         split is train, eval or demonstrations
    rg:chain_sum?size=500&seed=1&min_terms=2               other keys are parameters of the reasoning-gym task
    jsonl:gsm8k_train.jsonl?rows=0:400&slice=gsm8k         also .jsonl.gz
    parquet:train.parquet?answer=reward_model.ground_truth&reward=math&template=chat
    hf:openai/gsm8k?config=main&split=train
    train.csv, data/train.jsonl?answer=label               the ending tells the kind
    my/folder, owner/name                                  a folder, or else a data set of the hub

`spec.KEYS` has every key.

Rows of known formats need no more; `format=` (`formats.FORMATS`) names one that is not recognised by its fields.
`prompt=` and `answer=` map the fields of any other (dotted names reach into structures), `answer_after=####` keeps what
follows the last such mark of the answer. `reward` is the format's, math unless the rows are programs with tests.

`keep=REGEX` shortens each prompt to what the regular expression matches in it, one match after the other:
`rg:chain_sum?keep=[0-9%2B-]%2B` asks `4-1-7` for `State the final answer ...: 4 - 1 - 7 =`.

`rows=start:stop` keeps those rows (from 0, stop excluded), `share=low:high` those of them whose prompt hashes into that
part of [0, 1), then `seed` shuffles and `size` keeps the first. Shares that do not overlap have no prompt in common,
repeated prompts included: `share=0:0.8` to train on and `share=0.8:1` to evaluate on. `demonstration` is a field with
text to imitate, `@answer` for the bare answer, or `@equation` for one line of arithmetic that ends in it;
`noise=0.2` replaces a fifth of its letters and digits by others. A file with `optional=true` may be absent
(`drop_missing`).

Files are read as streams: memory is that of the rows kept, and nothing behind `stop` is read.
"""

from paced_fast.data.sources.chat import parse_day, template_arguments
from paced_fast.data.sources.drafts import Check, Draft, check_first_row, read_drafts
from paced_fast.data.sources.faults import BadRow, BadRows, MissingColumn
from paced_fast.data.sources.read import drop_missing, find_file, looked_at, require_file
from paced_fast.data.sources.spec import Messages, Source, is_template, parse_source, rewarded

__all__ = [
    "BadRow",
    "BadRows",
    "Check",
    "Draft",
    "Messages",
    "MissingColumn",
    "Source",
    "check_first_row",
    "drop_missing",
    "find_file",
    "is_template",
    "looked_at",
    "parse_day",
    "parse_source",
    "read_drafts",
    "require_file",
    "rewarded",
    "template_arguments",
]
