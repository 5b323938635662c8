"""The client of a server: what it sends to which server, what it makes of their replies, and one clear line for everything that goes wrong.

The server here is a few lines that play the four kinds; the real llama.cpp is in test_served.py.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_tokenizer
from gptoss_jax.errors import RunError, UsageError

pytest.importorskip("requests", reason="endpoints need the package requests")

from gptoss_jax.evaluation.endpoint import API_KEY, Endpoint

QUESTION = [{"messages": [{"role": "user", "content": "Spell out 7."}]}]


class Fake:
    """A server whose replies are `completion(body) -> (status, dict or text)`. `bodies` are the requests that came."""

    def __init__(self, owner="vllm"):
        self.owner, self.bodies, self.headers, self.active, self.most = owner, [], [], 0, 0
        self.models = {"data": [{"id": "tuned", "owned_by": owner}]}
        self.completion = lambda body: (200, self.reply(body))
        self.lock = threading.Lock()

    def reply(self, body, text="<|channel|>final<|message|>seven", reason="stop", logprobs=None, tokens=None):
        choice = {"text": text, "finish_reason": reason, "logprobs": logprobs}
        return {"choices": [choice], "usage": {"prompt_tokens": len(body["prompt"]) if tokens is None else tokens}}


@pytest.fixture
def fake():
    fake = Fake()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(200, fake.models)

        def do_POST(self):
            with fake.lock:
                fake.active += 1
                fake.most = max(fake.most, fake.active)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            fake.headers.append(dict(self.headers))
            result = fake.completion(body)
            with fake.lock:
                fake.active -= 1
            self.send(*result)

        def send(self, status, values):
            data = (values if isinstance(values, str) else json.dumps(values)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


def test_the_rendered_prompt_goes_out_as_ids_and_the_answer_comes_back_in_channels(fake, tokenizer):
    endpoint = Endpoint(f"{fake.url}/", tokenizer)
    (answer,) = endpoint.answer(QUESTION, max_new_tokens=9)
    assert (answer.final, answer.stopped) == ("seven", True)
    body = fake.bodies[-1]
    assert tokenizer.decode(body["prompt"]) == "<|start|>user<|message|>Spell out 7.<|end|><|start|>assistant"
    assert body["model"] == "tuned" and body["max_tokens"] == 9 and body["temperature"] == 0
    fake.completion = lambda body: (200, fake.reply(body, "<|channel|>final<|message|>sev", "length"))
    assert not endpoint.answer(QUESTION)[0].stopped, "cut off is not stopped"


@pytest.mark.parametrize(
    "owner, fields",
    [
        ("llamacpp", {"preserved_tokens"}),
        ("vllm", {"skip_special_tokens", "stop_token_ids", "spaces_between_special_tokens", "add_special_tokens", "return_tokens_as_token_ids"}),
        ("sglang", {"skip_special_tokens", "stop_token_ids"}),
        ("tensorrt_llm", {"skip_special_tokens", "stop_token_ids", "spaces_between_special_tokens", "add_special_tokens"}),
        ("somebody", set()),
    ],
)
def test_each_server_is_asked_only_what_it_knows(fake, tokenizer, owner, fields):
    fake.models["data"][0]["owned_by"] = owner
    Endpoint(fake.url, tokenizer).answer(QUESTION)
    assert set(fake.bodies[-1]) - {"model", "prompt", "max_tokens", "temperature"} == fields


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"id": 5, "token": "x", "top_logprobs": [{"id": 7, "token": "?", "logprob": -0.1}, {"id": 9, "token": "!", "logprob": -3.0}]}]},
        {"tokens": ["x"], "token_logprobs": [-0.1], "top_logprobs": [{"token_id:7": -0.1, "token_id:9": -3.0}]},
        {"tokens": ["x"], "token_logprobs": [-0.1], "top_logprobs": [{"<7>": -0.1, "<9>": -3.0, "no token has this text": -4.0}]},
    ],
    ids=["llama.cpp", "vLLM", "by text"],
)
def test_log_probabilities_come_by_token_id(fake, tokenizer, logprobs):
    text = json.dumps(logprobs).replace("<7>", tokenizer.decode([700])).replace("<9>", tokenizer.decode([900]))
    fake.completion = lambda body: (200, fake.reply(body, logprobs=json.loads(text) if "logprobs" in body else None))
    (found,) = Endpoint(fake.url, tokenizer).next_token([np.array([1, 2, 3], np.int32)], 2)
    assert found == ({700: -0.1, 900: -3.0} if "<7>" in json.dumps(logprobs) else {7: -0.1, 9: -3.0})
    assert fake.bodies[-1]["logprobs"] == 2 and fake.bodies[-1]["max_tokens"] == 1 and fake.bodies[-1]["prompt"] == [1, 2, 3]


def test_a_server_that_refuses_ids_gets_text_and_must_count_the_same_tokens(fake, tokenizer):
    count = lambda body: len(tokenizer(body["prompt"], add_special_tokens=False)["input_ids"])

    def only_text(body):
        if isinstance(body["prompt"], list):
            return 422, {"detail": "prompt must be a string"}
        return 200, fake.reply(body, tokens=count(body))

    fake.completion = only_text
    endpoint = Endpoint(fake.url, tokenizer)
    assert not endpoint.as_ids and "prompts as text" in endpoint.describe()
    assert endpoint.answer(QUESTION)[0].final == "seven" and fake.bodies[-1]["prompt"].startswith("<|start|>user")
    fake.completion = lambda body: (200, fake.reply(body, tokens=count(body) + 1)) if isinstance(body["prompt"], str) else (400, {"error": "no"})
    with pytest.raises(RunError, match="special tokens in the text are not parsed, or the tokenizer differs"):
        endpoint.answer(QUESTION)


def test_a_busy_server_is_asked_again_and_requests_at_once_are_bounded(fake, tokenizer, monkeypatch):
    monkeypatch.setattr("urllib3.util.Retry.sleep", lambda self, response=None: None)
    endpoint = Endpoint(fake.url, tokenizer, concurrency=3)
    failures = iter([503, 429] + [200] * 100)

    def sometimes(body):
        with fake.lock:
            status = next(failures)
        threading.Event().wait(0.02)
        return status, fake.reply(body) if status == 200 else {"error": {"message": "loading"}}

    fake.completion, fake.most = sometimes, 0
    done = []
    assert [a.final for a in endpoint.answer(QUESTION * 20, report=done.append)] == ["seven"] * 20
    assert fake.most == 3 and done == list(range(1, 21))
    fake.completion = lambda body: (503, {"error": {"message": "loading model"}})
    with pytest.raises(RunError, match="503, loading model"):
        endpoint.answer(QUESTION)


def test_the_key_of_the_environment_is_sent_and_never_shown(fake, tokenizer, monkeypatch):
    monkeypatch.setenv(API_KEY, "geheim-123")
    endpoint = Endpoint(fake.url, tokenizer)
    endpoint.answer(QUESTION)
    assert fake.headers[-1]["Authorization"] == "Bearer geheim-123" and "geheim" not in endpoint.describe() + repr(endpoint)
    for status, expected in ((401, f"environment variable {API_KEY}"), (400, "bad key \\*\\*\\*")):
        fake.completion = lambda body, status=status: (status, {"error": {"message": "bad key geheim-123"}})
        with pytest.raises(UsageError, match=expected) as caught:
            endpoint.answer(QUESTION)
        assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "change, error, fragment",
    [
        (lambda f: setattr(f, "completion", lambda body: (404, {"error": {"message": "no such model"}})), UsageError, "404, no such model"),
        (lambda f: setattr(f, "completion", lambda body: (400, {"message": "context is full\nreally"})), UsageError, "context is full really"),
        (lambda f: setattr(f, "completion", lambda body: (500, "<html>oops</html>")), RunError, "500, <html>oops</html>"),
        (lambda f: setattr(f, "completion", lambda body: (200, "<html>hello</html>")), RunError, "no JSON object"),
        (lambda f: setattr(f, "completion", lambda body: (200, {"choices": []})), RunError, "not as OpenAI's completions look"),
        (lambda f: setattr(f, "completion", lambda body: (200, f.reply(body, tokens=3))), RunError, "the server counts 3 prompt tokens"),
        (lambda f: setattr(f, "models", {"data": []}), RunError, "lists no models"),
        (lambda f: setattr(f, "models", "<html>"), RunError, "no JSON object"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(fake, tokenizer, change, error, fragment):
    change(fake)
    with pytest.raises(error) as caught:
        Endpoint(fake.url, tokenizer)
    assert fragment in str(caught.value) and "\n" not in str(caught.value) and fake.url in str(caught.value)


def test_wrong_addresses_models_and_silence(fake, tokenizer):
    with pytest.raises(UsageError, match="serves no model 'other', but tuned"):
        Endpoint(fake.url, tokenizer, model="other")
    with pytest.raises(UsageError, match="is no URL"):
        Endpoint("localhost:8000", tokenizer)
    with pytest.raises(RunError, match="connection refused: is the server running there"):
        Endpoint("http://127.0.0.1:9", tokenizer)
    endpoint = Endpoint(fake.url, tokenizer, timeout=0.2)
    fake.completion = lambda body: threading.Event().wait(1) or (200, fake.reply(body))
    with pytest.raises(RunError, match="no answer within 0.2 s"):
        endpoint.answer(QUESTION)


def test_a_server_without_log_probabilities_is_refused(fake, tokenizer):
    with pytest.raises(RunError, match="returned no log-probabilities"):
        Endpoint(fake.url, tokenizer).next_token([np.array([1], np.int32)])
