"""Sampling completions: token ids in, token ids and their log-probs out.

Two ways: the trainer's own model through transformers, and a vLLM engine in the same process.
"""

from paced_fast.generate.interface import Generator
from paced_fast.generate.own_model import TransformersGenerator
from paced_fast.generate.vllm_engine import VLLMGenerator

__all__ = ["Generator", "TransformersGenerator", "VLLMGenerator"]
