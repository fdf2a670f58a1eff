"""A client's connections to actors that listen: over the network of this machine, without Ray."""

import socket
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch
from index_contract import clustered, store_of
from numpy.typing import NDArray
from serving import wait_for

from knnlm.datastore.datastore import Datastore
from knnlm.errors import ClusterError, InvalidArgumentError
from knnlm.index.cluster.links import Arrived, Links
from knnlm.index.cluster.merging import merge_shares
from knnlm.index.cluster.messages import GREETING, SECRET_BYTES, Answer, Request, Scored
from knnlm.index.cluster.searcher import ShareSearcher
from knnlm.index.cluster.server import Endpoint, ShareServer
from knnlm.index.cluster.states import State, state_of
from knnlm.index.policy import build_index, open_index
from knnlm.index.share import Share

K = 30
QUERIES = clustered(5, seed=1).numpy()
HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    path = tmp_path_factory.mktemp("links") / "store"
    build_index(store_of(path, clustered(1000).half()), "ivf", k=K)
    return Datastore(path)


@pytest.fixture
def server(store: Datastore) -> Iterator[ShareServer]:
    server = ShareServer(ShareSearcher(store.path, Share(0, 1)), HERE)
    yield server
    server.close()


@pytest.fixture
def links(server: ShareServer) -> Links:
    return Links({(0, 0): lambda: server.endpoint})


def is_asked(
    links: Links, state: State, queries: NDArray[np.float32] = QUERIES, seconds: float = 30.0
) -> bool:
    """Ask the only actor; False while there is no connection."""
    try:
        links.ask((0, 0), state, queries, K, seconds)
    except ConnectionError:
        return False
    return True


def arrivals(links: Links) -> list[Arrived]:
    """Wait until something has arrived."""
    arrived: list[Arrived] = []

    def has_arrived() -> bool:
        arrived.extend(links.wait(1.0))
        return bool(arrived)

    wait_for(has_arrived)
    return arrived


def ask(links: Links, state: State, queries: NDArray[np.float32] = QUERIES) -> Answer | Exception:
    """Ask, and wait for what comes of it."""
    wait_for(lambda: is_asked(links, state, queries))
    [(place, answer)] = arrivals(links)
    assert place == (0, 0)
    return answer


def test_an_answer_is_the_searchs_own_bits(links: Links, store: Datastore) -> None:
    for queries in (QUERIES, QUERIES[:1], QUERIES[:0], clustered(60, seed=2).numpy()):
        answer = ask(links, state_of(store), queries)
        expected = open_index(store).search(torch.from_numpy(queries), K)
        assert isinstance(answer, Answer)
        assert (answer.state, answer.entries, answer.error) == (state_of(store), 1000, None)
        assert answer.found is not None
        merged = merge_shares([answer.found], K, 1.0)
        assert torch.equal(merged.squared_distances, expected.squared_distances)
        assert torch.equal(merged.rows, expected.rows)


def test_another_state_is_not_searched(links: Links, store: Datastore) -> None:
    answer = ask(links, State(7, "ab" * 32))
    assert isinstance(answer, Answer)
    assert (answer.state, answer.found, answer.error) == (state_of(store), None, None)


def test_an_error_arrives_as_what_it_is(
    links: Links, store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ask(links, state_of(store), QUERIES[:, :3])
    assert isinstance(answer, Answer)
    assert isinstance(answer.error, InvalidArgumentError)
    assert "dimension 24, got 3" in str(answer.error)
    monkeypatch.setattr(ShareSearcher, "opened", lambda *_: 1 / 0)
    answer = ask(links, state_of(store))
    assert isinstance(answer, Answer)
    assert isinstance(answer.error, ClusterError)
    assert "ZeroDivisionError: division by zero" in str(answer.error)


def test_what_nobody_waits_for_is_not_searched(
    links: Links, server: ShareServer, store: Datastore
) -> None:
    ask(links, state_of(store))
    assert is_asked(links, state_of(store), seconds=0.0)
    links.forget()
    assert isinstance(ask(links, state_of(store), QUERIES[:1]), Answer)
    assert server.searches == 2


def test_a_late_answer_is_not_taken_for_the_next(links: Links, store: Datastore) -> None:
    ask(links, state_of(store))
    assert is_asked(links, state_of(store))
    links.forget()
    answer = ask(links, state_of(store), QUERIES[:1])
    assert isinstance(answer, Answer)
    assert isinstance(answer.found, Scored)
    assert len(answer.found.counts) == 1


def test_a_broken_connection_is_told_and_opened_again(
    server: ShareServer, store: Datastore
) -> None:
    with socket.create_server((HERE, 0)) as dying:
        dead = Endpoint(HERE, dying.getsockname()[1], b"")
        finds: list[Endpoint | None] = [dead, None, server.endpoint]

        def find() -> Endpoint:
            found = finds.pop(0)
            if found is None:
                raise ConnectionRefusedError("it is not back yet")
            return found

        links = Links({(0, 0): find})
        client, _ = dying.accept()
        wait_for(lambda: is_asked(links, state_of(store)))
        client.close()
    [(place, error)] = arrivals(links)
    assert (place, type(error)) == ((0, 0), ConnectionError)
    answer = ask(links, state_of(store))
    assert isinstance(answer, Answer)
    assert answer.found is not None
    assert not finds


def test_strangers_are_not_heard(server: ShareServer, store: Datastore) -> None:
    far_too_many = np.broadcast_to(np.float32(0.0), (1 << 24, 24))
    for secret, queries in ((b"x" * SECRET_BYTES, QUERIES), (server.endpoint.secret, far_too_many)):
        with socket.create_connection((HERE, server.endpoint.port), 30.0) as stranger:
            request = Request(1, 30.0, state_of(store), queries, K)
            with suppress(ConnectionError):
                stranger.sendall(GREETING + secret + request.header)
                assert stranger.recv(1) == b""
    assert server.searches == 0
