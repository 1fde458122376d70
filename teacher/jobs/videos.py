"""Frames of videos as inputs, by rate or by scene change; timestamps are kept."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from teacher.errors import EnvironmentFailure, UsageError
from teacher.images import ImageError, encode_png
from teacher.jobs.containers import File, local
from teacher.label import Camera
from teacher.shards import content_key


class VideoSource:
    """Frames of one video, by rate or by scene change; timestamps are kept in the names.

    A frame's key is made of the video's content and the frame's time, so that the same clip gives
    the same keys wherever it lies.
    """

    def __init__(self, path: Path | File, *, fps: float, scene_change: float | None) -> None:
        """Pick the frames: ``fps`` per second, or, with ``scene_change``, the first of each scene.

        ``scene_change`` is the mean absolute grey difference (0..1) between two frames, reduced to
        32 x 32, above which a new scene starts (0.1 finds hard cuts).
        """
        if not isinstance(fps, int | float) or fps <= 0:
            raise UsageError(f"video.fps={fps}: expected more than 0 frames per second.")
        if scene_change is not None and not (
            isinstance(scene_change, int | float) and 0 < scene_change < 1
        ):
            raise UsageError(f"video.scene_change={scene_change}: expected 0 to 1, or null.")
        self.file = path if isinstance(path, File) else local(path)
        self.fps, self.scene_change = fps, scene_change
        self._local = threading.local()
        with self.file.open() as file:
            self._hash = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if not file.tell():  # which FFmpeg would call an invalid argument
                raise UsageError(f"images={self.file.path}: not a readable video (it is empty).")
        try:
            self._times = {f"t={t:012.6f}": pts for t, pts in self._pick()}
        except _av().FFmpegError as error:
            raise UsageError(f"images={self.file.path}: not a readable video ({error}).") from error

    def _pick(self) -> Iterator[tuple[float, int]]:
        """(seconds, time stamp) of the frames that become inputs."""
        with self.file.open() as file, _av().open(file) as clip:
            if not clip.streams.video:
                raise UsageError(f"images={self.file.path}: no picture in this video, only sound.")
            stream = clip.streams.video[0]
            if self.scene_change is not None:
                yield from self._scenes(clip, stream)
                return
            # by the packets' stamps: nothing is decoded, so that listing hours takes seconds
            stamps = [p.pts for p in clip.demux(stream) if p.size and not p.is_discard]
            tick_s = stream.time_base
        if None in stamps:  # a container without them (AVI)
            with self.file.open() as file, _av().open(file) as clip:
                stamps = [frame.pts for frame in clip.decode(video=0)]
        due = 0.0
        for pts in sorted({pts for pts in stamps if pts is not None}):
            seconds = float(pts * tick_s)
            if seconds >= due - 1e-6:
                yield seconds, pts
                due = max(due + 1 / self.fps, seconds + 0.5 / self.fps)

    def _scenes(self, clip: Any, stream: Any) -> Iterator[tuple[float, int]]:
        before = None
        for frame in clip.decode(stream):
            if frame.pts is None:
                continue
            grey = frame.reformat(width=32, height=32, format="gray").to_ndarray()
            now = grey.astype(np.float32) / 255
            if before is None or np.abs(now - before).mean() > self.scene_change:
                yield float(frame.pts * stream.time_base), frame.pts
            before = now

    def keyed_by_bytes(self, uri: str) -> bool:
        """Never: keys are those of the video and the time."""
        return False

    def list(self) -> list[str]:
        """``t=SECONDS`` of the picked frames, in time order."""
        return sorted(self._times)

    def read(self, uri: str) -> bytes:
        """The frame as PNG; decoding goes on from the last frame while times ascend."""
        wanted = self._times[uri]
        frames, at = getattr(self._local, "state", (None, None))
        if frames is None or at is None or at >= wanted:
            frames = self._frames(wanted)
        self._local.state = (None, None)
        try:
            for pts, frame in frames:
                if pts > wanted:
                    break
                if pts == wanted:
                    self._local.state = (frames, pts)
                    if frame.is_corrupt:
                        raise ImageError(f"{self.file.path.name}: damaged at {uri}")
                    return encode_png(upright(frame))
        except _av().error.InvalidDataError as error:
            raise ImageError(f"{self.file.path.name}: damaged at {uri} ({error})") from error
        raise ImageError(f"{self.file.path.name}: no frame at {uri}")

    def _frames(self, start: int) -> Iterator[tuple[int, Any]]:
        with self.file.open() as file, _av().open(file) as clip:
            stream = clip.streams.video[0]
            clip.seek(start, stream=stream, backward=True)
            for frame in clip.decode(stream):
                if frame.pts is not None and frame.pts >= start:
                    yield frame.pts, frame

    def key(self, uri: str) -> str:
        """Video content and timestamp."""
        return content_key(f"{self._hash} {uri}".encode())

    def camera(self, uri: str) -> Camera | None:
        """None: containers carry no intrinsics."""
        return None

    def stamp(self, uri: str) -> str:
        """Empty: the key is cheap."""
        return ""


def upright(frame: Any) -> np.ndarray:
    """A frame as uint8 [H, W, 3], turned as its container says (telephones film on their side)."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise EnvironmentFailure("videos need PyAV: pip install 'dense-distill[video]'") from error
    return av
