"""Prompts and answers: from a file or generated, tokenized, in a resumable order."""
