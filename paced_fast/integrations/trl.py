"""Trajectory balance in TRL: `PacedTrainer` and `PacedConfig` take the places of GRPOTrainer and GRPOConfig.

::

    from paced_fast.integrations.trl import PacedConfig, PacedTrainer

    trainer = PacedTrainer(model=..., reward_funcs=..., args=PacedConfig(...), train_dataset=...)
    trainer.train()

Generation, rewards, logging, callbacks, PEFT and vLLM are TRL's. What changes is the loss, from raw rewards and log Z
instead of advantages. log Z is estimated when the rewards arrive, over whole groups of all processes, so TRL may
shuffle and split the batch as it likes. Written against TRL 1.16.

B = sequences of a micro-batch, C = longest completion, H = hidden size.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from paced_fast.engine import plain_matrices
from paced_fast.errors import InputError
from paced_fast.integrations.losses import (
    Balance,
    group_log_z,
    loss_from_hidden,
    loss_from_logprobs,
    offsets,
    packed,
)
from paced_fast.integrations.trl_config import PacedConfig, check_prompts, check_reward_columns
from paced_fast.integrations.trl_memory import PromptMemory, ReduceTable
from paced_kernels import linear_logprobs

try:
    from trl.trainer.grpo_trainer import GRPOTrainer
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.trl needs TRL ({error}): pip install 'paced-fast[trl]'") from error

__all__ = ["PacedConfig", "PacedTrainer"]

# What a policy's own forward would do to its logits, and the fused op does not.
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
_SCALED_LOGITS += ("logits_soft_cap", "output_logit_soft_cap", "logits_mup_width_multiplier", "unpadded_vocab_size")

StateCall = Callable[[Tensor, Tensor, Tensor | None], Any]

# The column that numbers the prompts; reward functions do not see it.
_INDEX = "paced_prompt_index"


class PacedTrainer(GRPOTrainer):
    """GRPOTrainer with the trajectory-balance loss; the same arguments, `args` a `PacedConfig`."""

    _tag_names = ["trl", "paced-rl"]  # noqa: RUF012 (TRL declares it so)
    _name = "PACED-RL"
    _paper = {  # noqa: RUF012
        "title": "PACED-RL",
        "id": "2602.12642",
        "citation": "@misc{paced-rl, eprint = {arXiv:2602.12642}, year = 2026}",
    }

    args: PacedConfig

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, **options: Any) -> None:
        if not isinstance(args, PacedConfig):
            raise InputError(f"args is {type(args).__name__}: PacedTrainer takes a PacedConfig, a GRPOConfig with more")
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        for name in ("train_dataset", "eval_dataset"):
            data = options.get(name)
            for part, rows in data.items() if isinstance(data, dict) else [("", data)]:
                label = f"{name}[{part!r}]" if part else name
                columns = getattr(rows, "column_names", None)
                columns = columns if isinstance(columns, list) else None
                if options.get("environment_factory") is None:  # an environment makes prompts of its own
                    check_prompts(columns, label)
                check_reward_columns(functions, columns, label)
        rows: Any = options.get("train_dataset")
        remembers = args.log_z == "learned" or args.prompt_sampling == "paced"
        if remembers:
            if not hasattr(rows, "add_column") or not hasattr(rows, "__len__"):
                raise InputError("log_z='learned' and prompt_sampling='paced' need a train_dataset with a length")
            options["train_dataset"] = rows.add_column(_INDEX, list(range(len(rows))))
        self.memory: PromptMemory | None = None
        with plain_matrices() if args.use_vllm and args.vllm_mode == "colocate" else nullcontext():
            super().__init__(model, reward_funcs, args, **options)
        if remembers:
            process = self.accelerator.process_index
            self.memory = PromptMemory(args, len(rows), device=self.accelerator.device, process_index=process)
            if self.memory.table is not None:
                if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                    raise InputError(
                        "log_z='learned' has an optimizer group that DeepSpeed and FSDP do not take: use 'group'"
                    )
                self.add_callback(ReduceTable(self.memory.table, self.accelerator))
        if args.fused:
            base = self.accelerator.unwrap_model(self.model)
            base = base.get_base_model() if hasattr(base, "get_base_model") else base
            self._check_fused(base)
            add_state_call(base)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self.memory is None or self.args.prompt_sampling == "uniform":
            return super()._get_train_sampler(dataset)
        return self.memory.sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.memory is not None and _INDEX not in self._signature_columns:  # else every prompt is number 0
            self._signature_columns.append(_INDEX)

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's optimizer, with a group for the learned log Z: without momentum, so that unseen prompts stay, and with
        an eps well above rounding errors, because Adam's first step on a prompt is a whole one, however small its
        gradient."""
        optimizer = super().create_optimizer(model)
        table = None if self.memory is None else self.memory.table
        if table is not None and not any(group.get("is_log_z") for group in optimizer.param_groups):
            group = {"params": list(table.parameters()), "lr": self.args.log_z_learning_rate}
            known = {"betas": (0.0, 0.99), "eps": 1e-3, "weight_decay": 0.0}
            group |= {name: value for name, value in known.items() if name in optimizer.param_groups[0]}
            optimizer.add_param_group({**group, "is_log_z": True})
        return optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.memory is not None:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            self.memory.save(folder, epochs=int(self.state.epoch or 0), is_lead=bool(self.args.should_save))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # TRL counts micro-batches from 0 again: it would generate at other steps than an unstopped run.
            done = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
            self._step = done * self.args.gradient_accumulation_steps
            if self.memory is not None:
                self.memory.load(Path(checkpoint))

    def _check_fused(self, base: Any) -> None:
        head = base.get_output_embeddings()
        if getattr(base, "lm_head", head) is not head or hasattr(base, "cls"):
            raise InputError(f"{type(base).__name__} transforms its states before the output layer, unknown to TRL too")
        settings = base.config.get_text_config()
        scaled = [n for n in _SCALED_LOGITS if getattr(settings, n, None) not in (None, 1, 1.0)]
        for is_wrong, what in (
            (bool(scaled), f"this model scales its logits ({', '.join(scaled)})"),
            (getattr(self, "_is_vlm", False), "this model takes images"),
            (self.aux_loss_enabled, "this model has a router loss"),
        ):
            if is_wrong:
                raise InputError(f"{what}, which the fused loss does not know: set fused=False")

    # ---- rewards: raw, with log Z beside them -----------------------------------------------------------------------

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        per_function = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        for name, column in zip(self.reward_func_names, per_function.unbind(1), strict=True):
            if bool(column.isinf().any()):
                raise InputError(f"reward function {name} returned an infinite reward: return None for no verdict")
        self._rewards_per_function = per_function  # [processes * B, functions], NaN for no verdict
        return per_function

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        index = torch.tensor([row.get(_INDEX, 0) for row in inputs], device=self.accelerator.device)
        inputs = [{name: value for name, value in row.items() if name != _INDEX} for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        per_function = self._rewards_per_function
        scored = ~per_function.isnan().all(1)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        group_size = int((self.num_generations if self._mode == "train" else self.num_generations_eval) or 1)
        groups = torch.arange(len(rewards)).div(group_size, rounding_mode="floor").tolist()
        log_z = rewards / self.args.tb_beta
        if group_size > 1:
            log_z = group_log_z(log_z, groups, group_size=group_size, scored=scored)
        start = self.accelerator.process_index * len(inputs)
        here = slice(start, start + len(inputs))
        has_tokens = output["completion_mask"].bool().any(1)  # TRL empties the mask of a truncated completion
        output["rewards"], output["log_z"] = rewards[here], log_z[here]
        output["weights"] = (scored[here] & has_tokens).float()
        if self.memory is not None and self._mode == "train":
            every = self.accelerator.gather(index)
            assert isinstance(every, Tensor)
            accuracy = log_z * self.args.tb_beta
            found = self.memory.observe(
                output, index=index, every_index=every, rewards=rewards, accuracy=accuracy, scored=scored
            )
            if found is not None:
                self._metrics["train"]["tb/replayed"].append(float(found))
        output["num_trained"] = self.accelerator.reduce(output["weights"].sum(), reduction="sum")
        return output

    @property
    def _mode(self) -> str:
        assert self.model is not None
        return "train" if self.model.training else "eval"

    # ---- loss -------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,  # [B, P + C]
        attention_mask: Tensor,  # [B, P + C]
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Any, Any]:
        """Log-probs of the old policy [B, C], rounded as those of the loss are: TRL's are not, in bfloat16, and the
        ratio of a policy to itself would shrink with every token."""
        if not self.args.fused:
            options |= {"batch_size": batch_size, "compute_entropy": compute_entropy}
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        size, found = batch_size or len(input_ids), []
        for ids, shown in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            mask = shown[:, -logits_to_keep:]

            def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor = ids, mask: Tensor = mask):
                width = mask.shape[1]
                rows = packed(hidden[:, -width - 1 : -1], mask).to(weight.dtype)
                tokens = packed(ids[:, -width:], mask)
                return linear_logprobs(
                    rows, weight, tokens, bias=bias, temperature=self.temperature, return_entropy=True
                )

            with self.accelerator.autocast():
                values = model(input_ids=ids, attention_mask=shown, state_call=scores)
            empty = torch.zeros_like(mask, dtype=torch.float32)
            found.append([empty.masked_scatter(mask.bool(), value) for value in values])
        logprobs, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logprobs, entropy if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = self._mode
        mask = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
        weights = inputs["weights"]
        if "importance_sampling_ratio" in inputs:  # [B, 1], the trainer's policy against vLLM's
            weights = weights * inputs["importance_sampling_ratio"][:, 0]
        # DDP averages over processes, and the accumulated micro-batches are added: together one mean over a window.
        denominator = inputs["num_trained"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            denominator = denominator * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        settings = {
            "rewards": inputs["rewards"],
            "log_z": inputs["log_z"] if self.memory is None else self.memory.log_z(inputs),
            "beta": self.args.tb_beta,
            "denominator": denominator,
            "weights": weights,
            "importance_cap": self.args.importance_cap,
        }
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        old = inputs.get("old_per_token_logps")
        if self.args.fused:

            def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Balance:
                width = mask.shape[1]
                return loss_from_hidden(
                    packed(hidden[:, -width - 1 : -1], mask).to(weight.dtype),
                    weight,
                    packed(inputs["completion_ids"], mask),
                    offsets(mask),
                    bias=bias,
                    temperature=self.temperature,
                    old_logprobs=None if old is None else packed(old, mask),
                    **settings,
                )

            out = model(input_ids=input_ids, attention_mask=attention_mask, state_call=loss_of)
            loss = out.loss
        else:
            names = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes")
            names += ("num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")
            logprobs, entropy, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                mask.shape[1],
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **{name: inputs.get(name) for name in names},
            )
            out = loss_from_logprobs(logprobs, mask=mask, old_logprobs=old, **settings)
            out = out._replace(entropy=packed(entropy.detach(), mask))
            loss = out.loss
            if self.aux_loss_enabled:
                micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
                loss = loss + self.router_aux_loss_coef * aux_loss / micro_batches
        self._log_balance(out, inputs["weights"] > 0, mode)
        return loss

    def _log_balance(self, out: Balance, trained: Tensor, mode: str) -> None:
        assert out.entropy is not None
        zero = torch.zeros((), device=trained.device)
        sums = torch.stack(
            [
                trained.float().sum(),
                torch.where(trained, out.residual.float().square(), zero).sum(),
                torch.where(trained, out.log_ratio, zero).sum(),
                torch.where(trained, out.weight, zero).sum(),
                torch.full_like(zero, float(out.entropy.numel())),
                out.entropy.float().sum(),
            ]
        )
        total = self.accelerator.reduce(sums, reduction="sum")
        assert isinstance(total, Tensor)
        count, squares, ratios, weights, tokens, entropy = total.tolist()
        metrics = self._metrics[mode]
        metrics["tb/residual_rms"].append((squares / max(count, 1)) ** 0.5)
        metrics["tb/log_ratio"].append(ratios / max(count, 1))
        metrics["tb/importance_weight"].append(weights / max(count, 1))
        metrics["entropy"].append(entropy / max(tokens, 1))


