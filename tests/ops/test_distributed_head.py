"""The head over two ranks, processes on the CPU with gloo: a split vocabulary, and FSDP2 around `FusedLinearHead`.

Each rank computes the result of one rank by itself and compares. The two processes live as long as the tests pass; a
rank that does not answer in time is killed, so a collective that hangs is a failure.

T = packed tokens, B = sequences, H = hidden size, V = vocabulary.
"""

import contextlib
import datetime
import math
import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from paced_kernels import FusedLinearHead, VocabShard, linear_logprobs, trajectory_balance_loss
from paced_kernels._loss import fused_pass, tiles

WORLD_SIZE = 2
SECONDS_PER_CALL = 90
H, V = 6, 23


class Ranks:
    """Processes that run a function with their rank, and the place where they met."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, str(folder / "meeting"), theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of a process shows
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., None], *arguments: object) -> None:
        """Call `function(rank, *arguments)` on every rank; fail with the first traceback, or when a rank is late."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        for rank, pipe in enumerate(self.pipes):
            try:
                answer = pipe.recv() if pipe.poll(SECONDS_PER_CALL) else "no answer in time"
            except EOFError:
                answer = "the process ended"
            if answer:
                self.stop()
                pytest.fail(f"rank {rank}: {answer}", pytrace=False)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def serve(rank: int, meeting: str, pipe: Connection) -> None:
    """The life of one rank: answers each call with the traceback of its failure, or nothing."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{meeting}", datetime.timedelta(seconds=60), rank=rank, world_size=WORLD_SIZE
    )
    while True:
        function, arguments = pipe.recv()
        answer = ""
        try:
            function(rank, *arguments)
        except BaseException:
            answer = traceback.format_exc()
        pipe.send(answer)


@pytest.fixture(scope="module")
def holder() -> Iterator[list[Ranks]]:
    made: list[Ranks] = []
    yield made
    for ranks in made:
        ranks.stop()


@pytest.fixture
def ranks(holder: list[Ranks], tmp_path: Path) -> Ranks:
    if not holder or not holder[-1].processes:
        holder.append(Ranks(tmp_path))
    return holder[-1]


def make_case(lengths: list[int], dtype: torch.dtype, vocab_size: int = V) -> dict[str, Any]:
    """Arguments of the loss, the same on every rank; row 0 has a log-prob far below -44."""
    generator = torch.Generator().manual_seed(len(lengths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_rows, num_sequences = sum(lengths), len(lengths)
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    token_ids[:3] = torch.tensor([0, vocab_size - 1, vocab_size // 2])  # a target in every shard, and at both ends
    hidden, weight = normal(num_rows, H), normal(vocab_size, H)
    hidden[0] = -30.0 * weight[0]
    hidden[lengths[0]] = math.nan  # in the sequence of weight 0
    weights = torch.rand(num_sequences, generator=generator, dtype=torch.float64) + 0.5
    weights[1] = 0.0
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "head_weight": weight.to(dtype).requires_grad_(),
        "bias": normal(vocab_size).to(dtype).requires_grad_(),
        "log_z": normal(num_sequences).to(dtype).requires_grad_(),
        "token_ids": token_ids,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
        "rewards": torch.rand(num_sequences, generator=generator, dtype=torch.float64),
        "ref_logprobs": -3.0 + normal(num_rows),
        "behavior_logprobs": -3.0 + normal(num_rows),
        "importance_cap": 2.0,
        "weights": weights,
        "beta": 0.3,
    }


LEAVES = ("hidden", "head_weight", "bias", "log_z")


def shard_of(case: dict[str, Any], rank: int, cut: int) -> tuple[dict[str, Any], slice]:
    """The case with this rank's rows of the head, ids `cut` and above on rank 1, and the slice of those rows."""
    vocab_size = case["head_weight"].shape[0]
    rows = slice(0, cut) if rank == 0 else slice(cut, vocab_size)
    own = {name: case[name].detach().clone().requires_grad_() for name in ("hidden", "log_z")}
    own |= {name: case[name].detach()[rows].clone().requires_grad_() for name in ("head_weight", "bias")}
    return {**case, **own, "shard": VocabShard(dist.group.WORLD, rows.start, vocab_size)}, rows


