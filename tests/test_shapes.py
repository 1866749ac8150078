"""worlds/shapes.py: its words and its pictures are read back exactly, and nothing else is read."""

import itertools

import numpy as np
import pytest

from adapter import load
from captions import damaged

shapes = load("worlds.shapes")
Scene, Thing = shapes.Scene, shapes.Thing

RED_CIRCLE = Thing("small", "red", "circle", "centre")
ONE = Scene("white", (RED_CIRCLE,))
TWO = Scene("black", (Thing("large", "cyan", "cross", "top-left"), RED_CIRCLE))


def scenes(count, seed=0, things=None):
    """(rng, scene) `count` times, every other scene with a held-out pair."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield rng, shapes.sample(rng, things, held_out=bool(i % 2))


def colour(table, name):
    return np.float32(table[name]).reshape(3, 1, 1) / 127.5 - 1


# --- scenes --------------------------------------------------------------------------------------

def test_a_held_out_pair_is_drawn_never_unless_asked_for_and_always_when_asked_for():
    for i, (_, scene) in enumerate(scenes(4000)):
        pairs = {(thing.shape, thing.colour) for thing in scene.things}
        assert bool(pairs & shapes.HELD_OUT) == bool(i % 2) == shapes.is_held_out(scene)


def test_sample_draws_every_option_on_distinct_places_in_canonical_order():
    seen = set()
    for _, scene in scenes(2000):
        order = [shapes.PLACES.index(thing.place) for thing in scene.things]
        assert len(order) in (1, 2) and order == sorted(set(order))
        seen.update({scene.background, len(order)}, *scene.things)
    assert seen == {1, 2, *shapes.BACKGROUNDS, *shapes.SIZES, *shapes.COLOURS, *shapes.SHAPES,
                    *shapes.PLACES}


@pytest.mark.parametrize("count", [1, 2])
def test_sample_gives_the_number_of_things_asked_for(count):
    assert all(len(scene.things) == count for _, scene in scenes(100, things=count))


# --- words ---------------------------------------------------------------------------------------

def test_parse_inverts_describe():
    for rng, scene in scenes(4000):
        assert shapes.parse(shapes.describe(scene)) == scene
        assert shapes.parse(shapes.describe(scene, rng)) == scene


def test_parse_inverts_describe_for_every_thing_there_is():
    rng = np.random.default_rng(0)
    for thing in itertools.product(shapes.SIZES, shapes.COLOURS, shapes.SHAPES, shapes.PLACES):
        scene = Scene("grey", (Thing(*thing),))
        assert shapes.parse(shapes.describe(scene, rng)) == scene


@pytest.mark.parametrize("scene, orders", [(ONE, 1), (TWO, 2)])
def test_describe_uses_every_phrasing_in_every_order(scene, orders):
    rng = np.random.default_rng(0)
    captions = {shapes.describe(scene, rng) for _ in range(300)}
    assert len(captions) == orders * len(shapes.PHRASINGS)


@pytest.mark.parametrize("caption", [
    "", " ", "a", "red circle", "at the centre a small red circle", "white.",
    "at the centre a small red circle on white",
    "a small red circle on white.",
    "at the centre a red small circle on white.",
    "a small red circle at the centre on white.",
    "at the centre a small red circle, on white.",
    "at the centre a small red circle or at the top-left a large red cross on white.",
    "At the centre a small red circle on white.",
    "on white: centre small red circle, .",
    "(white), with centre a small red circle.",
])
def test_parse_rejects_what_describe_never_says(caption):
    assert shapes.parse(caption) is None


def test_parse_rejects_a_caption_cut_short_lengthened_or_with_one_wrong_word():
    for rng, scene in scenes(60):
        caption = shapes.describe(scene, rng)
        wrong = damaged(caption, "orange")
        assert [text for text in wrong if shapes.parse(text) is not None] == []


def test_parse_rejects_two_things_on_one_place_three_things_and_none():
    rng = np.random.default_rng(0)
    other = Thing("large", "blue", "square", "centre")
    elsewhere = [other._replace(place=place) for place in ("top-left", "bottom-right")]
    for things in [(RED_CIRCLE, other), (RED_CIRCLE, RED_CIRCLE), (RED_CIRCLE, *elsewhere), ()]:
        for _ in range(30):
            assert shapes.parse(shapes.describe(Scene("white", things), rng)) is None


# --- changes -------------------------------------------------------------------------------------

def test_apply_change_finds_what_change_did():
    for rng, scene in scenes(2000):
        if sum(shapes.is_held_out(Scene("", (thing,))) for thing in scene.things) == 2:
            continue                        # one change cannot undo both pairs
        sentence, after = shapes.change(scene, rng)
        assert shapes.apply_change(scene, sentence) == after


def test_change_alters_one_field_of_one_thing_and_never_makes_a_held_out_pair():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scene = shapes.sample(rng)
        _, after = shapes.change(scene, rng)
        assert not shapes.is_held_out(after)
        assert after == shapes.make_scene(after.background, after.things)
        assert after.background == scene.background and len(after.things) == len(scene.things)
        was, = set(scene.things) - set(after.things)
        now, = set(after.things) - set(scene.things)
        assert sum(a != b for a, b in zip(was, now)) == 1


def test_apply_change_against_every_sentence_there_is():
    options = {"colour": shapes.COLOURS, "size": shapes.SIZES, "shape": shapes.SHAPES,
               "place": shapes.PLACES}
    for _, scene in scenes(6, things=2):
        for field, shape, place in itertools.product(options, shapes.SHAPES, shapes.PLACES):
            for value in options[field]:
                sentence = shapes.CHANGES[field].format(shape=shape, place=place, value=value)
                expected = None
                for thing, other in (scene.things, scene.things[::-1]):
                    taken = field == "place" and value == other.place
                    if (thing.shape, thing.place) == (shape, place) and not taken:
                        changed = thing._replace(**{field: value})
                        expected = shapes.make_scene(scene.background, [changed, other])
                assert shapes.apply_change(scene, sentence) == expected


@pytest.mark.parametrize("sentence", [
    "", "the centre circle turns red", "the centre circle turns large.",
    "the centre circle becomes a small.", "the centre circle becomes cross.",
    "the centre circle moves to the left.", "and the centre circle turns blue.",
    "the centre circle turns blue. ", "the centre circle turns orange.",
])
def test_apply_change_rejects_what_change_never_says(sentence):
    assert shapes.apply_change(TWO, sentence) is None


# --- pictures ------------------------------------------------------------------------------------

def inside(shape, radius, x, y):
    """Is the point (x, y) in the shape? From its geometry, with no distance to an edge."""
    if shape == "circle":
        return x * x + y * y <= radius ** 2
    if shape == "square":
        return (abs(x) <= 0.86 * radius) & (abs(y) <= 0.86 * radius)
    if shape == "triangle":                 # equilateral, 1.8 radius high, pointing up
        below_top = y + 0.9 * radius
        return (abs(x) <= below_top / np.sqrt(3)) & (below_top <= 1.8 * radius)
    return ((abs(x) <= radius) & (abs(y) <= 0.36 * radius) |
            (abs(y) <= radius) & (abs(x) <= 0.36 * radius))


CORNERS = {     # in radii; near them two edges meet, and the distance to one is not the whole story
    "circle": [],
    "square": [(x, y) for x in (-0.86, 0.86) for y in (-0.86, 0.86)],
    "triangle": [(0, -0.9), (1.8 / np.sqrt(3), 0.9), (-1.8 / np.sqrt(3), 0.9)],
    "cross": [(x, y) for x in (-1, -0.36, 0.36, 1) for y in (-1, -0.36, 0.36, 1)],
}


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_is_the_share_of_a_pixel_that_16x_supersampling_finds(shape):
    rng = np.random.default_rng(0)
    pixels, points = np.arange(32) + 0.5, (np.arange(512) + 0.5) / 16
    for radius in [*shapes.SIZES.values(), 8.0, 11.6] * 8:
        cx, cy = rng.uniform(14, 18, 2)
        x, y = pixels[None, :] - cx, pixels[:, None] - cy
        covered = shapes.coverage(shape, radius, x, y)
        expected = inside(shape, radius, points[None, :] - cx, points[:, None] - cy)
        expected = expected.reshape(32, 16, 32, 16).mean((1, 3))
        at_corner = np.zeros((32, 32), bool)
        for i, j in CORNERS[shape]:
            at_corner |= np.maximum(abs(x - i * radius), abs(y - j * radius)) < 2
        # 0.07: 1/32 is the oracle's own step, 0.04 a pixel whose corner a 45 degree edge cuts
        assert abs(covered - expected)[~at_corner].max() < 0.07
        assert abs(covered.sum() / expected.sum() - 1) < 0.05


@pytest.mark.parametrize("size", [32, 64])
def test_render_gives_float32_pictures_in_range(size):
    for rng, scene in scenes(100):
        picture = shapes.render(scene, rng, size)
        assert picture.shape == (3, size, size) and picture.dtype == np.float32
        assert -1 <= picture.min() and picture.max() <= 1


def test_render_puts_each_colour_at_its_place_on_its_background():
    for _, scene in scenes(100):
        picture = shapes.render(scene)
        things = {thing.place: thing for thing in scene.things}
        for place, (row, column) in zip(shapes.PLACES, itertools.product((6, 16, 26), repeat=2)):
            expected = colour(shapes.BACKGROUNDS, scene.background)
            if place in things:
                expected = colour(shapes.COLOURS, things[place].colour)
            found = picture[:, row - 1:row + 1, column - 1:column + 1]
            np.testing.assert_array_equal(found, np.tile(expected, (2, 2)))


def test_render_is_the_same_for_the_same_jitter_and_differs_for_another():
    for _, scene in scenes(50):
        one, again, other = (shapes.render(scene, np.random.default_rng(s)) for s in (0, 0, 1))
        assert (one == again).all() and (one != other).any()
        assert (shapes.render(scene) == shapes.render(scene)).all()


@pytest.mark.parametrize("size", [32, 64])
def test_jitter_moves_a_thing_by_up_to_its_limit_in_both_directions_alone(size):
    rng, moves = np.random.default_rng(0), []
    for _ in range(200):
        drawn = abs(shapes.render(ONE, rng, size) - colour(shapes.BACKGROUNDS, "white")).sum(0)
        centre = [np.average(np.arange(size) + 0.5, weights=drawn.sum(axis)) for axis in (0, 1)]
        moves.append(np.array(centre) * 32 / size - 16)     # in pixels of a 32 x 32 picture
    low, high = np.min(moves, axis=0), np.max(moves, axis=0)
    assert (abs(high - shapes.JITTER) < 0.05).all() and (abs(low + shapes.JITTER) < 0.05).all()
    assert abs(np.corrcoef(np.transpose(moves))[0, 1]) < 0.2


# --- the grader: what it reads -------------------------------------------------------------------

@pytest.mark.parametrize("size, count", [(32, 600), (64, 60)])
def test_grade_reads_jittered_pictures(size, count):
    right = [shapes.grade(shapes.render(scene, rng, size)) == scene for rng, scene in scenes(count)]
    assert np.mean(right) >= 0.995


class Moves:
    """In place of a random generator: each thing's jitter (dx, dy), as a share of its limit."""

    def __init__(self, *moves):
        self.moves = iter(moves)

    def uniform(self, low, high, count):
        return high * np.array(next(self.moves))


