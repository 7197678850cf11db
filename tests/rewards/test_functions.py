import random

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.rewards import load_reward
from qerl_rl.rewards.exact import exact
from qerl_rl.rewards.math_answer import final_answer, math


def test_exact_ignores_surrounding_white_space_only():
    assert exact("1+1=", " 2\n", "2") == 1.0
    assert exact("1+1=", "2.", "2") == 0.0
    assert exact("1+1=", "", "2") == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so there are 72 clips", "Natalia sold 48+24 = 72 clips.\n#### 72"),
        ("The answer is \\boxed{72}.", "#### 72"),
        ("3 + 4 = 7, so I get 7", "7"),
        ("#### 1,234", "1234"),
        ("$1,234.50 in all", "1234.5"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{0.5}", "\\frac12"),
        ("x = \\boxed{-3}", "-3"),
        ("\\boxed{2} is wrong; \\boxed{3}", "3"),
        ("first 5, then 6\n#### 7\n", "7"),
        ("She has 18.0 dollars left", "18"),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}"),
        ("#### Tuesday", "tuesday"),
        ("\\boxed{1+x}", "x + 1"),
        ("\\boxed{2x}", "x*2"),
        ("\\boxed{x = 5}", "5"),
        ("\\boxed{5 m}", "5"),
        ("\\boxed{5m}", "5"),
        ("it is x = 5", "5"),
    ],
)
def test_math_accepts_equal_values(response, answer):
    assert math("?", response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", "72"),
        ("I do not know", "72"),
        ("so 72, or rather 73", "72"),
        ("\\boxed{72} and that makes 73. \\boxed{73}", "72"),
        ("72\n#### 73", "72"),
        ("\\boxed{", "72"),
        ("72", "Tuesday"),
        ("-3", "3"),
        ("\\boxed{2x}", "2"),
        ("\\boxed{y=2x+1}", "2"),
        ("\\boxed{x+1}", "x-1"),
    ],
)
def test_math_refuses_other_values(response, answer):
    assert math("?", response, answer) == 0.0


def test_math_of_random_numbers_in_random_dress():
    draw = random.Random(0)
    for _ in range(100):
        value = draw.randrange(-5000, 5000)
        dress = draw.choice(["So 1 + 2 is {:,}", "\\boxed{{{}}}", "maybe 3\n#### {:,}", "The answer is {}.", "${}$"])
        response = dress.format(value)
        assert math("?", response, f"because\n#### {value:,}") == 1.0, response
        assert math("?", response, f"because\n#### {value + draw.choice([-1, 1, 10]):,}") == 0.0, response


def test_final_answer_takes_the_last_complete_box():
    assert final_answer("\\boxed{a} \\boxed{b{c}d} \\boxed{e") == "b{c}d"
    assert final_answer("work #### 1 #### 2 ") == "2"


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "import json\n"
        "def brief(response):\n    return 1.0\n"
        "def length(prompt, response, answer):\n    return len(response)\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "needy_rewards.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own_module")
def test_a_dotted_path_loads_a_function_of_the_user():
    assert load_reward("own_rewards.length")("p", "four", "a") == 4


@pytest.mark.usefixtures("own_module")
@pytest.mark.parametrize(
    ("name", "problem", "fix"),
    [
        ("exat", "not a known reward", "set it to exact"),
        ("frobnicate", "not a known reward", "one of exact, math, boxed_math"),
        ("own_rewards.lenght", "no function lenght", "name length instead"),
        ("own_rewards.json", "no function json", "brief, length"),
        ("own_rewards.brief", "can't be called with (prompt, response, answer)", "let it take these"),
        ("no_such_module.reward", "no module no_such_module", "PYTHONPATH"),
        ("own_rewards.inner.reward", "own_rewards.inner", "correct the name"),
        ("broken_rewards.reward", "ZeroDivisionError", "import broken_rewards"),
        ("needy_rewards.reward", "imports not_installed_anywhere", "install"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_to_do(name, problem, fix):
    with pytest.raises(ConfigError) as caught:
        load_reward(name)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
