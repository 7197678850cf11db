"""The Megatron training engine: packing, scores, updates, offload, checkpoints, export."""
