"""media.py: files of every kind read as what they hold, and what is saved is read again."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from adapter import load

media, data = load("media"), load("data")
motion, shapes, tones = load("worlds.motion"), load("worlds.shapes"), load("worlds.tones")

RATES = 4000, 8000, 11025, 16000, 22050, 32000, 44100, 48000
PCM, ADPCM, FLOAT, MULAW, EXTENSIBLE = 1, 2, 3, 7, 0xFFFE           # formats of .wav files
INSIDE = slice(400, -400)       # away from the ends, where a low-pass filter rings
LAST_BIT = 2.0 ** -15


# --- .wav files, written by hand -----------------------------------------------------------------

def chunk(name, content):
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def wav(channels, rate=8000, bits=16, form=PCM, extra=b"", before=b""):
    """Levels in [-1, 1), a list of channels, each (n,) -> the bytes of a .wav file."""
    width, size = bits // 8, bits // 8 * len(channels)
    levels = [level for together in zip(*channels) for level in together]
    numbers = (round(level * 2 ** (bits - 1)) + 128 * (bits == 8) for level in levels)
    frames = b"".join(n.to_bytes(width, "little", signed=bits > 8) for n in numbers)
    head = struct.pack("<HHIIHH", form, len(channels), rate, rate * size % 2 ** 32, size, bits)
    return chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", head + extra) + before + chunk(b"data", frames))


def sine(hertz, rate, seconds=0.4, level=0.5):
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def read(path, content, samples=2400):
    """A file of these bytes, read -> (samples,) in [-1, 1]."""
    path.write_bytes(content)
    stored = media.read_sound(path, samples)
    assert stored.dtype == np.int16 and stored.shape == (1, samples)
    return data.to_signal(stored).numpy()[0]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_a_sine_of_every_width_and_rate_reads_as_that_sine_mono_or_stereo(tmp_path, bits, rate):
    expected = sine(523.25, 8000)[:2400]
    step = 2.0 ** (1 - bits) + LAST_BIT           # of the levels in the file, and of those read
    mono = read(tmp_path / "mono.wav", wav([sine(523.25, rate)], rate, bits))
    assert abs(mono - expected)[INSIDE].max() < step + 5e-5
    channels = [sine(523.25, rate, level=0.8), sine(523.25, rate, level=0.2)]
    stereo = read(tmp_path / "stereo.wav", wav(channels, rate, bits))
    assert abs(stereo - expected)[INSIDE].max() < step + 5e-5


def test_levels_at_8_khz_and_16_bits_are_read_as_they_are(tmp_path):
    numbers = np.array([0, 1, -1, 1234, 32767, -32767, -32768])
    path = tmp_path / "a.wav"
    path.write_bytes(wav([numbers / 32768]))
    assert media.read_sound(path, 7).tolist() == [[0, 1, -1, 1234, 32767, -32767, -32767]]


def test_other_chunks_and_odd_lengths_are_passed_over(tmp_path):
    wave = sine(500, 8000, seconds=0.1001)
    found = read(tmp_path / "a.wav", wav([wave], bits=24, before=chunk(b"LIST", b"odd")), 801)
    assert len(wave) == 801 and abs(found - wave).max() < LAST_BIT
    head, frames = wav([wave])[8:36], wav([wave])[44:]
    uneven = chunk(b"RIFF", head + chunk(b"data", frames + b"\1"))      # ends in half a sample
    found = read(tmp_path / "b.wav", uneven, 900)
    assert abs(found[:801] - wave).max() < LAST_BIT and not found[801:].any()


@pytest.mark.parametrize("rate", [11025, 16000, 22050, 44100, 32000])
def test_what_is_above_4_khz_vanishes_and_what_is_below_stays(tmp_path, rate):
    path = tmp_path / "a.wav"
    low = sine(3890, 8000)[:2400]
    assert abs(read(path, wav([sine(3890, rate)], rate)) - low)[INSIDE].max() < 1e-3
    for hertz in (4010, 5300):
        assert abs(read(path, wav([sine(hertz, rate)], rate))[INSIDE]).max() < 1e-3
    both = sine(4010, rate) + sine(3890, rate, level=0.3)
    assert abs(read(path, wav([both], rate)) - 0.6 * low)[INSIDE].max() < 1e-3


def test_a_shorter_sound_ends_in_silence_a_longer_one_is_cut(tmp_path):
    wave = sine(440, 16000)
    whole = read(tmp_path / "a.wav", wav([wave], 16000), 5000)
    assert len(wave) / 2 == 3200 and not whole[3200:].any() and abs(whole[3100:3200]).max() > 0.4
    cut = read(tmp_path / "b.wav", wav([wave], 16000), 700)
    assert abs(cut - whole[:700]).max() < 2 * LAST_BIT


@pytest.mark.parametrize("rate", [8000, 44100])
def test_of_a_long_sound_the_beginning_is_as_if_all_of_it_were_resampled(tmp_path, rate):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * rate)
    found = read(tmp_path / "a.wav", wav([wave], rate))
    assert abs(found - media.resample(wave, rate, 8000)[:2400]).max() < 2 * LAST_BIT


@pytest.mark.parametrize("rate, new", [(8000, 44100), (44100, 8000), (32000, 8000), (11025, 8000),
                                       (8000, 8000), (7919, 8000), (1000, 32000)])
def test_resample_against_the_sum_of_sines_that_it_samples(rate, new):
    n = 2 * rate + 1
    parts = [(0.3, 0.1, 0.0), (0.2, 0.31, 1.0), (0.4, 0.47, 2.0)]   # level, share of rate, phase

    def at(rate_of_samples, count):
        seconds = np.arange(count) / rate_of_samples
        return sum(level * np.sin(2 * np.pi * share * min(rate, new) * seconds + phase)
                   for level, share, phase in parts)

    found, count = media.resample(at(rate, n), rate, new), round(n * new / rate)
    assert found.shape == (count,)
    inside = slice(count // 10, -count // 10)
    assert abs(found - at(new, count))[inside].max() < 2e-3
    assert len(media.resample(np.zeros(0), rate, new)) == 0


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_tones_are_saved_exactly_and_graded_as_the_same_scene(tmp_path, kind):
    rng = np.random.default_rng(0)
    for _ in range(10):
        scene = tones.sample(rng)
        wave = tones.render(scene, rng)
        media.save_sound(kind(wave), tmp_path / "a.wav")
        stored = media.read_sound(tmp_path / "a.wav", tones.LENGTH)
        assert np.array_equal(stored, data.to_samples(wave))
        assert tones.grade(data.to_signal(stored).numpy()) == scene
        # Band-limited interpolation by hand: 80 samples at 8 kHz are 441 at 44.1 kHz.
        finer = np.fft.irfft(np.fft.rfft(wave[0], 80 * 52), 441 * 52) * 441 / 80
        media.save_sound(kind(finer[None]), tmp_path / "b.wav", 44100)
        stored = media.read_sound(tmp_path / "b.wav", tones.LENGTH)
        assert tones.grade(data.to_signal(stored).numpy()) == scene


def test_a_saved_sound_is_mono_of_16_bits_and_clips(tmp_path):
    media.save_sound(np.array([[0, 1, -1, 2, -2, 0.5]]), tmp_path / "a.wav", 16000)
    expected = np.array([0, 32767, -32767, 32767, -32767, 16384]) / 32768
    assert (tmp_path / "a.wav").read_bytes() == wav([expected], 16000)


GOOD = wav([sine(440, 8000, 0.05)])
QUIET = np.zeros(50)
BAD_SOUNDS = {
    "empty": (b"", "is cut short"),
    "words": (b"no sound, but words, and more of them than a header has bytes", "only PCM"),
    "picture": (chunk(b"RIFF", b"WEBP" + GOOD[12:]), "only PCM"),
    "header cut": (GOOD[:30], "cannot be read as a sound"),
    "no data": (GOOD[:36], "cannot be read as a sound"),
    "cut": (GOOD[:-1], "is cut short.* 400 samples"),
    "half": (GOOD[:len(GOOD) // 2], "is cut short.* 400 samples"),
    "RIFF too small": (GOOD[:4] + struct.pack("<I", 100) + GOOD[8:], "is cut short"),
    "adpcm": (wav([QUIET], form=ADPCM), "only PCM.*ffmpeg -i"),
    "float": (wav([QUIET], bits=32, form=FLOAT, extra=b"\0\0"), "only PCM.*ffmpeg -i"),
    "mulaw": (wav([QUIET], bits=8, form=MULAW), "only PCM.*ffmpeg -i"),
    "64 bits": (wav([QUIET], bits=64), "only PCM.*ffmpeg -i"),
    "0 bits": (GOOD[:34] + b"\0\0" + GOOD[36:], "only PCM"),
    "no channels": (wav([]), "only PCM"),
    "no sound": (wav([QUIET[:0]]), "has no sound in it"),
    "rate 0": (wav([QUIET], rate=0), "rate of 0 Hz"),
    "rate too high": (wav([QUIET], rate=2 ** 32 - 1), "rate of 4294967295 Hz"),
}


@pytest.mark.parametrize("name", BAD_SOUNDS)
def test_a_bad_sound_is_named_in_one_sentence(tmp_path, name):
    content, message = BAD_SOUNDS[name]
    path = tmp_path / f"{name}.wav"
    path.write_bytes(content)
    with pytest.raises(data.InputError, match=f"{name}.wav.*{message}") as raised:
        media.read_sound(path, 4096)
    assert "\n" not in str(raised.value)


def test_a_good_sound_cut_anywhere_is_an_input_error(tmp_path):
    for length in range(0, len(GOOD), 17):
        (tmp_path / "a.wav").write_bytes(GOOD[:length])
        with pytest.raises(data.InputError, match="a.wav"):
            media.read_sound(tmp_path / "a.wav", 4096)


def test_extensible_pcm_is_read(tmp_path):
    guid = struct.pack("<HHIH", 22, 16, 4, PCM) + bytes.fromhex("000000001000800000aa00389b71")
    content = wav([sine(440, 8000)], form=EXTENSIBLE, extra=guid)
    assert abs(read(tmp_path / "a.wav", content) - sine(440, 8000)[:2400]).max() < 2 * LAST_BIT
    with pytest.raises(data.InputError, match="a.wav.*only PCM.*ffmpeg -i.* -ar 8000"):
        read(tmp_path / "a.wav", content.replace(guid[-14:], bytes(14)))


@pytest.mark.parametrize("kind, load_file", [
    ("picture", lambda path: media.read_picture(path, 32)),
    ("sound", lambda path: media.read_sound(path, 4096)),
    ("clip", lambda path: media.read_video(path, 8, 32))])
def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path, kind, load_file):
    for path in (tmp_path / "gone.bin", tmp_path):
        with pytest.raises(data.InputError, match=f'there is no {kind} ".*{path.name}"'):
            load_file(path)


# --- pictures ------------------------------------------------------------------------------------

def test_a_saved_picture_is_enlarged_and_reads_as_the_same_scene(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.png"
    for _ in range(10):
        scene = shapes.sample(rng)
        picture = shapes.render(scene, rng)
        media.save_picture(torch.as_tensor(picture), path)
        large = data.to_bytes(picture).repeat(8, axis=1).repeat(8, axis=2)
        assert np.array_equal(media.read_picture(path, 256), large)
        assert shapes.grade(data.to_signal(media.read_picture(path, 32)).numpy()) == scene


# --- clips ---------------------------------------------------------------------------------------

def plain(*numbers):
    """(N, 3, 32, 32) uint8: frame after frame of one colour, that tells its number."""
    return np.stack([np.full((3, 32, 32), 20 * number, np.uint8) for number in numbers])


def save_frames(path, frames, **options):
    """Frames (N, C, H, W) uint8 by Pillow, each kept as it is."""
    first, *rest = [Image.fromarray(frame.transpose(1, 2, 0)) for frame in frames]
    first.save(path, save_all=True, append_images=rest, **options)


@pytest.mark.parametrize("action", motion.ACTIONS)
def test_a_clip_of_every_action_is_saved_exactly_and_graded_as_the_same_scene(tmp_path, action):
    rng, path, scenes = np.random.default_rng(0), tmp_path / "a.gif", []
    while len(scenes) < 3:
        scene = motion.sample(rng)
        scenes += [scene] if scene.action == action else []
    for scene in scenes:
        clip = motion.render(scene, rng)
        media.save_video(torch.as_tensor(clip), path)       # enlarged by 4
        large = data.to_bytes(clip).repeat(4, axis=2).repeat(4, axis=3)
        assert np.array_equal(media.read_video(path, motion.FRAMES, 128), large)
        stored = media.read_video(path, motion.FRAMES, motion.PIXELS)
        assert stored.dtype == np.uint8
        assert motion.grade(data.to_signal(stored).numpy()) == scene


@pytest.mark.parametrize("rate", [1, 3, 4, 7, 25])
@pytest.mark.parametrize("numbers", [
    [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 2, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 2],
    [1, 1, 2, 1, 1, 1, 3, 3], [1, 2, 3, 4, 5, 6, 7, 8]])
def test_frames_that_are_equal_survive_whatever_is_made_of_them_on_disk(tmp_path, numbers, rate):
    clip = data.to_signal(plain(*numbers)).numpy()
    media.save_video(clip, tmp_path / "a.gif", scale=1, rate=rate)
    assert np.array_equal(media.read_video(tmp_path / "a.gif", 8, 32), plain(*numbers))


def test_a_saved_clip_loops_without_end_at_its_rate(tmp_path):
    media.save_video(data.to_signal(plain(*range(8))), tmp_path / "a.gif", scale=2, rate=5)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.format == "GIF" and picture.size == (64, 64) and picture.n_frames == 8
        assert picture.info["loop"] == 0
        for frame in range(8):
            picture.seek(frame)
            assert picture.info["duration"] == 200


def test_256_colours_a_frame_are_exact_and_more_are_near(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (8, 3, 256), dtype=np.uint8)
    few = colours[:, :, rng.permutation(1024) % 256].reshape(8, 3, 32, 32)
    media.save_video(data.to_signal(few), tmp_path / "a.gif", scale=1)
    assert np.array_equal(media.read_video(tmp_path / "a.gif", 8, 32), few)
    scene = motion.sample(rng)
    noisy = motion.render(scene, rng) + 0.05 * rng.standard_normal((8, 3, 32, 32))
    media.save_video(noisy, tmp_path / "a.gif", scale=1)
    error = data.to_bytes(noisy) - media.read_video(tmp_path / "a.gif", 8, 32).astype(float)
    assert 10 * np.log10(255 ** 2 / (error ** 2).mean()) > 40


@pytest.mark.parametrize("numbers, lasts, expected", [
    ([1, 2, 3, 4], 100, [1, 1, 2, 2, 3, 3, 4, 4]),
    ([1, 2], [100, 300], [1, 1, 2, 2, 2, 2, 2, 2]),
    ([1, 2], [500, 1100], [1, 1, 2, 2, 2, 2, 2, 2]),                # after 0.1, 0.3, 0.5 ... s
    ([1, 2], 0, [1, 1, 1, 1, 2, 2, 2, 2]),                          # does not say: all the same
    (range(1, 9), [10, 10, 10, 10, 10, 10, 10, 990], range(1, 9)),  # eight are those eight
    ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], 100, [1, 3, 4, 6, 7, 9, 10, 12])])
def test_another_number_of_frames_is_spread_evenly_over_time(tmp_path, numbers, lasts, expected):
    save_frames(tmp_path / "a.gif", plain(*numbers), duration=lasts)
    found = media.read_video(tmp_path / "a.gif", 8, 32)
    assert found[:, 0, 0, 0].tolist() == [20 * number for number in expected]
    assert np.array_equal(found, plain(*expected))


def test_a_still_picture_is_a_clip_of_equal_frames(tmp_path):
    for name in ("a.gif", "a.png"):
        Image.fromarray(plain(3)[0].transpose(1, 2, 0)).save(tmp_path / name)
        assert np.array_equal(media.read_video(tmp_path / name, 8, 32), plain(*[3] * 8))


def test_each_frame_is_read_as_the_picture_that_it_is(tmp_path):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (8, 4, 50, 90), dtype=np.uint8)     # neither square nor opaque
    save_frames(tmp_path / "clip.png", clip, duration=100)
    found = media.read_video(tmp_path / "clip.png", 8, 32)
    for frame, read_frame in zip(clip, found):
        Image.fromarray(frame.transpose(1, 2, 0)).save(tmp_path / "frame.png")
        assert np.array_equal(media.read_picture(tmp_path / "frame.png", 32), read_frame)


def test_a_bad_clip_is_named_in_one_sentence(tmp_path):
    path = tmp_path / "a.gif"
    rng = np.random.default_rng(0)
    media.save_video(rng.uniform(-1, 1, (8, 3, 32, 32)), path)
    good = path.read_bytes()
    for content in (b"", b"no clip, but words", GOOD, good[:10], good[:900], good[:len(good) // 2],
                    good[:-10]):
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="a.gif.*cannot be read as a clip") as raised:
            media.read_video(path, 8, 32)
        assert "\n" not in str(raised.value)


def test_wide_greys_are_read_by_their_range_and_fractions_are_refused(tmp_path):
    from PIL import Image
    grey = np.arange(64, dtype=np.int32).reshape(8, 8) * 4
    for name, values in (("narrow", grey), ("wide", grey * 256)):
        Image.fromarray(values, "I").save(tmp_path / f"{name}.tiff")
        read = media.read_picture(tmp_path / f"{name}.tiff", 8)
        assert np.abs(read[0].astype(int) - grey).max() <= 1
    Image.fromarray(np.float32(grey) / 255, "F").save(tmp_path / "fractions.tiff")
    with pytest.raises(data.InputError, match="fractions.tiff"):
        media.read_picture(tmp_path / "fractions.tiff", 8)
