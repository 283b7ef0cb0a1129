"""Bundles by their digest, on a local disk or behind any fsspec URL.

    ROOT/sha256/<64 hexadecimal digits>/    one bundle, as `alter_core.bundle` describes it

A bundle is copied to a private folder, verified there, and only then moved to where it is looked for; the
manifest goes last where a folder cannot be moved. What is fetched is verified at every fetch. Names are
digests and the plain names of the manifest: nothing that a request says becomes part of a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import SplitResult, urlsplit

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from alter_core.bundle import (
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    Bundle,
    Manifest,
    read_bundle,
    read_manifest,
)
from alter_core.errors import (
    AlterError,
    BundleError,
    BundleFormatError,
    BundleNotFoundError,
    BundleSourceError,
    BundleTamperedError,
    ConfigError,
    RegistryUnavailableError,
)
from server.signatures import MAX_SIGNATURE_BYTES, SignaturePolicy

from .records import DIGEST_PATTERN

DEFAULT_MAX_BUNDLE_BYTES = 16 * 2**30
BundleCheck = Callable[[Bundle], object]
"""Raises to keep a bundle out."""

_State = frozenset[tuple[str, int, int, int, int]]
"""Name, inode, size, and times of the last change of content and of anything."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPolicy:
    """From where bundles may be imported; by default from nowhere."""

    sources: tuple[str, ...] = ()
    """URLs such as `file:///bundles` or `s3://bucket/experts`: what has the same scheme and host and lies
    below the path is allowed."""
    folders: tuple[Path, ...] = ()
    """The same for folders of this machine, absolute; names that no URL can hold are no matter here."""

    def __post_init__(self) -> None:
        for source in self.sources:
            if _split(source) is None:
                raise ConfigError(
                    "A source of imports cannot be used",
                    expected="a URL such as s3://bucket/folder or file:///folder",
                    got="one without a scheme, or with a query, credentials, '..' or an escape",
                    fix="Correct it.",
                )

    def check(self, url: str) -> None:
        """Raises: BundleSourceError."""
        wanted = _split(url)
        if wanted is None or not any(_is_below(wanted, source) for source in self._split()):
            raise self._refusal()

    def resolve(self, folder: str) -> str:
        """A local folder without links, if it lies below an allowed one. Raises: BundleSourceError."""
        resolved = os.path.realpath(folder)
        urls = [Path(source.path) for source in self._split() if source.scheme == "file"]
        for allowed in (*urls, *self.folders):
            if Path(resolved).is_relative_to(os.path.realpath(allowed)):
                return resolved
        raise self._refusal()

    def _split(self) -> list[SplitResult]:
        return [parts for parts in map(_split, self.sources) if parts is not None]

    def _refusal(self) -> BundleSourceError:
        places = [*map(str, self.folders), *self.sources]
        return BundleSourceError(
            "Bundles may not be imported from there",
            expected=f"a place below one of: {', '.join(places) or '(none is allowed)'}",
            got="another place, or a URL that leaves open where it leads",
            fix="Copy the bundle to an allowed place, or start the server with --alter-bundle-sources.",
        )


