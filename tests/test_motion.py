"""worlds/motion.py: its words and its clips are read back exactly, and nothing else is read."""

import itertools

import numpy as np
import pytest

from adapter import load
from captions import damaged

motion, shapes = load("worlds.motion"), load("worlds.shapes")
Scene = motion.Scene

STILL = Scene("white", "small", "red", "circle", "stays", "centre")
LEFT = Scene("black", "large", "cyan", "cross", "moves slowly", "left")
MOVES = ("moves slowly", "moves fast")
WAYS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0),
        "up-left": (-0.5 ** 0.5, -0.5 ** 0.5), "up-right": (0.5 ** 0.5, -0.5 ** 0.5),
        "down-left": (-0.5 ** 0.5, 0.5 ** 0.5), "down-right": (0.5 ** 0.5, 0.5 ** 0.5)}
OPPOSITE = {"up": "down", "left": "right", "up-left": "down-right", "up-right": "down-left"}
OPPOSITE |= {there: here for here, there in OPPOSITE.items()}


def scenes(count, seed=0, actions=motion.ACTIONS):
    """(rng, scene) `count` times, of these actions, every other scene with a held-out pair."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        scene = motion.sample(rng, held_out=bool(i % 2))
        while scene.action not in actions:
            scene = motion.sample(rng, held_out=bool(i % 2))
        yield rng, scene


def every_scene():
    for rest in itertools.product(shapes.BACKGROUNDS, shapes.SIZES, shapes.COLOURS, shapes.SHAPES):
        for action, values in motion.ACTIONS.items():
            yield from (Scene(*rest, action, value) for value in values if value not in rest[1:3])


def colour(table, name):
    return np.float32(table[name]).reshape(3, 1, 1) / 127.5 - 1


def drawn(scene, clip):
    """(8, 32, 32) how far each pixel is from the background, summed over red, green and blue."""
    return abs(clip - colour(shapes.BACKGROUNDS, scene.background)).sum(1)


def centres_of_mass(scene, clip):
    """(8, 2) x and y of what is drawn in each frame, in pixels."""
    mass, pixels = drawn(scene, clip), np.arange(32) + 0.5
    return np.stack([mass.sum(1) @ pixels, mass.sum(2) @ pixels], 1) / mass.sum((1, 2))[:, None]


def along(path, scenes=(STILL,) * 8):
    """A clip of the scenes' things with their centres on the path: 8 times (x, y)."""
    frames, pixels = [], np.arange(32) + 0.5
    for (x, y), scene in zip(path, scenes):
        mask = shapes.coverage(scene.shape, shapes.SIZES[scene.size], pixels[None, :] - x,
                               pixels[:, None] - y)
        frames.append(colour(shapes.BACKGROUNDS, scene.background) * (1 - mask)
                      + colour(shapes.COLOURS, scene.colour) * mask)
    return np.float32(frames)


# --- scenes --------------------------------------------------------------------------------------

def test_a_held_out_pair_is_drawn_never_unless_asked_for_and_always_when_asked_for():
    for i, (_, scene) in enumerate(scenes(4000)):
        pairs = {(scene.shape, scene.colour)}
        if scene.action == "turns":
            pairs.add((scene.shape, scene.value))
        assert bool(pairs & shapes.HELD_OUT) == bool(i % 2) == motion.is_held_out(scene)


def test_sample_draws_every_option_and_no_change_to_what_already_is():
    sampled = [scene for _, scene in scenes(4000)]
    for options, values in zip((shapes.BACKGROUNDS, shapes.SIZES, shapes.COLOURS, shapes.SHAPES),
                               zip(*sampled)):
        assert set(values) == set(options)
    assert {(scene.action, scene.value) for scene in sampled} == {
        (action, value) for action, values in motion.ACTIONS.items() for value in values}
    assert all(scene.value not in (scene.colour, scene.size) for scene in sampled)


# --- words ---------------------------------------------------------------------------------------

