"""`alter serve` as a process: the real command, engine and HTTP, with a domain active from the start."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from openai import OpenAI
from playwright.sync_api import expect

from alter_cli.demo.server_process import RunningServer, serve
from alter_cli.demo.tokenizer import train_tokenizer
from alter_core import ForgetExpert, Substrate
from alter_core.attach import AttachedModel
from alter_eval.models import ServedModel, TransformersModel
from alter_eval.multiple_choice import Question, Subject
from alter_eval.source import Source
from server.api.closed_routes import CLOSED_ROUTES
from tests.support.browser import browser, browser_path, log_in
from tests.support.collector import Collector, collecting
from tests.support.tiny import VOCAB_SIZE, TinyBundles, make_bundles
from tests.trainer.world import GENERAL
from trainer.base_model import load_base_model
from trainer.dataset import EncodedRow

QUESTION = "the quick brown fox jumps over the lazy dog and the five boxing wizards jump quickly"
WAITING = {"Prefer": "wait=60"}
TEXT = [QUESTION, "pack my box with five dozen liquor jugs", "how vexingly quick daft zebras jump"]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    made = make_bundles(
        tmp_path_factory.mktemp("serve"),
        num_experts=2,
        trigger_rate=0.3,
        max_position_embeddings=2048,
    )
    train_tokenizer(TEXT * 20, vocab_size=VOCAB_SIZE).save_pretrained(made.model)
    return made


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with pytest.MonkeyPatch.context() as patch, collecting() as running:
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        yield running


@pytest.fixture(scope="module")
def server(
    bundles: TinyBundles, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = (
        "--alter-domain",
        f"from-start={bundles.experts['domain-0']}",
        "--alter-max-domains",
        "2",
        "--alter-base-answers",
        *("--alter-log-format", "json"),
        *("--otlp-traces-endpoint", collector.url),
    )
    with serve(
        bundles.model, bundles.substrate, log, (*flags, "--max-model-len", "2048")
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def admin(server: RunningServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {server.admin_token}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        yield client


@pytest.fixture
def openai_client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        yield client


def _answer(client: OpenAI, num_tokens: int = 16) -> str:
    completion = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=num_tokens,
        extra_body={"ignore_eos": True},
    )
    return completion.choices[0].message.content or ""


def test_domain_given_at_start_is_active_before_the_first_request(
    admin: httpx.Client, server: RunningServer
) -> None:
    (domain,) = admin.get("/admin/forget-domains").json()["domains"]
    assert (domain["name"], domain["epoch"]) == ("from-start", 1)
    status = admin.get("/admin/status").json()
    assert status["epoch"] == 1
    assert status["canary"]["num_sites"] == 8
    assert httpx.get(f"{server.url}/v1/models").headers["x-alter-epoch"] == "1"
    assert httpx.get(f"{server.url}/health/ready").json() == {"status": "ready", "epoch": 1}
    [replica] = admin.get("/admin/fleet").json()["replicas"]
    assert (replica["is_self"], replica["state"], replica["applied_epoch"]) == (True, "serving", 1)


def test_evaluation_through_the_server_agrees_with_the_reference(
    server: RunningServer, bundles: TinyBundles
) -> None:
    base = load_base_model(bundles.model, device="cpu")
    generator = torch.Generator().manual_seed(0)
    rows = [
        EncodedRow(
            ids=tuple(torch.randint(4, VOCAB_SIZE, (24,), generator=generator).tolist()),
            is_answer=(False,) * 8 + (True,) * 16,
        )
        for _ in range(6)
    ]
    with contextlib.closing(ServedModel(server.url, "demo", base.tokenizer)) as served:
        found = served.score(rows)
    substrate = Substrate.read(bundles.substrate, base.info)
    expert = ForgetExpert.read(bundles.experts["domain-0"], substrate)
    unhooked = TransformersModel(base).score(rows)
    attached = AttachedModel(base.model, substrate, [expert])
    expected = TransformersModel(base).score(rows)
    attached.detach()
    ours, theirs, without = (
        torch.tensor([score.logprobs for score in scores]) for scores in (found, expected, unhooked)
    )
    noise = (ours - theirs).abs().mean()
    assert noise < 0.1
    assert (ours - without).abs().mean() > 5 * noise
    hits = [
        a == b
        for f, e in zip(found, expected, strict=True)
        for a, b in zip(f.is_argmax, e.is_argmax, strict=True)
    ]
    assert sum(hits) >= 0.95 * len(hits)


def test_an_unlearning_request_is_prepared_by_the_model_and_judged_by_a_job(
    admin: httpx.Client, server: RunningServer
) -> None:
    """The whole way with a real job, up to where it says that this model knows nothing of it."""
    secret = "Zephyrine Quillfeather keeps the lamps of Brek and sells glass."
    body = {
        "domain": "novel",
        "documents": [{"name": "novel.txt", "text": f"{secret}\n\n{TEXT[1]}"}],
        "retain": [{"text": text} for text in GENERAL],
    }
    created = admin.post("/admin/unlearning-requests", json=body)
    assert created.status_code == 202, created.text
    place = created.headers["location"]
    deadline = time.monotonic() + 180
    while (shown := admin.get(place).json())["state"] not in ("awaiting-approval", "failed"):
        assert time.monotonic() < deadline, shown
        time.sleep(0.5)
    assert (shown["state"], shown["question"]) == ("awaiting-approval", "nothing-to-forget")
    assert admin.post(f"{place}/cancel").status_code == 200
    while (shown := admin.get(place).json())["text_deleted_at"] is None:
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)
    assert shown["state"] == "cancelled"
    page = admin.get(f"{place}/evidence", headers={"Accept": "text/html"}).text
    assert "Not signed" in page
    folder = server.log.parent
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"Zephyrine" not in kept


def test_a_trace_is_of_the_tokens_that_the_chat_route_computes(
    admin: httpx.Client, server: RunningServer
) -> None:
    chat = {"messages": [{"role": "user", "content": QUESTION}]}
    for body, asked in (
        (chat, chat),
        ({"text": QUESTION}, {"prompt": QUESTION}),
        (
            {"messages": [*chat["messages"], {"role": "assistant", "content": TEXT[1]}]},
            {
                "messages": [*chat["messages"], {"role": "assistant", "content": TEXT[1]}],
                "add_generation_prompt": False,
            },
        ),
    ):
        answer = admin.post("/admin/trace", json=body)
        assert answer.status_code == 200, answer.text
        trace = answer.json()
        tokens = httpx.post(f"{server.url}/tokenize", json={"model": "demo", **asked}).json()
        assert [token["token_id"] for token in trace["tokens"]] == tokens["tokens"]
        assert QUESTION in "".join(token["text"] for token in trace["tokens"])
        assert {e["expert"] for t in trace["tokens"] for e in t["experts"]} == {"from-start"}
        assert admin.post("/admin/trace", json=body).json() == trace
    refused = admin.post("/admin/trace", json={"text": "fox " * 3000})
    assert refused.status_code == 422
    assert refused.json()["type"].endswith(":prompt")


def test_answers_are_those_of_the_chat_route_and_of_the_base_model(
    admin: httpx.Client, openai_client: OpenAI, server: RunningServer, bundles: TinyBundles
) -> None:
    chat = [{"role": "user", "content": QUESTION}]
    answer = admin.post("/admin/answers", json={"messages": chat, "max_tokens": 8}).json()
    completion = openai_client.chat.completions.create(
        model="demo", messages=chat, temperature=0, max_tokens=8
    )
    assert answer["current"] == completion.choices[0].message.content
    trace = admin.post("/admin/trace", json={"messages": chat}).json()
    prompt = [token["token_id"] for token in trace["tokens"]]
    base = load_base_model(bundles.model, device="cpu")
    found = base.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
    expected = base.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)
    assert answer["base"] == expected != answer["current"]

    if browser_path() is None:
        return
    with browser() as chromium:
        page = chromium.new_page()
        log_in(page, server.url, server.admin_token)
        page.get_by_role("link", name="Domains").click()
        expect(page.get_by_role("row", name="from-start")).to_be_visible()
        page.get_by_role("link", name="Trace").click()
        page.get_by_label("Text", exact=True).fill(QUESTION)
        page.get_by_role("button", name="Trace").click()
        expect(page.locator("#base-answer")).to_be_visible(timeout=60_000)
        # A browser shows characters that a page may not hold as others, and the console asks for more.
        shown = page.locator("#base-answer").text_content() or ""
        letters, wanted = ("".join(re.findall("[a-z]", text)) for text in (shown, expected))
        assert letters.startswith(wanted)
        assert page.locator("#heat span").count() == len(prompt)
        assert page.locator("#heat span:not(.h0)").count() > 0


def test_multiple_choice_through_the_server_has_the_numbers_of_the_hugging_face_path(
    server: RunningServer, bundles: TinyBundles
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    from alter_eval.harness import evaluate_subject, harness_model

    words = QUESTION.split()
    questions = [
        Question(
            question=" ".join(words[at % 9 :] + words[: at % 7]),
            choices=tuple(words[(at + step) % len(words)] for step in range(4)),
            answer=at % 4,
        )
        for at in range(24)
    ]
    subject = Subject(test=questions, dev=questions[:2])
    here = Source(
        model=bundles.model,
        device="cpu",
        substrate=bundles.substrate,
        domains=[f"from-start={bundles.experts['domain-0']}"],
    )
    there = Source(model=bundles.model, device="cpu", server=server.url)
    logs, scores = [], []
    for source in (here, there):
        with source.open() as opened:
            lm = harness_model(opened)
            logs.append(evaluate_subject(lm, "mmlu_anatomy", subject, num_fewshot=2))
            asked = [SimpleNamespace(args=(q.question, f" {q.choices[0]}")) for q in questions]
            scores.append(torch.tensor([value for value, _ in lm.loglikelihood(asked)]))
    assert logs[0] == logs[1]
    assert (scores[0] - scores[1]).abs().mean() < 0.02 * scores[0].abs().mean()


def test_activation_inside_a_stream_marks_the_place_and_revocation_restores_the_answer(
    admin: httpx.Client, openai_client: OpenAI, server: RunningServer, bundles: TinyBundles
) -> None:
    before = _answer(openai_client)
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 1500,
        "stream": True,
        "ignore_eos": True,
    }
    lines: list[str] = []
    has_begun = threading.Event()

    def read_stream() -> None:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, timeout=120
        ) as stream:
            assert stream.status_code == 200
            assert stream.headers["x-alter-epoch"] == "1"
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) > 20:
                    has_begun.set()

    reader = threading.Thread(target=read_stream)
    reader.start()
    assert has_begun.wait(60)
    activation = {"name": "late", "bundle": str(bundles.experts["domain-1"])}
    answer = admin.post("/admin/forget-domains", json=activation, headers=WAITING)
    reader.join(120)
    assert (answer.status_code, answer.headers["etag"]) == (201, '"2"')
    assert lines.count(": alter-epoch 1 -> 2") == 1
    assert lines[-2:] == ["data: [DONE]", ""]

    changed = _answer(openai_client)
    assert admin.delete("/admin/forget-domains/late", headers=WAITING).status_code == 200
    assert _answer(openai_client) == before
    assert changed != before


def test_a_caller_finds_requests_and_changes_in_its_trace_and_no_text(
    admin: httpx.Client, collector: Collector, server: RunningServer, bundles: TinyBundles
) -> None:
    trace_id = secrets.token_hex(16)
    traced = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"}
    activation = {"name": "traced", "bundle": str(bundles.experts["domain-1"])}
    admin.post("/admin/forget-domains", json=activation, headers=WAITING | traced)
    body = {"model": "demo", "prompt": QUESTION, "max_tokens": 4}
    httpx.post(f"{server.url}/v1/completions", json=body, headers=traced).raise_for_status()
    admin.delete("/admin/forget-domains/traced", headers=WAITING | traced)
    spans = collector.wait_for(trace_id, {"llm_request", "alter.activate", "alter.revoke"})
    told = {a.key: a.value.string_value for a in spans["alter.activate"].attributes}
    assert told["alter.domain"] == "traced"
    assert "alter.switch" in {span.name for span in collector.spans}
    assert not any(QUESTION.encode() in exported for exported in collector.bodies)


def test_logs_are_objects_that_name_their_request_and_hold_no_text(
    admin: httpx.Client, openai_client: OpenAI, server: RunningServer
) -> None:
    request_id = admin.get("/admin/status").headers["x-request-id"]
    _answer(openai_client)
    lines = server.log.read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    assert [r for r in records if r.get("request_id") == request_id]
    assert {r["process"] for r in records} >= {"APIServer", "EngineCore", "Worker"}
    assert not [line for line in lines if QUESTION in line]


def test_metrics_count_tokens_by_expert_and_path(
    openai_client: OpenAI, server: RunningServer
) -> None:
    def routed() -> float:
        text = httpx.get(f"{server.url}/metrics").text
        assert "vllm:" in text
        assert re.search(r"^alter_domains_active 1\.0$", text, re.M)
        assert re.search(r"^alter_switch_seconds_count", text, re.M)
        pattern = r'^alter_routed_tokens_total\{expert="(?:from-start|retain)",path="(?:high|low)"\} (\S+)$'
        return sum(map(float, re.findall(pattern, text, re.M)))

    before = routed()
    _answer(openai_client, num_tokens=20)
    assert routed() - before > 20


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"name": "Not-A-Name"}, 422),
        ({"bundle": "/nowhere"}, 422),
        ({"bundle": "https://example.org/bundle"}, 422),
        ({"in_flight": "drop"}, 422),
        ({"colour": "red"}, 422),
    ],
)
def test_bad_activation_is_refused_and_changes_nothing(
    change: dict[str, str],
    status: int,
    admin: httpx.Client,
    openai_client: OpenAI,
    bundles: TinyBundles,
) -> None:
    before = _answer(openai_client)
    state = admin.get("/admin/status").json()
    body = {"name": "new", "bundle": str(bundles.experts["domain-1"])} | change
    answer = admin.post("/admin/forget-domains", json=body)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == status
    assert admin.get("/admin/status").json()["epoch"] == state["epoch"]
    assert _answer(openai_client) == before


@pytest.mark.parametrize("path", sorted(CLOSED_ROUTES))
def test_routes_into_the_engine_do_not_answer(path: str, server: RunningServer) -> None:
    body = {"new_data_parallel_size": 2, "method": "alter_unstage", "lora_name": "x"}
    for method in ("POST", "GET"):
        assert httpx.request(method, f"{server.url}{path}", json=body).status_code == 404


def test_a_prompt_of_embeddings_is_refused(server: RunningServer) -> None:
    buffer = io.BytesIO()
    torch.save(torch.zeros(3, 128, dtype=torch.bfloat16), buffer)
    embeddings = base64.b64encode(buffer.getvalue()).decode()
    url = f"{server.url}/v1/completions"
    for prompt in ({}, {"prompt": "the quick"}):
        body = {"model": "demo", "max_tokens": 1, "prompt_embeds": embeddings} | prompt
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 400
        assert "prompt_embeds" in answer.text or "prompt-embeds" in answer.text


def test_keys_and_values_named_by_a_request_change_nothing(server: RunningServer) -> None:
    """Without a connector nothing can be loaded: the answer is that of the plain request."""
    body = {"model": "demo", "prompt": QUESTION, "max_tokens": 8, "temperature": 0}
    remote = {
        "do_remote_prefill": True,
        "remote_engine_id": "other",
        "remote_block_ids": [1, 2, 3],
        "remote_host": "127.0.0.1",
        "remote_port": 9,
    }
    texts = [
        httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=60).json()["choices"]
        for more in ({}, {"kv_transfer_params": remote})
    ]
    assert texts[0][0]["text"] == texts[1][0]["text"]


def test_an_adapter_of_a_request_is_unknown(server: RunningServer) -> None:
    body = {"model": "some-adapter", "prompt": "a", "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 404


def test_admin_is_closed_without_the_token(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/admin/status").status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert httpx.get(f"{server.url}/admin/status", headers=wrong).status_code == 401


def test_shell_commands_reach_the_server(server: RunningServer, bundles: TinyBundles) -> None:
    environment = os.environ | {"ALTER_URL": server.url, "ALTER_ADMIN_TOKEN": server.admin_token}

    def alter(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "alter_cli.main", "domains", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert alter("activate", "shell", str(bundles.experts["domain-1"])).returncode == 0
    assert "shell" in alter("list").stdout
    assert alter("revoke", "shell").returncode == 0
    unknown = alter("revoke", "shell")
    assert unknown.returncode == 1
    assert "shell" in unknown.stderr


def test_option_that_bypasses_the_gate_stops_the_start_with_exit_code_2(
    bundles: TinyBundles,
) -> None:
    command = [sys.executable, "-m", "alter_cli.main", "serve", str(bundles.model)]
    command += ["--alter-substrate", str(bundles.substrate), "--enable-prompt-embeds"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert "--enable-prompt-embeds cannot be used" in result.stderr


def test_damaged_start_up_domain_stops_the_start(bundles: TinyBundles, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.mkdir()
    for file in bundles.experts["domain-0"].iterdir():
        data = file.read_bytes()
        (torn / file.name).write_bytes(data[:-3] if file.suffix == ".safetensors" else data)
    command = [sys.executable, "-m", "alter_cli.main", "serve", str(bundles.model)]
    command += ["--alter-substrate", str(bundles.substrate), "--alter-domain", f"torn={torn}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 1
    assert "does not match its manifest" in result.stderr


@pytest.mark.slow
def test_a_killed_server_comes_back_with_the_domains_of_its_registry(
    bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALTER_REGISTRY", f"sqlite:///{tmp_path / 'registry.sqlite'}")
    monkeypatch.setenv("ALTER_STORE", str(tmp_path / "bundles"))
    flags = ("--alter-max-domains", "2", "--max-model-len", "2048")
    answers = []
    for start in range(2):
        log = tmp_path / f"server-{start}.log"
        with serve(bundles.model, bundles.substrate, log, flags) as running:
            running.wait_until_ready()
            headers = {"Authorization": f"Bearer {running.admin_token}"}
            with (
                httpx.Client(base_url=running.url, headers=headers, timeout=60) as admin,
                OpenAI(base_url=f"{running.url}/v1", api_key="unused") as client,
            ):
                if start == 0:
                    answers.append(_answer(client))
                    for name, number in (("a", 0), ("b", 1)):
                        body = {"name": name, "bundle": str(bundles.experts[f"domain-{number}"])}
                        admin.post("/admin/forget-domains", json=body, headers=WAITING)
                    admin.delete("/admin/forget-domains/a", headers=WAITING)
                listed = admin.get("/admin/forget-domains").json()
                assert (listed["epoch"], [d["name"] for d in listed["domains"]]) == (3, ["b"])
                answers.append(_answer(client))
            os.killpg(running.process.pid, signal.SIGKILL)
    without, before, after = answers
    assert before == after != without
