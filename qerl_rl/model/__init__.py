"""HF config and weights to the Megatron model: quantized experts, adapters, layouts."""
