"""data.py: text comes back, batches are what loops over documents make, folders are read."""

import collections
import copy
import doctest
import json
import types
import unicodedata

import numpy as np
import pytest
import torch

import small
from adapter import load

corpora, data, media = load("corpora"), load("data"), load("media")
shapes = load("worlds.shapes")
InputError, Tokenizer = data.InputError, data.Tokenizer

IMAGE = data.MODALITIES.index("image")
AUDIO = data.MODALITIES.index("audio")
HEADS = {"codes": 64, "latents": 16}        # positions that a picture takes in the two hosts


@pytest.fixture(scope="module")
def corpus():
    return corpora.toy_corpus("shapes", np.random.default_rng(0), 2000)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.train(corpus.texts())


# --- the tokenizer -------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "", " ", "\n", "\t \r\n\n  x  ", "a", "a small red circle.", "  two  spaces ", "a-b--", "-",
    "\N{PILE OF POO}\N{FAMILY}\u200d\N{REGIONAL INDICATOR SYMBOL LETTER A}", "你好,世界。",
    "\x00\x7f", "\u0301", "e\u0301\u0301", "\u0301 \u20dd", "\ufeff", "\ufffd", "\U0010ffff",
    "नमस्ते", "_ __a_", "\u2028\u2029\x85\u3000\xa0",
])
def test_any_text_comes_back(tokenizer, text):
    for any_tokenizer in (tokenizer, Tokenizer()):
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


def test_random_unicode_comes_back(tokenizer):
    rng = np.random.default_rng(0)
    marks = [chr(i) for i in range(0x3000) if unicodedata.combining(chr(i))]
    for _ in range(300):
        points = rng.integers(0, rng.choice([0x80, 0x800, 0x110000]), 12)
        characters = [chr(i) for i in points if not 0xD800 <= i < 0xE000]
        text = "".join(rng.permutation(characters + list(rng.choice(marks, 3)) + [" ", "\n"]))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_caption_comes_back_in_fewer_ids_than_bytes(tokenizer, corpus):
    for text in corpus.texts()[:500]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2


def test_special_tokens_are_never_made_from_text(tokenizer):
    for text in (*data.SPECIAL, "".join(data.SPECIAL), "a <bos> b<eoi>"):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == text


def test_decode_writes_special_tokens_by_name_and_broken_utf8_as_a_replacement(tokenizer):
    assert tokenizer.decode([*tokenizer.special.values()]) == "".join(data.SPECIAL)
    assert Tokenizer().decode(list("é".encode())[:1] + [97]) == "\ufffda"


def test_training_depends_on_the_texts_alone_not_on_their_order(corpus):
    texts = corpus.texts()[:400]
    merges = Tokenizer.train(texts, 60).merges
    assert len(merges) == 60
    assert merges == Tokenizer.train(texts, 60).merges == Tokenizer.train(texts[::-1], 60).merges


def test_training_merges_the_most_frequent_neighbours_first_and_none_seen_once():
    a, b, c = b"abc"
    # "ab" five times, then "(ab)c" three times; nothing else twice
    assert Tokenizer.train(["abc abc abc", "ab", "ab", "xy"]).merges[0] == (a, b)
    assert Tokenizer.train(["abc\nabc\nabc", "ab", "ab", "xy"]).merges == [(a, b), (256, c)]
    assert Tokenizer.train(["abc"]).merges == [] == Tokenizer.train([]).merges


def test_no_piece_reaches_over_the_edge_of_a_word(tokenizer):
    assert all(b" " not in piece[1:] for piece in tokenizer.pieces)


def test_merges_survive_save_and_load(tokenizer, corpus, tmp_path):
    torch.save({"merges": [list(pair) for pair in tokenizer.merges]}, tmp_path / "merges.pt")
    again = Tokenizer(torch.load(tmp_path / "merges.pt", weights_only=True)["merges"])
    assert again.merges == tokenizer.merges and again.special == tokenizer.special
    for text in [*corpus.texts()[:100], "你好 \N{PILE OF POO}"]:
        assert again.encode(text) == tokenizer.encode(text)


def test_id_ranges_are_disjoint_and_in_order_text_special_codes(tokenizer):
    layout = tokenizer.layout({"image": (8, 8, 8), "audio": (4, 1, 9)}, {"image": 512, "audio": 32})
    ids = list(range(len(tokenizer.pieces)))
    assert layout.text == len(ids)
    ids += [tokenizer.special[name] for name in data.SPECIAL]
    for first, stop in layout.codes:
        ids += range(first, stop)
    assert ids == list(range(layout.size))
    assert [stop - first for first, stop in layout.codes] == [0, 512, 32, 0]
    assert layout.shapes == (None, (8, 8, 8), (4, 1, 9), None)
    named = [layout.pad, layout.bos, layout.eos,
             *(pair[kind] for kind in (1, 2, 3) for pair in (layout.begin, layout.end))]
    assert named == [tokenizer.special[name] for name in data.SPECIAL]


