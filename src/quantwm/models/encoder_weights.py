"""Where the weights of a DINOv2 encoder come from.

The places, in the order in which they are looked at:

1. the file that was given, and then no other place;
2. the package itself, which holds ViT-S/14;
3. torch.hub's cache, `$TORCH_HOME/hub/checkpoints/dinov2_vitb14_pretrain.pth`;
4. Hugging Face's cache, `$HF_HOME/hub/models--facebook--dinov2-base/snapshots/*/`;
5. a download of Meta's file into torch.hub's cache, where that is allowed.

The package comes before the caches, so that what happens to be cached on a machine does not change
a result. A damaged file in a cache is reported and passed over.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import torch
from torch import Tensor

from quantwm.errors import CorruptFileError, QuantWMError, UsageError, unknown_name
from quantwm.files import atomic_path, sha256_file
from quantwm.models.checkpoint import (
    BUNDLED_ENCODER,
    ENCODER_SHA256,
    bundled_encoder_state,
    same_tensors,
)
from quantwm.models.config import EncoderConfig
from quantwm.models.encoder_file import FOLDER_FILES, config_of, read_encoder

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""(bytes done, of how many)"""
PLACES = ("package", "torch-hub", "hugging-face")
"""What `find_encoder` looks through, in this order, before it downloads."""
_BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
_TIMEOUT = 30.0


@dataclass(frozen=True)
class Release:
    """One of Meta's released encoders without registers.

    Attributes:
        name: of torch.hub.
        config: its size.
        repository: on the Hugging Face Hub.
        size, sha256: of Meta's file.
        url: of Meta's file.
    """

    name: str
    config: EncoderConfig
    repository: str
    size: int
    sha256: str
    url: str

    @property
    def file_name(self) -> str:
        """As Meta and torch.hub call it."""
        return f"{self.name}_pretrain.pth"


