"""Pictures generated in raster order, the channels of a pixel together: R, G, B, next pixel."""

import math

from torch import Tensor

from chainrule.pipeline.models.contract import Autoregressive


def check_picture(event_shape: tuple[int, ...]) -> None:
    """ValueError for what is no picture, (H, W) or (C, H, W)."""
    if len(event_shape) not in (2, 3) or min(event_shape) < 1:
        raise ValueError(f"event_shape is {event_shape}: a picture is (H, W) or (C, H, W)")


class RasterModel(Autoregressive):
    """A model of pictures (C, H, W), or (H, W) where there is one channel."""

    def _set_picture(self, event_shape: tuple[int, ...]) -> None:
        self.event_shape = event_shape
        self.height, self.width = event_shape[-2:]
        self.channels = event_shape[0] if len(event_shape) == 3 else 1
        self.length = math.prod(event_shape)

    def to_image(self, x: Tensor) -> Tensor:
        """(B, *event_shape) to (B, C, H, W)."""
        return x.reshape(len(x), self.channels, self.height, self.width)

    def to_sequence(self, x: Tensor) -> Tensor:
        return self.to_image(x).permute(0, 2, 3, 1).flatten(1)

    def to_event(self, sequence: Tensor) -> Tensor:
        pixels = sequence.reshape(len(sequence), self.height, self.width, self.channels)
        return pixels.permute(0, 3, 1, 2).reshape(len(sequence), *self.event_shape)

    def by_element(self, maps: Tensor) -> Tensor:
        """Output maps (B, C*P, H, W) to parameters (B, T, P) in generation order."""
        return maps.unflatten(1, (self.channels, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)
