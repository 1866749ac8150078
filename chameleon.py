"""Chameleon: every modality is discrete tokens in one stream, one transformer, one softmax.

A picture is 64 ids of a VQ-VAE's codes between <boi> and <eoi>. The model is a language model
over text and codes alike: it learns by next-token prediction, and draws by predicting codes.

Paper: Chameleon Team, "Chameleon: Mixed-Modal Early-Fusion Foundation Models" (arXiv 2405.09818).
As in the paper: early fusion, Llama blocks (RMSNorm, SwiGLU, RoPE, no biases) with QK-norm, z-loss
1e-5, and generation that allows, at each step, only ids of the modality in turn (Sec. 2.4).
As in its released code: guidance on the logits of the codes; LayerNorm over each head of q and k.
Added: a learned place for each code of a picture, beside the rotary positions; places that begin as
rows and columns, and codes as their vectors in the codebook; noise on the codes of a picture that
is being learned, without which words bind to places very late; and a larger weight for words about
a picture before them, of which reading needs every one.
Left out: norm re-ordering and dropout (needed from 7B parameters up), grouped queries (34B).

    python chameleon.py           one real batch, taken apart: seconds, no training
    python train.py chameleon     train it: minutes on a laptop

Symbols: B rows, T positions, D width, H heads, h head width, S new positions beside a cache, L
positions in the cache, N positions of all rows, V ids of the vocabulary. Masks: True = may attend.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class ChameleonConfig:
    width: int = 128                # D; the paper's 7B model has 4096
    depth: int = 4                  # blocks; the 7B model has 32
    heads: int = 8                  # H; the 7B model has 32
    hidden: int = 352               # of the SwiGLU, about 8 D / 3 as in Llama
    rope_theta: float = 10_000.0    # base of the rotary frequencies
    z_loss: float = 1e-5            # weight of (log Z)^2 (Sec. 2.3)
    reading_weight: float = 8.0     # in the loss, of a word behind a picture to be read; others: 1
    text_only_weight: float = 1.0   # of a word of a document of words alone
    shown_weight: float = 1.0       # of a code that opens its document: a picture to be read
    code_noise: float = 0.6         # largest share of a drawn image's codes replaced in its input


# --- the idea ------------------------------------------------------------------------------------

def attention_mask(document):
    """Causal, never across documents: images are tokens like any others.

    document (B, T) -> (B, 1, T, T), True where position i (row) may attend to position j (column).
    """
    T = document.shape[1]
    i, j = torch.arange(T, device=document.device)[:, None], torch.arange(T, device=document.device)
    same_document = document[:, :, None] == document[:, None, :]                    # (B, T, T)
    return ((j <= i) & same_document)[:, None]                                      # (B, 1, T, T)


def z_loss(logits):
    """(log Z)^2, Z = sum_i exp(logit_i): keeps logits from drifting (Sec. 2.3); (N, V) -> (N,)."""
    return logits.logsumexp(-1).square()


def replace_codes(tokens, share, codes):
    """Each code gives way to a random one with probability `share`: what the model sees, not what
    it shall say.

    A code is mostly known from its neighbours, so next-token prediction learns texture first and
    words last. Where neighbours are wrong, only the caption helps. tokens, share (...); codes
    (first, last + 1), the ids to draw from.
    """
    strange = torch.randint(*codes, tokens.shape, device=tokens.device)
    return torch.where(torch.rand(tokens.shape, device=tokens.device) < share, strange, tokens)


def allow(logits, layout, kind, left, room):
    """The modality state machine (Sec. 2.4): mask out every id whose turn it is not.

    kind (B,): the modality of the span that is being written, 0 in text; left (B,): codes it still
    needs; room (B,): positions left in the row. logits (B, V) -> (B, V), -inf where not allowed.
    """
    ids = torch.arange(logits.shape[1], device=logits.device)
    text = (ids < layout.text) | (ids == layout.eos)
    allowed = text.expand_as(logits)                                                # (B, V)
    for m, shape in enumerate(layout.shapes):
        if shape:
            fits = room >= math.prod(shape[1:]) + 2     # its codes and its end, beside its begin
            allowed = allowed | ((fits & (kind == 0))[:, None] & (ids == layout.begin[m]))
            code = (ids >= layout.codes[m][0]) & (ids < layout.codes[m][1])
            inside = torch.where(left[:, None] > 0, code, ids == layout.end[m])
            allowed = torch.where((kind == m)[:, None], inside, allowed)
    return logits.masked_fill(~allowed, -math.inf)


def guide(conditional, unconditional, guidance):
    """Classifier-free guidance: u + s (c - u), so 1 is no guidance (arXiv 2207.12598, Eq. 6)."""
    return unconditional + guidance * (conditional - unconditional)


# --- layers --------------------------------------------------------------------------------------

def rotary(positions, head_width, theta):
    """RoPE (arXiv 2104.09864): positions (B or 1, S) -> cos, sin (B or 1, S, 1, h / 2)."""
    exponent = torch.arange(0, head_width, 2, device=positions.device) / head_width
    angle = positions[..., None, None] * theta ** -exponent
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Turn each pair (a, b) of x (B, S, H, h) by its position's angle."""
    cos, sin = rope
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(h)) v on (B, S, H, h) tensors, fused."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                # (B, H, S, h)
    if q.device.type == "cpu":      # the backward of bf16 attention is many times slower on a CPU
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)
    else:
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)                           # (B, S, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.q_norm = nn.LayerNorm(config.width // config.heads)    # shared by heads, before RoPE,
        self.k_norm = nn.LayerNorm(config.width // config.heads)    # as in the released code
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rope, mask, cache=None):
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).unbind(2)  # (B, S, H, h)
        q, k = self.q_norm(q), self.k_norm(k)       # bounds the logits of attention (Sec. 2.3)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self, k, v)                         # (B, L, H, h)
        return self.out(attend(q, k, v, mask))