@pytest.mark.parametrize("colours", [("red", "cyan"), ("blue", "blue")])
@pytest.mark.parametrize("right, down", [(1, 0), (0, 1)], ids=["side by side", "one above another"])
def test_grade_reads_large_neighbours_that_are_pushed_together_most_of_which_touch(
        right, down, colours):
    rng, touch = np.random.default_rng(0), []
    grid = dict(zip(itertools.product(range(3), repeat=2), shapes.PLACES))
    pairs = [(first, grid[row + down, column + right]) for (row, column), first in grid.items()
             if (row + down, column + right) in grid]
    for places, kinds in itertools.product(pairs, itertools.product(shapes.SHAPES, repeat=2)):
        things = tuple(Thing("large", *thing) for thing in zip(colours, kinds, places))
        scene = Scene(rng.choice(list(shapes.BACKGROUNDS)), things)
        across = rng.uniform(-1, 1, 2)              # in the other direction, any jitter
        moves = [(down * across[0] + right, right * across[0] + down),
                 (down * across[1] - right, right * across[1] - down)]
        assert shapes.grade(shapes.render(scene, Moves(*moves))) == scene
        drawn = [shapes.render(Scene(scene.background, (thing,)), Moves(move))
                 != colour(shapes.BACKGROUNDS, scene.background)
                 for thing, move in zip(things, moves)]
        touch.append((drawn[0].any(0) & drawn[1].any(0)).any())     # they share a pixel
    assert len(touch) == 6 * 16 and np.mean(touch) > 0.5


