"""Motion: clips of one coloured shape that does one thing, their captions, and a reader of both.

    sample(rng) -> scene      draw a scene at random (never a held-out pair, unless asked)
    render(scene, rng)        scene -> clip, float32 (8, 3, 32, 32) in [-1, 1]: frames, channels,
                              height, width
    describe(scene, rng)      scene -> caption, in one of several phrasings
    parse(caption)            caption -> scene, the exact inverse; None if it is not a caption
    grade(clip)               clip -> scene by analysis-by-synthesis; None if it is unreadable

A scene is a background, a thing (size, colour and shape, as in shapes.py), an action and its value:
the thing moves in one of eight directions, slowly or fast; goes to one of four edges and back;
turns another colour or becomes the other size half way; or stays at one of nine places. Place and
pace have sub-pixel jitter. The thing is wholly inside the picture in every frame, but for less than
a pixel of a large one that stays at an edge. The (shape, colour) pairs held out of training are
those of shapes.py; a thing that turns a colour must avoid them before and after.

What happens is in no single frame: a clip with its frames shuffled is unreadable, and a clip that
runs backwards moves the other way. Nothing here learns: a clip in which one frame is blurred, half
drawn or out of place is not read.
"""

import functools
import re
from typing import NamedTuple

import numpy as np

from worlds.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    JITTER,
    PLACES,
    SHAPES,
    SIZES,
    _group,
    _pattern,
    _pick,
    _rgb,
    coverage,
)

FRAMES = 8
HALF = FRAMES // 2                          # the first frame of the second half
PIXELS = 32                                 # height and width of a frame
DIRECTIONS = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0), "up-left": (-1, -1),
              "up-right": (1, -1), "down-left": (-1, 1), "down-right": (1, 1)}      # (x, y)
EDGES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
SPEEDS = {"moves slowly": 1.0, "moves fast": 2.5, "bounces": 2.5}       # pixels a frame
PACE_JITTER = 0.05                          # a clip's speed is off by up to this share of it
ACTIONS = {                                 # and the values that each can have
    "moves slowly": tuple(DIRECTIONS), "moves fast": tuple(DIRECTIONS), "bounces": tuple(EDGES),
    "turns": tuple(COLOURS), "becomes": tuple(SIZES), "stays": PLACES}


class Scene(NamedTuple):
    background: str
    size: str
    colour: str
    shape: str
    action: str
    value: str                              # direction, edge, colour, size or place: see ACTIONS


def _later(scene):
    """(size, colour) of the thing in the second half of the clip."""
    return (scene.value if scene.action == "becomes" else scene.size,
            scene.value if scene.action == "turns" else scene.colour)


def is_held_out(scene):
    return any((scene.shape, colour) in HELD_OUT for colour in (scene.colour, _later(scene)[1]))


def sample(rng, held_out=False):
    """A random scene.

    held_out=False: no held-out (shape, colour) pair in any frame, as in training; True: in some.
    """
    while True:
        size, colour = _pick(rng, tuple(SIZES)), _pick(rng, tuple(COLOURS))
        action = _pick(rng, tuple(ACTIONS))
        value = _pick(rng, [value for value in ACTIONS[action] if value not in (size, colour)])
        scene = Scene(_pick(rng, tuple(BACKGROUNDS)), size, colour, _pick(rng, SHAPES), action,
                      value)
        if is_held_out(scene) == held_out:
            return scene


# --- clips ---------------------------------------------------------------------------------------

def _unit(vector):
    """A vector (x, y) at length 1."""
    return np.array(vector) / np.hypot(*vector)


def _path(scene, rng=None):
    """(8, 2) the thing's centre (x, y) in each frame, in pixels; `rng` jitters place and pace."""
    *jitter, faster = rng.uniform(-1, 1, 3) if rng is not None else (0.0, 0.0, 0.0)
    middle = PIXELS / 2 + JITTER * np.array(jitter)                             # (2,)
    if scene.action == "stays":
        row, column = divmod(PLACES.index(scene.value), 3)
        middle += 10 * np.array([column - 1, row - 1])
    if scene.action not in SPEEDS:
        return np.tile(middle, (FRAMES, 1))
    time = np.arange(FRAMES) - (FRAMES - 1) / 2                                 # 0 is half way
    way = SPEEDS[scene.action] * (1 + PACE_JITTER * faster) * time              # (8,)
    if scene.action != "bounces":
        return middle + np.outer(way, _unit(DIRECTIONS[scene.value]))
    # Straight on through the edge, then the part that is beyond it folded back.
    edge = np.array(EDGES[scene.value])
    wall = PIXELS / 2 - SIZES[scene.size]       # how far from the picture's middle a centre can go
    straight = middle + np.outer(wall + way, edge)
    beyond = np.maximum((straight - PIXELS / 2) @ edge - wall, 0)               # (8,)
    return straight - 2 * np.outer(beyond, edge)


def _mask(shape, radius, centres):
    """(frames, 32, 32) coverage of a thing at each of the centres (frames, 2)."""
    pixels = np.arange(PIXELS, dtype=np.float32) + 0.5
    centres = np.float32(centres)[:, :, None, None]
    return coverage(shape, radius, pixels[None, :] - centres[:, 0], pixels[:, None] - centres[:, 1])


def render(scene, rng=None):
    """Scene -> (8, 3, 32, 32) float32 in [-1, 1]; `rng` jitters place and pace, None does not."""
    looks = [(scene.size, scene.colour)] * HALF + [_later(scene)] * (FRAMES - HALF)
    radius = np.float32([SIZES[size] for size, _ in looks])[:, None, None]
    mask = _mask(scene.shape, radius, _path(scene, rng))[:, None]               # (8, 1, 32, 32)
    colours = np.stack([_rgb(COLOURS, colour) for _, colour in looks])          # (8, 3, 1, 1)
    return (_rgb(BACKGROUNDS, scene.background) * (1 - mask) + colours * mask).astype(np.float32)


# --- words ---------------------------------------------------------------------------------------

# How a scene is said, and how what it does is said. `parse` is made from these. "ends blue" and
# "ends small" begin alike: what a clip ends with must be seen before it is named (docs/all.md).
PHRASINGS = (
    "a {size} {colour} {shape} on {background} {does}.",
    "on {background}, a {size} {colour} {shape} {does}.",
    "{background}: {size} {colour} {shape} {does}.",
    "a {size} {colour} {shape} {does}, on {background}.",
)
DOES = {
    "moves slowly": ("moves {value} slowly", "slowly moves {value}"),
    "moves fast": ("moves {value} fast", "goes {value} fast"),
    "bounces": ("bounces off the {value} edge", "goes to the {value} edge and back"),
    "turns": ("turns {value}", "ends {value}"),
    "becomes": ("becomes {value}", "ends {value}"),
    "stays": ("stays at the {value}", "stands still at the {value}"),
}


def describe(scene, rng=None):
    """Scene -> caption; `rng` picks the phrasing."""
    whole, does = PHRASINGS[0], DOES[scene.action][0]
    if rng is not None:
        whole, does = _pick(rng, PHRASINGS), _pick(rng, DOES[scene.action])
    return whole.format(does=does.format(value=scene.value), **scene._asdict())


@functools.cache
def _patterns():
    """Each way to say a caption: (action, names of the fields in order, compiled pattern)."""
    return [(action, re.findall(r"\{(\w+)\}", template),
             re.compile(_pattern(template, value=_group(ACTIONS[action]))))
            for action in ACTIONS for does in DOES[action]
            for template in (whole.replace("{does}", does) for whole in PHRASINGS)]


def parse(caption):
    """Caption -> scene: the inverse of `describe` for every phrasing; None for anything else."""
    for action, fields, pattern in _patterns():
        match = pattern.fullmatch(caption)
        if match:
            scene = Scene(action=action, **dict(zip(fields, match.groups())))
            return None if scene.value in (scene.size, scene.colour) else scene
    return None


# --- the grader: what each frame shows -----------------------------------------------------------

MAX_RESIDUAL = 0.12     # unexplained near the thing, a pixel of its outline: more is unreadable
MAX_STRAY = 0.12        # unexplained elsewhere, as a share of the energy of the faintest thing
MIN_PRESENCE = 0.75     # share of a thing that must be inside the picture: an empty one has none
NEAR = 2.0              # pixels beyond a thing's radius that count as near it
FAINT = 0.25            # a pixel that is covered less than this does not help to find the thing
STEPS = 2               # of Gauss-Newton: then a centre is off by 0.01 pixels, by 0.05 at an edge


class Kind(NamedTuple):
    size: str
    shape: str
    offset: np.ndarray      # (2,) from its centre to its centre of mass, in pixels
    area: float             # its squared coverage, summed: its energy at a contrast of 1
    outline: float          # its length in pixels: what a blur leaves unexplained grows with it


def _balance(masks):
    """(..., 2) centre of mass (x, y) of masks (..., 32, 32), without their faint pixels."""
    weight = np.where(masks > FAINT, masks, 0)
    pixels = np.arange(PIXELS) + 0.5
    total = weight.sum((-2, -1))[..., None] + 1e-6          # an empty mask has its centre at (0, 0)
    return np.stack([weight.sum(-2) @ pixels, weight.sum(-1) @ pixels], -1) / total


@functools.cache
def _kinds():
    """Every kind of thing there is, measured on a drawing of it in the middle of a frame."""
    kinds, middle = [], np.array([[PIXELS / 2, PIXELS / 2]])
    for size, radius in SIZES.items():
        for shape in SHAPES:
            mask = _mask(shape, radius, middle)[0]
            kinds.append(Kind(size, shape, _balance(mask) - middle[0], float((mask ** 2).sum()),
                              float(np.hypot(*np.gradient(mask)).sum())))
    return kinds


def _uncover(clip):
    """The clip without its background, and how much of each pixel the colour of a frame covers.

    Returns (background, the clip minus it, colours: 8 names, their paint minus the background
    (8, 3, 1, 1), covered (8, 32, 32) in 0..1).
    """
    median = np.median(clip, axis=(0, 2, 3))                # a thing covers less than half of it
    background = min(BACKGROUNDS,
                     key=lambda name: abs(_rgb(BACKGROUNDS, name).ravel() - median).max())
    ground = _rgb(BACKGROUNDS, background)
    shown = clip - ground                                                       # (8, 3, 32, 32)
    paints = np.stack([_rgb(COLOURS, name) - ground for name in COLOURS])       # (6, 3, 1, 1)
    # With paint v and coverage a, a pixel's squared error |shown - a v|^2 is a quadratic in a.
    match = paints.reshape(-1, 3) @ shown.reshape(FRAMES, 3, -1)                # (8, 6, P)
    contrast = (paints ** 2).sum((1, 2))                                        # (6, 1)
    covered = np.clip(match / contrast, 0, 1)
    best = (covered * (2 * match - covered * contrast)).sum(-1).argmax(1)       # (8,)
    covered = covered[np.arange(FRAMES), best].reshape(FRAMES, PIXELS, PIXELS)
    return background, shown, [tuple(COLOURS)[i] for i in best], paints[best], covered


def _locate(covered, kind):
    """Where a thing of this kind explains covered (8, 32, 32) best: Gauss-Newton on the error.

    Returns (its centre in each frame (8, 2), its mask there (8, 32, 32), squared error (8,)).
    """
    centres, radius, step = _balance(covered) - kind.offset, SIZES[kind.size], 0.1
    for _ in range(STEPS):
        drawn = _mask(kind.shape, radius, centres)
        slopes = np.stack([_mask(kind.shape, radius, centres + move) - drawn
                           for move in ((step, 0), (0, step))], axis=1) / step
        slopes = slopes.reshape(FRAMES, 2, -1)                                  # (8, 2, P)
        error = slopes @ (covered - drawn).reshape(FRAMES, -1, 1)               # (8, 2, 1)
        curvature = slopes @ slopes.swapaxes(1, 2) + 1e-3 * np.eye(2)           # (8, 2, 2)
        centres = centres + np.clip(np.linalg.solve(curvature, error)[..., 0], -1, 1)
    drawn = _mask(kind.shape, radius, centres)
    return centres, drawn, ((covered - drawn) ** 2).sum((1, 2))