# --- packing against a loop ----------------------------------------------------------------------

def test_the_literal_example_of_the_docstring_is_true():
    result = doctest.testmod(data)
    assert result.attempted >= 6 and result.failed == 0


SHAPES = {"image": (1, 2, 2), "audio": (1, 1, 2)}
POSITIONS = [0, 4, 2, 0]
CODES = {"image": torch.tensor([[[5, 1], [0, 3]], [[2, 2], [7, 6]], [[1, 0], [4, 4]]]),
         "audio": torch.tensor([[[3, 0]], [[1, 2]]])}
LATENTS = {"image": torch.arange(3.).view(3, 1, 1, 1).expand(3, 1, 2, 2),
           "audio": torch.arange(10., 12.).view(2, 1, 1, 1).expand(2, 1, 1, 2)}
LAYOUT = Tokenizer().layout(SHAPES, {"image": 8, "audio": 4})
ROWS = [[[("text", "hi"), ("image", 2)], [("audio", 1), ("text", "abc"), ("image", 0)]],
        [[("text", "x")]],
        [[("image", 1)], [("image", 2), ("image", 0), ("text", "")], [("audio", 0), ("text", "y")]]]
LENGTH = 32


def packed(encoded, spans=None, rows=ROWS):
    tokenized = [[data.tokenize(document, Tokenizer()) for document in row] for row in rows]
    return data.pack(tokenized, LENGTH, LAYOUT, POSITIONS, encoded, spans)


def positions_of(row, encoded):
    """A row, position by position: [id or None for a latent, modality, span, document]."""
    out, span = [], 0
    for number, document in enumerate(row, 1):
        out.append([LAYOUT.bos, 0, 0, number])
        for name, content in document:
            kind = data.MODALITIES.index(name)
            if name == "text":
                out += [[byte, 0, 0, number] for byte in content.encode()]
                continue
            span += 1
            ids = [None] * POSITIONS[kind]
            if encoded is CODES:
                codes = encoded[name][content].flatten().tolist()
                ids = [LAYOUT.codes[kind][0] + code for code in codes]
            out.append([LAYOUT.begin[kind], 0, 0, number])
            out += [[i, kind, span, number] for i in ids]
            out.append([LAYOUT.end[kind], 0, 0, number])
        out.append([LAYOUT.eos, 0, 0, number])
    return out


@pytest.mark.parametrize("encoded", [CODES, LATENTS], ids=["codes", "latents"])
@pytest.mark.parametrize("spans", [None, [0, 7, 3, 0]], ids=["as many as there are", "padded"])
def test_pack_against_a_loop_over_positions(encoded, spans):
    batch = packed(encoded, spans)
    for r, row in enumerate(ROWS):
        expected, place = positions_of(row, encoded), 0
        for i in range(LENGTH):
            if i >= len(expected):          # padding; its modality is what makes the counts static
                assert batch.tokens[r, i] == LAYOUT.pad and batch.targets[r, i] == data.IGNORE
                assert batch.span[r, i] == batch.document[r, i] == 0
                continue
            token, kind, span, document = expected[i]
            following = expected[i + 1] if i + 1 < len(expected) else [None, 0, 0, 0]
            target = following[0] if following[3] == document else None
            lone = len(row[document - 1]) == 1 and row[document - 1][0][0] != "text"
            if lone and target == LAYOUT.eos:   # says nothing of what follows pictures
                target = None
            assert batch.tokens[r, i] == (LAYOUT.pad if token is None else token)
            assert batch.targets[r, i] == (data.IGNORE if target is None else target)
            assert (batch.modality[r, i], batch.document[r, i]) == (kind, document)
            assert batch.span[r, i] == span
            before = expected[i - 1][2] if i else 0
            place = 0 if not kind else place + 1 if before == span else 1
            assert batch.place[r, i] == place


