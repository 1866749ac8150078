"""Small models and batches, the same for both hosts: pictures take 4 positions, sounds 2, clips 8
(two frames of 4 codes; or four frames of two patches of latents)."""

import math

import torch

from adapter import load

chameleon, data, mot = load("chameleon"), load("data"), load("mot")
transfusion = load("transfusion")

SETTINGS = ("transfusion", "chameleon")
POSITIONS = [0, 4, 2, 8]
TOKENIZER = data.Tokenizer()
SIZE = {"width": 32, "depth": 2, "heads": 2, "hidden": 64}
SHAPES = {"transfusion": {"image": (2, 4, 4), "audio": (3, 2, 4), "video": (2, 8, 4)},  # 2 x 2 each
          "chameleon": {"image": (2, 2, 2), "audio": (2, 1, 2), "video": (2, 4, 2)}}
CODES = {"transfusion": {}, "chameleon": {"image": 8, "audio": 5, "video": 7}}
LAYOUT = {setting: TOKENIZER.layout(SHAPES[setting], CODES[setting]) for setting in SETTINGS}

# several spans and documents a row, of each modality a span that opens its document, and padding
ROWS = [[[("text", "red"), ("image", 0)], [("image", 1), ("text", "blue"), ("audio", 2)],
         [("video", 2), ("text", "go")]],
        [[("audio", 0), ("image", 2), ("video", 1), ("image", 3), ("text", "z")],
         [("text", "no more")]]]
LENGTH = 64                 # of a row
PADDED = [0, 6, 3, 4]       # spans by modality, where there shall be more than those of ROWS

# an open document that ends in each modality, and goes on with each span
ENDINGS = {"text": [("text", "ab")], "image": [("image", 1)],
           "audio": [("text", "what"), ("audio", 2)], "video": [("audio", 0), ("video", 1)]}
CROSSING = [[*before, (name, None)] for before in ENDINGS.values()
            for name in SHAPES["transfusion"]]


def signals(setting, count=6):
    """Untrained latents, or codes, of six pictures, sounds and clips."""
    random = torch.Generator().manual_seed(1)
    if setting == "transfusion":
        return {name: torch.randn(count, *shape, generator=random)
                for name, shape in SHAPES[setting].items()}
    return {name: torch.randint(CODES[setting][name], (count, *shape[1:]), generator=random)
            for name, shape in SHAPES[setting].items()}


def layout_of(setting, names):
    """The layout of a model that knows, beside text, the modalities of these names alone."""
    return TOKENIZER.layout({name: SHAPES[setting][name] for name in names},
                            {name: CODES[setting].get(name, 0) for name in names})


def pack(setting, rows=ROWS, spans=None, length=LENGTH, finished=True, table=None, layout=None):
    rows = [[data.tokenize(document, TOKENIZER) for document in row] for row in rows]
    return data.pack(rows, length, layout or LAYOUT[setting], POSITIONS, table or signals(setting),
                     spans, finished)


def prompts(setting, documents, layout=None):
    return data.pack_prompts(documents, TOKENIZER, layout or LAYOUT[setting], POSITIONS,
                             signals(setting))


def untrained(setting, towers=None, layout=None, **options):
    """A host as it is shipped; with towers, MoT in that host."""
    layout = layout or LAYOUT[setting]
    dense, config, mixture = {
        "transfusion": (transfusion.Transfusion, transfusion.TransfusionConfig, mot.MoTTransfusion),
        "chameleon": (chameleon.Chameleon, chameleon.ChameleonConfig, mot.MoTChameleon)}[setting]
    torch.manual_seed(0)
    if towers:
        return mixture(config(**SIZE), layout, towers=towers, **options)
    return dense(config(**SIZE, **options), layout)


def randomise(model, seed=0):
    """No weight stays at zero or one, so that every part of the model has a say."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    return model.eval()


def model(setting, towers=None, **options):
    return randomise(untrained(setting, towers, **options))


def times(batch, seed=0):
    """A time for every span of a batch of latents."""
    random = torch.Generator().manual_seed(seed)
    return [x if x is None else torch.rand(len(x), generator=random) for x in batch.signals]


def hidden(model, batch):
    """Hidden states (B, T, D) of either host."""
    latents = any(x is not None for x in batch.signals)
    is_transfusion = isinstance(model, transfusion.Transfusion)
    assert is_transfusion or not latents
    with torch.no_grad():
        return model(batch, times(batch)) if is_transfusion else model(batch)


def reaches(batch, whole_spans):
    """(B, T, T): may what stands at j change anything at i? A loop over what the papers say."""
    B, T = batch.tokens.shape
    allowed = torch.zeros(B, T, T, dtype=torch.bool)
    document, span = batch.document.tolist(), batch.span.tolist()
    for b in range(B):
        for i in range(T):
            for j in range(T):
                same_span = whole_spans and span[b][i] == span[b][j] > 0
                allowed[b, i, j] = document[b][i] == document[b][j] and (j <= i or same_span)
    return allowed


def check_grammar(row, start, size, spans, layout, is_content):
    """Assert that a generated row is text, whole spans, and an end; -> the kinds of its spans."""
    at, kinds, text = start, [], range(layout.text)
    while at < size:
        token, at = row[at], at + 1
        kind = layout.begin.index(token) if token in layout.begin else 0
        if kind:
            assert at - 1 + POSITIONS[kind] + 2 <= size, "a span was begun that does not fit"
        if token == layout.eos or (kind and len(kinds) == spans):
            assert set(row[at:]) <= {layout.pad}
            break
        if not kind:
            assert token in text
            continue
        stop = at + POSITIONS[kind]
        assert all(is_content(kind, i) for i in row[at:stop]) and row[stop] == layout.end[kind]
        kinds.append(kind)
        at = stop + 1
    return kinds


class Dice(torch.nn.Module):
    """A head that knows nothing, but likes some ids."""

    def __init__(self, layout, likes=()):
        super().__init__()
        self.bonus = torch.zeros(layout.size)
        self.bonus[list(likes)] = 6.0

    def forward(self, hidden):
        return 2 * torch.randn(*hidden.shape[:-1], len(self.bonus)) + self.bonus


def memorise(model, batch, steps=250, lr=1e-2):
    """Train on one batch with the same noise in each step -> the last loss and its parts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        torch.manual_seed(0)
        loss, parts = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), {name: value.item() for name, value in parts.items()}


def floor(rows, counted):
    """The least mean over the counted targets: which document follows <bos> cannot be known."""
    documents = sum(len(row) for row in rows)
    return documents * math.log(documents) / int(counted.sum())


def turned(x, positions, theta):
    """RoPE of one head x (S, h), by loops: the pair (i, i + h/2) turns by p theta^(-2i/h)."""
    x, half = x.tolist(), x.shape[1] // 2
    out = torch.zeros(len(x), 2 * half, dtype=torch.float64)
    for s, position in enumerate(positions.tolist()):
        for i in range(half):
            a, b, angle = x[s][i], x[s][i + half], position * theta ** (-2 * i / (2 * half))
            out[s, i] = a * math.cos(angle) - b * math.sin(angle)
            out[s, i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out
