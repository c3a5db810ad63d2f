"""Every layout and kernel of the policy's forward pass against one plain pass per sequence."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import tiny_families
import tiny_policy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel, masking_utils

from paced_fast.data import packing
from paced_fast.data.records import Rollouts
from paced_fast.errors import InputError
from paced_fast.policy import SHARED, Attention, Policy, attention, choose_attention
from paced_fast.policy import policy as policy_module
from paced_fast.policy.micro_batches import packed_micro_batches, packed_row

LENGTHS = [4, 1, 0, 6, 2, 5, 1, 3, 7]
PROMPTS = (5, 9, 2)
LAYOUTS = ("masked", "blocks", "packed-sdpa")


def batch() -> Rollouts:
    return tiny_policy.rollouts(LENGTHS, group_size=3, prompt_lengths=PROMPTS)


def policy_of(made: PreTrainedModel, layout: str, monkeypatch: pytest.MonkeyPatch, max_tokens: int = 4096) -> Policy:
    """The model computed in this layout; on a CPU the length of rows decides between mask and blocks."""
    monkeypatch.setattr(policy_module, "MASKED_ROW", {"masked": 10**6, "blocks": 0}.get(layout, 0))
    chosen = choose_attention("packed-sdpa", made) if layout == "packed-sdpa" else SHARED
    return Policy(made, max_tokens=max_tokens, attention=chosen)


def learned(policy: Policy, rollouts: Rollouts, factor: Tensor, max_tokens: int = 4096) -> dict[str, Tensor]:
    """Gradients of a weighted sum of log-probs, micro-batch by micro-batch."""
    head = policy.model.get_output_embeddings()
    for sequences in policy.micro_batches(rollouts, range(rollouts.num_sequences), max_tokens):
        part = packing.part(rollouts, sequences)
        logprobs = head(policy.hidden(part.rollouts)).log_softmax(-1).gather(-1, part.rollouts.token_ids[:, None])[:, 0]
        (logprobs * factor[part.tokens]).sum().backward()
    return tiny_policy.gradients(policy.model)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, gradient in found.items():
        scale = float(wanted[name].abs().max())
        assert scale > 1e-4, name
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=3e-5 * scale, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_layout_has_the_log_probs_and_gradients_of_separate_sequences(
    family: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, made = batch(), tiny_families.model(family)
    wanted = tiny_policy.naive_logprobs(made, rollouts)
    assert float(wanted.detach().std()) > 0.3, "a uniform distribution would hide mistakes"
    factor = torch.randn(rollouts.num_tokens)
    (wanted * factor).sum().backward()
    gradients = tiny_policy.gradients(made)
    made.zero_grad()
    policy = policy_of(made, layout, monkeypatch)
    torch.testing.assert_close(policy.logprobs(rollouts, 1.0), wanted.detach(), rtol=1e-4, atol=1e-4)
    assert_close(learned(policy, rollouts, factor), gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_batch_has_the_same_log_probs(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What other trainers compute: every sequence a row, zeros to its right, a mask of two dimensions."""
    rollouts, made = batch(), tiny_families.model("qwen3")
    sequences = [
        torch.tensor([*prompt, *tokens.tolist()])
        for prompt, tokens in zip(rollouts.prompt_ids, rollouts.token_ids.split(rollouts.lengths), strict=True)
    ]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s), dtype=torch.int64) for s in sequences], batch_first=True)
    with torch.no_grad():
        logprobs = made(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    wanted = [
        logprobs[i, len(prompt) - 1 + t, sequences[i][len(prompt) + t]]
        for i, prompt in enumerate(rollouts.prompt_ids)
        for t in range(rollouts.lengths[i])
    ]
    found = policy_of(made, layout, monkeypatch).logprobs(rollouts, 1.0)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_budget_of_tokens_gives_the_same_gradient(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts, made = batch(), tiny_families.model("mistral-window")
    factor = torch.randn(rollouts.num_tokens)
    whole = learned(policy_of(made, layout, monkeypatch), rollouts, factor)
    for max_tokens in (1, 17, 30):
        made.zero_grad()
        policy = policy_of(made, layout, monkeypatch, max_tokens)
        parts = policy.micro_batches(rollouts, range(len(LENGTHS)))
        assert len(parts) > 1
        assert_close(learned(policy, rollouts, factor, max_tokens), whole)


def test_a_packed_row_has_every_token_once_and_positions_that_start_again() -> None:
    rollouts = tiny_policy.rollouts([3, 1, 0, 2], group_size=2, prompt_lengths=(1, 2))  # prompts of 3 and 4 tokens
    first, second = rollouts.prompt_ids[0], rollouts.prompt_ids[2]
    a, _, c = (part.tolist() for part in (rollouts.token_ids[:3], rollouts.token_ids[3:4], rollouts.token_ids[4:]))
    row = packed_row(rollouts, share_prompts=False)
    # The last token of a completion predicts nothing, so it is not there.
    assert row.input_ids.tolist() == [[*first, *a[:2], *first, *second, *second, c[0]]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert row.lengths == (5, 3, 4, 5)
    assert row.cu_seqlens.tolist() == [0, 5, 8, 12, 17]
    assert row.cu_seqlens.dtype == torch.int32
    assert row.prefixes == (-1, -1, -1, -1)
    assert row.hidden_index.tolist() == [2, 3, 4, 7, 15, 16]
    row = packed_row(rollouts, share_prompts=True)
    assert row.input_ids.tolist() == [[*first, *a[:2], *second, c[0]]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    assert row.lengths == (3, 2, 4, 1)
    assert row.prefixes == (-1, 0, -1, 2)
    assert row.hidden_index.tolist() == [2, 3, 4, 2, 8, 9]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 60), st.booleans())
def test_packed_micro_batches_partition_the_sequences_within_the_budget(
    lengths: list[int], group_size: int, max_tokens: int, share: bool
) -> None:
    rollouts = tiny_policy.rollouts(lengths, group_size=group_size)
    chosen = list(range(len(lengths)))[::2]
    batches = packed_micro_batches(rollouts, chosen, max_tokens, share_prompts=share)
    assert sorted(i for part in batches for i in part) == chosen
    sizes = [packed_row(packing.select(rollouts, part), share_prompts=share).input_ids.shape[1] for part in batches]
    assert all(size <= max_tokens or len(part) == 1 for size, part in zip(sizes, batches, strict=True))
    assert all(a + b > max_tokens for i, a in enumerate(sizes) for b in sizes[:i]), "two would have fitted in one"


def test_long_rows_keep_no_mask_of_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing kept for the backward pass grows with the square of the row."""
    rollouts = tiny_policy.rollouts([9] * 40, group_size=20, prompt_lengths=(4,))
    largest = {}
    for layout in LAYOUTS:
        policy = policy_of(tiny_families.model("llama"), layout, monkeypatch)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            length = policy.hidden(rollouts).shape[0]
        largest[layout] = max(sizes)
    square = (6 + 20 * 8) ** 2
    assert length == 360
    assert largest["masked"] >= 2 * square
    assert largest["blocks"] < square
    assert largest["packed-sdpa"] < square


def test_short_rows_on_a_cpu_have_a_mask_and_long_ones_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    policy = tiny_policy.policy()
    for name in ("forward_rows", "packed_row"):
        real = getattr(policy_module, name)
        monkeypatch.setattr(policy_module, name, lambda *a, n=name, f=real, **k: calls.append(n) or f(*a, **k))
    policy.hidden(tiny_policy.rollouts([126, 126], group_size=2, prompt_lengths=(4,)))  # 6 + 125 + 125
    policy.hidden(tiny_policy.rollouts([127, 126], group_size=2, prompt_lengths=(4,)))
    assert calls == ["forward_rows", "packed_row"]


def test_the_host_does_not_look_for_sequences_in_a_packed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would read the positions back from the device to find where sequences end."""

    def reads(*_: Any) -> None:
        raise AssertionError("the host waits for the positions")

    policies = [policy_of(tiny_families.model(family), "packed-sdpa", monkeypatch) for family in tiny_families.FAMILIES]
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", reads)
    for policy in policies:
        policy.hidden(batch())
    made, ids, positions = tiny_families.model("llama"), torch.tensor([[1, 2]]), torch.tensor([[0, 0]])
    with pytest.raises(AssertionError, match="waits"):
        made(input_ids=ids, position_ids=positions, use_cache=False)


def test_calls_without_a_packed_row_are_what_they_were() -> None:
    ids, mask = torch.randint(0, 11, (2, 7)), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    for family in tiny_families.FAMILIES:
        made = tiny_families.model(family)
        before = made(input_ids=ids, attention_mask=mask).logits
        Policy(made, max_tokens=10)
        assert torch.equal(made(input_ids=ids, attention_mask=mask).logits, before)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float, left: int, right: int
) -> Tensor:
    """Attention of sequences one after another, as the documentation of the kernels has it."""
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    outputs = []
    for start, end in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False):
        own = [tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        place = torch.arange(end - start)
        distance = place[:, None] - place[None, :]
        seen = torch.ones(end - start, end - start, dtype=torch.bool)
        if left >= 0:
            seen &= distance <= left
        if right >= 0:
            seen &= -distance <= right
        output = scaled_dot_product_attention(*own, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def flash(returns_more: bool) -> Any:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float,
        causal: bool,
        deterministic: bool,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Any:
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        assert not deterministic
        right = 0 if causal else window_size[1]
        output = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], right)
        return (output, None) if returns_more else output

    return types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


