"""A trained model with what tokenizes for it: documents of words and signals in, and out."""

import torch

from chameleon import Chameleon, ChameleonConfig
from data import pack_prompts, to_signal, unpack
from machine import precision
from mot import MoTChameleon, MoTTransfusion
from transfusion import Transfusion, TransfusionConfig

# (architecture, setting) -> the model, its config, and the bottleneck of the autoencoder it reads
MODELS = {("chameleon", "chameleon"): (Chameleon, ChameleonConfig, "vq"),
          ("transfusion", "transfusion"): (Transfusion, TransfusionConfig, "kl"),
          ("mot", "chameleon"): (MoTChameleon, ChameleonConfig, "vq"),
          ("mot", "transfusion"): (MoTTransfusion, TransfusionConfig, "kl")}


def build(arch, setting, config, layout, mot=None):
    """The model of an architecture; `mot`: what only mot.py asks for (towers, untie)."""
    model, config_class, _ = MODELS[arch, setting]
    return model(config_class(**config), layout, **(mot or {}))


def layout_of(tokenizer, codecs):
    """The layout of sequences that hold what these codecs ({modality name: Codec}) encode."""
    return tokenizer.layout({name: codec.shape for name, codec in codecs.items()},
                            {name: codec.codes for name, codec in codecs.items()})


class Codecs:
    """What tokenizes signals, modality by modality."""

    def __init__(self, codecs, device="cpu"):
        """codecs: {modality name: vqvae.Codec}, each on the device."""
        self.codecs, self.device = codecs, torch.device(device)

    def encode(self, name, signals):
        """Signals of a modality, stored or as its codec takes them -> codes or latents, on the CPU.
        """
        return self.in_parts(lambda part: self.codecs[name].encode(
            to_signal(part).to(self.device)), torch.as_tensor(signals))

    def decode(self, name, encoded):
        return self.in_parts(lambda part: self.codecs[name].decode(part.to(self.device)), encoded)

    @torch.no_grad()
    def in_parts(self, function, rows, batch=64):
        """function(rows), a batch at a time, written into one tensor on the CPU.

        What a few need fits a processor's cache. Were their results kept in a list, they would lie
        between what each batch needs for a moment, and memory would grow by gigabytes.
        """
        whole = None
        with precision(self.device):
            for start in range(0, max(1, len(rows)), batch):
                part = function(rows[start:start + batch])
                if whole is None:
                    whole = torch.empty(len(rows), *part.shape[1:], dtype=part.dtype)
                whole[start:start + batch] = part
        return whole

    @property
    def picture_size(self):
        """Pixels of a side, of pictures and of the frames of clips."""
        return next((codec.autoencoder.config.size[0] for name, codec in self.codecs.items()
                     if name != "audio"), 0)


class System(Codecs):
    """A model with what tokenizes for it: documents of words and signals in, and out."""

    def __init__(self, model, codecs, tokenizer, device="cpu", longest_text=0):
        """longest_text: ids of the longest text that the model learned from."""
        super().__init__(codecs, device)
        self.new_text = max(64, longest_text + 4)
        self.model, self.tokenizer, self.layout = model.eval(), tokenizer, model.layout
        self.positions = model.span_lengths

    def complete(self, prompts, spans=1, new_text=0, batch=128, **settings):
        """Go on with prompts [("text", str) | (modality, signal) | (modality, None: to draw), ...].

        Returns whole documents, signals as tensors. A span that the model began, but `spans` did
        not let it draw, is None. new_text: most ids of text to add (default: as many as the longest
        text has, and 64 at least). `settings` go to the model's `generate`.
        """
        documents = []
        for start in range(0, len(prompts), batch):
            documents += self._complete(prompts[start:start + batch], spans,
                                        new_text or self.new_text, settings)
        return documents

    def _complete(self, prompts, spans, new_text, settings):
        given = {name: [] for name in self.codecs}
        numbered = []
        for prompt in prompts:
            numbered.append([])
            for name, content in prompt:
                if name != "text" and content is not None:
                    given[name].append(content)
                    content = len(given[name]) - 1
                numbered[-1].append((name, content))
        encoded = {name: self.encode(name, torch.stack(signals))
                   for name, signals in given.items() if signals}
        batch = pack_prompts(numbered, self.tokenizer, self.layout, self.positions, encoded)
        # room for a span even where none may be drawn, or the model could not open one
        size = batch.tokens.shape[1] + new_text + max(spans, 1) * (max(self.positions) + 2)
        with precision(self.device):
            tokens, latents = self.model.generate(batch.to(self.device), size, spans, **settings)
        tokens, lengths = tokens.cpu(), (batch.document > 0).sum(1).tolist()
        completed = []
        for i, prompt in enumerate(prompts):
            open_span = bool(prompt) and prompt[-1][1] is None
            drawn = [x if x is None else x[i].cpu() for x in latents]
            new = unpack(tokens[i, lengths[i] - open_span:], drawn, self.layout, self.tokenizer)
            old = list(prompt[:-1] if open_span else prompt)
            if old and new and old[-1][0] == new[0][0] == "text":
                old[-1:], new = [("text", old[-1][1] + new[0][1])], new[1:]
            completed.append((old, new))
        return self._decode(completed)

    def _decode(self, completed):
        """[(old, new), ...] -> documents, where codes or latents in `new` have become signals."""
        signals = {}
        for kind in self.codecs:
            drawn = [content for _, new in completed for name, content in new
                     if name == kind and content is not None]
            signals[kind] = iter(self.decode(kind, torch.stack(drawn)) if drawn else ())
        return [old + [(name, content if name == "text" or content is None
                        else next(signals[name])) for name, content in new]
                for old, new in completed]

    def draw(self, captions, name="image", **settings):
        """Captions -> signals (N, ...) of a modality."""
        return self.follow([("text", text) for text in captions], name, **settings)

    def follow(self, segments, name, **settings):
        """A signal of a modality after each segment, whatever its own -> signals (N, ...)."""
        documents = self.complete([[segment, (name, None)] for segment in segments],
                                  new_text=2, **settings)
        return torch.stack([document[1][1] for document in documents])

    def caption(self, signals, name="image", **settings):
        """Signals (N, ...) of a modality -> captions."""
        documents = self.complete([[(name, signal)] for signal in signals], spans=0, **settings)
        return ["".join(part for kind, part in document if kind == "text")
                for document in documents]
