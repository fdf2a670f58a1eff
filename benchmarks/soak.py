"""A server under load, beside a writer that changes its datastore without pause.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --clients 64 --minutes 10

A tiny random model is served by `knnlm serve`. Clients ask for completions, streams, scores,
explanations, analyses and passages; some ask for too much, and some leave before their answer. One
client asks for a single token, again and again. Meanwhile a process appends documents, forgets
them, compacts, builds indexes and tunes. An answer is stale if it names a document that was
forgotten before its request was sent. Memory is that of the server's process, measured as often
throughout. With one thread of tensor work each, the three processes leave each other a core.
"""

import argparse
import http.client
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import knnlm
from knnlm.datastore.datastore import Datastore
from knnlm.index.policy import build_index
from knnlm.knn_lm import KNNLM
from knnlm.maintenance import build, compact
from knnlm.model.language_model import LanguageModel
from knnlm.provenance import write_results
from knnlm.text.documents import Document

RESULTS = Path(__file__).parent / "results" / "soak.json"
PROSE = (
    "The nearest neighbors of a hidden state are the places where the model has felt like this "
    "before. What followed there is a guess at what follows here. "
)
DOCUMENTS = 30
MOST_DOCUMENTS = 60
FORGOTTEN = "forgotten.txt"  # a name and the time on every line
STOP = "stop"
HEADERS = {"Content-Type": "application/json"}
TIMEOUT = 600.0  # seconds: that of OpenAI's client
MEMORY_SAMPLES = 10


def save_model(folder: Path) -> None:
    """Save a random model of 2 layers, and a tokenizer of bytes and a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE], trainer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def made_document(number: int) -> Document:
    """Return a document that no other is like."""
    chosen = random.Random(number)
    words = PROSE.split()
    text = " ".join(chosen.choice(words) for _ in range(60))
    return Document(f"d{number}", f"{number} {number * number} {text}")


def write(folder: Path) -> None:
    """Change the datastore until the file `stop` is there; print how often each change was made."""
    torch.set_num_threads(1)
    chosen = random.Random(0)
    lm = LanguageModel.load(folder / "model")
    store = Datastore(folder / "store")
    made: Counter[str] = Counter()
    number = DOCUMENTS
    while not (folder / STOP).exists():
        names = [document.name for document in store.documents()]
        change = chosen.choice(["append", "forget", "forget", "compact", "index", "tune"])
        if change == "append" and len(names) < MOST_DOCUMENTS:
            build(store.path, lm, [made_document(number + extra) for extra in range(4)])
            number += 4
        elif change == "forget" and len(names) > DOCUMENTS // 2:
            gone = chosen.sample(names, 2)
            store.forget(gone)
            with (folder / FORGOTTEN).open("a") as file:
                file.writelines(f"{name} {time.monotonic()}\n" for name in gone)
        elif change == "compact":
            compact(store)
        elif change == "index":
            build_index(store, chosen.choice(["ivf", "auto", "compressed"]), k=16)
        elif change == "tune":
            text = [Document("held", PROSE * 4)]
            knnlm.tune(KNNLM(lm, store), text, max_k=16).save([store], ["held"])
        else:
            continue
        made[change] += 1
        store.refresh()
    print(json.dumps(made))


class Load:
    """The clients of one server, and what became of their requests."""

    def __init__(self, port: int, folder: Path, seconds: float) -> None:
        self._port = port
        self._folder = folder
        self._stop = time.monotonic() + seconds
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stale: list[str] = []
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def forgotten(self) -> set[str]:
        """Return the documents that have been forgotten by now."""
        with suppress(FileNotFoundError):
            lines = (self._folder / FORGOTTEN).read_text().splitlines()
            return {line.split()[0] for line in lines}
        return set()

    def ask(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        """Return the status and the body of an answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)) as client:
            content = None if body is None else json.dumps(body).encode()
            client.request("GET" if body is None else "POST", path, content, HEADERS)
            answer = client.getresponse()
            return answer.status, answer.read().decode()

    def leave(self, path: str, body: dict[str, Any], after: float) -> None:
        """Send a request and leave before its answer."""
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self._port)) as client:
            client.sendall(head.encode() + content)
            time.sleep(after)

    def run(self, seed: int) -> None:
        """Be one client until the end."""
        chosen = random.Random(seed)
        while time.monotonic() < self._stop:
            kind = chosen.choice(list(KINDS))
            path, body, wanted = KINDS[kind](chosen)
            forgotten = self.forgotten()
            started = time.monotonic()
            try:
                if wanted is None:
                    assert body is not None
                    self.leave(path, body, chosen.random() * 0.3)
                    self._note(kind)
                    continue
                status, text = self.ask(path, body)
                self._note_time(kind, started)
            except (OSError, http.client.HTTPException) as error:
                self._note(kind, failure=f"{error!r}")
                continue
            named = set(re.findall(r'"document": ?"(d\d+)"|"name": ?"(d\d+)"', text))
            stale = {one or other for one, other in named} & forgotten
            failed = status != wanted or ('"error"' in text and wanted == 200)
            failed = failed or (kind == "health" and '"ok"' not in text)
            failure = f"{status} {text[:300]}" if failed else ""
            self._note(kind, failure=failure, stale=" ".join(sorted(stale)))

    def probe(self) -> None:
        """Ask for single tokens until the end."""
        while time.monotonic() < self._stop:
            started = time.monotonic()
            status, text = self.ask("/v1/completions", {"prompt": "The", "max_tokens": 1})
            self._note_time("probe", started)
            self._note("probe", failure="" if status == 200 else f"{status} {text[:300]}")
            time.sleep(0.2)

    def _note_time(self, kind: str, started: float) -> None:
        with self._lock:
            self.seconds[kind].append(time.monotonic() - started)

    def _note(self, kind: str, *, failure: str = "", stale: str = "") -> None:
        with self._lock:
            self.requests[kind] += 1
            if failure:
                self.failures.append(f"{kind}: {failure}")
            if stale:
                self.stale.append(f"{kind}: {stale}")


