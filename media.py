"""Files of pictures, sounds and clips: what numpy arrays become on disk, and back.

    read_picture(path, size)            a PNG, JPEG, ... -> uint8 (3, size, size)
    read_sound(path, samples, rate)     a PCM .wav -> int16 (1, samples)
    read_video(path, frames, size)      an animated GIF -> uint8 (frames, 3, size, size)
    save_picture, save_sound, save_video    a signal in [-1, 1], array or tensor -> a file

What is read is what a corpus stores, and what `data.to_signal` takes. Anything may be in a user's
file: those that cannot be used raise InputError, one sentence that names the file.
"""

import contextlib
import io
import math
import os
import struct
from pathlib import Path
from wave import Error as WaveError
from wave import open as open_wave

import numpy as np

from data import InputError, to_bytes, to_samples

# --- pictures ------------------------------------------------------------------------------------

@contextlib.contextmanager
def _opened(path, kind):
    """A picture file, opened; what is wrong with it, found only later too, raises InputError."""
    from PIL import Image
    if not os.path.isfile(path):
        raise InputError(f'there is no {kind} "{path}"; mend the name')
    try:
        with Image.open(path) as picture:
            yield picture
    except (Image.DecompressionBombError, EOFError, IndexError, OSError, RuntimeError, SyntaxError,
            TypeError, ValueError, struct.error) as error:  # the bytes of a broken file go anywhere
        raise InputError(f'"{path}" cannot be read as a {kind} ({error}); '
                         "save it anew, as PNG, JPEG or GIF") from None


def _fit(picture, size):
    """A picture, or one frame of a clip -> uint8 (3, size, size)."""
    from PIL import Image, ImageOps
    if picture.mode == "F":
        raise ValueError("its pixels are not whole numbers")
    if picture.mode.startswith("I"):                    # 16 bits of grey, or 8 in a wider file
        scale = 256 if picture.getextrema()[1] > 255 else 1
        picture = picture.point(lambda value: value / scale).convert("L")
    picture = ImageOps.exif_transpose(picture).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return np.array(picture, np.uint8).transpose(2, 0, 1)


def _enlarge(picture, scale):
    """So that each pixel can be seen."""
    from PIL import Image
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def is_animated(path):
    """Whether a GIF is a clip: several frames, or one that lasts, as a clip without motion has."""
    with _opened(path, "picture") as picture:
        return getattr(picture, "n_frames", 1) > 1 or bool(picture.info.get("duration"))


def read_picture(path, size):
    """A PNG or JPEG file -> uint8 (3, size, size): alpha on white, middle square, resized."""
    with _opened(path, "picture") as picture:
        return _fit(picture, size)


def save_picture(picture, path, scale=8):
    """(3, H, W) in [-1, 1] -> a PNG or JPEG file, enlarged so that its pixels can be seen."""
    from PIL import Image
    _enlarge(Image.fromarray(to_bytes(picture).transpose(1, 2, 0)), scale).save(path)


# --- sounds --------------------------------------------------------------------------------------

RATES = 1_000, 1_000_000        # Hz, lowest and highest: a header that says otherwise is broken
FADE = 0.025                    # share of the band that fades out: from 3900 to 4000 Hz at 8 kHz
TAIL = 0.1                      # seconds after which what follows a sample no longer changes it
PCM, EXTENSIBLE = b"\x01\x00", b"\xfe\xff"                 # what a .wav header says its format is
GUID = bytes.fromhex("000000001000800000aa00389b71")        # with PCM before: integers
IEEE_FLOAT = 3


