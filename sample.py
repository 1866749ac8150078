"""Talk to a trained checkpoint: a prompt becomes a picture, sound or clip, and these a caption.

    python sample.py runs/mot "at the centre a large red circle on white."   writes a picture
    python sample.py runs/mot --image picture.png                            writes a caption
    python sample.py runs/mot                                                writes a free document
    python sample.py runs/mot-all "a loud sine wave plays C5, E5."           writes a sound
    python sample.py runs/mot-all --audio sample.wav                         writes a caption
    python sample.py runs/mot-all --video clip.gif --to audio                writes a clip's sound

Without a prompt the model decides what comes next, words or a signal, until it ends the document.
"""

import argparse
import math
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from checkpoints import load_system
from data import InputError, is_unicode, to_signal
from machine import pick_device
from media import read_picture, read_sound, read_video, save_picture, save_sound, save_video
from worlds import tones

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
                        help="what follows the prompt or file (default: after a prompt what the "
                             "model draws, or decides to; a caption after a file)")
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
    if not (args.temperature >= 0 and math.isfinite(args.temperature)
            and math.isfinite(args.guidance or 0) and 0 <= args.seed < 2 ** 63):
        raise InputError("--temperature must be 0 or more, --guidance a finite number, "
                         "--seed 0 or more and below 2^63")
    if args.prompt and not is_unicode(args.prompt):
        raise InputError("the prompt is not valid Unicode")
    system = load_system(args.run, pick_device(args.device))
    torch.manual_seed(args.seed)
    settings = {} if args.guidance is None else {"guidance": args.guidance}
    if not given:
        made = system.complete([[]], spans=3, temperature=args.temperature, **settings)[0]
        print(" ".join(content if name == "text" else f"[{name}]" for name, content in made))
        return write(as_text(args.out or "sample.md"), write_document, made)
    name, content = given[0]
    read = "" if name == "text" else content
    segment = (name, content if name == "text" else read_signal(name, content, system))
    kind, made = answer(system, segment, args.to, settings)
    if kind == "text":
        print(made)
        return args.out and write(as_text(args.out), lambda text, path:
                                  path.write_text(text + "\n", encoding="utf-8"), made, read)
    out = Path(args.out or "sample" + SUFFIX[kind])
    if kind != "image" and out.suffix.lower() != SUFFIX[kind]:
        raise InputError(f'--out: "{out}" would hold a {SUFFIX[kind]} file: name it so')
    write(out, SAVE[kind], made, read)


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


def as_text(path):
    """A path for words; InputError where its name is that of something else."""
    if Path(path).suffix.lower() not in ("", ".txt", ".md"):
        raise InputError(f'--out: "{path}" would hold words: name it .txt or .md')
    return path


def write(path, save, made, read=""):
    """Write a file; InputError where that fails, or where it would replace the one that was read.
    """
    if read and os.path.exists(path) and os.path.samefile(path, read):
        raise InputError(f'"{path}" is the file that was read: give another --out')
    try:
        save(made, Path(path))
    except (OSError, ValueError) as error:
        raise InputError(f'"{path}" cannot be written ({error}); give another --out') from None
    print(f"wrote {path}")


def run(main):
    """Call a command line's main; what the user got wrong is one sentence and exit code 2."""
    def terminated(*_):
        raise KeyboardInterrupt

    def dropped(what):      # Python drops what is raised while it tidies up: a moment later, again
        if not issubclass(what.exc_type, KeyboardInterrupt):
            return hook(what)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before, hook = signal.signal(signal.SIGTERM, terminated), sys.unraisablehook
    sys.unraisablehook = dropped
    try:
        main()
    except InputError as error:
        sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        print(f"error: {sentence}", file=sys.stderr)    # of a file's name, or a caption's, as well
        sys.exit(2)
    except OSError as error:            # a full disk, say
        print(f"error: {error}; what was saved before is kept", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(stopped if stopped.args else "stopped; what was saved before is kept",
              file=sys.stderr)
        sys.exit(130)
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    run(main)
