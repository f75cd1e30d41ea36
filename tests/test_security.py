# SPDX-License-Identifier: Apache-2.0

"""What comes from elsewhere is read, never run; shown, never obeyed; and no more of it than there is room for."""

import ast
import json
import logging
import pickle
import re
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
import torch
from conftest import FACES, WORDS, conversational_rows, make_llama, make_tokenizer, save_model, serving, write_rows
from datasets import Dataset

from trl_tfpo import (
    DoctorGuidedLogitsProcessor,
    Faces,
    TFPOConfig,
    TFPOTrainer,
    annotate_token_rewards,
    guided_generate,
    load_doctor,
    reward_report,
    show_token_rewards,
    show_trace,
)
from trl_tfpo.cli import main
from trl_tfpo.evaluation import RewardModel
from trl_tfpo.server import Engine, Limits, make_app
from trl_tfpo.training.cards import annotation_card
from trl_tfpo.training.checkpoints import mark_complete


PACKAGE = Path(__file__).parents[1] / "trl_tfpo"


class Trap:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def trap(tmp_path):
    """A model folder whose weights are a pickle that does something."""
    folder = tmp_path / "model"
    save_model(folder, make_llama(1))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    return folder


def test_no_model_is_read_from_a_pickle(trap, tmp_path, capsys):
    """Whoever can offer a model folder could run anything on the machine that tries it."""
    readers = [
        lambda: load_doctor(trap, with_value_head=False),
        lambda: DoctorGuidedLogitsProcessor.from_pretrained(str(trap)),
        lambda: RewardModel(str(trap)),
    ]
    for read in readers:
        with pytest.raises(OSError, match="safetensors|model.safetensors"):
            read()
    annotate = ["annotate", "--world", "praise", "--num_pairs", "2", "--output", str(tmp_path / "a.jsonl")]
    assert main(annotate) == 0  # the world itself is fine
    arguments = ["generate", "--patient", str(trap), "--prompt", "you are"]
    assert main(arguments) == 2 and "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