def test_grade_reads_pictures_with_the_error_of_a_good_autoencoder():
    deviation = 2 * 10 ** (-32 / 20)        # 32 dB
    right = []
    for rng, scene in scenes(300):
        noise = deviation * rng.standard_normal((3, 32, 32))
        right.append(shapes.grade((shapes.render(scene, rng) + noise).clip(-1, 1)) == scene)
    assert np.mean(right) >= 0.99


def test_grade_is_deterministic_and_leaves_its_picture_alone():
    for rng, scene in scenes(20):
        picture = shapes.render(scene, rng) + 0.2 * rng.standard_normal((3, 32, 32))
        before = picture.copy()
        assert shapes.grade(picture) == shapes.grade(picture)
        assert (picture == before).all()


# --- the grader: what it must not read -----------------------------------------------------------

def unreadable(pictures):
    """None of the pictures is read; on failure pytest shows as what."""
    grades = [shapes.grade(picture) for picture in pictures]
    read = [scene for scene in grades if scene is not None]
    assert read == [], f"{len(read)} of {len(grades)} were read"


def blur(picture, sigma):
    kernel = np.exp(-0.5 * (np.arange(-12, 13) / sigma) ** 2)
    for axis in (1, 2):
        padded = np.pad(picture, [(0, 0)] + [(12, 12) if a == axis else (0, 0) for a in (1, 2)],
                        mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 25, axis)
        picture = windows @ (kernel / kernel.sum())
    return picture


