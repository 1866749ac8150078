"""Talk to a trained checkpoint: a prompt becomes a picture, a picture becomes a caption.

    python sample.py runs/mot "at the centre a large red circle on white."   writes a picture
    python sample.py runs/mot --image picture.png                            writes a caption
    python sample.py runs/mot                                                writes a free document

Without a prompt the model decides what comes next, words or a picture, until it ends the document.
"""

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from chameleon import Chameleon, ChameleonConfig
from data import InputError, Tokenizer, pack_prompts, read_picture, to_bytes, to_signal, unpack
from mot import MoTChameleon, MoTTransfusion
from transfusion import Transfusion, TransfusionConfig
from vqvae import VQVAE, Codec, VQVAEConfig

FORMAT = 1                  # of checkpoints; raised when an older reader no longer understands them

# (architecture, setting) -> the model, its config, and the bottleneck of the autoencoder it reads
MODELS = {("chameleon", "chameleon"): (Chameleon, ChameleonConfig, "vq"),
          ("transfusion", "transfusion"): (Transfusion, TransfusionConfig, "kl"),
          ("mot", "chameleon"): (MoTChameleon, ChameleonConfig, "vq"),
          ("mot", "transfusion"): (MoTTransfusion, TransfusionConfig, "kl")}


class System:
    """A model with what tokenizes for it: documents of words and signals in, and out."""

    def __init__(self, model, codecs, tokenizer, device="cpu"):
        """codecs: {modality name: vqvae.Codec}, each on the device."""
        self.model, self.codecs = model.eval(), codecs
        self.tokenizer, self.layout, self.device = tokenizer, model.layout, torch.device(device)
        self.positions = [model.positions(kind) if shape else 0
                          for kind, shape in enumerate(model.layout.shapes)]

    @torch.no_grad()
    def encode(self, name, signals):
        """Signals of a modality, as its codec takes them -> codes or latents, on the CPU."""
        with precision(self.device):
            return self.codecs[name].encode(signals.to(self.device)).cpu()

    @torch.no_grad()
    def decode(self, name, encoded):
        with precision(self.device):
            return self.codecs[name].decode(encoded.to(self.device)).cpu()

    @property
    def picture_size(self):
        """Pixels of a side."""
        return self.codecs["image"].autoencoder.config.size[0]

    def complete(self, prompts, spans=1, new_text=64, batch=128, **settings):
        """Go on with prompts [("text", str) | ("image", picture) | ("image", None: to draw), ...].

        Returns whole documents, pictures as (3, H, W) tensors. A picture that the model began, but
        `spans` did not let it draw, is None. `settings` go to the model's `generate`.
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

    def draw(self, captions, **settings):
        """Captions -> pictures (N, 3, H, W)."""
        documents = self.complete([[("text", text), ("image", None)] for text in captions],
                                  new_text=2, **settings)
        return torch.stack([next(part for name, part in document if name == "image")
                            for document in documents])

    def caption(self, pictures, **settings):
        """Pictures (N, 3, H, W) -> captions."""
        documents = self.complete([[("image", picture)] for picture in pictures],
                                  spans=0, **settings)
        return ["".join(part for name, part in document if name == "text")
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
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # whatever torch, zip or pickle make of a broken or foreign file
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(f'"{path}" cannot be loaded as a checkpoint: {reason}') from None
    if not isinstance(saved, dict) or "format" not in saved:
        raise InputError(f'"{path}" is not a checkpoint of this project')
    if saved["format"] > FORMAT:
        raise InputError(f'"{path}" has format {saved["format"]}, newer than this code knows '
                         f"({FORMAT}): update the code")
    wanted = ["arch", "autoencoder"]
    if saved.get("arch") != "vqvae":
        wanted = ["arch", "autoencoders", "setting", "config", "mot", "merges", "ema"]
    missing = [name for name in wanted if name not in saved]
    if missing:
        raise InputError(f'"{path}" lacks {", ".join(missing)}: not a whole checkpoint')
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
                            {name: codec.codes for name, codec in codecs.items()})


def load_system(path, device="cpu"):
    """A trained model, ready to talk."""
    saved = load_checkpoint(path)
    if saved["arch"] == "vqvae":
        raise InputError(f'"{path}" is an autoencoder; '
                         "sample.py talks to chameleon, transfusion and mot")
    tokenizer = Tokenizer(saved["merges"])
    codecs = {name: Codec(name, load_autoencoder(kept).to(device))
              for name, kept in saved["autoencoders"].items()}
    model = build(saved["arch"], saved["setting"], saved["config"], layout_of(tokenizer, codecs),
                  saved["mot"])
    model.load_state_dict(saved["ema"])
    return System(model.to(device), codecs, tokenizer, device)


# --- the machine ---------------------------------------------------------------------------------

def pick_device(name):
    """auto, cpu, cuda or mps -> torch.device; InputError where the machine has none such."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none that torch can use; "
                         "try --device auto")
    return torch.device(name)


