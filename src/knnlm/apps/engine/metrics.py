"""Every counter, gauge and histogram of a server, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of one server; any thread may change them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "knnlm_requests",
            "Requests answered, by route and HTTP status (499: the client left).",
            ["route", "status"],
            registry=self._registry,
        )
        self.latency = Histogram(
            "knnlm_request_seconds",
            "From a request's arrival to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "knnlm_first_token_seconds",
            "From a completion's arrival to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.prompt_tokens = self._count("prompt_tokens", "Tokens of prompts read.")
        self.generated_tokens = self._count("generated_tokens", "Tokens generated.")
        self.drafted_tokens = self._count("drafted_tokens", "Tokens of drafts read.")
        self.accepted_tokens = self._count("accepted_tokens", "Tokens of drafts that were right.")
        self.model_seconds = Counter(
            "knnlm_model_seconds", "Spent in the language model.", registry=self._registry
        )
        self.search_seconds = Counter(
            "knnlm_search_seconds", "Spent in search for neighbors.", registry=self._registry
        )
        self.partial_searches = Counter(
            "knnlm_partial_searches",
            "Searches that left out entries, because a part of a cluster was late.",
            registry=self._registry,
        )
        self.coverage = Gauge(
            "knnlm_coverage",
            "Share of the entries that the last search looked at.",
            registry=self._registry,
        )
        self.coverage.set(1.0)
        self.failures = Counter(
            "knnlm_failures", "Completions that failed in the server.", registry=self._registry
        )
        self.reopening_failures = Counter(
            "knnlm_reopening_failures",
            "Attempts to open a datastore that had changed which failed.",
            registry=self._registry,
        )
        self.waiting = Gauge(
            "knnlm_waiting", "Completions waiting for a place.", registry=self._registry
        )
        self.running = Gauge(
            "knnlm_running", "Completions being generated.", registry=self._registry
        )

    def _count(self, name: str, described: str) -> Counter:
        return Counter(f"knnlm_{name}", described, registry=self._registry)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
