"""Talk to a trained checkpoint: a prompt becomes a picture, sound or clip, and these a caption.

    python sample.py runs/mot "at the centre a large red circle on white."   writes a picture
    python sample.py runs/mot --image picture.png                            writes a caption
    python sample.py runs/mot                                                writes a free document
    python sample.py runs/mot-all "a loud sine wave plays C5, G5."           writes a sound
    python sample.py runs/mot-all --audio sample.wav                         writes a caption
    python sample.py runs/mot-all --video clip.gif --to audio                writes a clip's sound

Without a prompt the model decides what comes next, words or a signal, until it ends the document.
"""

import argparse
import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path

import torch

from chameleon import Chameleon, ChameleonConfig
from data import InputError, Tokenizer, pack_prompts, to_signal, unpack
from machine import pick_device, precision
from media import read_picture, read_sound, read_video, save_picture, save_sound, save_video
from mot import MoTChameleon, MoTTransfusion
from transfusion import Transfusion, TransfusionConfig
from vqvae import READ_BY, VQVAE, Codec, VQVAEConfig
from worlds import tones

FORMAT = 2                  # of checkpoints; raised when what they hold changes

# (architecture, setting) -> the model, its config, and the bottleneck of the autoencoder it reads
MODELS = {("chameleon", "chameleon"): (Chameleon, ChameleonConfig, "vq"),
          ("transfusion", "transfusion"): (Transfusion, TransfusionConfig, "kl"),
          ("mot", "chameleon"): (MoTChameleon, ChameleonConfig, "vq"),
          ("mot", "transfusion"): (MoTTransfusion, TransfusionConfig, "kl")}


class Codecs:
    """What tokenizes signals, modality by modality."""

    def __init__(self, codecs, device="cpu"):
        """codecs: {modality name: vqvae.Codec}, each on the device."""
        self.codecs, self.device = codecs, torch.device(device)

    @torch.no_grad()
    def encode(self, name, signals, batch=512):
        """Signals of a modality, stored or as its codec takes them -> codes or latents, on the CPU.
        """
        with precision(self.device):
            return torch.cat([self.codecs[name].encode(to_signal(part).to(self.device)).cpu()
                              for part in torch.as_tensor(signals).split(batch)])

    @torch.no_grad()
    def decode(self, name, encoded, batch=512):
        with precision(self.device):
            return torch.cat([self.codecs[name].decode(part.to(self.device)).cpu()
                              for part in encoded.split(batch)])

    @property
    def picture_size(self):
        """Pixels of a side, of pictures and of the frames of clips."""
        return next((codec.autoencoder.config.size[0] for name, codec in self.codecs.items()
                     if name != "audio"), 0)


class System(Codecs):
    """A model with what tokenizes for it: documents of words and signals in, and out."""

    def __init__(self, model, codecs, tokenizer, device="cpu"):
        super().__init__(codecs, device)
        self.model, self.tokenizer, self.layout = model.eval(), tokenizer, model.layout
        self.positions = [model.positions(kind) if shape else 0
                          for kind, shape in enumerate(model.layout.shapes)]

    def complete(self, prompts, spans=1, new_text=64, batch=128, **settings):
        """Go on with prompts [("text", str) | (modality, signal) | (modality, None: to draw), ...].

        Returns whole documents, signals as tensors. A span that the model began, but `spans` did
        not let it draw, is None. `settings` go to the model's `generate`.
        """
        documents = []
        for start in range(0, len(prompts), batch):
            documents += self._complete(prompts[start:start + batch], spans, new_text, settings)
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


# --- checkpoints ---------------------------------------------------------------------------------

def build(arch, setting, config, layout, mot=None):
    """The model of an architecture; `mot`: what only mot.py asks for (towers, untie)."""
    model, config_class, _ = MODELS[arch, setting]
    return model(config_class(**config), layout, **(mot or {}))


