"""Rewards that a random model earns now and then, so that there is something to learn from."""


def share_of_digits(prompt: str, response: str, answer: str) -> float:
    """The share of the response's characters that are digits."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)


def many_digits(prompt: str, response: str, answer: str) -> float:
    """1 or 0, so that some groups of a random model earn the same throughout."""
    return float(share_of_digits(prompt, response, answer) > 0.15)
