"""VQ-VAE and its continuous twin: one convolutional autoencoder, two bottlenecks.

  signal (3, 32, 32) -> encoder -> z_e (C, 8, 8) -> bottleneck -> z_q (C, 8, 8) -> decoder -> signal
                                                 |
            "vq": each of the 64 vectors becomes the nearest of 512 codes   (Chameleon's tokens)
            "kl": each is the mean of a Gaussian, hardly squeezed           (Transfusion's latents)

Papers: van den Oord et al. 2017, "Neural Discrete Representation Learning" (arXiv 1711.00937);
Rombach et al. 2021, "Latent Diffusion" (arXiv 2112.10752) for the KL twin.
As in the paper: nearest code, straight-through gradient, commitment 0.25.
Instead of the codebook loss, the paper's own alternative: an EMA codebook (App. A.1).
Added: dead codes restart at an encoder output (Jukebox, arXiv 2005.00341, Sec. 3); the kl
decoder learns from noisy latents (RAE, arXiv 2510.11690), since drawn ones are a little off.
Left out: perceptual and adversarial losses (VQGAN); our pictures are flat enough without them.
The encoder and decoder are the same for both, so that what quantizing loses can be seen alone:
trained alike (--bottleneck kl --latent-noise 0 --steps 2000), the difference in PSNR.
Sound is a picture too: `spectrum` makes one of a waveform, `waveform` undoes it (Griffin-Lim). A
clip is its frames in turn. All are this class, with other sizes (autoencoders.py).

    python vqvae.py                          the idea on one batch, untrained, in seconds
    python train.py vqvae                    train the discrete one: ~35 dB, every code in use
    python train.py vqvae --bottleneck kl    train the continuous one: ~36 dB

Symbols: B batch, C latent channels, K codes, h x w latent grid, z_e encoder output, z_q quantized.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VQVAEConfig:
    bottleneck: str = "vq"              # "vq" (discrete codes) or "kl" (continuous latents)
    channels: int = 3                   # of the signal: RGB
    size: tuple = (32, 32)              # of the signal: height, width in pixels
    strides: tuple = ((2, 2), (2, 2))   # of the down-sampling convolutions: 32 x 32 -> 8 x 8
    widths: tuple = (32, 128)           # channels after each of them
    blocks: int = 2                     # residual blocks at each resolution
    latent_channels: int = 6            # C; fewer are easier to model, more to rebuild from
    codes: int = 512                    # K; VQ-VAE Sec. 4.1 uses 512, Chameleon 8192
    commitment: float = 0.25            # beta of Eq. 3; the paper found 0.1 to 2 alike
    codebook_decay: float = 0.99        # gamma of App. A.1
    dead_below: float = 0.1             # restart a code chosen less often than this per batch
    kl_weight: float = 1e-4             # per element; nearly no bottleneck, as in latent diffusion
    latent_noise: float = 0.3           # most that the kl decoder learns from, in deviations

    @property
    def grid(self):
        """(h, w) of the latents."""
        down = [math.prod(stride[axis] for stride in self.strides) for axis in (0, 1)]
        return self.size[0] // down[0], self.size[1] // down[1]


# --- the idea ------------------------------------------------------------------------------------

def quantize(z_e, codebook):
    """Nearest code by Euclidean distance (Eq. 1-2).

    z_e (..., C), codebook (K, C) -> codes (...) int64, z_q (..., C).
    """
    with torch.autocast(z_e.device.type, enabled=False):    # in bf16, near codes would be confused
        # ||z - e||^2 = ||z||^2 - 2 z.e + ||e||^2, and ||z||^2 does not depend on the code
        distance = codebook.square().sum(-1) - 2 * z_e @ codebook.T             # (..., K)
    codes = distance.argmin(-1)
    return codes, codebook[codes]


def straight_through(z_e, z_q):
    """z_q in the forward pass, the gradient of z_e in the backward pass (Sec. 3.2)."""
    return z_e + (z_q - z_e).detach()


def ema_codebook(z_e, codes, count, total, decay):
    """One step of the EMA codebook (App. A.1): every code moves to the mean of what chose it.

    z_e (N, C), codes (N,), count (K,), total (K, C) -> the new count and total; e = total / count.
        N_i <- gamma N_i + (1 - gamma) n_i        m_i <- gamma m_i + (1 - gamma) sum of its z_e
    """
    with torch.autocast(z_e.device.type, enabled=False):    # averages over many batches need fp32
        chosen = F.one_hot(codes, count.numel()).to(z_e.dtype)                  # (N, K)
        n, summed = chosen.sum(0), chosen.T @ z_e
        if dist.is_initialized():       # sums over the batches of all processes
            dist.all_reduce(n)
            dist.all_reduce(summed)
        return count * decay + (1 - decay) * n, total * decay + (1 - decay) * summed


def kl_to_unit_gaussian(mean, log_variance):
    """KL(N(mean, variance) || N(0, 1)) of each element, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


