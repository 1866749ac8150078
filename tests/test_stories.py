"""worlds/stories.py: its probabilities and its entropy are exact, and so is what it reads."""

import collections
import itertools
import math
import re

import numpy as np
import pytest

from adapter import load

stories, shapes = load("worlds.stories"), load("worlds.shapes")
Group, Scene = stories.Group, stories.Scene

RED, BLUE = Group("large", "red", "circle"), Group("small", "blue", "square")
GIFT = Scene("gift", ("Tom", "Anna"), (RED, BLUE), (2, 1, 3))
GIFT_TEXT = ("Tom has two large red circles and one small blue square. "
             "Anna gives him three more large red circles. "
             "now Tom has five large red circles and one small blue square.")


def told(count, seed=0):
    """(scene, text) `count` times."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene = stories.sample(rng)
        yield scene, stories.describe(scene, rng)


def one_of_each():
    """(scene, telling, text): a story in each of its tellings."""
    for name, kind in stories.GRAMMAR.items():
        numbers = next(numbers for numbers in kind.numbers if numbers[0] == 3)
        scene = Scene(name, ("Mia", "Ben"), (RED, BLUE)[:len(next(iter(kind.groups)))], numbers)
        for telling in kind.tellings:
            yield scene, telling, stories._fill(telling, scene, kind.answer(scene))


@pytest.fixture
def few(monkeypatch):
    """The grammar with two pairs of people and three choices of groups: small enough to list."""
    monkeypatch.setattr(stories, "PEOPLE", stories.uniform(list(stories.PEOPLE)[4:6]))
    for name, kind in stories.GRAMMAR.items():
        groups = stories.uniform(list(kind.groups)[7:10])
        monkeypatch.setitem(stories.GRAMMAR, name, kind._replace(groups=groups))


def every_story():
    """(scene, telling, text) of every derivation of the grammar."""
    for name, kind in stories.GRAMMAR.items():
        for *choices, telling in itertools.product(stories.PEOPLE, kind.groups, kind.numbers,
                                                   kind.tellings):
            scene = Scene(name, *choices)
            yield scene, telling, stories._fill(telling, scene, kind.answer(scene))


# --- scenes and words ----------------------------------------------------------------------------

def test_sample_draws_every_option_and_no_held_out_pair():
    scenes = [scene for scene, _ in told(5000)]
    assert {scene.kind for scene in scenes} == set(stories.GRAMMAR)
    assert {scene.people for scene in scenes} == set(itertools.permutations(stories.NAMES, 2))
    pairs = {(group.shape, group.colour) for scene in scenes for group in scene.groups}
    assert pairs == set(itertools.product(shapes.SHAPES, shapes.COLOURS)) - shapes.HELD_OUT
    assert all(len(set(scene.groups)) == len(scene.groups) for scene in scenes)


def test_a_story_is_told_as_the_docstring_shows():
    assert stories.describe(GIFT) == GIFT_TEXT == stories.render(GIFT)
    assert GIFT_TEXT in " ".join(stories.__doc__.split())


def test_parse_and_grade_invert_describe():
    for scene, text in told(3000):
        assert stories.parse(text) == scene == stories.grade(text)


def test_describe_uses_every_telling():
    rng = np.random.default_rng(0)
    for scene, _, text in one_of_each():
        texts = {stories.describe(scene, rng) for _ in range(50)}
        assert len(texts) == len(stories.GRAMMAR[scene.kind].tellings) and text in texts


def test_stories_are_short_and_of_few_words():
    texts = [text for _, text in told(3000)]
    assert all(20 <= len(text.split()) <= 45 for text in texts)
    assert all(2 <= len(re.findall("[.?]", text)) <= 4 for text in texts)
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert len(words) <= 80
    assert words >= {"circles", "squares", "triangles", "crosses", *shapes.SHAPES}


def test_the_answer_is_right_by_other_means():
    """Count the words: a sum, a difference, the greater number, the number last counted."""
    number = {word: i for i, word in enumerate(stories.NUMBERS, 1)}
    for scene, text in told(1500):
        said = [number[word] for word in re.findall(r"\w+", text) if word in number]
        if scene.kind in ("gift", "loss"):
            g_is_first = text.index(" ".join(scene.groups[0])) < text.index(" and ")
            n, other = said[:2] if g_is_first else said[1::-1]
            sign = 1 if scene.kind == "gift" else -1
            assert said[3] == n + sign * said[2] and said[4:] in ([], [other])
        elif scene.kind == "count":
            assert said == [*range(1, said[-1] + 1), said[-1]]
        elif scene.kind == "comparison":
            names = [word for word in re.findall(r"\w+", text) if word in stories.NAMES]
            assert names[-1] == (names[0] if said[0] > said[1] else names[1])
        elif scene.kind == "how many":
            assert said[2] == (said[0] if "asks" in text else said[1])
        else:
            answer = re.findall(r"\w+", text)[-1]
            assert re.search(f"(small|large) {answer} {scene.groups[0].shape}s?", text)


# --- what is not read ----------------------------------------------------------------------------

def test_a_story_with_a_wrong_answer_is_parsed_but_not_graded_and_has_no_probability():
    for scene, telling, _ in one_of_each():
        kind = stories.GRAMMAR[scene.kind]
        wrong = set(kind.answers) - {kind.answer(scene)}
        assert len(wrong) == len(kind.answers) - 1
        for answer in wrong:
            text = stories._fill(telling, scene, answer)
            assert stories.parse(text) == scene
            assert stories.grade(text) is None
            assert stories.log_probability(text) == -math.inf


@pytest.mark.parametrize("right, wrong", [
    ("now Tom has five", "now Tom has six"), ("now Tom has", "now Anna has"), ("him", "her"),
    ("one small blue square. ", "two small blue squares. "),
    ("Anna", "Tom"),
    ("more large red", "more small red"), ("five large red circles", "five large red circle"),
    ("one small blue square", "one small blue squares"), ("three more", "nine more"),
    ("large red circles", "large yellow circles"), ("red", "orange"), ("two", "2"),
    ("small blue square", "large red circle"), ("Tom", "Sam"), ("now", "so"), (".", ""),
    ("Tom has two", "tom has two"),
])
def test_a_story_with_something_wrong_is_not_graded(right, wrong):
    text = GIFT_TEXT.replace(right, wrong)
    assert text != GIFT_TEXT and stories.grade(GIFT_TEXT) == GIFT
    assert stories.grade(text) is None and stories.log_probability(text) == -math.inf


@pytest.mark.parametrize("text", [
    "", " ", ".", "Tom", "Tom has two large red circles.",
    "a small red circle at the centre on white.",
    "once upon a time there was a red circle. it had four corners. now it has none.",
    "there are some large red circles on the table. Tom counts them for Anna: one, three. "
    "there are three large red circles.",
    "there are some large red circles on the table. Tom counts them for Anna: one. "
    "there are one large red circle.",
    "Tom has two large red circles. Anna has two small blue squares. who has more things? "
    "Tom has more things.",
])
def test_what_no_derivation_writes_is_not_parsed(text):
    assert stories.parse(text) is None and stories.grade(text) is None
    assert stories.log_probability(text) == -math.inf


def test_a_story_cut_short_or_lengthened_is_not_parsed():
    for _, _, text in one_of_each():
        wrong = [text[:end] for end in range(len(text))]
        wrong += [extra + text for extra in (" ", "\n", "a ", "now ", text + " ")]
        wrong += [text + extra for extra in (" ", "\n", ".", " now", "\x00", " " + text)]
        assert [story for story in wrong if stories.parse(story) is not None] == []


# --- probability ---------------------------------------------------------------------------------

def test_every_table_adds_up_to_one():
    tables = [stories.KINDS, stories.PEOPLE]
    for kind in stories.GRAMMAR.values():
        tables += [kind.groups, kind.numbers, kind.tellings]
    for table in tables:
        assert math.fsum(table.values()) == pytest.approx(1, abs=1e-12) and min(table.values()) > 0


def test_choose_follows_its_table():
    rng, table = np.random.default_rng(0), {"a": 0.5, "b": 0.3, "c": 0.2}
    counts = collections.Counter(stories.choose(rng, table) for _ in range(20_000))
    for option, probability in table.items():
        error = (probability * (1 - probability) / 20_000) ** 0.5
        assert abs(counts[option] / 20_000 - probability) < 4 * error


def test_the_probabilities_of_all_stories_add_up_to_one_and_give_the_entropy(few):
    texts = [text for _, _, text in every_story()]
    assert len(set(texts)) == len(texts) > 10_000           # one derivation for each text
    log_p = np.array([stories.log_probability(text) for text in texts])
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-9)
    assert stories.entropy() == pytest.approx(-(np.exp(log_p) * log_p).sum(), abs=1e-9)


def test_no_story_of_the_whole_grammar_fits_two_tellings():
    for _, text in told(2000):
        assert sum(bool(pattern.fullmatch(text)) for *_, pattern in stories._patterns()) == 1


def test_the_entropy_is_the_mean_of_the_loss_of_the_true_model():
    losses = np.array([-stories.log_probability(text) for _, text in told(8000)])
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - stories.entropy()) < 3 * error < 0.1


def test_the_log_probability_of_a_story_by_hand():
    def product_of_inverses(possible):
        return math.fsum(1 / (n * k * m) for n, k, m in
                         itertools.product(range(1, 11), repeat=3) if possible(n, k, m))

    numbers = (1 / (2 * 1 * 3)) / product_of_inverses(lambda n, k, m: n + m <= 10)
    expected = 1 / 6 * 1 / 30 * 1 / (40 * 39) * numbers * 1 / 2
    assert stories.log_probability(GIFT_TEXT) == pytest.approx(math.log(expected), abs=1e-9)


def test_stories_come_as_often_as_their_probability_says(few):
    """Those of the likeliest numbers of each kind, each against its own count."""
    count = 20_000
    seen = collections.Counter(text for _, text in told(count))
    likely = {name: max(kind.numbers, key=kind.numbers.get)
              for name, kind in stories.GRAMMAR.items()}
    for scene, _, text in every_story():
        if scene.numbers == likely[scene.kind]:
            p = math.exp(stories.log_probability(text))
            assert count * p > 10
            assert abs(seen[text] - count * p) < 4.5 * (count * p * (1 - p)) ** 0.5
