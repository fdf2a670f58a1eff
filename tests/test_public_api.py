"""The front door: the public names, the errors, the version."""

import builtins
import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import knnlm
from knnlm import errors
from knnlm.errors import KNNLMError, MissingDependencyError, missing_dependency

PUBLIC = [
    "ActorReport",
    "Advance",
    "ArrayFormat",
    "Attachment",
    "AttachmentError",
    "Boundary",
    "CacheParameters",
    "Changes",
    "ClusterError",
    "Compaction",
    "Coverage",
    "Credit",
    "Datastore",
    "DatastoreChangedError",
    "DatastoreCorruptError",
    "DatastoreLockedError",
    "DatastoreMismatchError",
    "DatastoreNotFoundError",
    "DatastoreWriteError",
    "Document",
    "Documents",
    "Explanation",
    "Explanations",
    "Exported",
    "Fit",
    "FoundPassage",
    "FrequencyBucket",
    "Generation",
    "Index",
    "IndexKind",
    "InvalidArgumentError",
    "InvalidTextError",
    "KNNLM",
    "KNNLMError",
    "Key",
    "KeyDtype",
    "LanguageModel",
    "Measure",
    "MissingDependencyError",
    "ModelDtype",
    "ModelNotFoundError",
    "Neighbors",
    "NonFiniteKeysError",
    "Overlap",
    "Parameters",
    "Passage",
    "PerplexityReport",
    "Progress",
    "Proof",
    "Retriever",
    "Searches",
    "Seconds",
    "Settings",
    "Similarity",
    "Source",
    "StoredCluster",
    "StoredDocument",
    "StoredSample",
    "Sweep",
    "TextFormat",
    "TextNotFoundError",
    "Trial",
    "TunedMixture",
    "Tuning",
    "UnsupportedModelError",
    "Verification",
    "Vote",
    "Weights",
    "Windowing",
    "WorkerError",
    "attach",
    "build",
    "build_index",
    "cluster_status",
    "compact",
    "explain",
    "export_datastore",
    "import_datastore",
    "keep_index",
    "keep_tuned",
    "open_index",
    "prove_import",
    "read_documents",
    "start_cluster",
    "stop_cluster",
    "sum_credits",
    "tune",
    "verify",
]
ERRORS = {
    name: error
    for name, error in vars(errors).items()
    if inspect.isclass(error) and issubclass(error, BaseException)
}


def test_the_public_names_are_these() -> None:
    assert sorted(knnlm.__all__) == PUBLIC
    assert set(dir(knnlm)) == {*PUBLIC, "__version__"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_load_and_are_documented(name: str) -> None:
    thing = getattr(knnlm, name)
    assert thing.__name__ == name
    assert thing.__module__.startswith("knnlm.")
    documentation = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    # a dataclass without a docstring is given its signature for one
    assert documentation
    assert not documentation.startswith(f"{name}(")
    assert getattr(knnlm, name) is thing


@pytest.mark.parametrize("name", ["unknown", "torch", "_private", "Catalog"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'knnlm' has no attribute '{name}'"):
        getattr(knnlm, name)


def test_the_version_is_the_packages() -> None:
    assert knnlm.__version__ == importlib.metadata.version("knnlm")


def test_the_error_tree() -> None:
    assert KNNLMError.__bases__ == (Exception,)
    assert len(ERRORS) > 10


@pytest.mark.parametrize("name", sorted(set(ERRORS) - {"KNNLMError"}))
def test_every_error_is_ours_and_a_builtin(name: str) -> None:
    error = ERRORS[name]
    first, second = error.__bases__
    assert first is KNNLMError
    assert getattr(builtins, second.__name__) is second
    assert second not in (Exception, BaseException)
    assert name.endswith("Error")
    assert error.__doc__
    raised = error("one line")
    assert isinstance(raised, KNNLMError)
    assert str(raised) == "one line"


def test_a_missing_dependency_tells_the_remedy() -> None:
    error = missing_dependency("datasets", "reading hf: datasets", "data")
    assert isinstance(error, MissingDependencyError)
    assert isinstance(error, ImportError)
    assert str(error) == (
        "reading hf: datasets needs the package datasets: pip install 'knnlm[data]' "
        "(from a clone: pip install '.[data]')"
    )


def test_a_wrong_type_is_one_clear_line() -> None:
    """In a process of its own, where no argument is type-checked before it arrives."""
    program = """if True:
        import knnlm
        for call in [
            lambda: knnlm.build_index(5),
            lambda: knnlm.open_index(5),
            lambda: knnlm.keep_index(5),
            lambda: knnlm.compact(5),
            lambda: knnlm.verify(5),
            lambda: knnlm.tune(5, []),
            lambda: knnlm.explain("docs.store", "text"),
        ]:
            try:
                call()
            except knnlm.InvalidArgumentError as error:
                print(error)
    """
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *of_stores, of_model = answer.stdout.splitlines()
    assert len(of_stores) == 6
    assert set(of_stores) == {
        "store must be a datastore, its folder's path, or a sequence of these where several are "
        "possible, got 5 (int)"
    }
    assert of_model == (
        "model must be a KNNLM, got 'docs.store' (str): make one with KNNLM(model, store)"
    )