def resample(wave, rate, new_rate):
    """(n,) at `rate` samples a second -> float64 (round(n * new_rate / rate),) at `new_rate`.

    By the spectrum: what is above half of either rate is cut off, so that nothing aliases.
    """
    if rate == new_rate:
        return np.array(wave, np.float64)
    # Silence is added up to a length that is whole at both rates, or the pitch would be off. The
    # transform takes a sound for periodic: without the silence its end would ring in its start.
    step = rate // math.gcd(rate, new_rate)
    length = step * math.ceil((len(wave) + TAIL * rate) / step)
    band = np.fft.rfftfreq(length, 1 / rate) / (min(rate, new_rate) / 2)    # (length // 2 + 1,)
    # A band that ends at once would ring for long (as 1 / t, this as 1 / t^2).
    spectrum = np.fft.rfft(wave, length) * np.clip((1 - band) / FADE, 0, 1)
    new = np.fft.irfft(spectrum, length * new_rate // rate) * (new_rate / rate)
    return new[:round(len(wave) * new_rate / rate)]


def read_sound(path, samples, rate=8000):
    """A PCM .wav file -> int16 (1, samples): channels averaged, resampled to `rate`, the beginning.

    Of 8, 16, 24 or 32 bits, with any number of channels; a shorter one ends in silence.
    """
    if not os.path.isfile(path):
        raise InputError(f'there is no sound "{path}"; mend the name')
    try:
        with _plain_wav(path) as stream, open_wave(stream) as file:
            levels, found = _read_levels(file, path, samples / rate + TAIL)
    except (WaveError, EOFError, OSError, RuntimeError) as error:
        raise InputError(f'"{path}" cannot be read as a sound ({str(error) or "it is cut short"}); '
                         "only PCM .wav files can: convert it with: "
                         f"ffmpeg -i in.wav -ac 1 -ar {rate} -c:a pcm_s16le out.wav") from None
    stored = to_samples(resample(levels, found, rate)[:samples] / 32767)
    return np.pad(stored, (0, samples - len(stored)))[None]


def _plain_wav(path):
    """A .wav file, opened. One that says "extensible" but holds integers, as programs write 24 bits
    or 96 kHz, is read as if it said "PCM": before Python 3.12 `wave` refuses the former."""
    with open(path, "rb") as stream:
        head = stream.read(4096)
    at = head.find(b"fmt ", 12) + 8                     # of the format; at 24 of it the real one
    if at == 7 or head[at:at + 2] != EXTENSIBLE or head[at + 24:at + 40] != PCM + GUID:
        return open(path, "rb")
    content = Path(path).read_bytes()
    return io.BytesIO(content[:at] + PCM + content[at + 2:])


def _read_levels(file, path, seconds):
    """An open .wav file -> (levels of its first seconds, (n,) in units of 16 bits, its rate)."""
    channels, width, rate, count, *_ = file.getparams()
    if width > 4 or getattr(file, "getformat", int)() == IEEE_FLOAT:    # from Python 3.15 on
        raise WaveError("its samples are not integers of 8 to 32 bits")
    if not RATES[0] <= rate <= RATES[1]:
        raise InputError(f'"{path}" has a sampling rate of {rate} Hz; '
                         f"{RATES[0]} to {RATES[1]} can be read")
    if count == 0:
        raise InputError(f'"{path}" has no sound in it')
    file.setpos(count - 1)          # the last one, whether or not it is needed
    if len(file.readframes(1)) < channels * width:
        raise InputError(f'"{path}" is cut short: it has fewer than the {count} samples '
                         "that its header promises")
    file.rewind()
    data = file.readframes(min(count, math.ceil(seconds * rate)))
    raw = np.frombuffer(data, np.uint8).reshape(-1, channels, width)
    if width == 1:
        raw = raw ^ 128             # 8 bits are unsigned, all others signed
    wide = np.zeros((len(raw), channels, 4), np.uint8)
    wide[..., 4 - width:] = raw     # little-endian: the bytes that a narrower one lacks come first
    return wide.view("<i4")[..., 0].mean(1) / 2 ** 16, rate


def save_sound(wave, path, rate=8000):
    """(1, samples) in [-1, 1] -> a .wav file: mono, 16 bits."""
    (samples,) = to_samples(wave)
    with open(path, "wb") as stream, open_wave(stream, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(samples.tobytes())


# --- clips ---------------------------------------------------------------------------------------

UNTIMED = 100                   # milliseconds that a frame lasts that does not say: as in browsers


def read_video(path, frames, size):
    """An animated GIF -> uint8 (frames, 3, size, size), each frame as `read_picture` makes it.

    If it has another number of frames, they are taken at even times; a still picture is repeated.
    """
    from PIL import ImageSequence
    shown, lasts = [], []
    with _opened(path, "clip") as picture:
        for frame in ImageSequence.Iterator(picture):
            shown.append(_fit(frame, size))
            lasts.append(frame.info.get("duration") or UNTIMED)
        if len(shown) != frames:
            # By time and not by number: who writes a GIF (Pillow too) makes one long frame of
            # equal ones, and a thing that stays would seem to jump.
            ends = np.cumsum(lasts)
            times = (np.arange(frames) + 0.5) / frames * ends[-1]               # (frames,)
            shown = [shown[i] for i in np.searchsorted(ends, times, side="right")]
        return np.stack(shown)


def save_video(clip, path, scale=4, rate=4):
    """(frames, 3, H, W) in [-1, 1] -> a GIF that loops, of `rate` frames a second, enlarged.

    Exact but for frames of more than 256 colours, which is all that GIF has.
    """
    from PIL import Image
    frames = [_enlarge(Image.fromarray(pixels).quantize(
                  256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE), scale)
              for pixels in to_bytes(clip).transpose(0, 2, 3, 1)]               # (H, W, 3) each
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=round(1000 / rate))         # milliseconds of each frame
