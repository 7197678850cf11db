"""A module of a live vLLM model gets other weights: in the shape that they were loaded in, packed anew, in place.

Kernels keep weights in layouts of their own, some as nothing but an address. vLLM's layerwise reload takes a module
back to what it was before its kernels packed it, packs it once more, and copies the outcome into the tensors that the
kernels hold already. vllm-ascend's layers keep more than parameters, and are written to by `rewrite`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from qerl_rl.rollout.ascend.rewrite import is_ascend, refresh_attention, rewrite


def packed_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of vLLM's model by their paths, as the names of their parameters have them in any version.

    Routed experts are a module of their own in newer ones.
    """
    return {path.removesuffix(".routed_experts"): module for path, module in model.named_modules()}


def unpacked_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What this module's parameters were before they were packed, as meta tensors.

    Only a bias is itself, if it has one: vLLM changes it in place.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    parameters = dict(get_layerwise_info(module).restore_metadata[0])
    bias = getattr(module, "bias", None)
    return parameters | ({"bias": bias} if isinstance(bias, torch.Tensor) else {})


def absorbing_layers(model: torch.nn.Module) -> dict[torch.nn.Module, Any]:
    """By the up projection of a latent attention: the layer that has multiplied it into queries and outputs."""
    return {
        module.kv_b_proj: module
        for module in model.modules()
        if hasattr(module, "kv_b_proj") and hasattr(module, "process_weights_after_loading")
    }


@contextmanager
def _absorbed(module: Any, absorbing: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the layer `absorbing` (if any) takes up the weights of `module` as soon as they are packed.

    It may drop them afterwards, as it did when the model was loaded: both must see the same order.
    """
    if absorbing is None:
        yield
        return
    method = module.quant_method
    original = method.process_weights_after_loading

    def pack_and_absorb(layer: torch.nn.Module) -> None:
        original(layer)
        absorbing.process_weights_after_loading(dtype)

    method.process_weights_after_loading = pack_and_absorb
    try:
        yield
    finally:
        del method.process_weights_after_loading


@torch.no_grad()
def repack(module: Any, vllm_config: Any, tensors: Mapping[str, torch.Tensor], absorbing: Any = None) -> None:
    """Give `module` these parameters, of the names and shapes of `unpacked_parameters`, and let its kernels pack them.

    What a checkpoint holds once a matrix may come once a row [..., N, 1]. What is missing (the shape that int4 weights
    carry beside them) stays as it is. absorbing: the layer that keeps the weights in another form besides.
    """
    if is_ascend(module):
        expected = unpacked_parameters(module)
        # A parameter may be of fewer bits than what arrives: scales are bfloat16 there.
        rewrite(module, {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()})
        refresh_attention(module, vllm_config)
    else:
        _reload(module, vllm_config, tensors, absorbing)


def _reload(module: Any, vllm_config: Any, tensors: Mapping[str, torch.Tensor], absorbing: Any) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.utils.torch_utils import set_default_torch_dtype

    expected = unpacked_parameters(module)
    kept = {name: getattr(module, name).clone() for name in expected.keys() - tensors.keys()}
    dtype = vllm_config.model_config.dtype
    if hasattr(module.quant_method, "moe_kernel"):
        # With a kernel in place, unquantized experts would take their weights for packed already.
        module.quant_method.moe_kernel = None
    # The loaders that came with the model take full tensors, of which they cut out the rank's part.
    for name, parameter in expected.items():
        if name != "bias":
            parameter.weight_loader = _take
    absorbed = _absorbed(module, absorbing, dtype)
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(dtype), absorbed:
        if "bias" in tensors:
            module.bias.data.copy_(tensors["bias"])
        initialize_layerwise_reload(module)
        for name, tensor in {**kept, **tensors}.items():
            if name != "bias":
                parameter = getattr(module, name)
                parameter.weight_loader(parameter, once_a_matrix(tensor, parameter))
        finalize_layerwise_reload(module, vllm_config.model_config)


def once_a_matrix(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`tensor` in the shape of `parameter`: numbers [..., N, 1] that are the same for all rows become one a matrix.

    The parameter has one for each of those that are fused in it ([3] of q, k and v; [E, 2] of gate and up).
    """
    if tensor.shape == parameter.shape:
        return tensor
    value = tensor[..., 0, :]
    return value.expand(parameter.shape) if value.dim() == parameter.dim() else value.flatten()


def _take(param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """A weight loader for what is the rank's part already.

    vLLM calls it on a meta tensor first, to count what is copied, and then on an empty tensor that has yet to take up
    memory: it need not, where the new weight is what it is to become.
    """
    if param.is_meta or (param.dtype, param.device) != (loaded_weight.dtype, loaded_weight.device):
        param.data.copy_(loaded_weight)
    else:
        param.data = loaded_weight
