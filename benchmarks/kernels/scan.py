"""Seconds of the first scan of 20,000 labels, links to the images of a folder. Argument: the folder."""

import random
import sys
import tempfile
import time
from pathlib import Path

try:
    from data.labels.labels import load_annotations
except ImportError:  # an older checkout
    from data.labels import load_annotations

IMAGES = 20_000

rng = random.Random(0)
images = sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_file())
with tempfile.TemporaryDirectory() as root:
    folders = [Path(root, name, "train") for name in ("images", "labels")]
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(IMAGES):
        image = images[i % len(images)]
        (folders[0] / f"{i:06d}{image.suffix}").symlink_to(image)
        rows = [
            f"{rng.randrange(80)} {rng.uniform(0.2, 0.8):.6f} {rng.uniform(0.2, 0.8):.6f} 0.2 0.3\n"
            for _ in range(rng.randint(1, 15))
        ]
        (folders[1] / f"{i:06d}.txt").write_text("".join(rows), encoding="ascii")
    start = time.perf_counter()
    load_annotations([str(folders[0])], 80, progress=False)
    print(f"result: {time.perf_counter() - start}")