def assert_near(value: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Rounding apart: 1e-10 in float64 and 2e-5 in float32, relative to the largest entry."""
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    atol = tolerance * max(1.0, expected.nan_to_num().abs().max().item())
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=tolerance, atol=atol, equal_nan=True)


def assert_same_on_all_ranks(value: Tensor) -> None:
    everywhere = [torch.empty_like(value) for _ in range(WORLD_SIZE)]
    dist.all_gather(everywhere, value.detach().contiguous())
    torch.testing.assert_close(everywhere[0], everywhere[1], rtol=0, atol=0, equal_nan=True)


def check_split_loss(
    rank: int, dtype: torch.dtype, cut: int, lengths: list[int], way: str, stage: int, options: dict[str, Any]
) -> None:
    case = make_case(lengths, dtype)
    assert linear_logprobs(case["hidden"], case["head_weight"], case["token_ids"], bias=case["bias"])[0] < -44
    whole = trajectory_balance_loss(**{**case, **options, "workspace_bytes": None, "backend": "reference"})
    own, rows = shard_of(case, rank, cut)
    original = getattr(fused_pass.FusedPass, way)
    config = {"choose_config": lambda *_: None} if stage == 1 else {}
    with (
        mock.patch.object(fused_pass.FusedPass, way, autospec=True, side_effect=original) as spy,
        mock.patch.multiple(tiles, **config) if config else contextlib.nullcontext(),
    ):
        split = trajectory_balance_loss(**own, **options)
    assert spy.called, f"no group went the way {way}"
    for value, expected in zip(split, whole, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            assert_near(value, expected, dtype)
            assert_same_on_all_ranks(value)
    found = torch.autograd.grad(split.loss, [own[name] for name in LEAVES])
    wanted = torch.autograd.grad(whole.loss, [case[name] for name in LEAVES])
    for value, expected in zip(found, (wanted[0], wanted[1][rows], wanted[2][rows], wanted[3]), strict=True):
        assert_near(value, expected, dtype)
    assert_same_on_all_ranks(found[0])
    start, stop = case["cu_seqlens"][1:3].tolist()
    assert not found[0][start:stop].any(), "rows of weight 0"


def check_split_logprobs(rank: int, dtype: torch.dtype, cut: int, stage: int, options: dict[str, Any]) -> None:
    case = make_case([4, 3, 2, 0, 5], dtype)
    case["hidden"].detach().nan_to_num_(0.5)
    own, rows = shard_of(case, rank, cut)
    names = LEAVES[:3]
    config = {"choose_config": lambda *_: None} if stage == 1 else {}
    results = []
    for inputs, further in ((own, {"shard": own["shard"], **options}), (case, {})):
        with mock.patch.multiple(tiles, **config) if config else contextlib.nullcontext():
            states = inputs["hidden"], inputs["head_weight"], inputs["token_ids"]
            values = linear_logprobs(*states, bias=inputs["bias"], temperature=0.8, return_entropy=True, **further)
            slopes = torch.linspace(-1, 1, values[0].shape[0], dtype=values[0].dtype)
            loss = (slopes * values[0]).sum() + (slopes.flip(0) * values[1]).sum()
            results.append((*values, *torch.autograd.grad(loss, [inputs[name] for name in names])))
    found, wanted = results
    wanted = (*wanted[:3], wanted[3][rows], wanted[4][rows])
    for value, expected in zip(found, wanted, strict=True):
        assert_near(value, expected, dtype)
    for value in found[:3]:
        assert_same_on_all_ranks(value)


def workspace(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Memory for so many rows of an even shard."""
    return {"workspace_bytes": rows * -(-V // WORLD_SIZE) * dtype.itemsize}


SHORT, LONG = [4, 3, 2, 0, 5], [4, 3, 300, 2]


@pytest.mark.process
@pytest.mark.parametrize("cut", [7, 22])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("way", "lengths", "rows", "options"),
    [
        ("_one_pass", SHORT, 100, {"return_entropy": True}),
        ("_one_pass", SHORT, 6, {"reduction": "mean", "temperature": 0.7}),
        ("_one_pass", SHORT, 100, {"entropy_bonus": 0.3}),
        ("_two_passes", SHORT, 2, {"return_entropy": True, "denominator": 3.0}),
        ("_two_passes", SHORT, 2, {"entropy_bonus": 0.3}),
        ("_stream", LONG, 150, {"return_entropy": True}),
    ],
)
def test_a_split_vocabulary_gives_the_loss_and_gradients_of_a_whole_one(
    ranks: Ranks, way: str, lengths: list[int], rows: int, options: dict[str, Any], dtype: torch.dtype, cut: int
) -> None:
    ranks.run(check_split_loss, dtype, cut, lengths, way, 0, {**options, **workspace(rows, dtype)})


@pytest.mark.process
@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_split_log_probs_and_entropies_have_the_gradients_of_whole_ones(
    ranks: Ranks, dtype: torch.dtype, rows: int
) -> None:
    ranks.run(check_split_logprobs, dtype, 7, 0, workspace(rows, dtype))


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter, which a GPU turns off")
@pytest.mark.parametrize("stage", [1, 2])
def test_split_vocabularies_in_triton(ranks: Ranks, stage: int) -> None:
    triton = {"backend": "triton"}
    ranks.run(check_split_loss, torch.float32, 7, SHORT, "_one_pass", stage, {**triton, "return_entropy": True})
    few = {**triton, "entropy_bonus": 0.3, **workspace(3, torch.float32)}
    ranks.run(check_split_loss, torch.float32, 7, SHORT, "_two_passes", stage, few)
    ranks.run(check_split_loss, torch.float32, 7, LONG, "_stream", stage, {**triton, **workspace(150, torch.float32)})
    ranks.run(check_split_logprobs, torch.float32, 7, stage, {**triton, **workspace(3, torch.float32)})


def check_bfloat16_rows_agree(rank: int) -> None:
    """Unequal shards of a bfloat16 head, whose workspace is planned otherwise, take the same rows at a time."""
    case = make_case(SHORT, torch.bfloat16)
    case["log_z"] = case["log_z"].detach().float()
    own, _ = shard_of(case, rank, 3)
    for num_rows in (1, 2, 5):
        out = trajectory_balance_loss(**own, workspace_bytes=-(-num_rows * 12 * 4 * 4 // 3), backend="reference")
        assert_same_on_all_ranks(out.loss)


@pytest.mark.process
def test_unequal_shards_of_a_bfloat16_head_take_the_same_rows(ranks: Ranks) -> None:
    ranks.run(check_bfloat16_rows_agree)


class Model(nn.Module):
    """Embedding, one layer and the head."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.inner = nn.Linear(H, H)
        self.lm_head = FusedLinearHead.from_linear(nn.Linear(H, V, bias=not is_tied))
        if is_tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
        hidden = torch.tanh(self.inner(self.embedding(token_ids)))
        logprobs, entropy = self.lm_head(hidden, token_ids, return_entropy=True)
        out = self.lm_head(hidden, token_ids, cu_seqlens, ref_logprobs=logprobs - 1.0, beta=0.3, **options)
        return out.loss - 0.1 * entropy.sum() / options["denominator"]


def batch(first: int, last: int, denominator: float) -> dict[str, Any]:
    """Sequences first..last-1 of four."""
    case = make_case([4, 3, 5, 2], torch.float32)
    offsets = case["cu_seqlens"][first : last + 1]
    own = {name: case[name].detach()[first:last] for name in ("rewards", "log_z", "weights")}
    token_ids = case["token_ids"][offsets[0] : offsets[-1]]
    return {**own, "token_ids": token_ids, "cu_seqlens": offsets - offsets[0], "denominator": denominator}


def check_fsdp(rank: int, wraps_head: bool, is_tied: bool, is_mixed: bool) -> None:
    torch.manual_seed(0)
    model = Model(is_tied)
    dtype = torch.bfloat16 if is_mixed else torch.float32
    alone = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    rounded = {name: value.to(dtype) for name, value in alone.items()}
    whole = torch.func.functional_call(model, rounded, kwargs=batch(0, 4, 4.0), tie_weights=True)
    wanted = dict(zip(alone, torch.autograd.grad(whole, list(alone.values())), strict=True))

    # log_z and rewards are float32 and stay so.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    if wraps_head:
        fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    assert isinstance(model.lm_head.weight, DTensor)
    # The mean over ranks of losses over half the denominator is the loss of all sequences.
    half = batch(2 * rank, 2 * rank + 2, 4.0 / WORLD_SIZE)
    for _ in range(2):  # a second step with the gathered weights freed in between
        model.zero_grad()
        loss = model(**half)
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert_near(total / WORLD_SIZE, whole, torch.float32)
    assert {name for name, _ in model.named_parameters()} == set(wanted)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        found = parameter.grad.full_tensor()
        assert found.dtype == torch.float32, name
        error = ((found - wanted[name]).norm() / wanted[name].norm()).item()
        assert error < (1e-2 if is_mixed else 1e-5), (name, error)


@pytest.mark.process
@pytest.mark.parametrize(("wraps_head", "is_tied"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_fsdp_gives_the_loss_and_gradients_of_one_rank(
    ranks: Ranks, wraps_head: bool, is_tied: bool, is_mixed: bool
) -> None:
    ranks.run(check_fsdp, wraps_head, is_tied, is_mixed)


def check_sharded_weight_is_refused(rank: int) -> None:
    del rank
    model = Model(is_tied=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD_SIZE,)))
    inputs = torch.zeros(1, H), model.lm_head.weight, torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="head_weight is a DTensor: call the operation inside the forward"):
        linear_logprobs(*inputs)


@pytest.mark.process
def test_a_sharded_weight_outside_its_module_is_refused(ranks: Ranks) -> None:
    ranks.run(check_sharded_weight_is_refused)
