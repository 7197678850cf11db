"""Run Megatron-core on Ascend: torch_npu's and MindSpeed's adaptors, and what this project adds to them.

In this order: torch_npu's transfer_to_npu, MindSpeed's adaptor (or MindSpeed-LLM's, which contains it) with the
arguments of our configuration, Megatron, and then our own patches on top.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import Config
from qerl_rl.platform.cpu_adaptor import PatchError, replace
from qerl_rl.platform.mindspeed_arguments import command_line, left_out, mindspeed_arguments
from qerl_rl.platform.ops import leave_out, rotary, token_permute, token_unpermute

MINDSPEED_BRANCH, MINDSPEED_LLM_BRANCH, MEGATRON_BRANCH = "2.3.0_core_r0.12.1", "2.3.0", "core_v0.12.1"
"""Of their git repositories, what was read and run for this file; MindSpeed-LLM needs Megatron-LM's whole checkout."""


def apply(config: Config) -> None:
    """Apply everything; see `prepare_megatron`.

    Raises: ConfigError when a package of Ascend's is missing, saying how to get it. PatchError when megatron was
    imported before, or lacks what a patch replaces.
    """
    if "megatron.core" in sys.modules:
        raise PatchError("megatron.core is imported already: call prepare_megatron before anything imports it")
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    arguments = mindspeed_arguments(config)
    with compiler_kept(), quiet_lazy_modules():
        if config.model.provider == "mindspeed_llm":
            apply_mindspeed_llm(arguments)
        else:
            apply_mindspeed(arguments)
        importlib.import_module("megatron.core")
    leave_out(left_out(config.train))
    device_capability()
    fused_rotary()
    fused_permutation()


def apply_mindspeed(arguments: dict[str, Any]) -> None:
    """MindSpeed takes its arguments from the process's command line, which is another program's here, the first time
    it is asked for them, and keeps them: so they are asked for, completed, and there when its adaptor looks."""
    with words_of_command([]):
        given = _required("mindspeed.args_utils", "MindSpeed", MINDSPEED_BRANCH).get_mindspeed_args()
        _complete(given, arguments)
        _required("mindspeed.megatron_adaptor", "MindSpeed", MINDSPEED_BRANCH)


def apply_mindspeed_llm(arguments: dict[str, Any]) -> None:
    """MindSpeed-LLM patches as soon as it is imported, by the words of the command line; what asks later gets the
    global arguments of Megatron, which its training loop would have set."""
    advice = f"git clone -b {MEGATRON_BRANCH} https://github.com/NVIDIA/Megatron-LM, and put it in PYTHONPATH"
    if _spec("megatron.training") is None:
        problem = "model.provider=mindspeed_llm needs megatron.training, which the megatron-core of PyPI does not have."
        raise ConfigError(problem, fix=f"{advice}; or set model.provider to megatron")
    with words_of_command(command_line(arguments)):
        _required("mindspeed_llm", "MindSpeed-LLM", MINDSPEED_LLM_BRANCH)
        given = importlib.import_module("mindspeed.args_utils").get_mindspeed_args()
    _complete(given, arguments)
    importlib.import_module("megatron.training.global_vars").set_args(given)


def _complete(given: Namespace, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        setattr(given, name, value)


def _required(module: str, package: str, branch: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        fix = f"git clone -b {branch} https://github.com/Ascend/{package} and pip install -e {package}"
        raise ConfigError(
            f"{package} can't be imported ({error}), and the trainer on NPUs needs it.",
            fix=f"{fix} (python -m qerl_rl doctor --for npu lists what is missing), or set train.device to cpu",
        ) from None


def _spec(module: str) -> Any:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


@contextlib.contextmanager
def words_of_command(words: list[str]) -> Iterator[None]:
    """Let the process look as if it had been started with these words."""
    started_with = sys.argv
    sys.argv = [started_with[0] if started_with else "", *words]
    try:
        yield
    finally:
        sys.argv = started_with


@contextlib.contextmanager
def compiler_kept() -> Iterator[None]:
    """MindSpeed turns torch.compile off for good, which Megatron binds when it is imported and must not have, but which
    the rollout engine needs for its graphs."""

    def uncompiled(function: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    original = replace(torch, "compile", uncompiled)
    try:
        yield
    finally:
        torch.compile = original


@contextlib.contextmanager
def quiet_lazy_modules() -> Iterator[None]:
    """MindSpeed asks every loaded module for every name that it replaces. Some of transformers' import a file to
    answer, and raise that this lacks something (torchvision, for one) where hasattr expects an AttributeError."""
    lazy: list[tuple[types.ModuleType, Callable[[str], Any]]] = []
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and callable(vars(module).get("__getattr__")):
            lazy.append((module, vars(module)["__getattr__"]))

    def answering(ask: Callable[[str], Any]) -> Callable[[str], Any]:
        def answer(name: str) -> Any:
            try:
                return ask(name)
            except ImportError as error:
                raise AttributeError(name) from error

        return answer

    for module, ask in lazy:
        vars(module)["__getattr__"] = answering(ask)
    try:
        yield
    finally:
        for module, ask in lazy:
            vars(module)["__getattr__"] = ask


def device_capability() -> None:
    """torch's broadcast compares the capability of CUDA cards; torch_npu's is None, which it can't, and MindSpeed's
    takes no card to be asked about."""
    replace(torch.cuda, "get_device_capability", lambda device=None: (0, 0))


def fused_rotary() -> None:
    """Megatron's own rotary embedding is seven kernels for each sequence and layer, and keeps what they make."""
    module = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    name = "_apply_rotary_pos_emb_bshd"

    def apply_rotary(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Any:
        whole = t.dim() == 4 and freqs.shape[-1] == t.shape[-1]
        if rotary_interleaved or multi_latent_attention or not whole:
            return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        return rotary(t, (torch.cos(freqs) * mscale).to(t.dtype), (torch.sin(freqs) * mscale).to(t.dtype))

    original = replace(module, name, apply_rotary)


def fused_permutation() -> None:
    """Megatron sorts tokens by expert with a mask of every token and expert, and adds them up again by scattering.

    Only where each token has its k experts: a dispatcher that gathers all tokens keeps those of this rank's experts.
    """
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatchers = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def permute(
        tokens: torch.Tensor,
        routing_map: torch.Tensor,
        probs: torch.Tensor | None = None,
        num_out_tokens: int | None = None,
        fused: bool = False,
        drop_and_pad: bool = False,
    ) -> Any:
        count = len(tokens)
        if fused or drop_and_pad or not count or not num_out_tokens or num_out_tokens % count:
            return sort(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
        experts = routing_map.nonzero()[:, 1].view(count, -1)
        permuted, positions = token_permute(tokens, experts)
        chosen = None if probs is None else probs.T.contiguous().masked_select(routing_map.bool().T.contiguous())
        return permuted, chosen, positions

    def unpermute(
        permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, restore_shape: Any, probs: Any = None, **more: Any
    ) -> Any:
        # Megatron's own sorting gives int64.
        if sorted_indices.dtype != torch.int32 or probs is not None:
            return add_up(permuted_tokens, sorted_indices, restore_shape, probs=probs, **more)
        copies = len(sorted_indices) // restore_shape[0]
        ones = permuted_tokens.new_ones(restore_shape[0], copies)
        return token_unpermute(permuted_tokens, sorted_indices, ones)

    sort, add_up = replace(utils, "permute", permute), replace(utils, "unpermute", unpermute)
    replace(dispatchers, "permute", permute)
    replace(dispatchers, "unpermute", unpermute)