def torch_varlen(takes_groups: bool, unasked: str = "refuses") -> Any:
    """PyTorch's function, with or without the option for grouped heads; without it, what groups lead to."""

    def grouped(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        if not enable_gqa and q.shape[1] != k.shape[1]:
            raise ValueError("heads differ")
        assert max_q == max_k == int(cu_q.diff().max())
        return varlen(q, k, v, cu_q, cu_k, scale, *window_size)

    def plain(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
        if unasked == "wrong" and q.shape[1] != k.shape[1]:
            k = k.flip(1)
        seen_heads.append((q.shape[1], k.shape[1]))
        is_taken = unasked != "refuses"
        return grouped(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=is_taken)

    seen_heads: list[tuple[int, int]] = []
    return types.SimpleNamespace(varlen_attn=grouped if takes_groups else plain, seen_heads=seen_heads)


@pytest.mark.parametrize(("unasked", "is_repeated"), [("takes", False), ("refuses", True), ("wrong", True)])
def test_keys_are_repeated_only_where_the_kernel_is_not_right_without(
    unasked: str, is_repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = torch_varlen(takes_groups=False, unasked=unasked)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    made, rollouts = tiny_families.model("llama"), batch()
    wanted = tiny_policy.naive_logprobs(made, rollouts).detach()
    kernel = attention._VARLEN["packed-torch"].load()
    policy = Policy(made, max_tokens=4096, attention=Attention("packed-torch", "a stand-in", kernel))
    torch.testing.assert_close(policy.logprobs(rollouts, 1.0), wanted, rtol=1e-4, atol=1e-4)
    queries, keys = stand_in.seen_heads[-1]
    assert made.config.num_key_value_heads < made.config.num_attention_heads == queries
    assert keys == (queries if is_repeated else made.config.num_key_value_heads)


@pytest.mark.parametrize("family", ["llama", "qwen3-window"])
@pytest.mark.parametrize(
    ("name", "module", "stand_in"),
    [
        ("packed-flash4", "flash_attn.cute", flash(returns_more=True)),
        ("packed-flash3", "flash_attn_interface", flash(returns_more=False)),
        ("packed-flash2", "flash_attn", flash(returns_more=False)),
        ("packed-torch", "torch.nn.attention.varlen", torch_varlen(takes_groups=True)),
        ("packed-torch", "torch.nn.attention.varlen", torch_varlen(takes_groups=False)),
    ],
)
def test_kernels_are_called_as_they_are_documented(
    name: str, module: str, stand_in: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module.partition(".")[0], sys.modules.get("torch" if "torch" in module else ""))
    monkeypatch.setitem(sys.modules, module, stand_in)
    made, rollouts = tiny_families.model(family), batch()
    wanted = tiny_policy.naive_logprobs(made, rollouts).detach()
    policy = Policy(made, max_tokens=4096, attention=Attention(name, "a stand-in", attention._VARLEN[name].load()))
    torch.testing.assert_close(policy.logprobs(rollouts, 1.0), wanted, rtol=1e-4, atol=1e-4)


def on_gpu(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> Any:
    """What the choice reads of a model."""
    settings = types.SimpleNamespace(model_type="llama", head_dim=head_dim, hidden_size=128, num_attention_heads=2)
    return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, config=settings)


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, *installed: str) -> None:
    """A GPU of this compute capability with these packages."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    real = attention.util.find_spec
    parents = {name.partition(".")[0] for name in installed}
    monkeypatch.setattr(
        attention.util,
        "find_spec",
        lambda name: (object() if name in parents else None) if name.startswith("flash") else real(name),
    )
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.flash_attn_interface", "flash_attn_interface"):
        there = name in installed or name in parents
        monkeypatch.setitem(sys.modules, name, flash(returns_more=False) if there else None)


FLASH2, FLASH3, FLASH4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [
        (9, (FLASH2, FLASH3, FLASH4), "packed-flash3"),
        (9, (FLASH2, FLASH4), "packed-flash4"),
        (9, (FLASH2, FLASH3), "packed-flash3"),
        (9, (FLASH2,), "packed-flash2"),
        (10, (FLASH2, FLASH3, FLASH4), "packed-flash4"),
        (10, (FLASH2, FLASH3), "packed-flash2"),
        (8, (FLASH2, FLASH3, FLASH4), "packed-flash2"),
        (8, (FLASH4,), "packed-torch"),
        (9, (), "packed-torch"),
        (7, (FLASH2, FLASH3, FLASH4), "shared"),
    ],
)
def test_auto_takes_the_kernel_that_was_written_for_the_gpu(
    major: int, installed: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, major, *installed)
    assert choose_attention("auto", on_gpu()).name == expected


def test_what_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_families.model("llama")
    assert choose_attention("auto", made) == SHARED
    with pytest.raises(
        InputError, match=r"^--model.attention packed-flash2: the kernel needs a GPU, and .* cpu: use auto"
    ):
        choose_attention("packed-flash2", made)
    gpu(monkeypatch, 9, FLASH2)
    assert choose_attention("packed-flash2", on_gpu()).kernel is not None
    with pytest.raises(InputError, match=r"packed-flash3: flash-attn-3 is not installed: use auto"):
        choose_attention("packed-flash3", on_gpu())
    with pytest.raises(InputError, match=r"packed-flash4: flash-attn-4 is not installed or does not load \("):
        choose_attention("packed-flash4", on_gpu())
    chosen = choose_attention("auto", on_gpu(torch.float32))
    assert (chosen.name, chosen.reason) == ("shared", "varlen kernels need bfloat16 parameters, and these are float32")
    with pytest.raises(InputError, match="a multiple of 8 up to 256, and it is 12"):
        choose_attention("packed-torch", on_gpu(head_dim=12))


def test_attention_that_packed_rows_do_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_families.model("mistral-window")
    policy = policy_of(made, "packed-sdpa", monkeypatch)
    row = attention.Packed(packed_row(batch(), share_prompts=False), attention.sdpa, {})
    layer = made.model.layers[0].self_attn
    one = torch.zeros(1, 2, 3, 8)
    with pytest.raises(InputError, match="softcap"):
        attention._attend(layer, one, one, one, None, scaling=1.0, packed=row, softcap=30.0, sliding_window=3)
    with pytest.raises(InputError, match="does not pass its sliding window"):
        attention._attend(layer, one, one, one, None, scaling=1.0, packed=row)
    policy.model.config.attn_logit_softcapping = 50.0
    with pytest.raises(InputError, match=r"caps its attention scores, .*: use auto or padded"):
        Policy(made, max_tokens=10, attention=SHARED)