@pytest.mark.parametrize("spans", [None, [0, 7, 3, 0]], ids=["as many as there are", "padded"])
def test_order_sorts_by_modality_padding_last_and_inverse_undoes_it(spans):
    batch = packed(LATENTS, spans)
    everything = torch.arange(3 * LENGTH)
    assert torch.equal(batch.order[batch.inverse], everything)
    assert torch.equal(batch.inverse[batch.order], everything)
    key = [(batch.modality.flatten()[i].item(), batch.document.flatten()[i].item() == 0, i)
           for i in batch.order.tolist()]
    assert key == sorted(key)
    assert batch.sizes == tuple(sum(k[0] == kind for k in key) for kind in range(4))
    if spans:
        assert batch.sizes[1:] == (7 * 4, 3 * 2, 0)


def test_latents_stand_in_the_order_of_their_spans_and_padding_is_marked():
    batch = packed(LATENTS, [0, 6, 3, 0])
    assert batch.signals[0] is batch.signals[3] is None
    assert batch.signals[IMAGE].flatten(1)[:5].tolist() == [[n] * 4 for n in (2., 0, 1, 2, 0)]
    assert batch.signals[AUDIO].flatten(1)[:2].tolist() == [[n] * 2 for n in (11., 10.)]
    assert [len(x) for x in batch.signals[1:3]] == [6, 3]
    assert [flags.tolist() for flags in batch.real[:3]] == [[], [1] * 5 + [0], [1, 1, 0]]


def test_shown_marks_the_spans_that_open_a_document_with_more_after_them():
    batch = packed(LATENTS, [0, 6, 3, 0])
    assert batch.shown[IMAGE].tolist() == [False, False, False, True, False, False]
    assert batch.shown[AUDIO].tolist() == [True, True, False]


def test_unpack_inverts_pack():
    documents = [ROWS[0][1], [("text", "你好 x"), ("image", 1), ("image", 2), ("text", "\n")], []]
    for encoded in (CODES, LATENTS):
        for document in documents:
            batch = packed(encoded, rows=[[document]])
            found = data.unpack(batch.tokens[0, 1:], batch.signals, LAYOUT, Tokenizer())
            assert [name for name, _ in found] == [name for name, _ in document]
            for (name, content), (_, original) in zip(found, document):
                if name == "text":
                    assert content == original
                else:
                    torch.testing.assert_close(content, encoded[name][original].float()
                                               if encoded is LATENTS else encoded[name][original])


def test_unpack_gives_none_for_a_span_that_was_only_opened():
    begin = LAYOUT.begin[IMAGE]
    for tokens in ([97, begin], [97, begin, LAYOUT.pad], [97, begin, LAYOUT.codes[IMAGE][0]]):
        found = data.unpack(torch.tensor(tokens), [None] * 4, LAYOUT, Tokenizer())
        assert found == [("text", "a"), ("image", None)]


def test_pack_prompts_leaves_documents_open():
    prompts = [[("text", "ab"), ("image", None)], [("image", 1)], []]
    batch = data.pack_prompts(prompts, Tokenizer(), LAYOUT, POSITIONS, CODES)
    codes = (LAYOUT.codes[IMAGE][0] + CODES["image"][1].flatten()).tolist()
    for row, document, expected in zip(batch.tokens.tolist(), batch.document.tolist(), [
            [LAYOUT.bos, 97, 98, LAYOUT.begin[IMAGE]],
            [LAYOUT.bos, LAYOUT.begin[IMAGE], *codes, LAYOUT.end[IMAGE]],
            [LAYOUT.bos]]):
        padding = len(row) - len(expected)
        assert row == expected + [LAYOUT.pad] * padding
        assert document == [1] * len(expected) + [0] * padding


# --- the stream of batches -----------------------------------------------------------------------

def stream(corpus, tokenizer, host="latents", **options):
    """Batches of a corpus; picture number n is encoded as nothing but the number n."""
    numbers = torch.arange(len(corpus.signals["image"]))
    encoded = (numbers.float().view(-1, 1, 1, 1) if host == "latents"
               else torch.zeros(len(numbers), 8, 8, dtype=torch.int64))
    layout = tokenizer.layout({"image": (1, 8, 8)}, {} if host == "latents" else {"image": 512})
    options = {"rows": 16, "length": 96 if host == "latents" else 256, "seed": 0, **options}
    return data.Batches(corpus, tokenizer, layout, {"image": encoded}, [0, HEADS[host], 0, 0],
                        **options)


def captioned(count):
    """A corpus of pairs in which picture n is called n."""
    return data.Corpus([[("text", str(n)), ("image", n)] for n in range(count)],
                       {"image": np.zeros((count, 1))})


