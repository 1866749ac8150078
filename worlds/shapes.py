"""Shapes: pictures of one or two coloured shapes, their captions, and an exact reader of both.

    sample(rng) -> scene      draw a scene at random (never a held-out pair, unless asked)
    render(scene, rng)        scene -> picture, float32 (3, size, size) in [-1, 1]
    describe(scene, rng)      scene -> caption, in one of several phrasings
    parse(caption)            caption -> scene, the exact inverse; None if it is not a caption
    grade(picture)            picture -> scene by analysis-by-synthesis; None if it is unreadable
    change(scene, rng)        scene -> (sentence, scene after it): the plot of a two-picture story

A scene is a background and one or two things; a thing has a shape (4), a colour (6), a size (2) and
a place (3 x 3). Four (shape, colour) pairs are held out of training, so that a model can be asked
for something it has never seen. Pictures have sub-pixel jitter and anti-aliased edges, so that no
two are alike and a memorised picture is not enough.

Nothing here learns: a score given by `grade` is exact, and a blurred picture does not get one.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (225, 30, 35), "green": (25, 160, 50), "blue": (35, 70, 235),
           "yellow": (250, 215, 20), "purple": (170, 40, 200), "cyan": (30, 205, 225)}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (185, 185, 185), "black": (0, 0, 0)}
SIZES = {"small": 3.5, "large": 4.8}        # radius, in pixels of a 32 x 32 picture; few touch
PLACES = ("top-left", "top", "top-right", "left", "centre", "right",
          "bottom-left", "bottom", "bottom-right")
HELD_OUT = {("circle", "yellow"), ("square", "purple"), ("triangle", "green"), ("cross", "blue")}
JITTER = 0.5                                # a thing's centre moves by up to this many pixels


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    place: str


class Scene(NamedTuple):
    background: str
    things: tuple                           # in the order of PLACES, the order they are painted in


def make_scene(background, things):
    """A scene in its one canonical order, so that equal scenes compare equal."""
    return Scene(background, tuple(sorted(things, key=lambda thing: PLACES.index(thing.place))))


def is_held_out(scene):
    return any((thing.shape, thing.colour) in HELD_OUT for thing in scene.things)


def sample(rng, things=None, held_out=False):
    """A random scene of one or two things (`things` fixes how many).

    held_out=False: no held-out (shape, colour) pair, as in training; True: at least one.
    """
    count = things or int(rng.integers(1, 3))
    places = rng.permutation(len(PLACES))[:count]
    while True:
        scene = make_scene(_pick(rng, tuple(BACKGROUNDS)), [
            Thing(_pick(rng, tuple(SIZES)), _pick(rng, tuple(COLOURS)), _pick(rng, SHAPES),
                  PLACES[place]) for place in places])
        if is_held_out(scene) == held_out:
            return scene


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


# --- pictures ------------------------------------------------------------------------------------

def coverage(shape, radius, x, y):
    """Share of each pixel that the shape covers, 0..1; x, y are pixel offsets from its centre.

    0.5 - (signed distance to the edge), clipped, is a pixel's covered share on a straight edge.
    """
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.86 * radius
    elif shape == "triangle":               # equilateral, pointing up, inradius 0.6
        y = y - 0.3 * radius                # centred by its height, not by its centre of mass
        slanted = abs(x) * np.sqrt(0.75) - y * 0.5
        distance = np.maximum(slanted, y) - 0.6 * radius
    else:                                   # cross: the union of two bars
        arm = 0.36 * radius
        distance = np.minimum(np.maximum(abs(x) - radius, abs(y) - arm),
                              np.maximum(abs(x) - arm, abs(y) - radius))
    return np.clip(0.5 - distance, 0.0, 1.0)


def _mask(thing, dx, dy, size):
    """(size, size) coverage of a thing whose centre is moved by (dx, dy) pixels."""
    unit = size / 32
    row, column = divmod(PLACES.index(thing.place), 3)
    pixels = np.arange(size) + 0.5
    x = pixels[None, :] - (6 + 10 * column) * unit - dx * unit
    y = pixels[:, None] - (6 + 10 * row) * unit - dy * unit
    return coverage(thing.shape, SIZES[thing.size] * unit, x, y).astype(np.float32)


def _rgb(table, name):
    """A colour as a (3, 1, 1) array in [-1, 1]."""
    return (np.float32(table[name]) / 127.5 - 1).reshape(3, 1, 1)


def render(scene, rng=None, size=32):
    """Scene -> (3, size, size) float32 in [-1, 1]; `rng` jitters each thing, None centres it."""
    picture = np.broadcast_to(_rgb(BACKGROUNDS, scene.background), (3, size, size))
    for thing in scene.things:
        dx, dy = rng.uniform(-JITTER, JITTER, 2) if rng is not None else (0.0, 0.0)
        mask = _mask(thing, dx, dy, size)
        picture = picture * (1 - mask) + _rgb(COLOURS, thing.colour) * mask
    return picture.astype(np.float32)


# --- words ---------------------------------------------------------------------------------------

# (how a scene is said, how a thing is said, what joins two things). `parse` is made from this.
# The place comes first: a model that writes it has said which thing it is about to describe.
PHRASINGS = (
    ("{things} on {background}.", "at the {place} a {size} {colour} {shape}", " and "),
    ("{things} on {background}.", "{place} {size} {colour} {shape}", ", "),
    ("on {background}: {things}.", "{place} {size} {colour} {shape}", ", "),
    ("{background}, with {things}.", "{place} a {size} {colour} {shape}", " and "),
)


def describe(scene, rng=None):
    """Scene -> caption; `rng` picks the phrasing and which thing is named first."""
    phrasing = PHRASINGS[0] if rng is None else _pick(rng, PHRASINGS)
    things = list(scene.things)
    if rng is not None:
        rng.shuffle(things)
        things = [Thing(*thing) for thing in things]
    whole, each, joiner = phrasing
    said = joiner.join(each.format(**thing._asdict()) for thing in things)
    return whole.format(things=said, background=scene.background)


def _group(names):
    return "(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")"


_WORDS = {"size": _group(SIZES), "colour": _group(COLOURS), "shape": _group(SHAPES),
          "place": _group(PLACES), "background": _group(BACKGROUNDS)}


def _pattern(template, **parts):
    """A template as a regular expression: its fields become groups, the rest is literal."""
    words = {**_WORDS, **parts}
    return re.sub(r"\\\{(\w+)\\\}", lambda field: words[field[1]], re.escape(template))


def parse(caption):
    """Caption -> scene: the inverse of `describe` for every phrasing; None for anything else."""
    for whole, each, joiner in PHRASINGS:
        fields = re.findall(r"\{(\w+)\}", each)
        thing = _pattern(each)
        ungrouped = thing.replace("(", "(?:")
        things = f"(?P<things>{ungrouped}(?:{re.escape(joiner)}{ungrouped})?)"
        background = _WORDS["background"].replace("(", "(?P<background>")
        match = re.fullmatch(_pattern(whole, things=things, background=background), caption)
        if match:
            found = [Thing(**dict(zip(fields, values)))
                     for values in re.findall(thing, match["things"])]
            if len({thing.place for thing in found}) == len(found):
                return make_scene(match["background"], found)
    return None


CHANGES = {"colour": "the {place} {shape} turns {value}.",
           "size": "the {place} {shape} becomes {value}.",
           "shape": "the {place} {shape} becomes a {value}.",
           "place": "the {place} {shape} moves to {value}."}


def change(scene, rng):
    """Scene -> (sentence, the scene after it): one thing gets a new colour, size, shape or place.

    The scene after it has no held-out pair, unless the scene had.
    """
    options = {"colour": tuple(COLOURS), "size": tuple(SIZES), "shape": SHAPES, "place": PLACES}
    while True:
        thing = scene.things[int(rng.integers(len(scene.things)))]
        field = _pick(rng, tuple(CHANGES))
        value = _pick(rng, options[field])
        sentence = CHANGES[field].format(shape=thing.shape, place=thing.place, value=value)
        after = apply_change(scene, sentence)
        if after is not None and after != scene and (is_held_out(scene) or not is_held_out(after)):
            return sentence, after


def apply_change(scene, sentence):
    """The scene after a sentence made by `change`; None if the sentence does not fit the scene."""
    for field, template in CHANGES.items():
        match = re.fullmatch(_pattern(template, value=_WORDS[field]), sentence)
        if match is None:
            continue
        place, shape, value = match.groups()
        for thing in scene.things:
            if (thing.shape, thing.place) == (shape, place):
                others = [other for other in scene.things if other is not thing]
                if field == "place" and value in {other.place for other in others}:
                    return None             # that place is taken
                return make_scene(scene.background, others + [thing._replace(**{field: value})])
    return None


# --- the grader ----------------------------------------------------------------------------------

MAX_RESIDUAL = 0.08     # unexplained near a thing, as a share of its energy: more is unreadable
MAX_STRAY = 0.08        # unexplained elsewhere, as a share of the energy of the faintest thing
MIN_PRESENCE = 0.50     # a thing must explain this share of the energy that it would have if clean


@functools.lru_cache(maxsize=4)
def _templates(size):
    """Every thing that can stand at each place, with jitter on a 5 x 5 grid, and its coverage.

    Returns kinds, a list of (size name, shape); by place, the pixels that some thing there can
    cover, masks (kinds x 25, those pixels), and their squares; the least squared coverage of any.
    """
    kinds = [(name, shape) for name in SIZES for shape in SHAPES]
    grid = np.linspace(-JITTER, JITTER, 5)
    masks = np.float32([[_mask(Thing(name, "red", shape, place), dx, dy, size).ravel()
                         for name, shape in kinds for dx in grid for dy in grid]
                        for place in PLACES])
    near = [np.flatnonzero(each.max(0)) for each in masks]
    masks = [each[:, pixels] for each, pixels in zip(masks, near)]
    squares = [each ** 2 for each in masks]
    return kinds, near, masks, squares, min(float(each.sum(1).min()) for each in squares)


def _best_thing(picture, below, above, place, size):
    """The thing at `place` that best explains the picture (3, P), given what is below and above it.

    With mask a, colour c and visibility w of a pixel, the model is below + w a (c - below) + above
    parts; its squared error is a quadratic in a, so two matrix products try every mask in every
    colour at once. Returns (thing, its mask, how much it lowers the squared error, its energy).
    """
    kinds, *by_place, _ = _templates(size)
    near, a, a_squared = (each[PLACES.index(place)] for each in by_place)           # (masks, n)
    picture, below, hidden, painted = (x[:, near] for x in (picture, below, *above))
    error = picture - (below * (1 - hidden) + painted)                              # (3, n)
    paints = np.stack([_rgb(COLOURS, colour) for colour in COLOURS])[..., 0]        # (6, 3, 1)
    v = (paints - below) * (1 - hidden)                                             # (6, 3, n)
    energy = (v * v).sum(1) @ a_squared.T                                           # (6, masks)
    gain = 2 * (error * v).sum(1) @ a.T - energy
    colour, i = divmod(int(gain.argmax()), len(a))
    name, shape = kinds[i // 25]
    mask = np.zeros(size * size, np.float32)
    mask[near] = a[i]
    return (Thing(name, list(COLOURS)[colour], shape, place), mask, float(gain[colour, i]),
            float(energy[colour, i]))


def _explain(picture, background, size):
    """The best one or two things on this background: (fits, squared error of each pixel)."""
    flat = np.repeat(_rgb(BACKGROUNDS, background).reshape(3, 1), size * size, axis=1)
    nothing = np.zeros((1, size * size), np.float32), np.zeros_like(flat)
    alone = [_best_thing(picture, flat, nothing, place, size) for place in PLACES]
    present = [fit for fit in alone if fit[2] > MIN_PRESENCE * fit[3]]
    fits = sorted(sorted(present, key=lambda fit: -fit[2])[:2],
                  key=lambda fit: PLACES.index(fit[0].place))
    if len(fits) == 2:                      # neighbours may overlap: fit each again given the other
        for _ in range(2):
            lower, upper = fits
            hidden = upper[1][None]
            fits[0] = _best_thing(picture, flat, (hidden, hidden * _paint(upper)),
                                  lower[0].place, size)
            under = flat * (1 - fits[0][1]) + _paint(fits[0]) * fits[0][1]
            fits[1] = _best_thing(picture, under, nothing, upper[0].place, size)
    canvas = flat
    for fit in fits:
        canvas = canvas * (1 - fit[1]) + _paint(fit) * fit[1]
    return fits, ((picture - canvas) ** 2).sum(0)


def _paint(fit):
    return _rgb(COLOURS, fit[0].colour).reshape(3, 1)


def read(picture):
    """Picture (3, S, S) in [-1, 1] -> (the scene whose rendering is nearest in squared error, or
    None where nothing is there; whether it is clean: what the scene leaves unexplained, near each
    thing and elsewhere, is small against a thing's energy).
    """
    picture = np.asarray(picture, np.float32)
    size = picture.shape[-1] if picture.ndim else 0
    if picture.shape != (3, size, size) or not np.isfinite(picture).all():
        return None, False
    flat = picture.reshape(3, -1)
    explained = {name: _explain(flat, name, size) for name in _likely_backgrounds(flat)}
    name, (fits, error) = min(explained.items(), key=lambda item: item[1][1].sum())
    if not fits:
        return None, False
    clean, (_, near, _, _, least_area) = True, _templates(size)
    stray = error.copy()
    for thing, _, _, energy in fits:
        place = near[PLACES.index(thing.place)]
        stray[place] = 0
        clean &= bool(error[place].sum() <= MAX_RESIDUAL * energy)
    contrast = min(((_rgb(COLOURS, colour) - _rgb(BACKGROUNDS, name)) ** 2).sum()
                   for colour in COLOURS)
    edge = np.setdiff1d(np.arange(size * size), np.concatenate(near))   # which no thing reaches
    for place in (*near, edge):             # a third thing, or half of one, must not go unnoticed
        clean &= bool(stray[place].sum() <= MAX_STRAY * contrast * least_area)
    return make_scene(name, [fit[0] for fit in fits]), clean


def grade(picture):
    """Picture (3, S, S) in [-1, 1] -> the scene it shows, or None where it is unreadable: blurred,
    noisy, half drawn, blank. Deterministic analysis by synthesis."""
    scene, clean = read(picture)
    return scene if clean else None


def _likely_backgrounds(flat):
    """The backgrounds by their distance to the picture's median colour: the nearest is tried alone
    where it is near, since the things of a readable picture cover less than half of it."""
    median = np.median(flat, axis=1)
    distance = {name: abs(_rgb(BACKGROUNDS, name).ravel() - median).max() for name in BACKGROUNDS}
    nearest = min(distance, key=distance.get)
    return [nearest] if distance[nearest] < 0.25 else list(BACKGROUNDS)
