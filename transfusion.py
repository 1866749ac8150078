"""Transfusion: predict the next token and diffuse images, in one transformer.

Text positions are ids and learn by next-token prediction; image positions are patches of
continuous latents and learn to be denoised. Attention is causal, except inside one image, whose
patches all see each other.

Paper: Zhou et al. 2024, "Transfusion" (arXiv 2408.11039).
As in the paper: one stream, Llama blocks, the mask (Sec. 3), linear patches of 2 x 2 latents, a
timestep embedding for each patch, loss = LM + 5 x diffusion, and guidance.
Instead of DDPM: rectified flow (arXiv 2209.03003), logit-normal times (SD3, arXiv 2403.03206).
Instead of noise of at most t = 0.5 on an image that stands before its caption (Table 8): none, and
so nothing to denoise; --shown-limit 0.5 is the paper's way.
Added: a learned place for each patch; a larger weight for words about an image before them, of
which reading needs every one (--reading-weight 1 is the paper's); sounds (as spectra), clips.
Left out: U-Net patch encoders, the GAN and LPIPS of its VAE.

    python transfusion.py           one real batch, taken apart: seconds, no training
    python train.py transfusion     train it: minutes on a laptop

Symbols: B rows, T positions, D width, H heads, h head width, S new positions beside a cache, L
positions in the cache, N signals, C latent channels, V ids of the vocabulary, P values of one patch
(2 * 2 * C), n patches of a span.
Masks: True = may attend. Time: t = 0 is data, t = 1 is noise.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class TransfusionConfig:
    width: int = 128                # D; the paper's smallest is 768
    depth: int = 4                  # blocks; the paper's smallest has 16
    heads: int = 8                  # H; with fewer, words bind to places more slowly
    hidden: int = 352               # of the SwiGLU, about 8 D / 3 as in Llama
    rope_theta: float = 10_000.0    # base of the rotary frequencies
    patch: int = 2                  # patch side, in latents; the paper's main choice, 2 x 2
    diffusion_weight: float = 5.0   # lambda of Eq. 4
    reading_weight: float = 5.0     # in the loss, of a word behind an image to be read; others: 1
    time_mean: float = 0.5          # of the logit of t in training; SD3's best is 0 (Table 1)
    time_std: float = 1.5           # and its deviation; SD3's best is 1
    shown_limit: float = 0.0        # most noise on an image that precedes its words; Table 8: 0.5


# --- the idea ------------------------------------------------------------------------------------

def attention_mask(span, document):
    """Causal, plus full attention inside each span, never across documents (Sec. 3, Fig. 4).

    span, document (B, T) -> (B, 1, T, T), True where i (row) may attend to j (column).
    """
    T = span.shape[1]
    i, j = torch.arange(T, device=span.device)[:, None], torch.arange(T, device=span.device)
    same_span = (span[:, :, None] == span[:, None, :]) & (span > 0)[:, :, None]     # (B, T, T)
    same_document = document[:, :, None] == document[:, None, :]                    # (B, T, T)
    return (((j <= i) | same_span) & same_document)[:, None]                        # (B, 1, T, T)


def add_noise(x_0, noise, t):
    """The straight path to noise: x_t = (1 - t) x_0 + t eps. Its velocity is eps - x_0."""
    return (1 - t) * x_0 + t * noise, noise - x_0


def sample_times(count, mean, std, device):
    """Logit-normal times in (0, 1): t = sigmoid(u), u ~ N(mean, std^2) (SD3, Sec. 3.1).

    A mean above 0 favours strong noise, under which only the caption tells what the image should
    be; a wide deviation keeps enough of the weak noise, under which edges become sharp.
    """
    return (mean + std * torch.randn(count, device=device)).sigmoid()


def guide(conditional, unconditional, guidance):
    """Classifier-free guidance: u + s (c - u), so 1 is no guidance (arXiv 2207.12598, Eq. 6)."""
    return unconditional + guidance * (conditional - unconditional)


def patchify(latents, patch):
    """(N, C, height, width) -> (N, n, P): raster order of patches, each flattened.

    Frames of a clip stand one below the other, so that raster order is the order of time.
    """
    N, C, height, width = latents.shape
    x = latents.reshape(N, C, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(N, -1, C * patch * patch)


def unpatchify(patches, shape, patch):
    """(N, n, P) -> (N, C, height, width), the inverse; shape is (C, height, width)."""
    C, height, width = shape
    x = patches.reshape(-1, height // patch, width // patch, C, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, C, height, width)


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
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x, rope, mask, cache=None):
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).unbind(2)  # (B, S, H, h)
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


class TimeEmbedding(nn.Module):
    """t (N,) in [0, 1] -> (N, D): sinusoids, then two layers, as in DDPM."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.width // 2
        angle = 1000 * t[:, None] * 10_000 ** (-torch.arange(half, device=t.device) / half)
        return self.layers(torch.cat([angle.cos(), angle.sin()], dim=-1))


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