def assert_same(one, other):
    for name, a, b in zip(one._fields, one, other):
        if name == "sizes":
            assert a == b
        else:
            pairs = zip(a, b) if isinstance(a, tuple) else [(a, b)]
            assert all((x is None and y is None) or torch.equal(x, y) for x, y in pairs), name


def shape_of(field):
    """What a compiled model would specialise on."""
    if isinstance(field, tuple):
        return tuple(map(shape_of, field))
    return field if field is None or isinstance(field, int) else (tuple(field.shape), field.dtype)


@pytest.mark.parametrize("host", HEADS)
def test_shapes_are_static_and_nine_positions_in_ten_are_real(corpus, tokenizer, host):
    batches, kinds, real = stream(corpus, tokenizer, host), set(), []
    for _ in range(30):
        batch = next(batches)
        kinds.add(shape_of(tuple(batch)))
        real.append((batch.document > 0).float().mean().item())
    assert len(kinds) == 1
    assert np.mean(real) >= 0.9


@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize("length", [74, 96, 128, 150])
def test_no_batch_is_empty_however_few_documents_fit_a_row(rows, length):
    documents = [[("text", "a text"), ("image", 0)]] * 5        # 74 positions each
    batches = stream(data.Corpus(documents, {"image": np.zeros((1, 1))}), Tokenizer(), "codes",
                     rows=rows, length=length)
    for _ in range(20):
        batch = next(batches)
        assert (batch.document > 0).any() and batch.real[IMAGE].any()


def test_batches_are_a_function_of_the_seed(corpus, tokenizer):
    one, again, other = (stream(corpus, tokenizer, seed=seed) for seed in (3, 3, 4))
    for _ in range(3):
        batch = next(one)
        assert_same(batch, next(again))
        assert not torch.equal(batch.tokens, next(other).tokens)


def test_every_document_is_drawn_once_an_epoch_and_packed_or_held_back():
    batches, seen = stream(captioned(150), Tokenizer(), rows=4), []
    while batches.state["drawn"][0] < 300:          # two epochs
        batch = next(batches)
        seen += batch.signals[IMAGE].flatten()[batch.real[IMAGE] > 0].int().tolist()
        waiting = [batches.draw(0, number) for number in batches.state["held"][0]]
        held = [int(document[-1][1] if document[-1][0] else document[0][1])
                for document in waiting]
    count = np.bincount(seen + held)
    full, more = divmod(batches.state["drawn"][0], 150)
    assert len(count) == 150 and count.sum() == batches.state["drawn"][0]
    assert sorted(count) == [full] * (150 - more) + [full + 1] * more


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_document_that_leaves_less_room_than_others_need_is_drawn_too(rows):
    """However few rows a batch has: no document waits for ever, no batch is empty, and all have the
    same shapes."""
    texts = ["ab"] * 30 + ["a" * 24] * 2
    documents = [[("text", text), ("image", n)] for n, text in enumerate(texts)]
    batches = data.Batches(data.Corpus(documents, {}), small.TOKENIZER, small.LAYOUT["transfusion"],
                           small.signals("transfusion", len(texts)), small.POSITIONS, rows, 32,
                           read=0.0, drop=0.0)
    seen, shapes = collections.Counter(), set()
    while sum(seen.values()) < 3 * len(texts):
        batch = next(batches)
        shapes.add(shape_of(tuple(batch)))
        count = int(batch.real[IMAGE].sum())
        assert count
        seen.update(batch.signals[IMAGE].flatten(1)[:count, 0].tolist())
    assert len(seen) == len(texts) and max(seen.values()) <= 4 and len(shapes) == 1


def test_a_document_of_two_spans_is_drawn_where_a_batch_has_less_than_one_on_average():
    texts = [[("text", "ab"), ("image", 0), ("image", 1)]] + [[("text", "a" * 20)]] * 20
    batches = data.Batches(data.Corpus(texts, {}), small.TOKENIZER, small.LAYOUT["transfusion"],
                           small.signals("transfusion", 2), small.POSITIONS, 1, 32)
    assert any(next(batches).real[IMAGE].sum() == 2 for _ in range(60))


def test_rows_that_cannot_hold_what_every_batch_must_are_refused():
    documents = [[("text", "a"), ("image", 0)], [("text", "a" * 28)]]
    with pytest.raises(data.InputError, match="cannot hold a span of each modality"):
        data.Batches(data.Corpus(documents, {}), small.TOKENIZER, small.LAYOUT["transfusion"],
                     small.signals("transfusion", 1), small.POSITIONS, 1, 32)


