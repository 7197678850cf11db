"""`python -m qerl_rl make-model`: one line and exit code 2 for what the user can mend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qerl_rl import __main__ as command_line
from qerl_rl.make_model import tiny, upcycle
from qerl_rl.make_model.warm_start import Progress


def one_line_error(output: str) -> bool:
    return output.startswith("error: ") and output.count("\n") == 1 and "Fix: " in output


def test_a_file_as_folder_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "qerl_rl", "make-model", "tiny", "--out", str(tmp_path / "file")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert one_line_error(finished.stderr)
    assert str(tmp_path / "file") in finished.stderr


def test_missing_smollm2_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(upcycle, "PACKAGE", "qerl-rl-no-such-package")
    assert command_line.main(["make-model", "smollm2-moe", "--out", str(tmp_path)]) == 2
    assert one_line_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments", [[], ["make-model"], ["make-model", "tiny"], ["make-model", "huge", "--out", "x"]]
)
def test_wrong_usage_exits_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main(arguments)
    assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_tiny_reports_both_phases_and_ends_with_what_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def quick(out: Path, seed: int, *, format, report) -> tiny.TinyModel:
        report(Progress("skill", 1, 2.0, 0.7))
        report(Progress("doubt", 2, 1.0, 0.3))
        return tiny.TinyModel("arithmetic", seed, 2, 0.31, 3 << 20)

    monkeypatch.setattr(tiny, "make_tiny", quick)
    out = tmp_path / "new" / "model"
    assert command_line.main(["make-model", "tiny", "--out", str(out), "--seed", "5"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert str(out) in last
    assert "3.0 MiB" in last
    assert "31%" in last
