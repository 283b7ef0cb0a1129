"""The documentation: it builds, leads nowhere into the void, and says only what the program does."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from docsite import command_line, environment, http_api, pages, problems
from server.api.problems import TYPE_PREFIX, add_problem_handlers
from server.client import AdminClient

from .code_blocks import (
    SHELL,
    Block,
    blocks,
    command_lines,
    simple_commands,
    without_optional,
)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
VLLM_ROUTES = re.compile(r"/v1/[a-z/]+|/metrics|/health|/openapi\.json")
"""Of `alter serve`, but not ours to describe."""


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every page as it is rendered, by its path."""
    return {str(path.relative_to(ROOT)): pages.filled(path.read_text("utf-8")) for path in SOURCES}


@pytest.fixture(scope="module")
def found(texts: dict[str, str]) -> list[tuple[str, Block]]:
    """Every block of code, with the page that it is on."""
    return [(page, block) for page, text in texts.items() for block in blocks(text)]


@pytest.fixture(scope="module")
def commands(found: list[tuple[str, Block]]) -> list[tuple[str, list[str]]]:
    """Every simple command that a reader would type, with its page."""
    return [
        (page, words)
        for page, block in found
        if block.language in SHELL
        for line in command_lines(block)
        for words in simple_commands(line)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: any warning of mkdocs ends it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mkdocs and its plugins
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_every_page_is_built(site: Path) -> None:
    expected = {
        path.relative_to(DOCS).with_suffix(".html").as_posix().replace("README.html", "index.html")
        for path in DOCS.rglob("*.md")
    }
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert built == expected | {"404.html"}


def test_no_mark_is_left_unfilled(site: Path) -> None:
    assert [path for path in site.rglob("*.html") if "generated:" in path.read_text("utf-8")] == []


def test_every_link_leads_somewhere(site: Path) -> None:
    read = {path: Page.of(path) for path in site.rglob("*.html")}
    broken = [
        f"{path.relative_to(site)}: {link}"
        for path, page in read.items()
        if path.name != "404.html"  # of absolute links, for a server
        for link in page.links
        if not _resolves(path, link, read)
    ]
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Page.of(path)
        assert [url for url in page.fetched if urlsplit(url).netloc] == []
        assert "mermaid" not in page.classes, "the theme fetches mermaid's own program"
    for path in site.rglob("*.css"):
        assert (
            re.findall(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", path.read_text("utf-8")) == []
        )


def test_every_command_line_is_one_that_alter_takes(
    commands: list[tuple[str, list[str]]],
) -> None:
    typed = [(page, words[1:]) for page, words in commands if words[0] == "alter"]
    assert len(typed) > 50
    problems = [
        f"{page}: alter {' '.join(words)}: {why}"
        for page, words in typed
        if (why := refused(words))
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("domains activate authors /bundles/authors --reason 12", ""),
        ("domains activate authors", "bundle"),
        ("domains enact authors", "enact"),
        ("domains list --if-epoch 3", "--if-epoch"),
        ("fleet --lease x", "--lease"),
        ("serve MODEL --alter-substrate DIR --port 9000 [--alter-domain ...] [any flag]", ""),
        ("serve MODEL --alter-subtrate DIR", "--alter-subtrate"),
        ("train MODEL --out DIR --forget A=a [--forgot ...] --retain b", "--forgot"),
        ("token create --role owner --name a", "owner"),
    ],
)
def test_a_command_line_that_alter_does_not_take_is_found(line: str, why: str) -> None:
    (words,) = simple_commands(f"alter {line}")
    found = refused(words[1:])
    assert (why in found) if why else found == ""


def test_every_option_and_variable_that_is_named_exists(texts: dict[str, str]) -> None:
    serve = command_line.root_command().commands["serve"]
    flags = {flag for option in serve.params for flag in option.opts}
    variables = set(environment.named_variables())
    compose = (ROOT / "deploy" / ".env.example").read_text("utf-8")
    variables |= set(re.findall(r"^#?(ALTER_[A-Z_]+)=", compose, re.MULTILINE))
    for page, text in texts.items():
        assert set(re.findall(r"--alter-[a-z-]*[a-z]", text)) <= flags, page
        named = set(re.findall(r"\bALTER_[A-Z_]*[A-Z]\b", text))
        assert {each for each in named if not each.startswith("ALTER_DEMO_")} <= variables, page


def test_every_json_block_is_json(found: list[tuple[str, Block]]) -> None:
    for page, block in found:
        if block.language == "json":
            assert json.loads(block.text) is not None, page


def test_every_python_block_compiles_and_imports_what_exists(
    found: list[tuple[str, Block]],
) -> None:
    for page, block in found:
        if block.language != "python":
            continue
        tree = ast.parse(block.text)
        compile(tree, page, "exec")
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert [n.name for n in node.names if not hasattr(module, n.name)] == [], page
            elif isinstance(node, ast.Call):
                check_client_call(node)


def check_client_call(node: ast.Call) -> None:
    """Raises: AttributeError, TypeError for a call of `client` that AdminClient does not take."""
    target = node.func
    if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "client":
        signature = inspect.signature(getattr(AdminClient, target.attr))
        keywords = {str(keyword.arg): None for keyword in node.keywords}
        signature.bind(None, *node.args, **keywords)


def test_every_curl_command_asks_a_route_that_exists(
    commands: list[tuple[str, list[str]]],
) -> None:
    asked = [(page, words) for page, words in commands if words[0] == "curl"]
    assert len(asked) > 15
    for page, words in asked:
        method, path, body = request_of(words)
        if VLLM_ROUTES.fullmatch(path):
            continue
        operation = operation_of(method, path)
        assert operation is not None, f"{page}: {method} {path}"
        schema = operation.get("requestBody", {}).get("content", {}).get("application/json")
        assert (body is None) == (schema is None), f"{page}: {method} {path}"
        if schema is not None:
            components = {"components": http_api.openapi()["components"]}
            jsonschema.validate(body, schema["schema"] | components)


def test_the_problems_of_http_are_those_that_its_handlers_make() -> None:
    app = FastAPI()
    add_problem_handlers(app)

    class Body(BaseModel):
        number: int

    @app.post("/body")
    def body(body: Body) -> None: ...

    @app.post("/broken")
    def broken() -> None:
        raise RuntimeError

    client = TestClient(app, raise_server_exceptions=False)
    answers = [
        client.post("/body", content=b"{"),
        client.post("/body", json={}),
        client.post("/broken"),
        client.get("/elsewhere"),
        client.get("/body"),
    ]
    listed = {(kind, status) for kind, status, _ in problems.refusals()}
    for answer in answers:
        kind = answer.json()["type"].removeprefix(TYPE_PREFIX)
        assert (kind, answer.status_code) in listed


def test_results_that_are_named_exist(texts: dict[str, str]) -> None:
    for page, text in texts.items():
        prose = text
        for block in blocks(text):  # commands name what they would write
            prose = prose.replace(block.text, "")
        named = set(re.findall(r"docs/results/[\w-]+\.(?:md|json|png)", prose))
        assert [name for name in named if not (ROOT / name).is_file()] == [], page


def refused(words: list[str]) -> str:
    """Why `alter` would not take these words; empty if it does."""
    words, optional = without_optional(words)
    command: Any = command_line.root_command()
    try:
        context = command.make_context("alter", list(words))
        while hasattr(command, "commands"):
            rest = [*context._protected_args, *context.args]
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, rest, parent=context)
    except Exception as error:  # typer's own copy of click has the classes
        return f"{type(error).__name__}: {getattr(error, 'message', '') or error} {vars(error)}"
    known = {flag for parameter in command.params for flag in parameter.opts}
    options = [word.partition("=")[0] for word in optional if word.startswith("--")]
    # What `alter serve` does not know goes to vLLM, which knows nothing of ours.
    unknown = [word for word in options if word not in known]
    unknown += [word for word in context.args if word.startswith("--alter-")]
    return f"no such option: {', '.join(unknown)}" if unknown else ""


