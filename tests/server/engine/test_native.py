"""Compiling and loading the CPU kernels, and doing without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from server.engine import native


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _with_source(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder / "kernel.cpp"
    source.write_text(text)
    monkeypatch.setattr(native, "sources", lambda: [source])


def test_a_kernel_that_does_not_compile_is_done_without(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _with_source("#error no kernel", tmp_path, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert not native.load.__wrapped__()
    assert "plain torch takes their place" in caplog.text
    assert not list(cache.rglob("*.so"))
    assert not [path for path in cache.rglob("*") if path.is_file()], "nothing half done is left"


def test_without_a_compiler_torch_takes_over(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(cache / "no-such-compiler"))
    with caplog.at_level(logging.WARNING):
        assert not native.load.__wrapped__()
    assert "plain torch takes their place" in caplog.text


def test_kernels_can_be_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTER_NATIVE", "0")
    assert not native.load.__wrapped__()
    assert not cache.exists()


def test_a_compiled_library_is_kept_and_found_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_source("extern const int alter_test = 1;", tmp_path, monkeypatch)
    assert native.load.__wrapped__()
    (library,) = cache.rglob("*.so")
    before = library.stat().st_mtime_ns
    assert native.load.__wrapped__()
    assert library.stat().st_mtime_ns == before


def test_other_sources_or_another_processor_make_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_source("// one", tmp_path, monkeypatch)
    folders = {native._cache_folder()}
    _with_source("// two", tmp_path, monkeypatch)
    folders.add(native._cache_folder())
    monkeypatch.setattr(native, "_cpu_flags", lambda: "flags: none")
    folders.add(native._cache_folder())
    assert len(folders) == 3