class BundleStore:
    """See the module. Methods raise RegistryUnavailableError if the storage fails."""

    def __init__(
        self,
        url: str,
        *,
        imports: ImportPolicy | None = None,
        signatures: SignaturePolicy | None = None,
        max_bundle_bytes: int = DEFAULT_MAX_BUNDLE_BYTES,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`url`: a local folder or an fsspec URL; `storage_options` go to its file system. `signatures` are
        looked at whenever a bundle is read, on its way in and on its way out.

        Raises: ConfigError.
        """
        try:
            self._fs, root = url_to_fs(url, **(storage_options or {}))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                "The bundle store's URL cannot be used",
                expected="a folder, or a URL of a file system that is installed",
                got=type(error).__name__,
                fix="Correct the URL, or install fsspec's package for its scheme (S3: s3fs).",
            ) from error
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._root = os.path.realpath(root) if self._is_local else root.rstrip("/")
        self._imports = imports or ImportPolicy()
        self._signatures = signatures or SignaturePolicy()
        self._max_bundle_bytes = max_bundle_bytes
        self._verified: dict[str, _State] = {}

    def put(self, folder: Path, *, check: BundleCheck | None = None) -> str:
        """Stores the bundle at `folder`; returns its digest. On a local disk it is durable on return.

        `check` sees what was read and verified, before it is in the store; what it raises keeps it out.

        Raises: BundleError of the fitting kind.
        """
        with _storage_errors():
            return self._take(LocalFileSystem(), str(folder.absolute()), check)

    def import_from(
        self,
        url: str,
        *,
        check: BundleCheck | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> str:
        """Stores the bundle at a URL that the import policy allows; returns its digest. `check`: see `put`.

        Raises: BundleSourceError, or another BundleError.
        """
        self._imports.check(url)
        options = dict(storage_options or {})
        if url.startswith(("http:", "https:")):
            options["allow_redirects"] = False  # it could lead past the policy
        with _storage_errors():
            fs, folder = url_to_fs(url, **options)
            if isinstance(fs, LocalFileSystem):
                folder = self._imports.resolve(folder)
            return self._take(fs, folder.rstrip("/"), check)

    def local(self, digest: str, cache: Path) -> Path:
        """A verified folder of a bundle on this machine: the store's own if it lies here, else as `fetch`.

        What this process has verified is not read again as long as no file of it has been touched.

        Raises: as `fetch`.
        """
        if not self._is_local:
            return self.fetch(digest, cache)
        folder = Path(self._place(_hex(digest)))
        with _storage_errors():
            if not folder.is_dir():
                raise BundleNotFoundError(
                    "The store holds no such bundle",
                    expected=digest,
                    got="none",
                    fix="Activate the bundle again, or put its folder back into the store.",
                )
            state = _state(folder)
            # Keys may have changed: a signature is verified anew.
            if self._signatures.mode != "off" or self._verified.get(digest) != state:
                self._verify(folder, digest)
                self._verified[digest] = state
        return folder

    def fetch(self, digest: str, cache: Path) -> Path:
        """A verified local copy of a bundle, in a folder below `cache` that is kept for the next time.

        Raises: BundleNotFoundError, or another BundleError if the store's copy is not what it should be.
        """
        name = _hex(digest)
        target = cache / name
        with _storage_errors():
            if _is_verified(target, digest, self._verify):
                return target
            cache.mkdir(parents=True, exist_ok=True)
            with _private_folder(cache) as staging:
                self._copy(self._fs, self._place(name), staging)
                self._verify(staging, digest)
                _settle(staging, target, digest)
        return target

    def _take(self, fs: AbstractFileSystem, folder: str, check: BundleCheck | None) -> str:
        if self._is_local:
            Path(self._root, "sha256").mkdir(parents=True, exist_ok=True)
        with _private_folder(Path(self._root) if self._is_local else None) as staging:
            manifest = self._copy(fs, folder, staging)
            state = _state(staging)
            bundle = self._verify(staging, manifest.digest)
            if check is not None:
                check(bundle)
            place = self._place(_hex(manifest.digest))
            if self._is_local:
                _settle(staging, Path(place), manifest.digest)
                self._verified[manifest.digest] = state
            else:
                self._upload(staging, place, manifest)
        return manifest.digest

    def _upload(self, staging: Path, place: str, manifest: Manifest) -> None:
        """The manifest goes last; nothing goes that is there, since not every storage replaces at once."""
        names = (*manifest.files, SIGNATURE, MANIFEST)
        with contextlib.suppress(BundleError), _private_folder(None) as stored:
            self._copy(self._fs, place, stored)
            _verify(stored, manifest.digest)
            names = (SIGNATURE,)
        for name in names:
            if (staging / name).exists():
                self._fs.put_file(str(staging / name), f"{place}/{name}")

    def _copy(self, fs: AbstractFileSystem, folder: str, into: Path) -> Manifest:
        """Copies what may be a bundle, within limits. Raises: BundleError."""
        _copy_file(fs, f"{folder}/{MANIFEST}", into / MANIFEST, MAX_MANIFEST_BYTES)
        manifest = read_manifest(into)
        if len(manifest.files) > MAX_FILES:
            raise BundleFormatError(
                "The manifest lists too many files",
                expected=f"at most {MAX_FILES}",
                got=str(len(manifest.files)),
            )
        if isinstance(fs, LocalFileSystem):
            _refuse_strays(folder, manifest)
        left = self._max_bundle_bytes
        for name in manifest.files:
            if _FILE_NAME.fullmatch(name) is None or name in (MANIFEST, SIGNATURE):
                raise BundleTamperedError(
                    "The manifest lists something else than a plain file of the bundle",
                    expected="a plain file name",
                    got=repr(name[:80]),
                )
            left -= _copy_file(fs, f"{folder}/{name}", into / name, left)
        with contextlib.suppress(BundleNotFoundError):
            _copy_file(fs, f"{folder}/{SIGNATURE}", into / SIGNATURE, MAX_SIGNATURE_BYTES)
        _sync_folder(into)
        return manifest

    def _verify(self, folder: Path, digest: str) -> Bundle:
        """As `_verify`, the signature first. Raises: BundleError."""
        return self._signatures.read(folder, lambda folder: _verify(folder, digest))

    def _place(self, name: str) -> str:
        place = f"{self._root}/sha256/{name}"
        if self._is_local and os.path.realpath(place) != place:
            raise BundleTamperedError(
                "A folder of the bundle store is a symbolic link",
                expected="plain folders below the store's root",
                got="a link",
                fix="Find out who put it there, and remove it.",
            )
        return place


def _settle(staging: Path, target: Path, digest: str) -> None:
    """Moves a verified bundle to its place; of one that is there already the signature is renewed."""
    staging.chmod(0o755)
    if _move(staging, target):
        return
    if _is_verified(target, digest):
        if (staging / SIGNATURE).exists():
            (staging / SIGNATURE).replace(target / SIGNATURE)
            _sync_folder(target)
        return
    with _private_folder(target.parent) as trash:
        with contextlib.suppress(FileNotFoundError):
            target.rename(trash / "damaged")
        if not _move(staging, target):  # somebody else has mended it
            _verify(target, digest)


def _move(staging: Path, target: Path) -> bool:
    """False if something is there."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    _sync_folder(target.parent)
    _sync_folder(target.parent.parent)
    return True


def _state(folder: Path) -> _State:
    """Other after anything was done to a file of a folder; nobody can set the time of a change."""
    with os.scandir(folder) as entries:
        found = ((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
        return frozenset(
            (name, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            for name, info in found
        )


def _is_verified(
    folder: Path, digest: str, verify: Callable[[Path, str], Bundle] | None = None
) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        (verify or _verify)(folder, digest)
    except (AlterError, OSError):
        return False
    return True


def _verify(folder: Path, digest: str) -> Bundle:
    bundle = read_bundle(folder, read_manifest(folder).kind)
    if bundle.digest != digest:
        raise BundleTamperedError(
            "Another bundle lies where this one should", expected=digest, got=bundle.digest
        )
    return bundle


def _copy_file(fs: AbstractFileSystem, source: str, target: Path, max_bytes: int) -> int:
    """The number of bytes. Raises: BundleNotFoundError, BundleTamperedError, BundleFormatError."""
    size = 0
    with _open(fs, source) as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            size += len(chunk)
            if size > max_bytes:
                raise BundleFormatError(
                    f"{target.name} is too large", expected=f"at most {max_bytes} bytes"
                )
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return size


def _open(fs: AbstractFileSystem, path: str) -> BinaryIO:
    """Opens a plain file for reading. Raises: BundleNotFoundError, BundleTamperedError."""
    try:
        if not isinstance(fs, LocalFileSystem):
            return cast(BinaryIO, fs.open(path, "rb"))
        # Neither through a link, nor waiting for the writer of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _not_plain(path) from error
        is_absent = isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError)
        if is_absent or error.errno == errno.ENAMETOOLONG:
            raise BundleNotFoundError(
                f"{PurePosixPath(path).name} of the bundle cannot be read",
                expected="a folder that holds a whole bundle",
                got=type(error).__name__,
                fix="Check the place, and that it may be read.",
            ) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(path)
    return open(descriptor, "rb")


def _not_plain(path: str) -> BundleTamperedError:
    name = PurePosixPath(path).name
    return BundleTamperedError(f"{name!r} is not a plain file of the bundle", expected="a file")


def _refuse_strays(folder: str, manifest: Manifest) -> None:
    if stray := set(os.listdir(folder)) - {*manifest.files, MANIFEST, SIGNATURE}:
        raise BundleTamperedError(
            "The bundle's folder holds files that its manifest does not list",
            expected=", ".join(sorted(manifest.files)),
            got=f"{len(stray)} more",
        )


def _hex(digest: str) -> str:
    if re.fullmatch(DIGEST_PATTERN, digest) is None:
        raise BundleNotFoundError(
            "This is not the digest of a bundle",
            expected="sha256: and 64 hexadecimal digits",
            got=f"{len(digest)} characters",
        )
    return digest.removeprefix("sha256:")


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None if programs could differ over where it leads."""
    if not url.isascii() or not url.isprintable() or "::" in url or set(url) & set(" %\\@?#"):
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    if not url.startswith(f"{parts.scheme}://") or parts.scheme in ("", "local"):
        return None
    if (parts.scheme == "file") != (parts.netloc == ""):
        return None
    steps = parts.path.rstrip("/").split("/")[1:]
    return None if any(step in ("", ".", "..") for step in steps) else parts


def _is_below(url: SplitResult, source: SplitResult) -> bool:
    return (
        (url.scheme, url.netloc.lower()) == (source.scheme, source.netloc.lower())
    ) and PurePosixPath(url.path or "/").is_relative_to(source.path or "/")


@contextlib.contextmanager
def _private_folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except AlterError:
        raise
    except Exception as error:  # every file system has its own
        raise RegistryUnavailableError(
            "The storage of bundles did not do what was asked of it",
            expected="a file system that can be read and written",
            got=type(error).__name__,
            fix="Check the disk, or the service and its credentials, and try again.",
        ) from error
