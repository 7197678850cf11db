"""Rewards that a random model earns now and then, so that there is something to learn from."""


def share_of_digits(prompt: str, response: str, answer: str) -> float:
    """The share of the response's characters that are digits."""
    return sum(character.isdigit() for character in response) / max(len(response), 1)