def add_state_call(model: Any) -> None:
    """Let `model(..., state_call=f)` return `f(hidden states, head weight, head bias)` instead of logits.

    The loss has to be computed inside the forward of the output layer, within that of the model: there DDP, FSDP, ZeRO
    and autocast have the weights ready, and reduce their gradients afterwards. Both modules keep their own forward for
    every other call. The loss travels as a function, because wrappers round the tensors they are handed (rewards in
    bfloat16).
    """

    def states(self: Any, *args: Any, state_call: StateCall, **options: Any) -> Any:
        hidden = self.base_model(*args, use_cache=False, **options).last_hidden_state
        return self.get_output_embeddings()(hidden, state_call=state_call)

    def loss(self: Any, hidden: Tensor, *, state_call: StateCall) -> Any:
        if isinstance(self.weight, DTensor):  # not by FSDP, which has put it together by now
            raise InputError("the output layer is split, which the fused loss does not know: set fused=False")
        return state_call(hidden.to(self.weight.device), self.weight, self.bias)

    for module, instead in ((model, states), (model.get_output_embeddings(), loss)):
        module.forward = types.MethodType(_or_own(module.forward, instead), module)


def _or_own(own: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """`instead` where a call has `state_call`, else `own`, which is bound."""

    @functools.wraps(getattr(own, "__func__", own))  # with its `self`, or the first argument would look bound
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return instead(self, *args, **options) if options.get("state_call") is not None else own(*args, **options)

    return forward
