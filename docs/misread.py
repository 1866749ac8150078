"""Which clips a trained model misreads: for each action how many of 768 fresh ones get a caption of
another scene, and in what it differs.

    python docs/misread.py runs/mot-all         half a minute
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoints import load_system
from scores import fresh_cases
from worlds import motion

CASES, SEED = 768, 4321


def main():
    system = load_system(Path(sys.argv[1]) / "checkpoint.pt")
    scenes, _, clips = fresh_cases("video", CASES, np.random.default_rng(SEED), 32)
    read = list(map(motion.parse, system.caption(clips, "video")))
    for action in motion.ACTIONS:
        cases = [pair for pair in zip(scenes, read) if pair[0].action == action]
        wrong = Counter("no scene" if found is None else ", ".join(
            name for name in scene._fields if getattr(scene, name) != getattr(found, name))
            for scene, found in cases if found != scene)
        print(f"{action:14}{wrong.total():4} of {len(cases)}  {dict(wrong.most_common())}")


if __name__ == "__main__":
    main()