def request_of(words: list[str]) -> tuple[str, str, Any]:
    """Method, path and JSON body of a curl command."""
    method, url, body = "", "", None
    rest = iter(words[1:])
    for word in rest:
        if word == "-X":
            method = next(rest)
        elif word == "-d":
            body = json.loads(next(rest))
        elif word in ("-H", "-D", "-o", "--cacert", "--cert", "--key"):
            next(rest)
        elif not word.startswith("-"):
            url = word if "://" in word else f"http://{word}"
    return method or ("GET" if body is None else "POST"), urlsplit(url).path, body


def operation_of(method: str, path: str) -> dict[str, Any] | None:
    """What OpenAPI says of a request; None if it knows no such route."""
    for known_method, known_path, operation in http_api.operations():
        pattern = re.sub(r"\{\w+\}", "[^/]+", known_path)
        if method == known_method and re.fullmatch(pattern, path):
            return operation
    return None


class Page(HTMLParser):
    """Where a page of HTML leads, what it can be entered at, and what a browser fetches for it."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.fetched: set[str] = set()
        self.classes: set[str] = set()

    @classmethod
    def of(cls, path: Path) -> Page:
        """The page at a path."""
        page = cls()
        page.feed(path.read_text("utf-8"))
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes what there is."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= set(given.get("class", "").split())
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif "src" in given:
            self.fetched.add(given["src"])
        elif tag == "link" and given.get("rel") not in ("prev", "next", "canonical"):
            self.fetched.add(given.get("href", ""))
        if tag in ("img", "script", "link"):
            self.links |= {given[name] for name in ("src", "href") if name in given}


def _resolves(path: Path, link: str, read: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return False
    return (
        not parts.fragment or target not in read or unquote(parts.fragment) in read[target].anchors
    )