def test_no_more_pairs_go_without_words_than_are_not_read():
    with pytest.raises(data.InputError, match="--read-share 0.4 and --caption-dropout 0.7"):
        data.Batches(captioned(8), small.TOKENIZER, small.LAYOUT["transfusion"],
                     small.signals("transfusion", 8), small.POSITIONS, 4, 32, drop=0.7)


def test_streams_go_on_in_turn_when_a_batch_has_other_parts():
    def stream(name):
        return types.SimpleNamespace(state={}, name=name, epoch=2 - name)
    for before, after in ((1, 2), (2, 1), (4, 3)):
        turns = data.Alternate([stream(0), stream(1)], before)
        for _ in range(5 * before):
            turns.turn()
        other = data.Alternate([stream(0), stream(1)], after)
        other.state = turns.state
        order = [other.turn().name for _ in range(4 * after)]
        assert order == [int(batch % 3 == 2) for batch in range(5, 9) for _ in range(after)]


def test_each_make_up_is_gone_through_once_an_epoch_and_seldom_waits():
    """Pictures, sounds and words alone, in one stream: none is drawn twice before all are once."""
    documents = ([[("text", f"{n}"), ("image", n)] for n in range(60)]
                 + [[("text", f"{n}"), ("audio", n)] for n in range(30)]
                 + [[("text", f"{n}")] for n in range(20)])
    layout = Tokenizer().layout({"image": (1, 4, 4), "audio": (1, 2, 4)}, {})
    encoded = {"image": torch.zeros(60, 1, 4, 4), "audio": torch.zeros(30, 1, 2, 4)}
    batches = data.Batches(data.Corpus(documents, {}), Tokenizer(), layout, encoded, [0, 16, 8, 0],
                           rows=6, length=64, read=0, drop=0)
    drawn = {makeup: [] for makeup in batches.makeups}
    sizes = set()
    for _ in range(40):
        rows = batches.fill()
        for row in rows:
            for document in row:
                makeup = (0, *(sum(kind == m for kind, _ in document) for m in (1, 2, 3)))
                makeup = makeup if any(makeup) else (1, 0, 0, 0)        # words alone
                drawn[makeup].append(document[-1][1] if document[-1][0] else None)
        sizes.add(data.pack(rows, 64, layout, batches.positions, encoded, batches.spans).sizes)
    assert len(sizes) == 1
    for makeup, count in (((0, 1, 0, 0), 60), ((0, 0, 1, 0), 30)):
        seen = drawn[makeup]
        first = seen[:count]
        assert len(set(first)) > 0.8 * count, "few of an epoch may be late, none may come twice"
        assert max(np.bincount(seen)) - min(np.bincount(seen, minlength=count)) <= 2


def test_a_stream_restored_in_mid_epoch_goes_on_as_if_never_stopped(corpus, tokenizer, tmp_path):
    batches = stream(corpus, tokenizer, seed=5)
    for _ in range(4):
        next(batches)
    torch.save(batches.state, tmp_path / "state.pt")
    restored = stream(corpus, tokenizer, seed=5)
    restored.state = torch.load(tmp_path / "state.pt", weights_only=True)
    for _ in range(4):
        assert_same(next(batches), next(restored))


def test_a_state_that_was_kept_is_not_changed_by_going_on(corpus, tokenizer):
    batches = stream(corpus, tokenizer)
    next(batches)
    kept = copy.deepcopy(batches.state)
    saved = {**batches.state}
    next(batches)
    assert saved == kept


def test_long_documents_are_packed_apart():
    documents = ([[("text", f"{n}"), ("image", n)] for n in range(40)]
                 + [[("text", f"{n}"), ("video", n)] for n in range(12)])
    layout = Tokenizer().layout({"image": (1, 4, 4), "video": (1, 20, 16)}, {})
    encoded = {"image": torch.zeros(40, 1, 4, 4), "video": torch.zeros(12, 1, 20, 16)}
    positions = [0, 16, 0, 320]
    plans = data.plan_rows(data.Corpus(documents, {}), Tokenizer(), positions, 20)
    short, long = plans
    assert len(short.corpus.documents) == 40 and len(long.corpus.documents) == 12
    assert short.length < data.LONG < long.length and short.count == 20
    assert 0.4 <= long.count * long.length / (short.count * short.length) <= 1

    def stream():
        return data.Alternate([data.Batches(plan.corpus, Tokenizer(), layout, encoded, positions,
                                            plan.count, plan.length) for plan in plans])
    batches, lengths = stream(), []
    for _ in range(20):
        batch = next(batches)
        lengths.append(batch.tokens.shape[1])
        assert (batch.real[3] is not None and len(batch.real[3]) > 0) == (lengths[-1] > data.LONG)
    assert lengths.count(long.length) == int(20 * batches.share)
    assert {short.length, long.length} == set(lengths[:6])
    restored = stream()
    restored.state = copy.deepcopy(batches.state)
    for _ in range(4):
        assert_same(next(batches), next(restored))


