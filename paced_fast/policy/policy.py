"""The policy: a causal language model, the states that predict completion tokens, and prompt embeddings."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from paced_fast.config import Config, stream_seed
from paced_fast.data import packing
from paced_fast.data.records import Completion, Rollouts
from paced_fast.errors import InputError
from paced_fast.policy import embedding
from paced_fast.policy.attention import (
    MASKED_ROW,
    PADDED,
    Attention,
    Kernel,
    Packed,
    block_masks,
    choose_attention,
    install,
    sdpa,
    sdpa_masks,
)
from paced_fast.policy.capped import capped_logprobs
from paced_fast.policy.compiled import compile_parts
from paced_fast.policy.families import (
    check_taught,
    close,
    examine,
    head_states,
    is_plain,
    output_layer,
    probe_tokens,
    spare_tokens,
    unshareable,
    without_cache,
)
from paced_fast.policy.gradient_checkpointing import checkpoint_next_forward, enable_checkpointing
from paced_fast.policy.liger import use_liger
from paced_fast.policy.lora import adapt
from paced_fast.policy.micro_batches import (
    ForwardRows,
    PackedRow,
    forward_rows,
    longest_row,
    micro_batches,
    packed_micro_batches,
    packed_row,
)
from paced_fast.policy.padded import padded_micro_batches, padded_rows
from paced_fast.policy.sharding import Shards
from paced_kernels import linear_logprobs, warm_up

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def linear_options(bias: Tensor | None, temperature: float) -> dict[str, Any]:
    """Bias and temperature as the fused operations take them, for logits (W h + bias) / temperature: they add the bias
    after the division."""
    return {"bias": None if bias is None else bias / temperature, "temperature": temperature}


class Policy:
    """A Hugging Face causal language model seen as hidden states plus a linear head.

    H = hidden size, V = vocabulary, T = packed completion tokens (see `Rollouts`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int,
        attention: Attention | None = None,
        checkpoint: bool = False,
    ) -> None:
        """Wrap `model`; a forward pass without gradients takes at most `max_tokens` tokens at once.

        Without `attention` rows share prompts where the model's type lets them, and hold one sequence elsewhere.
        With `checkpoint` the backward pass computes every layer again instead of keeping its activations. Raises
        InputError for a model whose log-probs could not be told exactly.
        """
        self.family = examine(model)
        if attention is None:
            attention = choose_attention("auto" if unshareable(model.config) else "shared", model)
        if attention.name != PADDED.name:
            if (why := unshareable(model.config)) is not None:
                raise InputError(f"--model.attention {attention.name}: {why}: use auto or padded")
            install(model)
        if checkpoint:
            enable_checkpointing(model)
        self.model = model
        self.max_tokens = max_tokens
        self.attention = attention
        self.checkpoint = checkpoint
        self._shards: Shards | None = None
        if not is_plain(model.config) and attention.name != PADDED.name and not output_layer(model).weight.is_meta:
            self._check_sharing()

    @torch.no_grad()
    def _check_sharing(self) -> None:
        """Raises InputError when rows of several sequences do not give the log-probs of each sequence alone."""
        rows = probe_tokens(self.model.config, self.family.settings, (2, 4, spare_tokens(self.family) + 1, 3))
        prompts = [tuple(row) for row in rows[:2] for _ in range(2)]
        completions = [Completion(token_ids=row, logprobs=[0.0] * len(row), stopped=True) for row in rows[2:] * 2]
        batch = packing.pack(completions, prompts, [0, 0, 1, 1], [0.0] * 4, 0, self.device)
        wanted = []
        for prompt, one in zip(prompts, completions, strict=True):
            ids = torch.tensor([[*prompt, *one.token_ids]], device=self.device)
            logits = self.model(input_ids=ids, **without_cache(self.model)).logits[0, len(prompt) - 1 : -1].float()
            wanted.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
        for masked in (True, False) if self.attention.kernel is None else (False,):
            states = self._shared(batch, masked=masked) * self.family.scale
            found = self.token_logprobs(states, batch.token_ids, 1.0)
            if not close(found, torch.cat(wanted), self.model.dtype):
                raise InputError(
                    f"--model.attention {self.attention.name}: with several sequences per row this model of type "
                    f"{self.family.model_type} has other log-probs than with one: give --model.attention padded"
                )

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.model.device

    @property
    def lockstep(self) -> bool:
        """Whether ranks hold parts of the parameters, so that all must call the model the same number of times."""
        return self._shards is not None

    def shard(self, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        """Split the parameters over the ranks of `mesh`, in place and for good; passes compute in `dtype`."""
        self._shards = Shards(self.model, mesh, dtype=dtype)

    def run(self, compute: Callable[[], Result]) -> Result:
        """`compute()`, which calls `hidden` and may read `head`; what is differentiated is among what it returns.

        On sharded ranks nothing else may call the model outside `whole`.
        """
        return compute() if self._shards is None else self._shards.run(compute)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Gather the whole model on every rank, for passes without gradients, whose number may differ between ranks."""
        with contextlib.nullcontext() if self._shards is None else self._shards.whole():
            yield

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output layer as `hidden` goes with it: weight [V, H] and bias [V] or None."""
        layer = output_layer(self.model)
        return layer.weight, None if layer.bias is None else layer.bias * self.family.scale

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, tied ones once."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name, tied ones once; of sharded ones the shards."""
        if self._shards is not None:
            self._shards.settle()
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def micro_batches(
        self, rollouts: Rollouts, sequences: Sequence[int], max_tokens: int | None = None
    ) -> list[list[int]]:
        """Split `sequences` into lists that one forward pass takes, of at most `max_tokens` (the policy's own) tokens.

        What a pass computes counts: padding where rows are padded, a prompt once where it is shared.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        if self._padded:
            return padded_micro_batches(rollouts, sequences, limit)
        if self._masked(rollouts):
            return micro_batches(rollouts, sequences, limit)
        share = self.attention.kernel is None
        return packed_micro_batches(rollouts, sequences, limit, share_prompts=share)

    @property
    def longest_masked_row(self) -> int:
        """Longest row that uses a mask: 0 with a kernel for packed rows, unlimited on a GPU without one, where a call
        per block would cost more than the masked-out work."""
        if self.attention.kernel is not None:
            return 0
        return MASKED_ROW if self.device.type == "cpu" else sys.maxsize

    @property
    def _padded(self) -> bool:
        return self.attention.name == PADDED.name

    def check_length(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Raises InputError when a sequence of this many tokens exceeds the model's positions."""
        check_taught(self.family.limit, prompt_tokens, completion_tokens)

    def _masked(self, rollouts: Rollouts) -> bool:
        return longest_row(rollouts, self.max_tokens) <= self.longest_masked_row

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """States [T, H] that predict the packed completion tokens, differentiable in the parameters; inside `run`.

        With `head` they make the model's logits, which `token_logprobs` bounds where the model does. Raises InputError
        for a sequence that is longer than the model can place.
        """
        for prompt, length in zip(rollouts.prompt_ids, rollouts.lengths, strict=True):
            self.check_length(len(prompt), length)
        states = self._hidden(rollouts)
        return states if self.family.scale == 1.0 else states * self.family.scale

    def _hidden(self, rollouts: Rollouts) -> Tensor:
        if self.checkpoint and torch.is_grad_enabled():
            checkpoint_next_forward(self.model)
        if self._padded:
            padded = padded_rows(rollouts)
            return head_states(self.model, padded.input_ids).flatten(0, 1)[padded.hidden_index]
        return self._shared(rollouts, masked=self._masked(rollouts))

    def _shared(self, rollouts: Rollouts, *, masked: bool) -> Tensor:
        if masked:
            rows = forward_rows(rollouts, self.max_tokens)
            states = self.body(
                input_ids=rows.input_ids,
                attention_mask=self._masks(rows),
                position_ids=rows.position_ids,
                use_cache=False,
            ).last_hidden_state
            return states.flatten(0, 1)[rows.hidden_index]
        row = packed_row(rollouts, share_prompts=self.attention.kernel is None)
        kernel = self.attention.kernel or sdpa
        windows = set(self._windows().values())
        masks = sdpa_masks(row, windows, self.model.dtype) if kernel is sdpa else {}
        return self._packed(row, kernel, masks)[row.hidden_index]

    def _packed(self, row: PackedRow, kernel: Kernel, masks: Mapping[int | None, Tensor]) -> Tensor:
        """States [L, H] of a packed row."""
        # A mask of four dimensions is taken as it is: without one transformers would look for the ends of sequences in
        # the positions, and make the host wait for what it finds. The kernel does not read it.
        nothing = torch.zeros(1, 1, 0, 0, dtype=self.model.dtype, device=self.device)
        states = self.body(
            input_ids=row.input_ids,
            attention_mask=self._by_kind(dict.fromkeys(self._windows().values(), nothing)),
            position_ids=row.position_ids,
            use_cache=False,
            packed=Packed(row, kernel, masks),
        ).last_hidden_state
        return states[0]

    def _masks(self, rows: ForwardRows) -> Tensor | dict[str, Tensor]:
        """The rows' mask [R, 1, L, L], added to scores; one for each kind of layer where some or all see a window only.

        A model takes a mask as it is given, so its window has to be in it: a token sees those less than so many
        positions back, counted along its own sequence and not along the row. The masks are numbers and not booleans,
        because attention turns a boolean mask into numbers in every layer and autograd keeps each of them.
        """
        masks: dict[int | None, Tensor] = {}
        for window in self._windows().values():
            seen = rows.attention_mask
            if window is not None:
                seen = seen & (rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window)[:, None]
            masks[window] = self._added(seen)
        return self._by_kind(masks)

    def _windows(self) -> dict[str, int | None]:
        """The window of each kind of layer, None where it sees everything; one kind, "", where layers have no kinds."""
        settings = self.family.settings
        window, kinds = getattr(settings, "sliding_window", None), getattr(settings, "layer_types", None)
        if kinds is None:
            return {"": window}
        if window is None or "sliding_attention" not in kinds:
            return {"": None}
        return {"full_attention": None, "sliding_attention": window}

    def _by_kind(self, masks: Mapping[int | None, Tensor]) -> Tensor | dict[str, Tensor]:
        """Masks by window as the model takes them: one tensor, or one for each kind of layer."""
        windows = self._windows()
        return masks[windows[""]] if "" in windows else {kind: masks[window] for kind, window in windows.items()}

    def _added(self, mask: Tensor) -> Tensor:
        """0 where the mask is True, minus infinity elsewhere."""
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probs f32[T] of the packed tokens under the current parameters, at `temperature`."""
        result = torch.zeros(rollouts.num_tokens, dtype=torch.float32, device=self.device)
        for sequences in self.micro_batches(rollouts, range(rollouts.num_sequences)):
            part = packing.part(rollouts, sequences)
            result.index_copy_(0, part.tokens, self.pass_logprobs(part.rollouts, temperature))
        return result

    @torch.no_grad()
    def pass_logprobs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probs f32[T] of one micro-batch, in one pass of any length."""

        def compute() -> Tensor:
            return self.token_logprobs(self.hidden(rollouts), rollouts.token_ids, temperature)

        return self.run(compute)

    def token_logprobs(
        self, hidden: Tensor, token_ids: Tensor, temperature: float, *, skipped_share: float = 0.0
    ) -> Tensor:
        """Log-probs f32[T] of `token_ids` i64[T] given what `hidden` returned, differentiable; inside `run`. Their
        gradient may leave out `skipped_share`, see `linear_logprobs`, but for a model that bounds its logits."""
        weight, bias = self.head
        if self.family.cap is not None:
            return capped_logprobs(hidden, weight, token_ids, bias=bias, cap=self.family.cap, temperature=temperature)
        options = linear_options(bias, temperature)
        return linear_logprobs(hidden, weight, token_ids, skipped_share=skipped_share, **options)

    @torch.no_grad()
    def warm_up(self, *, skipped_share: float = 0.0) -> None:
        """Compile the kernels of `token_logprobs` and of the loss, which a GPU would do in the middle of a run; where
        there are none, nothing. `skipped_share` as they will get it. All ranks together."""
        if self.device.type == "cuda" and self.family.cap is None:
            self.run(partial(self._compile_kernels, skipped_share))

    def _compile_kernels(self, skipped_share: float) -> None:
        weight, bias = self.head
        warm_up(weight.detach(), bias=None if bias is None else bias.detach(), skipped_share=skipped_share)

    @torch.no_grad()
    def embed(self, prompts: Sequence[tuple[int, ...]], *, with_last: bool = False) -> Tensor:
        """Mean of the last layer's states over each prompt's tokens, f32[N, H]; with the last token's behind it,
        f32[N, 2H]. Prompts that are there twice, and what many of them begin with, are computed once."""
        size, distinct = output_layer(self.model).in_features, dict.fromkeys(prompts)
        if self._padded:
            parts = embedding.padded(distinct, self._padded_states, self.max_tokens)
        else:
            parts = embedding.packed(distinct, self._row_states, self.max_tokens, self.device)
        result = torch.zeros(len(prompts), 2 * size if with_last else size, device=self.device)
        return embedding.joined(parts, prompts, result)

    def _padded_states(self, ids: Tensor) -> Tensor:
        return self.run(partial(head_states, self.model, ids.to(self.device)))

    def _row_states(self, row: PackedRow, kernel: Kernel, before: int) -> Tensor:
        def compute() -> Tensor:
            windows = set(self._windows().values())
            masks = block_masks(before, max(row.lengths), windows, self.model.dtype, self.device)
            return self._packed(row, kernel, masks)

        return self.run(compute)

    @property
    def body(self) -> torch.nn.Module:
        """Part of the model that turns tokens into states: the text model without its output layer."""
        return self.model.base_model if self.family.settings is self.model.config else self.model.get_decoder()

    def frozen_copy(self) -> Policy:
        """Copy that is never trained; made before the parameters are split."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return Policy(model, max_tokens=self.max_tokens, attention=self.attention)


def make_policy(model: PreTrainedModel, config: Config) -> Policy:
    """Make the policy with the run's settings for its computation. Raises InputError for a setting that is not
    available."""
    return Policy(
        model,
        max_tokens=config.optimizer.micro_batch_tokens,
        attention=choose_attention(config.model.attention, model, torch.device(config.model.device)),
        checkpoint=config.model.gradient_checkpointing == "on",
    )


def prepare(policy: Policy, config: Config) -> None:
    """Give the policy that is to be trained its adapters and fused layers, and log what was chosen."""
    if config.lora.rank > 0:
        adapt(policy.model, config.lora, seed=stream_seed(config.seed, 0, "adapters"))
    device = torch.device(config.model.device)
    fused = use_liger(config.model.liger, policy.model, device)
    compiled = compile_parts(config.model.compile, policy.model, device)
    trained, total = (sum(p.numel() for p in own) for own in (policy.parameters(), policy.model.parameters()))
    logger.info(
        "policy: attention %s (%s); liger %s; compiled %s; %s of %s parameters trained",
        *(policy.attention.name, policy.attention.reason, fused, compiled, f"{trained:,}", f"{total:,}"),
    )