def load_checkpoint(path):
    """A run's folder or its checkpoint.pt -> its contents, checked; InputError where it is none."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f'there is no checkpoint "{path}"; train one with: python train.py mot')
    if path.stat().st_size == 0 or not zipfile.is_zipfile(path):     # as torch.save writes them
        raise InputError(f'"{path}" is not a checkpoint, or cut short')
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f'"{path}" holds more than tensors and plain values, code perhaps: '
                         "refused, and nothing in it was run") from None
    except Exception as error:      # whatever torch and zip make of a broken or foreign file
        raise InputError(f'"{path}" cannot be loaded as a checkpoint '
                         f"({type(error).__name__}): it is broken, or of something else") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise InputError(f'"{path}" is not a checkpoint of this project')
    if saved["format"] != FORMAT:
        newer = saved["format"] > FORMAT
        raise InputError(f'"{path}" has format {saved["format"]}, this code reads {FORMAT}: '
                         + ("update the code" if newer else "train it again"))
    wanted = ["arch", "autoencoder"]
    if saved.get("arch") != "vqvae":
        wanted = ["arch", "autoencoders", "codecs", "setting", "config", "mot", "merges", "ema",
                  "train", "model", "optimizer", "step", "seconds", "stream", "digest", "bf16"]
    missing = [name for name in wanted if name not in saved]
    if missing:
        raise InputError(f'"{path}" lacks {", ".join(missing)}: not a whole checkpoint')
    if saved["arch"] != "vqvae" and (saved["arch"], saved["setting"]) not in MODELS:
        raise InputError(f'"{path}" is of an architecture that this code does not know: '
                         f'{saved["arch"]} ({saved["setting"]})')
    return saved


def load_autoencoder(saved):
    """{"config", "weights"} -> VQVAE."""
    config = {name: _tuples(value) for name, value in saved["config"].items()}
    autoencoder = VQVAE(VQVAEConfig(**config))
    autoencoder.load_state_dict(saved["weights"])
    return autoencoder.eval()


def _tuples(value):
    return tuple(_tuples(part) for part in value) if isinstance(value, (list, tuple)) else value


def layout_of(tokenizer, codecs):
    """The layout of sequences that hold what these codecs ({modality name: Codec}) encode."""
    return tokenizer.layout({name: codec.shape for name, codec in codecs.items()},
                            {name: codec.codes for name, codec in codecs.items()}, READ_BY,
                            {name: codec.frames for name, codec in codecs.items()})


def load_system(path, device="cpu"):
    """A trained model, ready to talk."""
    saved = load_checkpoint(path)
    if saved["arch"] == "vqvae":
        raise InputError(f'"{path}" is an autoencoder; '
                         "sample.py talks to chameleon, transfusion and mot")
    try:
        tokenizer = Tokenizer(saved["merges"])
        autoencoders = {name: load_autoencoder(kept).to(device)
                        for name, kept in saved["autoencoders"].items()}
        codecs = {name: Codec(name, autoencoders[READ_BY[name]], frames)
                  for name, frames in saved["codecs"].items()}
        model = build(saved["arch"], saved["setting"], saved["config"],
                      layout_of(tokenizer, codecs), saved["mot"])
        model.load_state_dict(saved["ema"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise InputError(f'"{path}" holds a model that this code cannot build: it was written by '
                         "another version, or changed since") from None
    return System(model.to(device), codecs, tokenizer, device)


# --- command line --------------------------------------------------------------------------------

SUFFIX = {"image": ".png", "audio": ".wav", "video": ".gif"}
SAVE = {"image": save_picture, "audio": save_sound, "video": save_video}


def read_signal(name, path, system):
    """A file -> a signal of that modality, as the system takes it."""
    if name not in system.codecs:
        known = ", ".join(system.codecs) or "text alone"
        raise InputError(f"--{name}: this model was not trained on it; it knows {known}")
    if name == "audio":
        return to_signal(read_sound(path, tones.LENGTH, tones.RATE))
    if name == "video":
        return to_signal(read_video(path, system.codecs[name].frames, system.picture_size))
    return to_signal(read_picture(path, system.picture_size))


def write_document(document, path):
    """A document as Markdown, its signals as files beside it."""
    path, lines, count = Path(path), [], 0
    for name, content in document:
        if name == "text":
            lines.append(content)
        elif content is not None:
            count += 1
            file = path.with_name(f"{path.stem}-{count}{SUFFIX[name]}")
            SAVE[name](content, file)
            lines.append("!" * (name != "audio") + f"[{name} {count}]({file.name})")
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see: python {self.prog} --help)")


def arguments():
    parser = Parser(prog="sample.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, or its checkpoint.pt")
    parser.add_argument("prompt", nargs="?",
                        help="what to draw; without it, a free-running document")
    parser.add_argument("--image", help="a picture to read: writes its caption")
    parser.add_argument("--audio", help="a .wav file to read: writes its caption")
    parser.add_argument("--video", help="a .gif file to read: writes its caption")
    parser.add_argument("--to", choices=("text", *SUFFIX),
                        help="what follows the prompt or file (default: the model decides after a "
                             "prompt; a caption follows a file)")
    parser.add_argument("--out", help="the file to write (default: sample.png, .wav, .gif or .md; "
                                      "a caption is printed)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
    parser.add_argument("--temperature", type=float, default=0.8, help="of a free document's text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_args()


def main():
    args = arguments()
    given = [(name, getattr(args, name)) for name in SUFFIX if getattr(args, name) is not None]
    given += [("text", args.prompt)] * bool(args.prompt)
    if args.to and not given:
        raise InputError("--to says what follows a prompt or a file: give one")
    if len(given) > 1:
        raise InputError("give one thing to go on from: a prompt, --image, --audio or --video")
    if args.out and (not os.path.isdir(Path(args.out).parent) or os.path.isdir(args.out)):
        raise InputError(f'--out: "{args.out}" is not a file in a folder that exists')
    system = load_system(args.run, pick_device(args.device))
    torch.manual_seed(args.seed)
    settings = {} if args.guidance is None else {"guidance": args.guidance}
    if not given:
        made = system.complete([[]], spans=3, temperature=args.temperature, **settings)[0]
        print(" ".join(content if name == "text" else f"[{name}]" for name, content in made))
        return write(args.out or "sample.md", write_document, made)
    name, content = given[0]
    segment = (name, content if name == "text" else read_signal(name, content, system))
    kind, made = answer(system, segment, args.to, settings)
    if kind == "text":
        print(made)
        return args.out and write(args.out, lambda text, path:
                                  path.write_text(text + "\n", encoding="utf-8"), made)
    out = Path(args.out or "sample" + SUFFIX[kind])
    if kind != "image" and out.suffix.lower() != SUFFIX[kind]:
        raise InputError(f'--out: "{out}" would hold a {SUFFIX[kind]} file: name it so')
    write(out, SAVE[kind], made)


def answer(system, segment, kind, settings):
    """What follows a segment -> (modality, its content); kind None: as the model decides."""
    if kind not in (None, "text", *system.codecs):
        raise InputError(f"--to {kind}: this model was not trained on it; "
                         f"it knows {', '.join(['text', *system.codecs])}")
    if kind is None and segment[0] == "text" and len(system.codecs) == 1:
        kind = next(iter(system.codecs))        # nothing to decide
    if kind is None and segment[0] == "text" and system.codecs:
        found = [part for part in system.complete([[segment]], **settings)[0] if part[0] != "text"]
        if not found:
            raise InputError("the model would go on with words: say what shall follow with --to")
        return found[0]
    if kind in system.codecs:
        return kind, system.follow([segment], kind, **settings)[0]
    document = system.complete([[segment]], spans=0)[0]
    return "text", "".join(content for name, content in document if name == "text")


def write(path, save, made):
    try:
        save(made, Path(path))
    except (OSError, ValueError) as error:
        raise InputError(f'"{path}" cannot be written ({error})') from None
    print(f"wrote {path}")


def run(main):
    """Call a command line's main; what the user got wrong is one sentence and exit code 2."""
    def terminated(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:            # a full disk, say
        print(f"error: {error}; what was saved before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(stopped if stopped.args else "stopped; what was saved before is kept",
              file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run(main)