@pytest.mark.parametrize(("short", "long"), [(400, 4), (60, 60), (5, 300), (16, 345)])
def test_short_and_long_documents_are_drawn_equally_often(short, long):
    """Also where most of them are long, as with the codes of large pictures."""
    documents = ([[("text", f"{n:03}" + "a" * 57), ("image", 0)] for n in range(short)]
                 + [[("text", f"{n:03}" + "b" * 397), ("image", 0)] for n in range(long)])
    positions, layout = [0, 16, 0, 0], Tokenizer().layout({"image": (1, 4, 4)}, {})
    plans = data.plan_rows(data.Corpus(documents, {}), Tokenizer(), positions, 8)
    batches = data.Alternate([data.Batches(plan.corpus, Tokenizer(), layout,
                                           {"image": torch.zeros(1, 1, 4, 4)}, positions,
                                           plan.count, plan.length, read=0, drop=0)
                              for plan in plans])
    drawn = [0, 0]
    while min(drawn[0] / short, drawn[1] / long) < 12:
        for row in batches.fill():
            for document in row:
                drawn[len(document[0][1]) > 200] += 1
    assert 0.87 < (drawn[0] / short) / (drawn[1] / long) < 1.15


def test_rows_are_of_one_kind_where_all_documents_are_short_or_a_length_is_given():
    corpus = data.Corpus([[("text", "a"), ("image", 0)], [("text", "b"), ("video", 0)]], {})
    assert len(data.plan_rows(corpus, Tokenizer(), [0, 16, 0, 128], 4)) == 1
    assert len(data.plan_rows(corpus, Tokenizer(), [0, 16, 0, 300], 4)) == 2
    (rows,) = data.plan_rows(corpus, Tokenizer(), [0, 16, 0, 300], 4, 320)
    assert rows == data.Rows(corpus, 4, 320)


def test_each_modality_has_a_range_of_ids_for_its_codes():
    shapes, codes = {"image": (8, 2, 2), "audio": (8, 1, 2), "video": (8, 4, 2)}, {
        "image": 8, "audio": 5, "video": 7}
    layout = Tokenizer().layout(shapes, codes)
    first = layout.text + len(data.SPECIAL)
    assert layout.codes == ((first, first), (first, first + 8), (first + 8, first + 13),
                            (first + 13, first + 20)) and layout.size == first + 20
    del shapes["image"], codes["image"]
    layout = Tokenizer().layout(shapes, codes)
    assert layout.codes[1:] == ((first, first), (first, first + 5), (first + 5, first + 12))
    assert Tokenizer().layout({"image": (8, 2, 2), "video": (8, 4, 2)}, {}).size == first


@pytest.mark.parametrize("host", HEADS)
def test_every_picture_stands_in_the_document_of_its_caption(host):
    corpus = captioned(500)
    batches = stream(corpus, Tokenizer(), host, read=0.5, drop=0)
    if host == "codes":                     # 500 < 512 codes: picture n is the code n, 64 times
        batches.encoded = {"image": torch.arange(500).view(-1, 1, 1).expand(-1, 8, 8)}
    for _ in range(3):
        batch = next(batches)
        real = int(batch.real[IMAGE].sum())
        assert real == sum(len(row.unique()) - 1 for row in batch.span)
        places = batch.order[batch.sizes[0]:].view(-1, HEADS[host])
        for k, block in enumerate(places[:real]):
            r, at = divmod(block[0].item(), batch.tokens.shape[1])
            assert torch.equal(block, block[0] + torch.arange(len(block)))
            assert len(batch.span[r, at:at + len(block)].unique()) == 1
            mine = (batch.document[r] == batch.document[r, at]) & (batch.tokens[r] < 256)
            number = int(Tokenizer().decode(batch.tokens[r][mine].tolist()))
            if host == "latents":
                assert batch.signals[IMAGE][k].item() == number
            else:
                offset = batches.layout.codes[IMAGE][0]
                assert (batch.tokens[r, at:at + len(block)] == offset + number).all()


