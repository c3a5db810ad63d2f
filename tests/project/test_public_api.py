"""Signatures and error messages of `paced_kernels`, which other code and other trainers rely on to the letter."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paced_kernels
from paced_kernels import (
    Bell,
    PriorityTree,
    Sample,
    TBOutput,
    linear_logprobs,
    segment_sum,
    trajectory_balance_from_logprobs,
    trajectory_balance_loss,
)

EMPTY = inspect.Parameter.empty
LOSS_KEYWORDS = {
    "rewards": EMPTY,
    "log_z": EMPTY,
    "beta": EMPTY,
    "ref_logprobs": None,
    "weights": None,
    "behavior_logprobs": None,
    "importance_cap": None,
}


def positional_and_keywords(function: object) -> tuple[list[str], dict[str, object]]:
    """Names that may be given by position, and the defaults of the keyword-only ones in order."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return positional, {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_exports() -> None:
    assert sorted(paced_kernels.__all__) == [
        "Bell",
        "FusedLinearHead",
        "PriorityTree",
        "Sample",
        "TBOutput",
        "VocabShard",
        "default_workspace_bytes",
        "linear_logprobs",
        "segment_sum",
        "trajectory_balance_from_logprobs",
        "trajectory_balance_loss",
        "warm_up",
    ]


def test_signatures_of_the_functions() -> None:
    positional, keywords = positional_and_keywords(linear_logprobs)
    assert positional == ["hidden", "head_weight", "token_ids"]
    assert list(keywords.items()) == [
        ("bias", None),
        ("temperature", 1.0),
        ("return_entropy", False),
        ("workspace_bytes", None),
        ("backend", "auto"),
        ("shard", None),
        ("skipped_share", 0.0),
    ]
    positional, keywords = positional_and_keywords(trajectory_balance_loss)
    assert positional == ["hidden", "head_weight", "token_ids", "cu_seqlens"]
    assert list(keywords.items()) == [
        *LOSS_KEYWORDS.items(),
        ("bias", None),
        ("temperature", 1.0),
        ("reduction", "sum"),
        ("denominator", None),
        ("return_entropy", False),
        ("workspace_bytes", None),
        ("backend", "auto"),
        ("entropy_bonus", 0.0),
        ("shard", None),
        ("skipped_share", 0.0),
    ]
    positional, keywords = positional_and_keywords(trajectory_balance_from_logprobs)
    assert positional == ["logprobs", "cu_seqlens"]
    assert list(keywords.items()) == [*LOSS_KEYWORDS.items(), ("reduction", "sum"), ("denominator", None)]
    assert list(inspect.signature(segment_sum).parameters) == ["values", "cu_seqlens"]
    assert TBOutput._fields == ("loss", "residual", "seq_logprobs", "entropy")


def test_signatures_of_the_tree() -> None:
    positional, keywords = positional_and_keywords(PriorityTree)
    assert positional == ["capacity"]
    assert list(keywords.items()) == [("seed", EMPTY), ("device", "cpu"), ("stream", 0), ("backend", "auto")]
    assert Sample._fields == ("idx", "q", "prob", "total")
    expected = {
        "update": "(idx, w)",
        "write_range": "(start, w)",
        "rebuild": "(w, stats=None, *, allowed=None)",
        "sample": "(B, mode='systematic')",
        "sample_distinct": "(B, method='first', *, exploration=0.0)",
        "get": "(idx)",
        "total": "()",
        "status": "()",
        "check": "()",
        "state_dict": "()",
        "load_state_dict": "(state)",
    }
    for name, text in expected.items():
        parameters = list(inspect.signature(getattr(PriorityTree, name)).parameters.values())[1:]
        bare = [p.replace(annotation=EMPTY) for p in parameters]
        assert str(inspect.Signature(bare)) == text, name
    public = {name for name in vars(PriorityTree) if not name.startswith("_")}
    assert public == {*expected, "device"}


def test_every_public_function_is_documented() -> None:
    functions = [linear_logprobs, trajectory_balance_loss, trajectory_balance_from_logprobs, segment_sum, PriorityTree]
    functions += [getattr(PriorityTree, name) for name in vars(PriorityTree) if not name.startswith("_")]
    for function in functions:
        assert len(inspect.getdoc(function) or "") > 20, function
    for function in functions[:4]:
        assert "Returns:" in (inspect.getdoc(function) or ""), function