def test_parse_inverts_describe():
    for rng, scene in scenes(6000):
        assert motion.parse(motion.describe(scene, rng)) == scene


def test_parse_inverts_describe_for_every_scene_there_is():
    for scene in every_scene():
        assert motion.parse(motion.describe(scene)) == scene


@pytest.mark.parametrize("action", motion.ACTIONS)
def test_describe_uses_every_phrasing_and_each_is_read_back(action):
    rng = np.random.default_rng(0)
    scene = Scene("grey", "small", "red", "square", action, motion.ACTIONS[action][-1])
    captions = {motion.describe(scene, rng) for _ in range(300)}
    assert len(captions) == len(motion.PHRASINGS) * len(motion.DOES[action])
    assert {motion.parse(caption) for caption in captions} == {scene}


def test_no_caption_can_be_read_in_two_ways():
    for rng, scene in scenes(600):
        caption = motion.describe(scene, rng)
        assert sum(bool(pattern.fullmatch(caption)) for *_, pattern in motion._patterns()) == 1


@pytest.mark.parametrize("caption", [
    "", " ", "a", "white.", "a large red circle on white.", "a large red circle on white moves.",
    "a large red circle on white moves left.",
    "a large red circle on white moves left slowly",
    "A large red circle on white moves left slowly.",
    "a red large circle on white moves left slowly.",
    "a large red circle on white moves top slowly.",
    "a large red circle on white moves slowly left.",
    "a large red circle on white bounces off the up edge.",
    "a large red circle on white stays at the up-left.",
    "a large red circle on white turns red.",
    "a large red circle on white turns small.",
    "a large red circle on white becomes large.",
    "a large red circle on white becomes blue.",
    "a large red circle on white moves left slowly, on white.",
])
def test_parse_rejects_what_describe_never_says(caption):
    assert motion.parse(caption) is None


def test_parse_rejects_a_caption_cut_short_lengthened_or_with_one_wrong_word():
    for rng, scene in scenes(40):
        caption = motion.describe(scene, rng)
        wrong = damaged(caption, "orange")
        assert [text for text in wrong if motion.parse(text) is not None] == []


# --- clips ---------------------------------------------------------------------------------------

def test_render_gives_float32_clips_in_range():
    for rng, scene in scenes(100):
        clip = motion.render(scene, rng)
        assert clip.shape == (8, 3, 32, 32) and clip.dtype == np.float32
        assert -1 <= clip.min() and clip.max() <= 1


def test_render_is_the_same_for_the_same_jitter_and_differs_for_another():
    for _, scene in scenes(50):
        one, again, other = (motion.render(scene, np.random.default_rng(s)) for s in (0, 0, 1))
        assert (one == again).all() and (one != other).any()
        assert (motion.render(scene) == motion.render(scene)).all()


@pytest.mark.parametrize("action, speed", [("moves slowly", 1.0), ("moves fast", 2.5)])
def test_the_centre_of_mass_moves_in_the_named_direction_at_the_named_speed(action, speed):
    for direction, shape, size in itertools.product(WAYS, shapes.SHAPES, shapes.SIZES):
        scene = Scene("grey", size, "red", shape, action, direction)
        centres = centres_of_mass(scene, motion.render(scene))
        steps = np.diff(centres, axis=0)
        expected = speed * np.array(WAYS[direction])
        assert abs(steps - expected).max() < 0.15       # a frame's anti-aliased edges
        assert abs(steps.mean(0) - expected).max() < 0.02


@pytest.mark.parametrize("edge, axis, sign", [("left", 0, -1), ("right", 0, 1),
                                              ("top", 1, -1), ("bottom", 1, 1)])
def test_a_bouncing_thing_goes_to_its_edge_and_back(edge, axis, sign):
    for rng, scene in scenes(40, actions=("bounces",)):
        scene = scene._replace(value=edge)
        clip = motion.render(scene, rng)
        centres = sign * centres_of_mass(scene, clip)
        ahead = np.diff(centres[:, axis])
        assert (ahead[:3] > 2.2).all() and (ahead[4:] < -2.2).all()
        assert abs(np.diff(centres[:, 1 - axis])).max() < 0.15
        profile = drawn(scene, clip).max((0, 1 if axis == 0 else 2))    # all frames, by x or by y
        outermost = np.flatnonzero(profile > 0.1)[[0, -1][sign > 0]]
        assert abs(outermost - (0 if sign < 0 else 31)) <= 2