RELEASES = {
    name: Release(name, config, repository, size, sha256, f"{_BASE_URL}/{name}/{name}_pretrain.pth")
    for name, config, repository, size, sha256 in (
        (
            BUNDLED_ENCODER,
            EncoderConfig(),
            "facebook/dinov2-small",
            88_283_115,
            "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        ),
        (
            "dinov2_vitb14",
            EncoderConfig(depth=12, width=768, heads=12),
            "facebook/dinov2-base",
            346_378_731,
            "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        ),
    )
}


@dataclass(frozen=True)
class Encoder:
    """An encoder's weights and size.

    Attributes:
        config: its size.
        state: float32 tensors under Meta's names.
        sha256: of the content; that of the package's file for the encoder in the package.
    """

    config: EncoderConfig
    state: dict[str, Tensor]
    sha256: str


def open_encoder(
    source: str | Path = BUNDLED_ENCODER,
    *,
    download: bool = False,
    progress: Progress | None = None,
) -> Encoder:
    """The encoder that a user names.

    Args:
        source: a name of torch.hub (`dinov2_vits14`, `dinov2_vitb14`), looked for in all places; a
            name of the Hugging Face Hub (`facebook/dinov2-small`), looked for in its cache; or a
            file or folder, of whatever size it holds.
        download, progress: as in `find_encoder`.

    Raises:
        UsageError, MismatchError, CorruptFileError: as `find_encoder`.
    """
    by_repository = {release.repository: release for release in RELEASES.values()}
    if isinstance(source, str) and source in RELEASES:
        config = RELEASES[source].config
        state = find_encoder(source, download=download, progress=progress)
    elif isinstance(source, str) and source in by_repository:
        config = by_repository[source].config
        state = find_encoder(by_repository[source].name, places=("hugging-face",))
    elif isinstance(source, Path) or Path(source).exists() or Path(source).suffix:
        # The name of a released file tells how long it should be, if it is cut off.
        named = {release.file_name: release.size for release in RELEASES.values()}
        state = read_encoder(source, whole_size=named.get(Path(source).name))
        config = config_of(state)
    else:
        raise _unknown(source, [*RELEASES, *by_repository, "or an existing file or folder"])
    return Encoder(config, state, encoder_sha256(state))


def find_encoder(
    architecture: str = BUNDLED_ENCODER,
    file: str | Path | None = None,
    *,
    places: Sequence[str] = PLACES,
    download: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The weights of a released encoder, float32, under the names of Meta's release.

    Args:
        architecture: "dinov2_vits14" or "dinov2_vitb14".
        file: take this one (see `read_encoder`) and look nowhere else.
        places: which of `PLACES` to look through; the order is theirs.
        download: fetch Meta's file into torch.hub's cache if no place has it.
        progress: called while downloading.

    Raises:
        UsageError: an unknown name, or no place has the weights; the message lists them all and
            what each one held.
        MismatchError: the file is another size's.
        CorruptFileError: the file is damaged, or nothing but damaged files was found.
    """
    if architecture not in RELEASES:
        raise _unknown(architecture, RELEASES)
    unknown = [place for place in places if place not in PLACES]
    if unknown:
        raise unknown_name("place for encoder weights", unknown[0], PLACES)
    release = RELEASES[architecture]
    if file is not None:
        return read_encoder(file, release.config, whole_size=release.size)
    if "package" in places and architecture == BUNDLED_ENCODER:
        return bundled_encoder_state()
    searched: list[str] = []
    damaged = False
    for place, path in _cached(release, places):
        if not path.exists():
            searched.append(f"{place}: {path} is not there")
            continue
        try:
            state = read_encoder(path, release.config, whole_size=release.size)
        except QuantWMError as error:
            logger.warning("passed over %s", error)
            searched.append(f"{place}: {error}")
            damaged |= isinstance(error, CorruptFileError)
            continue
        logger.info("encoder weights of %s from %s", architecture, path)
        return state
    if download:
        try:
            path = download_encoder(architecture, progress=progress)
            return read_encoder(path, release.config, whole_size=release.size)
        except QuantWMError as error:
            searched.append(f"download: {error}")
            damaged |= isinstance(error, CorruptFileError)
    else:
        searched.append(f"download from {release.url}: not asked for")
    listed = "\n".join(f"  - {line}" for line in searched)
    message = (
        f"found no usable weights of {architecture}. Looked for them here:\n{listed}\n"
        f"Put {release.file_name} into one of these places, give a file of your own, or allow the "
        "download"
    )
    raise CorruptFileError(message) if damaged else UsageError(message)


def download_encoder(architecture: str, *, progress: Progress | None = None) -> Path:
    """Fetch Meta's file into torch.hub's cache, unless it is there already, whole.

    What arrives is compared with the length and the checksum of Meta's file before it gets its
    name: an interruption leaves nothing half-written.

    Raises:
        UsageError: an unknown architecture.
        CorruptFileError: something else arrived.
        QuantWMError: the network or the disk fails.
    """
    if architecture not in RELEASES:
        raise _unknown(architecture, RELEASES)
    release = RELEASES[architecture]
    path = _torch_hub_file(release)
    if path.is_file() and sha256_file(path) == release.sha256:
        return path
    logger.info("downloading %s (%d bytes)", release.url, release.size)
    digest = hashlib.sha256()
    done = 0
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        for chunk in _chunks(release.url):
            out.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, release.size)
        if done != release.size:
            raise CorruptFileError(
                f"{done} bytes of {release.size} arrived from {release.url}: the connection broke "
                "off, or something between here and there answered instead; try again"
            )
        if digest.hexdigest() != release.sha256:
            raise CorruptFileError(
                f"what {release.url} sent has the right length ({done} bytes) but not the checksum "
                f"{release.sha256}; try again"
            )
    return path


def encoder_sha256(state: dict[str, Tensor]) -> str:
    """SHA-256 of an encoder's content, whatever file or layout it came from.

    The encoder in the package has the checksum of its file, by which earlier caches know it.
    """
    if same_tensors(state, bundled_encoder_state()):
        return ENCODER_SHA256
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().float().contiguous().reshape(-1)
        digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _unknown(name: str, known: Sequence[str] | dict[str, Release]) -> UsageError:
    error = unknown_name("encoder", name, known)
    if "reg" not in name:
        return error
    return UsageError(
        f"{error}. DINOv2 with registers is another encoder, with other position arithmetic; "
        "DINO-WM uses the one without"
    )


def _cached(release: Release, places: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Files that may hold the weights, or where they would be, with the name of the place."""
    if "torch-hub" in places:
        yield "torch.hub's cache", _torch_hub_file(release)
    if "hugging-face" in places:
        folder = _hugging_face_folder() / f"models--{release.repository.replace('/', '--')}"
        found = [
            snapshot / name
            for snapshot in _snapshots(folder)
            for name in FOLDER_FILES
            if (snapshot / name).is_file()
        ]
        for path in found or [folder / "snapshots" / "*" / FOLDER_FILES[0]]:
            yield "Hugging Face's cache", path


def _torch_hub_file(release: Release) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / release.file_name


def _hugging_face_folder() -> Path:
    """The cache of `huggingface_hub`, by its own environment variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _snapshots(folder: Path) -> list[Path]:
    """Downloaded revisions of a repository, the one that `main` names first."""
    snapshots = sorted(folder.glob("snapshots/*"))
    reference = folder / "refs" / "main"
    main = reference.read_text().strip() if reference.is_file() else ""
    return sorted(snapshots, key=lambda snapshot: snapshot.name != main)


def _chunks(url: str) -> Iterator[bytes]:
    """What an address sends, piece by piece."""
    try:
        with urlopen(url, timeout=_TIMEOUT) as response:
            while chunk := response.read(1 << 20):
                yield chunk
    except (OSError, HTTPException) as error:
        raise QuantWMError(f"cannot fetch {url}: {error}") from error
