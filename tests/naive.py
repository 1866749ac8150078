"""What `generate` shall give, by a loop: one row, no cache, each step through the whole row.

Text and codes are greedy, Euler steps start from noise that is given. Either host, dense or MoT.
"""

import pytest
import torch

import small
from adapter import load

data, transfusion = load("data"), load("transfusion")


def opens(layout, ids, size):
    """Ids that may follow text: text, <eos>, the begin of a span that fits."""
    return [*range(layout.text), layout.eos] + [
        layout.begin[kind] for kind, shape in enumerate(layout.shapes)
        if shape and len(ids) + small.POSITIONS[kind] + 2 <= size]


def best(logits, allowed):
    return max(allowed, key=logits.tolist().__getitem__)


# --- Chameleon -----------------------------------------------------------------------------------

def kinds_of(ids, layout):
    """The modality of each id: a code's is that of the span in which it stands."""
    kinds, inside = [], 0
    for i in ids:
        inside = 0 if i in layout.end else inside
        kinds.append(inside)
        inside = layout.begin.index(i) if i in layout.begin else inside
    return kinds


def logits_after(model, ids):
    """Logits after a row of ids, by the whole row."""
    tokens, kinds = torch.tensor([ids]), kinds_of(ids, model.layout)
    modality = torch.tensor([kinds])
    order = modality.flatten().argsort(stable=True)
    place = [0]
    for kind in kinds:          # a code's number within its span
        place.append(place[-1] + 1 if kind else 0)
    place = torch.tensor([place[1:]])
    batch = data.Batch(tokens, tokens, modality, modality, place, torch.ones_like(tokens),
                       order, order.argsort(), tuple(kinds.count(kind) for kind in range(4)),
                       (None,) * 4, None, None)
    with torch.no_grad():
        return model.head(model(batch))[0, -1]


def generate_codes(model, ids, size, spans, guidance):
    """A row of Chameleon: every step runs the whole row, and its null branch."""
    layout, ids, drawn = model.layout, list(ids), 0
    while len(ids) < size and ids[-1] != layout.eos:
        begin = max((i for i, token in enumerate(ids) if token in layout.begin[1:]), default=None)
        inside = begin is not None and layout.end[layout.begin.index(ids[begin])] not in ids[begin:]
        logits = logits_after(model, ids)
        if inside:
            kind = layout.begin.index(ids[begin])
            if drawn == spans:
                break
            null = logits_after(model, [layout.bos, *ids[begin:]])
            logits = null + guidance * (logits - null)
            whole = len(ids) - begin - 1 == small.POSITIONS[kind]
            allowed = [layout.end[kind]] if whole else range(*layout.codes[kind])
            drawn += whole
        else:
            allowed = opens(layout, ids, size)
        ids.append(best(logits, allowed))
    return ids + [layout.pad] * (size - len(ids))


# --- Transfusion ---------------------------------------------------------------------------------

def tokens_of(document, layout):
    """The ids of an open document, <pad> where latents stand."""
    ids = [layout.bos]
    for name, content in document:
        kind = data.MODALITIES.index(name)
        ids += list(content.encode()) if not kind else [layout.begin[kind]]
        if kind and content is not None:
            ids += [layout.pad] * small.POSITIONS[kind] + [layout.end[kind]]
    return ids


def hidden_after(model, ids, latents, t=0.0):
    """Hidden states of one row of ids; latents: [(kind, x), ...], the last of them at time t."""
    layout = model.layout
    kinds, signals, times, number = [], [[], [], [], []], [[], [], [], []], 0
    spans, open_kind = [], 0
    for i, token in enumerate(ids):
        inside = token == layout.pad
        if inside and ids[i - 1] != layout.pad:
            open_kind = layout.begin.index(ids[i - 1])
            signals[open_kind].append(latents[number][1])
            times[open_kind].append(t if number == len(latents) - 1 else 0.0)
            number += 1
        kinds.append(open_kind if inside else 0)
        spans.append(number if inside else 0)
    tokens, modality = torch.tensor([ids]), torch.tensor([kinds])
    order = modality.flatten().argsort(stable=True)
    batch = data.Batch(
        tokens, tokens, modality, torch.tensor([spans]), torch.zeros_like(tokens),
        torch.ones_like(tokens), order, order.argsort(),
        tuple(kinds.count(kind) for kind in range(4)),
        tuple(torch.stack(x) if x else None for x in signals), None, None)
    with torch.no_grad():
        return model(batch, [torch.tensor(x) if x else None for x in times])[0]


