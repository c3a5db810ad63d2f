"""`PacedTrainer` with a model of images: scored by TRL's own head, images and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install -e '.[trl]'")
pytest.importorskip("PIL", reason="needs Pillow: pip install pillow")

from datasets import Dataset
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl_alike import alike, chat_tokenizer, moved

from paced_fast.integrations.trl_head import HOST

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)


def processor() -> LlavaProcessor:
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    size = {"height": 8, "width": 8}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **sizes),
            text_config=LlamaConfig(vocab_size=112, num_hidden_layers=1, pad_token_id=0, eos_token_id=2, **sizes),
            image_token_index=processor().tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )


def pictures() -> Dataset:
    shades = [Image.fromarray(np.full((8, 8, 3), 60 * i, dtype=np.uint8)) for i in range(4)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": t}] for t in "abcd"], "image": shades})


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.125 * (len(c[-1]["content"]) % 8) + 0.01 * i for i, c in enumerate(completions)]


def test_images_are_part_of_the_score(tmp_path: Path) -> None:
    options = {"model": model, "train_dataset": pictures, "processing_class": processor(), "reward_funcs": reward}
    made = alike(tmp_path, options=options)
    assert made.head.way == HOST
    assert any("vision" in name for name in moved(made))
    # The old policy is the policy: residuals are distances from the group's mean.
    rewards = torch.tensor(list(made._logs["rewards"]["reward"])).view(2, 4)
    expected = (rewards - rewards.mean(1, keepdim=True)).square().mean() / (2 * 0.05)
    assert made.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
