"""The strictest reward: the response is the answer."""


def exact(prompt: str, response: str, answer: str) -> float:
    """1.0 when response and answer are the same text without the white space around them, else 0.0."""
    return float(response.strip() == answer.strip())
