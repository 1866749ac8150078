"""`python vqvae.py` and the others: what they print is true of the model and batch they show."""

import contextlib
import functools
import io
import re
from typing import Any, NamedTuple

import pytest
import torch

import small
from adapter import load

show, vqvae = load("show"), load("vqvae")
HOSTS = ("chameleon", "transfusion", "mot")

hosts = pytest.mark.parametrize("name", HOSTS)


class Tour(NamedTuple):
    printed: str
    model: Any
    batch: Any

    def section(self, title):
        """The lines below the one that begins with `title`, up to an empty line."""
        return re.search(rf"^{title}.*\n((?:.+\n)+)", self.printed, re.M)[1].splitlines()

    def table(self, title):
        """Its lines 'name  value' -> {name: value}, both as they are printed."""
        return dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in self.section(title))

    def flops(self):
        return int(re.search(r"^forward FLOPs per position: ([\d,]+)", self.printed,
                             re.M)[1].replace(",", ""))


def run(name):
    """What `python NAME.py` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        load(name).main()
    return printed.getvalue()


@functools.cache
def toured(name):
    """A host's tour, and the model and batch that it is about."""
    seen, tour = [], show.tour
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "tour", lambda *args: (seen.append(args), tour(*args)))
        printed = run(name)
    (model, batch), = seen
    return Tour(printed, model, batch)


def number(text):
    return int(text.replace(",", ""))


def first_length(batch):
    return batch.document[0].tolist().count(1)


# --- the hosts -----------------------------------------------------------------------------------

@hosts
def test_the_positions_and_the_padding_are_those_of_the_batch(name):
    tour = toured(name)
    batch, said = tour.batch, tour.printed.splitlines()[0]
    B, T = batch.tokens.shape
    assert f"({B}, {T}) positions" in said
    kinds = batch.modality.flatten().tolist()
    assert f" {kinds.count(0)} text, {kinds.count(1)} image" in said
    padding = batch.document.flatten().tolist().count(0) / (B * T)
    assert int(re.search(r"(\d+)% padding", said)[1]) == pytest.approx(100 * padding, abs=0.51)


@hosts
def test_the_first_document_is_printed_id_by_id(name):
    tour = toured(name)
    words = " ".join(tour.section("its first document")).split()
    tokens, kinds = (x[0].tolist() for x in (tour.batch.tokens, tour.batch.modality))
    layout, T = tour.model.layout, first_length(tour.batch)
    assert len(words) == T
    for word, token, kind in zip(words, tokens, kinds):
        special = {"<bos>": layout.bos, "<eos>": layout.eos, "<boi>": layout.begin[1],
                   "<eoi>": layout.end[1]}
        if word == "i":
            assert kind == 1 and name != "chameleon"
        else:
            assert special.get(word, word) in (token, str(token))
            assert kind == 0 or name == "chameleon"
    image = slice(words.index("<boi>") + 1, words.index("<eoi>"))
    assert set(kinds[image]) == {1} and kinds[:T].count(1) == image.stop - image.start
    assert words[0] == "<bos>" and words[-1] == "<eos>"


@hosts
def test_the_mask_is_printed_position_by_position(name):
    tour = toured(name)
    header, *rows = tour.section("who may attend to whom")
    T = first_length(tour.batch)
    n = min(T, 40)
    assert T <= 40 or name == "chameleon"           # elsewhere the whole document is seen
    letters = "".join("tI"[kind] for kind in tour.batch.modality[0, :n].tolist())
    assert header.strip() == letters and "tI" in letters
    reaches = small.reaches(tour.batch, whole_spans=name != "chameleon")[0, :n, :n].tolist()
    expected = [f"{i} {letter} " + "".join(".#"[seen] for seen in row)
                for i, (letter, row) in enumerate(zip(letters, reaches))]
    found = [re.fullmatch(r" *(\d+) ([tI]) ?([.#]+)", row).groups() for row in rows]
    assert [" ".join(parts) for parts in found] == expected
    column = header.index(letters)                  # the header stands above what it names
    assert all(row[column:] == parts[2] for row, parts in zip(rows, found))


@hosts
def test_the_shapes_are_those_of_the_batch_and_in_the_order_of_the_computation(name):
    tour = toured(name)
    B, T = tour.batch.tokens.shape
    text, image = tour.batch.sizes[:2]
    D, V = tour.model.config.width, tour.model.layout.size
    everywhere = (B * T, D) if name == "mot" else (B, T, D)
    block = ["blocks.0." + part for part in ("attention_norm", "attention", "ffn_norm", "ffn")]
    expected = {"token_embedding": (B, T, D) if name == "chameleon" else (text, D)}
    expected |= dict.fromkeys([*block, "blocks.0"], everywhere)
    if name == "mot":
        expected |= {"norm.copies.0": (text, D), "norm.copies.1": (image, D)}
    expected |= {"norm": everywhere, "head": (B, T, V) if name == "chameleon" else (text, V)}
    if name != "chameleon":
        expected |= {"patch_out.1": (image, tour.model.patch_in["1"].in_features)}
    printed = {part: shape for part, shape in tour.table("shapes, stage by stage").items()
               if part in expected}
    assert list(printed.items()) == [(part, str(shape)) for part, shape in expected.items()]
    if name == "mot":           # what each tower of a block sees
        printed = tour.table("shapes, stage by stage")
        for part in ("attention_norm", "attention.qkv", "attention.out", "ffn_norm", "ffn"):
            width = 3 * D if part.endswith("qkv") else D
            assert [printed[f"blocks.0.{part}.copies.{tower}"] for tower in (0, 1)] == [
                str((text, width)), str((image, width))]


