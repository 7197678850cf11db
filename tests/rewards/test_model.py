"""Reward models: scores against transformers called one text at a time, limits, and faults that hurt one sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig, RewardConfig, RewardModelConfig
from qerl_rl.rewards import model as reward_model
from qerl_rl.rewards.model import RewardModel, batches_by_length, check_reward_model
from qerl_rl.rewards.scorer import RewardScorer
from tests.rewards.tiny_models import TEMPLATE, build, byte_tokenizer, save

KINDS = ["decoder", "padded decoder", "encoder"]
TEXTS = [("1+1=", "2"), ("say something long: ", "x" * 60), ("ü", ""), ("12+7=", "19 !"), ("q", "r")]
SAMPLES = [(prompt, response, "") for prompt, response in TEXTS]


def by_transformers(folder, texts):
    """Each text alone, without padding, as the model's own class scores it."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), byte_tokenizer()
    with torch.no_grad():
        return [model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_transformers_text_by_text(tmp_path, monkeypatch, kind):
    folder = save(tmp_path, kind)
    expected = by_transformers(folder, [prompt + response for prompt, response in TEXTS])
    assert np.std(expected) > 0.01
    for tokens in (1, 70, 8192):
        monkeypatch.setattr(reward_model, "BATCH_TOKENS", tokens)
        scores, failures = RewardModel(RewardModelConfig(path=str(folder)), DataConfig()).score(SAMPLES)
        assert failures == {}
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_a_text_that_uses_the_whole_vocabulary_is_scored_without_padding(tmp_path):
    folder = save(tmp_path, "decoder", vocabulary=200)
    alphabet = bytes(range(256)).decode("latin-1")
    model = RewardModel(RewardModelConfig(path=str(folder)), DataConfig())
    known = "".join(
        character for character in alphabet if all(token < 200 for token in byte_tokenizer()(character)["input_ids"])
    )
    texts = [known[start : start + 60] for start in range(0, len(known), 60)]
    scores, failures = model.score([(text, "", "") for text in texts])
    assert failures == {}
    np.testing.assert_allclose(scores, by_transformers(folder, texts), atol=1e-5)


def test_a_conversation_is_read_through_the_models_own_template(tmp_path):
    folder = save(tmp_path, "decoder", template=TEMPLATE)
    own = RewardModelConfig(path=str(folder))
    read = {
        DataConfig(): "ab",
        DataConfig(chat_template=True): "<user>a</><assistant>b</>",
        DataConfig(chat_template=True, system_prompt="s"): "<system>s</><user>a</><assistant>b</>",
    }
    for data, text in read.items():
        scores, _ = RewardModel(own, data).score([("a", "b", "")])
        assert scores.tolist() == pytest.approx(by_transformers(folder, [text]), abs=1e-5)


@pytest.mark.parametrize(("max_length", "kept"), [(10, 10), (0, 40), (99, 40)])
def test_what_is_too_long_loses_its_beginning(tmp_path, max_length, kept):
    folder = save(tmp_path, "encoder", positions=40)
    model = RewardModel(RewardModelConfig(path=str(folder), max_length=max_length), DataConfig())
    text = "".join(chr(97 + index % 26) for index in range(50))
    scores, _ = model.score([(text[:30], text[30:], "")])
    assert scores.tolist() == pytest.approx(by_transformers(folder, [text[-kept:]]), abs=1e-5)


def test_a_failure_scores_zero_and_hurts_no_other_sample(tmp_path):
    model, tokenizer = build("decoder", vocabulary=256), byte_tokenizer()
    (poison,) = tokenizer("!")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    samples = [*SAMPLES, ("", "", "")]
    scores, failures = RewardModel(RewardModelConfig(path=str(tmp_path)), DataConfig()).score(samples)
    assert failures.keys() == {3, 5}
    assert failures[3] == "the score is nan"
    assert scores[3] == scores[5] == 0
    others = [prompt + response for prompt, response in TEXTS if "!" not in response]
    np.testing.assert_allclose(scores[[0, 1, 2, 4]], by_transformers(tmp_path, others), atol=1e-5)


def test_a_text_that_breaks_the_model_is_the_only_one_that_fails(tmp_path):
    above = "z"
    small = save(tmp_path, "decoder", vocabulary=byte_tokenizer()(above)["input_ids"][0])
    scores, failures = RewardModel(RewardModelConfig(path=str(small)), DataConfig()).score(
        [("1+1=", "2", ""), ("1", above, ""), ("12", "", "")]
    )
    assert failures.keys() == {1}
    assert "IndexError" in failures[1]
    np.testing.assert_allclose(scores[[0, 2]], by_transformers(small, ["1+1=2", "12"]), atol=1e-5)


def test_the_models_part_joins_the_functions_with_its_weight():
    with RewardScorer(RewardConfig(function="exact")) as scorer:
        scores = scorer.score([("p", "4", "4"), ("p", "5", "4")])
    joined = scores.plus("model_mean", -0.5, np.array([2.0, 3.0], np.float32), {1: "the score is nan"})
    assert joined.values.tolist() == [0.0, -1.5]
    assert joined.parts["exact"].tolist() == [1.0, 0.0]
    assert joined.parts["model_mean"].tolist() == [2.0, 3.0]
    assert joined.failures == {1: "model_mean: the score is nan"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 120))
def test_batches_hold_every_text_once_within_the_limit(lengths, most):
    batches = list(batches_by_length(lengths, most))
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= most for rows in batches)
    ordered = [lengths[row] for rows in batches for row in rows]
    assert ordered == sorted(ordered)


def test_folders_that_hold_no_reward_model_are_refused(tmp_path):
    check_reward_model(str(save(tmp_path / "good", "decoder")))
    for name, path, problem in (
        ("empty", tmp_path / "nothing", "holds no config.json"),
        ("policy", save(tmp_path / "policy", "no head"), "is a Qwen3ForCausalLM, which gives no score"),
        ("classes", save(tmp_path / "classes", "encoder", labels=2), "has 2 labels"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_reward_model(str(path))
        assert problem in caught.value.problem, name
        assert caught.value.fix


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    folder = save(tmp_path, "no head")
    build("decoder").config.save_pretrained(folder)
    with pytest.raises(ConfigError, match="no weights score"):
        RewardModel(RewardModelConfig(path=str(folder)), DataConfig())
