"""What is trained on: the toy worlds as documents, alone or together; a folder of your own files.

    shapes      captions and pictures: pairs, stories of two pictures, words alone
    tones       captions and sounds
    motion      captions and clips
    stories     words alone, whose entropy is known
    all         the four together, and documents that cross modalities: words, picture, words and
                the sound of that picture; a clip and its sound, with words and without

A pair is stored with its words first; `data.Batches` turns some around, and leaves some words out.
"""

import json
import os
from pathlib import Path

import numpy as np

from data import Corpus, InputError, is_unicode, to_bytes, to_samples
from media import is_animated, read_picture, read_sound, read_video
from worlds import motion, shapes, stories, tones

WORLDS = {"image": shapes, "audio": tones, "video": motion}     # modality -> the world it shows
EXAMPLES = {"shapes": 40_000, "tones": 20_000, "motion": 10_000, "stories": 40_000, "all": 60_000}


class Table:
    """Documents and the signals that they name by number, while both grow."""

    def __init__(self, rng, size=32):
        self.rng, self.size, self.documents, self.signals = rng, size, [], {}

    def add(self, name, stored):
        """Store a signal -> the segment that names it."""
        self.signals.setdefault(name, []).append(stored)
        return name, len(self.signals[name]) - 1

    def draw(self, name, scene):
        """Render and store a scene of a modality's world -> its segment."""
        if name == "image":
            return self.add(name, to_bytes(shapes.render(scene, self.rng, self.size)))
        store = to_samples if name == "audio" else to_bytes
        return self.add(name, store(WORLDS[name].render(scene, self.rng)))

    def corpus(self):
        return Corpus(self.documents, {name: np.stack(stored)
                                       for name, stored in self.signals.items()})


# --- the toy worlds ------------------------------------------------------------------------------

def shapes_documents(table, pictures):
    """Pairs, two-picture stories, and stories without pictures."""
    rng, last = table.rng, len(table.signals.get("image", ())) + pictures
    while len(table.signals.get("image", ())) < last:
        scene, kind = shapes.sample(rng), rng.random()
        caption = shapes.describe(scene, rng)
        sentence, after = shapes.change(scene, rng)
        if kind < 0.78:
            table.documents.append([("text", caption), table.draw("image", scene)])
        elif kind < 0.95:
            table.documents.append([("text", caption), table.draw("image", scene),
                                    ("text", sentence), table.draw("image", after)])
        else:                   # opens with another word: what a text without a picture begins with
            end = shapes.describe(after, rng)
            table.documents.append([("text", f"imagine {caption} {sentence} now {end}")])


def pair_documents(table, name, count):
    """Captions and signals of a world."""
    for _ in range(count):
        scene = WORLDS[name].sample(table.rng)
        table.documents.append([("text", WORLDS[name].describe(scene, table.rng)),
                                table.draw(name, scene)])


def stories_documents(table, count):
    """Words alone."""
    for _ in range(count):
        table.documents.append([("text", stories.describe(stories.sample(table.rng), table.rng))])


def crossing_documents(table, count):
    """A third each: words, picture, words, its sound; words, clip, its sound; clip, its sound."""
    for number in range(count):
        if number % 3 == 0:
            scene = shapes.sample(table.rng)
            sound = sound_of_picture(scene)
            table.documents.append([("text", shapes.describe(scene, table.rng)),
                                    table.draw("image", scene),
                                    ("text", tones.describe(sound, table.rng)),
                                    table.draw("audio", sound)])
        else:
            scene = motion.sample(table.rng)
            words = [("text", motion.describe(scene, table.rng))] if number % 3 == 1 else []
            table.documents.append([*words, table.draw("video", scene),
                                    table.draw("audio", sound_of_clip(scene))])


# How a thing sounds: no held-out pair of tones.py occurs
TIMBRES = {"circle": "sine", "square": "square", "triangle": "sawtooth", "cross": "square"}
LOUDNESSES = {"small": "soft", "large": "loud"}
ROWS = "D#6", "B5", "E5"                                    # what is higher up sounds higher
ACTIONS = {"stays": ["C5"], "moves slowly": ["E5"], "moves fast": ["B5"], "bounces": ["C5", "B5"],
           "turns": ["C#6"], "becomes": ["D#6"]}