@pytest.mark.parametrize("action", ["turns", "becomes"])
def test_a_change_is_half_way_and_of_nothing_else(action):
    for rng, scene in scenes(100, actions=(action,)):
        clip = motion.render(scene, rng)
        assert (clip[:4] == clip[0]).all() and (clip[4:] == clip[4]).all()
        now = scene._replace(**{"colour" if action == "turns" else "size": scene.value})
        for frame, shown in ((0, scene), (7, now)):
            paint = colour(shapes.COLOURS, shown.colour)
            row, column = divmod(int(drawn(scene, clip)[frame].argmax()), 32)
            np.testing.assert_array_equal(clip[frame, :, row, column], paint[:, 0, 0])
            contrast = abs(paint - colour(shapes.BACKGROUNDS, scene.background)).sum()
            area = drawn(scene, clip)[frame].sum() / contrast
            whole = drawn(shown, along([(16, 16)], [shown])).sum() / contrast
            # sub-pixel places make 4 % of difference, the two sizes a factor of 2.1
            assert area == pytest.approx(whole, rel=0.1)


def test_a_thing_that_stays_is_at_its_place_in_every_frame():
    for rng, scene in scenes(100, actions=("stays",)):
        clip = motion.render(scene, rng)
        assert (clip == clip[0]).all()
        row, column = divmod(shapes.PLACES.index(scene.value), 3)
        found = centres_of_mass(scene, clip)[0] - (6 + 10 * column, 6 + 10 * row)
        balance = 0.3 * shapes.SIZES[scene.size] if scene.shape == "triangle" else 0
        assert abs(found - (0, balance)).max() < shapes.JITTER + 0.3


def test_a_thing_is_wholly_inside_the_picture_or_nearly_so_when_it_stays_at_an_edge():
    for rng, scene in scenes(600, actions=(*MOVES, "bounces", "stays")):
        mass = drawn(scene, motion.render(scene, rng)).sum((1, 2))
        whole = drawn(scene, along([(16, 16)], [scene])).sum()
        assert (mass > (0.9 if scene.action == "stays" else 0.97) * whole).all()


def test_jitter_moves_the_place_and_the_pace_by_up_to_their_limits():
    rng, scene = np.random.default_rng(0), LEFT._replace(action="moves fast")
    centres = np.stack([centres_of_mass(scene, motion.render(scene, rng)) for _ in range(300)])
    middle = centres.mean(1) - 16
    pace = -np.diff(centres[:, :, 0]).mean(1) / 2.5 - 1
    for values, limit in ((middle[:, 0], shapes.JITTER), (middle[:, 1], shapes.JITTER),
                          (pace, motion.PACE_JITTER)):
        assert abs(values.max() / limit - 1) < 0.1 and abs(values.min() / limit + 1) < 0.1


# --- the grader: what it reads -------------------------------------------------------------------

def test_grade_reads_jittered_clips():
    right = [motion.grade(motion.render(scene, rng)) == scene for rng, scene in scenes(300)]
    assert np.mean(right) >= 0.995


def test_the_grader_finds_the_centre_of_a_thing_even_if_the_edge_cuts_it():
    rng = np.random.default_rng(0)
    for size, shape in itertools.product(shapes.SIZES, shapes.SHAPES):
        path = rng.uniform(4.5, 27.5, (8, 2))
        _, _, centres = motion._look(along(path, [STILL._replace(size=size, shape=shape)] * 8))
        assert abs(centres - path).max() < 0.1


def filtered(clip, kernel):
    """The clip with each frame's rows and columns convolved with the kernel."""
    reach = len(kernel) // 2
    for axis in (2, 3):
        padding = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded = np.pad(clip, padding, mode="edge")
        clip = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis) @ kernel
    return clip