def test_captions_are_dropped_and_pictures_come_first_in_their_shares():
    count = 4000
    same = data.Corpus([[("text", "x"), ("image", 0)]] * count, {"image": np.zeros((1, 1))})
    batches = stream(same, Tokenizer(), read=0.3, drop=0.1)
    kinds = [tuple(kind for kind, _ in batches.draw(0, number)) for number in range(count)]
    error = 3 * (0.3 * 0.7 / count) ** 0.5          # three standard deviations
    assert kinds.count((1, 0)) / count == pytest.approx(0.3, abs=error)
    assert kinds.count((1,)) / count == pytest.approx(0.1, abs=error)
    assert kinds.count((0, 1)) + kinds.count((1, 0)) + kinds.count((1,)) == count


def test_in_the_shapes_world_pictures_precede_their_captions_in_a_fifth_of_the_pairs(corpus):
    batches = stream(corpus, Tokenizer(), length=400)
    drawn = [tuple(kind for kind, _ in batches.draw(makeup, number))
             for makeup, group in enumerate(batches.documents) for number in range(len(group))]
    pairs = [kinds for kinds in drawn if len(kinds) == 2]
    assert pairs.count((1, 0)) / len(pairs) >= 0.2


def test_stories_and_texts_are_never_turned_around_nor_cut():
    documents = [[("text", "a"), ("image", 0), ("text", "b"), ("image", 1)], [("text", "c")]]
    batches = stream(data.Corpus(documents, {"image": np.zeros((2, 1))}), Tokenizer())
    for makeup, kinds in ((0, [0, 1, 0, 1]), (1, [0])):
        for number in range(100):
            assert [kind for kind, _ in batches.draw(makeup, number)] == kinds


def test_a_text_longer_than_the_sequence_is_named():
    corpus = data.Corpus([[("text", "short"), ("image", 0)],
                          [("text", "a very long caption " * 9), ("image", 0)]],
                         {"image": np.zeros((1, 1))})
    with pytest.raises(InputError, match="a very long caption .*--context"):
        data.plan_rows(corpus, Tokenizer(), [0, 16, 0, 0], 4, 96)


def test_no_text_of_the_shapes_corpus_names_a_held_out_pair(corpus):
    captions = 0
    for text in corpus.texts():
        words = [word.strip(".,:") for word in text.split()]
        for colour, shape in zip(words, words[1:]):
            assert (shape, colour) not in shapes.HELD_OUT, text
            captions += colour in shapes.COLOURS and shape in shapes.SHAPES
    assert captions > len(corpus.documents)


def test_shapes_corpus_holds_every_kind_of_document_and_true_captions(corpus):
    kinds = {tuple(name for name, _ in document) for document in corpus.documents}
    assert kinds == {("text", "image"), ("text", "image", "text", "image"), ("text",)}
    right = []
    for document in corpus.documents[:300]:
        if len(document) > 1:
            scene = shapes.parse(document[0][1])
            picture = corpus.signals["image"][document[1][1]]
            right.append(shapes.grade(data.to_signal(picture).numpy()) == scene)
            assert not shapes.is_held_out(scene)
        if len(document) == 4:
            after = shapes.apply_change(scene, document[2][1])
            picture = corpus.signals["image"][document[3][1]]
            right.append(shapes.grade(data.to_signal(picture).numpy()) == after)
    assert np.mean(right) >= 0.99


def test_pixels_survive_the_way_to_signals_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    signal = data.to_signal(pixels)
    assert (signal.min(), signal.max()) == (-1, 1)
    assert np.array_equal(data.to_bytes(signal), pixels)


# --- a folder of one's own pictures --------------------------------------------------------------

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def picture(mode="RGB", size=(32, 32), colour=RED):
    from PIL import Image
    return Image.new(mode, size, colour)


