import pytest

from qerl_rl.config.schema import RewardConfig
from qerl_rl.rewards.scorer import RewardScorer
from qerl_rl.rewards.votes import SAME_VALUE, comparison_of, group_answers, judge_of


@pytest.fixture(scope="module")
def scorer():
    with RewardScorer(RewardConfig(function="math", workers=2, timeout_s=60.0), [SAME_VALUE]) as scorer:
        yield scorer


def groups_of(name, responses, scorer):
    (groups,) = group_answers([("p", responses)], comparison_of(name), scorer)
    names = {group: index for index, group in enumerate(dict.fromkeys(g for g in groups if g is not None))}
    return [None if group is None else names[group] for group in groups]


@pytest.mark.parametrize(
    ("name", "responses", "expected"),
    [
        ("exact", ["4", " 4\n", "4.0", "", "five"], [0, 0, 1, None, 2]),
        ("math", ["so 4", "\\boxed{4.0}", "it is 5", "#### 4", "no idea", "", "5.0"], [0, 0, 1, 0, None, None, 1]),
        ("math", ["\\boxed{\\frac12}", "0.5", "#### 50/100", "no idea", "no idea"], [0, 0, 0, None, None]),
        ("math", ["#### Tuesday", "\\boxed{tuesday}", "Tuesday"], [0, 0, None]),
        ("math_17k_acc", ["4", "\\boxed{4}", "\\boxed{4.0}", "\\boxed{x+1}", "\\boxed{1+x}"], [None, 0, 0, 1, 1]),
        ("acc_for_dapo", ["Answer: 4", "answer: $4.0$", "\\boxed{4}", "Answer: 3"], [0, 0, None, 1]),
        ("retool_reward", ["\\boxed{4}", "\\boxed{4.0}", "then \\boxed{4}"], [0, 1, 0]),
        ("own.function", ["so\n#### 4", "\\boxed{4}", "4", "4.0", ""], [0, 0, 0, 1, None]),
    ],
)
def test_answers_are_the_same_when_the_reward_says_so(scorer, name, responses, expected):
    assert groups_of(name, responses, scorer) == expected


def test_prompts_do_not_share_answers(scorer):
    groups = group_answers([("p", ["4", "5", "4"]), ("q", []), ("r", ["4", "4.0"])], comparison_of("math"), scorer)
    first, none, last = groups
    assert first[0] == first[2] != first[1]
    assert none == []
    assert last[0] == last[1]


def test_the_judge_is_the_first_that_looks_at_answers():
    assert judge_of({"format": 1.0, "length": 0.1, "math": 1.0, "exact": 1.0}) == "math"
    assert judge_of({"step": 1.0, "format": 1.0}) == "step"
    assert judge_of({"strict_format": 1.0, "own.reward": 0.0}) == "own.reward"
