"""The demo's base model and substrate, made if they are missing, and one `alter serve` that trains."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from alter_cli.demo import artefacts
from alter_cli.demo.corpus import Corpus
from alter_cli.demo.server_process import RunningServer, serve

FOLDER = Path("build/demo")


@dataclasses.dataclass(frozen=True)
class World:
    """A server, and what its model knows."""

    server: RunningServer
    corpus: Corpus
    expert: Path
    """Bundle of a domain that is not active."""


@contextlib.contextmanager
def serving(seed: int) -> Iterator[World]:
    """Until the block ends."""
    folder = FOLDER.absolute()
    corpus = artefacts.load_corpus(
        "authors", num_authors=None, num_domains=2, data_dir=Path(), seed=seed
    )
    made = artefacts.make(corpus, folder, seed=seed, console=Console(stderr=True))
    state = folder / "operator"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    files = corpus.save(state / "data")
    flags = [
        *("--max-model-len", "1024", "--dtype", made.dtype, "--alter-base-answers"),
        *("--alter-workspace", str(state / "workspace")),
        *("--alter-retain", str(files["retain"]), "--alter-general", str(files["general"])),
        *("--alter-general", str(files["unseen"])),
        *("--alter-bundle-sources", str(folder)),
    ]
    with serve(made.model, made.substrate, state / "server.log", flags) as server:
        server.wait_until_ready()
        yield World(server, corpus, next(iter(made.experts.values())))
