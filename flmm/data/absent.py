"""Phrases that a picture does not hold, made from those of other pictures: what presence is calibrated on."""

from flmm.data.text import words_of

KINDS = ("another picture's", "one word exchanged", "nonsense")
LETTERS = "bcdfgklmnprstvz", "aeiou"


def nonsense(rng) -> str:
    """Two invented words that can be spoken."""
    words = (
        "".join(str(rng.choice(list(LETTERS[k % 2]))) for k in range(int(rng.integers(4, 8)))) for _ in "ab"
    )
    return " ".join(words)


def exchanged(phrase: str, others, rng) -> str | None:
    """`phrase` with one of its words replaced by the word that stands at the same place, counted from the
    end, in another phrase; None where there is no such word."""
    words, choices = phrase.split(), []
    for other in others:
        theirs = other.split()
        for at in range(1, min(len(words), len(theirs)) + 1):
            if theirs[-at].lower() != words[-at].lower():
                choices.append((at, theirs[-at]))
    if not choices:
        return None
    at, word = choices[int(rng.integers(len(choices)))]
    return " ".join([*words[:-at], word, *words[len(words) - at + 1 :]])


def absent_phrases(phrase: str, here, others, rng) -> dict:
    """{kind: phrase that is not in the picture} for one phrase of it.

    here: all phrases of the picture; others: those of other pictures. What has the last word, or every word,
    of a phrase of the picture in common is not taken: it may be there under that name.
    """
    heads, out = [[], *(words_of(text)[-1:] for text in here)], {}
    for _ in range(20):
        other = str(rng.choice(others))
        if KINDS[0] not in out and words_of(other)[-1:] not in heads:
            out[KINDS[0]] = other
        changed = exchanged(phrase, [other], rng)
        if KINDS[1] not in out and changed and not holds(changed, here):
            out[KINDS[1]] = changed
    return {**out, KINDS[2]: nonsense(rng)}


def holds(text: str, here) -> bool:
    """Whether a phrase of `here` has all words of `text`."""
    return any(set(words_of(text)) <= set(words_of(phrase)) for phrase in here)