def blur(clip, sigma):
    kernel = np.exp(-0.5 * (np.arange(-8, 9) / sigma) ** 2)
    return filtered(clip, kernel / kernel.sum())


def test_grade_reads_clips_with_the_soft_edges_and_the_error_of_a_good_autoencoder():
    def decoded(clip, rng):
        soft = 0.7 * clip + 0.3 * filtered(clip, np.ones(3) / 3)
        return (soft + 0.03 * rng.standard_normal(clip.shape)).clip(-1, 1)

    right = [motion.grade(decoded(motion.render(scene, rng), rng)) == scene
             for rng, scene in scenes(150, seed=1)]
    assert np.mean(right) >= 0.99


def test_grade_reads_a_clip_that_runs_backwards_as_what_then_happens():
    for rng, scene in scenes(80, seed=2):
        backwards = scene
        if scene.action in MOVES:
            backwards = scene._replace(value=OPPOSITE[scene.value])
        elif scene.action == "turns":
            backwards = scene._replace(colour=scene.value, value=scene.colour)
        elif scene.action == "becomes":
            backwards = scene._replace(size=scene.value, value=scene.size)
        assert motion.grade(motion.render(scene, rng)[::-1]) == backwards


def test_grade_is_deterministic_and_leaves_its_clip_alone():
    for rng, scene in scenes(10):
        clip = motion.render(scene, rng) + 0.05 * rng.standard_normal((8, 3, 32, 32))
        before = clip.copy()
        assert motion.grade(clip) == motion.grade(clip)
        assert (clip == before).all()


# --- the grader: what it must not read -----------------------------------------------------------

def unreadable(clips):
    """None of the clips is read; on failure pytest shows as what."""
    grades = [motion.grade(clip) for clip in clips]
    read = [scene for scene in grades if scene is not None]
    assert grades and read == [], f"{len(read)} of {len(grades)} were read"


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
def test_an_empty_clip_is_unreadable(background):
    rng = np.random.default_rng(0)
    empty = np.tile(colour(shapes.BACKGROUNDS, background), (8, 1, 32, 32))
    unreadable([empty] + [empty + s * rng.standard_normal(empty.shape) for s in (0.01, 0.1, 0.3)])


def test_noise_is_unreadable():
    rng = np.random.default_rng(0)
    unreadable(s * rng.standard_normal((8, 3, 32, 32)) for s in [0.1, 0.3, 1.0] * 5)
    unreadable(np.tile(rng.uniform(-1, 1, (3, 32, 32)), (8, 1, 1, 1)) for _ in range(5))


def test_a_clip_in_noise_is_unreadable():
    unreadable(motion.render(scene, rng) + 0.6 * rng.standard_normal((8, 3, 32, 32))
               for rng, scene in scenes(40))


def test_heavily_blurred_clips_are_unreadable():
    unreadable(blur(motion.render(scene, rng), sigma=2) for rng, scene in scenes(80))


def test_one_heavily_blurred_frame_makes_a_clip_unreadable():
    def clips():
        for rng, scene in scenes(30):
            clip, frame = motion.render(scene, rng), rng.integers(8)
            clip[frame] = blur(clip, sigma=2)[frame]
            yield clip
    unreadable(clips())


def test_frames_that_are_blank_make_a_clip_unreadable():
    def clips():
        for rng, scene in scenes(40):
            clip, count = motion.render(scene, rng), rng.integers(1, 5)
            clip[rng.permutation(8)[:count]] = colour(shapes.BACKGROUNDS, scene.background)
            yield clip
    unreadable(clips())