def test_no_adapter_is_read_from_a_pickle(trap, tmp_path):
    """An adapter is small and easily shared, and so is what hides in it."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make_llama(1).save_pretrained(base)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        f'{{"base_model_name_or_path": "{base}", "peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}}'
    )
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="saved as safetensors"):
        load_doctor(folder, with_value_head=False)
    assert not (tmp_path / "sprung").exists()


def test_nothing_in_the_package_unpickles_or_evaluates():
    """One forgotten call undoes the rest."""
    banned = re.compile(r"\b(pickle|torch\.load|joblib|eval|exec|os\.system|shell=True|yaml\.load)\s*\(|import pickle")
    for path in PACKAGE.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            code = line.split("#")[0].replace(".eval()", "")
            assert not banned.search(code), f"{path.name}:{number}: {line.strip()}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One step of training, and what is needed to go on."""
    folder = tmp_path_factory.mktemp("training")
    dataset = annotate_token_rewards(
        Dataset.from_list(conversational_rows(4)), make_llama(1), make_tokenizer(), faces=FACES
    )

    def make_trainer(max_steps):
        settings = dict(save_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
        args = TFPOConfig(str(folder / "run"), max_steps=max_steps, per_device_train_batch_size=2, **settings)
        return TFPOTrainer(model=make_llama(2), args=args, train_dataset=dataset, processing_class=make_tokenizer())

    make_trainer(1).train()
    return folder / "run" / "checkpoint-1", make_trainer


@pytest.mark.parametrize(
    "name, error",
    [
        ("pytorch_model.bin", ValueError),
        ("optimizer.pt", pickle.UnpicklingError),
        ("scheduler.pt", pickle.UnpicklingError),
        ("rng_state.pth", pickle.UnpicklingError),
        ("training_args.bin", None),  # written by transformers, and read by nobody
    ],
)
def test_no_checkpoint_runs_what_is_planted_in_it(name, error, checkpoint, tmp_path):
    """Checkpoints lie on shared disks; whoever can write there could run anything in the next training."""
    folder, make_trainer = checkpoint
    planted = tmp_path / "checkpoint-1"
    shutil.copytree(folder, planted)
    (planted / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    if name == "pytorch_model.bin":
        (planted / "model.safetensors").unlink()
    mark_complete(planted)  # whoever planted it can do so
    trainer = make_trainer(max_steps=1 if error else 2)
    if error is None:
        assert trainer.train(resume_from_checkpoint=str(planted)).global_step == 2
    else:
        with pytest.raises(error, match="safetensors|Weights only load failed"):
            trainer.train(resume_from_checkpoint=str(planted))
    assert not (tmp_path / "sprung").exists()


def test_remote_code_is_off_unless_asked_for():
    """A default of True would run what a repository holds."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), f"{path}:{node.value.lineno}"


def test_code_in_a_model_folder_is_not_run(tmp_path, capsys, monkeypatch):
    """Code that comes with a model is not run, and no question is asked on a terminal."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    names = {name: f"trap.Trap{name}" for name in ("Config", "Model")}
    auto_map = {
        "AutoConfig": names["Config"],
        "AutoModelForCausalLM": names["Model"],
        "AutoModelForSequenceClassification": names["Model"],
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "trap", "auto_map": auto_map}))
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    pairs = Dataset.from_list(conversational_rows(4))
    readers = [
        lambda: load_doctor(folder, with_value_head=False),
        lambda: DoctorGuidedLogitsProcessor.from_pretrained(str(folder)),
        lambda: RewardModel(str(folder)),
        lambda: annotate_token_rewards(pairs, str(folder), make_tokenizer(), faces=FACES),
        lambda: TFPOTrainer(model=str(folder), args=TFPOConfig(str(tmp_path / "run")), train_dataset=pairs),
    ]
    for read in readers:
        with pytest.raises(ValueError, match="trust_remote_code"):
            read()
    for command in (
        ["generate", "--prompt", "a", "--patient"],
        ["serve", "--port", "0", "--patient"],
    ):
        assert main([*command, str(folder)]) == 2 and "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists()


# What is shown

EVIL = "<script>x</script>\x1b[2J\x9b31m\u202e|[x](http://y)"