class FeedForward(nn.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.ffn = FeedForward(config)

    def forward(self, x, rope, mask, cache=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Cache:
    """Keys and values of all blocks, B rows of different lengths, up to `size` positions each."""

    def __init__(self, B, size, device):
        self.size, self.kept = size, {}
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)

    def positions(self, S):
        """The next S positions of each row, (B, S)."""
        return self.lengths[:, None] + torch.arange(S, device=self.lengths.device)

    def append(self, layer, k, v):
        """Write k, v (B, S, H, h) after what each row has; kept only if `lengths` then grows."""
        if layer not in self.kept:
            self.kept[layer] = [k.new_zeros(len(k), self.size, *k.shape[2:]) for _ in "kv"]
        rows = torch.arange(len(k), device=k.device)[:, None]
        for kept, new in zip(self.kept[layer], (k, v)):
            kept[rows, self.positions(k.shape[1])] = new.to(kept.dtype)
        return [kept[:, :self.used] for kept in self.kept[layer]]

    def double(self):
        """Each row once more, of which its first position alone is kept: <bos>."""
        self.kept = {layer: [x.repeat(2, 1, 1, 1) for x in kept]
                     for layer, kept in self.kept.items()}
        self.lengths = torch.cat([self.lengths, torch.ones_like(self.lengths)])

    def mask(self, mask):
        """The mask among S new positions (B, 1, S, S) -> over all that is kept (B, 1, S, L)."""
        S = mask.shape[-1]
        self.used = int(self.lengths.max()) + S             # L: beyond it no row has anything
        j = torch.arange(self.used, device=mask.device) - self.lengths[:, None]   # (B, L)
        j = j[:, None, None, :].expand(-1, 1, S, -1)                              # (B, 1, S, L)
        return (j < 0) | (mask.gather(3, j.clamp(0, S - 1)) & (j < S))


def average(values, weights):
    """The weighted mean; nan without any weight."""
    return (values * weights).sum() / weights.sum()


def choose(logits, temperature):
    """logits (B, V) -> (B,): the best at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax(-1)
    share = (logits / temperature).softmax(-1).cumsum(-1)       # one random number a row: drawing
    number = torch.rand(len(share), 1, device=share.device)     # one for each id is much slower
    return (share / share[:, -1:] <= number).sum(-1)


def start_places(h, w, width):
    """How the places of a grid of codes begin, (h w, D): a row and a column, added, and some noise.

    Rows and columns are sines and cosines of periods 2, 4, 8, ... through a random projection, so
    that near places begin near each other, and so do those of one place in a clip's frames.
    """
    def axis(n):
        period = 2.0 ** torch.arange(1, (2 * n).bit_length())
        angle = 2 * math.pi * torch.arange(n)[:, None] / period                 # (n, periods)
        waves = torch.cat([angle.sin(), angle.cos()], 1)
        return waves @ torch.randn(2 * len(period), width) / len(period) ** 0.5     # (n, D)
    # 2 x 0.32^2 + 0.2^2: together a deviation of 0.5, that of the embeddings they are added to
    places = 0.32 * (axis(h)[:, None] + axis(w)) + 0.2 * torch.randn(h, w, width)
    return places.flatten(0, 1)


# --- model ---------------------------------------------------------------------------------------

class Chameleon(nn.Module):
    def __init__(self, config, layout):
        """layout: data.Layout, id ranges and the shape (C, h, w) of each modality's codes."""
        super().__init__()
        self.config, self.layout = config, layout
        self.token_embedding = nn.Embedding(layout.size, config.width)
        # by modality, how many positions a span takes: one for each code
        self.span_lengths = [math.prod(shape[1:]) if shape else 0 for shape in layout.shapes]
        # places of all modalities, one after the other; 0 in text
        before = torch.tensor([0, *self.span_lengths[:-1]]).cumsum(0)
        self.register_buffer("places_before", before, persistent=False)
        self.place_embedding = nn.Embedding(1 + sum(self.span_lengths), config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, layout.size, bias=False)
        self.initialise()

    def initialise(self):
        """Unit-variance projections; every block starts as the identity, every output at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5)
        for block in self.blocks:
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.ffn.down.weight)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.place_embedding.weight, std=0.5)
        for kind, shape in enumerate(self.layout.shapes):
            if shape:
                first = 1 + int(self.places_before[kind])
                places = start_places(*shape[1:], self.config.width)
                self.place_embedding.weight.data[first:first + len(places)] = places
        nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def start_codes(self, kind, codebook):
        """Codes of a modality begin as what they stand for: what lies near in the tokenizer's
        codebook (K, C) begins near in the embedding and in the head, through random projections.
        """
        (K, C), random = codebook.shape, torch.Generator().manual_seed(kind)
        z = (codebook - codebook.mean(0)) / codebook.std(0).clamp(min=1e-6) / C ** 0.5
        seen, said, noise = (torch.randn(rows, self.config.width, generator=random)
                             for rows in (C, C, K))
        rows = slice(*self.layout.codes[kind])
        self.token_embedding.weight[rows] = 0.45 * z @ seen + 0.22 * noise
        self.head.weight[rows] = 0.5 * z @ said / self.config.width ** 0.5

    def backbone(self, x, batch, rope, mask, cache=None):
        """x (B, S, D) through all blocks; batch: what mot.py routes by."""
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        return self.norm(x)

    def forward(self, batch, cache=None):
        """Ids of text and codes alike -> hidden states (B, S, D)."""
        place = batch.place + self.places_before[batch.modality] * (batch.place > 0)    # (B, S)
        x = self.token_embedding(batch.tokens) + self.place_embedding(place)        # (B, S, D)
        mask = attention_mask(batch.document)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if cache is not None:
            mask, positions = cache.mask(mask), cache.positions(x.shape[1])
        rope = rotary(positions, self.config.width // self.config.heads, self.config.rope_theta)
        return self.backbone(x, batch, rope, mask, cache)

    def weights(self, batch):
        """What each target counts in the loss: 0 where there is none; (B, T).

        It depends on what stands before a target, not on what it is: the best prediction stays the
        same. (A document's first word weighs 1: as it tells whether spans will follow, what it is
        would matter.)
        """
        shown, span = batch.shown_positions(self.span_lengths), batch.modality > 0  # (B, T)
        before = attention_mask(batch.document)[:, 0]                               # (B, T, T)
        reading = (before & shown[:, None]).any(-1)                 # may look at what is shown
        alone = ~((before | before.mT) & span[:, None]).any(-1)     # in a document without spans
        alone &= batch.tokens != self.layout.bos
        words = torch.where(reading, self.config.reading_weight,
                            torch.where(alone, self.config.text_only_weight, 1.0))
        codes = torch.where(F.pad(shown[:, 1:], (0, 1)), self.config.shown_weight, 1.0)
        is_text = batch.targets < self.layout.first_code
        return torch.where(is_text, words, codes) * (batch.targets >= 0)

    def totals(self, batch):
        """What the loss divides by: the weight of all targets -> (1,)."""
        return self.weights(batch).sum()[None]

    def loss(self, batch, totals=None):
        """Next-token cross-entropy over the whole stream, z-loss -> (scalar, {name: scalar}).

        totals: of a larger batch, of which this is a part; then the parts' losses add up to its.
        """
        if self.training:
            batch = batch._replace(tokens=self.noisy(batch))
        logits = self.head(self(batch)).float().flatten(0, 1)                       # (B T, V)
        targets = batch.targets.flatten()
        counted = (targets >= 0).float()
        error = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        drift, totals = z_loss(logits), self.totals(batch) if totals is None else totals
        weighted = (error + self.config.z_loss * drift) * self.weights(batch).flatten()
        loss = weighted.sum() / totals[0].clamp(min=1)
        said = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        right = (said == logits.amax(-1)).float()       # an argmax is slower
        text = counted * (targets < self.layout.first_code)
        parts = {"text": average(error.detach(), text), "text_accuracy": average(right, text),
                 "log_z_squared": average(drift.detach(), counted)}
        kinds = F.pad(batch.modality[:, 1:], (0, 1)).flatten()      # those of the targets
        for kind, name in enumerate(("text", "image", "audio", "video")):
            if kind and self.layout.shapes[kind]:
                parts[name] = average(error.detach(), counted * (kinds == kind))
        return loss, parts

    def noisy(self, batch):
        """tokens (B, T) with codes replaced, a share of its own in each span, 0 to `code_noise`."""
        tokens = batch.tokens.flatten()[batch.order].split(batch.sizes)
        parts = [tokens[0]]
        for kind, codes in list(enumerate(self.layout.codes))[1:]:
            if len(tokens[kind]):
                share = self.config.code_noise * torch.rand(len(batch.shown[kind]), 1,
                                                            device=batch.tokens.device)
                share = share * ~batch.shown[kind][:, None]     # what is to be read: as it is
                seen = replace_codes(tokens[kind].view(len(share), -1), share, codes)
                parts.append(seen.flatten())
        return torch.cat(parts)[batch.inverse].view(batch.tokens.shape)

    # --- generate --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompt, size, spans=1, guidance=1.25, temperature=0.0, code_temperature=0.1):
        """Go on with each row, one id at a time, text and codes from the same softmax.

        prompt: a batch with one open document a row. size: most positions of a row in all.
        spans: how many spans a row may draw; it stops where it opens one more.
        temperature, code_temperature: of text, of codes; 0 is greedy.
        Returns tokens (B, size), <pad> after the end, and four times None (there are no latents).
        """
        B, device = len(prompt.tokens), prompt.tokens.device
        lengths = (prompt.document > 0).sum(1)
        tokens = F.pad(prompt.tokens, (0, size - prompt.tokens.shape[1]), value=self.layout.pad)
        cache, guided = Cache(B, size + 1, device), guidance != 1 and spans > 0
        self(prompt, cache)
        cache.lengths += lengths - 1            # the last id is run once more, below
        if guided:
            cache.double()                      # the null branch: <bos> <begin>, codes so far
        last = tokens.gather(1, lengths[:, None] - 1)[:, 0]                         # (B,)
        nothing = torch.zeros_like(last)
        kind, left, drawn, done = self.advance(last, nothing, nothing, nothing, spans)
        done |= lengths >= size
        counts, place = torch.tensor(self.span_lengths, device=device), nothing
        while not done.all():
            hidden = self.extend(prompt, cache, last, kind, place)                  # (B or 2 B, D)
            logits, inside = self.head(hidden).float(), kind > 0
            cache.lengths[:B] += ~done
            if guided:
                logits, alone = logits.chunk(2)                                     # (B, V)
                cache.lengths[B:] = torch.where(inside, cache.lengths[B:] + 1, 1)
                logits = torch.where(inside[:, None], guide(logits, alone, guidance), logits)
            logits = allow(logits, self.layout, kind, left, size - lengths)
            last = torch.where(inside, choose(logits, code_temperature),
                               choose(logits, temperature))
            end = lengths[:, None].clamp(max=size - 1)
            kept = tokens.gather(1, end)[:, 0]
            tokens.scatter_(1, end, torch.where(done, kept, last)[:, None])
            lengths = lengths + ~done
            kind, left, drawn, stopped = self.advance(last, kind, left, drawn, spans)
            place = counts[kind] - left                 # of a code within its span, else 0
            done = done | stopped | (lengths >= size)
        return tokens, [None] * 4

    def advance(self, last, kind, left, drawn, spans):
        """The state of each row after one more id: a span opens, goes on, or closes; all (B,)."""
        closed = (kind > 0) & (left == 0)
        left = torch.where(kind > 0, left - 1, left).clamp(min=0)
        kind, drawn = kind.masked_fill(closed, 0), drawn + closed
        stopped = last == self.layout.eos
        for m, shape in enumerate(self.layout.shapes):
            if shape:
                opened = (kind == 0) & (last == self.layout.begin[m])
                stopped = stopped | (opened & (drawn >= spans))
                kind = kind.masked_fill(opened, m)
                left = left.masked_fill(opened, self.span_lengths[m])
        return kind, left, drawn, stopped

    def extend(self, prompt, cache, last, kind, place):
        """Run the last id of each row (B,) after all that its cache has, which may have two rows
        for each -> (B or 2 B, D)."""
        copies = len(cache.lengths) // len(last)
        last, kind, place = (x.repeat(copies) for x in (last, kind, place))
        modality = kind * (last >= self.layout.first_code)          # brackets of a span are text
        order = modality.argsort(stable=True)           # which rows write codes; MoT routes by it
        sizes = tuple(torch.bincount(modality, minlength=4).tolist())
        step = prompt._replace(tokens=last[:, None], document=torch.ones_like(last)[:, None],
                               modality=modality[:, None], place=place[:, None], order=order,
                               inverse=order.argsort(), sizes=sizes)
        return self(step, cache)[:, 0]


def main():
    """Take one real batch apart, untrained."""
    from show import demo, tour
    batch, layout = demo("vq")
    torch.manual_seed(0)
    tour(Chameleon(ChameleonConfig(), layout), batch)


if __name__ == "__main__":
    main()