@pytest.mark.parametrize("axis", [0, 1])
def test_half_a_thing_is_unreadable_in_all_frames_and_in_one(axis):
    def clips():
        for rng, scene in scenes(40):
            clip, one = motion.render(scene, rng), rng.integers(8)
            half = clip.copy()
            for frame, profile in zip(half, drawn(scene, clip).max(1 + axis)):
                middle = int(np.flatnonzero(profile > 0.1)[[0, -1]].mean())
                right_or_below = np.moveaxis(frame, 2 - axis, 1)[:, middle:]
                right_or_below[...] = colour(shapes.BACKGROUNDS, scene.background)
            yield half
            yield np.concatenate([clip[:one], half[one:one + 1], clip[one + 1:]])
    unreadable(clips())


def test_a_thing_that_is_half_outside_the_picture_is_unreadable():
    blue = STILL._replace(colour="blue")
    for x, y in ((0, 16), (32, 16), (16, 0), (16, 32)):
        unreadable([along([(x, y)] * 8, [STILL] * 4 + [blue] * 4)])
    x, y = 6, 26                            # wholly inside, the same is read
    assert motion.grade(along([(x, y)] * 8, [STILL] * 4 + [blue] * 4)) == STILL._replace(
        action="turns", value="blue")


def test_shuffled_frames_are_unreadable():
    def clips():
        for rng, scene in scenes(60, actions=(*MOVES, "bounces")):
            order = rng.permutation(8)
            if list(order) not in (list(range(8)), list(range(8))[::-1]):
                yield motion.render(scene, rng)[order]
    unreadable(clips())


def test_two_neighbouring_frames_of_a_move_in_the_wrong_order_make_it_unreadable():
    def clips():
        for rng, scene in scenes(40, actions=MOVES):
            order, first = np.arange(8), rng.integers(7)
            order[[first, first + 1]] = first + 1, first
            yield motion.render(scene, rng)[order]
    unreadable(clips())


def test_a_jump_is_unreadable():
    def clips():
        for rng, scene in scenes(60):
            clip, first = motion.render(scene, rng), rng.integers(1, 8)
            last = 8 if rng.random() < 0.5 else first + 1       # for good, or in one frame
            jump = rng.integers(2, 6) * rng.choice([-1, 1])
            clip[first:last] = np.roll(clip[first:last], jump, axis=rng.integers(2, 4))
            yield clip
    unreadable(clips())


@pytest.mark.parametrize("field", ["background", "size", "colour", "shape"])
def test_a_frame_of_another_scene_makes_a_clip_unreadable(field):
    options = {"background": shapes.BACKGROUNDS, "size": shapes.SIZES, "colour": shapes.COLOURS,
               "shape": shapes.SHAPES}[field]

    def clips():
        for rng, scene in scenes(30, actions=(*MOVES, "bounces", "stays")):
            value = rng.choice([option for option in options if option != getattr(scene, field)])
            clip, frame = motion.render(scene), rng.integers(8)
            clip[frame] = motion.render(scene._replace(**{field: value}))[frame]
            yield clip
    unreadable(clips())


def test_another_shape_in_the_second_half_is_unreadable():
    def clips():
        for rng, scene in scenes(40):
            shape = rng.choice([shape for shape in shapes.SHAPES if shape != scene.shape])
            other = motion.render(scene._replace(shape=shape))
            yield np.concatenate([motion.render(scene)[:4], other[4:]])
    unreadable(clips())


@pytest.mark.parametrize("frame", [1, 3, 5, 7])
def test_a_change_that_is_not_half_way_is_unreadable(frame):
    unreadable(motion.render(scene)[[0] * frame + [7] * (8 - frame)]
               for _, scene in scenes(10, actions=("turns", "becomes")))


def test_a_thing_that_changes_while_it_moves_and_one_that_changes_twice_are_unreadable():
    def clips():
        for _, scene in scenes(20, actions=(*MOVES, "bounces")):
            blue = scene._replace(colour="blue" if scene.colour != "blue" else "red")
            yield np.concatenate([motion.render(scene)[:4], motion.render(blue)[4:]])
    unreadable(clips())
    now = STILL._replace(size="large", colour="blue")
    unreadable([along([(16, 16)] * 8, [STILL] * 4 + [now] * 4)])


