"""Stories: short texts that count and calculate, whose probability and entropy are known exactly.

    sample(rng) -> scene      draw a story at random
    render(scene, rng)        scene -> text: a story's signal is its text, so this is `describe`
    describe(scene, rng)      scene -> text, in one of several tellings
    parse(text)               text -> scene, whatever its answer; None if it is not a story
    grade(text)               text -> scene; None if it is not a story, or if its answer is wrong
    opening(text)             its first words, for a model to go on from
    log_probability(text)     nats; -inf for a text that the grammar never writes
    entropy()                 nats a story: no language model's mean loss on stories can be lower

    Tom has two large red circles and one small blue square. Anna gives him three more large red
    circles. now Tom has five large red circles and one small blue square.

A scene is one of six kinds of story, its people, its groups of equal things and its numbers. Every
random choice is made by `choose`, from a table that gives each option its probability. Given the
kind, the choices are independent, and no text can be written in two ways: so the probability of a
text is the product of the probabilities of its choices, and the entropy of the stories is the sum
of the entropies of the tables.

One word of each story, its answer, follows from the rest: a sum, a difference, a count, a name or a
colour. It has probability 1: a model that calculates gets it for nothing, and what a model that
guesses loses on it is loss above the entropy. The (shape, colour) pairs that are held out of
training in shapes.py are in no story.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from worlds.shapes import COLOURS, HELD_OUT, SHAPES, SIZES, _group, _pattern

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NAMES = {"Tom": ("he", "him"), "Ben": ("he", "him"), "Max": ("he", "him"),
         "Anna": ("she", "her"), "Mia": ("she", "her"), "Eva": ("she", "her")}
COUNTS = ("n", "k", "m", "answer")          # the numbers of a telling


class Group(NamedTuple):
    size: str
    colour: str
    shape: str


class Scene(NamedTuple):
    kind: str
    people: tuple           # two names, a and b
    groups: tuple           # g, and in most kinds another, h
    numbers: tuple          # n of g; in most kinds k of h; and m of g where some are given away


# --- the grammar ---------------------------------------------------------------------------------

class Kind(NamedTuple):
    groups: dict            # three tables {option: probability}
    numbers: dict
    tellings: dict
    answer: Callable        # scene -> the one right word
    answers: tuple          # all words that could stand in its place


def uniform(options):
    """The table in which every option has the same probability."""
    options = tuple(options)
    return dict.fromkeys(options, 1 / len(options))


def small_first(count, possible):
    """The table of `count` numbers that are possible, in proportion to 1 / their product."""
    weights = {numbers: 1 / math.prod(numbers)
               for numbers in itertools.product(range(1, len(NUMBERS) + 1), repeat=count)
               if possible(*numbers)}
    total = sum(weights.values())
    return {numbers: weight / total for numbers, weight in weights.items()}


PEOPLE = uniform(itertools.permutations(NAMES, 2))
ONE_GROUP = uniform((Group(size, colour, shape),) for size in SIZES for colour in COLOURS
                    for shape in SHAPES if (shape, colour) not in HELD_OUT)
TWO_GROUPS = uniform((g, h) for (g,), (h,) in itertools.permutations(ONE_GROUP, 2))
TWO_SHAPES = uniform((g, h) for g, h in TWO_GROUPS if g.shape != h.shape)

# In a telling, {g_n} is the group g as n of them are called ("circle" or "circles") and {g} as more
# than one are; {shapes} are its shapes; {before} counts up to {n}; {he} and {him} stand for a.
GRAMMAR = {
    "gift": Kind(TWO_GROUPS, small_first(3, lambda n, k, m: n + m <= 10), uniform([
        "{a} has {n} {g_n} and {k} {h_k}. {b} gives {him} {m} more {g_m}. "
        "now {a} has {answer} {g_answer} and {k} {h_k}.",
        "{a} has {k} {h_k} and {n} {g_n}. {b} gives {him} {m} more {g_m}. "
        "how many {g} does {a} have now? {answer}.",
    ]), lambda scene: NUMBERS[scene.numbers[0] + scene.numbers[2] - 1], NUMBERS),
    "loss": Kind(TWO_GROUPS, small_first(3, lambda n, k, m: m < n), uniform([
        "{a} has {n} {g_n} and {k} {h_k}. {he} gives {m} of the {g} to {b}. "
        "now {a} has {answer} {g_answer} and {k} {h_k}.",
        "{a} has {k} {h_k} and {n} {g_n}. {b} takes {m} of the {g} from {him}. "
        "how many {g} does {a} have left? {answer}.",
    ]), lambda scene: NUMBERS[scene.numbers[0] - scene.numbers[2] - 1], NUMBERS),
    "comparison": Kind(TWO_GROUPS, small_first(2, lambda n, k: n != k), uniform([
        "{a} has {n} {g_n}. {b} has {k} {h_k}. who has more things? {answer} has more things.",
        "{a} and {b} look for things. {a} finds {n} {g_n}, and {b} finds {k} {h_k}. "
        "now {answer} has more things.",
    ]), lambda scene: scene.people[0 if scene.numbers[0] > scene.numbers[1] else 1], tuple(NAMES)),
    "count": Kind(ONE_GROUP, small_first(1, lambda n: n > 1), uniform([
        "there are some {g} on the table. {a} counts them for {b}: {before}{n}. "
        "there are {answer} {g_answer}.",
        "{b} asks {a} to count the {g} on the table. {a} counts {before}{n}. "
        "there are {answer} {g_answer}.",
    ]), lambda scene: NUMBERS[scene.numbers[0] - 1], NUMBERS),
    "how many": Kind(TWO_GROUPS, small_first(2, lambda n, k: True), uniform([
        "{a} has {n} {g_n} and {k} {h_k}. {b} asks {him} how many {g} {he} has. "
        "{he} says {answer}.",
        "{a} finds {k} {h_k} and {n} {g_n}. how many {g} does {a} find? "
        "{he} tells {b}: {answer}.",
    ]), lambda scene: NUMBERS[scene.numbers[0] - 1], NUMBERS),
    "what colour": Kind(TWO_SHAPES, small_first(2, lambda n, k: n > 1), uniform([
        "{a} draws {n} {g_n} and {k} {h_k} for {b}. what colour are the {shapes}? "
        "they are {answer}.",
        "{a} draws {k} {h_k} and {n} {g_n}. {b} asks what colour the {shapes} are. "
        "{a} says {answer}.",
    ]), lambda scene: scene.groups[0].colour, tuple(COLOURS)),
}
KINDS = uniform(GRAMMAR)


def choose(rng, options):
    """One of the options of a table {option: probability}."""
    draw = rng.random()
    for option, reached in zip(options, itertools.accumulate(options.values())):
        if draw < reached:
            return option
    return option           # the probabilities may add up to a rounding error less than 1


def sample(rng):
    """A random scene: the choices of a story, but for its telling."""
    kind = choose(rng, KINDS)
    return Scene(kind, choose(rng, PEOPLE), choose(rng, GRAMMAR[kind].groups),
                 choose(rng, GRAMMAR[kind].numbers))


# --- words ---------------------------------------------------------------------------------------

def _plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


def _called(group, number="two"):
    """A group's name: one large red circle, but two large red circles."""
    return " ".join((*group[:2], group.shape if number == "one" else _plural(group.shape)))


