"""The shared tokenizer, the document and batch format, toy corpora and a folder of your own files.

A *document* is a list of segments (modality, content), in any order: text segments hold a string,
the others the number of a signal in the corpus's table.  A *sequence* is what becomes of it:

    [("text", "hi"), ("image", 7)]  ->  <bos> h i <boi> [image positions] <eoi> <eos>

A *batch* packs whole documents, side by side, into rows of one length.  Every position has an id,
a modality, the number of its span and the number of its document; all four systems read the same
batch, and differ only in what stands in the positions of a span: ids of codes (Chameleon) or latent
vectors (Transfusion).  Shapes never change from batch to batch, not even how many positions each
modality has, so that a model is compiled once.

Text ids come first in the vocabulary, then the special tokens, then the codes of each modality.
"""

import functools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from worlds import shapes

MODALITIES = ("text", "image", "audio", "video")        # a position's modality is its place in here
SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<boa>", "<eoa>", "<bov>", "<eov>")
IGNORE = -100                                           # a target that no loss counts


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what it is and what to do."""


# --- the tokenizer -------------------------------------------------------------------------------

class Layout(NamedTuple):
    """What a model needs to know of its sequences: id ranges, how a span of each modality looks."""
    size: int                   # ids in all: text, special tokens, codes
    text: int                   # ids below this are text
    pad: int
    bos: int
    eos: int
    begin: tuple                # by modality: the id that opens a span (begin[0] is unused)
    end: tuple                  # by modality: the id that closes it
    codes: tuple                # by modality: (first, last + 1) of the ids of its codes
    shapes: tuple               # by modality: (C, h, w) of its encoded signals, None without any


class Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016), lossless on any UTF-8 text.

    Ids 0..255 are bytes, then one id for each merge, then the special tokens.
    """

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.rank = {pair: 256 + i for i, pair in enumerate(self.merges)}
        self.pieces = [bytes([byte]) for byte in range(256)]
        for a, b in self.merges:
            self.pieces.append(self.pieces[a] + self.pieces[b])
        self.special = {name: len(self.pieces) + i for i, name in enumerate(SPECIAL)}
        self.encode_word = functools.lru_cache(maxsize=100_000)(self._encode_word)

    @classmethod
    def train(cls, texts, merges=256):
        """Learn up to `merges` merges of the most frequent neighbours, never across words."""
        count = Counter(word for text in texts for word in split_words(text))
        words = {word: tuple(word.encode()) for word in count}
        learned = []
        for new in range(256, 256 + merges):
            pairs = Counter()
            for word, ids in words.items():
                for pair in zip(ids, ids[1:]):
                    pairs[pair] += count[word]
            if not pairs or max(pairs.values()) < 2:
                break
            best = max(pairs, key=lambda pair: (pairs[pair], pair))     # ties break the same way
            learned.append(best)
            words = {word: merge(ids, best, new) for word, ids in words.items()}
        return cls(learned)

    def _encode_word(self, word):
        ids = tuple(word.encode())
        while len(ids) > 1:
            pair = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if pair not in self.rank:
                break
            ids = merge(ids, pair, self.rank[pair])
        return ids

    def encode(self, text):
        """str -> list of text ids; special tokens are never made from text."""
        return [i for word in split_words(text) for i in self.encode_word(word)]

    def decode(self, ids):
        """Text ids -> str; special tokens are written by their names, broken UTF-8 as U+FFFD."""
        names = {i: name.encode() for name, i in self.special.items()}
        pieces = (names[i] if i in names else self.pieces[i] for i in ids)
        return b"".join(pieces).decode(errors="replace")

    def layout(self, shapes, codes):
        """shapes {modality name: (C, h, w)}, codes {modality name: K} -> Layout."""
        first, ranges = len(self.pieces) + len(SPECIAL), []
        for name in MODALITIES:
            ranges.append((first, first + codes.get(name, 0)))
            first = ranges[-1][1]
        special = self.special
        return Layout(first, len(self.pieces), special["<pad>"], special["<bos>"], special["<eos>"],
                      (None, special["<boi>"], special["<boa>"], special["<bov>"]),
                      (None, special["<eoi>"], special["<eoa>"], special["<eov>"]),
                      tuple(ranges), tuple(shapes.get(name) for name in MODALITIES))