def test_paces_directions_and_places_without_a_name_are_unreadable():
    time = np.arange(8)[:, None] - 3.5
    unreadable(along(16 + pace * time * WAYS[way])
               for pace in (0.3, 0.5, 1.5, 1.8, 3.2) for way in ("up", "down-right"))
    unreadable(along(16 + pace * time * (np.cos(np.pi / 8), np.sin(np.pi / 8)))
               for pace in (1.0, 2.5))
    unreadable(along([place] * 8) for place in [(11, 16), (16, 21), (21, 11)])
    straight = np.stack([2.5 * abs(time[:, 0]) + 10, np.full(8, 16)], 1)
    unreadable([along(straight)])                       # it turns round far from any edge


def test_the_same_drawings_on_paths_with_a_name_are_read():
    """So that the test above cannot pass because `along` draws badly."""
    time = np.arange(8)[:, None] - 3.5
    for way, (action, pace) in itertools.product(WAYS, [("moves slowly", 1.0),
                                                        ("moves fast", 2.5)]):
        clip = along(16 + pace * time * WAYS[way])
        assert motion.grade(clip) == STILL._replace(action=action, value=way)
    assert motion.grade(along([(6, 26)] * 8)) == STILL._replace(value="bottom-left")
    to_the_left = np.stack([2.5 * abs(time[:, 0]) + 4, np.full(8, 16)], 1)
    assert motion.grade(along(to_the_left)) == STILL._replace(action="bounces", value="left")


def test_random_places_and_curved_paths_are_unreadable():
    rng, time = np.random.default_rng(0), (np.arange(8)[:, None] - 3.5) / 3.5
    unreadable(along(rng.uniform(6, 26, (8, 2))) for _ in range(30))
    unreadable(along(16 + 9 * np.concatenate([np.cos(turn * time), np.sin(turn * time)], 1))
               for turn in (1, 2, 3))


def test_a_second_thing_is_unreadable():
    def clips():
        for rng, scene in scenes(40, actions=("stays",)):
            place = rng.choice([place for place in shapes.PLACES if place != scene.value])
            other = motion.sample(rng)._replace(background=scene.background, action="stays",
                                                value=place)
            clip, second = motion.render(scene, rng), motion.render(other, rng)
            yield np.where(drawn(other, second)[:, None] > 0.5, second, clip)
    unreadable(clips())


def test_the_tip_of_a_small_triangle_beside_a_thing_in_one_frame_is_unreadable():
    def clips():
        for rng, scene in scenes(100, actions=("stays",)):
            far = [place for place in motion.PLACES
                   if abs(np.subtract(*(divmod(motion.PLACES.index(p), 3)
                                        for p in (place, scene.value)))).max() > 1]
            if far:
                other = scene._replace(size="small", shape="triangle", value=rng.choice(far))
                clip, second = motion.render(scene, rng), motion.render(other, rng)
                rows = np.flatnonzero(drawn(other, second)[0].max(1) > 0.1)
                half, one = rows[:(len(rows) + 1) // 2], rng.integers(8)
                shown = drawn(other, second)[one, half] > 0.1
                clip[one][:, half] = np.where(shown, second[one][:, half], clip[one][:, half])
                yield clip
    unreadable(clips())


def test_the_average_of_two_clips_is_unreadable():
    unreadable((motion.render(scene, rng) + motion.render(motion.sample(rng), rng)) / 2
               for rng, scene in scenes(40))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_clip_with_one_value_that_is_not_finite_is_unreadable(value):
    clip = motion.render(LEFT)
    clip[3, 1, 5, 7] = value
    unreadable([clip])


@pytest.mark.parametrize("shape", [(3, 32, 32), (7, 3, 32, 32), (9, 3, 32, 32), (8, 32, 32, 3),
                                   (8, 1, 32, 32), (8, 3, 32, 31), (1, 8, 3, 32, 32)])
def test_a_clip_of_the_wrong_shape_is_unreadable(shape):
    unreadable([np.resize(motion.render(LEFT), shape)])
