"""Batches of decoded pictures: the batch of step s is a pure function of (seed, s).

    position p = s * batch_size + row -> epoch p // n, picture Permutation(n, seed, epoch)[p % n]
                                      -> crop and flip, drawn from (seed, p)

Each rank decodes its slice of the rows only. Nothing to save: a resumed run asks for the
step it stands at.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from chainrule.pipeline.config import RequestError
from chainrule.pipeline.data.order import Permutation, mix, stream_key
from chainrule.pipeline.data.reader import Shards

AHEAD = 4  # batches decoded before they are asked for
AUGMENTATION_STREAM = 0xA06  # keeps crops apart from the order


class ImageBatches:
    """Pictures of one split, uint8 (B, H, W, C), by step."""

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        seed: int,
        split: str = "train",
        crop: int | None = None,
        flip: bool = False,
        cache_bytes: int = 1 << 30,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`crop`: side of a random square window; without it all pictures must be of one size.

        `flip`: mirror left and right at random. `cache_bytes`: decoded pictures kept in memory.
        RequestError where the batch does not divide into ranks, or the split is empty.
        """
        self._shards, self._split, self._seed = shards, split, seed
        self._size, self._crop, self._flip = batch_size, crop, flip
        self._n = shards.count(split)
        if self._n == 0:
            raise RequestError(f"{shards.folder}: split '{split}' has no pictures")
        if batch_size % world_size:
            raise RequestError(f"batch_size {batch_size} does not divide into {world_size} ranks")
        rows = batch_size // world_size
        self._rows = range(rank * rows, (rank + 1) * rows)
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = cache_bytes

    def batch(self, step: int) -> np.ndarray:
        """This rank's rows of the batch of `step`."""
        positions = np.array([step * self._size + row for row in self._rows])
        epochs = positions // self._n
        images = []
        for epoch in np.unique(epochs).tolist():
            order = Permutation(self._n, self._seed, epoch)
            here = positions[epochs == epoch]
            for p, i in zip(here.tolist(), order[here % self._n].tolist(), strict=True):
                images.append(self._augment(self._picture(i), p, i))
        first = images[0].shape
        for image in images:
            if image.shape != first:
                alike = image.shape[2] == first[2]
                remedy = "set crop, or size in ingest" if alike else "set channels in ingest"
                raise RequestError(
                    f"{self._shards.folder}: pictures of {first} and {image.shape} in one batch; "
                    f"{remedy}"
                )
        return np.stack(images)

    def _picture(self, i: int) -> np.ndarray:
        image = self._cache.get(i)
        if image is None:
            sample = self._shards.read(self._split, i)
            if sample is None:  # damaged, under skip-and-count: the next one stands in
                return self._picture((i + 1) % self._n)
            image = sample.image()
            if self._cache_left >= image.nbytes:
                self._cache_left -= image.nbytes
                self._cache[i] = image
        return image

    def _augment(self, image: np.ndarray, position: int, i: int) -> np.ndarray:
        if self._crop is None and not self._flip:
            return image
        draw = int(mix(stream_key(self._seed, AUGMENTATION_STREAM, position))[0])
        if self._crop is not None:
            height, width = image.shape[:2]
            if min(height, width) < self._crop:
                raise RequestError(
                    f"{self._shards.folder}: picture {i} of split '{self._split}' is {height} x "
                    f"{width}, smaller than crop {self._crop}"
                )
            top = (draw & 0xFFFFFF) % (height - self._crop + 1)
            left = ((draw >> 24) & 0xFFFFFF) % (width - self._crop + 1)
            image = image[top : top + self._crop, left : left + self._crop]
        if self._flip and draw >> 63:
            image = image[:, ::-1]
        return image

    def iterate(self, start: int, stop: int, workers: int = 1) -> Iterator[np.ndarray]:
        """Batches of steps [start, stop), decoded ahead in threads (Pillow frees the lock)."""
        with ThreadPoolExecutor(max(1, workers), "pictures") as pool:
            pending: deque[Future[np.ndarray]] = deque()
            try:
                for step in range(start, stop):
                    while len(pending) < AHEAD + workers and step + len(pending) < stop:
                        pending.append(pool.submit(self.batch, step + len(pending)))
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()