def split_words(text):
    """Words with the space before them, runs of punctuation, single white space: all the text."""
    return re.findall(r" ?\w+(?:-\w+)*| ?[^\w\s]+|\s", text)


def merge(ids, pair, new):
    """ids with every occurrence of the pair replaced by the id `new`, from the left."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i:i + 2] == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return tuple(merged)


# --- documents -----------------------------------------------------------------------------------

class Corpus(NamedTuple):
    documents: list             # of documents: [(modality name, str or number of the signal), ...]
    signals: dict               # modality name -> uint8 or float array (N, channels, height, width)

    def texts(self):
        return [content for document in self.documents
                for name, content in document if name == "text"]


def to_bytes(signal):
    """[-1, 1] -> 0..255, as pictures are stored."""
    return np.clip(np.rint((np.asarray(signal) + 1) * 127.5), 0, 255).astype(np.uint8)


def to_signal(pixels):
    """Pixels 0..255, (..., C, H, W) -> float tensor in [-1, 1]."""
    return torch.as_tensor(pixels).float() / 127.5 - 1


def shapes_corpus(rng, pictures=40_000, size=32):
    """The shapes world as documents: pairs, two-picture stories, and stories without pictures."""
    documents, table = [], []

    def draw(scene):
        table.append(to_bytes(shapes.render(scene, rng, size)))
        return "image", len(table) - 1

    while len(table) < pictures:
        scene, kind = shapes.sample(rng), rng.random()
        caption = shapes.describe(scene, rng)
        sentence, after = shapes.change(scene, rng)
        if kind < 0.78:         # `Batches` turns some of these around: picture, then caption
            documents.append([("text", caption), draw(scene)])
        elif kind < 0.95:
            documents.append([("text", caption), draw(scene), ("text", sentence), draw(after)])
        else:                   # opens with another word: what a text without a picture begins with
            end = shapes.describe(after, rng)
            documents.append([("text", f"imagine {caption} {sentence} now {end}")])
    return Corpus(documents, {"image": np.stack(table)})


def folder_corpus(folder, size=32, held_out=0.1):
    """A folder with `metadata.jsonl` (Hugging Face ImageFolder) -> (train, held-out) Corpus.

    Each line is {"file_name": "0001.png", "text": "its caption"}. Pictures are cut to their middle
    square and resized. Raises InputError naming the file and line of whatever cannot be used.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f'--data: there is no folder "{folder}" (and no toy world of that name)')
    metadata = folder / "metadata.jsonl"
    if not os.path.isfile(metadata):
        raise InputError(f'--data: "{folder}" has no metadata.jsonl; write one line per picture: '
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
                pixels = read_picture(folder / name, size)
            except InputError as error:
                raise InputError(f"{metadata}, line {number}: {error}") from None
            pairs.append((text, pixels))
    if len(pairs) < 2:
        raise InputError(f'--data: "{metadata}" names {len(pairs)} pictures; at least 2 are '
                         "needed, one to learn from and one to be tested on")
    shuffled = np.random.default_rng(0).permutation(len(pairs))     # the same split in every run
    test = min(max(1, int(len(pairs) * held_out)), 512)
    return tuple(Corpus([[("text", pairs[i][0]), ("image", n)] for n, i in enumerate(part)],
                        {"image": np.stack([pairs[i][1] for i in part])})
                 for part in (shuffled[test:], shuffled[:test]))


def parse_metadata(line, where):
    """One line of metadata.jsonl -> (file name, text)."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", type(error).__name__)
        raise InputError(f"{where}: not JSON ({reason}): {line[:60]}") from None
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str)
                                              for key in ("file_name", "text")):
        raise InputError(f'{where}: needs "file_name" and "text", both strings: {line[:60]}')
    if entry["text"].encode(errors="replace").decode() != entry["text"]:
        raise InputError(f"{where}: its text is not valid Unicode: {line[:60]}")
    return entry["file_name"], entry["text"]


def read_picture(path, size):
    """A PNG or JPEG file -> uint8 (3, size, size): alpha on white, middle square, resized."""
    from PIL import Image, ImageOps, UnidentifiedImageError
    if not os.path.isfile(path):
        raise InputError(f'there is no picture "{path}"')
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):            # 16 bits of grey
                picture = picture.point(lambda value: value / 256).convert("L")
            picture = ImageOps.exif_transpose(picture).convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError,
            OSError, SyntaxError, ValueError) as error:
        raise InputError(f'"{path}" cannot be read as a picture ({error})') from None
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return np.array(picture, np.uint8).transpose(2, 0, 1)


# --- batches -------------------------------------------------------------------------------------

class Batch(NamedTuple):
    r"""One packed batch of B rows, T positions each. `sizes` and shapes are the same in every one.

    Two documents in a row of 14, with a tokenizer of bare bytes (so h is 104, i is 105, <pad> 256,
    <bos> 257, <eos> 258, <boi> 259, <eoi> 260) and pictures of 4 positions; codes begin at 265.

    >>> batch = example()
    >>> print(*batch.tokens[0].tolist())
    257 104 105 259 271 265 265 268 260 258 257 104 258 256
    >>> print(*batch.targets[0].tolist())
    104 105 259 271 265 265 268 260 258 -100 104 258 -100 -100
    >>> print(*batch.modality[0].tolist())
    0 0 0 0 1 1 1 1 0 0 0 0 0 0
    >>> print(*batch.span[0].tolist())
    0 0 0 0 1 1 1 1 0 0 0 0 0 0
    >>> print(*batch.document[0].tolist())
    1 1 1 1 1 1 1 1 1 1 2 2 2 0
    >>> print(*batch.order.tolist(), batch.sizes)
    0 1 2 3 8 9 10 11 12 13 4 5 6 7 (10, 4, 0, 0)
    """
    tokens: torch.Tensor        # (B, T) int64; <pad> where a latent stands
    targets: torch.Tensor       # (B, T) int64: the document's next id, IGNORE where there is none
    modality: torch.Tensor      # (B, T) int64: 0 text and special tokens, 1 image, 2 audio, 3 video
    span: torch.Tensor          # (B, T) int64: 1, 2, ... in each row for a span's positions, else 0
    place: torch.Tensor         # (B, T) int64: 1, 2, ... within each span, else 0
    document: torch.Tensor      # (B, T) int64: 1, 2, ... in each row, 0 for padding
    order: torch.Tensor         # (B * T,) int64: positions sorted by modality, padding last in each
    inverse: torch.Tensor       # (B * T,) int64: undoes it
    sizes: tuple                # by modality: how many positions it has (static)
    signals: tuple              # by modality: encoded signals (spans, C, h, w), or None; in `order`
    real: tuple                 # by modality: (spans,) float, 0.0 for the padding among them
    shown: tuple                # by modality: (spans,) bool: opens its document, so words follow it

    def to(self, device):
        return Batch(*(tuple(_to(x, device) for x in field) if isinstance(field, tuple)
                       else _to(field, device) for field in self))


def _to(x, device):
    return x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x


def tokenize(document, tokenizer):
    """[(modality name, content), ...] -> [(modality, ids as an array, or content), ...]."""
    return [(MODALITIES.index(name), np.array(tokenizer.encode(content), np.int64)
             if name == "text" else content) for name, content in document]


def good_length(lengths, step=32):
    """The shortest row, in steps of 32, that documents of these lengths fill to 90 %, or nearly."""
    rng, fills = np.random.default_rng(0), {}
    sample = rng.choice(lengths, 400).tolist()
    first = step * math.ceil(max(lengths) / step)
    for row in range(first, 4 * first + 1, step):
        free = []
        for length in sorted(sample, reverse=True):
            fitting = [room for room in free if room >= length]
            if fitting:
                free[free.index(min(fitting))] -= length
            else:
                free.append(row - length)
        fills[row] = sum(sample) / (row * len(free))
        if fills[row] >= 0.9:
            return row
    return max(fills, key=fills.get)


def measure(document, positions):
    """Positions a tokenized document takes, with <bos>, <eos> and the brackets of its spans."""
    return 2 + sum(len(content) if kind == 0 else positions[kind] + 2 for kind, content in document)


class Batches:
    """An endless stream of packed batches, a function of its seed alone; `state`: where it stands.

    encoded   {modality name: codes (N, h, w) int64 or latents (N, C, h, w)}, in the corpus's order
    positions positions of one span, by modality
    Of the two-segment documents with text first, a share `read` is turned around (picture first:
    the model learns to read it); a share `drop` goes without its text (guidance's null branch).
    """

    def __init__(self, corpus, tokenizer, layout, encoded, positions, rows, length, seed=0,
                 read=0.4, drop=0.1):
        self.layout, self.encoded = layout, encoded
        self.rows, self.length, self.seed, self.read, self.drop = rows, length, seed, read, drop
        self.positions = positions
        self.documents = [tokenize(document, tokenizer) for document in corpus.documents]
        lengths = [measure(document, self.positions) for document in self.documents]
        if max(lengths) > length:
            text = corpus.documents[int(np.argmax(lengths))][0][1]
            raise InputError(f"a document needs {max(lengths)} positions, a sequence has {length}: "
                             f'shorten its text ("{str(text)[:50]}...") or raise --context')
        self.orders, self.spans, self.state = {}, None, {"drawn": 0, "held": []}
        trials = [self.fill() for _ in range(8)]    # how many spans of each modality fit a batch
        self.spans = [round(sum(kind and m == kind for rows in trials for documents in rows
                                for document in documents for m, _ in document) / len(trials))
                      for kind in range(len(MODALITIES))]
        self.state = {"drawn": 0, "held": []}

    def draw(self, number):
        """The document drawn as number 0, 1, 2, ...: each once an epoch, in that epoch's order."""
        epoch, place = divmod(number, len(self.documents))
        document = self.documents[self.shuffled(epoch)[place]]
        if len(document) == 2 and document[0][0] == 0:
            chance = np.random.default_rng((self.seed, epoch, place)).random()
            if chance < self.read:
                return document[::-1]
            if chance < self.read + self.drop:
                return document[1:]
        return document

    def shuffled(self, epoch):
        """The order of an epoch, kept for the next call."""
        if epoch not in self.orders:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
            self.orders = {**dict(list(self.orders.items())[-2:]), epoch: order}
        return self.orders[epoch]

    def __iter__(self):
        return self

    def __next__(self):
        return pack(self.fill(), self.length, self.layout, self.positions, self.encoded, self.spans)

    def fill(self):
        """Rows of documents, each where it leaves least room, up to `spans`; the others wait."""
        free, wanted = [self.length] * self.rows, list(self.spans or [10 ** 9] * len(MODALITIES))
        total, rows = self.rows * self.length, [[] for _ in range(self.rows)]
        waiting, held, misses = list(self.state["held"]), [], 0
        while misses < 32:
            if waiting:
                number = waiting.pop(0)
            else:
                number = self.state["drawn"]
                self.state["drawn"] += 1
            document = self.draw(number)
            need = measure(document, self.positions)
            left = [w - sum(kind == m for kind, _ in document) if m else 0
                    for m, w in enumerate(wanted)]
            reserved = sum(w * p for w, p in zip(left, self.positions)) if self.spans else 0
            fitting = [f for f in free if f >= need]
            if not fitting or min(left) < 0 or total - need < reserved:
                held.append(number)
                misses += 1
                continue
            row = free.index(min(fitting))
            rows[row].append(document)
            free[row] -= need
            total, wanted = total - need, left
        self.state["held"] = held + waiting
        return rows


def pack(rows, length, layout, positions, encoded, spans=None, finished=True):
    """Lists of documents, a list for each row, -> Batch.

    spans: by modality, how many there shall be (None: those there are); padding makes up the rest.
    finished=False leaves out <eos>; then a span without a signal, (kind, None), is only opened.
    """
    shape = len(rows), length
    tokens = np.full(shape, layout.pad, np.int64)
    modality, span, place, owner = (np.zeros(shape, np.int64) for _ in range(4))
    lone = np.zeros(shape, bool)                # the <eoi> of a picture that stands without words
    signals, shown = [[] for _ in MODALITIES], [[] for _ in MODALITIES]
    for r, documents in enumerate(rows):
        at, count = 0, 0
        for d, document in enumerate(documents, 1):
            start = at
            tokens[r, at] = layout.bos
            at += 1
            for number, (kind, content) in enumerate(document):
                if kind == 0:
                    tokens[r, at:at + len(content)] = content
                    at += len(content)
                    continue
                tokens[r, at] = layout.begin[kind]
                at += 1
                if content is not None:
                    stop, count = at + positions[kind], count + 1
                    modality[r, at:stop], span[r, at:stop] = kind, count
                    signals[kind].append(content)
                    place[r, at:stop] = range(1, stop - at + 1)
                    shown[kind].append(number == 0 and len(document) > 1)
                    tokens[r, stop] = layout.end[kind]
                    at = stop + 1
            if finished:
                tokens[r, at] = layout.eos
                at += 1
            lone[r, at - 2] = finished and len(document) == 1 and document[0][0] > 0
            owner[r, start:at] = d
    spans = spans or [len(numbers) for numbers in signals]
    real = tuple(torch.arange(count) < len(numbers) for count, numbers in zip(spans, signals))
    padding = np.flatnonzero(owner.ravel() == 0)
    for kind, count in enumerate(spans):        # padding takes modalities so that counts are static
        missing = count - len(signals[kind])
        signals[kind] += [0] * missing
        shown[kind] += [False] * missing
        take, padding = np.split(padding, [missing * positions[kind]])
        modality.ravel()[take] = kind
    order = np.argsort(modality.ravel() * 2 + (owner.ravel() == 0), kind="stable")
    sizes = np.bincount(modality.ravel(), minlength=len(MODALITIES)).tolist()
    values = [None] * len(MODALITIES)
    for kind in range(1, len(MODALITIES)):
        if sizes[kind]:
            value = encoded[MODALITIES[kind]][torch.tensor(signals[kind])]
            if value.is_floating_point():
                values[kind] = value
            else:               # id = offset + code, here and nowhere else
                block = order[sum(sizes[:kind]):sum(sizes[:kind + 1])]
                tokens.ravel()[block] = value.numpy().ravel() + layout.codes[kind][0]
    tokens[owner == 0] = layout.pad
    targets = np.full_like(tokens, IGNORE)
    # a picture whose words were left out says nothing of what follows pictures
    follows = ~lone[:, :-1] & (owner[:, 1:] == owner[:, :-1]) & (tokens[:, 1:] != layout.pad)
    targets[:, :-1][follows] = tokens[:, 1:][follows]
    arrays = [torch.from_numpy(x) for x in (tokens, targets, modality, span, place, owner,
                                            order, np.argsort(order))]
    return Batch(*arrays, tuple(sizes), tuple(values), tuple(flags.float() for flags in real),
                 tuple(torch.tensor(flags) for flags in shown))


def pack_prompts(documents, tokenizer, layout, positions, encoded):
    """Open documents [(name, str, a signal's number or None: to draw), ...], one a row -> Batch."""
    rows = [[tokenize(document, tokenizer)] for document in documents]
    length = max(measure(document, positions) for row in rows for document in row)
    return pack(rows, length, layout, positions, encoded, finished=False)


def unpack(tokens, latents, layout, tokenizer):
    """What `generate` returned for a row, as a document: strings, and codes or latents as tensors.

    tokens (T,), from where the new part begins; latents, by modality, those drawn (spans, C, h, w).
    A span that was only opened holds None.
    """
    document, text, drawn = [], [], [0] * len(MODALITIES)
    ids, at = tokens.tolist(), 0
    while at < len(ids) and ids[at] not in (layout.eos, layout.pad):
        kind = layout.begin.index(ids[at]) if ids[at] in layout.begin else 0
        if not kind:
            text.append(ids[at])
            at += 1
            continue
        if text:
            document.append(("text", tokenizer.decode(text)))
        text, at = [], at + 1
        stop = next((i for i in range(at, len(ids)) if ids[i] == layout.end[kind]), None)
        content = None
        if stop is not None and ids[at] == layout.pad:
            content = latents[kind][drawn[kind]]
            drawn[kind] += 1
        elif stop is not None:
            content = tokens[at:stop].reshape(layout.shapes[kind][1:]) - layout.codes[kind][0]
        document.append((MODALITIES[kind], content))
        at = len(ids) if stop is None else stop + 1
    if text:
        document.append(("text", tokenizer.decode(text)))
    return document


def example():
    """The batch that `Batch` shows in its docstring."""
    tokenizer = Tokenizer()
    layout = tokenizer.layout({"image": (8, 2, 2)}, {"image": 8})
    documents = [[("text", "hi"), ("image", 0)], [("text", "h")]]
    row = [tokenize(document, tokenizer) for document in documents]
    return pack([row], 14, layout, [0, 4, 0, 0], {"image": torch.tensor([[[6, 0], [0, 3]]])})