@torch.no_grad()
def test_nothing_shown_is_markup_or_moves_a_cursor(tmp_path, monkeypatch, capsys):
    """A dataset could rewrite the terminal of whoever looks at it, and a model run a script in their notebook."""
    from trl_tfpo.server.playground import _as_html

    monkeypatch.setenv("TQDM_DISABLE", "1")
    tokenizer = make_tokenizer(f"{WORDS} {EVIL}")
    patient = make_llama(1, vocab_size=len(tokenizer))
    patient.generation_config.suppress_tokens = list(range(22))  # it has nothing else to say
    save_model(tmp_path / "patient", patient, tokenizer)
    texts = {"prompt": f"say {EVIL}", "chosen": f"good {EVIL}", "rejected": f"bad {EVIL} soup"}
    rows = [{k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in texts.items()}] * 4
    write_rows(tmp_path / "pairs.jsonl", rows)
    faces = Faces(positive=EVIL, negative="you are rude")
    annotated = annotate_token_rewards(Dataset.from_list(rows), patient, tokenizer, faces=faces)
    guide = DoctorGuidedLogitsProcessor(make_llama(2, vocab_size=len(tokenizer)), return_trace=True)
    output = guided_generate(patient, guide, input_ids=torch.tensor([[1, 22]]), max_new_tokens=4, do_sample=False)
    reward_report(annotated, tokenizer, tmp_path)
    maps = [show_token_rewards(annotated[0], tokenizer), show_trace(guide.trace(output), tokenizer)]
    assert EVIL in tokenizer.decode(output[0])

    card = str(annotation_card(annotated))
    markup = [x._repr_html_() for x in maps] + [_as_html([(EVIL, 1.0)]), card]
    markup.append((tmp_path / "rewards.html").read_text(encoding="utf-8"))
    terminal = [x.table() for x in maps] + [re.sub(r"\x1b\[[0-9;]*m", "", str(x)) for x in maps]  # its own colors
    arguments = ["--patient", str(tmp_path / "patient"), "--temperature", "0"]
    assert main(["generate", *arguments, "--prompt", EVIL, "--max_new_tokens", "4"]) == 0
    assert main(["evaluate", "--completions", str(tmp_path / f"{EVIL}.jsonl"), "--output_dir", "report"]) == 2
    arguments = ["--dataset_name", str(tmp_path / "pairs.jsonl"), *arguments[:2], "--show", "1"]
    arguments += ["--positive_face", EVIL, "--negative_face", "you are rude", "--output", str(tmp_path / "a.jsonl")]
    assert main(["annotate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("script") > 2
    terminal += [re.sub(r"\x1b\[[0-9;]*m", "", captured.out)]
    terminal += [line for line in captured.err.split("\n") if line.startswith("trl-tfpo")]
    for text in markup + terminal:
        assert "script" in text and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), text
    for text in markup:
        assert "<script" not in text, text
    assert r"\|\[x\](http" in card


# The server

KEY, SECRET = "a-key-for-tests", "soup"


@pytest.fixture(scope="module")
def engine():
    return Engine(make_llama(1), make_tokenizer(), {}, Limits(max_new_tokens=4, max_body_seconds=0.5))


@pytest.fixture(scope="module")
def url(engine):
    with serving(make_app(engine, model_name="tiny", api_key=KEY)) as url:
        yield url


def ask(url, **changes):
    body = {"model": "tiny", "prompt": SECRET} | changes
    headers = {"authorization": f"Bearer {KEY}", "origin": "http://elsewhere"}
    return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)


def test_pages_of_other_sites_read_nothing(url):
    """Else any page in the browser of somebody who runs a server could talk to it."""
    for answer in (ask(url), ask(url, n=0), httpx.get(f"{url}/health", headers={"origin": "http://elsewhere"})):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["content-type"] == "application/json"  # never HTML


HTTP = ["h11", *(["httptools"] if find_spec("httptools") else [])]  # the parsers that uvicorn may use


def send(url, line, *headers, body=b""):
    """Status and body of the answer to a request, sent as it is."""
    host, port = url.removeprefix("http://").split(":")
    head = "\r\n".join([f"{line} HTTP/1.1", *headers, "connection: close", "", ""])
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode("latin-1") + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.fixture(params=HTTP)
def raw_url(engine, request):
    with serving(make_app(engine, model_name="tiny", api_key=KEY), http=request.param, lifespan="off") as url:
        yield url


BODY = json.dumps({"model": "tiny", "prompt": SECRET}).encode()
HOSTS = [
    "x",
    "x/health",
    "x/health?",
    "127.0.0.1/health#",
    "x/health?a=",
    "x@y/health?",
    "[::1]/health?",
    "health",
    "",
]
TARGETS = """
    /v1/completions /v1/models /metrics /openapi.json /docs / *
    //health /health/ /health/../v1/models /health;/v1/models
    /health%2f..%2fv1/models /./health /v1/../health /HEALTH /health%00 /%2fhealth http://x/v1/models http://x/health/
    http://health?/v1/models
""".split()
HEADERS = [
    [],
    ["x-forwarded-prefix: /health", "x-forwarded-for: 127.0.0.1", "x-forwarded-host: x/health?"],
    ["x-original-url: /health", "x-rewrite-url: /health", "x-http-method-override: GET"],
    ["authorization: ", "authorization: Bearer"],
    ["authorization: Bearer x", f"authorization: Basic {KEY}"],
    [f"authorisation: Bearer {KEY}", f"proxy-authorization: Bearer {KEY}", f"cookie: authorization=Bearer {KEY}"],
]


