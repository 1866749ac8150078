"""corpora.py: what is trained on is true, holds nothing held out, and crosses modalities."""

import json

import numpy as np
import pytest
from PIL import Image

from adapter import load

corpora, data, media = load("corpora"), load("data"), load("media")
motion, shapes, stories, tones = (load(f"worlds.{name}")
                                  for name in ("motion", "shapes", "stories", "tones"))
InputError = data.InputError


@pytest.fixture(scope="module")
def everything():
    return corpora.toy_corpus("all", np.random.default_rng(0), 600)


def signal(corpus, segment):
    name, number = segment
    return data.to_signal(corpus.signals[name][number]).numpy()


def kinds(document):
    return tuple(name for name, _ in document)


@pytest.mark.parametrize("name, kind", [("tones", "audio"), ("motion", "video")])
def test_every_pair_is_true_and_none_is_held_out(name, kind):
    corpus, world = corpora.toy_corpus(name, np.random.default_rng(0), 60), corpora.WORLDS[kind]
    assert list(corpus.signals) == [kind] and len(corpus.documents) == 60
    for document in corpus.documents:
        assert kinds(document) == ("text", kind)
        scene = world.parse(document[0][1])
        assert scene == world.grade(signal(corpus, document[1])) and not world.is_held_out(scene)


def test_the_stories_corpus_is_stories_alone():
    corpus = corpora.toy_corpus("stories", np.random.default_rng(0), 50)
    assert not corpus.signals and len({document[0][1] for document in corpus.documents}) == 50
    for document in corpus.documents:
        assert kinds(document) == ("text",) and stories.grade(document[0][1])


def test_all_holds_every_kind_of_document_and_uses_each_signal_once(everything):
    assert {kinds(document) for document in everything.documents} == {
        ("text",), ("text", "image"), ("text", "audio"), ("text", "video"),
        ("text", "image", "text", "image"), ("text", "image", "text", "audio"),
        ("text", "video", "audio"), ("video", "audio")}
    for name, table in everything.signals.items():
        used = [number for document in everything.documents for kind, number in document
                if kind == name]
        assert sorted(used) == list(range(len(table)))


def test_all_is_as_large_as_its_share_of_each_world_says(everything):
    counts = {name: len(table) for name, table in everything.signals.items()}
    crossing = 600 // 30
    assert 228 + crossing // 3 <= counts["image"] <= 230 + crossing // 3 + 1
    assert counts["audio"] == 45 + crossing
    assert counts["video"] == 180 + sum(number % 3 > 0 for number in range(crossing))
    told = [document for document in everything.documents if kinds(document) == ("text",)]
    assert sum(stories.grade(document[0][1]) is not None for document in told) == 75


def test_what_crosses_modalities_is_true(everything):
    for document in everything.documents:
        if kinds(document) == ("text", "image", "text", "audio"):
            for words, seen in (document[:2], document[2:]):
                world = corpora.WORLDS[seen[0]]
                assert world.parse(words[1]) == world.grade(signal(everything, seen)) is not None
            picture, sound = (words for name, words in document if name == "text")
            assert tones.parse(sound) == corpora.sound_of_picture(shapes.parse(picture))
        elif kinds(document)[-2:] == ("video", "audio"):
            clip = motion.grade(signal(everything, document[-2]))
            sound = tones.grade(signal(everything, document[-1]))
            assert clip is not None and sound == corpora.sound_of_clip(clip)
            if len(document) == 3:
                assert motion.parse(document[0][1]) == clip


@pytest.mark.parametrize("world, sound_of, count", [
    (motion, corpora.sound_of_clip, 3 * 2 * 6),             # timbres, loudnesses, actions
    (shapes, corpora.sound_of_picture, 3 * 2 * 6)])         # a row, or two of three
def test_sounds_tell_what_is_seen_apart_and_hold_nothing_held_out(world, sound_of, count):
    rng = np.random.default_rng(0)
    sounds = {sound_of(world.sample(rng)) for _ in range(3000)}
    assert not any(map(tones.is_held_out, sounds))
    assert len(sounds) == count


def test_what_is_higher_up_in_a_picture_sounds_higher():
    scene = shapes.parse("at the top a small red square and at the bottom a large blue circle on "
                         "white.")
    assert corpora.sound_of_picture(scene) == tones.Scene("square", "soft", ("E5", "D#6"))


def test_a_corpus_is_a_function_of_its_generator():
    one, same, other = (corpora.toy_corpus("all", np.random.default_rng(seed), 60)
                        for seed in (1, 1, 2))
    assert one.documents == same.documents != other.documents
    for name, table in one.signals.items():
        assert np.array_equal(table, same.signals[name])


@pytest.fixture
def folder(tmp_path):
    """Three pictures, three sounds, three clips and a still .gif, all with their captions."""
    rng, lines = np.random.default_rng(0), []
    for name, save, suffix in (("image", media.save_picture, ".png"),
                               ("audio", media.save_sound, ".wav"),
                               ("video", media.save_video, ".GIF")):
        world = corpora.WORLDS[name]
        for n in range(3):
            scene = world.sample(rng)
            save(world.render(scene, rng), tmp_path / f"{n}{suffix}")
            lines.append({"file_name": f"{n}{suffix}", "text": world.describe(scene, rng)})
    Image.new("RGB", (9, 9), "red").save(tmp_path / "still.gif")
    lines.append({"file_name": "still.gif", "text": "all red"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_folder_of_pictures_sounds_and_clips(folder):
    train, test = corpora.folder_corpus(folder)
    assert {name: table.shape for name, table in train.signals.items()} == {
        "image": (3, 3, 32, 32), "audio": (2, 1, 4096), "video": (2, 8, 3, 32, 32)}
    assert {name: len(table) for name, table in test.signals.items()} == {
        "image": 1, "audio": 1, "video": 1}
    for corpus in (train, test):
        for (_, text), segment in corpus.documents:
            if text != "all red":
                world = corpora.WORLDS[segment[0]]
                assert world.grade(signal(corpus, segment)) == world.parse(text)


def test_a_lone_sound_is_learned_from_and_a_broken_one_is_named_with_its_line(folder):
    lines = (folder / "metadata.jsonl").read_text().split("\n")
    (folder / "metadata.jsonl").write_text("\n".join(lines[:4]))
    train, test = corpora.folder_corpus(folder)
    assert len(train.signals["audio"]) == 1 and "audio" not in test.signals
    (folder / "0.wav").write_bytes((folder / "0.wav").read_bytes()[:500])
    with pytest.raises(InputError, match=r'metadata.jsonl, line 4: .*0.wav" is cut short'):
        corpora.folder_corpus(folder)
