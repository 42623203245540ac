"""What engines are asked when nothing else is at hand: prompts of a given length, stories, plain questions.

Prompts are made of common words in a random order, so that no two share a prefix and the tokens per character
are those of English. Equal numbers give equal texts: every model reads the same.
"""

from __future__ import annotations

import random

_COMMON = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by "
    "word but not what all were we when your can said there use an each which she do how their if will up "
    "other about out many then them these so some her would make like him into time has look two more write "
    "go see number no way could people my than first water been call who oil its now find long down day did "
    "get come made may part over new sound take only little work know place year live me back give most very "
    "after thing our just name good sentence man think say great where help through much before line right "
    "too mean old any same tell boy follow came want show also around form three small set put end does "
    "another well large must big even such because turn here why ask went men read need land different home "
    "us move try kind hand picture again change off play spell air away animal house point page letter mother "
    "answer found study still learn should world"
)
WORDS = _COMMON.split()

QUESTIONS = (
    "Why is the sky blue?",
    "What is the capital of Italy?",
    "How do plants make their food?",
    "Explain in two sentences what inflation is.",
    "Who wrote Romeo and Juliet?",
    "What is 17 plus 25?",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "What is the difference between a virus and a bacterium?",
    "Name three ways to save electricity at home.",
    "How many days does a leap year have?",
    "Rewrite politely: send me the report now.",
    "What does a contract need to be binding?",
)
TINY = ("a", "I", "no", "yes")
"""Prompts of one token: all the rest of what the engine counts is its template."""
TOPICS = ("a lighthouse", "two brothers", "a long winter", "the last train", "a garden", "an old clock")


def words(count: int, number: int) -> str:
    """A prompt of `count` words, about as many tokens."""
    draw = random.Random(f"{count}:{number}")
    return " ".join(draw.choices(WORDS, k=count))


def story(number: int) -> str:
    """A prompt that makes any model talk."""
    return f"Number {number}. Tell me a very long story about {TOPICS[number % len(TOPICS)]}, chapter by chapter."