def erase_half(scene, thing, rng, axis):
    """The picture, but background below (axis 1) or to the right of (axis 2) the thing's middle."""
    picture = shapes.render(scene, rng)
    middle = 6 + 10 * divmod(shapes.PLACES.index(thing.place), 3)[axis - 1]
    np.moveaxis(picture, axis, 1)[:, middle:] = colour(shapes.BACKGROUNDS, scene.background)
    return picture


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_an_empty_picture_is_unreadable(background):
    rng = np.random.default_rng(0)
    empty = np.tile(colour(shapes.BACKGROUNDS, background), (1, 32, 32))
    unreadable([empty] + [empty + s * rng.standard_normal(empty.shape) for s in (0.01, 0.1, 0.3)])


def test_noise_is_unreadable():
    rng = np.random.default_rng(0)
    unreadable(s * rng.standard_normal((3, 32, 32)) for s in [0.1, 0.3, 1.0] * 20)
    unreadable(rng.uniform(-1, 1, (3, 32, 32)) for _ in range(20))


def test_heavily_blurred_pictures_are_unreadable():
    unreadable(blur(shapes.render(scene, rng), sigma=3) for rng, scene in scenes(600))


def test_how_much_blur_and_paleness_is_too_much():
    """Of single things: half a pixel of blur is read, one and a half is not; nor are pale ones."""
    for sigma, read in ((0.5, True), (1.5, False)):
        for rng, scene in scenes(150, things=1):
            found = shapes.grade(blur(shapes.render(scene, rng), sigma))
            assert found == (scene if read else None)

    def pale(scene, rng, share):
        empty = colour(shapes.BACKGROUNDS, scene.background)
        return empty + share * (shapes.render(scene, rng) - empty)
    unreadable(pale(scene, rng, 0.6) for rng, scene in scenes(150, things=1))


