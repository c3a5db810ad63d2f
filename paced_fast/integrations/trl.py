"""Trajectory balance in TRL: `PacedTrainer` and `PacedConfig` replace GRPOTrainer and GRPOConfig.

::

    from paced_fast.integrations.trl import PacedConfig, PacedTrainer

    trainer = PacedTrainer(model=..., reward_funcs=..., args=PacedConfig(...), train_dataset=...)
    trainer.train()

TRL still does generation, rewards, logging, callbacks, PEFT and vLLM. Only the loss differs: it uses raw rewards and
log Z instead of advantages. log Z is estimated when the rewards arrive, over whole groups from all processes, so TRL
may then shuffle and split the batch in any way. Written against TRL 1.16.

B = sequences per micro-batch, C = longest completion, H = hidden size.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from paced_fast.errors import InputError, pip_install
from paced_fast.generation.vllm_engine import plain_matrices
from paced_fast.integrations import trl_data
from paced_fast.integrations.losses import Balance, group_log_z, loss_from_hidden, loss_from_logprobs, sums_to_log
from paced_fast.integrations.trl_config import PacedConfig
from paced_fast.integrations.trl_head import FUSED, HOST, LOGITS, Completions, add_state_call, find_head, scores
from paced_fast.integrations.trl_memory import PromptMemory, ReduceTable
from paced_fast.integrations.trl_rows import add_old_logprobs, can_share, handed_to_model, regrouped
from paced_fast.policy import linear_options
from paced_kernels import linear_logprobs

try:
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.utils import get_config_model_id
except ImportError as error:
    raise ImportError(f"paced_fast.integrations.trl needs TRL ({error}): {pip_install('trl')}") from error

__all__ = ["PacedConfig", "PacedTrainer"]

logger = logging.getLogger(__name__)

# Inputs, besides the ids, that TRL passes to a model that takes images.
_OF_IMAGES = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
_OF_IMAGES += ("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")


def _as_grpo(own: Callable[..., None]) -> Callable[..., None]:
    """Return `own` with the signature of the installed GRPOTrainer, positional and keyword arguments alike."""
    return functools.wraps(GRPOTrainer.__init__)(own)


class PacedTrainer(GRPOTrainer):
    """GRPOTrainer with the trajectory-balance loss; takes the same arguments, but `args` is a `PacedConfig`."""

    _tag_names = ["trl", "paced-rl"]  # noqa: RUF012 (TRL declares it so)
    _name = "PACED-RL"
    _paper = {  # noqa: RUF012
        "title": "PACED-RL",
        "id": "2602.12642",
        "citation": "@misc{paced-rl, eprint = {arXiv:2602.12642}, year = 2026}",
    }

    args: PacedConfig

    @_as_grpo
    def __init__(self, *positional: Any, **named: Any) -> None:
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *positional, **named)
        given.apply_defaults()
        options = given.arguments
        if options["args"] is None:
            model = options["model"]
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            options["args"] = PacedConfig(f"{name.split('/')[-1]}-{self._name}")
        args = options["args"]
        if not isinstance(args, PacedConfig):
            raise InputError(
                f"args is a {type(args).__name__}: PacedTrainer needs PacedConfig, which extends GRPOConfig"
            )
        trl_data.check_data(options)
        rows = options["train_dataset"]
        remembers = args.log_z == "learned" or args.prompt_sampling == "paced"
        if remembers and not isinstance(rows, trl_data.Dataset):
            raise InputError("log_z='learned' and prompt_sampling='paced' need a train_dataset with a length")
        self.memory: PromptMemory | None = None
        with plain_matrices() if args.use_vllm and args.vllm_mode == "colocate" else nullcontext():
            super().__init__(*given.args[1:], **given.kwargs)
        if remembers:
            process = self.accelerator.process_index
            self.memory = PromptMemory(args, len(rows), device=self.accelerator.device, process_index=process)
            if self.memory.table is not None:
                if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                    raise InputError(
                        "log_z='learned' needs its own optimizer group, which DeepSpeed and FSDP do not take: use "
                        "'group'"
                    )
                self.add_callback(ReduceTable(self.memory.table, self.accelerator))
        plain = not self._is_vlm and self.rollout_func is None and self.environment_factories is None
        tokenizer: Any = self.processing_class
        if plain and not tokenizer(text=[""])["input_ids"][0]:
            trl_data.check_empty_prompts(options)
        base = self.accelerator.unwrap_model(self.model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        self.head = find_head(
            base,
            takes_images=self._is_vlm,
            is_whole=not (self.is_deepspeed_enabled or self.is_fsdp_enabled),
            has_router_loss=self.aux_loss_enabled,
        )
        self.shares_prompts = self._is_generating = False
        if self.head.way == FUSED and args.fused:
            add_state_call(base)
            self.shares_prompts = can_share(self.accelerator.unwrap_model(self.model), base)
        elif self.head.way == FUSED:
            self.head = self.head._replace(way=HOST, why="fused=False")
        elif args.fused or self.head.way == LOGITS:
            whose = "TRL's own head" if self.head.way == HOST else "the model's own logits, which exist in full"
            logger.warning("%s: its log-probs come from %s instead of the fused loss", self.head.why, whose)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **options: Any) -> Any:
        if self.memory is not None and description == "Training":
            dataset = trl_data.Numbered(self._remove_unused_columns(dataset, description))
        return super()._get_dataloader(dataset, description, *args, **options)

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if self.memory is not None and description == "Training":  # `_get_dataloader` has removed them
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        if self.memory is None or self.args.prompt_sampling == "uniform":
            return super()._get_train_sampler(dataset)
        return self.memory.sampler

    def create_optimizer(self, model: Any = None) -> Any:
        """Return TRL's optimizer with an added parameter group for the learned log Z.

        The group has no momentum, so prompts that were not seen stay unchanged. Its eps is well above rounding errors,
        because Adam's first step for a prompt has full size, however small the gradient.
        """
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
            self.memory.save(folder, epochs=int(self.state.epoch or 0), is_rank0=bool(self.args.should_save))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # TRL restarts its count of micro-batches at 0 and would generate at other steps than an uninterrupted run.
            done = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step
            self._step = done * self.args.gradient_accumulation_steps
            if self.memory is not None:
                self.memory.load(Path(checkpoint))

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.shares_prompts or self._mode != "train" or self._buffered_inputs is before:
            return inputs
        self._buffered_inputs = regrouped(self._buffered_inputs)
        if self._defers_old_logprobs:
            add_old_logprobs(self, self._buffered_inputs)
        return self._buffered_inputs[self._step % len(self._buffered_inputs)]

    @property
    def _defers_old_logprobs(self) -> bool:
        """Whether log-probs of the old policy are computed in the rows of the loss, so that both round alike."""
        corrects = self.use_vllm and self.vllm_importance_sampling_correction  # needs them before the batch is split
        return self.shares_prompts and self._mode == "train" and not corrects and self._scores_itself

    @property
    def _scores_itself(self) -> bool:
        """Whether no subclass has log-probs of its own."""
        used = getattr(self._get_per_token_logps_and_entropies, "__func__", None)
        return used is PacedTrainer._get_per_token_logps_and_entropies

    # ---- raw rewards and log Z --------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        index = None
        if self.memory is not None and self._mode == "train":
            index = torch.tensor([trl_data.number_of(row) for row in inputs], device=self.accelerator.device)
            inputs = [{name: value for name, value in row.items() if name != trl_data.INDEX} for row in inputs]
        trl_data.check_rows(
            inputs[0],
            f"a row of the {self._mode} dataset",
            functions=self.reward_funcs,
            makes_prompts=self.environment_factories is not None,
            adds_fields=self.rollout_func is not None,
        )
        self._is_generating = True
        try:
            with trl_data.kept_rewards(self) as kept:
                output = super()._generate_and_score_completions(inputs)
        finally:
            self._is_generating = False
        per_function = kept[-1]  # [processes * B, functions], NaN = not scored
        scored = ~per_function.isnan().all(1)
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(1)
        group_size = int((self.num_generations if self._mode == "train" else self.num_generations_eval) or 1)
        groups = torch.arange(len(rewards)).div(group_size, rounding_mode="floor").tolist()
        log_z = rewards / self.args.tb_beta
        if group_size > 1:
            log_z = group_log_z(log_z, groups, group_size=group_size, scored=scored)
        start = self.accelerator.process_index * len(inputs)
        here = slice(start, start + len(inputs))
        has_tokens = output["completion_mask"].bool().any(1)  # TRL zeroes the mask of a truncated completion
        output["rewards"], output["log_z"] = rewards[here], log_z[here]
        output["weights"] = (scored[here] & has_tokens).float()
        if self.memory is not None and index is not None:
            every = self.accelerator.gather(index)
            assert isinstance(every, Tensor)
            accuracy = log_z * self.args.tb_beta
            found = self.memory.observe(
                output, index=index, every_index=every, rewards=rewards, accuracy=accuracy, scored=scored
            )
            if found is not None:
                self._metrics["train"]["tb/replayed"].append(float(found))
        output["num_trained"] = self.accelerator.reduce(output["weights"].sum(), reduction="sum")
        output["made_advantages"] = output["advantages"].clone()
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        found = super()._tokenize_prompts(prompts)
        trl_data.check_tokens(prompts, found[0])
        return found

    def _generate(self, prompts: list[Any]) -> Any:
        found = super()._generate(prompts)
        trl_data.check_tokens(prompts, found[0])  # also checks the prompts of a rollout function
        return found

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
        compute_aux_loss: bool = False,
        **options: Any,
    ) -> tuple[Any, Any, Any]:
        """Return log-probs and, if requested, entropies [B, C] and the router loss.

        Log-probs of the old policy are rounded in the same way as those in the loss. TRL's own are not, in bfloat16:
        with them the ratio of a policy to itself would shrink with every token.
        """
        if self.head.way == HOST:
            options |= {"batch_size": batch_size, "compute_entropy": compute_entropy}
            options |= {"compute_aux_loss": compute_aux_loss}
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **options
            )
        if self._is_generating and self._defers_old_logprobs:
            return None, None, None  # `_prepare_inputs` makes up for it
        size, found, router = batch_size or len(input_ids), [], []
        for ids, shown in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            rows = Completions(ids[:, -logits_to_keep:], shown[:, -logits_to_keep:])
            values = self._scores(model, ids, shown, rows, compute_entropy, compute_aux_loss)
            found.append(values[:2])
            router.append(values[2])
        logprobs, entropy = zip(*found, strict=True)
        return (
            torch.cat(logprobs),
            torch.cat(entropy) if compute_entropy else None,
            torch.stack(router).mean() if compute_aux_loss else None,
        )

    def _scores(
        self,
        model: Any,
        input_ids: Tensor,  # [B, P + C]
        attention_mask: Tensor,  # [B, P + C]
        rows: Completions,
        with_entropy: bool,
        with_router_loss: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-probs, entropies [B, C] and the router loss, from the fused op or the model's own logits."""
        handed: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.head.way == LOGITS:
            handed |= {"output_router_logits": True} if with_router_loss else {}
            with self.accelerator.autocast():
                out = model(**handed, use_cache=False)
            found = scores(out.logits, rows, temperature=self.temperature, with_entropy=with_entropy)
            return *found, out.aux_loss if with_router_loss else None

        def scores_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            options: dict[str, Any] = linear_options(bias, self.temperature / self.head.scale)
            options["return_entropy"] = with_entropy
            return linear_logprobs(rows.states(hidden, weight.dtype), weight, rows.token_ids, **options)

        handed = handed_to_model(self, input_ids, attention_mask, rows)
        with self.accelerator.autocast():
            values, router = model(**handed, state_call=scores_of, router_loss=with_router_loss)
        logprobs, entropy = values if with_entropy else (values, None)
        return rows.pad(logprobs), None if entropy is None else rows.pad(entropy), router

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = self._mode
        made = inputs.get("made_advantages")  # None if the batch was not generated here
        if made is not None and not torch.equal(inputs["advantages"], made):
            raise InputError(
                "the advantages were changed after GRPOTrainer made them, but trajectory balance does not use them: "
                "change the rewards in _calculate_rewards, or completion_mask to leave tokens out"
            )
        mask = inputs["completion_mask"] * inputs["tool_mask"] if "tool_mask" in inputs else inputs["completion_mask"]
        weights = inputs["weights"]
        if "importance_sampling_ratio" in inputs:  # [B, 1], trainer policy / vLLM policy
            weights = weights * inputs["importance_sampling_ratio"][:, 0]
        # DDP averages over processes and accumulation adds micro-batches: together, one mean over the whole window.
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
        rows = Completions(inputs["completion_ids"], mask)
        if self.head.way == FUSED and self._scores_itself:

            def loss_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Balance:
                return loss_from_hidden(
                    rows.states(hidden, weight.dtype),
                    weight,
                    rows.token_ids,
                    rows.offsets,
                    **linear_options(bias, self.temperature / self.head.scale),
                    old_logprobs=None if old is None else rows.pack(old),
                    **settings,
                )

            handed = handed_to_model(self, input_ids, attention_mask, rows)
            out, router_loss = model(**handed, state_call=loss_of, router_loss=self.aux_loss_enabled)
        else:
            logprobs, entropy, router_loss = self._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                mask.shape[1],
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **{name: inputs.get(name) for name in _OF_IMAGES},
            )
            out = loss_from_logprobs(logprobs, mask=mask, old_logprobs=old, **settings)
            out = out._replace(entropy=rows.pack(entropy.detach()))
        loss = out.loss
        if self.aux_loss_enabled:
            micro_batches = self.current_gradient_accumulation_steps if mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * router_loss / micro_batches
            every = self.accelerator.gather_for_metrics(router_loss.detach())
            assert isinstance(every, Tensor)
            self._metrics[mode]["aux_loss"].append(every.mean().item())
        self._log_balance(out, inputs["weights"] > 0, mode)
        return loss

    def _log_balance(self, out: Balance, trained: Tensor, mode: str) -> None:
        total = self.accelerator.reduce(sums_to_log(out, trained), reduction="sum")
        assert isinstance(total, Tensor)
        count, squares, ratios, weights, tokens, entropy = total.tolist()
        metrics = self._metrics[mode]
        metrics["tb/residual_rms"].append((squares / max(count, 1)) ** 0.5)
        metrics["tb/log_ratio"].append(ratios / max(count, 1))
        metrics["tb/importance_weight"].append(weights / max(count, 1))
        metrics["entropy"].append(entropy / max(tokens, 1))
