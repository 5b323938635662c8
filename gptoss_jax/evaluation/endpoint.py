"""A served model (OpenAI-compatible: llama.cpp, vLLM, SGLang, trtllm-serve) as a subject of tasks and comparisons.

Requests go to /v1/completions with the harmony prompt as token ids, so neither the server's chat template nor its tokenizer is in the comparison.
Where a server refuses ids the text is sent, and it must turn special tokens in it into theirs; either way the number of prompt tokens that it reports
must be ours, or an error says so. What each is asked beyond the standard (from their request classes; llama.cpp was run, the others were not):

    llama.cpp        preserved_tokens: the tags stay in the text
    vLLM             skip_special_tokens off, stop_token_ids, logprobs with "token_id:N" as names; at most 20 of them unless --max-logprobs
    SGLang           skip_special_tokens off, stop_token_ids; logprobs name tokens by their text
    trtllm-serve     as SGLang; refuses unknown fields; several logprobs only with the PyTorch backend
    another one      nothing; it must return special tokens in the text by itself

The API key is taken from the environment variable GPTOSS_JAX_API_KEY, sent as bearer token to this URL alone, and shown nowhere.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from gptoss_jax.data.harmony import SPECIAL_TOKENS, System
from gptoss_jax.errors import RunError, UsageError
from gptoss_jax.evaluation.answers import STOP_TOKENS, Answer, parse_answer
from gptoss_jax.evaluation.questions import encode_questions

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry
except ImportError:
    raise UsageError("endpoints need the package requests: pip install 'gptoss_jax[eval]'") from None

API_KEY = "GPTOSS_JAX_API_KEY"
SERVERS = {"llamacpp": "llama.cpp", "vllm": "vLLM", "sglang": "SGLang", "tensorrt_llm": "trtllm-serve"}  # `owned_by` of /v1/models -> name
BUSY = (429, 502, 503, 504)


class Completion(NamedTuple):
    """One answer of the server. `top` are the log-probabilities of the most probable tokens at the first place, by token id."""

    text: str
    finish_reason: str | None
    top: dict[int, float]


class Endpoint:
    """A served model.

    Args:
      url: of the server, with or without /v1.
      tokenizer: that of the model which should be served.
      model: its name there, if several are served.
      timeout: seconds for one answer; connecting may take 10.
      retries: further tries of a request that found the server busy (429, 502-504) or could not connect, after 0.5, 1, 2, ... seconds.
      concurrency: requests at the same time.

    Raises:
      UsageError: no such URL, no such model, a key is wanted.
      RunError: nothing answers there, or not as such a server does.
    """

    def __init__(
        self, url: str, tokenizer: Any, *, model: str | None = None, timeout: float = 300.0, retries: int = 4, concurrency: int = 8
    ):
        if timeout <= 0 or concurrency < 1:
            raise UsageError(f"timeout = {timeout:g} must be above 0 and concurrency = {concurrency} at least 1")
        self.url = _base(url)
        self.tokenizer, self.timeout, self.concurrency = tokenizer, timeout, concurrency
        self._session = requests.Session()
        retry = Retry(retries, read=False, backoff_factor=0.5, status_forcelist=BUSY, allowed_methods=("POST",), raise_on_status=False)
        self._session.mount(self.url, HTTPAdapter(pool_maxsize=concurrency, max_retries=retry))
        self._session.mount(f"{self.url}/models", HTTPAdapter())  # the first request: who is not there is said at once
        if os.environ.get(API_KEY):
            self._session.headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        models = self._call("GET", "models").get("data")
        if not isinstance(models, list) or not models or not all(isinstance(card, dict) and "id" in card for card in models):
            raise RunError(f"{self.url}/models lists no models: not an OpenAI-compatible server?")
        names = [card["id"] for card in models]
        if model is not None and model not in names:
            raise UsageError(f"{self.url} serves no model {model!r}, but {', '.join(names)}")
        self.model = names[0] if model is None else model
        self.server = str(models[names.index(self.model)].get("owned_by", "unknown"))
        self._ids_by_text: dict[str, int] | None = None
        self.as_ids = self._accepts_ids()

    def describe(self) -> str:
        return f"{self.model} at {self.url} ({SERVERS.get(self.server, self.server)}), prompts as {'token ids' if self.as_ids else 'text'}"

    # ---- as a subject of tasks ------------------------------------------------------------------------------------------------------
    def answer(
        self,
        questions: Sequence[Mapping[str, Any]],
        *,
        system: System | str | None = None,
        max_new_tokens: int = 512,
        report: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Greedy answers. An answer that the server ended by itself counts as stopped."""
        prompts = encode_questions(questions, self.tokenizer, system)
        return [parse_answer(_with_stop(completion)) for completion in self._complete_all(prompts, max_new_tokens, 0, report)]

    def next_token(self, prompts: Sequence[np.ndarray], top: int = 20, report: Callable[[int], None] | None = None) -> list[dict[int, float]]:
        """Log-probabilities (nats) of the `top` most probable tokens after each prompt (int32 [n]), by token id.

        Raises:
          RunError: the server gives none.
        """
        found = [completion.top for completion in self._complete_all(prompts, 1, top, report)]
        if not all(found):
            raise RunError(f"{self.url}: the server returned no log-probabilities, so nothing can be compared")
        return found

    # ---- requests -------------------------------------------------------------------------------------------------------------------
    def _complete_all(self, prompts: Iterable[np.ndarray], max_tokens: int, top: int, report) -> list[Completion]:
        out = []
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._complete, prompt, max_tokens, top) for prompt in prompts]
            try:
                for future in futures:
                    out.append(future.result())
                    if report:
                        report(len(out))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return out

    def _complete(self, prompt: np.ndarray, max_tokens: int, top: int) -> Completion:
        ids = prompt.tolist()
        body = {"model": self.model, "prompt": ids if self.as_ids else self.tokenizer.decode(ids), "max_tokens": max_tokens, "temperature": 0}
        body |= self._extras() | ({"logprobs": top} if top else {})
        reply = self._call("POST", "completions", body)
        try:
            choice = reply["choices"][0]
            counted = reply["usage"]["prompt_tokens"]
            text, reason = choice["text"], choice.get("finish_reason")
            logprobs = choice.get("logprobs")
        except (KeyError, IndexError, TypeError) as error:
            raise RunError(f"{self.url}/completions: the reply has no {error}: not as OpenAI's completions look") from None
        if counted != len(ids):
            what = "special tokens in the text are not parsed, or the tokenizer differs" if not self.as_ids else "it adds or drops tokens"
            raise RunError(f"{self.url}: the server counts {counted} prompt tokens, these are {len(ids)}: {what}")
        return Completion(text, reason, self._top(logprobs) if top else {})

    def _extras(self) -> dict[str, Any]:
        if self.server == "llamacpp":
            return {"preserved_tokens": [name for name in SPECIAL_TOKENS if name in self.tokenizer.get_vocab()]}
        if self.server not in SERVERS:
            return {}
        stops = [self.tokenizer.convert_tokens_to_ids(name) for name in STOP_TOKENS if name in self.tokenizer.get_vocab()]
        extras: dict[str, Any] = {"skip_special_tokens": False, "stop_token_ids": stops}
        if self.server != "sglang":
            extras |= {"spaces_between_special_tokens": False, "add_special_tokens": False}
        if self.server == "vllm":
            extras["return_tokens_as_token_ids"] = True
        return extras

    def _accepts_ids(self) -> bool:
        """Asks for one token; a server that refuses ids answers 400 or 422."""
        (prompt,) = encode_questions([{"messages": [{"role": "user", "content": "Hi"}]}], self.tokenizer)
        self.as_ids = True
        try:
            self._complete(prompt, 1, 0)
        except UsageError as refused:
            self.as_ids = False
            try:
                self._complete(prompt, 1, 0)
            except UsageError:
                raise refused from None
        return self.as_ids

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        where = f"{self.url}/{path}"
        try:
            reply = self._session.request(method, where, json=body, timeout=(10, self.timeout))
        except requests.exceptions.Timeout:
            raise RunError(f"{where}: no answer within {self.timeout:g} s") from None
        except requests.exceptions.ConnectionError as error:
            reason = "connection refused: is the server running there?" if "refused" in str(error) else _innermost(error)
            raise RunError(f"{where}: {reason}") from None
        except requests.exceptions.RequestException as error:
            raise RunError(f"{where}: {_innermost(error)}") from None
        if reply.status_code in (401, 403):
            raise UsageError(f"{where}: the server wants an API key ({reply.status_code}): put it into the environment variable {API_KEY}")
        if reply.status_code == 404:
            raise UsageError(f"{where}: 404, {_message(reply)}; give the address of an OpenAI-compatible server")
        if reply.status_code in (400, 422):
            raise UsageError(f"{where}: the server refuses the request: {_message(reply)}")
        if reply.status_code >= 400:
            raise RunError(f"{where}: {reply.status_code}, {_message(reply)}")
        try:
            values = reply.json()
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise RunError(f"{where}: the reply is no JSON object: not an OpenAI-compatible server?")
        return values

    # ---- log-probabilities ----------------------------------------------------------------------------------------------------------
    def _top(self, logprobs: dict[str, Any] | None) -> dict[int, float]:
        """Of the first place. llama.cpp answers in the form of chat completions (with ids), the others in that of completions."""
        if not logprobs:
            return {}
        if logprobs.get("content"):
            entries = [(entry.get("id", entry["token"]), entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"]]
        else:
            entries = list(((logprobs.get("top_logprobs") or [None])[0] or {}).items())
        found = {self._id(token): float(value) for token, value in entries if value is not None}
        found.pop(None, None)
        return found

    def _id(self, token: int | str) -> int | None:
        """Token id from what a server calls the token; None where its text fits no token or several."""
        if isinstance(token, int):
            return token
        if token.startswith("token_id:"):
            return int(token.removeprefix("token_id:"))
        if self._ids_by_text is None:
            texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
            table: dict[str, int] = {}
            for i, text in enumerate(texts):
                table[text] = -1 if text in table or "\ufffd" in text else i
            self._ids_by_text = {text: i for text, i in table.items() if i >= 0}
        return self._ids_by_text.get(token)


def _base(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no URL: give it as http://HOST:PORT")
    if "@" in parts.netloc:
        raise UsageError(f"the URL of {parts.hostname} holds a credential: put the key into the environment variable {API_KEY}")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith('/v1') else path + '/v1'}"


def _with_stop(completion: Completion) -> str:
    """The text with the stop token, which servers leave out."""
    ended = completion.finish_reason == "stop" and not completion.text.endswith(STOP_TOKENS)
    return completion.text + ("<|return|>" if ended else "")


def _message(reply: requests.Response) -> str:
    """The server's own words, one line of them; a key in them is blotted out."""
    try:
        values = reply.json()
        error = values.get("error", values)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or str(error)
    except (ValueError, AttributeError):
        text = reply.text
    text = " ".join(str(text).split())
    key = os.environ.get(API_KEY)
    return (text.replace(key, "***") if key else text)[:200] or reply.reason


def _innermost(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    return " ".join(str(reason or error).split(": ")[-1].split())[:200]
