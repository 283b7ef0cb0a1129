"""Bundles by digest: whole and verified, or refused; and no way out of the allowed places."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from alter_core import ForgetExpert, Substrate
from alter_core.bundle import Bundle
from alter_core.errors import (
    BundleError,
    BundleFormatError,
    BundleNotFoundError,
    BundleSourceError,
    BundleTamperedError,
    ConfigError,
    RegistryUnavailableError,
    SubstrateMismatchError,
)
from server.registry import BundleStore, ImportPolicy
from tests.alter_core.crafted import (
    TRAINING,
    edit_manifest,
    replace_file,
    small_expert,
    small_substrate,
)
from tests.support.loopback import serving

from .conftest import digest

MANIFEST, WEIGHTS, SIGNATURE = "manifest.json", "weights.safetensors", "model.sig"


@pytest.fixture
def substrate(tmp_path: Path) -> Substrate:
    return small_substrate().write(tmp_path / "substrate", name="base", training=TRAINING)


@pytest.fixture
def folder(substrate: Substrate, tmp_path: Path) -> Path:
    """An expert's bundle where nothing else lies."""
    target = tmp_path / "inbox" / "expert"
    small_expert(substrate).write(target, substrate, training=TRAINING, evaluation={"x": 0.5})
    return target


@pytest.fixture
def wanted(folder: Path, substrate: Substrate) -> str:
    """The digest of `folder`."""
    return str(ForgetExpert.read(folder, substrate).digest)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a store on disk, and of one that is no true file system."""
    if request.param == "local":
        yield str(tmp_path / "store")
    else:
        yield f"memory:/{tmp_path}/store"
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def store(root: str) -> BundleStore:
    return BundleStore(root)


def overwrite(root: str, wanted: str, name: str, data: bytes) -> None:
    """Changes a file inside a store."""
    url = f"{root}/sha256/{wanted.removeprefix('sha256:')}/{name}"
    with fsspec.open(url, "wb") as file:
        file.write(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_put_is_fetched_byte_for_byte(
    store: BundleStore, root: str, folder: Path, wanted: str, substrate: Substrate, tmp_path: Path
) -> None:
    (folder / SIGNATURE).write_bytes(b"signed")
    assert store.put(folder) == wanted
    fetched = BundleStore(root).fetch(wanted, tmp_path / "cache")
    assert contents(fetched) == contents(folder)
    assert fetched.is_relative_to(tmp_path / "cache")
    assert ForgetExpert.read(fetched, substrate).digest == wanted
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [fetched.name]


def test_a_substrate_has_a_place_too(
    store: BundleStore, substrate: Substrate, tmp_path: Path
) -> None:
    assert store.put(tmp_path / "substrate") == substrate.digest


def test_a_second_put_changes_the_signature_alone(
    store: BundleStore, folder: Path, wanted: str, tmp_path: Path
) -> None:
    for number, signature in enumerate((None, b"first", b"second")):
        if signature is not None:
            (folder / SIGNATURE).write_bytes(signature)
        assert store.put(folder) == wanted
        fetched = store.fetch(wanted, tmp_path / f"cache-{number}")
        assert contents(fetched) == contents(folder)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "evaluation.json"])
def test_a_changed_store_is_found_out_and_healed_by_another_put(
    store: BundleStore, root: str, folder: Path, wanted: str, tmp_path: Path, name: str
) -> None:
    store.put(folder)
    for data in (b"", b"{}", contents(folder)[name][:-1]):
        overwrite(root, wanted, name, data)
        with pytest.raises(BundleError):
            store.fetch(wanted, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []
    assert store.put(folder) == wanted
    store.fetch(wanted, tmp_path / "cache")


def test_another_true_bundle_under_the_digest_is_found_out(
    store: BundleStore, root: str, folder: Path, wanted: str, substrate: Substrate, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    small_expert(substrate, "other").write(
        other, substrate, training=TRAINING, evaluation={"x": 0.5}
    )
    store.put(folder)
    for name, data in contents(other).items():
        overwrite(root, wanted, name, data)
    with pytest.raises(BundleTamperedError, match="Another bundle"):
        store.fetch(wanted, tmp_path / "cache")


def test_a_changed_cache_is_fetched_anew(
    store: BundleStore, folder: Path, wanted: str, tmp_path: Path
) -> None:
    store.put(folder)
    cached = store.fetch(wanted, tmp_path / "cache")
    (cached / WEIGHTS).write_bytes(b"torn")
    assert contents(store.fetch(wanted, tmp_path / "cache")) == contents(folder)
    (cached / "stray").write_bytes(b"")
    assert contents(store.fetch(wanted, tmp_path / "cache")) == contents(folder)
    shutil.rmtree(cached)
    cached.symlink_to(folder)
    assert not store.fetch(wanted, tmp_path / "cache").is_symlink()
    assert folder.is_dir()


def test_a_good_cache_needs_no_store(
    store: BundleStore, root: str, folder: Path, wanted: str, tmp_path: Path
) -> None:
    store.put(folder)
    store.fetch(wanted, tmp_path / "cache")
    overwrite(root, wanted, WEIGHTS, b"")
    store.fetch(wanted, tmp_path / "cache")


@pytest.mark.parametrize(
    "text",
    ["", "sha256:", "../../etc", "sha256:" + "../" * 21 + "x", "sha256:" + "A" * 64, "sha256:/etc"],
)
def test_only_digests_are_looked_up(store: BundleStore, tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleNotFoundError):
        store.fetch(text, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(BundleNotFoundError):
        store.fetch(digest(1), tmp_path / "cache")


def _link_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def _link_manifest(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "elsewhere")
    (folder / MANIFEST).symlink_to(folder.parent / "elsewhere")


def _pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _list(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_manifest(folder, lambda raw: raw["files"].update({name: "0" * 64}))

    return damage


def _list_many(folder: Path) -> None:
    for number in range(20):
        replace_file(folder, f"more-{number}", b"")


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), BundleNotFoundError),
        (lambda folder: (folder / WEIGHTS).unlink(), BundleNotFoundError),
        (lambda folder: (folder / "stray").write_bytes(b""), BundleTamperedError),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"torn"), BundleTamperedError),
        (lambda folder: replace_file(folder, WEIGHTS, b"torn"), BundleError),
        (lambda folder: (folder / SIGNATURE).symlink_to("/etc/passwd"), BundleTamperedError),
        (lambda folder: shutil.rmtree(folder), BundleNotFoundError),
        (_link_weights, BundleTamperedError),
        (_link_manifest, BundleTamperedError),
        (_pipe, BundleTamperedError),
        (_list("../secret"), BundleTamperedError),
        (_list("/etc/passwd"), BundleTamperedError),
        (_list(".."), BundleTamperedError),
        (_list("a\\b"), BundleTamperedError),
        (_list(MANIFEST), BundleTamperedError),
        (_list(SIGNATURE), BundleTamperedError),
        (_list_many, BundleFormatError),
    ],
)
def test_what_is_no_whole_bundle_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, damage: Callable[[Path], Any], error: type[BundleError]
) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    damage(folder)
    store = BundleStore(str(tmp_path / "store"))
    with pytest.raises(error):
        store.put(folder)
    assert [p for p in (tmp_path / "store").rglob("*") if p.name != "sha256"] == []


def test_a_bundle_above_the_limit_is_refused(store: BundleStore, root: str, folder: Path) -> None:
    size = sum(len(data) for name, data in contents(folder).items() if name != MANIFEST)
    BundleStore(root, max_bundle_bytes=size).put(folder)
    with pytest.raises(BundleFormatError, match="too large"):
        BundleStore(root, max_bundle_bytes=size - 1).put(folder)


def test_links_inside_a_store_are_not_followed(folder: Path, wanted: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for depth in ("sha256", f"sha256/{wanted.removeprefix('sha256:')}"):
        link = tmp_path / depth.replace("/", "-") / depth
        link.parent.mkdir(parents=True)
        link.symlink_to(outside)
        store = BundleStore(str(tmp_path / depth.replace("/", "-")))
        for use in (lambda s=store: s.put(folder), lambda s=store: s.fetch(wanted, tmp_path / "c")):
            with pytest.raises(BundleTamperedError, match="symbolic link"):
                use()
    assert list(outside.iterdir()) == []


def test_putting_and_fetching_at_once_never_shows_half_a_bundle(
    folder: Path, wanted: str, tmp_path: Path
) -> None:
    def put_and_fetch(number: int) -> None:
        store = BundleStore(str(tmp_path / "store"))
        assert store.put(folder) == wanted
        cache = tmp_path / f"cache-{number % 2}"
        assert contents(store.fetch(wanted, cache)) == contents(folder)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_and_fetch, range(12)))


def test_where_a_folder_cannot_be_moved_the_manifest_comes_last(
    folder: Path, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BundleStore(f"memory:/{tmp_path}/store")
    put_file, names = store._fs.put_file, []
    failing = 0

    def fail_late(source: str, target: str) -> None:
        names.append(Path(target).name)
        if len(names) == failing:
            raise TimeoutError
        put_file(source, target)

    monkeypatch.setattr(store._fs, "put_file", fail_late)
    for failing in (1, 2, 3):  # noqa: B007 (read by fail_late)
        names.clear()
        with pytest.raises(RegistryUnavailableError, match="TimeoutError"):
            store.put(folder)
        with pytest.raises(BundleNotFoundError):
            store.fetch(wanted, tmp_path / "cache")
    failing = 0
    names.clear()
    assert store.put(folder) == wanted
    assert names[-1] == MANIFEST
    names.clear()
    store.put(folder)
    assert names == []
    store.fetch(wanted, tmp_path / "cache")


def test_a_failing_disk_is_no_fault_of_the_bundle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RegistryUnavailableError, match="OSError"):
        BundleStore(str(tmp_path / "store")).put(folder)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["sha256"]


def test_a_store_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError):
        BundleStore("nonsense://x")


ALLOWED = ("file:///srv/bundles", "s3://models/experts/", "https://Host.example:8443/b")


@pytest.mark.parametrize(
    "url",
    [
        "file:///srv/bundles/a",
        "file:///srv/bundles",
        "s3://models/experts/a/b",
        "https://host.example:8443/b/c",
        "https://host.example:8443/b",
    ],
)
def test_urls_below_a_source_are_allowed(url: str) -> None:
    ImportPolicy(sources=ALLOWED).check(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/srv/bundles/a",
        "srv/bundles",
        "file:/srv/bundles/a",
        "file:///srv/bundles-2/a",
        "file:///srv/bundles/../../etc",
        "file:///srv/bundles/%2e%2e/etc",
        "file:///srv/bundles//etc",
        "file:///srv/bundles/./a",
        "file://host/srv/bundles/a",
        "FILE:///srv/bundles/a",
        "local:///srv/bundles/a",
        "s3://models/other",
        "s3://models2/experts/a",
        "s3a://models/experts/a",
        "simplecache::s3://models/experts/a",
        "s3://models/experts/a::file:///etc",
        "zip://a::s3://models/experts/b",
        "http://host.example:8443/b/c",
        "https://host.example/b/c",
        "https://host.example:8443/c",
        "https://host.example:8443@evil.example/b/c",
        "https://host.example:8443\\@evil.example/b/c",
        "https://evil.example#host.example:8443/b",
        "https://host.example:8443/b/c?x=1",
        "https://host.example:8443/b/c\n",
        "https://169.254.169.254/b",
        "https://[::1/b",
        "gs://models/experts/a",
        "memory://x",
    ],
)
def test_urls_that_lead_elsewhere_or_might_are_refused(url: str, tmp_path: Path) -> None:
    policy = ImportPolicy(sources=ALLOWED)
    with pytest.raises(BundleSourceError):
        policy.check(url)
    with pytest.raises(BundleSourceError):
        BundleStore(str(tmp_path), imports=policy).import_from(url)
    with pytest.raises(BundleSourceError):
        BundleStore(str(tmp_path)).import_from(url)


@pytest.mark.parametrize(
    "source",
    ["/srv", "s3://a@b/c", "file:///a/../b", "https://h/a?b", "local:///srv", "file://h/a"],
)
def test_a_policy_that_leaves_something_open_is_refused(source: str) -> None:
    with pytest.raises(ConfigError):
        ImportPolicy(sources=(source,))


def test_a_bundle_is_imported_from_an_allowed_folder_and_no_link_leads_out(
    folder: Path, wanted: str, tmp_path: Path
) -> None:
    inbox = folder.parent
    store = BundleStore(str(tmp_path / "store"), imports=ImportPolicy(sources=(inbox.as_uri(),)))
    assert store.import_from(folder.as_uri()) == wanted
    outside = shutil.copytree(folder, tmp_path / "outside")
    (inbox / "link").symlink_to(outside)
    with pytest.raises(BundleSourceError):
        store.import_from((inbox / "link").as_uri())
    # A source may itself be reached by a link.
    (tmp_path / "alias").symlink_to(inbox)
    alias = (tmp_path / "alias").as_uri()
    store = BundleStore(str(tmp_path / "store"), imports=ImportPolicy(sources=(alias,)))
    assert store.import_from(f"{alias}/expert") == wanted


def test_a_bundle_is_imported_from_storage(store: BundleStore, root: str, folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, data in contents(folder).items():
        memory.pipe_file(f"/bucket/expert/{name}", data)
    importing = BundleStore(root, imports=ImportPolicy(sources=("memory://bucket",)))
    assert importing.import_from("memory://bucket/expert/") == store.put(folder)


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    """Serves `folder` as /expert, and sends who asks for /moved/ there."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self) -> Any:
            if not self.path.startswith("/moved/"):
                return super().send_head()
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved/", "/expert/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder.parent))
    with serving(handler) as url:
        yield url


