"""Run every command of the README's ```sh blocks, in order, with a few steps and cases only."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

SHORT = {"train.py": ["--steps", "2", "--autoencoder-steps", "2", "--cases", "8",
                      "--examples", "300"]}


def commands(readme):
    """The python and torchrun commands of a Markdown file's sh blocks, comments removed."""
    blocks = re.findall(r"^```sh\n(.*?)^```", Path(readme).read_text(encoding="utf-8"), re.S | re.M)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line.split("&&")[-1]) for line in lines
            if "python" in line or "torchrun" in line]


def make_pictures(folder):
    """A small folder such as `--data` reads."""
    sys.path.insert(0, ".")
    import numpy as np

    from media import save_picture
    from worlds import shapes
    rng, lines = np.random.default_rng(0), []
    Path(folder).mkdir(exist_ok=True)
    for i in range(12):
        scene = shapes.sample(rng)
        save_picture(shapes.render(scene, rng), Path(folder) / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": shapes.describe(scene, rng)}))
    (Path(folder) / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def main():
    make_pictures("my_pictures")
    for command in commands(sys.argv[1]):
        if command[1:3] == ["-m", "pytest"]:
            continue                    # CI runs the tests by themselves
        program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[command[0]]
        script = next(word for word in command if word.endswith(".py"))
        given = command[1:]
        extra = [word for option, value in zip(*[iter(SHORT.get(script, []))] * 2)
                 if option not in given and not ("vqvae" in given and "auto" in option)
                 for word in (option, value)]
        if "--help" in given:
            extra = []
        print("$", " ".join(command + extra), flush=True)
        done = subprocess.run([sys.executable, *program, *command[1:], *extra],
                              stderr=subprocess.PIPE)
        if done.returncode:
            sys.exit(done.stderr.decode(errors="replace")[-2000:])


if __name__ == "__main__":
    main()