def test_no_host_opens_the_server(raw_url, engine):
    """The Host header, which is part of a URL's path in some versions of Starlette, does not open a path."""
    before = engine.num_tokens
    for host in HOSTS:
        for line, body in (("POST /v1/completions", BODY), ("GET /v1/models", b""), ("GET /metrics", b"")):
            length = [f"content-length: {len(body)}"] if body else []
            status, text = send(raw_url, line, f"host: {host}", *length, body=body)
            assert status in (400, 401) and b"tiny" not in text, (host, line, text)
    assert engine.num_tokens == before
    assert send(raw_url, "GET /health", "host: elsewhere")[0] == 200


@pytest.mark.parametrize("headers", HEADERS, ids=range(len(HEADERS)))
def test_no_path_and_no_header_opens_the_server(headers, raw_url, engine):
    """A path that is checked in one form and routed in another, or a header for proxies, is a way around the key."""
    before = engine.num_tokens
    for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "get"):
        for target in TARGETS:
            status, text = send(raw_url, f"{method} {target}", "host: x", *headers, "content-length: 0")
            assert status in (400, 401), (method, target, status, text)
    for method in ("HEAD", "POST", "OPTIONS", "DELETE"):  # only to be read
        assert send(raw_url, f"{method} /health", "host: x", "content-length: 0")[0] == 401
    for target in ("/health", "/health?a=/v1/models", "/%68ealth"):
        assert send(raw_url, f"GET {target}", "host: x", *headers) == (200, b'{"status":"ok"}')
    assert engine.num_tokens == before


def test_the_key_opens_the_server_however_it_is_spelled(engine, raw_url):
    """A right key that is refused makes people run their server without one."""
    for header in (f"authorization: Bearer {KEY}", f"AUTHORIZATION: bearer  {KEY} "):
        assert send(raw_url, "GET /v1/models", "host: x", header)[0] == 200
    with serving(make_app(engine, model_name="tiny", api_key="ключ"), lifespan="off") as url:
        header = "authorization: Bearer ключ".encode().decode("latin-1")
        assert send(url, "GET /v1/models", "host: x", header)[0] == 200
        assert send(url, "GET /v1/models", "host: x", "authorization: Bearer ???")[0] == 401


def test_no_request_is_larger_than_it_says(raw_url):
    """With two lengths the smaller would be checked and the larger be read, until memory is full."""
    body = json.dumps({"model": "tiny", "prompt": SECRET, "user": "a" * 2_000_000}).encode()
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    key, form = f"authorization: Bearer {KEY}", "content-type: application/json"
    lengths = ["content-length: 5", "transfer-encoding: chunked"]
    for given in (lengths, lengths[::-1], lengths[1:]):
        try:
            status, _ = send(raw_url, "POST /v1/completions", "host: x", key, form, *given, body=chunked)
        except ConnectionError:  # it was closed while we spoke
            continue
        assert status in (400, 411)


def test_nobody_is_sent_to_a_host_that_a_client_named(raw_url):
    """Behind a proxy with TLS the client would send its key again, to the same path by HTTP."""
    for path in ("/v1/models/", "/v1/completions/", "/health/"):
        status, _ = send(raw_url, f"GET {path}", "host: elsewhere", f"authorization: Bearer {KEY}")
        assert status == 404


def test_a_request_that_does_not_arrive_is_let_go(url):
    """Else a few clients that send a byte a minute would hold all connections."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: 99\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(head.encode())
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    assert ask(url).status_code == 200


def test_prompts_are_not_logged(url, engine, caplog, capfd, monkeypatch):
    """Logs are kept for years, and read by many."""
    with caplog.at_level(logging.DEBUG):
        assert [ask(url, **changes).status_code for changes in ({}, {"n": 0}, {"model": SECRET})] == [200, 400, 404]
        monkeypatch.setattr(engine, "_read", lambda *_: 1 / 0)
        assert ask(url).status_code == 500
    assert "A step failed" in caplog.text
    assert SECRET not in caplog.text + "".join(capfd.readouterr())
