"""Presets that need a GPU: models and data sets of the Hugging Face hub.

Parameters are bfloat16, and the optimiser keeps float32 masters of them: at a learning rate of 1e-6 an update of a
bfloat16 number nearly always rounds away.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from paced_fast.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GenerationConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    SchedulerConfig,
    WeightSyncConfig,
)

_ON_GPU: dict[str, Any] = {
    "device": "cuda",
    "dtype": "bfloat16",
    "matmul_precision": "high",
}
_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_MATH_FIELDS = "prompt=problem&answer=answer&reward=math"
_DEEPSCALER = f"hf:agentica-org/DeepScaleR-Preview-Dataset?split=train&{_MATH_FIELDS}"
_MATH_EVAL = (
    f"jsonl:aime24.jsonl?{_MATH_FIELDS}&optional=true",
    f"jsonl:amc23.jsonl?{_MATH_FIELDS}&optional=true",
    f"hf:HuggingFaceH4/MATH-500?split=test&{_MATH_FIELDS}&size=100&seed=0",
)
_PAPER_OPTIMIZER = OptimizerConfig(learning_rate=1e-6, weight_decay=0.1, minibatches=4, micro_batch_tokens=8192)
_PAPER_GENERATION = GenerationConfig(prompts_per_step=128, group_size=8, max_completion_tokens=3072, temperature=1.0)


def qwen_math_1_5b() -> Config:
    """Qwen2.5-Math-1.5B on DeepScaleR with the settings of arXiv 2602.12642; needs a GPU.

    From the paper: model, data, 150 steps, AdamW with learning rate 1e-6 and weight decay 0.1, groups of 8 at
    temperature 1, prompts up to 1024 and completions up to 3072 tokens, beta 0.05, tau 0.5, evaluation every 10 steps.
    Prompts per step, minibatches, template, precision and the evaluation sets are not in it.
    """
    return Config(
        preset="qwen_math_1_5b",
        steps=150,
        model=ModelConfig(name="Qwen/Qwen2.5-Math-1.5B", **_ON_GPU),
        data=DataConfig(
            train=(_DEEPSCALER,),
            eval=_MATH_EVAL,
            template=(
                f"<|im_start|>system\n{_BOXED}<|im_end|>\n<|im_start|>user\n{{prompt}}<|im_end|>\n"
                "<|im_start|>assistant\n"
            ),
            max_prompt_tokens=1024,
            too_long="skip",
        ),
        generation=_PAPER_GENERATION,
        loss=LossConfig(beta=0.05),
        optimizer=_PAPER_OPTIMIZER,
        scheduler=SchedulerConfig(tau=0.5),
        evaluation=EvaluationConfig(every=10, samples=8, final_samples=32),
    )


def qwen_math_7b() -> Config:
    """Qwen2.5-Math-7B on DeepScaleR with the settings of arXiv 2602.12642; needs several GPUs of 80 GB (paper: four).

    What is from the paper and what is not is as for `qwen_math_1_5b`.
    """
    small = qwen_math_1_5b()
    return dataclasses.replace(
        small,
        preset="qwen_math_7b",
        model=dataclasses.replace(small.model, name="Qwen/Qwen2.5-Math-7B"),
    )


def qwen3_4b() -> Config:
    """Qwen3-4B in thinking mode on DeepScaleR, completions of up to 8192 tokens; needs one or more GPUs of 80 GB.

    Not of the paper: its settings for loss, schedule and optimiser, with the model's own template and longer
    completions in fewer prompts.
    """
    small = qwen_math_1_5b()
    return dataclasses.replace(
        small,
        preset="qwen3_4b",
        model=dataclasses.replace(small.model, name="Qwen/Qwen3-4B"),
        data=dataclasses.replace(
            small.data, template=f"<|im_start|>user\n{{prompt}}\n\n{_BOXED}<|im_end|>\n<|im_start|>assistant\n"
        ),
        generation=dataclasses.replace(small.generation, prompts_per_step=64, max_completion_tokens=8192),
        optimizer=dataclasses.replace(small.optimizer, micro_batch_tokens=16384),
    )


def deepcoder_1_5b() -> Config:
    """DeepSeek-R1-Distill-Qwen-1.5B on DeepCoder, whose programs are judged by tests in a sandbox; needs a GPU.

    From the paper (arXiv 2602.12642): model, data, and the settings named at `qwen_math_1_5b`; the length of its run on
    code is not clear from it, and 150 steps stand for it. Which rows of the held-out parts count is not in it either.
    Rows without tests that can be judged (several right outputs, tests too large) are left out, up to a tenth.
    """
    data = "hf:agentica-org/DeepCoder-Preview-Dataset?format=deepcoder&reward=code"
    return Config(
        preset="deepcoder_1_5b",
        steps=150,
        model=ModelConfig(name="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", **_ON_GPU),
        data=DataConfig(
            train=tuple(f"{data}&config={x}&split=train&slice={x}" for x in ("primeintellect", "taco", "lcbv5")),
            eval=(
                f"{data}&config=lcbv5&split=test&slice=livecodebench&size=100&seed=0",
                f"{data}&config=codeforces&split=test&slice=codeforces&size=100&seed=0",
            ),
            # The model's own marks, which are not ASCII; the tokenizer begins with the first of them by itself.
            template=(
                "<\uff5cUser\uff5c>{prompt}\n\nWrite the whole program in Python, in one block of code that begins "
                "with ```python.<\uff5cAssistant\uff5c><think>\n"
            ),
            max_prompt_tokens=1024,
            too_long="skip",
            bad_rows="skip",
            max_bad_share=0.1,
        ),
        # Tests of contests print up to some MiB.
        reward=RewardConfig(code_output_kib=16 * 1024),
        generation=_PAPER_GENERATION,
        loss=LossConfig(beta=0.05),
        optimizer=_PAPER_OPTIMIZER,
        scheduler=SchedulerConfig(tau=0.5),
        evaluation=EvaluationConfig(every=10, samples=8, final_samples=8),
    )


def qwen_math_1_5b_lora() -> Config:
    """LoRA adapters for Qwen2.5-Math-1.5B on DeepScaleR; needs one GPU of 24 GB.

    Not of the paper: its settings with low-rank adapters, a learning rate ten times as high, and the engine's weights
    dropped while the policy trains.
    """
    whole = qwen_math_1_5b()
    return dataclasses.replace(
        whole,
        preset="qwen_math_1_5b_lora",
        lora=LoraConfig(rank=32, alpha=64),
        optimizer=dataclasses.replace(whole.optimizer, learning_rate=1e-5),
        weight_sync=WeightSyncConfig(mode="push", sleep_level=2, kv_cache_gib=8.0),
    )
