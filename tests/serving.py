"""A server in a thread, in front of a tiny model and its datastore, and clients for it."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
from conftest import byte_tokenizer, tiny_llama
from stores import distinct_documents

from knnlm.apps.engine.limits import Limits
from knnlm.apps.server.service import Service, listen
from knnlm.datastore.datastore import Datastore
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build
from knnlm.model.language_model import LanguageModel

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A chat template, which uses the control tokens of the tiny tokenizer."""
PARAMETERS: dict[str, Any] = {"k": 12, "lmbda": 0.4, "temperature": 10.0}


@dataclass
class Served:
    """A running server."""

    service: Service
    url: str

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60.0
        )

    def http(self, **options: Any) -> httpx2.Client:
        headers = {"Content-Type": "application/json"}
        return httpx2.Client(base_url=self.url, timeout=60.0, headers=headers, **options)

    def complete(self, prompt: Any, **options: Any) -> Any:
        """Send a request through the official client; return a stream as a list of chunks."""
        with self.openai() as client:
            answer = client.completions.create(model="tiny", prompt=prompt, **_own_aside(options))
            return list(answer) if options.get("stream") else answer

    def chat(self, messages: Any, **options: Any) -> Any:
        """Do the same for a conversation; a text stands for a user's only message."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        with self.openai() as client:
            answer = client.chat.completions.create(
                model="tiny", messages=messages, **_own_aside(options)
            )
            return list(answer) if options.get("stream") else answer

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.service.engine.is_idle)


def _own_aside(options: dict[str, Any]) -> dict[str, Any]:
    """Put the options that are not OpenAI's where the client takes them."""
    own = ("lmbda", "k", "knn_temperature", "sources", "top_k", "min_p", "repetition_penalty")
    extra = {name: value for name, value in options.items() if name in own}
    return {"extra_body": extra} | {n: v for n, v in options.items() if n not in own}


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextmanager
def serving(
    open_model: Callable[[], KNNLM],
    limits: Limits | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    name: str = "tiny",
) -> Iterator[Served]:
    """Serve a model by a name on a free port until the end of the block."""
    service = Service(
        open_model, name=name, limits=limits, api_key=api_key, cors_origins=cors_origins
    )
    service.open()
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=service.run, args=([listener],))
    thread.start()
    try:
        wait_for(lambda: service.started)
        yield Served(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        service.stop()
        service.stop()
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def fresh_lm() -> LanguageModel:
    """Return a tiny model that no other thread uses."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(tiny_llama(), tokenizer, name="tiny")


def tiny_store(path: Path, documents: int = 5) -> Path:
    build(path, fresh_lm(), distinct_documents(documents), window=64, context=16)
    return path


def opening(path: Path, **parameters: Any) -> KNNLM:
    """Open a store made by `tiny_store`."""
    return KNNLM(fresh_lm(), Datastore(path), **(PARAMETERS | parameters))
