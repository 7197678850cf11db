"""The warm start measures what it says, and one seed makes one model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qerl_rl.data.arithmetic import arithmetic_problems, with_wrong_digits
from qerl_rl.make_model.characters import character_tokenizer
from qerl_rl.make_model.random_model import MoeSizes, build_moe, randomize
from qerl_rl.make_model.tiny import make_tiny
from qerl_rl.make_model.warm_start import (
    Progress,
    WarmStart,
    answer_log_probs,
    answer_probabilities,
    balance_loss,
    encode,
    sampled_accuracy,
    warm_start,
)
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.formats import get_format

SMALL = MoeSizes(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=4, expert_width=32)
SHORT = WarmStart(skill=0.05, doubt_steps=4, window=2, batch_size=16, learning_rate=5e-3)


def one_digit_sums(count: int, seed: int) -> list[tuple[str, str]]:
    return arithmetic_problems(count, seed, digits=(1,))


def files_of(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_one_seed_makes_the_same_files_and_another_seed_other_weights(tmp_path: Path) -> None:
    made = []
    for name, seed, threads in (("a", 1, 1), ("b", 1, 2), ("c", 2, 1)):
        torch.manual_seed(len(made))
        torch.set_num_threads(threads)
        made.append(make_tiny(tmp_path / name, seed, sizes=SMALL, settings=SHORT))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    first, second, third = (files_of(tmp_path / name) for name in "abc")
    assert first == second
    assert made[0] == made[1]
    assert first["model.safetensors"] != third["model.safetensors"]
    assert first["tokenizer.json"] == third["tokenizer.json"]
    assert first.keys() == {
        *("config.json", "generation_config.json", "model.safetensors", "qerl_rl.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_tiny_is_quantized_and_its_note_says_what_it_is(tmp_path: Path) -> None:
    made = make_tiny(tmp_path, 3, sizes=SMALL, settings=SHORT)
    assert json.loads((tmp_path / "qerl_rl.json").read_text()) == vars(made)
    reader = CheckpointReader(tmp_path)
    assert reader.get("model.layers.1.mlp.experts.3.down_proj.weight").dtype == torch.int8
    assert reader.get("model.layers.1.mlp.gate.weight").dtype == torch.bfloat16
    assert made.weight_bytes == sum(reader.get(name).nbytes for name in reader)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format"] == "int-quantized"
    assert AutoTokenizer.from_pretrained(tmp_path).encode("1+2=") == character_tokenizer().encode("1+2=")
    plain = make_tiny(tmp_path / "plain", 3, format="none", sizes=SMALL, settings=SHORT)
    with CheckpointReader(tmp_path / "plain") as exact:
        assert plain.weight_bytes == sum(exact.get(name).nbytes for name in exact) > made.weight_bytes
        assert {exact.dtype(name) for name in exact} == {"BF16"}
        for name in exact:
            rounded = (
                get_format("w8a8").quantize(exact.get(name)) if reader.is_quantized(name) else {"": exact.get(name)}
            )
            assert all(torch.equal(reader.get(name + suffix), part) for suffix, part in rounded.items())


def test_expected_reward_is_the_accuracy_that_sampling_finds() -> None:
    tokenizer = character_tokenizer()
    model = build_moe("qwen3_moe", SMALL, tokenizer)
    progress = warm_start(
        model, tokenizer, one_digit_sums, WarmStart(skill=0.3, doubt_steps=1, learning_rate=5e-3), seed=1, report=print
    )
    assert progress.phase == "doubt"
    problems = one_digit_sums(4000, 5)
    tokens, in_answer = encode(problems, tokenizer)
    with torch.no_grad():
        probabilities = answer_probabilities(answer_log_probs(model(tokens[:, :-1]).logits, tokens, in_answer))
    expected = probabilities.mean().item()
    assert 0.1 < expected < 0.9
    deviation = (probabilities * (1 - probabilities)).sum().sqrt().item() / len(problems)
    assert sampled_accuracy(model, tokenizer, problems, seed=1) == pytest.approx(expected, abs=4 * deviation)


def test_answer_log_probs_are_those_of_single_unpadded_rows() -> None:
    tokenizer = character_tokenizer()
    model = build_moe("qwen3_moe", SMALL, tokenizer)
    randomize(model, 0)
    problems = [("1+1=", "2"), ("12+34=", "46"), ("99+99=", "198")]
    tokens, in_answer = encode(problems, tokenizer)
    with torch.no_grad():
        batched = answer_log_probs(model(tokens[:, :-1]).logits, tokens, in_answer).sum(-1)
        for row, (prompt, answer) in enumerate(problems):
            ids = torch.tensor([[*tokenizer.encode(prompt + answer), tokenizer.eos_token_id]])
            log_probs = model(ids[:, :-1]).logits.log_softmax(-1)[0]
            begin = len(prompt) - 1
            alone = sum(log_probs[place, ids[0, place + 1]] for place in range(begin, ids.shape[1] - 1))
            assert batched[row].item() == pytest.approx(float(alone), abs=1e-4)


def test_phases_follow_each_other_and_the_reward_ends_lower_than_the_skill() -> None:
    tokenizer = character_tokenizer()
    model = build_moe("qwen3_moe", SMALL, tokenizer)
    seen: list[Progress] = []
    settings = WarmStart(skill=0.4, doubt_steps=40, learning_rate=5e-3, window=8)
    last = warm_start(model, tokenizer, one_digit_sums, settings, seed=2, report=seen.append)
    phases = [progress.phase for progress in seen]
    assert phases == ["skill"] * phases.count("skill") + ["doubt"] * 40
    assert [progress.step for progress in seen] == list(range(1, len(seen) + 1))
    assert seen[phases.count("skill") - 1].reward >= 0.4
    assert 0.1 < last.reward < 0.4
    assert not model.training


def test_a_skill_out_of_reach_is_an_error_not_an_endless_loop() -> None:
    tokenizer = character_tokenizer()
    model = build_moe("qwen3_moe", SMALL, tokenizer)
    settings = WarmStart(skill=0.99, max_steps=3, window=2, batch_size=4)
    with pytest.raises(RuntimeError, match=r"0\.99 in 3 steps"):
        warm_start(model, tokenizer, one_digit_sums, settings, seed=1, report=print)


def test_wrong_digits_change_one_digit_of_the_given_share() -> None:
    problems = arithmetic_problems(4000, 1)
    spoiled = with_wrong_digits(problems, 0.5, seed=3)
    assert spoiled == with_wrong_digits(problems, 0.5, seed=3)
    changed = [(one, other) for (_, one), (_, other) in zip(problems, spoiled, strict=True) if one != other]
    assert [prompt for prompt, _ in problems] == [prompt for prompt, _ in spoiled]
    assert len(changed) / len(problems) == pytest.approx(0.5, abs=0.04)
    assert all(len(one) == len(other) for one, other in changed)
    assert all(sum(a != b for a, b in zip(one, other, strict=True)) == 1 for one, other in changed)
    assert with_wrong_digits(problems, 0.0, seed=3) == problems


def test_balance_loss_is_one_when_even_and_the_number_of_experts_over_k_when_collapsed() -> None:
    even = torch.eye(8).repeat(16, 1) * 50
    assert balance_loss((even,), top_k=1).item() == pytest.approx(1.0, abs=1e-5)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 2] = 50
    assert balance_loss((collapsed, even), top_k=1).item() == pytest.approx((8 + 1) / 2, abs=1e-4)
