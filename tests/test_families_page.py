"""The table of model families: some lines are tried again, and none is missing."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
SAMPLE = [
    "llama",
    "gpt2",
    "mamba",
    "bart",
    "bert",
    "roberta",
    "openai-gpt",
    "rwkv",
    "recurrent_gemma",
    "llama4_text",
    "cpmant",
    "modernbert-decoder",
    "gemma3_text",
    "jamba",
    "longcat_flash",
    "moshi",
]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = ROOT / "docs" / "generate_families.py"
    spec = importlib.util.spec_from_file_location("generate_families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", [*SAMPLE, "llama, LongRoPE", "phi3, LongRoPE"])
def test_a_family_is_in_the_state_that_the_page_says(
    generator: ModuleType, family: str, tmp_path: Path
) -> None:
    row = generator.try_family(family, generator.tiny_model(family), tmp_path)
    assert row.render() in PAGE.splitlines(), "docs/families.md is out of date"


def test_the_page_has_every_family_of_the_installed_version(generator: ModuleType) -> None:
    assert f"of transformers {transformers.__version__} makes" in PAGE
    listed = re.findall(r"^\| ([^|`]+) \|", PAGE, re.M)[1:]
    untried = PAGE.rstrip(".\n").rpartition(": ")[2].split(", ")
    named = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *generator.VARIANTS}
    assert sorted([*listed, *untried]) == sorted(named)


def test_what_is_wrong_has_a_remark() -> None:
    for line in PAGE.splitlines():
        if "| wrong |" in line or "| fails |" in line:
            assert not line.endswith("|  |"), line
