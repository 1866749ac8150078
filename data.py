"""The shared tokenizer, the document and batch format.

A *document* is a list of segments (modality, content), in any order: text segments hold a string,
the others the number of a signal in the corpus's table.  A *sequence* is what becomes of it:

    [("text", "hi"), ("image", 7)]  ->  <bos> h i <boi> [image positions] <eoi> <eos>

A *batch* packs whole documents, side by side, into rows of one length.  Every position has an id,
a modality, the number of its span and the number of its document; all four systems read the same
batch, and differ only in what stands in the positions of a span: ids of codes (Chameleon) or latent
vectors (Transfusion).  Shapes never change from batch to batch, not even how many positions each
modality has, so that a model is compiled once (twice, where some documents are long: `Alternate`).

Text ids come first in the vocabulary, then the special tokens, then the codes of each modality.
"""

import bisect
import functools
import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

MODALITIES = ("text", "image", "audio", "video")        # a position's modality is its place in here
SPECIAL = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<boa>", "<eoa>", "<bov>", "<eov>")
IGNORE = -100                                           # a target that no loss counts


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what it is and what to do."""


def is_unicode(text):
    """Whether a string can be written as UTF-8: what the system or JSON made of bytes may not."""
    return text.encode(errors="replace").decode() == text


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

    @property
    def first_code(self):
        """Ids from here on are codes, of whatever modality."""
        return self.codes[0][0]


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
    def train(cls, texts, merges=512):
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
    return re.findall(r" ?\w+(?:[-#]\w+)*| ?[^\w\s]+|\s", text)


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
    signals: dict               # modality name -> array (N, ...), as `to_signal` reads it

    def texts(self):
        return [content for document in self.documents
                for name, content in document if name == "text"]


def to_bytes(signal):
    """[-1, 1] -> 0..255, as pictures and clips are stored."""
    return np.clip(np.rint((np.asarray(signal) + 1) * 127.5), 0, 255).astype(np.uint8)


def to_samples(wave):
    """[-1, 1] -> -32767..32767, as sounds are stored."""
    return np.clip(np.rint(np.asarray(wave) * 32767), -32767, 32767).astype(np.int16)


def to_signal(stored):
    """Bytes of pictures and clips, 16-bit samples of sounds -> float tensor in [-1, 1]; a signal
    stays as it is."""
    stored = torch.as_tensor(stored)
    if stored.dtype == torch.uint8:
        return stored.float() / 127.5 - 1
    return stored.float() / 32767 if stored.dtype == torch.int16 else stored


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
    shown: tuple                # by modality: (spans,) bool: opens a document that goes on

    def to(self, device):
        return Batch(*(tuple(_to(x, device) for x in field) if isinstance(field, tuple)
                       else _to(field, device) for field in self))

    def shown_positions(self, positions):
        """(B, T) bool: of the spans that `shown` names. positions: of one span, by modality."""
        flags = [torch.zeros_like(self.order[:self.sizes[0]], dtype=torch.bool)]
        flags += [shown.repeat_interleave(n) for shown, n in zip(self.shown, positions)]
        return torch.cat(flags)[self.inverse].view(self.tokens.shape)


def _to(x, device):
    if not isinstance(x, torch.Tensor):
        return x
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)     # or the copy would wait
    return x.to(device)


def tokenize(document, tokenizer):
    """[(modality name, content), ...] -> [(modality, ids as an array, or content), ...]."""
    return [(MODALITIES.index(name), np.array(tokenizer.encode(content), np.int64)
             if name == "text" else content) for name, content in document]


def good_length(lengths, fill=0.9, step=32):
    """The shortest row, in steps of 32, that documents of these lengths fill to the share `fill`;
    else the row that they fill best."""
    rng, fills = np.random.default_rng(0), {}
    sample = sorted(rng.choice(lengths, 4000).tolist(), reverse=True)
    first = step * math.ceil(max(lengths) / step)
    for row in range(first, 4 * first + 1, step):
        free = []           # the room that each row has left, in order
        for length in sample:
            place = bisect.bisect_left(free, length)        # the least room that it fits in
            room = free.pop(place) if place < len(free) else row
            bisect.insort(free, room - length)
        fills[row] = sum(sample) / (row * len(free))
        if fills[row] >= fill:
            return row
    return max(fills, key=fills.get)


LONG = 160          # positions; the cost of attention grows with the square of a row's length, so
                    # longer documents have rows of their own
LONGEST = 4096      # positions that a row has at most, unless --context says otherwise


class Rows(NamedTuple):
    corpus: Corpus              # what is packed
    count: int                  # rows of a batch
    length: int                 # positions of a row


def plan_rows(corpus, tokenizer, positions, count, length=0):
    """The rows that a corpus is packed into: one kind, or short ones and long ones with about as
    many positions in all. length: of a row; 0: a good one. InputError where a document is longer.
    """
    lengths = [measure(tokenize(document, tokenizer), positions) for document in corpus.documents]
    if max(lengths) > (length or LONGEST):
        document = corpus.documents[int(np.argmax(lengths))]
        text = max((content for name, content in document if name == "text"), key=len, default="")
        raise InputError(f"a document needs {max(lengths)} positions, a sequence has "
                         f'{length or LONGEST}: shorten its text ("{text[:50]}...") or raise '
                         "--context")
    if length:
        return [Rows(corpus, count, length)]
    plans = []
    for is_long in (False, True):
        chosen = [i for i, needed in enumerate(lengths) if (needed > LONG) == is_long]
        if chosen:
            needed = [lengths[i] for i in chosen]
            length = good_length(needed, 0.85 if is_long else 0.9)
            rows = max(1, plans[0].count * plans[0].length // length) if plans else count
            part = corpus._replace(documents=[corpus.documents[i] for i in chosen])
            plans.append(Rows(part, rows, length))
    return plans


def measure(document, positions):
    """Positions a tokenized document takes, with <bos>, <eos> and the brackets of its spans; a span
    that is only opened takes one."""
    return 2 + sum(len(content) if kind == 0 else 1 if content is None else positions[kind] + 2
                   for kind, content in document)


class Batches:
    """An endless stream of packed batches, a function of its seed alone; `state`: where it stands.

    encoded   {modality name: codes (N, h, w) int64 or latents (N, C, h, w)}, in the corpus's order
    positions positions of one span, by modality
    Of the two-segment documents with text first, a share `read` is turned around (the signal first:
    the model learns to read it); a share `drop` goes without its text (guidance's null branch).

    Documents that hold the same signals (one picture, say) are a make-up. Each make-up is shuffled
    and gone through by itself, every document once an epoch, so that each batch can hold as many
    spans of a modality as any other.
    """

    WAIT = 6        # documents of a make-up that are tried, the oldest first, before it is given up
    TRIES = 32      # draws of a make-up that may find no room before a batch is full

    def __init__(self, corpus, tokenizer, layout, encoded, positions, rows, length, seed=0,
                 read=0.4, drop=0.1):
        if read + drop > 1:
            raise InputError(f"--read-share {read} and --caption-dropout {drop} are more than all "
                             "pairs together; lower one of them")
        self.layout, self.encoded, self.positions = layout, encoded, positions
        self.rows, self.length, self.seed, self.read, self.drop = rows, length, seed, read, drop
        groups = {}
        for document in corpus.documents:
            spans = tuple(sum(name == kind for name, _ in document) for kind in MODALITIES)
            makeup = int(not any(spans[1:])), *spans[1:]    # words alone count as a kind, too
            groups.setdefault(makeup, []).append(tokenize(document, tokenizer))
        self.makeups = sorted(groups)                   # by make-up, how many spans of each kind
        self.documents = [groups[makeup] for makeup in self.makeups]
        self.shares = np.cumsum([len(group) for group in self.documents]) / len(corpus.documents)
        self.shares[-1] = 1.0
        self.orders, self.spans, self.most, self.state = {}, None, None, self.start()
        trials = [document for _ in range(16) for row in self.fill() for document in row]
        filled = sum(measure(document, positions) for document in trials) / 16
        lengths = [[measure(document, positions) for document in group] for group in self.documents]
        count = filled / np.mean(sum(lengths, []))  # documents of a batch, in the corpus's shares
        means = count * np.average(self.makeups, axis=0, weights=list(map(len, self.documents)))
        self.most = self.affordable([math.ceil(mean) for mean in means], list(map(max, lengths)))
        self.spans = [0, *self.most[1:]]
        if not any(self.spans):             # then there is nothing to keep room for
            self.most[0] = rows * length
        self.state = self.start()

    def affordable(self, most, longest):
        """How many documents of words alone, and spans of each kind, a batch shall have -> the same
        or less: beside whatever document comes first, the others must still find room. longest: by
        make-up, positions of its longest document."""
        least = list(map(max, zip(*self.makeups)))      # or some document would never find any
        most, size = list(map(max, most, least)), self.rows * self.length
        while any(need + sum((m - count) * p for m, count, p in zip(most, makeup, self.positions))
                  > size for makeup, need in zip(self.makeups, longest)):
            kind = max(range(1, len(most)), key=lambda kind: most[kind] - least[kind])
            if most[kind] == least[kind]:
                raise InputError(f"{self.rows} rows of {self.length} positions cannot hold a span "
                                 "of each modality: give a larger --batch-size, a longer "
                                 "--context, or a lower --accumulate")
            most[kind] -= 1
        return most

    def start(self):
        """The state before the first batch: by make-up, how many were drawn, and who waits."""
        return {"batch": 0, "drawn": [0] * len(self.makeups), "held": [[] for _ in self.makeups]}

    @property
    def epoch(self):
        """Batches, about, in which every document comes once."""
        kept = self.state
        drawn = sum(len(row) for _ in range(16) for row in self.fill()) / 16
        self.state = kept
        return sum(map(len, self.documents)) / drawn

    def draw(self, makeup, number):
        """A make-up's document number 0, 1, 2, ...: each once an epoch, in that epoch's order."""
        epoch, place = divmod(number, len(self.documents[makeup]))
        order, chances = self.shuffled(makeup, epoch)
        document = self.documents[makeup][order[place]]
        if len(document) == 2 and document[0][0] == 0:
            if chances[place] < self.read:
                return document[::-1]
            if chances[place] < self.read + self.drop:
                return document[1:]
        return document

    def shuffled(self, makeup, epoch):
        """The order of an epoch and a chance for each of its places, kept for the next call."""
        if (makeup, epoch) not in self.orders:
            rng = np.random.default_rng((self.seed, makeup, epoch))
            count = len(self.documents[makeup])
            self.orders.pop((makeup, epoch - 2), None)
            self.orders[makeup, epoch] = rng.permutation(count), rng.random(count)
        return self.orders[makeup, epoch]

    def __iter__(self):
        return self

    def __next__(self):
        return pack(self.fill(), self.length, self.layout, self.positions, self.encoded, self.spans)

    def skip(self):
        """Go past a batch, which another process computes."""
        self.fill()

    def fill(self):
        """Rows of documents, each where it leaves least room, up to `spans`; the others wait."""
        rng = np.random.default_rng((self.seed, self.state["batch"]))
        drawn, held = list(self.state["drawn"]), [list(queue) for queue in self.state["held"]]
        free, wanted = [self.length] * self.rows, list(self.most or [10 ** 9] * len(MODALITIES))
        total, rows, misses = self.rows * self.length, [[] for _ in range(self.rows)], 0
        while misses < self.TRIES:
            makeup = int(np.searchsorted(self.shares, rng.random(), side="right"))
            left = [w - count for w, count in zip(wanted, self.makeups[makeup])]
            reserved = sum(w * p for w, p in zip(left, self.positions)) if self.spans else 0
            queue, place = held[makeup], 0
            while min(left) >= 0 and place < self.WAIT:
                if place == len(queue):
                    queue.append(drawn[makeup])
                    drawn[makeup] += 1
                document = self.draw(makeup, queue[place])
                need = measure(document, self.positions)
                fitting = [f for f in free if f >= need]
                if fitting and total - need >= reserved:
                    break
                place += 1
            else:
                misses += 1
                continue
            row = free.index(min(fitting))
            rows[row].append(document)
            free[row] -= need
            total, wanted = total - need, left
            del queue[place]
        self.state = {"batch": self.state["batch"] + 1, "drawn": drawn, "held": held}
        return rows


class Alternate:
    """Two streams of batches as one, evenly mixed, so that their epochs take equally long.

    A batch may be drawn in parts; those of one batch come from the same stream.
    """

    def __init__(self, streams, parts=1):
        self.streams, self.parts, self.drawn = streams, parts, 0
        first, second = (stream.epoch for stream in streams)
        self.share = second / (first + second)              # of the batches, the second stream's

    def __iter__(self):
        return self

    def turn(self):
        """The stream that the next batch comes from."""
        batch = self.drawn // self.parts
        self.drawn += 1
        return self.streams[int((batch + 1) * self.share) - int(batch * self.share)]

    def __next__(self):
        return next(self.turn())

    @property
    def kinds(self):
        """Each stream, and the share of all batches that come from it."""
        return list(zip(self.streams, (1 - self.share, self.share)))

    def fill(self):
        return self.turn().fill()

    skip = fill

    @property
    def state(self):
        return {"batch": self.drawn // self.parts,
                "streams": [stream.state for stream in self.streams]}

    @state.setter
    def state(self, state):
        self.drawn = state["batch"] * self.parts        # which may be more or fewer than before
        for stream, kept in zip(self.streams, state["streams"]):
            stream.state = kept


class Laid(NamedTuple):
    """Rows of documents, as arrays (B, T) of a batch; the ids of codes are still missing."""
    tokens: np.ndarray
    modality: np.ndarray
    span: np.ndarray
    place: np.ndarray
    document: np.ndarray
    lone: np.ndarray            # the end of a span that stands without words
    signals: list               # by modality: numbers of the signals, in the order of the positions
    shown: list                 # by modality: whether each opens a document that goes on


def lay_out(rows, length, layout, positions, finished):
    """Lists of documents, a list for each row -> Laid; see `pack`."""
    shape = len(rows), length
    tokens, lone = np.full(shape, layout.pad, np.int64), np.zeros(shape, bool)
    modality, span, place, owner = (np.zeros(shape, np.int64) for _ in range(4))
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
                    place[r, at:stop] = range(1, stop - at + 1)
                    signals[kind].append(content)
                    shown[kind].append(number == 0 and len(document) > 1)
                    tokens[r, stop] = layout.end[kind]
                    at = stop + 1
            if finished:
                tokens[r, at] = layout.eos
                at += 1
            lone[r, at - 2] = finished and len(document) == 1 and document[0][0] > 0
            owner[r, start:at] = d
    return Laid(tokens, modality, span, place, owner, lone, signals, shown)


def pack(rows, length, layout, positions, encoded, spans=None, finished=True):
    """Lists of documents, a list for each row, -> Batch.

    spans: by modality, how many there shall be (None: those there are); padding makes up the rest.
    finished=False leaves out <eos>; then a span without a signal, (kind, None), is only opened.
    """
    laid = lay_out(rows, length, layout, positions, finished)
    tokens, modality, owner, signals, shown = (laid.tokens, laid.modality, laid.document,
                                               laid.signals, laid.shown)
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
    follows = ~laid.lone[:, :-1] & (owner[:, 1:] == owner[:, :-1]) & (tokens[:, 1:] != layout.pad)
    targets[:, :-1][follows] = tokens[:, 1:][follows]
    arrays = [torch.from_numpy(x) for x in (tokens, targets, modality, laid.span, laid.place, owner,
                                            order, np.argsort(order))]
    return Batch(*arrays, tuple(sizes), tuple(values), tuple(flags.float() for flags in real),
                 tuple(torch.tensor(flags, dtype=torch.bool) for flags in shown))


def pack_prompts(documents, tokenizer, layout, positions, encoded):
    """Open documents [(name, str, a signal's number or None: to draw), ...], one a row -> Batch."""
    rows = [[tokenize(document, tokenizer)] for document in documents]
    length = max(measure(document, positions) for row in rows for document in row)
    return pack(rows, length - 1, layout, positions, encoded, finished=False)       # without <eos>


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
