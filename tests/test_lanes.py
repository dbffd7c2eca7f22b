"""Lanes: a job that fits a registered worker waits where that worker looks, and nowhere else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.lanes import BASE_EDGES, MOST_ODD_EDGES, Edges, answer_limit, drained_by, lane
from worker.protocol import ModelKind, ServedModel

LENGTHS = st.one_of(st.integers(1, 40), st.integers(1, 4000), st.integers(1, 300_000))
WORKERS = st.lists(
    st.builds(
        ServedModel,
        id=st.sampled_from(["a", "b/with/slashes"]),
        kind=st.sampled_from(ModelKind),
        context_length=LENGTHS,
        max_tokens=st.one_of(st.just(0), LENGTHS),
    ),
    min_size=1,
    max_size=6,
)


def fits(worker: ServedModel, prompt_tokens: int, max_tokens: int) -> bool:
    within = prompt_tokens + max_tokens <= worker.context_length
    return within and max_tokens <= answer_limit(worker)


@settings(max_examples=400)
@given(WORKERS, LENGTHS, st.integers(0, 5000))
def test_a_job_is_in_a_lane_of_every_worker_it_fits_and_of_no_other(
    workers: list[ServedModel], prompt_tokens: int, max_tokens: int
):
    edges = Edges().with_limits(workers)
    for model in {(w.kind, w.id) for w in workers}:
        waits_in = lane(
            edges,
            kind=model[0],
            model=model[1],
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
        )
        for worker in workers:
            same = (worker.kind, worker.id) == model
            drains = waits_in in drained_by(edges, [worker])
            assert drains == (same and fits(worker, prompt_tokens, max_tokens)), (worker, waits_in)


@settings(max_examples=200)
@given(WORKERS, WORKERS, LENGTHS, st.integers(0, 5000))
def test_new_edges_put_no_job_where_a_worker_looks_that_it_does_not_fit(
    before: list[ServedModel], after: list[ServedModel], prompt_tokens: int, max_tokens: int
):
    """Until it is moved, a job stands in the lane that older edges gave it: that may cost it a
    worker for a moment, but never bring it to one that it does not fit."""
    old = Edges().with_limits(before)
    new = old.with_limits(after)
    model = before[0]
    stands_in = lane(
        old, kind=model.kind, model=model.id, prompt_tokens=prompt_tokens, max_tokens=max_tokens
    )
    for worker in [*before, *after]:
        if stands_in in drained_by(new, [worker]):
            assert fits(worker, prompt_tokens, max_tokens)
    for worker in before:
        assert (stands_in in drained_by(new, [worker])) >= (stands_in in drained_by(old, [worker]))


def test_a_short_context_elsewhere_does_not_strand_a_job_that_fits_a_long_one():
    short = ServedModel(id="m", context_length=1500, max_tokens=256)
    long = ServedModel(id="m", context_length=4096, max_tokens=4096)
    edges = Edges().with_limits([short, long])
    waits_in = lane(edges, kind=ModelKind.TEXT, model="m", prompt_tokens=200, max_tokens=1200)
    assert waits_in in drained_by(edges, [long])
    assert waits_in not in drained_by(edges, [short])


def test_an_embedding_job_of_the_same_name_waits_in_another_lane():
    text = ServedModel(id="m", kind=ModelKind.TEXT, context_length=512)
    vector = ServedModel(id="m", kind=ModelKind.EMBEDDING, context_length=512)
    edges = Edges().with_limits([text, vector])
    waits_in = lane(edges, kind=ModelKind.EMBEDDING, model="m", prompt_tokens=3, max_tokens=0)
    assert waits_in in drained_by(edges, [vector])
    assert waits_in not in drained_by(edges, [text])


def test_a_worker_that_names_no_longest_answer_may_fill_its_context():
    assert answer_limit(ServedModel(id="m", context_length=700)) == 700
    assert answer_limit(ServedModel(id="m", context_length=700, max_tokens=9)) == 9


def test_lanes_stay_few_for_one_worker():
    """Each lane is a probe of every claim."""
    worker = ServedModel(id="m", context_length=131_072, max_tokens=8192)
    assert len(drained_by(Edges().with_limits([worker]), [worker])) <= 36


def test_there_is_room_for_round_limits_and_for_so_many_others():
    """Anybody may register, with as many limits as there are numbers: lanes are edges times edges."""
    edges = Edges()
    for limit in range(1101, 1201):
        edges = edges.with_limits([ServedModel(id="m", context_length=limit, max_tokens=limit)])
    assert len(edges.context) == len(edges.answer) == len(BASE_EDGES) + MOST_ODD_EDGES
    round_one = ServedModel(id="m", context_length=4096, max_tokens=0)
    assert 4096 in edges.with_limits([round_one]).context


def test_a_worker_whose_limit_is_no_edge_gets_jobs_that_fit():
    odd = ServedModel(id="m", context_length=1777, max_tokens=1777)
    many = [ServedModel(id="m", context_length=limit) for limit in range(1101, 1201)]
    edges = Edges().with_limits([*many, odd])
    assert 1777 not in edges.context
    drained = drained_by(edges, [odd])
    for prompt_tokens, at_all in ((500, True), (1000, True), (1776, False)):
        waits_in = lane(
            edges, kind=ModelKind.TEXT, model="m", prompt_tokens=prompt_tokens, max_tokens=1
        )
        assert (waits_in in drained) == at_all