def _prompt(chosen: random.Random) -> str:
    return PROSE[chosen.randrange(100) :][: chosen.randrange(1, 120)]


def _completion(chosen: random.Random) -> tuple[str, dict[str, Any], int]:
    body = {"prompt": _prompt(chosen), "max_tokens": chosen.randrange(1, 60), "sources": 4}
    sampling: dict[str, Any] = {
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "logit_bias": {"32": -1},
    }
    own = chosen.choice([{}, {"lmbda": 0.5}, {"k": 3, "knn_temperature": 40.0}, sampling])
    return "/v1/completions", body | own | {"stream": chosen.random() < 0.5}, 200


KINDS: dict[str, Any] = {
    "completion": _completion,
    "score": lambda chosen: (
        "/v1/completions",
        {"prompt": _prompt(chosen), "max_tokens": 1, "echo": True, "logprobs": 2},
        200,
    ),
    "explain": lambda chosen: ("/v1/explain", {"text": "x" + _prompt(chosen)}, 200),
    "analysis": lambda chosen: ("/explorer/analysis", {"text": "x" + _prompt(chosen)}, 200),
    "datastores": lambda chosen: ("/explorer/datastores", None, 200),
    "health": lambda chosen: ("/health", None, 200),
    "long": lambda chosen: (
        "/v1/completions",
        {"prompt": PROSE * 8, "max_tokens": 200, "temperature": 1, "seed": chosen.randrange(99)},
        200,
    ),
    "refused": lambda chosen: (
        "/v1/completions",
        {"prompt": chosen.choice(["a", "The nearest ", "1 2"]) * 80_000},
        400,
    ),
    "refused explanation": lambda chosen: (
        "/v1/explain",
        {"text": PROSE * 8, "sources": 64, "before": 1024, "after": 1024},
        400,
    ),
    "abandoned": lambda chosen: (
        "/v1/completions",
        {"prompt": PROSE * 6, "max_tokens": 400, "n": 2, "stream": chosen.random() < 0.5},
        None,
    ),
    "abandoned explanation": lambda chosen: (
        "/v1/explain",
        {"text": PROSE * 8, "sources": 16},
        None,
    ),
}
"""A path, a body (None: GET), and the status of the answer (None: the client leaves)."""


def resident_bytes(process: int) -> int:
    """Return the memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"VmRSS:\s*(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def soak(folder: Path, clients: int, seconds: float, with_writer: bool) -> dict[str, Any]:
    """Serve and ask for some time; return what happened."""
    save_model(folder / "model")
    lm = LanguageModel.load(folder / "model")
    documents = [made_document(number) for number in range(DOCUMENTS)]
    build(folder / "store", lm, documents, window=128, context=32)
    command = [sys.executable, "-m", "knnlm", "serve", str(folder / "store"), "--port", "0"]
    log = (folder / "server.log").open("w+")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    writer = None
    try:
        assert server.stdout is not None
        found = re.search(r":(\d+)/v1", server.stdout.readline())
        assert found, (folder / "server.log").read_text()
        warm_up = min(30.0, seconds / 4)
        load = Load(int(found[1]), folder, seconds + warm_up)
        if with_writer:
            writing = [sys.executable, __file__, "--write", str(folder)]
            writer = subprocess.Popen(writing, stdout=subprocess.PIPE, stderr=log, text=True)
        threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(clients)]
        threads.append(threading.Thread(target=load.probe))
        for thread in threads:
            thread.start()
        time.sleep(warm_up)  # until every kind of request was answered
        memory = [resident_bytes(server.pid)]
        for _ in range(MEMORY_SAMPLES):
            time.sleep(seconds / MEMORY_SAMPLES)
            memory.append(resident_bytes(server.pid))
        for thread in threads:
            thread.join()
        status, health = load.ask("/health", None)
        (folder / STOP).touch()
        changes = json.loads(writer.communicate(timeout=120)[0]) if writer else {}
    finally:
        for process in (server, writer):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(60)
    log.seek(0)
    return {
        "clients": clients,
        "minutes": round((seconds + warm_up) / 60, 2),
        "requests": dict(sorted(load.requests.items())),
        "failed": len(load.failures),
        "failures": load.failures[:20],
        "stale": len(load.stale),
        "stale_answers": load.stale[:20],
        "slowest_seconds": {kind: round(max(all_), 3) for kind, all_ in load.seconds.items()},
        "memory_bytes": memory,
        "changes": changes,
        "writer_status": writer.returncode if writer else None,
        "health": json.loads(health) | {"http_status": status},
        "server_status": server.returncode,
        "server_log": log.read()[-2000:],
    }


def main() -> None:
    """Run for as long as asked, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--no-writer", action="store_true", help="leave the datastore as it is")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write(options.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = 60 * options.minutes
        results = soak(Path(folder), options.clients, seconds, not options.no_writer)
    write_results(options.results, results)
    print(json.dumps(results, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