def sound_of_picture(scene):
    """A scene of shapes.py -> that of its sound: a note for each row where a thing is, in the
    timbre of the first thing's shape, as loud as that is large."""
    first = scene.things[0]
    notes = {ROWS[shapes.PLACES.index(thing.place) // 3] for thing in scene.things}
    return tones.make_scene(TIMBRES[first.shape], LOUDNESSES[first.size], notes)


def sound_of_clip(scene):
    """A scene of motion.py -> that of its sound: notes for what the thing does, in the timbre of
    its shape, as loud as it is large (at first)."""
    return tones.make_scene(TIMBRES[scene.shape], LOUDNESSES[scene.size], ACTIONS[scene.action])


def toy_corpus(name, rng, examples=0, size=32):
    """shapes, tones, motion, stories or all -> Corpus.

    examples: signals to draw, or stories to tell; in `all` both, most of what takes most practice.
    size: pixels of a picture's side.
    """
    table, count = Table(rng, size), examples or EXAMPLES[name]
    if name in ("shapes", "all"):
        shapes_documents(table, count if name == "shapes" else count * 38 // 100)
    if name in ("tones", "all"):
        pair_documents(table, "audio", count if name == "tones" else count * 3 // 40)
    if name in ("motion", "all"):
        pair_documents(table, "video", count if name == "motion" else count * 3 // 10)
    if name in ("stories", "all"):
        stories_documents(table, count if name == "stories" else count // 8)
    if name == "all":
        crossing_documents(table, count // 30)
    if len(table.documents) < 2:
        raise InputError(f"--examples {count}: too few to train on {name}")
    return table.corpus()


# --- a folder of your own files ------------------------------------------------------------------

def folder_corpus(folder, size=32, held_out=0.1):
    """A folder with `metadata.jsonl` (Hugging Face ImageFolder) -> (train, held-out) Corpus.

    Each line is {"file_name": "0001.png", "text": "its caption"}. A .wav file is a sound, an
    animated .gif a clip, anything else a picture; media.py says how each is cut and resized.
    Raises InputError naming the file and line of whatever cannot be used.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f'--data: there is no folder "{folder}"; give one, or a toy world: '
                         + ", ".join(EXAMPLES))
    metadata = folder / "metadata.jsonl"
    if not os.path.isfile(metadata):
        raise InputError(f'--data: "{folder}" has no metadata.jsonl; write one line per file: '
                         '{"file_name": "0001.png", "text": "its caption"}')
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{metadata}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{metadata}: cannot be read ({error.strerror})") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            name, text = parse_metadata(line, f"{metadata}, line {number}")
            try:
                pairs.append((name, text, *read_file(folder / name, size)))
            except InputError as error:
                raise InputError(f"{metadata}, line {number}: {error}") from None
    parts = Table(None), Table(None)
    for kind in WORLDS:
        own = {}                        # all lines of a file are trained on, or none
        for name, text, modality, stored in pairs:
            if modality == kind:
                own.setdefault(os.path.normpath(name), []).append((text, stored))
        files = list(own.values())
        shuffled = np.random.default_rng(0).permutation(len(own))   # the same split in every run
        test = min(max(1, int(len(own) * held_out)), 512) if len(own) > 1 else 0
        for place, i in enumerate(shuffled):
            table = parts[place < test]
            for text, stored in files[i]:
                table.documents.append([("text", text), table.add(kind, stored)])
    if not parts[1].documents:
        count = len({name for name, *_ in pairs})
        raise InputError(f'--data: "{metadata}" names {count} files; at least 2 of a kind are '
                         "needed, one to learn from and one to be tested on")
    return tuple(table.corpus() for table in parts)


def read_file(path, size):
    """A picture, sound or clip -> (its modality, what is stored of it)."""
    suffix = path.suffix.lower()
    if suffix == ".wav":
        return "audio", read_sound(path, tones.LENGTH, tones.RATE)
    if suffix == ".gif" and is_animated(path):
        return "video", read_video(path, motion.FRAMES, size)
    return "image", read_picture(path, size)


def parse_metadata(line, where):
    """One line of metadata.jsonl -> (file name, text)."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{where}: not JSON ({reason}); mend the line, or leave it out: "
                         f"{line[:60]}") from None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str)
                                              for key in ("file_name", "text")):
        raise InputError(f'{where}: needs "file_name" and "text", both strings: {line[:60]}')
    if not is_unicode(entry["text"]):
        raise InputError(f"{where}: its text is not valid Unicode: {line[:60]}")
    return entry["file_name"], entry["text"]
