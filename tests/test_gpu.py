"""The whole job on a GPU gives what it gives on the CPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, documents_of, tiny_llama

import knnlm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def test_build_search_evaluate_and_generate(tmp_path: Path, llama_lm: knnlm.LanguageModel) -> None:
    on_gpu = knnlm.LanguageModel(tiny_llama().to("cuda"), byte_tokenizer(), name="tiny")
    documents, held_out = documents_of(6), [knnlm.Document("h", "The nearest memory of a key.")]
    arguments = {"window": 64, "context": 16, "key_dtype": "float32"}
    theirs = knnlm.build(tmp_path / "cpu", llama_lm, documents, **arguments)  # type: ignore[arg-type]
    ours = knnlm.build(tmp_path / "gpu", on_gpu, documents, **arguments)  # type: ignore[arg-type]
    rows = torch.arange(theirs.rows)
    torch.testing.assert_close(ours.keys_at(rows), theirs.keys_at(rows), atol=1e-3, rtol=1e-3)
    assert torch.equal(ours.values, theirs.values)

    cpu, gpu = knnlm.KNNLM(llama_lm, theirs, k=32), knnlm.KNNLM(on_gpu, ours, k=32)
    expected, found = cpu.perplexity(held_out), gpu.perplexity(held_out)
    assert found.lm.perplexity == pytest.approx(expected.lm.perplexity, rel=1e-3)
    assert found.knn.perplexity == pytest.approx(expected.knn.perplexity, rel=1e-3)
    tokens = torch.tensor([[0, 5, 6, 7]])
    assert gpu.log_probs(tokens).device.type == "cuda"
    assert len(gpu.generate("The nearest", max_new_tokens=8).tokens) <= 8