def _fill(telling, scene, answer):
    """The telling of a scene, with any answer in the place of its answer."""
    said = dict(zip("ab", scene.people), answer=answer, shapes=_plural(scene.groups[0].shape),
                before="".join(f"{number}, " for number in NUMBERS[:scene.numbers[0] - 1]))
    said["he"], said["him"] = NAMES[scene.people[0]]
    said.update({letter: NUMBERS[number - 1] for letter, number in zip("nkm", scene.numbers)})
    for letter, group in zip("gh", scene.groups):
        said[letter] = _called(group)
        said.update({f"{letter}_{number}": _called(group, said.get(number)) for number in COUNTS})
    return telling.format(**said)


def describe(scene, rng=None):
    """Scene -> text with the right answer; `rng` chooses the telling."""
    tellings = GRAMMAR[scene.kind].tellings
    telling = next(iter(tellings)) if rng is None else choose(rng, tellings)
    return _fill(telling, scene, GRAMMAR[scene.kind].answer(scene))


def render(scene, rng=None):
    """Scene -> its signal, which in this world is the text."""
    return describe(scene, rng)


@functools.cache
def _group_names():
    """What a group can be called -> the group."""
    return {_called(group, number): group for group, in ONE_GROUP for number in ("one", "two")}


@functools.cache
def _patterns():
    """Each telling, with the names of its fields in order and the pattern that reads them."""
    number, group, name = _group(NUMBERS), _group(_group_names()), _group(NAMES)
    reads = {"a": name, "b": name, "n": number, "k": number, "m": number, "before": "([a-z, ]*?)",
             "he": "(he|she)", "him": "(him|her)", "shapes": _group(map(_plural, SHAPES))}
    for letter in "gh":
        reads |= {letter: group, **{f"{letter}_{number}": group for number in COUNTS}}
    return [(kind, telling, re.findall(r"\{(\w+)\}", telling),
             re.compile(_pattern(telling, answer=_group(GRAMMAR[kind].answers), **reads)))
            for kind in GRAMMAR for telling in GRAMMAR[kind].tellings]