def precision(device):
    """The context to compute in: bf16 where the machine is fast at it, else fp32."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bf16(device) else nullcontext()


def fast_bf16(device, known={}):
    """Whether bf16 matrix products are worth it; on a CPU measured, once, in a few milliseconds."""
    if device.type not in known:
        if device.type == "cpu":
            seconds = {}
            for dtype in (torch.float32, torch.bfloat16):
                a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
                for _ in range(3):
                    start = time.perf_counter()
                    a @ b
                    taken = time.perf_counter() - start
                    seconds[dtype] = min(seconds.get(dtype, taken), taken)
            known["cpu"] = seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]
        else:
            known[device.type] = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return known[device.type]


# --- command line --------------------------------------------------------------------------------

def save_picture(picture, path, scale=8):
    """(3, H, W) in [-1, 1] -> a PNG or JPEG file, enlarged so that its pixels can be seen."""
    from PIL import Image
    image = Image.fromarray(to_bytes(picture).transpose(1, 2, 0))
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def write_document(document, path):
    """A document as Markdown, its pictures beside it."""
    path, lines, count = Path(path), [], 0
    for name, content in document:
        if name == "text":
            lines.append(content)
        elif content is not None:
            count += 1
            picture = path.with_name(f"{path.stem}-{count}.png")
            save_picture(content, picture)
            lines.append(f"![{name} {count}]({picture.name})")
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
    parser.add_argument("--out", help="the file to write (default: sample.png or sample.md; "
                                      "a caption is printed)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; 1 is none")
    parser.add_argument("--temperature", type=float, default=0.8, help="of a free document's text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    return parser.parse_args()


def main():
    args = arguments()
    if args.image and args.prompt:
        raise InputError("give a prompt to draw or --image to read, not both")
    system = load_system(args.run, pick_device(args.device))
    torch.manual_seed(args.seed)
    settings = {} if args.guidance is None else {"guidance": args.guidance}
    name = args.out or ("" if args.image else "sample.png" if args.prompt else "sample.md")
    out = Path(name)
    if name and (not os.path.isdir(out.parent) or os.path.isdir(out)):
        raise InputError(f'--out: "{out}" is not a file in a folder that exists')
    if args.image:
        picture = to_signal(read_picture(args.image, system.picture_size))
        made = system.caption(picture[None])[0]
        print(made)
    elif args.prompt:
        made = system.draw([args.prompt], **settings)[0]
    else:
        made = system.complete([[]], spans=3, temperature=args.temperature, **settings)[0]
        print(" ".join(content if name == "text" else f"[{name}]" for name, content in made))
    if not name:
        return
    try:
        if args.image:
            out.write_text(made + "\n", encoding="utf-8")
        else:
            (save_picture if args.prompt else write_document)(made, out)
    except (OSError, ValueError) as error:
        raise InputError(f'"{out}" cannot be written ({error})') from None
    print(f"wrote {out}")


def run(main):
    """Call a command line's main; what the user got wrong is one sentence and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