@pytest.mark.parametrize("axis", [1, 2])
def test_half_a_thing_is_unreadable(axis):
    unreadable(erase_half(scene, scene.things[0], rng, axis)
               for rng, scene in scenes(150, things=1))


@pytest.mark.parametrize("axis", [1, 2])
def test_a_picture_with_a_thing_cut_in_half_is_never_read_as_the_whole_scene(axis):
    for rng, scene in scenes(150, things=2):
        for thing in scene.things:
            assert shapes.grade(erase_half(scene, thing, rng, axis)) != scene


def test_half_a_thing_beside_a_whole_one_is_unreadable():
    def pictures():
        for rng, scene in scenes(200, things=2):
            upper, lower = scene.things
            if shapes.PLACES.index(upper.place) // 3 < shapes.PLACES.index(lower.place) // 3:
                yield erase_half(scene, lower, rng, axis=1)
    unreadable(pictures())


@pytest.mark.parametrize("size", [32, 64])
def test_an_edge_that_no_thing_reaches_is_not_left_out(size):
    def pictures():
        for rng, scene in scenes(60):
            picture = shapes.render(scene, rng, size)
            other = next(paint for name, paint in shapes.BACKGROUNDS.items()
                         if name != scene.background)
            for edge in (picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]):
                edge[:] = np.float32(other)[:, None] / 127.5 - 1
            yield picture
    unreadable(pictures())


def test_the_least_half_of_all_beside_a_whole_thing_is_unreadable():
    """The tip of a small triangle, of which a few pixels are left."""
    def pictures():
        for rng, scene in scenes(1500, things=2):
            upper, lower = scene.things
            if (lower.size, lower.shape) == ("small", "triangle") and (
                    shapes.PLACES.index(upper.place) // 3 < shapes.PLACES.index(lower.place) // 3):
                yield erase_half(scene, lower, rng, axis=1)
    unreadable(pictures())


def test_a_third_thing_is_unreadable():
    def pictures():
        for rng, scene in scenes(200, things=2):
            taken = {thing.place for thing in scene.things}
            free = [place for place in shapes.PLACES if place not in taken]
            third = shapes.sample(rng, 1).things[0]._replace(place=free[rng.integers(len(free))])
            yield shapes.render(shapes.make_scene(scene.background, (*scene.things, third)), rng)
    unreadable(pictures())


def test_the_average_of_two_pictures_is_unreadable():
    def pictures():
        for rng, scene in scenes(200):
            other = shapes.sample(rng)
            if not {t.place for t in scene.things} & {t.place for t in other.things}:
                yield (shapes.render(scene, rng) + shapes.render(other, rng)) / 2
    unreadable(pictures())


def test_the_average_of_two_things_of_other_shape_and_colour_in_one_place_is_unreadable():
    def pictures():
        for rng, scene in scenes(200, things=1):
            thing, other = scene.things[0], shapes.sample(rng, 1).things[0]
            if thing.shape != other.shape and thing.colour != other.colour:
                other = Scene(scene.background, (other._replace(place=thing.place),))
                yield (shapes.render(scene, rng) + shapes.render(other, rng)) / 2
    unreadable(pictures())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_with_one_value_that_is_not_finite_is_unreadable(value):
    picture = shapes.render(TWO)
    picture[1, 5, 7] = value
    unreadable([picture])


@pytest.mark.parametrize("shape", [(32, 32), (1, 32, 32), (4, 32, 32), (32, 32, 3), (3, 32, 31),
                                   (1, 3, 32, 32)])
def test_a_picture_of_the_wrong_shape_is_unreadable(shape):
    unreadable([np.resize(shapes.render(TWO), shape)])
