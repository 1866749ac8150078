"""worlds/tones.py: its words and its waveforms are read back exactly, and nothing else is read."""

import itertools

import numpy as np
import pytest

from adapter import load
from captions import damaged

tones = load("worlds.tones")
Scene = tones.Scene
ONE = Scene("square", "soft", ("G5",))
FOUR = Scene("sawtooth", "loud", ("C5", "E5", "B5", "C#6"))
TIME = np.arange(4096) / 8000               # seconds


def scenes(count, seed=0, notes=None):
    """(rng, scene) `count` times, every other scene with a held-out pair."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield rng, tones.sample(rng, notes, held_out=bool(i % 2))


def rms(wave):
    return np.sqrt((wave ** 2).mean())


def power(wave, padded=4096):
    """(frequencies, power at each) of the whole clip under a Hann window."""
    return np.fft.rfftfreq(padded, 1 / 8000), abs(np.fft.rfft(wave * np.hanning(4096), padded)) ** 2


def chord(rng, frequencies, amplitudes=None, level=0.2):
    """(1, 4096): sines in random phase, with none of the code under test."""
    amplitudes = np.ones(len(frequencies)) if amplitudes is None else amplitudes
    wave = sum(a * np.sin(2 * np.pi * f * TIME + rng.uniform(0, 2 * np.pi))
               for f, a in zip(frequencies, amplitudes))
    return (wave * level / rms(wave))[None]


def some_notes(rng, count):
    return [list(tones.NOTES)[i] for i in rng.permutation(8)[:count]]


# --- scenes --------------------------------------------------------------------------------------

def test_a_held_out_pair_is_drawn_never_unless_asked_for_and_always_when_asked_for():
    for i, (_, scene) in enumerate(scenes(4000)):
        pairs = {(scene.timbre, note) for note in scene.notes}
        assert bool(pairs & tones.HELD_OUT) == bool(i % 2) == tones.is_held_out(scene)


def test_sample_draws_every_option_on_distinct_notes_from_low_to_high():
    seen = set()
    for _, scene in scenes(2000):
        hertz = [tones.NOTES[note] for note in scene.notes]
        assert 1 <= len(hertz) <= 4 and hertz == sorted(set(hertz))
        seen.update({scene.loudness, len(hertz)}, itertools.product([scene.timbre], scene.notes))
    assert seen == {1, 2, 3, 4, "soft", "loud",
                    *itertools.product(("sine", "square", "sawtooth"), tones.NOTES)}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sample_gives_the_number_of_notes_asked_for(count):
    assert all(len(scene.notes) == count for _, scene in scenes(100, notes=count))


def test_notes_are_two_bins_of_a_256_sample_window_apart_and_none_is_anothers_octave():
    for low, high in itertools.combinations(sorted(tones.NOTES.values()), 2):
        assert high - low >= 2 * 8000 / 256
        assert abs(high - 2 * low) > 8000 / 256


# --- words ---------------------------------------------------------------------------------------

def test_parse_inverts_describe():
    for rng, scene in scenes(4000):
        assert tones.parse(tones.describe(scene)) == scene
        assert tones.parse(tones.describe(scene, rng)) == scene


@pytest.mark.parametrize("scene, orders", [(ONE, 1), (FOUR, 24)])
def test_describe_uses_every_phrasing_in_every_order_and_all_mean_the_scene(scene, orders):
    rng = np.random.default_rng(0)
    captions = {tones.describe(scene, rng) for _ in range(1500)}
    assert len(captions) == orders * len(tones.PHRASINGS)
    assert {tones.parse(caption) for caption in captions} == {scene}


def test_captions_are_short():
    for rng, scene in scenes(500):
        assert 6 <= len(tones.describe(scene, rng).split(" ")) <= 14


@pytest.mark.parametrize("caption", [
    "", " ", "C5", "C5.", "a soft sine wave", "a soft sine wave plays .",
    "a soft sine wave plays C5",
    "a sine soft wave plays C5.",
    "a soft sine wave plays C5 and D5.",
    "a soft sine wave plays C5, D5, C5.",
    "a soft sine wave plays C5, D5, E5, G5, A5.",
    "a soft sine wave plays C#5.",
    "a soft sine wave plays C6.",
    "a soft sine wave plays c5.",
    "A soft sine wave plays C5.",
    "a quiet sine wave plays C5.",
    "a soft triangle wave plays C5.",
    "C5, D5, played by a soft sine wave.",
])
def test_parse_rejects_what_describe_never_says(caption):
    assert tones.parse(caption) is None


def test_parse_rejects_a_caption_cut_short_lengthened_or_with_one_wrong_word():
    for rng, scene in scenes(60):
        caption = tones.describe(scene, rng)
        wrong = damaged(caption, "F5")
        assert [text for text in wrong if tones.parse(text) is not None] == []


# --- waveforms -----------------------------------------------------------------------------------

def test_render_gives_float32_waveforms_in_range():
    rng = np.random.default_rng(0)
    for timbre, count in itertools.product(tones.TIMBRES, (1, 2, 3, 4)):
        for notes in itertools.combinations(tones.NOTES, count):
            for jitter in (None, rng):
                wave = tones.render(Scene(timbre, "loud", notes), jitter)
                assert wave.shape == (1, 4096) and wave.dtype == np.float32
                assert 0.2 < abs(wave).max() <= 1


def test_render_is_the_same_for_the_same_jitter_and_differs_for_another():
    for _, scene in scenes(50):
        one, again, other = (tones.render(scene, np.random.default_rng(s)) for s in (0, 0, 1))
        assert (one == again).all() and abs(one - other).max() > 0.5 * abs(one).max()
        assert (tones.render(scene) == tones.render(scene)).all()
        assert tones.grade(one) == tones.grade(other) == tones.grade(tones.render(scene)) == scene


@pytest.mark.parametrize("note", tones.NOTES)
def test_a_sine_peaks_at_its_note_and_is_detuned_in_both_directions_up_to_the_limit(note):
    rng, cents = np.random.default_rng(0), []
    for jitter in [None] + [rng] * 40:
        wave = tones.render(Scene("sine", "loud", (note,)), jitter)[0]
        frequencies, energy = power(wave, padded=2 ** 16)       # 0.12 Hz a bin, 0.4 cents of C5
        cents.append(1200 * np.log2(frequencies[energy.argmax()] / tones.NOTES[note]))
    assert abs(cents[0]) < 0.5
    assert -8.5 < min(cents) < -5 and 5 < max(cents) < 8.5


@pytest.mark.parametrize("timbre, harmonics", [
    ("sine", {1: 1}), ("square", {1: 1, 3: 1 / 3, 5: 1 / 5, 7: 1 / 7}),
    ("sawtooth", {k: 1 / k for k in range(1, 8)})])
def test_harmonics_have_the_amplitudes_of_their_fourier_series(timbre, harmonics):
    for note, hertz in tones.NOTES.items():
        wave = tones.render(Scene(timbre, "loud", (note,)))[0] * np.hanning(4096)
        found = [abs(wave @ np.exp(-2j * np.pi * k * hertz * TIME)) for k in range(1, 8)]
        expected = [harmonics.get(k, 0) if k * hertz < 3900 else 0 for k in range(1, 8)]
        below = [k * hertz < 4000 for k in range(1, 8)]         # above it an alias may answer
        np.testing.assert_allclose(np.array(found)[below] / found[0], np.array(expected)[below],
                                   atol=2e-3)


def test_no_energy_is_above_the_band_limit():
    for rng, scene in scenes(300):
        frequencies, energy = power(tones.render(scene, rng)[0])
        assert energy[frequencies > 3950].sum() < 1e-6 * energy.sum()


@pytest.mark.parametrize("loudness, level", [("soft", 0.06), ("loud", 0.2)])
def test_the_level_is_that_of_the_loudness_for_any_number_of_notes(loudness, level):
    for count in (1, 2, 3, 4):
        for rng, scene in scenes(50, notes=count):
            wave = tones.render(scene._replace(loudness=loudness), rng)[0]
            assert abs(rms(wave[480:]) / level - 1) < 0.03      # 480: the longest attack


def test_the_attack_takes_from_4_to_60_milliseconds():
    def attack(wave):                       # a linear swell loses 2/3 of the energy of its length
        return 1.5 * (4096 - (wave ** 2).sum() / rms(wave[480:]) ** 2) / 8

    rng, scene = np.random.default_rng(0), Scene("sine", "loud", ("A5",))
    lengths = [attack(tones.render(scene, rng)[0]) for _ in range(200)]
    assert 3 < min(lengths) < 8 and 56 < max(lengths) < 61
    assert abs(attack(tones.render(scene)[0]) - 4) < 1


def test_each_note_starts_at_a_phase_of_its_own_anywhere_in_its_period(monkeypatch):
    monkeypatch.setattr(tones, "DETUNING", 0.0)     # which would turn the phase as time goes by
    rng, scene, phases = np.random.default_rng(0), Scene("sine", "loud", ("C5", "D#6")), []
    for _ in range(300):
        wave = tones.render(scene, rng)[0] * np.hanning(4096)
        phases.append([np.angle(wave @ np.exp(-2j * np.pi * tones.NOTES[note] * TIME))
                       for note in scene.notes])
    for of_one_note in np.transpose(phases):
        assert (np.histogram(of_one_note, 6, (-np.pi, np.pi))[0] > 30).all()    # of 50 on average
    low, high = np.transpose(phases)
    for sign in (1, -1):                            # neither phase tells the other
        assert abs(np.exp(1j * (low + sign * high)).mean()) < 0.2


# --- the grader: what it reads -------------------------------------------------------------------

def test_grade_reads_jittered_waveforms():
    right = [tones.grade(tones.render(scene, rng)) == scene for rng, scene in scenes(600)]
    assert np.mean(right) >= 0.995


def test_grade_reads_every_scene_there_is_without_jitter():
    for timbre, loudness, count in itertools.product(tones.TIMBRES, ("soft", "loud"), (1, 2, 3, 4)):
        for notes in itertools.combinations(tones.NOTES, count):
            scene = Scene(timbre, loudness, notes)
            assert tones.grade(tones.render(scene)) == scene


def test_grade_reads_a_chord_of_plain_sines_in_any_order():
    rng = np.random.default_rng(0)
    for loudness, level in (("soft", 0.06), ("loud", 0.2)):
        for _ in range(50):
            notes = some_notes(rng, rng.integers(1, 5))
            wave = chord(rng, [tones.NOTES[note] for note in notes], level=level)
            assert tones.grade(wave) == tones.make_scene("sine", loudness, notes)


def test_soft_and_loud_differ_by_the_level_alone():
    for rng, scene in scenes(100):
        wave = tones.render(scene, rng)
        other, factor = ("loud", 0.2 / 0.06) if scene.loudness == "soft" else ("soft", 0.06 / 0.2)
        assert tones.grade(wave * factor) == scene._replace(loudness=other)


HANN = np.hanning(257)[:-1]


def stft(waves):
    """(N, 4096) -> (N, 32, 128): Hann window 256, hop 128, without the bin of 4 kHz."""
    padded = np.pad(waves, ((0, 0), (64, 64)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 256, axis=1)[:, ::128]
    return np.fft.rfft(frames * HANN)[..., :128]


def inverse_stft(frames):
    """(N, 32, 128) -> (N, 4096), by weighted overlap and add."""
    pieces = np.fft.irfft(np.pad(frames, ((0, 0), (0, 0), (0, 1)))) * HANN
    waves, weight = np.zeros((len(frames), 4224)), np.full(4224, 1e-2)
    for i in range(32):
        waves[:, 128 * i:128 * i + 256] += pieces[:, i]
        weight[128 * i:128 * i + 256] += HANN ** 2
    return (waves / weight)[:, 64:-64]


def test_grade_reads_what_griffin_lim_makes_of_noisy_log_magnitudes():
    sampled = list(scenes(80))
    waves = np.concatenate([tones.render(scene, rng) for rng, scene in sampled])
    rng = np.random.default_rng(0)
    log = np.log(abs(stft(waves)) + 1e-3)
    magnitude = np.exp(log + 0.15 * rng.standard_normal(log.shape))
    frames = magnitude * np.exp(2j * np.pi * rng.random(log.shape))
    for _ in range(60):
        frames = stft(inverse_stft(frames))
        frames *= magnitude / np.maximum(abs(frames), 1e-9)
    right = [tones.grade(wave[None]) == scene
             for wave, (_, scene) in zip(inverse_stft(frames), sampled)]
    assert np.mean(right) >= 0.95


def test_grade_is_deterministic_and_leaves_its_waveform_alone():
    for rng, scene in scenes(20):
        wave = tones.render(scene, rng) + 0.01 * rng.standard_normal((1, 4096))
        before = wave.copy()
        assert tones.grade(wave) == tones.grade(wave)
        assert (wave == before).all()


# --- the grader: what it must not read -----------------------------------------------------------

def unreadable(waves):
    """None of the waveforms is read; on failure pytest shows how many are."""
    grades = [tones.grade(wave) for wave in waves]
    read = [scene for scene in grades if scene is not None]
    assert grades and read == [], f"{len(read)} of {len(grades)} were read"


def test_silence_is_unreadable():
    unreadable([np.zeros((1, 4096)), np.full((1, 4096), 0.2)])


@pytest.mark.parametrize("level", [0.01, 0.06, 0.1, 0.2, 0.4])
def test_noise_is_unreadable(level):
    rng = np.random.default_rng(0)
    unreadable(level * rng.standard_normal((1, 4096)) for _ in range(50))


def test_a_scene_in_noise_as_loud_as_itself_is_unreadable():
    def waves():
        for rng, scene in scenes(200):
            wave = tones.render(scene, rng)
            yield np.sqrt(0.5) * (wave + rms(wave) * rng.standard_normal((1, 4096)))
    unreadable(waves())


@pytest.mark.parametrize("silent", [slice(2048), slice(2048, None), slice(3072, None)])
def test_a_clip_with_a_half_or_a_quarter_of_it_zeroed_is_unreadable(silent):
    def waves():
        for rng, scene in scenes(150):
            wave = tones.render(scene, rng)
            wave[:, silent] = 0
            yield wave
    unreadable(waves())


def test_a_loud_start_is_unreadable():
    def waves():
        for rng, scene in scenes(40):
            wave = tones.render(scene, rng)
            wave[:, :tones.WINDOW] *= 4
            yield wave
    unreadable(waves())


def test_a_clip_that_fades_out_is_unreadable():
    unreadable(tones.render(scene, rng) * np.linspace(1, 0, 4096) for rng, scene in scenes(50))


def test_notes_one_after_the_other_are_unreadable():
    def waves():
        rng = np.random.default_rng(0)
        for _ in range(100):
            first, second = (tones.render(Scene("sine", "loud", (note,)), rng)
                             for note in some_notes(rng, 2))
            yield np.concatenate([first[:, :2048], second[:, 2048:]], axis=1)
    unreadable(waves())


@pytest.mark.parametrize("timbre", tones.TIMBRES)
def test_a_note_that_stops_half_way_is_unreadable(timbre):
    def waves():
        rng = np.random.default_rng(0)
        for _ in range(100):
            notes = some_notes(rng, rng.integers(2, 5))
            more, fewer = (tones.render(Scene(timbre, "loud", some)) for some in (notes, notes[1:]))
            yield np.concatenate([more[:, :2048], fewer[:, 2048:]], axis=1)
    unreadable(waves())


def test_a_timbre_that_changes_half_way_is_unreadable():
    def waves():
        for rng, scene in scenes(20):
            for first, second in itertools.permutations(tones.TIMBRES, 2):
                start, end = (tones.render(scene._replace(timbre=timbre), rng)
                              for timbre in (first, second))
                yield np.concatenate([start[:, :2048], end[:, 2048:]], axis=1)
    unreadable(waves())


def half_way():
    """Frequencies in the middle between each two neighbours of the scale."""
    hertz = list(tones.NOTES.values())
    return [np.sqrt(low * high) for low, high in zip(hertz, hertz[1:])]


@pytest.mark.parametrize("timbre", tones.TIMBRES)
def test_a_note_half_way_between_two_of_the_scale_is_unreadable(timbre):
    waves = [sum(np.sin(2 * np.pi * k * hertz * TIME) / k for k in tones.TIMBRES[timbre]
                 if k * hertz < 3900) for hertz in half_way()]
    unreadable((wave * 0.2 / rms(wave))[None] for wave in waves)


def test_a_chord_with_one_more_note_half_way_between_two_of_the_scale_is_unreadable():
    def waves():
        rng = np.random.default_rng(0)
        for extra in half_way() * 30:
            notes = some_notes(rng, rng.integers(1, 5))
            yield chord(rng, [tones.NOTES[note] for note in notes] + [extra])
    unreadable(waves())


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_chord_an_octave_away_is_unreadable(factor):
    rng = np.random.default_rng(0)
    unreadable(chord(rng, [factor * tones.NOTES[note] for note in some_notes(rng, count)])
               for count in [1, 2, 3, 4] * 20)


def test_five_or_more_notes_are_unreadable():
    rng = np.random.default_rng(0)
    unreadable(chord(rng, [tones.NOTES[note] for note in some_notes(rng, count)])
               for count in [5, 6, 8] * 30)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_chord_with_one_note_much_weaker_is_unreadable(count):
    rng = np.random.default_rng(0)
    unreadable(chord(rng, [tones.NOTES[note] for note in some_notes(rng, count)],
                     [0.4] + [1.0] * (count - 1)) for _ in range(100))


def test_a_timbre_half_way_between_a_sine_and_a_square_wave_is_unreadable():
    rng = np.random.default_rng(0)
    for hertz in tones.NOTES.values():
        harmonics = [k for k in (3, 5, 7) if k * hertz < 3900]
        unreadable([chord(rng, [hertz] + [k * hertz for k in harmonics],
                          [1.0] + [0.5 / k for k in harmonics])])


@pytest.mark.parametrize("level", [0.02, 0.11, 0.4])
def test_a_level_that_is_neither_soft_nor_loud_is_unreadable(level):
    def waves():
        for rng, scene in scenes(50):
            wave = tones.render(scene, rng)
            yield wave * level / rms(wave)
    unreadable(waves())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_waveform_with_one_value_that_is_not_finite_is_unreadable(value):
    for scene in (FOUR, Scene("sine", "soft", ("C5",))):
        for place in (57, 3000):
            wave = tones.render(scene)
            wave[0, place] = value
            unreadable([wave])


@pytest.mark.parametrize("shape", [(4096,), (2, 4096), (1, 4095), (1, 8192), (4096, 1),
                                   (1, 1, 4096)])
def test_a_waveform_of_the_wrong_shape_is_unreadable(shape):
    unreadable([np.resize(tones.render(FOUR), shape)])
