"""Reading video files, by PyAV where it is installed."""

import importlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from quantwm.errors import CorruptFileError, MissingExtraError


def read_video(path: Path) -> npt.NDArray[np.uint8]:
    """All frames (T, H, W, 3) of a video, RGB.

    Raises:
        MissingExtraError: PyAV is not installed.
        CorruptFileError: the file is damaged or holds no frames.
    """
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise MissingExtraError("reading videos", "PyAV", "video") from error
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except Exception as error:
        raise CorruptFileError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise CorruptFileError(f"{path} holds no frames")
    return np.stack(frames)