def test_a_bundle_is_imported_over_http_and_no_redirect_is_followed(
    store: BundleStore, root: str, web: str, wanted: str
) -> None:
    importing = BundleStore(root, imports=ImportPolicy(sources=(web,)))
    assert importing.import_from(f"{web}/expert") == wanted
    with pytest.raises((BundleError, RegistryUnavailableError)):
        importing.import_from(f"{web}/moved")
    with pytest.raises(BundleNotFoundError):
        importing.import_from(f"{web}/nothing")


def test_what_is_applied_is_verified_and_copied_only_from_afar(
    store: BundleStore, root: str, folder: Path, wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(BundleNotFoundError):
        store.local(wanted, tmp_path / "cache")
    store.put(folder)
    local = store.local(wanted, tmp_path / "cache")
    assert contents(local) == contents(folder)
    is_here = not root.startswith("memory")
    assert local.is_relative_to(tmp_path / ("store" if is_here else "cache"))
    overwrite(root, wanted, WEIGHTS, b"torn")
    if is_here:
        with pytest.raises(BundleTamperedError):
            store.local(wanted, tmp_path / "cache")


def test_a_check_keeps_a_bundle_out(store: BundleStore, folder: Path, wanted: str) -> None:
    def refuse(bundle: Bundle) -> None:
        assert bundle.digest == wanted
        raise SubstrateMismatchError("of another substrate")

    with pytest.raises(SubstrateMismatchError):
        store.put(folder, check=refuse)
    with pytest.raises(BundleNotFoundError):
        store.local(wanted, folder.parent / "cache")
