"""Median milliseconds of a mosaic at 640 pixels, 2 workers. Arguments: a folder of images, the cache (none or ram)."""

import statistics
import sys
import tempfile
import time

from utils.files import ROOT
from utils.yaml_lines import load_yaml

try:
    from data.augment.config import AugmentConfig
    from data.labels.labels import load_annotations
    from data.loading.dataset import DetectionDataset
    from data.loading.loader import DetectionLoader
    from utils.device import keep_freed_memory
except ImportError:  # an older checkout
    from data.augment_config import AugmentConfig
    from data.dataset import DetectionDataset
    from data.loader import create_loader as DetectionLoader

    from data.labels import load_annotations
else:
    keep_freed_memory()  # as train.py does

folder, cache = sys.argv[1:]
with tempfile.TemporaryDirectory() as caches:
    records = load_annotations([folder], 10**6, cache_folder=caches, progress=False).records
recipe = AugmentConfig.from_hyp(load_yaml(ROOT / "data/hyps/hyp.scratch-low.yaml"))
dataset = DetectionDataset(list(records) * 3, 640, augment=recipe, cache=None if cache == "none" else cache)
loader = DetectionLoader(dataset, 16, workers=2, shuffle=True)
seconds = []
for epoch in range(5):
    loader.set_epoch(epoch)
    start = time.perf_counter()
    images = sum(len(batch.paths) for batch in loader)
    seconds.append((time.perf_counter() - start) / images)
loader.close()
print(f"result: {1000 * statistics.median(seconds[1:])}")  # the first epoch starts the workers and fills the cache