def write_lines(folder, lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


def entry(name, text="a caption"):
    return {"file_name": name, "text": text}


@pytest.fixture
def folder(tmp_path):
    """Two good pictures, lines 1 and 2."""
    picture().save(tmp_path / "1.png")
    picture(colour=BLUE).save(tmp_path / "2.png")
    write_lines(tmp_path, [entry("1.png", "red"), entry("2.png", "blue")])
    return tmp_path


def test_pictures_of_every_kind_are_read(folder):
    wide = picture(size=(40, 20), colour=BLUE)
    wide.paste(picture(size=(28, 20)), (6, 0))          # its middle square is red
    files = {"wide.png": (wide, RED), "photo.jpg": (picture(size=(100, 50)), (254, 0, 0)),
             "grey.png": (picture("L", colour=100), (100, 100, 100)),
             "clear.png": (picture("RGBA", colour=(0, 0, 255, 0)), WHITE),
             "solid.png": (picture("RGBA", colour=(0, 0, 255, 255)), BLUE),
             "palette.gif": (picture().convert("P"), RED), "tall.png": (picture(size=(3, 90)), RED),
             "bit.png": (picture("1", colour=1), WHITE)}
    (folder / "deep").mkdir()
    for name, (image, _) in files.items():
        image.save(folder / "deep" / name)
    write_lines(folder, ["", *(entry(f"deep/{name}", name) for name in files), ""])
    for size in (32, 48):
        found = {}
        for part in corpora.folder_corpus(folder, size):
            assert part.signals["image"].dtype == np.uint8
            assert part.signals["image"].shape == (len(part.documents), 3, size, size)
            for (_, text), (_, number) in part.documents:
                found[text] = part.signals["image"][number]
        assert found.keys() == files.keys()
        for name, (_, colour) in files.items():
            assert (found[name] == np.uint8(colour).reshape(3, 1, 1)).all(), name


def test_the_held_out_split_is_set_aside_once_and_for_all(folder):
    for n in range(30):
        picture().save(folder / f"{n}.png")
    write_lines(folder, [entry(f"{n}.png", str(n)) for n in range(30)])
    train, test = corpora.folder_corpus(folder, 8)
    assert len(test.documents) == 3 and len(train.documents) == 27
    assert sorted(map(int, train.texts() + test.texts())) == list(range(30))
    again = corpora.folder_corpus(folder, 8)
    assert (again[0].documents, again[1].documents) == (train.documents, test.documents)


def test_all_captions_of_a_file_are_trained_on_or_none(folder):
    for n in range(20):
        picture().save(folder / f"{n}.png")
    write_lines(folder, [entry(name, str(n)) for _ in range(5) for n in range(20)
                         for name in [f"{n}.png" if n % 2 else f"./{n}.png"]])
    train, test = corpora.folder_corpus(folder, 8)
    assert len(train.documents) == 90 and len(test.documents) == 10
    assert not set(train.texts()) & set(test.texts())


def test_captions_of_any_unicode_are_read_as_they_are(folder):
    texts = ["你好", "line\u2028separator", "\x85", "\N{PILE OF POO}"]
    write_lines(folder, [json.dumps(entry(name, text), ensure_ascii=False)
                         for name, text in zip(["1.png", "2.png"] * 2, texts)])
    train, test = corpora.folder_corpus(folder)
    assert sorted(train.texts() + test.texts()) == sorted(texts)


@pytest.mark.parametrize("line, message", [
    ("{not json", "not JSON"),
    ('["a list"]', '"file_name" and "text"'),
    ({"text": "x"}, '"file_name" and "text"'),
    ({"file_name": "1.png"}, '"file_name" and "text"'),
    ({"file_name": "1.png", "text": 5}, '"file_name" and "text"'),
    (entry("gone.png"), "gone.png"),
    (entry(""), "no picture"),
    (entry("broken.png"), "broken.png"),
    (entry("cut.png"), "cut.png"),
    (entry("empty.jpg"), "empty.jpg"), (entry("texture.png"), "texture.png"),
    (entry("metadata.jsonl"), "cannot be read as a picture"),
])
def test_a_bad_line_is_named_by_file_and_number(folder, line, message):
    dds = b"DDS " + (124).to_bytes(4, "little") + bytes(68) + (32).to_bytes(4, "little") + bytes(48)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more of it")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "texture.png").write_bytes(dds)
    write_lines(folder, [entry("1.png"), entry("2.png"), line])
    with pytest.raises(InputError) as error:
        corpora.folder_corpus(folder)
    assert f"{folder / 'metadata.jsonl'}, line 3" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_metadata_file_that_is_not_utf8_is_named(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "1.png", "text": "caf\xe9"}\n')
    with pytest.raises(InputError, match="metadata.jsonl"):
        corpora.folder_corpus(folder)


def test_a_missing_folder_one_without_metadata_and_one_with_too_few_pictures_are_named(folder):
    with pytest.raises(InputError, match="no folder.*gone"):
        corpora.folder_corpus(folder / "gone")
    with pytest.raises(InputError, match="no folder.*1.png"):
        corpora.folder_corpus(folder / "1.png")
    for lines, count in (([], 0), ([entry("1.png")], 1)):
        write_lines(folder, lines)
        with pytest.raises(InputError, match=f"metadata.jsonl.* {count} "):
            corpora.folder_corpus(folder)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(InputError, match="has no metadata.jsonl"):
        corpora.folder_corpus(folder)
