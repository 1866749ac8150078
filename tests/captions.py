"""Captions that are nearly right, the same for every world."""


def damaged(caption, word):
    """The caption cut short, lengthened, and with each of its words replaced by a foreign one."""
    wrong = [caption[:end] for end in range(len(caption))]
    wrong += [extra + caption for extra in (" ", "\n", "a ", "and ", ".", caption + " ")]
    wrong += [caption + extra for extra in (" ", "\n", "a", " and", ".", "\x00", caption)]
    words = caption.split(" ")
    return wrong + [" ".join(words[:i] + [word] + words[i + 1:]) for i in range(len(words))]
