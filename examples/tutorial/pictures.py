"""Write characters that no API of the tutorial knows as pictures, in place of your own.

Usage: `python examples/tutorial/pictures.py`, in the folder where `support/` (to adapt to) and
`new/` (to label) are to be.
"""

from pathlib import Path

from PIL import Image

import bidfmkd_fast as bf

dataset = bf.load_dataset("glyphs")
sampler = bf.EpisodeSampler(dataset, "meta_test", n_way=5, n_shot=5, n_query=15, seed=0)
episode = sampler.episode(0)
for folder, images, labels in (
    ("support", episode.support_images, episode.support_labels),
    ("new", episode.query_images, episode.query_labels),
):
    for number, (image, label) in enumerate(zip(images, labels.tolist())):
        path = Path(folder, f"character {label}", f"{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).byte().numpy()).save(path)