def test_results_are_float32_for_low_precision_and_float64_for_float64() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        arguments = loss_arguments(dtype)
        out = trajectory_balance_loss(**arguments, return_entropy=True)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert [value.dtype for value in out if value is not None] == [expected] * 4
        assert [tuple(value.shape) for value in out if value is not None] == [(), (2,), (2,), (5,)]
        out.loss.backward()
        assert arguments["hidden"].grad.dtype == dtype
        assert arguments["head_weight"].grad.dtype == dtype


def loss_arguments(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Valid arguments: T = 5, B = 2, H = 4, V = 7."""
    return {
        "hidden": torch.ones(5, 4, dtype=dtype, requires_grad=True),
        "head_weight": torch.ones(7, 4, dtype=dtype, requires_grad=True),
        "token_ids": torch.tensor([0, 1, 2, 6, 4]),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "rewards": torch.ones(2),
        "log_z": torch.zeros(2),
        "beta": 0.5,
    }


BAD_LINEAR_ARGUMENTS = [
    ({"hidden": torch.ones(5, 3)}, "hidden and head_weight disagree on H: 3 vs 4"),
    ({"hidden": torch.ones(4)}, r"hidden must have 2 dimension\(s\), got shape \(4,\)"),
    (
        {"hidden": torch.ones(2, 3, 4)},
        r"hidden must have 2 dimension\(s\), got shape \(2, 3, 4\): pack a padded batch by hidden\[:, :-1\]\[mask",
    ),
    ({"token_ids": torch.zeros(2, 3, dtype=torch.int64)}, r"token_ids must .* by input_ids\[:, 1:\]\[mask"),
    ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
    ({"hidden": torch.ones(5, 4, dtype=torch.int64)}, "hidden has dtype torch.int64, expected one of"),
    ({"hidden": torch.ones(4, 5).T}, r"hidden must be contiguous in its last dimension, got strides \(1, 5\)"),
    ({"hidden": torch.ones(5, 4, device="meta")}, "head_weight and hidden are on different devices: cpu vs meta"),
    ({"head_weight": torch.ones(7, 4).bfloat16()}, "different dtypes: torch.float32 vs torch.bfloat16"),
    ({"head_weight": torch.ones(0, 4)}, r"head_weight must have at least one row and one column, got \(0, 4\)"),
    ({"head_weight": torch.ones(4, 7).T}, r"head_weight must be contiguous in its last dimension"),
    ({"token_ids": torch.zeros(4, dtype=torch.int64)}, "hidden and token_ids disagree on T: 5 vs 4"),
    ({"token_ids": torch.zeros(5)}, "token_ids has dtype torch.float32, expected one of torch.int64, torch.int32"),
    ({"token_ids": torch.tensor([0, 1, 7, 0, 0])}, r"token_ids must lie in \[0, 7\), got values from 0 to 7"),
    ({"token_ids": torch.tensor([0, 1, -100, 0, 0])}, r"token_ids must lie in \[0, 7\), got values from -100 to 1"),
    ({"bias": torch.zeros(6)}, "bias and head_weight disagree on V: 6 vs 7"),
    ({"bias": torch.zeros(7).double()}, "bias and hidden have different dtypes: torch.float64 vs torch.float32"),
    ({"temperature": 0.0}, "temperature must be finite and greater than 0, got 0.0"),
    ({"temperature": float("nan")}, "temperature must be finite and greater than 0, got nan"),
    ({"temperature": torch.ones(())}, "temperature must be a Python number, got Tensor"),
    ({"workspace_bytes": 0}, "workspace_bytes must be None or a positive int, got 0"),
    ({"skipped_share": 1.0}, "skipped_share must be a Python number of at least 0 and below 1, got 1.0"),
    ({"skipped_share": -1e-9}, "skipped_share must be a Python number of at least 0 and below 1, got -1e-09"),
    ({"skipped_share": float("nan")}, "skipped_share must be a Python number of at least 0 and below 1, got nan"),
    ({"skipped_share": True}, "skipped_share must be a Python number of at least 0 and below 1, got True"),
    (
        {"backend": "cuda"},
        r"backend must be one of \('auto', 'triton', 'compiled', 'reference', 'pingpong'\), got 'cuda'",
    ),
]

BAD_SEQUENCE_ARGUMENTS = [
    ({"cu_seqlens": torch.tensor([1, 2, 5])}, "cu_seqlens must start at 0"),
    ({"cu_seqlens": torch.tensor([0, 6, 5])}, "cu_seqlens must not decrease"),
    ({"cu_seqlens": torch.tensor([0, 2, 4])}, "cu_seqlens must end at T = 5, the rows of"),
    ({"cu_seqlens": torch.tensor([0.0, 2.0, 5.0])}, "cu_seqlens has dtype torch.float32"),
    ({"cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"cu_seqlens must have B \+ 1 entries, got 0"),
    ({"rewards": torch.ones(3)}, "rewards and cu_seqlens disagree on B: 3 vs 2"),
    ({"rewards": torch.ones(2, dtype=torch.int64)}, r"rewards has dtype torch.int64, .*: give rewards.float\(\)"),
    ({"ref_logprobs": torch.ones(2, 3)}, r"ref_logprobs must have 1 .*: pack a padded batch by ref_logprobs\[mask\]"),
    ({"rewards": torch.ones(2, device="meta")}, "rewards and .* are on different devices: meta vs cpu"),
    ({"log_z": torch.ones(())}, r"log_z must have 1 dimension\(s\), got shape \(\)"),
    ({"weights": torch.ones(1)}, "weights and cu_seqlens disagree on B: 1 vs 2"),
    ({"ref_logprobs": torch.ones(4)}, r"ref_logprobs must have shape \[T\] = \[5\] or \[B\] = \[2\], got \(4,\)"),
    ({"behavior_logprobs": torch.ones(3)}, "behavior_logprobs must have shape"),
    ({"beta": 0}, "beta must be finite and greater than 0, got 0"),
    ({"beta": float("inf")}, "beta must be finite and greater than 0, got inf"),
    ({"beta": True}, "beta must be a Python number, got bool"),
    ({"importance_cap": 2.0}, "importance_cap needs behavior_logprobs, got None"),
    ({"importance_cap": -1.0, "behavior_logprobs": torch.zeros(2)}, "importance_cap must be finite and greater"),
    ({"reduction": "none"}, r"reduction must be one of \('sum', 'mean'\), got 'none'"),
    ({"denominator": 0.0}, "denominator must be finite and greater than 0, got 0.0"),
    ({"denominator": torch.ones(1)}, r"denominator must be a number or a 0-d tensor, got shape \(1,\)"),
]


@pytest.mark.parametrize(("bad", "message"), [*BAD_LINEAR_ARGUMENTS, *BAD_SEQUENCE_ARGUMENTS])
def test_errors_of_the_loss(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trajectory_balance_loss(**{**loss_arguments(), **bad})


@pytest.mark.parametrize(("bad", "message"), BAD_LINEAR_ARGUMENTS)
def test_errors_of_linear_logprobs(bad: dict[str, object], message: str) -> None:
    arguments = {name: loss_arguments()[name] for name in ("hidden", "head_weight", "token_ids")}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**arguments, **bad})


@pytest.mark.parametrize(("bad", "message"), BAD_SEQUENCE_ARGUMENTS)
def test_errors_of_the_loss_from_logprobs(bad: dict[str, object], message: str) -> None:
    arguments = {name: loss_arguments()[name] for name in ("cu_seqlens", "rewards", "log_z", "beta")}
    with pytest.raises(ValueError, match=message):
        trajectory_balance_from_logprobs(torch.zeros(5), **{**arguments, **bad})


def test_errors_of_the_tree() -> None:
    tree = PriorityTree(4, seed=0)
    floats, integers = torch.ones(2), torch.tensor([0, 1])
    cases = [
        (lambda: PriorityTree(0, seed=0), "capacity must be an int from 1 to"),
        (lambda: PriorityTree(2**31 + 1, seed=0), "capacity must be an int from 1 to 2147483648, got 2147483649"),
        (lambda: PriorityTree(4, seed=-1), "seed must be an int from 0 to"),
        (lambda: PriorityTree(4, seed=2**64), "seed must be an int from 0 to 18446744073709551615, got"),
        (lambda: PriorityTree(4, seed=0, stream=2**32), "stream must be an int from 0 to"),
        (lambda: tree.update(floats, floats), "idx has dtype torch.float32"),
        (lambda: tree.update(integers, torch.ones(3)), "idx and w disagree on B: 2 vs 3"),
        (lambda: tree.update(integers, torch.ones(2, 1)), r"w must have 1 dimension\(s\), got shape \(2, 1\)"),
        (lambda: tree.update(integers, torch.ones(2, dtype=torch.bool)), "w has dtype torch.bool"),
        (lambda: tree.write_range(0, torch.ones(5)), "w has more elements than the tree has leaves: 5 vs 4"),
        (lambda: tree.write_range(torch.ones(()), floats), "start must be one integer, got torch.float32"),
        (lambda: tree.rebuild(torch.ones(3)), "w and the tree disagree on N: 3 vs 4"),
        (lambda: tree.rebuild(torch.sigmoid), "stats must be given when w is a function, got None"),
        (lambda: tree.rebuild(torch.ones(4), torch.ones(4)), "stats must be None when w is a tensor"),
        (lambda: tree.sample(-1), r"B must be an int from 0 to 2\*\*31 - 1, got -1"),
        (lambda: tree.sample(2, "uniform"), r"mode must be one of \('systematic', 'stratified', 'iid'\), got"),
        (lambda: tree.sample_distinct(2, "topk"), r"method must be one of \('first', 'race'\), got 'topk'"),
        (lambda: Bell(float("nan"), 0.1), "center must be finite, got nan"),
        (lambda: Bell(0.5, 0.0), "width must be positive and finite, got 0.0"),
        (lambda: tree.rebuild(Bell(0.5, 0.1)), "stats must be given when w is a function, got None"),
        (lambda: tree.rebuild(Bell(0.5, 0.1), torch.ones(3)), "stats and the tree disagree on N: 3 vs 4"),
        (lambda: tree.rebuild(Bell(0.5, 0.1), torch.arange(4)), "stats has dtype torch.int64"),
        (lambda: tree.rebuild(torch.ones(4), allowed=torch.ones(4)), "allowed has dtype torch.float32"),
        (lambda: tree.rebuild(torch.ones(4), allowed=torch.ones(3) > 0), "allowed and the tree disagree on N: 3 vs 4"),
        (lambda: tree.sample_distinct(2, "race", exploration=1.5), "exploration must be from 0 to 1, and 0 unless"),
        (lambda: tree.sample_distinct(2, exploration=0.1), "exploration must be from 0 to 1, and 0 unless the method"),
        (lambda: tree.load_state_dict({}), "state lacks weights, step, seed, stream, size"),
        (lambda: tree.load_state_dict(PriorityTree(5, seed=0).state_dict()), r"shape \(5,\), expected \(4,\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert tree.step.item() == 0


def test_int32_indices_and_offsets_are_accepted() -> None:
    arguments = loss_arguments()
    expected = trajectory_balance_loss(**arguments).loss
    arguments["token_ids"] = arguments["token_ids"].int()
    arguments["cu_seqlens"] = arguments["cu_seqlens"].int()
    assert torch.equal(trajectory_balance_loss(**arguments, backend="reference").loss, expected)


@pytest.mark.process
def test_import_is_inert_and_needs_only_torch() -> None:
    folder = Path(paced_kernels.__file__).parents[1]
    assert not (folder / "__init__.py").exists()
    code = (
        "import os, sys, torch\n"
        "class Closed(dict):\n"
        "    def __getitem__(self, key): raise AssertionError(key)\n"
        "    get = __contains__ = __getitem__\n"
        "before = set(sys.modules)\n"
        "os.environ = Closed()\n"
        "import paced_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "roots = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "allowed = set(sys.stdlib_module_names) | {'paced_kernels', 'torch'}\n"
        "assert roots <= allowed, roots - allowed\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr
