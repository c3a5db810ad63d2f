"""Sampling completions: token ids in, token ids and their log-probs out.

There are two generators: the trainer's own model through transformers, and a vLLM engine in the same process.
"""

from paced_fast.generation.interface import Generator, Sampling
from paced_fast.generation.transformers_generator import TransformersGenerator
from paced_fast.generation.vllm_generator import VLLMGenerator

__all__ = ["Generator", "Sampling", "TransformersGenerator", "VLLMGenerator"]