# --- sound as a picture --------------------------------------------------------------------------

WINDOW, HOP, BINS = 256, 128, 128       # samples of a frame, between frames; rows of a picture
QUIET, LOUD = 0.03, 20.0                    # the magnitudes that become -1 and 1


def transform(waves):
    """Short-time Fourier transform: (N, samples) -> (N, frames, BINS), complex. The highest bin,
    half the sampling rate, is left out."""
    frames = F.pad(waves, (HOP // 2, HOP // 2)).unfold(1, WINDOW, HOP)        # (N, frames, WINDOW)
    return torch.fft.rfft(frames * torch.hann_window(WINDOW, device=waves.device))[..., :BINS]


def untransform(bins):
    """(N, frames, BINS) -> (N, samples): the waveform whose transform is nearest (Eq. 6 of Griffin
    and Lim 1984, "Signal Estimation from Modified Short-Time Fourier Transform")."""
    def overlap(frames):        # a sample is in one frame's first half, and in another's last
        early, late = frames.unflatten(2, (2, HOP)).unbind(2)               # (N, frames, HOP) each
        return (F.pad(early, (0, 0, 0, 1)) + F.pad(late, (0, 0, 1, 0))).flatten(1)
    window = torch.hann_window(WINDOW, device=bins.device)
    frames = torch.fft.irfft(bins, n=WINDOW) * window                         # (N, frames, WINDOW)
    weight = overlap(window.square().expand_as(frames[:1])).clamp(min=1e-3)
    return (overlap(frames) / weight)[:, HOP // 2:-(HOP // 2)]


def spectrum(waves):
    """Waveforms (N, 1, samples) -> pictures (N, 1, BINS, samples / HOP) in [-1, 1]: how loud each
    frequency is along time, on a logarithmic scale. Phases are left out."""
    magnitude = transform(waves[:, 0]).abs().clamp(QUIET, LOUD)                 # (N, frames, BINS)
    return 2 * ((magnitude / QUIET).log() / math.log(LOUD / QUIET)).transpose(1, 2)[:, None] - 1


def waveform(spectra, rounds=60):
    """The inverse of `spectrum`, up to phases, which are guessed until they fit one another:
    keep the magnitudes, take the phases of the nearest waveform, again and again (Griffin-Lim)."""
    level = (spectra[:, 0].transpose(1, 2) + 1) / 2                             # (N, frames, BINS)
    magnitude = QUIET * (LOUD / QUIET) ** level
    guess = torch.randn(*level.shape[1:], generator=torch.Generator().manual_seed(0))
    phases = torch.polar(torch.ones_like(guess), math.pi * guess).to(spectra.device)   # of length 1
    for _ in range(rounds):
        bins = transform(untransform(magnitude * phases))
        phases = bins / bins.abs().clamp(min=1e-8)
    return untransform(magnitude * phases)[:, None]


# --- layers --------------------------------------------------------------------------------------

class ResidualBlock(nn.Module):
    """x + conv1x1(silu(conv3x3(silu(x)))): VQ-VAE Sec. 4.1, but SiLU; it starts as the identity."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.project = nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x):
        return x + self.project(F.silu(self.conv(F.silu(x))))


class CodebookBottleneck(nn.Module):
    """z_e -> z_q among K codes. The codebook is learned by moving averages, kept in fp32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # count 0 marks every code as dead, so the first batch places them all: data-dependent init
        self.register_buffer("count", torch.zeros(config.codes))
        self.register_buffer("total", torch.zeros(config.codes, config.latent_channels))
        self.register_buffer("codebook", torch.zeros(config.codes, config.latent_channels))

    def forward(self, z_e):                                                     # (B, C, h, w)
        z_e = z_e.float().permute(0, 2, 3, 1)                                   # (B, h, w, C)
        if self.training:
            self.revive(z_e.detach().flatten(0, 2))
        codes, z_q = quantize(z_e, self.codebook)
        commitment = F.mse_loss(z_e, z_q)       # the codebook is a buffer: only the encoder moves
        if self.training:
            self.update(z_e.detach().flatten(0, 2), codes.flatten())
        z_q = straight_through(z_e, z_q).permute(0, 3, 1, 2)                    # (B, C, h, w)
        return z_q, self.config.commitment * commitment, {"commitment": commitment}

    @torch.no_grad()
    def revive(self, z_e):
        """Codes that (almost) nothing chooses any more restart at encoder outputs: the likelier at
        one, the farther from it all codes are (k-means++), so that few share a plain background."""
        dead = self.count < self.config.dead_below
        error = (z_e - quantize(z_e, self.codebook)[1]).square().sum(1)                 # (N,)
        error = error.nan_to_num(0.0).clamp(1e-12, 1e30)    # of what is not finite the trainer says
        picks = z_e[torch.multinomial(error, self.config.codes, replacement=True)]      # (K, C)
        if dist.is_initialized():       # several processes have one codebook: the first one's picks
            dist.broadcast(picks, 0)
        self.codebook.copy_(torch.where(dead[:, None], picks, self.codebook))
        self.total.copy_(torch.where(dead[:, None], picks, self.total))
        self.count.masked_fill_(dead, 1.0)

    @torch.no_grad()
    def update(self, z_e, codes):
        count, total = ema_codebook(z_e, codes, self.count, self.total, self.config.codebook_decay)
        self.count.copy_(count)
        self.total.copy_(total)
        self.codebook.copy_(total / count[:, None])


class GaussianBottleneck(nn.Module):
    """(mean, log-variance) -> a sample in training, the mean afterwards.

    In training noise is added on top, of a strength drawn for each signal, so that the decoder
    learns to see through what is off in latents that a model drew.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, moments):                                                 # (B, 2C, h, w)
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        kl = kl_to_unit_gaussian(mean, log_variance).mean()
        z = mean
        if self.training:
            strength = self.config.latent_noise * torch.rand_like(mean[:, :1, :1, :1])
            spread = mean.detach().std((0, 2, 3), keepdim=True)     # noise as a share of it
            deviation = (log_variance.exp() + (strength * spread).square()).sqrt()
            z = mean + deviation * torch.randn_like(mean)
        return z, self.config.kl_weight * kl, {"kl": kl}


# --- model ---------------------------------------------------------------------------------------

class VQVAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.bottleneck not in ("vq", "kl"):
            raise ValueError(f'bottleneck is "vq" or "kl", not "{config.bottleneck}"')
        self.config, widths, C = config, config.widths, config.latent_channels
        discrete = config.bottleneck == "vq"
        encoder, decoder, before = [], [], config.channels
        for stride, width in zip(config.strides, widths):
            kernel, padding = [2 * s for s in stride], [s // 2 for s in stride]
            blocks = [ResidualBlock(width) for _ in range(config.blocks)]
            encoder += [nn.Conv2d(before, width, kernel, stride, padding), *blocks]
            blocks = [ResidualBlock(width) for _ in range(config.blocks)]
            decoder = [*blocks, nn.SiLU(),
                       nn.ConvTranspose2d(width, before, kernel, stride, padding), *decoder]
            before = width
        self.encoder = nn.Sequential(*encoder, nn.SiLU(),
                                     nn.Conv2d(before, C if discrete else 2 * C, 1))
        self.bottleneck = (CodebookBottleneck if discrete else GaussianBottleneck)(config)
        self.decoder = nn.Sequential(nn.Conv2d(C, before, 3, padding=1), *decoder)
        # latents are modelled at zero mean and unit variance: see `fit_scale`
        self.register_buffer("latent_mean", torch.zeros(1, C, 1, 1))
        self.register_buffer("latent_std", torch.ones(1, C, 1, 1))
        self.to(memory_format=torch.channels_last)      # convolutions are faster so, on CPU and GPU

    def totals(self, signals):
        """What the loss divides by -> (1,)."""
        return torch.full((1,), float(len(signals)), device=signals.device)

    def loss(self, signals, totals=None):
        """signals (B, channels, H, W) in [-1, 1] -> (scalar, {name: scalar}).

        totals: of a larger batch, of which this is a part; then the parts' losses add up to its.
        """
        z_q, penalty, parts = self.bottleneck(self.encoder(signals))
        reconstruction = F.mse_loss(self.decoder(z_q).float(), signals)
        share = 1.0 if totals is None else len(signals) / totals[0]
        return (reconstruction + penalty) * share, {"reconstruction": reconstruction, **parts}

    def forward(self, signals):
        """signals -> their reconstructions, as the models downstream get them."""
        return self.decode(self.encode(signals))

    def encode(self, signals):
        """signals (B, channels, H, W) -> codes (B, h, w) int64, or latents (B, C, h, w) fp32."""
        z_e = self.encoder(signals).float()
        if self.config.bottleneck == "vq":
            return quantize(z_e.permute(0, 2, 3, 1), self.bottleneck.codebook)[0]
        return (z_e.chunk(2, dim=1)[0] - self.latent_mean) / self.latent_std

    def decode(self, encoded):
        """The inverse of `encode`: codes or latents -> signals (B, channels, H, W) in [-1, 1]."""
        if self.config.bottleneck == "vq":
            z_q = self.bottleneck.codebook[encoded].permute(0, 3, 1, 2)         # (B, C, h, w)
        else:
            z_q = encoded * self.latent_std + self.latent_mean
        return self.decoder(z_q).float().clamp(-1, 1)

    @torch.no_grad()
    def fit_scale(self, signals):
        """Measure the latents' mean and deviation, so `encode` returns unit variance per channel.

        Without it the noise of diffusion is too strong or too weak for the data (LDM Sec. 4.3.2).
        """
        if self.config.bottleneck == "kl":
            latents = self.encode(signals) * self.latent_std + self.latent_mean
            self.latent_mean.copy_(latents.mean((0, 2, 3), keepdim=True))
            self.latent_std.copy_(latents.std((0, 2, 3), keepdim=True))


class Codec:
    """Signals of one modality <-> codes or latents, by its autoencoder, which reads pictures.

    image: (N, 3, H, W) is a picture.  audio: (N, 1, samples) becomes its spectrum.
    video: (N, frames, 3, H, W) is taken frame by frame; what the frames become stands one below
    the other in time's order, so that a clip is a tall picture of latents (N, C, frames * h, w).
    """

    def __init__(self, name, autoencoder, frames=1):
        self.name, self.autoencoder, self.frames = name, autoencoder, frames
        config, (h, w) = autoencoder.config, autoencoder.config.grid
        self.shape = config.latent_channels, frames * h, w
        self.codes = config.codes if config.bottleneck == "vq" else 0

    def encode(self, signals):
        """Signals -> codes (N, frames * h, w) int64, or latents (N, C, frames * h, w)."""
        if self.name == "audio":
            signals = spectrum(signals)
        if self.name != "video":
            return self.autoencoder.encode(signals)
        encoded = self.autoencoder.encode(signals.flatten(0, 1)).unflatten(0, (-1, self.frames))
        return encoded.movedim(1, -3).flatten(-3, -2)       # (N, [C,] frames, h, w), then stacked

    def decode(self, encoded):
        """The inverse of `encode`."""
        if self.name == "video":
            frames = encoded.unflatten(-2, (self.frames, -1)).movedim(-3, 1)
            return self.autoencoder.decode(frames.flatten(0, 1)).unflatten(0, (-1, self.frames))
        signals = self.autoencoder.decode(encoded)
        return waveform(signals) if self.name == "audio" else signals


def code_usage(codes, K):
    """Codes (...) of many signals -> (perplexity, share of the K codes that occur at all)."""
    share = torch.bincount(codes.flatten(), minlength=K).float() / codes.numel()
    perplexity = torch.special.entr(share).sum().exp()
    return perplexity.item(), (share > 0).float().mean().item()


def main():
    """Take one real batch through both bottlenecks, untrained."""
    from show import demo_pictures
    pictures = demo_pictures(64)
    torch.manual_seed(0)
    for name in ("vq", "kl"):
        model = VQVAE(VQVAEConfig(bottleneck=name))
        loss, parts = model.loss(pictures)      # in training: places the codes
        z_e = model.encoder(pictures)
        encoded = model.eval().encode(pictures)
        print(f"\n{name}: pictures {tuple(pictures.shape)} -> encoder {tuple(z_e.shape)} -> "
              f"{'codes' if name == 'vq' else 'latents'} {tuple(encoded.shape)} -> decoder "
              f"{tuple(model.decode(encoded).shape)}")
        print(f"parameters {sum(p.numel() for p in model.parameters()):,}; "
              f"untrained loss {loss.item():.3f}, before weighting: "
              + ", ".join(f"{part} {value.item():.3f}" for part, value in parts.items()))
        if name == "vq":
            perplexity, used = code_usage(encoded, model.config.codes)
            print(f"the 64 codes of the first picture, of {model.config.codes} "
                  f"(in this batch {used:.0%} are used, perplexity {perplexity:.0f}):\n"
                  f"{encoded[0].numpy()}")


if __name__ == "__main__":
    main()