def _read(text):
    """Text -> (scene, telling, answer), whether the answer is right or wrong; None for no story."""
    for kind, telling, fields, pattern in _patterns():
        match = pattern.fullmatch(text)
        if match is None:
            continue
        said = dict(zip(fields, match.groups()))
        groups = {field[0]: _group_names()[words] for field, words in said.items()
                  if field.split("_")[0] in ("g", "h")}
        scene = Scene(kind, (said["a"], said["b"]),
                      tuple(groups[letter] for letter in "gh" if letter in groups),
                      tuple(NUMBERS.index(said[letter]) + 1 for letter in "nkm" if letter in said))
        if all(option in options for option, options in _choices(scene, telling)) and \
                _fill(telling, scene, said["answer"]) == text:      # what is said twice agrees
            return scene, telling, said["answer"]
    return None


def opening(text, words=6):
    """The first words of a story: a prompt that leaves most of it, and its answer, to be told."""
    return " ".join(text.split(" ")[:words])


def parse(text):
    """Text -> scene, the inverse of `describe`; its answer may be wrong. None if it is no story."""
    found = _read(text)
    return found and found[0]


def grade(text):
    """Text -> scene, if it is a story and its answer is right; else None."""
    found = _read(text)
    if found is None or GRAMMAR[found[0].kind].answer(found[0]) != found[2]:
        return None
    return found[0]


# --- probability ---------------------------------------------------------------------------------

def _choices(scene, telling):
    """Every choice that a story is made of, as (option, the table that it is chosen from)."""
    kind = GRAMMAR[scene.kind]
    return ((scene.kind, KINDS), (scene.people, PEOPLE), (scene.groups, kind.groups),
            (scene.numbers, kind.numbers), (telling, kind.tellings))


def log_probability(text):
    """Log-probability of a text, in nats: the sum over its choices; -inf if it is never written."""
    if grade(text) is None:
        return -math.inf
    scene, telling, _ = _read(text)
    return sum(math.log(options[option]) for option, options in _choices(scene, telling))


def _table_entropy(options):
    """H = - sum of p log p, in nats."""
    return -sum(probability * math.log(probability) for probability in options.values())


def entropy():
    """Entropy of the stories in nats, by the chain rule: H(kind) + E[H(the rest, given the kind)].

    A text tells all its choices, so the entropy of the texts is that of the choices.
    """
    return _table_entropy(KINDS) + sum(
        probability * (_table_entropy(PEOPLE) + _table_entropy(GRAMMAR[kind].groups)
                       + _table_entropy(GRAMMAR[kind].numbers)
                       + _table_entropy(GRAMMAR[kind].tellings))
        for kind, probability in KINDS.items())