@hosts
def test_the_printed_loss_is_the_sum_of_its_parts_and_of_a_model_that_knows_nothing(name):
    tour = toured(name)
    said = tour.table("shapes, stage by stage")["loss (untrained)"]
    loss, parts = said.split(", before weighting: ")
    parts = {part: float(value) for part, value in re.findall(r"(\w+) (\d+\.\d+)", parts)}
    log_v = torch.tensor(tour.model.layout.size).log().item()
    assert parts["text"] == pytest.approx(log_v, abs=6e-4)
    if name == "chameleon":
        assert parts["image"] == pytest.approx(log_v, abs=6e-4)
        expected = log_v + tour.model.config.z_loss * log_v ** 2
    else:
        noised = (~tour.batch.shown[1])[tour.batch.real[1] > 0].float().mean().item()
        assert f"the {noised:.0%} that are noised" in said and 0 < noised < 1
        expected = parts["text"] + tour.model.config.diffusion_weight * parts["image"] * noised
    assert float(loss) == pytest.approx(expected, abs=5e-3)


@hosts
def test_the_parameters_in_all_are_the_models_and_the_sum_of_the_parts(name):
    tour = toured(name)
    *parts, (last, total) = tour.table("parameters").items()
    count = sum(parameter.numel() for parameter in tour.model.parameters())
    assert last == "in all" and number(total) == count
    assert sum(number(value) for _, value in parts) == count
    towers = {tower for part, _ in parts for tower in re.findall(r"tower (\d)", part)}
    assert towers == ({"0", "1"} if name == "mot" else set())


@hosts
def test_the_flops_per_position_are_twice_the_weights_that_it_meets(name):
    tour = toured(name)
    config, positions = tour.model.config, tour.batch.tokens.numel()
    text, image = tour.batch.sizes[:2]
    D, V = config.width, tour.model.layout.size
    weights = config.depth * (4 * D * D + 3 * D * config.hidden) * positions
    if name == "chameleon":
        weights += D * V * positions
    else:           # the head sees text alone, the patches' projections images, the time a span
        patch, spans = tour.model.patch_in["1"].in_features, len(tour.batch.signals[1])
        weights += D * V * text + 2 * D * patch * image + 2 * D * D * spans
    attention = 2 * config.depth * tour.batch.tokens.shape[1] * D * positions   # q k^T, and its v
    assert tour.flops() == round(2 * (weights + attention) / positions)


def test_mot_has_the_flops_of_its_dense_host_and_tells_how_many_parameters_that_has():
    dense, mixture = toured("transfusion"), toured("mot")
    assert mixture.flops() == dense.flops()
    said = re.search(r"the dense host has ([\d,]+) parameters", mixture.printed)[1]
    assert said == dense.table("parameters")["in all"]
    assert f"and {dense.flops():,} FLOPs per position" in mixture.printed
    assert number(said) < number(mixture.table("parameters")["in all"])


# --- the autoencoder -----------------------------------------------------------------------------

@functools.cache
def autoencoders():
    """vqvae's printed lines -> {bottleneck: what is said of it}."""
    found = re.split(r"^(\w+): (?=pictures)", run("vqvae"), flags=re.M)
    return dict(zip(found[1::2], found[2::2]))


def test_both_bottlenecks_are_shown():
    assert list(autoencoders()) == ["vq", "kl"]


@pytest.mark.parametrize("name, encoder, encoded", [
    ("vq", "(64, 6, 8, 8)", "codes (64, 8, 8)"),
    ("kl", "(64, 12, 8, 8)", "latents (64, 6, 8, 8)")])        # mean and log variance: twice 6
def test_the_shapes_of_a_bottleneck(name, encoder, encoded):
    pictures = "(64, 3, 32, 32)"
    assert autoencoders()[name].splitlines()[0] == (
        f"pictures {pictures} -> encoder {encoder} -> {encoded} -> decoder {pictures}")


@pytest.mark.parametrize("name, part, weight", [("vq", "commitment", "commitment"),
                                                ("kl", "kl", "kl_weight")])
def test_the_parameters_and_the_loss_of_a_bottleneck(name, part, weight):
    model = vqvae.VQVAE(vqvae.VQVAEConfig(bottleneck=name))
    said = re.search(r"parameters ([\d,]+); untrained loss (.*), before weighting: (.*)",
                     autoencoders()[name])
    assert number(said[1]) == sum(parameter.numel() for parameter in model.parameters())
    parts = {part: float(value) for part, value in (pair.split() for pair in said[3].split(", "))}
    assert list(parts) == ["reconstruction", part] and parts["reconstruction"] > 0
    expected = parts["reconstruction"] + getattr(model.config, weight) * parts[part]
    assert float(said[2]) == pytest.approx(expected, abs=2e-3)


def test_the_codes_of_the_first_picture_are_printed_as_a_grid():
    said, config = autoencoders()["vq"], vqvae.VQVAEConfig()
    grid = [[int(i) for i in line.strip(" []").split()]
            for line in said.splitlines() if re.fullmatch(r"[\[\] \d]+", line)]
    assert [len(row) for row in grid] == [8] * 8 and f"of {config.codes} " in said
    codes = sum(grid, [])
    assert 0 <= min(codes) and max(codes) < config.codes and len(set(codes)) > 1
    used = int(re.search(r"(\d+)% are used", said)[1])
    assert len(set(codes)) / config.codes <= used / 100 + 0.005