def generate_latents(model, document, noise, size, spans, steps, guidance):
    """A row of Transfusion -> ids, [(kind, latents drawn), ...]; noise by kind, for all its spans.
    """
    layout, table, drawn = model.layout, small.signals("transfusion"), []
    ids = tokens_of(document, layout)
    given = [(data.MODALITIES.index(name), table[name][content])
             for name, content in document if name != "text" and content is not None]
    while len(ids) < size and ids[-1] != layout.eos:
        if ids[-1] in layout.begin:
            kind = layout.begin.index(ids[-1])
            if len(drawn) == spans:
                break
            n, x = small.POSITIONS[kind], noise[kind]
            for step in range(steps):
                t, velocities = 1 - step / steps, []
                for prefix, before in ((ids, given + drawn), ([layout.bos, ids[-1]], [])):
                    row = hidden_after(model, prefix + [layout.pad] * n, [*before, (kind, x)], t)
                    patches = model.patch_out[str(kind)](row[-n:])[None]
                    velocities.append(transfusion.unpatchify(patches, layout.shapes[kind],
                                                             model.config.patch)[0])
                conditional, null = velocities
                x = x - (null + guidance * (conditional - null)).detach() / steps
            drawn.append((kind, x))
            ids = ids + [layout.pad] * n + [layout.end[kind]]
            continue
        logits = model.head(hidden_after(model, ids, given + drawn)[-1])
        ids = ids + [best(logits, opens(layout, ids, size))]
    return ids + [layout.pad] * (size - len(ids)), drawn


# --- either --------------------------------------------------------------------------------------

def check_latents(model, documents, size, spans, steps, guidance):
    """Assert that Transfusion's `generate` gives what the loop gives -> the kinds drawn, by row."""
    noises, randn, kinds = {}, torch.randn, []

    def repeated(*shape, **options):            # the same noise for every span of a modality
        kind = model.layout.shapes.index(tuple(shape[1:]))
        return noises.setdefault(kind, randn(*shape, **options))

    prompt = small.prompts("transfusion", documents, model.layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", repeated)
        tokens, latents = model.generate(prompt, size, spans, steps=steps, guidance=guidance)
    for b, document in enumerate(documents):
        noise = {kind: x[b] for kind, x in noises.items()}
        expected, drawn = generate_latents(model, document, noise, size, spans, steps, guidance)
        assert tokens[b].tolist() == expected
        kinds.append([kind for kind, _ in drawn])
        for kind, found in enumerate(latents):
            of_kind = [x for k, x in drawn if k == kind]
            assert (found is None) == (model.layout.shapes[kind] is None)
            for x, y in zip(of_kind, () if found is None else found[b]):
                torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
    return kinds


def check_codes(model, documents, size, spans, guidance):
    """Assert that Chameleon's `generate` gives what the loop gives -> the kinds drawn, by row."""
    prompt, kinds = small.prompts("chameleon", documents, model.layout), []
    tokens, latents = model.generate(prompt, size, spans, guidance, code_temperature=0)
    assert latents == [None] * 4
    for found, row, document in zip(tokens.tolist(), prompt.tokens, prompt.document):
        start = row[:int((document > 0).sum())].tolist()
        assert found == generate_codes(model, start, size, spans, guidance)
        begun = len(start) - (start[-1] in model.layout.begin)
        kinds.append(small.check_grammar(found, begun, size, spans, model.layout,
                                         lambda kind, i: i in range(*model.layout.codes[kind])))
    return kinds


def check(setting, model, documents, size=34, spans=1, guidance=2.0):
    """Assert that `generate` gives what the loop gives -> the kinds drawn, by row."""
    if setting == "transfusion":
        return check_latents(model, documents, size, spans, 2, guidance)
    return check_codes(model, documents, size, spans, guidance)


def check_crossing(setting, model, guidance=2.0):
    """Assert that `generate` draws a span of each modality after a prompt that ends in each."""
    kinds = check(setting, model, small.CROSSING, guidance=guidance)
    assert kinds == [[data.MODALITIES.index(document[-1][0])] for document in small.CROSSING]
    assert len(kinds) == 12 and {tuple(drawn) for drawn in kinds} == {(1,), (2,), (3,)}
