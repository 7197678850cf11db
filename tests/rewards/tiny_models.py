"""Random reward models of a few kilobytes, with a tokenizer of their own: one token a byte."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"


def byte_tokenizer(template: str = "") -> PreTrainedTokenizerFast:
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def build(kind: str, *, labels: int = 1, vocabulary: int = 256, positions: int = 128) -> PreTrainedModel:
    """`decoder` names no padding token, `padded decoder` and `encoder` do, `no head` scores nothing."""
    torch.manual_seed(7)
    sizes = SIZES | {"num_labels": labels, "vocab_size": vocabulary, "max_position_embeddings": positions}
    if kind == "encoder":
        model: PreTrainedModel = BertForSequenceClassification(BertConfig(**sizes, initializer_range=0.3))
    else:
        own = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
        own["pad_token_id"] = 5 if kind == "padded decoder" else None
        kind_of_model = Qwen3ForCausalLM if kind == "no head" else Qwen3ForSequenceClassification
        model = kind_of_model(Qwen3Config(**sizes, **own))
    return model.eval()


def save(folder: Path, kind: str, *, template: str = "", **sizes: int) -> Path:
    build(kind, **sizes).save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder
