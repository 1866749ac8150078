"""Tones: chords of one to four notes, half a second long, their captions, and a reader of both.

    sample(rng) -> scene      draw a scene at random (never a held-out pair, unless asked)
    render(scene, rng)        scene -> waveform, float32 (1, 4096) in [-1, 1], 8 kHz
    describe(scene, rng)      scene -> caption, in one of several phrasings
    parse(caption)            caption -> scene, the exact inverse; None if it is not a caption
    grade(signal)             waveform -> scene by analysis-by-synthesis; None if it is unreadable

A scene has a timbre (3), a loudness (2) and one to four notes of a scale of eight. One (timbre,
note) pair for each timbre is held out of training, so that a model can be asked for something it
has never heard. Notes are slightly out of tune, start at a random phase and swell for a random
time, so that no two waveforms are alike and a memorised one is not enough.

Nothing here learns. The reader looks at magnitudes and levels, never at phases, since a waveform
that comes back from a spectrogram has lost them.
"""

import functools
import itertools
import re
from typing import NamedTuple

import numpy as np

from worlds.shapes import _pick

RATE = 8000                                 # samples a second
LENGTH = 4096                               # samples of a waveform, 0.512 s
TIMBRES = {"sine": (1,), "square": (1, 3, 5, 7), "sawtooth": (1, 2, 3, 4, 5, 6, 7)}  # harmonics
LOUDNESSES = {"soft": 0.06, "loud": 0.2}    # root mean square of the waveform after its attack
# In Hz: at least two bins of a 256-sample window apart, and no note the octave of another, so that
# the second harmonic of one is never the fundamental of another.
NOTES = {"C5": 523.25, "D5": 587.33, "E5": 659.26, "G5": 783.99, "A5": 880.00, "B5": 987.77,
         "C#6": 1108.73, "D#6": 1244.51}
MAX_NOTES = 4
HELD_OUT = {("sine", "G5"), ("square", "A5"), ("sawtooth", "D5")}
HIGHEST = 3900.0                            # Hz; a harmonic above it is left out: nothing aliases
DETUNING = 8.0                              # a note is off by up to this many cents (1/1200 octave)
ATTACK = (0.004, 0.06)                      # seconds from silence to the full level, the range


class Scene(NamedTuple):
    timbre: str
    loudness: str
    notes: tuple                            # in the order of NOTES, from low to high


def make_scene(timbre, loudness, notes):
    """A scene in its one canonical order, so that equal scenes compare equal."""
    return Scene(timbre, loudness, tuple(sorted(notes, key=tuple(NOTES).index)))


def is_held_out(scene):
    return any((scene.timbre, note) in HELD_OUT for note in scene.notes)


def sample(rng, notes=None, held_out=False):
    """A random scene of one to four notes (`notes` fixes how many).

    held_out=False: no held-out (timbre, note) pair, as in training; True: at least one.
    """
    count = notes or int(rng.integers(1, MAX_NOTES + 1))
    while True:
        scene = make_scene(_pick(rng, tuple(TIMBRES)), _pick(rng, tuple(LOUDNESSES)),
                           [tuple(NOTES)[i] for i in rng.permutation(len(NOTES))[:count]])
        if is_held_out(scene) == held_out:
            return scene


# --- waveforms -----------------------------------------------------------------------------------

def tone(timbre, frequency, phase=0.0):
    """One note, (LENGTH,): its harmonics k below HIGHEST, sum_k sin(k (2 pi f t + phase)) / k."""
    angle = 2 * np.pi * frequency * np.arange(LENGTH) / RATE + phase
    return sum(np.sin(k * angle) / k for k in TIMBRES[timbre] if k * frequency < HIGHEST)


def render(scene, rng=None):
    """Scene -> (1, LENGTH) float32 in [-1, 1].

    `rng` detunes each note, shifts its phase and draws the length of the attack; None does none
    of it and gives the shortest attack. The level is that of the loudness for any number of notes.
    """
    chord, attack = np.zeros(LENGTH), ATTACK[0]
    for note in scene.notes:
        cents, phase = 0.0, 0.0
        if rng is not None:
            cents, phase = rng.uniform(-DETUNING, DETUNING), rng.uniform(0, 2 * np.pi)
        chord += tone(scene.timbre, NOTES[note] * 2 ** (cents / 1200), phase)
    if rng is not None:
        attack = rng.uniform(*ATTACK)
    chord *= LOUDNESSES[scene.loudness] / np.sqrt((chord ** 2).mean())
    swell = np.minimum(np.arange(LENGTH) / (attack * RATE), 1.0)
    return (chord * swell)[None].astype(np.float32)


# --- words ---------------------------------------------------------------------------------------

# (how a scene is said, what joins its notes). `parse` is made from this.
PHRASINGS = (
    ("a {loudness} {timbre} wave plays {notes}.", ", "),
    ("{notes}, played by a {loudness} {timbre} wave.", " and "),
    ("{loudness} notes of a {timbre} wave: {notes}.", ", "),
    ("this {timbre} wave is {loudness} and plays {notes}.", " and "),
)


def describe(scene, rng=None):
    """Scene -> caption; `rng` picks the phrasing and the order in which the notes are named."""
    whole, joiner = PHRASINGS[0] if rng is None else _pick(rng, PHRASINGS)
    notes = list(scene.notes)
    if rng is not None:
        rng.shuffle(notes)
    return whole.format(timbre=scene.timbre, loudness=scene.loudness, notes=joiner.join(notes))


def _group(name, options):
    return f"(?P<{name}>" + "|".join(re.escape(option) for option in options) + ")"


def _pattern(whole, joiner):
    """A phrasing as a regular expression: its fields become named groups, the rest is literal."""
    note = "(?:" + "|".join(re.escape(note) for note in NOTES) + ")"
    more = f"(?:{re.escape(joiner)}{note}){{0,{MAX_NOTES - 1}}}"
    words = {"timbre": _group("timbre", TIMBRES), "loudness": _group("loudness", LOUDNESSES),
             "notes": f"(?P<notes>{note}{more})"}
    return re.sub(r"\\\{(\w+)\\\}", lambda field: words[field[1]], re.escape(whole))


def parse(caption):
    """Caption -> scene: the inverse of `describe` for every phrasing; None for anything else."""
    for whole, joiner in PHRASINGS:
        match = re.fullmatch(_pattern(whole, joiner), caption)
        if match:
            notes = match["notes"].split(joiner)
            if len(set(notes)) == len(notes):
                return make_scene(match["timbre"], match["loudness"], notes)
    return None


# --- the grader ----------------------------------------------------------------------------------

WINDOW = 512            # samples; frames overlap by half. 15.6 Hz a bin: two neighbours stay apart
MIN_MATCH = 0.87        # cosine of the angle between what is heard and the scene, in either half
MIN_MARGIN = 0.04       # any other scene must match less by this, in either half: nothing half-way
MIN_PRESENCE = 0.40     # power of the faintest note, as a share of the notes' mean, in either half
MAX_STRAY = 0.80        # power in any band beyond the scene's, as a share of the notes' mean
MAX_DRIFT = 1.6         # the level may be off by this factor, from the loudness's and along time


@functools.lru_cache(maxsize=1)
def _bands():
    """Semitones from two below the lowest note to HIGHEST: the pitch of all notes and harmonics.

    A detuned note stays in its band, and a note between two notes of the scale falls into a band
    of its own. The first and last band take all that is below and above.
    Returns their centres in Hz (bands,) and which of them each bin of a frame is in (bins, bands).
    """
    lowest = NOTES["C5"]
    last = round(12 * np.log2(HIGHEST / lowest))
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)                               # (bins,)
    semitone = 12 * np.log2(np.maximum(hertz, 1.0) / lowest)
    band = semitone.round().clip(-2, last).astype(int) + 2
    return lowest * 2 ** (np.arange(-2, last + 1) / 12), np.eye(last + 3)[band]


def spectrum(wave):
    """(LENGTH,) -> (frames, bands): the power in each band along time, with no phase in it."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::WINDOW // 2]
    hann = np.hanning(WINDOW + 1)[:-1]
    return abs(np.fft.rfft(frames * hann)) ** 2 @ _bands()[1]


def _direction(power):
    """(..., bands) -> unit vectors of magnitudes. A band counts by its frequency too: harmonics
    fall as 1 / k, and without it the nearest two timbres would be 0.05 apart, with it 0.07."""
    magnitude = np.sqrt(power * _bands()[0])
    return magnitude / np.linalg.norm(magnitude, axis=-1, keepdims=True)


@functools.lru_cache(maxsize=1)
def _dictionary():
    """Every timbre with every set of notes, and how it sounds.

    Returns scenes, a list of (timbre, notes); powers (scenes, bands), where the fundamental of each
    note has power 1; directions (scenes, bands); fundamentals {note: its band}.
    """
    centres, _ = _bands()
    fundamental = {note: int(abs(centres - hertz).argmin()) for note, hertz in NOTES.items()}
    scenes, powers = [], []
    for timbre in TIMBRES:
        alone = {}
        for note, hertz in NOTES.items():
            power = spectrum(tone(timbre, hertz)).mean(0)
            alone[note] = power / power[fundamental[note]]
        for count in range(1, MAX_NOTES + 1):
            for notes in itertools.combinations(NOTES, count):
                scenes.append((timbre, notes))
                powers.append(sum(alone[note] for note in notes))
    return scenes, np.array(powers), _direction(np.array(powers)), fundamental


def _loudness(wave):
    """(LENGTH,) -> the loudness, by the level along time; None if it is unsteady or neither."""
    levels = np.sqrt((wave.reshape(-1, WINDOW) ** 2).mean(1))
    level = np.median(levels[1:])           # the first has the attack: it may be low, but not loud
    if levels[1:].min() * MAX_DRIFT < level or levels.max() > level * MAX_DRIFT:
        return None
    for name, expected in LOUDNESSES.items():
        if expected / MAX_DRIFT < level < expected * MAX_DRIFT:
            return name
    return None


def grade(signal):
    """Waveform (1, LENGTH) in [-1, 1] -> the scene it sounds like, or None where it is unreadable.

    Deterministic analysis by synthesis: the timbre and notes whose magnitude spectrum is nearest in
    angle, if both halves of the clip agree on them, they are near, no others are nearly as near, no
    note is faint and nothing else is heard.
    """
    signal = np.asarray(signal, np.float64)
    if signal.shape != (1, LENGTH) or not np.isfinite(signal).all():
        return None
    loudness = _loudness(signal[0])
    if loudness is None:
        return None
    scenes, powers, directions, fundamental = _dictionary()
    frames = spectrum(signal[0])                                            # (15, bands)
    middle = len(frames) // 2                                               # it is in both halves
    halves = np.stack([frames[:middle].mean(0), frames[middle + 1:].mean(0)])
    match = _direction(halves) @ directions.T                               # (2, scenes)
    best = int(match.mean(0).argmax())
    others = np.delete(match, best, axis=1).max(1)                          # (2,)
    if (match[:, best] < MIN_MATCH).any() or (match[:, best] - others < MIN_MARGIN).any():
        return None
    timbre, notes = scenes[best]
    note_power = halves[:, [fundamental[note] for note in notes]]           # (2, notes)
    if (note_power.min(1) < MIN_PRESENCE * note_power.mean(1)).any():
        return None
    stray = halves.mean(0) - powers[best] * note_power.mean()               # (bands,)
    if stray.max() > MAX_STRAY * note_power.mean():
        return None
    return make_scene(timbre, loudness, notes)