# --- model ---------------------------------------------------------------------------------------

class Transfusion(nn.Module):
    def __init__(self, config, layout):
        """layout: data.Layout, id ranges and the shape (C, height, width) of each modality's
        latents."""
        super().__init__()
        self.config, self.layout, D = config, layout, config.width
        self.token_embedding = nn.Embedding(layout.size, D)
        self.patch_in, self.patch_out = nn.ModuleDict(), nn.ModuleDict()
        self.patch_place = nn.ParameterDict()           # (n, D), learned
        self.span_lengths = [0] * len(layout.shapes)    # by modality, positions that a span takes
        for kind, shape in enumerate(layout.shapes):
            if shape:
                n = self.span_lengths[kind] = shape[1] * shape[2] // config.patch ** 2
                P = math.prod(shape) // n
                self.patch_in[str(kind)] = nn.Linear(P, D)
                self.patch_out[str(kind)] = nn.Linear(D, P)
                self.patch_place[str(kind)] = torch.zeros(n, D)
        self.time_embedding = TimeEmbedding(D)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.head = nn.Linear(D, layout.size, bias=False)
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
        nn.init.zeros_(self.head.weight)
        for place in self.patch_place.values():
            nn.init.normal_(place, std=0.5)
        for out in self.patch_out.values():
            nn.init.zeros_(out.weight)

    def backbone(self, x, batch, rope, mask, cache=None):
        """x (B, S, D) through all blocks; batch: what mot.py routes by."""
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        return self.norm(x)

    def forward(self, batch, times, cache=None):
        """Ids of text, patches of the rest -> hidden states (B, S, D).

        batch.signals: latents that are noised already; times: by modality, t of each span (spans,).
        """
        B, S = batch.tokens.shape
        parts = [self.token_embedding(batch.tokens.flatten()[batch.order[:batch.sizes[0]]])]
        for kind, (latents, t) in enumerate(zip(batch.signals, times)):
            if latents is not None:
                x = self.patch_in[str(kind)](patchify(latents, self.config.patch))  # (spans, n, D)
                x = x + self.patch_place[str(kind)] + self.time_embedding(t)[:, None]
                parts.append(x.flatten(0, 1))
        x = torch.cat(parts)[batch.inverse].view(B, S, -1)      # by modality -> (B, S, D)
        mask = attention_mask(batch.span, batch.document)
        positions = torch.arange(S, device=x.device)[None]
        if cache is not None:
            mask, positions = cache.mask(mask), cache.positions(S)
        rope = rotary(positions, self.config.width // self.config.heads, self.config.rope_theta)
        return self.backbone(x, batch, rope, mask, cache)

    @property
    def limit(self):
        """Of the noise on spans that are to be read; in evaluation they are seen as they are."""
        return self.config.shown_limit if self.training else 0.0

    def noised(self, batch, kind):
        """1 for spans (N,) that the diffusion loss counts, 0 for padding and for what is clean."""
        return batch.real[kind] if self.limit else batch.real[kind] * ~batch.shown[kind]

    def weights(self, batch):
        """What each target of text counts in the loss: 0 where there is none; (text positions,).

        It depends on where a target stands, not on what it is: the best prediction stays the same.
        """
        shown = batch.shown_positions(self.span_lengths)                            # (B, T)
        mask = attention_mask(batch.span, batch.document)[:, 0]
        reading = (mask & shown[:, None]).any(-1)                                   # may look at it
        words = torch.where(reading, self.config.reading_weight, 1.0) * (batch.targets >= 0)
        return words.flatten()[batch.order[:batch.sizes[0]]]

    def totals(self, batch):
        """What the loss divides by: the weight of all words, and patches of the rest -> (2,)."""
        text = self.weights(batch).sum()
        patches = sum(batch.real[kind].sum() * self.span_lengths[kind]
                      for kind, shape in enumerate(self.layout.shapes) if shape)
        return torch.stack([text, text * 0 + patches]).float()      # a tensor without spans, too

    def loss(self, batch, totals=None):
        """L = L_LM + lambda L_diffusion (Eq. 4) -> (scalar, {name: scalar}).

        totals: of a larger batch, of which this is a part; then the parts' losses add up to its.
        """
        totals = (self.totals(batch) if totals is None else totals).clamp(min=1)
        noisy, velocities, times = [None] * 4, [None] * 4, [None] * 4
        for kind, x_0 in enumerate(batch.signals):
            if x_0 is not None:
                t = sample_times(len(x_0), self.config.time_mean, self.config.time_std, x_0.device)
                t = torch.where(batch.shown[kind], t * self.limit, t)
                times[kind], noise = t, torch.randn_like(x_0)
                noisy[kind], velocities[kind] = add_noise(x_0, noise, t[:, None, None, None])
        hidden = self(batch._replace(signals=tuple(noisy)), times)
        by_modality = hidden.flatten(0, 1)[batch.order].split(batch.sizes)     # (positions, D)
        targets = batch.targets.flatten()[batch.order[:batch.sizes[0]]]
        logits = self.head(by_modality[0]).float()                         # (text positions, ids)
        error = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        loss = (error * self.weights(batch)).sum() / totals[0]
        counted = (targets >= 0).float()
        said = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        right = (said == logits.amax(-1)).float()               # an argmax is slower
        parts = {"text": average(error.detach(), counted), "text_accuracy": average(right, counted)}
        for kind, velocity in enumerate(velocities):
            if velocity is not None:
                predicted = self.patch_out[str(kind)](by_modality[kind]).float()
                target = patchify(velocity, self.config.patch).flatten(0, 1)
                error = (predicted - target).square().view(len(velocity), -1).mean(1)    # (spans,)
                noised = self.noised(batch, kind)
                share = (error * noised).sum() * self.span_lengths[kind] / totals[1]
                loss = loss + self.config.diffusion_weight * share      # a clean patch adds 0
                parts |= self.by_noise(kind, error.detach(), times[kind], noised)
        return loss, parts

    def by_noise(self, kind, error, t, noised):
        """The diffusion loss of a modality, whole and by quarter of t (nan where one is empty)."""
        name = ("text", "image", "audio", "video")[kind]
        parts = {name: average(error, noised)}
        for quarter in range(4):
            inside = noised * (t * 4).long().eq(quarter)
            parts[f"{name}_noise_{quarter}"] = average(error, inside)
        return parts

    # --- generate -------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompt, size, spans=1, steps=16, guidance=1.5, temperature=0.0):
        """Go on with each row, which itself switches between next tokens and diffusion (Sec. 3).

        prompt: a batch with one open document a row, latents clean. size: most positions of a row.
        spans: how many spans a row may draw; it stops at the next. temperature: of text.
        Returns tokens (B, size), <pad> after the end and where latents stand, and the latents drawn
        in each row, by modality (B, spans, C, h, w) or None.
        """
        B, device = len(prompt.tokens), prompt.tokens.device
        lengths, drawn = (prompt.document > 0).sum(1), torch.zeros_like(prompt.tokens[:, 0])
        tokens = F.pad(prompt.tokens, (0, size - prompt.tokens.shape[1]), value=self.layout.pad)
        latents = [shape and torch.zeros(B, spans, *shape, device=device)
                   for shape in self.layout.shapes]
        longest = max(1, *self.span_lengths)
        cache, null = (Cache(B, size + longest, device) for _ in range(2))
        clean = [x if x is None else torch.zeros(len(x), device=device) for x in prompt.signals]
        hidden = self(prompt, clean, cache)                                         # (B, S, D)
        hidden = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))
        cache.lengths += lengths
        # the null branch of guidance: a document in which nothing stands before the span
        self.extend(prompt, null, 1, torch.full_like(tokens[:, :1], self.layout.bos))
        last = tokens.gather(1, lengths[:, None] - 1)                               # (B, 1)
        state = self.next_state(last[:, 0], drawn < spans, lengths < size)
        while (state >= 0).any():       # by row: 0 writes text, k > 0 draws modality k, -1 is done
            active = (state == 0).long()
            if active.any():            # language modelling, until every row draws or is done
                logits = self.text_logits(self.head(hidden[:, -1]).float(), size - lengths)
                last = choose(logits, temperature)[:, None]
            else:                       # diffusion, of all rows that draw this modality
                kind = int(state.max())
                active = (state == kind).long()
                x_0 = self.denoise(prompt, kind, cache, null, steps, guidance)
                self.extend(prompt, cache, active, kind=kind, latents=x_0)      # clean: context now
                ends, rows = self.layout.end[kind], active.nonzero()[:, 0]
                before = (tokens == ends).sum(1) - (prompt.tokens == ends).sum(1)   # of this kind
                latents[kind][rows, before[rows]] = x_0[rows]
                lengths, drawn = lengths + active * self.span_lengths[kind], drawn + active
                last = torch.full_like(last, self.layout.end[kind])
            end = lengths[:, None].clamp(max=size - 1)
            kept = tokens.gather(1, end)
            tokens.scatter_(1, end, torch.where(active[:, None] > 0, last, kept))
            lengths = lengths + active
            hidden = self.extend(prompt, cache, active, last)
            after = self.next_state(last[:, 0], drawn < spans, lengths < size)
            state = torch.where(active > 0, after, state)
        return tokens, latents

    def next_state(self, last, may_draw, has_room):
        """The state of rows (B,) after their last token: draw after a <begin>, stop after <eos>."""
        state = torch.zeros_like(last)
        for kind, begin in enumerate(self.layout.begin):
            if begin is not None:
                state = torch.where(last == begin, torch.where(may_draw, kind, -1), state)
        return torch.where((last != self.layout.eos) & has_room, state, -1)

    def text_logits(self, logits, room):
        """After text: text, <eos>, or the <begin> of a span that still fits; logits (B, ids)."""
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        allowed[:, :self.layout.text] = allowed[:, self.layout.eos] = True
        for kind, shape in enumerate(self.layout.shapes):
            if shape:
                allowed[:, self.layout.begin[kind]] = room >= self.span_lengths[kind] + 2
        return logits.masked_fill(~allowed, -math.inf)

    def extend(self, prompt, cache, keep, tokens=None, kind=0, latents=None, t=0.0):
        """Run S positions of one modality after the cache -> (B, S, D); `keep` rows keep them."""
        B, device = len(prompt.tokens), prompt.tokens.device
        signals, times = [None] * 4, [None] * 4
        if kind:
            tokens = torch.full((B, self.span_lengths[kind]), self.layout.pad, device=device)
            signals[kind], times[kind] = latents, torch.full((B,), t, device=device)
        order = torch.arange(tokens.numel(), device=device)
        sizes = tuple(tokens.numel() if m == kind else 0 for m in range(4))
        step = prompt._replace(tokens=tokens, span=torch.full_like(tokens, kind), order=order,
                               document=torch.ones_like(tokens), inverse=order, sizes=sizes,
                               signals=tuple(signals))
        hidden = self(step, times, cache)
        cache.lengths += keep * tokens.shape[1]
        return hidden

    def denoise(self, prompt, kind, cache, null, steps, guidance):
        """Euler steps from noise (t = 1) to data (t = 0), guided off a span without context."""
        B, shape = len(prompt.tokens), self.layout.shapes[kind]
        x = torch.randn(B, *shape, device=prompt.tokens.device)
        begin = torch.full((B, 1), self.layout.begin[kind], device=x.device)
        self.extend(prompt, null, 1, begin)                     # <bos> <begin>, and nothing else
        for step in range(steps):
            t = 1 - step / steps
            velocity = self.velocity(prompt, cache, kind, x, t)
            if guidance != 1:
                velocity = guide(velocity, self.velocity(prompt, null, kind, x, t), guidance)
            x = x - velocity / steps
        null.lengths -= 1
        return x

    def velocity(self, prompt, cache, kind, x, t):
        hidden = self.extend(prompt, cache, 0, kind=kind, latents=x, t=t)
        patches = self.patch_out[str(kind)](hidden).float()                     # (B, n, P)
        return unpatchify(patches, self.layout.shapes[kind], self.config.patch)


def main():
    """Take one real batch apart, untrained."""
    from show import demo, tour
    batch, layout = demo("kl")
    torch.manual_seed(0)
    tour(Transfusion(TransfusionConfig(), layout), batch)


if __name__ == "__main__":
    main()