def _look(clip):
    """What each frame shows: (background, [(size, colour, shape)] * 8, centres (8, 2)).

    None if in some frame a single thing on that background leaves too much unexplained.
    """
    background, shown, colours, paints, covered = _uncover(clip)
    fits = [_locate(covered, kind) for kind in _kinds()]
    best = np.argmin([error for _, _, error in fits], axis=0)                   # (8,)
    kinds = [_kinds()[i] for i in best]
    centres = np.stack([fits[i][0][t] for t, i in enumerate(best)])             # (8, 2)
    drawn = np.stack([fits[i][1][t] for t, i in enumerate(best)])               # (8, 32, 32)

    present = (drawn ** 2).sum((1, 2)) / [kind.area for kind in kinds]          # (8,)
    error = ((shown - drawn[:, None] * paints) ** 2).sum(1)                     # (8, 32, 32)
    reach = np.array([SIZES[kind.size] + NEAR for kind in kinds])[:, None, None]
    near = _mask("circle", reach, centres) > 0
    outline = np.array([kind.outline for kind in kinds]) * (paints ** 2).sum((1, 2, 3))
    faintest = min(kind.area for kind in _kinds()) * min(
        ((_rgb(COLOURS, name) - _rgb(BACKGROUNDS, background)) ** 2).sum() for name in COLOURS)
    if (present < MIN_PRESENCE).any():
        return None
    if ((error * near).sum((1, 2)) > MAX_RESIDUAL * outline).any():
        return None
    if ((error * ~near).sum((1, 2)) > MAX_STRAY * faintest).any():
        return None
    looks = [(kind.size, colour, kind.shape) for kind, colour in zip(kinds, colours)]
    return background, looks, centres


# --- the grader: what the clip does --------------------------------------------------------------

# Pixels a frame. Nothing is read between them: a pace that is neither has no name.
PACES = {"stays": (0.0, 0.2), "moves slowly": (0.7, 1.3), "moves fast": (2.0, 3.0)}
MAX_BEND = 0.6          # pixels from a centre to the straight line through all of them
MIN_COSINE = 0.97       # of the angle to the named direction, 14 degrees; the next is 45 away
MAX_MISPLACED = 2.0     # pixels from a place, across or down


def _straight(centres, directions):
    """Centres (8, 2) -> (action, direction): a straight and even path; None if it is not one."""
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    velocity = time @ centres / (time @ time)                                   # (2,)
    bend = centres - centres.mean(0) - time[:, None] * velocity
    pace = np.hypot(*velocity)
    action = next((name for name, (low, high) in PACES.items() if low <= pace <= high), None)
    if action is None or np.hypot(*bend.T).max() > MAX_BEND:
        return None
    if action == "stays":
        return action, None
    direction = max(directions, key=lambda name: velocity @ _unit(directions[name]))
    aligned = velocity @ _unit(directions[direction]) >= MIN_COSINE * pace
    return (action, direction) if aligned else None


def _bounce(centres, size):
    """The edge that a path (8, 2) comes back from half way; None if it does not bounce.

    Folded out at the edge, as `_path` folds it in, it is a straight path to that edge.
    """
    for name, edge in EDGES.items():
        beyond = PIXELS / 2 - SIZES[size] - (centres - PIXELS / 2) @ edge
        beyond[:HALF] = 0
        if _straight(centres + 2 * beyond[:, None] * edge, EDGES) == ("moves fast", name):
            return name
    return None


def _still(before, after, centre):
    """(action, value) of a thing that keeps its centre (2,); value None if that has no name."""
    if before[1:] == after[1:] and before != after:
        return "becomes", after[0]
    if before[::2] == after[::2] and before != after:
        return "turns", after[1]
    cell = (centre - 6) / 10                # places are ten pixels apart, the first at (6, 6)
    column, row = np.clip(np.rint(cell), 0, 2).astype(int)
    placed = before == after and abs(cell - (column, row)).max() * 10 <= MAX_MISPLACED
    return "stays", PLACES[3 * row + column] if placed else None


def grade(clip):
    """Clip (8, 3, 32, 32) in [-1, 1] -> the scene it shows, or None where it is unreadable.

    Deterministic: the thing that best explains each frame, then the one action that explains all
    the frames. A frame that no single thing explains, or frames that no action explains, are None.
    """
    clip = np.asarray(clip, np.float32)
    if clip.shape != (FRAMES, 3, PIXELS, PIXELS) or not np.isfinite(clip).all():
        return None
    seen = _look(clip)
    if seen is None:
        return None
    background, looks, centres = seen
    before, after = looks[0], looks[-1]
    if looks != [before] * HALF + [after] * (FRAMES - HALF):
        return None
    action, value = _straight(centres, DIRECTIONS) or ("bounces", _bounce(centres, before[0]))
    if action == "stays":
        action, value = _still(before, after, centres.mean(0))
    elif before != after:                   # no action both moves a thing and changes it
        return None
    return None if value is None else Scene(background, *before, action, value)
