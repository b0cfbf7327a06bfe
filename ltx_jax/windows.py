"""How a clip that is extended is cut into windows: each sees the end of what is there and adds frames to it."""

from dataclasses import dataclass, replace

from ltx_jax.geometry import VideoGrid
from ltx_jax.pictures import trim_frames
from ltx_jax.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of one extension; all have the same size, so that one compiled program makes them."""

    grid: VideoGrid  # of each window
    num_frames: int  # of the clip that is there
    num_new: int  # frames that come to it; the last window may make more, which are cut off
    num_context: int  # of a window's frames, those that are there already: 8k + 1
    backwards: bool

    @property
    def step(self) -> int:
        """New frames of each window."""
        return self.grid.num_frames - self.num_context

    @property
    def count(self) -> int:
        return -(-self.num_new // self.step)

    @property
    def total(self) -> VideoGrid:
        """The size of the whole clip; its frames need not be 8k + 1."""
        return replace(self.grid, num_frames=self.num_frames + self.num_new)

    @property
    def first_frame(self) -> int:
        """Where in the whole clip the clip begins that is there already."""
        return self.num_new if self.backwards else 0

    def begin(self, number: int) -> int:
        """The frame of the whole clip at which a window begins; below 0 where it makes more than is needed."""
        if self.backwards:
            return self.num_new - (number + 1) * self.step
        return self.num_frames + number * self.step - self.num_context


def windows_of(settings: Settings, grid: VideoGrid, num_frames: int) -> Windows:
    """The windows that extend a clip of `num_frames`, none larger than `grid`.

    Raises ValueError for an extension of less than a frame, a clip too short to go on from, and an overlap that leaves
    no room for new frames.
    """
    assert settings.extend is not None
    backwards, time = settings.extend < 0, grid.scale[0]
    num_new = round(abs(settings.extend) * grid.fps)
    if num_new < 1:
        raise ValueError(
            f"extend must be at least a frame, {1 / grid.fps:.3g} s at {grid.fps:g} fps; got {settings.extend:g} s"
        )
    # Before the start only whole latents are of use, behind the end one frame is enough.
    least = 1 + time if backwards else 1
    if num_frames < least:
        raise ValueError(f"a clip of {num_frames} frames cannot be continued before its start: {least} are needed")
    num_context = max(trim_frames(min(round(settings.overlap * grid.fps) + 1, num_frames), time), least)
    room = grid.num_frames - num_context
    if room < time:
        raise ValueError(
            f"windows of {grid.num_frames} frames that overlap by {num_context} make less than {time} new ones: "
            f"num_frames must be at least {num_context + time}, or overlap less than {settings.overlap:g} s"
        )
    each = -(-num_new // -(-num_new // room))  # as few windows as there can be, all alike
    step = -(-each // time) * time
    return Windows(
        grid=replace(grid, num_frames=num_context + step),
        num_frames=num_frames,
        num_new=num_new,
        num_context=num_context,
        backwards=backwards,
    )
